"""LaProp: Adam that averages scaled gradients, where Adam scales the average.

    v_t = b2 v_{t-1} + (1 - b2) g_t^2                             v^_t = v_t / (1 - b2^t)
    m_t = b1 m_{t-1} + (1 - b1) g_t / (sqrt(v^_t) + eps)          m^_t = m_t / (1 - b1^t)
    w <- (1 - lr * weight_decay) w - lr * m^_t

    laprop = chain(rms_scaling(second_moment=chain(ema_of_squares(b2), bias_correction(b2)),
                               eps=eps),
                   ema(b1), bias_correction(b1), add_decayed_weights(weight_decay),
                   scale_by_learning_rate(lr))

Each gradient is divided by the second moment of its own step, so that b1 and b2 may be chosen
apart: a step stays bounded for b1^2 > b2 too, where Adam's does not. Both averages are corrected
for their start at 0, v before it divides. With b1 = 0 this is Adam.

The authors' code multiplies by the learning rate before the average and not after it, so that a
step's rate acts on the steps to come too, and does not multiply the weight decay by it. Here, as in
`adamw`, the rate multiplies both. eps is 1e-15 as there.

Source: Ziyin, Wang & Ueda (2020), Algorithm 1, https://arxiv.org/abs/2002.04839
"""

from __future__ import annotations

from typing import Any

from jax.typing import DTypeLike

from adamx.core.chain import chain
from adamx.core.checks import Decay, NonNegative, Rate, checked
from adamx.storage.choice import Moments, stored
from adamx.transforms.add_decayed_weights import add_decayed_weights
from adamx.transforms.bias_correction import bias_correction
from adamx.transforms.ema import ema
from adamx.transforms.ema_of_squares import ema_of_squares
from adamx.transforms.rms_scaling import rms_scaling
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate


@checked
def laprop(
    learning_rate: Rate,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: NonNegative = 1e-15,
    eps_root: NonNegative = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: Rate = 0.0,
    mask: Any = None,
    *,
    moments: Moments = "float32",
) -> chain:
    """Return LaProp; arguments as `adamw`'s.

    Args:
        learning_rate: a number, array or schedule, >= 0.
        b1: weight of the past in the average of gradients, in [0, 1): a number, array or schedule.
            The gradients are scaled first.
        b2: weight of the past in the average of squares, in [0, 1): a number, array or schedule.
        eps: added to the root, >= 0, in the unit of the gradients.
        eps_root: added under the root, >= 0, in the squared unit of the gradients.
        mu_dtype: dtype of `mu`, rounded to nearest; None means the parameter's, at least float32.
        weight_decay: a number, array or schedule, >= 0. The weights shrink by
            `learning_rate * weight_decay` a step.
        mask: which leaves decay: a tree of bools, a function of the parameters that returns one, or
            patterns of paths, such as "*/kernel"; None means all.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.
            Also "packed16": `mu` and `nu` together in 4 bytes.

    Raises:
        ValueError: if a number is out of its range, or `moments` cannot store the slots.

    Example:
        Scaled gradients of -1 and 1, and an average of 1/3; how large they were is gone, since with
        b2 = 0 each is divided by its own magnitude:

        >>> import jax.numpy as jnp
        >>> tx, w = laprop(0.75, b1=0.5, b2=0.0), jnp.zeros(1)
        >>> _, state = tx.update(jnp.array([-4.0]), tx.init(w), w)
        >>> tx.update(jnp.array([0.5]), state, w)[0]
        Array([-0.25], dtype=float32)
    """
    squares = chain(ema_of_squares(b2), bias_correction(b2, "nu_correction"))
    average = chain(
        rms_scaling(second_moment=squares, eps=eps, eps_root=eps_root),
        ema(b1, mu_dtype, name="mu_normalized"),
        bias_correction(b1, "mu_correction"),
    )
    return chain(
        stored(average, moments),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
