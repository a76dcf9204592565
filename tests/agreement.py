"""Optimizers beside those who judge them: the papers' method, PyTorch's optimizer, Optax's.

How roundings are counted is in test_agreement.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import reference
from pytorch import composed
from recordings import TORCH
from reference import Trajectory

import adamx

partial = functools.partial
r = reference
STEPS = 40
RATES = 0.1 / (1 + 0.05 * np.arange(STEPS))
DECAYS = 0.5 / (1 + 0.1 * np.arange(STEPS))
T = np.arange(1, STEPS + 1)

# --- In float64 against the reference ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer, and the reference's method of the same hyperparameters.

    Attributes:
        tx: takes the learning rate.
        method: of the reference.
        options: what the method takes beside w, gradients and learning rate.
        masked: the method and its options where a mask excludes a leaf, which it does for "b".
    """

    tx: Callable[[Any], adamx.Transformation]
    method: Callable[..., Trajectory]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    masked: tuple[Callable[..., Trajectory], Mapping[str, Any]] | None = None


def alike(tx: Callable[..., Any], method: Callable[..., Trajectory], **options: Any) -> Optimizer:
    """An optimizer whose arguments are called as in the reference."""
    return Optimizer(partial(tx, **options), method, options)


ADAM: dict[str, Any] = {"b1": 0.8, "b2": 0.97, "eps": 1e-3}
CENTERED: dict[str, Any] = {"decay": 0.8, "eps": 0.5, "eps_in_sqrt": True, "centered": True}
DECAY = {"weight_decay": 0.5}

OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": alike(adamx.sgd, r.sgd),
    "sgd_momentum": alike(adamx.sgd, r.sgd, momentum=0.8),
    "sgd_nesterov": alike(adamx.sgd, r.sgd, momentum=0.8, nesterov=True),
    "sgd_momentum_l2": Optimizer(
        lambda lr: adamx.chain(adamx.add_decayed_weights(0.5), adamx.sgd(lr, 0.8)),
        r.sgd,
        {"momentum": 0.8, **DECAY},
    ),
    "sgdw_nesterov": Optimizer(
        lambda lr: adamx.chain(
            adamx.trace(0.8, nesterov=True),
            adamx.add_decayed_weights(0.5),
            adamx.scale_by_learning_rate(lr),
        ),
        r.sgdw,
        {"momentum": 0.8, "nesterov": True, **DECAY},
    ),
    "momentum": alike(adamx.momentum, r.momentum),
    "momentum_low": alike(adamx.momentum, r.momentum, decay=0.01),
    "momentum_zero": alike(adamx.momentum, r.momentum, decay=0.0),
    "adagrad": alike(adamx.adagrad, r.adagrad),
    "adagrad_zero": alike(adamx.adagrad, r.adagrad, initial_accumulator_value=0.0, eps=1e-3),
    "adagrad_eps_in_sqrt": alike(adamx.adagrad, r.adagrad, eps=1e-3, eps_in_sqrt=True),
    "rmsprop": alike(adamx.rmsprop, r.rmsprop),
    "rmsprop_initial": alike(adamx.rmsprop, r.rmsprop, decay=0.8, eps=1e-3, initial_scale=2.0),
    "rmsprop_eps_in_sqrt": alike(adamx.rmsprop, r.rmsprop, eps=1e-3, eps_in_sqrt=True),
    "rmsprop_bias_correction": alike(adamx.rmsprop, r.rmsprop, bias_correction=True),
    "rmsprop_centered": alike(adamx.rmsprop, r.rmsprop, **CENTERED),
    "rmsprop_momentum": alike(adamx.rmsprop, r.rmsprop, momentum=0.7),
    "rmsprop_nesterov": alike(adamx.rmsprop, r.rmsprop, momentum=0.7, nesterov=True),
    "rmsprop_all": alike(
        adamx.rmsprop,
        r.rmsprop,
        **CENTERED,
        momentum=0.7,
        nesterov=True,
        bias_correction=True,
        initial_scale=2.0,
    ),
    "adam": alike(adamx.adam, r.adam),
    "adam_other": alike(adamx.adam, r.adam, **ADAM),
    "adam_eps_root": alike(adamx.adam, r.adam, **ADAM, eps_root=0.02),
    "adam_nesterov": alike(adamx.adam, r.adam, **ADAM, nesterov=True),
    "adam_no_memory": alike(adamx.adam, r.adam, b1=0.0, b2=0.0, eps=1e-3),
    "adam_l2": Optimizer(
        lambda lr: adamx.chain(adamx.add_decayed_weights(0.5), adamx.adam(lr, **ADAM)),
        r.adam,
        {**ADAM, "l2": 0.5},
    ),
    "adamw": alike(adamx.adamw, r.adamw, **DECAY),
    "adamw_default_decay": Optimizer(adamx.adamw, r.adamw, {"weight_decay": 1e-4}),
    "adamw_all": alike(adamx.adamw, r.adamw, **ADAM, **DECAY, eps_root=0.02, nesterov=True),
    "adamw_masked": Optimizer(
        partial(adamx.adamw, **ADAM, **DECAY, mask={"a": True, "b": False}),
        r.adamw,
        {**ADAM, **DECAY},
        (r.adam, ADAM),
    ),
    "adamw_masked_by_function": Optimizer(
        partial(adamx.adamw, **ADAM, **DECAY, mask=lambda tree: jax.tree.map(jnp.isrealobj, tree)),
        r.adamw,
        {**ADAM, **DECAY},
        (r.adam, ADAM),
    ),
}


