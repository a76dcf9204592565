"""`audit`: every fault of a train step is found, named and advised on, and the advice helps."""

import warnings
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import devices, mesh_of, on_cpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import adamx
from adamx.inspect.program import bytes_accessed, kernels
from adamx.inspect.text import Text

pytestmark = pytest.mark.usefixtures("plain_jax")

SHAPE = (64, 48)
SIZE = 64 * 48 + 48
LIKE = {"w": jax.ShapeDtypeStruct(SHAPE, jnp.float32), "b": jax.ShapeDtypeStruct((48,), "float32")}
HALF = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), LIKE)
SCALARS = 256  # bytes for count, learning rate and the factors of bias correction


def steps(tx):
    """Return the plain step in both orders."""

    def right(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def wrong(grads, state, params):
        return right(params, state, grads)

    return right, wrong


def abstract(tx, like: Any = LIKE):
    return jax.eval_shape(tx.init, like)


def check_ok(found):
    assert found.ok and found.advice == (), str(found)
    assert str(found).splitlines()[0].endswith(": ok")


def only_advice(found):
    assert not found.ok
    (advice,) = found.advice
    assert f"1. {advice}" in " ".join(str(found).split())
    assert "1 thing to change" in str(found) and max(map(len, str(found).splitlines())) <= 100
    return advice


# --- In place -------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", [adamx, optax], ids=["adamx", "optax"])
def test_the_right_order_is_in_place(package):
    tx = package.adamw(1e-3)
    found = adamx.audit(jax.jit(steps(tx)[0], donate_argnums=(0, 1)), LIKE, abstract(tx), LIKE)
    check_ok(found)
    assert found.copies == ()
    assert found.donated == found.in_place == 6  # w and b of params, mu and nu
    assert found.devices == 1 and found.program == "jit_right"


TRANSFORMATIONS = {
    "clip and guard": adamx.skip_nonfinite(
        adamx.chain(adamx.clip_by_global_norm(1.0), adamx.adamw(1e-3))
    ),
    "packed16": adamx.adamw(1e-3, moments="packed16"),
    "trace": optax.sgd(0.1, momentum=0.9),
    "sgd": optax.sgd(0.1),
    "lion": optax.lion(1e-3),
    "schedule-free": adamx.schedule_free_adamw(1e-3),
    "guard with branches": optax.apply_if_finite(optax.adamw(1e-3), 3),
}


@pytest.mark.parametrize("tx", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
def test_nothing_is_wrong_with_any_optimizer_in_the_right_order(tx):
    found = adamx.audit(adamx.make_step(tx), LIKE, abstract(tx), LIKE)
    check_ok(found)
    assert found.in_place == found.donated


@pytest.mark.parametrize(
    ("tx", "like"),
    [
        (adamx.adan(1e-3), LIKE),
        (adamx.mars(1e-3), LIKE),
        (adamx.master_weights(adamx.adan(1e-3)), HALF),
    ],
    ids=["adan", "mars", "masters"],
)
def test_a_slot_that_is_the_gradient_follows_the_slot_not_the_gradient(tx, like):
    found = adamx.audit(adamx.make_step(tx), like, abstract(tx, like), like)
    assert found.ok and found.advice == (), found.advice


def test_parameters_that_were_those_before_follow_them():
    tx = adamx.adamw(1e-3)

    def step(params, state, grads):
        grads = jax.tree.map(lambda g, p, q: g + 0.5 * (p - q), grads, params, state["before"])
        updates, new = tx.update(grads, state["own"], params)
        return adamx.apply_updates(params, updates), {"own": new, "before": params}

    state = {"own": abstract(tx), "before": LIKE}
    found = adamx.audit(jax.jit(step, donate_argnums=(0, 1)), LIKE, state, LIKE)
    assert found.ok, found.advice


def test_masters_of_16_bit_parameters_are_in_place():
    tx = adamx.master_weights(adamx.adamw(1e-3))
    found = adamx.audit(adamx.make_step(tx), HALF, abstract(tx, HALF), HALF)
    check_ok(found)
    assert found.in_place == found.donated == 8


def test_steps_in_a_scan_are_in_place():
    tx = optax.adamw(1e-3)

    def right(params, state, grads):
        return jax.lax.scan(lambda c, g: (steps(tx)[0](*c, g), None), (params, state), grads)[0]

    def wrong(state, params, grads):
        return right(params, state, grads)

    many = jax.tree.map(lambda x: jax.ShapeDtypeStruct((4, *x.shape), x.dtype), LIKE)
    check_ok(adamx.audit(jax.jit(right, donate_argnums=(0, 1)), LIKE, abstract(tx), many))
    found = adamx.audit(jax.jit(wrong, donate_argnums=(0, 1)), abstract(tx), LIKE, many)
    assert "Donate (params, state)" in only_advice(found)
    kept = adamx.audit(jax.jit(right), LIKE, abstract(tx), many)
    assert only_advice(kept).startswith("params, state could be updated in place")


# --- Every fault, and what to do about it ---------------------------------------------------------


def test_arguments_in_the_wrong_order_are_found_named_and_put_right():
    on_cpu("XLA for GPU copies results, not arguments")
    tx = adamx.adamw(1e-3)
    right, wrong = steps(tx)
    found = adamx.audit(jax.jit(wrong, donate_argnums=(1, 2)), LIKE, abstract(tx), LIKE)
    advice = only_advice(found)
    assert "result/0/b is written over state/mu/b" in advice
    assert "Donate (params, state) and return them in that order" in advice
    assert "the step should take (params, state, grads)" in advice
    assert found.in_place == 0
    # nu and params are saved from being overwritten, and mu and nu brought to their places
    assert {copy.argument for copy in found.copies if copy.argument} == {
        f"{name}/{leaf}" for name in ("state/nu", "params") for leaf in "wb"
    }
    assert {copy.result for copy in found.copies if copy.result} == {
        f"result/1/{name}/{leaf}" for name in ("mu", "nu") for leaf in "wb"
    }
    assert len(found.copies) == 8
    assert "    f32[64,48] of params/w" in str(found).splitlines()
    check_ok(adamx.audit(jax.jit(right, donate_argnums=(0, 1)), LIKE, abstract(tx), LIKE))


def test_gradients_that_are_donated_in_front_take_the_place_of_the_params():
    tx = optax.sgd(0.1)
    _, wrong = steps(tx)
    found = adamx.audit(jax.jit(wrong, donate_argnums=(0, 1, 2)), LIKE, abstract(tx), LIKE)
    advice = only_advice(found)
    assert "result/0/w is written over grads/w" in advice
    assert "Donate params alone" in advice
    check_ok(adamx.audit(jax.jit(wrong, donate_argnums=2), LIKE, abstract(tx), LIKE))


def test_what_is_not_made_element_by_element_is_known_by_its_path():
    square = jax.ShapeDtypeStruct((64, 64), jnp.float32)

    def wrong(state, params):
        return {"p": params["p"] @ params["p"]}, {"q": state["q"] @ state["q"]}

    found = adamx.audit(jax.jit(wrong, donate_argnums=(0, 1)), {"q": square}, {"p": square})
    assert "the step should take (params, state)" in only_advice(found)

    def right(params, state):
        return wrong(state, params)

    check_ok(adamx.audit(jax.jit(right, donate_argnums=(0, 1)), {"p": square}, {"q": square}))


@pytest.mark.parametrize("order", ["right", "wrong"])
def test_what_is_not_donated_and_could_be_is_named(order):
    tx = optax.adamw(1e-3)
    right, wrong = steps(tx)
    step, names = (right, "params, state") if order == "right" else (wrong, "state, params")
    advice = only_advice(adamx.audit(jax.jit(step), LIKE, abstract(tx), LIKE))
    assert advice.startswith(f"{names} could be updated in place")
    assert "Donate (params, state) and" in advice  # and not the gradients, of the same shapes
    assert ("should take (params, state, grads)" in advice) == (order == "wrong")
    check_ok(adamx.audit(jax.jit(right, donate_argnums=(0, 1)), LIKE, abstract(tx), LIKE))


@pytest.mark.parametrize("tx", [optax.adamw(1e-3), adamx.adamw(1e-3, moments="packed16")])
def test_what_was_forgotten_alone_is_named(tx):
    right, _ = steps(tx)
    found = adamx.audit(jax.jit(right, donate_argnums=0), LIKE, abstract(tx), LIKE)
    assert only_advice(found).startswith("state could be updated in place")


def test_what_is_in_the_wrong_order_and_what_is_forgotten_are_one_thing_to_change():
    tx = adamx.momentum(0.1)

    def wrong(average, state, params, grads):
        params, state = steps(tx)[0](params, state, grads)
        average = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, average, params)
        return params, state, average

    found = adamx.audit(jax.jit(wrong, donate_argnums=(1, 2)), LIKE, abstract(tx), LIKE, LIKE)
    assert "the step should take (params, state, average, grads)" in only_advice(found)


def test_what_is_donated_in_vain_is_reported_and_not_warned_of():
    tx = optax.adamw(1e-3)
    right, _ = steps(tx)
    step = jax.jit(right, donate_argnums=(0, 1, 2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = adamx.audit(step, LIKE, abstract(tx), LIKE)
    assert not caught
    advice = only_advice(found)
    assert advice.startswith("No result takes the memory of the donated grads:")
    assert advice.endswith("Do not donate it.")
    check_ok(adamx.audit(jax.jit(right, donate_argnums=(0, 1)), LIKE, abstract(tx), LIKE))


def test_another_warning_comes_through():
    def step(params):
        warnings.warn("mind the gap", stacklevel=1)
        return jax.tree.map(lambda p: p + 1, params)

    with pytest.warns(UserWarning, match="mind the gap"):
        check_ok(adamx.audit(jax.jit(step, donate_argnums=0), LIKE))


@pytest.mark.parametrize("donated", [(), (0,)])
def test_parameters_that_come_out_wider_are_named(donated):
    def step(params, grads):
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    def cast(params, grads):
        return adamx.apply_updates(params, jax.tree.map(lambda g: -0.1 * g, grads))

    advice = only_advice(adamx.audit(jax.jit(step, donate_argnums=donated), HALF, LIKE))
    assert "params/w goes in as bfloat16[64,48], comes out as float32[64,48]" in advice
    check_ok(adamx.audit(jax.jit(cast, donate_argnums=0), HALF, LIKE))


def test_a_parameter_that_changes_its_shape_is_named():
    def step(params, grads):
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    one, batch = ({"w": jax.ShapeDtypeStruct(s, jnp.float32)} for s in ((3,), (5, 3)))
    advice = only_advice(adamx.audit(jax.jit(step, donate_argnums=0), one, batch))
    assert "params/w goes in as float32[3], comes out as float32[5,3]" in advice
    check_ok(adamx.audit(jax.jit(step, donate_argnums=0), one, one))


def test_a_state_that_starts_from_a_python_number_is_named_and_does_compile_twice():
    def count_up(params, state):
        count = state["count"] + jnp.int32(1)
        return jax.tree.map(lambda p: p - 0.1 / count, params), {"count": count}

    step: Any = jax.jit(count_up, donate_argnums=(0, 1))
    advice = only_advice(adamx.audit(step, LIKE, {"count": 0}))
    assert advice.startswith("state/count has the dtype of a Python number")
    check_ok(adamx.audit(step, LIKE, {"count": jnp.zeros((), jnp.int32)}))

    def compiled(count):
        step.clear_cache()
        carry = ({"w": jnp.ones(3)}, {"count": count})
        for _ in range(3):
            carry = step(*carry)
        return step._cache_size()

    assert compiled(0) == 2
    assert compiled(jnp.zeros((), jnp.int32)) == 1


def sharded():
    mesh = mesh_of((2,), ("d",))
    split, whole = NamedSharding(mesh, P("d")), NamedSharding(mesh, P())
    tx = adamx.adamw(1e-3)
    params, state = (
        jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split if x.ndim else whole),
            tree,
        )
        for tree in (LIKE, abstract(tx))
    )
    return tx, params, state, whole


def test_a_step_on_two_devices_is_read_device_by_device():
    tx, params, state, _ = sharded()
    found = adamx.audit(adamx.make_step(tx), params, state, params)
    check_ok(found)
    assert found.devices == 2 and "2 cpu devices, bytes on each" in str(found)
    assert found.params == ("params", SIZE // 2)
    assert 28 * SIZE // 2 <= found.floor_bytes <= 28 * SIZE // 2 + SCALARS
    wrong = jax.jit(steps(tx)[1], donate_argnums=(1, 2))
    found = adamx.audit(wrong, params, state, params)
    assert "Donate (params, state)" in only_advice(found)
    assert "f32[32,48]" in {copy.array for copy in found.copies}


@pytest.mark.parametrize("donated", [(0, 1), (0,)])
def test_a_state_that_comes_out_sharded_otherwise_is_named(donated):
    tx, params, state, whole = sharded()
    right, _ = steps(tx)

    def gathered(params, state, grads):
        params, state = right(params, state, grads)
        return params, jax.lax.with_sharding_constraint(state, whole)

    found = adamx.audit(jax.jit(gathered, donate_argnums=donated), params, state, params)
    advice = only_advice(found)
    assert "state/mu/w goes in on " in advice and "out_shardings" in advice
    kept = jax.jit(
        lambda params, state, grads: gathered(params, state, grads),
        donate_argnums=(0, 1),
        out_shardings=jax.tree.map(lambda x: x.sharding, (params, state)),
    )
    check_ok(adamx.audit(kept, params, state, params))


# --- Where there is nothing to change -------------------------------------------------------------


def test_an_update_alone_asks_for_its_state_only():
    tx = adamx.adamw(1e-3)
    advice = only_advice(adamx.audit(jax.jit(tx.update), LIKE, abstract(tx), LIKE))
    assert advice.startswith("state could be") and "Donate state alone" in advice


def test_gradients_that_give_their_memory_to_the_new_params_are_no_fault():
    def step(grads, params):
        return jax.tree.map(lambda g, p: p - 0.1 * g, grads, params)

    check_ok(adamx.audit(jax.jit(step, donate_argnums=0), LIKE, LIKE))


def test_memory_lent_to_an_unrelated_result_is_no_fault():
    square = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    check_ok(adamx.audit(jax.jit(lambda x, y: x @ y, donate_argnums=0), square, square))


def test_small_results_of_a_batch_are_let_be():
    def step(params, y):
        return jax.tree.map(lambda p: p + 1, params), (y - params["b"][0]) ** 2

    y = jax.ShapeDtypeStruct((7,), jnp.float32)  # of 3120 parameters
    check_ok(adamx.audit(jax.jit(step, donate_argnums=0), LIKE, y))


def network(params, x):
    return jnp.mean((jnp.tanh(x @ params["w"] + params["b"]) @ params["w"].T) ** 2)


def test_a_whole_train_step_keeps_the_copies_that_are_the_compilers():
    tx = optax.adamw(1e-3)

    def train(params, state, x):
        value, grads = jax.value_and_grad(network)(params, x)
        return *steps(tx)[0](params, state, grads), value

    def wrong(state, params, x):
        return train(params, state, x)

    x = jax.ShapeDtypeStruct((16, 64), jnp.float32)
    found = adamx.audit(jax.jit(train, donate_argnums=(0, 1)), LIKE, abstract(tx), x)
    check_ok(found)
    assert found.in_place == found.donated == 6
    assert not {copy.result for copy in found.copies} - {None}
    assert ("copies are the compiler's" in str(found)) == bool(found.copies)
    # params, mu, nu read and written, x read; no argument holds the gradient
    assert found.floor_bytes == pytest.approx(24 * SIZE + 4 * 16 * 64, abs=SCALARS)
    found = adamx.audit(jax.jit(wrong, donate_argnums=(0, 1)), abstract(tx), LIKE, x)
    assert "the step should take (params, state, x)" in only_advice(found)


# --- The numbers ----------------------------------------------------------------------------------


def test_the_bytes_are_those_of_the_compiled_program():
    on_cpu("a GPU aligns scalars to 64 bytes or more")
    tx = adamx.adamw(1e-3)
    _, wrong = steps(tx)
    compiled = jax.jit(wrong, donate_argnums=(1, 2)).lower(LIKE, abstract(tx), LIKE).compile()
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    assert cost and memory
    found = adamx.audit(compiled)
    # XLA's own count takes a scalar that a kernel uses twice, twice
    assert found.bytes_accessed == pytest.approx(cost["bytes accessed"], abs=SCALARS)
    assert found.temp_bytes == memory.temp_size_in_bytes >= 4 * SIZE
    in_place = adamx.audit(adamx.make_step(tx), LIKE, abstract(tx), LIKE)
    assert in_place.temp_bytes is not None and in_place.temp_bytes <= SCALARS
    assert in_place.params == ("params", SIZE)


def test_the_floor_counts_arguments_and_results_once():
    tx = adamx.sgd(0.1)
    found = adamx.audit(adamx.make_step(tx), LIKE, abstract(tx), LIKE)
    # p and g, count and learning rate read, all but g written
    assert found.floor_bytes == 12 * SIZE + 8 + 8
    undonated = adamx.audit(jax.jit(steps(tx)[0]), LIKE, abstract(tx), LIKE)
    assert undonated.floor_bytes == found.floor_bytes


def test_what_is_handed_through_in_place_counts_nothing():
    def step(params, frozen):
        return jax.tree.map(lambda p: p + 1, params), frozen

    found = adamx.audit(jax.jit(step, donate_argnums=(0, 1)), LIKE, LIKE)
    check_ok(found)
    assert found.floor_bytes == 8 * SIZE


def test_nothing_is_allocated_for_shapes():
    tx = adamx.adamw(1e-3)
    like = jax.ShapeDtypeStruct((2**38,), jnp.float32)  # a terabyte
    before = len(jax.live_arrays())
    found = adamx.audit(adamx.make_step(tx), like, abstract(tx, like), like)
    assert len(jax.live_arrays()) == before
    check_ok(found)
    assert found.floor_bytes == pytest.approx(28 * 2**38, abs=SCALARS)


def test_the_arguments_survive_and_nothing_is_run():
    ran = []

    def step(params):
        jax.debug.callback(lambda: ran.append(1))
        return params + 1

    params = jnp.ones(3)
    adamx.audit(jax.jit(step, donate_argnums=0), params)
    jax.effects_barrier()
    assert not ran
    np.testing.assert_array_equal(params, np.ones(3))


# --- For a device -------------------------------------------------------------------------------


def test_arrays_are_compiled_for_the_device_that_is_asked_for():
    tx, device = adamx.adamw(1e-3), devices(2)[1]
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), LIKE)
    seen = []

    def lower(*args, **kwargs):
        seen.extend(jax.tree.leaves((args, kwargs)))
        return adamx.make_step(tx).lower(*args, **kwargs)

    step = SimpleNamespace(lower=lower)
    found = adamx.audit(step, params, tx.init(params), grads=params, device=device)
    check_ok(found)
    assert found.devices == 1 and found.in_place == 6
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in seen)
    assert all(x.sharding.device_set == {device} for x in seen)


