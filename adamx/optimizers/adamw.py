"""AdamW: Adam with decoupled weight decay.

    w <- (1 - lr * weight_decay) w - lr * m^_t / (sqrt(v^_t) + eps)

    adamw = adam with add_decayed_weights(weight_decay) before the learning rate

Source: Loshchilov & Hutter (2019), Algorithm 2, https://arxiv.org/abs/1711.05101; as in PyTorch and
Optax the decay is multiplied by the learning rate.
"""

from __future__ import annotations

from typing import Any

from jax.typing import DTypeLike

from adamx.core.chain import chain
from adamx.core.checks import Decay, NonNegative, Rate, checked
from adamx.optimizers.adam import scale_by_adam
from adamx.storage.choice import Moments
from adamx.transforms.add_decayed_weights import add_decayed_weights
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate


@checked
def adamw(
    learning_rate: Rate,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: Rate = 1e-4,
    mask: Any = None,
    *,
    nesterov: bool = False,
    nu_dtype: DTypeLike | None = None,
    moments: Moments = "float32",
) -> chain:
    """Return AdamW; arguments as `optax.adamw`'s.

    Args:
        learning_rate: a number, array or schedule, >= 0.
        b1: weight of the past in the average of gradients, in [0, 1): a number, array or schedule.
        b2: weight of the past in the average of squares, in [0, 1): a number, array or schedule.
        eps: added to the root, >= 0, in the unit of the gradients.
        eps_root: added under the root, >= 0, in the squared unit of the gradients.
        mu_dtype: dtype of `mu`, rounded to nearest; None means the parameter's, at least float32.
        weight_decay: a number, array or schedule, >= 0. The weights shrink by
            `learning_rate * weight_decay` a step.
        mask: which leaves decay: a tree of bools, a function of the parameters that returns one, or
            patterns of paths, such as "*/kernel"; None means all.
        nesterov: whether to look one step ahead, as Nesterov's method does. True makes this NAdamW.
        nu_dtype: dtype of `nu`: float32, float64, bfloat16 (rounded stochastically; to nearest it
            would stop changing), or None, as for `mu_dtype`.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.
            Also "packed16" and "packed8": `mu` and `nu` together in 4 or 2 bytes.

    Raises:
        ValueError: if a number is out of its range, or `moments` cannot store the slots.

    Example:
        The first step moves by lr * (sign(g) + weight_decay * w):

        >>> import jax.numpy as jnp
        >>> tx, w = adamw(0.5, eps=0.0, weight_decay=0.25), jnp.array([2.0])
        >>> tx.update(jnp.array([4.0]), tx.init(w), w)[0]
        Array([-0.75], dtype=float32)
    """
    return chain(
        scale_by_adam(
            b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, nu_dtype=nu_dtype, moments=moments
        ),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
