"""Stacked layers: the results of the same layers as leaves of their own, for every line."""

import pickle
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, devices, draw, mesh_of, numbers_of_programs
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from table import TRANSFORMATIONS

import adamx
from adamx.core.concept import any_of
from adamx.core.paths import leaves_by_path

LAYERS = 2
FAST = {"adam_mini_by_path", "adaptive_clip", "cautious", "clip_by_global_norm", "clip_by_rms"}
FAST |= {"factored_ema_of_squares", "trust_ratio", "update_clipping"}
"""Everything that takes one statistic an array, and what takes one of the whole tree."""


def example(dtype=jnp.float32, leading=(LAYERS,), seed=0, head=False):
    """Return numbers whose size falls from layer to layer, by powers of 2: the bits stay few."""
    shapes = {"w": (*leading, 4, 3), "b": (*leading, 3)}
    tree = draw({name: jnp.zeros(shape) for name, shape in shapes.items()}, seed)
    size = 0.125 ** np.arange(np.prod(leading)).reshape(leading)
    for name, x in tree.items():
        tree[name] = x * size.reshape(*leading, *[1] * (x.ndim - len(leading))).astype(x.dtype)
    tree = {"layers": tree} | ({"head": draw(jnp.zeros((4, 3)), seed)} if head else {})
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def apart(tree, leading=(LAYERS,)):
    """Return the leaves of a tree by path, with each layer as a leaf of its own."""
    found = {}
    for path, x in leaves_by_path(tree).items():
        start, name, end = path.partition("layers/")
        if not name:
            found[path] = x
            continue
        for place in np.ndindex(leading):
            found[f"{start}layers/{'/'.join(map(str, place))}/{end}"] = x[place]
    return found


def separate(tree, leading=(LAYERS,)):
    """Return parameters or gradients as a tree with each layer as leaves of its own."""
    layers: dict[str, Any] = {}
    for place in np.ndindex(leading):
        inside = layers
        for i in place:
            inside = inside.setdefault(str(i), {})
        inside.update({name: x[place] for name, x in tree["layers"].items()})
    return {**tree, "layers": layers}


def run(tx, grads, params, update=None):
    state, updates = tx.init(params), params
    for g in grads:
        updates, state = (update or tx.update)(g, state, params)
    return updates, state


def assert_as_apart(tx, axes, params, grads, leading=(LAYERS,), update=lambda tx: tx.update):
    """Assert that steps of stacked layers give what steps of the layers as leaves give.

    Both compute the same sums of the same numbers in each layer. Only their order may differ, by
    half an ULP for each of up to twelve terms, and what the compiler contracts: `assert_close`.
    """
    outer = adamx.stacked(tx, axes)
    updates, state = run(outer, grads, params, update(outer))
    flat = [separate(g, leading) for g in grads]
    wanted, kept = run(tx, flat, separate(params, leading), update(tx))
    assert_close(apart(updates, leading), leaves_by_path(wanted))
    assert_close(apart(state, leading), leaves_by_path(kept))
    return updates


# everything that takes one statistic an array, after what reads the whole tree
ALL = adamx.chain(
    adamx.clip_by_global_norm(1.0, record=True),
    adamx.adaptive_clip(0.5),
    adamx.cautious(
        adamx.update_clipping(
            adamx.rms_scaling(adamx.ema(0.5), second_moment=adamx.ema_of_mean_squares(0.75)),
            0.75,
            slot="nu_mean",
        )
    ),
    adamx.clip_by_rms(0.5),
    adamx.clip_by_norm(0.5),
    adamx.keep_norm(),
    adamx.add_decayed_weights(0.1, lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
    adamx.trust_ratio(),
    adamx.scale_by_learning_rate(0.1),
)


@pytest.mark.usefixtures("promotion_of_foreign_stages")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in FAST else pytest.mark.slow)
        for n in TRANSFORMATIONS
        if n != "in_shard_map"  # belongs around: test_named_axes.py
    ],
)
def test_every_line_is_what_it_is_with_the_layers_as_leaves(name):
    tx, axes = TRANSFORMATIONS[name].make(), {"layers/*": 1}
    if not any_of(tx, lambda part: part.leafwise):
        with pytest.raises(ValueError, match="takes the whole tree"):
            adamx.stacked(tx, axes)
        return
    with jax.disable_jit():  # each operation is compiled once for all lines
        assert_as_apart(tx, axes, example(), [example(seed=seed) for seed in (1, 2)])


