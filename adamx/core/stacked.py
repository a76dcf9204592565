"""Layers stacked along leading axes, each an array of its own to the optimizer.

    u'[i] = tx(u[i], w[i], slots[i])        for each layer i of a leaf [L, ...]

A model whose layers run in a scan has one leaf [L, ...] in the place of L. A norm, a mean or a
count over that leaf spans all layers, and its rank is one too high for a mask. Here the leaf's
functions are mapped over the leading axes, and all that is chosen by shape sees one layer.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from adamx.core import paths
from adamx.core.concept import Slots, accumulated, any_of, emitted, hook, parts
from adamx.core.foreign import as_concept
from adamx.core.lifting import Between
from adamx.core.paths import Pattern, Predicate
from adamx.core.step import LeafStep
from adamx.core.transformation import Transformation
from adamx.core.value import as_pytree
from adamx.formula.expressions import Expr
from adamx.formula.symbols import Symbols
from adamx.formula.values import value_text

Leading = Mapping[Any, int] | tuple[tuple[Any, int], ...] | Callable[[str, Any], int]
"""The number of stacked axes of each leaf, by pattern, or as a function of path and leaf."""


class stacked(Transformation):
    """Let a transformation take stacked leaves as the arrays that are stacked in them.

    Every norm, mean and count is then one layer's; a slot smaller than its parameter has the
    stacked axes in front; masks, predicates and `axes=` see the shapes of one layer. The results
    are those of the same layers as leaves of their own, except for rounding in the last bits.

    What takes the whole tree, such as `clip_by_global_norm`, a stage of Optax or of `named`, takes
    it as before, and a wrapper's own slots are the leaf's. Methods without such statistics, such as
    `adamw` without a mask, compute the same with and without it. So do the library's storages: the
    rounding of an element depends on its value and the step alone.

    An array among the hyperparameters of `tx`, or what a schedule of a learning rate or a weight
    decay returns, may have one number for each layer: its shape broadcasts to the stacked axes.
    Such arrays are for stacked leaves alone: `by_path` gives the others their own optimizer.

    Attributes:
        tx: an adamx transformation: a piece, a whole optimizer, or one in wrappers.
        leading: how many leading axes of a leaf are stacked: a mapping from patterns of paths, or
            predicates of path and leaf, as in `by_path`, to whole numbers >= 0, where the first
            match wins and a leaf without one has 0; or a function of path and leaf.

    Raises:
        TypeError: if `tx` is not a transformation, `leading` neither a mapping nor a function, or a
            pattern not one.
        ValueError: if a number is not whole or negative, or `tx` has no part that takes one array
            at a time; at `init` and `update`, if a pattern matches no leaf, a leaf has fewer axes,
            or an array among the hyperparameters has another shape than the stacked axes.

    Example:
        Two layers, whose root mean squares are 5 and 1:

        >>> import adamx, jax.numpy as jnp
        >>> grads = {"layers": jnp.array([[1.0, 7.0], [1.0, -1.0]])}
        >>> tx = stacked(adamx.clip_by_rms(1.0), {"layers": 1})
        >>> tx.update(grads, tx.init(grads))[0]["layers"]
        Array([[ 0.2,  1.4],
               [ 1. , -1. ]], dtype=float32)

        A learning rate for each:

        >>> tx = stacked(adamx.sgd(jnp.array([0.5, 2.0])), {"layers": 1})
        >>> tx.update(grads, tx.init(grads))[0]["layers"]
        Array([[-0.5, -3.5],
               [-2. ,  2. ]], dtype=float32)
    """

    tx: Transformation
    leading: Leading

    def __post_init__(self) -> None:
        tx = as_concept(self.tx, "stacked: tx")
        if not any_of(tx, lambda part: part.leafwise):
            raise ValueError(
                "stacked: tx must have a part that takes one array at a time, got "
                f"{value_text(self.tx)}, which takes the whole tree, and stacked leaves as one "
                "array each: write such a method as an adamx transformation"
            )
        leading = self.leading
        if isinstance(leading, Mapping | tuple):
            leading = tuple(leading.items()) if isinstance(leading, Mapping) else leading
            for pattern, number in leading:
                paths.check_pattern("stacked", pattern, predicates=True)
                _check_number(f"leading[{paths.text(pattern)!r}]", number)
        elif not callable(leading):
            raise TypeError(
                "stacked: leading must map patterns to numbers of axes, as {'layers/*': 1}, "
                f"or be a function of path and leaf, got {leading!r}"
            )
        self._set(tx=tx, leading=leading)

    @classmethod
    def check_argument(cls, name: str, value: Any) -> None:
        pass  # `__post_init__` checks it

    def arguments(self) -> Iterator[tuple[str, Any]]:
        yield "", self.tx
        yield "", self.leading if callable(self.leading) else dict(self._by_pattern)

    @property
    def place(self) -> str:  # pyright: ignore
        places = {part.place for part in parts(self.tx)}
        return next(place for place in ("outermost", "last", "anywhere") if place in places)

    @property
    def _by_pattern(self) -> tuple[tuple[Pattern | Predicate, int], ...]:
        return self.leading if isinstance(self.leading, tuple) else ()

    def tree_names(self) -> tuple[str, ...]:
        return self.tx.tree_names()

    def state_names(self) -> tuple[str, ...]:
        return self.tx.state_names()

    def between(self) -> Between | None:
        found = self.tx.between()
        return found and found.inside(self)

    def for_tree(self, tree: Any) -> Transformation:
        """Return the transformation inside, with each part that takes one array mapped."""
        paths.check_all_used("stacked", [pattern for pattern, _ in self._by_pattern], tree)
        names, leaves, treedef = paths.flatten(tree)
        leaves = [jnp.asarray(x) if isinstance(x, float | complex) else x for x in leaves]
        found = {
            name: number
            for name, leaf in zip(names, leaves, strict=True)
            if leaf is not None and (number := self._number(name, leaf))
        }
        layers = [
            _layer(leaf, found[name]) if name in found else leaf
            for name, leaf in zip(names, leaves, strict=True)
        ]
        inner = hook(self.tx, "for_tree", treedef.unflatten(layers))
        return _mapped(inner, tuple(found.items()))

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        return self.tx.formula(u, symbols)

    def _number(self, path: str, leaf: Any) -> int:
        """Return how many leading axes of a leaf are stacked."""
        if callable(self.leading):
            number = self.leading(path, leaf)
            _check_number(f"what leading gives for leaf {path!r}", number)
        else:
            found = (n for pattern, n in self._by_pattern if paths.matches(pattern, path, leaf))
            number = next(found, 0)
        if number > leaf.ndim:
            raise ValueError(
                f"stacked: leaf {path!r} has the shape {list(leaf.shape)} and cannot have "
                f"{number} stacked axes: give it 0, by a pattern before the one that matches it"
            )
        return int(number)


def _mapped(tx: Any, found: tuple[tuple[str, int], ...]) -> Any:
    """Return a transformation with each largest part that takes one array mapped over layers."""
    if tx.leafwise:
        return _of_leaves(tx, found)
    return tx.with_children([_mapped(child, found) for child in tx.children])


class _of_leaves(Transformation):
    """A concept of which each leaf gets a variant for its number of stacked axes."""

    inner: Transformation
    found: tuple[tuple[str, int], ...]

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return dict(self.found)

    def for_leaf(self, path: str, leaf: jax.Array) -> Transformation:
        number = self._numbers.get(path, 0)
        own = hook(self.inner, "for_leaf", path, _layer(leaf, number) if number else leaf)
        _check_arrays(own, path, leaf.shape[:number])
        return of_layers(own, number) if number else own


class of_layers(Transformation):
    """A concept applied to each layer of one stacked leaf.

    Attributes:
        inner: the concept, for one layer.
        number: how many leading axes are stacked, >= 1.
    """

    inner: Transformation
    number: int

    def slots(self, param: jax.Array) -> Slots:
        return _started(as_pytree(self), param)

    def slot_names(self) -> tuple[str, ...]:
        return self.inner.slot_names()

    def accumulate(self, u: jax.Array, slots: Slots, step: LeafStep) -> Slots:
        return self._each(accumulated, u, slots, step)

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        return self._each(emitted, u, slots, step)

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        return self.inner.formula(u, symbols)

    def _each(self, half: Callable[..., Any], u: jax.Array, slots: Slots, step: LeafStep) -> Any:
        """Return one half of the step of each layer."""
        leading = u.shape[: self.number]

        def own(slots: Slots) -> Slots:  # a concept outside may have slots of other shapes
            return {n: x for n, x in slots.items() if x.shape[: self.number] == leading}

        def one(shared: Any, u: Any, slots: Slots, old: Slots, param: Any) -> Any:
            tree, (scalars, inner) = shared
            shard = step.shard.last(u.ndim)
            here = LeafStep(step.count, scalars, inner, old, param, step.grad_dtype, shard)
            return half(tree.tx, u, slots, here)

        shared = as_pytree(self.inner), step.inner[0]
        return each_layer(one, leading, shared, u, own(slots), own(step.old), step.param)

    def each(
        self, function: Callable[[Any, Slots], Slots], names: tuple[str, ...], slots: Slots
    ) -> Slots:
        """Return a leaf's slots, with a function of the concept applied to its own in each layer.

        Args:
            function: of the concept inside and the slots of one layer.
            names: the names of these slots.
            slots: all slots of the leaf.
        """
        own = {name: slots[name] for name in names if name in slots}
        others = {name: x for name, x in slots.items() if name not in own}
        if not own:
            return others
        leading = next(iter(own.values())).shape[: self.number]
        shared = as_pytree(self.inner)
        return others | each_layer(lambda tree, own: function(tree.tx, own), leading, shared, own)


def each_layer(
    function: Callable[..., Any], leading: tuple[int, ...], shared: Any, *arrays: Any
) -> Any:
    """Return function(shared, *arrays) for each layer.

    Args:
        function: of one layer.
        leading: the sizes of the stacked axes.
        shared: a tree of scalars and arrays: an array has one number for each layer, its shape
            broadcasts to `leading`.
        *arrays: trees of arrays whose first axes are the stacked ones; at least one array.

    Returns:
        A tree of arrays whose first axes are the stacked ones.

    Raises:
        ValueError: if an array in `shared` has another shape.

    Example:
        >>> x = jnp.array([[3.0, 4.0], [1.0, 0.0]])
        >>> each_layer(lambda c, x: c * jnp.linalg.norm(x), (2,), jnp.array([2.0, 5.0]), x)
        Array([10.,  5.], dtype=float32)
    """
    flat, treedef = jax.tree.flatten(shared)
    vectors: dict[int, jax.Array] = {}
    for i, x in enumerate(flat):
        if jnp.ndim(x):
            if not _broadcasts(jnp.shape(x), leading):
                raise ValueError(
                    f"stacked: a hyperparameter or schedule is an array of shape "
                    f"{list(jnp.shape(x))} for a leaf whose stacked axes are {list(leading)}: it "
                    "may be a number, or an array with one for each layer. Inside shard_map layers "
                    "with numbers of their own cannot be divided among devices"
                )
            vectors[i] = jnp.broadcast_to(x, leading)

    def one(vectors: dict[int, jax.Array], *arrays: Any) -> Any:
        own = [vectors.get(i, x) for i, x in enumerate(flat)]
        return function(treedef.unflatten(own), *arrays)

    for _ in leading:
        one = jax.vmap(one)
    return one(*_sharded_alike((vectors, *arrays), len(leading)))


def _sharded_alike(trees: Any, number: int) -> Any:
    """Return trees of arrays whose first axes are sharded alike, as vmap needs them.

    On a mesh with explicit axes they may differ: a slot that is divided over more devices than its
    parameter, or one number for each layer. Each axis is divided as in the first array that has it
    divided. On other meshes the compiler sees to it.
    """
    shardings = [jax.typeof(x).sharding for x in jax.tree.leaves(trees)]
    on_mesh = next((where for where in shardings if not where.mesh.empty), None)
    if on_mesh is None:
        return trees
    specs = [where.spec for where in shardings]
    first: list[Any] = []
    used: set[str] = set()
    for i in range(number):
        free = (spec[i] for spec in specs if spec[i] and used.isdisjoint(_mesh_axes(spec[i])))
        first.append(next(free, None))
        used |= _mesh_axes(first[i])

    def put(x: jax.Array) -> jax.Array:
        spec = jax.typeof(x).sharding.spec
        rest = [e if used.isdisjoint(_mesh_axes(e)) else None for e in spec[number:]]
        wanted = PartitionSpec(*first, *rest)
        return x if wanted == spec else jax.sharding.reshard(x, on_mesh.update(spec=wanted))

    return jax.tree.map(put, trees)


def _mesh_axes(entry: Any) -> set[str]:
    return set() if entry is None else {entry} if isinstance(entry, str) else {*entry}


def stacked_axes(bound: Any) -> int:
    """Return how many leading axes are stacked, for a transformation bound to one leaf.

    Example:
        >>> import adamx
        >>> w = jnp.zeros((2, 3))
        >>> tx = adamx.chain(stacked(adamx.clip_by_rms(1.0), {"*": 1}), adamx.scale(-0.5))
        >>> stacked_axes(tx.for_tree(w).for_leaf("", w))
        1
    """
    own = bound.number if isinstance(bound, of_layers) else 0
    return own + max(map(stacked_axes, bound.children), default=0)


# compiled, since otherwise the slots would not be on the parameter's device
@jax.jit
def _started(tree: as_pytree, param: jax.Array) -> Slots:
    concept = tree.tx
    start = lambda inner, layer: hook(inner.tx, "slots", layer)  # noqa: E731
    leading = param.shape[: concept.number]
    return each_layer(start, leading, as_pytree(concept.inner), param)


def _layer(leaf: Any, number: int) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of one layer."""
    return jax.ShapeDtypeStruct(leaf.shape[number:], leaf.dtype)


def _check_number(what: str, number: Any) -> None:
    if not isinstance(number, numbers.Integral) or number < 0:
        raise ValueError(
            f"stacked: {what} must be a number of leading axes, whole and >= 0, got {number!r}"
        )


def _check_arrays(tx: Transformation, path: str, leading: tuple[int, ...]) -> None:
    """Raise unless each array in a transformation has one number for each layer of a leaf."""
    for part in parts(tx):
        for name, value in part._held.items():
            if isinstance(value, jax.Array) and not _broadcasts(value.shape, leading):
                axes = f"stacked axes {list(leading)}" if leading else "no stacked axes"
                raise ValueError(
                    f"stacked: {name} of {type(part).__name__} has the shape {list(value.shape)}, "
                    f"and leaf {path!r} has {axes}: an array has one number for each layer; "
                    "by_path gives other leaves another transformation"
                )


def _broadcasts(shape: tuple[int, ...], leading: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, leading) == leading
    except ValueError:
        return False
