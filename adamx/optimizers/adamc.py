"""AdamC: AdamW whose decay follows the schedule twice, so that weights keep their norm.

    w <- w - lr_t * (m^_t / (sqrt(v^_t) + eps) + lr_t / max_learning_rate * weight_decay * w)
                                                           weights before a normalisation
    w <- w - lr_t * (m^_t / (sqrt(v^_t) + eps) + weight_decay * w)              the others

    adamc = chain(combine(add, scale_by_adam(...),
                          chain(set_to_zero(), add_decayed_weights(weight_decay),
                                scale(lr), scale(1 / max_learning_rate))),
                  scale_by_learning_rate(lr))

A layer before a normalisation does not depend on the norm of its weights, and its gradient is in
proportion to one over that norm. The norm settles where growth by the steps, lr^2, and decay,
lr * weight_decay |w|^2, balance. In AdamW it falls with the learning rate, and at the end of a
schedule the gradients grow; with a decay in proportion to lr^2 it stays. While the rate is the
largest, and with a constant rate, this is AdamW.

Source: Defazio (2025), https://arxiv.org/abs/2506.02285
"""

from __future__ import annotations

import numbers
import operator
from typing import Any

from jax.typing import DTypeLike

from adamx.core.chain import chain
from adamx.core.checks import Decay, NonNegative, Positive, Rate, checked
from adamx.core.combine import combine
from adamx.core.paths import Pattern, Predicate
from adamx.optimizers.adam import scale_by_adam
from adamx.storage.choice import Moments, stored
from adamx.transforms.add_decayed_weights import add_decayed_weights
from adamx.transforms.scale import scale
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate
from adamx.transforms.scale_by_path import scale_by_path
from adamx.transforms.set_to_zero import set_to_zero


@checked
def adamc(
    learning_rate: Rate,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: Rate = 1e-4,
    mask: Any = None,
    *,
    max_learning_rate: Positive | None = None,
    normalized: Pattern | Predicate | None = None,
    moments: Moments = "float32",
) -> chain:
    """Return AdamC; arguments as `adamw`'s.

    Args:
        learning_rate: a number, array or schedule, >= 0.
        b1: weight of the past in the average of gradients, in [0, 1): a number, array or schedule.
        b2: weight of the past in the average of squares, in [0, 1): a number, array or schedule.
        eps: added to the root, >= 0, in the unit of the gradients.
        eps_root: added under the root, >= 0, in the squared unit of the gradients.
        mu_dtype: dtype of `mu`, rounded to nearest; None means the parameter's, at least float32.
        weight_decay: a number, array or schedule, >= 0. The weights shrink by
            `learning_rate * weight_decay` a step. Those of `normalized` shrink by that times
            `learning_rate / max_learning_rate`.
        mask: which leaves decay: a tree of bools, a function of the parameters that returns one, or
            patterns of paths, such as "*/kernel"; None means all.
        max_learning_rate: the largest learning rate of the schedule, > 0. None means that the
            learning rate is a constant.
        normalized: which leaves a normalisation follows: a pattern of paths, or a predicate of path
            and leaf; None means all. The last layer is usually not one of them.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.
            Also "packed16" and "packed8": `mu` and `nu` together in 4 or 2 bytes.

    Raises:
        ValueError: if a number is out of its range, `learning_rate` is a schedule and there is no
            `max_learning_rate`, or it is a larger number; if `moments` cannot store the slots; at
            `init` and `update`, if `normalized` matches no leaf.

    Example:
        At half of the largest rate the weights decay by 0.5 * 0.5 * 0.25 of themselves:

        >>> import jax.numpy as jnp
        >>> tx = adamc(0.5, weight_decay=0.25, max_learning_rate=1.0, normalized="hidden")
        >>> w = {"hidden": jnp.array([2.0]), "head": jnp.array([2.0])}
        >>> tx.update({"hidden": jnp.zeros(1), "head": jnp.zeros(1)}, tx.init(w), w)[0]
        {'head': Array([-0.25], dtype=float32), 'hidden': Array([-0.125], dtype=float32)}
    """
    if max_learning_rate is None and callable(learning_rate):
        raise ValueError(
            "adamc: max_learning_rate must be the largest rate of the schedule, got None: its "
            "decay is multiplied by learning_rate / max_learning_rate"
        )
    both: tuple[Any, Any] = learning_rate, max_learning_rate
    constant = all(isinstance(rate, numbers.Real) for rate in both)
    if constant and both[0] > both[1]:
        raise ValueError(
            "adamc: max_learning_rate must be the largest learning rate, got "
            f"{max_learning_rate!r} and learning_rate={learning_rate!r}"
        )

    def of_normalized(factor: Any) -> Any:
        return scale(factor) if normalized is None else scale_by_path({normalized: factor})

    decay = [set_to_zero(), add_decayed_weights(weight_decay, mask)]
    if constant:
        decay += [of_normalized(both[0] / both[1])]
    elif max_learning_rate is not None:
        decay += [of_normalized(learning_rate), of_normalized(1 / max_learning_rate)]
    steps = combine(operator.add, scale_by_adam(b1, b2, eps, eps_root, mu_dtype), chain(*decay))
    return chain(stored(steps, moments, decays=(b1, b2)), scale_by_learning_rate(learning_rate))