def in_scan(tx):
    def update(grads, state, params):
        def body(state, g):
            updates, state = tx.update(g, state, params)
            return state, updates

        state, updates = jax.lax.scan(body, state, jax.tree.map(lambda g: g[None], grads))
        return jax.tree.map(lambda u: u[0], updates), state

    return jax.jit(update)


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize(
    ("dtype", "leading", "way"),
    [
        (jnp.float32, (2, 2), "in a scan"),
        pytest.param(jnp.float32, (LAYERS,), "called", marks=pytest.mark.slow),
        pytest.param(jnp.bfloat16, (2, 2), "in a scan", marks=pytest.mark.slow),
        pytest.param(jnp.bfloat16, (LAYERS,), "called", marks=pytest.mark.slow),
    ],
)
def test_all_statistics_at_once_are_those_of_one_layer(dtype, leading, way):
    tx = adamx.master_weights(ALL, "float32") if dtype == jnp.bfloat16 else ALL
    params = example(dtype, leading)
    grads = [example(dtype, leading, seed) for seed in range(1, 6)]
    update = in_scan if way == "in a scan" else (lambda tx: tx.update)
    assert_as_apart(tx, {"layers/*": len(leading)}, params, grads, leading, update)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adam_bfloat16", "adam_packed16", "adamw_packed8"])
def test_where_there_is_no_statistic_of_an_array_nothing_changes_in_any_bit(name):
    tx, params = TRANSFORMATIONS[name].make(), example(head=True)
    grads = [example(seed=seed, head=True) for seed in (1, 2)]
    with jax.disable_jit():  # compiled, two programs may differ in the last bits
        both = [run(tx, grads, params) for tx in (tx, adamx.stacked(tx, {"layers/*": 1}))]
    jax.tree.map(np.testing.assert_array_equal, *both)


@pytest.mark.usefixtures("quick_compiler")
def test_stacked_inside_stacked_adds_up():
    tx = adamx.chain(adamx.trust_ratio(), adamx.adaptive_clip(0.5))
    inside = adamx.stacked(tx, {"layers/w": 1})
    found = [
        run(tx, [example(leading=(2, 3), seed=1)], example(leading=(2, 3)))
        for tx in (
            adamx.stacked(inside, {"layers/*": 1}),
            adamx.stacked(tx, {"layers/w": 2, "layers/*": 1}),
        )
    ]
    jax.tree.map(np.testing.assert_array_equal, *found)


# ------------------------------------------------------------------- with other transformations


@pytest.mark.usefixtures("quick_compiler")
def test_groups_inside_see_one_layer_and_groups_outside_the_leaf():
    rates = {"matrices": 0.5, "vectors": 0.25}

    def of_rank(rank):
        def matrices(path, leaf):
            return leaf.ndim == rank

        return {matrices: adamx.lamb(rates["matrices"])}

    axes, lamb = {"layers/*": 1}, adamx.lamb(rates["vectors"])
    inside = adamx.stacked(adamx.by_path(of_rank(2), default=lamb), axes)
    by_path = adamx.by_path({"head": adamx.lamb(0.5), "*/w": adamx.lamb(0.5)}, default=lamb)
    outside = adamx.by_path(
        {
            "head": adamx.lamb(rates["matrices"]),
            **{p: adamx.stacked(tx, axes) for p, tx in of_rank(3).items()},
        },
        default=adamx.stacked(lamb, axes),
    )
    params, grads = example(head=True), [example(seed=1, head=True)]
    wanted, _ = run(by_path, [separate(g) for g in grads], separate(params))
    for tx in (inside, outside):
        updates, state = run(tx, grads, params)
        assert_close(apart(updates), leaves_by_path(wanted))
        labels = {leaf.path: leaf.group for leaf in adamx.summary(tx, params).leaves}
        assert labels["layers/w"] == "matrices" and labels["layers/b"] == "default"
        assert state["learning_rate"]["default"] == rates["vectors"]