def test_a_python_number_stays_one_on_a_device():
    step = jax.jit(lambda w, rate: jax.tree.map(lambda x: x * rate, w), donate_argnums=0)
    check_ok(adamx.audit(step, LIKE, 0.5, device=jax.devices()[0]))


def test_what_is_no_device_is_refused_with_the_remedy():
    step = jax.jit(lambda w: w)
    with pytest.raises(TypeError, match=r"audit: device must be a jax\.Device, .* got 'tpu'"):
        adamx.audit(step, LIKE, device="tpu")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"audit: step is already lowered .* no device"):
        adamx.audit(step.lower(LIKE), device=jax.devices()[0])


# --- Whatever is jitted ---------------------------------------------------------------------------


def test_accumulation_is_reported_by_the_program_that_would_run():
    tx = adamx.accumulate(adamx.adamw(1e-3), every=4)
    step, state = adamx.make_step(tx), abstract(tx)
    found = adamx.audit(step, LIKE, state, LIKE)
    check_ok(found)
    assert found.program == "jit_step"
    first = adamx.audit(step, LIKE, state | {"micro_step": jnp.int32(0)}, LIKE)
    check_ok(first)
    assert first.program == "jit_between_steps"
    # reads the sum and g, writes the sum
    assert first.floor_bytes == pytest.approx(12 * SIZE, abs=SCALARS)


