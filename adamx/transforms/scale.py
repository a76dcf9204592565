"""Multiply the updates by a number.

    u' = step_size * u

It keeps nothing, and may stand anywhere in a chain.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from adamx.core.checks import FINITE, Scalar, check
from adamx.core.lifting import Slots
from adamx.core.step import Step
from adamx.core.transformation import Transformation


class scale(Transformation):
    """Multiply the updates by a number; keep nothing.

    Attributes:
        step_size: any finite number, or a scalar array.

    Raises:
        ValueError: if `step_size` is a number that is NaN or infinite.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = scale(-0.5)
        >>> tx.update(jnp.array([4.0, -8.0]), tx.init(jnp.zeros(2)))[0]
        Array([-2.,  4.], dtype=float32)
    """

    step_size: Scalar

    def __post_init__(self) -> None:
        check(self, step_size=FINITE)

    def emit(self, u: jax.Array, slots: Slots, step: Step) -> jax.Array:
        return jnp.multiply(self.step_size, u)
