"""Reading the slots of a state, whatever they are stored in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adamx.core import errors
from adamx.core.lifting import disjoint
from adamx.core.transformation import Transformation


def moments(state: Mapping[str, Any], tx: Transformation) -> dict[str, Any]:
    """Return the slots of a state as the formula sees them, for logging, plots and conversion.

    Args:
        state: a state of `tx`.
        tx: the transformation that made it.

    Returns:
        For each slot, such as `mu` and `nu`, a tree shaped like the parameters: float32, or wider
        where the parameter is. Slots that are not packed are the state's own arrays. What foreign
        stages keep is left out.

    Raises:
        ValueError: if the state has not the slots of `tx`.

    Example:
        >>> import adamx, jax.numpy as jnp
        >>> tx = adamx.adam(0.1, b1=0.5, moments="packed16")
        >>> _, state = tx.update({"w": jnp.array([4.0])}, tx.init({"w": jnp.zeros(1)}))
        >>> sorted(state), moments(state, tx)["mu"]
        (['count', 'learning_rate', 'moments'], {'w': Array([2.], dtype=float32)})
    """
    errors.check_state(state)
    return disjoint(*(segment.reveal_tree(state) for segment in tx.segments()))
