"""adamx side by side with Optax, and with PyTorch if it is installed: one command, one report.

    python benchmarks/side_by_side.py [--quick] [--markdown docs/benchmarks.md]

Times are compared by ratio, interleaved in one process (see `measure`). Bytes, copies and temporary
memory are read from the compiled programs. A column gives the bar that adamx has set for itself,
and whether it is met.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import Loop, Sample, ratio, stages
from report import (
    ADAMX,
    AGAIN,
    OPTAX,
    QUICK,
    TORCH,
    Meter,
    Settings,
    Table,
    against_optax,
    compile_step,
    elements,
    median,
    normal,
    processors,
    single,
    torch_loop,
    tree,
    verdict,
)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from storages import compiling_storages, memory_of_storages, storages

import adamx
from adamx.inspect.program import Program, read_program

BAR_STEP = 1.0  # of Optax's time, for arrays from BAR_STEP_FROM elements on
BAR_STEP_FROM = 2**24
BAR_TRACING = 0.4  # of Optax's time, from BAR_TRACING_FROM leaves on
BAR_TRACING_FROM = 2000
BAR_EAGER = 0.1  # of Optax's time, from BAR_EAGER_FROM leaves on
BAR_EAGER_FROM = 150


def _pair(what: str) -> tuple[str, str]:
    return f"{what}, {ADAMX}", f"{what}, {OPTAX}"


_RATIOS = (f"{ADAMX} / {OPTAX}", f"{AGAIN} / {OPTAX}")
_TIMES = (*_pair("ms"), *_RATIOS)


def time_steps(
    ours: optax.GradientTransformation,
    theirs: optax.GradientTransformation,
    like: Any,
    settings: Settings,
    meter: Meter,
    what: str,
    with_torch: bool = False,
) -> tuple[dict[str, np.ndarray], dict[str, Program]]:
    """Return the times of the in-place steps of adamx and Optax, and their programs."""
    loops: dict[str, Sample] = {}
    programs: dict[str, Program] = {}
    grads = normal(like, settings.seed + 1)
    for name, tx in {ADAMX: ours, OPTAX: theirs, AGAIN: theirs}.items():
        compiled = compile_step(tx, like)
        programs[name] = read_program(compiled, like)
        params = normal(like, settings.seed)
        loops[name] = Loop(compiled, (params, tx.init(params)), grads, seconds=settings.seconds)
    if with_torch and importlib.util.find_spec("torch"):
        loops[TORCH] = torch_loop(normal(like, settings.seed), grads, settings.seconds)
    return meter(what, loops, settings.rounds), programs


# ------------------------------------------------------------------------------------ the sections


def in_place_step(settings: Settings, meter: Meter) -> list[Table]:
    """Compare AdamW's in-place step: time, and the compiled program."""
    cases = {f"1 array, {size / 2**20:g}M": single(size) for size in settings.sizes}
    many = tree(settings.large, settings.leaves)
    cases[f"{settings.leaves} arrays, {elements(many) / 2**20:.3g}M"] = many
    rows, read = [], []
    for what, like in cases.items():
        times, programs = time_steps(
            adamx.adamw(1e-3), optax.adamw(1e-3), like, settings, meter, f"step: {what}", True
        )
        ours, theirs = programs[ADAMX], programs[OPTAX]
        reached = ratio(times[ADAMX], times[OPTAX]).median
        barred = len(jax.tree.leaves(like)) == 1 and elements(like) >= BAR_STEP_FROM
        rows.append(
            [
                what,
                *(median(times[name], 1e-3) for name in (ADAMX, OPTAX)),
                *(against_optax(times, name) for name in (ADAMX, AGAIN, TORCH)),
                verdict(reached, BAR_STEP) if barred else "",
            ]
        )
        read.append(
            [
                what,
                *(f"{program.bytes_per_param:.5f}" for program in (ours, theirs)),
                *(str(program.copies) for program in (ours, theirs)),
                *(str(program.temp_bytes) for program in (ours, theirs)),
                verdict(ours.copies, 0),
            ]
        )
    return [
        Table(
            "AdamW's step: time",
            f"Params and state donated; {settings.rounds} rounds. PyTorch is "
            f"`torch.optim.AdamW(fused=True)` on {processors()} threads, which sleep when idle.",
            ["float32", *_TIMES, "torch / optax", "bar"],
            rows,
        ),
        Table(
            "AdamW's step: the compiled program",
            "Bytes that the kernels read and write, per parameter; `copy` instructions as large as "
            "a parameter; bytes of temporary memory.",
            ["float32", *_pair("bytes/param"), *_pair("copies"), *_pair("temp"), "bar on copies"],
            read,
        ),
    ]


