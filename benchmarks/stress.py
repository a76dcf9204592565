"""A stress set: AdamW in every storage on the unconstrained problems of CUTEst.

    python benchmarks/stress.py --markdown docs/stress-set.md      [--quick] [--only ROSENBR CUBE]

All methods and rates of a problem take their steps together: one program computes all gradients, in
float64, and one takes all steps, in float32 as in training; the latter is compiled once for all
problems with as many variables. Needs `sif2jax` (importing it takes a minute).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from report import Table
from rich.console import Console
from rich.progress import track
from scipy.optimize import minimize
from side_by_side import environment

import adamx

MARK = "<!-- tables -->"  # what stands above it is written by hand


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is run.

    Attributes:
        rates: the grid of learning rates, each of which falls to 0 along a cosine.
        steps: of each run.
        largest: number of variables above which a problem is left out.
        traffic: bytes above which a problem is left out, if its gradients of all runs move more.
        tolerance: the part of the possible decrease that may be missing where a problem is solved.
    """

    rates: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0, 10.0)
    steps: int = 1000
    largest: int = 1024
    traffic: float = 1e8
    tolerance: float = 1e-3


FULL = Settings()
QUICK = Settings(rates=(0.01, 1.0), steps=50, largest=4)

Schedule = Callable[[jax.Array], jax.Array]
Bound = Callable[[np.ndarray], np.ndarray]

# ------------------------------------------------------------------------------ methods and bounds

B1, B2, DECAY = 0.9, 0.999, 1e-4


def reach(t: np.ndarray, m: float = 0.0, v: float = 0.0) -> np.ndarray:
    """Return the largest |m^| / sqrt(v^) in step t, where the averages are stored with errors.

    By Cauchy and Schwarz, with stored averages of at most 1 + m and at least 1 - v times what they
    should be,

        |m_t| <= (1 - b1) sum_k b1^k (1 + m)^(k + 1) |g_{t-k}|
        v_t   >= (1 - b2) sum_k b2^k (1 - v)^(k + 1) g_{t-k}^2
        |m_t| / sqrt(v_t) <= (1 - b1) / sqrt(1 - b2) * (1 + m) / sqrt(1 - v) * sqrt(sum_k q^k),
        q = (b1 (1 + m))^2 / (b2 (1 - v)).

    Args:
        t: numbers of steps, from 1.
        m: how much too large a stored average of gradients may be, relative to it.
        v: how much too small a stored average of squares may be, relative to it.

    Example:
        >>> reach(np.array([1.0, 2000.0])).round(2)
        array([1.  , 6.76])
    """
    q = (B1 * (1 + m)) ** 2 / (B2 * (1 - v))
    ratio = (1 - B1) * (1 + m) / np.sqrt((1 - B2) * (1 - v)) * np.sqrt((1 - q**t) / (1 - q))
    return ratio * np.sqrt(1 - B2**t) / (1 - B1**t)


def reach_of_packed8(t: np.ndarray) -> np.ndarray:
    """Return the same for packed8, which limits the ratio itself (`adamx/storage/packed8.py`)."""
    return 1.061 * adamx.ratio_bound(B1, B2) * np.sqrt(1 - B2**t) / (1 - B1**t)


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the tables.

    Attributes:
        make: returns the transformation from its schedule.
        reach: the largest |m^| / sqrt(v^) in step t, or None where nothing is claimed.
        dtype: of the parameters.
    """

    make: Callable[[Schedule], Any]
    reach: Bound | None = None
    dtype: Any = jnp.float32


def methods() -> dict[str, Method]:
    """Return the methods by name: the peer, each storage of AdamW's moments, masters, others."""
    bf16, masters, adamw = jnp.bfloat16, adamx.master_weights, adamx.adamw
    halves = functools.partial(reach, m=2.0**-7, v=2.0**-7)
    words = functools.partial(reach, m=2.0**-7, v=2.0**-8)
    return {
        "optax.adamw": Method(optax.adamw, reach),
        "adamw": Method(adamw, reach),
        "adamw bfloat16": Method(lambda lr: adamw(lr, moments="bfloat16"), halves),
        "adamw packed16": Method(lambda lr: adamw(lr, moments="packed16"), words),
        "adamw packed8": Method(lambda lr: adamw(lr, moments="packed8"), reach_of_packed8),
        "master_weights": Method(lambda lr: masters(adamw(lr)), reach, bf16),
        "master_weights packed8 remainder8": Method(
            lambda lr: masters(adamw(lr, moments="packed8"), "remainder8"), reach_of_packed8, bf16
        ),
        "skip_nonfinite": Method(lambda lr: adamx.skip_nonfinite(adamw(lr)), reach),
        "adam_atan2": Method(adamx.adam_atan2),
        "adopt": Method(adamx.adopt),
        "lion": Method(adamx.lion),
        "rmsprop": Method(adamx.rmsprop),
    }


