"""Parameter groups by path, masks by pattern, schedules of decays, averages of parameters."""

import dataclasses
import functools
import pickle
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import reference_family

import adamx
from adamx.core.paths import matches, paths_of
from adamx.transforms.bias_correction import one_minus_power

pytestmark = pytest.mark.usefixtures("quick_compiler")  # both sides are compiled alike

ULP = 2.0**-23


def start():
    return {
        "embed": jnp.ones((4, 2)),
        "layers": [
            {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.array([0.5, -0.5])},
            {"kernel": jnp.full((2, 2), -1.0), "bias": jnp.array([1.0, 3.0])},
        ],
    }


def gradients(number=3):
    rng = np.random.default_rng(0)
    return [
        jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), start())
        for _ in range(number)
    ]


def train(tx, grads=None, params=None):
    params = start() if params is None else params
    state, step = tx.init(params), adamx.make_step(tx)
    for g in grads or gradients():
        params, state = step(params, state, g)
    return params, state


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --------------------------------------------------------------------------------------- groups


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Box:
    value: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Attention:
    key: Any
    value: Any


def test_a_box_around_an_array_is_no_part_of_its_path():
    boxed = {"dense": {"bias": Box(1.0), "kernel": Box(None)}, "attention": Attention(1.0, 1.0)}
    unboxed = {"dense": {"bias": 1.0, "kernel": None}, "attention": {"key": 1.0, "value": 1.0}}
    assert paths_of(boxed) == paths_of(unboxed)
    assert paths_of({"value": 1.0}) == ["value"], "a key of a dict is no box"


def test_a_state_made_from_boxes_is_used_without_them_and_carried_over():
    """As Flax NNX does: init sees its variables, update their arrays."""
    params = start()
    boxed = jax.tree.map(Box, params)
    tx = adamx.by_path(
        {"*/bias": adamx.sgd(0.1, momentum=0.5), "layers/1/kernel": None},
        default=adamx.adamw(0.1, mask="layers/*", moments="packed16"),
    )

    def unbox(tree):
        return jax.tree.map(
            lambda box: box.value if isinstance(box, Box) else box,
            tree,
            is_leaf=lambda x: isinstance(x, Box),
        )

    same(unbox(tx.init(boxed)), tx.init(params))
    state = tx.update(gradients()[0], tx.init(params), params)[1]
    for have, saved in (
        (boxed, state),
        (params, {k: jax.tree.map(Box, x) for k, x in state.items()}),
    ):
        carried, adaptation = adamx.adapt_state(tx, have, saved)
        assert adaptation == adamx.Adaptation((), ())
        same(unbox(carried), state)


def test_each_group_is_trained_as_it_would_be_alone():
    """To 2 ULP: two programs may contract a * b + c differently, half a ULP in each of 3 steps."""
    adamw = functools.partial(adamx.adamw, learning_rate=0.1, weight_decay=0.3)
    tx = adamx.by_path(
        {
            "embed": None,
            "layers/0/*": adamx.sgd(0.5, momentum=0.9),
            "*/bias": {"weight_decay": 0.0, "b1": 0.5},
            re.compile(r"layers/[1-9]/kernel"): {"moments": "packed16"},
        },
        default=adamw,
    )
    params, state = train(tx)
    same(params["embed"], start()["embed"])
    alone = {
        ("embed",): start(),
        (0, "kernel"): train(adamx.sgd(0.5, momentum=0.9))[0],
        (0, "bias"): train(adamx.sgd(0.5, momentum=0.9))[0],
        (1, "bias"): train(adamw(weight_decay=0.0, b1=0.5))[0],
        (1, "kernel"): train(adamw(moments="packed16"))[0],
    }
    for where, wanted in alone.items():
        a, b = params["layers"], wanted["layers"]
        a, b = (params, wanted) if where == ("embed",) else (a[where[0]], b[where[0]])
        np.testing.assert_array_max_ulp(a[where[-1]], b[where[-1]], 2)
    assert int(state["count"]) == 3
    # what is kept: one tree a slot, None where the group has none
    assert state["trace"]["layers"][0]["kernel"].shape == (2, 2)
    assert state["mu"]["layers"][1]["bias"].shape == (2,)
    kept = {name: len(jax.tree.leaves(state[name])) for name in ("trace", "mu", "nu", "packed16")}
    assert kept == {"trace": 2, "mu": 1, "nu": 1, "packed16": 1}
    rates = {"layers/0/*": 0.5, "*/bias": 0.1, r"layers/[1-9]/kernel": 0.1, "default": 0.1}
    assert {k: round(float(v), 6) for k, v in state["learning_rate"].items()} == rates


