"""Leaves chosen by their path: "encoder/layer_0/bias".

A pattern is a string with `*`, `?` and `[...]` as in file names, where `*` matches any characters,
even `/`; or a compiled regular expression. Either has to match the whole path.

Flax puts arrays into boxes, objects with the one attribute `value`, and takes them out again: it
calls `init` with `Variable`s and `update` with arrays. A box is not part of a path.
"""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.tree_util import GetAttrKey

from adamx.formula.values import function_name

Pattern = str | re.Pattern[str]
"""Chooses leaves by their path."""

Predicate = Callable[[str, Any], Any]
"""Chooses leaves by their path and the leaf itself, an array or its shape."""


def check_pattern(function: str, pattern: Any, predicates: bool = False) -> None:
    """Raise TypeError unless the pattern is one or, with `predicates`, a function."""
    if not isinstance(pattern, str | re.Pattern) and not (predicates and callable(pattern)):
        more = ", or a function of path and leaf" if predicates else ""
        raise TypeError(
            f"{function}: a pattern must be a string such as '*/bias' or a compiled regular "
            f"expression{more}, got {pattern!r}"
        )
    if callable(pattern):
        check_callable(function, "a pattern that is a function", pattern, "path", "leaf")


def check_callable(function: str, what: str, given: Any, *arguments: str) -> None:
    """Raise TypeError where a function cannot be called with these arguments."""
    try:
        inspect.signature(given).bind(*arguments)
    except TypeError as error:
        raise TypeError(
            f"{function}: {what} is called as f({', '.join(arguments)}), and {text(given)} is not "
            f"such a function: {error}"
        ) from None
    except ValueError:  # of C: its arguments are not known
        return


def text(pattern: Pattern | Predicate) -> str:
    """Return a pattern as it was written, or a predicate's name."""
    if isinstance(pattern, re.Pattern):
        return pattern.pattern
    return function_name(pattern) if callable(pattern) else pattern


def matches(pattern: Pattern | Predicate, path: str, leaf: Any = None) -> bool:
    """Say whether a pattern matches a whole path, or a predicate is true of a leaf.

    Example:
        >>> matches("*/bias", "dense/0/bias"), matches("*/bias", "bias"), matches("*bias", "bias")
        (True, False, True)
        >>> matches(re.compile(r"dense/[0-3]/.*"), "dense/4/bias")
        False
    """
    if isinstance(pattern, str):
        return fnmatch.fnmatchcase(path, pattern)
    if callable(pattern):
        return leaf is not None and bool(pattern(path, leaf))
    return pattern.fullmatch(path) is not None


def paths_of(tree: Any) -> list[str]:
    """Return the paths of a tree's leaves, including None leaves.

    Raises:
        ValueError: if two leaves have one path.

    Example:
        >>> paths_of({"dense": [{"bias": 0.0, "kernel": None}]})
        ['dense/0/bias', 'dense/0/kernel']
    """
    paths = flatten(tree)[0]
    check_distinct(paths)
    return paths


def flatten(tree: Any) -> tuple[list[str], list[Any], Any]:
    """Return the paths of a tree's leaves, the leaves, and the treedef; None counts as a leaf.

    Example:
        >>> flatten({"dense": [{"bias": 0.0, "kernel": None}]})[:2]
        (['dense/0/bias', 'dense/0/kernel'], [0.0, None])
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
    keys = [path for path, _ in flat]
    if any(path[-1:] == _BOX for path in keys):  # with other attributes it is not a box
        below = collections.Counter(path[:depth] for path in keys for depth in range(len(path)))
        keys = [p[:-1] if p[-1:] == _BOX and below[p[:-1]] == 1 else p for p in keys]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in keys]
    return names, [leaf for _, leaf in flat], treedef


_BOX = (GetAttrKey("value"),)


def with_path_of(path: tuple[Any, ...], leaves: Mapping[tuple[Any, ...], Any]) -> Any:
    """Return the leaf whose path ends the path of a slot, as its parameter's does, or None.

    Args:
        path: JAX's keys: the slot's name, and then the path of its parameter.
        leaves: by their paths, of JAX's keys as well.
    """
    ends = (path[start:] for start in range(1, len(path) + 1))
    return next((leaves[end] for end in ends if end in leaves), None)


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by their paths; None is left out.

    Example:
        >>> leaves_by_path({"dense": [1.0, None, 2.0]})
        {'dense/0': 1.0, 'dense/2': 2.0}
    """
    paths, leaves, _ = flatten(tree)
    check_distinct(paths)
    return {path: x for path, x in zip(paths, leaves, strict=True) if x is not None}


