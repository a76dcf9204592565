"""Simplified AdEMAMix: AdamW with a sum of gradients and today's gradient in the numerator.

    m_t = b1 m_{t-1} + g_t
    v_t = b2 v_{t-1} + (1 - b2) g_t^2          v^_t = v_t / (1 - b2^t)
    w <- w - lr * ((m_t + alpha g_t) / (sqrt(v^_t + eps_root) + eps) + weight_decay * w)

    simplified_ademamix = chain(rms_scaling(combine(add, trace(b1), scale(alpha)),
                                            second_moment=chain(ema_of_squares(b2),
                                                                bias_correction(b2))),
                                add_decayed_weights(weight_decay), scale_by_learning_rate(lr))

In AdEMAMix's two averages the fast one is here the gradient itself, so that one slot is enough. The
sum is 1 / (1 - b1) times an average: with alpha = 0 this is Adam with a learning rate that is
1 - b1 of Adam's, without the correction of m.

Source: Morwani et al. (2025), https://arxiv.org/abs/2502.02431; the name and the formula are
Optax's (`optax.contrib.simplified_ademamix`)
"""

from __future__ import annotations

import operator
from typing import Any

from adamx.core.chain import chain
from adamx.core.checks import Decay, FiniteOrSchedule, Fraction, NonNegative, Rate, checked
from adamx.core.combine import combine
from adamx.storage.choice import Moments, stored
from adamx.transforms.add_decayed_weights import add_decayed_weights
from adamx.transforms.bias_correction import bias_correction
from adamx.transforms.ema_of_squares import ema_of_squares
from adamx.transforms.rms_scaling import rms_scaling
from adamx.transforms.scale import scale
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate
from adamx.transforms.trace import trace


@checked
def simplified_ademamix(
    learning_rate: Rate,
    b1: Fraction = 0.99,
    b2: Decay = 0.95,
    alpha: FiniteOrSchedule = 0.0,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    weight_decay: Rate = 0.0,
    mask: Any = None,
    *,
    moments: Moments = "float32",
) -> chain:
    """Return simplified AdEMAMix; arguments as `optax.contrib.simplified_ademamix`'s.

    Args:
        learning_rate: a number, array or schedule, >= 0.
        b1: weight of the past in the sum of gradients, in [0, 1]: a number, array or schedule.
        b2: weight of the past in the average of squares, in [0, 1): a number, array or schedule.
        alpha: factor of today's gradient in the numerator: a number, array or schedule.
        eps: added to the root, >= 0, in the unit of the gradients.
        eps_root: added under the root, >= 0, in the squared unit of the gradients.
        weight_decay: a number, array or schedule, >= 0. The weights shrink by
            `learning_rate * weight_decay` a step.
        mask: which leaves decay: a tree of bools, a function of the parameters that returns one, or
            patterns of paths, such as "*/kernel"; None means all.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.

    Raises:
        ValueError: if a number is out of its range, or `moments` cannot store the slots.

    Example:
        The first step: 0.5 * (4 + 2 * 4) / 4

        >>> import jax.numpy as jnp
        >>> tx, w = simplified_ademamix(0.5, alpha=2.0, eps=0.0), jnp.zeros(1)
        >>> print(f"{tx.update(jnp.array([4.0]), tx.init(w), w)[0][0]:.3f}")
        -1.500
    """
    scaling = rms_scaling(
        combine(operator.add, trace(b1), scale(alpha)),
        second_moment=chain(ema_of_squares(b2), bias_correction(b2, "nu_correction")),
        eps=eps,
        eps_root=eps_root,
    )
    return chain(
        stored(scaling, moments),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
