"""Factors of the learning rate by path, depth and width."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

import adamx

pytestmark = pytest.mark.usefixtures("quick_compiler")


def params() -> Any:
    return {"embed": jnp.ones((3, 2)), "layers": [{"w": jnp.ones((2, 2)), "b": jnp.ones(2)}] * 2}


def factors_of(tx, tree=None):
    """Return what each leaf's update of 1 becomes."""
    tree = params() if tree is None else tree
    ones = jax.tree.map(jnp.ones_like, tree)
    updates, state = tx.update(ones, tx.init(tree))
    assert set(state) == {"count"}
    return updates


def test_a_path_comes_first_then_the_first_pattern_and_others_stay():
    found = factors_of(
        adamx.scale_by_path(
            {"layers/*": 2.0, "*/b": 3.0, "layers/1/b": 4.0, re.compile("no|embed"): 0.5}
        )
    )
    assert float(found["embed"][0, 0]) == 0.5
    assert [float(layer["w"][0, 0]) for layer in found["layers"]] == [2.0, 2.0]
    assert [float(layer["b"][0]) for layer in found["layers"]] == [2.0, 4.0]
    alone = factors_of(adamx.scale_by_path({"embed": -2.0}))
    assert float(alone["embed"][0, 0]) == -2.0 and float(alone["layers"][0]["b"][0]) == 1.0


def test_a_factor_may_be_an_array_a_schedule_or_what_a_function_gives():
    rows = jnp.array([[1.0], [2.0], [4.0]])
    found = factors_of(
        adamx.scale_by_path({"embed": rows, "*/w": lambda t: jnp.where(t == 0, 3.0, 1.0)})
    )
    np.testing.assert_array_equal(found["embed"], rows * jnp.ones((1, 2)))
    assert float(found["layers"][0]["w"][0, 0]) == 3.0
    by_rank = factors_of(adamx.scale_by_path(lambda path, leaf: leaf.ndim + ("0" in path) / 4))
    assert float(by_rank["embed"][0, 0]) == 2.0 and float(by_rank["layers"][0]["b"][0]) == 1.25


def test_behind_an_optimizer_it_is_the_optimizer_with_that_rate():
    """The factors are powers of two; a compiler may round the sum with the decay once or twice."""
    tree, factors = params(), {"embed": 0.5, "layers/0/*": 2.0}
    one = adamx.chain(adamx.adamw(0.5, weight_decay=0.25), adamx.scale_by_path(factors))
    groups = {p: adamx.adamw(0.5 * c, weight_decay=0.25) for p, c in factors.items()}
    other = adamx.by_path(groups, default=adamx.adamw(0.5, weight_decay=0.25))
    grads = jax.tree.map(lambda p: p / 3, tree)
    a, b = tree, tree
    state, theirs = one.init(tree), other.init(tree)
    for _ in range(3):
        updates, state = one.update(grads, state, a)
        expected, theirs = other.update(grads, theirs, b)
        assert_close(updates, expected, ulps=2)
        a, b = adamx.apply_updates(a, updates), adamx.apply_updates(b, expected)


def test_layers_that_are_stacked_decay_along_their_axis():
    stacked = {"embed": jnp.ones(2), "layers": {"w": jnp.ones((3, 2, 2)), "b": jnp.ones((3, 2))}}
    factors = adamx.layerwise_decay(stacked, 0.5, stacked="layers/*", before=["embed"])
    found = factors_of(adamx.scale_by_path(factors), stacked)
    for leaf in ("w", "b"):
        each = found["layers"][leaf].reshape(3, -1)[:, 0]
        np.testing.assert_array_equal(each, [0.125, 0.25, 0.5])
    apart = {"embed": jnp.ones(2), "layers": [{"w": jnp.ones((2, 2))} for _ in range(3)]}
    alike = adamx.layerwise_decay(apart, 0.5, layer=r"layers/(\d+)/", before=["embed"])
    assert alike == {f"layers/{i}/w": 0.5 ** (3 - i) for i in range(3)} | {"embed": 0.0625}
    inside = adamx.stacked(
        adamx.scale_by_path({"layers/*": jnp.array([1.0, 2.0, 4.0])}), {"layers/*": 1}
    )
    rows = factors_of(inside, stacked)["layers"]["b"][:, 0]
    np.testing.assert_array_equal(rows, [1.0, 2.0, 4.0])


