"""Layouts over eight devices: equal parameters, the bytes each device holds, what communicates."""

import functools
import re
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import devices, mesh_of, thinned
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from table import TRANSFORMATIONS, every, of_each_kind

import adamx
from adamx.core.stacked import each_layer

KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda k: k.name)

# by layout: the specs of a matrix and a vector, and the axis over which slots are divided beyond
LAYOUTS = {
    "replicated": (P(), P(), None),
    "fsdp": (P("data"), P("data"), None),
    "tensor_parallel": (P(None, "model"), P("model"), None),
    "fsdp_and_tensor_parallel": (P("data", "model"), P(("data", "model")), None),
    "zero1": (P(), P(), "data"),
    "zero1_and_tensor_parallel": (P(None, "model"), P("model"), "data"),
}
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)

OPTIMIZERS = {
    "adamw": lambda: adamx.adamw(1e-2, weight_decay=0.1),
    "packed16": lambda: adamx.adamw(1e-2, moments="packed16"),
    "packed8": lambda: adamx.adamw(1e-2, moments="packed8"),
    "masters": lambda: adamx.master_weights(adamx.adamw(1e-2)),
    "guard": lambda: adamx.skip_nonfinite(adamx.adamw(1e-2)),
    "accumulate": lambda: adamx.accumulate(adamx.adamw(1e-2), 2),
    "groups": lambda: adamx.by_path({"b": None}, default=adamx.adamw(1e-2)),
    "schedule": lambda: adamx.adamw(optax.linear_schedule(1e-2, 1e-3, 10), weight_decay=0.1),
}


def grid(kind=AxisType.Auto):
    return mesh_of((4, 2), ("data", "model"), kind)


def numbers(seed, dtype=jnp.float32):
    generator = np.random.default_rng(seed)
    shapes = {"w": (16, 32), "b": (32,)}
    return {name: jnp.asarray(generator.normal(size=s), dtype) for name, s in shapes.items()}


def placed(layout, kind=AxisType.Auto, dtype=jnp.float32):
    """Return the parameters in a layout, and the axis for the slots."""
    matrix, vector, over = LAYOUTS[layout]
    specs = {"w": matrix, "b": vector}
    mesh = grid(kind)
    params = numbers(0, dtype)
    return {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in params.items()}, over


def in_layout(tx, layout, kind=AxisType.Auto, dtype=jnp.float32):
    """Return the step, the parameters and the state of a layout."""
    params, over = placed(layout, kind, dtype)
    of_params = jax.tree.map(lambda x: x.sharding, params)
    of_state = adamx.state_sharding(tx, params, over=over)
    step = adamx.make_step(tx, out_shardings=(of_params, of_state))
    return step, params, jax.jit(tx.init, out_shardings=of_state)(params)


def gradients(step, params):
    return jax.tree.map(
        lambda g, p: jax.device_put(g.astype(p.dtype), p.sharding), numbers(100 + step), params
    )


