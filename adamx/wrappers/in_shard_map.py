"""Inside `jax.shard_map`: statistics of whole arrays, not of one device's shards.

    u'_d = shard d of tx(u, w, slots)

A device sees its shards u_d, w_d and slots_d. Each sum over an array or the tree is added over the
mesh axes that divide it (`adamx.core.shard`). The rest is elementwise and stays on the device.
"""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from adamx.core import paths
from adamx.core.concept import hook
from adamx.core.leaves import Leaves
from adamx.core.lifting import Between, State
from adamx.core.paths import Pattern
from adamx.core.shard import WHOLE, Shard, Spec, is_mapped, shard_of
from adamx.core.step import Step
from adamx.core.wrapper import Wrapper
from adamx.formula.values import value_text


class in_shard_map(Wrapper):
    """Let a transformation inside `jax.shard_map` take each leaf as a shard of a whole array.

    Every norm, mean and count of an array or of the tree is then added over the mesh axes, and a
    step is skipped on all devices or on none. Updates and state are the shards of those that the
    whole arrays give, except for rounding, since the sums are in another order. Masks, predicates
    and what else is chosen by shape see whole arrays. Elementwise methods, such as `adamw`, compute
    the same with and without it, and so do the library's storages: the rounding of an element
    depends on its value and the step alone.

    It belongs around the whole optimizer, wrappers included. `update` is called inside `shard_map`,
    `jax.pmap`, or `jax.vmap` with an axis name, and `init` there or outside, with whole arrays. A
    stage of Optax or of `named` sees one device's shards.

    Attributes:
        tx: the whole optimizer, an adamx or Optax transformation.
        specs: what `shard_map` has for the parameters: one `PartitionSpec` for all leaves, a tree
            of them, in which one may stand for a whole branch, or a mapping from patterns of paths,
            as in `by_path`, where the first match wins and a pattern also takes what is below the
            paths that it matches. The name of a mesh axis, or a tuple of names, in the place of a
            `PartitionSpec` says that they divide the leaf along dimensions that are not known. Then
            sums over some dimensions, such as those of `adam_mini`, are errors. Axes that
            `shard_map` leaves to the compiler divide nothing.

    Raises:
        TypeError: if `tx` is not a transformation, or a pattern or a spec not one.
        ValueError: if a spec has an axis twice; at `init` and `update`, if a pattern matches no
            leaf, or a leaf has no spec or fewer dimensions than its spec; at `update`, if there is
            no such mesh axis.

    Example:
        The root mean square of the whole array is 5, those of the two shards are 1 and 7:

        >>> import adamx, jax.numpy as jnp
        >>> from jax.sharding import PartitionSpec as P
        >>> tx = in_shard_map(adamx.clip_by_rms(2.5), P("model"))
        >>> update = jax.vmap(lambda g: tx.update(g, tx.init(g))[0], axis_name="model")
        >>> update(jnp.array([[1.0, -1.0], [7.0, 7.0]]))
        Array([[ 0.5, -0.5],
               [ 3.5,  3.5]], dtype=float32)
    """

    specs: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(specs=_by_pattern(self.specs))

    def arguments(self) -> Iterator[tuple[str, Any]]:
        yield "", self.tx
        (pattern, spec), *others = self.specs
        yield "", spec if pattern == "*" and not others else dict(self.specs)

    def for_tree(self, tree: Any) -> _of_shards:
        """Return the transformation inside, with the shard of each leaf."""
        names, leaves, treedef = paths.flatten(tree)
        patterns = [pattern for pattern, _ in self.specs]
        unused = [p for p in patterns if not any(_takes(p, name) for name in names)]
        paths.check_all_used("in_shard_map", unused, tree)
        leaves = [jnp.asarray(x) if isinstance(x, float | complex) else x for x in leaves]
        shards = [
            WHOLE if leaf is None else self._shard(name, leaf)
            for name, leaf in zip(names, leaves, strict=True)
        ]
        pairs = zip(leaves, shards, strict=True)
        whole = treedef.unflatten([None if x is None else shard.whole(x) for x, shard in pairs])
        found = tuple(zip(names, shards, strict=True))
        return _of_shards(hook(self.inner, "for_tree", whole), found)

    def between(self) -> Between | None:
        return self.inner_between()

    def _shard(self, path: str, leaf: Any) -> Shard:
        spec = next((spec for pattern, spec in self.specs if _takes(pattern, path)), None)
        if spec is None:
            raise ValueError(
                f"in_shard_map: leaf {path!r} has no spec: PartitionSpec() is that of a leaf that "
                "all devices have whole"
            )
        shard = shard_of(spec, leaf.ndim)
        if shard.dims is not None and len(shard.dims) > leaf.ndim:
            raise ValueError(
                f"in_shard_map: leaf {path!r} has the shape {list(leaf.shape)}, and its spec "
                f"{value_text(spec)} is for {len(shard.dims)} dimensions"
            )
        return shard


