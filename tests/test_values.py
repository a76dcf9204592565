"""A transformation is a value: it prints, compares, hashes, pickles, and passes through jit."""

import copy
import dataclasses
import functools
import pickle
from collections.abc import Callable
from typing import Any, cast

import equinox as eqx
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import TRANSFORMATIONS

import adamx

pytestmark = pytest.mark.usefixtures("quick_compiler")  # both sides are compiled alike

PARAMS = jnp.array([1.0, -2.0])


def first_update(tx, grads=PARAMS):
    return tx.update(grads, tx.init(PARAMS), PARAMS)[0]


def update_of(tree):
    return first_update(tree.tx)


def schedule(step):
    return 0.1 / (1 + jnp.asarray(step, jnp.float32))


def not_vectors(params):
    return jax.tree.map(lambda x: x.ndim != 1, params)


LINEAR = optax.linear_schedule(0.1, 0.0, 10)
CLIP = optax.clip(1.0)
ARRAY = jnp.float32(0.5)


@dataclasses.dataclass(frozen=True)
class Warmup:
    """A schedule that is a value, around one that is a closure."""

    steps: int
    after: Callable[[Any], Any]

    def __call__(self, step):
        return jnp.where(step < self.steps, 0.0, self.after(step))


class Plain:
    """A schedule whose class says nothing of how it prints or compares."""

    def __call__(self, step):
        return schedule(step)

    def method(self, step):
        return schedule(step)


# ---------------------------------------------------------------------------------------- printing

PRINTED = [
    (adamx.identity(), "identity()"),
    (adamx.ema(0.9), "ema(0.9)"),
    (adamx.ema(0.9, name="m"), "ema(0.9, name='m')"),
    (adamx.ema(0.9, jnp.bfloat16), "ema(0.9, dtype=bfloat16)"),
    (adamx.ema(0.9, "bfloat16"), "ema(0.9, dtype='bfloat16')"),
    (adamx.ema(np.float64(0.9)), "ema(0.9)"),
    (adamx.ema(ARRAY), "ema(float32[])"),
    (adamx.ema(np.array(0.5)), "ema(0.5)"),
    (adamx.ema_of_squares(0.9, 1.0), "ema_of_squares(0.9, initial=1.0)"),
    (adamx.trace(0.9, True), "trace(0.9, nesterov=True)"),
    (adamx.sum_of_squares(), "sum_of_squares()"),
    (adamx.sum_of_squares(0.5), "sum_of_squares(0.5)"),
    (adamx.scale(-0.5), "scale(-0.5)"),
    (adamx.chain(), "chain()"),
    (adamx.chain(adamx.chain(adamx.ema(0.5)), adamx.scale(2.0)), "chain(ema(0.5), scale(2.0))"),
    (
        adamx.combine(jnp.subtract, adamx.identity(), adamx.ema(0.5)),
        "combine(subtract, identity(), ema(0.5))",
    ),
    (adamx.combine(schedule, adamx.ema(0.5)), "combine(schedule, ema(0.5))"),
    (
        adamx.scale_by_learning_rate(schedule, flip_sign=False),
        "scale_by_learning_rate(schedule, flip_sign=False)",
    ),
    (adamx.scale_by_learning_rate(LINEAR), "scale_by_learning_rate(polynomial_schedule)"),
    (adamx.scale_by_learning_rate(lambda _: 0.1), "scale_by_learning_rate(<lambda>)"),
    (adamx.scale_by_learning_rate(Plain()), "scale_by_learning_rate(Plain)"),
    (adamx.scale_by_learning_rate(Plain().method), "scale_by_learning_rate(method)"),
    (adamx.add_decayed_weights(), "add_decayed_weights()"),
    (
        adamx.add_decayed_weights(0.1, {"w": True, "b": False}),
        "add_decayed_weights(0.1, mask={'b': False, 'w': True})",
    ),
    (adamx.add_decayed_weights(0.1, not_vectors), "add_decayed_weights(0.1, mask=not_vectors)"),
    (
        adamx.chain(CLIP, adamx.ema(0.9), optax.scale_by_adam()),
        "chain(clip(...), ema(0.9), scale_by_adam(...))",
    ),
    (adamx.named("slow", adamx.ema(0.9)), "named('slow', tx=ema(0.9))"),
    (adamx.named("slow", optax.trace(0.9)), "named('slow', tx=trace)"),
    (
        adamx.adamw(LINEAR, b1=ARRAY, eps=1e-6, mask=not_vectors),
        """\
chain(
    rms_scaling(
        chain(ema(float32[]), bias_correction(float32[])),
        second_moment=chain(ema_of_squares(0.999), bias_correction(0.999)),
        eps=1e-06,
    ),
    add_decayed_weights(0.0001, mask=not_vectors),
    scale_by_learning_rate(polynomial_schedule),
)""",
    ),
    (
        adamx.rmsprop(0.1, centered=True, momentum=0.9, eps_in_sqrt=True),
        """\
chain(
    rms_scaling(
        second_moment=combine(variance, ema_of_squares(0.9), ema(0.9)),
        eps=0.0,
        eps_root=1e-08,
    ),
    scale_by_learning_rate(0.1),
    trace(0.9, name='trace_of_steps'),
)""",
    ),
    (
        adamx.chain(
            optax.MultiSteps(optax.adam(0.1), 4).gradient_transformation(),
            optax.inject_hyperparams(optax.adam)(0.1),
            optax.clip_by_global_norm(1.0),
        ),
        "chain(MultiSteps.init(...), inject_hyperparams(...), clip_by_global_norm(...))",
    ),
]