def collectives(hlo):
    """Return the kind and shape of everything that communicates in a compiled program."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", hlo)
    shapes = ((kind, shape) for what, kind in found for shape in re.findall(r"\w+\[[\d,]*\]", what))
    return sorted(shapes)


def pairs():
    """Yield all pairs: fast is one for each optimizer, in which all layouts come."""
    for i, optimizer in enumerate(OPTIMIZERS):
        for j, layout in enumerate(LAYOUTS):
            fast = (i + j) % len(LAYOUTS) == 0 and i < len(LAYOUTS)
            yield pytest.param(optimizer, layout, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(("optimizer", "layout"), [*pairs()])
def test_every_layout_ends_at_the_parameters_of_one_device(optimizer, layout):
    # an update is elementwise, stochastic rounding a hash of values: the same bits anywhere, where
    # a device holds several elements (of one alone, JAX 0.12 contracts a product and a sum
    # otherwise) and no two products are added whose factors are known only in the step (LAST_BIT)
    dtype = jnp.bfloat16 if optimizer == "masters" else jnp.float32
    tx = OPTIMIZERS[optimizer]()
    single, alone, kept = adamx.make_step(tx), numbers(0, dtype), tx.init(numbers(0, dtype))
    step, params, state = in_layout(tx, layout, dtype=dtype)
    before = jax.tree.map(lambda x: x.sharding, (params, state))
    for t in range(4):
        params, state = step(params, state, gradients(t, params))
        alone, kept = single(alone, kept, gradients(t, alone))
    jax.tree.map(np.testing.assert_array_equal, params, alone)
    jax.tree.map(np.testing.assert_array_equal, state, kept)
    assert jax.tree.map(lambda x: x.sharding, (params, state)) == before


FAST = "b1", "fsdp"
LAST_BIT = {
    "b1": lambda: adamx.adamw(1e-2, b1=optax.linear_schedule(0.9, 0.8, 10)),
    "b2": lambda: adamx.adamw(1e-2, b2=optax.linear_schedule(0.999, 0.99, 10)),
    "adan": lambda: adamx.adan(1e-2),
    "adopt": lambda: adamx.adopt(1e-2),
    "radam": lambda: adamx.radam(1e-2),
    "ema_of_params": lambda: adamx.chain(adamx.adamw(1e-2), adamx.ema_of_params(0.9)),
    "mean_of_params": lambda: adamx.chain(adamx.adamw(1e-2), adamx.mean_of_params()),
}


@pytest.mark.parametrize(
    ("optimizer", "layout"),
    [
        pytest.param(name, layout, marks=() if (name, layout) == FAST else pytest.mark.slow)
        for name in LAST_BIT
        for layout in ("fsdp", "zero1_and_tensor_parallel")
    ],
)
def test_what_adds_two_products_ends_there_but_for_last_bits(optimizer, layout):
    # Which product the compiler contracts with the sum depends on how many elements a device has.
    # A step then differs by a rounding of the other product, which is no larger than the largest
    # number here, or of the two that Adan adds: 2^-24 of that each. Their effect does not grow:
    # decays are below 1. A parameter is moved by lr times a ratio of such slots.
    tx, steps = LAST_BIT[optimizer](), 4
    single, alone, kept = adamx.make_step(tx), numbers(0), tx.init(numbers(0))
    step, params, state = in_layout(tx, layout)
    for t in range(steps):
        params, state = step(params, state, gradients(t, params))
        alone, kept = single(alone, kept, gradients(t, alone))
    for x, y in zip(*map(jax.tree.leaves, ((params, state), (alone, kept))), strict=True):
        largest = float(np.max(np.abs(y)))
        np.testing.assert_allclose(x, y, rtol=0, atol=2 * steps * 2.0**-24 * largest)


@functools.cache
def communicates(clipped, layout):
    """Return the collectives of AdamW's step in a layout, behind a clip or without one."""
    tx = adamx.adamw(1e-2)
    tx = adamx.chain(adamx.clip_by_global_norm(1.0), tx) if clipped else tx
    step, params, state = in_layout(tx, layout)
    return collectives(step.lower(params, state, params).compile().as_text())


@LAYOUT
def test_the_update_communicates_nothing_but_what_the_layout_needs(layout):
    needed = {
        # what the divided slots make of the parameters is gathered once, along the data axis
        "zero1": [("all-gather", "f32[16,32]"), ("all-gather", "f32[32]")],
        "zero1_and_tensor_parallel": [("all-gather", "f32[16,16]"), ("all-gather", "f32[16]")],
    }
    assert communicates(False, layout) == needed.get(layout, [])


@LAYOUT
def test_a_clip_communicates_one_number_beyond_that(layout):
    extra = list(communicates(True, layout))
    for item in communicates(False, layout):
        extra.remove(item)
    assert {shape for _, shape in extra} <= {"f32[]"}
    assert bool(extra) == (LAYOUTS[layout][0] != P())  # else each device has the whole gradient


def test_collectives_are_found():
    def sums(x, y):
        return jnp.sum(x), jnp.sum(y, 1)  # which XLA makes one operation of, with two results

    rows = NamedSharding(grid(), P("data"))
    x, y = (jax.device_put(jnp.ones(shape), rows) for shape in ((8,), (8, 4)))
    y = jax.device_put(y, NamedSharding(grid(), P(None, "data")))
    found = collectives(jax.jit(sums).lower(x, y).compile().as_text())
    assert found == [("all-reduce", "f32[8]"), ("all-reduce", "f32[]")]