@pytest.mark.usefixtures("quick_compiler")
def test_wrappers_inside_and_outside_give_the_same_and_choose_the_same_programs():
    def wrapped(tx):
        return adamx.monitor(adamx.accumulate(adamx.master_weights(tx), 2), every=2)

    axes, lars = {"layers/*": 1}, adamx.chain(adamx.trust_ratio(), adamx.sgd(0.5))
    grads = [example(jnp.bfloat16, seed=seed) for seed in (1, 2)]
    found = []
    for tx in (wrapped(adamx.stacked(lars, axes)), adamx.stacked(wrapped(lars), axes)):
        step, now = adamx.make_step(tx), example(jnp.bfloat16)
        state, ran = tx.init(now), numbers_of_programs(step)
        for g in grads:
            now, state = step(now, state, g)
        found.append((now, state))
        assert ran == [2, -1, 1] and int(state["count"]) == 1
        assert state["monitor"]["grad_norm"]["layers/w"].shape == (LAYERS,)
    jax.tree.map(np.testing.assert_array_equal, *found)
    guarded = adamx.stacked(adamx.skip_nonfinite(lars), axes)
    bad = jax.tree.map(lambda g: g.at[0].set(jnp.nan), example())
    assert int(run(guarded, [bad], example())[1]["skipped"]) == 1


@pytest.mark.usefixtures("quick_compiler")
def test_in_a_chain_its_stages_are_stages_and_optax_reads_the_whole_leaf():
    axes, decayed = {"layers/*": 1}, adamx.add_decayed_weights(0.1)
    whole, layer = optax.clip_by_block_rms(0.01), adamx.clip_by_rms(0.1)
    inside = adamx.chain(decayed, adamx.stacked(adamx.chain(whole, layer, adamx.ema(0.5)), axes))
    by_hand = adamx.chain(decayed, whole, adamx.stacked(layer, axes), adamx.ema(0.5))
    grads, params = [example(seed=1), example(seed=2)], example()
    with jax.numpy_dtype_promotion("standard"):
        found = [run(tx, grads, params) for tx in (inside, by_hand)]
        jax.tree.map(np.testing.assert_array_equal, *found)
    last = adamx.stacked(adamx.ema_of_params(0.9), axes)
    with pytest.raises(ValueError, match="must be the last stage"):
        adamx.chain(last, adamx.scale(1.0))
    with pytest.raises(ValueError, match="wraps the whole optimizer"):
        adamx.chain(adamx.stacked(adamx.skip_nonfinite(adamx.sgd(0.1)), axes), adamx.scale(1.0))


class scaled8(adamx.Storage):
    """A storage that knows shapes: int8 with one scale for each array."""

    def encode(self, slots, bits):
        kept = {}
        for name, x in slots.items():
            scale = jnp.maximum(jnp.max(jnp.abs(x)), 1e-30) / 127
            kept |= {name: jnp.round(x / scale).astype(jnp.int8), f"{name}_scale": scale}
        return kept

    def decode(self, stored):
        names = [name for name in stored if not name.endswith("_scale")]
        return {n: stored[n].astype(jnp.float32) * stored[f"{n}_scale"] for n in names}


@pytest.mark.usefixtures("quick_compiler")
def test_a_storage_with_a_number_for_each_array_has_one_for_each_layer():
    tx = scaled8(adamx.ema(0.5))
    with jax.disable_jit():
        assert_as_apart(tx, {"layers/*": 1}, example(), [example(seed=seed) for seed in (1, 2)])
    outer, params = adamx.stacked(tx, {"layers/*": 1}), example()
    _, state = run(outer, [example(seed=1)], params)
    assert state["mu_scale"]["layers"]["w"].shape == (LAYERS,)
    plain = outer.replace(tx=adamx.ema(0.5))
    exact = run(plain, [example(seed=1)], params)[1]
    seen = adamx.moments(state, outer)["mu"]["layers"]["w"]
    step = np.asarray(state["mu_scale"]["layers"]["w"]).reshape(LAYERS, 1, 1)
    assert (np.abs(seen - exact["mu"]["layers"]["w"]) <= 0.51 * step).all(), "half a spacing"
    for tx, other, saved in ((outer, plain, exact), (plain, outer, state)):
        adapted, said = adamx.adapt_state(tx, params, saved, saved_by=other)
        assert said == adamx.Adaptation((), ())
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=0),
            adamx.moments(adapted, tx)["mu"],
            adamx.moments(state, outer)["mu"],
        )


