"""Scheduled hyperparameters over the whole family: b_t in step t, corrected by the product.

Each optimizer gets a schedule for every argument that takes one, all at once, and is compared to
its formula written in NumPy with arrays of decays. A new one is tested by adding a line to MEMBERS.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import adamx
from adamx.core.checks import ranges_of

STEPS, SHAPE = 16, (2, 3)
T = np.arange(1.0, STEPS + 1)
N = np.arange(STEPS + 1.0)
ULP = 2.0**-23

# Gradients and weights of one sign, so that hardly anything cancels; signs for Lion.
_RANDOM = np.random.default_rng(0)
G = _RANDOM.uniform(0.5, 2.0, (STEPS, *SHAPE))
SIGNED = G * _RANDOM.choice([-1.0, 1.0], G.shape)
W = _RANDOM.uniform(0.5, 2.0, SHAPE)

# The values of the schedules, by the argument's name, and a number of the same kind. No two rise
# or fall alike. Rates are powers of 2, with which the float32 weights of schedule-free are exact.
VALUES: dict[str, np.ndarray] = {
    **dict.fromkeys(("learning_rate", "adam_learning_rate"), 2.0 ** (N % 3 - 2)),
    "multiplier": 2.0 ** (N % 3 - 2),
    "weight_decay": 0.1 + 0.05 * N,
    **dict.fromkeys(("weight_decay_rate", "adam_weight_decay"), 0.1 + 0.05 * N),
    **dict.fromkeys(("b1", "beta", "adam_b1"), 0.5 + 0.02 * N),
    **dict.fromkeys(("b2", "adam_b2"), 0.75 - 0.02 * N),
    "b3": 0.6 + 0.01 * N,
    "decay": 0.4 + 0.03 * N,
    "momentum": 0.8 - 0.03 * N,
    "alpha": 1.0 + 0.1 * N,
    "look_ahead": 0.3 + 0.02 * N,
}
NUMBERS = {name: 0.25 for name in VALUES} | {
    "b1": 0.75, "b2": 0.875, "b3": 0.625, "decay": 0.875, "momentum": 0.5, "beta": 0.75
}  # fmt: skip
EPS, ROOT = 0.125, 0.0625
LR, WD, B1, B2, B3, DECAY, BALL, ALPHA, AHEAD = (
    VALUES[name]
    for name in ("learning_rate", "weight_decay", "b1", "b2", "b3", "decay", "momentum", "alpha",
                 "look_ahead")
)  # fmt: skip


def in_steps(values: np.ndarray, number: Any) -> Any:
    """The schedule with these values."""
    return jnp.asarray(values)[number]


def schedules() -> dict[str, Any]:
    """Every argument's schedule.

    Of a copy: JAX remembers the dtype of a constant that a program without x64 holds.
    """
    return {name: functools.partial(in_steps, values.copy()) for name, values in VALUES.items()}


def constants() -> dict[str, Any]:
    """Schedules that stay at the numbers."""
    return {name: lambda _, value=value: value for name, value in NUMBERS.items()}


# ------------------------------------------------------------------------- the formulas, in NumPy


def at(per_step: np.ndarray) -> np.ndarray:
    """One number a step, shaped to meet the gradients."""
    return per_step[:STEPS, None, None]


def recurrence(
    step: Callable[[Any, Any, float], Any], x: np.ndarray, b: np.ndarray, start: Any = 0.0
) -> np.ndarray:
    """All values of s_t = step(s_{t-1}, x_t, b_t)."""
    values, now = [], start
    for x_t, b_t in zip(x, b, strict=False):
        now = step(now, x_t, b_t)
        values.append(now)
    return np.stack(values)


def ema(x: np.ndarray, b: np.ndarray, start: float = 0.0) -> np.ndarray:
    """The exponential moving average."""
    return recurrence(lambda m, x, b: b * m + (1 - b) * x, x, b, start)


def past(b: np.ndarray) -> np.ndarray:
    """One minus the product of the decays so far."""
    return 1 - np.cumprod(b)[:STEPS]


def mean(g: np.ndarray, b: np.ndarray = B1, start: float = 0.0) -> np.ndarray:
    """The corrected average."""
    return ema(g, b, start) / at(past(b))


def rms(squares: np.ndarray, eps_root: float = ROOT) -> np.ndarray:
    """The denominator."""
    return np.sqrt(squares + eps_root) + EPS


def ball(g: np.ndarray, nesterov: bool = False) -> np.ndarray:
    """The heavy ball; Nesterov's looks ahead with tomorrow's momentum."""
    total = recurrence(lambda m, g, b: b * m + g, g, BALL)
    return g + at(BALL[1:]) * total if nesterov else total


def adam(eps_root: float = ROOT) -> np.ndarray:
    """Adam without its rate."""
    return mean(G) / rms(mean(G**2, B2), eps_root)


def looking_ahead(b: np.ndarray) -> np.ndarray:
    """Dozat's numerator, with b_{t+1} before m_t."""
    beyond = 1 - np.cumprod(b)[1:]
    return at(b[1:] / beyond) * ema(G, b) + at((1 - b)[:STEPS] / past(b)) * G


