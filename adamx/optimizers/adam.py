"""Adam: Momentum's average over RMSprop's root, both corrected for their start at zero.

    m_t = b1 m_{t-1} + (1 - b1) g_t            m^_t = m_t / (1 - b1^t)
    v_t = b2 v_{t-1} + (1 - b2) g_t^2          v^_t = v_t / (1 - b2^t)
    w <- w - lr * m^_t / (sqrt(v^_t) + eps)

    adam = chain(rms_scaling(chain(ema(b1), bias_correction(b1)),
                             second_moment=chain(ema_of_squares(b2), bias_correction(b2))),
                 scale_by_learning_rate(lr))

Source: Kingma & Ba (2015), Algorithm 1, https://arxiv.org/abs/1412.6980
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike

from adamx.core.chain import chain
from adamx.core.checks import Decay, NonNegative, Rate, checked
from adamx.core.transformation import Transformation
from adamx.storage.bfloat16 import bfloat16
from adamx.storage.choice import Moments, stored
from adamx.transforms.bias_correction import bias_correction
from adamx.transforms.ema import ema
from adamx.transforms.ema_of_squares import ema_of_squares
from adamx.transforms.nesterov_ema import nesterov_ema
from adamx.transforms.rms_scaling import rms_scaling
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate


@checked
def scale_by_adam(
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    nu_dtype: DTypeLike | None = None,
    moments: Moments = "float32",
) -> Transformation:
    """Return Adam without its learning rate; arguments as `optax.scale_by_adam`'s.

    Args:
        b1: weight of the past in the average of gradients, in [0, 1): a number, array or schedule.
        b2: weight of the past in the average of squares, in [0, 1): a number, array or schedule.
        eps: added to the root, >= 0, in the unit of the gradients.
        eps_root: added under the root, >= 0, in the squared unit of the gradients.
        mu_dtype: dtype of `mu`, rounded to nearest; None means the parameter's, at least float32.
        nesterov: whether to look one step ahead, as Nesterov's method does. True makes this NAdam.
        nu_dtype: dtype of `nu`: float32, float64, bfloat16 (rounded stochastically; to nearest it
            would stop changing), or None, as for `mu_dtype`.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.
            Also "packed16" and "packed8": `mu` and `nu` together in 4 or 2 bytes.

    Raises:
        ValueError: if a number is out of its range, `moments` is unknown or given together with a
            dtype, or "packed8" has no bound for the decays.

    Example:
        >>> scale_by_adam(b1=0.5, b2=0.75)
        rms_scaling(
            chain(ema(0.5), bias_correction(0.5)),
            second_moment=chain(ema_of_squares(0.75), bias_correction(0.75)),
        )
    """
    plain = chain(ema(b1, mu_dtype), bias_correction(b1, "mu_correction"))
    rounded = nu_dtype is not None and jnp.finfo(nu_dtype).bits < 32
    if rounded and jnp.dtype(nu_dtype) != jnp.bfloat16:
        raise ValueError(f"scale_by_adam: nu_dtype must be bfloat16 or wider, got {nu_dtype!r}")
    if moments != "float32" and not (mu_dtype is None and nu_dtype is None):
        raise ValueError(
            f"scale_by_adam: moments={moments!r} keeps both: leave mu_dtype and nu_dtype out"
        )
    squares = ema_of_squares(b2, dtype=None if rounded else nu_dtype)
    scaling = rms_scaling(
        nesterov_ema(b1, mu_dtype) if nesterov else plain,
        second_moment=chain(squares, bias_correction(b2, "nu_correction")),
        eps=eps,
        eps_root=eps_root,
    )
    if rounded:
        return bfloat16(scaling, only=("nu",))
    return stored(scaling, moments, decays=(b1, b2))


@checked
def adam(
    learning_rate: Rate,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    nu_dtype: DTypeLike | None = None,
    moments: Moments = "float32",
) -> chain:
    """Return Adam; arguments as `optax.adam`'s.

    Args:
        learning_rate: a number, array or schedule, >= 0.
        b1: weight of the past in the average of gradients, in [0, 1): a number, array or schedule.
        b2: weight of the past in the average of squares, in [0, 1): a number, array or schedule.
        eps: added to the root, >= 0, in the unit of the gradients.
        eps_root: added under the root, >= 0, in the squared unit of the gradients. It is for
            differentiating through the second moment.
        mu_dtype: dtype of `mu`, rounded to nearest; None means the parameter's, at least float32.
        nesterov: whether to look one step ahead, as Nesterov's method does. True makes this NAdam.
        nu_dtype: dtype of `nu`: float32, float64, bfloat16 (rounded stochastically; to nearest it
            would stop changing), or None, as for `mu_dtype`.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.
            Also "packed16" and "packed8": `mu` and `nu` together in 4 or 2 bytes.

    Raises:
        ValueError: if a number is out of its range, `moments` is unknown or given together with a
            dtype, or "packed8" has no bound for the decays.

    Example:
        In the first step each element moves by the learning rate, whatever its gradient:

        >>> import jax.numpy as jnp
        >>> tx = adam(0.5, eps=0.0)
        >>> tx.update(jnp.array([4.0, -0.001]), tx.init(jnp.zeros(2)))[0].round(3)
        Array([-0.5,  0.5], dtype=float32)
    """
    return chain(
        scale_by_adam(
            b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, nu_dtype=nu_dtype, moments=moments
        ),
        scale_by_learning_rate(learning_rate),
    )
