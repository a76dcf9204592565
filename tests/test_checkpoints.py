"""A state saved with orbax goes on bit for bit, also under another configuration.

Every line of table.py that has a learning rate is saved and restored. What Optax's Adam cannot be
restored into is shown beside what adamx's can.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from table import TRANSFORMATIONS

import adamx
from adamx import adapt_state

FLOAT32 = {"w": jnp.array([[1.0, -2.0, 3.0], [0.5, 0.25, -4.0]]), "b": jnp.array(0.5)}
BFLOAT16 = jax.tree.map(lambda p: p.astype(jnp.bfloat16), FLOAT32)


@pytest.fixture(autouse=True)
def standard_promotion():
    """As users run: Optax does not run under strict promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def checkpointer():
    with ocp.StandardCheckpointer() as checkpointer:
        yield checkpointer


@pytest.fixture
def saved(checkpointer, tmp_path):
    """Return a function that saves a tree, and gives back the folder it was saved in."""

    def save(tree):
        checkpointer.save(tmp_path / "checkpoint", tree)
        checkpointer.wait_until_finished()
        return tmp_path / "checkpoint"

    return save


def gradient(number, params, spoilt=False):
    """Draw the gradient of a step from the number of the step."""
    generator = np.random.default_rng(number)
    grads = jax.tree.map(lambda p: jnp.asarray(generator.normal(size=p.shape), p.dtype), params)
    return jax.tree.map(lambda g: g * jnp.nan, grads) if spoilt else grads


def train(step, at, numbers, spoilt=None):
    """Take steps from (params, state); the arrays that came in are left as they were."""
    params, state = jax.tree.map(jnp.copy, at)
    for number in numbers:
        params, state = step(params, state, gradient(number, params, number == spoilt))
    return params, state


