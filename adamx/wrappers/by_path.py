"""Groups of parameters, each with an optimizer of its own.

    u'_leaf = (the transformation of the first pattern that matches the leaf's path)(u_leaf)

Each leaf belongs to one group and goes through one kernel. All groups share one state: a slot is
one tree, with None for the leaves of groups that do not have this slot, and a recorded scalar is a
dict by pattern.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import optax

from adamx.core import errors, lifting, paths
from adamx.core.concept import Slots, any_of, disjoint, parts
from adamx.core.foreign import as_concept
from adamx.core.leaves import Leaves
from adamx.core.lifting import BEGAN, State
from adamx.core.paths import Pattern, Predicate
from adamx.core.step import Step
from adamx.core.transformation import Transformation
from adamx.transforms.set_to_zero import set_to_zero

DEFAULT = "default"


class by_path(Transformation):
    """Give each group of parameters a transformation of its own.

    It can be any stage of a top-level chain, or the whole optimizer. A concept that reads the whole
    tree, such as `clip_by_global_norm`, reads only its group's leaves inside `by_path`, and all
    leaves in a stage before it.

    Attributes:
        patterns: the groups' patterns in order: the first match wins. As an argument, `groups` maps
            each pattern (a string such as "*/bias", where * matches any characters, or a compiled
            regular expression; both match the whole path) or predicate (a function of path and
            leaf, such as `lambda path, leaf: leaf.ndim == 2`) to a transformation, to None for
            frozen parameters, which have no state and do not move, or to a dict of settings for the
            function given as `default`.
        transformations: the groups' transformations; the last one is for all other leaves. As an
            argument, `default` is a transformation, None, or a function that makes one, such as
            `functools.partial(adamx.adamw, 1e-3)`.

    Raises:
        TypeError: if a pattern, a group or the default is none of these.
        ValueError: if a group's transformation wraps the whole optimizer; at `init` and `update`,
            if a pattern matches no leaf, or only leaves of the patterns before it.

    Example:
        >>> import adamx, functools, jax.numpy as jnp
        >>> groups = {"embed": None, "*/bias": {"learning_rate": 0.25}}
        >>> tx = by_path(groups, default=functools.partial(adamx.sgd, learning_rate=1.0))
        >>> params = {"embed": jnp.ones(1), "dense": {"bias": jnp.ones(1), "kernel": jnp.ones(1)}}
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> print(updates["embed"], updates["dense"]["bias"], updates["dense"]["kernel"])
        [0.] [-0.25] [-1.]
        >>> {name: float(rate) for name, rate in state["learning_rate"].items()}
        {'*/bias': 0.25, 'default': 1.0}
    """

    patterns: tuple[Pattern | Predicate, ...]
    transformations: tuple[Transformation, ...]

    scoped = True

    def __init__(
        self,
        groups: Mapping[Any, Any],
        *,
        default: optax.GradientTransformation | Callable[..., Any] | None,
    ) -> None:
        """Make the groups' transformations from the arguments."""
        if not isinstance(groups, Mapping):
            raise TypeError(f"by_path: groups must map patterns to groups, got {groups!r}")
        made = [_made(pattern, group, default) for pattern, group in groups.items()]
        self._set(patterns=tuple(groups))
        if len(set(self._labels)) < len(self._labels):
            raise ValueError(
                f"by_path: patterns must differ, and {DEFAULT!r} is the name of all other leaves, "
                f"got {self._labels[:-1]}: '[d]efault' is a pattern for the path 'default'"
            )
        self._set(transformations=(*made, _made(DEFAULT, {}, default)))
        trees = self.tree_names()
        for tx in self.transformations:
            scalars = [name for name in tx.state_names() if name not in tx.tree_names()]
            errors.check_disjoint(trees, scalars)

    def arguments(self) -> Iterator[tuple[str, Any]]:
        yield "", dict(zip(self.patterns, self.transformations, strict=False))
        yield "default", self.transformations[-1]

    any_shapes = True  # each group looks for itself

    @classmethod
    def check_argument(cls, name: str, value: Any) -> None:
        pass  # `_made` checks it

    @property
    def place(self) -> str:  # pyright: ignore
        last = any(any_of(tx, lambda part: part.place == "last") for tx in self.children)
        return "last" if last else "anywhere"

    @property
    def _labels(self) -> tuple[str, ...]:
        return (*map(paths.text, self.patterns), DEFAULT)

    def tree_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(n for tx in self.transformations for n in tx.tree_names()))

    def state_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(n for tx in self.transformations for n in tx.state_names()))

    def for_tree(self, tree: Any) -> Any:
        """Return this with the groups' transformations, and the leaves of each predicate, known."""
        self._check_used(tree)
        patterns = tuple(paths.settled(pattern, tree) for pattern in self.patterns)
        return super().for_tree(tree).with_fields(patterns=patterns)

    def for_leaf(self, path: str, leaf: jax.Array) -> Any:
        return self.transformations[self._number(path, leaf)].for_leaf(path, leaf)

    def beginning(self, path: str, leaf: jax.Array) -> Slots:
        return self.transformations[self._number(path, leaf)].beginning(path, leaf)

    def label(self, path: str, leaf: Any) -> str:
        """Return the pattern of a leaf's group, or "default"."""
        return self._labels[self._number(path, leaf)]

    def init_tree(self, leaves: Leaves) -> State:
        groups = self._groups(leaves)
        entries = [
            disjoint(*(segment.init_tree(group.leaves) for segment in group.tx.segments()))
            for group in groups
        ]
        return _merged(leaves, groups, entries)

    def update_tree(self, leaves: Leaves, step: Step) -> tuple[Leaves, State]:
        groups, entries, began = self._groups(leaves), [], {}
        values, emit = list(leaves.values), list(leaves.emit)
        for group in groups:
            inside = dataclasses.replace(step, state=group.state(leaves, step.state) | began)
            out, own = lifting.run(group.tx, group.leaves, inside)
            if BEGAN in own:  # with the changes of the groups before
                began = {BEGAN: own.pop(BEGAN)}
            for i, u, dtype in zip(group.places, out.values, out.emit, strict=True):
                values[i], emit[i] = u, dtype
            own.pop("count", None)  # one for all groups
            entries.append(own)
        out = dataclasses.replace(leaves, values=values, emit=emit)
        return out, _merged(leaves, groups, entries) | began

    def _check_used(self, tree: Any) -> None:
        """Raise ValueError where a group has no leaf of a tree that has leaves."""
        names, leaves, _ = paths.flatten(tree)
        paths.check_distinct(names)
        used = set(map(self._number, names, leaves))
        if not names or used >= set(range(len(self.patterns))):
            return
        paths.check_all_used("by_path", self.patterns, tree)
        for i, pattern in enumerate(self.patterns):
            if i not in used and not (callable(pattern) and None in leaves):
                raise ValueError(
                    f"by_path: all leaves of {paths.text(pattern)!r} are in the groups of the "
                    f"patterns before it, {[paths.text(p) for p in self.patterns[:i]]}: put it "
                    "before them"
                )

    def _number(self, path: str, leaf: Any) -> int:
        found = (i for i, p in enumerate(self.patterns) if paths.matches(p, path, leaf))
        return next(found, len(self.patterns))

    def _groups(self, leaves: Leaves) -> list[_Group]:
        """Return the groups in the order of their transformations."""
        places: list[list[int]] = [[] for _ in self.transformations]
        for i, (path, leaf) in enumerate(zip(leaves.paths, leaves.whole(), strict=True)):
            places[self._number(path, leaf)].append(i)
        each = zip(self._labels, self.transformations, places, strict=True)
        return [_Group(label, tx, where, _only(leaves, where)) for label, tx, where in each]


