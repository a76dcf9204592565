"""Judges the benchmarks by running them small, and the compiled programs by what they say."""

from __future__ import annotations

import functools
import gc
import importlib
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.progress import Progress
from scripts import is_a_picture

import adamx
from adamx.inspect.program import count_copies, read_program

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
around: Any = importlib.import_module("around")
measure: Any = importlib.import_module("measure")
side_by_side: Any = importlib.import_module("side_by_side")

TINY = side_by_side.Settings(
    sizes=(256,),
    leaves=2,
    many=4,
    small=((4,), (2, 3)),
    large=((8,), (4, 8)),
    methods_size=256,
    around_size=256,
    memory=2**13,
    width=8,
    rounds=2,
    slow_rounds=1,
    seconds=0.0,
)
MILLION = 2**20


@pytest.fixture(autouse=True)
def plain_jax() -> Iterator[None]:
    """What is measured is what users run: Optax mixes dtypes that strict promotion refuses."""
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


# --- The measuring helpers -----------------------------------------------------------------------


def test_a_ratio_is_the_median_over_the_rounds_not_the_ratio_of_medians() -> None:
    times, baseline = np.array([1.0, 10.0, 100.0]), np.array([2.0, 10.0, 25.0])
    found = measure.ratio(times, baseline)
    assert (found.median, found.low, found.high) == (1.0, 0.75, 2.5)
    assert found.rounds == 3


def test_interleave_measures_every_candidate_once_a_round_and_keeps_every_sample() -> None:
    calls: list[str] = []

    def candidate(name: str) -> Any:
        def sample() -> float:
            calls.append(name)
            return float(len(calls))

        return sample

    names = ["a", "b", "c"]
    ticks: list[None] = []
    times = measure.interleave(
        {name: candidate(name) for name in names},
        rounds=20,
        seed=0,
        tick=lambda: ticks.append(None),
    )
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert rounds[0] == ("a", "b", "c")  # the warm-up
    assert all(sorted(order) == names for order in rounds)
    assert len(set(rounds)) > 3  # shuffled
    assert sorted(np.concatenate(list(times.values()))) == list(range(4, 64))
    assert len(ticks) == 63


def test_interleave_restores_the_garbage_collector_after_an_error() -> None:
    seen: list[bool] = []

    def sample() -> float:
        seen.append(gc.isenabled())
        if len(seen) == 2:
            raise RuntimeError("stop")
        return 1.0

    with pytest.raises(RuntimeError, match="stop"):
        measure.interleave({"a": sample}, rounds=2, seed=0)
    assert seen == [True, False]
    assert gc.isenabled()


def test_a_loop_threads_donated_buffers_through() -> None:
    step = jax.jit(lambda x, by: (x + by,), donate_argnums=0)
    loop = measure.Loop(step, (jnp.zeros(3),), jnp.ones(3), seconds=0.0)
    assert loop() > 0 and loop() > 0
    # one step untimed and one timed a sample, and one to settle how many
    np.testing.assert_array_equal(loop.carry[0], np.full(3, 5.0))


@pytest.mark.parametrize(
    ("line", "copies"),
    [
        ("%copy.8 = f32[4,8]{1,0} copy(%a)", 1),
        ("ROOT %copy.8 = f32[32]{0} copy(f32[32]{0} %a), metadata={op_name='x'}", 1),
        ("%s = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[]) copy-start(%a)", 1),
        ("%d = f32[8,4]{1,0} copy-done(%s)", 0),
        ("%copy.8 = f32[31]{0} copy(%a)", 0),
        ("%copy.8 = s32[] copy(%a)", 0),
        ("%copy_fusion = f32[32]{0} fusion(%copy.8), kind=kLoop", 0),
        ("%copy.8 = bf16[2,16]{1,0:T(8,128)} copy(%a)", 1),
    ],
)
def test_copies_are_counted_by_the_size_of_their_result(line: str, copies: int) -> None:
    assert count_copies(f"ENTRY {{\n  {line}\n}}\n", {32}) == copies


def test_a_step_in_the_wrong_order_is_seen_to_copy() -> None:
    """The reading has to see the fault it is there for: state given back before params."""
    tx, like = adamx.adamw(1e-3), side_by_side.single(MILLION)

    def step(grads: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, like)
    compiled = jax.jit(step, donate_argnums=(1, 2)).lower(like, state, like).compile()
    assert read_program(compiled, like).copies > 0