@LAYOUT
def test_each_device_holds_the_bytes_of_its_layout(layout):
    _, _, state = in_layout(adamx.adamw(1e-2), layout)
    held = {
        name: sum(s.data.nbytes for x in jax.tree.leaves(state[name]) for s in x.addressable_shards)
        for name in ("mu", "nu")
    }
    whole = 4 * (16 * 32 + 32)
    parts = {
        "replicated": 1,
        "fsdp": 4,
        "tensor_parallel": 2,
        "fsdp_and_tensor_parallel": 8,
        "zero1": 4,
        "zero1_and_tensor_parallel": 8,
    }[layout]
    assert held == {"mu": 8 * whole // parts, "nu": 8 * whole // parts}
    first = [s for x in jax.tree.leaves(state["mu"]) for s in x.addressable_shards[:1]]
    assert sum(s.data.nbytes for s in first) == whole // parts


@KINDS
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_a_state_made_without_a_word_lies_beside_its_parameters(kind, compiled):
    tx = adamx.accumulate(adamx.master_weights(adamx.adamw(1e-2, moments="packed16")), 2)
    params, _ = placed("fsdp_and_tensor_parallel", kind, jnp.bfloat16)
    state = (jax.jit(tx.init) if compiled else tx.init)(params)
    for name in ("packed16", "remainder", "accumulated"):
        for key, param in params.items():
            assert state[name][key].sharding.is_equivalent_to(param.sharding, param.ndim)
    everywhere = NamedSharding(grid(kind), P())
    for name in ("count", "learning_rate", "micro_step"):
        assert state[name].sharding.is_equivalent_to(everywhere, 0)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_a_step_from_a_fresh_state_compiles_once(compiled):
    tx = adamx.adamw(1e-2)
    params, _ = placed("fsdp")
    state = (jax.jit(tx.init) if compiled else tx.init)(params)
    step = adamx.make_step(tx)
    for t in range(3):
        params, state = step(params, state, gradients(t, params))
    assert step._cache_size() == 1  # pyright: ignore


def test_optax_puts_a_compiled_state_on_one_device():
    params, _ = placed("fsdp")
    state = jax.jit(optax.adamw(1e-2).init)(params)
    assert len(state[0].mu["w"].devices()) == 1  # what the test before the last one is about


@every
def test_state_sharding_tells_where_a_state_lies(name):
    tx = TRANSFORMATIONS[name].make()
    mesh = grid()
    params = {"w": jax.device_put(jnp.ones((4, 3)), NamedSharding(mesh, P("data")))}
    told, shapes = adamx.state_sharding(tx, params), jax.eval_shape(tx.init, params)
    jax.tree.map(lambda where, x: where.shard_shape(x.shape), told, shapes)  # raises if it cannot
    for slot in tx.tree_names():
        for where, x in zip(*map(jax.tree.leaves, (told[slot], shapes[slot])), strict=True):
            if x.shape == (4, 3):
                assert where == params["w"].sharding
    others = {n: told[n] for n in set(told) - set(tx.tree_names())}
    assert all(len(where.device_set) == 8 for where in jax.tree.leaves(others))


def test_state_sharding_is_for_any_transformation_of_optax_too():
    params, _ = placed("fsdp_and_tensor_parallel")
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-3)))
    told = adamx.state_sharding(tx, params)
    state = jax.jit(tx.init, out_shardings=told)(params)
    moments = state[1][0]
    for tree in (moments.mu, moments.nu):
        assert jax.tree.map(lambda x: x.sharding, tree) == jax.tree.map(
            lambda x: x.sharding, params
        )
    assert len(moments.count.devices()) == 8
    # Optax keeps one number in the place of the row sums of so small a matrix
    rows = adamx.state_sharding(optax.scale_by_factored_rms(), params).v_row["w"]
    assert rows.spec == P() and len(rows.device_set) == 8


