"""Leave the updates as they are.

    u' = u

The neutral element of `chain`, and a branch that hands on the gradient itself.
"""

from __future__ import annotations

from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr
from adamx.formula.symbols import Symbols


class identity(Transformation):
    """Leave the updates as they are, without any state.

    Example:
        >>> import jax.numpy as jnp
        >>> identity().update(jnp.array([4.0, -8.0]), identity().init(jnp.zeros(2)))[0]
        Array([ 4., -8.], dtype=float32)
    """

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        return u
