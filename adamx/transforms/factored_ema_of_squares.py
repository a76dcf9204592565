"""Moving averages of the squares' rows and columns: Adafactor's second moment of a matrix.

    R_t = decay * R_{t-1} + (1 - decay) * (mean_j |u_t|^2 + eps),    R_0 = 0,    one for each row i
    C_t = decay * C_{t-1} + (1 - decay) * (mean_i |u_t|^2 + eps),    C_0 = 0,    one for each column
    u'_t = R_t C_t / mean_i R_t

This is the matrix of rank one that is nearest to the average of squares in the I-divergence, and
has the same means of rows and columns. For n rows and m columns it takes n + m numbers in the place
of n m. A vector, and an array that is too small for it to pay, has the average of its squares:

    nu_t = decay * nu_{t-1} + (1 - decay) * (|u_t|^2 + eps),    nu_0 = 0

The paper has sums over rows and columns; means, as in Optax, give the same product. It adds eps to
the square of each gradient, which is the same sum.

Source: Shazeer & Stern (2018), Algorithms 1 and 4, https://arxiv.org/abs/1804.04235
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adamx.core.arithmetic import average, divide, limited_square, placed_like, zeros
from adamx.core.checks import Decay, NonNegative, whole_number
from adamx.core.concept import Slots
from adamx.core.norms import mean, reduced_size
from adamx.core.schedules import scheduled_decay
from adamx.core.shard import total
from adamx.core.step import LeafStep, Step
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, last, reduced
from adamx.formula.symbols import Symbols

MatrixAxes = tuple[int, ...] | Callable[[str, jax.Array], tuple[int, ...]] | None
"""The axes of rows and columns, for all leaves or as a function of a leaf's path and the leaf."""


