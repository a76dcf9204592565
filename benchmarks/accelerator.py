"""AdamW's step on an accelerator: how much of the memory's bandwidth it reaches, and its peers.

    python benchmarks/accelerator.py [--quick] [--markdown docs/on-a-gpu.md]

    bandwidth = (parameters, state and gradients read, parameters and state written) / time

The bytes are those that any step has to move, counted in the arrays, not those that its kernels do
move: a step that passes over its arrays twice reaches half. Each candidate is measured interleaved
with Optax's step of the same method and with a copy from device to device, whose bandwidth is the
highest that can be reached. PyTorch's fused AdamW and FlashOptim take part if they are installed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import Loop, ratio
from report import AGAIN, OPTAX, TORCH, Meter, Table, elements, median, torch_loop, tree
from rich.console import Console
from rich.progress import Progress
from side_by_side import environment, size

import adamx
from adamx.inspect.program import count_kernels, read_program

COPY = "copy"
LARGEST_COPY = 2**31  # bytes read; larger ones are not faster


@dataclasses.dataclass(frozen=True)
class Settings:
    """The sizes of the measurements, and how long they last.

    Attributes:
        sizes: numbers of parameters.
        leaves: numbers of arrays that they are split into.
        rounds: of samples.
        seconds: how long a sample lasts.
        seed: of the data, and of the order within the rounds.
    """

    sizes: tuple[int, ...] = (10**6, 10**8, 10**9)
    leaves: tuple[int, ...] = (1, 150)
    rounds: int = 15
    seconds: float = 0.05
    seed: int = 0


QUICK = Settings(sizes=(2**12,), leaves=(2,), rounds=2, seconds=0.0)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An optimizer's step in place.

    Attributes:
        init: makes the state from the parameters.
        step: jitted: (params, state, grads) -> (params, state), the first two donated.
        dtype: of parameters and gradients.
        peer: the name of Optax's step of the same method, which is timed beside it.
        again: bytes a parameter that have to be read twice, since a norm comes before the step.
    """

    init: Callable[[Any], Any]
    step: Any
    dtype: Any = jnp.float32
    peer: str = OPTAX
    again: int = 0

    def lowered(self, shapes: Any) -> jax.stages.Lowered:
        """Return the step traced for parameters of these shapes, to be compiled."""
        return self.step.lower(shapes, jax.eval_shape(self.init, shapes), shapes)


def candidates() -> dict[str, Candidate]:
    """Return the candidates by name, except PyTorch, which does not run in JAX."""

    def of(tx: Any, dtype: Any = jnp.float32, peer: str = OPTAX, again: int = 0) -> Candidate:
        return Candidate(tx.init, adamx.make_step(tx), dtype, peer, again)

    adamw, masters = functools.partial(adamx.adamw, 1e-3), adamx.master_weights
    clipped = adamx.chain(adamx.clip_by_global_norm(1.0), adamw())
    optax_clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    clip, guard, lamb = "optax, clip", "optax, clip and guard", "optax, lamb"
    found = {
        "float32": of(adamw()),
        "packed16": of(adamw(moments="packed16")),
        "packed8": of(adamw(moments="packed8")),
        "bf16, masters": of(masters(adamw()), jnp.bfloat16),
        "bf16, remainder8 and packed8": of(
            masters(adamw(moments="packed8"), "remainder8"), jnp.bfloat16
        ),
        OPTAX: of(optax.adamw(1e-3)),
        "clip": of(clipped, peer=clip, again=4),
        clip: of(optax_clipped, peer=clip, again=4),
        "clip and guard": of(adamx.skip_nonfinite(clipped), peer=guard, again=4),
        guard: of(optax.apply_if_finite(optax_clipped, 3), peer=guard, again=4),
        "lamb": of(adamx.lamb(1e-3), peer=lamb, again=12),
        lamb: of(optax.lamb(1e-3), peer=lamb, again=12),
    }
    if importlib.util.find_spec("flashoptim_jax"):
        found["FlashOptim, float32"] = flash(None, jnp.float32)
        found["FlashOptim, bf16, 24 bits"] = flash(24, jnp.bfloat16)
    return found


