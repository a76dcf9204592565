"""Cautious Lion: Lion without the elements whose step goes against today's gradient.

    u = sign(b1 m_{t-1} + (1 - b1) g_t),  kept = (u * g_t > 0)
    w <- w - lr * (u * kept * n / (sum(kept) + 1) + weight_decay * w)
    m_t = b2 m_{t-1} + (1 - b2) g_t

    cautious_lion = chain(cautious(chain(interpolated_ema(b1, b2), sign())),
                          add_decayed_weights(weight_decay), scale_by_learning_rate(lr))

kept, n and the sum are of one array; see `adamx.transforms.cautious`.

Source: Liang et al. (2024), Algorithm 2, https://arxiv.org/abs/2411.16085
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax.typing import DTypeLike

from adamx.core.chain import chain
from adamx.core.checks import DECAY_OR_SCHEDULE, RATE, ScalarOrSchedule, checked
from adamx.storage.choice import Moments, stored
from adamx.transforms.add_decayed_weights import add_decayed_weights
from adamx.transforms.cautious import cautious
from adamx.transforms.interpolated_ema import POSITIVE_DECAY, interpolated_ema
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate
from adamx.transforms.sign import sign


@checked(learning_rate=RATE, b1=DECAY_OR_SCHEDULE, b2=POSITIVE_DECAY, weight_decay=RATE)
def cautious_lion(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.99,
    mu_dtype: DTypeLike | None = None,
    weight_decay: ScalarOrSchedule = 1e-3,
    mask: Any | Callable[[Any], Any] = None,
    *,
    moments: Moments = "float32",
) -> chain:
    """Return cautious Lion; arguments as `adamx.lion`'s.

    Args:
        learning_rate: >= 0: a number, array or schedule.
        b1: weight of the past in the average whose sign is taken, in [0, 1): a number, array or
            schedule.
        b2: weight of the past in the average that is kept, in (0, 1): a number, array or schedule.
        mu_dtype: dtype of the slot `mu`, rounded to nearest; None means float32, or wider where
            the parameter is.
        weight_decay: >= 0: a number, array or schedule; the weights shrink by
            `learning_rate * weight_decay` a step, also those that are not moved.
        mask: which leaves decay: a tree of bools, or a function that makes one from the
            parameters; None means all.
        moments: how `mu` is kept: "float32", "bfloat16" (2 bytes instead of 4, rounded
            stochastically), or a function that wraps a transformation, such as a `Storage`.

    Raises:
        ValueError: if a number is out of its range, or the slot cannot be kept so.

    Example:
        All three are kept, and 3 / (3 + 1) of the step is taken:

        >>> import jax.numpy as jnp
        >>> tx, w = cautious_lion(0.5, weight_decay=0.0), jnp.ones(3)
        >>> tx.update(jnp.array([4.0, -2.0, 1.0]), tx.init(w), w)[0]
        Array([-0.375,  0.375, -0.375], dtype=float32)
    """
    return chain(
        cautious(chain(stored(interpolated_ema(b1, b2, mu_dtype), moments), sign())),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
