"""A storage: how the slots of one array are kept from one step to the next.

    stored_{t-1} --decode--> slots_{t-1} --accumulate--> slots_t --encode--> stored_t
    u'_t = emit(u_t, decode(stored_t))

Arithmetic stays in float32; only what lies between the steps is narrow. What is emitted comes from
what was stored, so that an update never uses a number that the next step will not see. A storage
knows nothing of the formula that it wraps, and works on one element at a time: no blocks and no
scales, the parameter's own shape and sharding.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from adamx.core import errors, lifting
from adamx.core.expressions import Expr
from adamx.core.formula import Symbols
from adamx.core.lifting import Slots
from adamx.core.rounding import random_bits, step_key
from adamx.core.step import Step
from adamx.core.transformation import Transformation


class Storage(Transformation):
    """The base of every storage: subclass it and define `encode` and `decode`.

    Attributes:
        inner: what keeps the slots: an adamx transformation that acts on one array at a time.

    Raises:
        TypeError: in `grad` through a step, since a narrow format has no derivative.
        ValueError: if `inner` reads the whole tree or keeps nothing.

    Example:
        A format with a quarter of float32's bits, in five lines (with nearest rounding, which
        an average with a long memory does not bear):

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
        name = type(self).__name__
        if not isinstance(self.inner, Transformation):
            raise TypeError(f"{name}: inner must be an adamx transformation, got {self.inner!r}")
        if not lifting.slot_names(self.inner):
            raise ValueError(f"{name}: {self.inner!r} keeps no slots, so there is nothing to store")

    def encode(self, slots: Slots, bits: Slots) -> Slots:
        """Return what is kept of one array's slots.

        Args:
            slots: by name: float32 arrays (float64 or complex ones where the parameter is).
            bits: by the same names: random bits, uint32, one word an element, of which the high
                ones are random. Those of a slot depend on this slot alone, so that each can be
                updated in place.

        Returns:
            Arrays of the same shape, by name; the names may be others.
        """
        raise NotImplementedError

    def decode(self, stored: Slots) -> Slots:
        """Return the slots that `encode` was given, as far as they were kept."""
        raise NotImplementedError

    def slots(self, param: jax.Array) -> Slots:
        return _encoded(self, self.inner.slots(param))

    def prepare(self, step: Step) -> Any:
        return step_key(step.count)

    def accumulate(self, u: jax.Array, slots: Slots, step: Step) -> Slots:
        before = self._decoded(slots)
        changed = self.inner.accumulate(u, before, self._seen(step))
        errors.check_accumulated(self.inner, before, changed)
        after = before | changed
        own = {name: after[name] for name in lifting.slot_names(self.inner)}
        own = _not_differentiable(type(self).__name__, own)
        return self.encode(own, _bits(step.scalars, own))

    def emit(self, u: jax.Array, slots: Slots, step: Step) -> jax.Array:
        return self.inner.emit(u, self._decoded(slots), self._seen(step))

    def reveal(self, slots: Slots) -> Slots:
        return self.inner.reveal(self._decoded(slots))

    def conceal(self, seen: Slots) -> Slots:
        return _encoded(self, self.inner.conceal(seen))

    def _decoded(self, slots: Slots) -> Slots:
        """Return all of a leaf's slots, with those of the inner concept decoded."""
        names = lifting.slot_names(self)
        others = {name: x for name, x in slots.items() if name not in names}
        return others | self.decode({name: slots[name] for name in names if name in slots})

    def _seen(self, step: Step) -> Step:
        """Return the step as the inner concept sees it."""
        return dataclasses.replace(step.child(0), old=self._decoded(step.old))

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        return self.inner.formula(u, symbols)


@jax.jit
def _encoded(storage: Storage, slots: Slots) -> Slots:
    """Encode outside a step: compiled, since operation by operation it takes a second a shape."""
    return storage.encode(slots, _bits(step_key(0), slots))


def _bits(key: jax.Array, slots: Slots) -> Slots:
    """Return random bits for the elements of each slot, from their values."""
    return {name: random_bits(key, x.real.astype(jnp.float32)) for name, x in slots.items()}


def _not_differentiable(name: str, slots: Slots) -> Slots:
    """Return the slots; raise where a derivative with respect to them is asked for."""

    @jax.custom_jvp
    def same(slots: Slots) -> Slots:
        return slots

    @same.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        del primals, tangents
        raise TypeError(
            f"{name}: a step that rounds what it keeps has no derivative: differentiate through "
            'one with moments="float32", the default'
        )

    return same(slots)
