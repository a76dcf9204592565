"""Move only those elements whose update agrees with today's gradient in sign.

    kept_i = (u_i * g_i > 0)
    u'_i   = u_i * n / (sum_j kept_j + xi)    where kept, 0 elsewhere

u is the inner transformation's update for the gradient g, and n the size of the array. The other
elements would go uphill, carried by old gradients; the factor makes up for them. A complex element
is kept if the angle between u and g is less than a right angle.

The paper's listing divides by mean(kept) + eps, the authors' code by max(mean(kept), 1e-3): both
leave a step unchanged if all its elements are kept. The formula above, with xi = 1, multiplies it
by n / (n + 1), which is 1/2 in an array with one element. Where most of a gradient is 0, as in an
embedding, few elements are kept and the factor is large.

Source: Liang et al. (2024), Algorithm 2, https://arxiv.org/abs/2411.16085
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from adamx.core.arithmetic import divide
from adamx.core.checks import NonNegative
from adamx.core.concept import Slots
from adamx.core.norms import count, reduced_size
from adamx.core.step import LeafStep
from adamx.core.transformation import Transformation
from adamx.formula.expressions import ZERO, Expr, reduced, symbol
from adamx.formula.symbols import Symbols


def agreement(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the sign of a * b, 1, 0 or -1; for complex numbers, of the cosine between them.

    Example:
        >>> agreement(jnp.array([1e-30, -2.0, 0.0]), jnp.array([1e-30, 1.0, 1.0]))
        Array([ 1., -1.,  0.], dtype=float32)
    """
    return jnp.sign(jnp.real(jnp.sign(a) * jnp.conj(jnp.sign(b))))


class cautious(Transformation):
    """Keep the elements of the inner update that agree with the incoming one, and enlarge them.

    Attributes:
        inner: the transformation that makes the update, such as `scale_by_adam()`. The learning
            rate and weight decay come after `cautious`.
        xi: added to the number of elements kept, >= 0.

    Raises:
        TypeError: if `inner` is not an adamx transformation.
        ValueError: if `xi` is negative or not finite.

    Example:
        The average still points up in the second element, the gradient down; 3 / (2 + 1) = 1:

        >>> import adamx, jax.numpy as jnp
        >>> tx = cautious(adamx.ema(0.5))
        >>> _, state = tx.update(jnp.array([4.0, 4.0, -4.0]), tx.init(jnp.zeros(3)))
        >>> tx.update(jnp.array([2.0, -1.0, -2.0]), state)[0]
        Array([ 2.,  0., -2.], dtype=float32)
    """

    inner: Transformation
    _: dataclasses.KW_ONLY
    xi: NonNegative = 1.0

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        update = self.inner.emit(u, slots, step.child(0))
        kept = agreement(update, u) > 0
        number = count(kept, u.real.dtype, step.shard)
        size = jnp.full_like(number, reduced_size(u, shard=step.shard))
        factor = divide(size, number + self.xi, least=self.xi)
        return jnp.where(kept, factor * update, 0)

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        g = symbols.named(u)
        update = symbols.named(self.inner.formula(g, symbols))
        kept = symbols.named(Expr(">", (update * g, ZERO)), "kept")
        symbols.remark("n: the number of elements of the array")
        number = reduced("sum", kept, "array") + symbols.number("xi", self.xi)
        return symbol("n") * update * kept / number
