"""NAdam: Adam whose average of gradients looks one step ahead, as Nesterov's method does.

    m_t = b1 m_{t-1} + (1 - b1) g_t            v^_t = v_t / (1 - b2^t)
    w <- w - lr * (b1 m_t / (1 - b1^(t+1)) + (1 - b1) g_t / (1 - b1^t)) / (sqrt(v^_t) + eps)

    nadam = chain(rms_scaling(nesterov_ema(b1),
                              second_moment=chain(ema_of_squares(b2), bias_correction(b2))),
                  scale_by_learning_rate(lr))

This is Optax's NAdam, with a constant momentum. PyTorch's momentum rises from b1 / 2 to b1: use
`scheduled_nesterov_ema(b1)` instead of `nesterov_ema(b1)`. The paper's algorithm has that schedule
too, averages with it, and multiplies v^_t by b2.

Source: Dozat (2016), Algorithm 2, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ
"""

from __future__ import annotations

from jax.typing import DTypeLike

from adamx.core.chain import chain
from adamx.core.checks import Decay, NonNegative, Rate, checked
from adamx.optimizers.adam import scale_by_adam
from adamx.storage.choice import Moments
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate


@checked
def nadam(
    learning_rate: Rate,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    moments: Moments = "float32",
) -> chain:
    """Return NAdam; arguments as `optax.nadam`'s.

    Args:
        learning_rate: a number, array or schedule, >= 0.
        b1: weight of the past in the average of gradients, in [0, 1): a number, array or schedule.
        b2: weight of the past in the average of squares, in [0, 1): a number, array or schedule.
        eps: added to the root, >= 0, in the unit of the gradients.
        eps_root: added under the root, >= 0, in the squared unit of the gradients.
        mu_dtype: dtype of `mu`, rounded to nearest; None means the parameter's, at least float32.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.
            Also "packed16" and "packed8": `mu` and `nu` together in 4 or 2 bytes.

    Raises:
        ValueError: if a number is out of its range, or `moments` cannot store the slots.

    Example:
        First step: m = 0.5 g, so the numerator is 0.5 * 0.5 g / 0.75 + 0.5 g / 0.5 = 4/3 g:

        >>> import jax.numpy as jnp
        >>> tx = nadam(0.75, b1=0.5, eps=0.0)
        >>> tx.update(jnp.array([4.0, -0.001]), tx.init(jnp.zeros(2)))[0].round(3)
        Array([-1.,  1.], dtype=float32)
    """
    return chain(
        scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=True, moments=moments),
        scale_by_learning_rate(learning_rate),
    )