# ----------------------------------------------------------------------------------------- problems


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is minimised.

    Attributes:
        name: its name in CUTEst.
        start: the published first point, float64, of shape [variables].
        objective: of a float64 point.
    """

    name: str
    start: np.ndarray
    objective: Callable[[jax.Array], jax.Array]


def problems() -> dict[str, Problem]:
    """Return all unconstrained problems of `sif2jax` by name."""
    before = bool(jax.config.read("jax_enable_x64"))
    found = importlib.import_module("sif2jax").unconstrained_minimisation_problems
    jax.config.update("jax_enable_x64", before)  # importing it enables float64 for everybody
    made = {}
    with jax.enable_x64(True):
        for given in found:
            objective = functools.partial(lambda given, y: given.objective(y, given.args), given)
            made[given.name] = Problem(given.name, np.asarray(given.y0, np.float64), objective)
    return made


# --------------------------------------------------------------------------------------------- runs


@dataclasses.dataclass(frozen=True)
class Result:
    """What the runs on a problem did; arrays are of shape [methods, rates].

    Attributes:
        variables: how many.
        first: the objective at the start.
        best: the least value that a run or L-BFGS-B found.
        peer: the least value that L-BFGS-B found.
        away: how far its point is from the start, in the element that moved most.
        least: of each run's values.
        last: of each run's values.
        largest: of each run's values.
        bad: in which step, from 1, the gradient was not finite at first; 0 if it always was.
        moved: the longest step of an element, in units of its bound, while the gradients were
            finite; NaN where there is no bound.
        finite: whether parameters and state were finite after each step up to there, and for
            `skip_nonfinite` up to the end.
        steepest: the largest element of a finite gradient.
        seconds: what the problem took.
    """

    variables: int
    first: float
    best: float
    peer: float
    away: float
    least: np.ndarray
    last: np.ndarray
    largest: np.ndarray
    bad: np.ndarray
    moved: np.ndarray
    finite: np.ndarray
    steepest: np.ndarray
    seconds: float

    def solved(self, tolerance: float) -> np.ndarray:
        """Say which runs got all of the decrease that is known to be possible, but a part.

        It is the test of Moré & Wild (2009), Benchmarking derivative-free optimization algorithms,
        https://doi.org/10.1137/080724083, equation 2.2: f(x) <= f_L + tolerance (f(x_0) - f_L).
        """
        return self.least <= self.best + tolerance * (self.first - self.best)


def judged(problem: Problem, runs: tuple[int, int]) -> Any:
    """Return the program, compiled, that gives the gradients of all runs and notes their values.

    It takes points, float32 [methods, rates, variables], and the values' least, largest and last.

    Args:
        problem: what is minimised.
        runs: numbers of methods and rates.
    """
    slope = jax.value_and_grad(lambda x: problem.objective(x.astype(jnp.float64)).astype(float))

    @jax.jit
    def judge(points: jax.Array, seen: tuple[jax.Array, ...]) -> Any:
        values, grads = jax.vmap(jax.vmap(slope))(points)
        return grads, (jnp.fmin(seen[0], values), jnp.fmax(seen[1], values), values)

    points = jax.ShapeDtypeStruct((*runs, problem.start.size), jnp.float32)
    seen = (jax.ShapeDtypeStruct(runs, jnp.float64),) * 3
    return judge.lower(points, seen).compile()


@dataclasses.dataclass(frozen=True)
class Steps:
    """One step of all methods and rates, compiled once for a number of variables."""

    methods: tuple[Method, ...]
    settings: Settings

    def __post_init__(self) -> None:
        object.__setattr__(self, "step", jax.jit(self._step))
        object.__setattr__(self, "start", jax.jit(self._start))

    @property
    def reaches(self) -> np.ndarray:
        """The bounds of all methods, [steps, methods], NaN where there is none."""
        t = np.arange(1.0, self.settings.steps + 1)
        unknown = np.full(len(t), np.nan)
        found = [unknown if m.reach is None else m.reach(t) for m in self.methods]
        return np.stack(found, -1).astype(np.float32)

    def schedule(self, rate: jax.Array) -> Schedule:
        """Return a learning rate that falls to 0 along a cosine."""
        falling = optax.cosine_decay_schedule(1.0, self.settings.steps)
        return lambda count: rate * falling(count)

    def _start(self, start: jax.Array) -> Any:
        """Return points, and of each method the parameters, the state and the account."""
        rates = jnp.asarray(self.settings.rates)

        def of(method: Method, rate: jax.Array) -> Any:
            params = start.astype(method.dtype)
            account = jnp.int32(0), jnp.float32(0), jnp.bool(True), jnp.float32(0)
            return params, method.make(self.schedule(rate)).init(params), account

        carry = [jax.vmap(functools.partial(of, method))(rates) for method in self.methods]
        return self.points(carry), carry

    def points(self, carry: Any) -> jax.Array:
        """Return the parameters of all methods, float32 [methods, rates, variables]."""
        return jnp.stack([params.astype(jnp.float32) for params, *_ in carry])

    def _step(self, t: jax.Array, reaches: jax.Array, grads: jax.Array, carry: Any) -> Any:
        rates = jnp.asarray(self.settings.rates)
        after = []
        for i, method in enumerate(self.methods):
            of = functools.partial(self.taken, method, t, reaches[t, i])
            after.append(jax.vmap(of)(rates, grads[i], *carry[i]))
        return self.points(after), after

    def taken(
        self, method: Method, t: jax.Array, reach: jax.Array, rate: jax.Array, grads: jax.Array,
        params: jax.Array, state: Any, account: Any,
    ) -> Any:  # fmt: skip
        """Take one step of one method at one rate."""
        bad, moved, finite, steepest = account
        schedule = self.schedule(rate)
        tx = method.make(schedule)
        updates, after = tx.update(grads.astype(method.dtype), state, params)
        new = adamx.apply_updates(params, updates)
        good = (bad == 0) & jnp.isfinite(grads).all()
        bad = jnp.where((bad == 0) & ~good, t + 1, bad)
        w, size = jnp.abs(params.astype(jnp.float32)), jnp.abs(updates.astype(jnp.float32))
        allowed = schedule(t) * (reach + DECAY * w)
        if method.dtype == jnp.bfloat16:  # the master is half a spacing off, before and after
            half = 2.0**-8
            allowed = schedule(t) * (reach + DECAY * w * (1 + half))
            allowed += half * (w + jnp.abs(new.astype(jnp.float32))) * (1 + half)
        longest = jnp.max(jnp.where(size > 0, size / allowed, 0))
        floats = [x for x in jax.tree.leaves((new, after)) if jnp.issubdtype(x.dtype, jnp.floating)]
        whole = jnp.stack([jnp.isfinite(x).all() for x in floats]).all()
        guarded = isinstance(tx, adamx.skip_nonfinite)
        return new, after, (
            bad,
            jnp.where(good, jnp.maximum(moved, longest), moved),
            finite & (whole | ~(good | guarded)),
            jnp.where(good, jnp.maximum(steepest, jnp.abs(grads).max()), steepest),
        )  # fmt: skip


def tried(problem: Problem, steps: Steps) -> Result | None:
    """Run all methods and rates on a problem; None means that its gradient takes too long."""
    clock = time.perf_counter()
    reaches = jnp.asarray(steps.reaches)
    with jax.enable_x64(True):
        judge = judged(problem, (len(steps.methods), len(steps.settings.rates)))
    if judge.cost_analysis()["bytes accessed"] > steps.settings.traffic:
        return None
    points, carry = steps.start(jnp.asarray(problem.start, jnp.float32))
    first = points
    with jax.enable_x64(True):
        none = jnp.full(points.shape[:2], jnp.nan)
        seen = none, none, none
    for t in range(steps.settings.steps):
        with jax.enable_x64(True):
            grads, seen = judge(points, seen)
        points, carry = steps.step(jnp.int32(t), reaches, grads, carry)
    with jax.enable_x64(True):
        start = float(judge(first, (none, none, none))[1][2][0, 0])
        seen = judge(points, seen)[1]

        def alone(x: np.ndarray) -> tuple[float, np.ndarray]:
            at = jnp.broadcast_to(jnp.asarray(x, jnp.float32), points.shape)
            grads, (_, _, values) = judge(at, seen)
            return float(values[0, 0]), np.asarray(grads[0, 0], np.float64)

        options = {"maxiter": 1000, "maxfun": 500, "ftol": 0.0, "gtol": 0.0}
        peer = minimize(alone, problem.start, jac=True, method="L-BFGS-B", options=options)
    least, largest, last = map(np.asarray, seen)
    bad, moved, finite, steepest = (
        np.stack([np.asarray(account[i]) for *_, account in carry]) for i in range(4)
    )
    best = np.nanmin([start, float(peer.fun), *least.ravel()])
    return Result(
        problem.start.size, start, float(best), float(peer.fun),
        float(np.abs(peer.x - problem.start).max()), least, last, largest, bad, moved,
        finite, steepest, time.perf_counter() - clock,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- tables

Results = Mapping[str, Result]
FLOAT32, PEER, GUARD = "adamw", "optax.adamw", "skip_nonfinite"
ROUNDING = 1e-5  # of the schedule, of 15 operations on float32 numbers, and of the sum in a bound


def broken(results: Results, chosen: Mapping[str, Method]) -> list[str]:
    """Return the promises that a method of adamx did not keep, each with its problem."""
    told = []
    for name, result in results.items():
        for i, method in enumerate(chosen):
            if method == PEER:
                continue
            if not result.finite[i].all():
                told.append(f"{name}: {method}: not finite, though its gradients are")
            if (longest := np.nanmax([0.0, *result.moved[i]])) > 1 + ROUNDING:
                told.append(f"{name}: {method}: a step of {longest:.6g} times its bound")
    return told


def solved_table(results: Results, chosen: Mapping[str, Method], settings: Settings) -> Table:
    """Return how many problems each method solves at each rate."""
    solved = np.stack([result.solved(settings.tolerance) for result in results.values()])
    rows = [
        [method, *(f"{solved[:, i, j].sum()}" for j in range(len(settings.rates))),
         f"{solved[:, i].any(-1).sum()}"]
        for i, method in enumerate(chosen)
    ]  # fmt: skip
    note = (
        f"Of {len(results)} problems, in {settings.steps} steps, at each rate of the grid, and at "
        f"any of them. Solved: f(x) <= f_L + {settings.tolerance:g} (f(x_0) - f_L) at some step, "
        "where f_L is the least value that any run, or SciPy's L-BFGS-B, found."
    )
    columns = ["method", *(f"{rate:g}" for rate in settings.rates), "any rate"]
    return Table("Solved", note, columns, rows)


def bounds_table(results: Results, chosen: Mapping[str, Method], settings: Settings) -> Table:
    """Return what each method's runs had to keep, and how far up they went."""
    rows = []
    for i, method in enumerate(chosen):
        bad = np.stack([result.bad[i] for result in results.values()])
        finite = np.stack([result.finite[i] for result in results.values()])
        moved = np.stack([result.moved[i] for result in results.values()])
        up = np.stack([~(result.last[i] <= result.first) for result in results.values()])
        none = chosen[method].reach is None
        rows.append([
            method, f"{(bad == 0).sum()}", f"{(~finite).sum()}",
            "-" if none else f"{np.nanmax(moved):.3g}",
            *(f"{up[:, j].sum()}" for j in range(len(settings.rates))),
            f"{up.all(-1).sum()}",
        ])  # fmt: skip
    runs = len(results) * len(settings.rates)
    note = (
        f"Of {runs} runs a method: those whose gradients were finite to the end; those of which a "
        "parameter or a number of the state was not finite, though each gradient up to there was "
        f"(for `{GUARD}`: whether it was or not); the longest step of an element in units of its "
        "bound, while the gradients were finite; and how many of the problems ended up: above "
        "their start, or at no number, at each rate, and at every one."
    )
    up = [f"up at {rate:g}" for rate in settings.rates]
    columns = ["method", "gradients finite", "not finite", "longest step", *up, "at every rate"]
    return Table("Finite, and within the bound", note, columns, rows)