@dataclasses.dataclass(frozen=True)
class _Group:
    """One group of a tree: its label, its transformation, its leaves and their places."""

    label: str
    tx: Transformation
    places: list[int]
    leaves: Leaves

    def state(self, everyones: Leaves, state: Mapping[str, Any]) -> State:
        """Return the state as this group sees it: its leaves' slots, and its own scalars."""
        own = {name: errors.entry(state, name) for name in self.tx.state_names()}
        for name, x in own.items():
            if name in self.tx.tree_names():
                column = everyones.column(name, x)
                own[name] = self.leaves.tree([column[i] for i in self.places])
            elif isinstance(x, Mapping):
                own[name] = errors.entry(x, self.label)
            else:
                raise ValueError(
                    f"by_path: state[{name!r}] must be a dict with a value for each group, got "
                    f"{errors.describe(x)}: write state[{name!r}][{self.label!r}], or, if the "
                    "state was made by another composition, adapt_state(tx, params, state, "
                    "saved_by=old_tx) carries it over"
                )
        return {**state, **own}


def _only(leaves: Leaves, places: list[int]) -> Leaves:
    """Return some of the leaves, in a tree with `optax.MaskedNode` in the place of the others.

    So does `optax.multi_transform`: to some Optax methods None is a leaf with another meaning.
    """

    def some(column: list[Any]) -> list[Any]:
        return [column[i] for i in places]

    tree: list[Any] = [optax.MaskedNode()] * len(leaves.paths)
    for i in places:
        tree[i] = 0
    treedef = jax.tree.structure(leaves.tree(tree))
    params = None if leaves.params is None else some(leaves.params)
    lists = some(leaves.paths), some(leaves.values), params, some(leaves.came), some(leaves.emit)
    return Leaves(*lists, treedef, some(leaves.shards))


