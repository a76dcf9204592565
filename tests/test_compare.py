"""`compare` against differences worked out by hand."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamx
from adamx import compare

pytestmark = pytest.mark.usefixtures("quick_compiler")

INF, NAN = np.inf, np.nan
TINY = 2.0**-126  # the smallest normal float32, and bfloat16


@pytest.fixture
def standard():
    """Optax's own transformations do not run under strict dtype promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def giving(updates) -> Any:
    """Return a transformation that replaces whatever comes by the given updates."""
    return optax.stateless(lambda *_: updates)


def difference(a, b):
    """Return what compare says of two updates, and of parameters that become them."""
    zeros = jax.tree.map(jnp.zeros_like, a)
    return compare(giving(a), giving(b), zeros, [zeros])


# -------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize(
    ("dtype", "a", "b", "relative", "ulps"),
    [
        # one ULP of float32 in [1, 2) is 2^-23
        ("float32", 1.0, 1.0, 0.0, 0.0),
        ("float32", 1.0, 1 + 2**-23, 2**-23 / (1 + 2**-23), 1.0),
        ("float32", 1 + 2**-23, 1.0, 2**-23 / (1 + 2**-23), 1.0),
        ("float32", -1.5, -1.5 + 3 * 2**-23, 2**-22, 3.0),
        ("float32", 2.0, 2 + 2**-22, 2**-22 / (2 + 2**-22), 1.0),
        # the larger of the two says what one ULP is
        ("float32", 1 - 2**-24, 1.0, 2**-24, 0.5),
        ("float32", 0.0, 1.0, 1.0, 2.0**23),
        ("float32", 1.0, -1.0, 2.0, 2.0**24),
        ("float32", 3e38, -3e38, 2.0, 2 * float(np.float32(3e38)) / 2.0**104),
        ("float32", 0.0, -0.0, 0.0, 0.0),
        # below the smallest normal number the spacing stays what it is there, 2^-149
        ("float32", TINY, TINY - 2**-149, 2.0**-23, 1.0),
        ("float32", 2.0**-149, 0.0, 1.0, 1.0),
        ("float32", 2.0**-140, 2.0**-141, 0.5, 2.0**8),
        ("bfloat16", 1.0, 1 + 2**-7, 2**-7 / (1 + 2**-7), 1.0),
        ("bfloat16", 2.0**-133, 0.0, 1.0, 1.0),
        ("float16", 1.0, 1 + 2**-10, 2**-10 / (1 + 2**-10), 1.0),
        ("float16", 2.0**-24, 0.0, 1.0, 1.0),
        # |3 + 4i| = 5, where one ULP is 2^-21
        ("complex64", 3 + 4j, 3 + (4 + 2**-21) * 1j, 2**-21 / 5, 1.0),
        ("complex64", 3 + 4j, (3 - 2**-21) + 4j, 2**-21 / 5, 1.0),
        ("float32", INF, INF, 0.0, 0.0),
        ("float32", NAN, NAN, 0.0, 0.0),
        ("float32", INF, 1.0, INF, INF),
        ("float32", 1.0, -INF, INF, INF),
        ("float32", INF, -INF, INF, INF),
        ("float32", NAN, 1.0, INF, INF),
        ("float32", 0.0, NAN, INF, INF),
        ("float32", INF, NAN, INF, INF),
        ("complex64", complex(NAN, 0), 1j, INF, INF),
    ],
)
def test_a_difference_is_what_it_is_by_hand(dtype, a, b, relative, ulps):
    # beside an element that agrees, so that one is found among several
    a, b = (jnp.array([7.0, x], dtype) for x in (a, b))
    (found,) = difference(a, b).updates
    np.testing.assert_allclose(found.relative, relative, rtol=1e-6)  # |3 + 4i + ULP| is not 5
    assert found.ulps == ulps


@pytest.mark.usefixtures("x64")
def test_float64_is_compared_in_its_own_ulps():
    one = jnp.array([1.0], jnp.float64)
    (found,) = difference(one, one + 2**-52).updates
    assert found.ulps == 1.0 and found.relative == 2**-52 / (1 + 2**-52)


@pytest.mark.usefixtures("standard")
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    ("dtype", "x", "ulp"),
    [(jnp.bfloat16, 1.0, 2**-7), (jnp.float16, 1.0, 2**-10), (jnp.float16, 2.0**-20, 2.0**-24)],
)
def test_two_dtypes_are_compared_in_ulps_of_the_narrower(dtype, x, ulp, swap):
    pair = jnp.array([x]), jnp.array([x + ulp], dtype)
    a, b = pair[::-1] if swap else pair
    found = compare(giving(a), giving(b), jnp.zeros(1, jnp.float32), [jnp.zeros(1)])
    assert found.updates[0].ulps == 1.0


