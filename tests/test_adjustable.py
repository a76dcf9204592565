"""`adjustable`: a hyperparameter that the state holds, and that is changed there by hand."""

import copy
import functools
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import mesh_of
from scheduled import (
    MEMBERS,
    STEPS,
    ULP,
    VALUES,
    W,
    build,
    function_of,
    schedules,
    takes,
)

import adamx
from adamx import adjustable

pytestmark = pytest.mark.usefixtures("quick_compiler")

T = np.arange(1.0, STEPS + 1)
WRONG: Any = "fast"
ANY: Any = adjustable(0.9)
ONES = {"w": jnp.ones(3), "b": jnp.ones(2)}
# Nesterov's look-ahead needs the next step's decay, which nobody knows if it is set by hand
AHEAD = ("sgd_nesterov", "rmsprop_nesterov", "nadam", "nadamw", "muon")
FAST = ("adamw", "schedule_free_adamw", "stable_adamw", "lion")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
        for name in MEMBERS
        if name not in AHEAD
    ],
)
def test_every_scheduled_argument_may_be_set_by_hand(name: str) -> None:
    """Set to a schedule's values in each step it is the schedule; bounds as in scheduled."""
    arguments = [a for a in takes(function_of(name), schedule=True)
                 if a not in MEMBERS[name].fixed]  # fmt: skip
    first = {argument: adjustable(float(VALUES[argument][0])) for argument in VALUES}
    txs = build(name, schedules()), build(name, first)
    grads, w = jnp.asarray(MEMBERS[name].g, jnp.float32), jnp.asarray(W, jnp.float32)
    states = [tx.init(w) for tx in txs]
    assert set(states[1]) == set(states[0]) | {*arguments}

    @jax.jit
    def step(states, w, g):
        return [tx.update(g, state, w) for tx, state in zip(txs, states, strict=True)]

    for t in range(STEPS):
        now = {argument: jnp.float32(VALUES[argument][t]) for argument in arguments}
        new = {  # in each group
            name: jax.tree.map(lambda _, x=x: x, states[1][name]) for name, x in now.items()
        }
        (a, one), (b, two) = step([states[0], states[1] | new], w, grads[t])
        np.testing.assert_allclose(
            b, a, rtol=0, atol=(8 + t) * ULP * MEMBERS[name].worse * float(jnp.abs(a).max())
        )
        for argument in arguments:
            assert {*map(float, jax.tree.leaves(two[argument]))} == {
                np.float32(VALUES[argument][t])
            }
        states = [one, two]
    assert step._cache_size() == 1  # pyright: ignore


def test_it_is_inject_hyperparams_with_one_name_in_one_state():
    """Both multiply by minus the rate in float32: bit for bit."""
    ours, theirs = adamx.sgd(adjustable(0.5)), optax.inject_hyperparams(optax.sgd)(0.5)
    state: Any = ours.init(ONES)
    other: Any = theirs.init(ONES)
    for rate in (0.5, 0.3, 0.0):
        state["learning_rate"] = other.hyperparams["learning_rate"] = jnp.float32(rate)
        a, state = ours.update(ONES, state)
        b, other = theirs.update(ONES, other)
        jax.tree.map(np.testing.assert_array_equal, a, b)


