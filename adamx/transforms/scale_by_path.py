"""Multiply the updates of each leaf by a factor of its own: rates by path, shape and depth.

    u' = c(leaf) u

At the end of a chain it multiplies the learning rate, and with it the decay, of each leaf.
`adamx.layerwise_decay` and `adamx.width_rules` give factors; any mapping or function does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from adamx.core import paths
from adamx.core.checks import ranges_of
from adamx.core.identity import identity
from adamx.core.paths import Pattern, Predicate
from adamx.core.transformation import Transformation
from adamx.transforms.scale import scale

Factors = Mapping[Any, Any] | Callable[[str, Any], Any]
"""The factor of each leaf, by pattern, or as a function of path and leaf."""


class scale_by_path(Transformation):
    """Multiply the updates of each leaf by a factor of its own; keep nothing.

    Attributes:
        factors: a mapping from patterns of paths, or predicates of path and leaf, as in `by_path`,
            to factors, where a path as it is comes first, then the first pattern that matches; a
            leaf without one keeps its updates. Or a function of path and leaf that returns the
            factor. A factor is a finite number, an array that broadcasts to the leaf (inside
            `stacked`: one number for each layer), or a schedule, which sees 0 in the first step.

    Raises:
        TypeError: if `factors` is neither a mapping nor a function of path and leaf, or a pattern
            not one.
        ValueError: if a factor is a number that is NaN or infinite; at `init` and `update`, if a
            pattern matches no leaf.

    Example:
        >>> import adamx, jax.numpy as jnp
        >>> tx = adamx.chain(adamx.sgd(0.5), scale_by_path({"embed": 0.5}))
        >>> grads = {"embed": jnp.array([4.0]), "head": jnp.array([4.0])}
        >>> tx.update(grads, tx.init(grads))[0]
        {'embed': Array([-1.], dtype=float32), 'head': Array([-2.], dtype=float32)}
    """

    patterns: tuple[Pattern | Predicate, ...]
    scales: tuple[scale, ...]
    function: Callable[[str, Any], Any] | None

    def __init__(self, factors: Factors) -> None:
        """Check the factors of a mapping; those of a function are checked when it is called."""
        if not isinstance(factors, Mapping) and not callable(factors):
            raise TypeError(
                "scale_by_path: factors must map patterns to numbers, as {'embed*': 0.1}, or be a "
                f"function of path and leaf, got {factors!r}"
            )
        if not isinstance(factors, Mapping):
            paths.check_callable("scale_by_path", "factors", factors, "path", "leaf")
        by_pattern = factors if isinstance(factors, Mapping) else {}
        for pattern in by_pattern:
            paths.check_pattern("scale_by_path", pattern, predicates=True)
        scales = [_scale(f"factors[{paths.text(p)!r}]", c) for p, c in by_pattern.items()]
        self._set(patterns=tuple(by_pattern), scales=tuple(scales))
        self._set(function=None if isinstance(factors, Mapping) else factors)

    @classmethod
    def check_argument(cls, name: str, value: Any) -> None:
        pass  # `__init__` checks it

    def arguments(self) -> Iterator[tuple[str, Any]]:
        factors = (tx.step_size for tx in self.scales)
        yield "", self.function or dict(zip(self.patterns, factors, strict=True))

    def for_tree(self, tree: Any) -> Transformation:
        """Return the concept that knows each leaf's factor."""
        names, leaves, _ = paths.flatten(tree)
        by_pattern = dict(zip(self.patterns, self.scales, strict=True))
        known = by_pattern.keys() & set(names)
        others = [pattern for pattern in self.patterns if pattern not in known]
        paths.check_all_used("scale_by_path", others, tree)
        found: dict[str, Any] = {name: by_pattern[name] for name in names if name in known}
        for name, leaf in zip(names, leaves, strict=True):
            if self.function and leaf is not None:
                found[name] = _scale(f"the factor of leaf {name!r}", self.function(name, leaf))
            elif name not in found:
                fitting = (by_pattern[p] for p in others if paths.matches(p, name, leaf))
                found[name] = next(fitting, identity())
        return _scaled(tuple(found), tuple(found.values()))


class _scaled(Transformation):
    """Each leaf's own transformation, by its path."""

    names: tuple[str, ...]
    scales: tuple[Transformation, ...]

    @functools.cached_property
    def _by_name(self) -> dict[str, Transformation]:
        return dict(zip(self.names, self.scales, strict=True))

    def for_leaf(self, path: str, leaf: jax.Array) -> Transformation:
        del leaf
        return self._by_name.get(path, identity())


def _scale(what: str, number: Any) -> scale:
    """Return the scaling by a factor, which equals another one by the same."""
    ranges_of(scale)["step_size"].check("scale_by_path", what, number)
    return scale(number)
