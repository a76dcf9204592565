"""Yogi: Adam whose second moment falls slowly, so that the steps grow slowly.

    m_t = b1 m_{t-1} + (1 - b1) g_t                                m^_t = m_t / (1 - b1^t)
    v_t = v_{t-1} + (1 - b2) sign(g_t^2 - v_{t-1}) g_t^2           v^_t = v_t / (1 - b2^t)
    w <- w - lr * m^_t / (sqrt(v^_t) + eps),                       m_0 = v_0 = 1e-6

    yogi = chain(rms_scaling(chain(ema(b1, initial=1e-6), bias_correction(b1)),
                             second_moment=chain(additive_average_of_squares(b2, initial=1e-6),
                                                 bias_correction(b2)),
                             eps=1e-3),
                 scale_by_learning_rate(lr))

This is Optax's Yogi. The paper corrects neither moment and starts m at 0; the start of m matters
where gradients are below 1e-5 or so. PyTorch has no Yogi.

Source: Zaheer et al. (2018), Algorithm 2,
https://papers.nips.cc/paper/2018/hash/90365351ccc7437a1309dc64e4db32a3-Abstract.html
"""

from __future__ import annotations

from adamx.core.chain import chain
from adamx.core.checks import Decay, NonNegative, Rate, checked
from adamx.storage.choice import Moments, stored
from adamx.transforms.additive_average_of_squares import additive_average_of_squares
from adamx.transforms.bias_correction import bias_correction
from adamx.transforms.ema import ema
from adamx.transforms.rms_scaling import rms_scaling
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate


@checked
def yogi(
    learning_rate: Rate,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: NonNegative = 1e-3,
    *,
    moments: Moments = "float32",
) -> chain:
    """Return Yogi; arguments as `optax.yogi`'s.

    Args:
        learning_rate: a number, array or schedule, >= 0.
        b1: weight of the past in the average of gradients, in [0, 1): a number, array or schedule.
        b2: weight of the past in the average of squares, in [0, 1): a number, array or schedule.
        eps: added to the root, >= 0, in the unit of the gradients.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.
            Also "packed16": `mu` and `nu` together in 4 bytes.

    Raises:
        ValueError: if a number is out of its range, or `moments` cannot store the slots.

    Example:
        Gradients 2, then 1: v = 0 + 4/2, then 2 - 1/2 = 1.5, corrected 2, where Adam's is 5/3:

        >>> import jax.numpy as jnp
        >>> tx = yogi(0.5, b1=0.0, b2=0.5, eps=0.0)
        >>> _, state = tx.update(jnp.array([2.0]), tx.init(jnp.zeros(1)))
        >>> updates, state = tx.update(jnp.array([1.0]), state)
        >>> state["nu_additive"].round(2), updates.round(2)
        (Array([1.5], dtype=float32), Array([-0.35], dtype=float32))
    """
    average = chain(ema(b1, initial=1e-6), bias_correction(b1, "mu_correction"))
    squares = additive_average_of_squares(b2, initial=1e-6)
    second_moment = chain(squares, bias_correction(b2, "nu_correction"))
    scaling = rms_scaling(average, second_moment=second_moment, eps=eps)
    return chain(stored(scaling, moments), scale_by_learning_rate(learning_rate))