def test_all_of_the_state_is_on_the_device_of_parameters_on_one():
    device = devices(4)[3]
    params = jax.device_put({"w": jnp.ones((4, 4)), "b": jnp.ones(())}, device)
    told = adamx.state_sharding(adamx.adamw(1e-3), params)
    assert {where.device_set == {device} for where in jax.tree.leaves(told)} == {True}
    assert jax.tree.structure(told) == jax.tree.structure(adamx.adamw(1e-3).init(params))


def test_state_sharding_tells_slots_from_parameters_of_the_same_name():
    mesh = grid()
    row, column = NamedSharding(mesh, P("data")), NamedSharding(mesh, P(None, "model"))
    params = {"w": jax.device_put(jnp.ones((4, 4)), row)}
    params["mu"] = {"w": jax.device_put(jnp.ones((4, 4)), column)}
    told = adamx.state_sharding(adamx.adam(1e-3), params)
    assert told["mu"]["w"] == row
    assert told["mu"]["mu"]["w"] == told["nu"]["mu"]["w"] == column


def test_a_slot_that_is_shorter_along_an_axis_is_whole_there():
    params, _ = placed("fsdp_and_tensor_parallel")
    told = adamx.state_sharding(adamx.adam_mini(1e-3), params)
    assert told["nu_mean"]["w"].spec == P(None, "model")


def test_zero1_divides_the_first_dimension_that_can_be():
    mesh = grid()

    def spec(shape, before, over: Any = "data"):
        where = NamedSharding(mesh, before)
        params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)}
        return adamx.state_sharding(adamx.momentum(1e-3), params, over=over)["mu"]["w"].spec

    assert spec((4, 8), P()) == P("data", None)
    assert spec((3, 8), P()) == P(None, "data")
    assert spec((3, 8), P(None, "model")) == P(None, ("model", "data"))
    assert spec((8,), P(), over=("data", "model")) == P(("data", "model"))
    assert spec((8, 3), P("model"), over=("model", "data")) == P(("model", "data"), None)
    for shape, before in {
        (3, 4): P(None, "model"),  # 4 are not 8 parts
        (3, 5): P(),
        (4, 8): P(None, "data"),  # used already
    }.items():
        with pytest.warns(UserWarning, match="over='data' divides no slot"):
            assert spec(shape, before) == before


@pytest.mark.parametrize(
    "kind",
    [pytest.param(AxisType.Auto, marks=pytest.mark.slow), AxisType.Explicit],
    ids=lambda kind: kind.name,
)
@of_each_kind
# of ema_of_mean_squares, whose one slot has a number a row
@pytest.mark.filterwarnings("ignore:state_sharding. over='data' divides no slot")
@pytest.mark.usefixtures("quick_compiler", "promotion_of_foreign_stages")
def test_a_step_keeps_the_slots_divided_on_a_mesh_of_either_kind(name, kind):
    """Also a slot that is shorter than its parameter, which is whole along the divided axis.

    And the slots of 16-bit parameters, and those along whose axis the parameter is divided too.
    """
    mesh = mesh_of((4, 2), ("data", "model"), kind)
    tx, everywhere = TRANSFORMATIONS[name].make(), NamedSharding(mesh, P())
    params = {"w": jnp.ones((16, 8)), "b": jnp.ones(8), "h": jnp.ones((16, 8), jnp.bfloat16)}
    params = jax.device_put(params, everywhere)
    params["m"] = jax.device_put(jnp.ones(8), NamedSharding(mesh, P("model")))
    where = adamx.state_sharding(tx, params, over="data")
    state = jax.jit(tx.init, out_shardings=where)(params)
    step = adamx.make_step(tx, out_shardings=(jax.tree.map(lambda x: x.sharding, params), where))
    params, state = step(params, state, jax.tree.map(jnp.ones_like, params))
    for x, expected in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True):
        assert x.sharding.is_equivalent_to(expected, x.ndim)
    assert params["w"].sharding.is_fully_replicated


