"""RAdam: momentum in the first steps, then Adam, damped while its second moment is young.

    rho_t = rho_inf - 2 t b2^t / (1 - b2^t)    rho_inf = 2 / (1 - b2) - 1
    r_t   = sqrt((rho_t - 4) (rho_t - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho_t))
    w <- w - lr * r_t m^_t / (sqrt(v^_t) + eps) where rho_t >= threshold, else w - lr * m^_t

    radam = chain(rectified(rms_scaling(chain(ema(b1), bias_correction(b1)),
                                        second_moment=chain(ema_of_squares(b2),
                                                            bias_correction(b2))),
                            decay=b2),
                  scale_by_learning_rate(lr))

The threshold is 4 in the paper, 5 in Optax and PyTorch. The paper has no eps; PyTorch adds it to
sqrt(v_t) before the correction, so it weighs more in the first steps.

Source: Liu et al. (2020), Algorithm 2, https://arxiv.org/abs/1908.03265
"""

from __future__ import annotations

from adamx.core.chain import chain
from adamx.core.checks import Decay, NonNegative, Rate, checked
from adamx.storage.choice import Moments, stored
from adamx.transforms.bias_correction import bias_correction
from adamx.transforms.ema import ema
from adamx.transforms.ema_of_squares import ema_of_squares
from adamx.transforms.nesterov_ema import nesterov_ema
from adamx.transforms.rectified import ConstantDecay, rectified
from adamx.transforms.rms_scaling import rms_scaling
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate


@checked
def radam(
    learning_rate: Rate,
    b1: Decay = 0.9,
    b2: ConstantDecay = 0.999,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
    threshold: NonNegative = 5.0,
    *,
    nesterov: bool = False,
    moments: Moments = "float32",
) -> chain:
    """Return RAdam; arguments as `optax.radam`'s.

    Args:
        learning_rate: a number, array or schedule, >= 0.
        b1: weight of the past in the average of gradients, in [0, 1): a number, array or schedule.
        b2: weight of the past in the average of squares, in [0, 1): a number or array, since a
            schedule has no rho_inf. With b2 <= 2/3 the threshold 5 is never reached.
        eps: added to the root, >= 0, in the unit of the gradients.
        eps_root: added under the root, >= 0, in the squared unit of the gradients.
        threshold: the least rho_t at which to divide by the root, >= 0. 4 or less means rho_t > 4.
            The paper has 4.
        nesterov: whether to look one step ahead, as Nesterov's method does.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.
            Also "packed16" and "packed8": `mu` and `nu` together in 4 or 2 bytes.

    Raises:
        TypeError: if `b2` is a schedule.
        ValueError: if a number is out of its range, or `moments` cannot store the slots.

    Example:
        The first step is momentum's, and proportional to the gradient:

        >>> import jax.numpy as jnp
        >>> tx = radam(0.5)
        >>> tx.update(jnp.array([4.0, -8.0]), tx.init(jnp.zeros(2)))[0].round(3)
        Array([-2.,  4.], dtype=float32)
    """
    average = nesterov_ema(b1) if nesterov else chain(ema(b1), bias_correction(b1, "mu_correction"))
    squares = chain(ema_of_squares(b2), bias_correction(b2))
    scaling = rms_scaling(average, second_moment=squares, eps=eps, eps_root=eps_root)
    return chain(
        stored(rectified(scaling, decay=b2, threshold=threshold), moments, decays=(b1, b2)),
        scale_by_learning_rate(learning_rate),
    )
