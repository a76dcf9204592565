"""A warning for parameters of 16 bits or fewer that small steps would not change."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from adamx.core.rounding import NARROW


class PrecisionWarning(UserWarning):
    """An optimizer got parameters of 16 bits or fewer, in which small steps are rounded away.

    Example:
        >>> import adamx, jax.numpy as jnp, warnings
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     state = adamx.adam(1e-3).init(jnp.ones(2, jnp.bfloat16))
        >>> [warning.category.__name__ for warning in caught]
        ['PrecisionWarning']
    """


def warn_of_rounding(params: Sequence[jax.Array]) -> None:
    """Warn if some of the parameters to which an optimizer adds its steps have 16 bits or fewer.

    It recommends what these dtypes can do: float8 cannot be rounded stochastically.

    Inside `master_weights` the parameters are float32 masters, so there is no warning.
    """
    narrow = [p.dtype for p in params if jnp.finfo(p.dtype).bits < 32]
    if not narrow:
        return
    said = ""
    if all(dtype in NARROW for dtype in narrow):
        said = (
            ", or round without bias: with step = adamx.make_step(tx, rounding='stochastic') and "
            "state = step.init(params), or with adamx.apply_updates(..., rounding='stochastic')"
        )
    warnings.warn(
        f"adamx: {len(narrow)} of the parameters' leaves are "
        f"{' or '.join(sorted(set(map(str, narrow))))}: a step smaller than "
        f"{max(float(jnp.finfo(dtype).eps) for dtype in narrow) / 2:.1g} of a parameter is rounded "
        f"away when it is added. Keep the lost bits with adamx.master_weights(tx){said}",
        PrecisionWarning,
        stacklevel=levels_up(),
    )


def levels_up() -> int:
    """Return how many frames above the caller the first code outside adamx and JAX is."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _INSIDE:
        level, frame = level + 1, frame.f_back
    return level


_INSIDE = ("adamx", "jax")
