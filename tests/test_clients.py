"""The blocks of docs/clients.md train to the weights of the plain loop, or of the wrapper by hand.

A block is found by its heading and goes on from the first one, as the page says. Two programs that
do the same operations give the same bits. Where the operations come in another order the weights
are rounded otherwise: below 4, each step rounds each of them by at most 2^-23, so that a run is
within STEPS * 2^-23 of the exact one, and two runs within twice that; that all other rounding is
small beside it is the first test.
"""

import functools
import re
from pathlib import Path
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.core import freeze
from flax.training.train_state import TrainState

import adamx

# what is tested does not depend on optimised code, and compiling takes most of the time
pytestmark = pytest.mark.usefixtures("quick_compiler")

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "clients.md").read_text()
SECTION = re.compile(r"\A(.+?)\n.*?^```python\n(.*?)^```$", re.M | re.S)
BLOCKS: dict[str, str] = dict(p for text in PAGE.split("\n## ") for p in SECTION.findall(text))
README = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)[0]
STEPS = 20
ROUNDING = STEPS * 2.0**-23


@pytest.fixture(autouse=True)
def as_users_run():
    """With JAX's own promotion: Optax's schedules and the libraries need it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def run(source, namespace):
    namespace = dict(namespace)
    exec(compile(source, "docs/clients.md", "exec"), namespace)
    return namespace


@functools.cache
def plain() -> dict[str, Any]:
    return run(BLOCKS["The plain loop"], {})


@functools.cache
def client(heading):
    return run(BLOCKS[heading], plain())


@functools.cache
def plain_step(tx):
    return plain()["plain_step"](tx)


def loop(tx, params, xs, ys) -> Any:
    state, step = tx.init(params), plain_step(tx)
    for x, y in zip(xs, ys, strict=True):
        params, state = step(params, state, x, y)
    return params, state


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def near(a, b, roundings=1):
    """Assert that runs which round so many times a step, the one and the other, agree."""
    atol = 2 * ROUNDING * roundings
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)


def far(a, b):
    return any(
        np.abs(x - y).max() > 100 * ROUNDING
        for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )


def row(tree, *index):
    return jax.tree.map(lambda x: x[index], tree)


def test_every_block_has_a_test():
    tests = Path(__file__).read_text()
    assert len(BLOCKS) == PAGE.count("```python")
    for heading in BLOCKS:
        assert f'"{heading}"' in tests, heading


@pytest.mark.slow
def test_rounding_moves_a_weight_by_no_more_than_one_unit_a_step():
    ns = run(BLOCKS["Many seeds at once"], plain())
    starts = jax.tree.map(lambda a, b: np.concatenate([a[None], b]), ns["start"], ns["starts"])
    found = [loop(ns["tx"], row(starts, i), ns["xs"], ns["ys"])[0] for i in range(4)]
    with jax.enable_x64(True):
        starts, *data = jax.tree.map(np.float64, (starts, ns["xs"], ns["ys"]))
        ns["xs"], ns["ys"] = data  # what `train` reads
        exact = jax.tree.map(np.asarray, jax.jit(jax.vmap(ns["train"]))(starts))
    for i, weights in enumerate(found):
        assert max(np.abs(p).max() for p in jax.tree.leaves(weights)) < 4
        wanted = row(exact, i)
        assert jax.tree.leaves(wanted)[0].dtype == np.float64
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=ROUNDING), weights, wanted
        )
        assert far(weights, row(starts, i)), "it trains"


# ----------------------------------------------------------------------------------- the libraries


def nnx_weights(ns):
    return nnx.to_pure_dict(nnx.state(ns["model"], nnx.Param))


def test_flax_nnx():
    ns = client("Flax NNX")
    same(nnx_weights(ns), plain()["params"])
    same(ns["state"], plain()["state"])


@pytest.mark.slow
def test_flax_nnx_goes_on_from_split_and_merge_and_from_a_checkpoint(tmp_path):
    ns = run(BLOCKS["Flax NNX"], plain())
    tx, step, x, y = (ns[name] for name in ("tx", "nnx_step", "x", "y"))
    graph, state = nnx.split((ns["model"], ns["optimizer"]))
    merged = nnx.merge(graph, jax.tree.map(jnp.copy, state))

    saved = {name: nnx.to_pure_dict(nnx.state(ns[name])) for name in ("model", "optimizer")}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "run", saved)
    fresh = ns["Network"](nnx.Rngs(1))
    fresh = fresh, nnx.Optimizer(fresh, tx, wrt=nnx.Param)
    for made, pure in zip(fresh, (restored["model"], restored["optimizer"]), strict=True):
        state = nnx.state(made)
        nnx.replace_by_pure_dict(state, pure)
        nnx.update(made, state)

    for model, optimizer in ((ns["model"], ns["optimizer"]), merged, fresh):
        step(model, optimizer, x, y)
        assert set(optimizer.opt_state) == {"count", "learning_rate", "mu", "nu"}
        assert int(optimizer.opt_state["count"][...]) == STEPS + 1
        same(*(nnx.to_pure_dict(nnx.state(o)) for o in (optimizer, ns["optimizer"])))
        same(*(nnx.to_pure_dict(nnx.state(m)) for m in (model, ns["model"])))


@pytest.mark.slow
def test_flax_nnx_has_the_paths_of_the_model():
    """Its init sees variables, its update their arrays."""
    ns = client("Flax NNX")
    tx = adamx.by_path(
        {"hidden/kernel": None, "*/bias": adamx.sgd(0.1)},
        default=adamx.adamw(1e-2, mask=adamx.all_but("out/*", "hidden/*"), moments="packed16"),
    )
    model = ns["Network"](nnx.Rngs(0))
    before = nnx_weights({"model": model})
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    ns["nnx_step"](model, optimizer, ns["x"], ns["y"])
    after = nnx_weights({"model": model})
    grads = jax.grad(ns["loss"])(before, ns["x"], ns["y"])
    same(after["hidden"]["kernel"], before["hidden"]["kernel"])
    for layer in ("hidden", "out"):
        # one step of w - lr g of weights below 1, from gradients of another program
        wanted = before[layer]["bias"] - 0.1 * grads[layer]["bias"]
        np.testing.assert_allclose(after[layer]["bias"], wanted, rtol=0, atol=4 * 2.0**-23)
    # the first step of Adam is the learning rate, whatever the gradient; moments of 16 bits
    moved = np.abs(after["out"]["kernel"] - before["out"]["kernel"])
    np.testing.assert_allclose(moved, 1e-2, rtol=2.0**-7)


def test_the_state_in_flax_nnx_is_read_as_plain_dicts():
    """Masters of one step from bfloat16 weights of 1 with gradients of 1: w - lr g, w - lr."""
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    nnx.update(model, jax.tree.map(jnp.ones_like, nnx.state(model)))
    tx = adamx.master_weights(
        adamx.by_path({"bias": adamx.sgd(0.125)}, default=adamx.adam(0.25, eps=0.0))
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.state(model, nnx.Param))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state = nnx.to_pure_dict(nnx.state(optimizer))["opt_state"]
    masters = adamx.masters(params, state)
    np.testing.assert_allclose(masters["bias"], [0.875] * 2, rtol=1e-6)
    np.testing.assert_allclose(masters["kernel"], np.full((3, 2), 0.75), rtol=1e-6)
    average = adamx.moments(state, tx)["mu"]
    assert average["bias"] is None
    np.testing.assert_allclose(average["kernel"], np.full((3, 2), 0.1), rtol=1e-6)
    for have, saved in ((params, state), (nnx.state(model, nnx.Param), optimizer.opt_state)):
        carried, adaptation = adamx.adapt_state(tx, have, saved)
        assert adaptation == adamx.Adaptation((), ())
        assert int(carried["count"]) == 1


def test_flax_linen():
    ns = client("Flax Linen")
    assert int(ns["state"].step) == STEPS
    same(ns["state"].params, plain()["params"])
    same(ns["state"].opt_state, plain()["state"])


def test_flax_linen_is_made_and_stepped_inside_jit_in_place():
    ns = client("Flax Linen")
    model, tx, step = ns["model"], ns["tx"], ns["linen_step"]

    @jax.jit
    def create(params):
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    state = create(jax.tree.map(jnp.copy, ns["start"]))
    for x, y in zip(ns["xs"], ns["ys"], strict=True):
        before, state = state, step(state, x, y)
        slots = [before.params, before.opt_state["mu"], before.opt_state["nu"]]
        assert all(x.is_deleted() for x in jax.tree.leaves(slots))
    same(state.params, plain()["params"])
    same(state.opt_state, plain()["state"])


@pytest.mark.slow
def test_flax_linen_in_its_own_containers():
    """Frozen dicts, and boxes around arrays that carry the names of mesh axes."""
    kernel = nn.with_partitioning(nn.initializers.ones, (None, "model"))
    model, x = nn.Dense(2, kernel_init=kernel), jnp.ones((4, 3))
    params = freeze(model.init(jax.random.key(0), x)["params"])
    tx = adamx.adamw(0.5, eps=0.0, weight_decay=0.25, mask="kernel")
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    grads = jax.tree.map(jnp.ones_like, params)
    state = jax.jit(lambda state: state.apply_gradients(grads=grads))(state)
    assert jax.tree.structure(state.params) == jax.tree.structure(params)
    assert jax.tree.structure(state.opt_state["mu"]) == jax.tree.structure(params)
    # w - lr (1 + wd w): from 1 to 0.375, and the bias without decay from 0
    np.testing.assert_allclose(state.params["kernel"].value, 0.375, rtol=1e-6)
    np.testing.assert_allclose(state.params["bias"], -0.5, rtol=1e-6)


def test_equinox():
    ns = client("Equinox")
    layers = zip(("hidden", "out"), ns["model"].layers, strict=True)
    near({n: {"kernel": m.weight.T, "bias": m.bias} for n, m in layers}, plain()["params"])


def test_equinox_keeps_none_where_a_model_has_no_weights_and_where_it_is_frozen():
    ns = client("Equinox")
    model, tx, x, y = (ns[name] for name in ("model", "tx", "x", "y"))
    weights = eqx.filter(model, eqx.is_inexact_array)
    # the activation is a leaf of the model, and no array
    assert ns["state"]["mu"].activation is None and callable(model.activation)
    assert jax.tree.structure(ns["state"]["mu"]) == jax.tree.structure(weights)

    spec = jax.tree.map(eqx.is_inexact_array, model)
    spec = eqx.tree_at(lambda m: m.layers[0].weight, spec, False)

    @eqx.filter_jit
    def step(model, state):
        part, rest = eqx.partition(model, spec)

        def loss(part):
            return jnp.mean((jax.vmap(eqx.combine(part, rest))(x) - y) ** 2)

        updates, state = tx.update(eqx.filter_grad(loss)(part), state, part)
        return eqx.combine(eqx.apply_updates(part, updates), rest), state

    state = tx.init(eqx.filter(model, spec))
    new, after = step(model, state)
    assert after["mu"].layers[0].weight is None
    assert jax.tree.structure(after) == jax.tree.structure(state)
    same(new.layers[0].weight, model.layers[0].weight)
    # Adam's first step is the learning rate, and AdamW shrinks w by lr * 0.1 * w beside it
    before, moved = model.layers[1].weight, new.layers[1].weight - model.layers[1].weight
    np.testing.assert_allclose(np.abs(moved + 1e-3 * before), 1e-2, rtol=1e-4)


def test_haiku():
    ns = client("Haiku")
    named = {n: {"kernel": m["w"], "bias": m["b"]} for n, m in ns["params"].items()}
    near(named, plain()["params"])


@pytest.mark.slow
def test_haiku_has_paths_of_two_levels():
    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([4, 2, 1])(x)))
    x = plain()["xs"][0]
    params = jax.jit(network.init)(jax.random.key(0), x)
    grads = jax.jit(jax.grad(lambda params: jnp.sum(network.apply(params, x) ** 2)))(params)
    rates = {"*/b": 0.5, "mlp/~/linear_1/*": None, "mlp/~/linear_2/w": 0.25}
    tx = adamx.by_path(
        {path: rate and adamx.sgd(rate) for path, rate in rates.items()},
        default=adamx.chain(
            adamx.identity(), adamx.add_decayed_weights(0.5, "mlp/~/linear_0/w"), adamx.scale(-1.0)
        ),
    )
    updates, state = tx.update(grads, tx.init(params), params)
    assert set(state["learning_rate"]) == {"*/b", "mlp/~/linear_2/w"}
    for number in range(3):
        name = f"mlp/~/linear_{number}"
        same(updates[name]["b"], -0.5 * grads[name]["b"])
    same(updates["mlp/~/linear_1"]["w"], jnp.zeros((4, 2)))
    same(updates["mlp/~/linear_2"]["w"], -0.25 * grads["mlp/~/linear_2"]["w"])
    first = "mlp/~/linear_0"
    wanted = -(grads[first]["w"] + 0.5 * params[first]["w"])
    np.testing.assert_array_max_ulp(updates[first]["w"], wanted, 1)  # with and without an FMA


# -------------------------------------------------------------------------------- one compiled call


def test_a_scan():
    ns = client("A scan")
    near(ns["params"], plain()["params"])
    near(ns["state"], plain()["state"])
    wanted = [ns["schedule"](t) for t in range(STEPS)]
    np.testing.assert_allclose(ns["rates"], wanted, rtol=4 * 2.0**-23)


@pytest.mark.slow
def test_many_seeds_are_the_runs_of_each():
    ns = client("Many seeds at once")
    runs = [loop(ns["tx"], row(ns["starts"], i), ns["xs"], ns["ys"])[0] for i in range(3)]
    for i, alone in enumerate(runs):
        near(row(ns["many"], i), alone)
    assert far(runs[0], runs[1])


@pytest.mark.slow
def test_a_grid_is_the_runs_of_each():
    ns = client("A grid of hyperparameters in one call")
    runs = {}
    for i, rate in enumerate((1e-3, 3e-3, 1e-2)):
        for j, decay in enumerate((0.0, 0.1)):
            tx = adamx.adamw(rate, weight_decay=decay)
            runs[i, j], _ = loop(tx, ns["start"], ns["xs"], ns["ys"])
            near(row(ns["grid"], i, j), runs[i, j])
    assert far(runs[0, 0], runs[0, 1]) and far(runs[0, 1], runs[1, 1])


def test_a_transformation_is_an_argument_by_its_arrays():
    ns = client("A transformation as an argument")
    for i, rate in enumerate((1e-3, 3e-3, 1e-2)):
        alone = ns["moved"](adamx.as_pytree(adamx.sgd(rate)))
        near(row(ns["each"], i), alone)
    assert far(row(ns["each"], 0), row(ns["each"], 2))


# --------------------------------------------------------------------------------- Optax's wrappers


@pytest.mark.slow
def test_inject_hyperparams_is_the_run_with_decays_of_float32():
    ns = client("inject_hyperparams")
    b1, b2 = float(np.float32(0.9)), float(np.float32(0.999))

    def adamw(decay):
        return adamx.adamw(ns["schedule"], b1, b2, weight_decay=decay)

    alone, state = loop(adamw(0.1), ns["start"], ns["xs"], ns["ys"])
    near(ns["params"], alone)
    assert ns["state"].hyperparams["learning_rate"] == state["learning_rate"]
    # the decay that was changed by hand holds in the next step
    batch = ns["x"], ns["y"]
    changed, _ = ns["step"](ns["params"], ns["state"], *batch)
    inner = ns["params"], ns["state"].inner_state
    near(changed, plain_step(adamw(0.0))(*inner, *batch)[0])
    assert far(changed, plain_step(adamw(0.1))(*inner, *batch)[0])


def test_inject_hyperparams_leaves_static_decays_as_they_are():
    ns = client("inject_hyperparams")
    static = optax.inject_hyperparams(adamx.adamw, static_args=("b1", "b2", "eps", "eps_root"))
    wrapped = static(learning_rate=ns["schedule"], weight_decay=0.1)
    params, state = loop(wrapped, ns["start"], ns["xs"], ns["ys"])
    assert set(state.hyperparams) == {"learning_rate", "weight_decay"}
    near(params, ns["params"])
    near(params, plain()["params"])


@pytest.mark.slow
def test_multi_steps_is_the_step_of_the_large_batch():
    ns = client("MultiSteps")
    large = [x.reshape(5, 64, -1) for x in (ns["xs"], ns["ys"])]
    near(ns["params"], loop(ns["tx"], ns["start"], *large)[0])
    assert int(ns["state"].inner_opt_state["count"]) == 5


def pick(tree, name):
    return {layer: {name: leaves[name]} for layer, leaves in tree.items()}


def merge(*trees):
    return {layer: {k: v for tree in trees for k, v in tree[layer].items()} for layer in trees[0]}


def grouped(transformations, start, xs, ys):
    """Train each group, by the name of its leaves, with an optimizer that sees it alone."""

    @jax.jit
    def step(params, states, x, y):
        grads = jax.grad(plain()["loss"])(params, x, y)
        new = {}
        for name, tx in transformations.items():
            of = pick(params, name)
            updates, states[name] = tx.update(pick(grads, name), states[name], of)
            new[name] = adamx.apply_updates(of, updates)
        fixed = [pick(params, name) for name in ("kernel", "bias") if name not in new]
        return merge(*new.values(), *fixed), states

    states = {name: tx.init(pick(start, name)) for name, tx in transformations.items()}
    for x, y in zip(xs, ys, strict=True):
        start, states = step(start, states, x, y)
    return start


@pytest.mark.slow
def test_masked_moves_the_chosen_weights_alone():
    ns = client("masked")
    near(ns["params"], grouped({"kernel": ns["tx"]}, ns["start"], ns["xs"], ns["ys"]))
    same(pick(ns["params"], "bias"), pick(ns["start"], "bias"))
    ours, _ = loop(
        adamx.by_path({"*/bias": None}, default=ns["tx"]), ns["start"], ns["xs"], ns["ys"]
    )
    near(ns["params"], ours)


def test_partition_is_each_groups_own_run():
    ns = client("partition")
    groups = {"kernel": ns["tx"], "bias": adamx.adam(3e-3)}
    near(ns["params"], grouped(groups, ns["start"], ns["xs"], ns["ys"]))
    by_path = adamx.by_path({"*/bias": adamx.adam(3e-3)}, default=ns["tx"])
    near(ns["params"], loop(by_path, ns["start"], ns["xs"], ns["ys"])[0])
    assert optax.multi_transform is optax.partition


@pytest.mark.slow
def test_lookahead_written_out():
    """Every fifth step the slow weights go half the way to the fast, which start again there."""
    ns = client("lookahead")
    fast = slow = ns["start"]
    state, step = ns["tx"].init(fast), plain_step(ns["tx"])
    for number, (x, y) in enumerate(zip(ns["xs"], ns["ys"], strict=True), 1):
        fast, state = step(fast, state, x, y)
        if number % 5 == 0:
            fast = slow = jax.tree.map(lambda s, f: s + 0.5 * (f - s), slow, fast)
    near(ns["params"].slow, slow)
    near(ns["params"].fast, fast)


@pytest.mark.slow
def test_schedule_free_written_out():
    """z steps, x is its average, y between: six roundings a step where x is recovered from y."""
    ns = client("schedule_free")
    tx, grad = ns["base"], jax.jit(jax.grad(ns["loss"]))
    x = y = z = ns["start"]
    state = tx.init(y)
    for number, batch in enumerate(zip(ns["xs"], ns["ys"], strict=True), 1):
        updates, state = tx.update(grad(y, *batch), state, y)
        z = jax.tree.map(jnp.add, z, updates)
        x = jax.tree.map(lambda x, z, c=1 / number: (1 - c) * x + c * z, x, z)
        y = jax.tree.map(lambda x, z: 0.9 * x + (1 - 0.9) * z, x, z)
    near(ns["params"], y, roundings=6)
    near(ns["averaged"], x, roundings=6)
    ours = adamx.schedule_free(adamx.adam(1e-2, b1=0.0), 1e-2)
    params, state = loop(ours, ns["start"], ns["xs"], ns["ys"])
    near(params, y, roundings=6)
    near(adamx.schedule_free_eval_params(state, params), x, roundings=6)


# ------------------------------------------------------------------------------------- the README


def test_the_readmes_own_loop_is_the_plain_one_with_optax_around():
    ns = run(README, {})
    schedule, x, y = ns["schedule"], ns["x"], ns["y"]
    tx = adamx.adamw(schedule, weight_decay=1e-3)
    params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.mean((x @ p["w"] + p["b"] - y) ** 2))(params)
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
        grads = jax.tree.map(lambda g: g / jnp.maximum(norm, 1.0), grads)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        params, state = step(params, state)
    near(ns["params"], params)
    assert ns["state"]["learning_rate"] == state["learning_rate"] == schedule(STEPS - 1)
