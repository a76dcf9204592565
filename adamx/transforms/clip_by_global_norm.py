"""Clip the updates by the norm of the whole tree.

    norm = sqrt(sum over all elements of |u|^2)
    u'   = u * min(1, max_norm / norm)

The norm is computed once a step, in float32 (float64 where a leaf is), as a plain sum, which costs
one reading of the gradients. A norm above 1.8e19 counts as infinite, so that the update is 0, and
elements below 1.1e-19 count as 0 (`adamx.core.norms`).

Source: Pascanu et al. (2013), section 3.2, https://arxiv.org/abs/1211.5063
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from adamx.core.checks import Limit, ScalarOrSchedule
from adamx.core.concept import Slots
from adamx.core.norms import global_norm
from adamx.core.schedules import scheduled
from adamx.core.step import LeafStep, Step
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, call, reduced
from adamx.formula.symbols import Symbols


class clip_by_global_norm(Transformation):
    """Scale the updates down so that the norm of the whole tree is at most `max_norm`.

    It reads the whole tree, so it belongs in a top-level chain. As the first stage it costs one
    reading of the gradients; after other stages, their output is computed twice or stored. NaN and
    infinite elements turn the updates into NaN. A norm above 1.8e19 overflows float32: it counts as
    infinite, and the updates are 0. `skip_nonfinite` around the chain skips both kinds of steps,
    and shares the reading.

    Args:
        max_norm: a number, array or schedule, >= 0. It is in the unit of the updates. The number
            infinity clips nothing, for a norm that is only recorded.
        record: True records the norm before clipping as `state["grad_norm"]`, in the dtype in which
            it is computed; a string is another name for it, False records nothing.

    Raises:
        ValueError: if `max_norm` is negative or NaN.

    Example:
        >>> tx = clip_by_global_norm(1.0, record=True)
        >>> grads = {"w": jnp.array([3.0]), "b": jnp.array([-4.0])}
        >>> updates, state = tx.update(grads, tx.init(grads))
        >>> updates, float(state["grad_norm"])
        ({'b': Array([-0.8], dtype=float32), 'w': Array([0.6], dtype=float32)}, 5.0)
    """

    max_norm: Limit
    recorded_as: str | None

    measures_norm = True  # pyright: ignore

    def __init__(self, max_norm: ScalarOrSchedule, record: bool | str = False) -> None:
        """Check max_norm and settle the name of the recorded norm."""
        self._set(max_norm=max_norm)
        name = record if isinstance(record, str) else "grad_norm" if record else None
        self._set(recorded_as=name)

    def arguments(self) -> Iterator[tuple[str, Any]]:
        yield "", self.max_norm
        if self.recorded_as is not None:
            yield "record", self.recorded_as == "grad_norm" or self.recorded_as

    def tree_scalars(self, step: Step, leaves: list[jax.Array]) -> Any:
        norm = global_norm(leaves, step.shards)
        limit = jnp.asarray(scheduled(self, "max_norm", step.count), norm.dtype)
        beyond = norm > limit
        return jnp.where(beyond, limit / jnp.where(beyond, norm, 1), 1), norm

    def record(self, scalars: Any) -> dict[str, Any]:
        _, norm = scalars
        return {} if self.recorded_as is None else {self.recorded_as: norm}

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        factor, _ = step.scalars
        return factor * u

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        u, largest = symbols.named(u), symbols.number("c", self.max_norm)
        return u * call("min", 1, largest / reduced("norm", u, "all"))
