"""Every kind of step compiled for a GPU and a TPU, without one: what its kernels move.

    JAX_PLATFORMS=cpu python benchmarks/ahead_of_time.py [--markdown docs/accelerators.md]

It needs `pip install '.[accelerators,examples]'` and takes a quarter of an hour, or half of that
with `--jobs 2` and enough processors. The steps are compiled by the compilers of an H100 and of
TPUs: those of one large array, of trees of many arrays, and of a tree with 7e9 parameters over many
chips. The floor is what any step has to move: parameters and slots read and written once, gradients
read once, and once more where a norm or a guard has to know all of them before the first is used.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU here to ask about
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # by several processes

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from report import Table
from rich.console import Console
from rich.progress import track

import adamx
from adamx.inspect.program import Program, count_kernels, read_program
from adamx.inspect.text import Text

SIZE = 2**27  # of bytes at least: a TPU keeps smaller arrays on its chip, of 128 MiB
DEVICES = ("H100", "TPU v5e")
# what XLA's cost model asks about a card, from NVIDIA's data sheet and cudaDeviceProp
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  device_memory_size: 84942979072
  memory_bandwidth: 3352320000000
  clock_rate_ghz: 1.98
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 8 }
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


# ------------------------------------------------------------------------------------- the devices


def missing() -> str:
    """Return which packages are not installed that the compilers need; "" if all are."""
    needed = ("jax_cuda12_plugin", "libtpu")
    return ", ".join(name for name in needed if importlib.util.find_spec(name) is None)


@functools.cache
def device(name: str) -> Any:
    """Return a device that is not there, for which the compilers compile."""
    if name == "H100":
        found = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    else:
        found = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    return found.devices[0]


# --------------------------------------------------------------------------------------- the steps


def optax_step(tx: Any, out_shardings: Any = None) -> Any:
    """Return Optax's own step, in place."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1), out_shardings=out_shardings)


def is_shape(x: Any) -> bool:
    """Say whether a node of a tree of shapes is one of them."""
    return isinstance(x, tuple)


def with_numbers(state: Any, numbers: Mapping[str, int]) -> Any:
    """Return a state in which these entries are numbers."""
    return state | {name: np.int32(x) for name, x in numbers.items()} if numbers else state


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the page.

    Attributes:
        make: returns the transformation.
        dtype: of parameters and gradients.
        reread: whether every gradient has to be known before the first is used.
        step: makes the step.
        floor: bytes a parameter; None counts parameters, slots and gradients.
        numbers: entries of the state, by which `make_step` chooses among its programs.
    """

    make: Callable[[], Any]
    dtype: Any = jnp.float32
    reread: bool = False
    step: Callable[[Any], Any] = adamx.make_step
    floor: float | None = None
    numbers: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def arguments(self, where: Any, shapes: Any = (SIZE,)) -> tuple[Any, ...]:
        """Return parameters, state and gradients of a tree of shapes on a device, without data."""
        sharding = SingleDeviceSharding(where)
        params = jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, self.dtype), shapes, is_leaf=is_shape
        )
        state = jax.eval_shape(self.make().init, params)
        params, state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), (params, state)
        )
        return params, with_numbers(state, self.numbers), params

    def least(self) -> float:
        """Return the bytes a parameter that any step has to move."""
        if self.floor is not None:
            return self.floor
        params, state, grads = self.arguments(jax.devices()[0])
        size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
        moved = 2 * size(params) + 2 * size(state) + (1 + self.reread) * size(grads)
        return round(moved / SIZE, 2)

    def compiled(self, name: str, shapes: Any = (SIZE,)) -> jax.stages.Compiled:
        """Compile the step of a tree of shapes for a device."""
        return self.step(self.make()).lower(*self.arguments(device(name), shapes)).compile()

    def read(self, name: str) -> Program:
        """Compile the step of one array for a device and read it."""
        return read_program(self.compiled(name), jax.ShapeDtypeStruct((SIZE,), self.dtype))


A = functools.partial(adamx.adamw, 1e-3)
CLIP = functools.partial(adamx.clip_by_global_norm, 1.0)
M, GUARD = adamx.master_weights, adamx.skip_nonfinite
HALF: dict[str, Any] = {"dtype": jnp.bfloat16}
PLAIN: dict[str, Any] = {"step": optax_step}


def clipped(**options: Any) -> Any:
    """Return AdamW behind a clip."""
    return adamx.chain(CLIP(), A(**options))


def optax_clipped() -> Any:
    """Return Optax's AdamW behind its clip."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


