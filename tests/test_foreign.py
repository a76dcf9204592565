"""Optax's methods as stages, as groups and under `make_step`: each as Optax itself runs it."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

import adamx
from adamx.training import _apart, _first


@pytest.fixture(autouse=True)
def as_users_run(quick_compiler):
    """Optax does not run under strict promotion; two programs are compared bit for bit."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def start() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {"b": draw(3), "v": {"x": draw(3, 4), "y": draw(4)}, "w": draw(4, 3)}


def loss(params):
    return sum(jnp.sum(jnp.cos(x) + 0.1 * x**2) for x in jax.tree.leaves(params))


def norm_of(tree):
    return jnp.sqrt(sum(jnp.sum(x * x) for x in jax.tree.leaves(tree)))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# -------------------------------------------------------------------- every optimizer of Optax


def at_a_rate(factory):
    return factory(0.01)


OTHERWISE: dict[str, Any] = {  # those that need more than a learning rate
    "polyak_sgd": lambda f: f(0.1),
    "noisy_sgd": lambda f: f(0.01, key=jax.random.key(1)),
    "lbfgs": lambda f: f(0.01, linesearch=None),
    "dog": lambda f: f(),
    "dowg": lambda f: f(),
    "mechanize": lambda f: f(optax.adam(0.01)),
    "schedule_free": lambda f: f(optax.sgd(0.01), 0.01),
}
MODULES = (optax, optax.contrib)
STAGES = ("scale_by_learning_rate", "scale_by_rprop")
# a deprecated one, and those that need an objective, other params, a gradient for each example; sam
# takes no extra arguments, so that multi_transform cannot run it either
ELSEWHERE = {"optimistic_adam", "sophia", "lookahead", "dpsgd", "sam"}
MADE: dict[str, Any] = {
    name: functools.partial(OTHERWISE.get(name, at_a_rate), f)
    for module in MODULES
    for name, f in vars(module).items()
    if name in OTHERWISE
    or (
        inspect.isfunction(f)
        and "learning_rate" in inspect.signature(f).parameters
        and name not in (*STAGES, *ELSEWHERE)
        and not name.startswith("_")
    )
} | {
    "masked": lambda: optax.masked(
        optax.add_decayed_weights(0.1), lambda p: jax.tree.map(lambda x: x.ndim == 2, p)
    ),
    "partition": lambda: optax.partition(
        {"a": optax.adam(0.01), "b": optax.sgd(0.1)},
        lambda p: jax.tree.map(lambda x: "ab"[x.ndim == 2], p),
    ),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(0.01), 3).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.01), 3),
    "centralize": lambda: optax.chain(optax.centralize(), optax.adaptive_grad_clip(0.1)),
    "keep_params_nonnegative": lambda: optax.keep_params_nonnegative(),
    "scale_by_param_block_norm": lambda: optax.scale_by_param_block_norm(),
}


def of_every_optimizer(*quick):
    names = [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in MADE]
    return pytest.mark.parametrize("name", names)


def test_the_list_has_the_methods_that_people_met():
    assert len(MADE) > 50
    assert {"lamb", "lars", "adafactor", "fromage", "novograd", "muon", "dowg", "cocob"} <= {*MADE}


def train(step, state, params, number):
    for _ in range(number):
        value, grads = jax.value_and_grad(loss)(params)
        params, state = step(params, state, grads, value=value)
    return params, state


def plain(tx):
    @jax.jit
    def step(params, state, grads, value):
        update = optax.with_extra_args_support(tx).update
        updates, state = update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    return step


@of_every_optimizer("lamb", "galore", "masked")
def test_a_group_is_trained_as_by_multi_transform(name):
    label = lambda p: {"b": "b", "v": {"x": "rest", "y": "rest"}, "w": "rest"}  # noqa: E731
    theirs = optax.multi_transform({"b": optax.sgd(0.1), "rest": MADE[name]()}, label)
    ours = adamx.by_path({"b": adamx.sgd(0.1)}, default=MADE[name]())
    wanted, _ = train(plain(theirs), theirs.init(start()), start(), 10)
    found, state = train(plain(ours), ours.init(start()), start(), 10)
    same(found, wanted)
    assert jax.tree.structure(state) == jax.tree.structure(ours.init(start()))


@of_every_optimizer("prodigy", "dowg")
def test_make_step_of_a_fresh_state_is_the_plain_step(name):
    tx = MADE[name]()
    wanted, _ = train(plain(tx), tx.init(start()), start(), 3)
    params, step = start(), adamx.make_step(tx)
    found, _ = train(step, tx.init(params), params, 3)
    same(found, wanted)
    inside = adamx.chain(MADE[name]())
    found, _ = train(adamx.make_step(inside), inside.init(params := start()), params, 3)
    same(found, wanted)


# ------------------------------------------------------------------------- what a step donates


