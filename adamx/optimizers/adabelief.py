"""AdaBelief: Adam divided by the root mean square of the gradients' deviations from their average.

    m_t = b1 m_{t-1} + (1 - b1) g_t                      m^_t = m_t / (1 - b1^t)
    s_t = b2 s_{t-1} + (1 - b2) (g_t - m_t)^2 + e        s^_t = s_t / (1 - b2^t)
    w <- w - lr * m^_t / (sqrt(s^_t) + eps)

    adabelief = adam with second_moment=chain(deviation(), ema_of_squares(b2), bias_correction(b2))
                and eps_root=e / (1 - b2)

e is the argument `eps_root`. The paper and Optax add it to s_t in every step. Over t steps it sums
up to e (1 - b2^t) / (1 - b2), and after the correction to e / (1 - b2): a constant under the root.
Here it is added there; the updates are the same, and the slot `nu` is the plain average. The paper
has one eps for both; it is 1e-16 in the authors' code, and Optax's default for both.

With a scheduled b2 the sum would not be constant, so b2 cannot be a schedule. The same pieces, with
an eps_root of `rms_scaling`, take any schedule.

Source: Zhuang et al. (2020), Algorithm 2, https://arxiv.org/abs/2010.07468
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

from adamx.core.chain import chain
from adamx.core.checks import DECAY, Decay, NonNegative, Rate, Scalar, checked
from adamx.storage.choice import Moments, stored
from adamx.transforms.bias_correction import bias_correction
from adamx.transforms.deviation import deviation
from adamx.transforms.ema import ema
from adamx.transforms.ema_of_squares import ema_of_squares
from adamx.transforms.nesterov_ema import nesterov_ema
from adamx.transforms.rms_scaling import rms_scaling
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate

ConstantDecay = Annotated[
    Scalar,
    dataclasses.replace(
        DECAY,
        constant="eps_root, added in every step, sums up to a constant under the root only with a "
        "constant b2: compose the pieces, with an eps_root of rms_scaling",
    ),
]


@checked
def adabelief(
    learning_rate: Rate,
    b1: Decay = 0.9,
    b2: ConstantDecay = 0.999,
    eps: NonNegative = 1e-16,
    eps_root: NonNegative = 1e-16,
    *,
    nesterov: bool = False,
    moments: Moments = "float32",
) -> chain:
    """Return AdaBelief; arguments as `optax.adabelief`'s.

    Args:
        learning_rate: a number, array or schedule, >= 0.
        b1: weight of the past in the average of gradients, in [0, 1): a number, array or schedule.
        b2: weight of the past in the average of squared deviations, in [0, 1): a number or array.
            With a schedule eps_root would not sum up to a constant.
        eps: added to the root, >= 0, in the unit of the gradients.
        eps_root: added to the average of squares in every step, >= 0, in the squared unit of the
            gradients. It keeps the steps finite where gradients are constant.
        nesterov: whether to look one step ahead, as Nesterov's method does.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.
            Also "packed16": `mu` and `nu` together in 4 bytes.

    Raises:
        TypeError: if `b2` is a schedule.
        ValueError: if a number is out of its range, or `moments` cannot store the slots.

    Example:
        In the first step m = g / 4, so the deviation is 3/4 g, and the step is 4/3 of Adam's:

        >>> import jax.numpy as jnp
        >>> tx = adabelief(0.75, b1=0.75)
        >>> tx.update(jnp.array([4.0, -8.0]), tx.init(jnp.zeros(2)))[0].round(3)
        Array([-1.,  1.], dtype=float32)
    """
    average = nesterov_ema(b1) if nesterov else chain(ema(b1), bias_correction(b1, "mu_correction"))
    squares = chain(deviation(), ema_of_squares(b2, name="nu_deviation"), bias_correction(b2))
    scaling = rms_scaling(average, second_moment=squares, eps=eps, eps_root=eps_root / (1 - b2))
    return chain(stored(scaling, moments), scale_by_learning_rate(learning_rate))