CASES = {
    "adamw": Case(A),
    "optax.adamw": Case(lambda: optax.adamw(1e-3), **PLAIN),
    "packed16": Case(lambda: A(moments="packed16")),
    "packed8": Case(lambda: A(moments="packed8")),
    "bfloat16": Case(lambda: A(moments="bfloat16")),
    "clip and adamw": Case(clipped, reread=True),
    "optax: clip and adamw": Case(optax_clipped, reread=True, **PLAIN),
    "skip_nonfinite(adamw)": Case(lambda: GUARD(A()), reread=True),
    "optax.apply_if_finite(adamw)": Case(
        lambda: optax.apply_if_finite(optax.adamw(1e-3), 3), reread=True, **PLAIN
    ),
    "skip_nonfinite(clip and adamw)": Case(lambda: GUARD(clipped()), reread=True),
    "skip_spikes(clip and adamw)": Case(lambda: adamx.skip_spikes(clipped()), reread=True),
    "clip_to_history and adamw": Case(
        lambda: adamx.chain(adamx.clip_to_history(), A()), reread=True
    ),
    "clip_by_zscore and adamw": Case(lambda: adamx.chain(adamx.clip_by_zscore(), A()), reread=True),
    "accumulate, final step": Case(lambda: adamx.accumulate(A(), 4)),
    "optax.MultiSteps": Case(
        lambda: optax.MultiSteps(optax.adamw(1e-3), 4).gradient_transformation(), **PLAIN
    ),
    "lamb": Case(lambda: adamx.lamb(1e-3), floor=40),
    "optax.lamb": Case(lambda: optax.lamb(1e-3), floor=40, **PLAIN),
    "monitor, measuring": Case(
        lambda: adamx.monitor(A(), 100), floor=16, numbers={"monitor_step": 99}
    ),
    "cautious_adamw": Case(lambda: adamx.cautious_adamw(1e-3), floor=36),
    "stable_adamw": Case(lambda: adamx.stable_adamw(1e-3), floor=36),
    "adan": Case(lambda: adamx.adan(1e-3)),
    "optax.adan": Case(lambda: optax.adan(1e-3), **PLAIN),
    "lion": Case(lambda: adamx.lion(1e-4)),
    "schedule_free_adamw": Case(lambda: adamx.schedule_free_adamw(1e-3)),
    "bf16: adamw": Case(A, **HALF),
    "bf16: optax.adamw": Case(lambda: optax.adamw(1e-3), **HALF, **PLAIN),
    "bf16: stochastic rounding": Case(
        A, **HALF, step=lambda tx: adamx.make_step(tx, rounding="stochastic")
    ),
    "bf16: clip and adamw": Case(clipped, reread=True, **HALF),
    "bf16: optax: clip and adamw": Case(optax_clipped, reread=True, **HALF, **PLAIN),
    "bf16: skip_nonfinite(adamw)": Case(lambda: GUARD(A()), reread=True, **HALF),
    "bf16: skip_spikes(clip and adamw)": Case(
        lambda: adamx.skip_spikes(clipped()), reread=True, **HALF
    ),
    "bf16: clip_to_history and adamw": Case(
        lambda: adamx.chain(adamx.clip_to_history(), A()), reread=True, **HALF
    ),
    "bf16: masters": Case(lambda: M(A()), **HALF),
    "bf16: masters, remainder8": Case(lambda: M(A(), "remainder8"), **HALF),
    "bf16: masters, float32": Case(lambda: M(A(), "float32"), **HALF),
    "bf16: masters and packed16": Case(lambda: M(A(moments="packed16")), **HALF),
    "bf16: masters, remainder8 and packed8": Case(
        lambda: M(A(moments="packed8"), "remainder8"), **HALF
    ),
    "bf16: masters(clip and adamw)": Case(lambda: M(clipped()), reread=True, **HALF),
    "bf16: masters(lamb)": Case(lambda: M(adamx.lamb(1e-3)), floor=38, **HALF),
    "bf16: accumulate(masters), final step": Case(lambda: adamx.accumulate(M(A()), 4), **HALF),
    "bf16: guard(masters(clip and packed8)), remainder8": Case(
        lambda: GUARD(M(clipped(moments="packed8"), "remainder8")), reread=True, **HALF
    ),
}

