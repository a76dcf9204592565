"""Orthogonalise the update of a matrix by Newton and Schulz' iteration: Muon's step.

    X_0 = u / (|u|_F + eps)
    X_k = a X_{k-1} + b (X X^T) X + c (X X^T)^2 X,    X = X_{k-1},    k = 1 ... ns_steps
    u'  = X_{ns_steps}

An odd polynomial of a matrix acts on its singular values alone: where u = U S V^T, u' = U p(S) V^T,
p being the quintic a x + b x^3 + c x^5, applied again and again. With Muon's coefficients five
steps take all singular values above 1/500 of the norm to between 0.68 and 1.21, which does as well
as 1; coefficients that converge to 1 would need many more steps. The Gram matrix is that of the
shorter side.

Source: Jordan et al. (2024), Muon: An optimizer for hidden layers in neural networks,
https://kellerjordan.github.io/posts/muon; the quintic as in Bernstein & Newhouse (2024),
https://arxiv.org/abs/2409.20325
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from adamx.core.arithmetic import divide, resharded_like
from adamx.core.checks import NonNegative, whole_number
from adamx.core.concept import Slots
from adamx.core.norms import norm
from adamx.core.shard import Shard
from adamx.core.step import LeafStep
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, call
from adamx.formula.symbols import Symbols

Sides = tuple[Any, ...] | Callable[[str, jax.Array], tuple[Any, ...]] | None
"""The axes of a matrix's two sides, or a function of a leaf's path and the leaf that tells them."""

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Muon's coefficients a, b and c."""


class orthogonalized(Transformation):
    """Replace the update of each matrix by one of nearly the same singular vectors; keep nothing.

    Attributes:
        ns_coeffs: the coefficients (a, b, c) of the quintic, or a tuple of `ns_steps` such triples,
            one for each step.
        ns_steps: the number of steps, >= 1.
        eps: added to the norm, >= 0, in the unit of the updates. A matrix far below it stays small.
        axes: the axes of the matrix's rows, or inputs, and of its columns, or outputs: a pair, each
            an axis or a tuple of axes, which together are one side, such as (0, (1, 2)) for a
            kernel (in, heads, features). All other axes are stacked: each index has a matrix of its
            own. () leaves an array as it is. Or a function from a leaf's path, such as
            "dense/kernel", and the leaf to one of these. None means the two axes of a matrix.
        dtype: the dtype in which the matrices are multiplied; None means the update's, at least
            float32. bfloat16 is faster on accelerators, and exact enough.

    Raises:
        TypeError: if `ns_steps` is not a whole number, or one that is not known when a program is
            traced.
        ValueError: if a number is out of its range, or `axes` does not name two sides without a
            common axis; at `update`, if a leaf does not have these axes, or is not a matrix where
            `axes` is None.

    Example:
        One step of 2 x - 1.5 x^3 + 0.5 x^5, of the singular values 0.6 and 0.8 of a norm 5:

        >>> import jax.numpy as jnp
        >>> tx, grads = orthogonalized((2.0, -1.5, 0.5), 1), jnp.diag(jnp.array([3.0, 4.0]))
        >>> found = tx.update(grads, tx.init(grads))[0]
        >>> [round(x, 4) for x in jnp.ravel(found).tolist()]
        [0.9149, 0.0, 0.0, 0.9958]
    """

    ns_coeffs: tuple[Any, ...] = QUINTIC
    ns_steps: int = 5
    eps: NonNegative = 1e-8
    axes: Sides = None
    dtype: DTypeLike | None = None

    def __post_init__(self) -> None:
        steps = whole_number("orthogonalized", "ns_steps", self.ns_steps)
        self._set(ns_steps=steps, ns_coeffs=_as_tuple(self.ns_coeffs))
        triples = self._triples()
        if len(triples) != steps or not all(map(_is_triple, triples)):
            raise ValueError(
                "orthogonalized: ns_coeffs must be three finite numbers, or three for each of the "
                f"{steps} steps, got {self.ns_coeffs!r}"
            )
        if self.axes is not None and not callable(self.axes):
            self._set(axes=checked_sides("orthogonalized", self.axes))

    def for_leaf(self, path: str, leaf: jax.Array) -> Transformation:
        return self.with_fields(axes=sides_of("orthogonalized", self.axes, path, leaf))

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        sides = sides_of("orthogonalized", self.axes, "", u)
        if not sides:
            return u
        rows, columns = sides
        size = norm(u, rows + columns, step.shard)
        x = divide(u, size + self.eps, least=self.eps)
        x = _gathered(x, rows + columns, step.shard)
        others = tuple(i for i in range(x.ndim) if i not in rows + columns)
        order = others + rows + columns
        moved = _on_each_device(x.transpose(order), len(others))
        flat = moved.reshape(*moved.shape[: len(others)], math.prod(x.shape[i] for i in rows), -1)
        found = self._iterated(flat).astype(u.dtype).reshape(moved.shape)
        back = found.transpose(sorted(range(x.ndim), key=lambda i: order[i]))
        return step.shard.own(resharded_like(back, u), u)

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        if self.axes == ():
            return u
        known = set(self._triples())
        a, b, c = ("a", "+ b", "+ c") if len(known) > 1 else map("{:+g}".format, *known)
        signed = f"{a.lstrip('+')} X {b[0]} {b[1:].strip()} (X X^T) X {c[0]} {c[1:].strip()}"
        symbols.remark(
            f"orthogonalized: {self.ns_steps} steps X <- {signed} (X X^T)^2 X from X / |X|"
        )
        return call("orthogonalized", u, self.ns_steps)

    def _triples(self) -> tuple[tuple[float, ...], ...]:
        """Return the coefficients of each step."""
        coeffs = self.ns_coeffs
        many = isinstance(coeffs, tuple) and any(isinstance(x, tuple) for x in coeffs)
        return coeffs if many else (coeffs,) * self.ns_steps

    def _iterated(self, x: jax.Array) -> jax.Array:
        """Return the matrices [..., n, m] after all steps."""
        turned = x.shape[-2] > x.shape[-1]
        x = x.astype(self.dtype or x.dtype)
        x = x.swapaxes(-1, -2) if turned else x
        for i, (a, b, c) in enumerate(self._triples()):
            # or XLA for TPU keeps the terms of several steps, and adds them up in the last
            x = jax.lax.optimization_barrier(x) if i else x
            gram = x @ x.swapaxes(-1, -2).conj()
            x = a * x + (b * gram + c * (gram @ gram)) @ x
        return x.swapaxes(-1, -2) if turned else x