def beside_table(results: Results, chosen: Mapping[str, Method], settings: Settings) -> Table:
    """Return which problems each storage solves and float32 does not, and the reverse."""
    names, methods = np.array(list(results)), list(chosen)
    solved = np.stack([result.solved(settings.tolerance).any(-1) for result in results.values()])
    wide = solved[:, methods.index(FLOAT32)]
    rows = []
    for i, method in enumerate(methods):
        if chosen[method].reach is not None and method != FLOAT32:
            only = [", ".join(names[which]) or "-" for which in (
                wide & ~solved[:, i], solved[:, i] & ~wide)]  # fmt: skip
            counts = (wide & solved[:, i]).sum(), (~wide & ~solved[:, i]).sum()
            rows.append([method, *(f"{count}" for count in counts), *only])
    note = f"At any rate. Float32 is `{FLOAT32}`, with float32 parameters and moments."
    columns = ["storage", "both", "neither", "only float32", "only the storage"]
    return Table("Storages beside float32", note, columns, rows)


def reasons(result: Result, i: int, settings: Settings, reach: Bound) -> str:
    """Return why method number i does not solve a problem, as far as the numbers tell."""
    told, t = [], np.arange(settings.steps)
    falling = max(settings.rates) * 0.5 * (1 + np.cos(np.pi * t / settings.steps))
    if (bad := result.bad[i] > 0).any():
        rates = ", ".join(f"{rate:g}" for rate in np.array(settings.rates)[bad])
        told.append(f"gradients not finite at {rates}")
    if result.steepest[i].max() > 2.0**60:
        told.append(f"gradients up to {result.steepest[i].max():.0e}")
    if not (result.last[i] <= result.first).any():
        told.append("up at every rate: the smallest is too large for the smallest element")
    if result.peer > result.best + settings.tolerance * (result.first - result.best):
        told.append("L-BFGS-B does not solve it either")
    elif result.away > float(np.sum(falling * reach(t + 1.0))):
        told.append(f"L-BFGS-B's point is {result.away:.0e} away: further than the bound allows")
    return "; ".join(told) or "slow"


