"""Groups of parameters, each with an optimizer of its own.

    u'_leaf = (the transformation of the first pattern that matches the leaf's path)(u_leaf)

Each leaf belongs to one group and goes through one kernel; the state is one: a slot is one tree,
None where a leaf's group does not keep it, and a recorded scalar is a dict by pattern.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import optax

from adamx.core import errors, lifting, paths
from adamx.core.foreign import as_concept
from adamx.core.lifting import Leaves, State
from adamx.core.paths import Pattern
from adamx.core.printing import Verbatim
from adamx.core.step import Step
from adamx.core.transformation import Transformation
from adamx.transforms.set_to_zero import set_to_zero

DEFAULT = "default"


class by_path(Transformation):
    """Give each group of parameters a transformation of its own.

    It stands anywhere in a top-level chain, or is the whole optimizer. What reads the whole tree,
    such as `clip_by_global_norm`, reads the leaves of its group inside, and all in front of it.

    Attributes:
        patterns: what the groups' paths match, in order: the first match wins. As an argument,
            `groups` maps each pattern (a string such as "*/bias", where * stands for any
            characters, or a compiled regular expression; both match the whole path) to a
            transformation, to None for frozen parameters, which keep no state and do not move, or
            to a dict of settings for the function given as `default`.
        transformations: those of the groups; the last one is that of all other leaves. As an
            argument, `default` is a transformation, None, or a function that makes one, such as
            `functools.partial(adamx.adamw, 1e-3)`.

    Raises:
        TypeError: if a pattern, a group or the default is of none of these kinds.
        ValueError: if a group's transformation wraps the whole optimizer; at `init` and `update`,
            if a pattern matches no leaf.

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

    patterns: tuple[Pattern, ...]
    transformations: tuple[Transformation, ...]

    holds_trees = True

    def __init__(
        self,
        groups: Mapping[Pattern, Any],
        *,
        default: optax.GradientTransformation | Callable[..., Any] | None,
    ) -> None:
        """Make the groups' transformations from what was given for them."""
        if not isinstance(groups, Mapping):
            raise TypeError(f"by_path: groups must map patterns to groups, got {groups!r}")
        made = [_made(pattern, group, default) for pattern, group in groups.items()]
        object.__setattr__(self, "patterns", tuple(groups))
        if len(set(self._labels)) < len(self._labels):
            raise ValueError(
                f"by_path: patterns must differ, and {DEFAULT!r} names what no pattern matches, "
                f"got {self._labels[:-1]}: '[d]efault' is a pattern for the path 'default'"
            )
        object.__setattr__(self, "transformations", (*made, _made(DEFAULT, {}, default)))
        trees = self.tree_names()
        for tx in self.transformations:
            scalars = [name for name in tx.state_names() if name not in tx.tree_names()]
            errors.check_disjoint(dict.fromkeys(trees), dict.fromkeys(scalars))

    def arguments(self) -> Iterator[tuple[str, Any]]:
        pairs = zip(self._labels, self.transformations, strict=True)
        lines = "".join(f"{label!r}: {tx!r},\n" for label, tx in pairs if label != DEFAULT)
        yield "", Verbatim("{\n    " + lines.rstrip().replace("\n", "\n    ") + "\n}")
        yield "default", self.transformations[-1]

    @property
    def leafwise(self) -> bool:
        return False

    @property
    def stands_last(self) -> bool:  # pyright: ignore
        return any(lifting.any_of(tx, lambda part: part.stands_last) for tx in self.children)

    @property
    def _labels(self) -> tuple[str, ...]:
        return (*map(paths.text, self.patterns), DEFAULT)

    def tree_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(n for tx in self.transformations for n in tx.tree_names()))

    def state_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(n for tx in self.transformations for n in tx.state_names()))

    def resolve(self, tree: Any) -> Transformation:
        paths.check_all_used("by_path", self.patterns, paths.paths_of(tree))
        return super().resolve(tree)

    def bind(self, path: str, leaf: jax.Array) -> Transformation:
        return self.transformations[self._group(path)].bind(path, leaf)

    def label(self, path: str) -> str:
        """Return the pattern of the group to which a leaf belongs, or "default"."""
        return self._labels[self._group(path)]

    def init_tree(self, leaves: Leaves) -> State:
        entries = []
        for tx, part in self._parts(leaves):
            own = (segment.init_tree(part) for segment in tx.segments())
            entries.append(lifting.disjoint(*own))
        return self._merged(leaves, entries)

    def update_tree(self, leaves: Leaves, step: Step, last: bool) -> tuple[Leaves, State]:
        values, entries = list(leaves.values), []
        for label, (tx, part) in zip(self._labels, self._parts(leaves), strict=True):
            inside = dataclasses.replace(step, state=self._of_group(step.state, label, tx))
            part, own = lifting.run(tx, part, inside, narrow=last)
            values = [a if b is None else b for a, b in zip(values, part.values, strict=True)]
            entries.append(own)
        return dataclasses.replace(leaves, values=values), self._merged(leaves, entries)

    def reveal_tree(self, state: Mapping[str, Any]) -> State:
        names = self.tree_names()
        if not names:
            return {}
        like = errors.entry(state, names[0])
        where, _, treedef = paths.flatten(like)
        leaves = Leaves(where, [True] * len(where), None, [None] * len(where), treedef)
        entries = []
        for label, (tx, part) in zip(self._labels, self._parts(leaves), strict=True):
            own = self._of_group(state, label, tx)
            for name in tx.tree_names():
                column = errors.beside(treedef, name, own[name], leaves.values)
                mine = zip(part.values, column, strict=True)
                own[name] = leaves.tree([None if u is None else x for u, x in mine])
            entries.append(lifting.disjoint(*(s.reveal_tree(own) for s in tx.segments())))
        return self._merged_trees(leaves, entries)

    def _parts(self, leaves: Leaves) -> list[tuple[Transformation, Leaves]]:
        """Return each group's transformation, and its leaves, with None in the place of others."""
        group = [self._group(path) for path in leaves.paths]
        return [
            (tx, dataclasses.replace(leaves, values=_only(number, group, leaves.values)))
            for number, tx in enumerate(self.transformations)
        ]

    def _group(self, path: str) -> int:
        found = (i for i, pattern in enumerate(self.patterns) if paths.matches(pattern, path))
        return next(found, len(self.patterns))

    def _of_group(self, state: Mapping[str, Any], label: str, tx: Transformation) -> State:
        """Return the state as one group sees it: the common trees, and its own scalars."""
        trees = tx.tree_names()
        own = {name: errors.entry(state, name) for name in tx.state_names()}
        by_label = {name: x for name, x in own.items() if name not in trees}
        for name, x in by_label.items():  # one of another composition has no labels
            own[name] = errors.entry(x if isinstance(x, Mapping) else {name: x}, label)
        return {**state, **own}

    def _merged(self, leaves: Leaves, entries: list[State]) -> State:
        """Return one state: each leaf's slots from its group, the scalars by the group's label."""
        scalars: State = {}
        for label, tx, own in zip(self._labels, self.transformations, entries, strict=True):
            for name in [name for name in own if name not in tx.tree_names()]:
                scalars.setdefault(name, {})[label] = own.pop(name)
        return self._merged_trees(leaves, entries) | scalars

    def _merged_trees(self, leaves: Leaves, entries: list[State]) -> State:
        group = [self._group(path) for path in leaves.paths]
        merged: dict[str, list[Any]] = {}
        for number, own in enumerate(entries):
            for name, tree in own.items():
                column = leaves.treedef.flatten_up_to(tree)
                mine = merged.setdefault(name, [None] * len(group))
                merged[name] = [
                    x if g == number else kept
                    for g, x, kept in zip(group, column, mine, strict=True)
                ]
        return {name: leaves.tree(column) for name, column in merged.items()}


def _only(number: int, group: list[int], values: list[Any]) -> list[Any]:
    return [x if g == number else None for g, x in zip(group, values, strict=True)]


def _made(pattern: Any, group: Any, default: Any) -> Transformation:
    """Return the transformation of one group."""
    paths.check_pattern("by_path", pattern)
    if isinstance(group, Mapping):
        if callable(default):
            group = default(**group)
        elif group:
            raise TypeError(
                f"by_path: the group {paths.text(pattern)!r} has settings, {dict(group)!r}, and "
                "default is no function to be called with them: write it as a function, such as "
                f"functools.partial(adamx.adamw, 1e-3), got {default!r}"
            )
        else:
            group = default
    if group is None:
        return set_to_zero()
    if not isinstance(group, optax.GradientTransformation):
        raise TypeError(
            f"by_path: the group {paths.text(pattern)!r} must be a transformation, a dict of "
            f"settings, or None for frozen, got {group!r}"
        )
    made = as_concept(group, "by_path: a group")
    for part in lifting.parts(made):
        if part.stands_alone:
            raise ValueError(
                f"by_path: {type(part).__name__} wraps the whole optimizer: put it around by_path, "
                f"not into the group {paths.text(pattern)!r}"
            )
    return made
