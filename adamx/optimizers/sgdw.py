"""SGDW: stochastic gradient descent with decoupled weight decay.

    m_t = momentum * m_{t-1} + g_t
    w <- (1 - lr * weight_decay) w - lr * m_t

    sgdw = chain(trace(momentum, nesterov), add_decayed_weights(weight_decay),
                 scale_by_learning_rate(lr))

Without momentum this is SGD with L2 regularisation. With momentum, L2 regularisation, such as
PyTorch's `SGD(weight_decay=...)`, puts weight_decay * w into m_t; this does not. The paper
multiplies g_t by the learning rate before adding it to m_t, which is the same while the rate is
constant. It multiplies weight_decay by the schedule alone: its value is the initial rate times
the value here.

Source: Loshchilov & Hutter (2019), Algorithm 1, https://arxiv.org/abs/1711.05101
"""

from __future__ import annotations

from typing import Any

from adamx.core.chain import chain
from adamx.core.checks import Fraction, Rate, checked
from adamx.storage.choice import Moments, stored
from adamx.transforms.add_decayed_weights import add_decayed_weights
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate
from adamx.transforms.trace import trace


@checked
def sgdw(
    learning_rate: Rate,
    momentum: Fraction | None = None,
    nesterov: bool = False,
    weight_decay: Rate = 1e-4,
    mask: Any = None,
    *,
    moments: Moments = "float32",
) -> chain:
    """Return stochastic gradient descent with decoupled weight decay.

    Args:
        learning_rate: a number, array or schedule, >= 0.
        momentum: decay of the heavy ball `trace`, in [0, 1]: a number, array or schedule; None
            means no momentum.
        nesterov: whether to look one step ahead, as Nesterov's method does.
        weight_decay: a number, array or schedule, >= 0. The weights shrink by
            `learning_rate * weight_decay` a step.
        mask: which leaves decay: a tree of bools, a function of the parameters that returns one, or
            patterns of paths, such as "*/kernel"; None means all.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.

    Raises:
        ValueError: if a number is out of its range, or `moments` cannot store the slots.

    Example:
        >>> import jax.numpy as jnp
        >>> tx, w = sgdw(0.5, momentum=0.9, weight_decay=0.25), jnp.array([2.0])
        >>> tx.update(jnp.array([4.0]), tx.init(w), w)[0]
        Array([-2.25], dtype=float32)
    """
    if momentum is None and moments != "float32":
        raise ValueError(f"sgdw: without momentum there are no moments to keep as {moments!r}")
    return chain(
        *([] if momentum is None else [stored(trace(momentum, nesterov), moments)]),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