# ------------------------------------------------------------------- numbers for each layer


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize(
    ("leading", "shape"),
    [((2,), (2,)), ((2, 3), (3,)), pytest.param((2, 3), (2, 1), marks=pytest.mark.slow)],
)
def test_a_hyperparameter_may_have_a_number_for_each_layer(leading, shape):
    generator = np.random.default_rng(0)
    drawn = {
        "learning_rate": generator.uniform(0.1, 0.5, shape).astype(np.float32),
        "b1": generator.uniform(0.1, 0.9, shape).astype(np.float32),
        "eps": generator.uniform(0.1, 0.5, shape).astype(np.float32),
    }
    rate = jnp.asarray(drawn["learning_rate"])
    arrays: dict[str, Any] = {name: jnp.asarray(x) for name, x in drawn.items()} | {
        "weight_decay": lambda _: rate
    }
    tx = adamx.stacked(adamx.adamw(**arrays), {"*": len(leading)})
    params, grads = example(leading=leading), [example(leading=leading, seed=s) for s in (1, 2)]
    updates, state = run(tx, grads, params)
    assert state["learning_rate"].shape == shape
    for place in np.ndindex(leading):
        own: dict[str, Any] = {
            name: float(np.broadcast_to(x, leading)[place]) for name, x in drawn.items()
        }
        alone = adamx.adamw(**own, weight_decay=own["learning_rate"])
        params_of, *grads_of = [
            {name: x[place] for name, x in tree["layers"].items()} for tree in (params, *grads)
        ]
        wanted, _ = run(alone, grads_of, params_of)
        assert_close({name: x[place] for name, x in updates["layers"].items()}, wanted)


# ------------------------------------------------------------------- bytes and devices


@pytest.mark.parametrize(
    "make",
    [
        adamx.cautious_adamw,
        pytest.param(adamx.adam_mini, marks=pytest.mark.slow),
        pytest.param(adamx.adamw, marks=pytest.mark.slow),
        pytest.param(adamx.lamb, marks=pytest.mark.slow),
    ],
)
def test_a_step_moves_no_more_bytes(make):
    """Beyond what a layer has in the place of a leaf: numbers for each of 256 rows, or fewer."""
    params = {"layers": {"w": jnp.ones((4, 256, 128))}}
    moved = []
    for tx in (make(0.1), adamx.stacked(make(0.1), {"layers/*": 1})):
        found = adamx.audit(adamx.make_step(tx), params, tx.init(params), params)
        assert found.ok, found
        moved.append(found.bytes_accessed)
    assert moved[1] <= moved[0] * (1 + 1 / 256)


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda k: k.name)
@pytest.mark.parametrize(
    ("spec", "over"),
    [(P(None, "data"), None), (P("data", None, "model"), None), (P(None, None, "model"), "data")],
    ids=["another axis", "the layers", "slots over the layers"],
)
def test_however_it_is_sharded_it_is_the_same(kind, spec, over):
    mesh = mesh_of((2, 2), ("data", "model"), kind)
    rates = jnp.array([0.1, 0.2, 0.3, 0.4])
    tx = adamx.stacked(adamx.adam_mini(rates, weight_decay=0.1), {"*": 1})
    params, grads = (draw({"w": jnp.zeros((4, 8, 6))}, seed) for seed in (0, 1))
    wanted, kept = run(tx, [grads], params)
    where = NamedSharding(mesh, spec)
    placed = jax.device_put(params, where)
    of_state = adamx.state_sharding(tx, placed, over=over)
    state = jax.jit(tx.init)(placed)
    if over:
        state = jax.device_put(state, of_state)
    for name in tx.tree_names():
        x, expected = state[name]["w"], of_state[name]["w"]
        assert x.sharding.is_equivalent_to(expected, x.ndim), (name, x.sharding, expected)
    entry = (*of_state["nu_mean"]["w"].spec, None)[0]
    assert entry == (over or spec[0]), "the stacked axis keeps its sharding"
    updates, state = jax.jit(tx.update)(jax.device_put(grads, where), state, placed)
    assert_close(updates, wanted)
    assert_close(state, kept)


