"""AdamW with a weight decay that does not depend on the learning rate.

    w <- w - eta_t (alpha * m^_t / (sqrt(v^_t) + eps) + weight_decay * w)

    adamw_independent = chain(scale_by_adam(...), scale(alpha), add_decayed_weights(weight_decay),
                              scale_by_learning_rate(eta))

Here alpha is `learning_rate`, and eta_t, the schedule of both, is `multiplier`. In `adamw`, as in
PyTorch and Optax, a step decays by eta_t * alpha * weight_decay: until alpha changes, it is this
optimizer with the weight decay alpha * weight_decay.

Source: Loshchilov & Hutter (2019), Algorithm 2 and Appendix B.1, https://arxiv.org/abs/1711.05101
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from adamx.core.chain import chain
from adamx.core.checks import Decay, NonNegative, Positive, Range, Rate, Scalar, checked
from adamx.optimizers.adam import scale_by_adam
from adamx.storage.choice import Moments
from adamx.transforms.add_decayed_weights import add_decayed_weights
from adamx.transforms.scale import scale
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate

Size = Annotated[Scalar, Range(1.0, math.inf, "a number >= 1")]


@checked
def adamw_independent(
    learning_rate: NonNegative,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: NonNegative = 1e-8,
    weight_decay: Rate = 1e-4,
    mask: Any = None,
    *,
    multiplier: Rate = 1.0,
    moments: Moments = "float32",
) -> chain:
    """Return AdamW whose weights shrink by `multiplier * weight_decay` a step.

    Args:
        learning_rate: the paper's alpha, >= 0: a number or array. `multiplier` is its schedule.
        b1: weight of the past in the average of gradients, in [0, 1): a number, array or schedule.
        b2: weight of the past in the average of squares, in [0, 1): a number, array or schedule.
        eps: added to the root, >= 0, in the unit of the gradients.
        weight_decay: a number, array or schedule, >= 0. The weights shrink by
            `multiplier * weight_decay` a step; `normalized_weight_decay` computes it from the
            length of the training.
        mask: which leaves decay: a tree of bools, a function of the parameters that returns one, or
            patterns of paths, such as "*/kernel"; None means all.
        multiplier: a number, array or schedule, >= 0. It is eta_t, the schedule of learning rate
            and decay alike, such as `optax.cosine_decay_schedule(1.0, steps)`. The state has the
            one last used as `state["learning_rate"]`.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.
            Also "packed16" and "packed8": `mu` and `nu` together in 4 or 2 bytes.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        The first step moves by eta * (alpha * sign(g) + weight_decay * w):

        >>> import jax.numpy as jnp
        >>> tx = adamw_independent(0.5, eps=0.0, weight_decay=0.25, multiplier=0.5)
        >>> w = jnp.array([2.0])
        >>> tx.update(jnp.array([4.0]), tx.init(w), w)[0]
        Array([-0.5], dtype=float32)
    """
    return chain(
        scale_by_adam(b1, b2, eps, moments=moments),
        scale(learning_rate),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(multiplier),
    )


@checked
def normalized_weight_decay(
    norm: NonNegative, *, batch_size: Size, examples: Size, epochs: Positive
) -> Scalar:
    """Return norm * sqrt(batch_size / (examples * epochs)), a weight decay for a training's length.

    The longer the training, the smaller is the best decay a step. With this rule one `norm` suits
    short and long trainings.

    Args:
        norm: the normalised decay, >= 0; the paper's best are between 0.025 and 0.05.
        batch_size: the number of examples in a step, >= 1.
        examples: the number of examples in the training set, >= 1.
        epochs: the number of epochs of the whole training, or of one restart, > 0.

    Returns:
        The decay for `adamw_independent`, or, divided by the learning rate, for `adamw`.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> normalized_weight_decay(0.05, batch_size=100, examples=10_000, epochs=100)
        0.0005
    """
    return norm * (batch_size / (examples * epochs)) ** 0.5
