"""Pieces that a user writes: one of each kind, in the conditions of use.

The four kinds are those that stretch the protocol: slots of other shapes than the parameter's, a
concept that needs the whole matrix, a storage with a number for each array, and a wrapper.
"""

import functools
import pickle
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import mesh_of, thinned
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adamx

pytestmark = pytest.mark.usefixtures("quick_compiler")


class factored_ema_of_squares(adamx.Transformation):
    """Rows and columns of the squares, each averaged; a vector keeps all of its squares."""

    decay: float

    def slot_names(self):
        return ("nu", "nu_row", "nu_col")

    def slots(self, param):
        if param.ndim < 2:
            return {"nu": adamx.zeros(param)}
        return {"nu_row": jnp.zeros(param.shape[:-1]), "nu_col": adamx.zeros(param).mean(-2)}

    def accumulate(self, u, slots, step):
        squares = {"nu": u**2}
        if "nu" not in slots:
            squares = {"nu_row": (u**2).mean(-1), "nu_col": (u**2).mean(-2)}
        return {n: self.decay * slots[n] + (1 - self.decay) * x for n, x in squares.items()}

    def emit(self, u, slots, step):
        if "nu" in slots:
            return slots["nu"]
        row, col = slots["nu_row"], slots["nu_col"]
        return jnp.expand_dims(row / row.mean(-1, keepdims=True), -1) * jnp.expand_dims(col, -2)


class rotated(adamx.Transformation):
    """The update in the eigenbasis of the average of g g^T; other leaves as they are."""

    decay: float

    def slot_names(self):
        return ("gram", "basis")

    def slots(self, param):
        if param.ndim != 2:
            return {}
        rows = param.shape[0]
        return {"gram": jnp.zeros((rows, rows)), "basis": jnp.eye(rows)}

    def accumulate(self, u, slots, step):
        if "gram" not in slots:
            return {}
        gram = self.decay * slots["gram"] + (1 - self.decay) * u @ u.T
        return {"gram": gram, "basis": jnp.linalg.qr(gram @ slots["basis"])[0]}

    def emit(self, u, slots, step):
        return slots["basis"].T @ u if "basis" in slots else u


class scaled8(adamx.Storage):
    """Eight bits a number, and one scale an array."""

    def encode(self, slots, bits):
        kept = {}
        for name, x in slots.items():
            unit = jnp.maximum(jnp.max(jnp.abs(x), initial=0) / 127, 1e-30)
            noise = (bits[name] >> 8).astype(jnp.float32) * 2.0**-24
            kept[name] = jnp.floor(x / unit + noise).astype(jnp.int8)
            kept[f"{name}_scale"] = unit
        return kept

    def decode(self, stored):
        names = [name for name in stored if not name.endswith("_scale")]
        return {n: stored[n].astype(jnp.float32) * stored[f"{n}_scale"] for n in names}


class lookahead(adamx.Wrapper):
    """Every few steps the parameters go back towards a slow copy, which moves towards them."""

    every: int = 3
    share: float = 0.5

    def slots(self, param):
        return {"slow": jnp.array(param, copy=True)}

    def update_tree(self, leaves, step):
        slow = self.own(leaves, step)["slow"]
        out, entries = self.run(leaves, step)
        now = step.count % self.every == 0
        for i, (u, w) in enumerate(zip(out.values, leaves.like(), strict=True)):
            if u is not None:
                new = slow[i] + self.share * (w + u - slow[i])
                out.values[i] = step.emitted(jnp.where(now, new - w, u))
                slow[i] = step.select(jnp.where(now, new, slow[i]), slow[i])
        return out, entries | {"slow": leaves.tree(slow)}


def factored():
    second = factored_ema_of_squares(0.5)
    return adamx.chain(adamx.rms_scaling(second_moment=second), adamx.scale_by_learning_rate(0.1))


OWN = {
    "factored": factored,
    "rotated": lambda: adamx.chain(rotated(0.5), adamx.sgd(0.1)),
    "scaled8": lambda: adamx.sgd(0.1, momentum=0.5, moments=scaled8),
    "lookahead": lambda: lookahead(adamx.adamw(0.1)),
}


def start() -> dict[str, Any]:
    w = jnp.arange(6, dtype=jnp.float32).reshape(2, 3) / 4
    return {"w": w, "b": jnp.ones(3), "s": jnp.ones(())}


def gradients(step: int) -> dict[str, Any]:
    return jax.tree.map(lambda p: (p + 0.5) * (-1.0) ** step / (step + 1), start())


def trained(tx, steps=4, params=None):
    params = start() if params is None else params
    state, update = tx.init(params), adamx.make_step(tx)
    for t in range(steps):
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), gradients(t), params)
        params, state = update(params, state, grads)
    return params, state