@pytest.mark.parametrize(("tx", "text"), PRINTED, ids=lambda x: x if isinstance(x, str) else "")
def test_prints_its_composition_and_values(tx, text):
    assert repr(tx) == str(tx) == text


@pytest.mark.parametrize("again", [copy.deepcopy, jax.jit(lambda tx: tx)], ids=["copy", "jit"])
def test_a_copy_prints_as_the_original(again):
    tx = adamx.chain(adamx.scale_by_rms(0.5), adamx.scale(ARRAY))
    assert repr(again(tx)) == repr(tx)
    assert repr(tx) == ("chain(rms_scaling(second_moment=ema_of_squares(0.5)), scale(float32[]))")


def test_a_line_may_be_88_characters_long():
    fits, longer = (adamx.ema(0.5, name="m" * n) for n in (71, 72))
    assert len(repr(fits)) == 88 and "\n" not in repr(fits)
    assert repr(longer) == f"ema(\n    0.5,\n    name='{'m' * 72}',\n)"


@pytest.mark.parametrize(
    "make",
    [
        lambda: adamx.scale_by_learning_rate(Warmup(5, LINEAR)),
        lambda: adamx.scale_by_learning_rate(functools.partial(LINEAR)),
        lambda: adamx.scale_by_learning_rate(jax.jit(schedule)),
        lambda: adamx.add_decayed_weights(0.1, {"w": Plain()}),
        lambda: adamx.add_decayed_weights(0.1, Plain()),
        lambda: adamx.combine(functools.partial(jnp.add, 1.0), adamx.ema(0.5)),
        lambda: adamx.chain(CLIP._replace(init=functools.partial(CLIP.init))),
    ],
)
def test_never_prints_an_address(make):
    assert "0x" not in repr(make())


def test_prints_a_traced_value_by_its_type():
    printed = []
    jax.eval_shape(lambda rate: printed.append(repr(adamx.scale_by_learning_rate(rate))), 0.1)
    assert printed == ["scale_by_learning_rate(float32[])"]


# ------------------------------------------------------------------------------- equality and hash

