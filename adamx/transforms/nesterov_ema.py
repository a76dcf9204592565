"""Nesterov's look-ahead for a bias-corrected average: NAdam's numerator.

    mu_t = decay * mu_{t-1} + (1 - decay) * u_t
    u'_t = decay * mu_t / (1 - decay^(t+1)) + (1 - decay) * u_t / (1 - decay^t)

The average one step ahead, with today's update standing in for tomorrow's.

Source: Dozat (2016), section 2, with a constant momentum, as Optax's `nesterov=True`,
https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ
"""

from __future__ import annotations

from typing import Any

import jax
from jax.typing import DTypeLike

from adamx.core.arithmetic import average, zeros
from adamx.core.checks import DECAY, Scalar, check
from adamx.core.lifting import Slots
from adamx.core.step import Step
from adamx.core.transformation import Transformation
from adamx.transforms.bias_correction import one_minus_power


class nesterov_ema(Transformation):
    """Replace the updates by their bias-corrected average, one step ahead.

    Attributes:
        decay: weight of the past, in [0, 1).
        dtype: what the average is kept in; None means float32, or wider where the parameter is.
        name: the slot that keeps the average.

    Raises:
        ValueError: if `decay` is a number outside [0, 1), or a 16-bit array.

    Example:
        First step: mu = 2, u' = 0.5 * 2 / 0.75 + 0.5 * 4 / 0.5 = 5.333...

        >>> import jax.numpy as jnp
        >>> tx = nesterov_ema(0.5)
        >>> tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))[0].round(3)
        Array([5.333], dtype=float32)
    """

    decay: Scalar
    dtype: DTypeLike | None = None
    name: str = "mu"

    def __post_init__(self) -> None:
        check(self, decay=DECAY)

    def slots(self, param: jax.Array) -> Slots:
        return {self.name: zeros(param, self.dtype)}

    def prepare(self, step: Step) -> Any:
        ahead = self.decay / one_minus_power(self.decay, step.count.astype(float) + 1)
        today = (1 - self.decay) / one_minus_power(self.decay, step.count)
        return 1 - self.decay, ahead, today

    def accumulate(self, u: jax.Array, slots: Slots, step: Step) -> Slots:
        weight, _, _ = step.scalars
        return {self.name: average(slots[self.name], u, self.decay, weight)}

    def emit(self, u: jax.Array, slots: Slots, step: Step) -> jax.Array:
        _, ahead, today = step.scalars
        return ahead * slots[self.name] + today * u
