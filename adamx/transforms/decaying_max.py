"""Decaying maximum of the magnitudes: AdaMax's infinity norm.

    nu_t = max(decay * nu_{t-1}, |u_t| + eps),    nu_0 = 0

It is the limit, for p to infinity, of an average of |u|^p taken to the power 1 / p. It needs no
bias correction: it starts with the first magnitude. The paper has no eps; Optax and PyTorch add it
to the magnitude, which keeps the maximum above 0. For complex numbers |u| is the magnitude, as in
Optax; PyTorch treats the real and the imaginary part as two parameters.

Source: Kingma & Ba (2015), Algorithm 2, https://arxiv.org/abs/1412.6980
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from adamx.core.arithmetic import compute_dtype, real_dtype
from adamx.core.checks import Decay, NonNegative
from adamx.core.concept import Slots
from adamx.core.schedules import scheduled
from adamx.core.step import LeafStep, Step
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, abs_, call, last
from adamx.formula.symbols import Symbols


class decaying_max(Transformation):
    """Replace the updates by the decaying maximum of their magnitudes.

    Attributes:
        decay: weight of the past, in [0, 1): a number, array or schedule. It multiplies the old
            maximum.
        eps: added to each magnitude, >= 0, in the unit of the gradients.
        name: the slot that keeps the maximum: real, float32 or wider, shaped like the parameter,
            in the unit of the incoming updates.

    Raises:
        ValueError: if `decay` is a number outside [0, 1), `eps` is negative, or one of them is a
            16-bit array.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = decaying_max(0.5)
        >>> _, state = tx.update(jnp.array([4.0, -8.0]), tx.init(jnp.zeros(2)))
        >>> tx.update(jnp.array([1.0, -5.0]), state)[0]
        Array([2., 5.], dtype=float32)
    """

    decay: Decay
    eps: NonNegative = 0.0
    name: str = "nu_inf"

    def slots(self, param: jax.Array) -> Slots:
        return {self.name: jnp.zeros_like(param, real_dtype(compute_dtype(param.dtype)))}

    def scalars(self, step: Step) -> Any:
        return scheduled(self, "decay", step.count)

    def accumulate(self, u: jax.Array, slots: Slots, step: LeafStep) -> Slots:
        return {self.name: jnp.maximum(step.scalars * slots[self.name], jnp.abs(u) + self.eps)}

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        return slots[self.name]

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        b, v = symbols.number("b", self.decay), symbols.slot(self.name)
        magnitude = abs_(u) + symbols.number("eps", self.eps)
        return symbols.define(v, call("max", b * last(v), magnitude), 0)
