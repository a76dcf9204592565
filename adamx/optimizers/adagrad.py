"""AdaGrad: divide by the root of the sum of all squared gradients.

    s_t = s_{t-1} + g_t^2                                      w <- w - lr * g_t / (sqrt(s_t) + eps)

    adagrad = chain(rms_scaling(second_moment=sum_of_squares()), scale_by_learning_rate(lr))

Source: Duchi, Hazan & Singer (2011), Figure 1, https://jmlr.org/papers/v12/duchi11a.html
"""

from __future__ import annotations

from adamx.core.chain import chain
from adamx.core.checks import NonNegative, Rate, checked
from adamx.storage.choice import Moments, stored
from adamx.transforms.rms_scaling import rms_scaling
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate
from adamx.transforms.sum_of_squares import sum_of_squares


@checked
def adagrad(
    learning_rate: Rate,
    initial_accumulator_value: NonNegative = 0.1,
    eps: NonNegative = 1e-7,
    eps_in_sqrt: bool = False,
    *,
    moments: Moments = "float32",
) -> chain:
    """Return AdaGrad; arguments as `optax.adagrad`'s, which adds eps under the root.

    Args:
        learning_rate: a number, array or schedule, >= 0.
        initial_accumulator_value: value of the sum before the first step, >= 0.
        eps: added to the root, >= 0, in the unit of the gradients. As in the paper and PyTorch.
        eps_in_sqrt: True adds eps under the root, as Optax does.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.

    Raises:
        ValueError: if a number is out of its range, or `moments` cannot store the slots.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = adagrad(1.0, initial_accumulator_value=16.0, eps=1.0)
        >>> tx.update(jnp.array([3.0]), tx.init(jnp.zeros(1)))[0]
        Array([-0.5], dtype=float32)
    """
    inside, outside = (eps, 0.0) if eps_in_sqrt else (0.0, eps)
    squares = sum_of_squares(initial_accumulator_value)
    scaling = rms_scaling(second_moment=squares, eps=outside, eps_root=inside)
    return chain(stored(scaling, moments), scale_by_learning_rate(learning_rate))
