"""AdEMAMix: AdamW with a second, slow average of the gradients in the numerator.

    m_t = b1 m_{t-1} + (1 - b1) g_t
    slow_t = b3 slow_{t-1} + (1 - b3) g_t
    v_t = b2 v_{t-1} + (1 - b2) g_t^2
    w <- w - lr * ((m^_t + alpha slow_t) / (sqrt(v^_t + eps_root) + eps) + weight_decay * w)

    ademamix = chain(rms_scaling(combine(add, chain(ema(b1), bias_correction(b1)),
                                         chain(ema(b3), scale(alpha))),
                                 second_moment=chain(ema_of_squares(b2), bias_correction(b2))),
                     add_decayed_weights(weight_decay), scale_by_learning_rate(lr))

The slow average starts at 0, without bias correction. In long runs the paper raises alpha and b3
over the first T steps (often all of them), so that the early steps stay stable:

    ademamix(lr, b3=half_life_schedule(0.9, 0.9999, T), alpha=optax.linear_schedule(0.0, 5.0, T))

A schedule sees 0 in the first step, as in Optax; the authors' code gives it 1. A scheduled b3 is a
float32, in which 1 - 0.9999 is up to 3e-4 off; the average's gain is still one. alpha is 5 here and
in `optax.contrib.ademamix`; `optax.contrib.scale_by_ademamix` has 6.

Source: Pagliardini, Ablin & Grangier (2024), Algorithm 1, https://arxiv.org/abs/2409.03137
"""

from __future__ import annotations

import operator
from typing import Any

from jax.typing import DTypeLike

from adamx.core.chain import chain
from adamx.core.checks import Decay, FiniteOrSchedule, NonNegative, Rate, checked
from adamx.core.combine import combine
from adamx.storage.choice import Moments, stored
from adamx.transforms.add_decayed_weights import add_decayed_weights
from adamx.transforms.bias_correction import bias_correction
from adamx.transforms.ema import ema
from adamx.transforms.ema_of_squares import ema_of_squares
from adamx.transforms.rms_scaling import rms_scaling
from adamx.transforms.scale import scale
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate


@checked
def ademamix(
    learning_rate: Rate,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    b3: Decay = 0.9999,
    alpha: FiniteOrSchedule = 5.0,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: Rate = 0.0,
    mask: Any = None,
    *,
    moments: Moments = "float32",
) -> chain:
    """Return AdEMAMix; arguments as `optax.contrib.ademamix`'s.

    Args:
        learning_rate: a number, array or schedule, >= 0.
        b1: weight of the past in the average of gradients, in [0, 1): a number, array or schedule.
            This is the fast average.
        b2: weight of the past in the average of squares, in [0, 1): a number, array or schedule.
        b3: weight of the past in the slow average of gradients, in [0, 1): a number, array or
            schedule, such as `half_life_schedule(b1, 0.9999, steps)`.
        alpha: factor of the slow average in the numerator: a number, array or schedule.
        eps: added to the root, >= 0, in the unit of the gradients.
        eps_root: added under the root, >= 0, in the squared unit of the gradients.
        mu_dtype: dtype of `mu`, rounded to nearest; None means the parameter's, at least float32.
            `mu_slow` stays wide: rounded to nearest bfloat16 it would stop changing.
        weight_decay: a number, array or schedule, >= 0. The weights shrink by
            `learning_rate * weight_decay` a step.
        mask: which leaves decay: a tree of bools, a function of the parameters that returns one, or
            patterns of paths, such as "*/kernel"; None means all.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.
            Also "packed16": `mu` and `nu` together in 4 bytes, `mu_slow` wide. The three slots take
            12, 6 or 8 bytes a parameter.

    Raises:
        ValueError: if a number is out of its range, or `moments` cannot store the slots.

    Example:
        The first step: 0.5 * (4 + 2 * 0.25 * 4) / 4

        >>> import jax.numpy as jnp
        >>> tx, w = ademamix(0.5, 0.5, 0.5, b3=0.75, alpha=2.0, eps=0.0), jnp.zeros(1)
        >>> tx.update(jnp.array([4.0]), tx.init(w), w)[0]
        Array([-0.75], dtype=float32)
    """
    fast = chain(ema(b1, mu_dtype), bias_correction(b1, "mu_correction"))
    both = combine(operator.add, fast, chain(ema(b3, name="mu_slow"), scale(alpha)))
    squares = chain(ema_of_squares(b2), bias_correction(b2, "nu_correction"))
    scaling = rms_scaling(both, second_moment=squares, eps=eps, eps_root=eps_root)
    return chain(
        stored(scaling, moments),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
