"""Measure programs side by side: time ratios on a noisy machine.

    ratio = median over rounds of  time(candidate) / time(baseline)

Every round measures every candidate once, in a new random order, so that both times of a ratio
come from the same second of the machine. All rounds count. A second copy of the baseline among the
candidates shows how far the ratio of equal programs is from 1: the resolution.

Bytes and copies are read from the compiled program (`adamx/inspect/program.py`), without noise.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

Sample = Callable[[], float | tuple[float, ...]]
"""A candidate: measures once and returns seconds, or several parts of them."""


# ------------------------------------------------------------------------------------------- times


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Ratios of two times, one a round.

    Attributes:
        median: of the ratios.
        low: their lower quartile.
        high: their upper quartile.
        rounds: how many there are.
    """

    median: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ratio(times: np.ndarray, baseline: np.ndarray) -> Ratio:
    """Return the ratios of times that were taken in the same rounds.

    Example:
        >>> print(ratio(np.array([1.0, 2.0, 6.0]), np.array([2.0, 2.0, 2.0])))
        1.000 [0.750, 2.000]
    """
    low, median, high = np.quantile(times / baseline, [0.25, 0.5, 0.75])
    return Ratio(float(median), float(low), float(high), len(times))


def interleave(
    candidates: Mapping[str, Sample],
    *,
    rounds: int,
    seed: int,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, np.ndarray]:
    """Measure every candidate once a round, in shuffled order, without the garbage collector.

    Args:
        candidates: by name. Each is called once before the rounds, to warm up.
        rounds: how many, >= 1.
        seed: of the order within the rounds.
        tick: called after every sample, and after every warm-up.

    Returns:
        For each candidate its samples in the order of the rounds: an array of shape [rounds], or
        [rounds, parts] if a sample has several parts.
    """
    order = random.Random(seed)
    for sample in candidates.values():
        sample()
        tick()
    times: dict[str, list[Any]] = {name: [] for name in candidates}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in order.sample(list(candidates), len(candidates)):
                times[name].append(candidates[name]())
                tick()
    finally:
        if collecting:
            gc.enable()
    return {name: np.array(samples) for name, samples in times.items()}


class Loop:
    """A step that runs again and again; a sample is the mean time of a few steps in a row.

    Each step gets the results of the step before it, so that donated buffers are threaded through.
    The first step of a sample is not timed, since it finds the caches and the threads as another
    candidate left them. The first sample settles how many steps make up a sample.
    """

    def __init__(
        self,
        step: Callable[..., tuple[Any, ...]],
        carry: tuple[Any, ...],
        *fixed: Any,
        seconds: float = 0.05,
    ) -> None:
        """Prepare `carry = step(*carry, *fixed)`.

        Args:
            step: may donate `carry`, and returns the next one.
            carry: the first one; the loop owns it from now on.
            *fixed: arguments that stay.
            seconds: how long a sample should last.
        """
        self.step, self.carry, self.fixed = step, carry, fixed
        self.seconds, self.repeats = seconds, 0

    def run(self, steps: int) -> float:
        """Run some steps, wait for the last, and return the seconds that this took."""
        start = time.perf_counter()
        for _ in range(steps):
            self.carry = self.step(*self.carry, *self.fixed)
        jax.block_until_ready(self.carry)
        return time.perf_counter() - start

    def __call__(self) -> float:
        """Return the mean seconds of a step."""
        self.run(1)
        if not self.repeats:
            self.repeats = max(1, math.ceil(self.seconds / self.run(1)))
        return self.run(self.repeats) / self.repeats


def stages(make: Callable[[], Any], *arguments: Any, compiling: bool = False) -> Sample:
    """Return a candidate that traces, lowers and, if asked, compiles, and times each stage.

    Args:
        make: returns the jitted function, a new one each time, so that nothing of it is cached.
        *arguments: arrays or their shapes.
        compiling: whether to compile too.
    """

    def sample() -> tuple[float, ...]:
        gc.collect()
        step = make()
        clock = [time.perf_counter()]
        traced = step.trace(*arguments)
        clock.append(time.perf_counter())
        lowered = traced.lower()
        clock.append(time.perf_counter())
        if compiling:
            lowered.compile()
            clock.append(time.perf_counter())
        return tuple(np.diff(clock).tolist())

    return sample