SAME: dict[str, tuple[Any, Any]] = {
    "numbers": (adamx.ema(0.9), adamx.ema(0.9)),
    "keyword": (adamx.ema(0.9), adamx.ema(decay=0.9, name="mu")),
    "int and float": (adamx.ema(0), adamx.ema(0.0)),
    "NumPy's number": (adamx.ema(0.5), adamx.ema(np.float64(0.5))),
    "no arguments": (adamx.identity(), adamx.identity()),
    "compositions": (adamx.adamw(0.1, b1=0.8), adamx.adamw(0.1, b1=0.8)),
    "spliced": (
        adamx.chain(adamx.ema(0.9), adamx.chain(adamx.scale(1.0), adamx.scale(2.0))),
        adamx.chain(adamx.chain(adamx.ema(0.9), adamx.scale(1.0)), adamx.scale(2.0)),
    ),
    "the same array": (adamx.sgd(ARRAY), adamx.sgd(ARRAY)),
    "the same function": (adamx.sgd(schedule), adamx.sgd(schedule)),
    "the same closure": (adamx.sgd(LINEAR), adamx.sgd(LINEAR)),
    "equal callables": (adamx.sgd(Warmup(5, LINEAR)), adamx.sgd(Warmup(5, LINEAR))),
    "dict masks": (
        adamx.add_decayed_weights(0.1, {"w": True}),
        adamx.add_decayed_weights(0.1, {"w": True}),
    ),
    "the same foreign": (adamx.chain(CLIP), adamx.chain(CLIP)),
    "named": (adamx.named("a", adamx.ema(0.9)), adamx.named("a", adamx.ema(0.9))),
    "dtypes": (adamx.ema(0.9, jnp.bfloat16), adamx.ema(0.9, jnp.bfloat16)),
}
OTHER: dict[str, tuple[Any, Any]] = {
    "numbers": (adamx.ema(0.9), adamx.ema(0.8)),
    "classes": (adamx.ema(0.9), adamx.trace(0.9)),
    "signs of zero": (adamx.scale(0.0), adamx.scale(-0.0)),
    "names": (adamx.ema(0.9), adamx.ema(0.9, name="m")),
    "deep": (adamx.adam(0.1, b2=0.99), adamx.adam(0.1, b2=0.999)),
    "order": (
        adamx.chain(adamx.scale(1.0), adamx.ema(0.9)),
        adamx.chain(adamx.ema(0.9), adamx.scale(1.0)),
    ),
    "length": (adamx.chain(adamx.ema(0.9)), adamx.chain(adamx.ema(0.9), adamx.identity())),
    "a chain of one": (adamx.chain(adamx.ema(0.9)), adamx.ema(0.9)),
    "arrays": (adamx.sgd(ARRAY), adamx.sgd(jnp.copy(ARRAY))),
    "array and number": (adamx.sgd(ARRAY), adamx.sgd(0.5)),
    "lambdas": (adamx.sgd(lambda _: 0.1), adamx.sgd(lambda _: 0.1)),
    "closures": (adamx.sgd(LINEAR), adamx.sgd(optax.linear_schedule(0.1, 0.0, 10))),
    "callables": (adamx.sgd(Warmup(5, LINEAR)), adamx.sgd(Warmup(6, LINEAR))),
    "dict masks": (
        adamx.add_decayed_weights(0.1, {"w": True}),
        adamx.add_decayed_weights(0.1, {"w": False}),
    ),
    "masks of arrays": (  # whose comparison has no one truth value
        adamx.add_decayed_weights(0.1, {"w": np.array([True, False])}),
        adamx.add_decayed_weights(0.1, {"w": np.array([True, False])}),
    ),
    "foreign": (adamx.chain(CLIP), adamx.chain(optax.clip(1.0))),
    "Optax's": (adamx.trace(0.9), optax.trace(0.9)),
    "its pair": (adamx.ema(0.9), tuple(adamx.ema(0.9))),
    "an empty tuple": (adamx.ema(0.9), ()),
    "None": (adamx.ema(0.9), None),
}


@pytest.mark.parametrize("name", SAME)
def test_built_alike_is_equal_with_equal_hash(name):
    a, b = SAME[name]
    assert a == b and b == a and not a != b and not b != a
    assert hash(a) == hash(b)
    assert len({a, b}) == 1