@dataclasses.dataclass(frozen=True)
class Piece:
    """A concept, and what it makes of all gradients (``[STEPS, *shape]``) and constant weights."""

    tx: Callable[[], adamx.Transformation]
    emitted: Callable[[np.ndarray, np.ndarray], np.ndarray]
    slots: Mapping[str, Callable[[np.ndarray], np.ndarray]] = dataclasses.field(
        default_factory=dict
    )


def at(per_step: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Shape one number a step so that it multiplies values step by step."""
    return per_step.reshape(-1, *[1] * (values.ndim - 1))


def decaying_sum(g: np.ndarray) -> np.ndarray:
    """The sum of 0.7^(t-s) g_s over s <= t."""
    age = T[:, None] - T
    return np.tensordot(np.where(age >= 0, 0.7 ** np.maximum(age, 0), 0.0), g, 1)


def looking_ahead(g: np.ndarray) -> np.ndarray:
    """Dozat (2016) with the constant momentum 0.7."""
    now, ahead = 1 - 0.7**T, 1 - 0.7 ** (T + 1)
    return at(0.7 / ahead, g) * r.ema(g, 0.7) + at(0.3 / now, g) * g


def squares(g: np.ndarray) -> np.ndarray:
    """The average of squares with the decay 0.7 from 1.5."""
    return r.ema_of_squares(g, 0.7, 1.5)


def total(g: np.ndarray) -> np.ndarray:
    """1.5 and the sum of all squares so far."""
    return 1.5 + np.cumsum(np.abs(g) ** 2, axis=0)


def rates(step: Any) -> Any:
    """The learning rates as a schedule."""
    return jnp.asarray(RATES)[step]


def decays(step: Any) -> Any:
    """The weight decays as a schedule."""
    return jnp.asarray(DECAYS)[step]


PIECES: dict[str, Piece] = {
    "identity": Piece(adamx.identity, lambda g, _: g),
    "scale": Piece(lambda: adamx.scale(-1.75), lambda g, _: -1.75 * g),
    "ema": Piece(
        lambda: adamx.ema(0.7), lambda g, _: r.ema(g, 0.7), {"mu": lambda g: r.ema(g, 0.7)}
    ),
    "ema_corrected": Piece(
        lambda: adamx.chain(adamx.ema(0.7, name="m"), adamx.bias_correction(0.7)),
        lambda g, _: r.bias_correction(r.ema(g, 0.7), 0.7),
        {"m": lambda g: r.ema(g, 0.7)},
    ),
    "bias_correction": Piece(
        lambda: adamx.bias_correction(0.99), lambda g, _: r.bias_correction(g, 0.99)
    ),
    "nesterov_ema": Piece(
        lambda: adamx.nesterov_ema(0.7, name="m"),
        lambda g, _: looking_ahead(g),
        {"m": lambda g: r.ema(g, 0.7)},
    ),
    "trace": Piece(
        lambda: adamx.trace(0.7, name="sum"),
        lambda g, _: decaying_sum(g),
        {"sum": decaying_sum},
    ),
    "trace_nesterov": Piece(
        lambda: adamx.trace(0.7, nesterov=True),
        lambda g, _: g + 0.7 * decaying_sum(g),
        {"trace": decaying_sum},
    ),
    "ema_of_squares": Piece(
        lambda: adamx.ema_of_squares(0.7, 1.5, name="v"),
        lambda g, _: squares(g),
        {"v": squares},
    ),
    "sum_of_squares": Piece(
        lambda: adamx.sum_of_squares(1.5, name="s"), lambda g, _: total(g), {"s": total}
    ),
    "rms_scaling": Piece(
        lambda: adamx.rms_scaling(
            adamx.scale(3.0), second_moment=adamx.sum_of_squares(1.5), eps=0.25, eps_root=0.5
        ),
        lambda g, _: 3 * g / (np.sqrt(total(g) + 0.5) + 0.25),
        {"sum_of_squares": total},
    ),
    "scale_by_adam": Piece(
        lambda: adamx.scale_by_adam(**ADAM, eps_root=0.02),
        lambda g, w: -r.adam(0 * w, g, learning_rate=1.0, **ADAM, eps_root=0.02).updates,
        {"mu": lambda g: r.ema(g, 0.8), "nu": lambda g: r.ema_of_squares(g, 0.97)},
    ),
    "scale_by_rms": Piece(
        lambda: adamx.scale_by_rms(0.7, 0.25, 1.5, bias_correction=True),
        lambda g, _: g / (np.sqrt(squares(g) / at(1 - 0.7**T, g)) + 0.25),
        {"nu": squares},
    ),
    "scale_by_rms_eps_in_sqrt": Piece(
        lambda: adamx.scale_by_rms(0.7, 0.25, 1.5, eps_in_sqrt=True),
        lambda g, _: g / np.sqrt(squares(g) + 0.25),
        {"nu": squares},
    ),
    "add_decayed_weights": Piece(
        lambda: adamx.add_decayed_weights(decays), lambda g, w: g + at(DECAYS, g) * w
    ),
    "scale_by_learning_rate": Piece(
        lambda: adamx.scale_by_learning_rate(rates), lambda g, _: -at(RATES, g) * g
    ),
    "flip_sign_false": Piece(
        lambda: adamx.scale_by_learning_rate(0.3, flip_sign=False), lambda g, _: 0.3 * g
    ),
    "combine": Piece(
        lambda: adamx.combine(jnp.add, adamx.ema(0.7), adamx.trace(0.7)),
        lambda g, _: r.ema(g, 0.7) + decaying_sum(g),
        {"mu": lambda g: r.ema(g, 0.7), "trace": decaying_sum},
    ),
}


def problem() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Weights, and gradients of scales from 1e-3 to 10 with zeros among them; "b" is complex."""
    rng = np.random.default_rng(1)
    w, g = {}, {}
    for name, shape in {"a": (3, 4), "b": (5,)}.items():
        scale = 10 ** rng.uniform(-3, 1, shape)
        w[name] = rng.normal(size=shape)
        g[name] = scale * rng.normal(size=(STEPS, *shape))
        if name == "b":
            w[name] = w[name] + 1j * rng.normal(size=shape)
            g[name] = g[name] + 1j * scale * rng.normal(size=g[name].shape)
        g[name][rng.random(g[name].shape) < 0.1] = 0.0
        g[name][:3, ..., 0] = 0.0  # some elements have no gradient at first
    return w, g


W, G = problem()


def walk(txs: Any, params: Any, gradients: Any) -> dict[str, tuple[Any, Any]]:
    """Run transformations by name on given parameters and gradients; stack what they return."""

    @jax.jit
    def step(states: Any, params: Any, grads: Any) -> Any:
        return {
            name: tx.update(grads[name], states[name], params[name]) for name, tx in txs.items()
        }

    def pick(tree: Any, t: int) -> Any:
        return jax.tree.map(lambda x: x[t], tree)

    states = {name: tx.init(pick(params[name], 0)) for name, tx in txs.items()}
    steps = []
    for t in range(STEPS):
        pairs = step(states, pick(params, t), pick(gradients, t))
        states = {name: pair[1] for name, pair in pairs.items()}
        steps.append(jax.device_get(pairs))
    return jax.tree.map(lambda *values: np.stack(values), *steps)


def assert_close(actual: Any, wanted: Any, measure: Any, amplified: float = 1.0) -> None:
    """Hold float64 values of all steps to the number of roundings that the two programs make.

    Taking a gradient into an average, each of the two rounds at most six times: the square or the
    corrections, two products, a difference, a sum. These errors decay with the average, or stay,
    in a sum: 12 roundings a step at most. In what is emitted a numerator and the root of a
    denominator (half its error) meet: 18 a step. Ten more come with the step itself: two
    corrections, root, eps, quotient, decay, rate.
    """
    assert actual.dtype == wanted.dtype
    bound = (10 + 18 * at(T, wanted)) * 2.0**-53 * amplified * np.abs(measure)
    np.testing.assert_array_less(np.abs(actual - wanted), np.where(bound > 0, bound, 1e-300))


# --- In float64 against PyTorch ------------------------------------------------------------------


def as_in_torch(name: str) -> adamx.Transformation:
    """The composition that does what PyTorch's optimizer does with a case's hyperparameters."""
    h = TORCH[name]["hyperparameters"]
    if h.get("dampening"):  # = momentum: an average, of which from_torch takes PyTorch's buffer
        return adamx.momentum(h["lr"], h["momentum"])
    return composed(TORCH[name]["class"], h)


# --- In float32 against Optax --------------------------------------------------------------------

RATE = 1e-3
SIZE = 256


def of_one_sign(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights in [1, 2] and gradients of their signs, float32: no sum of an optimizer cancels."""
    rng = np.random.default_rng(seed)
    sign = rng.choice([-1.0, 1.0], SIZE)
    scale = sign * 10 ** rng.uniform(-3, 0, SIZE)
    g = scale * np.abs(rng.normal(size=(60, SIZE)))
    g[rng.random(g.shape) < 0.1] = 0.0
    return (sign * rng.uniform(1, 2, SIZE)).astype(np.float32), g.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same optimizer twice, and how many ULPs apart the updates of step t may be.

    Attributes:
        ours: adamx's.
        theirs: Optax's, with the settings of `ours`.
        method: the reference's.
        a_step: ULPs that a step may add in the slots, as far as they reach the update.
        constant: ULPs that come with the emission, each time anew.
    """

    ours: adamx.Transformation
    theirs: optax.GradientTransformation
    method: Callable[..., Trajectory]
    a_step: float = 0.0
    constant: float = 0.0

    def ulps(self, t: int) -> float:
        """Where nothing cancels, an old error weighs at most what it weighed when it was made."""
        return self.constant + self.a_step * t


o = optax
# A sum made by the same operations in the same order differs where one program fuses product and
# sum. An average is made in two ways: Optax's decay * m + (1 - decay) * g rounds a factor, a
# product and the sum, 3; adamx's rounds 1 - decay, a product, a difference and the sum, 4. Under a
# root they halve.
SUM, AVERAGE, ROOT_OF_AVERAGE, ROOT_OF_SUM = 1.0, 7.0, 3.5, 0.5
# Root, eps, quotient (in Optax's AdaGrad and RMSprop a reciprocal root, good to 2 ULP, and a
# product) and the rate, in each; two corrections, well conditioned at b = 0.5 and 0.75, and two
# quotients more; a decay or a look ahead, with a product and a sum.
ROOTED, CORRECTED, DECAYED = 6.0, 14.0, 18.0
WELL: dict[str, Any] = {"b1": 0.5, "b2": 0.75}
IN_SQRT: dict[str, Any] = {"eps_in_sqrt": True}

PAIRS: dict[str, Pair] = {
    "sgd": Pair(adamx.sgd(RATE), o.sgd(RATE), r.sgd),
    "sgd_momentum": Pair(adamx.sgd(RATE, 0.9), o.sgd(RATE, 0.9), partial(r.sgd, momentum=0.9), SUM),
    "sgd_nesterov": Pair(
        adamx.sgd(RATE, 0.9, True),
        o.sgd(RATE, 0.9, True),
        partial(r.sgd, momentum=0.9, nesterov=True),
        SUM,
        SUM,
    ),
    "momentum": Pair(
        adamx.momentum(RATE),
        o.chain(o.ema(0.9, debias=False), o.scale_by_learning_rate(RATE)),
        r.momentum,
        AVERAGE,
        1.0,
    ),
    "adagrad": Pair(
        adamx.adagrad(RATE, **IN_SQRT),
        o.adagrad(RATE),
        partial(r.adagrad, **IN_SQRT),
        ROOT_OF_SUM,
        ROOTED,
    ),
    "rmsprop": Pair(
        adamx.rmsprop(RATE, **IN_SQRT),
        o.rmsprop(RATE),
        partial(r.rmsprop, **IN_SQRT),
        ROOT_OF_AVERAGE,
        ROOTED,
    ),
    "rmsprop_eps_outside": Pair(
        adamx.rmsprop(RATE, eps=1e-4),
        o.rmsprop(RATE, eps=1e-4, eps_in_sqrt=False),
        partial(r.rmsprop, eps=1e-4),
        ROOT_OF_AVERAGE,
        ROOTED,
    ),
    "rmsprop_initial_scale": Pair(
        adamx.rmsprop(RATE, initial_scale=1.0, **IN_SQRT),
        o.rmsprop(RATE, initial_scale=1.0),
        partial(r.rmsprop, initial_scale=1.0, **IN_SQRT),
        ROOT_OF_AVERAGE,
        ROOTED,
    ),
    "rmsprop_momentum": Pair(
        adamx.rmsprop(RATE, momentum=0.9, **IN_SQRT),
        o.rmsprop(RATE, momentum=0.9),
        partial(r.rmsprop, momentum=0.9, **IN_SQRT),
        ROOT_OF_AVERAGE + SUM,
        ROOTED,
    ),
    "rmsprop_nesterov": Pair(
        adamx.rmsprop(RATE, momentum=0.9, nesterov=True, **IN_SQRT),
        o.rmsprop(RATE, momentum=0.9, nesterov=True),
        partial(r.rmsprop, momentum=0.9, nesterov=True, **IN_SQRT),
        ROOT_OF_AVERAGE + SUM,
        ROOTED + SUM,
    ),
    "adam": Pair(
        adamx.adam(RATE, **WELL),
        o.adam(RATE, **WELL),
        partial(r.adam, **WELL),
        AVERAGE + ROOT_OF_AVERAGE,
        CORRECTED,
    ),
    "adam_eps_root": Pair(
        adamx.adam(RATE, **WELL, eps=1e-4, eps_root=1e-4),
        o.adam(RATE, **WELL, eps=1e-4, eps_root=1e-4),
        partial(r.adam, **WELL, eps=1e-4, eps_root=1e-4),
        AVERAGE + ROOT_OF_AVERAGE,
        CORRECTED,
    ),
    "nadam": Pair(
        adamx.adam(RATE, **WELL, nesterov=True),
        o.nadam(RATE, **WELL),
        partial(r.adam, **WELL, nesterov=True),
        AVERAGE + ROOT_OF_AVERAGE,
        DECAYED,
    ),
    "adamw": Pair(
        adamx.adamw(RATE, **WELL, weight_decay=0.1),
        o.adamw(RATE, **WELL, weight_decay=0.1),
        partial(r.adamw, **WELL, weight_decay=0.1),
        AVERAGE + ROOT_OF_AVERAGE,
        DECAYED,
    ),
}
