"""A storage: the format of one array's slots between two steps.

    stored_{t-1} --decode--> slots_{t-1} --accumulate--> slots_t --encode--> stored_t
    u'_t = emit(u_t, decode(stored_t))

Arithmetic stays in float32; only the stored slots are narrow. The update is computed from the slots
as they were stored, so it never uses a number that the next step will not see. A storage knows
nothing of the formula that it wraps, and the storages here work on each element by itself: without
blocks and scales, in the parameter's own shape and sharding.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from adamx.core.arithmetic import compute_dtype, is_inexact, widen
from adamx.core.concept import Slots, accumulated, hook
from adamx.core.rounding import random_bits, step_key
from adamx.core.step import LeafStep, Step
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr
from adamx.formula.symbols import Symbols


class Storage(Transformation):
    """The base of every storage: subclass it and define `encode` and `decode`.

    Attributes:
        inner: an adamx transformation with slots that acts on one array at a time.

    Raises:
        TypeError: in `grad` through a step, since a narrow format has no derivative.
        ValueError: if `inner` reads the whole tree or has no slots.

    Example:
        A format with a quarter of float32's bits, in five lines (it rounds to nearest, which is
        not enough for an average with a long memory):

        >>> import adamx, jax.numpy as jnp
        >>> class float8(adamx.Storage):
        ...     def encode(self, slots, bits):
        ...         return {name: x.astype(jnp.float8_e5m2) for name, x in slots.items()}
        ...     def decode(self, stored):
        ...         return {name: x.astype(jnp.float32) for name, x in stored.items()}
        >>> tx = float8(adamx.ema(0.5))
        >>> updates, state = tx.update(jnp.array([4.0, -2.2]), tx.init(jnp.zeros(2)))
        >>> updates
        Array([ 2., -1.], dtype=float32)
    """

    inner: Transformation

    def __post_init__(self) -> None:
        if not self.inner.slot_names():
            name = type(self).__name__
            raise ValueError(f"{name}: {self.inner!r} has no slots, so there is nothing to store")

    def encode(self, slots: Slots, bits: Slots) -> Slots:
        """Return the stored form of one array's slots.

        Args:
            slots: float32 arrays by name (float64 or complex for such parameters), whatever the
                gradients are.
            bits: by the same names: uint32 words, one per element, whose high bits are random. A
                slot's bits depend on this slot alone, so that each can be updated in place.

        Returns:
            Arrays by name, of any dtypes and shapes; the names may differ.
        """
        raise NotImplementedError

    def decode(self, stored: Slots) -> Slots:
        """Return the slots that `encode` got, as far as it stored them.

        Args:
            stored: the arrays that `encode` returned, in the same dtypes.
        """
        raise NotImplementedError

    def slots(self, param: jax.Array) -> Slots:
        return self.encoded(self.inner.slots(param))

    def stored_names(self) -> tuple[str, ...]:
        return self.slot_names()

    @functools.cached_property
    def _slot_names(self) -> tuple[str, ...]:
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        first = dict.fromkeys(self.inner.slot_names(), scalar)
        if self.inner.stored_names():  # a storage in a storage has slots of other dtypes
            first |= jax.eval_shape(self.inner.slots, scalar)
        return tuple(jax.eval_shape(self.encoded, first))

    def scalars(self, step: Step) -> Any:
        return step_key(step.count)

    def accumulate(self, u: jax.Array, slots: Slots, step: LeafStep) -> Slots:
        before = self.decoded(slots, u.dtype)
        after = before | accumulated(self.inner, u, before, self._inside(step, u.dtype))
        kept = self.decoded(slots)  # float64 gradients make wider slots than the parameter's
        names = [name for name in self.inner.slot_names() if name in after]
        own = {name: after[name].astype(kept[name].dtype) for name in names}
        own = _not_differentiable(type(self).__name__, own)
        return hook(self, "encode", own, _bits(step.scalars, own))

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        return self.inner.emit(u, self.decoded(slots, u.dtype), self._inside(step, u.dtype))

    def decoded(self, slots: Slots, compute: DTypeLike | None = None) -> Slots:
        """Return all of a leaf's slots, with the inner concept's slots decoded.

        Args:
            slots: the leaf's slots, with this storage's slots as they are stored.
            compute: the dtype to widen them to; None means float32, or wider if a slot is.
        """
        names = self.slot_names()
        others = {name: x for name, x in slots.items() if name not in names}
        found = hook(self, "decode", {name: slots[name] for name in names if name in slots})
        for name in found.keys() - set(self.inner.stored_names()):
            if is_inexact(x := found[name]):
                found[name] = widen(x, compute_dtype(x.dtype) if compute is None else compute)
        return others | found

    def encoded(self, slots: Slots) -> Slots:
        """Return the slots of the inner concept encoded, outside a step."""
        return _encoded(self, slots)

    def _inside(self, step: LeafStep, compute: DTypeLike) -> LeafStep:
        """Return the step as the inner concept sees it."""
        return dataclasses.replace(step.child(0), old=self.decoded(step.old, compute))

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        return self.inner.formula(u, symbols)


@jax.jit
def _encoded(storage: Storage, slots: Slots) -> Slots:
    """Encode outside a step: compiled, since uncompiled it takes a second per shape."""
    return hook(storage, "encode", slots, _bits(step_key(0), slots))


def _bits(key: jax.Array, slots: Slots) -> Slots:
    """Return random bits for the elements of each slot, from their values."""
    return {name: random_bits(key, x.real.astype(jnp.float32)) for name, x in slots.items()}


def _not_differentiable(name: str, slots: Slots) -> Slots:
    """Return the slots; raise if a derivative with respect to them is taken."""

    @jax.custom_jvp
    def same(slots: Slots) -> Slots:
        return slots

    @same.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        del primals, tangents
        raise TypeError(
            f"{name}: a step that rounds its slots has no derivative: differentiate through a step "
            'with moments="float32", the default'
        )

    return same(slots)