def failures_table(results: Results, chosen: Mapping[str, Method], settings: Settings) -> Table:
    """Return the problems that float32 AdamW does not solve, with the reasons."""
    i, rows = list(chosen).index(FLOAT32), []
    for name, result in results.items():
        solved = result.solved(settings.tolerance)
        if not solved[i].any():
            least = np.fmin.reduce(result.least[i])
            others = [m for k, m in enumerate(chosen) if solved[k].any()]
            part = (result.first - least) / (result.first - result.best)
            rows.append([
                name, f"{result.variables}", f"{result.first:.4g}", f"{result.best:.4g}",
                f"{100 * part:.4g}", ", ".join(others) or "-",
                reasons(result, i, settings, chosen[FLOAT32].reach or reach),
            ])  # fmt: skip
    note = (
        f"Of `{FLOAT32}`, at any rate: the value at the start, the least that is known, how much "
        "of the decrease between them its best run got, who solves it, and what the runs show."
    )
    columns = ["problem", "variables", "start", "least known", "got, %", "solved by", "seen"]
    return Table("Not solved", note, columns, rows)


def gradients_table(results: Results, chosen: Mapping[str, Method], settings: Settings) -> Table:
    """Return the problems on which float32 AdamW met a gradient that float32 does not hold."""
    i, rows = list(chosen).index(FLOAT32), []
    for name, result in results.items():
        if (bad := result.bad[i]).any() or result.steepest[i].max() > 2.0**60:
            steps = [f"{step}" if step else "-" for step in bad]
            rows.append([name, *steps, f"{result.steepest[i].max():.1e}"])
    note = (
        f"Of `{FLOAT32}`: the first step, at each rate, in which a gradient was infinite or NaN in "
        "float32; and the largest finite one. Problems are listed that have such a step, or "
        "gradients above 2^60, which count as that."
    )
    columns = ["problem", *(f"{rate:g}" for rate in settings.rates), "largest"]
    return Table("Extreme gradients", note, columns, rows)


