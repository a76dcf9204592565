"""MARS-AdamW: AdamW on gradients whose variance is reduced by the last step's gradient.

    c_t = g_t + gamma b1 / (1 - b1) (g_t - g_{t-1}),    c_1 = g_1
    u_t = c_t / max(1, |c_t|)                           |.| the norm over one array
    m_t = b1 m_{t-1} + (1 - b1) u_t                     m^_t = m_t / (1 - b1^t)
    v_t = b2 v_{t-1} + (1 - b2) u_t^2                   v^_t = v_t / (1 - b2^t)
    w <- (1 - lr * weight_decay) w - lr * m^_t / (sqrt(v^_t) + eps)

    mars = chain(combine(add, identity(), chain(difference(), scale(gamma * b1 / (1 - b1)))),
                 clip_by_norm(1.0), scale_by_adam(b1, b2, eps), add_decayed_weights(weight_decay),
                 scale_by_learning_rate(lr))

This is the paper's approximate form, which takes g_{t-1} as it was. The exact form computes the
gradient of today's batch at the last weights too. In the first step there is nothing to subtract;
the authors' code begins with a previous gradient of 0, which a clipped first gradient does not
show. It also leaves vectors to AdamW, as `by_path` does. gamma = 0 is AdamW behind a clip of each
array.

Source: Yuan et al. (2024), https://arxiv.org/abs/2411.10438
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Annotated, Any

from jax.typing import DTypeLike

from adamx.core.chain import chain
from adamx.core.checks import DECAY, Decay, NonNegative, Rate, Scalar, checked
from adamx.core.combine import combine
from adamx.core.identity import identity
from adamx.optimizers.adam import scale_by_adam
from adamx.storage.choice import Moments, stored
from adamx.transforms.add_decayed_weights import add_decayed_weights
from adamx.transforms.clip_by_norm import clip_by_norm
from adamx.transforms.difference import difference
from adamx.transforms.scale import scale
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate

ConstantDecay = Annotated[
    Scalar,
    dataclasses.replace(
        DECAY,
        constant="the factor of the difference, gamma b1 / (1 - b1), is computed once: compose the "
        "pieces, with a schedule of `scale`",
    ),
]


@checked
def mars(
    learning_rate: Rate,
    b1: ConstantDecay = 0.95,
    b2: Decay = 0.99,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: Rate = 0.0,
    mask: Any = None,
    *,
    gamma: NonNegative = 0.025,
    moments: Moments = "float32",
) -> chain:
    """Return MARS-AdamW in its approximate form; arguments as `adamw`'s.

    Args:
        learning_rate: a number, array or schedule, >= 0.
        b1: weight of the past in the average of gradients, in [0, 1): a number or array. The
            change of the gradient has the factor gamma b1 / (1 - b1).
        b2: weight of the past in the average of squares, in [0, 1): a number, array or schedule.
        eps: added to the root, >= 0, in the unit of the gradients.
        eps_root: added under the root, >= 0, in the squared unit of the gradients.
        mu_dtype: dtype of `mu`, rounded to nearest; None means the parameter's, at least float32.
        weight_decay: a number, array or schedule, >= 0. The weights shrink by
            `learning_rate * weight_decay` a step.
        mask: which leaves decay: a tree of bools, a function of the parameters that returns one, or
            patterns of paths, such as "*/kernel"; None means all.
        gamma: how strongly the variance is reduced, >= 0: a number or array.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.
            Also "packed16": `mu` and `nu` together in 4 bytes, `previous` wide. The three slots
            take 12, 6 or 8 bytes a parameter.

    Raises:
        ValueError: if a number is out of its range, or `moments` cannot store the slots.
        TypeError: if `b1` is a schedule.

    Example:
        The second gradient counts 0.25 + 0.5 * (0.25 - 0.5), and the first 0.5:

        >>> import jax.numpy as jnp
        >>> tx, w = mars(1.0, 0.5, 0.0, 0.0, gamma=0.5), jnp.zeros(1)
        >>> _, state = tx.update(jnp.array([0.5]), tx.init(w), w)
        >>> tx.update(jnp.array([0.25]), state, w)[1]["mu"]
        Array([0.1875], dtype=float32)
    """
    change = chain(difference(), scale(gamma * b1 / (1 - b1)))
    scaled = chain(
        combine(operator.add, identity(), change),
        clip_by_norm(1.0),
        scale_by_adam(b1, b2, eps, eps_root, mu_dtype),
    )
    return chain(
        stored(scaled, moments),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
