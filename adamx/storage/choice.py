"""A storage chosen by name: `adam(..., moments="packed16")`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

from adamx.core.transformation import Transformation
from adamx.storage.bfloat16 import bfloat16
from adamx.storage.packed8 import packed8, ratio_bound
from adamx.storage.packed16 import packed16

Name = Literal["float32", "bfloat16", "packed16", "packed8"]

Moments = Name | Callable[[Transformation], Transformation]
"""The name of a storage, or a function that wraps a transformation in one."""

NAMES = get_args(Name)


def stored(
    inner: Transformation, moments: Moments, decays: tuple[Any, Any] | None = None
) -> Transformation:
    """Return the transformation with its slots in a storage.

    Args:
        inner: the transformation that has the slots.
        moments: "float32" leaves it as it is; "bfloat16" (2 bytes per slot), "packed16" (Adam's two
            moments in 4 bytes) or "packed8" (in 2); or a function that wraps a transformation,
            such as a subclass of `Storage`.
        decays: b1 and b2 if `inner` has Adam's moments, for "packed8"; None otherwise.

    Raises:
        ValueError: if there is no storage of that name, or it cannot store these slots.
        TypeError: if `moments` is neither a name nor a function.

    Example:
        >>> import adamx
        >>> stored(adamx.ema(0.9), "bfloat16")
        bfloat16(ema(0.9))
    """
    if moments == "float32":
        return inner
    if callable(moments):
        return moments(inner)
    if moments == "bfloat16":
        return bfloat16(inner)
    if moments == "packed16":
        return packed16(inner)
    if moments == "packed8" and decays is not None:
        return packed8(inner, ratio_bound(*decays))
    if moments == "packed8":
        raise ValueError(
            "packed8: stores mu as its ratio to the root of nu, which has a bound if they are the "
            "averages of one gradient and of its square, but the slots here, "
            f"{sorted(inner.slot_names())}, are not: bfloat16 stores any slots, in 2 bytes each"
        )
    kind = ValueError if isinstance(moments, str) else TypeError
    raise kind(f"moments must be one of {NAMES} or a function, got {moments!r}")
