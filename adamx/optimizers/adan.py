"""Adan: Nesterov's momentum for Adam, from the differences of the gradients.

    d_t = g_t - g_{t-1},  d_1 = 0
    m_t = b1 m_{t-1} + (1 - b1) g_t               delta_t = b2 delta_{t-1} + (1 - b2) d_t
    v_t = b3 v_{t-1} + (1 - b3) (g_t + look_ahead d_t)^2
    w <- w - lr * ((m^_t + look_ahead delta^_t) / (sqrt(v^_t + eps_root) + eps) + weight_decay * w)

    adan = chain(rms_scaling(combine(add, chain(ema(b1), bias_correction(b1)),
                                     chain(difference(), ema(b2), bias_correction(b2),
                                           scale(look_ahead))),
                             second_moment=chain(extrapolation(look_ahead), ema_of_squares(b3),
                                                 bias_correction(b3))),
                 add_decayed_weights(weight_decay), scale_by_learning_rate(lr))

m^, delta^ and v^ are corrected for their start at 0, as in the authors' code; the paper starts m
and v at the first gradient and its square. The paper's betas are 1 - b.

look_ahead is b2 in the paper (as 1 - beta_2) and in the authors' code: 0.92 by default. Optax 0.2.8
uses 1 - b2 = 0.08, which makes the look-ahead nearly vanish: `look_ahead=1 - b2` gives its steps.

The weight decay is Optax's. The paper divides w by 1 + lr * weight_decay after the step, which is
this decay with the learning rate lr / (1 + lr * weight_decay).

Source: Xie et al. (2022), Algorithm 1, https://arxiv.org/abs/2208.06677
"""

from __future__ import annotations

import operator
from typing import Any

from adamx.core.chain import chain
from adamx.core.checks import Decay, FiniteOrSchedule, NonNegative, Rate, checked
from adamx.core.combine import combine
from adamx.storage.choice import Moments, stored
from adamx.transforms.add_decayed_weights import add_decayed_weights
from adamx.transforms.bias_correction import bias_correction
from adamx.transforms.difference import difference
from adamx.transforms.ema import ema
from adamx.transforms.ema_of_squares import ema_of_squares
from adamx.transforms.extrapolation import extrapolation
from adamx.transforms.rms_scaling import rms_scaling
from adamx.transforms.scale import scale
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate


@checked
def adan(
    learning_rate: Rate,
    b1: Decay = 0.98,
    b2: Decay = 0.92,
    b3: Decay = 0.99,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 1e-8,
    weight_decay: Rate = 0.0,
    mask: Any = None,
    *,
    look_ahead: FiniteOrSchedule | None = None,
    moments: Moments = "float32",
) -> chain:
    """Return Adan; arguments as `optax.adan`'s.

    Args:
        learning_rate: a number, array or schedule, >= 0.
        b1: weight of the past in the average of gradients, in [0, 1): a number, array or schedule.
        b2: weight of the past in the average of the gradients' differences, in [0, 1): a number,
            array or schedule.
        b3: weight of the past in the average of squares, in [0, 1): a number, array or schedule.
        eps: added to the root, >= 0, in the unit of the gradients.
        eps_root: added under the root, >= 0, in the squared unit of the gradients.
        weight_decay: a number, array or schedule, >= 0. The weights shrink by
            `learning_rate * weight_decay` a step.
        mask: which leaves decay: a tree of bools, a function of the parameters that returns one, or
            patterns of paths, such as "*/kernel"; None means all.
        look_ahead: factor of the difference that is added to the gradient: a number, array or
            schedule; None means b2, as in the paper. Optax 0.2.8 has 1 - b2.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.
            The four slots take 16 or 8 bytes a parameter.

    Raises:
        ValueError: if a number is out of its range, or `moments` cannot store the slots.

    Example:
        The first step is Adam's; the second has a difference:

        >>> import jax.numpy as jnp
        >>> tx = adan(0.5, b1=0.0, b2=0.0, b3=0.0, eps=0.0, eps_root=0.0, look_ahead=0.5)
        >>> first, state = tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)), jnp.zeros(1))
        >>> tx = adan(0.5, b1=0.0, b2=0.0, b3=0.0, eps=1.0, eps_root=0.0, look_ahead=0.5)
        >>> second, _ = tx.update(jnp.array([6.0]), state, jnp.zeros(1))  # 7 / (7 + 1)
        >>> print(first, second)
        [-0.5] [-0.4375]
    """
    factor = b2 if look_ahead is None else look_ahead
    change = chain(
        difference(), ema(b2, name="delta"), bias_correction(b2, "delta_correction"), scale(factor)
    )
    both = combine(operator.add, chain(ema(b1), bias_correction(b1, "mu_correction")), change)
    ahead = chain(
        extrapolation(factor),
        ema_of_squares(b3, name="nu_extrapolated"),
        bias_correction(b3, "nu_correction"),
    )
    scaling = rms_scaling(both, second_moment=ahead, eps=eps, eps_root=eps_root)
    return chain(
        stored(scaling, moments),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
