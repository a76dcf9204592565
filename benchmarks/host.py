"""What a large tree costs on the host: compiling a step, and everything that visits each leaf.

    python benchmarks/host.py [--quick] [--markdown docs/host-benchmarks.md]
                              [--compile] [--scale] [--imports] [--leaves 150,300] [--rounds 3]
                              [--only WORD]

`--compile` traces, lowers and compiles the in-place step of each configuration beside Optax's
equivalent, interleaved in one process, and prints the ratios. `--scale` times what grows with the
number of leaves, and prints the exponent of the growth: 1 is linear. `--imports` imports adamx and
Optax, each in a process of its own. Without any of these, all.

Times are those of the processor: the machine may be shared. Nothing is cached between two samples.
It takes twenty minutes on one core, most of it for compiling.
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import interleave, ratio
from report import Table, compile_step, verdict
from rich.console import Console
from side_by_side import environment
from storages import cast

import adamx

Make = Callable[[], optax.GradientTransformation]

TEXT = """\
The leaves are those of a transformer whose layers are separate leaves: matrices of three shapes
and vectors of two. All times are seconds of the processor.

XLA's time to compile for a CPU is proportional to the instructions of all leaves together: it makes
the machine code of equal kernels once, but runs its other passes over each of them. A storage that
encodes two averages in one word has several times AdamW's instructions, and takes several times as
long to compile: once, not in each step. From some 2000 leaves on, XLA's time grows faster than the
tree, for Optax's step as for adamx's: some of its passes compare each kernel with every other. No
step of 20000 leaves could be compiled, Optax's or adamx's, within 24 GiB of memory. What adamx does
itself grows with the tree.