@pytest.mark.parametrize("name", OWN)
def test_a_piece_of_ones_own_trains_prints_pickles_and_is_summed_up(name):
    tx = OWN[name]()
    assert tx == OWN[name]() and pickle.loads(pickle.dumps(tx)) == tx
    params, state = trained(tx)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
    like, kept = jax.eval_shape(tx.init, start()), {"slots": 0}
    chex.assert_trees_all_equal_structs(like, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(like, state)
    for entry in tx.tree_names():
        kept["slots"] += sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state[entry]))
    assert adamx.summary(tx, start()).bytes["slots"] == kept["slots"]
    assert type(tx.children[0] if name == "scaled8" else tx).__name__ in repr(tx)


AROUND = {
    "skip_nonfinite": adamx.skip_nonfinite,
    "accumulate": lambda tx: adamx.accumulate(tx, 2),
    "monitor": lambda tx: adamx.monitor(tx, every=2, groups=("*",)),
    "by_path": lambda tx: adamx.by_path({"w": tx}, default=None),
    "bfloat16": adamx.bfloat16,
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize(
    "name", [n if n == "factored" else pytest.param(n, marks=pytest.mark.slow) for n in OWN]
)
def test_a_piece_of_ones_own_works_inside_the_wrappers(name, around):
    if around == "by_path" and name == "lookahead":
        with pytest.raises(ValueError, match="lookahead wraps the whole optimizer"):
            AROUND[around](OWN[name]())
        return
    if around == "bfloat16":
        if name != "rotated":  # the slots of others are packed already, or not for one array
            return
        tx = adamx.chain(adamx.bfloat16(rotated(0.5)), adamx.sgd(0.1))
    else:
        tx = AROUND[around](OWN[name]())
    params, state = trained(tx)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
    moments = adamx.moments(state, tx)
    inner = adamx.moments(trained(OWN[name]())[1], OWN[name]())
    assert set(inner) <= set(moments)


@pytest.mark.parametrize("name", thinned(OWN))
def test_masters_follow_a_piece_of_ones_own_in_float32(name):
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), start())
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), half)
    params, state = trained(adamx.master_weights(OWN[name]()), params=half)
    update, inner = adamx.make_step(OWN[name]()), OWN[name]().init(wide)
    for t in range(4):
        grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16).astype(jnp.float32), gradients(t))
        wide, inner = update(wide, inner, grads)
    chex.assert_trees_all_close(adamx.masters(params, state), wide, rtol=1e-6)  # FMA


def test_a_wrapper_that_says_nothing_of_cheap_programs_gets_none():
    """It may act on updates of zero too: make_step ends where one program for all calls ends."""
    tx = lookahead(adamx.accumulate(adamx.sgd(0.5), 2), every=3)
    step, one = adamx.make_step(tx), jax.jit(tx.update)
    params, state = start(), tx.init(start())
    a = jax.tree.map(jnp.copy, params), tx.init(params)
    for t in range(6):
        a = step(*a, gradients(t))
        updates, state = one(gradients(t), state, params)
        params = adamx.apply_updates(params, updates)
    chex.assert_trees_all_close(a, (params, state), rtol=1e-6)  # FMA: one program or two


def test_lookahead_is_optaxs():
    tx = lookahead(adamx.adamw(0.1, weight_decay=0.1), every=3)
    theirs = optax.lookahead(optax.adamw(0.1, weight_decay=0.1), 3, 0.5)
    both: Any = optax.LookaheadParams(start(), start())
    params, state, its = start(), tx.init(start()), theirs.init(both)
    for t in range(7):
        updates, state = tx.update(gradients(t), state, params)
        params = optax.apply_updates(params, updates)
        with jax.numpy_dtype_promotion("standard"):
            updates, its = theirs.update(gradients(t), its, both)
        both = optax.apply_updates(both, updates)
    chex.assert_trees_all_close(params, both.fast, rtol=1e-5)  # 7 steps of float32


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_a_slot_of_another_shape_is_sharded_along_the_axes_it_shares(kind):
    mesh = mesh_of((2, 4), ("x", "y"), kind)
    tx = factored()

    def put(shape, *spec):
        return jax.device_put(jnp.ones(shape), NamedSharding(mesh, PartitionSpec(*spec)))

    params = {"w": put((4, 8), "x", "y"), "square": put((8, 8), "x", "y"), "b": put((8,), "y")}
    wanted = {"nu": {"b": ("y",)}, "nu_row": {"w": ("x",)}, "nu_col": {"w": ("y",)}}
    told = adamx.state_sharding(tx, params)
    for made in (jax.jit(tx.init)(params), tx.init(params)):
        for slot, leaves in wanted.items():
            for leaf, spec in leaves.items():
                assert tuple(told[slot][leaf].spec) == spec
                assert tuple(made[slot][leaf].sharding.spec) == spec
        # as long as either axis: on all devices where the concept does not place it
        assert len(made["nu_row"]["square"].devices()) == 8
        assert tuple(made["nu_row"]["square"].sharding.spec) in ((), (None,))
    one = tx.update(*[jax.tree.map(np.asarray, x) for x in (params, made, params)])
    many = jax.jit(tx.update)(params, made, params)
    chex.assert_trees_all_close(jax.device_get(many), jax.device_get(one), rtol=1e-6)  # the order