def flash(bits: int | None, dtype: Any) -> Candidate:
    """Return FlashOptim's AdamW, on a GPU with its own kernels."""
    from flashoptim_jax import flash_adamw

    tx = flash_adamw(
        1e-3, weight_decay=1e-4, master_weight_bits=bits, fused=jax.default_backend() == "gpu"
    )
    return Candidate(tx.init, jax.jit(tx.step, donate_argnums=(0, 1)), dtype)


# -------------------------------------------------------------------------------- bytes and memory


def bytes_of(*trees: Any) -> int:
    """Return the bytes of all arrays in trees of arrays or of their shapes.

    Example:
        >>> bytes_of(jnp.zeros(3), [jax.ShapeDtypeStruct((2, 2), jnp.bfloat16)])
        20
    """
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trees))


def must_move(params: Any, state: Any) -> int:
    """Return the bytes that a step has to read and write, with gradients like the parameters."""
    return 2 * bytes_of(params, state) + bytes_of(params)


def memory() -> float:
    """Return the bytes of the device's memory; infinity if it does not tell."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit", float("inf"))


# --------------------------------------------------------------------------------------- the loops


def like(parameters: int, leaves: int, dtype: Any) -> dict[str, Any]:
    """Return the shapes of equal vectors with so many elements in all, or a few less."""
    shapes = tree(((parameters // leaves,),), leaves)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)


@functools.partial(jax.jit, static_argnums=(1, 2))
def normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Return standard normal numbers, made on the device."""
    return jax.random.normal(key, shape, dtype)


def filled(shapes: Any, seed: int) -> Any:
    """Return a tree of standard normal numbers."""
    flat, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(flat))
    return treedef.unflatten([normal(k, x.shape, x.dtype) for k, x in zip(keys, flat, strict=True)])


