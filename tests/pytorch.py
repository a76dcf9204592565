"""PyTorch's optimizers, composed of adamx's concepts, from their hyperparameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import adamx


def composed(name: str, h: Mapping[str, Any]) -> adamx.Transformation:
    """Return what `torch.optim.NAME` does.

    Args:
        name: of the class.
        h: all hyperparameters, by PyTorch's names.
    """
    decay = adamx.add_decayed_weights(h["weight_decay"])
    ascends = adamx.scale(-1.0 if h.get("maximize") else 1.0)
    if name == "AdamW" or h.get("decoupled_weight_decay"):
        rate = adamx.scale_by_learning_rate(h["lr"])
        return adamx.chain(ascends, scaling(name, h), decay, rate)
    return adamx.chain(ascends, decay, with_rate(name, h))


def with_rate(name: str, h: Mapping[str, Any]) -> adamx.Transformation:
    """Return the method with its learning rate, without decay."""
    lr = h["lr"]
    match name:
        case "SGD" if h["dampening"]:  # of every gradient but the first

            def share(count: jax.Array) -> jax.Array:
                return jnp.where(count == 0, 1.0, 1 - h["dampening"])

            return adamx.chain(adamx.scale(share), adamx.sgd(lr, h["momentum"], h["nesterov"]))
        case "SGD":
            return adamx.sgd(lr, h["momentum"] or None, h["nesterov"])
        case "RMSprop":
            return adamx.rmsprop(
                lr, h["alpha"], h["eps"], centered=h["centered"], momentum=h["momentum"] or None
            )
        case "Adagrad":
            falling = lambda count: lr / (1 + count.astype(float) * h["lr_decay"])  # noqa: E731
            rate = falling if h["lr_decay"] else lr
            return adamx.adagrad(rate, h["initial_accumulator_value"], h["eps"])
        case "Adamax":
            b1, b2 = h["betas"]
            return adamx.adamax(lr, b1, b2, h["eps"])
        case _:
            return adamx.chain(scaling(name, h), adamx.scale_by_learning_rate(lr))


def scaling(name: str, h: Mapping[str, Any]) -> adamx.Transformation:
    """Return the direction of a method that divides by a root."""
    b1, b2 = h["betas"]
    squares, correction = adamx.ema_of_squares(b2), adamx.bias_correction(b2)
    if h.get("amsgrad"):
        squares = adamx.chain(squares, adamx.running_max())
    numerator = adamx.chain(adamx.ema(b1), adamx.bias_correction(b1))
    if name == "NAdam":
        numerator = adamx.scheduled_nesterov_ema(b1, h["momentum_decay"])
    if name == "RAdam":  # eps is added to the root of v, and their quotient corrected
        scaled = adamx.rms_scaling(numerator, second_moment=squares, eps=h["eps"])
        return adamx.chain(adamx.rectified(scaled, decay=b2), adamx.scale(root_of_correction(b2)))
    second = adamx.chain(squares, correction)
    return adamx.rms_scaling(numerator, second_moment=second, eps=h["eps"])


def root_of_correction(b2: float) -> Callable[[jax.Array], jax.Array]:
    """Return the schedule sqrt(1 - b2^t) of RAdam's steps that are rectified, and 1 before."""

    def root(count: jax.Array) -> jax.Array:
        t = count.astype(float) + 1
        length = 2 / (1 - b2) - 1 - 2 * t * b2**t / (1 - b2**t)
        return jnp.where(length > 5, jnp.sqrt(1 - b2**t), 1.0)

    return root
