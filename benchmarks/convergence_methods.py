"""The methods that convergence.py compares: ways to keep Adam's moments, or the parameters.

FlashOptim takes part if it is installed (`pip install flashoptim-jax`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from blockwise8 import adam8

import adamx

try:
    from flashoptim_jax import flash_adam
    from flashoptim_jax.compression import reconstruct_weights
except ImportError:
    flash_adam = reconstruct_weights = None

Pair = tuple[Callable[[Any], Any], Callable[[Any, Any, Any], tuple[Any, Any]]]
FLOAT32 = "float32"


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to keep Adam's moments, or the parameters.

    Attributes:
        make: returns `init(params)` and `step(params, state, grads)` for a learning rate, and for
            b1, b2 and eps.
        dtype: of the parameters.
    """

    make: Callable[..., Pair]
    dtype: Any = jnp.float32


def ours(build: Callable[..., adamx.Transformation], rounding: str = "nearest") -> Any:
    """Return a function that makes the steps of an adamx transformation."""

    def make(rate: optax.ScalarOrSchedule, **options: float) -> Pair:
        tx = build(rate, **options)
        step = adamx.make_step(tx, rounding=rounding)
        return step.init, step

    return make


def theirs(build: Callable[..., optax.GradientTransformation]) -> Any:
    """Return a function that makes the steps of an Optax transformation."""

    def make(rate: optax.ScalarOrSchedule, **options: float) -> Pair:
        tx = build(rate, **options)

        def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return tx.init, step

    return make


def flash(bits: int | None) -> Any:
    """Return a function that makes the steps of FlashOptim on its pure-XLA path."""

    def make(rate: optax.ScalarOrSchedule, **options: float) -> Pair:
        assert flash_adam is not None
        tx = flash_adam(rate, master_weight_bits=bits, fused=False, **options)
        return tx.init, tx.step

    return make


def stored(moments: str) -> Method:
    """Return Adam with its moments in a storage."""
    return Method(ours(functools.partial(adamx.adam, moments=moments)))


def to_nearest(rate: optax.ScalarOrSchedule, **options: float) -> adamx.Transformation:
    """Return Adam with bfloat16 moments that are rounded to nearest."""
    narrow = adamx.bfloat16(adamx.scale_by_adam(**options), nearest=True)
    return adamx.chain(narrow, adamx.scale_by_learning_rate(rate))


def masters(keep: str, moments: str = "float32") -> Method:
    """Return Adam on masters of bfloat16 parameters."""

    def build(rate: optax.ScalarOrSchedule, **options: float) -> adamx.Transformation:
        return adamx.master_weights(adamx.adam(rate, **options, moments=moments), keep)

    return Method(ours(build), jnp.bfloat16)


MOMENTS = {
    FLOAT32: stored("float32"),
    "bfloat16": stored("bfloat16"),
    "packed16": stored("packed16"),
    "packed8": stored("packed8"),
    "bfloat16, to nearest": Method(ours(to_nearest)),
    "block-wise 8-bit": Method(theirs(adam8)),
    **({"FlashOptim": Method(flash(None))} if flash_adam else {}),
}
PARAMS = {
    "remainder": masters("remainder"),
    "remainder8": masters("remainder8"),
    "float32 masters": masters("float32"),
    "stochastic": Method(ours(adamx.adam, "stochastic"), jnp.bfloat16),
    "remainder8 + packed8": masters("remainder8", "packed8"),
    "Optax": Method(theirs(optax.adam), jnp.bfloat16),
    **({"FlashOptim, 24 bits": Method(flash(24), jnp.bfloat16)} if flash_adam else {}),
}
METHODS = MOMENTS | {f"bf16: {name}": method for name, method in PARAMS.items()}