def nadam() -> np.ndarray:
    """That numerator over Adam's root."""
    return looking_ahead(B1) / rms(mean(G**2, B2))


def adamax() -> np.ndarray:
    """The maximum fades by b2_t."""
    return mean(G) / recurrence(lambda v, g, b: np.maximum(b * v, g + EPS), G, B2)


def amsgrad() -> np.ndarray:
    """Optax's: the maximum of the corrected v."""
    return mean(G) / rms(np.maximum.accumulate(mean(G**2, B2)))


def adabelief() -> np.ndarray:
    """With b2 = 0.875 and e in every step."""
    b, far = np.full(STEPS, 0.875), (G - ema(G, B1)) ** 2
    s = recurrence(lambda s, x, b: b * s + (1 - b) * x + ROOT, far, b)
    return mean(G) / (np.sqrt(s / at(past(b))) + EPS)


def radam() -> np.ndarray:
    """With b2 = 0.875, whose rho_inf is 15."""
    b = np.full(STEPS, 0.875)
    rho = 15 - 2 * T * 0.875**T / (1 - 0.875**T)
    ready = rho >= 5
    rho = np.where(ready, rho, 5.0)
    factor = np.sqrt((rho - 4) * (rho - 2) * 15 / (11 * 13 * rho))
    return np.where(at(ready), at(factor) * mean(G) / rms(mean(G**2, b)), mean(G))


def yogi() -> np.ndarray:
    """Both averages start at 1e-6."""
    v = recurrence(lambda v, x, b: v + (1 - b) * np.sign(x - v) * x, G**2, B2, 1e-6)
    return mean(G, B1, 1e-6) / (np.sqrt(v / at(past(B2))) + EPS)


def before(values: np.ndarray) -> np.ndarray:
    """The same a step ago, and zero at first."""
    return np.concatenate([0 * values[:1], values[:-1]])


def interpolated() -> np.ndarray:
    """What Lion takes the sign of."""
    return at(B1) * before(ema(SIGNED, B2)) + (1 - at(B1)) * SIGNED


def adan(ahead: np.ndarray) -> np.ndarray:
    """All three averages are corrected."""
    change = np.concatenate([0 * G[:1], G[1:] - G[:-1]])
    squares = mean((G + at(ahead) * change) ** 2, B3)
    return (mean(G) + at(ahead) * mean(change, B2)) / rms(squares) + at(WD) * W


def adopt() -> np.ndarray:
    """v starts at the first square."""
    v = recurrence(lambda v, x, b: x if v is None else b * v + (1 - b) * x, G**2, B2, None)
    bound = at((T - 1) ** 0.25)
    return ema(np.clip(G / np.maximum(np.sqrt(before(v)), EPS), -bound, bound), B1)


def adam_atan2() -> np.ndarray:
    """An angle in the place of Adam's quotient."""
    return np.arctan2(mean(G), np.sqrt(mean(G**2, B2))) + at(WD) * W