def test_a_predicate_is_asked_about_the_parameters_as_they_were_given():
    asked = []

    def narrow(path, leaf):
        asked.append(str(leaf.dtype))
        return leaf.dtype == jnp.bfloat16

    tx = adamx.master_weights(adamx.by_path({narrow: adamx.sgd(0.5)}, default=None))
    w = jnp.ones(1, jnp.bfloat16)
    assert tx.update(w, tx.init(w), w)[0] == -0.5
    assert set(asked) == {"bfloat16"}


def test_the_first_match_wins():
    groups = {"layers/0/bias": adamx.sgd(1.0), "*/bias": adamx.sgd(2.0), "layers/*": None}
    params, _ = train(adamx.by_path(groups, default=adamx.sgd(4.0)), [jax.tree.map(
        jnp.ones_like, start())])  # fmt: skip
    moved = jax.tree.map(lambda p, q: float((p - q).max()), start(), params)
    assert moved == {
        "embed": 4.0,
        "layers": [{"kernel": 0.0, "bias": 1.0}, {"kernel": 0.0, "bias": 2.0}],
    }


def test_a_group_may_clip_by_its_own_norm_and_keep_masters():
    clip = adamx.clip_by_global_norm(1.0, record=True)
    tx = adamx.by_path(
        {
            "embed": adamx.chain(clip, adamx.sgd(1.0)),
            "layers/0/*": adamx.chain(clip, adamx.sgd(1.0)),
        },
        default=adamx.sgd(1.0),
    )
    grads = jax.tree.map(lambda p: jnp.full_like(p, 3.0), start())
    params, state = train(tx, [grads])
    assert {k: float(v) for k, v in state["grad_norm"].items()} == {
        "embed": pytest.approx(3 * 8**0.5, rel=4 * ULP),
        "layers/0/*": pytest.approx(3 * 6**0.5, rel=4 * ULP),
    }
    np.testing.assert_allclose(params["embed"], 1 - 1 / 8**0.5, rtol=8 * ULP)
    np.testing.assert_array_equal(params["layers"][1]["bias"], [-2.0, 0.0])

    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), start())
    masters = adamx.by_path({"embed": adamx.master_weights(adamx.sgd(2.0**-10))}, default=None)
    assert masters.place == "last"
    _, state = train(masters, [jax.tree.map(jnp.ones_like, half)] * 3, half)
    assert state["remainder"]["embed"].dtype == jnp.int16
    assert state["remainder"]["layers"][0]["bias"] is None


def test_groups_stand_anywhere_in_a_chain():
    """Before the learning rate, behind a clip over all groups, and around each other."""
    inner = adamx.by_path({"*/bias": None}, default=adamx.scale(2.0))
    scaling = adamx.by_path({"layers/0/*": inner}, default=adamx.trace(0.5))
    tx = adamx.chain(adamx.scale(3.0), scaling, adamx.scale_by_learning_rate(0.5))
    params, state = train(tx, [jax.tree.map(jnp.ones_like, start())])
    moved = jax.tree.map(lambda p, q: float((p - q).max()), start(), params)
    assert moved == {
        "embed": 1.5,
        "layers": [{"kernel": 3.0, "bias": 0.0}, {"kernel": 1.5, "bias": 1.5}],
    }
    assert set(state) == {"count", "trace", "learning_rate"}
    assert float(state["learning_rate"]) == 0.5


def test_what_follows_groups_gets_their_updates_unrounded():
    """2^-30 is no float16."""
    grads = {"w": jnp.ones(2, jnp.float16)}
    tx = adamx.chain(adamx.by_path({}, default=adamx.scale(2.0**-30)), adamx.scale(2.0**30))
    same(tx.update(grads, tx.init(grads))[0], grads)


def test_frozen_parameters_keep_nothing_and_do_not_move_even_by_nan():
    grads = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), start())
    tx = adamx.by_path({"layers/*": None}, default=adamx.adamw(0.1))
    params, state = train(tx, [grads])
    same(params["layers"], start()["layers"])
    assert all(state[slot]["layers"][0]["kernel"] is None for slot in ("mu", "nu"))
    updates, _ = tx.update(grads, tx.init(start()), start())
    same(updates["layers"], jax.tree.map(jnp.zeros_like, start()["layers"]))