def at(name: str, path: str, there: Mapping[str, Any]) -> str:
    """Return a leaf's path in the state: the slot's name alone if the parameters are one array.

    Args:
        name: the slot's name.
        path: the leaf's path in the parameters.
        there: the state's leaves, by path.
    """
    return place if (place := f"{name}/{path}") in there else name


def check_distinct(paths: Sequence[str]) -> None:
    """Raise ValueError where two leaves have one path, as in {"a/b": x, "a": {"b": y}}."""
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(
            f"adamx: two leaves have the path {twice!r}, so that no mask, pattern or saved state "
            "can tell them apart: rename a key that contains '/'"
        )


def check_all_used(function: str, patterns: Sequence[Pattern | Predicate], tree: Any) -> None:
    """Raise ValueError where a pattern matches no leaf of a tree that has leaves."""
    paths, leaves, _ = flatten(tree)
    check_distinct(paths)
    for pattern in patterns if paths else ():
        if callable(pattern) and any(leaf is None for leaf in leaves):
            continue  # it may be true of a leaf whose gradient is None
        if not any(map(functools.partial(matches, pattern), paths, leaves)):
            some = ", ".join(map(repr, paths[:6])) + (", ..." if len(paths) > 6 else "")
            said = f"{function}: the pattern {text(pattern)!r} matches no leaf: it has to match "
            said += "the whole path, where * matches any characters; "
            if callable(pattern):
                said = f"{function}: the predicate {text(pattern)!r} is true of no leaf: "
            raise ValueError(f"{said}the paths are {some}")


def settled(pattern: Pattern | Predicate, tree: Any) -> Pattern | Predicate:
    """Return a pattern as it is, and for a predicate the one that knows its leaves of a tree.

    Example:
        >>> found = settled(lambda path, leaf: leaf > 1, {"w": 1.0, "v": 2.0})
        >>> matches(found, "w", 5.0), matches(found, "v", 0.0), text(found)
        (False, True, '<lambda>')
    """
    if not callable(pattern):
        return pattern
    paths, leaves, _ = flatten(tree)
    pairs = zip(paths, leaves, strict=True)
    return _Settled(text(pattern), frozenset(p for p, leaf in pairs if matches(pattern, p, leaf)))


@dataclasses.dataclass(frozen=True)
class _Settled:
    """A predicate that is true of these paths, and has the name of another."""

    name: str
    paths: frozenset[str]

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, path: str, leaf: Any) -> bool:
        del leaf
        return path in self.paths


def all_but(*patterns: Pattern) -> Callable[[Any], Any]:
    """Return a mask that is True for every leaf that none of the patterns matches.

    Args:
        *patterns: strings such as "*/bias", or compiled regular expressions.

    Returns:
        A function of the parameters that gives a tree of bools, for `mask=` here and in Optax.

    Raises:
        TypeError: if an argument is not a pattern.
        ValueError: when the mask is made, if a pattern matches no leaf.

    Example:
        >>> mask = all_but("*bias", "norm/*")
        >>> mask({"dense": {"kernel": 1.0, "bias": 1.0}, "norm": {"scale": 1.0}})
        {'dense': {'bias': False, 'kernel': True}, 'norm': {'scale': False}}
    """
    for pattern in patterns:
        check_pattern("all_but", pattern)
    return _AllBut(patterns)


@dataclasses.dataclass(frozen=True)
class _AllBut:
    """A function that compares, pickles and prints by its patterns."""

    patterns: tuple[Pattern, ...]

    def __call__(self, tree: Any) -> Any:
        paths = paths_of(tree)
        check_all_used("all_but", self.patterns, tree)
        chosen = [not any(matches(p, path) for p in self.patterns) for path in paths]
        return jax.tree.structure(tree, is_leaf=lambda x: x is None).unflatten(chosen)

    def __repr__(self) -> str:
        return f"all_but({', '.join(map(repr, map(text, self.patterns)))})"
