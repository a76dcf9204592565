"""Momentum as in the notes: a step along the average of the gradients.

    m_t = b m_{t-1} + (1 - b) g_t                                         w <- w - lr * m_t

    momentum = chain(ema(b), scale_by_learning_rate(lr))

PyTorch's `SGD(momentum=b, dampening=b)` is the same, except that it does not dampen its first
gradient. `sgd(lr * (1 - b), momentum=b)`, the heavy ball, is the same with a sum.
"""

from __future__ import annotations

from adamx.core.chain import chain
from adamx.core.checks import Decay, Rate, checked
from adamx.storage.choice import Moments, stored
from adamx.transforms.ema import ema
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate


@checked
def momentum(learning_rate: Rate, decay: Decay = 0.9, *, moments: Moments = "float32") -> chain:
    """Return gradient descent along the exponential moving average of the gradients.

    Args:
        learning_rate: a number, array or schedule, >= 0.
        decay: weight of the past, in [0, 1): a number, array or schedule. The heavy ball,
            `sgd(lr, momentum=decay)`, takes steps 1 / (1 - decay) times as large.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.

    Raises:
        ValueError: if a number is out of its range, or `moments` cannot store the slots.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = momentum(0.5, decay=0.75)
        >>> tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))[0]
        Array([-0.5], dtype=float32)
    """
    return chain(stored(ema(decay), moments), scale_by_learning_rate(learning_rate))