def mars() -> np.ndarray:
    """With b1 = 0.5, so that the difference has the factor gamma = 0.025."""
    c = G + 0.025 * np.concatenate([0 * G[:1], G[1:] - G[:-1]])
    c = c / np.maximum(1, norm(c))
    return mean(c, np.full(STEPS, 0.5)) / rms(mean(c**2, B2)) + at(WD) * W


def simplified_ademamix() -> np.ndarray:
    """A sum of gradients and today's."""
    total = recurrence(lambda m, g, b: b * m + g, G, B1)
    return (total + at(ALPHA) * G) / rms(mean(G**2, B2)) + at(WD) * W


def laprop() -> np.ndarray:
    """The average of scaled gradients."""
    return mean(G / rms(mean(G**2, B2))) + at(WD) * W


def cautiously(u: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Only where u and g agree."""
    kept = u * g > 0
    return u * kept * (g[0].size / (np.sum(kept, axis=(1, 2), keepdims=True) + 1))


def norm(x: np.ndarray) -> np.ndarray:
    """Over one array."""
    return np.sqrt(np.sum(x**2, axis=(-2, -1), keepdims=True))


def lamb() -> np.ndarray:
    """As long as the weights."""
    x = adam() + at(WD) * W
    return norm(W) / norm(x) * x


def adam_mini() -> np.ndarray:
    """One v for each column."""
    squares = np.mean(G**2, axis=1, keepdims=True)
    return mean(G) / rms(mean(squares, B2), 0.0) + at(WD) * W


def stable_adamw() -> np.ndarray:
    """Divided by how far g exceeds v."""
    v = mean(G**2, B2)
    excess = np.sqrt(np.mean(G**2 / np.maximum(v, EPS**2), axis=(1, 2), keepdims=True))
    return (adam(0.0) + at(WD) * W) / np.maximum(1, excess)


def adafactor() -> np.ndarray:
    """The average of clipped steps that are as long as the weights, by rows and columns."""
    b2 = 1 - T**-0.8
    row, col = (ema(np.mean(G**2, axis=i, keepdims=True) + EPS, b2) for i in (2, 1))
    u = G / np.sqrt(row * col / np.mean(row, axis=1, keepdims=True))
    u = u / np.maximum(1, np.sqrt(np.mean(u**2, axis=(1, 2), keepdims=True)))
    return ema(at(LR) * np.sqrt(np.mean(W**2)) * u, BALL) + at(WD) * W


def muon(b: np.ndarray) -> np.ndarray:
    """NAdam's numerator, by its singular values; the matrix has 3 outputs for 2 inputs."""
    u, s, v = np.linalg.svd(looking_ahead(b), full_matrices=False)
    s = s / (np.sqrt(np.sum(s**2, axis=-1, keepdims=True)) + EPS)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return np.sqrt(3 / 2) * (u * s[:, None, :]) @ v + at(WD) * W


def rmsprop(nesterov: bool = False) -> np.ndarray:
    """The ball rolls over the steps, rate included; here without correction."""
    return ball(at(LR) * G / rms(ema(G**2, DECAY), 0.0), nesterov)


def centered() -> np.ndarray:
    """By the corrected variance; eps under the root."""
    return G / np.sqrt(mean(G**2, DECAY) - mean(G, DECAY) ** 2 + EPS)


def schedule_free() -> np.ndarray:
    """y by way of x and z, b1 = 0.875 of x."""
    y, z, x, total, steps = W, W, W, 0.0, []
    largest = np.maximum.accumulate(LR)
    for t, scaled in enumerate(G / rms(mean(G**2, B2), 0.0)):
        z = z - LR[t] * (scaled + WD[t] * y)
        total += largest[t] ** 2
        x = x + largest[t] ** 2 / total * (z - x)
        new = 0.125 * z + 0.875 * x
        steps.append(y - new)
        y = new
    return np.stack(steps)


# ---------------------------------------------------------------------------------- the law's table


@dataclasses.dataclass(frozen=True)
class Member:
    """An optimizer, and what it emits with all its schedules.

    Attributes:
        wanted: minus the updates, before the rate.
        recorded: the scalars that are in the state because of the schedules, after each step.
        worse: by how much more than to itself an update's roundings are relative.
        fixed: arguments that stay as they are.
        of: the function's name, where it is not the member's.
        g: the gradients.
        rated: False where the rate is in `wanted`.
        walks: whether the parameters move by the updates; else they stay.
    """

    wanted: Callable[[], np.ndarray]
    recorded: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    worse: float = 1.0
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    of: str = ""
    g: np.ndarray = dataclasses.field(default_factory=lambda: G)
    rated: bool = True
    walks: bool = False


BOTH = {"mu_correction": past(B1), "nu_correction": past(B2)}
MU, NU = ({name: BOTH[name]} for name in BOTH)

MEMBERS: dict[str, Member] = {
    "sgd": Member(lambda: ball(G)),
    "sgd_nesterov": Member(lambda: ball(G, True), of="sgd", fixed={"nesterov": True}),
    "sgdw": Member(lambda: ball(G) + at(WD) * W),
    "momentum": Member(lambda: ema(G, DECAY)),
    "adagrad": Member(
        lambda: G / rms(np.cumsum(G**2, axis=0) + 1, 0.0), fixed={"initial_accumulator_value": 1.0}
    ),
    "rmsprop": Member(rmsprop, rated=False),
    "rmsprop_nesterov": Member(
        lambda: rmsprop(True), of="rmsprop", fixed={"nesterov": True}, rated=False
    ),
    # E[g^2] and E[g]^2 are at most 4, and what is under the root at least 1/8
    "rmsprop_centered": Member(
        centered,
        {"mu_correction": past(DECAY), "nu_correction": past(DECAY)},
        worse=32.0,
        of="rmsprop",
        fixed={
            "centered": True,
            "bias_correction": True,
            "eps_in_sqrt": True,
            "momentum": None,
        },
    ),
    "adam": Member(adam, BOTH),
    "adamw": Member(lambda: adam() + at(WD) * W, BOTH),
    "adamw_independent": Member(
        lambda: 0.25 * adam(0.0) + at(WD) * W, BOTH, fixed={"learning_rate": 0.25}
    ),
    "nadam": Member(nadam, BOTH),
    "nadamw": Member(lambda: nadam() + at(WD) * W, BOTH),
    "adamax": Member(adamax, MU),
    "adamaxw": Member(lambda: adamax() + at(WD) * W, MU),
    "amsgrad": Member(amsgrad, BOTH),
    # (g - m)^2 <= 4 is averaged with e / (1 - b2) = 1/2: its roundings weigh (2 + 2)^2 / (1/2)
    "adabelief": Member(adabelief, MU, worse=32.0, fixed={"b2": 0.875}),
    # rho_t - 4 >= 1 is a difference from 15, halved by the root
    "radam": Member(radam, MU, worse=8.0, fixed={"b2": 0.875}),
    # v comes down from 4 to no less than 1/8, so that roundings of 4 weigh 32, halved by the root
    "yogi": Member(yogi, BOTH, worse=16.0),
    "lion": Member(lambda: np.sign(interpolated()) + at(WD) * W, g=SIGNED),
    # the terms of numerator and square are at most 2 + 0.75 (2 + 2) = 5, the numerator 0.1 or more
    "adan": Member(
        lambda: adan(B2),
        {"mu_correction": past(B1), "delta_correction": past(B2), "nu_correction": past(B3)},
        worse=50.0,
        fixed={"look_ahead": None},
    ),
    "adan_ahead": Member(
        lambda: adan(AHEAD),
        {"mu_correction": past(B1), "delta_correction": past(B2), "nu_correction": past(B3)},
        worse=50.0,
        of="adan",
    ),
    "ademamix": Member(
        lambda: (mean(G) + at(ALPHA) * ema(G, B3)) / rms(mean(G**2, B2)) + at(WD) * W, BOTH
    ),
    "adopt": Member(adopt),
    "adam_atan2": Member(adam_atan2, BOTH),
    "laprop": Member(laprop, BOTH),
    "adamc": Member(
        lambda: adam() + at(LR) / 2 * at(WD) * W, BOTH, fixed={"max_learning_rate": 2.0}
    ),
    # the difference is 1.5 at most, a fortieth of it 0.04 beside 0.5
    "mars": Member(mars, NU, worse=2.0, fixed={"b1": 0.5}),
    "simplified_ademamix": Member(simplified_ademamix, NU),
    "cautious_adamw": Member(lambda: cautiously(adam(), G) + at(WD) * W, BOTH),
    "cautious_lion": Member(
        lambda: cautiously(np.sign(interpolated()), SIGNED) + at(WD) * W, g=SIGNED
    ),
    "lamb": Member(lamb, BOTH),
    "adam_mini": Member(adam_mini, BOTH),
    "adafactor": Member(adafactor, fixed={"min_dim_size_to_factor": 2}, rated=False),
    # a rounding of the numerator grows by 3.45 in each of five steps, 480 times; a small element is
    # a twentieth of the largest
    "muon": Member(lambda: muon(B1), MU, worse=1e4),
    "muon_adamw": Member(
        lambda: muon(np.full_like(B1, 0.75)),
        worse=1e4,
        fixed={"beta": 0.75, "adam_b1": 0.5, "adam_b2": 0.5},
    ),
    "stable_adamw": Member(stable_adamw, {**BOTH, "clipping_correction": past(B2)}),
    # the update is a difference of averages of y and z, of at most 4, and is 1e-3 or more
    "schedule_free_adamw": Member(
        schedule_free, NU, worse=4e3, fixed={"b1": 0.875}, rated=False, walks=True
    ),
}


def function_of(name: str) -> Any:
    """The optimizer's function."""
    return getattr(adamx, MEMBERS[name].of or name)


def takes(function: Any, schedule: bool) -> list[str]:
    """The numbers that may be scheduled, or those that may not."""
    return [name for name, range_ in ranges_of(function).items() if range_.schedule == schedule]


def build(name: str, values: Mapping[str, Any]) -> adamx.Transformation:
    """The member with these values for all that may be scheduled."""
    member, function = MEMBERS[name], function_of(name)
    small = {"eps": EPS, "eps_root": ROOT}
    options = {argument: small[argument] for argument in takes(function, schedule=False)
               if argument in small}  # fmt: skip
    options |= {argument: values[argument] for argument in takes(function, schedule=True)}
    return function(**options | dict(member.fixed))


def walk(
    txs: Mapping[str, adamx.Transformation], params: Callable[[str, int], Any], dtype: Any
) -> Any:
    """Run all in one program, since compiling is what takes time; stack what they return."""

    @jax.jit
    def step(states: Any, params: Any, grads: Any) -> Any:
        return {
            name: tx.update(grads[name], states[name], params[name]) for name, tx in txs.items()
        }

    def arrays(t: int, of: Callable[[str, int], Any]) -> Any:
        return {name: jnp.asarray(of(name, t), dtype) for name in txs}

    def gradient(name: str, t: int) -> Any:
        member = MEMBERS.get(name.split("/")[0])
        return (member.g if member else G)[t]

    states = {name: tx.init(jnp.asarray(W, dtype)) for name, tx in txs.items()}
    steps = []
    for t in range(STEPS):
        grads = arrays(t, gradient)
        pairs = step(states, arrays(t, params), grads)
        states = {name: pair[1] for name, pair in pairs.items()}
        steps.append(jax.device_get(pairs))
    return jax.tree.map(lambda *values: np.stack(values), *steps)


@functools.cache
def wanted(name: str) -> np.ndarray:
    """The updates that the formula gives."""
    member = MEMBERS[name]
    return -(at(LR) if member.rated else 1.0) * member.wanted()
