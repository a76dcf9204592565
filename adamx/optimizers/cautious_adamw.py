"""Cautious AdamW: AdamW without the elements whose step goes against today's gradient.

    u = m^_t / (sqrt(v^_t) + eps),  kept = (u * g_t > 0)
    w <- w - lr * (u * kept * n / (sum(kept) + 1) + weight_decay * w)

    cautious_adamw = chain(cautious(scale_by_adam(b1, b2)), add_decayed_weights(weight_decay),
                           scale_by_learning_rate(lr))

kept, n and the sum are of one array. `add_cautious_decayed_weights` can replace the decay. See
`adamx.transforms.cautious` for how the paper's listing and its code differ.

Source: Liang et al. (2024), Algorithm 2, https://arxiv.org/abs/2411.16085
"""

from __future__ import annotations

from typing import Any

from jax.typing import DTypeLike

from adamx.core.chain import chain
from adamx.core.checks import Decay, NonNegative, Rate, checked
from adamx.optimizers.adam import scale_by_adam
from adamx.storage.choice import Moments
from adamx.transforms.add_decayed_weights import add_decayed_weights
from adamx.transforms.cautious import cautious
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate


@checked
def cautious_adamw(
    learning_rate: Rate,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: Rate = 1e-4,
    mask: Any = None,
    *,
    moments: Moments = "float32",
) -> chain:
    """Return cautious AdamW; arguments as `adamx.adamw`'s.

    Args:
        learning_rate: a number, array or schedule, >= 0.
        b1: weight of the past in the average of gradients, in [0, 1): a number, array or schedule.
        b2: weight of the past in the average of squares, in [0, 1): a number, array or schedule.
        eps: added to the root, >= 0, in the unit of the gradients.
        eps_root: added under the root, >= 0, in the squared unit of the gradients.
        mu_dtype: dtype of `mu`, rounded to nearest; None means the parameter's, at least float32.
        weight_decay: a number, array or schedule, >= 0. The weights shrink by
            `learning_rate * weight_decay` a step. Elements that are not kept shrink too.
        mask: which leaves decay: a tree of bools, a function of the parameters that returns one, or
            patterns of paths, such as "*/kernel"; None means all.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.
            Also "packed16" and "packed8": `mu` and `nu` together in 4 or 2 bytes.

    Raises:
        ValueError: if a number is out of its range, or `moments` cannot store the slots.

    Example:
        All three elements are kept, so the step is multiplied by 3 / (3 + 1):

        >>> import jax.numpy as jnp
        >>> tx, w = cautious_adamw(0.5, 0.5, 0.5, eps=0.0, weight_decay=0.0), jnp.ones(3)
        >>> tx.update(jnp.array([4.0, -2.0, 1.0]), tx.init(w), w)[0]
        Array([-0.375,  0.375, -0.375], dtype=float32)
    """
    return chain(
        cautious(scale_by_adam(b1, b2, eps, eps_root, mu_dtype, moments=moments)),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