def assert_same(a, b):
    """Compare trees, dtypes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


# --------------------------------------------------------------------------- saved, restored, on

CASES: dict[str, tuple[Any, Any, str]] = {
    name: (case.make, BFLOAT16 if case.masters else FLOAT32, "nearest")
    for name, case in TRANSFORMATIONS.items()
    if "learning_rate" in case.make().state_names() or case.foreign
}
CASES["stochastic"] = (lambda: adamx.adamw(0.01), BFLOAT16, "stochastic")
CASES["stochastic_packed8"] = (
    lambda: adamx.adamw(0.01, moments="packed8"),
    BFLOAT16,
    "stochastic",
)
CASES["all_at_once"] = (
    lambda: adamx.accumulate(
        adamx.skip_nonfinite(
            adamx.master_weights(
                adamx.by_path(
                    {"w": {"moments": "packed16"}}, default=functools.partial(adamx.adamw, 0.1)
                )
            )
        ),
        2,
    ),
    BFLOAT16,
    "nearest",
)


def test_every_optimizer_is_among_the_cases():
    assert KEPT <= CASES.keys()
    optimizers = {
        name
        for name in adamx.__all__
        if getattr(adamx, name).__module__.startswith("adamx.optimizers.")
        and not name.startswith(("scale_by", "normalized"))
    }
    wrappers = {"accumulate", "by_path", "master_weights", "schedule_free"}
    wrappers |= {"skip_nonfinite", "skip_spikes"}
    missing = {
        name for name in optimizers | wrappers if not any(map(re.compile(name).match, CASES))
    }
    assert not missing


# one of each way to keep something
KEPT = {"adamw_packed8", "chain_foreign", "schedule_free", "all_at_once"}


@pytest.mark.usefixtures("quick_compiler")  # both runs are of one program, optimised or not
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in KEPT else pytest.mark.slow) for name in CASES],
)
def test_a_restored_run_goes_on_bit_for_bit(name, saved, checkpointer):
    make, params, rounding = CASES[name]
    tx = make()
    step = adamx.make_step(tx, rounding=rounding)
    guarded = "skipped" in tx.state_names()
    begun = train(step, (params, tx.init(params)), range(3), spoilt=1 if guarded else None)
    abstract = jax.eval_shape(lambda p: (p, make().init(p)), params)
    restored = checkpointer.restore(saved(begun), abstract)
    assert_same(restored, begun)
    if guarded:
        assert restored[1]["skipped"] == 1
    if "micro_step" in restored[1]:
        assert restored[1]["micro_step"] == 1  # in the middle of a sum
    assert_same(train(step, restored, range(3, 6)), train(step, begun, range(3, 6)))


# ------------------------------------------- what Optax's checkpoints do not outlive, and ours do

RATE = 0.1
ULP = 2.0**-23


def constant(_):
    return RATE


CHANGES: dict[str, tuple[Any, Any, set[str]]] = {
    # what is added: to Optax's adam, to ours, and what adapt_state has to fill in for it. With
    # these settings none of them changes an update, so that a jump would show.
    "a schedule": (optax.adam(constant), adamx.adam(constant), set()),
    "a clip": (
        optax.chain(optax.clip_by_global_norm(1e6), optax.adam(RATE)),
        adamx.chain(adamx.clip_by_global_norm(1e6), adamx.adam(RATE)),
        set(),
    ),
    "a decay with a mask": (
        optax.adamw(RATE, weight_decay=0.0, mask={"w": True, "b": False}),
        adamx.adamw(RATE, weight_decay=0.0, mask={"w": True, "b": False}),
        set(),
    ),
    "a guard": (
        optax.apply_if_finite(optax.adam(RATE), 5),
        adamx.skip_nonfinite(adamx.adam(RATE), 5),
        {"consecutive_skipped", "skipped"},
    ),
    "a slot": (
        # from the same gradient again and again, v only grows, so that its maximum is v
        optax.amsgrad(RATE),
        adamx.amsgrad(RATE),
        {"nu_max/b", "nu_max/w"},
    ),
}


def constant_gradient(tx, params, state, steps):
    """Take steps along one gradient; return (the updates of each, state)."""
    grads, update, found = gradient(0, params), jax.jit(tx.update), []
    for _ in range(steps):
        updates, state = update(grads, state, params)
        found.append(updates)
    return found, state


@pytest.mark.parametrize(
    "what", [w if i < 2 else pytest.param(w, marks=pytest.mark.slow) for i, w in enumerate(CHANGES)]
)
def test_a_checkpoint_outlives_what_is_added_here_and_not_in_optax(what, saved, checkpointer):
    theirs, ours, filled = CHANGES[what]
    before = optax.adam(RATE), adamx.adam(RATE)
    states = [constant_gradient(tx, FLOAT32, tx.init(FLOAT32), 3)[1] for tx in before]
    folder = saved({"optax": states[0], "adamx": states[1]})

    def restored(optax_tx, adamx_tx):
        trees = {"optax": optax_tx.init(FLOAT32), "adamx": adamx_tx.init(FLOAT32)}
        return checkpointer.restore(folder, jax.eval_shape(lambda: trees))

    assert_same(restored(*before)["optax"], states[0])  # it is not the checkpoint that fails
    with pytest.raises(ValueError, match="structure"):
        restored(theirs, before[1])

    if not filled:
        state = restored(before[0], ours)["adamx"]
    else:  # the state has something new: ours is adapted, whatever was restored
        state, adaptation = adapt_state(ours, FLOAT32, checkpointer.restore(folder)["adamx"])
        assert set(adaptation.filled) == filled and not adaptation.dropped
    assert state["count"] == 3
    got, _ = constant_gradient(ours, FLOAT32, state, 3)
    expected, _ = constant_gradient(before[1], FLOAT32, states[1], 3)
    # two programs: their products and sums may be contracted differently, a ULP for each operation
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=8 * ULP), got, expected)


def test_a_guard_added_to_a_saved_run_guards_it(saved, checkpointer):
    tx, guarded = adamx.adamw(RATE), adamx.skip_nonfinite(adamx.adamw(RATE))
    begun = train(adamx.make_step(tx), (FLOAT32, tx.init(FLOAT32)), range(3))
    state, _ = adapt_state(guarded, FLOAT32, checkpointer.restore(saved(begun[1])))
    params, state = train(adamx.make_step(guarded), (begun[0], state), [3], spoilt=3)
    assert_same(params, begun[0])
    assert state["skipped"] == 1 and state["count"] == 3


# --------------------------------------------------------------------------------- another storage

STORAGES = ("float32", "bfloat16", "packed16", "packed8")
BETAS: dict[str, Any] = {"b1": 0.9, "b2": 0.999}


def adam(moments, **betas):
    return adamx.adam(RATE, **BETAS | betas, moments=moments)


def moments_within(new, old, moments):
    """Assert that moments are what a storage may make of others, rounded up or down once.

    A bfloat16 has 7 bits behind the leading one, `nu` in packed16 has 8, in packed8 2, and half of
    the 2^-92 that it is stored with. The spacing of packed8's ratio x = 223 / c |mu| / S is at most
    (1 + x) / 8, that of mu so |mu| / 8 + c S / (8 * 223), and S at most 1.061 sqrt(nu). Beyond that
    there are a few ULP of arithmetic.
    """
    relative = {
        "float32": (0, 0),
        "bfloat16": (2.0**-7, 2.0**-7),
        "packed16": (2.0**-7, 2.0**-8),
        "packed8": (2.0**-3, 2.0**-2),
    }[moments]
    for mu, nu, old_mu, old_nu in zip(
        *(jax.tree.leaves(tree[name]) for tree in (new, old) for name in ("mu", "nu")), strict=True
    ):
        c = adamx.ratio_bound(**BETAS) if moments == "packed8" else 0
        fixed = c * 1.061 * np.sqrt(nu) / (8 * 223)
        assert np.all(np.abs(mu - old_mu) <= (relative[0] + 4 * ULP) * np.abs(old_mu) + fixed)
        assert np.all(np.abs(nu - old_nu) <= (relative[1] + 4 * ULP) * np.abs(old_nu))


@pytest.fixture(scope="module")
def runs():
    """Return (params, state) after ten steps with each storage."""
    steps = {}
    for moments in STORAGES:
        tx = adam(moments)
        steps[moments] = train(adamx.make_step(tx), (FLOAT32, tx.init(FLOAT32)), range(10))
    return steps


def all_storages():
    """Yield all pairs: fast are the changes along the circle."""
    for i, of in enumerate(STORAGES):
        for j, to in enumerate(STORAGES):
            fast = (j - i) % len(STORAGES) == 1
            yield pytest.param(of, to, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(("of", "to"), [*all_storages()])
def test_the_moments_are_carried_over_to_any_storage(of, to, runs):
    params, state = runs[of]
    old, new = adam(of), adam(to)
    carried, adaptation = adapt_state(new, params, state, saved_by=old)
    assert (adaptation.filled, adaptation.dropped) == ((), ())
    assert jax.eval_shape(lambda: carried) == jax.eval_shape(new.init, params)
    assert carried["count"] == 10 and carried["learning_rate"] == np.float32(RATE)
    read = adamx.moments(state, old)
    moments_within(adamx.moments(carried, new), read, to)
    if of == to:
        assert_same(carried, state)
    if to == "float32":
        assert_same({name: carried[name] for name in ("mu", "nu")}, read)
    back, _ = adapt_state(old, params, carried, saved_by=new)
    if of in ("bfloat16", "packed16") and to == "float32":
        assert_same(back, state)  # what has been rounded is rounded to itself


def test_every_word_of_a_storage_that_stays_stays_as_it_is():
    params, tx = jnp.zeros(2**16), adam("packed8")
    state = tx.init(params) | {"packed8": jnp.arange(2**16).astype(jnp.uint16)}
    guarded = adamx.skip_nonfinite(tx)
    assert_same(adapt_state(guarded, params, state, saved_by=tx)[0]["packed8"], state["packed8"])


def test_a_storage_added_to_a_saved_run_makes_no_jump(saved, checkpointer, runs):
    params, state = runs["float32"]
    old, new = adam("float32"), adam("packed16")
    folder = saved(state)
    with pytest.raises(ValueError, match="structure"):
        checkpointer.restore(folder, jax.eval_shape(new.init, params))
    carried, _ = adapt_state(new, params, checkpointer.restore(folder), saved_by=old)
    grads = gradient(10, params)
    (a, after), (b, wanted) = new.update(grads, carried), old.update(grads, state)
    moments = adamx.moments(after, new)
    for u, v, m, old_m in zip(
        *map(jax.tree.leaves, (a, b, moments["mu"], state["mu"])), strict=True
    ):
        # u = -lr mu^ / sqrt(nu^): mu was rounded twice, by 2^-7 of what it was and of what it is;
        # sqrt(nu) by half of 2^-8 each time
        ratio = 2.0**-7 * (np.abs(old_m) + np.abs(m)) / np.abs(m) + 2.0**-8
        assert np.all(np.abs(u - v) <= 1.02 * ratio * np.abs(u))
    assert wanted["count"] == after["count"] == 11


@pytest.mark.parametrize(
    ("of", "to"),
    [
        (of, to)
        for of in STORAGES
        for to in STORAGES
        if of != to and {of, to} != {"float32", "bfloat16"}
    ],
)
def test_moments_are_not_lost_in_another_storage_without_being_told(of, to, runs):
    params, state = runs[of]
    with pytest.raises(
        ValueError, match=r"adapt_state: '(mu|packed16|packed8)/.*was saved as.*saved_by=old_tx"
    ):
        adapt_state(adam(to), params, state)


def test_the_old_transformation_has_to_be_the_one_that_made_the_state(runs):
    params, state = runs["packed16"]
    for wrong in (adam("float32"), adam("packed8")):
        with pytest.raises(ValueError, match=r"adapt_state: .*saved_by=old_tx"):
            adapt_state(adam("packed16"), params, state, saved_by=wrong)
    with pytest.raises(
        ValueError, match=r"saved_by must be .* do not fit it: consecutive_skipped, skipped"
    ):
        wrong = adamx.skip_nonfinite(adam("packed16"))
        adapt_state(adam("packed16"), params, state, saved_by=wrong)


def test_other_decays_are_carried_over_in_packed8(runs):
    params, state = runs["packed8"]
    old, new = adam("packed8"), adam("packed8", b1=0.5)
    carried, _ = adapt_state(new, params, state, saved_by=old)
    found, read = adamx.moments(carried, new), adamx.moments(state, old)
    moments_within(found, read, "packed8")
    assert_same(found["nu"], read["nu"])
    # the words as they are would be read with another bound
    unchanged = adamx.moments(state, new)["mu"]["w"]
    assert np.all(np.abs(unchanged / read["mu"]["w"] - 1) > 0.25)


def in_groups(**moments):
    """Everything at once, each leaf in a storage of its own."""
    groups = {leaf: {"moments": name} for leaf, name in moments.items()}
    made = adamx.by_path(groups, default=functools.partial(adamx.adamw, RATE, **BETAS))
    return adamx.accumulate(adamx.skip_nonfinite(adamx.master_weights(made)), 2)


@pytest.mark.slow
def test_groups_with_masters_change_their_storages_leaf_by_leaf():
    params = BFLOAT16 | {"v": jnp.ones(3, jnp.bfloat16)}
    old = in_groups(w="packed16", b="float32", v="packed8")
    new = in_groups(w="bfloat16", b="packed16", v="packed8")
    params, state = train(adamx.make_step(old), (params, old.init(params)), range(7))
    carried, adaptation = adapt_state(new, params, state, saved_by=old)
    assert (adaptation.filled, adaptation.dropped) == ((), ())
    assert jax.eval_shape(lambda: carried) == jax.eval_shape(new.init, params)
    kept = ("count", "remainder", "accumulated", "micro_step", "skipped", "learning_rate")
    assert_same({name: carried[name] for name in kept}, {name: state[name] for name in kept})
    assert_same(carried["packed8"]["v"], state["packed8"]["v"])
    read, found = adamx.moments(state, old), adamx.moments(carried, new)
    for leaf, moments in {"w": "bfloat16", "b": "packed16", "v": "float32"}.items():
        here, there = ({name: x[name][leaf] for name in ("mu", "nu")} for x in (found, read))
        moments_within(here, there, moments)
    back, _ = adapt_state(old, params, carried, saved_by=new)
    assert_same(back["packed8"]["v"], state["packed8"]["v"])
    step = adamx.make_step(new)
    assert_same(adamx.masters(params, carried), adamx.masters(params, state))
    step(params, carried, gradient(7, params))


def test_a_storage_inside_a_storage_is_carried_over():
    def made(moments):
        return adamx.chain(adamx.bfloat16(adamx.chain(moments, adamx.trace(0.5))), adamx.sgd(0.1))

    old, new = made(adamx.scale_by_adam()), made(adamx.packed16(adamx.scale_by_adam()))
    params, state = train(adamx.make_step(old), (FLOAT32, old.init(FLOAT32)), range(3))
    carried, _ = adapt_state(new, params, state, saved_by=old)
    assert_same(carried["trace"], state["trace"])
    read, found = adamx.moments(state, old), adamx.moments(carried, new)
    assert_same(found["mu"], read["mu"])  # of 7 bits here and there
    assert_same(found["nu"], read["nu"])


def test_a_new_slot_is_filled_in_and_an_old_one_dropped_beside_another_storage(runs):
    params, state = runs["packed16"]
    tx = adamx.amsgrad(RATE, moments="bfloat16")
    carried, adaptation = adapt_state(tx, params, state, saved_by=adam("packed16"))
    assert set(adaptation.filled) == {"nu_max/b", "nu_max/w"} and not adaptation.dropped
    moments_within(adamx.moments(carried, tx), adamx.moments(state, adam("packed16")), "bfloat16")
    tx = adamx.momentum(RATE)
    carried, adaptation = adapt_state(tx, params, state, saved_by=adam("packed16"))
    assert adaptation.dropped == ("nu/b", "nu/w") and not adaptation.filled
    assert_same(carried["mu"], adamx.moments(state, adam("packed16"))["mu"])


def test_dropping_words_that_nothing_takes_the_place_of_is_no_error(runs):
    params, state = runs["packed16"]
    _, adaptation = adapt_state(adamx.sgd(RATE), params, state)
    assert adaptation.dropped == ("packed16/b", "packed16/w")


@pytest.mark.parametrize(("of", "to"), [("remainder", "float32"), ("remainder", "remainder8")])
def test_what_is_kept_of_the_masters_cannot_change(of, to):
    def made(keep):
        return adamx.master_weights(adamx.adamw(RATE), keep)

    for a, b in ((of, to), (to, of)):
        for was in (None, made(a)):
            with pytest.raises(ValueError, match=r"keep= of master_weights nor the"):
                adapt_state(made(b), BFLOAT16, made(a).init(BFLOAT16), saved_by=was)


def test_masters_are_added_to_a_saved_run():
    old = adamx.sgd(RATE, momentum=0.9)
    new = adamx.master_weights(adamx.momentum(RATE))
    _, adaptation = adapt_state(new, BFLOAT16, old.init(BFLOAT16))
    assert adaptation.dropped == ("trace/b", "trace/w")
    assert set(adaptation.filled) == {"mu/b", "mu/w", "remainder/b", "remainder/w"}


@pytest.mark.parametrize("params", [{"": jnp.ones(3)}, jnp.ones(3), {"a": {"": jnp.ones(2)}}])
def test_a_key_may_be_empty(params):
    old, new = adam("float32"), adam("packed16")
    carried, adaptation = adapt_state(new, params, old.init(params), saved_by=old)
    assert_same(carried, new.init(params))
    assert (adaptation.filled, adaptation.dropped) == ((), ())