def test_lowered_and_compiled_steps_are_read_as_they_are():
    tx = optax.adamw(1e-3)
    arguments = LIKE, abstract(tx), LIKE
    lowered = jax.jit(steps(tx)[1], donate_argnums=(1, 2)).lower(*arguments)
    found = adamx.audit(lowered)
    assert found == adamx.audit(lowered.compile())
    assert "Donate (params, state)" in only_advice(found)
    with pytest.raises(TypeError, match=r"audit: step is already lowered or compiled .* got 3"):
        adamx.audit(lowered, *arguments)


@pytest.mark.parametrize("step", [lambda params: params, "jit", 3])
def test_a_step_that_is_not_jitted_is_refused_with_the_remedy(step):
    with pytest.raises(TypeError, match=r"audit: step must be .*jax\.jit\(step, donate_argnums"):
        adamx.audit(step, LIKE)


def test_keyword_arguments_are_named_too():
    def step(*, params, grads):
        return jax.tree.map(lambda p, g: p - g, params, grads)

    advice = only_advice(adamx.audit(jax.jit(step), params=LIKE, grads=LIKE))
    assert advice.startswith("params could be updated")
    check_ok(adamx.audit(jax.jit(step, donate_argnames="params"), params=LIKE, grads=LIKE))


def test_constants_of_the_step_do_not_shift_the_arguments():
    table = jnp.arange(64.0 * 48).reshape(SHAPE)

    def step(grads, w):
        return w - table * grads

    found = adamx.audit(jax.jit(step, donate_argnums=(0, 1)), LIKE["w"], LIKE["w"])
    assert "result is written over grads" in only_advice(found)
    # grads and w read, w written; the table is no argument
    assert found.floor_bytes == 12 * 64 * 48


