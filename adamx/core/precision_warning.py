"""A warning where 16-bit parameters would stand still."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from adamx.core.lifting import any_of

if TYPE_CHECKING:
    from adamx.core.transformation import Transformation

ROUNDED = "__rounded__"  # set in a transformation whose updates are rounded without bias


class PrecisionWarning(UserWarning):
    """16-bit parameters are given to an optimizer that rounds its steps away.

    Example:
        >>> import adamx, jax.numpy as jnp, warnings
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     state = adamx.adam(1e-3).init(jnp.ones(2, jnp.bfloat16))
        >>> [warning.category.__name__ for warning in caught]
        ['PrecisionWarning']
    """


def warn_of_rounding(tx: Transformation, params: Any) -> None:
    """Warn at `init`, if an optimizer is given 16-bit parameters without masters."""
    if not any_of(tx, lambda concept: concept.takes_steps) or ROUNDED in vars(tx):
        return
    if any_of(tx, lambda concept: concept.keeps_precision):
        return
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(params) if hasattr(leaf, "dtype")]
    narrow = [d for d in dtypes if jnp.issubdtype(d, jnp.inexact) and jnp.finfo(d).bits < 32]
    if not narrow:
        return
    dtype = narrow[0]
    warnings.warn(
        f"adamx: {len(narrow)} of the parameters' leaves are {dtype}: a step smaller than "
        f"{float(jnp.finfo(dtype).eps) / 2:.1g} of a parameter is rounded away when it is added. "
        "Keep what is missing with adamx.master_weights(tx), or round without bias with "
        "adamx.make_step(tx, rounding='stochastic'), made before init, or "
        "adamx.apply_updates(..., rounding='stochastic')",
        PrecisionWarning,
        stacklevel=3,
    )