WHOLE_RUNS = {
    "guard, clip and sum": lambda: adamx.accumulate(
        adamx.skip_nonfinite(adamx.chain(adamx.clip_by_global_norm(1.0), adamx.adamw(1e-2))), 2
    ),
    "statistics of masters": lambda: adamx.monitor(
        adamx.master_weights(adamx.adamw(1e-2), "remainder8"), every=2
    ),
    "a sum of masters": lambda: adamx.accumulate(adamx.master_weights(adamx.adamw(1e-2)), 2),
    "averages": lambda: adamx.chain(adamx.adamw(1e-2), adamx.ema_of_params(0.5)),
    "schedule-free masters": lambda: adamx.master_weights(adamx.schedule_free_adamw(1e-2)),
}


@pytest.mark.parametrize("name", thinned(WHOLE_RUNS))
@pytest.mark.usefixtures("quick_compiler")
def test_on_a_mesh_with_explicit_axes_divided_slots_serve_everything_around_a_step(name):
    """Steps, masters, a reset, an adaptation: where slots are divided further than parameters."""
    mesh = mesh_of((4, 2), ("data", "model"), AxisType.Explicit)
    where = {"v": NamedSharding(mesh, P("model")), "w": NamedSharding(mesh, P(None, "model"))}
    tx, one = WHOLE_RUNS[name](), {n: jnp.ones((16, 8), jnp.bfloat16) for n in where}
    params = jax.device_put(one, where)
    over = adamx.state_sharding(tx, params, over="data")
    state = jax.jit(tx.init, out_shardings=over)(params)
    step, alone = adamx.make_step(tx, out_shardings=(where, over)), adamx.make_step(tx)
    kept = tx.init(one)
    for t in range(3):
        grads = jax.tree.map(lambda x, t=t: (x * (t + 0.5)).astype(x.dtype), one)
        params, state = step(params, state, jax.device_put(grads, where))
        one, kept = alone(one, kept, grads)
    for n in one:
        np.testing.assert_allclose(
            np.asarray(params[n], np.float32), np.asarray(one[n], np.float32), rtol=2.0**-8
        )
    if "master" in state:
        masters = adamx.masters(params, state)
        assert {x.dtype for x in jax.tree.leaves(masters)} == {np.dtype(jnp.float32)}
    again = adamx.reset(tx, state, params, "w")
    assert int(again["began"]["w"]["count"]) == int(state["count"])
    adapted, said = adamx.adapt_state(tx, params, state)
    assert said.filled == said.dropped == ()
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), adapted, state
    )


def updates_of(tx, params, grads):
    """Two steps from zeros; the gradients are moved between meshes inside jit, if at all."""
    _, state = tx.update(grads, tx.init(params), params)
    return tx.update(grads, state, params)[0]


def on_a_mesh(tree):
    where = NamedSharding(mesh_of((1,), ("data",), AxisType.Explicit), P(None))
    return jax.tree.map(lambda x: jax.sharding.reshard(x, where), tree)


def with_some_on_a_mesh(tx, which):
    """The step of a tree of which either the gradients or the parameters are on a mesh."""

    def step(params, grads):
        if which == "grads":
            return updates_of(tx, params, on_a_mesh(grads))
        return updates_of(tx, on_a_mesh(params), grads)

    return step


