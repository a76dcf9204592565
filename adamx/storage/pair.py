"""The base of the storages that pack two slots of Adam's kind into one word.

    word = encode(mu, nu)

The word's slot is named after the format and after what `mu` and `nu` average, as each slot of
adamx has one meaning by its name: words of another format, or of another method, are never read as
these.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from adamx.core.concept import Slots
from adamx.storage.moments import slot_of_kind
from adamx.storage.storage import Storage


class Pair(Storage):
    """A storage with a field `name`, whose `inner` has slots `mu...` and `nu...`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if None in self._two:
            raise ValueError(
                f"{type(self).__name__}: stores mu and nu, Adam's two moments, in one word, but "
                f"the slots here are {sorted(self.inner.slot_names())}: bfloat16 stores any slots, "
                "in 2 bytes each"
            )

    @functools.cached_property
    def _two(self) -> tuple[Any, Any]:
        slots = self.inner.slot_names()
        return slot_of_kind("mu", slots), slot_of_kind("nu", slots)

    @property
    def word(self) -> str:
        """The name of the word's slot."""
        mu, nu = self._two
        after = mu.removeprefix("mu") + nu.removeprefix("nu")
        return vars(self)["name"] or type(self).__name__ + after

    def pair(self, slots: Slots) -> tuple[jax.Array, jax.Array]:
        """Return mu and nu; raise unless they are float32."""
        for name in self._two:
            if slots[name].dtype != jnp.float32:
                raise TypeError(
                    f"{type(self).__name__}: packs float32 moments, but {name} of a parameter of "
                    "this dtype, or of a gradient without its parameter, is "
                    f'{slots[name].dtype}: use moments="float32" for float64 and complex '
                    "parameters; for such gradients of float32 parameters call "
                    "update(grads, state, params)"
                )
        mu, nu = self._two
        return slots[mu], slots[nu]

    def packed(self, slots: Slots, word: jax.Array) -> Slots:
        """Return the slots with a word in the place of the two."""
        return {n: x for n, x in slots.items() if n not in self._two} | {self.word: word}

    def unpacked(self, stored: Slots, mu: jax.Array, nu: jax.Array) -> Slots:
        """Return the stored slots with the two in the place of their word."""
        others = {n: x for n, x in stored.items() if n != self.word}
        return others | dict(zip(self._two, (mu, nu), strict=True))
