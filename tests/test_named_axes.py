"""Inside shard_map: norms, means, counts and the guard are of whole arrays and the whole tree."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import devices, draw, mesh_of
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from table import TRANSFORMATIONS

import adamx
from adamx.core import norms
from adamx.core.shard import Shard

SPECS = {"w": P("data", "model"), "u": P(None, "model"), "r": P()}
SHAPES = {"w": (4, 6), "u": (3, 4), "r": (5,)}
SIZE = 41  # elements in all


def grid(kind=AxisType.Auto):
    return mesh_of((2, 2), ("data", "model"), kind)


def numbers(seed, shapes=SHAPES, dtype=jnp.float32):
    """Return normal numbers, of which each row is twice as large as the one before."""
    generator = np.random.default_rng(seed)
    rows = {n: 2.0 ** np.arange(s[0]).reshape(-1, *[1] * (len(s) - 1)) for n, s in shapes.items()}
    return {n: jnp.asarray(generator.normal(size=s) * rows[n], dtype) for n, s in shapes.items()}


def placed(tree, specs=SPECS, mesh=None):
    return {n: jax.device_put(x, NamedSharding(mesh or grid(), specs[n])) for n, x in tree.items()}


def sharded(tx, params, specs=SPECS, mesh=None, **options):
    """Return the update inside shard_map, with the specs of the state that docs recommend."""
    mesh = mesh or grid()
    of_state = adamx.state_sharding(tx, placed(params, specs, mesh))
    of_state = jax.tree.map(lambda x: x.spec, of_state)
    put = (specs, of_state, specs)
    return jax.shard_map(tx.update, mesh=mesh, in_specs=put, out_specs=put[:2], **options)


def assert_near(got, wanted, bound):
    """Compare trees leaf by leaf, in units of the leaf's largest element."""

    def check(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * np.abs(b).max(initial=0))

    jax.tree.map(check, got, wanted)


# Each of the two orders of a sum of n terms >= 0 is off by at most (n - 1) 2^-24 of it. Two such
# sums of at most SIZE terms, a root, a few more roundings, in two steps:
ORDER = 2 * 2 * 2 * SIZE * 2.0**-24
BFLOAT16 = 2.0**-7  # a difference in the last bit may round to the next number

MECHANISMS = (
    "cautious",
    "adaptive_clip",
    "trust_ratio",
    "adafactor",
    "skip_nonfinite_clip",
    "monitor",
)


def two_steps(update, state, params):
    """Return the second step's updates, and the state after it."""
    dtype = params["w"].dtype
    _, state = update(numbers(1, dtype=dtype), state, params)
    return update(numbers(2, dtype=dtype), state, params)


def fast_for(*names):
    # the line in_shard_map has specs of its own, which say that its leaves are whole
    others = (n for n in TRANSFORMATIONS if n not in (*names, "in_shard_map"))
    slow = [pytest.param(n, marks=pytest.mark.slow) for n in others]
    return pytest.mark.parametrize("name", [*names, *slow])


@pytest.mark.usefixtures("quick_compiler", "promotion_of_foreign_stages")
@pytest.mark.parametrize(
    ("name", "check_vma"),
    [
        *((name, True) for name in MECHANISMS),
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in MECHANISMS),
        *(
            pytest.param(name, i % 2 == 0, marks=pytest.mark.slow)
            for i, name in enumerate(TRANSFORMATIONS)
            if name not in (*MECHANISMS, "in_shard_map")  # whose specs say that leaves are whole
        ),
    ],
)
def test_shards_get_the_step_of_the_whole_arrays(name, check_vma):
    case = TRANSFORMATIONS[name]
    tx, params = case.make(), numbers(0)
    inside = adamx.in_shard_map(tx, SPECS)
    update = jax.jit(sharded(inside, params, check_vma=check_vma))
    got = two_steps(update, inside.init(params), params)
    wanted = two_steps(jax.jit(tx.update), tx.init(params), params)
    assert_near(got, wanted, BFLOAT16 if case.narrow else ORDER)


@pytest.mark.usefixtures("quick_compiler")
def test_a_storage_rounds_each_element_as_in_the_whole_array():
    tx, params = TRANSFORMATIONS["adamw_packed8"].make(), draw(numbers(0), 0)
    inside, grads = adamx.in_shard_map(tx, SPECS), draw(numbers(0), 1)
    state = tx.init(params)
    got = jax.jit(sharded(inside, params))(grads, state, params)
    jax.tree.map(np.testing.assert_array_equal, got, tx.update(grads, state, params))


# ---------------------------------------------------------------------------- where it may be used

