"""Lion: the sign of an average of gradients, without a second moment.

    w <- w - lr * (sign(b1 m_{t-1} + (1 - b1) g_t) + weight_decay * w)
    m_t = b2 m_{t-1} + (1 - b2) g_t

    lion = chain(interpolated_ema(b1, b2), sign(), add_decayed_weights(weight_decay),
                 scale_by_learning_rate(lr))

Every element moves by the learning rate, so the learning rate should be 3 to 10 times smaller than
AdamW's, and the weight decay larger by the same factor. The slot takes 4 bytes a parameter where
Adam's take 8. Optax and the paper agree.

Source: Chen et al. (2023), Algorithm 2, https://arxiv.org/abs/2302.06675
"""

from __future__ import annotations

from typing import Any

from jax.typing import DTypeLike

from adamx.core.chain import chain
from adamx.core.checks import Decay, Rate, checked
from adamx.storage.choice import Moments, stored
from adamx.transforms.add_decayed_weights import add_decayed_weights
from adamx.transforms.interpolated_ema import PositiveDecay, interpolated_ema
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate
from adamx.transforms.sign import sign


@checked
def lion(
    learning_rate: Rate,
    b1: Decay = 0.9,
    b2: PositiveDecay = 0.99,
    mu_dtype: DTypeLike | None = None,
    weight_decay: Rate = 1e-3,
    mask: Any = None,
    *,
    moments: Moments = "float32",
) -> chain:
    """Return Lion; arguments as `optax.lion`'s.

    Args:
        learning_rate: a number, array or schedule, >= 0. Every element moves by it in a step.
        b1: weight of the slot in the average whose sign is taken, in [0, 1): a number, array or
            schedule.
        b2: weight of the past in the slot, in (0, 1): a number, array or schedule.
        mu_dtype: dtype of `mu`, rounded to nearest; None means the parameter's, at least float32.
        weight_decay: a number, array or schedule, >= 0. The weights shrink by
            `learning_rate * weight_decay` a step.
        mask: which leaves decay: a tree of bools, a function of the parameters that returns one, or
            patterns of paths, such as "*/kernel"; None means all.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.

    Raises:
        ValueError: if a number is out of its range, or `moments` cannot store the slots.

    Example:
        >>> import jax.numpy as jnp
        >>> tx, w = lion(0.5, weight_decay=0.25), jnp.array([2.0, 2.0])
        >>> tx.update(jnp.array([4.0, -0.001]), tx.init(w), w)[0]
        Array([-0.75,  0.25], dtype=float32)
    """
    return chain(
        stored(interpolated_ema(b1, b2, mu_dtype), moments),
        sign(),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
