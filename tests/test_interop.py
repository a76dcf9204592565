"""Runs that change over in their middle: from Optax and PyTorch to adamx, and back.

After the change the slots are the same numbers, so that what two programs may be apart k steps
later is what they may be apart k steps after the start: the counts of roundings are those of
test_agreement.py and test_family.py. Tests with PyTorch itself are skipped where it is not
installed; what it kept is also recorded (tests/data/record_torch.py).
"""

import functools
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import agreement
import agreement_family as family
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from agreement import RATE, of_one_sign
from helpers import thinned
from recordings import IN_FAMILY, LEAVES, RECORDING, TORCH

import adamx

pytestmark = pytest.mark.usefixtures("quick_compiler")

o: Any = optax  # its states are of no type
BEFORE, AFTER = 7, 10
ULP = 2.0**-23
PAIRS = {
    **{name: (pair.ours, pair.theirs) for name, pair in agreement.PAIRS.items()},
    **{
        f"family_{name}": (
            getattr(adamx, name)(RATE, **pair.options, **pair.ours),
            pair.theirs(RATE, **pair.options),
        )
        for name, pair in family.PAIRS.items()
        if pair.theirs
    },
}
ONE_WAY = {"family_adabelief", "family_schedule_free_adamw"}
"""An Optax transformation does not tell what the way back needs."""


runs_optax = pytest.mark.usefixtures("standard_promotion")


def ulps_of(name: str) -> tuple[np.ndarray, Any]:
    """The measure of the roundings of each update, and the ULPs after k steps."""
    if name in agreement.PAIRS:
        w, g = of_one_sign()
        pair = agreement.PAIRS[name]
        return np.abs(pair.method(w, g, learning_rate=RATE).updates), pair.ulps
    _, measure, sums = family.in_float32(name.removeprefix("family_"))
    return measure.updates, lambda k: 18 + 10.5 * k + sums


def weights(name: str) -> np.ndarray:
    """The reference's weights, so that a step's error is its own."""
    if name in agreement.PAIRS:
        w, g = of_one_sign()
        return agreement.PAIRS[name].method(w, g, learning_rate=RATE).params.astype(np.float32)
    return family.weights_of(f"{name.removeprefix('family_')} ours").astype(np.float32)


@functools.cache
def runs() -> dict[str, dict[str, Any]]:
    """What each pair emits: to the end, and from the change on; and the states at the change."""

    @jax.jit
    def step(states: Any, grads: Any, params: Any) -> Any:
        return {
            name: tuple(
                tx.update(grads, state, params[name])
                for tx, state in zip(PAIRS[name], both, strict=True)
            )
            for name, both in states.items()
        }

    def walk(states: Any, first: int, last: int) -> Any:
        updates = []
        for t in range(first, last):
            now = {name: jnp.asarray(path[t]) for name, path in paths.items()}
            pairs = step(states, jnp.asarray(g[t]), now)
            states = {name: tuple(state for _, state in both) for name, both in pairs.items()}
            updates.append({name: tuple(u for u, _ in both) for name, both in pairs.items()})
        return jax.tree.map(lambda *x: np.stack(x), *updates), states

    _, g = of_one_sign()
    paths = {name: weights(name) for name in PAIRS}
    start = {
        name: tuple(tx.init(jnp.asarray(paths[name][0])) for tx in both)
        for name, both in PAIRS.items()
    }
    _, middle = walk(start, 0, BEFORE)
    on, _ = walk(middle, BEFORE, BEFORE + AFTER)
    changed = {}
    for name, (ours, theirs) in PAIRS.items():
        w = jnp.asarray(paths[name][BEFORE])
        with jax.numpy_dtype_promotion("strict"):
            there = adamx.from_optax(middle[name][1], ours, w, count=BEFORE)
        back = middle[name][1] if name in ONE_WAY else adamx.to_optax(middle[name][0], theirs, w)
        changed[name] = there, back
    after, _ = walk(changed, BEFORE, BEFORE + AFTER)
    return {
        name: {"on": on[name], "after": after[name], "middle": middle[name], "new": changed[name]}
        for name in PAIRS
    }


def assert_within(actual: np.ndarray, wanted: np.ndarray, measure: np.ndarray, ulps: Any) -> None:
    for k in range(1, AFTER + 1):
        bound = ulps(k) * ULP * measure[BEFORE + k - 1]
        difference = np.abs(actual[k - 1] - wanted[k - 1])
        np.testing.assert_array_less(difference, np.where(bound > 0, bound, 1e-45))


@runs_optax
@pytest.mark.parametrize(
    "name", [n if i % 2 else pytest.param(n, marks=pytest.mark.slow) for i, n in enumerate(PAIRS)]
)
def test_an_optax_run_goes_on_in_adamx(name):
    measure, ulps = ulps_of(name)
    ours, theirs = runs()[name]["after"][0], runs()[name]["on"][1]
    if name == "family_adabelief":
        # nu - eps_root is rounded once more, and the root halves it
        assert_within(ours, theirs, measure, lambda k: ulps(k) + 1)
    else:
        assert_within(ours, theirs, measure, ulps)


@runs_optax
@pytest.mark.parametrize("name", PAIRS)
def test_what_came_from_optax_goes_on_as_if_it_had_been_adamx_all_the_way(name):
    measure, ulps = ulps_of(name)
    found = runs()[name]
    # the slots differ by the roundings of the steps before, as they do between the libraries
    assert_within(found["after"][0], found["on"][0], measure, lambda k: ulps(BEFORE + k))
    uninterrupted, new = found["middle"][0], found["new"][0]
    assert new.keys() == uninterrupted.keys()
    for entry in uninterrupted.keys() - PAIRS[name][0].tree_names() - {"weight_sum"}:
        np.testing.assert_array_equal(new[entry], uninterrupted[entry])
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), new, uninterrupted)
    assert all(jax.tree.leaves(same))