def shapes(width) -> Any:
    sizes = {
        "embed": (50, width),
        "norm": (width,),
        "query": (width, width // 8, 8),
        "out": (width // 8, 8, width),
        "conv": (3, 3, width, width),
        "head": (width, 10),
        "last_bias": (10,),
    }
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in sizes.items()}


def test_the_rules_of_width_are_those_of_the_papers_table():
    """Table 3 of arXiv 2203.03466, with a width four times that of the narrow model."""
    rules = adamx.width_rules(shapes(32), shapes(128))
    to_wide = dict.fromkeys(["embed", "norm"])
    between = dict.fromkeys(["query", "out", "conv"])
    assert rules.adam == {
        **dict.fromkeys(to_wide, 1.0),
        **dict.fromkeys(between, 0.25),
        "head": 0.25,
        "last_bias": 1.0,
    }
    assert rules.sgd == {
        **dict.fromkeys(to_wide, 4.0),
        **dict.fromkeys(between, 1.0),
        "head": 0.25,
        "last_bias": 1.0,
    }
    assert rules.init == {
        **dict.fromkeys(to_wide, 1.0),
        **dict.fromkeys(between, 0.5),
        "head": 0.25,
        "last_bias": 1.0,
    }
    assert set().union(*(set(r.values()) for r in adamx.width_rules(shapes(64), shapes(64)))) == {
        1.0
    }


def change_of_output(width, rules) -> float:
    """Return how far a step of Adam moves the outputs of a network with two hidden layers."""
    generator = np.random.default_rng(0)
    sizes = {"a": (8, width), "b": (width, width), "c": (width, 4)}
    start = {"a": 8**-0.5, "b": 64**-0.5, "c": 64**-0.5}
    w: Any = {
        n: jnp.asarray(start[n] * rules.init[n] * generator.normal(size=s), jnp.float32)
        for n, s in sizes.items()
    }
    x = jnp.asarray(np.random.default_rng(1).normal(size=(16, 8)), jnp.float32)
    y = jnp.asarray(np.random.default_rng(2).normal(size=(16, 4)), jnp.float32)

    def output(w):
        return jax.nn.relu(jax.nn.relu(x @ w["a"]) @ w["b"]) @ w["c"]

    tx = adamx.chain(adamx.adam(1e-4), adamx.scale_by_path(rules.adam))

    @jax.jit
    def step(w, state):
        grads = jax.grad(lambda w: jnp.mean((output(w) - y) ** 2))(w)
        updates, state = tx.update(grads, state, w)
        return adamx.apply_updates(w, updates), state

    before, state = output(w), tx.init(w)
    w, state = step(w, state)
    return float(jnp.sqrt(jnp.mean((output(w) - before) ** 2)))


def test_with_them_a_step_moves_the_outputs_alike_at_every_width():
    """The check of coordinates: without the rules the change grows with the width, about 16-fold.

    The paper promises the order of magnitude; the factor 2 is what is left to finite widths.
    """

    def shapes(width) -> Any:
        sizes = {"a": (8, width), "b": (width, width), "c": (width, 4)}
        return {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in sizes.items()}

    narrow, same = (adamx.width_rules(shapes(64), shapes(w)) for w in (64, 64))
    wide = adamx.width_rules(shapes(64), shapes(1024))
    moved = change_of_output(1024, wide) / change_of_output(64, narrow)
    assert 0.5 < moved < 2
    kept = wide._replace(adam=same.adam)  # the rates of the narrow model
    assert change_of_output(1024, kept) / change_of_output(64, narrow) > 5


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: adamx.scale_by_path(2.0),  # pyright: ignore
            TypeError,
            "must map patterns to numbers",
        ),
        (lambda: adamx.scale_by_path({3: 2.0}), TypeError, "a pattern must be a string"),
        (lambda: adamx.scale_by_path({"a": None}), ValueError, r"factors\['a'\] must be finite"),
        (lambda: adamx.scale_by_path({"a": np.nan}), ValueError, r"factors\['a'\] must be finite"),
        (
            lambda: adamx.scale_by_path({"a*": 1.0}).init(params()),
            ValueError,
            r"the pattern 'a\*' matches no leaf",
        ),
        (
            lambda: factors_of(adamx.scale_by_path(lambda *_: np.inf)),
            ValueError,
            "the factor of leaf 'embed' must be finite",
        ),
        (lambda: adamx.layerwise_decay(params(), 0.0, layer="(1)"), ValueError, "ratio must be in"),
        (lambda: adamx.layerwise_decay(params(), 0.5), ValueError, "give either layer"),
        (
            lambda: adamx.layerwise_decay(params(), 0.5, layer="(1)", stacked="*"),
            ValueError,
            "give either layer",
        ),
        (
            lambda: adamx.layerwise_decay(params(), 0.5, layer="1"),
            ValueError,
            "must have one group",
        ),
        (
            lambda: adamx.layerwise_decay(params(), 0.5, layer=r"x(\d)"),
            ValueError,
            "no leaf in a layer",
        ),
        (
            lambda: adamx.layerwise_decay(params(), 0.5, stacked="*"),
            ValueError,
            r"different numbers, \[2, 3\]",
        ),
        (
            lambda: adamx.layerwise_decay(params(), 0.5, layer=r"layers/(\d)", before=["x"]),
            ValueError,
            "the pattern 'x' matches no leaf",
        ),
        (
            lambda: adamx.width_rules({"a": jnp.ones(1)}, {"b": jnp.ones(1)}),
            ValueError,
            r"only one of the models has \['a', 'b'\]",
        ),
        (
            lambda: adamx.width_rules({"a": jnp.ones(1)}, {"a": jnp.ones((1, 1))}),
            ValueError,
            "leaf 'a' has the shapes",
        ),
    ],
)
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("k", "linear", "root"),
    [(1, 0.1, 0.1), (4, 0.4, 0.2), (1 / 256, 0.1 / 256, 0.1 / 16)],
)
def test_rates_of_another_batch_by_hand(k, linear, root):
    sizes = {"batch_size": 256, "new_batch_size": 256 * k}
    np.testing.assert_allclose(adamx.linear_rule(0.1, **sizes), linear, rtol=1e-15)
    np.testing.assert_allclose(adamx.square_root_rule(0.1, **sizes), root, rtol=1e-15)
    np.testing.assert_allclose(
        adamx.inverse_square_root_rule(0.1, **sizes), 0.1 * 0.1 / root, rtol=1e-15
    )


