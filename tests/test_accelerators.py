"""Steps compiled for an H100 and a TPU v5e, which are not here, move what they must and no more.

The figures are the same with jax 0.10 and 0.12.
"""

import functools
import importlib
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import adamx

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
try:
    ahead: Any = importlib.import_module("ahead_of_time")
except ModuleNotFoundError as error:
    pytest.skip(f"not installed: {error.name}", allow_module_level=True)

pytestmark = [
    pytest.mark.skipif(
        bool(ahead.missing()),
        reason=f"not installed: {ahead.missing()}: pip install 'adamx[accelerators]'",
    ),
    pytest.mark.filterwarnings("ignore"),
]

# bytes a parameter, kernels, copies and temporary bytes a parameter above the floor, and why
ABOVE = {
    ("cautious_adamw", "H100"): (38, 2, 0, 1, "the mask waits for its mean, a byte a parameter"),
    ("cautious_adamw", "TPU v5e"): (38, 2, 0, 1, "the same"),
    ("bf16: masters(lamb)", "H100"): (38, 2, 0, 4, "the update in float32 waits for its norm"),
    ("bf16: masters(lamb)", "TPU v5e"): (38, 2, 0, 4, "the same"),
    ("monitor, measuring step", "H100"): (60, 2, 1, 8, "its statistics are in a branch"),
    ("monitor, measuring step", "TPU v5e"): (60, 2, 1, 8, "the same"),
}
# methods whose update depends on a norm or mean of the update itself
TWO_PASSES = {"lamb", "cautious_adamw", "stable_adamw"}
MAIN = {
    "adamw",
    "packed16",
    "skip_nonfinite(clip and adamw)",
    "lamb",
    "bf16: clip and adamw",
    "bf16: masters",
    "bf16: masters, remainder8",
    "bf16: guard(masters(clip and packed8)), remainder8",
}
OURS = [name for name in ahead.CASES if "optax" not in name]


@pytest.fixture(autouse=True)
def plain_jax():
    """What is compiled is what users run."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@functools.cache
def on_the_page() -> dict[str, list[str]]:
    """Return the cells of the page's rows, by the name of the step."""
    lines = (ROOT / "docs" / "accelerators.md").read_text().splitlines()
    rows = [[cell.strip() for cell in x[1:-1].split("|")] for x in lines if x.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize("where", ahead.DEVICES)
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x in MAIN else pytest.mark.slow) for x in OURS]
)
def test_a_step_moves_what_it_must(name, where):
    """The floor in one kernel, in two where gradients are needed twice; scalars are below 0.01."""
    case = ahead.CASES[name]
    passes = 2 if case.reread or name in TWO_PASSES else 1
    wanted = ABOVE.get((name, where), (case.least(), passes, 0, 0, ""))
    program = case.read(where)
    temporary = program.temp_bytes / ahead.SIZE
    got = (program.bytes_per_param, program.large, program.copies, temporary)
    assert got == pytest.approx(wanted[:4], abs=0.02), wanted[4]
    start = 1 + ahead.DEVICES.index(where) * len(ahead.COLUMNS)
    there = on_the_page()[name][start : start + len(ahead.COLUMNS)]
    assert ahead.cells(program) == there, "run benchmarks/ahead_of_time.py anew"


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5p:2x2x1", "v6e:2x2"])
def test_masters_are_one_kernel_on_other_tpus_with_the_option_that_the_page_names(topology):
    tpu = ahead.topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    case = ahead.CASES["bf16: masters"]
    arguments = case.arguments(tpu)
    lowered = case.step(case.make()).lower(*arguments)
    without = ahead.read_program(lowered.compile(), arguments[0])
    assert (round(without.bytes_per_param, 2), without.large) == (36, 2)
    chosen = lowered.compile(compiler_options={ahead.WEIGHS: "true"})
    program = ahead.read_program(chosen, arguments[0])
    assert (round(program.bytes_per_param, 2), program.large) == (26, 1)
    assert ahead.OTHER_TPUS in (ROOT / "docs" / "accelerators.md").read_text()


def test_every_step_is_on_the_page():
    assert on_the_page().keys() - {"step", ":--"} == ahead.CASES.keys()


@pytest.mark.parametrize("where", ahead.DEVICES)
def test_an_audit_is_of_the_device_that_is_not_there(where):
    tx, params = adamx.adamw(1e-3), jnp.zeros((64, 48))
    device = ahead.device(where)
    found = adamx.audit(adamx.make_step(tx), params, tx.init(params), params, device=device)
    assert found.ok and found.in_place == found.donated == 3
    assert found.platform == device.platform != "cpu"


def test_an_audit_of_a_step_on_many_chips_is_of_one_of_them():
    """Four chips, of which each has a quarter of every array; a clip sums over them."""
    chips = ahead.topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = jax.sharding.Mesh(chips, ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    tx = adamx.chain(adamx.clip_by_global_norm(1.0), adamx.adamw(1e-3))
    params = jax.ShapeDtypeStruct((ahead.SIZE,), jnp.float32)
    params, state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split if x.ndim else whole),
        (params, jax.eval_shape(tx.init, params)),
    )
    found = adamx.audit(adamx.make_step(tx), params, state, params)
    assert found.ok and found.devices == 4 and found.platform == "tpu"
    assert found.params == ("params", ahead.SIZE // 4)
    assert found.bytes_accessed == pytest.approx(32 * ahead.SIZE / 4, rel=1e-3)