WRAPPED = {
    "alone": lambda tx: tx,
    "skip_nonfinite": adamx.skip_nonfinite,
    "masters": adamx.master_weights,
    "monitor, accumulate": lambda tx: adamx.monitor(adamx.accumulate(tx, 2), every=3),
    "accumulate, monitor": lambda tx: adamx.accumulate(adamx.monitor(tx, every=3), 2),
    "after Optax's": lambda tx: adamx.chain(optax.clip(9.0), tx),
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.usefixtures("standard_promotion")
def test_a_new_rate_acts_from_the_next_step_on_and_nothing_is_compiled_anew(name):
    tx = WRAPPED[name](adamx.sgd(adjustable(0.5)))
    every = 2 if "accumulate" in name else 1
    step, params = adamx.make_step(tx), jax.tree.map(jnp.zeros_like, ONES)
    state, sizes = tx.init(params), []
    for rate in (0.5, 0.25, 0.125, 0.0625):
        state["learning_rate"] = jnp.float32(rate)
        for _ in range(every * 3):
            params, state = step(params, state, ONES)
        assert float(state["learning_rate"]) == rate and state["learning_rate"].dtype == jnp.float32
        sizes.append(step._cache_size())  # pyright: ignore
    np.testing.assert_array_equal(params["w"], -3 * (0.5 + 0.25 + 0.125 + 0.0625))
    assert len(set(sizes)) == 1


def test_each_group_has_its_own():
    tx = adamx.by_path(
        {"b": {"learning_rate": adjustable(0.25)}},
        default=functools.partial(adamx.sgd, learning_rate=adjustable(1.0)),
    )
    state = adamx.skip_nonfinite(adamx.chain(tx, adamx.scale(adjustable(2.0)))).init(ONES)
    assert {k: float(v) for k, v in state["learning_rate"].items()} == {"b": 0.25, "default": 1.0}
    state = tx.init(ONES)
    state["learning_rate"]["b"] = jnp.float32(0.5)
    updates, state = tx.update(ONES, state)
    assert float(updates["b"][0]) == -0.5 and float(updates["w"][0]) == -1.0
    assert float(state["learning_rate"]["b"]) == 0.5


def test_a_bad_step_keeps_what_was_set():
    tx = adamx.skip_nonfinite(adamx.sgd(adjustable(0.5)))
    state = tx.init(ONES) | {"learning_rate": jnp.float32(0.25)}
    updates, state = tx.update({"w": jnp.full(3, jnp.nan), "b": jnp.ones(2)}, state)
    assert int(state["skipped"]) == 1 and float(state["learning_rate"]) == 0.25
    assert not updates["b"].any()


@pytest.mark.parametrize(("given", "used"), [(-1.0, 0.0), (2.0, 1 - 2.0**-24), (0.75, 0.75)])
def test_a_value_outside_the_range_counts_as_the_nearest_inside(given, used):
    """In the average; the entry stays as it was set."""
    tx = adamx.ema(adjustable(0.5))
    state = tx.init(jnp.zeros(1)) | {"decay": jnp.float32(given), "mu": jnp.ones(1)}
    updates, state = tx.update(jnp.zeros(1), state)
    assert float(updates[0]) == np.float32(used) and float(state["decay"]) == given


def test_nan_is_seen():
    tx = adamx.sgd(adjustable(0.5))
    state = tx.init(jnp.zeros(1)) | {"learning_rate": jnp.float32(jnp.nan)}
    assert jnp.isnan(tx.update(jnp.ones(1), state)[0]).all()


def test_a_run_goes_on_with_what_was_set():
    """After a checkpoint, and in a run that had a number or a schedule so far."""
    tx = adamx.adam(adjustable(0.5))
    state = tx.init(ONES) | {"learning_rate": jnp.float32(0.25)}
    saved = jax.device_get(tx.update(ONES, state)[1])
    restored, said = adamx.adapt_state(tx, ONES, saved)
    assert float(restored["learning_rate"]) == 0.25 and not said.filled and not said.dropped
    _, state = tx.update(ONES, restored)
    assert float(state["learning_rate"]) == 0.25
    scheduled = adamx.adam(optax.linear_schedule(1.0, 0.0, 4))
    state = scheduled.init(ONES)
    for _ in range(3):
        _, state = scheduled.update(ONES, state)
    _, state = tx.update(ONES, state)
    assert float(state["learning_rate"]) == 0.5  # schedule(2), the one last used


def test_an_entry_that_is_missing_or_no_number_is_named():
    tx = adamx.adamw(adjustable(0.5), weight_decay=adjustable(0.1))
    state = adamx.adamw(0.5).init(ONES)
    with pytest.raises(ValueError, match=r"no 'weight_decay'.*adapt_state"):
        tx.update(ONES, state, ONES)
    carried, said = adamx.adapt_state(tx, ONES, state)
    assert said.filled == ("weight_decay",) and float(carried["weight_decay"]) == np.float32(0.1)
    with pytest.raises(ValueError, match=r"state\['learning_rate'\] is float32\[2\]"):
        tx.update(ONES, carried | {"learning_rate": jnp.ones(2)}, ONES)


def test_a_python_number_in_the_state_becomes_a_float32_array():
    tx = adamx.sgd(adjustable(0.5))
    updates, state = tx.update(ONES, tx.init(ONES) | {"learning_rate": 0.25})
    assert float(updates["w"][0]) == -0.25
    assert state["learning_rate"].dtype == jnp.float32 and not state["learning_rate"].weak_type


def test_no_entry_of_a_fresh_state_belongs_to_anyone_else():
    tx = adamx.adam(adjustable(0.5), b1=adjustable(0.9))
    step, params = adamx.make_step(tx), jax.tree.map(jnp.copy, ONES)
    kept = tx.init(ONES)
    step(params, tx.init(ONES), ONES)  # donates the other
    assert float(kept["learning_rate"]) == 0.5 and float(tx.init(ONES)["b1"]) == np.float32(0.9)


def test_one_object_under_two_names_and_one_name_for_two():
    once = adjustable(0.5)
    assert {"learning_rate", "weight_decay"} <= adamx.adamw(once, weight_decay=once).init(
        ONES
    ).keys()
    both = adjustable(0.5, "betas")
    state = adamx.adam(0.1, b1=both, b2=both).init(ONES)
    assert "betas" in state and not {"b1", "b2"} & state.keys()
    tx = adamx.chain(adamx.scale(both), optax.identity(), adamx.scale(both))
    assert float(tx.update(ONES, tx.init(ONES))[0]["w"][0]) == 0.25


def test_states_of_one_optimizer_have_rates_of_their_own_under_vmap():
    tx = adamx.adam(adjustable(0.5), eps=0.0)
    params = jnp.zeros((3, 2))
    state = jax.vmap(tx.init)(params) | {"learning_rate": jnp.array([0.5, 0.25, 0.0])}
    updates, state = jax.vmap(tx.update)(jnp.ones((3, 2)), state)
    np.testing.assert_array_max_ulp(updates[:, 0], jnp.array([-0.5, -0.25, 0.0]), 2)


def test_it_is_a_value():
    a, b = (adamx.adam(adjustable(0.5), b1=adjustable(0.9)) for _ in range(2))
    assert a == b and hash(a) == hash(b) and a != adamx.adam(adjustable(0.25), b1=adjustable(0.9))
    assert "scale_by_learning_rate(adjustable(0.5, 'learning_rate'))" in repr(a)
    assert repr(adjustable(np.array(0.5))) == "adjustable(0.5)"
    for other in (pickle.loads(pickle.dumps(a)), copy.deepcopy(a)):
        assert other == a
        other.update(ONES, other.init(ONES))
    text = str(adamx.summary(a, ONES))
    assert "lr_t = adjustable(0.5, 'learning_rate')\n" in text + "\n"


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: adjustable(WRONG), TypeError, "value must be a number, got 'fast'"),
        (lambda: jax.jit(adjustable)(0.5), TypeError, "value must be a number, got .*Trace"),
        (lambda: adamx.sgd(adjustable(-1.0)), ValueError, "sgd: learning_rate must be finite"),
        (lambda: adamx.ema(adjustable(1.0)), ValueError, r"ema: decay must be in \[0, 1\)"),
        (lambda: adamx.adam(0.1, **{"eps": ANY}), TypeError, "eps must be a number"),
        (lambda: adamx.radam(0.1, **{"b2": ANY}), TypeError, "only a constant decay"),
        (lambda: adamx.adam(0.1, b1=adjustable(0.9), moments="packed8"), TypeError, "b1"),
        (
            lambda: adamx.chain(adamx.ema(adjustable(0.9)), adamx.trace(adjustable(0.9))),
            ValueError,
            r"two arguments keep 'decay'.*adjustable\(0.9, name=...\)",
        ),
        (lambda: adamx.ema(adjustable(0.9, "mu")), ValueError, "two stages keep 'mu'"),
        (lambda: adamx.ema(adjustable(0.9, "count")), ValueError, "'count' is the state's own"),
        (
            lambda: adamx.chain(adamx.scale(adjustable(1.0, "learning_rate")), adamx.sgd(0.1)),
            ValueError,
            "two stages keep 'learning_rate'",
        ),
        (
            lambda: optax.sgd(adjustable(0.1)).update(ONES, optax.sgd(0.1).init(ONES)),
            TypeError,
            "inject_hyperparams",
        ),
    ],
)
def test_mistakes_are_named(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_without_it_the_entry_is_a_record_and_is_overwritten():
    """As `scale_by_learning_rate` and the page on the update say."""
    tx = adamx.sgd(0.5)
    updates, state = tx.update(ONES, tx.init(ONES) | {"learning_rate": jnp.float32(0.25)})
    assert float(updates["w"][0]) == -0.5 and float(state["learning_rate"]) == 0.5
    assert "overwritten" in str(adamx.scale_by_learning_rate.__doc__)


@pytest.mark.filterwarnings("ignore:jax.array_ref is deprecated:DeprecationWarning")  # by Flax
def test_a_rate_is_set_in_an_optimizer_of_flax_nnx():
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.zeros(2))

    model = Model()
    optimizer = nnx.Optimizer(model, adamx.sgd(adjustable(0.5)), wrt=nnx.Param)
    traced = []

    @nnx.jit
    def train(model, optimizer):
        traced.append(1)
        optimizer.update(model, nnx.grad(lambda m: m.w[...].sum())(model))

    train(model, optimizer)
    optimizer.opt_state["learning_rate"][...] = jnp.float32(0.25)
    train(model, optimizer)
    np.testing.assert_array_equal(model.w[...], -0.75)
    assert len(traced) == 1


def test_a_rate_is_set_in_a_sharded_state():
    mesh = mesh_of((8,), ("x",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    w = jax.device_put(jnp.zeros(8), place)
    tx = adamx.sgd(adjustable(0.5))
    step, state = adamx.make_step(tx), jax.jit(tx.init)(w)
    for _ in range(2):  # the first state has other placements than those that a step returns
        w, state = step(w, state, jax.device_put(jnp.ones(8), place))
    size = step._cache_size()  # pyright: ignore
    there = state["learning_rate"].sharding
    state["learning_rate"] = jax.device_put(jnp.float32(0.25), there)
    w, state = step(w, state, jax.device_put(jnp.ones(8), place))
    np.testing.assert_array_equal(w, -1.25)
    assert step._cache_size() == size  # pyright: ignore