@pytest.mark.parametrize("same", [NAN, INF])
def test_what_both_have_hides_no_difference(same):
    (found,) = difference(jnp.array([same, 1.0, 1.0]), jnp.array([same, 2.0, 1.0])).updates
    # 1 in units of 2^-22
    assert found.relative == found.of_largest == 0.5 and found.ulps == 2.0**22


def test_of_largest_weighs_a_difference_by_the_size_of_its_leaf():
    # the 2^-4 that is next to zero, and the 2^-3 that is the largest, over 8; in "small" 1/4 over 2
    a = {"large": jnp.array([0.0, 8.0, 1.0]), "small": jnp.array([1.75, 2.0])}
    b = {"large": jnp.array([2**-4, 7.5, 1.125]), "small": jnp.array([2.0, 2.0])}
    for found in (difference(a, b), difference(b, a)):
        assert found.updates[0].of_largest == 1 / 8
        assert found.updates[0].relative == 1.0
    del a["small"], b["small"]
    assert difference(a, b).updates[0].of_largest == 0.5 / 8
    assert difference(a, b | {"large": a["large"].at[0].set(NAN)}).updates[0].of_largest == INF


def test_where_there_is_no_difference_no_leaf_is_named():
    assert difference({"w": jnp.ones(2)}, {"w": jnp.ones(2)}).params[0].path == ""
    assert difference({}, {}).params[0].ulps == 0.0


def test_integers_and_empty_leaves_agree_or_do_not():
    def counting(start):
        state = {"n": jnp.int32(start), "empty": jnp.zeros(0)}
        init: Any = lambda _: state  # noqa: E731
        return optax.identity()._replace(init=init)

    same = compare(counting(1), counting(1), jnp.ones(1), [jnp.ones(1)])
    other = compare(counting(1), counting(2), jnp.ones(1), [jnp.ones(1)])
    assert (same.slots["n"].relative, same.slots["n"].ulps) == (0.0, 0.0)
    assert (other.slots["n"].relative, other.slots["n"].ulps) == (INF, INF)
    assert other.slots["empty"].ulps == 0.0


def test_the_worst_leaf_is_named_by_its_ulps():
    # relative is largest in the bfloat16 leaf: 2^-7, one ULP; in float32 2^-10 is 2^13 ULP
    a = {"narrow": jnp.ones(1, jnp.bfloat16), "wide": {"w": jnp.ones(1)}, "same": jnp.ones(1)}
    b = a | {"narrow": a["narrow"] + 2**-7, "wide": {"w": a["wide"]["w"] + 2**-10}}
    for found in (difference(a, b), difference(b, a)):
        (u,), (p,) = found.updates, found.params
        assert u == p
        assert u.relative == 2**-7 / (1 + 2**-7)
        assert (u.ulps, u.path) == (2.0**13, "wide/w")


# ---------------------------------------------------------------------------------- step by step

W = jnp.array([1.0, 1.0])


def test_each_follows_its_own_parameters():
    # f' = w: w halves in one and loses a quarter in the other
    tx = {
        rate: adamx.chain(adamx.add_decayed_weights(1.0), adamx.scale(-rate))
        for rate in (0.5, 0.25)
    }
    found = compare(tx[0.5], tx[0.25], W, [jnp.zeros(2)] * 3)
    updates, params = ([d.relative for d in ds] for ds in (found.updates, found.params))
    np.testing.assert_allclose(params, [1 - 0.5 / 0.75, 1 - 0.25 / 0.75**2, 1 - 0.125 / 0.75**3])
    np.testing.assert_allclose(updates, [1 - 0.25 / 0.5, 1 - 0.1875 / 0.25, 1 - 0.125 / 0.140625])


def growing() -> Any:
    """Return a transformation that is off by 0, 1, 2, ... ULP of float32 in [1, 2)."""
    return optax.stateless_with_tree_map(lambda u, _: u * 2.0**-23)


STEPS = [jnp.array([0.0, float(n)]) for n in range(4)]