CLIP = functools.partial(adamx.clip_by_global_norm, 1.0, record=True)


def guarded():
    return adamx.skip_nonfinite(adamx.chain(CLIP(), adamx.momentum(0.1)))


def one_step(tx):
    grads = numbers(1)
    return tx.update(grads, tx.init(grads))


def in_mesh(tx, kind):
    specs = {"w": P("data"), "u": P(None, "model"), "r": P()}
    mesh, grads = grid(kind), numbers(1)
    update = sharded(adamx.in_shard_map(tx, specs), grads, specs, mesh)
    grads = placed(grads, specs, mesh)
    return update(grads, jax.jit(tx.init)(grads), grads)


def in_pmap(tx):
    devices(2)
    grads, inside = numbers(1), adamx.in_shard_map(tx, {"r": P(), "*": P("rows")})
    cut = {n: x if n == "r" else x[:, None] for n, x in grads.items()}  # a row on each device
    cut |= {"w": cut["w"].reshape(2, 2, 6), "u": grads["u"].reshape(2, 2, 3)}
    axes = {"w": 0, "u": 0, "r": None}
    update = jax.pmap(lambda g: inside.update(g, inside.init(g)), "rows", in_axes=(axes,))
    updates, state = update(cut)
    back = {n: x[0] if n == "r" else x.reshape(SHAPES[n]) for n, x in updates.items()}
    return back, {"grad_norm": state["grad_norm"][1]}


def in_vmap(tx):
    grads = numbers(1)
    inside = adamx.in_shard_map(tx, {"r": P(), "*": P("rows")})
    halves = {n: x if n == "r" else x.reshape(2, 2, -1) for n, x in grads.items()}
    axes = {"w": 0, "u": 0, "r": None}
    update = jax.vmap(lambda g: inside.update(g, inside.init(g)), in_axes=(axes,), axis_name="rows")
    updates, state = update(halves)
    back = {n: x[0] if n == "r" else x.reshape(SHAPES[n]) for n, x in updates.items()}
    return back, {"grad_norm": state["grad_norm"][1]}


WAYS = {
    "a mesh with explicit axes": lambda tx: in_mesh(tx, AxisType.Explicit),
    "eager shard_map": lambda tx: in_mesh(tx, AxisType.Auto),
    "pmap": in_pmap,
    "vmap": in_vmap,
}


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("way", WAYS)
def test_it_runs_wherever_an_axis_has_a_name(way):
    tx = adamx.chain(CLIP(), adamx.clip_by_rms(0.01))
    (wanted, one), (got, many) = one_step(tx), WAYS[way](tx)
    assert_near(got, wanted, ORDER)
    assert_near(many["grad_norm"], one["grad_norm"], ORDER)


def test_axes_that_the_compiler_divides_are_not_summed_over():
    mesh, grads = grid(), {"w": jnp.arange(8.0).reshape(4, 2)}
    specs = {"w": P("data", "model")}
    tx = adamx.in_shard_map(CLIP(), specs)
    update = jax.shard_map(
        lambda g: tx.update(g, tx.init(g))[1]["grad_norm"],
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P(),
        axis_names={"data"},
    )
    got = jax.jit(update)(placed(grads, specs, mesh))
    np.testing.assert_allclose(got, np.sqrt(140), rtol=8 * 2.0**-24)  # sums of whole numbers


# ------------------------------------------------------------------------------ communication


def all_reduces(tx):
    grads = numbers(1)
    update = jax.jit(sharded(adamx.in_shard_map(tx, SPECS), grads))
    text = update.lower(grads, tx.init(grads), grads).compile().as_text() or ""
    return len(re.findall(r" all-reduce(?:-start)?\(", text))


def test_a_clip_and_a_guard_add_one_number_over_the_devices_and_elementwise_methods_none():
    assert all_reduces(guarded()) == 1
    both = adamx.skip_nonfinite(adamx.skip_spikes(adamx.chain(CLIP(), adamx.momentum(0.1))))
    assert all_reduces(both) == 1
    assert all_reduces(adamx.adamw(0.1)) == 0


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("clipped", [True, False])
def test_a_nonfinite_element_in_one_shard_skips_the_step_on_all_devices(clipped):
    tx = adamx.in_shard_map(guarded() if clipped else adamx.skip_nonfinite(adamx.sgd(0.1)), SPECS)
    grads = numbers(1)
    update, state = jax.jit(sharded(tx, grads)), tx.init(grads)
    for bad in (grads | {"u": grads["u"].at[1, 3].set(jnp.nan)}, grads | {"r": grads["r"] / 0}):
        updates, state = update(bad, state, grads)
        assert not any(x.any() for x in jax.tree.leaves(updates))
    _, state = update(grads, state, grads)
    assert (int(state["skipped"]), int(state["count"])) == (2, 1)


