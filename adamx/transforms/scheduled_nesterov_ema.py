"""Nesterov's look-ahead with a momentum that warms up: the numerator of PyTorch's NAdam.

    b_t  = decay * (1 - 0.96^(momentum_decay * t) / 2)
    mu_t = decay * mu_{t-1} + (1 - decay) * u_t
    u'_t = b_{t+1} * mu_t / (1 - b_1 ... b_{t+1}) + (1 - b_t) * u_t / (1 - b_1 ... b_t)

The momentum b_t rises from decay / 2 to decay; with momentum_decay = 0.004 it takes some 20 000
steps. `nesterov_ema` is the same with b_t = decay from the start, as in Optax. In the paper the
average has the weights b_t and 1 - b_t. PyTorch averages with decay, as this concept does: then
1 - b_1 ... b_t is not exactly the bias correction, and enlarges a constant gradient at first.

1 - b_1 ... b_t is computed from t alone, without state, as a sum of positive terms, which do not
cancel. PyTorch accumulates the product, in float32 by default.

Source: Dozat (2016), Algorithm 2, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ, as in
https://docs.pytorch.org/docs/stable/generated/torch.optim.NAdam.html
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from adamx.core.arithmetic import average, widen, zeros
from adamx.core.checks import DECAY, NonNegative, Scalar
from adamx.core.concept import Slots
from adamx.core.step import LeafStep, Step
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, T, expr, last
from adamx.formula.symbols import Symbols
from adamx.transforms.bias_correction import one_minus_power

ConstantDecay = Annotated[
    Scalar,
    dataclasses.replace(
        DECAY,
        constant="momentum_decay is the schedule of the momentum: nesterov_ema takes any other",
    ),
]
_RATE = -math.log(0.96)
_TERMS = 52  # each is less than half the one before, and float64 has 52 bits


def one_minus_product(decay: Scalar, rate: Scalar, t: jax.Array) -> jax.Array:
    """Return 1 - b_1 * ... * b_t with b_i = decay * (1 - q^i / 2) and q = exp(-rate).

    The product is decay^t times the product of 1 - q^i / 2, whose logarithm is minus the sum over k
    of (q^k + q^2k + ... + q^tk) / (k 2^k); each bracket is a geometric sum.

    Args:
        decay: in [0, 1), a float or an array like `t`.
        rate: >= 0, a float or an array like `t`.
        t: floating array of whole numbers >= 1.

    Example:
        >>> print(one_minus_product(0.5, 0.0, jnp.array(2.0)))
        0.9375
    """
    k = jnp.arange(1, 1 + _TERMS, dtype=t.dtype)
    still = rate * k == 0
    below = jnp.where(still, 1, rate * k)
    sums = jnp.where(still, t, jnp.exp(-below) * jnp.expm1(-t * below) / jnp.expm1(-below))
    lost = jnp.sum(sums / (k * 2**k))
    decayed = one_minus_power(decay, t)
    return decayed - (1 - decayed) * jnp.expm1(-lost)


class scheduled_nesterov_ema(Transformation):
    """Replace the updates by their corrected average, one step ahead, with a rising momentum.

    Attributes:
        decay: weight of the past, in [0, 1), and the final momentum: a number or array.
            `momentum_decay` is the schedule; `nesterov_ema` takes any other.
        momentum_decay: how fast the momentum rises, >= 0; 0 keeps it at decay / 2.
        dtype: dtype of the slot, rounded to nearest; None means the parameter's, at least float32.
        name: the slot that keeps the average: shaped like the parameter, in the unit of the
            updates.

    Raises:
        TypeError: if an argument is a schedule.
        ValueError: if `decay` is a number outside [0, 1), `momentum_decay` is negative, or one of
            them is a 16-bit array.

    Example:
        With b_t = 1/4, in the first step: mu = 2, u' = 2/4 / (1 - 1/16) + 4 * 3/4 / (1 - 1/4)

        >>> import jax.numpy as jnp
        >>> tx = scheduled_nesterov_ema(0.5, momentum_decay=0.0)
        >>> tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))[0].round(3)
        Array([4.533], dtype=float32)
    """

    decay: ConstantDecay
    momentum_decay: NonNegative = 4e-3
    dtype: DTypeLike | None = None
    name: str = "mu"

    def slots(self, param: jax.Array) -> Slots:
        return {self.name: zeros(param, self.dtype)}

    def scalars(self, step: Step) -> Any:
        t = step.count.astype(float)
        decay, rate = widen(self.decay, t.dtype), _RATE * widen(self.momentum_decay, t.dtype)
        now, then = (jnp.exp(-rate * s) / 2 for s in (t, t + 1))
        ahead = decay * (1 - then) / one_minus_product(decay, rate, t + 1)
        today = (1 - decay + decay * now) / one_minus_product(decay, rate, t)
        return 1 - self.decay, ahead, today

    def accumulate(self, u: jax.Array, slots: Slots, step: LeafStep) -> Slots:
        weight, _, _ = step.scalars
        return {self.name: average(slots[self.name], u, self.decay, weight)}

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        _, ahead, today = step.scalars
        return ahead * slots[self.name] + today * u

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        u, b, m = symbols.named(u), symbols.number("b", self.decay), symbols.slot(self.name)
        symbols.define(m, b * last(m) + (1 - b) * u, 0)
        rate = symbols.number("psi", self.momentum_decay)
        now, ahead = (b * (1 - expr(0.96) ** (rate * t) / 2) for t in (T, T + 1))
        now = symbols.named(now, "momentum", array=False)
        product = symbols.slot("product", array=False)
        symbols.define(product, now * last(product), 1)
        ahead = symbols.named(ahead, "next", array=False)
        return ahead * m / (1 - ahead * product) + (1 - now) * u / (1 - product)