def test_a_step_of_equinox_is_read():
    eqx = pytest.importorskip("equinox")
    mlp = eqx.nn.MLP(3, 2, width_size=8, depth=1, key=jax.random.key(0))
    tx = adamx.adamw(1e-2)
    state = tx.init(eqx.filter(mlp, eqx.is_inexact_array))
    x = jnp.ones((4, 3))

    def step(x, mlp, state):
        grads = eqx.filter_grad(lambda m: jnp.mean(jax.vmap(m)(x) ** 2))(mlp)
        updates, state = tx.update(grads, state, mlp)
        return eqx.apply_updates(mlp, updates), state

    def swapped(x, state, mlp):
        return step(x, mlp, state)

    kept = adamx.audit(eqx.filter_jit(step), x, mlp, state)
    assert "could be updated in place" in only_advice(kept)
    wrong = adamx.audit(eqx.filter_jit(swapped, donate="all-except-first"), x, state, mlp)
    assert "result/1/0/layers/0/weight is written over" in only_advice(wrong)
    check_ok(adamx.audit(eqx.filter_jit(step, donate="all-except-first"), x, mlp, state))


@pytest.mark.slow
def test_a_step_of_nnx_is_read():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, adamx.adamw(1e-2), wrt=nnx.Param)

    def step(model, optimizer, x):
        grads = nnx.grad(lambda m: jnp.mean(m(x) ** 2))(model)
        optimizer.update(model, grads)

    x = jnp.ones((4, 3))
    kept = adamx.audit(nnx.jit(step), model, optimizer, x)
    assert "Donate (model, optimizer) and nothing else" in only_advice(kept)
    donated = nnx.jit(step, donate_argnames=("model", "optimizer"))
    found = adamx.audit(donated, model, optimizer, x)
    check_ok(found)
    assert found.params == ("model", 8)


