"""Optax transformations as stages of a chain.

They act on whole trees, between the kernels. Schedules, clips, partitions and all optimizers
outside the Adam family are left to Optax.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adamx.core import errors
from adamx.core.lifting import Leaves, State
from adamx.core.step import Step
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, call
from adamx.formula.symbols import Symbols
from adamx.formula.values import factory_name


class named(Transformation):
    """Name the entry of the chain's state that holds an Optax transformation's state.

    A stage of `chain` that is not named has the name of the function that made it, so only two
    stages of one kind need this. A transformation without memory has no entry.

    Attributes:
        name: the entry in the state.
        tx: any `optax.GradientTransformation`.

    Raises:
        TypeError: if `tx` is not a transformation.

    Example:
        >>> import adamx, jax.numpy as jnp
        >>> tx = adamx.chain(named("fast", optax.ema(0.5)), named("slow", optax.ema(0.9)))
        >>> sorted(tx.init(jnp.zeros(2)))
        ['count', 'fast', 'slow']
    """

    name: str
    tx: optax.GradientTransformation

    def __post_init__(self) -> None:
        if not isinstance(self.tx, optax.GradientTransformation):
            raise TypeError(f"named: tx must be an Optax or adamx transformation, got {self.tx!r}")

    @classmethod
    def check_argument(cls, name: str, value: Any) -> None:
        pass  # any transformation will do

    @functools.cached_property
    def children(self) -> tuple[Transformation, ...]:
        return ()

    def __repr__(self) -> str:
        return f"{self.name}(...)" if self.name == factory_name(self.tx) else super().__repr__()

    def init_tree(self, leaves: Leaves) -> State:
        state = self.tx.init(leaves.tree(leaves.values))
        return {name: state for name in self.state_names()}

    def update_tree(self, leaves: Leaves, step: Step) -> tuple[Leaves, State]:
        tx = optax.with_extra_args_support(self.tx)
        params = leaves.params_tree()
        updates = leaves.tree(leaves.values)
        fresh = jax.eval_shape(tx.init, updates if params is None else params)
        state = errors.entry(step.state, self.name) if self.state_names() else fresh
        if None not in leaves.values:
            errors.check_foreign(self.name, state, fresh)
        updates, new = tx.update(updates, state, params, **step.extra)
        state = step.select(_as_before(self.name, new, state), state)
        values = leaves.column(self.name, updates)
        values = [None if u is None else step.emitted(u) for u in values]
        return leaves.with_values(values), {name: state for name in self.state_names()}

    def tree_names(self) -> tuple[str, ...]:
        return ()

    def state_names(self) -> tuple[str, ...]:
        """Return the entry's name, or nothing if the transformation has no memory."""
        try:
            state = jax.eval_shape(self.tx.init, jax.ShapeDtypeStruct((), jnp.float32))
        except Exception:  # init needs more than one scalar, so it may have memory
            return (self.name,)
        return (self.name,) if jax.tree.leaves(state) else ()

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        return call(self.name, u)


class narrow(Transformation):
    """Cast the updates to the gradients' dtypes, as an Optax transformation expects them."""

    def update_tree(self, leaves: Leaves, step: Step) -> tuple[Leaves, State]:
        return leaves.narrowed(), {}


def _as_before(name: str, new: Any, old: Any) -> Any:
    """Return a stage's new state in the dtypes that its init chose.

    Inside `accumulate`, and with stochastic rounding, the updates are wider than the gradients.

    Raises:
        ValueError: if the tree has changed: some Optax stages drop their entry for a leaf without
            an update.
    """
    if jax.tree.structure(new) != jax.tree.structure(old):
        raise ValueError(
            f"adamx: the stage {name!r} returned another tree as its state: where a gradient is "
            "None, this Optax stage drops its entry: pass zeros, or leave the leaf out at init too"
        )

    def cast(a: Any, b: Any) -> Any:
        dtype = jnp.result_type(b)
        return a if jnp.result_type(a) == dtype else jnp.asarray(a).astype(dtype)

    return jax.tree.map(cast, new, old)


def as_concept(stage: Any, what: str) -> Transformation:
    """Return the stage itself, or the foreign transformation under its factory's name.

    Args:
        stage: the user's argument.
        what: the names of the function and the argument, for the message.

    Raises:
        TypeError: if it is not a transformation.
    """
    if isinstance(stage, Transformation):
        return stage
    if isinstance(stage, optax.GradientTransformation):
        return named(factory_name(stage), stage)
    hint = ": write it as a call" if callable(stage) else ""
    raise TypeError(f"{what} must be an adamx or Optax transformation, got {stage!r}{hint}")