Layers that are stacked, as a `scan` over layers wants them, make one leaf of each weight, whatever
the number of layers. So nothing here grows with the layers, and
[`stacked`](around-the-update.md#stacked-layers) computes each statistic for every layer.
"""

BARS = {  # of the time of everything, from tracing to compiling
    "adamw": 1.0,
    "clip, mask": 1.0,
    "two groups": 1.0,
    "packed16 / float32": 1.2,
    "packed8, remainder8 / float32": 3.0,
}

WIDTH = 64
BLOCK = {  # a transformer's shapes, scaled down: compiling does not depend on the sizes
    "attn": {name: (WIDTH, WIDTH) for name in ("q", "k", "v", "o")},
    "mlp": {"up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH), "bias": (4 * WIDTH,)},
    "norm1": {"scale": (WIDTH,), "bias": (WIDTH,)},
    "norm2": {"scale": (WIDTH,), "bias": (WIDTH,)},
}


def transformer(leaves: int) -> dict[str, Any]:
    """Return the shapes of a transformer with so many float32 leaves."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    layers = -(-leaves // 11)
    blocks = {f"layer{i:04d}": BLOCK for i in range(layers)}
    flat, treedef = jax.tree.flatten(blocks, is_leaf=lambda x: isinstance(x, tuple))
    kept: list[Any] = [shape(x) if i < leaves else None for i, x in enumerate(flat)]
    return treedef.unflatten(kept)


def matrices(params: Any) -> Any:
    """Return the usual mask of weight decay: matrices decay, vectors do not."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def labels(params: Any) -> Any:
    """Return Optax's labels of the two groups."""
    return jax.tree.map_with_path(
        lambda path, _: "bias" if "bias" in jax.tree_util.keystr(path) else "default", params
    )


# ---------------------------------------------------------------------------------- compiling


def pairs() -> dict[str, tuple[Make, Make, Any]]:
    """Return what to compile: adamx's optimizer, what it is compared with, and the dtype."""
    adamw = functools.partial(adamx.adamw, 1e-3)
    theirs = functools.partial(optax.adamw, 1e-3)
    bf16, f32 = jnp.bfloat16, jnp.float32
    return {
        "adamw": (adamw, theirs, f32),
        "clip, mask": (
            lambda: adamx.chain(adamx.clip_by_global_norm(1.0), adamw(mask=matrices)),
            lambda: optax.chain(optax.clip_by_global_norm(1.0), theirs(mask=matrices)),
            f32,
        ),
        "two groups": (
            lambda: adamx.by_path({"*bias": adamw(weight_decay=0.0)}, default=adamw()),
            lambda: optax.partition(
                {"bias": theirs(weight_decay=0.0), "default": theirs()}, labels
            ),
            f32,
        ),
        "packed16 / float32": (functools.partial(adamw, moments="packed16"), adamw, f32),
        "packed8 / float32": (functools.partial(adamw, moments="packed8"), adamw, f32),
        "packed8, remainder8 / float32": (
            lambda: adamx.master_weights(adamw(moments="packed8"), "remainder8"),
            adamw,
            (bf16, f32),
        ),
    }


def stages(make: Make, like: Any) -> Callable[[], tuple[float, ...]]:
    """Return a candidate that times tracing, lowering and compiling the in-place step, anew."""

    def sample() -> tuple[float, ...]:
        jax.clear_caches()
        gc.collect()
        tx = make()
        state = jax.eval_shape(tx.init, like)
        step = adamx.make_step(tx)
        clock = [time.process_time()]
        traced: Any = step.trace(like, state, like)  # pyright: ignore
        clock.append(time.process_time())
        lowered = traced.lower()
        clock.append(time.process_time())
        lowered.compile()
        clock.append(time.process_time())
        return (*np.diff(clock), clock[-1] - clock[0])

    return sample


def compiling(leaves: tuple[int, ...], rounds: int, only: str) -> Table:
    """Compare compiling the step."""
    rows = []
    for count in leaves:
        for name, (ours, theirs, dtypes) in pairs().items():
            if only not in name:
                continue
            mine, other = dtypes if isinstance(dtypes, tuple) else (dtypes, dtypes)
            like = transformer(count)
            candidates = {
                "ours": stages(ours, cast(like, mine)),
                "theirs": stages(theirs, cast(like, other)),
            }
            times = interleave(candidates, rounds=rounds, seed=0)
            cells, of = [name, str(count)], 0.0
            for part in range(4):
                both = [times[x][:, part] for x in ("ours", "theirs")]
                of = ratio(*both).median
                cells += [f"{np.median(both[0]):.2f} / {np.median(both[1]):.2f}", f"{of:.2f}"]
            cells.append(verdict(of, BARS[name]) if name in BARS else "")
            sides = (ours, cast(like, mine)), (theirs, cast(like, other))
            cells.append(" / ".join(f"{instructions(*side) / count:.0f}" for side in sides))
            rows.append(cells)
            print(*cells, flush=True)
    parts = [
        f"{part}, {x}" for part in ("trace", "lower", "compile", "all") for x in ("s", "ratio")
    ]
    note = (
        "The in-place step; adamx / Optax unless the row says more. The bar is for the ratio of "
        "all. Instructions: of the compiled program, for each leaf."
    )
    return Table(
        "Compiling the step", note, ["float32", "leaves", *parts, "bar", "instructions"], rows
    )


def instructions(make: Make, like: Any) -> int:
    """Return the number of instructions of the compiled step."""
    return (compile_step(make(), like).as_text() or "").count(" = ")


def importing(rounds: int) -> Table:
    """Compare the import of the two libraries; both import JAX."""
    program = "import resource, {}; print(resource.getrusage(resource.RUSAGE_SELF).ru_utime)"
    empty = program.format("sys")

    def sample(line: str) -> Callable[[], float]:
        return lambda: float(subprocess.check_output([sys.executable, "-c", line]))

    lines = {name: program.format(name) for name in ("adamx", "optax")}
    candidates = {name: sample(line) for name, line in {**lines, "nothing": empty}.items()}
    times = interleave(candidates, rounds=rounds, seed=0)
    ours, theirs = (times[name] - np.median(times["nothing"]) for name in lines)
    row = ["import", f"{np.median(ours):.2f} / {np.median(theirs):.2f}", str(ratio(ours, theirs))]
    note = "Each in a process of its own, which takes `import jax` along; adamx / Optax."
    return Table("Importing", note, ["", "s", "ratio"], [row])


# ------------------------------------------------------------------------------------- growing


def filled(like: Any) -> Any:
    """Return a tree of small arrays with the structure of another one."""
    return jax.tree.map(lambda _: jnp.ones(2), like)


def host_work() -> dict[str, tuple[Callable[[Any], Callable[[], Any]], int]]:
    """Return what visits every leaf: the call to time for a tree, and its largest size."""
    tx, theirs = adamx.adamw(1e-3), optax.adamw(1e-3)

    def masked(module: Any) -> Any:
        def prepared(like: Any) -> Any:
            mask = matrices(like)
            return lambda: module.adamw(1e-3, mask=mask)

        return prepared

    def groups_of_one(like: Any) -> Any:
        names = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in leaves_of(like)]
        return lambda: adamx.by_path(dict.fromkeys(names, tx), default=tx)

    def init(tx: Any) -> Any:
        return lambda like: lambda: jax.eval_shape(tx.init, like)

    def concrete(tx: Any) -> Any:
        def prepared(like: Any) -> Any:
            params = filled(like)
            return lambda: jax.block_until_ready(tx.init(params))

        return prepared

    def jitted(tx: Any) -> Any:
        return lambda like: lambda: jax.jit(tx.init).trace(like)

    def trace(tx: Any) -> Any:
        def prepared(like: Any) -> Any:
            state = jax.eval_shape(tx.init, like)
            return lambda: adamx.make_step(tx).trace(like, state, like)  # pyright: ignore

        return prepared

    def lower(tx: Any) -> Any:
        def prepared(like: Any) -> Any:
            state = jax.eval_shape(tx.init, like)
            traced: Any = adamx.make_step(tx).trace(like, state, like)  # pyright: ignore
            return traced.lower

        return prepared

    def compiled(tx: Any) -> Any:
        def prepared(like: Any) -> Any:
            state = jax.eval_shape(tx.init, like)
            lowered: Any = adamx.make_step(tx).lower(like, state, like)
            return lowered.compile

        return prepared

    def grown(like: Any) -> Any:
        small, large = filled(like), jax.tree.map(lambda _: jnp.ones(3), like)
        state = tx.init(small)
        return lambda: adamx.adapt_state(tx, large, state, rows={"*": 0})

    def layout(like: Any) -> Any:
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like
        )
        return lambda: adamx.state_sharding(tx, placed)

    def adapted(like: Any) -> Any:
        params = filled(like)
        state = adamx.sgd(1e-3, momentum=0.9).init(params)
        return lambda: adamx.adapt_state(tx, params, state)

    def compared(like: Any) -> Any:
        params = filled(like)
        return lambda: adamx.compare(tx, theirs, params, [params])

    def audited(like: Any) -> Any:
        params = filled(like)
        step, state = adamx.make_step(tx), tx.init(params)
        return lambda: adamx.audit(step, params, state, params)

    leaves_of = jax.tree_util.tree_leaves_with_path
    clip = adamx.chain(adamx.clip_by_global_norm(1.0), adamx.adamw(1e-3, mask=matrices))
    groups = adamx.by_path({"*bias": adamx.sgd(1e-3)}, default=tx)
    watched = adamx.monitor(tx, every=100)
    # compiling more takes XLA many minutes, Optax's step as well, and `compare` compiles both
    most, some, few = 20000, 6000, 2000
    return {
        "construct, a mask as a tree": (masked(adamx), most),
        "construct, a mask as a tree, optax": (masked(optax), most),
        "construct, a group for each leaf": (groups_of_one, most),
        "eval_shape(init)": (init(tx), most),
        "eval_shape(init), optax": (init(theirs), most),
        "traced init": (jitted(tx), most),
        "traced init, optax": (jitted(theirs), most),
        "init": (concrete(tx), most),
        "init, optax": (concrete(theirs), most),
        "trace": (trace(tx), most),
        "trace, optax": (trace(theirs), most),
        "lower": (lower(tx), most),
        "lower, optax": (lower(theirs), most),
        "compile": (compiled(tx), some),
        "compile, optax": (compiled(theirs), some),
        "trace, clip and mask": (trace(clip), most),
        "trace, two groups": (trace(groups), most),
        "monitor: eval_shape(init)": (init(watched), most),
        "monitor: trace": (trace(watched), most),
        "summary": (lambda like: lambda: str(adamx.summary(tx, like)), most),
        "state_sharding": (layout, most),
        "adapt_state": (adapted, most),
        "adapt_state, rows": (grown, most),
        "compare": (compared, few),
        "audit": (audited, some),
    }