@runs_optax
@pytest.mark.parametrize("name", sorted(PAIRS.keys() - ONE_WAY))
def test_an_adamx_run_goes_on_in_optax(name):
    measure, ulps = ulps_of(name)
    assert_within(runs()[name]["after"][1], runs()[name]["on"][0], measure, ulps)


@runs_optax
@pytest.mark.parametrize("name", sorted(PAIRS.keys() - ONE_WAY))
def test_there_and_back_is_the_same_optax_state(name):
    theirs, new = runs()[name]["middle"][1], runs()[name]["new"][0]
    back = adamx.to_optax(new, PAIRS[name][1], jnp.asarray(weights(name)[BEFORE]))
    assert jax.tree.structure(back) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, back, theirs)


def test_every_optimizer_of_both_libraries_is_converted():
    files = (Path(adamx.__file__).parent / "optimizers").glob("[a-z]*.py")
    both = {p.stem for p in files if hasattr(o, p.stem) or hasattr(o.contrib, p.stem)}
    # Optax's muon, with AdamW for the rest, is muon_adamw: test_muon.py
    assert both - {"muon"} <= {name.removeprefix("family_") for name in PAIRS}


# --- What stands around an Optax optimizer --------------------------------------------------------


def schedule(step):
    return 0.1 / (1.0 + 0.5 * jnp.asarray(step, jnp.float32))


WELL: dict[str, Any] = {"b1": 0.5, "b2": 0.75}
MASK = {"a": True, "b": False}


def matrices(params: Any) -> Any:
    return {name: params[name].ndim > 1 for name in ("a", "b")}


TREE: Any = {"a": jnp.array([[1.0, 1.5], [1.25, 2.0]]), "b": jnp.array([1.5, 1.0, 1.75])}
inject = functools.partial(o.inject_hyperparams, hyperparam_dtype=jnp.float32)
AROUND: dict[str, tuple[Any, Any]] = {
    "chain": (
        o.chain(
            o.clip_by_global_norm(0.1),
            o.adamw(schedule, **WELL, weight_decay=0.1, mask=matrices),
        ),
        adamx.chain(
            adamx.clip_by_global_norm(0.1, record=True),
            adamx.adamw(schedule, **WELL, weight_decay=0.1, mask=matrices),
        ),
    ),
    "named_chain": (
        o.named_chain(("one", o.clip(0.5)), ("two", o.adam(0.1, **WELL))),
        adamx.chain(adamx.clip_by_value(0.5), adamx.adam(0.1, **WELL)),
    ),
    "inject_hyperparams": (
        inject(o.adamw)(schedule, **WELL, weight_decay=0.1),
        adamx.adamw(schedule, **WELL, weight_decay=0.1),
    ),
    "masked": (
        o.chain(o.masked(o.trace(0.5), MASK), o.scale_by_learning_rate(schedule)),
        adamx.by_path({"b": adamx.sgd(schedule)}, default=adamx.sgd(schedule, momentum=0.5)),
    ),
    "partition": (
        o.partition({True: o.adam(schedule, **WELL), False: o.sgd(0.1, momentum=0.5)}, MASK),
        adamx.by_path({"b": adamx.sgd(0.1, momentum=0.5)}, default=adamx.adam(schedule, **WELL)),
    ),
    "groups_of_one_kind": (
        o.partition({True: o.adam(0.1, **WELL), False: o.adam(0.2, **WELL)}, MASK),
        adamx.by_path({"b": adamx.adam(0.2, **WELL)}, default=adamx.adam(0.1, **WELL)),
    ),
    "apply_if_finite": (
        o.apply_if_finite(o.adam(schedule, **WELL), 3),
        adamx.skip_nonfinite(adamx.adam(schedule, **WELL)),
    ),
    "scheduled_decay": (
        o.chain(o.trace(0.5), o.add_decayed_weights(schedule), o.scale(-0.1)),
        adamx.chain(adamx.trace(0.5), adamx.add_decayed_weights(schedule), adamx.scale(-0.1)),
    ),
}


def gradients(t: int) -> Any:
    return jax.tree.map(lambda p: p * (0.1 + 0.05 * t), TREE)


def follow(tx: Any, state: Any, first: int, last: int) -> Any:
    """Updates on constant parameters, and the last state."""
    update, updates = jax.jit(tx.update), []
    for t in range(first, last):
        u, state = update(gradients(t), state, TREE)
        updates.append(u)
    return updates, state


def assert_goes_on(ours: Any, theirs: Any) -> None:
    """The bound of AdamW, and a norm of 7 terms: all numbers are of one sign."""
    for k, (u, v) in enumerate(zip(ours, theirs, strict=True), start=1):
        bound = (18 + 10.5 * k + 7) * ULP
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=bound), u, v)  # noqa: B023


@runs_optax
@pytest.mark.parametrize("name", thinned(AROUND))
def test_chains_masks_groups_and_wrappers_are_seen_through_both_ways(name):
    theirs, ours = AROUND[name]
    _, state = follow(theirs, theirs.init(TREE), 0, BEFORE)
    on, _ = follow(theirs, state, BEFORE, BEFORE + 3)
    start = ours.init(TREE)
    new = adamx.from_optax(state, ours, TREE)
    assert jax.tree.structure(new) == jax.tree.structure(start) and int(new["count"]) == BEFORE
    assert_goes_on(follow(ours, new, BEFORE, BEFORE + 3)[0], on)
    if "learning_rate" in start:
        uninterrupted = follow(ours, start, 0, BEFORE)[1]
        jax.tree.map(
            np.testing.assert_array_equal, new["learning_rate"], uninterrupted["learning_rate"]
        )
    back = adamx.to_optax(new, theirs, TREE)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert_goes_on(follow(theirs, back, BEFORE, BEFORE + 3)[0], on)


