"""The guard against spikes of the loss and of the gradient's norm."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import on_cpu
from table import OUTSIDE

import adamx
from adamx.inspect.program import read_program

quick = pytest.mark.usefixtures("quick_compiler")

RATE = optax.linear_schedule(0.1, 0.0, 10)
WINDOW, SIGMA, LIMIT = 8, 1.5, 3


def decisions(norms, losses, window=WINDOW, sigma=SIGMA, limit=LIMIT):
    """Say of each step whether it is a spike and whether it is taken, in float64, from lists.

    Also return how close a decision was: the smallest distance to the bound, relative to the value.
    """
    histories: tuple[list[float], list[float]] = [], []
    spikes, taken, in_a_row, closest = [], [], 0, np.inf
    for values in zip(norms, losses, strict=True):
        usual = True
        for x, history in zip(values, histories, strict=True):
            last = np.array(history[-window:])
            if 2 * len(last) >= window:
                bound = last.mean() + sigma * last.std()
                usual &= bool(x <= bound)
                closest = min(closest, abs(1 - bound / x))
        takes = usual or in_a_row >= limit
        in_a_row = 0 if usual else in_a_row + 1
        spikes.append(not usual)
        taken.append(takes)
        for x, history in zip(values, histories, strict=True):
            if takes and np.isfinite(x):
                history.append(x)
    return np.array(spikes), np.array(taken), closest


def followed(tx, norms, losses):
    """Return (updates, counters) of a run whose gradients have these norms."""

    def step(state, now):
        norm, loss = now
        updates, state = tx.update(jnp.array([0.6, -0.8]) * norm, state, loss=loss)
        return state, (updates[0], state["spikes"], state["consecutive_spikes"], state["count"])

    state = tx.init(jnp.zeros(2))
    return jax.jit(lambda: jax.lax.scan(step, state, (norms, losses)))()


def drawn(number=120):
    """Norms and losses with outliers, and in the middle another level for good."""
    generator = np.random.default_rng(3)
    norms, losses = np.exp(generator.normal(size=(2, number)) * [[0.3], [0.1]])
    norms[generator.uniform(size=number) < 0.06] *= 4
    losses[generator.uniform(size=number) < 0.06] += 1
    norms[70:] *= 5
    norms[40] = losses[50] = np.inf
    return norms.astype(np.float32), losses.astype(np.float32)


@quick
def test_it_skips_what_the_formula_skips_until_it_gives_up():
    norms, losses = drawn()
    spikes, taken, closest = decisions(norms.astype(float), losses.astype(float))
    # a dozen roundings of 2^-24, beside values up to a hundred times as large as their deviation
    assert closest > 1e-4
    # the loss alone, the norm alone, neither, both, and steps that were taken in spite of it
    by_norm, _, _ = decisions(norms.astype(float), np.ones_like(norms, float))
    assert spikes[4:].sum() > by_norm.sum() > 5 and (spikes & taken).any() and taken[-10:].any()
    tx = adamx.skip_spikes(adamx.sgd(1.0), WINDOW, SIGMA, LIMIT)
    state, (updates, total, in_a_row, count) = followed(tx, norms, losses)
    np.testing.assert_array_equal(np.asarray(updates) != 0, taken)
    np.testing.assert_array_equal(total, np.cumsum(~taken))
    np.testing.assert_array_equal(count, np.cumsum(taken))
    np.testing.assert_array_equal(np.asarray(in_a_row) > 0, spikes)
    for name, values in (("recent_norms", norms), ("recent_losses", losses)):
        entered = values[taken & np.isfinite(values)][::-1][:WINDOW]
        np.testing.assert_allclose(state[name], entered, rtol=4 * 2.0**-24)  # a norm is a root


def run(tx, norms, state=None, **extra) -> Any:
    state = tx.init(jnp.zeros(1)) if state is None else state
    for norm in norms:
        _, state = tx.update(jnp.array([norm]), state, **extra)
    return state


def test_nothing_is_skipped_before_half_the_window_is_filled_and_the_loss_has_its_own():
    tx = adamx.skip_spikes(adamx.sgd(1.0), 4)
    state = run(tx, [1.0, 100.0, np.nan])
    assert [int(state[n]) for n in ("count", "spikes")] == [2, 1]
    assert int(run(tx, [1.0, np.nan])["spikes"]) == 0
    state = run(tx, [1.0] * 5)
    assert int(run(tx, [1.0], state, loss=9e9)["spikes"]) == 0  # the first loss
    state = run(tx, [1.0, 1.0], state, loss=2.0)
    assert int(run(tx, [1.0], state, loss=2.01)["spikes"]) == 1
    assert (
        int(run(tx, [1.0], state)["spikes"]) == 0 == int(run(tx, [1.0], state, loss=None)["spikes"])
    )


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e17])
def test_equal_values_are_no_spike_and_only_ratios_count(size):
    """Whatever the rounding of their mean: 0.1 has no exact sum. A norm ends at 1e19."""
    values = [0.1 * size] * 5 + [0.2 * size, 0.1 * size]
    spread = [size * x for x in (0.1, 0.2, 0.1, 0.2, 0.4, 0.9)]  # the deviation is 0.05, then 0.11
    tx = adamx.skip_spikes(adamx.sgd(1.0), 6, 6.0)
    state = tx.init(jnp.zeros(1))
    seen = []
    for x in values:
        state = run(tx, [1.0], state, loss=x)
        seen.append(int(state["spikes"]))
    assert seen == [0, 0, 0, 0, 0, 1, 1]
    state, seen = tx.init(jnp.zeros(1)), []
    for x in spread:
        state = run(tx, [1.0], state, loss=x)
        seen.append(int(state["spikes"]))
    assert seen == [0, 0, 0, 0, 0, 1]
    if size == 1.0:
        assert int(run(tx, values)["spikes"]) == 1


def test_a_loss_as_large_as_a_float32_is_a_spike():
    tx = adamx.skip_spikes(adamx.sgd(1.0), 6, 6.0)
    state = tx.init(jnp.zeros(1))
    for loss in (1.0, 2.0, 1.5, 1.7):
        state = run(tx, [1.0], state, loss=loss)
    for count, loss in enumerate((3e38, 1e25, np.inf, np.nan), 1):
        state = run(tx, [1.0], state, loss=loss)
        assert int(state["spikes"]) == count


def test_a_negative_loss_is_compared_as_any_other():
    tx = adamx.skip_spikes(adamx.sgd(1.0), 4, 2.0)
    state = tx.init(jnp.zeros(1))
    for loss in (-3.0, -1.0, 0.0, -4.0):  # 0 is the bound
        state = run(tx, [1.0], state, loss=loss)
    assert int(state["spikes"]) == 0
    np.testing.assert_array_equal(state["recent_losses"], [-4.0, -1.0, -3.0, 0.0])
    assert int(run(tx, [1.0], state, loss=0.5)["spikes"]) == 1


@quick
def test_a_lasting_change_of_level_is_learnt_with_a_limit_and_never_without():
    """With k new values of n the bound is k/n + sigma root(k/n (1 - k/n)) of the way up."""
    shares = np.arange(1, 5) / 128
    bounds = shares + 6 * np.sqrt(shares * (1 - shares))
    assert (bounds < 1).tolist() == [True, True, True, False]
    norms = np.array([1.0] * 128 + [5.0] * 30, np.float32)
    losses = np.ones_like(norms)
    for limit, skipped in ((None, 30), (10, 10)):
        tx = adamx.skip_spikes(adamx.sgd(1.0), max_consecutive=limit)
        _, (_, total, in_a_row, _) = followed(tx, norms, losses)
        assert int(total[-1]) == skipped
        expected = 30 if limit is None else 0
        assert int(in_a_row[-1]) == expected
        if limit:  # ten are skipped, and four taken that are spikes all the same
            assert [int(in_a_row[128 + i]) for i in (9, 13, 14)] == [10, 14, 0]


@quick
def test_a_skipped_step_changes_nothing_but_its_counters():
    params = {"w": jnp.array([1.0, -0.0]), "b": jnp.array(2.0)}
    inner = adamx.chain(adamx.clip_by_global_norm(1.0, record=True), adamx.adamw(RATE))
    tx = adamx.skip_spikes(inner, 2)
    step: Any = jax.jit(lambda g, s, loss: tx.update(g, s, params, loss=loss))
    state = tx.init(params)
    for _ in range(2):
        _, state = step(params, state, 1.0)
    for bad in ((jax.tree.map(lambda p: 9 * p, params), 1.0), (params, 1.5)):
        updates, after = step(bad[0], state, bad[1])
        moved = adamx.apply_updates(params, updates)
        counters = {"spikes": 1, "consecutive_spikes": 1}
        assert {name: int(after[name]) for name in counters} == counters
        kept = [{k: v for k, v in x.items() if k not in counters} for x in (after, state)]
        for a, b in zip(*map(jax.tree.leaves, (kept[0], kept[1])), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(*map(jax.tree.leaves, (moved, params)), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


FAST = {"master_weights", "monitor, skip_nonfinite, masters"}
OTHERS = [name for name in OUTSIDE if "skip_spikes" not in name]


@quick
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
        for name in (*OTHERS, *(f"{name} inside" for name in OTHERS))
    ],
)
def test_other_wrappers_around_it_and_inside_leave_its_decisions_alone(name):
    """The parameters of a run with a spike are those of the run without that step."""
    other = OUTSIDE[name.removesuffix(" inside")]
    inner = adamx.momentum(0.5)
    if name.endswith(" inside"):
        tx = adamx.skip_spikes(other(inner), 4)
    else:
        tx = other(adamx.skip_spikes(inner, 4))
    step, runs = adamx.make_step(tx), []
    for norms in ([1.0, 2.0, 50.0, 1.5], [1.0, 2.0, 1.5]):
        params = {"w": jnp.array([1.0], jnp.bfloat16)}
        state = tx.init(params)
        for norm in norms:
            params, state = step(params, state, {"w": jnp.array([norm], jnp.bfloat16)})
        kept = {k: v for k, v in state.items() if k not in ("spikes", "monitor_step")}
        runs.append((params, kept, state["spikes"]))
    assert [int(spikes) for *_, spikes in runs] == [1, 0]
    for a, b in zip(*map(jax.tree.leaves, (runs[0][:2], runs[1][:2])), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_micro_batches_are_judged_one_by_one_outside_and_as_a_mean_inside():
    outside = adamx.skip_spikes(adamx.accumulate(adamx.sgd(1.0), 2), 4)
    inside = adamx.accumulate(adamx.skip_spikes(adamx.sgd(1.0), 4), 2)
    norms = [1.0, 1.5, 1.2, 50.0, 1.3]
    state = run(outside, norms)  # 50 is left out, so that 1.3 makes the second step
    assert [int(state[n]) for n in ("count", "micro_step", "spikes")] == [2, 0, 1]
    state = run(inside, [*norms, 1.1, 1.0, 50.0])  # means: 1.25, 25.6, 1.2, 25.5
    assert [int(state[n]) for n in ("count", "spikes")] == [4, 0]
    state = run(inside, [1.0, 1.5, 1.2, 1.3, 1.2, 50.0])
    assert [int(state[n]) for n in ("count", "micro_step", "spikes")] == [2, 0, 1]


def test_a_run_goes_on_bit_for_bit_and_a_history_of_another_length_begins_anew():
    tx = adamx.skip_spikes(adamx.adam(0.1), 4)
    half = run(tx, [1.0, 2.0, 9e3], loss=0.7)
    saved = jax.tree.map(np.asarray, half)
    restored = jax.tree.map(jnp.asarray, saved)
    a, b = run(tx, [3.0, 2.5, 9e3], half, loss=0.6), run(tx, [3.0, 2.5, 9e3], restored, loss=0.6)
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    longer = adamx.skip_spikes(adamx.adam(0.1), 6)
    with pytest.raises(ValueError, match=r"state\['recent_norms'\] is float32\[4\], expected"):
        run(longer, [1.0], half)
    recent = {"recent_norms", "recent_losses"}
    rest = {name: x for name, x in half.items() if name not in recent}
    carried, adaptation = adamx.adapt_state(longer, jnp.zeros(1), rest)
    assert set(adaptation.filled) == recent
    assert int(carried["spikes"]) == int(half["spikes"])
    assert int(run(longer, [5.0], carried)["spikes"]) == int(half["spikes"])


SIZE = 2**16


@pytest.mark.parametrize(
    ("around", "clip", "moved"),
    [
        (adamx.skip_spikes, None, 44),
        (lambda tx: adamx.skip_nonfinite(adamx.skip_spikes(tx)), adamx.clip_by_global_norm(1), 44),
        pytest.param(
            lambda tx: adamx.skip_spikes(adamx.skip_nonfinite(tx)),
            adamx.clip_by_zscore(),
            44,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda tx: adamx.skip_nonfinite(adamx.monitor(adamx.skip_spikes(tx), every=100)),
            adamx.clip_by_global_norm(1),
            44,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["alone", "in a guard, around a clip", "around both", "with a monitor between"],
)
def test_guards_and_clips_read_the_gradient_once_more_in_all(around, clip, moved):
    on_cpu("the bytes are those of XLA for CPUs; tests/test_accelerators.py has a GPU's")
    params = {"w": jnp.zeros(SIZE)}
    tx = around(adamx.adamw(0.1) if clip is None else adamx.chain(clip, adamx.adamw(0.1)))
    lowered = adamx.make_step(tx).lower(params, tx.init(params), params, loss=1.0)
    program = read_program(lowered.compile(), params)
    # scalars, rings of 512 bytes, and the buffers of their sums
    assert program.always == pytest.approx(moved, abs=32 * 1024 / SIZE)
    assert program.copies == 0 and program.temp_bytes < SIZE


def test_a_mean_of_gradients_is_not_measured_for_a_guard_around():
    summed = adamx.accumulate(adamx.clip_by_global_norm(1.0), 2)
    assert not summed.measures_norm and adamx.monitor(adamx.clip_by_zscore()).measures_norm
    assert not adamx.chain(adamx.ema(0.9), adamx.clip_by_zscore()).measures_norm
    groups = adamx.by_path({"w": adamx.sgd(0.1)}, default=adamx.sgd(0.1))
    assert not groups.measures_norm and adamx.skip_spikes(groups).measures_norm


def test_bad_arguments_are_named():
    inner = adamx.sgd(0.1)
    for bad, error in ((0, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match="skip_spikes: window must be a whole number >= 1"):
            adamx.skip_spikes(inner, bad)  # pyright: ignore
    for bad in (-1.0, np.nan):
        with pytest.raises(ValueError, match="skip_spikes: sigma must be finite and >= 0"):
            adamx.skip_spikes(inner, sigma=bad)
    with pytest.raises(ValueError, match="skip_spikes: max_consecutive must be a whole number"):
        adamx.skip_spikes(inner, max_consecutive=-1)
    with pytest.raises(TypeError, match=r"^skip_spikes: tx must be an adamx or Optax transf"):
        adamx.skip_spikes(0.1)  # pyright: ignore
    tx = adamx.skip_spikes(inner)
    for bad in (jnp.ones(2), 1j, True):
        with pytest.raises(TypeError, match="skip_spikes: loss must be a real scalar"):
            run(tx, [1.0], loss=bad)


def test_a_fresh_history_has_no_nan_for_debuggers():
    with jax.debug_nans(True):
        assert int(run(adamx.skip_spikes(adamx.sgd(0.1), 4), [0.0, 0.0, 1.0, 1.0])["spikes"]) == 0


def test_it_prints_its_arguments():
    tx = adamx.skip_spikes(adamx.sgd(0.1), 64, max_consecutive=5)
    inner = "chain(scale_by_learning_rate(0.1))"
    assert repr(tx) == f"skip_spikes({inner}, window=64, max_consecutive=5)"
    assert "above those of the last 64 by 6.0 standard deviations" in str(
        adamx.summary(tx, {"w": jnp.zeros(3)})
    )