def growing(leaves: tuple[int, ...], only: str) -> Table:
    """Time what visits every leaf, and the exponent of its growth between the last two sizes."""
    rows = []
    for name, (prepare, most) in host_work().items():
        if only not in name:
            continue
        times: dict[int, float] = {}
        for count in (n for n in leaves if n <= most):
            jax.clear_caches()
            gc.collect()
            call = prepare(transformer(count))
            start = time.process_time()
            call()
            times[count] = time.process_time() - start
        rows.append(
            [name, *(f"{times[n]:.3g}" if n in times else "" for n in leaves), _growth(times)]
        )
        print(*rows[-1], flush=True)
    heads = ["seconds", *(f"{count} leaves" for count in leaves), "exponent"]
    note = "Each once, with empty caches. The exponent is that between the last two sizes."
    return Table("What grows with the leaves", note, heads, rows)


def _growth(times: dict[int, float]) -> str:
    *_, (few, short), (many, long) = times.items()
    return f"{math.log(long / short) / math.log(many / few):.2f}"


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--scale", action="store_true")
    parser.add_argument("--imports", action="store_true")
    parser.add_argument("--leaves", default="")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="")
    parser.add_argument("--quick", action="store_true", help="small and short")
    parser.add_argument("--markdown", type=Path, help="write the report to this file too")
    given = parser.parse_args()
    every = not (given.compile or given.scale or given.imports)
    numbers = tuple(int(n) for n in given.leaves.split(",") if n)
    short, long, rounds = (150, 1000), (300, 1000, 2000, 6000, 20000), given.rounds
    if given.quick:
        short, long, rounds = (20,), (20, 40), 1

    def tables() -> Iterator[Table]:
        if given.imports or every:
            yield importing(1 if given.quick else max(rounds, 11))
        if given.compile or every:
            yield compiling(numbers or short, rounds, given.only)
        if given.scale or every:
            yield growing(numbers or long, given.only)

    made = list(tables())
    for table in made:
        Console(width=160).print(table.markdown())
    if given.markdown:
        given.markdown.write_text(page(made))


def page(tables: Sequence[Table]) -> str:
    """Return the report as a page."""
    facts = "\n".join(f"- {name}: {value}" for name, value in environment().items())
    return "\n".join(
        [
            "# What a large tree costs on the host",
            "",
            "Written by `python benchmarks/host.py --markdown docs/host-benchmarks.md`, not by "
            "hand.",
            "",
            facts,
            "",
            TEXT,
            *(table.markdown() for table in tables),
        ]
    )


if __name__ == "__main__":
    main()