# ----------------------------------------------------------------------- what is known of a leaf


def test_a_device_that_has_what_others_have_counts_once():
    x, y = jnp.ones(3), jnp.ones((2, 2))
    shards = [Shard(), Shard(("rows",), (("rows",), ()))]
    total = jax.vmap(
        lambda _: norms.sum_of_all_squares([x, y], shards), axis_name="rows", axis_size=2
    )(jnp.zeros(2))
    assert total.tolist() == [11.0, 11.0]


def seen_by(make):
    """Return the shapes that a function in a transformation gets of a shard."""
    seen = []

    def look(leaf):
        seen.append(leaf.shape)
        return True

    tx = adamx.in_shard_map(make(look), P("rows"))
    w = {"w": jnp.ones((1, 4))}
    jax.eval_shape(
        jax.vmap(lambda _: tx.update(w, tx.init(w), w)[0], axis_name="rows", axis_size=8),
        jnp.zeros(8),
    )
    return set(seen)


def test_what_is_chosen_by_shape_sees_whole_arrays():
    whole = {(8, 4)}
    assert seen_by(lambda f: adamx.adamw(0.1, mask=lambda tree: jax.tree.map(f, tree))) == whole
    axes = lambda f: adamx.adam_mini(0.1, axes=lambda _, leaf: (0,) * f(leaf))  # noqa: E731
    assert seen_by(axes) == whole
    groups = lambda f: adamx.by_path({lambda _, x: f(x): None}, default=adamx.sgd(0.1))  # noqa: E731
    assert seen_by(groups) == whole


def test_a_unit_is_that_of_the_whole_array():
    w, g = jnp.ones((8, 4)), jnp.arange(32.0).reshape(8, 4)
    tx = adamx.adaptive_clip(0.1)
    inside = adamx.in_shard_map(tx, P("rows"))
    rows = jax.vmap(lambda g, w: inside.update(g, {"count": jnp.int32(0)}, w)[0], axis_name="rows")
    got = rows(g[:, None], w[:, None])[:, 0]  # a shard [1, 4] alone would be one unit
    np.testing.assert_allclose(got, tx.update(g, tx.init(w), w)[0], rtol=ORDER)


