"""Which leaves a concept acts on: a tree of bools, a function of the parameters, or patterns.

A concept with a field `mask` calls `copied` at construction and `settle` in its `for_tree`. It acts
on the leaves whose mask is True and leaves the others as they are.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

import jax

from adamx.core.identity import identity
from adamx.core.paths import Pattern, check_all_used, matches, paths_of
from adamx.core.transformation import Transformation


def copied(mask: Any) -> Any:
    """Return a copy of a mask that is a tree, since the caller may change it."""
    return mask if _is_function(mask) else copy.deepcopy(mask)


def _is_function(mask: Any) -> bool:
    """Say whether a mask has to be called: a module of bools is a tree, though it is callable."""
    return callable(mask) and jax.tree_util.all_leaves([mask])


def settle(concept: Any, tree: Any) -> Transformation:
    """Return the concept with its mask resolved for a tree of parameters.

    Args:
        concept: a concept with a field `mask`: None (all leaves), a tree of bools shaped like the
            parameters or a prefix of them, a function that makes one from the parameters, a
            pattern of paths, or a tuple or list of patterns.
        tree: the parameters.

    Raises:
        ValueError: if the mask does not fit the tree, or a pattern matches none of its leaves.
    """
    name = type(concept).__name__
    if concept.mask is None or not (paths := paths_of(tree)):  # any mask fits a tree without leaves
        return concept
    mask = concept.mask(tree) if _is_function(concept.mask) else concept.mask
    if mask is None:
        return concept
    patterns = _patterns(mask)
    if patterns is not None:
        check_all_used(name, patterns, tree)
        chosen = {path for path in paths if any(matches(p, path) for p in patterns)}
    else:
        try:
            full = jax.tree.broadcast(mask, tree, is_leaf=lambda x: x is None)
        except ValueError as error:
            raise ValueError(
                f"{name}: mask must be a tree of bools that is a prefix of the parameters' tree, "
                f"or patterns of paths; False is the mask of no leaf: {error}"
            ) from None
        flags = jax.tree.leaves(full, is_leaf=lambda x: x is None)
        chosen = {path for path, flag in zip(paths, flags, strict=True) if flag}
    return _masked(dataclasses.replace(concept, mask=None), frozenset(chosen))


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