def network(width: int) -> Any:
    """Return the shapes of a network of three layers."""
    widths = [width, 2 * width, 2 * width, 10]
    return [
        {"w": jax.ShapeDtypeStruct((n, m), jnp.float32), "b": single(m)}
        for n, m in itertools.pairwise(widths)
    ]


def train_step(tx: optax.GradientTransformation, like: Any, batch: int = 96) -> jax.stages.Compiled:
    """Return the compiled train step: loss, gradient, update and apply, in place."""

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"][None])
        return jnp.mean((x @ params[-1]["w"] + params[-1]["b"][None] - y) ** 2)

    def train(params: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    first, last = like[0]["w"].shape[0], like[-1]["w"].shape[1]
    x, y = (jax.ShapeDtypeStruct((batch, n), jnp.float32) for n in (first, last))
    jitted = jax.jit(train, donate_argnums=(0, 1))
    return jitted.lower(like, jax.eval_shape(tx.init, like), x, y).compile()


def inside_training(settings: Settings, meter: Meter) -> list[Table]:
    """Compare AdamW inside a jitted train step: the compiled program."""
    like = network(settings.width)
    task = meter.progress.add_task("train step", total=2)
    programs: dict[str, Program] = {}
    for name, tx in {ADAMX: adamx.adamw(1e-3), OPTAX: optax.adamw(1e-3)}.items():
        programs[name] = read_program(train_step(tx, like), like)
        meter.progress.advance(task)
    bars = {ADAMX: verdict(programs[ADAMX].copies, programs[OPTAX].copies), OPTAX: ""}
    return [
        Table(
            "AdamW inside a jitted train step",
            f"Loss, gradient, update and apply for three layers with {elements(like)} parameters, "
            "in one program; params and state donated.",
            ["float32", "copies", "bytes/param", "temp", "bar on copies"],
            [
                [name, str(p.copies), f"{p.bytes_per_param:.3f}", str(p.temp_bytes), bars[name]]
                for name, p in programs.items()
            ],
        )
    ]


def matrices(params: Any) -> Any:
    """Return the usual mask of weight decay: matrices decay, vectors do not."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def tracing(settings: Settings, meter: Meter) -> list[Table]:
    """Compare how long it takes to trace, lower and compile the step."""
    few, many = f"{settings.leaves} leaves", f"{settings.many} leaves"
    rows = []
    for what, leaves, mask, compiling in (
        (few, settings.leaves, None, True),
        (many, settings.many, None, False),
        (f"{many}, decay masked", settings.many, matrices, False),
    ):
        like = tree(settings.small, leaves)
        ours, theirs = adamx.adamw(1e-3, mask=mask), optax.adamw(1e-3, mask=mask)
        samples = {}
        for name, tx in {ADAMX: ours, OPTAX: theirs, AGAIN: theirs}.items():
            make = functools.partial(adamx.make_step, tx)
            state = jax.eval_shape(tx.init, like)
            samples[name] = stages(make, like, state, like, compiling=compiling)
        times = meter(f"tracing: {what}", samples, settings.slow_rounds)
        parts = {
            "trace": {name: t[:, 0] for name, t in times.items()},
            "lower": {name: t[:, 1] for name, t in times.items()},
            "trace + lower": {name: t[:, 0] + t[:, 1] for name, t in times.items()},
        }
        if compiling:
            parts["compile"] = {name: t[:, 2] for name, t in times.items()}
        for part, of in parts.items():
            barred = part == "trace + lower" and leaves >= BAR_TRACING_FROM
            rows.append(
                [
                    f"{what}: {part}",
                    *(median(of[name]) for name in (ADAMX, OPTAX)),
                    *(against_optax(of, name) for name in (ADAMX, AGAIN)),
                    verdict(ratio(of[ADAMX], of[OPTAX]).median, BAR_TRACING) if barred else "",
                ]
            )
    return [
        Table(
            "Tracing, lowering and compiling AdamW's step",
            f"Leaves of {len(settings.small)} shapes; each time a new jitted function; "
            f"{settings.slow_rounds} rounds. Masked: vectors do not decay.",
            ["float32", *_pair("s"), *_RATIOS, "bar"],
            rows,
        )
    ]


def outside_jit(settings: Settings, meter: Meter) -> list[Table]:
    """Compare `update` called outside jit."""
    rows = []
    for shapes in (settings.small, settings.large):
        like = tree(shapes, settings.leaves)
        params, grads = normal(like, settings.seed), normal(like, settings.seed + 1)
        loops: dict[str, Sample] = {}
        first: dict[str, float] = {}
        ours, theirs = adamx.adamw(1e-3), optax.adamw(1e-3)
        for name, tx in {ADAMX: ours, OPTAX: theirs, AGAIN: theirs}.items():
            update = eager_update(tx, params)
            loop = Loop(update, (tx.init(params), None), grads, seconds=settings.seconds)
            if name != AGAIN:
                jax.clear_caches()
            first[name] = loop.run(1)
            loops[name] = loop
        what = f"{settings.leaves} arrays, {elements(like) / 2**20:.3g}M"
        times = meter(f"outside jit: {what}", loops, settings.slow_rounds)
        reached = ratio(times[ADAMX], times[OPTAX]).median
        rows.append(
            [
                what,
                *(median(times[name], 1e-3) for name in (ADAMX, OPTAX)),
                *(against_optax(times, name) for name in (ADAMX, AGAIN)),
                *(f"{first[name]:.3g}" for name in (ADAMX, OPTAX)),
                verdict(reached, BAR_EAGER) if settings.leaves >= BAR_EAGER_FROM else "",
            ]
        )
    return [
        Table(
            "AdamW's update outside jit",
            f"`tx.update(grads, state, params)` with arrays, nothing donated; "
            f"{settings.slow_rounds} rounds. The first call compiles, with empty caches.",
            ["float32", *_TIMES, *_pair("first call s"), "bar"],
            rows,
        )
    ]


def eager_update(tx: optax.GradientTransformation, params: Any) -> Callable[..., tuple[Any, Any]]:
    """Return the update as a step of a `Loop`: (state, last updates, grads) -> (state, updates)."""

    def update(state: Any, _: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return state, updates

    return update


Pair = tuple[optax.GradientTransformation, optax.GradientTransformation]


def method_pairs() -> dict[str, Pair]:
    """Return the same formula in adamx and in Optax, by the method's name."""
    return {
        "sgd": (adamx.sgd(1e-3), optax.sgd(1e-3)),
        "heavy ball": (adamx.sgd(1e-3, momentum=0.9), optax.sgd(1e-3, momentum=0.9)),
        "nesterov": (
            adamx.sgd(1e-3, momentum=0.9, nesterov=True),
            optax.sgd(1e-3, momentum=0.9, nesterov=True),
        ),
        "momentum": (
            adamx.momentum(1e-3, decay=0.9),
            optax.chain(optax.ema(0.9, debias=False), optax.scale_by_learning_rate(1e-3)),
        ),
        "rmsprop": (adamx.rmsprop(1e-3), optax.rmsprop(1e-3, eps_in_sqrt=False)),
        "adagrad": (adamx.adagrad(1e-3, eps_in_sqrt=True), optax.adagrad(1e-3)),
        "adam": (adamx.adam(1e-3), optax.adam(1e-3)),
    }


def methods(settings: Settings, meter: Meter) -> list[Table]:
    """Compare the steps of the other methods, each against the same formula in Optax."""
    rows = []
    like = single(settings.methods_size)
    for method, (ours, theirs) in method_pairs().items():
        times, programs = time_steps(ours, theirs, like, settings, meter, f"step: {method}")
        pair = programs[ADAMX], programs[OPTAX]
        rows.append(
            [
                method,
                *(median(times[name], 1e-3) for name in (ADAMX, OPTAX)),
                *(against_optax(times, name) for name in (ADAMX, AGAIN)),
                *(f"{program.bytes_per_param:.5f}" for program in pair),
                *(str(program.copies) for program in pair),
            ]
        )
    return [
        Table(
            f"The other methods, 1 array, {settings.methods_size / 2**20:g}M",
            f"The same formula on both sides; params and state donated; {settings.rounds} rounds.",
            ["float32", *_TIMES, *_pair("bytes/param"), *_pair("copies")],
            rows,
        )
    ]


SECTIONS = (
    in_place_step,
    inside_training,
    tracing,
    outside_jit,
    methods,
    storages,
    compiling_storages,
    memory_of_storages,
)


def report(settings: Settings, progress: Progress) -> Iterator[Table]:
    """Run the sections one after the other."""
    meter = Meter(progress, settings.seed)
    for section in SECTIONS:
        yield from section(settings, meter)


# ------------------------------------------------------------------------------------- the command


def environment() -> dict[str, str]:
    """Return the facts on which the figures depend."""
    packages = [p for p in ("adamx", "jax", "jaxlib", "optax", "torch") if _version(p)]
    load = {"load average": f"{os.getloadavg()[1]:.1f}"} if hasattr(os, "getloadavg") else {}
    return {
        "date": datetime.date.today().isoformat(),
        "processor": f"{processor()}, {processors()} cores",
        "device": f"{jax.default_backend()}: {jax.devices()[0].device_kind}",
        "python": platform.python_version(),
        **load,
    } | {package: _version(package) for package in packages}


def _version(package: str) -> str:
    if package == "adamx":
        return adamx.__version__
    return importlib.metadata.version(package) if importlib.util.find_spec(package) else ""


def processor() -> str:
    """Return the processor's name."""
    told = Path("/proc/cpuinfo")
    if told.exists():
        for line in told.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


READING = """\
`a / b` is the median over the rounds of a's time divided by b's in the same round, with the
quartiles of these ratios in brackets. In each round every candidate is measured once, in shuffled
order, in one process; all rounds count, and the garbage collector is off. *optax again* is Optax
compiled a second time: the distance of its ratio from 1 is the resolution of the row. A *bar* is
an upper bound that adamx has set for itself. It is compared with the median as it is: where a ratio
misses it by no more than the resolution or the quartiles, the measurement cannot tell the two
apart. 1M is 2^20.
"""


def markdown(tables: Sequence[Table], settings: Settings) -> str:
    """Return the report as a page."""
    facts = "\n".join(f"- {name}: {value}" for name, value in environment().items())
    return "\n".join(
        [
            "# adamx side by side with Optax",
            "",
            "Written by `python benchmarks/side_by_side.py --markdown docs/benchmarks.md` "
            f"(seed {settings.seed}), not by hand.",
            "",
            facts,
            "",
            READING,
            *(table.markdown() for table in tables),
        ]
    )


def size(text: str) -> int:
    """Return a number of elements, from "4096", "64k" or "16M".

    Example:
        >>> size("64k"), size("1.5M")
        (65536, 1572864)
    """
    unit = {"k": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:])
    return int(float(text[:-1]) * unit) if unit else int(text)


