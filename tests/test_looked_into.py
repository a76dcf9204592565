"""What other libraries find when they look into a transformation: one immutable value."""

import dataclasses
import subprocess
import sys
from typing import Any

import equinox as eqx
import hydra.utils
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optree
import pytest
import treescope
from flax import nnx
from helpers import thinned
from omegaconf import OmegaConf
from table import TRANSFORMATIONS, of_each_kind

import adamx

pytestmark = pytest.mark.usefixtures("quick_compiler")

RATE = jnp.float32(0.5)


def start() -> dict[str, Any]:
    return {"w": jnp.arange(1.0, 7.0).reshape(2, 3) / 4, "b": jnp.ones(3)}


@pytest.fixture(autouse=True)
def as_users_run():
    """Flax and Optax do not run under strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_it_is_neither_a_dataclass_nor_a_tree_of_anything(name):
    tx = TRANSFORMATIONS[name].make()
    assert not dataclasses.is_dataclass(tx) and not hasattr(type(tx), "__attrs_attrs__")
    assert jax.tree.leaves(tx) == [] and jax.tree.map(lambda x: None, tx) is tx
    tree = adamx.as_pytree(tx)
    again = jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(tree)).tx
    assert again == tx and hash(again) == hash(tx) and repr(again) == repr(tx)


# ------------------------------------------------------------------------- as its (init, update)


@of_each_kind
def test_it_is_rebuilt_from_its_items(name):
    tx: Any = TRANSFORMATIONS[name].make()
    assert type(tx)(*tx) is tx and type(tx)._make(tx) is tx
    trees: Any = {"tx": tx}
    assert optree.tree_map(lambda function: function, trees)["tx"] is tx


def test_with_another_function_it_becomes_optaxs_pair():
    tx: Any = adamx.ema(0.9)
    for pair in ((tx.init, print), (print, tx.update), (tx.init, adamx.ema(0.5).update)):
        for made in (type(tx)(*pair), type(tx)._make(pair)):
            assert type(made) is optax.GradientTransformationExtraArgs and tuple(made) == pair


# -------------------------------------------------------------------------------- array arguments

ARRAYS = {
    "adam": lambda x: adamx.adam(x),
    "b1": lambda x: adamx.adamw(0.1, b1=x),
    "groups": lambda x: adamx.by_path({"w": adamx.sgd(x)}, default=adamx.adam(x)),
    "wrapped": lambda x: adamx.skip_nonfinite(adamx.accumulate(adamx.lion(x), 1)),
    "packed": lambda x: adamx.adamw(x, moments="packed16"),
}


@pytest.mark.parametrize("name", thinned(ARRAYS))
def test_flax_nnx_takes_array_hyperparameters(name):
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.w = nnx.Param(start()["w"])

    model, tx = Model(), ARRAYS[name](RATE)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    nnx.jit(lambda m, o: o.update(m, nnx.grad(lambda m: (m.w**2).sum())(m)))(model, optimizer)
    expected = {"w": start()["w"]}
    updates, _ = tx.update(jax.tree.map(lambda w: 2 * w, expected), tx.init(expected), expected)
    np.testing.assert_array_equal(model.w[...], expected["w"] + updates["w"])


@pytest.mark.parametrize("name", thinned(ARRAYS))
def test_donating_everything_leaves_the_users_arrays(name):
    rate = jnp.float32(0.5)
    tx, params = ARRAYS[name](rate), start()

    @eqx.filter_jit(donate="all")
    def step(tx, params, state):
        updates, state = tx.update(params, state, params)
        return eqx.apply_updates(params, updates), state

    params, state = step(tx, params, tx.init(params))
    step(tx, params, state)
    assert not rate.is_deleted() and float(rate) == 0.5


@pytest.mark.parametrize("name", thinned(ARRAYS, 4))
def test_as_pytree_maps_and_differentiates_inside_jit(name):
    def moved(tree):
        tx, params = tree.tx, start()
        updates, _ = tx.update(params, tx.init(params), params)
        return jnp.stack([jnp.sum(u) for u in jax.tree.leaves(updates)]).sum()

    rates = jnp.array([0.5, 0.25])
    trees = jax.vmap(lambda x: adamx.as_pytree(ARRAYS[name](x)))(rates)
    each = [moved(adamx.as_pytree(ARRAYS[name](x))) for x in rates]
    np.testing.assert_allclose(jax.jit(jax.vmap(moved))(trees), each, rtol=2**-20)  # sums of 9
    slope = jax.jit(jax.grad(moved))(adamx.as_pytree(ARRAYS[name](RATE)))
    inside = jax.grad(lambda x: moved(adamx.as_pytree(ARRAYS[name](x))))(RATE)
    np.testing.assert_allclose(sum(jax.tree.leaves(slope)), inside, rtol=2**-20)
    assert bool(jnp.isfinite(inside))


# ----------------------------------------------------------------------------- configs and printers

ADAMW = {"_target_": "adamx.adamw", "learning_rate": 0.1}
CONFIGS = {
    "nested": (
        {"_target_": "adamx.skip_nonfinite", "tx": ADAMW},
        lambda: adamx.skip_nonfinite(adamx.adamw(0.1)),
    ),
    "positional": (
        {
            "_target_": "adamx.chain",
            "_args_": [{"_target_": "adamx.clip_by_global_norm", "max_norm": 1.0}, ADAMW],
        },
        lambda: adamx.chain(adamx.clip_by_global_norm(1.0), adamx.adamw(0.1)),
    ),
    "overridden": (ADAMW | {"weight_decay": 0.5}, lambda: adamx.adamw(0.1, weight_decay=0.5)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_hydra_builds_it_from_a_config(name):
    config, expected = CONFIGS[name]
    assert hydra.utils.instantiate(OmegaConf.create(config)) == expected()


def test_hydra_takes_it_as_an_override():
    config = OmegaConf.create({"_target_": "adamx.chain", "_args_": [ADAMW]})
    assert hydra.utils.instantiate(config, adamx.ema(0.9)) == adamx.chain(adamx.ema(0.9))
    config = OmegaConf.create({"_target_": "adamx.skip_nonfinite", "tx": None})
    made = hydra.utils.instantiate(config, tx=adamx.sgd(0.1))
    assert made == adamx.skip_nonfinite(adamx.sgd(0.1))


def test_other_libraries_print_it_once():
    tx = adamx.adam(0.1)
    assert eqx.tree_pformat(tx) == repr(tx)
    text = treescope.render_to_text(tx)
    assert text.count("scale_by_learning_rate") == 1 and "learning_rate=0.1" in text
    assert "bound method" not in text


CHECKED = """
from jaxtyping import install_import_hook
with install_import_hook("adamx", "beartype.beartype"):
    import adamx
