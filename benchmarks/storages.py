"""Moments in fewer bytes and parameters in 16 bits: time, traffic and memory of the step."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from measure import Loop, Sample, ratio, stages
from report import (
    AGAIN,
    OPTAX,
    TORCH,
    Meter,
    Settings,
    Table,
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

import adamx
from adamx.inspect.program import read_program

BAR_PACKED16 = 0.65  # of Optax's time, from BAR_FROM elements on
BAR_FROM = 2**26
BAR_BYTES = 24.0  # that packed16 moves for each parameter
BAR_COMPILE = 1.5  # packed16's time to compile, as a multiple of float32's, at 150 leaves

Variant = tuple[Callable[[], optax.GradientTransformation], Any]


def variants() -> dict[str, Variant]:
    """Return what to compare with float32 `optax.adamw`: optimizers and parameters' dtypes."""
    adamw = functools.partial(adamx.adamw, 1e-3)
    found: dict[str, Variant] = {
        name: (functools.partial(adamw, moments=name), jnp.float32)
        for name in ("float32", "bfloat16", "packed16", "packed8")
    }
    for keep in ("remainder", "remainder8", "float32"):
        tx = functools.partial(_with_masters, adamw, keep)
        found[f"bf16 parameters, masters: {keep}"] = (tx, jnp.bfloat16)
    found["bf16 parameters, optax"] = (functools.partial(optax.adamw, 1e-3), jnp.bfloat16)
    return found


def _with_masters(adamw: Callable[[], Any], keep: str) -> adamx.Transformation:
    return adamx.master_weights(adamw(), keep)


def cast(like: Any, dtype: Any) -> Any:
    """Return the shapes, or arrays, in another dtype."""

    def one(x: Any) -> Any:
        shape = jax.ShapeDtypeStruct(x.shape, dtype)
        return shape if isinstance(x, jax.ShapeDtypeStruct) else x.astype(dtype)

    return jax.tree.map(one, like)


def storages(settings: Settings, meter: Meter) -> list[Table]:
    """Compare AdamW's in-place step over the formats of its state and parameters."""
    cases = {f"1 array, {size / 2**20:g}M": single(size) for size in settings.sizes}
    many = tree(settings.large, settings.leaves)
    cases[f"{settings.leaves} arrays, {elements(many) / 2**20:.3g}M"] = many
    tables = []
    for what, like in cases.items():
        programs, loops = {}, {}
        theirs = (functools.partial(optax.adamw, 1e-3), jnp.float32)
        for name, (make, dtype) in {OPTAX: theirs, AGAIN: theirs, **variants()}.items():
            tx, narrow = make(), cast(like, dtype)
            compiled = compile_step(tx, narrow)
            programs[name] = read_program(compiled, like)
            loops[name] = _loop(compiled, tx, narrow, settings)
        if importlib.util.find_spec("torch"):
            params, grads = normal(like, settings.seed), normal(like, settings.seed + 1)
            loops[TORCH] = torch_loop(params, grads, settings.seconds)
        times = meter(f"storages: {what}", loops, settings.rounds)
        rows = []
        for name in times:
            program = programs.get(name)
            beside = [str(ratio(times[name], times[x])) for x in (OPTAX, TORCH) if x in times]
            cells = ["-"] * 4
            if program:
                cells = [
                    f"{state_bytes(name, like):.3g}",
                    f"{program.bytes_per_param:.2f}",
                    str(program.copies),
                    f"{program.temp_bytes / elements(like):.2f}",
                ]
            bar = ""
            if name == "packed16" and elements(like) >= BAR_FROM:
                bar = verdict(ratio(times[name], times[OPTAX]).median, BAR_PACKED16)
            rows.append([name, *cells, median(times[name], 1e-3), *beside, bar])
        torch_column = ["/ torch"] if TORCH in times else []
        tables.append(
            Table(
                f"AdamW's step by storage, {what}",
                "State: bytes of all slots for each parameter; moved: bytes that the kernels read "
                "and write for each parameter; temp: temporary memory for each parameter, in "
                f"bytes. {settings.rounds} rounds; PyTorch's fused AdamW, {processors()} threads.",
                ["", "state", "moved", "copies", "temp", "ms", "/ optax", *torch_column, "bar"],
                rows,
            )
        )
    return tables