def test_moments_reads_the_groups_out():
    groups = {"embed": {"moments": "packed16"}, "layers/0/*": None}
    tx = adamx.by_path(groups, default=functools.partial(adamx.adam, 0.1))
    _, state = train(tx)
    found = adamx.moments(state, tx)
    assert set(found) == {"mu", "nu"}
    assert found["mu"]["embed"].dtype == jnp.float32 and found["mu"]["embed"].shape == (4, 2)
    assert found["mu"]["layers"][0]["bias"] is None
    same(found["mu"]["layers"][1], state["mu"]["layers"][1])
    plain, other = adamx.adam(0.1), adamx.adam(0.1, moments="packed16")
    same(found["nu"]["embed"], adamx.moments(train(other)[1], other)["nu"]["embed"])
    same(found["nu"]["layers"][1], adamx.moments(train(plain)[1], plain)["nu"]["layers"][1])


def test_moments_of_groups_that_keep_none():
    tx = adamx.by_path({"embed": None}, default=adamx.sgd(0.1))
    assert adamx.moments(tx.init(start()), tx) == {}


def test_moments_are_unpacked_by_the_group_that_packed_them():
    """Both keep `moments`, one in 16 bits, the other in 8; three of one are no number of others."""
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    packed = {"a": adamx.adam(0.1, moments="packed8"), "b": adamx.adam(0.1, moments="packed16")}
    tx = adamx.by_path({"a": packed["a"]}, default=packed["b"])
    found = adamx.moments(train(tx, [jax.tree.map(jnp.copy, params)], params)[1], tx)["nu"]
    for name, alone in packed.items():
        params = {"a": jnp.ones(3), "b": jnp.ones(3)}
        state = train(alone, [jax.tree.map(jnp.copy, params)], params)[1]
        same(found[name], adamx.moments(state, alone)["nu"][name])


def test_a_mask_acts_in_its_group():
    """The mask is that of the whole tree: it may name leaves of other groups too."""
    decayed = functools.partial(adamx.adamw, 0.1, weight_decay=0.5)
    tx = adamx.by_path({"layers/0/*": decayed(mask="*kernel"), "embed": None}, default=decayed())
    params = train(tx)[0]["layers"]
    plain = train(adamx.adamw(0.1, weight_decay=0.0))[0]["layers"]
    decaying = train(decayed())[0]["layers"]
    for i, name, wanted in ((0, "bias", plain), (0, "kernel", decaying), (1, "bias", decaying)):
        np.testing.assert_array_max_ulp(params[i][name], wanted[i][name], 2)


def test_groups_whose_last_stage_settles_the_parameters_come_last():
    averaged = adamx.chain(adamx.adamw(0.1), adamx.ema_of_params())
    tx = adamx.by_path({"embed": averaged}, default=adamx.sgd(0.1))
    with pytest.raises(ValueError, match="by_path sets the new parameters"):
        adamx.chain(tx, adamx.scale(2.0))


def test_a_concept_in_a_group_sees_the_whole_state():
    class times_count(adamx.Transformation):
        def scalars(self, step):
            return step.state["count"].astype(float)

        def emit(self, u, slots, step):
            return step.scalars * u

    tx = adamx.by_path({"embed": times_count()}, default=adamx.sgd(0.1))
    state = tx.init(start())
    for t in (1, 2):
        updates, state = tx.update(start(), state)
        np.testing.assert_array_equal(updates["embed"], t)


def test_groups_prints_compares_and_pickles():
    tx = adamx.by_path({"*/bias": None, re.compile("e.*"): adamx.sgd(0.5)}, default=adamx.sgd(1.0))
    assert repr(tx) == (
        "by_path(\n"
        "    {\n"
        "        '*/bias': set_to_zero(),\n"
        "        'e.*': chain(scale_by_learning_rate(0.5)),\n"
        "    },\n"
        "    default=chain(scale_by_learning_rate(1.0)),\n"
        ")"
    )
    assert pickle.loads(pickle.dumps(tx)) == tx
    assert tx != adamx.by_path({"*/bias": None}, default=adamx.sgd(1.0))


