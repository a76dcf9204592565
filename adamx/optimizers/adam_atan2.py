"""Adam-atan2: Adam without eps, whose steps do not depend on the unit of the gradients.

    m_t = b1 m_{t-1} + (1 - b1) g_t            m^_t = m_t / (1 - b1^t)
    v_t = b2 v_{t-1} + (1 - b2) g_t^2          v^_t = v_t / (1 - b2^t)
    w <- (1 - lr * weight_decay) w - lr * a atan2(m^_t, b sqrt(v^_t))

    adam_atan2 = chain(atan2_scaling(chain(ema(b1), bias_correction(b1)),
                                     second_moment=chain(ema_of_squares(b2), bias_correction(b2)),
                                     a=a, b=b),
                       add_decayed_weights(weight_decay), scale_by_learning_rate(lr))

Adam's eps is a number in the unit of the gradients, which shrink as a model grows. Here there is
none. A first step is lr a pi / 4 for b = 1, where Adam's is lr: with a = 4 / pi, 1.27, Adam's
learning rates fit, but no step is longer than 2 lr.

a and b are 1 by default, so that the update is the angle itself. The decay is `adamw`'s.

Source: Everett et al. (2024), https://arxiv.org/abs/2407.05872
"""

from __future__ import annotations

from typing import Any

from jax.typing import DTypeLike

from adamx.core.chain import chain
from adamx.core.checks import Decay, NonNegative, Rate, checked
from adamx.storage.choice import Moments, stored
from adamx.transforms.add_decayed_weights import add_decayed_weights
from adamx.transforms.atan2_scaling import atan2_scaling
from adamx.transforms.bias_correction import bias_correction
from adamx.transforms.ema import ema
from adamx.transforms.ema_of_squares import ema_of_squares
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate


@checked
def adam_atan2(
    learning_rate: Rate,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    mu_dtype: DTypeLike | None = None,
    weight_decay: Rate = 0.0,
    mask: Any = None,
    *,
    a: NonNegative = 1.0,
    b: NonNegative = 1.0,
    moments: Moments = "float32",
) -> chain:
    """Return Adam-atan2; arguments as `adamw`'s.

    Args:
        learning_rate: a number, array or schedule, >= 0.
        b1: weight of the past in the average of gradients, in [0, 1): a number, array or schedule.
        b2: weight of the past in the average of squares, in [0, 1): a number, array or schedule.
        mu_dtype: dtype of `mu`, rounded to nearest; None means the parameter's, at least float32.
        weight_decay: a number, array or schedule, >= 0. The weights shrink by
            `learning_rate * weight_decay` a step.
        mask: which leaves decay: a tree of bools, a function of the parameters that returns one, or
            patterns of paths, such as "*/kernel"; None means all.
        a: factor of the angle, >= 0: a number or array.
        b: factor of the root, >= 0: a number or array.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.
            Also "packed16" and "packed8": `mu` and `nu` together in 4 or 2 bytes.

    Raises:
        ValueError: if a number is out of its range, or `moments` cannot store the slots.

    Example:
        In the first step each element moves by the learning rate, however small its gradient:

        >>> import jax.numpy as jnp
        >>> tx, w = adam_atan2(0.5, a=4 / jnp.pi), jnp.zeros(2)
        >>> tx.update(jnp.array([4.0, -1e-15]), tx.init(w), w)[0].round(3)
        Array([-0.5,  0.5], dtype=float32)
    """
    scaling = atan2_scaling(
        chain(ema(b1, mu_dtype), bias_correction(b1, "mu_correction")),
        second_moment=chain(ema_of_squares(b2), bias_correction(b2, "nu_correction")),
        a=a,
        b=b,
    )
    return chain(
        stored(scaling, moments, decays=(b1, b2)),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