@of_each_kind
@pytest.mark.parametrize("which", ["grads", pytest.param("params", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("promotion_of_foreign_stages")
def test_arrays_on_a_mesh_with_explicit_axes_go_with_arrays_on_none(name, which):
    """As in a train step that computes gradients on a mesh from parameters made before it."""
    tx, params = TRANSFORMATIONS[name].make(), {"w": jnp.ones((4, 2)), "b": jnp.ones(2)}
    updates = jax.eval_shape(with_some_on_a_mesh(tx, which), params, params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize("turned", [False, True])
def test_layers_on_a_mesh_with_explicit_axes_go_with_layers_on_none(turned):
    """The mesh is that of the array that is on one, whichever comes first."""
    where = NamedSharding(mesh_of((1,), ("data",), AxisType.Explicit), P("data"))

    def added(x):
        pair = (x, jax.sharding.reshard(x, where))
        return each_layer(lambda _, a, b: a + b, (8,), (), *(pair[::-1] if turned else pair))

    x = jnp.arange(16.0).reshape(8, 2)
    np.testing.assert_array_equal(np.asarray(jax.jit(added)(x)), 2 * np.asarray(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in TRANSFORMATIONS.items() if case.kind])
@pytest.mark.parametrize("which", ["grads", "params"])
@pytest.mark.usefixtures("quick_compiler", "promotion_of_foreign_stages")
def test_arrays_on_a_mesh_give_the_values_of_arrays_on_none(name, which):
    """But for the order of sums and for fused operations: up to 8 ULPs in two steps."""
    tx = TRANSFORMATIONS[name].make()
    params = {"w": jnp.linspace(0.1, 1.0, 8).reshape(4, 2), "b": jnp.ones(2)}
    grads = jax.tree.map(lambda x: 0.5 * x, params)
    wanted = jax.jit(functools.partial(updates_of, tx))(params, grads)
    have = jax.jit(with_some_on_a_mesh(tx, which))(params, grads)
    for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2.0**-20, atol=1e-9)


ON_HOST = {
    "adamw": (lambda: adamx.adamw(1e-2), "nearest"),
    "stochastic rounding": (lambda: adamx.sgd(1e-2, momentum=0.5), "stochastic"),
    "programs between full steps": (
        lambda: adamx.monitor(adamx.accumulate(adamx.adamw(1e-2, moments="packed8"), 2), every=3),
        "nearest",
    ),
}


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="XLA cannot compile it for devices")
@pytest.mark.parametrize("name", thinned(ON_HOST, keep=3))
def test_slots_can_lie_in_the_memory_of_the_host(name):
    make, rounding = ON_HOST[name]
    tx, (params, _) = make(), placed("fsdp")
    on_host = adamx.state_sharding(tx, params, memory_kind="pinned_host")
    scalar = {"b": jax.device_put(jnp.ones(()), NamedSharding(grid(), P()))}
    stays = adamx.state_sharding(adamx.adamw(1e-2), scalar, memory_kind="pinned_host")
    assert stays["mu"]["b"] == scalar["b"].sharding
    kept = jax.jit(tx.init)(params)
    where = jax.tree.map(lambda x: x.sharding, (params, kept))
    state = jax.jit(tx.init, out_shardings=on_host)(params)
    same = jax.tree.map(jnp.copy, params)
    step = adamx.make_step(tx, rounding=rounding)
    alone = adamx.make_step(tx, rounding=rounding, out_shardings=where)
    for t in range(4):
        params, state = step(params, state, gradients(t, params))
        same, kept = alone(same, kept, gradients(t, same))
        jax.tree.map(lambda x, place: x.sharding == place or pytest.fail(), state, on_host)
    jax.tree.map(np.testing.assert_array_equal, (params, state), (same, kept))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=() if name.startswith("zero1") else pytest.mark.slow)
        for name in LAYOUTS
    ],
)
def test_a_data_parallel_training_ends_where_that_of_one_device_does(layout):
    # a linear model on 64 examples, 8 to a device: the sums of the gradient are in another order
    lr, eps, steps = 1e-2, 1e-2, 5
    tx = adamx.adamw(lr, eps=eps)
    generator = np.random.default_rng(7)
    x, y = generator.normal(size=(64, 16)), generator.normal(size=(64, 32))

    def train(params, state, x, y):
        loss = lambda p: jnp.mean(jnp.square(x @ p["w"] + p["b"][None] - y))  # noqa: E731
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return adamx.apply_updates(params, updates), state

    alone = numbers(0, jnp.float64)
    kept, single = tx.init(alone), jax.jit(train)
    params, over = placed(layout, dtype=jnp.float64)
    of_params = jax.tree.map(lambda x: x.sharding, params)
    of_state = adamx.state_sharding(tx, params, over=over)
    state = jax.jit(tx.init, out_shardings=of_state)(params)
    spread = jax.jit(train, out_shardings=(of_params, of_state))
    rows = NamedSharding(grid(), P("data"))
    ours = jax.device_put(x, rows), jax.device_put(y, rows)
    for _ in range(steps):
        alone, kept = single(alone, kept, jnp.asarray(x), jnp.asarray(y))
        params, state = spread(params, state, *ours)
    # One gradient is a sum of 64 products, of residuals that are sums of 17: either order is off
    # by at most 82 eps of the sum of magnitudes. An update moves by lr / eps * 2 of a change of the
    # gradient at most (numerator and root), a gradient by its Hessian of a change of the weights.
    unit = np.finfo(np.float64).eps
    largest = np.abs(y).max() + 17 * (np.abs(x).max() + 1) * (np.abs(numbers(0)["w"]).max() + 1)
    of_gradient = 2 * 82 * unit * 2 / 32 * np.abs(x).max() * largest
    hessian = 2 / (64 * 32) * np.abs(x.T @ x).sum(0).max()
    error = 0.0
    for _ in range(steps):
        error = error * (1 + 2 * lr / eps * hessian) + 2 * lr / eps * of_gradient + 4 * unit
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(alone), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= error
    assert error < 1e-9  # which is still far below one step
    moved = np.abs(np.asarray(params["w"]) - np.asarray(numbers(0, jnp.float64)["w"])).max()
    assert moved > lr  # it did train


