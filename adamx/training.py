"""The two lines around an optimizer: add the updates, and do it in place.

w_t = w_{t-1} + u_t
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import optax
from optax import apply_updates

__all__ = ["apply_updates", "make_step"]


class StepFunction(Protocol):
    """What `make_step` returns."""

    def __call__(self, params: Any, state: Any, grads: Any, **extra: Any) -> tuple[Any, Any]:
        """Return the new (params, state); the old ones are donated."""
        ...

    def lower(self, params: Any, state: Any, grads: Any, **extra: Any) -> jax.stages.Lowered:
        """Lower without running, to look at the compiled program."""
        ...


def make_step(tx: optax.GradientTransformation) -> StepFunction:
    """Return the jitted step `(params, state, grads) -> (params, state)`, which works in place.

    Params and state are donated: their buffers hold the results, so that a step needs no memory
    beyond them, and the arrays that were passed are gone. The order matters: JAX pairs donated
    arguments with outputs first come, first served, by shape and dtype; with the gradients in
    front, or the state before the params, every array would be copied, without a warning.
    Arguments that do not fit raise before anything is donated. A parameter whose gradient is None
    stays as it is.

    Args:
        tx: any adamx or Optax transformation.

    Returns:
        The jitted function; its `lower` shows the compiled program. Keyword arguments go on to
        `tx.update`.

    Raises:
        TypeError: if `tx` is not a transformation.

    Example:
        >>> import adamx, jax.numpy as jnp
        >>> tx = adamx.sgd(0.5)
        >>> params = {"w": jnp.array([1.0, 2.0])}
        >>> step = make_step(tx)
        >>> params, state = step(params, tx.init(params), {"w": jnp.array([2.0, -2.0])})
        >>> params
        {'w': Array([0., 3.], dtype=float32)}
    """
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(f"make_step: tx must be an adamx or Optax transformation, got {tx!r}")
    update = optax.with_extra_args_support(tx).update

    def step(params: Any, state: Any, grads: Any, **extra: Any) -> tuple[Any, Any]:
        updates, state = update(grads, state, params, **extra)
        return jax.tree.map(_apply, updates, params, is_leaf=lambda x: x is None), state

    def _apply(update: Any, param: Any) -> Any:
        return param if update is None else apply_updates(param, update)

    return jax.jit(step, donate_argnames=("params", "state"))
