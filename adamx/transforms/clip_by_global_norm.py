"""Shorten the updates of the whole tree together, where they are longer than allowed.

    norm = sqrt(sum over all elements of |u|^2)
    u'   = u * min(1, max_norm / norm)

The norm is computed once a step, in float32 (float64 where a leaf is), as a plain sum. Where that
has overflowed, or is so small that squares were lost, a branch on scalars alone computes it anew
from scaled updates, so that the norm is right for gradients of any size and costs one reading.

Source: Pascanu et al. (2013), section 3.2, https://arxiv.org/abs/1211.5063
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from adamx.core.arithmetic import (
    compute_dtype,
    real_dtype,
    real_times_complex,
    root,
    squared_magnitude,
)
from adamx.core.checks import RATE, ScalarOrSchedule, check
from adamx.core.expressions import Expr, call, reduced
from adamx.core.formula import Symbols
from adamx.core.lifting import Slots
from adamx.core.step import Step
from adamx.core.transformation import Transformation
from adamx.transforms.scale_by_learning_rate import scheduled

# For float32 and float64: the sum under which squares of single elements may have been lost, and
# the factors with which the norms of such and of overflowing updates are computed: powers of two,
# which round nothing, far enough from both ends of the range.
_SCALES = {4: (2.0**-80, 2.0**-96, 2.0**80), 8: (2.0**-800, 2.0**-700, 2.0**500)}


def sum_of_all_squares(leaves: Sequence[jax.Array]) -> jax.Array:
    """Return the sum of |u|^2 over all elements: infinite where it overflows.

    Written alike wherever it is needed, so that the compiler finds the sums to be one.

    Args:
        leaves: arrays in compute dtype.

    Example:
        >>> print(sum_of_all_squares([jnp.array([1.0, 2.0]), jnp.array(3.0)]))
        14.0
    """
    dtype = real_dtype(compute_dtype(*(u.dtype for u in leaves)))
    sums = [jnp.sum(squared_magnitude(u)).astype(dtype) for u in leaves]
    return sum(sums, start=jnp.zeros([], dtype))


def global_norm(leaves: Sequence[jax.Array]) -> jax.Array:
    """Return the root of the sum of squares over all elements of all leaves.

    Args:
        leaves: arrays in compute dtype; with none the norm is 0.

    Returns:
        A scalar, float32 or float64: inf where an element is infinite, NaN where one is NaN.

    Example:
        The squares of these are no float32:

        >>> print(global_norm([jnp.array([3e30]), jnp.array([4e30])]))
        5e+30
        >>> print(global_norm([jnp.array([3e-30, 4e-30])]))
        5e-30
    """
    plain = sum_of_all_squares(leaves)
    small, down, up = _SCALES[plain.dtype.itemsize]

    def scaled() -> jax.Array:
        # not a constant: the compiler would write (c u)^2 as c^2 u^2, which overflows
        factor = jnp.where(plain <= small, up, down).astype(plain.dtype)
        shares = []
        for u in leaves:
            with real_times_complex(u.dtype):
                shares.append(factor.astype(real_dtype(u.dtype)) * u)
        return root(sum_of_all_squares(shares)) / factor

    usual = (plain > small) & (plain < jnp.inf)
    return jax.lax.cond(usual, lambda: jnp.sqrt(plain), scaled)


class clip_by_global_norm(Transformation):
    """Scale the updates down such that the norm of the whole tree is `max_norm` at most.

    It reads the whole tree, so it stands in a top-level chain (at the head, where it costs one
    reading of the gradients; behind other stages what these emit is computed twice or stored).
    NaN and infinite elements make updates that are NaN; `skip_nonfinite` around the chain skips
    such steps, and shares the reading.

    Attributes:
        max_norm: >= 0, in the unit of the updates: a number, array or schedule.
        recorded_as: the state's entry with the norm before clipping, float32; None keeps none. The
            argument is `record`: True means "grad_norm", a string another name.

    Raises:
        ValueError: if `max_norm` is negative or not finite.

    Example:
        >>> tx = clip_by_global_norm(1.0, record=True)
        >>> grads = {"w": jnp.array([3.0]), "b": jnp.array([-4.0])}
        >>> updates, state = tx.update(grads, tx.init(grads))
        >>> updates, float(state["grad_norm"])
        ({'b': Array([-0.8], dtype=float32), 'w': Array([0.6], dtype=float32)}, 5.0)
    """

    max_norm: ScalarOrSchedule
    recorded_as: str | None

    def __init__(self, max_norm: ScalarOrSchedule, record: bool | str = False) -> None:
        """Check max_norm and settle the name of what is recorded."""
        object.__setattr__(self, "max_norm", max_norm)
        check(self, max_norm=RATE)
        name = record if isinstance(record, str) else "grad_norm" if record else None
        object.__setattr__(self, "recorded_as", name)

    def arguments(self) -> Iterator[tuple[str, Any]]:
        yield "", self.max_norm
        if self.recorded_as is not None:
            yield "record", self.recorded_as == "grad_norm" or self.recorded_as

    def measure(self, step: Step, leaves: list[jax.Array]) -> Any:
        norm = global_norm(leaves)
        limit = jnp.asarray(scheduled(self.max_norm, step.count), norm.dtype)
        beyond = norm > limit
        return jnp.where(beyond, limit / jnp.where(beyond, norm, 1), 1), norm

    def record(self, scalars: Any) -> Slots:
        _, norm = scalars
        return {} if self.recorded_as is None else {self.recorded_as: norm}

    def emit(self, u: jax.Array, slots: Slots, step: Step) -> jax.Array:
        factor, _ = step.scalars
        return factor * u

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        u, largest = symbols.named(u), symbols.number("c", self.max_norm)
        return u * call("min", 1, largest / reduced("norm", u, "all"))