def test_first_beyond_is_the_first_step_past_a_bound():
    found = compare(growing(), giving(jnp.zeros(2)), W, STEPS)
    # 0, 1, 3, 6 ULP: the parameters are 1 + 0, 1, 1 + 2, 1 + 2 + 3 ULP
    assert [d.ulps for d in found.params] == [0.0, 1.0, 3.0, 6.0]
    assert [found.first_beyond(ulps=bound) for bound in (0, 0.5, 1, 3, 6)] == [2, 2, 3, 4, None]
    assert found.first_beyond(relative=2**-23) == 3
    assert found.first_beyond(relative=0.0, ulps=5) == 2  # either of them
    assert found.first_beyond(relative=1.0, ulps=2) == 3
    assert found.first_beyond() is None


def test_an_infinite_difference_is_past_every_bound():
    found = compare(giving(jnp.array([NAN, 0.0])), giving(jnp.zeros(2)), W, [W] * 2)
    assert found.first_beyond(ulps=1e30) == found.first_beyond(relative=1e30) == 1


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_gradients_may_be_a_function_of_the_step(steps):
    asked = []

    def gradient(step):
        asked.append(step)
        return STEPS[0] + step

    found = compare(adamx.sgd(0.5), adamx.sgd(0.25), W, gradient, steps=steps)
    assert asked == list(range(steps)) and len(found.params) == len(found.updates) == steps
    listed = compare(adamx.sgd(0.5), adamx.sgd(0.25), W, [STEPS[0] + n for n in range(steps)])
    assert found == listed


def test_steps_stops_early_and_draws_no_gradient_more():
    gradients = iter(STEPS)
    found = compare(growing(), giving(jnp.zeros(2)), W, gradients, steps=3)
    assert [d.ulps for d in found.params] == [0.0, 1.0, 3.0]
    assert len(list(gradients)) == len(STEPS) - 3


def test_a_stacked_array_is_one_gradient_a_row():
    found = compare(growing(), giving(jnp.zeros(2)), W, jnp.stack(STEPS), steps=9)
    assert [d.ulps for d in found.params] == [0.0, 1.0, 3.0, 6.0]


def test_the_callers_parameters_are_left_as_they_were():
    params = {"w": jnp.array([1.0])}
    compare(adamx.sgd(0.5), optax.sgd(0.5), params, [params])
    np.testing.assert_array_equal(params["w"], [1.0])


@pytest.mark.parametrize(
    ("gradients", "steps", "said"),
    [
        ([], None, "compare: gradients must hold at least one tree, got none"),
        ([W], 0, "compare: gradients must hold at least one tree, got none"),
        (
            lambda step: W * step,
            None,
            "compare: steps must be given if gradients is a function, got None",
        ),
    ],
)
def test_without_a_gradient_there_is_nothing_to_compare(gradients, steps, said):
    with pytest.raises(ValueError) as error:
        compare(adamx.sgd(0.1), adamx.sgd(0.1), W, gradients, steps=steps)
    assert str(error.value) == said


# ------------------------------------------------------------------------------------------ slots

TREE = {"w": W, "inner": {"b": jnp.array([[2.0]])}}
MOMENTS = ["count", "mu/inner/b", "mu/w", "nu/inner/b", "nu/w"]


def gradient(step):
    return jax.tree.map(lambda x: jnp.cos(x + step), TREE)


@pytest.mark.usefixtures("standard")
@pytest.mark.parametrize(
    ("other", "unmatched"),
    [
        (optax.adamw(0.1), ["learning_rate"]),
        (optax.chain(optax.clip(9.0), optax.adamw(0.1)), ["learning_rate"]),
        (
            optax.inject_hyperparams(optax.adamw, hyperparam_dtype=jnp.float32)(0.1),
            [
                *(
                    f"hyperparams/{name}"
                    for name in ("b1", "b2", "eps", "eps_root", "weight_decay")
                ),
                "inner_state/0/count",
            ],
        ),
        (adamx.adamw(0.1), []),
    ],
    ids=["adamw", "chain", "inject_hyperparams", "adamx"],
)
def test_slots_are_matched_with_optax_by_path(other, unmatched):
    found = compare(adamx.adamw(0.1), other, TREE, map(gradient, range(5)))
    assert list(found.slots) == [
        name for name in ["count", "learning_rate", *MOMENTS[1:]] if name not in unmatched
    ]
    assert found.unmatched == unmatched
    for path, slot in found.slots.items():
        # b2 = 0.999 rounds to float32: 1 - b2 is 1.3e-5 off where it is an array
        assert slot.path == path and slot.relative < 3e-5
    # where the recorded rate has no match, nothing is put in its place
    assert ("learning_rate" in found.slots) == ("learning_rate" not in unmatched)


