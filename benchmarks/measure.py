"""Measure programs side by side: time ratios on a noisy machine, and what the compiled code says.

    ratio = median over rounds of  time(candidate) / time(baseline)

Every round measures every candidate once, in a new random order, so that both times of a ratio
come from the same second of the machine. All rounds count. A second copy of the baseline among the
candidates shows what a ratio of equal programs looks like: the resolution.

Bytes and copies are read from the compiled program, and do not depend on noise.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import random
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

Sample = Callable[[], float | tuple[float, ...]]
"""A candidate: measures once and returns seconds, or several parts of them."""

_COPY = re.compile(r"= (?:\(\w+\[([\d,]*)\].*?\) copy-start|\w+\[([\d,]*)\]\S* copy)\(")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%(\S+) = ([a-z]+\d*)\[([\d,]*)\]\S* ([\w-]+)\((.*?)\)")
_NAME = re.compile(r"%([\w.\-]+)")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPCODE = re.compile(r"\s+(?:ROOT )?%?\S+ = (?:\(.*?\)|\S+) ([a-z][\w-]*)\(")
_CALLED = re.compile(r"(?:to_apply|body|\w+_computation)=%?([\w.\-]+)|\w+_computations=\{(.*?)\}")
_ENTERED = {"call", "while", "conditional"}
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "conditional"}


# ----------------------------------------------------------------------------------------- in time


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
        [rounds, parts] where a sample has several parts.
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
    """A step that is run over and over; a sample is the mean time of a few steps in a row.

    What a step returns is what the next one is given, so that donated buffers are threaded
    through. The first step of a sample is not timed: it finds the caches and the threads as
    another candidate left them. The first sample settles how many steps make up a sample.
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
        """Run some steps, wait for the last, and return the seconds that took."""
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
    """Return a candidate that traces and lowers, and compiles if asked to, and times each.

    Args:
        make: returns the jitted function, new each time, so that nothing of it is cached.
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


# ----------------------------------------------------------------------------- in compiled programs


@dataclasses.dataclass(frozen=True)
class Program:
    """What a compiled program says about itself.

    Attributes:
        bytes_per_param: bytes that its kernels read and write, by XLA's count, per parameter.
        always: the same without what stands in branches, of which a usual step takes none: bytes
            of the arguments and results of the instructions outside them, per parameter.
        copies: `copy` instructions whose result is as large as one of the parameters.
        temp_bytes: memory beyond arguments and results.
    """

    bytes_per_param: float
    always: float
    copies: int
    temp_bytes: int


def read_program(compiled: jax.stages.Compiled, params: Any) -> Program:
    """Read a compiled program that works on a tree of parameters, or on their shapes."""
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    cost: Any = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    return Program(
        bytes_per_param=cost["bytes accessed"] / sum(sizes),
        always=bytes_outside_branches(compiled.as_text() or "") / sum(sizes),
        copies=count_copies(compiled.as_text() or "", set(sizes)),
        temp_bytes=memory.temp_size_in_bytes,
    )


def bytes_outside_branches(hlo: str) -> int:
    """Return the bytes that the instructions of a program's entry read and write.

    XLA's own count adds up both sides of every conditional. Here the conditional itself counts
    nothing, nor do instructions that move nothing.

    Example:
        >>> hlo = '''
        ... %branch (x: f32[8]) -> f32[] {
        ...   ROOT %r = f32[] reduce(%x, %zero)
        ... }
        ... ENTRY %main (g: f32[8], p: bf16[2,2]) -> f32[8] {
        ...   %g = f32[8]{0} parameter(0)
        ...   %p = bf16[2,2]{1,0} parameter(1)
        ...   %c.1 = (f32[]) conditional(%s, %g, %g), branch_computations={%branch, %branch}
        ...   ROOT %fusion = f32[8]{0} fusion(%g, %p), kind=kLoop
        ... }
        ... '''
        >>> bytes_outside_branches(hlo)
        72
    """
    entry = hlo[hlo.index("ENTRY") :]
    found = [_INSTRUCTION.match(line) for line in entry.splitlines()[1:]]
    instructions = [match.groups() for match in found if match]
    size = {name: _bytes(dtype, dims) for name, dtype, dims, _, _ in instructions}
    return sum(
        size[name] + sum(size.get(operand, 0) for operand in _NAME.findall(operands))
        for name, _, _, opcode, operands in instructions
        if opcode not in _FREE
    )


def _bytes(dtype: str, dims: str) -> int:
    bits = int("".join(filter(str.isdigit, dtype)) or 8)  # "pred" is a byte
    return math.prod(map(int, filter(None, dims.split(",")))) * bits // 8


def count_copies(hlo: str, sizes: set[int]) -> int:
    """Return how many copies in the text of a program make an array of one of these sizes.

    Sizes are numbers of elements, so that a copy into another layout or shape counts too.

    Example:
        >>> hlo = '''
        ...   %copy.1 = f32[4,8]{1,0} copy(%params)
        ...   %copy.2 = s32[] copy(%count)
        ...   %start = (f32[32]{0}, f32[32]{0}, u32[]) copy-start(%mu)
        ... '''
        >>> count_copies(hlo, {32})
        2
    """
    shapes = ("".join(filter(None, found)) for found in _COPY.findall(hlo))
    return sum(math.prod(map(int, filter(None, shape.split(",")))) in sizes for shape in shapes)


def count_kernels(hlo: str) -> tuple[int, int]:
    """Return how many kernels a program starts, and how many of them are fusions.

    These are the instructions of the entry, and of what it calls, loops over or branches into, but
    for those that move nothing. A fusion is one kernel, whatever it holds.

    Example:
        >>> hlo = '''
        ... %fused (x: f32[8]) -> f32[8] {
        ...   %x = f32[8]{0} parameter(0)
        ...   ROOT %n = f32[8]{0} negate(%x)
        ... }
        ... %wrapped (x: f32[8]) -> f32[8] {
        ...   %x = f32[8]{0} parameter(0)
        ...   ROOT %f = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused
        ... }
        ... ENTRY %main (g: f32[8]) -> (f32[8], f32[8]) {
        ...   %g = f32[8]{0} parameter(0)
        ...   %a = f32[8]{0} call(%g), to_apply=%wrapped
        ...   %b = (f32[8]{0}, f32[]) fusion(%a), kind=kLoop, calls=%fused.1
        ...   %c = f32[8]{0} copy(%a)
        ...   ROOT %t = (f32[8]{0}, f32[8]{0}) tuple(%a, %c)
        ... }
        ... '''
        >>> count_kernels(hlo)
        (3, 2)
    """
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if found := _COMPUTATION.match(line):
            name = found.group(1)
            bodies[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            bodies[name].append(line)

    def count(name: str) -> np.ndarray:
        total = np.zeros(2, int)
        for line in bodies[name]:
            found = _OPCODE.match(line)
            opcode = found.group(1) if found else "parameter"
            if opcode in _ENTERED:
                for one, several in _CALLED.findall(line):
                    for called in (one or several).split(","):
                        total += count(called.strip(" %"))
            elif opcode not in _FREE:
                total += 1, opcode == "fusion"
        return total

    kernels, fusions = count(entry)
    return int(kernels), int(fusions)