@pytest.mark.parametrize("name", OTHER)
def test_built_otherwise_is_unequal(name):
    a, b = OTHER[name]
    assert a != b and b != a and not a == b and not b == a
    assert isinstance(hash(a), int)


def test_an_optimizer_is_its_pieces_with_their_defaults():
    rate = adamx.scale_by_learning_rate(0.1)
    decay = adamx.add_decayed_weights(1e-4)
    assert adamx.adam(0.1) == adamx.chain(adamx.scale_by_adam(), rate)
    assert adamx.adamw(0.1) == adamx.chain(adamx.scale_by_adam(), decay, rate)
    assert adamx.rmsprop(0.1) == adamx.chain(adamx.scale_by_rms(), rate)


class Rude:
    """A schedule that raises where it is compared or hashed."""

    def __call__(self, step):
        return schedule(step)

    def __eq__(self, other):
        raise RuntimeError("__eq__")

    def __hash__(self):
        raise RuntimeError("__hash__")


@pytest.mark.parametrize(
    "value", [Rude(), {"w": Rude()}, [1], np.array([True, False])], ids=lambda x: type(x).__name__
)
def test_equality_and_hash_never_raise(value):
    class held(adamx.Transformation):
        value: Any
        static: Any = None

    a, b = held(value, [value]), held(value, [value])
    assert a == a and isinstance(hash(a), int)
    assert isinstance(a == b, bool) and isinstance(a != held(copy.copy(value)), bool)
    np.testing.assert_array_equal(first_update(a), PARAMS)  # which takes it for a jit key


def test_tracers_compare_by_identity():
    @jax.jit
    def step(one, other):
        assert adamx.sgd(one) == adamx.sgd(one)
        assert hash(adamx.sgd(one)) == hash(adamx.sgd(one))
        assert adamx.sgd(one) != adamx.sgd(other)
        masked = adamx.add_decayed_weights(0.1, {"w": one})
        assert masked != adamx.add_decayed_weights(0.1, {"w": other})
        return hash(masked) is None

    assert not step(1.0, 1.0)


def test_equal_transformations_share_one_compilation():
    traces = []

    class counting(adamx.Transformation):
        factor: float
        static: Any = None

        def emit(self, u, slots, step):
            traces.append(self.factor)
            return self.factor * u

    for factor in (2.0, 2, 2.0, 2):
        np.testing.assert_array_equal(first_update(counting(factor, {"a": [1]})), 2 * PARAMS)
    assert list(map(repr, traces)) == ["2.0", "2"]
    traces.clear()
    np.testing.assert_array_equal(first_update(counting(3.0)), 3 * PARAMS)
    # a program with -0.0 is not the program with 0.0
    signs = [np.signbit(first_update(counting(zero))[0]) for zero in (0.0, -0.0)]
    assert signs == [False, True] and traces == [3.0, 0.0, -0.0]


def test_a_schedule_that_can_be_changed_is_equal_to_itself_alone():
    @dataclasses.dataclass
    class Plateau:
        rate: float

        def __call__(self, step):
            return self.rate

    first = Plateau(0.5)
    np.testing.assert_array_equal(first_update(adamx.sgd(first)), -0.5 * PARAMS)
    first.rate = 0.25  # not seen by the compiled program; see `update`
    second = Plateau(0.25)
    assert first == second and adamx.sgd(first) != adamx.sgd(second)
    first.rate = 1.0
    np.testing.assert_array_equal(first_update(adamx.sgd(second)), -0.25 * PARAMS)


# -------------------------------------------------------------------------------- pickle and copies

PICKLED = {
    "adamw": adamx.adamw(0.1, b1=0.8),
    "function": adamx.adamw(schedule, mask=not_vectors),
    "dict mask": adamx.add_decayed_weights(0.1, {"w": True}),
    "all of rmsprop": adamx.rmsprop(0.1, centered=True, momentum=0.9, bias_correction=True),
    "dtype": adamx.ema(0.9, jnp.bfloat16),
    "named": adamx.chain(adamx.named("slow", adamx.ema(0.9)), adamx.trace(0.5)),
    "callable": adamx.sgd(Warmup(5, schedule)),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", PICKLED)
def test_pickles(name, protocol):
    tx = PICKLED[name]
    again = pickle.loads(pickle.dumps(tx, protocol))
    assert again == tx and hash(again) == hash(tx) and repr(again) == repr(tx)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda tx: pickle.loads(pickle.dumps(tx))])