TIED: dict[str, Any] = {
    "in the params": lambda p, s, g: ({**p, "w": p["v"]}, s, {**g, "w": g["v"]}),
    "params and state": lambda p, s, g: (p, s | {"mu": p}, g),
    "in the state": lambda p, s, g: (p, s | {"mu": s["nu"]}, g),
    "params and gradients": lambda p, s, g: (p, s, p),
    "state and gradients": lambda p, s, g: (p, s | {"mu": g}, g),
    "a shard": lambda p, s, g: (p, s | {"mu": {**p, "b": p["b"].addressable_shards[0].data}}, g),
}


@pytest.mark.parametrize("where", TIED)
def test_an_array_that_occurs_twice_is_copied_before_it_is_donated(where):
    tx = adamx.adam(0.1)
    flat = {"b": jnp.arange(3.0), "v": jnp.ones(4), "w": jnp.full(4, 2.0)}
    params, state, grads = TIED[where](flat, tx.init(flat), jax.tree.map(jnp.copy, flat))
    apart = jax.tree.map(jnp.copy, (params, state))
    kept = jax.tree.map(jnp.copy, grads)
    step = adamx.make_step(tx)
    first = step(params, state, grads)
    same(grads, kept)
    assert any(x.is_deleted() for x in jax.tree.leaves(state)), "the rest is donated"
    same(first, step(apart[0], apart[1], grads))


def test_a_step_looks_for_such_arrays_again_in_another_run_and_not_in_its_own_results(monkeypatch):
    tx, looked = optax.contrib.prodigy(0.1), []
    monkeypatch.setattr("adamx.training._apart", lambda *trees: looked.append(1) or _apart(*trees))
    step = adamx.make_step(tx)
    for run in (1, 2):
        params = start()
        state = tx.init(params)
        for _ in range(3):
            params, state = step(params, state, jax.tree.map(jnp.ones_like, params))
        assert len(looked) == run
    step(params, state, params)
    assert len(looked) == 3, "the gradients are the parameters"


def test_the_first_array_of_a_tree():
    leaf = jnp.ones(2)
    assert _first((optax.EmptyState(), {}, None, {"a": [leaf, 2.0]})) is leaf
    assert _first((optax.EmptyState(), None)) is None


def test_a_stages_own_key_outlives_a_donated_state():
    key = jax.random.key(3)
    tx = adamx.chain(optax.add_noise(0.1, 0.5, key), adamx.sgd(0.1))
    for _ in range(2):
        params = start()
        adamx.make_step(tx)(params, tx.init(params), start())
    assert not key.is_deleted()


@pytest.mark.slow
def test_a_line_search_gets_its_function():
    tx, value_fn = optax.lbfgs(), jax.tree_util.Partial(loss)
    params = start()
    state, step = tx.init(params), adamx.make_step(tx)
    before = loss(params)
    for _ in range(2):
        value, grads = jax.value_and_grad(loss)(params)
        params, state = step(params, state, grads, value=value, grad=grads, value_fn=value_fn)
    assert loss(params) < before


# ---------------------------------------------------------------------------------- MultiSteps


def test_multi_steps_is_a_transformation_wherever_one_is_taken():
    many: Any = functools.partial(optax.MultiSteps, optax.sgd(0.5), 2)
    params, grads = {"b": jnp.ones(2), "w": jnp.ones(2)}, [{"b": jnp.ones(2), "w": jnp.ones(2)}] * 2
    wanted = many().gradient_transformation()
    for tx in (
        many(),
        adamx.skip_nonfinite(many()),
        adamx.chain(adamx.named("m", many())),
        adamx.by_path({"b": many()}, default=many()),
    ):
        found = adamx.compare(tx, wanted, params, grads)
        assert [x.ulps for x in found.params] == [0, 0]
    assert "MultiSteps" in str(adamx.summary(many(), params))
    assert jax.tree.leaves(adamx.state_sharding(many(), params))
    step, state = adamx.make_step(many()), wanted.init(params)
    params, state = step(params, state, grads[0])
    params, _ = step(params, state, grads[0])
    np.testing.assert_array_equal(params["w"], 0.5)


# ---------------------------------------------------- stages that change shapes, states and trees


def mean_over_examples():
    return optax.stateless(lambda u, _: jax.tree.map(lambda g: jnp.mean(g, 0), u))


def private():
    noise = 0.0
    return optax.contrib.differentially_private_aggregate(1e9, noise, key=jax.random.key(0))


def per_example():
    return jax.tree.map(lambda g: jnp.stack([g, 2 * g, 3 * g]), start())


def two_steps(tx, grads, params):
    state, total = tx.init(start()), []
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
        total.append(updates)
    return total


def then_adam():
    return adamx.chain(mean_over_examples(), adamx.adam(0.1))


