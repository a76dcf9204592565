"""Stochastic gradient descent, plain or with heavy-ball or Nesterov momentum.

    trace_t = momentum * trace_{t-1} + g_t                                w <- w - lr * trace_t

    sgd = chain(trace(momentum, nesterov), scale_by_learning_rate(lr))

Without momentum the trace is the gradient. With Nesterov momentum the step is along
momentum * trace_t + g_t.
"""

from __future__ import annotations

from jax.typing import DTypeLike

from adamx.core.chain import chain
from adamx.core.checks import Fraction, Rate, checked
from adamx.storage.choice import Moments, stored
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate
from adamx.transforms.trace import trace


@checked
def sgd(
    learning_rate: Rate,
    momentum: Fraction | None = None,
    nesterov: bool = False,
    accumulator_dtype: DTypeLike | None = None,
    *,
    moments: Moments = "float32",
) -> chain:
    """Return stochastic gradient descent; arguments as `optax.sgd`'s.

    Args:
        learning_rate: a number, array or schedule, >= 0.
        momentum: decay of the heavy ball `trace`, in [0, 1]: a number, array or schedule; None
            means no momentum. For the notes' Momentum, an average and not a sum, see
            `adamx.momentum`.
        nesterov: whether to look one step ahead, as Nesterov's method does.
        accumulator_dtype: dtype of the slot, rounded to nearest; None means the parameter's, at
            least float32.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.

    Raises:
        ValueError: if a number is out of its range, or `moments` cannot store the slots.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = sgd(0.5)
        >>> tx.update(jnp.array([2.0]), tx.init(jnp.zeros(1)))[0]
        Array([-1.], dtype=float32)
    """
    if momentum is None:
        if moments != "float32":
            raise ValueError(f"sgd: without momentum there are no moments to keep as {moments!r}")
        return chain(scale_by_learning_rate(learning_rate))
    ball = trace(momentum, nesterov, accumulator_dtype)
    return chain(stored(ball, moments), scale_by_learning_rate(learning_rate))
