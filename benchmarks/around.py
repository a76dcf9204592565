"""The cost of clip, guard, micro-batches and statistics around AdamW's update, as multiples of it.

python benchmarks/around.py [--quick] [--markdown docs/around-benchmarks.md]
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import Loop, Sample, ratio
from report import (
    QUICK,
    Meter,
    Settings,
    Table,
    compile_step,
    elements,
    median,
    normal,
    single,
    tree,
    verdict,
)
from rich.console import Console
from rich.progress import Progress
from side_by_side import environment

import adamx
from adamx.inspect.program import Program, read_program

EVERY = 4
ALONE, AGAIN = "adamw alone", "adamw again"
CLIP, GUARD, BOTH = "clip at the head", "guard", "guard and clip"
MICRO, FINAL, IN_JIT = (
    "accumulate: micro-step",
    "accumulate: final step",
    "accumulate, in one program",
)
AVERAGE = "ema_of_params"
BETWEEN, MEASURING = "monitor: step between", "monitor: measuring step"
BARS = {CLIP: 1.25, GUARD: 1.25, BOTH: 1.25, MICRO: 0.5, FINAL: 1.6}  # of AdamW alone

Step = tuple[jax.stages.Compiled, Callable[[Any], tuple[Any, ...]], Callable[..., tuple[Any, ...]]]


def transformations() -> dict[str, optax.GradientTransformation]:
    """Return the transformations whose steps are one program, by name."""
    adamw = functools.partial(adamx.adamw, 1e-3)
    clip = adamx.clip_by_global_norm(1.0, record=True)
    theirs = optax.adamw(1e-3)
    return {
        ALONE: adamw(),
        AGAIN: adamw(),
        CLIP: adamx.chain(clip, adamw()),
        GUARD: adamx.skip_nonfinite(adamw()),
        BOTH: adamx.skip_nonfinite(adamx.chain(clip, adamw())),
        IN_JIT: adamx.accumulate(adamw(), EVERY),
        AVERAGE: adamx.chain(adamw(), adamx.ema_of_params(0.999)),
        "optax.adamw": theirs,
        "optax: clip_by_global_norm": optax.chain(optax.clip_by_global_norm(1.0), theirs),
        "optax: apply_if_finite": optax.apply_if_finite(theirs, 10),
        f"optax: MultiSteps({EVERY})": _multi_steps(theirs),
        "optax: adamw and params_ema": optax.chain(theirs, optax.ema(0.999)),
    }


def _multi_steps(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    steps = optax.MultiSteps(tx, EVERY)
    return optax.GradientTransformation(steps.init, steps.update)  # pyright: ignore


def compiled_steps(like: Any) -> dict[str, Step]:
    """Return each step: compiled, a function that makes its first carry, and one that calls it."""
    found: dict[str, Step] = {}
    for name, tx in transformations().items():
        compiled = compile_step(tx, like)
        found[name] = compiled, lambda params, tx=tx: (params, tx.init(params)), compiled
    tx = adamx.accumulate(adamx.adamw(1e-3), EVERY)
    step = adamx.make_step(tx)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    state = tx.init(zeros)

    adding = step.lower(zeros, state, zeros).compile()

    def kept(params: Any) -> tuple[Any, ...]:
        fresh = tx.init(params)
        return ({name: fresh[name] for name in ("count", "accumulated", "micro_step")},)

    found[MICRO] = adding, kept, lambda kept, grads: (adding(None, kept, grads)[1],)
    last = adamx.accumulate(adamx.adamw(1e-3), 1)  # the same program; every step is final
    closing = compile_step(last, like)
    found[FINAL] = closing, lambda params: (params, last.init(params)), closing

    seldom = adamx.monitor(adamx.adamw(1e-3), 2**30)
    unmeasured = adamx.make_step(seldom)
    program = unmeasured.lower(zeros, seldom.init(zeros), zeros).compile()
    found[BETWEEN] = program, lambda params: (params, seldom.init(params)), unmeasured

    watched = adamx.monitor(adamx.adamw(1e-3), EVERY)
    measured = adamx.make_step(watched)
    is_due = {"monitor_step": np.int32(EVERY - 1)}

    def due(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        return measured(params, state | is_due, grads)

    measuring = measured.lower(zeros, watched.init(zeros) | is_due, zeros).compile()
    found[MEASURING] = measuring, lambda params: (params, watched.init(params)), due
    return found


def both(first: Program, then: Program) -> Program:
    """Return the numbers of two programs that run one after the other."""
    return Program(
        first.bytes_per_param + then.bytes_per_param,
        first.always + then.always,
        first.large + then.large,
        first.copies + then.copies,
        max(first.temp_bytes, then.temp_bytes),
    )


def around(settings: Settings, meter: Meter) -> list[Table]:
    """Compare AdamW's in-place step, with something around it, with AdamW alone."""
    many = tree(settings.large, settings.leaves)
    cases = {
        f"1 array, {settings.around_size / 2**20:g}M": single(settings.around_size),
        f"{settings.leaves} arrays, {elements(many) / 2**20:.3g}M": many,
    }
    tables = []
    for what, like in cases.items():
        programs: dict[str, Program] = {}
        loops: dict[str, Sample] = {}
        grads = normal(like, settings.seed + 1)
        for name, (compiled, first, step) in compiled_steps(like).items():
            programs[name] = read_program(compiled, like)
            carry = first(normal(like, settings.seed))
            loops[name] = Loop(step, carry, grads, seconds=settings.seconds)
        programs[MEASURING] = both(programs[MEASURING], programs[BETWEEN])
        times = meter(f"around: {what}", loops, settings.rounds)
        rows = []
        for name, program in programs.items():
            of = ratio(times[name], times[ALONE])
            rows.append(
                [
                    name,
                    median(times[name], 1e-3),
                    "" if name == ALONE else str(of),
                    f"{program.always:.2f}",
                    f"{program.bytes_per_param:.2f}",
                    str(program.copies),
                    verdict(of.median, BARS[name]) if name in BARS else "",
                ]
            )
        tables.append(
            Table(
                f"Around AdamW's step: {what}",
                "In place, gradients of ordinary size; the multiples are of adamx's AdamW alone. "
                "bytes/param: read and written in every step; with branches: those of a branch "
                "too, by the side that moves most. micro-step and final step are the two programs "
                f"of `make_step` for `accumulate`; {EVERY} gradients make a step. The step between "
                "is one of its two programs for `monitor`, with a group for each array; the "
                "measuring step is the other, and then that one.",
                ["float32", "ms", "/ adamw alone", "bytes/param", "with branches", "copies", "bar"],
                rows,
            )
        )
    return tables


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small and short")
    parser.add_argument("--markdown", type=Path, help="write the report to this file too")
    options = parser.parse_args()
    settings = QUICK if options.quick else Settings()
    console = Console()
    with Progress(console=Console(stderr=True), redirect_stdout=False) as progress:
        tables = around(settings, Meter(progress, settings.seed))
    console.print(*(table.rich() for table in tables))
    if options.markdown:
        options.markdown.write_text(page(tables, settings))


def page(tables: Sequence[Table], settings: Settings) -> str:
    """Return the report as a page."""
    facts = "\n".join(f"- {name}: {value}" for name, value in environment().items())
    return "\n".join(
        [
            "# Around the update, measured",
            "",
            "Written by `python benchmarks/around.py --markdown docs/around-benchmarks.md` "
            f"({settings.rounds} rounds, seed {settings.seed}), not by hand.",
            "",
            facts,
            "",
            "`/ adamw alone` is the median over the rounds of a time divided by the time of "
            "adamx's AdamW in the same round, with the quartiles of these ratios in brackets. In "
            "each round every step is measured once, in shuffled order, in one process.",
            "",
            *(table.markdown() for table in tables),
        ]
    )


if __name__ == "__main__":
    main()