def test_a_slot_that_differs_says_by_how_much():
    found = compare(adamx.ema(0.5), adamx.ema(0.75), W, [4.0 * W])
    # 2 against 1, where one ULP of 2 is 2^-22
    slot = found.slots["mu"]
    assert (slot.relative, slot.ulps, slot.of_largest, slot.path) == (0.5, 2.0**22, 0.5, "mu")
    assert found.slots["count"].ulps == 0.0


def test_an_entry_at_the_same_path_wins_over_one_that_only_ends_alike():
    other = adamx.chain(adamx.named("a", adamx.ema(0.0)), adamx.ema(0.5))
    found = compare(adamx.ema(0.5), other, W, [W])
    assert found.slots["mu"].ulps == 0.0
    assert found.unmatched == ["a/count", "a/mu"]


def test_a_path_ends_alike_only_at_a_whole_name():
    found = compare(adamx.ema(0.5), adamx.ema(0.5, name="xmu"), W, [W])
    assert list(found.slots) == ["count"] and found.unmatched == ["mu", "xmu"]


def test_an_entry_of_another_shape_is_no_match():
    class norm(adamx.Transformation):
        def slots(self, param):
            return {"mu": jnp.zeros(())}

    found = compare(adamx.ema(0.5), norm(), W, [W])
    assert list(found.slots) == ["count"] and set(found.unmatched) == {"mu"}


@pytest.mark.usefixtures("standard")
def test_a_random_key_in_a_state_is_compared():
    noisy = optax.add_noise(0.1, 0.5, jax.random.key(0))
    found = compare(noisy, optax.add_noise(0.1, 0.5, jax.random.key(1)), W, [W])
    same = compare(noisy, noisy, W, [W])
    assert found.slots["rng_key"].ulps == INF and same.slots["rng_key"].ulps == 0.0


# -------------------------------------------------------------------------------------- the table

# u = -0.5 m against -0.25 m with m = 1/2, 3/4; w = 1 - 1/4 - 3/8 and 1 - 1/8 - 3/16. One ULP of
# 1/4 and 3/8 is 2^-25, of 7/8 and 11/16 it is 2^-24: 1/8 is 2^22 or 2^21, 5/16 is 5 * 2^20.
TABLE = """\
half against quarter
                   updates                          params
 step   relative        ULP of largest   relative        ULP of largest  in leaf
    1   5.00e-01   4.19e+06   5.00e-01   1.43e-01    2.1e+06   1.43e-01  w
    2   5.00e-01   6.29e+06   5.00e-01   4.55e-01   5.24e+06   4.55e-01  w
slots after step 2:
count   0.00e+00          0   0.00e+00
 mu/w   0.00e+00          0   0.00e+00"""


def stepping(rate):
    return adamx.chain(adamx.ema(0.5), adamx.scale(-rate))


def test_prints_as_a_table():
    found = compare(
        stepping(0.5), stepping(0.25), {"w": W}, [{"w": W}] * 2, names=("half", "quarter")
    )
    assert [line.rstrip() for line in str(found).splitlines()] == TABLE.splitlines()


def test_the_table_names_what_only_one_state_has():
    found = compare(adamx.sgd(0.5), adamx.momentum(0.5), {"w": W}, [{"w": W}])
    assert str(found).splitlines()[-1] == "in one state only: mu/w"
    assert str(found).splitlines()[0] == "a against b"


@pytest.mark.parametrize("name", ["learning_rate", "mu/a_layer_with_a_long_name/kernel"])
def test_the_columns_of_the_table_line_up(name):
    tree = {"a_layer_with_a_long_name": {"kernel": W}}
    lines = str(compare(adamx.momentum(0.5), adamx.momentum(0.25), tree, [tree] * 2)).splitlines()
    (step,) = (line for line in lines if line.split()[0] == "1")
    (slot,) = (line for line in lines if line.split()[0] == name)
    ends = ([match.end() for match in re.finditer(r"\S+", line)] for line in (slot, step))
    assert next(ends)[:4] == next(ends)[:4]


def test_a_long_run_shows_the_first_steps_and_the_last():
    found = compare(adamx.scale(1.0), adamx.scale(2.0), W, [W * 0.0] * 60)
    shown = [line.split()[0] for line in str(found).splitlines()[3:-2]]
    assert shown == ["1", "2", "3", "5", "10", "20", "50", "60"]
    assert len(found.params) == 60