# --- The text of programs -------------------------------------------------------------------------

ASYNCHRONOUS = """HloModule jit_step, input_output_alias={ {0}: (1, {}, may-alias) }, e={}

%fused (p.0: f32[8], p.1: f32[8]) -> f32[8] {
  %p.0 = f32[8]{0} parameter(0)
  %p.1 = f32[8]{0} parameter(1)
  %scaled = f32[8]{0} multiply(%p.1, %p.1)
  ROOT %sum = f32[8]{0} add(%p.0, %scaled)
}

ENTRY %main (g: f32[8], w: f32[8], s: f32[8]) -> (f32[8], f32[8]) {
  %g = f32[8]{0} parameter(0), metadata={op_name="grads[\\'w\\']"}
  %w = f32[8]{0} parameter(1)
  %s = f32[8]{0} parameter(2)
  %start = (f32[8]{0:S(1)}, f32[8]{0}, u32[]) copy-start(%w), cross_program_prefetch_index=0
  %done = f32[8]{0:S(1)} copy-done(%start)
  %new = f32[8]{0} fusion(%done, %g), kind=kLoop, calls=%fused
  %back = (f32[8]{0}, f32[8]{0}, u32[]) copy-start(%new)
  %home = f32[8]{0} copy-done(%back)
  ROOT %out = (f32[8]{0}, f32[8]{0}) tuple(%home, %s)
}
"""


