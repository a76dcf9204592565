"""LAMB: AdamW's step, rescaled in each array to a fraction of the norm of its weights.

    u  = m^_t / (sqrt(v^_t) + eps) + weight_decay * w
    w <- w - lr * |w| / |u| * u                        |.| the norm over one array

    lamb = adamw with trust_ratio() before the learning rate

This is Optax's LAMB. Some implementations leave out the bias correction, which acts like a warm-up,
clip by the global norm first, or bound |w| or the ratio.

Source: You et al. (2020), Algorithm 2, https://arxiv.org/abs/1904.00962
"""

from __future__ import annotations

from typing import Any

from adamx.core.chain import chain
from adamx.core.checks import Decay, NonNegative, Rate, checked
from adamx.optimizers.adam import scale_by_adam
from adamx.storage.choice import Moments
from adamx.transforms.add_decayed_weights import add_decayed_weights
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate
from adamx.transforms.trust_ratio import trust_ratio


@checked
def lamb(
    learning_rate: Rate,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: NonNegative = 1e-6,
    eps_root: NonNegative = 0.0,
    weight_decay: Rate = 0.0,
    mask: Any = None,
    *,
    moments: Moments = "float32",
) -> chain:
    """Return LAMB; arguments as `optax.lamb`'s.

    Args:
        learning_rate: a number, array or schedule, >= 0. An array changes by this fraction of its
            norm in a step.
        b1: weight of the past in the average of gradients, in [0, 1): a number, array or schedule.
        b2: weight of the past in the average of squares, in [0, 1): a number, array or schedule.
        eps: added to the root, >= 0, in the unit of the gradients.
        eps_root: added under the root, >= 0, in the squared unit of the gradients.
        weight_decay: a number, array or schedule, >= 0.
        mask: which leaves decay: a tree of bools, a function of the parameters that returns one, or
            patterns of paths, such as "*/kernel"; None means all. The ratio is taken of all leaves.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.
            Also "packed16" and "packed8": `mu` and `nu` together in 4 or 2 bytes.

    Raises:
        ValueError: if a number is out of its range, or `moments` cannot store the slots.

    Example:
        Adam's step is (1, -1); it is scaled to the norm of the weights, and halved:

        >>> import jax.numpy as jnp
        >>> tx, w = lamb(0.5, eps=0.0), jnp.array([2.0, 2.0])
        >>> tx.update(jnp.array([2.0, -0.1]), tx.init(w), w)[0].round(3)
        Array([-1.,  1.], dtype=float32)
    """
    return chain(
        scale_by_adam(b1, b2, eps, eps_root, moments=moments),
        add_decayed_weights(weight_decay, mask),
        trust_ratio(),
        scale_by_learning_rate(learning_rate),
    )
