"""AdEMAMix: AdamW with a second, slow average of the gradients in the numerator.

    m_t = b1 m_{t-1} + (1 - b1) g_t
    slow_t = b3 slow_{t-1} + (1 - b3) g_t
    v_t = b2 v_{t-1} + (1 - b2) g_t^2
    w <- w - lr * ((m^_t + alpha slow_t) / (sqrt(v^_t + eps_root) + eps) + weight_decay * w)

    ademamix = chain(rms_scaling(combine(add, chain(ema(b1), bias_correction(b1)),
                                         chain(ema(b3), scale(alpha))),
                                 second_moment=chain(ema_of_squares(b2), bias_correction(b2))),
                     add_decayed_weights(weight_decay), scale_by_learning_rate(lr))

The slow average is left to fill up from 0. In long runs the paper raises alpha and b3 over the
first T steps (often all of them), so that the early steps stay stable:

    ademamix(lr, b3=half_life_schedule(0.9, 0.9999, T), alpha=optax.linear_schedule(0.0, 5.0, T))

A schedule sees 0 in the first step, as in Optax; the authors' code gives it 1. A scheduled b3 is a
float32, in which 1 - 0.9999 is up to 3e-4 off; the average's gain is one nevertheless. alpha is 5
here and in `optax.contrib`, where `scale_by_ademamix` has 6.

Source: Pagliardini, Ablin & Grangier (2024), Algorithm 1, https://arxiv.org/abs/2409.03137
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from jax.typing import DTypeLike

from adamx.core.chain import chain
from adamx.core.checks import (
    DECAY_OR_SCHEDULE,
    FINITE_OR_SCHEDULE,
    NON_NEGATIVE,
    RATE,
    Scalar,
    ScalarOrSchedule,
    checked,
)
from adamx.core.combine import combine
from adamx.storage.choice import Moments, stored
from adamx.transforms.add_decayed_weights import add_decayed_weights
from adamx.transforms.bias_correction import bias_correction
from adamx.transforms.ema import ema
from adamx.transforms.ema_of_squares import ema_of_squares
from adamx.transforms.rms_scaling import rms_scaling
from adamx.transforms.scale import scale
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate


@checked(
    learning_rate=RATE,
    b1=DECAY_OR_SCHEDULE,
    b2=DECAY_OR_SCHEDULE,
    b3=DECAY_OR_SCHEDULE,
    alpha=FINITE_OR_SCHEDULE,
    eps=NON_NEGATIVE,
    eps_root=NON_NEGATIVE,
    weight_decay=RATE,
)
def ademamix(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    b3: ScalarOrSchedule = 0.9999,
    alpha: ScalarOrSchedule = 5.0,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Any | Callable[[Any], Any] = None,
    *,
    moments: Moments = "float32",
) -> chain:
    """Return AdEMAMix; arguments as `optax.contrib.ademamix`'s.

    Args:
        learning_rate: >= 0: a number, array or schedule.
        b1: weight of the past in the fast average of gradients, in [0, 1): a number, array or
            schedule.
        b2: weight of the past in the average of squares, in [0, 1): a number, array or schedule.
        b3: weight of the past in the slow average of gradients, in [0, 1): a number, array or
            schedule, such as `half_life_schedule(b1, 0.9999, steps)`.
        alpha: how much of the slow average is added to the fast one: a number, array or schedule.
        eps: >= 0, added to the root, in the unit of the gradients.
        eps_root: >= 0, added under the root, in the squared unit of the gradients.
        mu_dtype: dtype of the slot `mu`; None means float32, or wider where the parameter is.
            `mu_slow` stays wide: rounded to nearest bfloat16 it would stand still.
        weight_decay: >= 0: a number, array or schedule; the weights shrink by
            `learning_rate * weight_decay` a step.
        mask: which leaves decay: a tree of bools, or a function that makes one from the
            parameters; None means all.
        moments: how the slots `mu`, `mu_slow` and `nu` are kept: "float32" (12 bytes a parameter),
            "bfloat16" (6, rounded stochastically), "packed16" (8: `mu_slow` stays wide), or a
            function that wraps a transformation, such as a `Storage`.

    Raises:
        ValueError: if a number is out of its range, or the slots cannot be kept so.

    Example:
        The first step: 0.5 * (4 + 2 * 0.25 * 4) / 4

        >>> import jax.numpy as jnp
        >>> tx, w = ademamix(0.5, 0.5, 0.5, b3=0.75, alpha=2.0, eps=0.0), jnp.zeros(1)
        >>> tx.update(jnp.array([4.0]), tx.init(w), w)[0]
        Array([-0.75], dtype=float32)
    """
    slow = chain(ema(b3, name="mu_slow"), scale(alpha))
    scaling = rms_scaling(
        combine(operator.add, chain(ema(b1, mu_dtype), bias_correction(b1, "mu_correction")), slow),
        second_moment=chain(ema_of_squares(b2), bias_correction(b2, "nu_correction")),
        eps=eps,
        eps_root=eps_root,
    )
    return chain(
        stored(scaling, moments),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
