"""Schedule-free AdamW: RMSprop moves z, x averages z, and gradients are taken in between.

    y_t     = (1 - b1) z_t + b1 x_t
    v_t     = b2 v_{t-1} + (1 - b2) g_t^2,    g_t the gradient at y_t,    v^_t = v_t / (1 - b2^t)
    z_{t+1} = z_t - lr_t * (g_t / (sqrt(v^_t) + eps) + weight_decay * y_t)
    x_{t+1} = (1 - c_t) x_t + c_t z_{t+1},    c_t = lr_t^2 / (lr_1^2 + ... + lr_t^2)

    schedule_free_adamw = schedule_free(chain(rms_scaling(second_moment=chain(ema_of_squares(b2),
                                                                              bias_correction(b2))),
                                              add_decayed_weights(weight_decay),
                                              scale_by_learning_rate(lr)), lr, b1)

The parameters are y; evaluate at x, from `schedule_free_eval_params`. The warm-up is the paper's,
lr_t = lr * min(1, t / warmup_steps); Optax moves z by the last step's rate, so its first step is 0.
v is corrected as in Optax and in the authors' present PyTorch code. The paper puts
sqrt(1 - b2^t) into lr_t instead: then early steps count less in the average, and decay less. As a
composition that is

    rate = lambda step: lr * jnp.sqrt(1 - b2 ** (step + 1.0))
    schedule_free(chain(rms_scaling(second_moment=ema_of_squares(b2)),
                        add_decayed_weights(weight_decay), scale_by_learning_rate(rate)), rate, b1)

Source: Defazio et al. (2024), Algorithm 1, https://arxiv.org/abs/2405.15682
"""

from __future__ import annotations

import optax

from adamx.core.chain import chain
from adamx.core.checks import Decay, NonNegative, Rate, checked
from adamx.storage.choice import Moments, stored
from adamx.transforms.add_decayed_weights import add_decayed_weights
from adamx.transforms.bias_correction import bias_correction
from adamx.transforms.ema_of_squares import ema_of_squares
from adamx.transforms.rms_scaling import rms_scaling
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate
from adamx.transforms.schedule_free import Share, schedule_free


@checked
def schedule_free_adamw(
    learning_rate: Rate = 0.0025,
    warmup_steps: int | None = None,
    b1: Share = 0.9,
    b2: Decay = 0.999,
    eps: NonNegative = 1e-8,
    weight_decay: Rate = 0.0,
    weight_lr_power: NonNegative = 2.0,
    *,
    moments: Moments = "float32",
) -> schedule_free:
    """Return schedule-free AdamW; arguments as `optax.contrib.schedule_free_adamw`'s.

    It is the last stage of a chain. Its slots `z` and `nu` take 8 bytes a parameter.

    Args:
        learning_rate: a number, array or schedule, >= 0. A schedule must not decay, and excludes
            `warmup_steps`.
        warmup_steps: the number of steps, >= 1, over which the rate rises linearly, starting with
            `learning_rate / warmup_steps`; None means no warm-up.
        b1: weight of the average x in the parameters y, in (0, 1]: a number or array, no schedule.
        b2: weight of the past in the average of squares, in [0, 1): a number, array or schedule.
        eps: added to the root, >= 0, in the unit of the gradients.
        weight_decay: a number, array or schedule, >= 0. z moves by `learning_rate * weight_decay`
            of the parameters a step.
        weight_lr_power: power of the learning rate in the weights of the average, >= 0; 0 weights
            all steps alike.
        moments: storage of slots: "float32", "bfloat16" (2 bytes each) or a function; see `stored`.

    Raises:
        TypeError: if `b1` is a schedule.
        ValueError: if a number is out of its range, `moments` cannot store `nu`, or a schedule is
            given together with `warmup_steps`.

    Example:
        The first step moves z, x and y equally:

        >>> import jax.numpy as jnp
        >>> tx, y = schedule_free_adamw(0.5, eps=0.0), jnp.array([2.0])
        >>> tx.update(jnp.array([4.0]), tx.init(y), y)[0]
        Array([-0.5], dtype=float32)
    """
    if warmup_steps is not None:
        if callable(learning_rate):
            raise ValueError(
                "schedule_free_adamw: learning_rate must be a number where warmup_steps is given, "
                f"got {learning_rate!r}"
            )
        if warmup_steps < 1:
            raise ValueError(
                f"schedule_free_adamw: warmup_steps must be >= 1 or None, got {warmup_steps!r}"
            )
        first = learning_rate / warmup_steps
        learning_rate = optax.linear_schedule(first, learning_rate, warmup_steps - 1)
    squares = chain(ema_of_squares(b2), bias_correction(b2, "nu_correction"))
    steps = chain(
        stored(rms_scaling(second_moment=squares, eps=eps), moments),
        add_decayed_weights(weight_decay),
        scale_by_learning_rate(learning_rate),
    )
    return schedule_free(steps, learning_rate, b1, weight_lr_power)
