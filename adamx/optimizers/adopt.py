"""ADOPT: Adam whose second moment excludes today's gradient, so that it converges for any b2.

    v_1 = g_1^2,  m_1 = 0
    m_t = b1 m_{t-1} + (1 - b1) clip(g_t / max(sqrt(v_{t-1}), eps), (t - 1)^(1/4))
    v_t = b2 v_{t-1} + (1 - b2) g_t^2
    w <- w - lr * m_t

    adopt = chain(delayed_rms_scaling(seeded_ema_of_squares(b2), eps=eps), growing_clip(0.25),
                  ema(b1), scale_by_learning_rate(lr))

The first step only starts v: the weights do not move. ADOPT averages scaled gradients, where Adam
scales the average. v has no bias to correct, and the bias of m is not corrected. The second version
of the paper added the clipping; without `growing_clip` this is the first version. Optax and the
authors' code agree with this; Optax counts steps from 0, so its bound is (t - 1)^(1/4) too. Its
`nesterov=True` has no paper and no counterpart here.

Source: Taniguchi et al. (2024), Algorithm 2, https://arxiv.org/abs/2411.02853
"""

from __future__ import annotations

from jax.typing import DTypeLike

from adamx.core.chain import chain
from adamx.core.checks import Decay, NonNegative, Rate, checked
from adamx.storage.choice import Moments, stored
from adamx.transforms.delayed_rms_scaling import delayed_rms_scaling
from adamx.transforms.ema import ema
from adamx.transforms.growing_clip import growing_clip
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate
from adamx.transforms.seeded_ema_of_squares import seeded_ema_of_squares


@checked
def adopt(
    learning_rate: Rate,
    b1: Decay = 0.9,
    b2: Decay = 0.9999,
    eps: NonNegative = 1e-6,
    mu_dtype: DTypeLike | None = None,
    *,
    moments: Moments = "float32",
) -> chain:
    """Return ADOPT; arguments as `optax.contrib.adopt`'s.

    Args:
        learning_rate: a number, array or schedule, >= 0.
        b1: weight of the past in the average of gradients, in [0, 1): a number, array or schedule.
            The gradients are scaled first.
        b2: weight of the past in the average of squares, in [0, 1): a number, array or schedule.
        eps: the smallest divisor, >= 0, in the unit of the gradients.
        mu_dtype: dtype of `mu`, rounded to nearest; None means the parameter's, at least float32.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.
            Also "packed16": `mu` and `nu` together in 4 bytes.

    Raises:
        ValueError: if a number is out of its range, or `moments` cannot store the slots.

    Example:
        The second step is the first to move: 0.5 * 0.1 * 2 / 4

        >>> import jax.numpy as jnp
        >>> tx, w = adopt(0.5), jnp.zeros(1)
        >>> first, state = tx.update(jnp.array([4.0]), tx.init(w), w)
        >>> second, _ = tx.update(jnp.array([2.0]), state, w)
        >>> print(first, second)
        [-0.] [-0.025]
    """
    scaled = delayed_rms_scaling(seeded_ema_of_squares(b2), eps=eps)
    average = chain(scaled, growing_clip(0.25), ema(b1, mu_dtype, name="mu_scaled"))
    return chain(stored(average, moments), scale_by_learning_rate(learning_rate))
