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
from adamx.core.arithmetic import placed_like
from adamx.core.leaves import Leaves
from adamx.core.lifting import State
from adamx.core.paths import flatten, leaves_by_path, with_path_of
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

    any_shapes = True

    def __post_init__(self) -> None:
        self._set(tx=as_transformation(self.tx, "named: tx"))

    @classmethod
    def check_argument(cls, name: str, value: Any) -> None:
        pass  # any transformation will do

    @functools.cached_property
    def children(self) -> tuple[Transformation, ...]:
        return ()

    def __repr__(self) -> str:
        return f"{self.name}(...)" if self.name == factory_name(self.tx) else super().__repr__()

    def init_tree(self, leaves: Leaves) -> State:
        # a copy, since some states hold the parameters, or a key that the stage holds too
        params = leaves.tree(leaves.values)
        state = jax.tree.map(jnp.copy, self.tx.init(params))
        known = dict(jax.tree_util.tree_flatten_with_path(params)[0])

        def put(path: tuple[Any, ...], x: Any) -> Any:
            param = with_path_of(path, known)
            return x if param is None or not jnp.ndim(x) else placed_like(x, param)

        state = jax.tree_util.tree_map_with_path(put, state)
        return {name: state for name in self.state_names()}

    def update_tree(self, leaves: Leaves, step: Step) -> tuple[Leaves, State]:
        params, updates = leaves.params_tree(), leaves.tree(leaves.values)
        fresh = jax.eval_shape(self.tx.init, updates if params is None else params)
        state = errors.entry(step.state, self.name) if self.state_names() else fresh
        errors.check_foreign_leaves(self.name, state, fresh)
        updates, new = self._updated(leaves, updates, params, state, fresh, step.extra)
        self._check_kept(leaves, state, new)
        if step.taken is not None:
            self._check_selectable(new, state)
        state = step.select(_in_dtypes_of(state, new), state)
        values = self._values(leaves, updates)
        values = [None if u is None else step.emitted(u) for u in values]
        return leaves.with_values(values), {name: state for name in self.state_names()}

    def _updated(
        self, leaves: Leaves, updates: Any, params: Any, state: Any, fresh: Any, extra: Any
    ) -> tuple[Any, Any]:
        """Return what the transformation does; if it raises, say what does not fit, if anything."""
        tx = optax.with_extra_args_support(self.tx)
        try:
            return tx.update(updates, state, params, **extra)
        except (AttributeError, TypeError, ValueError) as error:
            failed = error
        self._check_kept(leaves, state, fresh)
        errors.check_foreign_tree(self.name, state, fresh)
        leaves.check_shapes()
        raise failed

    def _check_kept(self, leaves: Leaves, old: Any, new: Any) -> None:
        """Raise if the state loses an entry in a step where a leaf has no update."""
        if None in leaves.values and leaves_by_path(old).keys() - leaves_by_path(new).keys():
            raise ValueError(
                f"adamx: the stage {self.name!r} returned another tree as its state: where a "
                "gradient is None, this Optax stage drops its entry: pass zeros, or leave the leaf "
                "out at init too"
            )

    def _check_selectable(self, new: Any, old: Any) -> None:
        """Raise if a skipped step could not keep the old state, of another tree or shape."""
        same = jax.tree.structure(new) == jax.tree.structure(old)
        if not same or jax.tree.map(jnp.shape, new) != jax.tree.map(jnp.shape, old):
            raise ValueError(
                f"adamx: the stage {self.name!r} returned a state of another tree than before: "
                "where steps may be skipped, as in skip_nonfinite and accumulate, the first state "
                "must have all entries: that of optax.snapshot has, that of optax.monitor has not"
            )

    def _values(self, leaves: Leaves, updates: Any) -> list[Any]:
        """Return the outgoing updates; raise ValueError if they are another tree."""
        paths, values, treedef = flatten(updates)
        if treedef != leaves.treedef:
            raise ValueError(
                f"adamx: the stage {self.name!r} returned another tree as its updates, with the "
                f"leaves {paths[:4]} for {leaves.paths[:4]}: the updates of all stages have the "
                "parameters' tree, since they are added to the parameters"
            )
        return values

    def tree_names(self) -> tuple[str, ...]:
        return ()

    def state_names(self) -> tuple[str, ...]:
        """Return the entry's name, or nothing if the transformation has no memory."""
        return (self.name,) if self._has_memory else ()

    @functools.cached_property
    def _has_memory(self) -> bool:
        """Whether the first state holds an array, or a later one (as that of `optax.monitor`)."""
        tx, like = optax.with_extra_args_support(self.tx), jax.ShapeDtypeStruct((), jnp.float32)
        try:
            state = jax.eval_shape(tx.init, like)
        except Exception:  # init needs more than one scalar, so it may have memory
            return True
        try:
            later = jax.eval_shape(lambda u, s: tx.update(u, s, u)[1], like, state)
        except Exception:  # it needs more: the first state has to tell
            later = None
        return bool(jax.tree.leaves((state, later)))

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        return call(self.name, u)


class narrow(Transformation):
    """Cast the updates to the gradients' dtypes, as an Optax transformation expects them."""

    any_shapes = True

    def update_tree(self, leaves: Leaves, step: Step) -> tuple[Leaves, State]:
        return leaves.narrowed(), {}


def _in_dtypes_of(old: Any, new: Any) -> Any:
    """Return a stage's new state in the dtypes that its init chose.

    Inside `accumulate`, and with stochastic rounding, the updates are wider than the gradients.
    """
    paths, values, treedef = flatten(new)
    before = leaves_by_path(old)

    def cast(path: str, x: Any) -> Any:
        if x is None or path not in before:
            return x
        dtype = jnp.result_type(before[path])
        return x if jnp.result_type(x) == dtype else jnp.asarray(x).astype(dtype)

    return treedef.unflatten(map(cast, paths, values))


def as_transformation(tx: Any, what: str) -> optax.GradientTransformation:
    """Return a transformation as it is, or that of an `optax.MultiSteps`.

    Args:
        tx: the user's argument.
        what: the names of the function and the argument, for the message.

    Raises:
        TypeError: if it is not a transformation.
    """
    if isinstance(tx, optax.MultiSteps):
        return tx.gradient_transformation()
    if isinstance(tx, optax.GradientTransformation):
        return tx
    hint = ": write it as a call" if callable(tx) else ""
    given = repr(tx) if callable(tx) else errors.describe(tx)
    raise TypeError(f"{what} must be an adamx or Optax transformation, got {given}{hint}")


def as_concept(stage: Any, what: str) -> Transformation:
    """Return an adamx transformation itself, an Optax one under the name of its factory.

    Args:
        stage: the user's argument.
        what: the names of the function and the argument, for the message.

    Raises:
        TypeError: if it is not a transformation.
    """
    tx = as_transformation(stage, what)
    return tx if isinstance(tx, Transformation) else named(factory_name(tx), tx)
