"""The younger members of the Adam family beside those who judge them, as in agreement.py.

What roundings are relative to is each member's own: its `Measure`.
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
import reference_family
from agreement import (
    SIZE,
    STEPS,
    T,
    at,
    of_one_sign,
)
from recordings import LEAVES, TORCH
from reference import Recorder, Trajectory

import adamx

partial = functools.partial
r = reference_family
Method = Callable[..., Trajectory]
Options = Mapping[str, Any]

# --- How far a rounding reaches ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Measure:
    """What roundings are relative to: for the updates, and for each slot."""

    updates: np.ndarray
    slots: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Case:
    """One array's problem and what the reference makes of it.

    Attributes:
        w: the array at the start.
        g: the gradients.
        rate: the learning rates, one a step.
        method: of the reference.
        options: what the method takes beside these.
        run: what it did.
    """

    w: np.ndarray
    g: np.ndarray
    rate: np.ndarray
    method: Method
    options: Options

    @functools.cached_property
    def run(self) -> Trajectory:
        """The trajectory of the reference."""
        return self.method(self.w, self.g, learning_rate=self.rate, **self.options)

    @property
    def decayed(self) -> np.ndarray:
        """The magnitudes of the decay's share in the updates."""
        decay = self.options.get("weight_decay", 0.0)
        return at(self.rate * decay, self.g) * np.abs(self.run.params[:-1])


def on_magnitudes(case: Case) -> Measure:
    """The same method on |g|, in which nothing cancels; the decay is added to it."""
    options = {k: 0.0 if k == "weight_decay" else v for k, v in case.options.items()}
    run = case.method(0 * np.abs(case.w), np.abs(case.g), learning_rate=case.rate, **options)
    return Measure(np.abs(run.updates) + case.decayed, run.slots)


def on_differences(spread: Callable[[Case], np.ndarray], case: Case) -> Measure:
    """The same where the second moment holds differences: nu is as inexact as its `spread`.

    That is what it would be if they were sums. Under the root the relative error halves; here it
    does not.
    """
    plain = on_magnitudes(case)
    wide, nu = spread(case), case.run.slots["nu"]
    worse = 1 + wide / np.where(nu > 0, nu, 1.0)
    root = np.sqrt(r.bias_correction(nu, case.options[SECOND[case.method]])) + case.options["eps"]
    numerator = {
        r.adabelief: lambda: looking_further(case),
        r.adan: lambda: adan_numerator(case),
        r.yogi: lambda: np.abs(plain.updates) * root / at(case.rate, root),
    }[case.method]()
    updates = at(case.rate, root) * numerator / root * worse + case.decayed
    return Measure(updates, {**plain.slots, "nu": wide + nu, "delta": adan_differences(case)})


def looking_further(case: Case) -> np.ndarray:
    """AdaBelief's numerator on |g|."""
    g, b1 = np.abs(case.g), case.options["b1"]
    m, t = reference.ema(g, b1), np.arange(1, len(g) + 1)
    if not case.options.get("nesterov"):
        return r.bias_correction(m, b1)
    return at(b1 / (1 - b1 ** (t + 1)), m) * m + at((1 - b1) / (1 - b1**t), g) * g


SECOND = {r.adabelief: "b2", r.yogi: "b2", r.adan: "b3"}


def deviations(case: Case) -> np.ndarray:
    """AdaBelief: (|g| + the average of |g|)^2 in the place of |g - m|^2."""
    g = np.abs(case.g)
    wide = reference.ema_of_squares(g + reference.ema(g, case.options["b1"]), case.options["b2"])
    return wide + case.run.slots["nu"]


def all_steps(case: Case) -> np.ndarray:
    """Yogi: steps up only. Errors stay in the sum, as in AdaGrad's.

    Which way nu steps is a sign, `decided` also in float32: 60 steps of 5 roundings are 1.8e-5.
    """
    start, g, nu = case.options.get("initial_nu", 1e-6), np.abs(case.g), case.run.slots["nu"]
    before = np.concatenate([0 * nu[:1] + start, nu[:-1]])
    decided(np.where(g > 0, before - g**2, 1.0), np.where(g > 0, before + g**2, 0.0), 2e-5)
    return start + (1 - case.options["b2"]) * np.cumsum(np.abs(case.g) ** 2, axis=0)


def changes(g: np.ndarray) -> np.ndarray:
    """|g_t| + |g_{t-1}|, and zero at first."""
    return np.concatenate([0 * np.abs(g[:1]), np.abs(g[1:]) + np.abs(g[:-1])])


def adan_differences(case: Case) -> np.ndarray:
    """Adan's delta if the differences were sums."""
    return reference.ema(changes(case.g), case.options.get("b2", 0.0))


def adan_look_ahead(case: Case) -> float:
    """The weight of the difference."""
    b2 = case.options["b2"]
    return b2 if case.options["look_ahead"] == "paper" else 1 - b2


def adan_numerator(case: Case) -> np.ndarray:
    """Adan's numerator if the differences were sums."""
    mean = reference.bias_correction(reference.ema(np.abs(case.g), case.options["b1"]),
                                     case.options["b1"])  # fmt: skip
    delta = reference.bias_correction(adan_differences(case), case.options["b2"])
    return mean + adan_look_ahead(case) * delta


def looking_ahead(case: Case) -> np.ndarray:
    """Adan: |g| + a (|g_t| + |g_{t-1}|) in the place of g + a d."""
    ahead = np.abs(case.g) + adan_look_ahead(case) * changes(case.g)
    return reference.ema_of_squares(ahead, case.options["b3"])


