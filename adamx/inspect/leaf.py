"""One parameter in a summary: its shape, slots and formula, and what they cost."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Sharding

from adamx.core.sharding import alike
from adamx.formula.expressions import W
from adamx.formula.symbols import Formula


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter in a summary.

    Attributes:
        path: such as "dense/kernel".
        group: the pattern of its `by_path` group; "" if there are no groups.
        param: its shape and dtype.
        slots: by name, the shapes and dtypes of its slots.
        formula: the formula of its update.
        rereads: whether a step reads an array as large as its gradient once more.
        stacked: how many of its leading axes are declared by `stacked`.
        sharding: the parameter's; None if it has none, and is whole on each device.
    """

    path: str
    group: str
    param: jax.ShapeDtypeStruct
    slots: dict[str, jax.ShapeDtypeStruct]
    formula: Formula
    rereads: bool
    stacked: int = 0
    sharding: Sharding | None = None

    @property
    def frozen(self) -> bool:
        """Whether it never moves."""
        return self.formula.step == W

    @property
    def decayed(self) -> bool:
        """Whether a weight decay acts on it."""
        return any(symbol.args[0].base == "wd" for symbol in self.formula.values)

    @property
    def layer(self) -> jax.ShapeDtypeStruct:
        """The shape and dtype of the parameter, or of one layer of a stacked one."""
        return jax.ShapeDtypeStruct(self.param.shape[self.stacked :], self.param.dtype)

    @property
    def slot_bytes(self) -> int:
        """The bytes of its slots."""
        return sum(map(bytes_of, self.slots.values()))

    @property
    def traffic(self) -> int:
        """The least bytes that a step moves for it; a frozen one is neither read nor written."""
        return self._traffic(bytes_of(self.param), self.slot_bytes)

    @property
    def per_device(self) -> dict[str, int]:
        """The bytes of the "parameter" and of the "slots" on one device, and the "traffic" there.

        Slots are sharded like the parameter, along the axes that they share with it.
        """
        param, *slots = map(self._on_a_device, (self.param, *self.slots.values()))
        traffic = self._traffic(param, sum(slots))
        return {"parameter": param, "slots": sum(slots), "traffic": traffic}

    def _traffic(self, param: int, slots: int) -> int:
        moved = 0 if self.frozen else 2
        read = int(bool(self.slots) or not self.frozen) + self.rereads
        return (moved + read) * param + 2 * slots

    def _on_a_device(self, x: jax.ShapeDtypeStruct) -> int:
        if self.sharding is None:
            return bytes_of(x)
        shape = alike(self.sharding, self.param.shape, x.shape).shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize


def bytes_of(x: Any) -> int:
    """Return the bytes of an array or of its shape."""
    return x.size * x.dtype.itemsize


def some(leaves: list[Leaf]) -> str:
    """Return the paths of the first leaves, and the number of the others."""
    paths = [leaf.path or "the array" for leaf in leaves[:3]]
    return ", ".join(paths) + (f" and {len(leaves) - 3} more" if len(leaves) > 3 else "")