def _loop(compiled: jax.stages.Compiled, tx: Any, like: Any, settings: Settings) -> Loop:
    params = jax.tree.map(lambda x, p: x.astype(p.dtype), normal(like, settings.seed), like)
    grads = jax.tree.map(lambda x, p: x.astype(p.dtype), normal(like, settings.seed + 1), like)
    return Loop(compiled, (params, tx.init(params)), grads, seconds=settings.seconds)


def state_bytes(name: str, like: Any) -> float:
    """Return the bytes of all slots for each parameter, counted in the state's arrays."""
    make, dtype = variants().get(name, (functools.partial(optax.adamw, 1e-3), jnp.float32))
    state = jax.eval_shape(make().init, cast(like, dtype))
    slots = [x for x in jax.tree.leaves(state) if x.ndim]
    return sum(x.size * x.dtype.itemsize for x in slots) / elements(like)


def compiling_storages(settings: Settings, meter: Meter) -> list[Table]:
    """Compare how long the step takes to trace, lower and compile."""
    like = tree(settings.small, settings.leaves)
    samples: dict[str, Sample] = {}
    for name, (build, dtype) in variants().items():
        tx, narrow = build(), cast(like, dtype)
        make = functools.partial(adamx.make_step, tx)
        state = jax.eval_shape(tx.init, narrow)
        samples[name] = stages(make, narrow, state, narrow, compiling=True)
    times = meter(f"compiling: {settings.leaves} leaves", samples, settings.slow_rounds)
    rows = []
    for name, t in times.items():
        compiled = ratio(t[:, 2], times["float32"][:, 2])
        bar = verdict(compiled.median, BAR_COMPILE) if name == "packed16" else ""
        traced = ratio(t[:, 0] + t[:, 1], times["float32"][:, 0] + times["float32"][:, 1])
        cells = [median(t[:, 0] + t[:, 1]), str(traced), median(t[:, 2]), str(compiled)]
        rows.append([name, *cells, bar])
    return [
        Table(
            f"Compiling AdamW's step by storage, {settings.leaves} leaves",
            f"Leaves of {len(settings.small)} shapes; each time a new jitted function; "
            f"{settings.slow_rounds} rounds; trace includes lowering.",
            ["", "trace, s", "trace / float32", "compile, s", "compile / float32", "bar"],
            rows,
        )
    ]


def memory_of_storages(settings: Settings, meter: Meter) -> list[Table]:
    """Read the memory of a donated step for a large tree from the compiled program."""
    width = 2**10
    rows = max(1, settings.memory // (8 * width))
    like = {f"layer{i}": jax.ShapeDtypeStruct((rows, width), jnp.float32) for i in range(8)}
    task = meter.progress.add_task("memory", total=len(variants()))
    cells = []
    for name, (build, dtype) in variants().items():
        memory: Any = compile_step(build(), cast(like, dtype)).memory_analysis()
        mib = 2**20
        grads = elements(like) * jnp.dtype(dtype).itemsize
        resident = memory.argument_size_in_bytes - grads
        cells.append(
            [
                name,
                f"{resident / mib:.0f}",
                f"{resident / elements(like):.2f}",
                f"{memory.alias_size_in_bytes / resident:.4f}",
                f"{memory.temp_size_in_bytes / mib:.1f}",
            ]
        )
        meter.progress.advance(task)
    return [
        Table(
            f"Memory of a donated step, {elements(like) / 1e6:.0f}M parameters in 8 arrays",
            "By the compiled program's own count: parameters and state (without the gradients, "
            "which are an argument too), the share of them that is updated in place, and temporary "
            "memory.",
            ["", "parameters + state, MiB", "bytes/param", "in place", "temp, MiB"],
            cells,
        )
    ]
