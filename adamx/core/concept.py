"""A concept: a filter with memory, written for one array.

    accumulate:  slots_t = f(u_t, slots_{t-1})       take in the incoming update
    emit:        u'_t    = h(u_t, slots_t)           return the outgoing update

The two halves are separate so that a storage can change how slots are *stored* (in 16 bits, say)
without knowing the formula: `emit` computes the update from the slots as they were stored.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamx.core import errors
from adamx.core.arithmetic import compute_dtype, is_inexact, widen
from adamx.core.checks import ranges_of
from adamx.core.step import LeafStep, Step
from adamx.core.value import Value
from adamx.formula.adjustable import adjustable
from adamx.formula.expressions import Expr, call
from adamx.formula.symbols import Symbols

Slots = dict[str, jax.Array]
Scalars = tuple[Any, tuple[Any, ...]]  # a concept's own, and its children's
_FIRST = np.int32(1)  # the step whose scalars are recorded at init


class Concept(Value):
    """What a concept may define for one array; see `adamx.Transformation`.

    Concepts held in fields are its children. Their slots, scalars and variants are handled here,
    so a concept made of concepts defines only `emit` if each child reads the same incoming update,
    and `accumulate` too if one child reads another's output.
    """

    place = "anywhere"  # in a chain; or "last", or "outermost": around the whole optimizer
    scoped = False  # whether each child has entries of its own in the state, as in `by_path`
    takes_steps = False  # whether it turns a chain into an optimizer

    def slots(self, param: jax.Array) -> Slots:
        """Return the start values of the slots, by name, made from one parameter.

        Args:
            param: of any floating or complex dtype; an abstract value under `jax.eval_shape`.
        """
        return disjoint(*(child.slots(param) for child in self.children))

    def slot_names(self) -> tuple[str, ...]:
        """Return the names of all slots that a leaf may have.

        By default `slots` is called once with a scalar's shape, to see the names. Define this too
        if `slots` needs more axes, or if leaves have different slots; a leaf that lacks a slot has
        None in its place.
        """
        return self._slot_names

    def stored_names(self) -> tuple[str, ...]:
        """Return the names of the slots that `accumulate` and `emit` get as stored, not widened."""
        return tuple(name for child in self.children for name in child.stored_names())

    def scalars(self, step: Step) -> Any:
        """Return scalars for `accumulate` and `emit`, in any pytree; called once per step."""
        return None

    def tree_scalars(self, step: Step, leaves: list[jax.Array]) -> Any:
        """Return scalars as `scalars` does, from the updates of the whole tree in compute dtype.

        A concept that defines this starts a new segment of the program, so it must be a stage of a
        top-level chain.
        """
        return self.scalars(step)

    def record(self, scalars: Any) -> dict[str, Any]:
        """Return the scalars that the state records, by name."""
        return {}

    def accumulate(self, u: jax.Array, slots: Slots, step: LeafStep) -> Slots:
        """Return the slots that change.

        Args:
            u: the incoming update in compute dtype.
            slots: all of the leaf's slots in compute dtype, including other concepts' slots.
            step: the step as this leaf sees it.
        """
        new: Slots = {}
        for i, child in enumerate(self.children):
            new |= accumulated(child, u, slots | new, step.child(i))
        return new

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        """Return the outgoing update, from the new slots as they were stored."""
        return u

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        """Return the value of `emit` as an expression, for `summary`; by default `name(u)`.

        Args:
            u: the incoming update.
            symbols: names the hyperparameters, and names and defines the slots.
        """
        return call(type(self).__name__, u)

    def for_tree(self, tree: Any) -> Any:
        """Return this concept with everything resolved that depends on the tree, such as a mask.

        Args:
            tree: the parameters, or the updates if `update` was called without params.
        """
        return self.with_children([hook(child, "for_tree", tree) for child in self.children])

    def for_leaf(self, path: str, leaf: jax.Array) -> Any:
        """Return the variant of this concept for one leaf; most concepts have one for all leaves.

        Args:
            path: such as "dense/kernel".
            leaf: the parameter, or the update if `update` was called without params.
        """
        return self.with_children([hook(child, "for_leaf", path, leaf) for child in self.children])

    def overrides(self, method: str) -> bool:
        """Say whether this concept itself defines an optional method, such as `tree_scalars`."""
        return getattr(type(self), method) is not getattr(Concept, method)

    @functools.cached_property
    def _slot_names(self) -> tuple[str, ...]:
        if not self.overrides("slots"):
            return tuple(name for child in self.children for name in child.slot_names())
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        try:
            return tuple(jax.eval_shape(self.slots, scalar))
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise TypeError(
                f"{type(self).__name__}.slots failed for a parameter of shape [], which it gets to "
                f"learn the names of the slots: {type(error).__name__}: {error}; make it accept "
                "such a parameter, or define slot_names(self), which returns the names"
            ) from error

    @functools.cached_property
    def recorded_names(self) -> tuple[str, ...]:
        """The names of the scalars that this concept and its children record in the state."""
        children = (name for child in self.children for name in child.recorded_names)
        return (*self._own_recorded_names, *children)

    @functools.cached_property
    def _own_recorded_names(self) -> tuple[str, ...]:
        if not self.overrides("record"):
            return ()
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        return tuple(jax.eval_shape(lambda leaf: _first_of_own(self, [leaf], _FIRST), scalar))

    @property
    def measures_norm(self) -> bool:
        """Whether it begins with the norm of the whole tree of updates that come in.

        A guard around it then judges by the same sum of squares (`sum_of_all_squares`), so that
        both share one reading of the gradients. The first child gets the updates that come in.
        """
        return not self.scoped and any(child.measures_norm for child in self.children[:1])

    @property
    def adjustables(self) -> dict[str, adjustable]:
        """The concept's own arguments that are read from the state, by field."""
        fields = ((name, getattr(self, name)) for name in ranges_of(type(self)))
        return {name: value for name, value in fields if isinstance(value, adjustable)}

    @functools.cached_property
    def with_rates_as_arrays(self) -> Any:
        """This concept with arrays in the place of its rates, so that a program serves for all.

        A rate is a number without an upper end that may be a schedule: a learning rate, a weight
        decay, a bound. Decays stay numbers, since 1 - b and log(b) are computed in double precision
        from them, and so do numbers that no schedule may replace, such as eps, and a rate of 0.0,
        with which a concept may have less to do.
        """
        numbers = {
            name: np.asarray(value)
            for name, range_ in ranges_of(type(self)).items()
            if range_.is_rate and isinstance(value := getattr(self, name), float) and value
        }
        inside = self.with_children([child.with_rates_as_arrays for child in self.children])
        return inside.with_fields(**numbers) if numbers else inside

    def adjusted(self, step: Step) -> Any:
        """Return this concept with schedules that give what they have to in this step.

        Those in the place of adjustables give what the state has. For a leaf that began late the
        others give what they give to the leaves that did not, but for those of the leaf's own age
        (`of_age`).
        """
        found = {
            field: functools.partial(_always, held(value, step.state))
            for field, value in self.adjustables.items()
        }
        if (began := step.began) is not None:
            for field in ranges_of(type(self)).keys() - found.keys():
                schedule = getattr(self, field)
                if callable(schedule) and not getattr(schedule, "of_age", False):
                    found[field] = functools.partial(_later, schedule, began)
        return self.with_fields(**found) if found else self

    def beginning(self, path: str, leaf: jax.Array) -> Slots:
        """Return the recorded scalars that a leaf keeps for itself if it begins late, at the start.

        Those that are computed from the whole tree it shares with all leaves.

        Args:
            path: such as "dense/kernel".
            leaf: the parameter.
        """
        own = {} if self.overrides("tree_scalars") else _first_recorded(self, [])
        return disjoint(own, *(child.beginning(path, leaf) for child in self.children))