def parse(arguments: Sequence[str] | None = None) -> tuple[Settings, Path | None]:
    """Return the settings, and where to write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small and short, under a minute")
    parser.add_argument("--sizes", nargs="+", type=size, help="sizes of the step, such as 1M 16M")
    parser.add_argument("--rounds", type=int, help="of the steps; slow sections take a twelfth")
    parser.add_argument("--seed", type=int, default=0, help="of the data and of the order")
    parser.add_argument("--markdown", type=Path, help="write the report to this file too")
    options = parser.parse_args(arguments)
    settings = dataclasses.replace(QUICK if options.quick else Settings(), seed=options.seed)
    if options.sizes:
        settings = dataclasses.replace(settings, sizes=tuple(options.sizes))
    if options.rounds:
        slow = max(1, options.rounds // 12)
        settings = dataclasses.replace(settings, rounds=options.rounds, slow_rounds=slow)
    return settings, options.markdown


def main() -> None:
    """Run the command."""
    settings, page = parse()
    start = time.perf_counter()
    console = Console()
    console.width = max(console.width, 160)
    console.print(*(f"{name}: {value}" for name, value in environment().items()), sep="\n")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    tables = []
    with Progress(
        *columns, TimeElapsedColumn(), console=Console(stderr=True), redirect_stdout=False
    ) as progress:
        for table in report(settings, progress):
            tables.append(table)
            console.print("", table.rich())
    console.print(f"\n{READING}\n{time.perf_counter() - start:.0f} s in all")
    if page:
        page.write_text(markdown(tables, settings))


if __name__ == "__main__":
    main()