import jax, jax.numpy as jnp, numpy as np, optax
params = {"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(3, jnp.bfloat16)}
schedule = optax.linear_schedule(1.0, 0.5, 3)
for make in (adamx.adamw, adamx.lion, adamx.schedule_free_adamw, adamx.adan, adamx.lamb):
    for rate in (1, 0.1, np.float32(0.1), np.array(0.1), jnp.float32(0.1), schedule):
        tx = adamx.master_weights(adamx.skip_nonfinite(make(rate)))
        step, state = adamx.make_step(tx), tx.init(params)
        print(type(step(jax.tree.map(jnp.copy, params), state, params)[0]).__name__)
"""


IMPORTED = """
import sys, jax, optax
before = set(sys.modules)
import adamx
new = set(sys.modules) - before
print(*{name.partition(".")[0] for name in new} - sys.stdlib_module_names - {"jax"})
print(*(name for name in new if "jax.extend" in name or "pallas" in name))
"""


def test_its_import_loads_no_other_library_and_no_more_of_jax():
    """No library for plots or checkpoints, and no `jax.extend`, with which Pallas would come."""
    run = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True)
    assert run.stdout.split() == ["adamx"], run.stdout + run.stderr[-2000:]


@pytest.mark.slow
def test_its_type_hints_hold_at_run_time():
    run = subprocess.run([sys.executable, "-c", CHECKED], capture_output=True, text=True)
    assert run.stdout.split() == ["dict"] * 30, run.stderr[-2000:]
