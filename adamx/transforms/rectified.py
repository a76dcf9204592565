"""Rectify a scaling by a young second moment: RAdam's warm-up, without a schedule.

    rho_inf = 2 / (1 - decay) - 1
    rho_t   = rho_inf - 2 * t * decay^t / (1 - decay^t)
    r_t     = sqrt((rho_t - 4) (rho_t - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho_t))
    u'_t    = r_t * scaling(u_t) where rho_t >= threshold and rho_t > 4, else its numerator

rho_t is the number of gradients that the average of squares is worth: 1 in the first step, rho_inf
in the end. While it is small, the root of the average is too noisy to divide by, and the steps
follow the numerator alone. Later r_t, which rises to 1, makes up for the remaining noise.

Computed as written, rho_t is a difference of numbers near rho_inf: in float32, at decay = 0.999,
numbers near 4 are 2e-4 off. With x = -log(decay) and G(z) = 1 + 1/z - coth(z),

    rho_t = 1 - G(x / 2) + t * G(t * x / 2)

is the same without that loss. Only a constant decay has a rho_inf, so schedules are refused.

The paper rectifies where rho_t > 4 (threshold = 4 here), PyTorch where rho_t > 5, Optax where
rho_t >= 5: at decay = 0.999, the paper from the fifth step on, the other two from the sixth.

Source: Liu et al. (2020), Algorithm 2, https://arxiv.org/abs/1908.03265
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from adamx.core.arithmetic import limit_for_squares, widen
from adamx.core.checks import DECAY, NonNegative, Scalar
from adamx.core.concept import Slots
from adamx.core.step import LeafStep, Step
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, T, expr, sqrt, where
from adamx.formula.symbols import Symbols
from adamx.transforms.rms_scaling import rms_scaling

ConstantDecay = Annotated[
    Scalar,
    dataclasses.replace(
        DECAY, constant="r_t compares rho_t with rho_inf, which only a constant decay has"
    ),
]


class rectified(Transformation):
    """Rectify an `rms_scaling`, and skip its division while the second moment is young.

    Attributes:
        scaling: Adam's scaling; the first steps follow its numerator.
        decay: decay of the average of squares in the scaling, in [0, 1): a number or array, no
            schedule.
        threshold: the least rho_t at which to divide by the root, >= 0. 4 or less means rho_t > 4.

    Raises:
        TypeError: if `scaling` is not an `rms_scaling`, or `decay` is a schedule.
        ValueError: if `decay` or `threshold` is a number out of its range, or a 16-bit array.

    Example:
        For a steady gradient the scaling emits its sign; the first five steps follow the gradient:

        >>> import adamx, jax, jax.numpy as jnp
        >>> corrected = adamx.chain(adamx.ema_of_squares(0.999), adamx.bias_correction(0.999))
        >>> tx = rectified(adamx.rms_scaling(second_moment=corrected), decay=0.999)
        >>> g, state, emitted = jnp.array(3.0), tx.init(jnp.zeros(())), []
        >>> for _ in range(8):
        ...     update, state = tx.update(g, state)
        ...     emitted.append(round(float(update), 3))
        >>> emitted
        [3.0, 3.0, 3.0, 3.0, 3.0, 0.026, 0.033, 0.039]
    """

    scaling: rms_scaling
    _: dataclasses.KW_ONLY
    decay: ConstantDecay
    threshold: NonNegative = 5.0

    def __post_init__(self) -> None:
        if not isinstance(self.scaling, rms_scaling):
            raise TypeError(f"rectified: scaling must be an rms_scaling, got {self.scaling!r}")

    def scalars(self, step: Step) -> Any:
        decay, threshold = (widen(x, jnp.result_type(float)) for x in (self.decay, self.threshold))
        length = effective_length(decay, step.count)
        ready = (length >= threshold) & (length > 4)
        rho = jnp.where(ready, length, 5.0)
        limit = jnp.maximum((1 + decay) / (1 - decay), rho)
        factor = jnp.sqrt((rho - 4) / (limit - 4) * ((rho - 2) / (limit - 2)) * (limit / rho))
        return ready, factor

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        ready, factor = step.scalars
        inner = step.child(0)
        scaled = factor * self.scaling.emit(u, slots, inner)
        u = limit_for_squares(u, step.grad_dtype)
        return jnp.where(ready, scaled, self.scaling.numerator.emit(u, slots, inner.child(0)))

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        u = symbols.named(u)
        scaled, b = self.scaling.formula(u, symbols), symbols.number("b", self.decay)
        end = symbols.named(2 / (1 - b) - 1, "rho_inf", array=False, shift=None)
        rho = symbols.named(end - 2 * T * b**T / (1 - b**T), "rho", array=False)
        share = (rho - 4) * (rho - 2) * end / ((end - 4) * (end - 2) * rho)
        if isinstance(self.threshold, float) and self.threshold <= 4:
            ready = Expr(">", (rho, expr(4)))
        else:
            ready = Expr(">=", (rho, symbols.number("threshold", self.threshold)))
        r = symbols.named(sqrt(share), "r", array=False)
        return where(ready, r * scaled, self.scaling.numerator.formula(u, symbols))


def effective_length(decay: Scalar, count: jax.Array) -> jax.Array:
    """Return the number of updates that an average started at 0 is worth: RAdam's rho_t.

    Args:
        decay: weight of the past, in [0, 1): a number, whose logarithm is taken in double
            precision, or an array.
        count: array of whole numbers >= 1.

    Example:
        With decay 1/2, after two steps: 3 - 2 * 2 * (1/4) / (3/4) = 5/3

        >>> [round(float(x), 4) for x in effective_length(0.5, jnp.array([1, 2, 100]))]
        [1.0, 1.6667, 3.0]
    """
    if isinstance(decay, jax.Array | np.ndarray):
        rate = jnp.where(decay > 0, -jnp.log1p(jnp.where(decay > 0, decay, 0.5) - 1), jnp.inf)
        count = count.astype(decay.dtype)
    else:
        rate = jnp.asarray(-math.log(decay) if decay else math.inf, float)
        count = count.astype(float)
    return 1 - _gap(rate / 2) + count * _gap(count * rate / 2)


def _gap(z: jax.Array) -> jax.Array:
    """Return 1 + 1/z - coth(z), for z > 0: by a continued fraction where the poles would cancel."""
    small, large = jnp.minimum(z, 1), jnp.maximum(z, 1)
    fraction = jnp.zeros_like(z)
    for odd in range(19, 1, -2):
        fraction = small / (odd + small * fraction)
    return jnp.where(z < 1, 1 - fraction, 1 / large - 2 / jnp.expm1(2 * large))