def accumulated(concept: Concept, u: jax.Array, slots: Slots, step: LeafStep) -> Slots:
    """Return a concept's changed slots; raise unless they are like their start values."""
    new = hook(concept, "accumulate", u, slots, step)
    errors.check_accumulated(type(concept).__name__, slots, new)
    return new


def emitted(concept: Concept, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
    """Return a concept's outgoing update; raise unless it has the incoming one's shape."""
    out = hook(concept, "emit", u, slots, step)
    errors.check_emitted(type(concept).__name__, u, out)
    return out


def hook(concept: Concept, name: str, *args: Any) -> Any:
    """Call a concept's method; turn a failed look-up into a ValueError with class and method."""
    try:
        return getattr(concept, name)(*args)
    except (IndexError, KeyError) as error:
        of_leaf = name in ("accumulate", "emit")
        there = f"; the leaf's slots are {sorted(args[1])}" if of_leaf else ""
        raise ValueError(
            f"{type(concept).__name__}.{name} failed: {type(error).__name__}: {error}{there}"
        ) from error


def scalars_of(
    tx: Concept,
    step: Step,
    leaves: Sequence[jax.Array] | None,
    known: dict[Any, Scalars],
    of_tree: dict[Any, Any],
) -> Scalars:
    """Return the scalars of a concept and its children; the first child may read the tree too.

    Args:
        tx: the concept.
        step: the step.
        leaves: the updates of the whole tree; None for a concept that does not read them.
        known: what has been computed in this step from the same updates: a mask makes several
            variants of a chain, and a norm of the whole tree is measured once for all of them.
        of_tree: the concepts' own scalars that have been read off the tree, for leaves of all ages.
    """
    if tx not in known:
        if leaves is not None and tx.overrides("tree_scalars"):
            if tx not in of_tree:
                wide, run = [widen(u, compute_dtype(u.dtype)) for u in leaves], step.of_run()
                of_tree[tx] = hook(tx.adjusted(run), "tree_scalars", run, wide)
            own = of_tree[tx]
        else:
            own = hook(tx.adjusted(step), "scalars", step)
        children = enumerate(tx.children)
        inner = (scalars_of(x, step, None if i else leaves, known, of_tree) for i, x in children)
        known[tx] = own, tuple(inner)
    return known[tx]


def recorded(tx: Concept, scalars: Scalars) -> Slots:
    """Return the scalars that a concept and its children record in the state."""
    own, inner = scalars
    children = zip(tx.children, inner, strict=True)
    return disjoint(_recorded(tx, own), *(recorded(child, part) for child, part in children))


def first_recorded(tx: Concept, leaves: Sequence[jax.Array]) -> Slots:
    """Return the recorded scalars' initial values; scalars that read the tree start at zero."""
    own = _first_recorded(tx, leaves if tx.overrides("tree_scalars") else [])
    return disjoint(own, *(first_recorded(child, leaves) for child in tx.children))


def _first_recorded(tx: Concept, leaves: Sequence[jax.Array]) -> Slots:
    """Return the initial values of the scalars that a concept itself records."""
    if not tx._own_recorded_names:
        return {}
    scheduled = any(map(callable, tx._held.values()))  # then a few operations: one program
    first = _compiled_first_of_own if scheduled else _first_of_own
    return first(tx, leaves, _FIRST)


def _first_of_own(tx: Concept, leaves: Sequence[jax.Array], count: Any) -> Slots:
    step = Step(count=jnp.asarray(count))
    now = tx.adjusted(step)
    if not tx.overrides("tree_scalars"):
        return _recorded(tx, hook(now, "scalars", step))
    shapes = jax.eval_shape(
        lambda leaves: _recorded(tx, hook(now, "tree_scalars", step, leaves)),
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves],  # whichever shards they are
    )
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


