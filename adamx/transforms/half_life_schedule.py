"""A schedule of decays whose half-life grows linearly: AdEMAMix's warm-up of b3.

    1 / log(decay_s) = (1 - s/steps) / log(start) + (s/steps) / log(end),    s < steps
    decay_s = end,                                                           s >= steps

The half-life of an average is log(1/2) / log(decay). A straight line from 0.9 to 0.9999 would leave
the long half-lives to the last few steps; here each gets its share.

Source: Pagliardini, Ablin & Grangier (2024), section 3 and appendix A.1,
https://arxiv.org/abs/2409.03137
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class half_life_schedule:
    """Go from one decay to another so that the half-life grows linearly with the steps.

    Attributes:
        start: the decay at step 0, in (0, 1).
        end: the decay from step number `steps` on, in (0, 1).
        steps: the number of steps from `start` to `end`, >= 1.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        Halfway between the half-lives 1 and 3 is 2, whose decay is the root of 1/2:

        >>> schedule = half_life_schedule(0.5, 0.5 ** (1 / 3), steps=4)
        >>> [round(float(schedule(step)), 4) for step in (0, 2, 4, 5)]
        [0.5, 0.7071, 0.7937, 0.7937]
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"half_life_schedule: {name} must be in (0, 1), got {getattr(self, name)!r}"
                )
        if self.steps < 1:
            raise ValueError(f"half_life_schedule: steps must be >= 1, got {self.steps!r}")

    def __call__(self, step: Any) -> jax.Array:
        """Return the decay of step number `step`, which is 0 at the first."""
        part = jnp.minimum(jnp.asarray(step, float) / self.steps, 1.0)
        first, last = 1 / math.log(self.start), 1 / math.log(self.end)
        return jnp.exp(1 / (first + part * (last - first)))