def test_a_storage_decodes_what_it_encoded():
    """The same dtypes in a step, in `moments` and in `adapt_state`; codes may be floats too."""

    class codes(adamx.Storage):
        def encode(self, slots, bits):
            return {name: x.astype(jnp.float8_e4m3fn) for name, x in slots.items()}

        def decode(self, stored):
            assert {str(x.dtype) for x in stored.values()} == {"float8_e4m3fn"}
            words = {n: jax.lax.bitcast_convert_type(x, jnp.uint8) for n, x in stored.items()}
            return {name: x.astype(jnp.float32) for name, x in words.items()}

    tx = adamx.chain(codes(adamx.ema(0.5)), adamx.scale(1.0))
    updates, state = tx.update(start(), tx.init(start()))
    np.testing.assert_array_equal(updates["b"], np.full(3, 48.0))  # the code of 0.5
    np.testing.assert_array_equal(adamx.moments(state, tx)["mu"]["b"], np.full(3, 48.0))
    adamx.adapt_state(adamx.chain(adamx.ema(0.5), adamx.scale(1.0)), start(), state, saved_by=tx)


# ------------------------------------------------------------------------------------- mistakes


def started(**hooks):
    """A concept with one slot and some methods that are wrong."""
    ema = {"slots": lambda self, param: {"mu": adamx.zeros(param)}}
    return type("mine", (adamx.Transformation,), ema | hooks)()


MISTAKES = {
    "slots": lambda self, param: {"mu": jnp.eye(param.shape[0])},
    "accumulate": lambda self, u, slots, step: {"mu": slots["nu"]},
    "emit": lambda self, u, slots, step: step.scalars[0]["rate"],
    "scalars": lambda self, step: step.state["rate"],
    "tree_scalars": lambda self, step, leaves: leaves[99],
    "record": lambda self, scalars: {"rate": {}["rate"]},
    "for_tree": lambda self, tree: tree["nothing"],
    "for_leaf": lambda self, path, leaf: {}[path],
}


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
@pytest.mark.parametrize("hook", MISTAKES)
def test_a_failed_look_up_in_a_hook_names_class_and_hook(hook, nested):
    hooks = {hook: MISTAKES[hook]}
    if hook == "emit":
        hooks["scalars"] = lambda self, step: [{}]
    with pytest.raises((TypeError, ValueError), match=rf"mine\.{hook} failed.*(Key|Index)Error"):
        tx = started(**hooks)
        tx = adamx.chain(adamx.scale(2.0), tx, adamx.scale(0.5)) if nested else tx
        tx.update(start(), tx.init(start()), start())


def test_a_slot_that_slot_names_does_not_list_is_an_error():
    tx = started(slots=lambda self, p: {"nu" if p.ndim else "mu": adamx.zeros(p)})
    with pytest.raises(ValueError, match=r"mine\.slots: started 'nu' for leaf 'b'.*slot_names"):
        tx.init(start())
    tx = started(for_leaf=lambda self, path, leaf: adamx.ema(0.5, name="other"))
    with pytest.raises(ValueError, match=r"ema\.slots: started 'other' for leaf 'b'"):
        tx.init(start())


# ------------------------------------------------------------------------- groups by a predicate


def matrices(path, leaf):
    return leaf.ndim == 2


def test_groups_may_be_chosen_by_a_predicate_of_path_and_leaf():
    tx = adamx.by_path(
        {matrices: adamx.momentum(0.1), "b": None}, default=functools.partial(adamx.sgd, 0.5)
    )
    assert tx == adamx.by_path(
        {matrices: adamx.momentum(0.1), "b": None}, default=functools.partial(adamx.sgd, 0.5)
    )
    assert "matrices: chain(ema" in repr(tx)
    assert pickle.loads(pickle.dumps(tx)) == tx
    state = tx.init(start())
    assert state["mu"]["b"] is None and state["mu"]["w"].shape == (2, 3)
    updates, state = tx.update(gradients(0), state, start())
    np.testing.assert_array_equal(updates["b"], 0)
    np.testing.assert_allclose(updates["s"], -0.5 * gradients(0)["s"])
    assert state["learning_rate"].keys() == {"matrices", "default"}
    assert {leaf.path: leaf.group for leaf in adamx.summary(tx, start()).leaves} == {
        "b": "b",
        "s": "default",
        "w": "matrices",
    }
    with pytest.raises(ValueError, match="by_path: the predicate 'matrices' is true of no leaf"):
        tx.init({"b": jnp.ones(3)})
    with pytest.raises(ValueError, match="by_path: patterns must differ"):
        adamx.by_path({matrices: None, "matrices": None}, default=adamx.sgd(0.1))


# --------------------------------------------------------------------------------- what is kept


def test_variants_are_not_kept_for_ever():
    tx = adamx.adamw(0.1, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params))
    for size in range(1, 60):
        jax.eval_shape(tx.init, {"w": jax.ShapeDtypeStruct((size, 2), jnp.float32)})

    def sizes(value):
        yield len(vars(value).get("__made__", ()))
        for child in value.children:
            yield from sizes(child)

    assert 0 < max(sizes(tx)) <= 16
