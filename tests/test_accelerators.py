"""Steps compiled for an H100 and a TPU v5e, which are not here, move what they must and no more.

The figures are the same with jax 0.10 and 0.12.
"""

import functools
import importlib
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import adamx
from adamx.inspect.program import bytes_accessed
from adamx.inspect.text import Text

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
    pytest.mark.usefixtures("plain_jax"),
]

# bytes a parameter, kernels, copies and temporary bytes a parameter above the floor, and why
ABOVE = {
    # the floor takes 4 bytes of memory, for the update; without memory g is read again: 40 bytes
    ("cautious_adamw", "H100"): (38, 2, 0, 1, "the mask waits for its mean, a byte a parameter"),
    ("cautious_adamw", "TPU v5e"): (38, 2, 0, 1, "the same"),
    ("lamb", "H100"): (40, 3, 0, 0, "the norm of the weights has a kernel of its own"),
    ("lamb", "TPU v5e"): (40, 3, 0, 0, "the same"),
    ("bf16: masters(lamb)", "H100"): (38, 3, 0, 4, "the update in float32 waits for its norm"),
    ("bf16: masters(lamb)", "TPU v5e"): (38, 3, 0, 4, "the same"),
    ("monitor, measuring", "H100"): (24, 2, 0, 4, "the update is written for its two sums"),
    ("monitor, measuring", "TPU v5e"): (28, 3, 0, 4, "and, on a TPU, v is read again"),
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
    "monitor, measuring",
}
OURS = [name for name in ahead.CASES if "optax" not in name]


def page() -> str:
    return (ROOT / "docs" / "accelerators.md").read_text()


@functools.cache
def on_the_page() -> dict[str, list[str]]:
    """Return the cells of the page's rows for one array, by the name of the step."""
    lines = page().partition("## Many arrays")[0].splitlines()
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


class InHalf(adamx.Storage):
    """A storage such as a user writes."""

    def encode(self, slots, bits):
        return {name: x.astype(jnp.float16) for name, x in slots.items()}

    def decode(self, stored):
        return {name: x.astype(jnp.float32) for name, x in stored.items()}


@pytest.mark.parametrize("where", ahead.DEVICES)
@pytest.mark.parametrize(
    ("tx", "kept"),
    [
        (adamx.ema(0.9, jnp.bfloat16), "bf16"),
        (adamx.ema(0.9, jnp.float16), "f16"),
        (adamx.bfloat16(adamx.ema(0.9), nearest=True), "bf16"),
        (InHalf(adamx.ema(0.9)), "f16"),
    ],
    ids=str,
)
def test_the_update_is_made_of_the_slot_as_it_is_kept(tx, kept, where):
    """XLA for GPU takes a cast and the cast back for nothing, unless it is told otherwise."""
    case = ahead.Case(lambda: tx, step=lambda tx: jax.jit(tx.update, donate_argnums=(1,)))
    grads, state, _ = case.arguments(ahead.device(where))
    text = case.step(tx).lower(grads, state).compile().as_text()
    widened = [line for line in text.splitlines() if re.search(r"= f32\[.* convert\(", line)]
    # the slot of the step before is widened, and the new one again after it was narrowed
    assert len(widened) == 2 and f"{kept}[{ahead.SIZE}]" in text


def test_masters_are_compared_with_the_parameter_after_they_were_rounded():
    """XLA for GPU compares this dtype in a wider one, and would leave out the cast to it."""
    case = ahead.Case(lambda: adamx.master_weights(adamx.sgd(0.1)), jnp.float8_e4m3b11fnuz)
    params, state, grads = case.arguments(ahead.device("H100"))
    lowered = jax.jit(case.make().update).lower(grads, state, params)
    assert " reduce-precision(" in (lowered.compile().as_text() or "")


def test_rows_and_columns_of_a_matrix_are_not_padded_to_tiles_of_a_tpu():
    """A column of n numbers is not n tiles: parameters and state are as large as their numbers."""
    here = jax.sharding.SingleDeviceSharding(ahead.device("TPU v5e"))
    tx, size = adamx.adafactor(0.1), 2048
    params = jax.ShapeDtypeStruct((size, size), jnp.float32)
    trees = params, jax.eval_shape(tx.init, params), params
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)  # noqa: E731
    lowered = jax.jit(tx.update).lower(*jax.tree.map(place, trees))
    found: Any = lowered.compile().memory_analysis()
    assert found.argument_size_in_bytes < 4 * (2 * size**2 + 4 * size)
    assert found.temp_size_in_bytes < 0.03 * 4 * size**2  # a few rows of tiles


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
    assert ahead.OTHER_TPUS in page()


