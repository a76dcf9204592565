"""Every kind of step compiled for a GPU and a TPU, without one: what its kernels move.

    JAX_PLATFORMS=cpu python benchmarks/ahead_of_time.py [--markdown docs/accelerators.md]

It needs `pip install '.[accelerators,examples]'` and takes a minute or two. Each step is that of
one large array, and is compiled by the compilers of an H100 and of a TPU v5e. The floor is what any
step has to move: parameters and slots read and written once, gradients read once, and once more
where a norm or a guard has to know all of them before the first is used.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU here to ask about
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # by several processes

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from report import Table
from rich.console import Console
from rich.progress import track

import adamx
from adamx.inspect.program import Program, read_program

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
def device(name: str) -> jax.Device:
    """Return a device that is not there, for which the compilers compile."""
    if name == "H100":
        found = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    else:
        found = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    return found.devices[0]


# --------------------------------------------------------------------------------------- the steps


def optax_step(tx: Any) -> Any:
    """Return Optax's own step, in place."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the page.

    Attributes:
        make: returns the transformation.
        dtype: of parameters and gradients.
        reread: whether every gradient has to be known before the first is used.
        step: makes the step.
        floor: bytes a parameter; None counts parameters, slots and gradients.
    """

    make: Callable[[], Any]
    dtype: Any = jnp.float32
    reread: bool = False
    step: Callable[[Any], Any] = adamx.make_step
    floor: float | None = None

    def arguments(self, where: jax.Device) -> tuple[Any, ...]:
        """Return the shapes of parameters, state and gradients on a device."""
        sharding = jax.sharding.SingleDeviceSharding(where)
        params = jax.ShapeDtypeStruct((SIZE,), self.dtype)
        state = jax.eval_shape(self.make().init, params)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            (params, state, params),
        )

    def least(self) -> float:
        """Return the bytes a parameter that any step has to move."""
        if self.floor is not None:
            return self.floor
        params, state, grads = self.arguments(jax.devices()[0])
        size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
        moved = 2 * size(params) + 2 * size(state) + (1 + self.reread) * size(grads)
        return round(moved / SIZE, 2)

    def read(self, name: str) -> Program:
        """Compile the step for a device and read it."""
        params, state, grads = self.arguments(device(name))
        compiled = self.step(self.make()).lower(params, state, grads).compile()
        return read_program(compiled, params)


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
    "accumulate, final step": Case(lambda: adamx.accumulate(A(), 4)),
    "optax.MultiSteps": Case(
        lambda: optax.MultiSteps(optax.adamw(1e-3), 4).gradient_transformation(), **PLAIN
    ),
    "lamb": Case(lambda: adamx.lamb(1e-3), floor=40),
    "optax.lamb": Case(lambda: optax.lamb(1e-3), floor=40, **PLAIN),
    "monitor, measuring step": Case(lambda: adamx.monitor(A(), 100), floor=32),
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


def table(dtype: Any, title: str) -> Table:
    """Compile the steps of one dtype for every device."""
    rows = []
    for name, case in track(CASES.items(), title):
        if case.dtype == dtype:
            figures = (cell for where in DEVICES for cell in cells(case.read(where)))
            rows.append([name, f"{case.least():g}", *figures])
    columns = [f"{where}: {column}" for where in DEVICES for column in COLUMNS]
    return Table(title, "", ["step", "floor", *columns], rows)


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


def page(tables: list[Table]) -> str:
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
            "No step was run, and no time measured: the compilers of an H100 and of a TPU v5e run "
            f"on any machine. Each step is that of one array of {SIZE:,} parameters, compiled "
            "ahead of time; its kernels' bytes are counted in the program's text. The floor is "
            "what any step has to move: parameters and slots read and written once, gradients read "
            "once, and once more where a norm or a guard has to know all of them first. "
            "[`audit`](audit.md) does the same for a step of your own.",
            "",
            f"{NOTE}\n",
            f"{OTHER_TPUS}\n",
            *(table.markdown() for table in tables),
        ]
    )


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--markdown", type=Path, help="write the page to this file too")
    options = parser.parse_args()
    if absent := missing():
        parser.error(f"not installed: {absent}: pip install 'adamx[accelerators]'")
    tables = [
        table(jnp.float32, "float32 parameters"),
        table(jnp.bfloat16, "bfloat16 parameters"),
    ]
    Console().print(*(found.rich() for found in tables))
    if options.markdown:
        options.markdown.write_text(page(tables))


if __name__ == "__main__":
    main()
