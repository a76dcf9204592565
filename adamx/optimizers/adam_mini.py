"""Adam-mini: AdamW with one second moment for a block of elements.

    m_t = b1 m_{t-1} + (1 - b1) g_t                  m^_t = m_t / (1 - b1^t)
    v_t = b2 v_{t-1} + (1 - b2) mean(g_t^2)          v^_t = v_t / (1 - b2^t)    one v a block
    w  <- (1 - lr * weight_decay) w - lr * m^_t / (sqrt(v^_t) + eps)

    adam_mini = adamw with ema_of_mean_squares(b2, axes) as its second moment

It keeps 4 bytes a parameter where AdamW keeps 8. The paper's subject is the choice of the blocks
(`adamx.transforms.ema_of_mean_squares`). With `axes=None` a block is an output neuron of a kernel,
or a whole vector. Heads of queries and keys, and tokens of embeddings, need a function:

    def axes(path, leaf):
        if "embed" in path:
            return (1,)              # (tokens, features): one block a token
        if "query" in path or "key" in path:
            return (0, 2)            # (features, heads, head features): one block a head
        return tuple(range(leaf.ndim - 1)) or (0,)

The method's first version averaged over whole value, attention and MLP matrices and left embeddings
to AdamW, and the authors' code does not decay normalisation layers: use `axes` and `mask` for both.

Source: Zhang et al. (2024), Algorithms 1 and 3, https://arxiv.org/abs/2406.16793
"""

from __future__ import annotations

from typing import Any

from adamx.core.chain import chain
from adamx.core.checks import Decay, NonNegative, Rate, checked
from adamx.storage.choice import Moments, stored
from adamx.transforms.add_decayed_weights import add_decayed_weights
from adamx.transforms.bias_correction import bias_correction
from adamx.transforms.ema import ema
from adamx.transforms.ema_of_mean_squares import BlockAxes, ema_of_mean_squares
from adamx.transforms.rms_scaling import rms_scaling
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate


@checked
def adam_mini(
    learning_rate: Rate,
    b1: Decay = 0.9,
    b2: Decay = 0.95,
    eps: NonNegative = 1e-8,
    weight_decay: Rate = 0.1,
    mask: Any = None,
    *,
    axes: BlockAxes = None,
    moments: Moments = "float32",
) -> chain:
    """Return Adam-mini, with decoupled weight decay.

    Args:
        learning_rate: a number, array or schedule, >= 0. The same as for AdamW.
        b1: weight of the past in the average of gradients, in [0, 1): a number, array or schedule.
        b2: weight of the past in the average of squares, in [0, 1): a number, array or schedule.
            The squares are averaged over a block first.
        eps: added to the root, >= 0, in the unit of the gradients.
        weight_decay: a number, array or schedule, >= 0. The weights shrink by
            `learning_rate * weight_decay` a step.
        mask: which leaves decay: a tree of bools, a function of the parameters that returns one, or
            patterns of paths, such as "*/kernel"; None means all.
        axes: the axes to average over: a tuple, or a function from a leaf's path, such as
            "dense/kernel", and the leaf to a tuple; None means all but the last of a matrix or
            kernel, and all of a vector. () averages nothing.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.
            `nu` is small, and float32 or wider.

    Raises:
        ValueError: if a number is out of its range, or `moments` cannot store `mu`.

    Example:
        In the first column sqrt(v) = sqrt((1 + 49) / 2) = 5, in the second one 2:

        >>> import jax.numpy as jnp
        >>> tx, w = adam_mini(5.0, eps=0.0, weight_decay=0.0), jnp.zeros((2, 2))
        >>> grads = jnp.array([[1.0, 2.0], [7.0, 2.0]])
        >>> tx.update(grads, tx.init(w), w)[0].astype(jnp.bfloat16)
        Array([[-1, -5],
               [-7, -5]], dtype=bfloat16)
    """
    average = chain(stored(ema(b1), moments), bias_correction(b1, "mu_correction"))
    squares = chain(ema_of_mean_squares(b2, axes), bias_correction(b2, "nu_correction"))
    return chain(
        rms_scaling(average, second_moment=squares, eps=eps),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
