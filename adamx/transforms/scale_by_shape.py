"""Scale a matrix by its shape, so that one learning rate serves for all: Muon's factors.

    u' = u sqrt(max(1, outputs / inputs))                        consistent_rms=None
    u' = u consistent_rms sqrt(max(inputs, outputs))             a number

An orthogonal matrix of n rows and m columns has the root mean square 1 / sqrt(max(n, m)). The
second factor gives it `consistent_rms` for all shapes; 0.2 is about that of AdamW's updates, whose
learning rate and weight decay then do for Muon too. The first is the original's, for matrices
(in, out).

Source: Jordan et al. (2024), https://kellerjordan.github.io/posts/muon; Liu et al. (2025), section
2.2 and equation 4, https://arxiv.org/abs/2502.16982
"""

from __future__ import annotations

import math

import jax

from adamx.core.checks import NonNegative
from adamx.core.identity import identity
from adamx.core.transformation import Transformation
from adamx.transforms.orthogonalized import Sides, checked_sides, sides_of
from adamx.transforms.scale import scale


class scale_by_shape(Transformation):
    """Multiply the update of each matrix by a factor that depends on its shape; keep nothing.

    Attributes:
        consistent_rms: the root mean square, >= 0, that an orthogonal matrix gets; None means the
            original factor, the root of outputs over inputs, at least 1.
        axes: the axes of the matrix's rows, or inputs, and of its columns, or outputs: a pair, each
            an axis or a tuple of axes, which together are one side, such as (0, (1, 2)) for a
            kernel (in, heads, features). All other axes are stacked: each index has a matrix of its
            own. () leaves an array as it is. Or a function from a leaf's path, such as
            "dense/kernel", and the leaf to one of these. None means the two axes of a matrix.

    Raises:
        ValueError: if `consistent_rms` is a negative number, or `axes` does not name two sides; at
            `update`, if a leaf does not have these axes, or is not a matrix where `axes` is None.

    Example:
        >>> import jax.numpy as jnp
        >>> w = jnp.ones((1, 4))
        >>> for tx in (scale_by_shape(), scale_by_shape(0.2)):
        ...     print(tx.update(w, tx.init(w))[0])
        [[2. 2. 2. 2.]]
        [[0.4 0.4 0.4 0.4]]
    """

    consistent_rms: NonNegative | None = None
    axes: Sides = None

    def __post_init__(self) -> None:
        if self.axes is not None and not callable(self.axes):
            self._set(axes=checked_sides("scale_by_shape", self.axes))

    def for_leaf(self, path: str, leaf: jax.Array) -> Transformation:
        """Return the scaling by the factor of a leaf's shape."""
        sides = sides_of("scale_by_shape", self.axes, path, leaf)
        if not sides:
            return identity()
        inputs, outputs = (math.prod(leaf.shape[i] for i in side) for side in sides)
        if self.consistent_rms is None:
            return scale(math.sqrt(max(1.0, outputs / max(inputs, 1))))
        return scale(self.consistent_rms * math.sqrt(max(inputs, outputs)))