def copy_loop(moved: int, seconds: float) -> tuple[Loop, int]:
    """Return a loop over a copy on the device, and the bytes that it reads and writes."""
    read = min(moved // 2, LARGEST_COPY) // 4 * 4
    copy = jax.jit(lambda x: (jnp.copy(x),))
    return Loop(copy, (jnp.zeros(read // 4, jnp.uint32),), seconds=seconds), 2 * read


class Synchronised:
    """The result of a loop that runs PyTorch on a GPU; `jax.block_until_ready` waits for it."""

    def block_until_ready(self) -> None:
        """Wait for the device."""
        import torch

        torch.cuda.synchronize()


def torch_gpu_loop(shapes: Any, seconds: float) -> Loop:
    """Return PyTorch's fused AdamW on a GPU as a loop."""
    import torch

    sizes = [x.shape for x in jax.tree.leaves(shapes)]
    tensors = [torch.randn(shape, device="cuda") for shape in sizes]
    for tensor in tensors:
        tensor.grad = torch.randn_like(tensor)
    optimizer = torch.optim.AdamW(tensors, lr=1e-3, weight_decay=1e-4, fused=True)

    def step(done: Synchronised) -> tuple[Synchronised]:
        optimizer.step()
        return (done,)

    return Loop(step, (Synchronised(),), seconds=seconds)


def torch_step(shapes: Any, settings: Settings) -> Loop:
    """Return PyTorch's fused AdamW as a loop, on the kind of device that JAX runs on."""
    if jax.default_backend() == "gpu":
        return torch_gpu_loop(shapes, settings.seconds)
    return torch_loop(filled(shapes, 0), filled(shapes, 1), settings.seconds)


def torch_takes_part() -> bool:
    """Say whether PyTorch is installed and runs on the device that JAX runs on."""
    if not importlib.util.find_spec("torch"):
        return False
    import torch

    return jax.default_backend() == "cpu" or torch.cuda.is_available()


def running(
    candidate: Candidate, shapes: Any, compiled: jax.stages.Compiled, settings: Settings
) -> Loop:
    """Return a candidate's compiled step as a loop, with parameters of its own."""
    params = filled(shapes, settings.seed)
    carry = params, candidate.init(params)
    return Loop(compiled, carry, filled(shapes, settings.seed + 1), seconds=settings.seconds)


# --------------------------------------------------------------------------------------- the table

COLUMNS = (
    "",
    "bytes/param",
    "ms",
    "GB/s",
    "of the copy's",
    "time / optax",
    "kernels",
    "fusions",
    "moved/param",
    "copies",
    "temp/param",
    "finite",
)
NOTE = """\
bytes/param: the bytes that a step has to read and write, the gradient twice where its norm comes
first, in LAMB both moments too; ms: the median time of a step; GB/s: these bytes by the time; of
the copy's: this by the bandwidth of a copy of as many bytes (2 GiB read at most) in the same
rounds. From the compiled program: the kernels that it starts, how many of them are fusions, the
bytes that they move, copies of whole parameters, and temporary bytes. finite: whether all
parameters were finite after the last step.""".replace("\n", " ")


def steps(parameters: int, leaves: int, settings: Settings, meter: Meter) -> Table:
    """Measure every candidate on one tree, interleaved with its peer of Optax and with a copy."""
    taking_part = candidates()
    trees = {name: like(parameters, leaves, x.dtype) for name, x in taking_part.items()}
    lowered = [x.lowered(trees[name]) for name, x in taking_part.items()]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        programs = dict(
            zip(taking_part, pool.map(jax.stages.Lowered.compile, lowered), strict=True)
        )

    def looped(name: str) -> Loop:
        return running(taking_part[name], trees[name], programs[name], settings)

    def timed(name: str, peer: str, loop: Loop, moved: int) -> list[str]:
        copying, copied = copy_loop(moved, settings.seconds)
        loops = {name: loop, AGAIN: looped(peer), COPY: copying}
        times = meter(f"{parameters:,} in {leaves}: {name}", loops, settings.rounds)
        share = ratio(times[COPY] / copied, times[name] / moved)
        return [
            median(times[name], 1e-3),
            f"{moved / np.median(times[name]) / 1e9:.4g}",
            f"{share.median:.1%}",
            str(ratio(times[name], times[AGAIN])),
        ]

    def row(name: str, candidate: Candidate | None) -> list[str]:
        """Return the cells of a candidate; None is PyTorch's fused AdamW, in float32."""
        measured = candidate or taking_part[OPTAX]
        shapes = like(parameters, leaves, measured.dtype)
        state = jax.eval_shape(measured.init, shapes)
        moved = must_move(shapes, state) + measured.again * elements(shapes)
        first = [name, f"{moved / elements(shapes):.4g}"]
        copied = min(moved, 2 * LARGEST_COPY)
        if bytes_of(shapes, state, shapes) + 16 * parameters + copied > 0.9 * memory():
            return [*first, "does not fit", *["-"] * (len(COLUMNS) - 3)]
        if candidate is None:
            cells = timed(name, OPTAX, torch_step(shapes, settings), moved)
            return [*first, *cells, *["-"] * (len(COLUMNS) - 6)]
        compiled, loop = programs[name], looped(name)
        cells = timed(name, candidate.peer, loop, moved)
        program = read_program(compiled, shapes)
        finite = all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(loop.carry[0]))
        return [
            *first,
            *cells,
            *map(str, count_kernels(compiled.as_text() or "")),
            f"{program.bytes_per_param:.2f}",
            str(program.copies),
            f"{program.temp_bytes / elements(shapes):.2f}",
            "yes" if finite else "no",
        ]

    rows = [row(name, candidate) for name, candidate in taking_part.items()]
    if torch_takes_part():
        rows.append(row(TORCH, None))
    arrays = f"{leaves} arrays" if leaves > 1 else "one array"
    return Table(f"{parameters:,} parameters in {arrays}", NOTE, COLUMNS, rows)


# ------------------------------------------------------------------------------------- the command


ANSWERS = {
    "float32": "AdamW in float32 takes {} of the time of Optax's.",
    "packed16": 'With `moments="packed16"` it takes {}.',
    "packed8": 'With `moments="packed8"` it takes {}.',
    "bf16, masters": "bfloat16 parameters with masters take {} of the time of Optax's in float32.",
}


def answer(tables: Sequence[Table]) -> str:
    """Say how long AdamW takes beside Optax's: the range of the medians over all tables."""
    medians: dict[str, list[float]] = {}
    for table in tables:
        column = table.columns.index("time / optax")
        for row in table.rows:
            if "[" in row[column]:
                medians.setdefault(row[0], []).append(float(row[column].split()[0]))
    told = []
    for name, sentence in ANSWERS.items():
        if found := medians.get(name):
            least, most = f"{min(found):.2f}", f"{max(found):.2f}"
            told.append(sentence.format(least if least == most else f"{least} to {most}"))
    told.append("The ranges are of the medians in the tables below.")
    return textwrap.fill(" ".join(told), width=100)


def markdown(tables: Sequence[Table], settings: Settings) -> str:
    """Return the report as a page."""
    versions = environment()
    if importlib.util.find_spec("flashoptim_jax"):
        versions["flashoptim-jax"] = importlib.metadata.version("flashoptim-jax")
    facts = "\n".join(f"- {name}: {value}" for name, value in versions.items())
    how = f"""\
In each of {settings.rounds} rounds a candidate, Optax's step of the same method and a copy are each
measured once, in shuffled order: steps in place, one after the other, and the wait for the last.
`time / optax` is the median over the rounds, with the quartiles in brackets. In Optax's rows, a
second compiled copy is timed against the first; its distance from 1 shows the measurement's noise.

Rows without the name of another library are adamx's AdamW, except for `lamb`. `clip`,
`clip and guard` and `lamb` are divided by the row of the same name with `optax`; all others, those
of bfloat16 parameters, FlashOptim and PyTorch too, by `optax`: its AdamW in float32.

Many small arrays take as long as the host needs to hand them over, one after the other: more slots
are more arrays. PyTorch's step is a few kernels for all of them. Layers that are
[stacked for a scan](around-the-update.md#stacked-layers) are few arrays."""
    command = "python benchmarks/accelerator.py --markdown docs/on-a-gpu.md"
    return "\n".join(
        [
            "# Steps measured on a GPU",
            "",
            answer(tables),
            "",
            f"Written by `{command}` (seed {settings.seed}), not by hand.",
            "",
            facts,
            "",
            how,
            "",
            *(table.markdown() for table in tables),
        ]
    )


def parse(arguments: Sequence[str] | None = None) -> tuple[Settings, Path | None]:
    """Return the settings, and where to write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    parser.add_argument("--sizes", nargs="+", type=size, help="parameters, such as 1M 1000000")
    parser.add_argument("--leaves", nargs="+", type=int, help="arrays that they are split into")
    parser.add_argument("--rounds", type=int, help="of samples")
    parser.add_argument("--seed", type=int, default=0, help="of the data and of the order")
    parser.add_argument("--markdown", type=Path, help="write the report to this file too")
    options = parser.parse_args(arguments)
    settings = QUICK if options.quick else Settings()
    settings = dataclasses.replace(
        settings,
        sizes=tuple(options.sizes or settings.sizes),
        leaves=tuple(options.leaves or settings.leaves),
        rounds=options.rounds or settings.rounds,
        seed=options.seed,
    )
    return settings, options.markdown


def main(arguments: Sequence[str] | None = None) -> list[Table]:
    """Run the command; return the tables."""
    settings, page = parse(arguments)
    # leave memory for PyTorch
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    console = Console()
    console.width = max(console.width, 160)
    tables = []
    with Progress(console=Console(stderr=True), redirect_stdout=False) as progress:
        meter = Meter(progress, settings.seed)
        for parameters in settings.sizes:
            for leaves in settings.leaves:
                tables.append(steps(parameters, leaves, settings, meter))
                console.print("", tables[-1].rich())
                if page:  # the tables so far are kept if a later one fails
                    page.write_text(markdown(tables, settings))
    return tables


if __name__ == "__main__":
    main()