BOTH = ("data", "model")
FORMS = {
    "one spec": (P("data"), ("data",), ("data",)),
    "a tree": ({"a": {"w": P("data")}, "b": [P(None, "model")]}, ("data",), ("model",)),
    "a branch": ({"a": P("data"), "b": [P("model")]}, ("data",), ("model",)),
    "patterns": ({"a/*": P("data"), "*": P()}, ("data",), ()),
    "a regular expression": ({"a": P(), re.compile("b/."): P(BOTH)}, (), BOTH),
    "a pattern above": ({"a": P("data"), "b": P("model")}, ("data",), ("model",)),
    "a name": ("data", ("data",), ("data",)),
    "names": (BOTH, BOTH, BOTH),
    "names by pattern": ({"a": P(), "b": "model"}, (), ("model",)),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_specs(form):
    specs, first, second = FORMS[form]
    tree = {"a": {"w": jnp.ones((2, 3))}, "b": [jnp.ones((4, 2))]}
    tx = adamx.in_shard_map(adamx.sgd(0.1), specs)
    shards = dict(tx.for_tree(tree).shards)
    assert (shards["a/w"].names, shards["b/0"].names) == (first, second)
    assert tx.replace(specs=tx.specs) == tx
    assert (shards["a/w"].dims is None) == (form in ("a name", "names"))


def test_it_prints_as_it_was_written():
    assert repr(adamx.in_shard_map(adamx.scale(2.0), P("data", None))) == (
        "in_shard_map(scale(2.0), PartitionSpec('data', None))"
    )
    specs = {"w": P("data"), "*": "model"}
    tx = adamx.in_shard_map(adamx.scale(2.0), specs)
    assert repr(tx) == "in_shard_map(scale(2.0), {'w': PartitionSpec('data'), '*': 'model'})"


# ------------------------------------------------------------------------------ inside and outside


LAYERS = {"layers": P("data", "model"), "w": P("data")}


@pytest.mark.usefixtures("quick_compiler")
def test_stacked_layers_divided_over_devices_are_arrays_of_their_own():
    shapes = {"layers": (4, 6), "w": (4, 3)}
    params, grads = numbers(0, shapes), numbers(1, shapes)
    tx = adamx.stacked(adamx.chain(CLIP(), adamx.clip_by_rms(0.01)), {"layers": 1})
    tx = adamx.monitor(tx, every=1)
    inside = adamx.in_shard_map(tx, LAYERS)
    state = inside.init(params)
    got = jax.jit(sharded(inside, params, LAYERS))(grads, state, params)
    assert_near(got, tx.update(grads, state, params), ORDER)


@pytest.mark.usefixtures("quick_compiler")
def test_inside_stacked_a_spec_is_that_of_one_layer():
    shapes = {"layers": (3, 4)}
    specs = {"layers": P(None, "model")}
    params, grads = numbers(0, shapes), numbers(1, shapes)
    one = adamx.stacked(adamx.clip_by_rms(0.01), {"layers": 1})
    many = adamx.stacked(adamx.in_shard_map(adamx.clip_by_rms(0.01), P("model")), {"layers": 1})
    got, _ = jax.jit(sharded(many, params, specs))(grads, many.init(params), params)
    assert_near(got, one.update(grads, one.init(params), params)[0], ORDER)
    whole = adamx.stacked(
        adamx.in_shard_map(adamx.chain(CLIP(), adamx.scale(1.0)), P("model")), {"layers": 1}
    )
    with pytest.raises(ValueError, match=r"write in_shard_map\(stacked\(tx, \.\.\.\), specs\)"):
        jax.eval_shape(sharded(whole, params, specs), grads, whole.init(params), params)


@pytest.mark.usefixtures("quick_compiler")
def test_all_wrappers_may_be_inside():
    groups = {"u": adamx.chain(CLIP(), adamx.sgd(0.1)), "r": None}
    tx = adamx.master_weights(adamx.by_path(groups, default=adamx.lamb(0.1)))
    tx = adamx.accumulate(adamx.skip_nonfinite(tx), 2)
    tx = adamx.monitor(tx, every=1, groups=("w", "*"))
    params = numbers(0, dtype=jnp.bfloat16)
    update = jax.jit(sharded(adamx.in_shard_map(tx, SPECS), params))
    got, many = two_steps(update, tx.init(params), params)
    wanted, one = two_steps(jax.jit(tx.update), tx.init(params), params)
    assert_near(got, wanted, BFLOAT16)
    found, statistics = adamx.statistics(many), adamx.statistics(one)
    assert found == pytest.approx(statistics, rel=BFLOAT16, nan_ok=True)


@pytest.mark.usefixtures("quick_compiler")
def test_a_slot_without_the_divided_axis_is_measured_once():
    """The share of small elements weighs the slots of adam_mini by their own sizes."""
    params = {"w": jnp.ones((4, 6)), "u": jnp.ones((3, 4))}
    specs = {"w": P("data", "model"), "u": P()}
    grads = {"w": 1e-12 * params["w"], "u": params["u"]}
    tx = adamx.monitor(adamx.adam_mini(0.1), every=1, groups=("*",))
    update = jax.jit(sharded(adamx.in_shard_map(tx, specs), params, specs))
    _, state = update(grads, tx.init(params), params)
    assert adamx.statistics(state)["eps_share/*"] == pytest.approx(0.6)  # 6 of 6 + 4 numbers


def test_steps_between_run_inside_too():
    tx = adamx.in_shard_map(adamx.accumulate(adamx.sgd(0.1), 4), P())
    between = tx.between()
    assert between is not None
    assert (between.every, type(between.tx)) == (4, adamx.in_shard_map)


# ------------------------------------------------------------------------------ without it


def warned(tx, **options):
    """Return what a step inside shard_map says, traced and not compiled."""
    specs = dict.fromkeys(SPECS, P("data", "model"))
    shapes = {"w": (4, 6), "u": (2, 4), "r": (2, 2)}
    grads = numbers(1, shapes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        update = sharded(tx, grads, specs, **options)
        said = []
        try:
            jax.eval_shape(update, grads, tx.init(grads), grads)
        except ValueError as error:
            said.append(str(error))
    return "".join(said + [str(w.message) for w in caught if w.category is adamx.ShardWarning])


@pytest.mark.usefixtures("promotion_of_foreign_stages")
@fast_for(*MECHANISMS, "adamw", "accumulate", "schedule_free")
def test_what_reads_a_whole_leaf_or_tree_says_so_and_the_rest_is_silent(name):
    case = TRANSFORMATIONS[name]
    tx = case.make()
    said = warned(tx)
    assert bool(said) == case.whole
    assert not said or "adamx.in_shard_map(tx, specs)" in said
    assert not said or case.varied or "['data', 'model']" in said
    assert not warned(adamx.in_shard_map(tx, P("data", "model")))


def test_a_warning_can_be_ignored_and_jax_has_to_know():
    assert "shard" in warned(adamx.clip_by_rms(1.0))
    assert not warned(adamx.clip_by_rms(1.0), check_vma=False)
    inner = adamx.in_shard_map(adamx.clip_by_rms(1.0), P("data"))
    assert "['model']" in warned(inner)  # its gradients differ along an axis that no spec names


@pytest.mark.parametrize("name", ["skipped", "grad_norm", "monitor"])
def test_an_entry_that_would_differ_between_devices_is_an_error(name):
    tx = {
        "skipped": adamx.skip_nonfinite(adamx.sgd(0.1)),
        "grad_norm": CLIP(),
        "monitor": adamx.monitor(adamx.sgd(0.1), every=1),
    }[name]
    assert f"state['{name}'] would differ along the mesh axes ['data', 'model']" in warned(tx)


# ------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("specs", "error", "match"),
    [
        (3, TypeError, "specs must be a PartitionSpec or names of mesh axes"),
        ({"w": 3}, TypeError, "got 3 for 'w'"),
        ({3: P()}, TypeError, "a pattern must be a string"),
        (P(P.UNCONSTRAINED), TypeError, "specs must be"),
        ({}, ValueError, "at least one spec"),
        (P("data", "data"), ValueError, r"PartitionSpec\('data', 'data'\) has an axis twice"),
    ],
)
def test_specs_that_are_none(specs, error, match):
    with pytest.raises(error, match=match):
        adamx.in_shard_map(adamx.sgd(0.1), specs)


@pytest.mark.parametrize(
    ("specs", "match"),
    [
        ({"w": P()}, "leaf 'b' has no spec"),
        ({"*": P(), "v": P()}, "'v'"),
        (P(None, "data"), r"leaf 'b' has the shape \[3\], and its spec .* is for 2 dimensions"),
    ],
)
def test_specs_that_do_not_fit_the_tree(specs, match):
    with pytest.raises(ValueError, match=match):
        adamx.in_shard_map(adamx.sgd(0.1), specs).init({"w": jnp.ones((2, 3)), "b": jnp.ones(3)})


def test_there_has_to_be_such_an_axis():
    tx, w = adamx.in_shard_map(adamx.adamw(0.1), P("data")), jnp.ones(4)
    state = tx.init(w)
    with pytest.raises(ValueError, match="there is no mesh axis 'data' here: call update in"):
        tx.update(w, state, w)


def test_sums_over_some_axes_need_a_spec():
    w = jnp.ones((2, 3))
    tx = adamx.in_shard_map(adamx.adam_mini(0.1), "rows")
    update = jax.vmap(lambda _: tx.update(w, tx.init(w), w)[0], axis_name="rows", axis_size=2)
    with pytest.raises(ValueError, match=r"over the axes \[0\] of an array with 2 .*PartitionSpec"):
        jax.eval_shape(update, jnp.zeros(2))


def test_it_stands_around_the_whole_optimizer():
    with pytest.raises(ValueError, match=r"write in_shard_map\(chain\(...\), ...\)"):
        adamx.chain(adamx.in_shard_map(CLIP(), P()), adamx.sgd(0.1))
    with pytest.raises(TypeError, match="in_shard_map: tx must be an adamx or Optax"):
        adamx.in_shard_map(P("data"), CLIP())  # pyright: ignore


@pytest.mark.parametrize("spec", [P("data"), P("data", "model"), P(("data", "model"))], ids=str)
@pytest.mark.usefixtures("quick_compiler")
def test_factors_for_each_layer_or_element_are_divided_like_the_leaf(spec):
    numbers = jnp.arange(32.0).reshape(4, 8)
    for factor in (numbers, numbers[:, :1], numbers[:1]):
        tx = adamx.chain(adamx.sgd(1.0), adamx.scale_by_path({"w": factor}))
        inside, specs = adamx.in_shard_map(tx, {"w": spec}), {"w": spec}
        update = jax.shard_map(
            lambda g, tx=inside: tx.update(g, tx.init(g))[0],
            mesh=grid(),
            in_specs=(specs,),
            out_specs=specs,
        )
        got = jax.jit(update)({"w": numbers})["w"]
        np.testing.assert_array_equal(
            got, tx.update({"w": numbers}, tx.init({"w": numbers}))[0]["w"]
        )
