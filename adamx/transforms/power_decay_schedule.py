"""A schedule of decays that rises to 1 as a power of the step: Adafactor's b2.

    decay_t = 1 - (t - offset)^-exponent,    t = 1 in the first step
    decay_t = 0                              up to t = offset + 1

The first average is the first square itself, so that no correction is needed, and the memory grows
with the steps: with the exponent 1 all squares weigh alike, and with 0.8 old ones weigh less.

Source: Shazeer & Stern (2018), section 7.2, https://arxiv.org/abs/1804.04235
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from adamx.core.checks import as_float
from adamx.core.value import Value


class power_decay_schedule(Value):
    """Let a decay go from 0 to 1, so that the memory grows as a power of the number of steps.

    For a leaf that began late (`reset`), the steps are those since it began.

    Attributes:
        exponent: how fast, >= 0: a number or array. 0 keeps the decay at 0.
        offset: how many steps the decay stays 0 before it rises: a number or array. Where training
            goes on from a state whose `count` is `offset`, the average begins anew.

    Raises:
        ValueError: if `exponent` is a negative number.

    Example:
        >>> schedule = power_decay_schedule(0.5)
        >>> [round(float(schedule(step)), 4) for step in (0, 3, 99)]
        [0.0, 0.5, 0.9]
    """

    exponent: Any = 0.8
    offset: Any = 0.0

    is_part = False
    of_age = True

    def __post_init__(self) -> None:
        self._set(exponent=as_float(self.exponent), offset=as_float(self.offset))
        if isinstance(self.exponent, float) and not self.exponent >= 0:
            raise ValueError(f"power_decay_schedule: exponent must be >= 0, got {self.exponent!r}")

    def __call__(self, step: Any) -> jax.Array:
        """Return the decay of step number `step`, which is 0 at the first."""
        t = jnp.asarray(step, float) + 1 - self.offset
        return -jnp.expm1(-self.exponent * jnp.log(jnp.maximum(t, 1.0)))