TABLES = (solved_table, bounds_table, beside_table, failures_table, gradients_table)


def left_out(names: Mapping[str, str]) -> str:
    """Return which problems were left out, by their reasons."""
    told = []
    for reason in dict.fromkeys(names.values()):
        these = [name for name, why in names.items() if why == reason]
        told.append(f"- {reason} ({len(these)}): {', '.join(these)}")
    return "\n".join(["## Left out", "", *told]) if told else ""


def main(argv: Sequence[str] | None = None) -> list[Table]:
    """Run the command; `argv` is the command line, None means the program's own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few steps, small problems")
    parser.add_argument("--only", nargs="+", help="names of problems")
    parser.add_argument("--markdown", type=Path, help="write the tables to this page")
    options = parser.parse_args(argv)
    settings, every, chosen = (QUICK if options.quick else FULL), problems(), methods()
    if unknown := sorted(set(options.only or ()) - every.keys()):
        parser.error(f"argument --only: no problem is called {unknown[0]!r}")
    steps, console = Steps(tuple(chosen.values()), settings), Console(stderr=True)
    results: dict[str, Result] = {}
    without: dict[str, str] = {}
    for name in track(sorted(options.only or every), "problems", console=console):
        result = None
        if every[name].start.size > settings.largest:
            without[name] = f"more than {settings.largest} variables"
        elif (result := tried(every[name], steps)) is None:
            without[name] = f"gradients of all runs that move {settings.traffic / 1e6:g} MB a step"
        elif not np.isfinite(result.first):
            without[name] = "an objective that is not finite at the start"
        else:
            results[name] = result
    made = [table(results, chosen, settings) for table in TABLES]
    console = Console()
    console.width = max(console.width, 150)
    for table in made:
        console.print(table.rich())
    if options.markdown:
        facts = "\n".join(f"- {name}: {value}" for name, value in environment().items())
        parts = [facts, *(table.markdown().strip() for table in made), left_out(without)]
        above = options.markdown.read_text().partition(MARK)[0]
        options.markdown.write_text(f"{above}{MARK}\n\n" + "\n\n".join(parts).strip() + "\n")
    if told := broken(results, chosen):
        parser.exit(1, "".join(f"{line}\n" for line in told))
    return made


if __name__ == "__main__":
    main()