def test_copies_of_arrays_have_their_values(again):
    tx = adamx.chain(adamx.scale(ARRAY), adamx.scale(jnp.float32(3.0)))
    copied = again(tx)
    assert jax.tree.leaves(adamx.as_pytree(copied)) == [0.5, 3.0]
    assert copied != tx  # arrays compare by identity
    np.testing.assert_array_equal(first_update(copied), 1.5 * PARAMS)


def test_a_transformation_that_went_through_jit_pickles():
    tx = jax.jit(lambda tx: tx)(adamx.adam(ARRAY))
    assert repr(pickle.loads(pickle.dumps(tx))) == repr(copy.deepcopy(tx)) == repr(tx)


@pytest.mark.parametrize("name", [*PICKLED, "closure", "foreign", "lambda"])
def test_deep_copies_are_equal(name):
    more = {
        "closure": adamx.adamw(LINEAR),
        "foreign": adamx.chain(CLIP, adamx.ema(0.9)),
        "lambda": adamx.sgd(lambda _: 0.1),
    }
    tx = (PICKLED | more)[name]
    assert copy.deepcopy(tx) == tx and copy.copy(tx) is tx


def test_a_mask_is_what_it_was_when_it_was_given():
    # a value that changed would be found in jit's cache under what it was
    mask = {"w": True}
    tx = adamx.add_decayed_weights(0.5, mask)
    mask["w"] = False
    params = {"w": PARAMS}
    for update in (tx.update, jax.jit(tx.update)):
        updates, _ = update(params, tx.init(params), params)
        np.testing.assert_array_equal(updates["w"], 1.5 * PARAMS)
    assert tx == adamx.add_decayed_weights(0.5, {"w": True})


def test_a_mask_that_is_a_callable_object_is_kept_as_it_is():
    # functions compare by identity: a copy would make two built alike unequal
    mask = Plain()
    assert adamx.add_decayed_weights(0.5, mask).mask is mask
    assert adamx.add_decayed_weights(0.5, mask) == adamx.add_decayed_weights(0.5, mask)


def test_a_leaf_whose_mask_is_none_does_not_decay():
    tx, params = adamx.add_decayed_weights(0.5, {"w": True, "b": None}), {"w": PARAMS, "b": PARAMS}
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(updates["w"], 1.5 * PARAMS)
    np.testing.assert_array_equal(updates["b"], PARAMS)


def test_deep_copies_share_no_mask():
    tx = adamx.add_decayed_weights(0.1, {"w": True})
    copied = copy.deepcopy(tx)
    assert copied.mask == {"w": True} and copied.mask is not tx.mask


class Held(adamx.Transformation):
    """A concept that keeps functions in a tuple."""

    functions: tuple[Callable[..., Any], ...]


TOP_LEVEL_LAMBDA = lambda _: 0.1  # noqa: E731