class _of_shards(Wrapper):
    """A transformation of a tree whose leaves are these shards, by path."""

    shards: tuple[tuple[str, Shard], ...]

    def init_tree(self, leaves: Leaves) -> State:
        return super().init_tree(self._seen(leaves))

    def update_tree(self, leaves: Leaves, step: Step) -> tuple[Leaves, State]:
        seen = self._seen(leaves)
        for name in sorted({name for shard in seen.shards for name in shard.names}):
            mesh = jax.sharding.get_abstract_mesh()
            if not is_mapped(name) and name not in mesh.axis_names:
                raise ValueError(
                    f"in_shard_map: there is no mesh axis {name!r} here: call update in "
                    "jax.shard_map or jax.pmap over it; under jax.jit alone the arrays are whole, "
                    "and the transformation needs no in_shard_map"
                )
        out, entries = super().update_tree(seen, step)
        return dataclasses.replace(out, shards=leaves.shards), entries

    def _seen(self, leaves: Leaves) -> Leaves:
        found = dict(self.shards)
        return dataclasses.replace(leaves, shards=[found[path] for path in leaves.paths])


def _by_pattern(specs: Any) -> tuple[tuple[Pattern, Spec], ...]:
    """Return specs by pattern, from what the user gives."""
    if isinstance(specs, PartitionSpec) or _are_names(specs):
        found = {"*": specs}
    elif isinstance(specs, Mapping) and all(map(_is_spec, specs.values())):
        found = specs
    elif isinstance(specs, tuple) and all(isinstance(x, tuple) and len(x) == 2 for x in specs):
        found = dict(specs)  # as this function returns them
    else:
        named = paths.leaves_by_path(specs)
        found = {glob.escape(path) or "*": spec for path, spec in named.items()}
    for pattern, spec in found.items():
        paths.check_pattern("in_shard_map", pattern)
        if not _is_spec(spec):
            raise TypeError(
                "in_shard_map: specs must be a PartitionSpec or names of mesh axes, a tree of "
                f"PartitionSpecs, or map patterns to them, got {spec!r} for {paths.text(pattern)!r}"
            )
        names = shard_of(spec, 0).names
        if len(set(names)) < len(names):
            raise ValueError(f"in_shard_map: the spec {value_text(spec)} has an axis twice")
    if not found:
        raise ValueError(f"in_shard_map: specs must have at least one spec, got {specs!r}")
    return tuple(found.items())


def _is_spec(x: Any) -> bool:
    if isinstance(x, PartitionSpec):
        return all(entry is None or _are_names(entry) for entry in x)
    return _are_names(x)


def _are_names(x: Any) -> bool:
    many = isinstance(x, tuple) and len(x) > 0 and all(isinstance(name, str) for name in x)
    return isinstance(x, str) or many


def _takes(pattern: Pattern, path: str) -> bool:
    """Say whether a pattern matches a path, or one above it."""
    below = isinstance(pattern, str) and paths.matches(f"{pattern}/*", path)
    return below or paths.matches(pattern, path)
