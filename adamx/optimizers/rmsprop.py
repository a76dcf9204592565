"""RMSprop: divide by the root of the average of the squared gradients.

    v_t = b v_{t-1} + (1 - b) g_t^2                            w <- w - lr * g_t / (sqrt(v_t) + eps)

    rmsprop = chain(rms_scaling(second_moment=ema_of_squares(b)), scale_by_learning_rate(lr))

Source: Tieleman & Hinton (2012), Lecture 6.5; centred: Graves (2013), section 4.2,
https://arxiv.org/abs/1308.0850
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from adamx.core.arithmetic import squared_magnitude
from adamx.core.chain import chain
from adamx.core.checks import Decay, Fraction, NonNegative, Rate, Scalar, checked
from adamx.core.combine import combine
from adamx.core.transformation import Transformation
from adamx.formula.expressions import abs_, call
from adamx.storage.choice import Moments, stored
from adamx.transforms.bias_correction import bias_correction as corrected
from adamx.transforms.ema import ema
from adamx.transforms.ema_of_squares import ema_of_squares
from adamx.transforms.rms_scaling import rms_scaling
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate
from adamx.transforms.trace import trace


@checked
def scale_by_rms(
    decay: Decay = 0.9,
    eps: NonNegative = 1e-8,
    initial_scale: NonNegative = 0.0,
    eps_in_sqrt: bool = False,
    bias_correction: bool = False,
) -> rms_scaling:
    """Return RMSprop without its learning rate; arguments as `optax.scale_by_rms`'s.

    Args:
        decay: weight of the past, in [0, 1): a number, array or schedule.
        eps: added to the root, >= 0, in the unit of the gradients.
        initial_scale: the average before the first step, >= 0.
        eps_in_sqrt: True adds eps under the root, as Optax does.
        bias_correction: whether to divide averages by 1 - decay^t.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> scale_by_rms(0.9)
        rms_scaling(second_moment=ema_of_squares(0.9))
    """
    squares = ema_of_squares(decay, initial_scale)
    unbiased = chain(squares, corrected(decay, "nu_correction"))
    return _scaling(unbiased if bias_correction else squares, eps, eps_in_sqrt)


def variance(mean_of_squares: jax.Array, mean: jax.Array) -> jax.Array:
    """Return E[g^2] - |E[g]|^2, kept from falling below 0 by rounding.

    E[g^2] is at least |E[g]|^2. If it is less than half of it, it has squares too large for their
    dtype, which count as the largest number; then E[g^2] itself is returned.

    Example:
        >>> print(variance(jnp.array(5.0), jnp.array(2.0)))
        1.0
    """
    square = squared_magnitude(mean)
    most = jnp.minimum(mean_of_squares, float(jnp.finfo(square.dtype).max))
    overflown = 0.5 * square > most
    return jnp.where(overflown, most, jnp.maximum(most - square, 0))


variance.formula = lambda v, m: call("max", v - abs_(m) ** 2, 0)  # pyright: ignore


@checked
def rmsprop(
    learning_rate: Rate,
    decay: Decay = 0.9,
    eps: NonNegative = 1e-8,
    initial_scale: NonNegative = 0.0,
    eps_in_sqrt: bool = False,
    centered: bool = False,
    momentum: Fraction | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    moments: Moments = "float32",
) -> chain:
    """Return RMSprop; arguments as `optax.rmsprop`'s, but for the default of `eps_in_sqrt`.

    Args:
        learning_rate: a number, array or schedule, >= 0.
        decay: weight of the past, in [0, 1): a number, array or schedule.
        eps: added to the root, >= 0, in the unit of the gradients. As in the notes and PyTorch.
        initial_scale: the average before the first step, >= 0.
        eps_in_sqrt: True adds eps under the root, as Optax does.
        centered: whether to divide by the standard deviation of the gradients, with a slot `mu`.
        momentum: decay of the heavy ball `trace`, in [0, 1]: a number, array or schedule; None
            means no momentum.
        nesterov: whether to look one step ahead, as Nesterov's method does. It is for `momentum`.
        bias_correction: whether to divide averages by 1 - decay^t.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.

    Raises:
        ValueError: if a number is out of its range, or `moments` cannot store the slots;
            `centered` needs float32.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = rmsprop(0.5, decay=0.75, eps=0.0)
        >>> tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))[0]
        Array([-1.], dtype=float32)
    """
    if centered and moments != "float32":
        raise ValueError(
            "rmsprop: centered subtracts mu^2 from nu, and rounding errors would swamp the "
            f"difference: moments must be 'float32', got {moments!r}"
        )
    squares: Transformation = ema_of_squares(decay, initial_scale)
    mean: Transformation = ema(decay)
    if bias_correction:
        squares = chain(squares, corrected(decay, "nu_correction"))
        mean = chain(mean, corrected(decay, "mu_correction"))
    second_moment = combine(variance, squares, mean) if centered else squares
    ball = None if momentum is None else trace(momentum, nesterov, name="trace_of_steps")
    return chain(
        stored(_scaling(second_moment, eps, eps_in_sqrt), moments),
        scale_by_learning_rate(learning_rate),
        *([] if ball is None else [stored(ball, moments)]),
    )


def _scaling(second_moment: Transformation, eps: Scalar, eps_in_sqrt: bool) -> rms_scaling:
    inside, outside = (eps, 0.0) if eps_in_sqrt else (0.0, eps)
    return rms_scaling(second_moment=second_moment, eps=outside, eps_root=inside)