def test_every_step_is_on_the_page():
    assert on_the_page().keys() - {"step", ":--"} == ahead.CASES.keys()
    sections = [table.title for table in ahead.CHIPS] + list(ahead.TREES)
    assert all(f"### {title}\n" in page() for title in sections)
    assert all(text in page() for text in (ahead.NOTE, ahead.MANY, ahead.OVER_CHIPS))


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


# arrays of a network, small: a large one is summed in two kernels
FEW = {f"layer {i}": {"w": (64, 32), "b": (32,)} for i in range(6)}


def kernels(name: str) -> int:
    return ahead.count_kernels(ahead.CASES[name].compiled("H100", FEW).as_text())[0]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("adamw", "optax.adamw"),
        ("clip and adamw", "optax: clip and adamw"),
        ("skip_nonfinite(adamw)", "optax.apply_if_finite(adamw)"),
        pytest.param("lamb", "optax.lamb", marks=pytest.mark.slow),
    ],
)
def test_a_gpu_starts_no_more_kernels_an_array_than_for_optax(ours, theirs):
    """And at most 4 more for scalars: counters, a rate and a guard's total."""
    assert kernels(ours) <= kernels(theirs) + 4


@pytest.mark.parametrize("where", ahead.DEVICES)
def test_muons_iteration_moves_and_holds_no_more_than_optaxs(where):
    """Of a matrix that does not fit on the chip. Optax's coefficients are arrays in the state."""
    shapes = {"tokens": (50257, 768), "bias": (768,)}
    found = {}
    for name in ("muon_adamw", "optax.contrib.muon"):
        compiled = ahead.OF_TREES[name].compiled(where, shapes)
        moved = bytes_accessed(Text(compiled.as_text()))
        found[name] = moved, compiled.memory_analysis().temp_size_in_bytes
    for ours, theirs in zip(*found.values(), strict=True):
        assert ours <= theirs + 4096


def test_measuring_needs_the_memory_of_one_update_at_a_time():
    """In a branch it needed that of all: 4 bytes a parameter, and 4 for those of the step."""
    shapes = {str(i): (2**22,) for i in range(4)}
    memory: Any = ahead.CASES["monitor, measuring"].compiled("H100", shapes).memory_analysis()
    assert memory.temp_size_in_bytes <= 1.1 * 4 * 2**22  # one of the four


@pytest.mark.parametrize("shape", [(1009, 2003), (3, 100003), (7, 7, 3, 64)], ids=str)
def test_a_tpu_holds_narrow_slots_of_odd_shapes_in_proportion(shape):
    """Half a float32's bytes for uint16, a quarter for int8, of the same padded size."""
    wide = ahead.held(shape, jnp.float32)
    assert ahead.held(shape, jnp.uint16) == pytest.approx(wide / 2, rel=0.01)
    assert ahead.held(shape, jnp.int8) == pytest.approx(wide / 4, rel=0.01)


@pytest.mark.parametrize("name", ["clip and adamw", pytest.param("lamb", marks=pytest.mark.slow)])
def test_fsdp_communicates_the_sums_alone_and_keeps_every_sharding(name):
    """One all-reduce of a scalar, or of a scalar for each array and its weights."""
    chips = ahead.Chips("v5e:2x2", 1, zero1=False)
    compiled, given = chips.compiled(ahead.CASES[name])
    found = ahead.collectives(ahead.Text(compiled.as_text()))
    leaves = len(jax.tree.leaves(ahead.llama(1), is_leaf=ahead.is_shape))
    assert found.keys() == {"all-reduce"} and found["all-reduce"][0] == 1
    assert found["all-reduce"][1] <= (4 if name != "lamb" else 8 * leaves)
    for x, at in zip(
        jax.tree.leaves(given), jax.tree.leaves(compiled.output_shardings), strict=True
    ):
        assert at.is_equivalent_to(x.sharding, x.ndim)


def test_zero1_gathers_each_parameter_once_and_keeps_every_slot_divided():
    chips = ahead.Chips("v5e:2x2", 1, zero1=True)
    text = chips.cells("adamw")
    leaves = len(jax.tree.leaves(ahead.llama(1), is_leaf=ahead.is_shape))
    assert text[0].startswith(f"{leaves} all-gather, ") and text[-1] == "38 of 38"