def test_asynchronous_copies_are_traced_to_their_argument():
    text = Text(ASYNCHRONOUS)
    start, back = text.copies({8})
    assert (text.source(start), text.source(back)) == (1, None)
    assert text.aliases == {1: 0}
    assert text.parameters[0].label == "grads['w']"


def test_results_are_traced_through_fusions_to_what_they_are_made_of():
    text = Text(ASYNCHRONOUS)
    assert text.sources(0) == {1: 1, 0: 2}  # w + g * g
    assert text.sources(1) == {2: 0}


def test_what_chooses_between_two_values_is_no_part_of_them():
    text = Text("""HloModule jit_step

ENTRY %main (m: pred[8], w: f32[8]) -> f32[8] {
  %m = pred[8]{0} parameter(0)
  %w = f32[8]{0} parameter(1)
  %n = f32[8]{0} negate(%w)
  ROOT %out = f32[8]{0} select(%m, %n, %w)
}
""")
    assert text.sources(0) == {1: 0}


def test_what_stays_on_the_chip_is_not_moved():
    """`w` is fetched to the chip: read once, 32 bytes; the fusion reads `g`, writes; 32 go back."""
    on_chip = ASYNCHRONOUS.replace("{0:S(1)}", "{0:T(128)S(1)}")
    assert bytes_accessed(Text(on_chip)) == 32 + (32 + 32) + (32 + 32)
    # without tiles it is no TPU's, and the memory 1 no chip's
    assert bytes_accessed(Text(ASYNCHRONOUS)) == (32 + 32) + (32 + 32 + 32) + (32 + 32)


