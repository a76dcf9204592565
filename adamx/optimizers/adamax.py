"""AdaMax: Adam with the largest gradient instead of the root mean square.

    m_t = b1 m_{t-1} + (1 - b1) g_t            m^_t = m_t / (1 - b1^t)
    v_t = max(b2 v_{t-1}, |g_t| + eps)
    w <- w - lr * m^_t / v_t

    adamax = chain(ratio(chain(ema(b1), bias_correction(b1)), denominator=decaying_max(b2, eps)),
                   scale_by_learning_rate(lr))

The paper has no eps; Optax and PyTorch add it to each gradient's magnitude.

Source: Kingma & Ba (2015), Algorithm 2, https://arxiv.org/abs/1412.6980
"""

from __future__ import annotations

from adamx.core.chain import chain
from adamx.core.checks import Decay, NonNegative, Rate, checked
from adamx.storage.choice import Moments, stored
from adamx.transforms.bias_correction import bias_correction
from adamx.transforms.decaying_max import decaying_max
from adamx.transforms.ema import ema
from adamx.transforms.ratio import ratio
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate


@checked
def adamax(
    learning_rate: Rate,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: NonNegative = 1e-8,
    *,
    moments: Moments = "float32",
) -> chain:
    """Return AdaMax; arguments as `optax.adamax`'s.

    Args:
        learning_rate: a number, array or schedule, >= 0.
        b1: weight of the past in the average of gradients, in [0, 1): a number, array or schedule.
        b2: factor by which the largest magnitude fades in a step, in [0, 1): a number, array or
            schedule.
        eps: added to each magnitude, >= 0, in the unit of the gradients. With 0, an element that
            has had no gradient does not move.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.
            Also "packed16": `mu` and `nu` together in 4 bytes.

    Raises:
        ValueError: if a number is out of its range, or `moments` cannot store the slots.

    Example:
        In the first step each element moves by the learning rate:

        >>> import jax.numpy as jnp
        >>> tx = adamax(0.5, eps=0.0)
        >>> tx.update(jnp.array([4.0, -0.001]), tx.init(jnp.zeros(2)))[0].round(3)
        Array([-0.5,  0.5], dtype=float32)
    """
    average = chain(ema(b1), bias_correction(b1, "mu_correction"))
    scaling = ratio(average, denominator=decaying_max(b2, eps))
    return chain(stored(scaling, moments), scale_by_learning_rate(learning_rate))