def rectified(case: Case) -> Measure:
    """Beside Adam's: rho_t - 4, of which r_t has the root, is a difference from rho_inf.

    It is inexact by some roundings of rho_inf, as many in each step: 1/t of what is allowed.
    """
    plain = on_magnitudes(case)
    t, b2 = np.arange(1, len(case.g) + 1), case.options["b2"]
    rho_inf = 2 / (1 - b2) - 1
    rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
    worse = np.where(rho > 4, rho_inf / np.where(rho > 4, rho - 4, 1.0), 0.0)
    return Measure(at(1 + worse / t, case.g) * plain.updates, plain.slots)


def signs(case: Case) -> Measure:
    """Lion. A real sign is exact unless its number rounds to zero: `decided` says that none does.

    A complex one, x / |x|, is as inexact as x, in which terms cancel.
    """
    b1, slot = case.options["b1"], case.run.slots["mu"]
    before = np.concatenate([0 * slot[:1], slot[:-1]])
    x = np.abs(b1 * before + (1 - b1) * case.g)
    average = reference.ema(np.abs(case.g), case.options["b2"])
    earlier = np.concatenate([0 * average[:1], average[:-1]])
    wide = b1 * earlier + (1 - b1) * np.abs(case.g)
    decided(x, wide)
    worse = wide / np.where(x > 0, x, 1.0) if np.iscomplexobj(case.g) else 1.0 * (x > 0)
    return Measure(at(case.rate, wide) * worse + case.decayed, {"mu": average})


def decided(x: np.ndarray, measure: np.ndarray, margin: float = 1e-12) -> None:
    """No sign of this draw is within roundings of turning: that would turn a whole step.

    40 steps have less than 10 + 18 * 40 roundings of 2^-53, 8.1e-14 together. An exact zero, where
    all gradients were zero, is zero in both programs. (In float32 all gradients of an element have
    one sign, and no sum is near zero.)
    """
    assert np.all((np.abs(x) > margin * measure) | (measure == 0))


def kept(case: Case) -> Measure:
    """The measure of the method without caution times the factor of what is kept."""
    adam = case.method is r.cautious_adamw
    names = {"b1", "b2", "eps", "eps_root"} if adam else {"b1", "b2"}
    options = {k: v for k, v in case.options.items() if k in names}
    inner = Case(case.w, case.g, np.ones(len(case.g)), reference.adam if adam else r.lion, options)
    measure = on_magnitudes(inner) if adam else signs(inner)
    u = -inner.run.updates
    decided(np.real(u * np.conj(case.g)), measure.updates * np.abs(case.g))
    rescale = case.options.get("rescale", "count")
    cautious = np.stack([r.cautious(x, g, rescale) for x, g in zip(u, case.g, strict=True)])
    factor = np.abs(cautious) / np.where(u == 0, 1.0, np.abs(u))
    return Measure(at(case.rate, u) * factor * measure.updates + case.decayed, measure.slots)


def by_norms(case: Case) -> Measure:
    """LAMB: each element is as inexact as its terms, the ratio as the norm of all terms together.

    The sums of at most 12 squares add 12 roundings in each program, halved by the root.
    """
    names = {"b1", "b2", "eps", "eps_root"}
    options = {k: v for k, v in case.options.items() if k in names}
    adam = Case(case.w, case.g, np.ones(len(case.g)), reference.adam, options)
    plain, decay = on_magnitudes(adam), case.options["weight_decay"]
    wide = plain.updates + decay * np.abs(case.run.params[:-1])
    x = np.abs(decay * case.run.params[:-1] - adam.run.updates)
    axes = tuple(range(1, x.ndim))
    norms = [np.sqrt(np.sum(y**2, axis=axes, keepdims=True)) for y in (x, wide)]
    lengths = np.sqrt(np.sum(np.abs(case.run.params[:-1]) ** 2, axis=axes, keepdims=True))
    ratio = np.where(norms[0] > 0, lengths / norms[0], 1.0)
    worse = np.where(norms[0] > 0, norms[1] / norms[0], 1.0)
    return Measure(at(case.rate, x) * ratio * (wide + x * worse), plain.slots)


def along_z(case: Case) -> Measure:
    """Schedule-free: errors of z stay; the update is a difference of averages of z and y."""
    names = {"b2", "eps"}
    options = {k: v for k, v in case.options.items() if k in names}
    step = Case(case.w, case.g, case.rate, reference.rmsprop, {"decay": options["b2"],
                "eps": options["eps"], "bias_correction": True})  # fmt: skip
    plain = on_magnitudes(step)
    z = np.abs(case.w) + np.cumsum(plain.updates + case.decayed, axis=0)
    y = np.abs(case.run.params[:-1])
    return Measure(z + y, {"z": z, "nu": plain.slots["nu"]})


def step_by_step(case: Case) -> Measure:
    """Adafactor: nothing cancels but in the average of the steps, which is one of magnitudes here.

    Five sums of at most 12 terms, halved by roots, take the roundings of a first step fourfold.
    """
    b, wd = case.options.get("momentum"), case.options.get("weight_decay_rate", 0.0)
    steps = case.run.updates + wd * case.run.params[:-1]
    slots = {}
    if b is not None:
        before = np.concatenate([0 * steps[:1], -steps[:-1]])
        slots = {"mu": reference.ema(np.abs(-steps - b * before) / (1 - b), b)}
    wide = slots.get("mu", np.abs(steps)) + wd * np.abs(case.run.params[:-1])
    return Measure(4 * wide, {name: 4 * x for name, x in (case.run.slots | slots).items()})