@runs_optax
def test_multisteps_is_converted_between_two_steps_and_refused_inside_a_sum():
    theirs, ours = o.MultiSteps(o.adam(0.1, **WELL), 2), adamx.adam(0.1, **WELL)
    tx = theirs.gradient_transformation()
    _, state = follow(tx, tx.init(TREE), 0, 6)
    new = adamx.from_optax(state, ours, TREE)
    assert int(new["count"]) == 3
    np.testing.assert_array_equal(new["mu"]["b"], state.inner_opt_state[0].mu["b"])
    back = adamx.to_optax(new, tx, TREE)
    assert int(back.gradient_step) == int(back.inner_opt_state[0].count) == 3
    _, inside = follow(tx, state, 6, 7)
    with pytest.raises(ValueError, match=r"state\.mini_step is 1: .* convert after the step"):
        adamx.from_optax(inside, ours, TREE)


@runs_optax
def test_moments_of_16_bits_are_widened_and_narrowed_on_the_way_back():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), TREE)
    tx = o.adam(0.1)
    _, state = tx.update(params, tx.init(params), params)
    assert state[0].nu["a"].dtype == jnp.bfloat16
    new = adamx.from_optax(state, adamx.adam(0.1), params)
    assert new["nu"]["a"].dtype == jnp.float32
    np.testing.assert_array_equal(new["nu"]["a"], state[0].nu["a"].astype(jnp.float32))
    back = adamx.to_optax(new, tx, params)
    jax.tree.map(np.testing.assert_array_equal, back, state)
    masters = adamx.master_weights(adamx.adam(0.1))
    adapted, adaptation = adamx.adapt_state(masters, params, new)
    assert adaptation.filled == ("remainder/a", "remainder/b")
    np.testing.assert_array_equal(adapted["nu"]["a"], new["nu"]["a"])


@runs_optax
def test_scalars_that_remember_are_those_of_a_run_of_as_many_steps():
    def rising(step):
        return 1.0 - 0.5 / (1.0 + jnp.asarray(step, jnp.float32))

    tx = adamx.adam(schedule, b1=rising, b2=0.75)
    _, uninterrupted = follow(tx, tx.init(TREE), 0, BEFORE)
    theirs = o.adam(0.1)
    _, state = follow(theirs, theirs.init(TREE), 0, BEFORE)
    new = adamx.from_optax(state, tx, TREE)
    for name in ("count", "learning_rate", "mu_correction"):
        # a product of seven factors, in two programs
        np.testing.assert_allclose(new[name], uninterrupted[name], rtol=BEFORE * ULP)


@runs_optax
def test_the_count_can_be_given_where_optax_has_none():
    theirs, ours = o.sgd(0.1, momentum=0.5), adamx.sgd(schedule, momentum=0.5)
    state = theirs.init(TREE)
    assert int(adamx.from_optax(state, ours, TREE)["count"]) == 0
    new = adamx.from_optax(state, ours, TREE, count=5)
    assert int(new["count"]) == 5
    np.testing.assert_allclose(new["learning_rate"], schedule(4), rtol=ULP)


def adam_state(params: Any = TREE, tx: Any = None) -> Any:
    tx = o.adam(0.1) if tx is None else tx
    return tx.init(params)