# these work on matrices
OF_TREES = CASES | {
    "adafactor": Case(lambda: adamx.adafactor(1e-3)),
    "optax.adafactor": Case(lambda: optax.adafactor(1e-3), **PLAIN),
    "muon_adamw": Case(lambda: adamx.muon_adamw(1e-3)),
    "optax.contrib.muon": Case(lambda: optax.contrib.muon(1e-3), **PLAIN),
}


# -------------------------------------------------------------------------------------- many arrays


def gpt2(stacked: bool = False) -> dict[str, Any]:
    """Return the shapes of GPT-2's arrays (124e6 parameters), layer by layer or stacked."""
    d = 768
    layer = {
        "ln_1": {"g": (d,), "b": (d,)},
        "attention": {"w": (d, 3 * d), "b": (3 * d,)},
        "projection": {"w": (d, d), "b": (d,)},
        "ln_2": {"g": (d,), "b": (d,)},
        "up": {"w": (d, 4 * d), "b": (4 * d,)},
        "down": {"w": (4 * d, d), "b": (d,)},
    }
    layers: Any = [layer] * 12
    if stacked:
        layers = jax.tree.map(lambda shape: (12, *shape), layer, is_leaf=is_shape)
    ends = {"tokens": (50257, d), "places": (1024, d), "ln": {"g": (d,), "b": (d,)}}
    return ends | {"layers": layers}


ODD = {
    "scalar": (),
    "one": (1,),
    "prime": (1000003,),
    "two primes": (1009, 2003),
    "tall": (100003, 3),
    "wide": (3, 100003),
    "convolution": (7, 7, 3, 64),
    "four axes": (3, 3, 257, 511),
    "five axes": (2, 3, 5, 7, 1001),
}
SMALL_STATE = ("packed8", "bf16: masters, remainder8 and packed8")
PLAIN_STEPS = ("adamw", "optax.adamw")
TREES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "GPT-2, an array a layer: 148 arrays": (
        gpt2(),
        (
            *PLAIN_STEPS,
            "clip and adamw",
            "optax: clip and adamw",
            "skip_nonfinite(adamw)",
            "optax.apply_if_finite(adamw)",
            "lamb",
            "optax.lamb",
            "monitor, measuring",
            *SMALL_STATE,
            "adafactor",
            "optax.adafactor",
            "muon_adamw",
            "optax.contrib.muon",
        ),
    ),
    "GPT-2, layers stacked: 16 arrays": (gpt2(stacked=True), (*PLAIN_STEPS, *SMALL_STATE)),
    "odd shapes: 9 arrays": (ODD, (*PLAIN_STEPS, "lamb", "optax.lamb", "packed16", *SMALL_STATE)),
}
TREE_COLUMNS = ("bytes", "kernels", "temporary", "seconds")


def size_of(shapes: Any) -> int:
    """Return the number of elements of a tree of shapes."""
    return sum(map(math.prod, jax.tree.leaves(shapes, is_leaf=is_shape)))


def tree_cells(title: str, name: str, where: str) -> list[str]:
    """Compile the step of a tree and return its figures under `TREE_COLUMNS`."""
    case, (shapes, _) = OF_TREES[name], TREES[title]
    start = time.process_time()
    compiled = case.compiled(where, shapes)
    seconds = time.process_time() - start
    text = compiled.as_text() or ""
    kernels, fusions = count_kernels(text)
    program = read_program(compiled, case.arguments(device(where), shapes)[0])
    return [
        f"{program.bytes_per_param:.3g}",
        str(kernels if where == "H100" else fusions),
        f"{program.temp_bytes / size_of(shapes):.2f}",
        f"{seconds:.1f}",
    ]


