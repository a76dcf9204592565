"""A tree of updates taken apart into its leaves, and put together again.

tree <-> (paths, values), and beside each value its parameter and its dtypes
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from adamx.core import errors
from adamx.core.arithmetic import cast
from adamx.core.paths import flatten
from adamx.core.shard import WHOLE, Shard


@dataclasses.dataclass(frozen=True)
class Leaves:
    """A tree of updates taken apart: parallel lists, with None where the tree has None.

    Attributes:
        paths: each leaf's place in the tree, such as "dense/kernel".
        values: the updates: the gradients at first, in compute dtype between segments.
        params: the parameters, or None if `update` was called without.
        came: the gradients' dtypes.
        emit: the dtypes of the outgoing updates; None leaves an update as it is.
        treedef: the structure that turns a list into a tree again.
        shards: which shard of an array each is, inside `in_shard_map`.
    """

    paths: list[str]
    values: list[Any]
    params: list[Any] | None
    came: list[Any]
    emit: list[Any]
    treedef: Any
    shards: list[Shard]

    def tree(self, values: list[Any]) -> Any:
        """Return a parallel list as a tree."""
        return self.treedef.unflatten(values)

    def column(self, name: str, tree: Any) -> list[Any]:
        """Return another tree as a parallel list; raise if its structure differs.

        Args:
            name: the tree's name for the error: "params", or an entry of the state.
            tree: the tree.
        """
        return errors.flatten_like(self.treedef, name, tree, self.values)

    def params_tree(self) -> Any:
        """Return the parameters that have an update as a tree; None without parameters."""
        if self.params is None:
            return None
        pairs = zip(self.params, self.values, strict=True)
        return self.tree([None if u is None else param for param, u in pairs])

    def like(self) -> list[Any]:
        """Return the parameters if `update` got them, otherwise the updates."""
        return self.values if self.params is None else self.params

    def whole(self) -> list[Any]:
        """Return them as `like` does, with the shape of the whole array in the place of a shard."""
        pairs = zip(self.like(), self.shards, strict=True)
        return [None if x is None else shard.whole(x) for x, shard in pairs]

    def narrowed(self) -> Leaves:
        """Return the updates in their outgoing dtypes."""
        pairs = zip(self.values, self.emit, strict=True)
        return self.with_values([u if u is None or d is None else cast(u, d) for u, d in pairs])

    def check_shapes(self) -> None:
        """Raise unless each update has the shape and kind of its parameter."""
        for path, u, param in zip(self.paths, self.values, self.params or (), strict=False):
            if u is not None:
                errors.check_shape(path, u, param)

    def with_values(self, values: list[Any]) -> Leaves:
        """Return the same leaves with other updates."""
        return dataclasses.replace(self, values=values)


def completed(updates: Any, like: Any) -> Any:
    """Return the updates with a None for each leaf of a branch that is one None in them.

    Args:
        updates: the gradients.
        like: the parameters, or another tree shaped like them; None leaves the updates alone.
    """
    _, given, treedef = flatten(updates)
    if like is None or all(u is not None for u in given):
        return updates
    try:
        branches = treedef.flatten_up_to(like)
    except (ValueError, TypeError):  # which `flatten_like` explains
        return updates
    new = [
        jax.tree.map(lambda _: None, branch) if u is None and flatten(branch)[0] != [""] else u
        for u, branch in zip(given, branches, strict=True)
    ]
    return treedef.unflatten(new)


def is_on_host(x: Any) -> bool:
    """Say whether an array is in the host's memory, as offloaded slots are."""
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def on_device(tree: Any) -> Any:
    """Return a tree of which the arrays in the host's memory are copied to the device."""
    return jax.tree.map(
        lambda x: jax.device_put(x, jax.memory.Space.Device) if is_on_host(x) else x, tree
    )


def take_apart(updates: Any, params: Any) -> Leaves:
    """Flatten the updates, and the parameters with them; raise if they do not fit."""
    paths, given, treedef = flatten(updates)
    values = [
        None if u is None else errors.as_inexact(path, u)
        for path, u in zip(paths, given, strict=True)
    ]
    column = None
    if params is not None:
        column = [
            None if u is None else errors.check_param(path, u, p)
            for path, u, p in zip(
                paths, values, errors.flatten_like(treedef, "params", params, values), strict=True
            )
        ]
    came = [None if u is None else u.dtype for u in values]
    return Leaves(paths, values, column, came, came, treedef, [WHOLE] * len(paths))