# --- The report ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "section",
    (side_by_side.in_place_step, side_by_side.memory_of_storages, around.around),
    ids=lambda section: section.__name__,
)
def test_a_section_runs_and_renders(section: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of them; CI runs all, by their commands, and compares with the pages (.ci/tables.py)."""
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # the other tests' caches are there too
    with Progress(disable=True) as progress:
        tables = section(TINY, side_by_side.Meter(progress, TINY.seed))
        assert progress.finished
    assert tables
    for table in tables:
        assert all(len(row) == len(table.columns) for row in table.rows)
        assert len(set(table.columns)) == len(table.columns)
        assert table.rich().row_count == len(table.rows) > 0
    page = side_by_side.markdown(tables, TINY)
    assert all(table.title in page for table in tables)
    widths = {line.count("|") for line in tables[0].markdown().splitlines() if "|" in line}
    assert len(widths) == 1


def test_the_options_reach_the_settings(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    arguments = ["--quick", "--sizes", "64k", "1M", "--rounds", "24", "--seed", "3"]
    settings, written = side_by_side.parse([*arguments, "--markdown", str(page)])
    assert (settings.sizes, settings.rounds, settings.slow_rounds) == ((2**16, 2**20), 24, 2)
    assert (settings.seed, settings.many, written) == (3, side_by_side.QUICK.many, page)
    assert side_by_side.parse([]) == (side_by_side.Settings(), None)


def test_a_bar_is_met_at_equality_only_from_below() -> None:
    assert side_by_side.verdict(0.4, 0.4) == "<= 0.4: met"
    assert side_by_side.verdict(0.4001, 0.4) == "<= 0.4: not met"


# --- The page on the family -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def family() -> Any:
    return importlib.import_module("family")


@pytest.mark.slow
def test_the_family_is_measured_and_what_stands_above_the_mark_stays(
    family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("adamax", "adam_mini")
    page = tmp_path / "family.md"
    page.write_text(f"By hand.\n\n{family.MARK}\nold tables\n")
    monkeypatch.setattr(family, "report", kept := Kept(family.report))
    family.main(["--quick", "--only", *names, "--markdown", str(page)])
    text = page.read_text()
    assert text.startswith(f"By hand.\n\n{family.MARK}\n\nBelow: ")
    assert "old tables" not in text
    costs, agreement, digits = kept.tables
    for table in kept.tables:
        assert table.markdown() in text
        assert [row[0] for row in table.rows] == list(names)
        assert all(len(row) == len(table.columns) for row in table.rows)
    # 1000 numbers of nu beside 1000 * 1000 of mu, and the scalars
    assert [row[1:3] for row in costs.rows] == [["mu, nu_inf", "8"], ["mu", "4"]]
    assert [round(float(row[3])) for row in costs.rows] == [40, 28]
    adamax, mini = agreement.rows
    # Optax's correction of m, 1 - 0.9^t, is rounded once, and all else a few times
    assert 0 < float(adamax[1]) < 30
    assert all(float(number) < 1e-12 for number in re.findall(r"\de-\d+", adamax[3]))
    assert mini[1:] == ["-", "-", "-"]
    assert [row[4] for row in digits.rows] == ["the same", "optax.adamw"]
    assert all(float(row[2].partition("%")[0]) > 50 for row in digits.rows)


class Kept:
    """Yields what a generator yields, and keeps it."""

    def __init__(self, generate: Any) -> None:
        self.generate, self.tables = generate, []

    def __call__(self, *arguments: Any) -> Iterator[Any]:
        for table in self.generate(*arguments):
            self.tables.append(table)
            yield table


def test_the_family_page_shows_every_optimizer_as_it_is(family: Any) -> None:
    """Formulas and pieces change with the code: run benchmarks/family.py anew if this fails."""
    text = (Path(__file__).parents[1] / "docs" / "family.md").read_text()
    for name in family.NAMES:
        assert text.count(f"\n| {name} | ") == 3, name
        assert family.section(name) in text, name


def test_every_recorded_run_of_pytorch_is_on_the_family_page(family: Any) -> None:
    """But those with L2 regularisation, which is `add_decayed_weights` before an optimizer."""
    listed = {case for cases in family.CASES.values() for case in cases}
    left = {"adam_l2", "sgd_l2", "sgd_momentum_l2"}
    assert listed == family.old_members.TORCH.keys() - left


# --- Bad batches ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_bad_batches_are_planted_alike_and_what_they_cost_is_drawn_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spikes: Any = importlib.import_module("spikes")
    page, picture = tmp_path / "page.md", tmp_path / "spikes.png"
    page.write_text("before\n<!-- spikes -->\nold\n<!-- /spikes -->\nafter\n")
    drawn: list[Any] = []
    draw = spikes.draw
    monkeypatch.setattr(spikes, "draw", lambda *given: (drawn.append(given[0]), draw(*given)))
    made = spikes.main(["--quick", "--output", str(picture), "--markdown", str(page)])
    assert picture.stat().st_size > 10_000
    text = page.read_text()
    assert text.startswith("before\n<!-- spikes -->\n\n|") and text.endswith("-->\nafter\n")
    assert "old" not in text and len(made.rows) == len(spikes.COLORS) == 5
    (found,), settings = drawn, spikes.QUICK
    for kinds in found.values():
        clean, random, large = kinds.values()
        for seed in range(settings.model.seeds):
            bad = spikes.planted(settings, seed)
            assert bad.any() and not bad[: settings.good].any()
            assert np.array_equal(np.isnan(random.losses[seed]), bad)
            first = int(bad.argmax()) + 1  # until then all see the same
            assert np.array_equal(clean.losses[seed, :first], large.losses[seed, :first])
            assert clean.after[seed] != random.after[seed]
    # a thousand times the gradient is nothing to a clip, costs Adam, and is skipped
    assert (found["adam"][spikes.LARGE].after != found["adam"][spikes.CLEAN].after).all()
    np.testing.assert_array_equal(found["adam"][spikes.LARGE].skipped, 0)
    bad = [spikes.planted(settings, seed).sum() for seed in range(settings.model.seeds)]
    np.testing.assert_array_equal(found["skip_spikes"][spikes.LARGE].skipped, bad)


# --- The best rate at three widths ---------------------------------------------------------------


@pytest.mark.slow
def test_the_rates_of_widths_are_measured_drawn_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: Any = importlib.import_module("widths")
    page, picture = tmp_path / "page.md", tmp_path / "widths.png"
    page.write_text("before\n<!-- widths -->\nold\n<!-- /widths -->\nafter\n")
    drawn: list[Any] = []
    draw = widths.draw
    monkeypatch.setattr(widths, "draw", lambda *given: (drawn.append(given[0]), draw(*given)))
    made = widths.main(["--quick", "--output", str(picture), "--markdown", str(page)])
    assert is_a_picture(picture)
    text, there = page.read_text(), (ROOT / "docs" / "scaling-up.md").read_text()
    assert text.startswith("before\n<!-- widths -->\n\n|") and "old" not in text
    assert text.endswith("<!-- /widths -->\nafter\n")
    number = re.compile(r"2[⁻⁰¹²³⁴-⁹]+|width \d+")
    section = number.sub("#", there[there.index("<!-- widths -->") :])
    for row in made.rows:
        assert "| " + number.sub("#", row[0]) + " |" in section
    (found,), settings = drawn, widths.QUICK
    without, with_rules = found[widths.WITHOUT], found[widths.WITH]
    assert [*without] == [*with_rules] == [*settings.widths]
    np.testing.assert_array_equal(without[16], with_rules[16])  # where all factors are 1
    assert (without[32] != with_rules[32]).all() and without[32].shape == (2, 2)
    # the draws are the same, and of the deviations only the last kernel's is another
    rules = adamx.width_rules(widths.shapes(16, settings), widths.shapes(32, settings))
    plain, ruled = (widths.first_weights(32, settings, 0, r) for r in (None, rules))
    np.testing.assert_allclose(ruled.pop("head"), plain.pop("head") / 2**0.5, rtol=3e-7)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7), plain, ruled)


# --- What the compiled programs say --------------------------------------------------------------


@pytest.fixture(scope="module")
def steps() -> dict[str, Any]:
    """AdamW's compiled steps at a million elements, read."""
    like = side_by_side.single(MILLION)
    pair = {"adamx": adamx.adamw(1e-3), "optax": optax.adamw(1e-3)}
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        return {
            name: read_program(side_by_side.compile_step(tx, like), like)
            for name, tx in pair.items()
        }


def test_the_step_copies_nothing(steps: dict[str, Any]) -> None:
    assert steps["adamx"].copies == 0


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU's step is one kernel")
def test_the_step_moves_40_bytes_a_parameter(steps: dict[str, Any]) -> None:
    """On CPU a kernel has one output, so that there are three.

    mu reads mu and g and writes mu: 12 bytes. nu does the same: 12. The parameter's kernel reads
    the parameter, the new mu and the new nu, and writes the parameter: 16. The rest is scalars.
    """
    assert 12 + 12 + 16 <= steps["adamx"].bytes_per_param <= 40.01
    scalars = 256 / MILLION
    assert steps["adamx"].bytes_per_param <= steps["optax"].bytes_per_param + scalars


def test_the_step_needs_no_memory_beyond_its_arguments(steps: dict[str, Any]) -> None:
    assert steps["adamx"].temp_bytes < 1024


# What a step moves in addition to AdamW's 40 bytes. Clip and guard read g once more, together too.
# A micro-step reads g and the sum and writes the sum; the final step does that before mu and nu,
# which then read the sum instead of g. The average reads p, mu, nu and itself, and writes itself.
MOVED = {
    "clip at the head": 44,
    "guard": 44,
    "guard and clip": 44,
    "accumulate: micro-step": 12,
    "accumulate: final step": 52,
    "accumulate, in one program": 52,
    "ema_of_params": 52,
    "monitor: step between": 40,
}


@functools.cache
def around_steps(leaves: int) -> dict[str, Any]:
    """What goes around AdamW's step at a million elements, in one array or in three, read."""
    one = side_by_side.single(MILLION)
    like = one if leaves == 1 else [side_by_side.single(MILLION + i) for i in range(leaves)]
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        return {
            name: read_program(compiled, like)
            for name, (compiled, _, _) in around.compiled_steps(like).items()
        }


arrays = pytest.mark.parametrize("leaves", [1, pytest.param(3, marks=pytest.mark.slow)])


@arrays
@pytest.mark.parametrize("name", MOVED)
def test_what_goes_around_the_step_copies_nothing(name: str, leaves: int) -> None:
    assert around_steps(leaves)[name].copies == 0


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU's step is one kernel")
@arrays
@pytest.mark.parametrize("name", MOVED)
def test_what_goes_around_the_step_moves_what_it_must(name: str, leaves: int) -> None:
    """0.01 for scalars. XLA's count, with the branches, is at least as large."""
    program = around_steps(leaves)[name]
    assert MOVED[name] <= program.always <= MOVED[name] + 0.01
    assert program.always <= program.bytes_per_param + 0.01


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU's step is one kernel")
@arrays
def test_measuring_reads_and_writes_no_more_than_the_updates_and_slots(leaves: int) -> None:
    """Before the step of 40 bytes: mu, nu and u are written to memory, as CPU sums one at a time.

    They are 12 each as ever, and u's quotient is 12; 40 more are the sums' own readings.
    """
    program = around_steps(leaves)["monitor: measuring step"]
    assert 48 <= program.bytes_per_param <= 88.01
    assert program.always == program.bytes_per_param
    assert program.temp_bytes / (leaves * MILLION) <= 12.01
    assert program.copies == 0


def test_the_two_counts_of_bytes_agree_where_there_is_no_branch() -> None:
    for name in ("adamw alone", "ema_of_params", "accumulate: final step", "optax.adamw"):
        program = around_steps(1)[name]
        assert program.always == pytest.approx(program.bytes_per_param, abs=0.01)


def test_a_train_step_copies_no_more_than_with_optax() -> None:
    like = side_by_side.network(64)
    ours, theirs = (
        read_program(side_by_side.train_step(tx, like), like)
        for tx in (adamx.adamw(1e-3), optax.adamw(1e-3))
    )
    assert ours.copies <= theirs.copies
    assert ours.bytes_per_param <= theirs.bytes_per_param * 1.001


class counted(adamx.Transformation):
    """Passes the updates on, and counts how often it is traced."""

    calls: Any

    def accumulate(self, u: jax.Array, slots: Any, step: Any) -> Any:
        self.calls.append((u.shape, str(u.dtype)))
        return {}


@pytest.mark.parametrize("leaves", [3, 30])
def test_the_kernel_is_traced_once_for_each_shape_and_dtype(leaves: int) -> None:
    kinds = [((8,), jnp.float32), ((2, 3), jnp.float32), ((8,), jnp.bfloat16)]
    params = [jnp.ones(*kinds[i % len(kinds)]) for i in range(leaves)]
    calls: list[Any] = []
    tx = adamx.chain(counted(calls), adamx.adamw(1e-3))
    adamx.make_step(tx).lower(params, tx.init(params), params)
    assert len(calls) == len(kinds)


class Compiled(logging.Handler):
    """Keeps the names of the functions that XLA compiles."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        found = re.search(r"Finished XLA compilation of jit\((\S+)\)", record.getMessage())
        if found:
            self.names.append(found.group(1))


def test_update_outside_jit_compiles_once() -> None:
    params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    calls: list[Any] = []
    tx = adamx.chain(counted(calls), adamx.adamw(1e-3))
    state = tx.init(params)
    handler = Compiled()
    logger = logging.getLogger("jax")
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            for number in range(5):
                grads = jax.tree.map(lambda x, n=number: jnp.full_like(x, n), params)
                updates, state = tx.update(grads, state, params)
                params = adamx.apply_updates(params, updates)
    finally:
        logger.removeHandler(handler)
    assert handler.names.count("update") == 1
    assert len(calls) == 2  # one a shape
