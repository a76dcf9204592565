"""Likely mistakes in a composition for some parameters, in sentences; see `summary`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from adamx.core.chain import chain
from adamx.core.concept import any_of, parts
from adamx.core.foreign import named
from adamx.core.transformation import Transformation
from adamx.formula.expressions import REDUCTIONS, Expr
from adamx.inspect.leaf import Leaf, some
from adamx.transforms.add_decayed_weights import add_decayed_weights
from adamx.transforms.scale import scale

LARGE_EPS = 1e-3
"""From here on `summary` warns of eps: gradients of single elements are often smaller."""


def likely_mistakes(tx: Any, leaves: list[Leaf]) -> Iterator[str]:
    """Yield a sentence for each likely mistake.

    Args:
        tx: the adamx or Optax transformation.
        leaves: the parameters, with their formulas.
    """
    yield from _foreign_precision(tx, leaves)
    if isinstance(tx, Transformation):
        yield from _misplaced(tx)
    yield from _undeclared_layers(leaves)
    yield from _decayed_vectors(leaves)
    yield from _large_eps(leaves)


def _foreign_precision(tx: Any, leaves: list[Leaf]) -> Iterator[str]:
    """Warn of 16-bit parameters in a foreign transformation; the `init` of adamx's warns itself."""
    narrow = [leaf for leaf in leaves if jnp.finfo(leaf.param.dtype).bits < 32]
    if narrow and not isinstance(tx, Transformation):
        yield (
            f"{len(narrow)} of the parameters' leaves are {narrow[0].param.dtype}, and an Optax "
            "transformation may lose small steps by rounding: adamx.master_weights(tx) does not"
        )


def _misplaced(tx: Transformation) -> Iterator[str]:
    """Warn of what comes after the learning rate, and of a composition without one."""
    for each in parts(tx):
        rate = None
        for stage in each.stages if isinstance(each, chain) else ():
            name = stage.name if isinstance(stage, named) else type(stage).__name__
            if rate and any_of(stage, lambda x: isinstance(x, add_decayed_weights)):
                yield (
                    f"{name} comes after {rate}, where it adds to the weights what it should take "
                    "from them: put it before"
                )
            elif rate and name.startswith(("clip", "adaptive_clip", "adaptive_grad_clip")):
                yield (
                    f"{name} comes after {rate}, where it clips the step and not the gradient: put "
                    "it first, if that is not meant"
                )
            if any_of(stage, lambda x: x.takes_steps):
                rate = name
    if not any_of(tx, _may_step):
        yield (
            "no stage multiplies by minus a learning rate, so that the updates go up the gradient: "
            "end with adamx.scale_by_learning_rate(...)"
        )


def _may_step(part: Any) -> bool:
    """Say whether a concept may turn the gradient into a step down."""
    size = part.step_size if isinstance(part, scale) else 0.0
    down = not isinstance(size, float) or size < 0
    return part.takes_steps or down or isinstance(part, named)


def _decayed_vectors(leaves: list[Leaf]) -> Iterator[str]:
    """Warn of a weight decay on leaves of rank 0 and 1, if there are others."""
    vectors = [leaf for leaf in leaves if leaf.decayed and leaf.layer.ndim <= 1]
    if vectors and any(leaf.layer.ndim > 1 for leaf in leaves):
        yield (
            f"weight decay acts on {some(vectors)}, of rank 1 or less: biases and the scales of "
            "norms are usually left out, with mask=adamx.all_but(...)"
        )


def _undeclared_layers(leaves: list[Leaf]) -> Iterator[str]:
    """Warn of leaves that look like stacked layers, if the optimizer takes each as one array.

    So look all leaves below one place in the tree if they have the same first size L, and are
    matrices [L, m, n] as well as biases and norms [L, n].
    """
    seen: set[str] = set()
    for place, found in _by_place(leaves).items():
        sizes = {leaf.layer.shape[:1] for leaf in found}
        ranks = {leaf.layer.ndim for leaf in found}
        alike = len(sizes) == 1 and sizes != {(1,)} and min(ranks) == 2 < max(ranks)
        inside = any(f"{place}/".startswith(above) for above in seen)
        if alike and not inside and any(map(_takes_layers_as_one, found)):
            seen.add(f"{place}/" if place else "")
            pattern = f"{place}/*" if place else "*"
            yield (
                f"{some(found)} look like {sizes.pop()[0]} layers stacked along the first axis, "
                f'and this optimizer takes each leaf as one array: adamx.stacked(tx, {{"{pattern}":'
                f" {found[0].stacked + 1}}}) takes each layer as an array"
            )


def _by_place(leaves: list[Leaf]) -> dict[str, list[Leaf]]:
    """Return the leaves below each place in the tree, the root first."""
    found: dict[str, list[Leaf]] = {}
    for depth in range(max((leaf.path.count("/") for leaf in leaves), default=0) + 1):
        for leaf in leaves:
            steps = leaf.path.split("/")
            if depth < len(steps):
                found.setdefault("/".join(steps[:depth]), []).append(leaf)
    return found


def _takes_layers_as_one(leaf: Leaf) -> bool:
    """Say whether a leaf's update would be another one if it were stacked layers."""
    first = (_axes(part.args[2], leaf.layer) for part in leaf.formula.parts() if _of_array(part))
    return any(0 in axes for axes in first) or (leaf.decayed and leaf.layer.ndim == 2)


def _of_array(part: Expr) -> bool:
    return part.op in REDUCTIONS and part.args[1] != "all"


def _axes(function: Callable[[Any], Any] | None, x: jax.ShapeDtypeStruct) -> set[int]:
    """Return the axes of an array that a reduction is over."""
    axes = None if function is None else function(x)
    if axes is None:
        return set(range(x.ndim))
    return {axis % x.ndim for axis in (axes if isinstance(axes, tuple) else (axes,))}


def _large_eps(leaves: list[Leaf]) -> Iterator[str]:
    """Warn of an eps from LARGE_EPS on, of an eps under the root from its square on."""
    values = [(s.args[0].base, x) for leaf in leaves for s, x in leaf.formula.values.items()]
    for base, least in (("eps", LARGE_EPS), ("eps_root", LARGE_EPS**2)):
        for eps in [x for b, x in values if b == base and isinstance(x, float) and x >= least][:1]:
            size = eps if base == "eps" else math.sqrt(eps)
            yield (
                f"{base} = {eps:g}: elements whose gradients stay below {size:g} are divided by "
                "that and not by their own size, so their steps are as small as their gradients"
            )
