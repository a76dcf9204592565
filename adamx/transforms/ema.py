"""Exponential moving average of the updates: Momentum's m, Adam's first moment.

    mu_t = decay * mu_{t-1} + (1 - decay) * u_t,    mu_0 = 0

It is computed as mu_{t-1} + (1 - decay) * (u_t - mu_{t-1}): in float32 the factors decay and
1 - decay, each rounded, do not sum to one (0.999 and 0.001 are 1.3e-8 over), and an average whose
gain is not one is off by 1.3e-5 for ever. With two products in place of (u - mu), opposite numbers
near the largest one do not overflow. (A float32 that creeps up on a constant stops where its steps
fall below half a ULP, 3e-5 short at 0.999, in any form; gradients that vary do not meet this.)

For the first 1 / (1 - decay) steps the average leans towards zero; `bias_correction` undoes that.

Source: Kingma & Ba (2015), Algorithm 1, https://arxiv.org/abs/1412.6980
"""

from __future__ import annotations

from typing import Any

import jax
from jax.typing import DTypeLike

from adamx.core.arithmetic import zeros
from adamx.core.checks import DECAY, Scalar, check
from adamx.core.lifting import Slots
from adamx.core.step import Step
from adamx.core.transformation import Transformation


class ema(Transformation):
    """Replace the updates by their exponential moving average.

    Attributes:
        decay: weight of the past, in [0, 1); 0 makes this the identity.
        dtype: what the average is kept in, rounded to nearest; None means float32, or wider where
            the parameter is.
        name: the slot that keeps the average: shaped like the parameter, in the unit of the
            incoming updates.

    Raises:
        ValueError: if `decay` is a number outside [0, 1), or a 16-bit array.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = ema(0.75)
        >>> updates, state = tx.update(jnp.array([4.0, -8.0]), tx.init(jnp.zeros(2)))
        >>> updates, state["mu"]
        (Array([ 1., -2.], dtype=float32), Array([ 1., -2.], dtype=float32))
    """

    decay: Scalar
    dtype: DTypeLike | None = None
    name: str = "mu"

    def __post_init__(self) -> None:
        check(self, decay=DECAY)

    def slots(self, param: jax.Array) -> Slots:
        return {self.name: zeros(param, self.dtype)}

    def prepare(self, step: Step) -> Any:
        return 1 - self.decay  # in the precision in which decay was given

    def accumulate(self, u: jax.Array, slots: Slots, step: Step) -> Slots:
        mu, weight = slots[self.name], step.scalars
        return {self.name: mu + (weight * u - weight * mu)}

    def emit(self, u: jax.Array, slots: Slots, step: Step) -> jax.Array:
        return slots[self.name]