def test_parts_of_an_array_are_moved_alone():
    text = Text("""HloModule jit_step

%fused (p.0: f32[64,8], p.1: s32[], p.2: f32[1,8]) -> f32[64,8] {
  %p.0 = f32[64,8]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %p.2 = f32[1,8]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,8]{1,0} dynamic-slice(%p.0, %p.1, %zero), dynamic_slice_sizes={1,8}
  %sum = f32[1,8]{1,0} add(%row, %p.2)
  ROOT %new = f32[64,8]{1,0} dynamic-update-slice(%p.0, %sum, %p.1, %zero)
}

ENTRY %main (w: f32[64,8], i: s32[], x: f32[64,8]) -> f32[64,8] {
  %w = f32[64,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = f32[64,8]{1,0} parameter(2)
  %first = f32[1,8]{1,0} slice(%x), slice={[0:1], [0:8]}
  ROOT %out = f32[64,8]{1,0} fusion(%w, %i, %first), kind=kLoop, calls=%fused
}
""")
    # the slice reads a row of 32 bytes and writes it; the fusion reads two, and writes one
    assert bytes_accessed(text) == 32 + 32 + (32 + 4 + 32) + 32


BRANCHES = """HloModule jit_step

%heavy (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %twice = f32[8]{0} add(%a, %a)
}

%light (b: f32[8]) -> f32[8] {
  ROOT %b = f32[8]{0} parameter(0)
}

%body (c: (f32[8])) -> (f32[8]) {
  %c = (f32[8]{0}) parameter(0)
  %d = f32[8]{0} get-tuple-element(%c), index=0
  %e = f32[8]{0} negate(%d)
  ROOT %f = (f32[8]{0}) tuple(%e)
}

ENTRY %main (s: pred[], g: f32[8]) -> f32[8] {
  %s = pred[] parameter(0)
  %g = f32[8]{0} parameter(1)
  %h = f32[8]{0} conditional(%s, %g, %g), true_computation=%heavy, false_computation=%light
  %t = (f32[8]{0}) tuple(%h)
  %l = (f32[8]{0}) while(%t), condition=%never, body=%body
  ROOT %out = f32[8]{0} get-tuple-element(%l), index=0
}
"""


