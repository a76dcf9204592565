"""Fan-out: every branch reads the same incoming update, and a function joins their results.

    u' = fn(branch_1(u), branch_2(u), ...)

Adam's two moments read the same gradient, so Adam is such a composition and not a pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax

from adamx.core.concept import Slots
from adamx.core.step import LeafStep
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr
from adamx.formula.symbols import Symbols, applied


class combine(Transformation):
    """Join the results of several branches that read the same update.

    Attributes:
        fn: takes one array per branch, all of the update's shape in compute dtype, and returns one.
            A function defined at a module's top level, or `operator.add`, keeps the transformation
            picklable; JAX's ufuncs, such as `jnp.add`, do not.
        branches: adamx concepts or chains of them that act on one array.

    Raises:
        TypeError: if a branch is not an adamx transformation, or `fn` cannot be called.
        ValueError: if two branches have a slot of the same name, or one reads the whole tree.

    Example:
        The gradient minus its average:

        >>> import jax.numpy as jnp
        >>> from adamx import ema, identity
        >>> tx = combine(jnp.subtract, identity(), ema(0.75))
        >>> tx.update(jnp.array([4.0, -8.0]), tx.init(jnp.zeros(2)))[0]
        Array([ 3., -6.], dtype=float32)
    """

    fn: Callable[..., jax.Array]
    branches: tuple[Transformation, ...]

    def __init__(
        self, fn: Callable[..., jax.Array], *branches: optax.GradientTransformation
    ) -> None:
        if not callable(fn) or isinstance(fn, Transformation):
            raise TypeError(f"combine: fn must be a function of arrays, got {fn!r}")
        for branch in branches:
            if not isinstance(branch, Transformation):
                raise TypeError(
                    f"combine: a branch must be an adamx transformation, got {branch!r}"
                )
        self._set(fn=fn, branches=branches)

    def arguments(self) -> Iterator[tuple[str, Any]]:
        yield from (("", argument) for argument in (self.fn, *self.branches))

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        return self.fn(*(b.emit(u, slots, step.child(i)) for i, b in enumerate(self.branches)))

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        u = symbols.named(u)
        return applied(self.fn, *(branch.formula(u, symbols) for branch in self.branches))
