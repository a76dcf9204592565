"""Update clipping: a smaller step where the gradient has outgrown its second moment.

    RMS_t = sqrt(mean(|g_t|^2 / max(nu^_t, eps^2))),    nu^_t = nu_t / (1 - decay^t)
    u'_t  = inner(g_t) / max(1, RMS_t)                  the mean over one array

RMS_t is about 1 while gradients keep their size. When they grow faster than the average of squares,
RMS_t exceeds 1, and the step would be too long by that factor. Clipping the output instead,
`chain(inner, clip_by_rms(1.0))`, is different if inner has a momentum, which smooths the very jump
that RMS_t sees.

1 - decay^t is factored out of the mean: a corrected nu that both this and inner divide by would be
written to memory.

Source: Shazeer & Stern (2018), section 6, https://arxiv.org/abs/1804.04235; Wortsman et al. (2023),
Algorithm 2, https://arxiv.org/abs/2304.13013
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from adamx.core.arithmetic import limit_for_squares, root, squared_magnitude
from adamx.core.checks import Decay, NonNegative
from adamx.core.concept import Slots
from adamx.core.norms import reduced_size
from adamx.core.shard import total
from adamx.core.step import LeafStep, Step
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, call, reduced, sqrt
from adamx.formula.symbols import Symbols
from adamx.transforms.bias_correction import weight_in_formula, weight_of_past

CORRECTION = "clipping_correction"


class update_clipping(Transformation):
    """Divide the output of a concept by RMS_t where the gradient exceeds its second moment.

    Attributes:
        inner: the transformation that makes the update and keeps the second moment.
        decay: weight of the past, in [0, 1): a number, array or schedule. It is the decay of the
            second moment, for its bias correction; 0 makes none. With a schedule the
            state has `clipping_correction`: 1 minus the product of the decays.
        eps: the least root of the second moment, >= 0, in the unit of the gradients.
        slot: the slot to read. It holds the second moment, >= 0, such as that of `ema_of_squares`.

    Raises:
        TypeError: if `inner` is not an adamx transformation.
        ValueError: if a number is out of its range; at `update`, if there is no such slot.

    Example:
        Without correction, the second moment is g^2 / 4 in the first step, and RMS is 2:

        >>> import adamx, jax.numpy as jnp
        >>> inner = adamx.rms_scaling(second_moment=adamx.ema_of_squares(0.75), eps=0.0)
        >>> tx = update_clipping(inner, 0.0)
        >>> tx.update(jnp.array([4.0, -8.0]), tx.init(jnp.zeros(2)))[0]
        Array([ 1., -1.], dtype=float32)
    """

    inner: Transformation
    decay: Decay
    eps: NonNegative = 1e-6
    _: dataclasses.KW_ONLY
    slot: str = "nu"

    def scalars(self, step: Step) -> jax.Array:
        return weight_of_past(self, step, CORRECTION)

    def record(self, scalars: Any) -> dict[str, Any]:
        return {CORRECTION: scalars} if callable(self.decay) else {}

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        if self.slot not in slots:
            raise ValueError(
                f"update_clipping: there is no slot {self.slot!r}, only {sorted(slots)}"
            )
        nu, correction = slots[self.slot], step.scalars
        info = jnp.finfo(nu.dtype)
        # never 0, whatever eps is
        least = jnp.maximum(nu, jnp.maximum(correction * self.eps**2, float(info.tiny)))
        g = limit_for_squares(u, step.grad_dtype)
        square = jnp.minimum(squared_magnitude(g), info.max)
        mean = total(square / least, shard=step.shard) / reduced_size(u, shard=step.shard)
        excess = root(correction * mean.reshape(()))
        return self.inner.emit(u, slots, step.child(0)) / jnp.maximum(1, excess)

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        u = symbols.named(u)
        update, v = self.inner.formula(u, symbols), symbols.slot(self.slot)
        v = symbols.hat(v, v / weight_in_formula(self.decay, symbols, CORRECTION))
        least = call("max", v, symbols.number("eps", self.eps) ** 2)
        excess = sqrt(reduced("mean", u**2 / least, "array"))
        return update / call("max", 1, symbols.named(excess, "RMS", array=False))