def test_slots_are_on_the_device_of_their_parameter():
    tx = adamx.stacked(adamx.adam_mini(0.1), {"layers/*": 1})
    paths = leaves_by_path(example())
    where = {path: device for path, device in zip(paths, devices(1 + len(paths))[1:], strict=True)}
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: jax.device_put(
            x, where[jax.tree_util.keystr(path, simple=True, separator="/")]
        ),
        example(),
    )
    state = tx.init(params)
    for name in tx.tree_names():
        for path, slot in leaves_by_path(state[name]).items():
            assert slot.devices() == {where[path]}, (name, path)


# ------------------------------------------------------------------- what it shows


def test_it_is_a_value():
    first = lambda path, leaf: 1  # noqa: E731
    axes = {"layers/*": 1, re.compile("x.*"): 2}
    tx = adamx.stacked(adamx.sgd(0.1), axes)
    assert repr(tx) == "stacked(chain(scale_by_learning_rate(0.1)), {'layers/*': 1, 'x.*': 2})"
    assert eval(repr(adamx.stacked(adamx.ema(0.5), {"*": 1})), {**vars(adamx)}) == adamx.stacked(
        adamx.ema(0.5), {"*": 1}
    )
    assert repr(adamx.stacked(adamx.ema(0.5), first)) == "stacked(ema(0.5), <lambda>)"
    again = adamx.stacked(adamx.sgd(0.1), {**axes})
    assert tx == again and hash(tx) == hash(again)
    assert tx == pickle.loads(pickle.dumps(tx)) == tx.replace(leading={**axes})
    assert (
        tx != tx.replace(leading={"layers/*": 1})
        and tx.replace(tx=adamx.ema(0.5)).leading == tx.leading
    )
    for axes in (first, {first: 1}):
        with pytest.raises(pickle.PicklingError, match="stacked: leading holds"):
            pickle.dumps(adamx.stacked(adamx.sgd(0.1), axes))


@pytest.mark.usefixtures("quick_compiler")
def test_statistics_have_a_row_for_each_layer_and_groups_one():
    tx, params = adamx.stacked(adamx.adamw(0.5), {"layers/*": 1}), example()
    _, state = run(adamx.monitor(tx, every=1), [example(seed=1)], params)
    found = adamx.statistics(state)
    _, alone = run(
        adamx.monitor(adamx.adamw(0.5), every=1), [separate(example(seed=1))], separate(params)
    )
    wanted = adamx.statistics(alone)
    moved = {re.sub(r"layers/(\d)/(\w)", r"layers/\2/\1", name): x for name, x in wanted.items()}
    assert found.keys() == moved.keys() and "update_to_param/layers/w/1" in found
    np.testing.assert_allclose(
        [*found.values()], [moved[name] for name in found], rtol=1e-6, err_msg="8 terms in order"
    )
    _, state = run(adamx.monitor(tx, every=1, groups=("*/w",)), [example(seed=1)], params)
    assert set(adamx.statistics(state)) >= {"grad_norm/*/w", "grad_norm/others"}
    one = adamx.monitor(adamx.stacked(adamx.sgd(0.5), {"*": 1}), every=1)
    _, state = run(one, [jnp.ones((2, 3))], jnp.ones((2, 3)))
    assert {"grad_norm/0", "grad_norm/1"} <= adamx.statistics(state).keys()


@pytest.mark.usefixtures("quick_compiler")
def test_a_run_goes_on_when_its_layers_are_declared():
    before, params = adamx.monitor(adamx.adamw(0.5), every=1), example()
    now = adamx.monitor(adamx.stacked(adamx.adamw(0.5), {"layers/*": 1}), every=1)
    _, state = run(before, [example(seed=1)], params)
    with pytest.raises(ValueError, match=r"shape \[\] and is measured with \[2\].* delete"):
        now.update(example(seed=2), state, params)
    del state["monitor"]
    state, said = adamx.adapt_state(now, params, state)
    assert {path.split("/")[0] for path in said.filled} == {"monitor"} and not said.dropped
    assert int(now.update(example(seed=2), state, params)[1]["count"]) == 2