def through_newton_schulz(case: Case) -> Measure:
    """Muon: what the average is off by, as a part of its norm, may grow by the quintic's slopes.

    These are at most 3.45 in each of five steps, 480 in all; each step adds a dozen roundings of
    its own, and the singular values of the reference some more: 1000 in the place of 480.
    """
    names = {"beta", "nesterov"}
    options = {k: v for k, v in case.options.items() if k in names}
    average, wide = (
        np.abs(
            r.muon(0 * case.w.ravel(), g.reshape(len(g), -1), learning_rate=1.0, **options).updates
        ).reshape(g.shape)
        for g in (case.g, np.abs(case.g))
    )
    slots = {"mu": reference.ema(np.abs(case.g), options.get("beta", 0.95))}
    if case.w.ndim != 2:
        return Measure(at(case.rate, wide) * wide + case.decayed, slots)
    norms = [np.sqrt(np.sum(x**2, axis=(1, 2), keepdims=True)) for x in (wide, average)]
    scale = np.sqrt(max(case.w.shape)) * max(1.0, case.options.get("consistent_rms") or 1.0)
    return Measure(at(case.rate * scale * 1000, wide) * norms[0] / norms[1] + case.decayed, slots)


def through_changes(case: Case) -> Measure:
    """MARS: the differences are sums here; the norm is as inexact as all that are under it."""
    options = case.options
    factor = options["gamma"] * options["b1"] / (1 - options["b1"])
    before = np.concatenate([case.g[:1], case.g[:-1]])
    c = np.abs(case.g + factor * (case.g - before))
    wide = np.abs(case.g) + factor * changes(case.g)
    axes = tuple(range(1, c.ndim))
    norms = [np.sqrt(np.sum(x**2, axis=axes, keepdims=True)) for x in (c, wide)]
    worse = norms[1] / np.where(norms[0] > 0, norms[0], 1.0)
    wide = (wide + c * worse) / np.maximum(1, norms[0])
    mu = reference.ema(wide, options["b1"])
    nu, run = reference.ema_of_squares(wide, options["b2"]), case.run.slots["nu"]
    root = np.sqrt(r.bias_correction(run, options["b2"]) + options.get("eps_root", 0.0))
    numerator = r.bias_correction(mu, options["b1"]) * (1 + nu / np.where(run > 0, run, 1.0))
    updates = at(case.rate, root) * numerator / (root + options["eps"]) + case.decayed
    return Measure(updates, {"mu": mu, "nu": nu})


def on_a_sphere(case: Case) -> Measure:
    """Adam's direction as `by_norms`, and the weights, which are turned: by a root of 12 squares.

    The weights' factor is off by some four roundings of norms and quotients.
    """
    adam = Case(case.w, case.g, np.ones(len(case.g)), reference.adam, case.options)
    plain, u, w = on_magnitudes(adam), np.abs(adam.run.updates), np.abs(case.run.params[:-1])
    axes = tuple(range(1, u.ndim))
    lengths, norms, wide = (
        np.sqrt(np.sum(x**2, axis=axes, keepdims=True)) for x in (w, u, plain.updates)
    )
    ratio = lengths / np.where(norms > 0, norms, 1.0)
    worse = np.where(norms > 0, wide / np.where(norms > 0, norms, 1.0), 0.0)
    step = at(case.rate, u) * ratio * (plain.updates + u * worse)
    return Measure(4 * w + 2 * step, plain.slots)


def as_it_is(case: Case) -> Measure:
    """A factor and the learning rate: the sum of 12 squares is halved by the root."""
    return Measure(np.abs(case.run.updates))


# --- The table -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Member:
    """A composition of adamx, and the reference's method of the same hyperparameters.

    Attributes:
        tx: takes the learning rate.
        method: of the reference.
        options: what the method takes beside w, gradients and learning rate.
        measure: how far roundings reach.
        leaves: "a" is real, "b" is complex.
        scalars: what the state holds beside the reference's slots.
        slots: makes of the reference's slots those of adamx, where they differ.
        unlike: other options of the reference, that make another method.
    """

    tx: Callable[[Any], adamx.Transformation]
    method: Method
    options: Options = dataclasses.field(default_factory=dict)
    measure: Callable[[Case], Measure] = on_magnitudes
    leaves: tuple[str, ...] = LEAVES
    scalars: frozenset[str] = frozenset()
    slots: Callable[[Case], Mapping[str, np.ndarray]] = lambda case: case.run.slots
    unlike: tuple[Options, ...] = ()


def alike(name: str, options: Options, method: Method | None = None, **more: Any) -> Member:
    """A member called as in the reference, with arguments called as there."""

    def tx(rate: Any) -> adamx.Transformation:
        return getattr(adamx, name)(rate, **options)

    return Member(tx, method or getattr(r, name), options, **more)


def composed(*pieces: Callable[[], adamx.Transformation]) -> Callable[[Any], adamx.Transformation]:
    """Pieces before the learning rate."""
    return lambda rate: adamx.chain(
        *(piece() for piece in pieces), adamx.scale_by_learning_rate(rate)
    )


ADAM: dict[str, Any] = {"b1": 0.8, "b2": 0.97, "eps": 1e-3}
DECAY: dict[str, Any] = {"weight_decay": 0.5}
LION: dict[str, Any] = {"b1": 0.8, "b2": 0.95}
ADAN: dict[str, Any] = {"b1": 0.9, "b2": 0.7, "b3": 0.95, "eps": 1e-3, "eps_root": 1e-4}
BELIEF: dict[str, Any] = {"b1": 0.8, "b2": 0.97, "eps": 1e-3, "eps_root": 1e-4}


def mean_of_gradients() -> adamx.Transformation:
    """Adam's numerator."""
    return adamx.chain(adamx.ema(0.8), adamx.bias_correction(0.8))


def second(*between: adamx.Transformation, corrected: bool = True) -> adamx.Transformation:
    """Adam's second moment with pieces between average and correction."""
    correction = (adamx.bias_correction(0.97),) if corrected else ()
    return adamx.chain(adamx.ema_of_squares(0.97), *between, *correction)