AGGREGATED = {
    "mean": then_adam,
    "private": lambda: adamx.chain(private(), adamx.adam(0.1)),
    "and a clip": lambda: adamx.chain(
        mean_over_examples(), adamx.clip_by_global_norm(1e9), adamx.adam(0.1)
    ),
    "skip_nonfinite": lambda: adamx.skip_nonfinite(then_adam()),
    "monitor": lambda: adamx.monitor(then_adam(), every=1),
    "masters": lambda: adamx.master_weights(then_adam()),
    "in groups": lambda: adamx.by_path({"b": then_adam()}, default=then_adam()),
    "by groups": lambda: adamx.chain(
        adamx.by_path({"b": mean_over_examples()}, default=mean_over_examples()), adamx.adam(0.1)
    ),
}
SLOW = {"private", "skip_nonfinite", "monitor", "in groups"}


@pytest.mark.parametrize(
    "name", [n if n not in SLOW else pytest.param(n, marks=pytest.mark.slow) for n in AGGREGATED]
)
def test_a_stage_may_average_over_examples(name):
    """To 4 ULP of a step of 0.1: the sums of three gradients may be rounded in another order."""
    tx = AGGREGATED[name]()
    mean = jax.tree.map(lambda g: jnp.mean(g, 0), per_example())
    wanted = two_steps(adamx.adam(0.1), mean, start())
    for params in (start(), None) if name != "masters" else (start(),):
        for a, b in zip(two_steps(tx, per_example(), params), wanted, strict=True):
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=4 * 2**-27), a, b)


@pytest.mark.parametrize(
    "tx",
    [
        adamx.adam(0.1),
        adamx.chain(adamx.scale(1.0), mean_over_examples(), adamx.adam(0.1)),
        adamx.chain(optax.clip(9.0), adamx.adam(0.1)),
        adamx.chain(optax.clip(9.0)),
        adamx.by_path({"b": None}, default=then_adam()),
    ],
    ids=["no stage", "a concept first", "no mean", "no concept", "a group"],
)
def test_a_shape_is_checked_where_a_concept_reads_it(tx):
    with pytest.raises(ValueError, match=r"'b' has an update of shape \[3, 3\].*batch axis"):
        tx.update(per_example(), tx.init(start()), start())
    with pytest.raises(ValueError, match=r"'accumulated'.*shape"):
        tx = adamx.accumulate(then_adam(), 2)
        tx.update(per_example(), tx.init(start()), start())