class factored_ema_of_squares(Transformation):
    """Replace the updates by the product of averages of their squares' rows and columns.

    Attributes:
        decay: weight of the past, in [0, 1): a number, array or schedule.
        min_dim_size_to_factor: the least size, >= 1, of both axes of an array that is factored.
        eps: added to the squares, >= 0, in the squared unit of the gradients.
        axes: the axis along which the rows are counted, and that of the columns: a pair, `()` for
            arrays that are not factored, or a function from a leaf's path, such as "dense/kernel",
            and the leaf to one of these. None means the two largest axes, of which the larger one
            counts the columns, if both have the least size.
        name: the slot that keeps the average of an array that is not factored: real, float32 or
            wider, shaped like the parameter, in the squared unit of the updates. A factored array
            has `<name>_row` and `<name>_col` in its place, with size 1 along the axis that is
            averaged over. A sharded parameter's slot is sharded along the other axes.

    Raises:
        TypeError: if `min_dim_size_to_factor` is not a whole number, or one that is not known when
            a program is traced.
        ValueError: if a number is out of its range, or `axes` is not a pair of different axes; at
            `init` and `update`, if a leaf does not have these axes.

    Example:
        The means of the rows' squares are 26 and 4, of the columns' 10 and 20, and of all 15:

        >>> import jax.numpy as jnp
        >>> tx, grads = factored_ema_of_squares(0.0, 2), jnp.array([[4.0, 6.0], [2.0, 2.0]])
        >>> updates, state = tx.update(grads, tx.init(grads))
        >>> state["nu_row"], state["nu_col"]
        (Array([[26.],
               [ 4.]], dtype=float32), Array([[10., 20.]], dtype=float32))
    """

    decay: Decay
    min_dim_size_to_factor: int = 128
    eps: NonNegative = 1e-30
    axes: MatrixAxes = None
    name: str = "nu"

    def __post_init__(self) -> None:
        name, least = "min_dim_size_to_factor", self.min_dim_size_to_factor
        self._set(**{name: whole_number("factored_ema_of_squares", name, least)})
        if self.axes is not None and not callable(self.axes):
            self._set(axes=_checked(self.axes))

    def for_leaf(self, path: str, leaf: jax.Array) -> Transformation:
        return self.with_fields(axes=self._axes(path, leaf))

    def slot_names(self) -> tuple[str, ...]:
        return (self.name, *self._names)

    def slots(self, param: jax.Array) -> Slots:
        # a reduction keeps the slot of a sharded parameter sharded along the other axes
        start = placed_like(zeros(param), param).real
        axes = self._axes("", param)
        if not axes:
            return {self.name: start}
        means = (start.sum(axis, keepdims=True) for axis in reversed(axes))
        return dict(zip(self._names, means, strict=True))

    def scalars(self, step: Step) -> Any:
        return scheduled_decay(self, step.count)

    def accumulate(self, u: jax.Array, slots: Slots, step: LeafStep) -> Slots:
        axes = self._axes("", u)
        square = limited_square(u)
        squares = {self.name: square}
        if axes:
            means = (mean(square, axis, step.shard) for axis in reversed(axes))
            squares = dict(zip(self._names, means, strict=True))
        decay, weight = step.scalars
        largest = jnp.finfo(u.dtype).max  # where a sum overflows
        return {
            name: average(slots[name], jnp.minimum(x + self.eps, largest), decay, weight)
            for name, x in squares.items()
        }

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        axes = self._axes("", u)
        if not axes:
            return slots[self.name]
        row, col = (slots[name] for name in self._names)
        mean = total(row, axes[0], step.shard) / reduced_size(row, axes[0], step.shard)
        # near 1, so that neither a product of averages nor the derivative leaves the range
        unit = jax.lax.stop_gradient(1 / jnp.maximum(mean, jnp.finfo(mean.dtype).tiny))
        return divide(row * unit, mean * unit) * col

    @property
    def _names(self) -> tuple[str, str]:
        return f"{self.name}_row", f"{self.name}_col"

    def _axes(self, path: str, x: jax.Array) -> tuple[int, ...]:
        """Return the axes of an array's rows and columns; none if it is not factored."""
        axes = self.axes
        if axes is None:
            return _largest(x.shape, self.min_dim_size_to_factor)
        if callable(axes):
            axes = _checked(axes(path, x))
        if any(not -x.ndim <= axis < x.ndim for axis in axes):
            raise ValueError(
                f"factored_ema_of_squares: axes must be axes of the leaf, got {axes} for "
                f"{path!r} of shape {list(x.shape)}; () leaves it as it is"
            )
        return tuple(axis % x.ndim for axis in axes)

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        b, eps = symbols.number("b", self.decay), symbols.number("eps", self.eps)
        if self.axes == ():
            v = symbols.slot(self.name)
            return symbols.define(v, b * last(v) + (1 - b) * (u**2 + eps), 0)
        u, found = symbols.named(u), []
        for i, (name, over) in enumerate(zip(self._names, ("row", "column"), strict=True)):
            mean = reduced("mean", u**2, over, lambda x, i=i: self._axes("", x)[1 - i])
            slot = symbols.slot(name)
            found.append(symbols.define(slot, b * last(slot) + (1 - b) * (mean + eps), 0))
        row, col = found
        return row * col / reduced("mean", row, "column", lambda x: self._axes("", x)[0])


def _checked(axes: Any) -> tuple[int, ...]:
    """Return a pair of axes as a tuple, or the empty one; raise for anything else."""
    found = tuple(axes) if isinstance(axes, tuple | list) else None
    if found is None or len(found) not in (0, 2) or len(set(found)) != len(found):
        raise ValueError(
            "factored_ema_of_squares: axes must be the axis of the rows and that of the columns, "
            f"as (-2, -1), or () for an array that is not factored, got {axes!r}"
        )
    return found


def _largest(shape: tuple[int, ...], least: int) -> tuple[int, ...]:
    """Return the second largest and the largest axis, the later of equal ones as the larger.

    Example:
        >>> _largest((3, 4), 3), _largest((4, 4), 3), _largest((2, 8, 4), 3), _largest((2, 4), 3)
        ((0, 1), (0, 1), (2, 1), ())
    """
    in_order = sorted(range(len(shape)), key=lambda axis: shape[axis])
    pair = tuple(in_order[-2:])
    return pair if len(pair) == 2 and shape[pair[0]] >= least else ()
