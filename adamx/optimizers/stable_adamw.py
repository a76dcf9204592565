"""StableAdamW: AdamW with a smaller learning rate in arrays whose gradients outgrow v.

    RMS_t = sqrt(mean(g_t^2 / max(v^_t, eps^2)))       over one array
    lr_t  = lr / max(1, RMS_t)
    w    <- (1 - lr_t * weight_decay) w - lr_t * m^_t / (sqrt(v^_t) + eps)

    stable_adamw = chain(update_clipping(chain(scale_by_adam(b1, b2, eps),
                                               add_decayed_weights(weight_decay)), b2, eps),
                         scale_by_learning_rate(lr))

This is Adafactor's update clipping, as a learning rate for each array; it makes clipping of the
gradients unnecessary. The paper writes the bias correction as decays that change with t,
b (1 - b^(t-1)) / (1 - b^t), and so averages m^ and v^ directly.

Source: Wortsman et al. (2023), Algorithm 2, https://arxiv.org/abs/2304.13013
"""

from __future__ import annotations

from typing import Any

from adamx.core.chain import chain
from adamx.core.checks import Decay, NonNegative, Rate, checked
from adamx.optimizers.adam import scale_by_adam
from adamx.storage.choice import Moments, stored
from adamx.transforms.add_decayed_weights import add_decayed_weights
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate
from adamx.transforms.update_clipping import update_clipping


@checked
def stable_adamw(
    learning_rate: Rate,
    b1: Decay = 0.9,
    b2: Decay = 0.99,
    eps: NonNegative = 1e-6,
    weight_decay: Rate = 1e-2,
    mask: Any = None,
    *,
    moments: Moments = "float32",
) -> chain:
    """Return StableAdamW, which needs no clipping of the gradients.

    Args:
        learning_rate: a number, array or schedule, >= 0.
        b1: weight of the past in the average of gradients, in [0, 1): a number, array or schedule.
        b2: weight of the past in the average of squares, in [0, 1): a number, array or schedule.
        eps: added to the root, >= 0, in the unit of the gradients. It is also RMS_t's least root.
        weight_decay: a number, array or schedule, >= 0. The weights shrink by `lr_t * weight_decay`
            a step.
        mask: which leaves decay: a tree of bools, a function of the parameters that returns one, or
            patterns of paths, such as "*/kernel"; None means all.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.
            Also "packed16" and "packed8": `mu` and `nu` together in 4 or 2 bytes.

    Raises:
        ValueError: if a number is out of its range, or `moments` cannot store the slots.

    Example:
        A gradient that grows 8-fold in the second step has RMS^2 = 64 * 1.5 / (0.5 + 64), so the
        step, 17 / 3 / sqrt(43), is divided by 1.22:

        >>> import jax.numpy as jnp
        >>> tx, w = stable_adamw(1.0, 0.5, 0.5, 0.0, 0.0), jnp.zeros(1)
        >>> _, state = tx.update(jnp.ones(1), tx.init(w), w)
        >>> tx.update(jnp.array([8.0]), state, w)[0].round(3)
        Array([-0.708], dtype=float32)
    """
    steps = chain(scale_by_adam(b1, b2, eps), add_decayed_weights(weight_decay, mask))
    clipped = update_clipping(steps, b2, eps)
    return chain(stored(clipped, moments, decays=(b1, b2)), scale_by_learning_rate(learning_rate))
