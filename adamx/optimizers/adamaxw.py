"""AdaMaxW: AdaMax with decoupled weight decay.

    w <- (1 - lr * weight_decay) w - lr * m^_t / v_t

    adamaxw = adamax with add_decayed_weights(weight_decay) before the learning rate

Source: Kingma & Ba (2015), Algorithm 2, https://arxiv.org/abs/1412.6980, with the decay of
Loshchilov & Hutter (2019), https://arxiv.org/abs/1711.05101, multiplied by the learning rate as in
Optax.
"""

from __future__ import annotations

from typing import Any

from adamx.core.chain import chain
from adamx.core.checks import Decay, NonNegative, Rate, checked
from adamx.storage.choice import Moments, stored
from adamx.transforms.add_decayed_weights import add_decayed_weights
from adamx.transforms.bias_correction import bias_correction
from adamx.transforms.decaying_max import decaying_max
from adamx.transforms.ema import ema
from adamx.transforms.ratio import ratio
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate


@checked
def adamaxw(
    learning_rate: Rate,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: NonNegative = 1e-8,
    weight_decay: Rate = 1e-4,
    mask: Any = None,
    *,
    moments: Moments = "float32",
) -> chain:
    """Return AdaMaxW; arguments as `optax.adamaxw`'s.

    Args:
        learning_rate: a number, array or schedule, >= 0.
        b1: weight of the past in the average of gradients, in [0, 1): a number, array or schedule.
        b2: factor by which the largest magnitude fades in a step, in [0, 1): a number, array or
            schedule.
        eps: added to each magnitude, >= 0, in the unit of the gradients.
        weight_decay: a number, array or schedule, >= 0. The weights shrink by
            `learning_rate * weight_decay` a step.
        mask: which leaves decay: a tree of bools, a function of the parameters that returns one, or
            patterns of paths, such as "*/kernel"; None means all.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.
            Also "packed16": `mu` and `nu` together in 4 bytes.

    Raises:
        ValueError: if a number is out of its range, or `moments` cannot store the slots.

    Example:
        The first step moves by lr * (sign(g) + weight_decay * w):

        >>> import jax.numpy as jnp
        >>> tx, w = adamaxw(0.5, b1=0.5, eps=0.0, weight_decay=0.25), jnp.array([2.0])
        >>> tx.update(jnp.array([4.0]), tx.init(w), w)[0]
        Array([-0.75], dtype=float32)
    """
    average = chain(ema(b1), bias_correction(b1, "mu_correction"))
    scaling = ratio(average, denominator=decaying_max(b2, eps))
    return chain(
        stored(scaling, moments),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