@pytest.mark.parametrize(
    ("tx", "where", "held"),
    [
        (
            adamx.adamw(LINEAR),
            "scale_by_learning_rate: learning_rate",
            "polynomial_schedule.<locals>.schedule",
        ),
        (adamx.chain(CLIP), "named: tx", "clip.<locals>.update_fn"),
        (adamx.chain(optax.scale_by_adam()), "named: tx", "scale_by_adam.<locals>.init_fn"),
        (
            adamx.add_decayed_weights(0.1, (lambda: lambda params: params)()),
            "add_decayed_weights: mask",
            "<lambda>.<locals>.<lambda>",
        ),
        (Held((schedule, LINEAR)), "Held: functions", "polynomial_schedule.<locals>.schedule"),
        (adamx.sgd(TOP_LEVEL_LAMBDA), "scale_by_learning_rate: learning_rate", "<lambda>"),
        (
            adamx.sgd(functools.partial(LINEAR)),
            "scale_by_learning_rate: learning_rate",
            "polynomial_schedule.<locals>.schedule",
        ),
        (adamx.combine(jnp.subtract, adamx.ema(0.5), adamx.identity()), "combine: fn", "subtract"),
    ],
    ids=["schedule", "clip", "foreign", "mask", "tuple", "lambda", "partial", "ufunc"],
)
def test_what_holds_a_closure_says_why_it_cannot_be_pickled(tx, where, held):
    with pytest.raises(pickle.PicklingError) as error:
        pickle.dumps(tx)
    message = str(error.value)
    assert message.startswith(f"{where} holds ") and held in message
    assert message.endswith(
        ", which pickle cannot store: save the arguments instead, and build the "
        "transformation again"
    )
    assert "0x" not in message


# ------------------------------------------------------------------------- through jit, in a tree

STATIC = adamx.sgd(0.5)
DYNAMIC = adamx.sgd(ARRAY)
both = pytest.mark.parametrize("tx", [STATIC, DYNAMIC], ids=["numbers", "arrays"])


@both
@pytest.mark.parametrize("how", ["argument", "static argument", "closed over", "returned"])
def test_passes_through_jit(tx, how):
    call = {
        "argument": lambda: jax.jit(first_update)(tx),
        "static argument": lambda: jax.jit(first_update, static_argnums=0)(tx),
        "closed over": lambda: jax.jit(lambda grads: first_update(tx, grads))(PARAMS),
        "returned": lambda: first_update(jax.jit(lambda tx: tx)(tx)),
    }
    np.testing.assert_array_equal(call[how](), -0.5 * PARAMS)


def test_is_compiled_once_for_all_values_of_an_array():
    traces = []

    @jax.jit
    def update(tree, grads):
        traces.append(1)
        return first_update(tree.tx, grads)

    for rate in (0.5, 0.25):
        for x in (jnp.float32(rate), rate):
            tree = adamx.as_pytree(adamx.sgd(x))
            np.testing.assert_array_equal(update(tree, PARAMS), -rate * PARAMS)
    assert len(traces) == 3  # once for arrays, and once for each number


class Trainer(eqx.Module):
    params: jax.Array
    tx: optax.GradientTransformation
    static: optax.GradientTransformation = eqx.field(static=True)


@flax.struct.dataclass
class TrainState:
    params: jax.Array
    tx: optax.GradientTransformation = flax.struct.field(pytree_node=False)


@both
def test_is_a_field_of_a_module_and_of_a_struct(tx):
    @eqx.filter_jit
    def of_module(trainer):
        return first_update(trainer.tx), first_update(trainer.static)

    module = Trainer(PARAMS, tx, STATIC)
    jax.tree.map(np.testing.assert_array_equal, of_module(module), (-0.5 * PARAMS,) * 2)
    assert jax.tree.structure(module) == jax.tree.structure(Trainer(PARAMS, tx, adamx.sgd(0.5)))

    struct = jax.jit(lambda s: s.replace(params=s.params + first_update(s.tx)))(
        TrainState(PARAMS, STATIC)
    )
    np.testing.assert_array_equal(struct.params, 0.5 * PARAMS)
    assert struct.tx is STATIC


def test_it_has_no_leaves_and_as_pytree_has_its_arrays():
    static = adamx.adamw(schedule, mask=not_vectors)
    assert adamx.as_pytree(static).tx is static
    b2, rate = jnp.float32(0.99), jnp.float32(0.1)
    dynamic = adamx.adam(rate, b2=b2)
    assert jax.tree.leaves((static, dynamic, adamx.as_pytree(static))) == []
    leaves = jax.tree.leaves(adamx.as_pytree(dynamic))
    assert [x is y for x, y in zip(leaves, (b2, b2, rate), strict=True)] == [True] * 3
    assert adamx.as_pytree(dynamic).tx == dynamic
    doubled = jax.tree.map(lambda x: 2 * x, adamx.as_pytree(DYNAMIC)).tx
    assert type(doubled) is adamx.chain
    np.testing.assert_array_equal(first_update(doubled), -PARAMS)
    with pytest.raises(TypeError, match=r"^as_pytree: tx must be an adamx transf.* got 0\.1"):
        adamx.as_pytree(0.1)


