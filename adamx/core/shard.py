"""The shard of an array that a device has inside `jax.shard_map`, and sums over all shards.

    sum over the array = psum(sum over the shard),    over the mesh axes that divide it

A sum over some dimensions is added over the mesh axes of these dimensions alone: the others are
divided between the devices, like the result. An array that is not divided needs no addition.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from adamx.core.precision_warning import levels_up

Axes = int | tuple[int, ...] | None
"""The axes to reduce over; None means all of them."""

Spec = PartitionSpec | str | tuple[str, ...]
"""A spec as for `jax.shard_map`; or mesh axes that divide an array along unknown dimensions."""


class ShardWarning(UserWarning):
    """Inside `jax.shard_map` a norm, a mean or a count is over one device's shard of an array.

    It is given where JAX knows that the array is not the same on all devices: under
    `check_vma=True`.

    Example:
        >>> import adamx, warnings
        >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> spec, tx = PartitionSpec("model"), adamx.clip_by_rms(1.0)
        >>> clip = lambda g: tx.update(g, tx.init(g))[0]
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     g = jax.shard_map(clip, mesh=mesh, in_specs=spec, out_specs=spec)(jnp.ones(4))
        >>> [warning.category.__name__ for warning in caught]
        ['ShardWarning']
    """


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Shard:
    """Which shard of an array a device has.

    Attributes:
        names: the mesh axes that divide the leaf, in any order.
        dims: for each dimension of the array, those that divide it; None if that is unknown.

    Example:
        >>> shard_of(PartitionSpec("data", None), 3)
        Shard(names=('data',), dims=(('data',), (), ()))
        >>> shard_of("data", 3)
        Shard(names=('data',), dims=None)
    """

    names: tuple[str, ...] = ()
    dims: tuple[tuple[str, ...], ...] | None = None

    def along(self, x: jax.Array, axes: Axes) -> tuple[str, ...]:
        """Return the mesh axes, of those that JAX maps over, that divide some axes of an array.

        Args:
            x: the shard.
            axes: of the shard.

        Raises:
            ValueError: if it is not known which they are.
        """
        if not isinstance(axes, tuple):
            axes = tuple(range(x.ndim)) if axes is None else (axes,)
        whole = len({axis % x.ndim for axis in axes}) == x.ndim
        if self.dims is None:
            if axes and not whole and self.names:
                raise ValueError(
                    f"in_shard_map: a sum over the axes {list(axes)} of an array with {x.ndim} "
                    f"needs to know which of them {list(self.names)} divides: give the leaf a "
                    "PartitionSpec in the place of these names"
                )
            return _mapped(self.names) if axes or whole else ()
        if x.ndim != len(self.dims):
            raise ValueError(
                f"in_shard_map: an array with {x.ndim} axes has a spec for {len(self.dims)}, "
                "since it is stacked outside, and a sum over the whole array needs them all: write "
                "in_shard_map(stacked(tx, ...), specs)"
            )
        return _mapped(name for axis in axes for name in self.dims[axis])

    def whole(self, x: Any) -> Any:
        """Return the whole array's shape and dtype; the shard itself if it is the whole array."""
        sizes = [axis_size(_mapped(names)) for names in self.dims or ()]
        if math.prod(sizes) == 1:
            return x
        padded = [1] * (x.ndim - len(sizes)) + sizes
        shape = tuple(a * b for a, b in zip(x.shape, padded, strict=True))
        return jax.ShapeDtypeStruct(shape, x.dtype)

    def last(self, number: int) -> Shard:
        """Return the shard of each of the arrays that are stacked in this one.

        Args:
            number: how many axes each of them has.
        """
        if self.dims is None:
            return self
        dims = self.dims[max(len(self.dims) - number, 0) :]
        return Shard(self.names, dims)

    def own(self, x: Any, like: Any) -> Any:
        """Return the part of an array that belongs to this shard.

        Args:
            x: an array that broadcasts to the whole one, or a number.
            like: the shard.
        """
        for back in range(1, 1 + min(jnp.ndim(x), len(like.shape)) if self.names else 1):
            size = like.shape[-back]
            if x.shape[-back] not in (1, size):
                names = self.along(like, (len(like.shape) - back,))
                start = jax.lax.axis_index(names) * size
                x = jax.lax.dynamic_slice_in_dim(x, start, size, x.ndim - back)
        return x

    def of_slot(self, slot: Any, whole: Any) -> Shard:
        """Return which shard of a slot belongs to this one of its parameter.

        Args:
            slot: the slot that belongs to this shard, of as many axes as the parameter.
            whole: the slot that belongs to the whole parameter.
        """
        if self.dims is None:
            return self
        pairs = zip(self.dims, slot.shape, whole.shape, strict=True)
        return Shard(self.names, tuple(names if a != b else () for names, a, b in pairs))


WHOLE = Shard()