def test_a_pattern_that_matches_nothing_is_an_error_that_shows_the_paths():
    tx = adamx.by_path({"*/biases": None}, default=adamx.sgd(1.0))
    text = (
        r"^by_path: the pattern '\*/biases' matches no leaf.*whole path.*'embed', 'layers/0/bias'"
    )
    with pytest.raises(ValueError, match=text):
        tx.init(start())
    state = adamx.sgd(1.0).init(start())
    with pytest.raises(ValueError, match="matches no leaf"):
        tx.update(start(), state, start())
    with pytest.raises(ValueError, match=r"the paths are 'p0', .*'p5', \.\.\.$"):
        tx.init({f"p{i}": jnp.ones(1) for i in range(7)})
    assert tx.init({}) is not None  # an empty tree has nothing to match


def test_a_state_without_groups_or_with_them_is_of_another_composition():
    plain, groups = adamx.sgd(0.1), adamx.by_path({"embed": None}, default=adamx.sgd(0.1))
    with pytest.raises(ValueError, match=r"write .*\['default'\].*adapt_state"):
        groups.update(start(), plain.init(start()))
    with pytest.raises(ValueError, match=r"state\['learning_rate'\] is a dict with.*adapt_state"):
        plain.update(start(), groups.init(start()))


@pytest.mark.parametrize(
    ("groups", "default", "error", "text"),
    [
        ({3: None}, None, TypeError, "by_path: a pattern must be a string such as '*/bias' or a"),
        ({"w": 0.1}, None, TypeError, "by_path: the group 'w' must be a transformation, a dict"),
        ({}, 0.1, TypeError, "by_path: the group 'default' must be a transformation"),
        ({"w": {"b1": 0.5}}, None, TypeError, "default must be a function that takes them"),
        (
            {"w": {"b1": 0.5}},
            adamx.adam(0.1),
            TypeError,
            "by_path: the group 'w' has settings, {'b1': 0.5}",
        ),
        ({"default": None}, None, ValueError, "by_path: patterns must differ"),
        ([("w", None)], None, TypeError, "by_path: groups must map patterns to groups, got [("),
        (
            {"w": adamx.chain(adamx.clip_by_global_norm(1.0, record="mu"), adamx.sgd(0.1))},
            adamx.momentum(0.1),
            ValueError,
            "two stages keep 'mu' in the state",
        ),
        (
            {"w": adamx.accumulate(adamx.sgd(0.1), 2)},
            None,
            ValueError,
            "by_path: accumulate wraps the whole optimizer: put it around by_path",
        ),
    ],
)
def test_mistakes_in_groups_are_named(groups, default, error, text):
    with pytest.raises(error, match=re.escape(text)):
        adamx.by_path(groups, default=default)


@pytest.mark.parametrize(
    ("pattern", "path", "wanted"),
    [
        ("*", "a/b", True),
        ("*/b", "a/c/b", True),
        ("*/b", "b", False),
        ("A", "a", False),
        ("layer_[0-3]/*", "layer_2/w", True),
        ("layer_?/w", "layer_10/w", False),
        (re.compile("a"), "a/b", False),
        (re.compile("a/.*"), "a/b", True),
    ],
)
def test_a_pattern_matches_the_whole_path(pattern, path, wanted):
    assert matches(pattern, path) is wanted


# ---------------------------------------------------------------------------------------- masks

DECAYING = {"embed": False, "layers": [{"kernel": True, "bias": False}] * 2}


@pytest.mark.parametrize(
    "mask",
    [
        "layers/*/kernel",
        re.compile(r"layers/\d+/kernel"),
        ("layers/0/kernel", "layers/1/kernel"),
        ["*0/kernel", re.compile(".*1/kernel")],
        adamx.all_but("*/bias", "embed"),
        DECAYING,
        lambda _: DECAYING,
    ],
)
def test_a_mask_by_pattern_is_the_mask_as_a_tree(mask, masked_by_a_tree):
    same(train(adamx.adamw(0.1, weight_decay=0.5, mask=mask))[0], masked_by_a_tree)


@pytest.fixture(scope="module")
def masked_by_a_tree():
    return train(adamx.adamw(0.1, weight_decay=0.5, mask=DECAYING))[0]


def test_an_empty_list_of_patterns_is_refused():
    for mask in ([], ()):
        with pytest.raises(
            ValueError, match=r"add_decayed_weights: mask must .*as False for no leaf"
        ):
            adamx.adamw(0.1, mask=mask).init(start())
        empty: Any = type(mask)()
        adamx.adamw(0.1, mask=mask).init(empty)  # the tree of bools of a tree without leaves