def trees(workers: Executor) -> list[Table]:
    """Compile steps of trees of many arrays."""
    columns = ["step", *(f"{where}: {column}" for where in DEVICES for column in TREE_COLUMNS)]
    return [
        Table(title, "", columns, rows(workers, tree_cells, title, names))
        for title, (_, names) in TREES.items()
    ]


def rows(workers: Executor, cells: Any, title: str, names: Sequence[str]) -> list[list[str]]:
    """Return a row for each step: its name, and the cells of each device."""
    todo = [(name, where) for name in names for where in DEVICES]
    found = workers.map(functools.partial(cells, title), *zip(*todo, strict=True))
    made: dict[str, list[str]] = {name: [name] for name in names}
    for (name, _), some in zip(todo, track(found, title, len(todo)), strict=True):
        made[name] += some
    return list(made.values())


PADDED = (jnp.float32, jnp.uint32, jnp.uint16, jnp.int8)


def held(shape: tuple[int, ...], dtype: Any) -> float:
    """Return the bytes an element that a TPU v5e holds for an array: in tiles, some not full."""
    x = jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device("TPU v5e")))
    memory: Any = jax.jit(lambda x: x).lower(x).compile().memory_analysis()
    return memory.argument_size_in_bytes / max(math.prod(shape), 1)


def padding() -> Table:
    """Return what a TPU v5e holds for arrays of odd shapes."""
    shapes = [*ODD.values(), (768,), (768, 2304), (12, 768)]
    rows = [[str(x), *(f"{held(x, dtype):.4g}" for dtype in PADDED)] for x in shapes]
    return Table(
        "What a TPU holds for odd shapes",
        "Bytes an element, of slots and parameters in each dtype. `packed8` has uint16 slots, "
        "`packed16` uint32 ones, `remainder8` int8 ones, masters' remainders are int16.",
        ["shape", *(np.dtype(dtype).name for dtype in PADDED)],
        rows,
    )


# --------------------------------------------------------------------------------------- many chips


def llama(layers: int) -> dict[str, Any]:
    """Return the shapes of a network like Llama's with 7e9 parameters, or of some of its layers."""
    d, inner, words = 4096, 11008, 32000
    layer = dict.fromkeys(("query", "key", "value", "out"), (d, d))
    layer |= {"gate": (d, inner), "up": (d, inner), "down": (inner, d)}
    layer |= {"norm_1": (d,), "norm_2": (d,)}
    stacked = {name: (layers, *shape) for name, shape in layer.items()}
    return {"embedding": (words, d), "head": (d, words), "norm": (d,), "layers": stacked}


