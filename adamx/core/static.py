"""A value that takes part in a jit key: comparing and hashing it never raises."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any


@dataclasses.dataclass(frozen=True, eq=False)
class Static:
    """A box whose equality is the value's where that is a plain bool, and identity elsewhere.

    0.0 and -0.0 differ, since a program with one is not the program with the other.

    Example:
        >>> Static(0.5) == Static(0.5), Static({"w": True}) == Static({"w": True})
        (True, True)
        >>> Static(0.0) == Static(-0.0), hash(Static([1])) == hash(Static([2]))
        (False, True)
    """

    value: Any

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Static):
            return NotImplemented
        a, b = self.value, other.value
        if a is b:
            return True
        if isinstance(a, numbers.Real) and isinstance(b, numbers.Real) and a == b:
            return math.copysign(1, a) == math.copysign(1, b)
        try:
            return type(a) is type(b) and bool(a == b)
        except Exception:  # a foreign value's __eq__ may raise anything; then identity decides
            return False

    def __hash__(self) -> int:
        try:
            return hash(self.value)
        except TypeError:
            return hash(type(self.value))
