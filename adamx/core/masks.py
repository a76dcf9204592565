"""Which leaves a concept acts on: a tree of bools, a function of the parameters, or patterns.

A concept with a field `mask` calls `copied` at construction and `settle` in its `for_tree`. It acts
on the leaves whose mask is True and leaves the others as they are.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import jax

from adamx.core.errors import differences
from adamx.core.identity import identity
from adamx.core.paths import Pattern, check_all_used, check_callable, flatten, matches, paths_of
from adamx.core.transformation import Transformation


def copied(mask: Any) -> Any:
    """Return a copy of a mask that is a tree, since the caller may change it."""
    return mask if _is_function(mask) else jax.tree.map(copy.deepcopy, mask)


def _is_function(mask: Any) -> bool:
    """Say whether a mask has to be called: a module of bools is a tree, though it is callable."""
    return callable(mask) and jax.tree_util.all_leaves([mask])


def settle(concept: Any, tree: Any) -> Transformation:
    """Return the concept with its mask resolved for a tree of parameters.

    Args:
        concept: a concept with a field `mask`: None (all leaves), a tree of bools shaped like the
            parameters or a prefix of them (or in other containers, with the same paths), a function
            that makes one from the parameters, a pattern of paths, or a tuple or list of patterns.
        tree: the parameters.

    Raises:
        ValueError: if the mask does not fit the tree, or a pattern matches none of its leaves.
    """
    name = type(concept).__name__
    if concept.mask is None or not (paths := paths_of(tree)):  # any mask fits a tree without leaves
        return concept
    mask = concept.mask
    if _is_function(mask):
        check_callable(name, "mask", mask, "params")
        mask = mask(tree)
    if mask is None:
        return concept
    patterns = _patterns(mask)
    if patterns is not None:
        check_all_used(name, patterns, tree)
        chosen = {path for path in paths if any(matches(p, path) for p in patterns)}
    else:
        chosen = {path for path, flag in zip(paths, _flags(name, mask, tree), strict=True) if flag}
    return _masked(concept.replace(mask=None), frozenset(chosen))


def _flags(name: str, mask: Any, tree: Any) -> list[Any]:
    """Return the flag of each leaf of a tree, from a mask that is a prefix of it.

    In other containers the mask is matched by path: Flax NNX calls `init` with a State of Variables
    and `update` with a State of arrays, and a mask may be either, or a dict.
    """
    try:
        full = jax.tree.broadcast(mask, tree, is_leaf=lambda x: x is None)
        return jax.tree.leaves(full, is_leaf=lambda x: x is None)
    except ValueError:
        flags = dict(zip(paths_of(mask), flatten(mask)[1], strict=True))
    above = {path: _above(path, flags) for path in paths_of(tree)}
    missing = [path for path, entry in above.items() if entry not in flags]
    extra = sorted(flags.keys() - set(above.values()))
    if missing or extra:
        apart = differences("the parameters' tree", missing, "the mask", extra)
        raise ValueError(
            f"{name}: mask must be a tree of bools that is a prefix of the parameters' tree, such "
            f"as False for no leaf, or patterns of paths{apart}"
        )
    return [flags[entry] for entry in above.values()]


def _above(path: str, flags: dict[str, Any]) -> str:
    """Return the path that has a flag and leads to this one, or this one itself."""
    steps = path.split("/")
    leading = ("/".join(steps[:depth]) for depth in range(len(steps) + 1))
    return next((p for p in leading if p in flags), path)


def _patterns(mask: Any) -> tuple[Pattern, ...] | None:
    """Return a mask's patterns, or None if it is a tree of bools.

    An empty list is the mask of an empty tree, not a list of patterns: False masks no leaf.
    """
    many = mask if isinstance(mask, tuple | list) else (mask,)
    return tuple(many) if many and all(isinstance(p, str | re.Pattern) for p in many) else None


class _masked(Transformation):
    """A concept with its mask resolved: it acts on these paths, `nothing` on the others."""

    concept: Transformation
    paths: frozenset[str]
    nothing: Transformation = identity()

    def for_leaf(self, path: str, leaf: jax.Array) -> Transformation:
        return self.concept if path in self.paths else self.nothing