@dataclasses.dataclass(frozen=True)
class Chips:
    """One table of steps over many chips.

    Attributes:
        topology: of the TPU.
        layers: how many of 32 layers; with ZeRO-1 each chip holds all parameters and gradients.
        zero1: whether slots alone are divided, instead of parameters, gradients and slots.
        steps: names of the steps.
    """

    topology: str
    layers: int
    zero1: bool
    steps: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The heading."""
        how = "ZeRO-1" if self.zero1 else "FSDP"
        size = size_of(llama(self.layers)) / 1e9
        return f"{how} over TPU {self.topology}, {self.layers} layers, {size:.2f}e9 parameters"

    def compiled(self, case: Case) -> tuple[jax.stages.Compiled, Any]:
        """Compile a step, and return it with the shardings that parameters and state have."""
        chips = topologies.get_topology_desc(platform="tpu", topology_name=self.topology).devices
        mesh = Mesh(np.array(chips), ("data",))

        def placed(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
            spec: list[str | None] = [None] * len(shape)
            if not self.zero1:
                spec[max(range(len(shape)), key=lambda i: shape[i])] = "data"
            where = NamedSharding(mesh, PartitionSpec(*spec))
            return jax.ShapeDtypeStruct(shape, case.dtype, sharding=where)

        params = jax.tree.map(placed, llama(self.layers), is_leaf=is_shape)
        tx = case.make()
        where = adamx.state_sharding(tx, params, over="data" if self.zero1 else None)
        state = jax.tree.map(
            lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
            jax.eval_shape(tx.init, params),
            where,
        )
        told = jax.tree.map(lambda x: x.sharding, params), where
        step = (
            optax_step(tx, out_shardings=told)
            if case.step is optax_step
            else adamx.make_step(tx, out_shardings=told if self.zero1 else None)
        )
        return step.lower(params, state, params).compile(), (params, state)

    def table(self, workers: Executor) -> Table:
        """Compile the steps."""
        found = track(workers.map(self.cells, self.steps), self.title, len(self.steps))
        rows = [[name, *cells] for name, cells in zip(self.steps, found, strict=True)]
        return Table(self.title, "", ["step", *CHIP_COLUMNS], rows)

    def cells(self, name: str) -> list[str]:
        """Compile a step and return its figures under `CHIP_COLUMNS`."""
        compiled, given = self.compiled(CASES[name])
        memory: Any = compiled.memory_analysis()
        found = collectives(Text(compiled.as_text() or ""))
        inputs, outputs = jax.tree.leaves(given), jax.tree.leaves(compiled.output_shardings)
        kept = sum(
            at.is_equivalent_to(x.sharding, x.ndim) for x, at in zip(inputs, outputs, strict=True)
        )
        return [
            "; ".join(f"{n} {name}, {size:,} bytes" for name, (n, size) in found.items()) or "none",
            f"{memory.argument_size_in_bytes / 2**30:.2f}",
            f"{memory.temp_size_in_bytes / 2**30:.2f}",
            f"{kept} of {len(inputs)}",
        ]


COLLECTIVES = {"all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"}
CHIP_COLUMNS = ("collectives", "GiB of arguments", "GiB temporary", "sharded as told")
ON_CHIPS = (
    *PLAIN_STEPS,
    "clip and adamw",
    "optax: clip and adamw",
    "lamb",
    "optax.lamb",
    *SMALL_STATE,
)
ON_ZERO1 = (*PLAIN_STEPS, "clip and adamw", "optax: clip and adamw", "lamb", SMALL_STATE[1])
CHIPS = (
    Chips("v5e:4x4", 32, False, ON_CHIPS),
    Chips("v5e:4x4", 2, True, ON_ZERO1),
    Chips("v5p:4x4x4", 32, False, ON_CHIPS),
    Chips("v5p:4x4x4", 8, True, PLAIN_STEPS),
)


def collectives(text: Text) -> dict[str, tuple[int, int]]:
    """Return how often a program communicates, and the bytes of the results, by operation."""
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for x in text.instructions.values():
        name = x.opcode.removesuffix("-done")
        if name in COLLECTIVES:
            count[name] += 1
            size[name] += x.bytes
    return {name: (count[name], size[name]) for name in sorted(count)}


# ---------------------------------------------------------------------------------------- the page

WEIGHS = "xla_tpu_use_bundle_aware_cost_model_for_fusions"
COLUMNS = ("bytes", "kernels", "copies", "temporary")


def cells(program: Program) -> list[str]:
    """Return a program's figures under `COLUMNS`: bytes and temporary memory a parameter."""
    return [
        f"{program.bytes_per_param:.3g}",
        str(program.large),
        str(program.copies),
        f"{round(program.temp_bytes / SIZE, 2):g}",
    ]


def one_cells(title: str, name: str, where: str) -> list[str]:
    """Compile the step of one array and return its figures under `COLUMNS`."""
    del title
    return cells(CASES[name].read(where))


def table(workers: Executor, dtype: Any, title: str) -> Table:
    """Compile the steps of one dtype for every device."""
    names = [name for name, case in CASES.items() if case.dtype == dtype]
    made = [
        [name, f"{CASES[name].least():g}", *row]
        for name, *row in rows(workers, one_cells, title, names)
    ]
    columns = [f"{where}: {column}" for where in DEVICES for column in COLUMNS]
    return Table(title, "", ["step", "floor", *columns], made)