def shard_of(spec: Spec, ndim: int) -> Shard:
    """Return the shard that a spec makes of an array with some number of dimensions."""
    if not isinstance(spec, PartitionSpec):
        return Shard((spec,) if isinstance(spec, str) else spec)
    dims = tuple(() if x is None else (x,) if isinstance(x, str) else tuple(x) for x in spec)
    dims += ((),) * (ndim - len(dims))
    return Shard(tuple(itertools.chain.from_iterable(dims)), dims)


def is_mapped(name: str) -> bool:
    """Say whether JAX maps over an axis here, in `shard_map`, `pmap` or `vmap`."""
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True


def _mapped(names: Any) -> tuple[str, ...]:
    return tuple(name for name in names if is_mapped(name))


def axis_size(names: tuple[str, ...]) -> int:
    """Return the number of devices along some mesh axes."""
    return math.prod(jax.lax.axis_size(name) for name in names)


def total(x: jax.Array, axes: Axes = None, shard: Shard = WHOLE) -> jax.Array:
    """Return the sum over axes of a whole array; they stay, with size 1.

    Args:
        x: the array, or a device's shard of it.
        axes: to reduce over; None means all of them.
        shard: which shard x is.

    Warns:
        ShardWarning: if x is one of several shards of which `shard` does not know.
    """
    _warn_of_others((x,), (shard,))
    return _psum(jnp.sum(x, axes, keepdims=True), shard.along(x, axes))


def total_of_all(
    sums: Sequence[jax.Array], arrays: Sequence[jax.Array], shards: Sequence[Shard]
) -> jax.Array:
    """Return the sum of sums over whole arrays, with one communication for all of them.

    Args:
        sums: the sum over each shard: scalars of one dtype.
        arrays: the shards.
        shards: which shards they are; () if each is a whole array.

    Warns:
        ShardWarning: as for `total`.
    """
    shards = shards or (WHOLE,) * len(sums)
    _warn_of_others(arrays, shards)
    by_names: dict[tuple[str, ...], list[jax.Array]] = {}
    for one, x, shard in zip(sums, arrays, shards, strict=True):
        by_names.setdefault(tuple(sorted(shard.along(x, None))), []).append(one)
    all_names = tuple(dict.fromkeys(itertools.chain.from_iterable(by_names)))
    found = jnp.zeros([], sums[0].dtype)
    for names, own in by_names.items():
        # what several devices have alike counts once: at the first of them
        same = [jax.lax.axis_index(name) == 0 for name in all_names if name not in names]
        one = sum(own[1:], start=own[0])
        found += jnp.where(jnp.array(same).all(), one, 0) if same else one
    return _psum(found, all_names)


def check_alike(what: str, before: Any, after: Any) -> None:
    """Raise where a new entry of the state differs between devices and the old one does not.

    Args:
        what: the entry's name.
        before: the old value, or a tree of values.
        after: the new value, or a tree of values.
    """
    known = frozenset[str]().union(*map(varying, jax.tree.leaves(before)))
    if others := frozenset[str]().union(*map(varying, jax.tree.leaves(after))) - known:
        raise ValueError(
            f"adamx: inside shard_map state[{what!r}] would differ along the mesh axes "
            f"{sorted(others)}, since it is measured on each device's shard, and before this step "
            "it is the same on all devices: adamx.in_shard_map(tx, specs), around the whole "
            "optimizer and with the specs that shard_map has for the parameters, measures the "
            "whole arrays; gradients of parameters that are the same on all devices need "
            "jax.lax.pmean"
        )


def _psum(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Return the sum over mesh axes; x itself without any."""
    if not names:
        return x
    same = tuple(name for name in names if name not in varying(x))
    if 0 < len(same) < len(names) and hasattr(jax.lax, "pcast"):  # otherwise psum sees to it
        x = jax.lax.pcast(x, same, to="varying")
    return jax.lax.psum(x, names)


def varying(x: Any) -> frozenset[str]:
    """Return the mesh axes along which an array differs, as far as JAX knows: `check_vma=True`."""
    kind = jax.typeof(x)
    return frozenset(kind.mat.varying if hasattr(kind, "mat") else kind.vma)


def _warn_of_others(arrays: Sequence[jax.Array], shards: Sequence[Shard]) -> None:
    pairs = zip(arrays, shards, strict=True)
    others = frozenset().union(*(varying(x).difference(shard.names) for x, shard in pairs))
    if others:
        warnings.warn(
            "adamx: a norm, a mean or a count inside shard_map is over one device's shard: the "
            f"array differs along the mesh axes {sorted(others)}, and no spec says that they "
            "divide it. adamx.in_shard_map(tx, specs), with the specs that shard_map has for the "
            "parameters, takes it over the whole array. Gradients of parameters that are the same "
            "on all devices need jax.lax.pmean. If each device's own is meant, ignore this warning",
            ShardWarning,
            stacklevel=levels_up(),
        )