@pytest.mark.parametrize(
    "tx",
    [
        adamx.adamw(0.1, mask={"a": {"b": True}, "a/b": False}),
        adamx.adamw(0.1, mask=adamx.all_but("a/*")),
        adamx.by_path({"a/*": None}, default=adamx.sgd(0.1)),
    ],
    ids=["tree", "all_but", "by_path"],
)
def test_two_leaves_of_one_path_cannot_be_told_apart(tx):
    params = {"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(2)}
    with pytest.raises(ValueError, match="adamx: two leaves have the path 'a/b', so that no mask"):
        tx.init(params)
    adamx.adamw(0.1).init(params)  # where no path chooses, it does not matter


def test_all_but_counts_leaves_that_are_none():
    assert adamx.all_but("b")({"a": 1.0, "b": None}) == {"a": True, "b": False}


def test_a_mask_that_matches_nothing_or_does_not_fit_is_an_error():
    for mask, name in (("*/scale", "add_decayed_weights"), (adamx.all_but("*/scale"), "all_but")):
        tx = adamx.adamw(0.1, mask=mask)
        with pytest.raises(ValueError, match=rf"^{name}: the pattern '\*/scale' matches no leaf"):
            tx.init(start())
    with pytest.raises(TypeError, match="all_but: a pattern must be a string"):
        adamx.all_but(3)  # pyright: ignore
    with pytest.raises(ValueError, match=r"prefix of the parameters' tree.*, or patterns of paths"):
        adamx.adamw(0.1, mask={"embed": True}).init(start())


def test_all_but_serves_optax_too_and_is_a_value():
    mask = adamx.all_but("*/bias", "embed")
    theirs = optax.masked(optax.set_to_zero(), mask)
    updates: Any = theirs.update(start(), theirs.init(start()))[0]
    assert not updates["layers"][0]["kernel"].any() and updates["layers"][0]["bias"].all()
    assert adamx.adamw(0.1, mask=mask) == adamx.adamw(0.1, mask=adamx.all_but("*/bias", "embed"))
    assert pickle.loads(pickle.dumps(mask)) == mask
    assert repr(mask) == "all_but('*/bias', 'embed')"
    assert "mask=all_but('*/bias', 'embed')" in repr(adamx.adamw(0.1, mask=mask))


# ---------------------------------------------------------------------------- schedules of decays


def rising(step):
    return 1 - 0.5 / (1 + jnp.asarray(step, float))


def falling(step):
    return 0.9 - 0.02 * jnp.asarray(step, float)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("nesterov", [False, True])
def test_scheduled_decays_are_corrected_by_their_product(nesterov):
    """Adam with b1_t and b2_t, and Dozat's NAdam with them, written out in float64.

    Each step rounds some 30 times, and errors of averages decay: 40 times 2^-53 of the magnitudes.
    """
    g = np.random.default_rng(0).normal(size=(20, 5))
    tx = adamx.adam(0.1, b1=rising, b2=falling, eps=1e-3, nesterov=nesterov)
    state = tx.init(jnp.zeros(5))
    m = v = np.zeros(5)
    left1 = left2 = 1.0  # the products of the decays so far
    for t in range(20):
        b1, b2, next_b1 = float(rising(t)), float(falling(t)), float(rising(t + 1))
        m, v = b1 * m + (1 - b1) * g[t], b2 * v + (1 - b2) * g[t] ** 2
        left1, left2 = left1 * b1, left2 * b2
        m_hat = m / (1 - left1)
        if nesterov:
            m_hat = next_b1 * m / (1 - left1 * next_b1) + (1 - b1) * g[t] / (1 - left1)
        wanted = -0.1 * m_hat / (np.sqrt(v / (1 - left2)) + 1e-3)
        updates, state = tx.update(jnp.asarray(g[t]), state)
        np.testing.assert_allclose(updates, wanted, rtol=0, atol=40 * 2.0**-53 * 20)
        np.testing.assert_allclose(state["mu_correction"], 1 - left1, rtol=60 * 2.0**-53)
        np.testing.assert_allclose(state["nu_correction"], 1 - left2, rtol=60 * 2.0**-53)


def test_a_constant_schedule_is_the_constant():
    """In float32 the recurrence of 1 - b^t is within a few ULP of the closed form."""
    constant = adamx.adam(0.1, b1=0.875, b2=0.984375)
    scheduled = adamx.adam(0.1, b1=lambda _: 0.875, b2=lambda _: 0.984375)
    a, b = constant.init(jnp.zeros(4)), scheduled.init(jnp.zeros(4))
    assert set(b) - set(a) == {"mu_correction", "nu_correction"}
    for t in range(1, 60):
        g = jnp.asarray(np.random.default_rng(t).normal(size=4), jnp.float32)
        (x, a), (y, b) = constant.update(g, a), scheduled.update(g, b)
        np.testing.assert_allclose(x, y, rtol=(8 + t) * ULP, atol=0)


def test_a_schedule_that_is_added_to_a_running_training_makes_no_jump():
    constant, scheduled = adamx.adam(0.1, b1=0.875), adamx.adam(0.1, b1=lambda _: 0.875)
    state = constant.init(jnp.zeros(4))
    g = jnp.array([1.0, -2.0, 0.5, 3.0])
    for _ in range(10):
        _, state = constant.update(g, state)
    carried, adaptation = adamx.adapt_state(scheduled, jnp.zeros(4), state)
    assert adaptation.filled == ("mu_correction",)
    for _ in range(3):
        (x, state), (y, carried) = constant.update(g, state), scheduled.update(g, carried)
        np.testing.assert_allclose(x, y, rtol=8 * ULP)


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_schedule_may_give_any_kind_of_number(nesterov):
    g = jnp.array([1.0, -2.0, 0.5])
    for value, same_value in ((0, 0.0), (jnp.bfloat16(0.5), 0.5), (np.float64(0.5), 0.5)):
        given = adamx.adam(0.1, b1=lambda _, v=value: v, b2=lambda _: 0.75, nesterov=nesterov)
        wanted = adamx.adam(0.1, b1=same_value, b2=0.75, nesterov=nesterov)
        a, b = given.init(g), wanted.init(g)
        for _ in range(2):
            (x, a), (y, b) = given.update(g, a), wanted.update(g, b)
            np.testing.assert_allclose(x, y, rtol=8 * ULP)
        assert a["mu_correction"].dtype == jnp.float32


def test_a_correction_has_a_derivative_where_the_decay_is_zero():
    """That of 1 - b^3 is -3 b^2."""
    slope = jax.grad(lambda b: one_minus_power(b, jnp.array(3)))
    assert float(slope(0.0)) == 0 and float(slope(0.5)) == pytest.approx(-0.75, rel=8 * ULP)


def test_any_optax_schedule_serves_for_any_decay():
    ramp = optax.linear_schedule(0.5, 0.9, 4)
    for tx in (
        adamx.momentum(0.1, decay=ramp),
        adamx.rmsprop(0.1, decay=ramp, centered=True, bias_correction=True),
        adamx.adamw(0.1, b1=ramp, b2=ramp, weight_decay=ramp, moments="packed16"),
        adamx.adamw(ramp, mask="layers/*"),
    ):
        params, state = train(tx)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((params, state)))
    with pytest.raises(TypeError, match=r'^ratio_bound: b1 .*"packed16" takes schedules$'):
        adamx.adam(0.1, b1=ramp, moments="packed8")