def test_is_stacked_by_vmap_and_vmapped_over():
    rates = jnp.array([0.5, 0.25, 0.0])
    stacked = jax.vmap(lambda rate: adamx.as_pytree(adamx.sgd(rate)))(rates)
    assert repr(stacked) == "as_pytree(chain(scale_by_learning_rate(float32[3])))"
    expected = -rates[:, None] * PARAMS[None]
    np.testing.assert_array_equal(jax.vmap(update_of)(stacked), expected)
    np.testing.assert_array_equal(jax.vmap(lambda r: first_update(adamx.sgd(r)))(rates), expected)
    np.testing.assert_array_equal(jax.lax.map(update_of, stacked), expected)


def test_has_derivatives_with_respect_to_its_arrays():
    slope = jax.grad(lambda tree: jnp.sum(update_of(tree)))(adamx.as_pytree(DYNAMIC))
    np.testing.assert_array_equal(jax.tree.leaves(slope), [-jnp.sum(PARAMS)])


def test_is_a_carry_of_scan():
    def halved(tree, _):
        return jax.tree.map(lambda x: x / 2, tree), None

    tree, _ = jax.lax.scan(halved, adamx.as_pytree(DYNAMIC), length=2)
    np.testing.assert_array_equal(update_of(tree), -0.125 * PARAMS)


# ------------------------------------------------------------------------------- as a named tuple


def test_unpacks_and_indexes_like_optax():
    tx = adamx.momentum(0.5)
    init, update = tx
    assert tx[0] == tx.init == init and tx[1] == tx[-1] == tx.update == update
    assert tx[:] == (init, update) == tuple(tx) and len(tx) == 2 and tx
    updates, _ = update(PARAMS, init(PARAMS))
    np.testing.assert_array_equal(updates, first_update(tx))
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    with pytest.raises(IndexError):
        tx[len(tx)]


def test_replace_gives_an_optax_pair():
    tx = adamx.sgd(0.5)
    other: Any = tx._replace(init=lambda params: ("kept", tx.init(params)))
    assert not isinstance(other, adamx.Transformation)
    assert isinstance(other, optax.GradientTransformationExtraArgs)
    kept: Any = other.init(PARAMS)
    assert other.update == tx.update and kept[0] == "kept"
    with pytest.raises((TypeError, ValueError), match="unknown"):
        tx._replace(unknown=1)


def test_replace_builds_and_checks_anew():
    assert adamx.ema(0.9).replace(decay=0.5) == adamx.ema(0.5)
    scaling = cast(adamx.rms_scaling, adamx.scale_by_adam()).replace(eps=1.0)
    assert scaling == adamx.scale_by_adam(eps=1.0)
    with pytest.raises(ValueError, match=r"^ema: decay must be in \[0, 1\), got 1.5"):
        adamx.ema(0.9).replace(decay=1.5)
    tx = adamx.chain(adamx.ema(0.9), adamx.scale(2.0))
    assert tx.replace(stages=tx.stages[:1]) == adamx.chain(adamx.ema(0.9))
    recorded = adamx.clip_by_global_norm(1.0, record=True)
    assert recorded.replace(max_norm=2.0) == adamx.clip_by_global_norm(2.0, record=True)
    for name, line in TRANSFORMATIONS.items():
        tx = line.make()
        assert tx.replace() == tx, name


def test_is_frozen():
    tx: Any = adamx.ema(0.9)
    with pytest.raises(dataclasses.FrozenInstanceError):
        tx.decay = 0.5
    with pytest.raises(dataclasses.FrozenInstanceError):
        del tx.decay
    names = [field.name for field in adamx.ema.hyperparameters()]
    assert names == ["decay", "dtype", "name", "initial"]