def sides_of(function: str, axes: Sides, path: str, x: Any) -> tuple[tuple[int, ...], ...]:
    """Return the axes of the two sides of an array's matrices; () for an array that has none.

    Args:
        function: the calling concept, for messages.
        axes: as in `orthogonalized`.
        path: the leaf's path.
        x: the array, or its shape and dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> sides_of("f", (0, (1, -1)), "w", jnp.zeros((4, 2, 3)))
        ((0,), (1, 2))
    """
    if axes is None:
        if x.ndim != 2:
            raise ValueError(
                f"{function}: leaf {path!r} has the shape {list(x.shape)} and is not a matrix: "
                "axes= says which axes are its rows and columns, stacked(tx, ...) which are "
                "stacked, and by_path or muon_adamw gives other leaves another optimizer"
            )
        axes = (0, 1)
    if callable(axes):
        axes = checked_sides(function, axes(path, x))
    flat = [axis for side in axes for axis in ((side,) if isinstance(side, int) else side)]
    if any(not -x.ndim <= axis < x.ndim for axis in flat) or len(
        {axis % x.ndim for axis in flat}
    ) < len(flat):
        raise ValueError(
            f"{function}: axes must be different axes of the leaf, got {axes} for {path!r} of "
            f"shape {list(x.shape)}; () leaves it as it is"
        )
    sides = ((side,) if isinstance(side, int) else side for side in axes)
    return tuple(tuple(axis % x.ndim for axis in side) for side in sides)


def checked_sides(function: str, axes: Any) -> tuple[Any, ...]:
    """Return two sides as a tuple of axes or tuples of axes, or the empty one; else raise."""
    found = _as_tuple(axes)
    sides = [x if isinstance(x, tuple) else (x,) for x in found] if isinstance(found, tuple) else []
    numbers_alone = all(isinstance(i, int) for side in sides for i in side)
    if found != () and not (len(sides) == 2 and all(sides) and numbers_alone):
        raise ValueError(
            f"{function}: axes must be the axes of the rows and those of the columns, as (0, 1) or "
            f"(0, (1, 2)), or () for an array that is left as it is, got {axes!r}"
        )
    return found


def _is_triple(x: Any) -> bool:
    three = isinstance(x, tuple) and len(x) == 3
    return three and all(isinstance(c, numbers.Real) and math.isfinite(c) for c in x)


def _as_tuple(x: Any) -> Any:
    return tuple(map(_as_tuple, x)) if isinstance(x, tuple | list) else x


def _gathered(x: jax.Array, axes: tuple[int, ...], shard: Shard) -> jax.Array:
    """Return the whole matrices of a device's shard, in `shard_map`."""
    for axis in axes:
        if names := shard.along(x, (axis,)):
            x = jax.lax.all_gather(x, names, axis=axis, tiled=True)
    return x


def _on_each_device(x: jax.Array, number: int) -> jax.Array:
    """Return matrices that each device has whole, on a mesh with explicit axes.

    There JAX does not choose how a product of divided matrices is computed; elsewhere the compiler
    does. The first axes, as many as the number says, stay divided.
    """
    where = jax.typeof(x).sharding
    spec = PartitionSpec(*where.spec[:number], *[None] * (x.ndim - number))
    return x if where.spec == spec else jax.sharding.reshard(x, where.update(spec=spec))