def without_eps(case: Case) -> Mapping[str, np.ndarray]:
    """AdaBelief's nu less the eps_root that was added in each step: adamx adds it when emitting."""
    added = case.options["eps_root"] * (1 - case.options["b2"] ** T) / (1 - case.options["b2"])
    nu = case.run.slots["nu"]
    return {**case.run.slots, "nu": nu - at(added, nu)}


SLOW, WEIGHTS = 0.9 + 0.002 * np.arange(STEPS), 0.1 * np.arange(STEPS)


def slow_decays(step: Any) -> Any:
    """A schedule of AdEMAMix's b3."""
    return jnp.asarray(SLOW)[step]


def slow_weights(step: Any) -> Any:
    """A schedule of AdEMAMix's alpha."""
    return jnp.asarray(WEIGHTS)[step]


def mini(w: np.ndarray, g: np.ndarray, **options: Any) -> Trajectory:
    """Adam-mini with a block for each index of the last axis, a vector being one."""
    return r.adam_mini(w, g, axes=tuple(range(w.ndim - 1)) or None, **options)


def largest_axes(w: np.ndarray, g: np.ndarray, **options: Any) -> Trajectory:
    """Adafactor of a matrix, whose longer axis is that of the columns, or of a vector."""
    found = None if w.ndim < 2 else (0, 1) if w.shape[0] <= w.shape[1] else (1, 0)
    return r.adafactor(w, g, **{"axes": found, **options})


def sides(path: str, leaf: Any) -> tuple[int, ...]:
    """Matrices alone are orthogonalised."""
    return (0, 1) if leaf.ndim == 2 else ()


MUON: dict[str, Any] = {
    "beta": 0.8, "eps": 1e-3, "nesterov": False, "weight_decay": 0.5, "consistent_rms": 0.2
}  # fmt: skip


def muon_or_adamw(w: np.ndarray, g: np.ndarray, **options: Any) -> Trajectory:
    """Muon for a matrix, AdamW for a vector."""
    if w.ndim == 2:
        return r.muon(w, g, **options)
    rest = {name: x for name, x in options.items() if name in ("learning_rate", "weight_decay")}
    return reference.adamw(w, g, b1=0.8, b2=0.97, eps=1e-3, **rest)


def normalized_or_not(w: np.ndarray, g: np.ndarray, **options: Any) -> Trajectory:
    """AdamC for the real leaf, AdamW for the complex one."""
    rest = {name: x for name, x in options.items() if name != "max_learning_rate"}
    return reference.adamw(w, g, **rest) if np.iscomplexobj(w) else r.adamc(w, g, **options)


FACTOR: dict[str, Any] = {
    "decay_rate": 0.6, "decay_offset": 5, "multiply_by_parameter_scale": False,
    "clipping_threshold": 0.5, "momentum": 0.9, "weight_decay_rate": 0.5, "eps": 0.01,
}  # fmt: skip