def test_a_branch_counts_by_its_heavier_side_and_a_loop_once():
    text = Text(BRANCHES)
    assert bytes_accessed(text) == (32 + 32) + (32 + 32)
    assert bytes_accessed(text, branches=False) == 32 + 32
    assert [x.opcode for x in kernels(text)] == ["add", "negate"]
    assert [x.opcode for x in kernels(text, branches=False)] == ["negate"]


def test_the_report_divides_by_what_may_be_the_parameters_whatever_their_name():
    """The state, which comes first here, holds the count."""
    tx, w = adamx.adamw(0.1), jnp.ones((4, 3))

    def step(state, weights_of_mine, grads):
        updates, state = tx.update(grads, state, weights_of_mine)
        return state, adamx.apply_updates(weights_of_mine, updates)

    found = adamx.audit(jax.jit(step, donate_argnums=(0, 1)), tx.init(w), w, w)
    assert found.params == ("weights_of_mine", 12)
    alone = adamx.audit(jax.jit(lambda s, g: tx.update(g, s, g)[1]), tx.init(w), w)
    assert alone.params == ("s", 26)


def test_a_program_that_measures_is_counted_by_the_element_of_the_parameters():
    tx = adamx.monitor(adamx.adamw(1e-3), every=2)
    state = abstract(tx) | {"monitor_step": jnp.int32(1)}
    found = adamx.audit(adamx.make_step(tx), LIKE, state, LIKE)
    assert found.program == "jit_entries_apart"
    assert found.params == ("params", sum(x.size for x in jax.tree.leaves(LIKE)))


def test_an_argument_that_is_passed_and_not_read_is_no_part_of_the_floor():
    tx, other = adamx.adamw(1e-3), jax.ShapeDtypeStruct((4096,), jnp.float32)
    step = jax.jit(lambda p, s, g, _: tx.update(g, s, p), keep_unused=True)
    without = adamx.audit(jax.jit(tx.update), LIKE, abstract(tx), LIKE)
    found = adamx.audit(step, LIKE, abstract(tx), LIKE, other)
    assert found.floor_bytes == without.floor_bytes