NOTE = (
    "Bytes and temporary memory are a parameter's, of a branch those of the side that moves most. "
    "Kernels are those that read or write an array as large as the parameters, copies those of "
    "such an array. Steps that are above the floor are listed in `tests/test_accelerators.py`, "
    "with the reasons."
)
OTHER_TPUS = (
    "On TPU v4, v5p and v6e, masters with a remainder are two kernels (36 bytes a parameter "
    "instead of 26, and 4 of temporary memory) unless XLA weighs kernels as on a v5e. Set "
    f"`LIBTPU_INIT_ARGS=--{WEIGHS}=true` before JAX starts, or pass "
    f'`compiler_options={{"{WEIGHS}": "true"}}` to `jax.jit`: then they are one.'
)


MONITOR = (
    "`monitor` measures in a program of its own, before the step: its row is that program's, whose "
    "floor is one reading of parameters, slots and gradients. It also writes and reads an array's "
    "update, of which it takes the norm and the mean; that memory is free again for the next array."
)
MANY = (
    "Kernels are all that a GPU starts, small ones for scalars too; of a TPU they are the fusions, "
    "as it fetches arrays to its chip and back by many small transfers in the background, which is "
    "also most of its temporary memory. Bytes below the floor are of arrays that stay there. "
    "Of the few that AdamW has more than Optax's, one writes 4 bytes: the learning rate into the "
    "state, which may have been saved with another. "
    "Muon's bytes are mostly those of its products of matrices. "
    "Seconds are those of a processor for tracing and compiling, on the machine where this page "
    "was written: compare them with each other."
)
OVER_CHIPS = (
    "Each array is divided along its longest axis (FSDP), or parameters and gradients are on every "
    "chip and the slots divided by `state_sharding(..., over=)` (ZeRO-1). Memory is a chip's; "
    "arguments are parameters, state and gradients, of which the step overwrites the first two. "
    "Bytes are those of the results on a chip. With ZeRO-1 the compiler gathers the updated "
    "parameters; which operation it takes for that depends on the TPU, not on the optimizer."
)


def page(one: list[Table], many: list[Table], chips: list[Table]) -> str:
    """Return the report as a page."""
    packages = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "optax")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return "\n".join(
        [
            "# Compiled for GPU and TPU",
            "",
            "Written by `python benchmarks/ahead_of_time.py --markdown docs/accelerators.md`, not "
            f"by hand, with {versions}.",
            "",
            "No step was run, and no step's time measured: the compilers of an H100 and of a TPU "
            "v5e run on any machine. The steps are compiled ahead of time; their kernels' bytes "
            "are counted in the program's text. The floor is what any step has to move: parameters "
            "and slots read and written once, gradients read once, and once more where a norm or a "
            "guard has to know all of them first. [`audit`](audit.md) does the same for a step of "
            "your own.",
            "",
            f"## One array\n\nOf {SIZE:,} parameters. {NOTE}\n",
            f"{MONITOR}\n",
            f"{OTHER_TPUS}\n",
            *(f"#{table.markdown()}" for table in one),
            f"## Many arrays\n\n{MANY}\n",
            *(f"#{table.markdown()}" for table in many),
            f"## Many chips\n\n{OVER_CHIPS}\n",
            *(f"#{table.markdown()}" for table in chips),
        ]
    )


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--markdown", type=Path, help="write the page to this file too")
    parser.add_argument("--jobs", type=int, default=1, help="how many processes compile")
    options = parser.parse_args()
    if absent := missing():
        parser.error(f"not installed: {absent}: pip install 'adamx[accelerators]'")
    processes = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, processes) as workers:
        one = [
            table(workers, jnp.float32, "float32 parameters"),
            table(workers, jnp.bfloat16, "bfloat16 parameters"),
        ]
        many = [*trees(workers), padding()]
        chips = [where.table(workers) for where in CHIPS]
    Console().print(*(found.rich() for found in (*one, *many, *chips)))
    if options.markdown:
        options.markdown.write_text(page(one, many, chips))


if __name__ == "__main__":
    main()
