"""A leaf that is added, thawed or reset in step N takes the steps of a run that began then.

The run that it is compared with starts with all leaves, and its schedules start at N. Its program
is another one, so the two agree to the roundings of a compilation (`assert_close`). So do the
leaves that did not begin late with the run in which no leaf did: XLA:CPU computes the expm1 of two
counts in vector instructions and that of one in scalar ones, which differ by a ULP or two.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, draw, mesh_of, spec
from jax.sharding import NamedSharding, PartitionSpec
from table import TRANSFORMATIONS, of_every_other_kind

import adamx
from adamx.core.checks import ranges_of

pytestmark = pytest.mark.usefixtures("quick_compiler")

N, MORE = 6, 3
PARAMS = {"old": jnp.array([[0.5, -1.0], [2.0, 0.25]]), "new": jnp.array([[1.0, -2.0, 0.5]])}
LATER = range(N, N + MORE)

# What these do depends on the memory of all leaves, which differs between the runs.
OF_ALL_MEMORIES = {"clip_last", "clip_by_zscore", "skip_spikes"}


def shifted(tx: Any, steps: int) -> Any:
    """Return a transformation whose schedules start at a step."""

    def later(schedule):
        return lambda count: schedule(count + steps)

    fields = {name: getattr(tx, name) for name in ranges_of(type(tx))}
    fields = {
        name: later(value)
        for name, value in fields.items()
        if callable(value)
        and not isinstance(value, adamx.adjustable)
        and not getattr(value, "of_age", False)
    }
    inside = [shifted(child, steps) for child in tx.children]
    return tx.with_children(inside).with_fields(**fields)


def follow(tx, state, steps, params: Any = PARAMS):
    """Return the updates of some steps, and the state; the parameters stay where they are."""
    updates = []
    for step in steps:
        grads = {n: None if p is None else draw(PARAMS, step)[n] for n, p in params.items()}
        out, state = tx.update(grads, state, params)
        updates.append(out)
    return updates, state


def of(updates, leaf):
    return [u[leaf] for u in updates]


WAYS = {
    "reset": (PARAMS, lambda tx, state: adamx.reset(tx, state, PARAMS, "new")),
    "added": ({"old": PARAMS["old"]}, lambda tx, state: adamx.adapt_state(tx, PARAMS, state)[0]),
    "thawed": (
        PARAMS | {"new": None},
        lambda tx, state: adamx.adapt_state(tx, PARAMS, state)[0],
    ),
}


@pytest.mark.usefixtures("promotion_of_foreign_stages")
@of_every_other_kind(0)
def test_it_takes_the_steps_of_a_run_that_began_then(name):
    tx = TRANSFORMATIONS[name].make()
    expected = None
    for way, (before, begin) in WAYS.items():
        _, state = follow(tx, tx.init(before), range(N), before)
        if any(isinstance(x, dict) and "count" in x for x in state.values()) or "ema" in state:
            with pytest.raises(
                ValueError, match="'new' begins in the middle of the run, and the O"
            ):
                begin(tx, state)
            continue
        late = begin(tx, state)
        if way != "reset" and not set(tx.tree_names()) - {"remainder8", "master"}:
            assert "began" not in late  # it keeps nothing, so nothing of it can be new
            continue
        assert late.keys() == state.keys() | {"began"}
        steps = int(state["count"])
        assert int(late["began"]["new"]["count"]) == steps
        found, after = follow(tx, late, LATER)
        assert spec(after) == spec(late)
        if expected is None:
            anew = shifted(tx, steps)
            expected, _ = follow(anew, anew.init(PARAMS), LATER)
        if name not in OF_ALL_MEMORIES:
            assert_close(of(found, "new"), of(expected, "new"))
        if way == "reset" and name not in OF_ALL_MEMORIES:
            others, _ = follow(tx, state, LATER)
            assert_close(of(found, "old"), of(others, "old"))


def rising(step):
    return 1.0 - 0.5 / (1.0 + jnp.asarray(step, jnp.float32))


def late_state(tx, way="reset"):
    before, begin = WAYS[way]
    return begin(tx, follow(tx, tx.init(before), range(N), before)[1])


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_adams_first_step_is_the_learning_rate():
    tx = adamx.adam(0.1)
    for way in WAYS:
        (updates,), _ = follow(tx, late_state(tx, way), [N])
        np.testing.assert_allclose(jnp.abs(updates["new"]), 0.1, rtol=2e-6)  # but for eps


@pytest.mark.parametrize("decays", [{}, {"b1": rising, "b2": rising}], ids=["fixed", "scheduled"])
def test_a_group_that_was_frozen_begins_when_it_is_thawed(decays):
    make = functools.partial(adamx.adamw, 0.1, **decays)
    frozen = adamx.by_path({"new": None}, default=make)
    thawed = adamx.by_path({"new": {"weight_decay": 0.5}}, default=make)
    _, state = follow(frozen, frozen.init(PARAMS), range(N))
    late, adaptation = adamx.adapt_state(thawed, PARAMS, state)
    assert adaptation.late == ("new",) and "began 1: new." in str(adaptation)
    found, _ = follow(thawed, late, LATER)
    anew = shifted(make(weight_decay=0.5), N)
    expected, _ = follow(anew, anew.init(PARAMS), LATER)
    assert_close(of(found, "new"), of(expected, "new"))


CLIPS = {
    n: adamx.clip_by_global_norm(lambda t, c=c: c * rising(t))
    for n, c in [("old", 0.1), ("new", 0.2)]
}


class clip_of_each(adamx.Transformation):
    def for_leaf(self, path, leaf):
        return CLIPS[path]


@pytest.mark.parametrize("clip", [CLIPS["old"], clip_of_each()], ids=["one", "of each leaf"])
def test_a_norm_of_the_tree_is_clipped_as_it_is_for_the_other_leaves(clip):
    tx = adamx.chain(clip, adamx.scale(1.0))
    found, _ = follow(tx, late_state(tx), LATER)
    expected, _ = follow(tx, follow(tx, tx.init(PARAMS), range(N))[1], LATER)
    assert_close(found, expected)


def test_a_leaf_keeps_its_moments_over_a_freeze_if_they_are_put_back():
    tx = adamx.adamw(0.1)
    frozen = adamx.by_path({"new": None}, default=tx)
    _, before = follow(tx, tx.init(PARAMS), range(N))
    _, state = follow(frozen, adamx.adapt_state(frozen, PARAMS, before)[0], LATER)
    for name in ("mu", "nu"):
        state[name]["new"] = before[name]["new"]
    after, adaptation = adamx.adapt_state(tx, PARAMS, state)
    assert adaptation.late == () and "began" not in after
    np.testing.assert_array_equal(after["mu"]["new"], before["mu"]["new"])


PAUSED = ["adam_scheduled_decays", "by_path", "adam_packed16", "adafactor"]
OTHERS = [n for n, case in TRANSFORMATIONS.items() if case.kind and n not in PAUSED]


@pytest.mark.usefixtures("promotion_of_foreign_stages")
@pytest.mark.parametrize(
    "name", [*PAUSED, *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)]
)
def test_a_leaf_goes_on_after_a_pause_as_if_there_had_been_none(name):
    tx, without = TRANSFORMATIONS[name].make(), {"old": PARAMS["old"]}
    _, before = follow(tx, tx.init(PARAMS), range(N))
    if any(isinstance(x, dict) and "count" in x for x in before.values()) or "ema" in before:
        with pytest.raises(ValueError, match="'new' begins in the middle of the run, and the O"):
            adamx.reset(tx, before, PARAMS, "new", to=before)
        return
    paused, _ = adamx.adapt_state(tx, without, before)
    _, paused = follow(tx, paused, range(4), without)  # two steps of an accumulation
    state, _ = adamx.adapt_state(tx, PARAMS, paused)
    state = adamx.reset(tx, state, PARAMS, "new", to=before)
    steps = int(state["count"]) - int(before["count"])
    assert int(state["began"]["new"]["count"]) == steps
    found, after = follow(tx, state, LATER)
    assert spec(after) == spec(state)
    expected, _ = follow(shifted(tx, steps), before, LATER)
    if name not in OF_ALL_MEMORIES:
        assert_close(of(found, "new"), of(expected, "new"))
    # and once more, from a state in which it is a leaf with an age of its own
    again = adamx.reset(tx, after, PARAMS, "new", to=state)
    assert again["began"]["new"].keys() == state["began"]["new"].keys()
    age = int(state["count"]) - steps
    assert int(again["count"]) - int(again["began"]["new"]["count"]) == age


def test_a_leaf_goes_on_with_what_its_group_recorded_in_two_stages_of_groups():
    def adam(b1):
        return adamx.scale_by_adam(b1=lambda step: b1 * rising(step), b2=0.9)

    tx = adamx.chain(
        adamx.by_path({"old": adamx.scale(2.0)}, default=adamx.scale(1.0)),
        adamx.by_path({"new": adam(0.5)}, default=adam(0.9)),
    )
    _, before = follow(tx, tx.init(PARAMS), range(N))
    state = adamx.reset(tx, before, PARAMS, "new", to=before)
    expected, _ = follow(tx, before, LATER)
    found, _ = follow(tx, state, LATER)
    assert_close(of(found, "new"), of(expected, "new"))


def test_a_state_to_go_back_to_is_an_earlier_one():
    tx = adamx.adamw(0.1)
    _, later = follow(tx, tx.init(PARAMS), range(N))
    with pytest.raises(
        ValueError, match="'new' has taken 6 steps in `to`, and the whole run only 0"
    ):
        adamx.reset(tx, tx.init(PARAMS), PARAMS, "new", to=later)
    with pytest.raises(ValueError, match="nu"):
        adamx.reset(tx, later, PARAMS, "new", to=adamx.momentum(0.1).init(PARAMS))


def test_masters_and_averages_that_go_on_while_a_leaf_is_frozen_are_not_its_moments():
    def around(tx):
        return adamx.master_weights(adamx.chain(tx, adamx.ema_of_params(0.9)))

    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    frozen = around(adamx.by_path({"new": None}, default=adamx.adam(0.1)))
    state = frozen.init(low)
    state = frozen.update(low, state, low)[1]
    _, adaptation = adamx.adapt_state(around(adamx.adam(0.1)), low, state)
    assert adaptation.late == ("new",)


def test_a_reset_leaf_keeps_its_master_and_its_part_of_a_sum():
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    tx = adamx.master_weights(adamx.accumulate(adamx.adam(0.1), 2))
    step, state, params = adamx.make_step(tx), tx.init(low), low
    for _ in range(3):
        params, state = step(params, state, low)
    late = adamx.reset(tx, state, params, ["new"])
    assert_same(adamx.masters(params, late), adamx.masters(params, state))
    assert_same(late["accumulated"], state["accumulated"])
    assert not late["mu"]["new"].any() and int(late["began"]["new"]["count"]) == 1


def test_a_leaf_that_begins_twice_has_the_later_age():
    tx = adamx.adam(0.1, b1=rising)
    _, state = follow(tx, late_state(tx, "added"), LATER)
    again = adamx.reset(tx, state, PARAMS, re.compile("new"))
    assert {k: float(v) for k, v in again["began"]["new"].items()} == {
        "count": N + MORE,
        "mu_correction": 0.0,
        "learning_rate": pytest.approx(0.1),
    }


@pytest.mark.parametrize(
    "tx",
    [
        adamx.adamw(0.1, b1=rising),
        adamx.monitor(adamx.skip_nonfinite(adamx.adam(0.1)), every=2),
        adamx.accumulate(adamx.by_path({"old": adamx.sgd(0.1)}, default=adamx.nadam(0.1)), 2),
        adamx.stacked(adamx.schedule_free_adamw(0.1), {"new": 1}),
    ],
    ids=["adamw", "monitor", "accumulate", "stacked"],
)
def test_such_a_state_goes_through_make_step_and_scan(tx):
    late, grads = late_state(tx), draw(PARAMS, 1)
    step = adamx.make_step(tx)
    params, state = jax.tree.map(jnp.copy, (PARAMS, late))  # which make_step donates
    for _ in range(2 * MORE):
        params, state = step(params, state, grads)

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (adamx.apply_updates(params, updates), state), None

    scanned, _ = jax.lax.scan(body, (PARAMS, late), length=2 * MORE)
    assert spec(state) == spec(late)
    assert_close((params, state), scanned)


def test_what_is_recorded_goes_on_where_a_gradient_is_none_and_stays_in_a_skipped_step():
    tx = adamx.skip_nonfinite(adamx.adam(0.1, b1=rising))
    late = late_state(tx)
    grads = draw(PARAMS, 1)
    both = tx.update(grads, late, PARAMS)[1]
    without = tx.update(grads | {"new": None}, late, PARAMS)[1]
    assert_close(both["began"], without["began"])
    assert float(both["began"]["new"]["mu_correction"]) > 0
    skipped = tx.update(grads | {"old": grads["old"] * jnp.inf}, both, PARAMS)[1]
    assert_same(skipped["began"], both["began"])


def test_ages_are_carried_over_and_dropped_with_their_leaves():
    tx = adamx.adam(0.1, b1=rising)
    _, late = follow(tx, late_state(tx), LATER)
    for saved in (late, jax.tree.map(np.asarray, late)):
        state, adaptation = adamx.adapt_state(tx, PARAMS, saved)
        assert_same(state, late)
        assert (adaptation.filled, adaptation.dropped, adaptation.late) == ((), (), ())
    state, adaptation = adamx.adapt_state(tx, {"old": PARAMS["old"]}, late)
    assert "began" not in state and "began/new/count" in adaptation.dropped
    narrow = adamx.adam(0.1, b1=rising, moments="bfloat16")
    state, _ = adamx.adapt_state(narrow, PARAMS, late, saved_by=tx)
    assert_same(state["began"], late["began"])


def test_before_the_first_step_no_leaf_is_late():
    tx = adamx.adam(0.1)
    state, adaptation = adamx.adapt_state(tx, PARAMS, tx.init({"old": PARAMS["old"]}))
    assert "began" not in state | adamx.reset(tx, state, PARAMS, "*") and adaptation.late == ()


def test_it_has_a_sharding_and_lies_where_its_parameters_do():
    mesh = mesh_of((2,), ("x",))
    where = NamedSharding(mesh, PartitionSpec())
    params, tx = jax.device_put(PARAMS, where), adamx.adam(0.1)
    late = adamx.reset(tx, late_state(tx), params, "new")
    shardings = adamx.state_sharding(tx, params, state=late)
    assert jax.tree.structure(shardings) == jax.tree.structure(late)
    assert late["began"]["new"]["count"].sharding == shardings["began"]["new"]["count"] == where


def test_moments_are_read_from_such_a_state():
    tx = adamx.adam(0.1, moments="packed16")
    late = late_state(tx)
    assert not adamx.moments(late, tx)["mu"]["new"].any()


def test_the_monitor_corrects_with_the_leafs_own_age():
    eps = 1.0
    tx = adamx.monitor(adamx.adam(0.1, b2=0.5, eps=eps), every=1)
    params = {"old": jnp.ones(2), "new": jnp.ones(2)}
    state, grads = tx.init(params), jax.tree.map(lambda p: 1.25 * p, params)
    for _ in range(20):
        _, state = tx.update(grads, state, params)
    _, late = tx.update(grads, adamx.reset(tx, state, params, "new"), params)
    # sqrt(nu / (1 - 0.5)) is 1.25, and sqrt(nu / (1 - 0.5^21)) would be 0.88, below eps
    assert late["monitor"]["eps_share"] == {"old": 0.0, "new": 0.0}


def test_pytorch_gets_each_leafs_own_step_and_optax_cannot():
    tx, late = adamx.adam(0.1), late_state(adamx.adam(0.1))
    group = {"params": [0, 1], "amsgrad": False}
    like = {"state": {0: {"step": 0, "exp_avg": 0, "exp_avg_sq": 0}}, "param_groups": [group]}
    like["param_groups"][0] |= {"lr": 0.1}
    found = adamx.to_torch(late, tx, PARAMS, names={"old": 0, "new": 1}, like=like)
    assert [float(found["state"][i]["step"]) for i in (0, 1)] == [N, 0]
    with pytest.raises(ValueError, match=r"to_optax: the leaves \['new'\] began late"):
        adamx.to_optax(late, optax.adam(0.1), PARAMS)


def test_what_does_not_fit_is_refused():
    tx = adamx.adam(0.1)
    late = late_state(tx)
    for began, error, said in [
        ({"head": {"count": jnp.int32(1)}}, ValueError, r"state\['began'\] has \['head'\]"),
        ({"new": jnp.int32(1)}, TypeError, r"state\['began'\] must be a dict of the leaves"),
        ({"new": {}}, ValueError, r"no 'count'.*\(in state\['began'\]\['new'\]\)"),
        ({"new": {"count": 1.5}}, TypeError, r"whole number.*\(in state\['began'\]\['new'\]\)"),
    ]:
        with pytest.raises(error, match=said):
            tx.update(PARAMS, late | {"began": began}, PARAMS)
    with pytest.raises(ValueError, match="reset: the pattern 'neww' matches no leaf"):
        adamx.reset(tx, late, PARAMS, "neww")
    for patterns in (3, [3]):
        with pytest.raises(TypeError, match="reset: a pattern must be a string"):
            adamx.reset(tx, late, PARAMS, patterns)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="'began' is the state's own"):
        adamx.ema(0.9, name="began").init(PARAMS)


def test_late_leaves_of_any_ages_share_a_trace():
    traced = []

    class counted(adamx.Transformation):
        def slots(self, param):
            return {"mu": adamx.zeros(param)}

        def scalars(self, step):
            return 0.5, 1 / step.count.astype(float)

        def emit(self, u, slots, step):
            traced.append(u.shape)
            return u * step.scalars[0] * step.scalars[1] + step.count.astype(float)

    tx, params = counted(), {name: jnp.ones(2) for name in "abcd"}
    state = tx.init(params)
    for name in "abc":
        _, state = tx.update(params, state, params)
        state = adamx.reset(tx, state, params, name)
    traced.clear()
    updates, _ = tx.update(params, state, params)
    assert len(traced) == 2  # one for d, which is as old as the run
    ages = {"a": 3, "b": 2, "c": 1, "d": 4}
    for name, age in ages.items():
        np.testing.assert_allclose(updates[name], 0.5 / age + age, rtol=1e-6)


@pytest.mark.parametrize("where", [{"memory_kind": "pinned_host"}, {"over": "data"}], ids=str)
def test_slots_that_are_reset_stay_where_they_were(where):
    if "memory_kind" in where and jax.__version_info__ < (0, 10):
        pytest.skip("XLA cannot compile it for devices")
    mesh = mesh_of((2,), ("data",))
    params = {
        "w": jax.device_put(jnp.ones((4, 2), jnp.bfloat16), NamedSharding(mesh, PartitionSpec()))
    }
    tx = adamx.master_weights(adamx.adamw(0.1))
    wanted = adamx.state_sharding(tx, params, **where)
    state = jax.jit(tx.init, out_shardings=wanted)(params)
    assert adamx.masters(params, state)["w"].dtype == jnp.float32
    state = adamx.reset(tx, state, params, "w")
    jax.tree.map(
        lambda x, there: x.sharding.is_equivalent_to(there, x.ndim) or pytest.fail(), state, wanted
    )
    assert state["mu"]["w"].sharding.memory_kind == wanted["mu"]["w"].memory_kind
