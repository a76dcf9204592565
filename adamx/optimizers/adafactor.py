"""Adafactor: a second moment of rows and columns, clipped updates, and relative steps.

    V_t = R_t C_t / mean(R_t)                        of averages of g^2, with decay 1 - t^-0.8
    u_t = g_t / sqrt(V_t)
    u_t = u_t / max(1, rms(u_t) / clipping_threshold)
    w  <- w - lr * max(rms(w), 1e-3) * u_t           rms over one array

    adafactor = chain(rms_scaling(second_moment=factored_ema_of_squares(power_decay_schedule())),
                      clip_by_rms(1.0), scale_by_learning_rate(lr), scale_by_param_block_rms())

It keeps a few bytes a row and a column, where Adam keeps 8 bytes a parameter. `momentum` keeps an
average of the steps in addition, in 4 bytes, or in 2 with `moments="bfloat16"`.

The paper's rate is min(1e-2, 1 / sqrt(t)), which is `learning_rate=lambda step: ...` here. Its
momentum is an average of u_t; here, as in Optax, it is one of the whole step, with learning rate
and scale. The weight decay is added after the learning rate, as in Optax; the paper has none.

Source: Shazeer & Stern (2018), Algorithms 4 and 5, https://arxiv.org/abs/1804.04235
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.typing import DTypeLike

from adamx.core.chain import chain
from adamx.core.checks import Decay, Finite, NonNegative, Rate, checked, whole_number
from adamx.core.transformation import Transformation
from adamx.storage.choice import Moments, stored
from adamx.transforms.add_decayed_weights import add_decayed_weights
from adamx.transforms.clip_by_rms import clip_by_rms
from adamx.transforms.ema import ema
from adamx.transforms.factored_ema_of_squares import factored_ema_of_squares
from adamx.transforms.power_decay_schedule import power_decay_schedule
from adamx.transforms.rms_scaling import rms_scaling
from adamx.transforms.scale import scale
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate
from adamx.transforms.scale_by_param_block_rms import scale_by_param_block_rms

# NumPy's, which optax.inject_hyperparams does not trace as it does an int: it decides shapes.
_LEAST: Any = np.int32(128)


@checked
def adafactor(
    learning_rate: Rate,
    min_dim_size_to_factor: int = _LEAST,
    decay_rate: NonNegative = 0.8,
    decay_offset: Finite = 0,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: NonNegative | None = 1.0,
    momentum: Decay | None = None,
    dtype_momentum: DTypeLike | None = None,
    weight_decay_rate: Rate | None = None,
    eps: NonNegative = 1e-30,
    factored: bool = True,
    weight_decay_mask: Any = None,
    *,
    moments: Moments = "float32",
) -> chain:
    """Return Adafactor; arguments as `optax.adafactor`'s.

    Args:
        learning_rate: a number, array or schedule, >= 0. With `multiply_by_parameter_scale` an
            array changes by this fraction of its size in a step, at most.
        min_dim_size_to_factor: the least size, >= 1, of both axes of an array that is factored.
        decay_rate: the exponent, >= 0, of the decay 1 - t^-decay_rate of the squares.
        decay_offset: the number of steps before the decay begins to rise; see
            `power_decay_schedule`.
        multiply_by_parameter_scale: whether to multiply by the root mean square of an array's
            weights, 1e-3 at least.
        clipping_threshold: the largest root mean square of an array's update, >= 0, before the
            learning rate; None means no clipping.
        momentum: decay of an average of the steps, in [0, 1): a number, array or schedule; None
            means no average.
        dtype_momentum: dtype of `mu`, rounded to nearest; None means the parameter's, at least
            float32.
        weight_decay_rate: a number, array or schedule, >= 0, by which the weights shrink in a step,
            whatever the learning rate; None means no decay.
        eps: added to the squares, >= 0, in the squared unit of the gradients.
        factored: whether to factor at all. False keeps `nu` for each parameter.
        weight_decay_mask: which leaves decay: a tree of bools, a function of the parameters that
            returns one, or patterns of paths, such as "*/kernel"; None means all.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.
            It is that of `mu`.

    Raises:
        TypeError: if `min_dim_size_to_factor` is not a whole number, or one that is not known when
            a program is traced.
        ValueError: if a number is out of its range, or `moments` cannot store `mu`.

    Example:
        In the first step v is g^2, and the weights' root mean square is 5:

        >>> import jax.numpy as jnp
        >>> tx, w = adafactor(0.5), jnp.array([1.0, -7.0])
        >>> tx.update(jnp.array([3.0, -0.1]), tx.init(w), w)[0]
        Array([-2.5,  2.5], dtype=float32)
    """
    least = whole_number("adafactor", "min_dim_size_to_factor", min_dim_size_to_factor)
    squares = factored_ema_of_squares(
        power_decay_schedule(decay_rate, decay_offset), least, eps, None if factored else ()
    )
    stages: list[Transformation] = [rms_scaling(second_moment=squares, eps=0.0)]
    if clipping_threshold is not None:
        stages.append(clip_by_rms(clipping_threshold))
    stages.append(scale_by_learning_rate(learning_rate, flip_sign=False))
    if multiply_by_parameter_scale:
        stages.append(scale_by_param_block_rms())
    if momentum is not None:
        stages.append(stored(ema(momentum, dtype_momentum), moments))
    elif moments != "float32":
        raise ValueError(f"adafactor: without momentum there are no moments to keep as {moments!r}")
    if weight_decay_rate is not None:
        stages.append(add_decayed_weights(weight_decay_rate, weight_decay_mask))
    return chain(*stages, scale(-1.0))
