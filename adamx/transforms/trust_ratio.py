"""Scale each array's update to the size of the array's weights: LARS' and LAMB's trust ratio.

    u' = u * trust_coefficient |w| / (|u| + eps),    |.| the norm over one array
    u' = u                                           where |w| = 0 or |u| = 0, or |w| overflows

So one step changes every array by the same fraction of its norm, lr * trust_coefficient, however
large its gradients are. While the weights are zero, the update passes unchanged. LAMB's paper has
phi(|w|) instead of |w|, where phi may bound it; here, as in Optax (`scale_by_trust_ratio`), phi is
the identity.

Source: You et al. (2017), Algorithm 1, https://arxiv.org/abs/1708.03888; You et al. (2020),
Algorithm 2, https://arxiv.org/abs/1904.00962
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from adamx.core.checks import NonNegative
from adamx.core.concept import Slots
from adamx.core.norms import norm
from adamx.core.step import LeafStep
from adamx.core.transformation import Transformation
from adamx.formula.expressions import ZERO, Expr, W, reduced, where
from adamx.formula.symbols import Symbols


class trust_ratio(Transformation):
    """Multiply each array's update by the ratio of the weights' norm to its own; keep nothing.

    Attributes:
        trust_coefficient: ratio of the output's norm to the weights', >= 0; 1 for LAMB, 0.001 for
            LARS.
        eps: added to the update's norm, >= 0, in the unit of the updates.

    Raises:
        ValueError: if an argument is a negative number; at `update`, if it is called without
            params.

    Example:
        The weights' norm is 5, the update's 10; b is still zero:

        >>> import jax.numpy as jnp
        >>> tx = trust_ratio()
        >>> params = {"w": jnp.array([3.0, 4.0]), "b": jnp.zeros(1)}
        >>> grads = {"w": jnp.array([-6.0, 8.0]), "b": jnp.ones(1)}
        >>> tx.update(grads, tx.init(params), params)[0]
        {'b': Array([1.], dtype=float32), 'w': Array([-3.,  4.], dtype=float32)}
    """

    trust_coefficient: NonNegative = 1.0
    eps: NonNegative = 0.0

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        param = step.needs_param(self)
        of_weights, of_update = (norm(x, shard=step.shard).reshape(()) for x in (param, u))
        nothing = (of_weights == 0) | (of_update == 0) | jnp.isinf(of_weights)
        ratio = self.trust_coefficient * of_weights / jnp.where(nothing, 1, of_update + self.eps)
        return u * jnp.where(nothing, 1, ratio)

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        u, c = symbols.named(u), symbols.number("c", self.trust_coefficient)
        of_weights, of_update = (reduced("norm", x, "array") for x in (W, u))
        ratio = c * of_weights / (of_update + symbols.number("delta", self.eps))
        something = Expr(">", (of_weights * of_update, ZERO))
        return symbols.named(where(something, ratio, 1), "r", array=False) * u