MODEL = {
    "layers": {
        "mlp": {"w": jax.ShapeDtypeStruct((4, 8, 6), "float32"),
                "b": jax.ShapeDtypeStruct((4, 6), "float32")},
        "norm": jax.ShapeDtypeStruct((4, 8), "float32"),
    },
    "embed": jax.ShapeDtypeStruct((9, 8), "float32"),
}  # fmt: skip


def matrices(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


def test_summary_counts_the_layers_as_arrays():
    tx = adamx.stacked(adamx.adam_mini(0.1, mask=matrices), {"layers/*": 1})
    rows = str(adamx.summary(tx, MODEL, by="leaf"))
    assert re.search(r"layers/mlp/w +4 arrays \[8, 6\] .* nu_mean float32\[4, 1, 6\]", rows)
    assert re.search(r"embed +\[9, 8\]", rows)
    assert "2 leaves of 4 arrays" in str(adamx.summary(tx, MODEL))
    assert adamx.summary(tx, MODEL).warnings == ()
    state = jax.eval_shape(tx.init, MODEL)
    slots = sum(x.size * 4 for n in tx.tree_names() for x in jax.tree.leaves(state[n]))
    assert adamx.summary(tx, MODEL).bytes["slots"] == slots
    (said,) = adamx.summary(adamx.stacked(adamx.adamw(0.1), {"layers/*": 1}), MODEL).warnings
    assert "weight decay acts on layers/mlp/b, layers/norm, of rank 1" in said


@pytest.mark.parametrize(
    ("tx", "warns"),
    [
        (adamx.lamb(0.1), True),
        (adamx.adamw(0.1, mask=matrices), True),  # the decay of the biases
        (adamx.adamw(0.1, mask="*/w"), False),
        (adamx.adam_mini(0.1, weight_decay=0.0), True),
        (adamx.chain(adamx.adaptive_clip(0.1, axis=-2), adamx.sgd(0.1)), True),  # over its layers
        (adamx.chain(adamx.adaptive_clip(0.1, axis=-1), adamx.sgd(0.1)), False),
        (adamx.chain(adamx.clip_by_global_norm(1.0), adamx.adam(0.1)), False),
        (adamx.stacked(adamx.lamb(0.1), {"layers/*": 1}), False),
    ],
)
def test_summary_says_where_stacked_layers_are_not_declared(tx, warns):
    found = [said for said in adamx.summary(tx, MODEL).warnings if "stacked along" in said]
    assert len(found) == warns
    for said in found:
        assert "4 layers stacked along the first axis" in said
        assert 'adamx.stacked(tx, {"layers/*": 1})' in said


def shape(*axes):
    return jax.ShapeDtypeStruct(axes, jnp.float32)


@pytest.mark.parametrize(
    ("layers", "warns"),
    [
        ({"w": shape(4, 8, 6), "b": shape(4, 6)}, True),
        ({"w": shape(4, 8, 6), "b": shape(4, 6), "scale": shape(8)}, False),
        ({"w": shape(4, 8, 6), "v": shape(4, 6, 8)}, False),
        ({"w": shape(8, 6), "v": shape(8, 4)}, False),
        ({"w": shape(1, 8, 6), "b": shape(1, 6)}, False),
        ({"w": shape(4, 8, 6), "b": shape(2, 6)}, False),
    ],
)
def test_layers_are_taken_for_stacked_if_matrices_and_vectors_have_one_first_size(layers, warns):
    found = adamx.summary(adamx.lamb(0.1, mask="*/w"), {"layers": layers, "head": shape(9, 8)})
    assert len(found.warnings) == warns


# ------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("tx", "axes", "kind", "said"),
    [
        (3, {"*": 1}, TypeError, "stacked: tx must be an adamx or Optax"),
        (optax.adam(0.1), {"*": 1}, ValueError, "which takes the whole tree"),
        (adamx.sgd(0.1), 1, TypeError, "leading must map patterns .* got 1"),
        (adamx.sgd(0.1), {1: 1}, TypeError, "stacked: a pattern must be"),
        (adamx.sgd(0.1), {"*": -1}, ValueError, r"leading\['\*'\] .* got -1"),
        (adamx.sgd(0.1), {"*": 1.5}, ValueError, "whole and >= 0, got 1.5"),
    ],
)
def test_a_mistake_is_an_error_at_construction(tx: Any, axes: Any, kind, said):
    with pytest.raises(kind, match=said):
        adamx.stacked(tx, axes)