def test_marins_recipe_is_these_rules():
    """Its own formulas, at its reference of 8 sequences a step and 1e9 tokens."""
    for batch, tokens in [(8, 1e9), (128, 1e10), (64, 3e9)]:
        r = batch * 1e9 / (8 * tokens)
        sizes = {"batch_size": 8 / 1e9, "new_batch_size": batch / tokens}
        rate = adamx.square_root_rule(1.0013e-3, **sizes)
        eps = adamx.inverse_square_root_rule(9.31e-8, **sizes)
        np.testing.assert_allclose(
            np.array([rate, eps]), [1.0013e-3 * r**0.5, 9.31e-8 / r**0.5], rtol=1e-14
        )
        b2 = adamx.half_life_rule(0.9999, batch_size=8, new_batch_size=batch)
        np.testing.assert_allclose(b2, 0.9999 ** (batch / 8), rtol=1e-15)


@pytest.mark.parametrize(
    ("decay", "k", "expected"),
    [
        (0.9, 1, 0.9),
        (0.9, 3, 0.729),
        (0.81, 1 / 2, 0.9),
        (0.0, 2, 0.0),
        # ln 0.95 = -0.051293294; a 512th of it is -1.00182e-4, and exp of that 0.99989982
        (0.95, 1 / 512, 0.99989982),
    ],
)
def test_decays_of_another_batch_by_hand(decay, k, expected):
    found = adamx.half_life_rule(decay, batch_size=512, new_batch_size=512 * k)
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_an_average_at_another_batch_forgets_in_as_many_tokens():
    """Two steps on batches of 1 and one on a batch of 2 leave the same of what was before."""
    b = adamx.half_life_rule(0.5, batch_size=2, new_batch_size=1)
    np.testing.assert_allclose(b * b, 0.5, rtol=1e-15)


@pytest.mark.parametrize(
    ("path", "base", "shape", "ratio"),
    [
        ("query/kernel", (64, 4, 16), (256, 16, 16), 4),
        ("query/kernel", (64, 4, 16), (256, 8, 32), 4),
        ("out/kernel", (4, 16, 64), (16, 16, 256), 4),
        ("out/kernel", (4, 16, 64), (8, 32, 256), 4),
        ("out/kernel", (8, 32, 256), (4, 16, 64), 1 / 4),
    ],
)
def test_the_fan_in_of_attention_grows_with_heads_and_their_size(path, base, shape, ratio):
    one, other = ({path: jax.ShapeDtypeStruct(x, jnp.float32)} for x in (base, shape))
    rules = adamx.width_rules(one, other)
    assert rules.adam[path] == 1 / ratio and rules.init[path] == 1 / ratio**0.5
    assert rules.sgd[path] == 1


@pytest.mark.parametrize(
    ("base", "shape"), [((4, 16), (16, 16)), ((4, 16), (8, 32)), ((64,), (256,))]
)
def test_a_bias_of_attention_is_a_bias(base, shape):
    one, other = ({"query/bias": jax.ShapeDtypeStruct(x, jnp.float32)} for x in (base, shape))
    rules = adamx.width_rules(one, other)
    assert (rules.adam, rules.sgd, rules.init) == tuple({"query/bias": x} for x in (1, 4, 1))