# -------------------------------------------------------------------------- averages of parameters


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("which", ["mean", "ema", "ema_zero"])
def test_averages_of_parameters_are_the_references(which):
    """20 steps: each average rounds 4 times a step, and the weights are of order 1."""
    g = np.random.default_rng(0).normal(size=(20, 5))
    decay = {"mean": None, "ema": 0.8, "ema_zero": 0.0}[which]
    piece = adamx.mean_of_params() if decay is None else adamx.ema_of_params(decay)
    tx = adamx.chain(adamx.momentum(0.1), piece)
    w = jnp.ones(5)
    state, step, kept = tx.init(w), adamx.make_step(tx), []
    np.testing.assert_array_equal(state[piece.name], w)
    walked = [np.ones(5)]
    for x in g:
        w, state = step(w, state, jnp.asarray(x))
        walked.append(np.asarray(w))
        kept.append(np.asarray(state[piece.name]))
    run = reference.momentum(np.ones(5), g, learning_rate=0.1)
    np.testing.assert_allclose(walked, run.params, rtol=1e-13)
    wanted = (
        reference_family.mean_of_params(run.params[1:])
        if decay is None
        else reference_family.ema_of_params(run.params[1:], decay)
    )
    np.testing.assert_allclose(kept, wanted, rtol=0, atol=20 * 4 * 2.0**-53 * 2)