def growing() -> Any:
    """Like `optax.monitor`: the first state has no measurement, all others have one."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return updates, {"norm": norm_of(updates)}

    return optax.GradientTransformation(lambda params: {}, update)


@pytest.mark.parametrize("how", ["eager", "step", "group"])
def test_a_stage_may_give_its_state_another_tree(how):
    make = getattr(optax, "monitor", None)
    stages = [growing()] if make is None else [growing(), make({"norm": norm_of})]
    for stage in stages:
        tx = adamx.chain(adamx.named("seen", stage), adamx.sgd(0.5))
        if how == "group":
            tx = adamx.by_path({"b": tx}, default=adamx.sgd(0.5))
        params, grads = start(), start()
        state, step = tx.init(params), adamx.make_step(tx)
        for _ in range(3):
            if how == "step":
                params, state = step(params, state, grads)
            else:
                _, state = tx.update(grads, state, params)
        of = {"b": grads["b"]} if how == "group" else grads
        norm = jax.tree.leaves(state["seen"])
        np.testing.assert_allclose(norm, [norm_of(of)], rtol=4 * 2.0**-23)


def test_where_a_step_may_be_skipped_the_state_of_a_stage_keeps_its_tree_and_shapes():

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return updates, jnp.zeros(2)

    longer = optax.GradientTransformation(lambda params: jnp.zeros(1), update)
    for stage in (growing(), longer):
        inside = adamx.chain(adamx.named("seen", stage), adamx.sgd(0.5))
        for tx in (adamx.skip_nonfinite(inside), adamx.accumulate(inside, 2)):
            with pytest.raises(ValueError, match=r"'seen' returned a state of another tree.*skip"):
                tx.update(start(), tx.init(start()), start())
        inside.update(start(), inside.init(start()), start())
    tx = adamx.skip_nonfinite(adamx.chain(optax.snapshot("n", norm_of), adamx.sgd(0.5)))
    tx.update(start(), tx.init(start()), start())


def test_a_stage_that_returns_another_tree_of_updates_is_reported():
    tx = adamx.chain(optax.stateless(lambda u, _: {"norm": u}), adamx.sgd(0.1))
    with pytest.raises(ValueError, match=r"'stateless' returned another tree as its updates.*norm"):
        tx.update(start(), tx.init(start()), start())


@pytest.mark.parametrize("make", [optax.lamb, optax.adam, lambda r: optax.trace(r)])
def test_a_leaf_without_a_gradient_is_not_dropped_silently(make):
    for tx in (adamx.chain(make(0.1)), adamx.by_path({"w": None}, default=make(0.1))):
        state = tx.init(start())
        with pytest.raises(ValueError, match=r"where a gradient is None.*drops its entry"):
            tx.update(start() | {"b": None}, state, start())


def test_a_stage_that_freezes_a_leaf_stops_its_gradient_in_a_group_too():
    stage = optax.stateless(lambda u, _: jax.tree.map(lambda g: None, u))
    tx = adamx.by_path({"b": stage}, default=adamx.sgd(0.1))
    updates, _ = tx.update(start(), tx.init(start()), start())
    assert updates["b"] is None and updates["w"] is not None


# ------------------------------------------------------------------------------- masks of Flax


class Net(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        self.norm = nnx.LayerNorm(3, rngs=nnx.Rngs(0))


def containers() -> dict[str, Any]:
    state = nnx.split(Net(), nnx.Param, ...)[1]
    pure = nnx.to_pure_dict(state)
    return {
        "variables": state,
        "arrays": nnx.State(pure),
        "dict": pure,
        "frozen": freeze(pure),
    }


def decays(tree):
    return jax.tree.map(lambda x: x.ndim == 2, tree)


@pytest.mark.parametrize("mask", ["variables", "arrays", "dict", "frozen"])
def test_a_mask_may_be_in_other_containers_than_the_parameters(mask):
    masks = containers()
    for params in containers().values():
        for flags, number in ((decays(masks[mask]), 1), ({"dense": True, "norm": False}, 2)):
            tx = adamx.chain(adamx.add_decayed_weights(0.5, mask=flags))
            zero = jax.tree.map(jnp.zeros_like, params)
            updates, _ = tx.update(zero, tx.init(params), jax.tree.map(jnp.ones_like, params))
            assert sum(int((u != 0).all()) for u in jax.tree.leaves(updates)) == number


@pytest.mark.parametrize("mask", ["variables", "arrays", "dict", "frozen"])
def test_an_optimizer_of_nnx_takes_a_mask_in_any_container(mask):
    net = Net()
    tx = adamx.adamw(1.0, weight_decay=0.5, mask=decays(containers()[mask]))
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
    before = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    optimizer.update(net, jax.tree.map(jnp.zeros_like, nnx.state(net, nnx.Param)))
    after = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    np.testing.assert_array_equal(after["dense"]["kernel"], before["dense"]["kernel"] * 0.5)
    np.testing.assert_array_equal(after["norm"]["scale"], before["norm"]["scale"])


@pytest.mark.parametrize("params", ["variables", "dict"])
def test_a_mask_that_misses_a_path_or_has_one_more_says_which(params):
    mask = containers()["arrays"]
    flags = nnx.to_pure_dict(decays(mask))
    del flags["dense"]["bias"]
    for wrong, said in (
        (flags, r"only in the parameters' tree: \['dense/bias'\]$"),
        ({"dense": True, "norm": True, "odd": True}, r"only in the mask: \['odd'\]$"),
    ):
        tx = adamx.chain(adamx.add_decayed_weights(0.5, mask=nnx.State(wrong)))
        with pytest.raises(ValueError, match=said):
            tx.init(containers()[params])


WRONG: dict[str, Any] = {
    "integers": lambda x: x.astype(int),
    "booleans": lambda x: x > 0,
    "complex numbers": lambda x: x + 0j,
    "a string": lambda _: "w",
    "an object": lambda _: object(),
    "a key": lambda _: jax.random.key(0),
    "another shape": lambda x: x[None],
    "None": lambda _: None,
    "a branch": lambda x: {"v": x},
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("path", ["b", "w"])
def test_a_wrong_leaf_in_the_state_of_a_stage_is_named(wrong, path):
    """Whether the stage would fail at it, with an error of its own, or not."""
    tx = adamx.chain(adamx.named("mean", optax.ema(0.5)), adamx.scale_by_learning_rate(0.1))
    params = {"b": jnp.ones([]), "w": jnp.ones(3)}
    state = tx.init(params)
    ema = state["mean"].ema
    state["mean"] = state["mean"]._replace(ema=ema | {path: WRONG[wrong](ema[path])})
    with pytest.raises(ValueError, match=rf"^adamx: leaf 'ema/{path}.*' of state\['mean'\] is "):
        tx.update(params, state, params)


def test_a_gradient_of_another_shape_is_named_where_a_stage_fails_at_it():
    tx = adamx.chain(optax.ema(0.5), adamx.scale_by_learning_rate(0.1))
    params = {"b": jnp.ones([]), "w": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"^adamx: leaf 'w' has an update of shape \[3, 2\]"):
        tx.update(params | {"w": jnp.ones((3, 2))}, tx.init(params), params)