def test_what_state_sharding_cannot_use_is_an_error():
    params, _ = placed("fsdp")
    tx = adamx.adamw(1e-3)
    with pytest.raises(TypeError, match="tx must be an adamx or Optax transformation, got int 1"):
        adamx.state_sharding(cast(Any, 1), params)
    with pytest.raises(ValueError, match=r"\['w'\] has no sharding"):
        adamx.state_sharding(tx, {"w": np.ones(3)})
    with pytest.raises(ValueError, match="which has no 'rows'"):
        adamx.state_sharding(tx, params, over="rows")
    with pytest.raises(ValueError, match=r"is on a mesh with axes \[\], which has no 'data'"):
        adamx.state_sharding(tx, {"w": jnp.ones(3)}, over="data")


@KINDS
@pytest.mark.parametrize("saved_by", [None, adamx.adamw(1e-3)], ids=["", "saved_by"])
def test_a_state_from_the_host_goes_where_its_parameters_are(kind, saved_by):
    params, _ = placed("fsdp_and_tensor_parallel", kind, jnp.float32)
    moments = "float32" if saved_by is None else "packed16"
    tx, fresh = adamx.adamw(1e-3, moments=moments), adamx.adamw(1e-3).init(params)
    wanted = tx.init(params)
    theirs = optax.adamw(1e-3).init(params)
    for saved in (jax.device_get(fresh), jax.device_put(jax.device_get(fresh), devices(4)[3])):
        state, _ = adamx.adapt_state(tx, params, saved, saved_by=saved_by)
        assert_like(state, wanted)
    if saved_by is None:
        for saved in (theirs, jax.device_get(theirs)):  # Optax's count is on one device
            assert_like(adamx.from_optax(saved, tx, params), wanted)
        group = {"params": [0, 1], "decoupled_weight_decay": True, "amsgrad": False}
        moments = {p: {k: np.ones(x.shape) for k in MOMENTS} for p, x in params.items()}
        of_torch = {i: {"step": 3 - i} | x for i, x in enumerate(moments.values())}
        names: Any = dict(zip(moments, of_torch, strict=True))
        torch = {"state": of_torch, "param_groups": [group]}
        late = adamx.from_torch(torch, tx, params, names=names)
        began = adamx.state_sharding(tx, params, state=late)
        assert list(late["began"]) == [list(names)[1]] and jax.tree.leaves(began["began"])
        for x, where in zip(*map(jax.tree.leaves, (late, began)), strict=True):
            assert x.sharding.is_equivalent_to(where, x.ndim)
        step: Any = adamx.make_step(tx)
        step(jax.tree.map(jnp.copy, params), state, params)
        assert step._cache_size() == 1


MOMENTS = ("exp_avg", "exp_avg_sq")


def assert_like(state, wanted):
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    for x, y in zip(*map(jax.tree.leaves, (state, wanted)), strict=True):
        assert x.dtype == y.dtype and x.sharding.is_equivalent_to(y.sharding, x.ndim)