_compiled_first_of_own = jax.jit(_first_of_own, static_argnums=0)


def _recorded(tx: Concept, own: Any) -> Slots:
    """Return the scalars that a concept itself records: floats as float32 or float64 arrays."""
    scalars = {name: jnp.asarray(x) for name, x in hook(tx, "record", own).items()}
    return {
        name: x.astype(jnp.float32) if is_inexact(x) and (x.weak_type or x.itemsize < 4) else x
        for name, x in scalars.items()
    }


def held(value: adjustable, state: Mapping[str, Any]) -> jax.Array:
    """Return what a state has for an adjustable; its first value if the state is empty."""
    if not state:
        return value.first()
    return jnp.asarray(errors.scalar(state, str(value.name))).astype(jnp.float32)


def _always(value: Any, count: Any) -> Any:
    del count
    return value


def _later(schedule: Callable[[Any], Any], began: jax.Array, count: Any) -> Any:
    return schedule(count + began)


def all_adjustables(tx: Concept) -> dict[str, adjustable]:
    """Return what a concept and its children read from the state, by name.

    Raises:
        ValueError: if two have one name and are not the same.
    """
    inside = (all_adjustables(child).values() for child in (() if tx.scoped else tx.children))
    found: dict[str, adjustable] = {}
    for value in itertools.chain(tx.adjustables.values(), *inside):
        first = found.setdefault(str(value.name), value)
        if first is not value:
            raise ValueError(
                f"adamx: two arguments keep {value.name!r} in the state, {value!r} and {first!r}: "
                f"give one of them another name, adjustable({value.value!r}, name=...)"
            )
    return found


def parts(tx: Concept) -> Iterator[Any]:
    """Yield a concept, its children, and theirs."""
    yield tx
    for child in tx.children:
        yield from parts(child)


def any_of(tx: Concept, holds: Callable[[Any], bool]) -> bool:
    """Say whether something holds for a concept or for one of its children."""
    return any(map(holds, parts(tx)))


def disjoint(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Merge dictionaries that must have no name in common, unless for the same adjustable."""
    merged: dict[str, Any] = {}
    for part in parts:
        shared = {n for n, x in part.items() if isinstance(x, adjustable) and merged.get(n) is x}
        errors.check_disjoint(merged, part.keys() - shared)
        merged |= part
    return merged
