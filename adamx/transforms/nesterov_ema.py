"""Nesterov's look-ahead for a bias-corrected average: NAdam's numerator.

    mu_t = decay * mu_{t-1} + (1 - decay) * u_t
    u'_t = decay * mu_t / (1 - decay^(t+1)) + (1 - decay) * u_t / (1 - decay^t)

This is the average one step ahead, with today's update in place of tomorrow's. With a scheduled
decay, decay_{t+1} multiplies mu_t, and products of decays replace the powers. (PyTorch's NAdam
schedules these factors and not the average: `scheduled_nesterov_ema`.)

Source: Dozat (2016), section 2; with a constant decay as Optax's `nesterov=True`,
https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from adamx.core.arithmetic import average, zeros
from adamx.core.checks import Decay
from adamx.core.concept import Slots
from adamx.core.schedules import scheduled
from adamx.core.step import LeafStep, Step
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, T, following, last
from adamx.formula.symbols import Symbols
from adamx.transforms.bias_correction import one_minus_power, weight_in_formula, weight_of_past


class nesterov_ema(Transformation):
    """Replace the updates by their bias-corrected average, one step ahead.

    Attributes:
        decay: weight of the past, in [0, 1): a number, array or schedule.
        dtype: dtype of the slot, rounded to nearest; None means the parameter's, at least float32.
        name: the slot that keeps the average. With a scheduled decay the state has
            `<name>_correction` too: 1 minus the product of the decays.

    Raises:
        ValueError: if `decay` is a number outside [0, 1), or a 16-bit array.

    Example:
        First step: mu = 2, u' = 0.5 * 2 / 0.75 + 0.5 * 4 / 0.5 = 5.333...

        >>> import jax.numpy as jnp
        >>> tx = nesterov_ema(0.5)
        >>> tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))[0].round(3)
        Array([5.333], dtype=float32)
    """

    decay: Decay
    dtype: DTypeLike | None = None
    name: str = "mu"

    @property
    def _correction(self) -> str:
        return f"{self.name}_correction"

    def slots(self, param: jax.Array) -> Slots:
        return {self.name: zeros(param, self.dtype)}

    def scalars(self, step: Step) -> Any:
        past = weight_of_past(self, step, self._correction)
        if callable(self.decay):
            decay, tomorrow = (
                jnp.asarray(scheduled(self, "decay", count), past.dtype)
                for count in (step.count, step.count + 1)
            )
            beyond = past + (1 - tomorrow) * (1 - past)
        else:
            decay = tomorrow = scheduled(self, "decay", step.count)
            beyond = one_minus_power(decay, step.count.astype(float) + 1)
        return decay, 1 - decay, tomorrow / beyond, (1 - decay) / past, past

    def record(self, scalars: Any) -> dict[str, Any]:
        return {self._correction: scalars[-1]} if callable(self.decay) else {}

    def accumulate(self, u: jax.Array, slots: Slots, step: LeafStep) -> Slots:
        decay, weight, *_ = step.scalars
        return {self.name: average(slots[self.name], u, decay, weight)}

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        _, _, ahead, today, _ = step.scalars
        return ahead * slots[self.name] + today * u

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        u, b, m = symbols.named(u), symbols.number("b", self.decay), symbols.slot(self.name)
        symbols.define(m, b * last(m) + (1 - b) * u, 0)
        past, ahead = weight_in_formula(self.decay, symbols, self._correction), following(b)
        beyond = past + (1 - ahead) * (1 - past) if callable(self.decay) else 1 - b ** (T + 1)
        return ahead * m / beyond + (1 - b) * u / past