ADAM: Any = adamx.adam(0.1)
REFUSED = {
    "tx of Optax": (lambda: adamx.from_optax(adam_state(), o.adam(0.1), TREE), "adamx transf"),
    "counts differ": (
        lambda: adamx.from_optax(
            (adam_state()[0], o.ScaleByScheduleState(jnp.int32(3))), ADAM, TREE
        ),
        r"\{'state\[0\]\.count': 0, 'state\[1\]\.count': 3\}",
    ),
    "count given differs": (
        lambda: adamx.from_optax(adam_state(), ADAM, TREE, count=2),
        r"'count=': 2, 'state\[0\]\.count': 0",
    ),
    "count negative": (
        lambda: adamx.from_optax(o.sgd(0.1).init(TREE), adamx.sgd(0.1), TREE, count=-1),
        r"count must be in \[0, 2\^31\), got -1",
    ),
    "two mu": (
        lambda: adamx.from_optax(o.chain(o.adam(0.1), o.ema(0.9)).init(TREE), ADAM, TREE),
        r"state\[0\]\[0\]\.mu\['a'\] and state\[1\]\.ema\['a'\] would both be 'mu'",
    ),
    "slot missing": (
        lambda: adamx.from_optax(o.sgd(0.1, 0.9).init(TREE), ADAM, TREE),
        r"tx keeps 'mu' of 'a', and .* only \['trace'\].*adapt_state",
    ),
    "slot left over": (
        lambda: adamx.from_optax(adam_state(), adamx.momentum(0.1), TREE),
        r"state\[0\]\.nu\['a'\] is 'nu' of 'a', which tx does not keep, only \['mu'\]",
    ),
    "masked leaf": (
        lambda: adamx.from_optax(adam_state(tx=o.masked(o.adam(0.1), MASK)), ADAM, TREE),
        "tx keeps 'mu' of 'b'",
    ),
    "another model": (
        lambda: adamx.from_optax(adam_state({**TREE, "a": jnp.ones(5)}), ADAM, TREE),
        r"'mu' of 'a', has shape \[5\] and has shape \[2, 2\] here",
    ),
    "SM3": (
        lambda: adamx.from_optax(o.scale_by_sm3().init(TREE), ADAM, TREE),
        "state is ScaleBySM3State, which is not an Optax state that adamx can",
    ),
    "read as dicts": (
        lambda: adamx.from_optax([adam_state()[0]._asdict()], ADAM, TREE),
        r"state\[0\]\['count'\] is int32\[\].*as its target",
    ),
    "vmapped": (
        lambda: adamx.from_optax(jax.vmap(o.adam(0.1).init)(TREE["a"]), ADAM, TREE["a"]),
        r"state\[0\]\.count must be one number, got shape \[2\]",
    ),
    "packed": (
        lambda: adamx.from_optax(adam_state(), adamx.adam(0.1, moments="packed16"), TREE),
        'got packed16: convert with moments="float32", and adapt_state',
    ),
    "Optax stage with memory": (
        lambda: adamx.from_optax(adam_state(), adamx.chain(adamx.adam(0.1), o.ema(0.5)), TREE),
        r"state is stored under 'ema': .* state \| \{'ema': \.\.\.\}",
    ),
    "maximum of the raw nu": (
        lambda: adamx.from_optax(
            o.amsgrad(0.1).init(TREE),
            adamx.chain(adamx.ema_of_squares(0.9), adamx.running_max(), adamx.bias_correction(0.9)),
            TREE,
        ),
        "go on with adamx.amsgrad",
    ),
    "to: tx of adamx": (
        lambda: adamx.to_optax(ADAM.init(TREE), ADAM, TREE),
        "tx must be the Optax transformation",
    ),
    "to: state of Optax": (
        lambda: adamx.to_optax(adam_state(), o.adam(0.1), TREE),
        "a dict with 'count'",
    ),
    "to: slot missing": (
        lambda: adamx.to_optax(adamx.momentum(0.1).init(TREE), o.adam(0.1), TREE),
        r"tx keeps 'nu' of 'a' \(state\[0\]\.nu\).*only \['mu'\]",
    ),
    "to: slot left over": (
        lambda: adamx.to_optax(ADAM.init(TREE), o.lion(0.1), TREE),
        r"the state keeps \['nu'\], for which tx has no place",
    ),
    "to: packed": (
        lambda: adamx.to_optax(adamx.adam(0.1, moments="packed16").init(TREE), o.adam(0.1), TREE),
        r"adamx\.moments\(state, tx\)",
    ),
    "to: another model": (
        lambda: adamx.to_optax(ADAM.init({**TREE, "a": jnp.ones(5)}), o.adam(0.1), TREE),
        r"state\['mu'\] of 'a' is float32\[5\] where these parameters need float32\[2, 2\]",
    ),
    "to: adabelief": (
        lambda: adamx.to_optax(adamx.adabelief(0.1).init(TREE), o.adabelief(0.1), TREE),
        r"state\[0\]\.nu cannot be computed: it holds eps_root",
    ),
    "to: schedule_free": (
        lambda: adamx.to_optax(
            adamx.schedule_free_adamw(0.1).init(TREE), o.contrib.schedule_free_adamw(0.1), TREE
        ),
        "cannot be computed: it needs weight_lr_power",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_with_optax_is_an_error_that_says_why(name):
    convert, message = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=f"(?s){message}"):
        convert()


@runs_optax
def test_a_stage_without_a_counterpart_brings_its_state_along():
    theirs = o.chain(o.zero_nans(), o.adam(0.1))
    bad = jax.tree.map(lambda p: p.at[0].set(jnp.nan), TREE)
    _, state = theirs.update(bad, theirs.init(TREE))
    whole = adamx.chain(o.zero_nans(), adamx.adam(0.1))
    with pytest.raises(TypeError, match=r"state\[0\] is ZeroNansState"):
        adamx.from_optax(state, ADAM, TREE)
    with pytest.raises(ValueError, match=r"state \| \{'zero_nans': \.\.\.\}"):
        adamx.from_optax(state[1], whole, TREE)
    new = adamx.from_optax(state[1], ADAM, TREE) | {"zero_nans": state[0]}
    assert jax.tree.structure(new) == jax.tree.structure(whole.init(TREE))
    _, new = whole.update(TREE, new)
    assert int(new["count"]) == 2


@runs_optax
def test_packed_moments_reach_optax_by_what_they_reveal():
    tx = adamx.adam(0.1, moments="packed16")
    _, state = follow(tx, tx.init(TREE), 0, 2)
    plain = {"count": state["count"]} | adamx.moments(state, tx)
    found = adamx.to_optax(plain, o.adam(0.1), TREE)
    jax.tree.map(np.testing.assert_array_equal, found[0].mu, plain["mu"])


# --- PyTorch, as recorded -------------------------------------------------------------------------

STATES = np.load(Path(__file__).with_name("data") / "torch_states.npz")
GROUPS = json.loads(str(STATES["param_groups"]))
NAMES = {"a": 0, "b": 1}


def recorded(name: str) -> dict[str, Any]:
    state: dict[int, Any] = {}
    for key in STATES:
        case, *place = key.split("/")
        if case == name:
            state.setdefault(int(place[0]), {})[place[1]] = STATES[key]
    return {"state": state, "param_groups": GROUPS[name]}


def as_in_torch(name: str) -> adamx.Transformation:
    h = TORCH[name]["hyperparameters"]
    if name in IN_FAMILY:
        return family.as_in_torch(name)[0]
    if TORCH[name]["class"] == "RMSprop" and h["momentum"]:
        scaling = adamx.rmsprop(1.0, h["alpha"], h["eps"], centered=h["centered"]).stages[0]
        return adamx.chain(
            scaling, adamx.trace(h["momentum"]), adamx.scale_by_learning_rate(h["lr"])
        )
    return agreement.as_in_torch(name)


def converted(name: str) -> Any:
    count = BEFORE if TORCH[name]["class"] == "SGD" else None
    params = {leaf: RECORDING[f"initial/{leaf}"] for leaf in LEAVES}
    return adamx.from_torch(recorded(name), as_in_torch(name), params, names=NAMES, count=count)


@functools.cache
def torch_runs() -> dict[str, Any]:
    """States of adamx after as many steps, the same on magnitudes, and where converted ones go."""
    with jax.enable_x64(True):
        txs = {name: as_in_torch(name) for name in TORCH}

        @jax.jit
        def step(states: Any, grads: Any, params: Any) -> Any:
            pairs = {k: tx.update(grads, states[k], params[k]) for k, tx in txs.items()}
            new = {k: adamx.apply_updates(params[k], u) for k, (u, _) in pairs.items()}
            return {k: state for k, (_, state) in pairs.items()}, new

        g = {leaf: RECORDING[f"gradients/{leaf}"] for leaf in LEAVES}
        start = {leaf: jnp.asarray(RECORDING[f"initial/{leaf}"]) for leaf in LEAVES}

        def weights(t: int) -> Any:
            if t == 0:
                return {k: start for k in txs}
            return {
                k: {leaf: jnp.asarray(RECORDING[f"{k}/{leaf}"][t - 1]) for leaf in LEAVES}
                for k in txs
            }

        own = magnitudes = {k: tx.init(start) for k, tx in txs.items()}
        for t in range(BEFORE):
            now = {leaf: x[t] for leaf, x in g.items()}
            own, _ = step(own, now, weights(t))
            large = jax.tree.map(jnp.abs, (now, weights(t)))
            magnitudes, _ = step(magnitudes, *large)
        states, params, after = {k: converted(k) for k in txs}, weights(BEFORE), []
        for t in range(BEFORE, BEFORE + AFTER):
            states, params = step(states, {leaf: x[t] for leaf, x in g.items()}, params)
            after.append(params)
        after = jax.tree.map(lambda *x: np.stack(x), *after)
        return jax.device_get({"own": own, "magnitudes": magnitudes, "after": after})


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", thinned(TORCH, 5))
def test_what_pytorch_kept_is_what_adamx_keeps(name):
    """The bound of test_agreement.py: 12 roundings a step and 10, of the same on magnitudes.

    PyTorch does not dampen the first gradient: its buffer holds momentum^t g_1 more.
    """
    new, own = converted(name), torch_runs()["own"][name]
    assert new.keys() == own.keys()
    for entry, tree in own.items():
        if entry not in as_in_torch(name).tree_names():
            np.testing.assert_allclose(new[entry], tree, rtol=1e-15)
            continue
        for leaf in LEAVES:
            wanted, measure = tree[leaf], torch_runs()["magnitudes"][name][entry][leaf]
            if TORCH[name]["hyperparameters"].get("dampening"):
                wanted = wanted + 0.9**BEFORE * RECORDING[f"gradients/{leaf}"][0]
            bound = (10 + 12 * BEFORE) * 2.0**-53 * np.abs(measure)
            difference = np.abs(np.asarray(new[entry][leaf]) - wanted)
            np.testing.assert_array_less(difference, np.where(bound > 0, bound, 1e-300))


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("name", TORCH)
def test_a_recorded_pytorch_run_goes_on_in_adamx(name, leaf):
    """To 1e-12 of the way gone since, and the rounding of w: test_agreement.py.

    What PyTorch does otherwise comes on top, as in test_family.py.
    """
    before, path = np.split(RECORDING[f"{name}/{leaf}"][: BEFORE + AFTER], [BEFORE])
    relative, expected = 1e-12, path
    if name in IN_FAMILY:
        _, method, peculiar = family.as_in_torch(name)
        start, g = RECORDING[f"initial/{leaf}"], RECORDING[f"gradients/{leaf}"]
        shift = (method(start, g).params - method(start, g, **peculiar).params)[1:]
        h = TORCH[name]["hyperparameters"]
        kept = (1 - h["lr"] * h["weight_decay"]) ** np.arange(1, AFTER + 1)  # what decay leaves
        shift_at_change = np.multiply.outer(kept, shift[BEFORE - 1])
        expected = path + (shift[BEFORE : BEFORE + AFTER] - shift_at_change)
        relative = 2e-11 if name == "radam" else 1e-12
    steps = np.diff(np.concatenate([before[-1:], path]), axis=0)
    way = np.cumsum(np.abs(steps), axis=0)
    k = agreement.at(np.arange(1, AFTER + 1), way)
    rounding = k * 4 * 2.0**-53 * np.max(np.abs(path), axis=0)
    difference = np.abs(torch_runs()["after"][name][leaf] - expected)
    np.testing.assert_array_less(difference, relative * way + rounding)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", TORCH)
def test_there_and_back_is_the_same_state_dict(name):
    state_dict = recorded(name)
    params = {leaf: RECORDING[f"initial/{leaf}"] for leaf in LEAVES}
    like = {"state": {}, "param_groups": GROUPS[name]}
    found = adamx.to_torch(converted(name), as_in_torch(name), params, names=NAMES, like=like)
    assert found["param_groups"] == GROUPS[name]
    for index in (0, 1):
        fields = state_dict["state"].get(index, {})
        assert found["state"][index].keys() == fields.keys()
        for field, value in fields.items():
            if field == "mu_product":  # a product in float32, and one in float64
                np.testing.assert_allclose(found["state"][index][field], value, rtol=7 * 2**-24)
            else:
                np.testing.assert_array_equal(found["state"][index][field], value)


def test_arrays_are_transposed_and_copied():
    w, g = np.arange(6.0, dtype=np.float32).reshape(2, 3), np.arange(24.0, dtype=np.float32)
    kernel = g.reshape(2, 3, 2, 2)  # out, in, height, width
    state_dict = {
        "state": {0: {"momentum_buffer": w}, 1: {"momentum_buffer": kernel}},
        "param_groups": [{"params": [0, 1], "dampening": 0, "momentum": 0.9}],
    }
    params = {"dense": jnp.zeros((3, 2)), "conv": jnp.zeros((2, 2, 3, 2))}
    names = {"dense": (0, (1, 0)), "conv": (1, (2, 3, 1, 0))}
    tx = adamx.sgd(0.1, momentum=0.9)
    state = adamx.from_torch(state_dict, tx, params, names=names)
    w += 1  # as a tensor that is stepped in place
    assert float(state["trace"]["dense"][2, 1]) == 5.0
    assert float(state["trace"]["conv"][1, 0, 2, 1]) == kernel[1, 2, 1, 0]
    found = adamx.to_torch(state, tx, params, names=names, like=state_dict)
    np.testing.assert_array_equal(found["state"][0]["momentum_buffer"], w - 1)
    np.testing.assert_array_equal(found["state"][1]["momentum_buffer"], kernel)
    assert all(x["momentum_buffer"].flags.writeable for x in found["state"].values())


def torch_state(tx=ADAM, *, group=None, fields=None, names=None, params=None, count=None, **more):
    """Convert a small state_dict of Adam with something in it changed."""
    ones = np.ones(2, np.float32)
    adam = {"step": np.float32(3), "exp_avg": ones, "exp_avg_sq": ones}
    groups = [{"params": [0, 1], "amsgrad": False, "betas": (0.9, 0.999), **(group or {})}]
    state_dict = {
        "state": {0: {**adam, **(fields or {})}, 1: adam},
        "param_groups": groups,
    } | more
    params = {"a": jnp.ones(2), "b": jnp.ones(2)} if params is None else params
    names = NAMES if names is None else names
    return adamx.from_torch(state_dict, tx, params, names=names, count=count)


def from_sgd(tx, count=None, **hyperparameters):
    group = {"params": [0], "dampening": 0, "momentum": 0.9, **hyperparameters}
    state_dict = {"state": {0: {"momentum_buffer": np.ones(2)}}, "param_groups": [group]}
    return adamx.from_torch(state_dict, tx, {"a": jnp.ones(2)}, names={"a": 0}, count=count)


def into_torch(tx, group, names=NAMES, params=None):
    params = {"a": jnp.ones(2), "b": jnp.ones(2)} if params is None else params
    like = {"state": {}, "param_groups": [{"params": [0, 1], **group}]}
    return adamx.to_torch(tx.init(params), tx, params, names=names, like=like)


def test_a_parameter_that_never_had_a_gradient_begins_now():
    ones = {"exp_avg": np.ones(2), "exp_avg_sq": np.ones(2)}
    state_dict = {
        "state": {1: {"step": np.float32(5), **ones}},
        "param_groups": [{"params": [0, 1], "amsgrad": False, "lr": 0.1}],
    }
    params, tx = {"a": jnp.ones(2), "b": jnp.ones(2)}, adamx.adam(0.1)
    state = adamx.from_torch(state_dict, tx, params, names={"a": 0, "b": 1})
    assert {k: int(v["count"]) for k, v in state["began"].items()} == {"a": 5}
    assert not state["mu"]["a"].any() and state["nu"]["b"].all()
    updates, _ = tx.update(params, state, params)
    np.testing.assert_allclose(updates["a"], -0.1, rtol=2e-6)  # Adam's first step, but for eps


def rising(step):
    return 0.9 - 0.4 / (1 + jnp.asarray(step, jnp.float32))


@pytest.mark.parametrize("b1", [0.9, rising], ids=["fixed", "scheduled"])
def test_a_parameter_of_fewer_steps_goes_on_as_a_leaf_that_began_late(b1):
    """One of five steps, and one without a gradient in the first two; all gradients are 1."""
    m, v = 0.0, 0.0
    for t in range(2, 5):
        decay = float(rising(t)) if callable(b1) else b1
        m, v = decay * m + (1 - decay), 0.999 * v + 0.001
    moments = {"exp_avg": np.full(2, m, np.float32), "exp_avg_sq": np.full(2, v, np.float32)}
    ones = {"exp_avg": np.ones(2), "exp_avg_sq": np.ones(2)}
    state_dict = {
        "state": {0: {"step": np.float32(3), **moments}, 1: {"step": np.float32(5), **ones}},
        "param_groups": [{"params": [0, 1], "amsgrad": False, "lr": 0.1}],
    }
    names, params = {"a": 0, "b": 1}, {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = adamx.adam(0.1, b1=b1)
    state = adamx.from_torch(state_dict, tx, params, names=names)
    assert int(state["count"]) == 5 and int(state["began"]["a"]["count"]) == 2
    assert state["began"].keys() == {"a"}
    updates, _ = tx.update(params, state, params)
    # averages of ones that are corrected for their own age are 1: the step is the rate, but for
    # float32's roundings of m, v and the two corrections
    np.testing.assert_allclose(updates["a"], -0.1, rtol=8 * 2**-24)
    back = adamx.to_torch(state, tx, params, names=names, like=state_dict)
    assert [float(back["state"][i]["step"]) for i in (0, 1)] == [3, 5]


AMSGRAD = {"fields": {"max_exp_avg_sq": np.ones(2)}, "group": {"amsgrad": True}}
COMPLEX = {"a": jnp.ones(2, jnp.complex64), "b": jnp.ones(2)}
REFUSED_OF_TORCH = {
    "the model's": (
        lambda: adamx.from_torch({"weight": np.ones(2)}, ADAM, TREE, names={}),
        "state_dict of a PyTorch optimizer, with 'state'.* is it the model's",
    ),
    "names lack a leaf": (
        lambda: torch_state(names={"a": 0, "c": 1}),
        r"it lacks \['b'\], and has \['c'\] too many; the leaves are \['a', 'b'\]",
    ),
    "names lack an index": (
        lambda: torch_state(names={"a": 0, "b": 0}),
        r"each index of the state_dict once: they are \[0, 1\], got \[0, 0\]",
    ),
    "axes": (
        lambda: torch_state(names={"a": (0, (1, 0)), "b": 1}),
        r"names\['a'\] has axes \(1, 0\) .* a permutation of \(0,\)",
    ),
    "count given differs": (
        lambda: torch_state(count=2),
        r"count is 2, and the largest step in state_dict\['state'\] is 3: leave count out",
    ),
    "count negative": (
        lambda: from_sgd(adamx.sgd(0.1, 0.9), count=-1),
        r"from_torch: count must be in \[0, 2\^31\), got -1",
    ),
    "a shape": (
        lambda: torch_state(fields={"exp_avg": np.ones(3)}),
        r"\[0\]\['exp_avg'\], 'mu' of 'a', has shape \[3\] .* a transposed array",
    ),
    "no state yet": (
        lambda: torch_state(state={}),
        "tx keeps 'mu' of 'a', and the state_dict has no slots",
    ),
    "complex v": (
        lambda: torch_state(
            fields={k: np.ones(2, np.complex64) for k in ("exp_avg", "exp_avg_sq")}, params=COMPLEX
        ),
        "'nu' of 'a', is complex64 and is float32 here: adamx averages the squared magnitude",
    ),
    "NAdam": (
        lambda: torch_state(adamx.nadam(0.1), fields={"mu_product": np.float32(0.1)}),
        "rise from half of betas.* adamx.nadam has constant momenta",
    ),
    "AMSGrad": (
        lambda: torch_state(adamx.amsgrad(0.1), **AMSGRAD),
        "max_exp_avg_sq is the maximum of the raw averages",
    ),
    "unknown field": (
        lambda: torch_state(fields={"acc_delta": np.ones(2)}),
        "keeps 'acc_delta', which adamx cannot convert",
    ),
    "left over": (
        lambda: torch_state(adamx.momentum(0.1)),
        r"\['exp_avg_sq'\] is 'nu' of 'a', which tx does not keep, only \['mu'\]",
    ),
    "a sum for an average": (
        lambda: from_sgd(adamx.momentum(0.1)),
        r"without dampening give adamx\.sgd",
    ),
    "a damped sum": (
        lambda: from_sgd(adamx.sgd(0.1, 0.9), dampening=0.5),
        r"dampening=0\.5 is a sum of \(1 - dampening\) g",
    ),
    "momentum behind the rate": (
        lambda: into_torch(adamx.rmsprop(0.1, momentum=0.9), {"centered": False, "momentum": 0.9}),
        "comes before the learning rate",
    ),
    "to: another optimizer": (
        lambda: into_torch(adamx.adam(0.1), {"rho": 0.9}),
        r"the group with \['params', 'rho'\] belongs to no optimizer that adamx can",
    ),
    "to: slot missing": (
        lambda: into_torch(adamx.sgd(0.1, 0.9), {"amsgrad": False}),
        r"keeps 'exp_avg' of parameter 0, .* no 'mu' of 'a', only \['trace'\]",
    ),
    "to: slot left over": (
        lambda: into_torch(adamx.adam(0.1), {"dampening": 0, "momentum": 0}),
        r"keeps \['mu', 'nu'\] of 'a', for which the optimizer of parameter 0 has no place",
    ),
    "to: AMSGrad": (
        lambda: into_torch(adamx.amsgrad(0.1), {"amsgrad": True}),
        "max_exp_avg_sq is the maximum of the raw averages",
    ),
    "to: complex v": (
        lambda: into_torch(adamx.adam(0.1), {"amsgrad": False}, params=COMPLEX),
        "'nu' of the complex 'a' is the average of squared magnitudes",
    ),
    "to: packed": (
        lambda: into_torch(adamx.adam(0.1, moments="packed16"), {"amsgrad": False}),
        "got packed16",
    ),
}


@pytest.mark.parametrize("name", REFUSED_OF_TORCH)
def test_what_cannot_be_converted_with_pytorch_is_an_error_that_says_why(name):
    convert, message = REFUSED_OF_TORCH[name]
    with pytest.raises((TypeError, ValueError), match=f"(?s){message}"):
        convert()


# --- PyTorch itself -------------------------------------------------------------------------------

live = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not installed: pip install torch"
)


def behind(*stages: adamx.Transformation) -> adamx.Transformation:
    return adamx.chain(*stages, adamx.scale_by_learning_rate(0.01))


def below(*second_moment: adamx.Transformation, above: Any = None) -> adamx.Transformation:
    above = adamx.chain(adamx.ema(0.9), adamx.bias_correction(0.9)) if above is None else above
    return adamx.rms_scaling(above, second_moment=adamx.chain(*second_moment), eps=1e-8)


SQUARES, CORRECTED = adamx.ema_of_squares(0.999), adamx.bias_correction(0.999)
LIVE: dict[str, tuple[str, dict[str, Any], adamx.Transformation]] = {
    "adam": ("Adam", {}, adamx.adam(0.01)),
    "adamw": ("AdamW", {"weight_decay": 0.1}, adamx.adamw(0.01, weight_decay=0.1)),
    "amsgrad": (
        "AdamW",
        {"amsgrad": True, "weight_decay": 0},
        behind(below(SQUARES, adamx.running_max(), CORRECTED)),
    ),
    "nadam": (
        "NAdam",
        {},
        behind(below(SQUARES, CORRECTED, above=adamx.scheduled_nesterov_ema(0.9))),
    ),
    # PyTorch's eps stands elsewhere
    "radam": ("RAdam", {"eps": 1e-30}, adamx.radam(0.01, eps=1e-30)),
    "adamax": ("Adamax", {}, adamx.adamax(0.01)),
    "rmsprop": (
        "RMSprop",
        {"alpha": 0.9, "momentum": 0.5, "centered": True},
        behind(adamx.rmsprop(1.0, centered=True).stages[0], adamx.trace(0.5)),
    ),
    "adagrad": ("Adagrad", {"eps": 1e-8}, adamx.adagrad(0.01, 0.0, 1e-8)),
    "sgd": ("SGD", {"momentum": 0.9, "nesterov": True}, adamx.sgd(0.01, 0.9, True)),
    "dampened": ("SGD", {"momentum": 0.9, "dampening": 0.9}, adamx.momentum(0.01, 0.9)),
}
AXES = {"conv": (2, 3, 1, 0), "dense/bias": (0,), "dense/kernel": (1, 0)}
LIVE_NAMES: dict[str, Any] = {
    "conv": (0, AXES["conv"]),
    "dense/kernel": (1, AXES["dense/kernel"]),
    "dense/bias": 2,
}
SHAPES = {"conv": (3, 2, 2, 2), "dense/kernel": (4, 3), "dense/bias": (4,)}


def ours_of(arrays: dict[str, Any]) -> Any:
    """PyTorch's arrays by our paths, as a tree of ours."""
    flat = {path: jnp.asarray(x).transpose(AXES[path]) for path, x in arrays.items()}
    return {
        "conv": flat["conv"],
        "dense": {"bias": flat["dense/bias"], "kernel": flat["dense/kernel"]},
    }


@live
@pytest.mark.usefixtures("x64")
def test_a_live_pytorch_run_goes_on_in_adamx_and_then_in_pytorch_again():
    """To 1e-12 of the way gone; all of them in one program."""
    import torch  # pyright: ignore[reportMissingImports]

    rng = np.random.default_rng(3)
    g = [{p: rng.normal(size=s) for p, s in SHAPES.items()} for _ in range(BEFORE + AFTER + 3)]
    start = {path: rng.normal(size=shape) for path, shape in SHAPES.items()}
    order = [*SHAPES]

    def optimizer(name: str, weights: Any) -> Any:
        kind, options, _ = LIVE[name]
        tensors = [torch.tensor(np.array(weights[p]), requires_grad=True) for p in order]
        return getattr(torch.optim, kind)(tensors, lr=0.01, **options), tensors

    def go(made: Any, first: int, last: int) -> list[dict[str, np.ndarray]]:
        path = []
        for t in range(first, last):
            for p, tensor in zip(order, made[1], strict=True):
                tensor.grad = torch.tensor(g[t][p])
            made[0].step()
            path.append({p: x.detach().numpy().copy() for p, x in zip(order, made[1], strict=True)})
        return path

    txs = {name: tx for name, (_, _, tx) in LIVE.items()}

    @jax.jit
    def step(states: Any, grads: Any, params: Any) -> Any:
        pairs = {k: tx.update(grads, states[k], params[k]) for k, tx in txs.items()}
        new = {k: adamx.apply_updates(params[k], u) for k, (u, _) in pairs.items()}
        return {k: state for k, (_, state) in pairs.items()}, new

    torch.set_default_dtype(torch.float64)  # NAdam's product of momenta has the default dtype
    try:
        made = {name: optimizer(name, start) for name in LIVE}
        early = {name: go(made[name], 0, BEFORE) for name in LIVE}
        params = {name: ours_of(early[name][-1]) for name in LIVE}
        states = {
            name: adamx.from_torch(
                made[name][0].state_dict(),
                tx,
                params[name],
                names=LIVE_NAMES,
                count=BEFORE if LIVE[name][0] == "SGD" else None,
            )
            for name, tx in txs.items()
        }
        theirs = {name: go(made[name], BEFORE, len(g)) for name in LIVE}
        ours = []
        for t in range(BEFORE, BEFORE + AFTER):
            states, params = step(states, ours_of(g[t]), params)
            ours.append(params)
        for name, tx in txs.items():
            last, way = ours_of(early[name][-1]), jax.tree.map(jnp.zeros_like, params[name])
            for ours_now, theirs_now in zip(ours, theirs[name], strict=False):
                now = ours_of(theirs_now)
                way = jax.tree.map(lambda s, a, b: s + jnp.abs(a - b), way, now, last)
                last = now
                jax.tree.map(
                    lambda a, b, s: np.testing.assert_array_less(
                        np.abs(a - b), 1e-12 * s + AFTER * 4 * 2.0**-53 * 4
                    ),
                    ours_now[name],
                    now,
                    way,
                )
            weights = {
                path: np.transpose(x, np.argsort(AXES[path]))
                for path, x in {
                    "conv": params[name]["conv"],
                    "dense/kernel": params[name]["dense"]["kernel"],
                    "dense/bias": params[name]["dense"]["bias"],
                }.items()
            }
            again = optimizer(name, weights)
            found = adamx.to_torch(
                states[name], tx, params[name], names=LIVE_NAMES, like=again[0].state_dict()
            )
            found["state"] = jax.tree.map(torch.as_tensor, found["state"])
            again[0].load_state_dict(found)
            for a, b in zip(go(again, BEFORE + AFTER, len(g)), theirs[name][AFTER:], strict=True):
                for p in order:
                    np.testing.assert_allclose(a[p], b[p], rtol=1e-12, atol=1e-13)
    finally:
        torch.set_default_dtype(torch.float32)


@live
def test_bfloat16_tensors_are_widened_and_go_back():
    import torch  # pyright: ignore[reportMissingImports]

    weight = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.tensor([1.0, -2.0, 3.0], dtype=torch.bfloat16)
    optimizer.step()
    kept = optimizer.state_dict()["state"][0]
    params, tx = {"w": jnp.ones(3, jnp.bfloat16)}, adamx.adamw(1e-3)
    state = adamx.from_torch(optimizer.state_dict(), tx, params, names={"w": 0})
    assert state["nu"]["w"].dtype == jnp.float32
    np.testing.assert_array_equal(state["nu"]["w"], kept["exp_avg_sq"].float().numpy())
    found = adamx.to_torch(state, tx, params, names={"w": 0}, like=optimizer.state_dict())
    found["state"] = jax.tree.map(torch.as_tensor, found["state"])
    optimizer.load_state_dict(found)
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg_sq"], kept["exp_avg_sq"])


@live
def test_the_blocks_of_the_page_with_pytorch_run():
    page = Path(__file__).parents[1] / "docs/coming-from-elsewhere.md"
    found = re.findall(r"^```py\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    assert found
    with jax.numpy_rank_promotion("allow"):
        exec(compile("\n".join(found), page.name, "exec"), {})