def test_the_average_is_that_of_the_masters():
    """Steps of 1e-3 on a bfloat16 of 1: the parameter jumps, the average follows the master."""
    tx = adamx.master_weights(adamx.chain(adamx.sgd(2.0**-10), adamx.mean_of_params()))
    w = jnp.ones(1, jnp.bfloat16)
    state, step = tx.init(w), adamx.make_step(tx)
    for _ in range(3):
        w, state = step(w, state, jnp.ones(1, jnp.bfloat16))
    np.testing.assert_array_equal(state["params_mean"], np.float32(1 - 2 * 2.0**-10))


def test_an_average_is_the_last_stage_and_needs_the_parameters():
    with pytest.raises(ValueError, match="mean_of_params sets the new parameters"):
        adamx.chain(adamx.mean_of_params(), adamx.sgd(0.1))
    with pytest.raises(ValueError, match="ema_of_params sets the new parameters"):
        adamx.chain(adamx.ema_of_params(), adamx.sgd(0.1))
    for piece in (adamx.mean_of_params(), adamx.ema_of_params()):
        with pytest.raises(ValueError, match=f"^{type(piece).__name__}: needs the parameters"):
            piece.update(start(), piece.init(start()))


# -------------------------------------------------------------- decay that is none of the rate's


@pytest.mark.usefixtures("x64")
def test_independent_decay_is_the_papers_algorithm():
    g = np.random.default_rng(0).normal(size=(20, 5))
    eta = np.cos(np.arange(20) / 20) + 0.5
    tx = adamx.adamw_independent(
        0.03, weight_decay=0.01, multiplier=lambda step: jnp.asarray(eta)[step]
    )
    w = jnp.full(5, 2.0)
    state, step = tx.init(w), adamx.make_step(tx)
    run = reference_family.adamw_independent(
        np.full(5, 2.0), g, learning_rate=0.03, multiplier=list(eta), weight_decay=0.01
    )
    for t in range(20):
        w, state = step(w, state, jnp.asarray(g[t]))
        np.testing.assert_allclose(w, run.params[t + 1], rtol=1e-13)


def test_independent_decay_stays_when_the_rate_changes_and_adamws_does_not():
    w, zero = jnp.array([2.0]), jnp.zeros(1)
    shrunk = []
    for rate in (0.1, 0.01):
        for tx in (adamx.adamw_independent(rate, weight_decay=0.5), adamx.adamw(
            rate, weight_decay=0.5)):  # fmt: skip
            shrunk.append(float(tx.update(zero, tx.init(w), w)[0][0]))
    np.testing.assert_allclose(shrunk, [-1.0, -0.1, -1.0, -0.01], rtol=1e-6)


def test_independent_decay_passes_its_settings_on():
    """The first step from w = 2 with g = 4: alpha * 4 / (4 + eps) and the decay, where it is."""
    params = {"a": jnp.array([2.0]), "b": jnp.array([2.0])}
    grads = jax.tree.map(lambda w: 2 * w, params)
    tx = adamx.adamw_independent(
        0.5, eps=4.0, weight_decay=0.25, mask={"a": True, "b": False}, moments="packed16"
    )
    updates, state = tx.update(grads, tx.init(params), params)
    assert set(state) == {"count", "learning_rate", "packed16"}
    np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-0.75, -0.25], rtol=2.0**-7)


def test_normalised_decay():
    wanted = reference_family.normalised_weight_decay(
        0.05, batch_size=128, dataset_size=50_000, epochs=1800
    )
    ours = adamx.normalized_weight_decay(0.05, batch_size=128, examples=50_000, epochs=1800)
    assert ours == pytest.approx(wanted, rel=1e-15)
    sizes = {"batch_size": 1.0, "examples": 1.0, "epochs": 1.0}
    for name, bad in (("batch_size", 0.0), ("examples", 0.5), ("epochs", 0.0), ("norm", -1.0)):
        with pytest.raises(ValueError, match=f"normalized_weight_decay: {name} must be"):
            adamx.normalized_weight_decay(**{"norm": 0.05, **sizes, name: bad})