def clipped_sgd(clip: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Method:
    """Clip of (gradient, weights), and then a step."""

    def method(w: np.ndarray, gradients: np.ndarray, *, learning_rate: Any) -> Trajectory:
        record = Recorder(w)
        for _, g, lr in reference.steps(gradients, learning_rate):
            record.add(-lr * clip(g, record.w))
        return record.trajectory()

    return method


def cautiously_decayed(w: np.ndarray, g: np.ndarray, *, learning_rate: Any, weight_decay: float,
                       **options: Any) -> Trajectory:  # fmt: skip
    """Adam with cautious weight decay."""
    plain = reference.adam(w, g, learning_rate=1.0, **options)
    return r.cautious_decay(w, plain, learning_rate=learning_rate, weight_decay=weight_decay)


def decay_decided(case: Case) -> Measure:
    """Adam's measure; whether an element decays is decided by the sign of its step."""
    options = {k: v for k, v in case.options.items() if k != "weight_decay"}
    inner = Case(case.w, case.g, np.ones(len(case.g)), reference.adam, options)
    plain, w = on_magnitudes(inner), case.run.params[:-1]
    decided(np.real(inner.run.updates * np.conj(w)), plain.updates * np.abs(w))
    return Measure(at(case.rate, w) * plain.updates + case.decayed, plain.slots)


def independently(
    w: np.ndarray, g: np.ndarray, *, learning_rate: Any, **options: Any
) -> Trajectory:
    """AdamW with the paper's decay: the given rates are its schedule multiplier."""
    return r.adamw_independent(w, g, learning_rate=0.3, multiplier=learning_rate, **options)


FREE = frozenset({"weight_sum", "max_lr", "b1"})

FAMILY: dict[str, Member] = {
    "adamax": alike("adamax", {}),
    "adamax_other": alike("adamax", {**ADAM, "eps": 0.1}, unlike=({**ADAM, "eps": 1e-9},)),
    "adamaxw": alike("adamaxw", {**ADAM, **DECAY}),
    "nadam": Member(lambda rate: adamx.nadam(rate), partial(reference.adam, nesterov=True)),
    "nadam_other": Member(
        lambda rate: adamx.nadam(rate, **ADAM, eps_root=0.02),
        partial(reference.adam, nesterov=True),
        {**ADAM, "eps_root": 0.02},
    ),
    "nadamw": Member(
        lambda rate: adamx.nadamw(rate, **ADAM, **DECAY),
        partial(reference.adamw, nesterov=True),
        {**ADAM, **DECAY},
    ),
    "nadam_torch": Member(
        composed(
            lambda: adamx.rms_scaling(
                adamx.scheduled_nesterov_ema(0.8, 0.1), second_moment=second(), eps=1e-3
            )
        ),
        r.nadam,
        {**ADAM, "momentum_decay": 0.1},
        unlike=(
            {**ADAM, "momentum_decay": 0.004},
            {**ADAM, "momentum_decay": 0.1, "average": "scheduled"},
        ),
    ),
    "amsgrad": alike("amsgrad", {}),
    "amsgrad_other": alike(
        "amsgrad",
        {**ADAM, "eps_root": 0.02},
        unlike=tuple({**ADAM, "eps_root": 0.02, "variant": v} for v in ("torch", "paper")),
    ),
    "amsgrad_torch": Member(
        composed(
            lambda: adamx.rms_scaling(
                mean_of_gradients(), second_moment=second(adamx.running_max()), eps=1e-3
            )
        ),
        r.amsgrad,
        {**ADAM, "variant": "torch"},
        unlike=({**ADAM, "variant": "optax"}, {**ADAM, "variant": "paper"}),
    ),
    "amsgrad_paper": Member(
        composed(
            lambda: adamx.rms_scaling(
                adamx.ema(0.8),
                second_moment=second(adamx.running_max(), corrected=False),
                eps=1e-3,
            )
        ),
        r.amsgrad,
        {**ADAM, "variant": "paper"},
        unlike=({**ADAM, "variant": "optax"}, {**ADAM, "variant": "torch"}),
    ),
    "adabelief": alike(
        "adabelief",
        BELIEF,
        measure=partial(on_differences, deviations),
        slots=without_eps,
        unlike=({**BELIEF, "eps_root": 0.0},),
    ),
    "adabelief_nesterov": alike(
        "adabelief",
        {**BELIEF, "nesterov": True},
        measure=partial(on_differences, deviations),
        slots=without_eps,
        unlike=(BELIEF,),
    ),
    "radam_nesterov": alike("radam", {**ADAM, "nesterov": True}, measure=rectified, unlike=(ADAM,)),
    "radam": alike("radam", {**ADAM, "b2": 0.999}, measure=rectified),
    "radam_short": alike(
        "radam",
        {"b1": 0.8, "b2": 0.9, "eps": 0.1, "eps_root": 0.02},
        measure=rectified,
        unlike=(
            {"b1": 0.8, "b2": 0.9, "eps": 0.1, "eps_root": 0.02, "threshold": 4.0},
            {"b1": 0.8, "b2": 0.9, "eps": 0.1, "eps_root": 0.02, "eps_on": "raw"},
        ),
    ),
    "radam_never_rectified": alike("radam", {**ADAM, "b2": 0.5}, measure=rectified),
    "radam_paper": alike(
        "radam",
        {**ADAM, "b2": 0.9, "threshold": 4.0},
        measure=rectified,
        unlike=({**ADAM, "b2": 0.9},),
    ),
    "yogi": alike(
        "yogi",
        ADAM,
        measure=partial(on_differences, all_steps),
        unlike=({**ADAM, "corrected": False}, {**ADAM, "initial_nu": 0.1}),
    ),
    "yogi_paper": Member(
        composed(
            lambda: adamx.rms_scaling(
                adamx.ema(0.8),
                second_moment=adamx.additive_average_of_squares(0.97, initial=0.25),
                eps=1e-3,
            )
        ),
        r.yogi,
        {**ADAM, "corrected": False, "initial_mu": 0.0, "initial_nu": 0.25},
        partial(on_differences, all_steps),
    ),
    "lion": alike("lion", {**LION, **DECAY}, measure=signs),
    "adan": Member(
        lambda rate: adamx.adan(rate, **ADAN, **DECAY),
        r.adan,
        {**ADAN, **DECAY, "look_ahead": "paper"},
        partial(on_differences, looking_ahead),
        unlike=(
            {**ADAN, **DECAY, "look_ahead": "optax"},
            {**ADAN, **DECAY, "look_ahead": "paper", "proximal": True},
        ),
    ),
    "adan_optax": Member(
        lambda rate: adamx.adan(rate, **ADAN, look_ahead=1 - ADAN["b2"]),
        r.adan,
        {**ADAN, "look_ahead": "optax"},
        partial(on_differences, looking_ahead),
    ),
    "ademamix": alike("ademamix", {**ADAM, "b3": 0.99, "alpha": 3.0, "eps_root": 0.02, **DECAY}),
    "ademamix_scheduled": Member(
        lambda rate: adamx.ademamix(rate, **ADAM, b3=slow_decays, alpha=slow_weights),
        r.ademamix,
        {**ADAM, "b3": SLOW, "alpha": WEIGHTS},
        unlike=({**ADAM, "b3": SLOW + 0.002, "alpha": WEIGHTS + 0.1},),  # the paper's count
    ),
    "adopt": alike("adopt", ADAM, unlike=({**ADAM, "clipped": False},)),
    "adopt_unclipped": Member(
        composed(
            lambda: adamx.delayed_rms_scaling(adamx.seeded_ema_of_squares(0.97), eps=1e-3),
            lambda: adamx.ema(0.8),
        ),
        r.adopt,
        {**ADAM, "clipped": False},
    ),
    "adam_atan2": alike(
        "adam_atan2",
        {"b1": 0.8, "b2": 0.97, "a": 2.0, "b": 0.5, **DECAY},
        unlike=tuple(
            {"b1": 0.8, "b2": 0.97, "a": 2.0, "b": 0.5, **DECAY} | other
            for other in ({"a": 1.0}, {"b": 1.0}, {"weight_decay": 0.0})
        ),
    ),
    "adamc": Member(
        lambda rate: adamx.adamc(rate, **ADAM, **DECAY, max_learning_rate=0.2, normalized="a"),
        normalized_or_not,
        {**ADAM, **DECAY, "max_learning_rate": 0.2},
        unlike=({**ADAM, **DECAY, "max_learning_rate": None}, {**ADAM, "max_learning_rate": 0.2}),
    ),
    "mars": alike(
        "mars",
        {**ADAM, "eps_root": 0.02, "gamma": 0.5, **DECAY},
        measure=through_changes,
        unlike=tuple(
            {**ADAM, "eps_root": 0.02, "gamma": 0.5, **DECAY} | other
            for other in ({"gamma": 0.0}, {"clipped": False}, {"weight_decay": 0.0})
        ),
    ),
    "simplified_ademamix": alike(
        "simplified_ademamix",
        {**ADAM, "alpha": 3.0, "eps_root": 0.02, **DECAY},
        unlike=({**ADAM, "eps_root": 0.02, **DECAY},),
    ),
    "hyperball": Member(
        lambda rate: adamx.chain(adamx.scale_by_adam(**ADAM), adamx.hyperball(rate)),
        r.adamh,
        ADAM,
        on_a_sphere,
        unlike=({**ADAM, "kept": False},),
    ),
    "laprop": alike(
        "laprop",
        {**ADAM, "eps_root": 0.02, **DECAY},
        unlike=tuple(
            {**ADAM, "eps_root": 0.02, **DECAY, **other}
            for other in ({"rate": "averaged"}, {"corrected": False})
        ),
    ),
    "sgdw": alike("sgdw", {"momentum": 0.8, "nesterov": True, **DECAY}, reference.sgdw),
    "cautious_adamw": alike(
        "cautious_adamw",
        {**ADAM, "eps_root": 0.02, **DECAY},
        measure=kept,
        unlike=tuple(
            {**ADAM, "eps_root": 0.02, **DECAY, **other}
            for other in ({"rescale": "mean"}, {"decay_last": True})
        ),
    ),
    "cautious_adamw_mean": Member(
        composed(
            lambda: adamx.cautious(adamx.scale_by_adam(**ADAM), xi=0.0),
            lambda: adamx.add_decayed_weights(0.5),
        ),
        r.cautious_adamw,
        {**ADAM, **DECAY, "rescale": "mean"},
        kept,
    ),
    "cautious_lion": alike("cautious_lion", {**LION, **DECAY}, measure=kept),
    "cautious_decay": Member(
        composed(
            lambda: adamx.scale_by_adam(**ADAM), lambda: adamx.add_cautious_decayed_weights(0.5)
        ),
        cautiously_decayed,
        {**ADAM, **DECAY},
        decay_decided,
    ),
    "lamb": alike("lamb", {**ADAM, "eps_root": 0.02, **DECAY}, measure=by_norms),
    "adam_mini": alike("adam_mini", {**ADAM, **DECAY}, mini),
    "adam_mini_all": Member(
        lambda rate: adamx.adam_mini(
            rate, **ADAM, **DECAY, axes=lambda _, leaf: tuple(range(leaf.ndim))
        ),
        r.adam_mini,
        {**ADAM, **DECAY},
        unlike=({**ADAM, **DECAY, "axes": 0},),
    ),
    "stable_adamw": alike("stable_adamw", {**ADAM, **DECAY}),
    "muon": Member(
        lambda rate: adamx.muon(rate, weight_decay=0.5, axes=sides),
        r.muon,
        DECAY,
        through_newton_schulz,
        unlike=tuple(
            DECAY | {name: value}
            for name, value in {
                "beta": 0.9,
                "nesterov": False,
                "ns_steps": 4,
                "consistent_rms": 0.2,
                "eps": 0.1,
                "weight_decay": 0.0,
                "ns_coeffs": (3.4445, -4.7750, 2.0),
            }.items()
        ),
    ),
    "muon_adamw": Member(
        lambda rate: adamx.muon_adamw(
            rate,
            beta=0.8,
            eps=1e-3,
            nesterov=False,
            adam_b1=0.8,
            adam_b2=0.97,
            adam_weight_decay=0.5,
            weight_decay=0.5,
            consistent_rms=0.2,
        ),
        muon_or_adamw,
        MUON,
        lambda case: (through_newton_schulz if case.w.ndim == 2 else on_magnitudes)(case),
        scalars=frozenset({"nu"}),
    ),
    "adafactor": Member(
        lambda rate: adamx.adafactor(rate, 2),
        largest_axes,
        measure=step_by_step,
        scalars=frozenset({"nu", "nu_row", "nu_col"}),
        unlike=tuple(
            {name: value}
            for name, value in {
                "axes": None,
                "decay_rate": 0.7,
                "eps": 1e-3,
                "clipping_threshold": None,
                "multiply_by_parameter_scale": False,
            }.items()
        ),
    ),
    "adafactor_other": Member(
        lambda rate: adamx.adafactor(
            rate, 2, 0.6, 5, False, 0.5, 0.9, None, 0.5, 0.01, factored=False
        ),
        r.adafactor,
        FACTOR,
        step_by_step,
        scalars=frozenset({"nu", "nu_row", "nu_col"}),
        unlike=tuple(
            FACTOR | {name: value}
            for name, value in {
                "decay_offset": 4,
                "momentum": 0.8,
                "weight_decay_rate": 0.0,
            }.items()
        ),
    ),
    "schedule_free_adamw": alike(
        "schedule_free_adamw",
        {**ADAM, **DECAY},
        measure=along_z,
        scalars=FREE,
        unlike=({**ADAM, **DECAY, "variant": "paper"},),
    ),
    "schedule_free_adamw_power": alike(
        "schedule_free_adamw", {**ADAM, "weight_lr_power": 1.0}, measure=along_z, scalars=FREE
    ),
    # the paper's schedule multiplies the decay and a learning rate that is a constant before it
    "adamw_independent": Member(
        composed(
            lambda: adamx.scale_by_adam(**ADAM),
            lambda: adamx.scale(0.3),
            lambda: adamx.add_decayed_weights(0.5),
        ),
        independently,
        {**ADAM, **DECAY},
    ),
    "clip_by_value": Member(
        composed(lambda: adamx.clip_by_value(0.3)),
        clipped_sgd(lambda g, _: r.clip_by_value(g, 0.3)),
        measure=as_it_is,
    ),
    "clip_by_rms": Member(
        composed(lambda: adamx.clip_by_rms(0.5)),
        clipped_sgd(lambda g, _: r.clip_by_rms(g, 0.5)),
        measure=as_it_is,
    ),
    "adaptive_clip": Member(
        composed(lambda: adamx.adaptive_clip(0.2, 0.5)),
        clipped_sgd(lambda g, w: r.adaptive_clip(g, w, 0.2, 0.5)),
        measure=as_it_is,
    ),
    "adaptive_clip_rows": Member(
        composed(lambda: adamx.adaptive_clip(0.2, 0.5, axis=-1)),
        clipped_sgd(lambda g, w: r.adaptive_clip(g, w, 0.2, 0.5, axis=-1)),
        measure=as_it_is,
    ),
}


# --- In float64 against PyTorch ------------------------------------------------------------------


def as_in_torch(name: str) -> tuple[adamx.Transformation, Callable[..., Trajectory], Options]:
    """The composition that does what PyTorch's optimizer does, and the reference of both.

    The options are PyTorch's peculiarities, which the composition does not have.
    """
    h = TORCH[name]["hyperparameters"]
    b1, b2, lr, eps = *h["betas"], h["lr"], h["eps"]
    options = {"learning_rate": lr, "b1": b1, "b2": b2, "eps": eps}
    numerator = adamx.chain(adamx.ema(b1), adamx.bias_correction(b1))
    squares, correction = adamx.ema_of_squares(b2), adamx.bias_correction(b2)
    end = adamx.scale_by_learning_rate(lr)
    match TORCH[name]["class"]:
        case "Adam" if h["amsgrad"]:
            largest = adamx.chain(squares, adamx.running_max(), correction)
            scaling = adamx.rms_scaling(numerator, second_moment=largest, eps=eps)
            return adamx.chain(scaling, end), partial(r.amsgrad, **options, variant="torch"), {}
        case "Adamax":
            return adamx.adamax(lr, b1, b2, eps), partial(r.adamax, **options), {}
        case "NAdam":
            wd = h["weight_decay"]
            scaling = adamx.rms_scaling(
                adamx.scheduled_nesterov_ema(b1, h["momentum_decay"]),
                second_moment=adamx.chain(squares, correction),
                eps=eps,
            )
            method = partial(
                r.nadamw, **options, momentum_decay=h["momentum_decay"], weight_decay=wd
            )
            single = {"product_type": np.float32}
            return adamx.chain(scaling, adamx.add_decayed_weights(wd), end), method, single
        case "RAdam":
            method = partial(r.radam, **options, strict=True)
            return adamx.radam(lr, b1, b2, eps), method, {"eps_on": "raw"}
        case other:
            raise ValueError(other)


# --- In float32 against Optax --------------------------------------------------------------------

RATE = 1e-3
WELL: dict[str, Any] = {"b1": 0.5, "b2": 0.75}
contrib = optax.contrib


@dataclasses.dataclass(frozen=True)
class Pair:
    """An optimizer of both libraries.

    Attributes:
        theirs: Optax's, or None where it has none.
        method: of the reference.
        options: of all three, decays whose powers Optax computes well.
        measure: how far roundings reach.
        ours: options of adamx alone.
        judging: options of the reference alone.
        sums: numbers that are added up in a norm or mean; each program rounds as often, and the
            root halves it.
        defaults: the options of the reference that are adamx's defaults, where they differ.
    """

    theirs: Callable[..., optax.GradientTransformation] | None
    method: Method
    options: Options
    measure: Callable[[Case], Measure] = on_magnitudes
    ours: Options = dataclasses.field(default_factory=dict)
    judging: Options = dataclasses.field(default_factory=dict)
    sums: int = 0
    defaults: Options = dataclasses.field(default_factory=dict)


WD = {"weight_decay": 0.1}
MARS: dict[str, Any] = {"b1": 0.95, "b2": 0.99, "eps": 1e-8, "gamma": 0.025}
ADAMS: dict[str, Any] = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
PAIRS: dict[str, Pair] = {
    "adamax": Pair(optax.adamax, r.adamax, WELL, defaults=ADAMS),
    "adamaxw": Pair(
        optax.adamaxw, r.adamaxw, {**WELL, **WD}, defaults={**ADAMS, "weight_decay": 1e-4}
    ),
    "nadam": Pair(optax.nadam, partial(reference.adam, nesterov=True), {**WELL, "eps_root": 1e-4}),
    "nadamw": Pair(
        optax.nadamw,
        partial(reference.adamw, nesterov=True),
        {**WELL, **WD},
        defaults={"weight_decay": 1e-4},
    ),
    "amsgrad": Pair(optax.amsgrad, r.amsgrad, {**WELL, "eps_root": 1e-4}),
    "adabelief": Pair(
        optax.adabelief,
        r.adabelief,
        {**WELL, "eps": 1e-3, "eps_root": 1e-4},
        partial(on_differences, deviations),
        defaults={"b1": 0.9, "b2": 0.999, "eps": 1e-16, "eps_root": 1e-16},
    ),
    "radam": Pair(
        optax.radam, r.radam, {**WELL, "eps_root": 1e-4}, rectified, defaults={"b2": 0.999}
    ),
    "yogi": Pair(
        optax.yogi,
        r.yogi,
        {**WELL, "eps": 0.01},
        partial(on_differences, all_steps),
        defaults={"b2": 0.999, "eps": 1e-3},
    ),
    "lion": Pair(
        optax.lion,
        r.lion,
        {**WELL, **WD},
        signs,
        defaults={"b1": 0.9, "b2": 0.99, "weight_decay": 1e-3},
    ),
    "adan": Pair(
        optax.adan,
        r.adan,
        {**WELL, "b3": 0.875, "eps_root": 1e-4, "eps": 1e-3, **WD},
        partial(on_differences, looking_ahead),
        ours={"look_ahead": 0.25},
        judging={"look_ahead": "optax"},
        defaults={
            **{"b1": 0.98, "b2": 0.92, "b3": 0.99, "eps": 1e-8, "eps_root": 1e-8},
            "look_ahead": "paper",
        },
    ),
    "ademamix": Pair(
        contrib.ademamix, r.ademamix, {**WELL, "b3": 0.875, "alpha": 2.0, "eps_root": 1e-4, **WD}
    ),
    "adopt": Pair(contrib.adopt, r.adopt, WELL),
    "adam_atan2": Pair(None, r.adam_atan2, {}),
    "adamc": Pair(None, r.adamc, {}, defaults={"weight_decay": 1e-4}),
    "mars": Pair(None, r.mars, {}, through_changes, sums=SIZE, defaults=MARS),
    "simplified_ademamix": Pair(
        contrib.simplified_ademamix, r.simplified_ademamix, {**WELL, "alpha": 2.0, "eps_root": 1e-4}
    ),
    "laprop": Pair(None, r.laprop, {}),
    "lamb": Pair(
        optax.lamb,
        r.lamb,
        {**WELL, "eps": 1e-3, "eps_root": 1e-4, **WD},
        by_norms,
        sums=SIZE,
        defaults={"eps": 1e-6, "weight_decay": 0.0},
    ),
    "adafactor": Pair(
        optax.adafactor,
        r.adafactor,
        {"momentum": 0.5, "weight_decay_rate": 1e-3, "clipping_threshold": 0.5, "eps": 1e-6},
        step_by_step,
        sums=SIZE,
    ),
    "schedule_free_adamw": Pair(
        contrib.schedule_free_adamw,
        r.schedule_free_adamw,
        {**WELL, **WD, "eps": 1e-8},
        along_z,
        defaults={"b2": 0.999, "eps": 1e-8},
    ),
    "cautious_adamw": Pair(
        None, r.cautious_adamw, {}, kept, defaults={**ADAMS, "weight_decay": 1e-4}
    ),
    "cautious_lion": Pair(
        None,
        r.cautious_lion,
        {},
        kept,
        defaults={"b1": 0.9, "b2": 0.99, "weight_decay": 1e-3},
    ),
    "adam_mini": Pair(None, mini, {}, sums=SIZE, defaults={"weight_decay": 0.1}),
    "stable_adamw": Pair(None, r.stable_adamw, {}, sums=SIZE, defaults={"weight_decay": 0.01}),
    "sgdw": Pair(None, reference.sgdw, {}, defaults={"weight_decay": 1e-4}),
}
CLIPS: dict[str, tuple[Callable[[], Any], Callable[[], Any], Method]] = {
    "clip_by_value": (
        lambda: adamx.clip_by_value(0.3),
        lambda: optax.clip(0.3),
        clipped_sgd(lambda g, _: r.clip_by_value(g, 0.3)),
    ),
    "clip_by_rms": (
        lambda: adamx.clip_by_rms(0.1),
        lambda: optax.clip_by_block_rms(0.1),
        clipped_sgd(lambda g, _: r.clip_by_rms(g, 0.1)),
    ),
    "adaptive_clip": (
        lambda: adamx.adaptive_clip(0.1),
        lambda: optax.adaptive_grad_clip(0.1),
        clipped_sgd(lambda g, w: r.adaptive_clip(g, w, 0.1)),
    ),
}


def in_float32(name: str, defaults: bool = False) -> tuple[Case, Measure, int]:
    """The problem of one pair, its measure and its sums."""
    w, g = of_one_sign()
    pair = PAIRS.get(name) or Pair(None, CLIPS[name][2], {}, as_it_is, sums=SIZE)
    options = pair.defaults if defaults else {**pair.options, **pair.judging}
    case = Case(w.astype(np.float64), g.astype(np.float64), np.full(60, RATE), pair.method, options)
    return case, pair.measure(case), pair.sums


@functools.cache
def run_in_float32() -> dict[str, np.ndarray]:
    """The updates of all, in one program, from the reference's weights rounded to float32."""
    txs: dict[str, Any] = {}
    for name, pair in PAIRS.items():
        txs[f"{name} default"] = getattr(adamx, name)(RATE)
        if pair.theirs:
            txs[f"{name} ours"] = getattr(adamx, name)(RATE, **pair.options, **pair.ours)
            txs[f"{name} theirs"] = pair.theirs(RATE, **pair.options)
    for name, (ours, theirs, _) in CLIPS.items():
        txs[f"{name} ours"] = adamx.chain(ours(), adamx.scale_by_learning_rate(RATE))
        txs[f"{name} theirs"] = optax.chain(theirs(), optax.scale_by_learning_rate(RATE))
    gradients = jnp.asarray(of_one_sign()[1])
    paths = {key: jnp.asarray(weights_of(key), jnp.float32) for key in txs}

    def step(states: Any, now: Any) -> Any:
        grads, params = now
        pairs = {key: tx.update(grads, states[key], params[key]) for key, tx in txs.items()}
        return {key: pair[1] for key, pair in pairs.items()}, {
            key: pair[0] for key, pair in pairs.items()
        }

    def program() -> Any:
        states = {key: tx.init(paths[key][0]) for key, tx in txs.items()}
        return jax.lax.scan(step, states, (gradients, {k: p[:-1] for k, p in paths.items()}))[1]

    return jax.device_get(jax.jit(program)())


def weights_of(key: str) -> np.ndarray:
    """The reference's weights for a key of `run_in_float32`."""
    name, which = key.split()
    return in_float32(name, which == "default")[0].run.params