@pytest.mark.parametrize(
    ("tx", "axes", "said"),
    [
        (adamx.sgd(0.1), {"blocks/*": 1}, "stacked: the pattern 'blocks/.' matches no leaf"),
        (adamx.sgd(0.1), {"layers/*": 3}, r"leaf 'layers/b' has the shape \[2, 3\] .* give it 0"),
        (adamx.sgd(0.1), lambda path, leaf: 0.5, "what leading gives for leaf 'head' .* got 0.5"),
        (
            adamx.sgd(jnp.ones(2)),
            {"layers/*": 1},
            "learning_rate of scale_by_learning_rate .* 'head' has no stacked axes.* by_path",
        ),
        (adamx.sgd(jnp.ones(3)), {"*": 1}, r"shape \[3\], .* stacked axes \[4\]"),
        (
            adamx.by_path({"head": None}, default=adamx.sgd(lambda _: jnp.ones(3))),
            {"layers/*": 1},
            r"is an array of shape \[3\] .* stacked axes are \[2\]",
        ),
    ],
)
def test_a_mistake_is_an_error_at_the_first_step(tx, axes, said):
    tx, params = adamx.stacked(tx, axes), example(head=True)
    with pytest.raises(ValueError, match=said):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.usefixtures("quick_compiler")
def test_statistics_of_divided_layers_are_measured_on_a_mesh_of_either_kind(kind, every):
    mesh = mesh_of((4, 2), ("data", "model"), kind)
    layers = jnp.arange(32.0).reshape(4, 8)
    params = {"layers": {"w": jax.device_put(layers, NamedSharding(mesh, P("data", None)))}}
    tx = adamx.monitor(adamx.stacked(adamx.adamw(1e-3), {"layers/*": 1}), every=every)
    state = jax.jit(tx.init)(params)
    for _ in range(every):
        _, state = jax.jit(tx.update)(params, state, params)
    norms = state["monitor"]["grad_norm"]["layers/w"]
    np.testing.assert_allclose(norms, np.linalg.norm(layers, axis=1), rtol=1e-6)
    grads = jax.tree.map(jnp.copy, params)
    elsewhere = jax.eval_shape(tx.update, grads, tx.init({"layers": {"w": layers}}), params)[1]
    assert elsewhere["monitor"]["grad_norm"]["layers/w"].shape == (4,)
    _, state = adamx.make_step(tx)(params, state, grads)


@pytest.mark.usefixtures("quick_compiler")
def test_statistics_of_divided_layers_are_divided_inside_shard_map():
    mesh, spec = mesh_of((2,), ("data",)), {"layers": {"w": P("data")}}
    layers = jnp.arange(32.0).reshape(4, 8)
    params = {"layers": {"w": jax.device_put(layers, NamedSharding(mesh, P("data")))}}
    tx = adamx.monitor(adamx.stacked(adamx.adamw(1e-3), {"layers/*": 1}), every=1)
    tx = adamx.in_shard_map(tx, spec)
    state = jax.jit(tx.init)(params)
    of = jax.tree.map(lambda x: x.spec, adamx.state_sharding(tx, params))
    update = jax.shard_map(
        lambda g, s: tx.update(g, s, g)[1], mesh=mesh, in_specs=(spec, of), out_specs=of
    )
    norms = jax.jit(update)(params, state)["monitor"]["grad_norm"]["layers/w"]
    np.testing.assert_allclose(norms, np.linalg.norm(layers, axis=1), rtol=1e-6)