def _merged(leaves: Leaves, groups: list[_Group], entries: list[State]) -> State:
    """Return one state: each leaf's slots from its group, the scalars by the group's label."""
    scalars: State = {}
    columns: dict[str, list[Any]] = {}
    for group, own in zip(groups, entries, strict=True):
        for name, entry in own.items():
            if name not in group.tx.tree_names():
                scalars.setdefault(name, {})[group.label] = entry
                continue
            column = columns.setdefault(name, [None] * len(leaves.paths))
            for i, x in zip(group.places, group.leaves.treedef.flatten_up_to(entry), strict=True):
                column[i] = x
    return {name: leaves.tree(column) for name, column in columns.items()} | scalars


def _called(default: Callable[..., Any], settings: Mapping[str, Any]) -> Any:
    """Call the default with settings, which also replace positional arguments of a partial."""
    if isinstance(default, functools.partial) and default.args:
        names = [*inspect.signature(default.func).parameters][: len(default.args)]
        if not settings.keys().isdisjoint(names):
            given = dict(zip(names, default.args, strict=True)) | default.keywords
            return default.func(**{**given, **settings})
    return default(**settings)


def _made(pattern: Any, group: Any, default: Any) -> Transformation:
    """Return the transformation of one group."""
    paths.check_pattern("by_path", pattern, predicates=True)
    if isinstance(group, Mapping):
        if group and not callable(default):
            raise TypeError(
                f"by_path: the group {paths.text(pattern)!r} has settings, {dict(group)!r}, so "
                "default must be a function that takes them, such as "
                f"functools.partial(adamx.adamw, 1e-3), got {default!r}"
            )
        group = _called(default, group) if callable(default) else default
    if group is None:
        return set_to_zero()
    if not isinstance(group, optax.GradientTransformation | optax.MultiSteps):
        raise TypeError(
            f"by_path: the group {paths.text(pattern)!r} must be a transformation, a dict of "
            f"settings, or None for frozen, got {group!r}"
        )
    made = as_concept(group, "by_path: a group")
    for part in parts(made):
        if part.place == "outermost":
            raise ValueError(
                f"by_path: {type(part).__name__} wraps the whole optimizer: put it around by_path, "
                f"not into the group {paths.text(pattern)!r}"
            )
    return made
