"""Undo the lean towards zero of an average that started there.

    u'_t = u_t / (1 - decay^t),    t = 1 in the first step

1 - decay^t is computed as -expm1(t * log(decay)), with log(decay) in double precision on the host
where decay is a number: the plain form is 1.4e-3 off in float32 at decay = 0.99999, this one 4e-7
at most for t up to 1e7. decay = 0 is a case of its own: the correction is 1.

Source: Kingma & Ba (2015), Algorithm 1 and section 3, https://arxiv.org/abs/1412.6980
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from adamx.core.checks import DECAY, Scalar, check
from adamx.core.lifting import Slots
from adamx.core.step import Step
from adamx.core.transformation import Transformation


def one_minus_power(decay: Scalar, count: jax.Array) -> jax.Array:
    """Return 1 - decay^count, to 4e-7 relative in float32.

    Args:
        decay: in [0, 1): a number, whose logarithm is taken in double precision, or an array.
        count: array of whole numbers >= 1, integer or floating.

    Returns:
        An array of the default floating dtype (float64 where x64 is enabled), or decay's.

    Example:
        >>> print(one_minus_power(0.5, jnp.array(2)), one_minus_power(0.0, jnp.array(1)))
        0.75 1.0
    """
    if isinstance(decay, jax.Array | np.ndarray):
        positive = jnp.where(decay > 0, decay, 0.5)
        # decay - 1 is exact for decay in [0.5, 1]; log(decay) would lose what 0.99999 has left
        power = jnp.expm1(count.astype(decay.dtype) * jnp.log1p(positive - 1))
        return jnp.where(decay > 0, -power, 1)
    if decay == 0:
        return jnp.ones_like(count, dtype=float)
    return -jnp.expm1(count.astype(float) * math.log(float(decay)))


class bias_correction(Transformation):
    """Divide the updates by 1 - decay^t; keep nothing.

    Attributes:
        decay: the decay of the average that this corrects, in [0, 1); 0 makes this the identity.

    Raises:
        ValueError: if `decay` is a number outside [0, 1), or a 16-bit array.

    Example:
        In the first step the corrected average is the update itself:

        >>> import adamx, jax.numpy as jnp
        >>> tx = adamx.chain(adamx.ema(0.5), bias_correction(0.5))
        >>> tx.update(jnp.array([4.0, -8.0]), tx.init(jnp.zeros(2)))[0]
        Array([ 4., -8.], dtype=float32)
    """

    decay: Scalar

    def __post_init__(self) -> None:
        check(self, decay=DECAY)

    def prepare(self, step: Step) -> jax.Array:
        return one_minus_power(self.decay, step.count)

    def emit(self, u: jax.Array, slots: Slots, step: Step) -> jax.Array:
        return u / step.scalars
