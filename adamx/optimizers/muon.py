"""Muon: momentum, orthogonalised; and Muon for some matrices with AdamW for the rest.

    m_t = beta m_{t-1} + (1 - beta) g_t
    u_t = beta m_t / (1 - beta^(t+1)) + (1 - beta) g_t / (1 - beta^t)
    w  <- (1 - lr * weight_decay) w - lr * s * orthogonalized(u_t)    s by the matrix's shape

    muon = chain(nesterov_ema(beta), orthogonalized(), scale_by_shape(),
                 add_decayed_weights(weight_decay), scale_by_learning_rate(lr))

    muon_adamw = by_path({is_matrix: muon}, default=adamw)

The step has no second moment: the state is 4 bytes a parameter of a matrix. Embeddings, the last
layer, biases and norms belong to AdamW, whatever their shape: `matrices` says which leaves do not.

s is sqrt(max(1, outputs / inputs)), the original's factor. With `consistent_rms=0.2` it is
0.2 sqrt(max(inputs, outputs)), with which AdamW's learning rate and weight decay do for Muon too.
The original's momentum is a sum, m_t = beta m_{t-1} + g_t, and u_t = g_t + beta m_t (`trace`):
orthogonalised, that is the same but for the correction of the start. This is Optax's.

Source: Jordan et al. (2024), https://kellerjordan.github.io/posts/muon; Liu et al. (2025),
https://arxiv.org/abs/2502.16982
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from adamx.core.chain import chain
from adamx.core.checks import Decay, NonNegative, Rate, checked
from adamx.core.paths import Pattern
from adamx.optimizers.adamw import adamw
from adamx.storage.choice import Moments, stored
from adamx.transforms.add_decayed_weights import add_decayed_weights
from adamx.transforms.bias_correction import bias_correction
from adamx.transforms.ema import ema
from adamx.transforms.nesterov_ema import nesterov_ema
from adamx.transforms.orthogonalized import QUINTIC, Sides, orthogonalized
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate
from adamx.transforms.scale_by_shape import scale_by_shape
from adamx.wrappers.by_path import by_path

# NumPy's, which optax.inject_hyperparams does not trace as it does an int: it makes the program.
_STEPS: Any = np.int32(5)


@checked
def muon(
    learning_rate: Rate,
    ns_coeffs: tuple[Any, ...] = QUINTIC,
    ns_steps: int = _STEPS,
    beta: Decay = 0.95,
    eps: NonNegative = 1e-8,
    weight_decay: Rate = 0.0,
    weight_decay_mask: Any = None,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = True,
    consistent_rms: NonNegative | None = None,
    axes: Sides = None,
    dtype: DTypeLike | None = None,
    moments: Moments = "float32",
) -> chain:
    """Return Muon, for parameters that are all matrices; arguments as `optax.contrib.muon`'s.

    Args:
        learning_rate: a number, array or schedule, >= 0.
        ns_coeffs: the coefficients (a, b, c) of the quintic, or a tuple of `ns_steps` such triples,
            one for each step.
        ns_steps: the number of steps, >= 1.
        beta: weight of the past in the average of gradients, in [0, 1): a number, array or
            schedule.
        eps: added to the norm, >= 0, in the unit of the updates.
        weight_decay: a number, array or schedule, >= 0. The weights shrink by
            `learning_rate * weight_decay` a step.
        weight_decay_mask: which leaves decay: a tree of bools, a function of the parameters that
            returns one, or patterns of paths, such as "*/kernel"; None means all.
        mu_dtype: dtype of `mu`, rounded to nearest; None means the parameter's, at least float32.
        nesterov: whether to look one step ahead, as Nesterov's method does.
        consistent_rms: the root mean square, >= 0, that an orthogonal matrix gets; None means the
            original factor, the root of outputs over inputs, at least 1.
        axes: the axes of the matrix's rows, or inputs, and of its columns, or outputs: a pair, each
            an axis or a tuple of axes, which together are one side, such as (0, (1, 2)) for a
            kernel (in, heads, features). All other axes are stacked: each index has a matrix of its
            own. () leaves an array as it is. Or a function from a leaf's path, such as
            "dense/kernel", and the leaf to one of these. None means the two axes of a matrix.
        dtype: the dtype in which the matrices are multiplied; None means the update's, at least
            float32. bfloat16 is faster on accelerators, and exact enough.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.

    Raises:
        TypeError: if `ns_steps` is not a whole number, or one that is not known when a program is
            traced.
        ValueError: if a number is out of its range, or `moments` cannot store the slots; at `init`
            and `update`, if a leaf is not a matrix where `axes` is None.

    Example:
        The singular values 0.6 and 0.8 of the norm become 0.72 and 1.12:

        >>> import jax.numpy as jnp
        >>> tx, w = muon(0.5), jnp.zeros((2, 2))
        >>> updates, state = tx.update(jnp.diag(jnp.array([3.0, 4.0])), tx.init(w), w)
        >>> [round(x, 2) for x in jnp.diag(updates).tolist()]
        [-0.36, -0.56]
    """
    if nesterov:
        average = stored(nesterov_ema(beta, mu_dtype), moments)
    else:
        corrected = bias_correction(beta, "mu_correction")
        average = chain(stored(ema(beta, mu_dtype), moments), corrected)
    return chain(
        average,
        orthogonalized(ns_coeffs, ns_steps, eps, axes, dtype),
        scale_by_shape(consistent_rms, axes),
        add_decayed_weights(weight_decay, weight_decay_mask),
        scale_by_learning_rate(learning_rate),
    )


def is_matrix(path: str, leaf: Any) -> bool:
    """Say whether a leaf has two axes."""
    del path
    return leaf.ndim == 2


@checked
def muon_adamw(
    learning_rate: Rate,
    ns_coeffs: tuple[Any, ...] = QUINTIC,
    ns_steps: int = _STEPS,
    beta: Decay = 0.95,
    eps: NonNegative = 1e-8,
    weight_decay: Rate = 0.0,
    weight_decay_mask: Any = None,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = True,
    adam_b1: Decay = 0.9,
    adam_b2: Decay = 0.999,
    adam_eps_root: NonNegative = 0.0,
    adam_weight_decay: Rate = 0.0,
    adam_learning_rate: Rate | None = None,
    consistent_rms: NonNegative | None = None,
    matrices: Callable[[str, Any], bool] | Pattern | None = None,
    axes: Sides = None,
    dtype: DTypeLike | None = None,
    moments: Moments = "float32",
) -> by_path:
    """Return Muon for some leaves and AdamW for all others; arguments as `optax.contrib.muon`'s.

    Args:
        learning_rate: a number, array or schedule, >= 0.
        ns_coeffs: the coefficients (a, b, c) of the quintic, or a tuple of `ns_steps` such triples,
            one for each step.
        ns_steps: the number of steps, >= 1.
        beta: weight of the past in the average of gradients, in [0, 1): a number, array or
            schedule.
        eps: added to the norm, >= 0, in the unit of the updates. For AdamW it is added to the root.
        weight_decay: a number, array or schedule, >= 0. The weights shrink by
            `learning_rate * weight_decay` a step. It is that of Muon's leaves.
        weight_decay_mask: which leaves decay: a tree of bools, a function of the parameters that
            returns one, or patterns of paths, such as "*/kernel"; None means all. It is that of
            Muon's leaves.
        mu_dtype: dtype of `mu`, rounded to nearest; None means the parameter's, at least float32.
        nesterov: whether to look one step ahead, as Nesterov's method does. It is for both.
        adam_b1: b1 of AdamW, in [0, 1): a number, array or schedule.
        adam_b2: b2 of AdamW, in [0, 1): a number, array or schedule.
        adam_eps_root: eps_root of AdamW, >= 0, in the squared unit of the gradients.
        adam_weight_decay: weight decay of AdamW's leaves: a number, array or schedule, >= 0.
        adam_learning_rate: learning rate of AdamW: a number, array or schedule, >= 0; None means
            `learning_rate`.
        consistent_rms: the root mean square, >= 0, that an orthogonal matrix gets; None means the
            original factor, the root of outputs over inputs, at least 1.
        matrices: which leaves are Muon's: a function of path and leaf, such as
            `lambda path, leaf: leaf.ndim == 2 and "embed" not in path`, or a pattern of paths; None
            means those with two axes. There must be one at least.
        axes: the axes of the matrix's rows, or inputs, and of its columns, or outputs: a pair, each
            an axis or a tuple of axes, which together are one side, such as (0, (1, 2)) for a
            kernel (in, heads, features). All other axes are stacked: each index has a matrix of its
            own. () leaves an array as it is. Or a function from a leaf's path, such as
            "dense/kernel", and the leaf to one of these. None means the two axes of a matrix.
        dtype: the dtype in which the matrices are multiplied; None means the update's, at least
            float32. bfloat16 is faster on accelerators, and exact enough.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.

    Raises:
        TypeError: if `ns_steps` is not a whole number, or one that is not known when a program is
            traced.
        ValueError: if a number is out of its range, or `moments` cannot store the slots; at `init`
            and `update`, if no leaf is Muon's, or one of these is not a matrix where `axes` is
            None.

    Example:
        The bias moves by the sign of its gradient:

        >>> import jax.numpy as jnp
        >>> tx = muon_adamw(0.5, nesterov=False)
        >>> params = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
        >>> grads = {"kernel": jnp.diag(jnp.array([3.0, 4.0])), "bias": jnp.array([3.0, -4.0])}
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> [round(x, 2) for x in updates["bias"].tolist()]
        [-0.5, 0.5]
        >>> [round(x, 2) for x in jnp.diag(updates["kernel"]).tolist()]
        [-0.36, -0.56]
        >>> state["nu"]["kernel"] is None
        True
    """
    of_matrices = muon(
        learning_rate, ns_coeffs, ns_steps, beta, eps, weight_decay, weight_decay_mask, mu_dtype,
        nesterov=nesterov, consistent_rms=consistent_rms, axes=axes, dtype=dtype, moments=moments,
    )  # fmt: skip
    rest = adamw(
        learning_rate if adam_learning_rate is None else adam_learning_rate,
        adam_b1, adam_b2, eps, adam_eps_root, mu_dtype, adam_weight_decay, nesterov=nesterov,
        moments=moments,
    )  # fmt: skip
    return by_path({matrices or is_matrix: of_matrices}, default=rest)
