"""Every mistake gets an error that says where, what was expected, what was given, and why."""

import fractions
import inspect
import math
import re
from collections.abc import Callable
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hyperparameters import (
    ABOVE_0,
    DECAY,
    DERIVED,
    FINITE,
    HYPERPARAMETERS,
    OPEN_DECAY,
    OPTIONAL,
    POSITIVE,
    RATE,
    SCHEDULED,
    SCHEDULED_DECAY,
    SCHEDULED_FRACTION,
    SCHEDULES,
    SHARE,
    UP_TO_INFINITY,
    build,
)

import adamx
from adamx.core.checks import ranges_of
from adamx.core.errors import describe

# ------------------------------------------------------------- hyperparameters, at construction

TEXT = {
    DECAY: "in [0, 1)",
    SCHEDULED_FRACTION: "in [0, 1]",
    SHARE: "in (0, 1]",
    POSITIVE: "finite and >= 0",
    RATE: "finite and >= 0",
    FINITE: "finite",
    OPEN_DECAY: "in (0, 1)",
    SCHEDULED_DECAY: "in [0, 1)",
    SCHEDULED: "finite",
    ABOVE_0: "finite and > 0",
    UP_TO_INFINITY: ">= 0",
}
# 10^400 is no double
NOT_FINITE: list[Any] = [math.nan, math.inf, -math.inf, np.float32(math.nan), 10**400]
OUTSIDE: dict[str, list[Any]] = {
    DECAY: [1.0, 1, True, -1, -1e-9, 1.5, np.float32(1.0), np.float64(-0.5)],
    SCHEDULED_FRACTION: [1.0 + 2**-52, 2, -1, -1e-9, np.float32(1.5)],
    SHARE: [0, 0.0, -0.0, 1.0 + 2**-52, -1e-9],
    POSITIVE: [-1, -1e-300, np.float32(-1e-8)],
    RATE: [-1, -1e-300, np.float32(-1e-8)],
    FINITE: [],
    OPEN_DECAY: [0, 0.0, 1.0, -1, 1.5],
    SCHEDULED_DECAY: [1.0, 1, True, -1, -1e-9, 1.5, np.float32(1.0), np.float64(-0.5)],
    SCHEDULED: [],
    ABOVE_0: [0, -1, -0.0],
    UP_TO_INFINITY: [-1, -1e-300, -math.inf],
}
# 1 - 2^-53 is the largest double below 1
INSIDE: dict[str, list[Any]] = {
    DECAY: [0, 1 - 2**-53],
    SCHEDULED_FRACTION: [0.0, 1, lambda _: 0.1],
    SHARE: [1e-300, 1],
    POSITIVE: [0, 1e30],
    RATE: [0.0, lambda _: 0.1],
    FINITE: [-1e30, np.float32(0.5)],
    OPEN_DECAY: [5e-324, 1 - 2**-53, lambda _: 0.1],
    SCHEDULED_DECAY: [0, 1 - 2**-53, lambda _: 0.1],
    SCHEDULED: [-1e30, lambda _: 0.1],
    ABOVE_0: [5e-324, 1e30],
    UP_TO_INFINITY: [0, math.inf, np.float32(math.inf), lambda _: 0.1],
}


def not_finite(range_):
    """Return values that are not finite, of which none is in the range."""
    return [x for x in NOT_FINITE if range_ != UP_TO_INFINITY or not x > 0]


# without names in them, so that the message can be compared
WRONG_KIND: list[Any] = ["0.9", b"0.9", [0.9], (0.9,), {"decay": 0.9}, 0.9 + 0j, slice(None)]

ARGUMENTS = [(function, argument) for function, of in HYPERPARAMETERS.items() for argument in of]
EXAMPLES = {HYPERPARAMETERS[f][a]: (f, a) for f, a in reversed(ARGUMENTS) if (f, a) not in OPTIONAL}
"""One argument of each range."""

YAMLS = ", which is text: YAML reads 1e-3 so, and 1.0e-3 as a number"
every = pytest.mark.parametrize(("function", "argument"), ARGUMENTS)
of_each_range = pytest.mark.parametrize(("function", "argument"), EXAMPLES.values())
of_each_range_and_slowly_all = pytest.mark.parametrize(
    ("function", "argument"),
    [
        pytest.param(*of, marks=() if of in EXAMPLES.values() else pytest.mark.slow)
        for of in ARGUMENTS
    ],
)


def test_the_table_has_every_hyperparameter_of_every_public_function():
    takes = {}
    for name in adamx.__all__:
        function: Any = getattr(adamx, name)
        if callable(function) and not name.endswith("Warning"):
            arguments = inspect.signature(function).parameters.values()
            numbers = {a.name for a in arguments if str(a.annotation).startswith("Scalar")}
            numbers |= set(ranges_of(function))
            takes |= {name: numbers} if numbers else {}
    for name in OF_NUMBERS:
        assert takes.pop(name) == set(OF_NUMBERS[name])
    assert takes == {function: set(table) for function, table in HYPERPARAMETERS.items()}


BATCHES = {"batch_size": (2, 0), "new_batch_size": (1, -1)}
OF_NUMBERS: dict[str, dict[str, tuple[float, Any]]] = {
    "normalized_weight_decay": {
        "norm": (0.5, -1),
        "batch_size": (1, 0.5),
        "examples": (1, 0),
        "epochs": (1, 0),
    },
    "ratio_bound": {"b1": (0.5, 1), "b2": (0.75, -1)},
    "linear_rule": {"learning_rate": (1, -1), **BATCHES},
    "square_root_rule": {"learning_rate": (1, -1), **BATCHES},
    "inverse_square_root_rule": {"eps": (1, -1), **BATCHES},
    "half_life_rule": {"decay": (0.5, 1), **BATCHES},
}
"""Functions that return a number: for each argument one in its range, and one out of it."""


@pytest.mark.parametrize("function", OF_NUMBERS)
def test_a_function_that_returns_a_number_has_ranges_too(function):
    fine = {argument: inside for argument, (inside, _) in OF_NUMBERS[function].items()}
    assert getattr(adamx, function)(**fine) > 0
    for argument, (_, outside) in OF_NUMBERS[function].items():
        with pytest.raises(ValueError, match=f"^{function}: {argument} must be .* got {outside}$"):
            getattr(adamx, function)(**fine | {argument: outside})


@pytest.mark.parametrize(
    ("rate", "largest", "message"),
    [
        (lambda _: 0.1, None, r"^adamc: max_learning_rate must be the .* schedule, got None: "),
        (0.5, 0.25, r"^adamc: max_learning_rate must be .* got 0.25 and learning_rate=0.5$"),
    ],
)
def test_a_decay_that_follows_a_schedule_knows_its_largest_rate(rate, largest, message):
    with pytest.raises(ValueError, match=message):
        adamx.adamc(rate, max_learning_rate=largest)


@every
def test_each_argument_has_its_range(function, argument):
    range_ = HYPERPARAMETERS[function][argument]
    optional = (function, argument) in OPTIONAL
    for value in [*OUTSIDE[range_][:1], math.nan, *([] if optional else [None])]:
        with pytest.raises(ValueError) as error:
            build(function, **{argument: value})
        expected = f"{function}: {argument} must be {TEXT[range_]}, got {value!r}"
        assert str(error.value) == expected
    with pytest.raises(TypeError) as error:
        build(function, **{argument: "0.9"})
    start = f"{function}: {argument} must be {kinds_of(range_)}"
    expected = f"{start}, {TEXT[range_]}, got '0.9'{YAMLS}"
    assert str(error.value) == expected
    if range_ not in SCHEDULES:
        with pytest.raises(TypeError, match=f"^{function}: {argument} must be a number or a "):
            build(function, **{argument: lambda _: 0.5})
    for value in INSIDE[range_] + ([None] if optional else []):
        assert isinstance(build(function, **{argument: value}), adamx.Transformation)
    # looking at the values of these would stop the device, or the trace
    array = jnp.float32(2.0)
    (kept, *_) = jax.tree.leaves(adamx.as_pytree(build(function, **{argument: array})))
    assert kept is array or (function, argument) in DERIVED
    jax.eval_shape(lambda traced: build(function, **{argument: traced}), math.nan)


def kinds_of(range_):
    """Return what an error says of the kinds of values that may be."""
    several = "a number, a scalar array or a schedule"
    return several if range_ in SCHEDULES else "a number or a scalar array"


@of_each_range
def test_a_number_out_of_range_is_refused_by_the_function_called(function, argument):
    range_ = HYPERPARAMETERS[function][argument]
    for value in [*not_finite(range_), *OUTSIDE[range_], None]:
        with pytest.raises(ValueError) as error:
            build(function, **{argument: value})
        expected = f"{function}: {argument} must be {TEXT[range_]}, got {value!r}"
        assert str(error.value) == expected


@of_each_range
def test_what_is_no_number_is_refused_by_the_function_called(function, argument):
    range_ = HYPERPARAMETERS[function][argument]
    start = f"{function}: {argument} must be {kinds_of(range_)}"
    for value in WRONG_KIND:
        with pytest.raises(TypeError) as error:
            build(function, **{argument: value})
        hint = YAMLS if isinstance(value, str) else ""
        assert str(error.value) == f"{start}, {TEXT[range_]}, got {value!r}{hint}"
    for array in (jnp.array(True), np.array(["0.9"])):
        with pytest.raises(TypeError) as error:
            build(function, **{argument: array})
        assert str(error.value) == f"{start}, got an array of {array.dtype}"


# decays that may not be scheduled, and a word of why
CONSTANT = {
    ("adabelief", "b2"): "with an eps_root of rms_scaling",
    ("mars", "b1"): "with a schedule of `scale`",
    ("radam", "b2"): "rho_inf",
    ("rectified", "decay"): "rho_inf",
    ("scheduled_nesterov_ema", "decay"): "nesterov_ema takes any",
    ("schedule_free", "b1"): "x is made of them with one b1",
    ("schedule_free_adamw", "b1"): "x is made of them with one b1",
}


def test_a_decay_that_may_not_be_scheduled_says_why():
    decays = {
        (function, argument)
        for function, table in HYPERPARAMETERS.items()
        for argument, range_ in table.items()
        if range_ in (DECAY, SHARE)
    }
    assert decays == set(CONSTANT)
    for (function, argument), why in CONSTANT.items():
        with pytest.raises(TypeError, match=f"^{function}: {argument} must be .*: .*{why}"):
            build(function, **{argument: lambda _: 0.5})


@of_each_range
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_16_bit_array_is_refused_with_its_likely_cause(function, argument, dtype):
    text = re.escape(TEXT[HYPERPARAMETERS[function][argument]])
    start = rf"^{function}: {argument} must be {text} in float32 or wider, got an array of "
    for array in (jnp.array(0.5, dtype), np.array(0.5, dtype)):
        with pytest.raises(ValueError, match=f"{start}{array.dtype}") as error:
            build(function, **{argument: array})
        assert "inject_hyperparams" in str(error.value)
        assert "hyperparam_dtype=jnp.float32" in str(error.value)


@of_each_range
def test_a_numpy_scalar_array_is_checked_as_the_number_it_becomes(function, argument):
    range_ = HYPERPARAMETERS[function][argument]
    doubles = (x for x in not_finite(range_) if not isinstance(x, int))
    for value in [*doubles, *OUTSIDE[range_]]:
        with pytest.raises(ValueError) as error:
            build(function, **{argument: np.array(value, np.float64)})
        assert str(error.value).startswith(f"{function}: {argument} must be {TEXT[range_]}, got ")


@of_each_range_and_slowly_all
def test_a_numpy_array_is_an_array(function, argument):
    # float64 is NumPy's default, and not JAX's
    tx, params = build(function, **{argument: np.array(0.5)}), jnp.ones(2)
    updates, _ = jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), params)
    assert updates.dtype == jnp.float32


@pytest.mark.parametrize("function", ["scale", "trace", "sum_of_squares"])
def test_numpy_numbers_become_python_numbers(function):
    # a NumPy scalar would impose its dtype on the arrays it meets
    (argument,) = HYPERPARAMETERS[function]
    value = getattr(build(function, **{argument: np.float64(0.5)}), argument)
    assert type(value) is float and value == 0.5


def test_a_positional_argument_is_checked_under_its_name():
    with pytest.raises(ValueError, match=r"^adam: b1 must be in \[0, 1\), got 1.0$"):
        adamx.adam(0.1, 1.0)
    with pytest.raises(ValueError, match=r"^adamw: weight_decay must be finite and >= 0, got -1$"):
        adamx.adamw(0.1, 0.9, 0.999, 1e-8, 0.0, None, -1)


@pytest.mark.parametrize("function", HYPERPARAMETERS)
def test_an_argument_that_is_missing_or_unknown_is_reported_by_the_function_called(function):
    call: Any = getattr(adamx, function)
    parameters = inspect.signature(call).parameters.values()
    if any(p.default is p.empty for p in parameters):
        with pytest.raises(TypeError, match=rf"^{function}\b.*missing"):
            call()
    with pytest.raises(TypeError, match=rf"^{function}\b.*argument '?lrr'"):
        build(function, lrr=0.1)


@pytest.mark.parametrize("function", [adamx.scale, adamx.sgd])
@pytest.mark.parametrize("number", [2**40, fractions.Fraction(1, 4), True])
def test_a_python_number_of_any_kind_is_a_number(function, number):
    tx, params = function(number), jnp.ones(2)
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(abs(updates), float(number))


# ----------------------------------------------------------------------------- leaves, at init

W, B = jnp.array([1.0, 2.0]), jnp.array([[1.0, 2.0, 3.0]])
W_COMPLEX = W.astype(jnp.complex64)
PARAMS = {"dense": {"w": W, "b": B}, "out": W}
TX = adamx.momentum(0.1)
GRADS, STATE = jax.tree.map(jnp.ones_like, PARAMS), TX.init(PARAMS)


def put(tree, path, value):
    """Return the tree with another leaf (or branch) at a path."""
    name, _, rest = path.partition("/")
    return tree | {name: put(tree[name], rest, value) if rest else value}


def drop(tree, path):
    """Return the tree without the leaf at a path."""
    name, _, rest = path.partition("/")
    if rest:
        return tree | {name: drop(tree[name], rest)}
    return {key: value for key, value in tree.items() if key != name}


@pytest.mark.parametrize(
    ("leaf", "said"),
    [
        (jnp.ones((2, 3), jnp.int32), ["int32[2, 3]", "cannot move integers", "partition"]),
        (np.ones(3, np.uint8), ["uint8[3]", "cannot move integers", "partition"]),
        (jnp.array(True), ["bool[]", "or booleans", "partition"]),
        (np.bool_(True), ["bool[]", "or booleans", "partition"]),
        (3, ["the integer 3", "write it as a float", "None"]),
        (True, ["the integer True", "None"]),
        ("relu", ["str", "eqx.filter", "None"]),
        (jax.nn.relu, ["eqx.filter", "None"]),
        (jax.random.key(0), ["key<fry>[]", "partition"]),
    ],
    ids=["int32", "uint8", "array", "NumPy", "int", "bool", "string", "function", "key"],
)
def test_a_leaf_that_cannot_be_moved_is_named(leaf, said):
    with pytest.raises(TypeError) as error:
        TX.init(put(PARAMS, "dense/w", leaf))
    for part in ["adamx: leaf 'dense/w' must be a floating-point array, got ", *said]:
        assert part in str(error.value)


@pytest.mark.parametrize("leaf", ["relu", jax.nn.relu], ids=["string", "function"])
def test_a_gradient_that_is_no_array_is_named(leaf):
    with pytest.raises(TypeError, match=r"leaf 'dense/w' must be .*eqx\.filter"):
        TX.update(put(PARAMS, "dense/w", leaf), STATE, PARAMS)


def test_the_gradient_of_an_integer_parameter_says_to_partition():
    tx = adamx.sgd(0.1)
    params = {"w": W, "n": jnp.array([3])}
    grads = jax.grad(lambda p: jnp.sum(p["w"]), allow_int=True)(params)
    with pytest.raises(TypeError, match=r"leaf 'n' must be a floating-point array.*partition"):
        tx.update(grads, tx.init({"w": W, "n": None}), params)


def test_none_floats_and_complex_numbers_are_leaves():
    state = TX.init({"none": None, "number": 1.0, "complex": 1j, "numpy": np.ones(2)})
    shapes = jax.tree.map(jnp.shape, state["mu"])
    assert shapes == {"none": None, "number": (), "complex": (), "numpy": (2,)}
    # a Python number becomes an array that has a dtype of its own
    updates, state = jax.jit(adamx.ema(0.5).update)(1.0, adamx.ema(0.5).init(1.0))
    assert not updates.weak_type and not state["mu"].weak_type


# ---------------------------------------------------------- updates, state and params that misfit


FOREIGN = adamx.chain(optax.trace(0.9), adamx.scale_by_learning_rate(0.1))
TREES, MODEL, SWAPPED = "different trees", "another model", "update(updates, state, params)"
PARTITION = "an optimizer cannot move integers or booleans; partition them out"
ADAPT = "adapt_state(tx, params, state"
MIXED_UP = ((TypeError, ValueError), ["swapped", SWAPPED])

# what was passed as (updates, state, params), the error, and what its message has to say
MISFITS: dict[str, tuple[tuple[Any, Any, Any], Any, list[str]]] = {
    "shape": (
        (put(GRADS, "dense/w", jnp.ones((5, 2))), STATE, PARAMS),
        ValueError,
        ["'dense/w'", "[5, 2]", "[2]", "batch axis", MODEL],
    ),
    "shape that broadcasts": (
        (put(GRADS, "dense/w", jnp.ones(1)), STATE, PARAMS),
        ValueError,
        ["'dense/w'", "of shape [1]", "[2]", MODEL],
    ),
    "scalar": (
        (put(GRADS, "dense/w", 1.0), STATE, PARAMS),
        ValueError,
        ["'dense/w'", "of shape []", "[2]"],
    ),
    "missing leaf": (
        (drop(GRADS, "dense/w"), STATE, PARAMS),
        ValueError,
        [TREES, "only in params: ['dense/w']", MODEL, SWAPPED],
    ),
    "leaf too many": (
        (put(GRADS, "dense/x", W), STATE, PARAMS),
        ValueError,
        [TREES, "only in the updates: ['dense/x']", MODEL, SWAPPED],
    ),
    "leaf too many that is None": (
        (put(GRADS, "dense/x", None), STATE, PARAMS),
        ValueError,
        [TREES, "only in the updates: ['dense/x']", MODEL, SWAPPED],
    ),
    "branch for a leaf": (
        (put(GRADS, "out", {"w": W}), STATE, PARAMS),
        ValueError,
        [TREES, "only in the updates: ['out/w']", "only in params: ['out']"],
    ),
    "leaf for a branch of params": (
        (put(GRADS, "dense", W), STATE, PARAMS),
        ValueError,
        ["'dense", TREES],
    ),
    "leaf for a branch of the state": (
        (put(GRADS, "dense", W), STATE, None),
        ValueError,
        ["'dense", "state['mu']", TREES],
    ),
    "integer gradient": (
        (put(GRADS, "dense/w", jnp.ones(2, jnp.int32)), STATE, PARAMS),
        TypeError,
        ["'dense/w'", "int32[2]", PARTITION],
    ),
    "boolean gradient": (
        (put(GRADS, "dense/w", jnp.ones(2, bool)), STATE, PARAMS),
        TypeError,
        ["'dense/w'", "bool[2]", PARTITION],
    ),
    "integer parameter": (
        (GRADS, STATE, put(PARAMS, "dense/w", jnp.ones(2, jnp.int32))),
        TypeError,
        ["'dense/w'", "int32[2]", PARTITION],
    ),
    "complex gradient of a real parameter": (
        (put(GRADS, "dense/w", W_COMPLEX), STATE, PARAMS),
        TypeError,
        ["'dense/w'", "complex64[2]", "float32[2]", "one is complex, the other real"],
    ),
    "real gradient of a complex parameter": (
        (GRADS, STATE, put(PARAMS, "dense/w", W_COMPLEX)),
        TypeError,
        ["'dense/w'", "complex64[2]", "float32[2]", "one is complex, the other real"],
    ),
    "complex gradient for a real state": (
        (put(GRADS, "dense/w", W_COMPLEX), STATE, None),
        TypeError,
        ["'dense/w'", "state['mu']", "complex64", "float32", MODEL],
    ),
    "real gradient for a complex state": (
        (GRADS, TX.init(put(PARAMS, "dense/w", W_COMPLEX)), PARAMS),
        TypeError,
        ["'dense/w'", "state['mu']", "complex64", "float32", MODEL],
    ),
    "integer state": (
        (GRADS, put(STATE, "mu/dense/w", jnp.ones(2, jnp.int32)), PARAMS),
        TypeError,
        ["'dense/w'", "state['mu']", "int32"],
    ),
    "no parameter": (
        (GRADS, STATE, put(PARAMS, "dense/w", None)),
        ValueError,
        ["'dense/w'", "float32[2]", "params is None there"],
    ),
    "state of other shapes": (
        (GRADS, TX.init(put(PARAMS, "dense/w", jnp.ones(3))), PARAMS),
        ValueError,
        ["'dense/w'", "state['mu']", "shape [3]", "[2]", MODEL],
    ),
    "state of another tree": (
        (GRADS, TX.init(drop(PARAMS, "dense/w")), PARAMS),
        ValueError,
        [TREES, "state['mu']", "only in the updates: ['dense/w']", MODEL],
    ),
    "state with a leaf too many": (
        (drop(GRADS, "dense/w"), STATE, drop(PARAMS, "dense/w")),
        ValueError,
        [TREES, "only in state['mu']: ['dense/w']", MODEL],
    ),
    "state that is None there": (
        (GRADS, TX.init(put(PARAMS, "dense/w", None)), PARAMS),
        ValueError,
        ["'dense/w'", "state['mu'] is None there", ADAPT],
    ),
    "state of Optax": (
        (GRADS, optax.sgd(0.1).init(PARAMS), PARAMS),
        TypeError,
        ["a dict with 'count'", "got tuple", "from_optax(state, tx, params) converts the state"],
    ),
    "no state": ((GRADS, None, PARAMS), TypeError, [SWAPPED, "got NoneType"]),
    "state without count": (
        (GRADS, drop(STATE, "count"), PARAMS),
        TypeError,
        ["with 'count'", "dict with ['learning_rate', 'mu']"],
    ),
    "number for state": ((GRADS, 3.5, PARAMS), TypeError, [SWAPPED, "a dict with 'count', got "]),
    "state without mu": (
        (GRADS, drop(STATE, "mu"), PARAMS),
        ValueError,
        ["no 'mu'", "['count', 'learning_rate']", "another composition", ADAPT],
    ),
    "state without learning rate": (
        (GRADS, drop(STATE, "learning_rate"), PARAMS),
        ValueError,
        ["no 'learning_rate'", "another composition", ADAPT],
    ),
    "state with an unknown entry": (
        (GRADS, STATE | {"trace": STATE["mu"]}, PARAMS),
        ValueError,
        ["['trace']", "another composition", ADAPT],
    ),
    "updates and state swapped": ((STATE, GRADS, PARAMS), *MIXED_UP),
    "updates and state swapped, no params": ((STATE, GRADS, None), *MIXED_UP),
    "state and params swapped": ((GRADS, PARAMS, STATE), *MIXED_UP),
    "updates and params swapped": ((PARAMS, GRADS, STATE), *MIXED_UP),
    "state first": ((STATE, PARAMS, GRADS), *MIXED_UP),
    "params for state": ((GRADS, PARAMS, None), *MIXED_UP),
}
CALLS = ["eager", "jitted", "make_step"]


def call(how, tx, updates, state, params):
    if how == "make_step":
        return adamx.make_step(tx)(params, state, updates)
    return (tx.update if how == "eager" else jax.jit(tx.update))(updates, state, params)


@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_named_with_its_likely_cause(name, how):
    arguments, kind, said = MISFITS[name]
    with pytest.raises(kind) as error:
        call(how, TX, *arguments)
    assert str(error.value).startswith("adamx: ")
    for part in said:
        assert part in str(error.value)
    # nothing was donated: what was passed can be passed again
    assert not any(x.is_deleted() for x in jax.tree.leaves(arguments) if isinstance(x, jax.Array))


def test_of_many_leaves_that_do_not_fit_four_are_named():
    here, there = ({f"{name}{i}": W for i in range(5)} for name in ("a", "b"))
    with pytest.raises(ValueError) as error:
        adamx.sgd(0.1).update(here, adamx.sgd(0.1).init(here), there)
    assert "only in the updates: ['a0', 'a1', 'a2', 'a3'] and more, " in str(error.value)
    assert "only in params: ['b0', 'b1', 'b2', 'b3'] and more " in str(error.value)


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


@pytest.mark.parametrize("how", CALLS)
def test_after_a_failed_update_the_same_arrays_go_on(how):
    params, state = copied(PARAMS), copied(STATE)
    with pytest.raises(ValueError, match="'dense/w'"):
        call(how, TX, put(GRADS, "dense/w", jnp.ones(3)), state, params)
    assert not any(x.is_deleted() for x in jax.tree.leaves((params, state)))
    got = call(how, TX, GRADS, state, params)
    expected = call(how, TX, GRADS, copied(STATE), copied(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_make_step_keeps_a_parameter_whose_gradient_is_none():
    tx, params = adamx.sgd(0.5), copied(PARAMS)
    grads = put(GRADS, "dense", {"w": None, "b": None})
    params, _ = adamx.make_step(tx)(params, tx.init(params), grads)
    np.testing.assert_array_equal(params["dense"]["b"], B)
    np.testing.assert_array_equal(params["out"], W - 0.5)


@pytest.mark.parametrize("how", CALLS)
def test_a_foreign_stage_does_not_take_the_state_of_another_model(how):
    state = {"count": STATE["count"], "learning_rate": STATE["learning_rate"]}
    # where ranks are promoted it would be broadcast, and the state would change its shape
    with jax.numpy_rank_promotion("allow"), pytest.raises(ValueError) as error:
        state["trace"] = optax.trace(0.9).init(put(PARAMS, "dense/w", jnp.ones((4, 2))))
        call(how, FOREIGN, GRADS, state, copied(PARAMS))
    for part in ["trace", "dense/w", "[4, 2]", "[2]", MODEL]:
        assert part in str(error.value)
    with pytest.raises(ValueError) as error:
        state["trace"] = optax.trace(0.9).init(drop(PARAMS, "dense/w"))
        call(how, FOREIGN, GRADS, state, copied(PARAMS))
    for part in ["trace", "dense/w", MODEL]:
        assert part in str(error.value)
    with pytest.raises(ValueError) as error:
        state["trace"] = optax.trace(0.9).init(put(PARAMS, "dense/x", W))
        call(how, FOREIGN, GRADS, state, copied(PARAMS))
    for part in ["state['trace']", "dense/x' of", "need none", MODEL]:
        assert part in str(error.value)


def test_a_foreign_stage_without_its_entry_says_so():
    state = drop(FOREIGN.init(PARAMS), "trace")
    with pytest.raises(ValueError, match=r"no 'trace', only \['count', 'learning_rate'\]"):
        FOREIGN.update(GRADS, state, PARAMS)


@pytest.mark.parametrize("how", ["eager", "jitted"])
def test_decay_needs_params(how):
    tx = adamx.chain(adamx.add_decayed_weights(0.1), adamx.scale(-1.0))
    with pytest.raises(ValueError) as error:
        call(how, tx, GRADS, tx.init(PARAMS), None)
    assert "add_decayed_weights: needs the parameters" in str(error.value)
    assert SWAPPED in str(error.value)


@pytest.mark.parametrize("mask", [{"x": True}, {"dense": {"w": True}, "out": True}])
def test_a_mask_that_does_not_fit_is_reported(mask):
    tx = adamx.add_decayed_weights(0.1, mask=mask)
    with pytest.raises(ValueError, match=r"^add_decayed_weights: mask must be a tree of bools"):
        tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"^add_decayed_weights: mask must be a tree of bools"):
        tx.update(GRADS, {"count": STATE["count"]}, PARAMS)


# -------------------------------------------------------------------------- unfiltered modules


class Model(eqx.Module):
    w: jax.Array
    bias: jax.Array
    steps: jax.Array
    activation: Callable[[jax.Array], jax.Array]


def model():
    unfiltered = Model(B, W, jnp.array(3), jax.nn.relu)
    return unfiltered, eqx.filter(unfiltered, eqx.is_inexact_array)


def not_vectors(params):
    return jax.tree.map(lambda x: x.ndim != 1, params)


@pytest.mark.parametrize(
    ("keep", "leaf", "said"),
    [(lambda _: True, "activation", "eqx.filter"), (eqx.is_array, "steps", "eqx.partition")],
    ids=["all", "arrays"],
)
def test_init_of_an_unfiltered_module_says_what_to_do(keep, leaf, said):
    # a module's leaves come in the order of its fields: the first that is none is named
    unfiltered, _ = model()
    params = eqx.tree_at(lambda m: m.steps, unfiltered, 1.0) if leaf == "activation" else unfiltered
    with pytest.raises(TypeError, match=f"leaf '{leaf}' must be .*{said}"):
        adamx.sgd(0.1).init(eqx.filter(params, keep))


@pytest.mark.parametrize("how", ["eager", "filter_jit", "closed over"])
@pytest.mark.parametrize(
    "tx",
    [
        adamx.chain(adamx.add_decayed_weights(0.5), adamx.scale(-1.0)),
        adamx.chain(adamx.add_decayed_weights(0.5, not_vectors), adamx.scale(-1.0)),
        adamx.chain(optax.add_decayed_weights(0.5), adamx.scale(-1.0)),
    ],
    ids=["concept", "mask", "foreign"],
)
def test_an_unfiltered_module_is_accepted_where_the_update_is_none(how, tx):
    unfiltered, params = model()
    grads, state = jax.tree.map(jnp.ones_like, params), tx.init(params)
    expected = tx.update(grads, state, params)
    update = {
        "eager": tx.update,
        "filter_jit": eqx.filter_jit(tx.update),
        "closed over": lambda g, s, p: jax.jit(lambda g, s: tx.update(g, s, p))(g, s),
    }[how]
    # exact: halves of small integers
    jax.tree.map(np.testing.assert_array_equal, update(grads, state, unfiltered), expected)


# ---------------------------------------------------------------------------- concepts of users


class Broken(adamx.Transformation):
    """A concept with one mistake."""

    mistake: str

    def slots(self, param):
        return {"m": adamx.zeros(param)}

    def accumulate(self, u, slots, step):
        value = {
            "unknown slot": {"x": u},
            "shape of slot": {"m": jnp.sum(u)},
            "complex slot": {"m": jax.lax.complex(u, u)},
        }
        return value.get(self.mistake, {"m": u})

    def emit(self, u, slots, step):
        if self.mistake == "shape of update":
            return jnp.sum(u)
        return jax.lax.complex(u, u) if self.mistake == "complex update" else u


MISTAKES: dict[str, tuple[type[Exception], str]] = {
    "unknown slot": (ValueError, "accumulate returned 'x', which slots did not start"),
    "shape of slot": (
        ValueError,
        r"accumulate returned 'm' of shape \[\], slots started it with \[2\]",
    ),
    "complex slot": (TypeError, "accumulate returned a complex 'm' for a real slot"),
    "shape of update": (
        ValueError,
        r"emit returned float32\[\] for an update float32\[2\]: shape and kind have to stay",
    ),
    "complex update": (
        ValueError,
        r"emit returned complex64\[2\] for an update float32\[2\]: shape and kind have to stay",
    ),
}


@pytest.mark.parametrize("place", ["alone", "in a chain"])
@pytest.mark.parametrize("how", ["eager", "jitted"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_concept_is_reported_with_its_name(mistake, how, place):
    kind, message = MISTAKES[mistake]
    tx = Broken(mistake)
    tx = tx if place == "alone" else adamx.chain(adamx.scale(2.0), tx)
    with pytest.raises(kind, match=message) as error:
        call(how, tx, W, tx.init(W), W)
    assert "Broken" in str(error.value)


class Only(adamx.Transformation):
    """Act on some leaves, and leave the others as they are."""

    paths: frozenset[str]
    inner: adamx.Transformation

    def for_leaf(self, path, leaf):
        return self.inner if path in self.paths else adamx.identity()


def test_a_leaf_that_has_slots_which_its_variant_does_not_keep_is_named():
    narrow, wide = (Only(frozenset(paths), adamx.ema(0.9)) for paths in (["w"], ["w", "b"]))
    params = {"w": W, "b": B}
    narrow.update(params, narrow.init(params))
    with pytest.raises(ValueError, match=r"leaf 'b' keeps \['mu'\] in the state.*adapt_state"):
        narrow.update(params, wide.init(params))
    with pytest.raises(ValueError, match=r"leaf 'b' has an update, but state\['mu'\] is None"):
        wide.update(params, narrow.init(params))


def test_a_concept_may_emit_another_dtype():
    class Narrow(adamx.Transformation):
        def emit(self, u, slots, step):
            return u.astype(jnp.bfloat16)

    updates, _ = Narrow().update(W, Narrow().init(W), W)
    assert updates.dtype == jnp.float32


def test_a_concept_may_accumulate_a_real_slot_where_it_started_a_complex_one():
    class Magnitude(adamx.Transformation):
        def slots(self, param):
            return {"m": adamx.zeros(param)}

        def accumulate(self, u, slots, step):
            return {"m": jnp.abs(u)}

    tx = Magnitude()
    _, state = tx.update(1j * W_COMPLEX, tx.init(W_COMPLEX))
    assert state["m"].dtype == jnp.complex64
    np.testing.assert_array_equal(state["m"], W)


def test_a_boolean_is_no_state_for_a_concept_that_counts():
    class Tally(adamx.Transformation):
        def slots(self, param):
            return {"n": jnp.zeros_like(param, jnp.int32)}

        def accumulate(self, u, slots, step):
            return {"n": slots["n"] + jnp.int32(1)}

    tx = Tally()
    tx.update(W, tx.init(W))
    with pytest.raises(
        TypeError, match=r"state\['n'\] is bool\[2\] where this gradient needs int32"
    ):
        tx.update(W, tx.init(W) | {"n": jnp.ones(2, bool)})


COUNTING = adamx.accumulate(adamx.skip_nonfinite(TX), 2)


@pytest.mark.parametrize("name", ["count", "micro_step", "skipped", "consecutive_skipped"])
@pytest.mark.parametrize("count", [None, 1.5, jnp.zeros(2, jnp.int32), "3", True, jnp.float32(1)])
def test_a_count_that_is_none_is_named(name, count):
    state = COUNTING.init(PARAMS) | {name: count}
    with pytest.raises(TypeError, match=rf"state\['{name}'\] must be a whole number"):
        jax.eval_shape(lambda: COUNTING.update(GRADS, state, PARAMS))
    if name == "micro_step":
        with pytest.raises(TypeError, match=rf"state\['{name}'\] must be a whole number"):
            adamx.make_step(COUNTING)(PARAMS, state, GRADS)


@pytest.mark.parametrize("name", ["count", "micro_step", "skipped", "consecutive_skipped"])
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.uint16])
def test_a_count_of_fewer_than_32_bits_is_refused_before_it_overflows(name, dtype):
    state = COUNTING.init(PARAMS)
    state |= {name: state[name].astype(dtype)}
    with pytest.raises(TypeError, match=rf"state\['{name}'\] must have 32 bits, got .*adapt_state"):
        jax.eval_shape(lambda: COUNTING.update(GRADS, state, PARAMS))
    carried, _ = adamx.adapt_state(COUNTING, PARAMS, state)
    COUNTING.update(GRADS, carried, PARAMS)


@pytest.mark.parametrize("rate", [None, "0.1", jnp.ones(1), {"all": jnp.ones(())}])
def test_a_recorded_scalar_that_is_none_is_named(rate):
    with pytest.raises(ValueError, match=r"state\['learning_rate'\] is .*, expected float32\[\]"):
        jax.eval_shape(lambda: TX.update(GRADS, STATE | {"learning_rate": rate}, PARAMS))


@pytest.mark.parametrize("slot", ["w", object(), jax.random.key(0)], ids=["text", "object", "key"])
def test_a_slot_that_is_no_array_of_numbers_is_named(slot):
    with pytest.raises(TypeError, match=r"leaf 'dense/w': state\['mu'\] is .* needs float32"):
        jax.eval_shape(lambda: TX.update(GRADS, put(STATE, "mu/dense/w", slot), PARAMS))


def test_a_concept_that_mixes_dtypes_is_told_so_where_promotion_is_strict():
    class Mixed(adamx.Transformation):
        def emit(self, u, slots, step):
            return u * jnp.ones_like(u, jnp.bfloat16)

    tx = Mixed()
    with pytest.raises(jax.dtypes.TypePromotionError):
        tx.update(W, tx.init(W))


# --------------------------------------------------------------------------------- compositions


class Norm(adamx.Transformation):
    """A concept that reads the whole tree."""

    def tree_scalars(self, step, leaves):
        return sum(jnp.sum(x * x) for x in leaves)

    def emit(self, u, slots, step):
        return u / step.scalars


class Pair(adamx.Transformation):
    """A concept made of two."""

    first: adamx.Transformation
    second: adamx.Transformation


SQUARES = adamx.ema_of_squares(0.9)
A_BRANCH = {
    "rms_scaling": lambda branch: adamx.rms_scaling(second_moment=branch),
    "rms_scaling numerator": lambda branch: adamx.rms_scaling(branch, second_moment=SQUARES),
    "combine": lambda branch: adamx.combine(jnp.add, adamx.identity(), branch),
    "Pair": lambda branch: Pair(adamx.identity(), branch),
}


@pytest.mark.parametrize("outer", A_BRANCH)
@pytest.mark.parametrize(
    ("branch", "kind", "said"),
    [
        (optax.clip(1.0), TypeError, "got an Optax transformation, which acts on whole trees"),
        (adamx.chain(optax.clip(1.0)), ValueError, r"got chain\(.*\), which reads the whole tree"),
        (Norm(), ValueError, r"got Norm\(\), which reads the whole tree"),
        (adamx.chain(adamx.ema(0.9), Norm()), ValueError, "got .* which reads the whole tree"),
        (adamx.named("x", adamx.ema(0.9)), ValueError, "got .* which reads the whole tree"),
    ],
    ids=["foreign", "foreign in a chain", "norm", "norm in a chain", "named"],
)
def test_what_acts_on_trees_cannot_be_a_branch(outer, branch, kind, said):
    with pytest.raises(kind, match=rf"^{outer.split()[0]}: {said}") as error:
        A_BRANCH[outer](branch)
    assert "top-level adamx.chain" in str(error.value)


def test_what_acts_on_trees_can_be_a_stage():
    tx = adamx.chain(adamx.scale(2.0), Norm(), optax.clip(0.3), adamx.chain(Norm()))
    updates, _ = tx.update(W, tx.init(W), W)
    # 2 [1, 2] / 20 = [0.1, 0.2], whose squares sum to 0.05
    np.testing.assert_allclose(updates, [2.0, 4.0], rtol=1e-6)


@pytest.mark.parametrize("branch", [0.9, None, adamx.ema, adamx.adam, "ema"])
@pytest.mark.parametrize("outer", ["rms_scaling", "rms_scaling numerator", "combine"])
def test_a_branch_that_is_no_transformation_is_refused(outer, branch):
    field = {"rms_scaling": "second_moment", "rms_scaling numerator": "numerator"}
    where = rf"^{outer.split()[0]}: {field.get(outer, 'a branch')} must be an adamx transformation"
    with pytest.raises(TypeError, match=f"{where}, got {re.escape(repr(branch))}$"):
        A_BRANCH[outer](branch)


@pytest.mark.parametrize("fn", [3, None, adamx.ema(0.9)])
def test_combine_needs_a_function(fn):
    said = f"^combine: fn must be a function of arrays, got {re.escape(repr(fn))}$"
    with pytest.raises(TypeError, match=said):
        adamx.combine(fn, adamx.trace(0.5))


@pytest.mark.parametrize("stage", [0.1, None, "adam", (jnp.zeros_like, jnp.add)])
def test_a_stage_that_is_no_transformation_is_refused(stage):
    said = "^chain: a stage must be an adamx or Optax transformation, got "
    with pytest.raises(TypeError, match=said + re.escape(describe(stage))) as error:
        adamx.chain(adamx.ema(0.9), stage)
    assert "write it as a call" not in str(error.value)


@pytest.mark.parametrize("stage", [adamx.ema, adamx.adam, optax.adam])
def test_a_stage_that_was_not_called_is_reported_as_such(stage):
    with pytest.raises(TypeError, match=r"^chain: a stage must be .*: write it as a call$"):
        adamx.chain(stage)


@pytest.mark.parametrize("tx", [adamx.adam, "adam", None])
def test_named_and_make_step_and_compare_need_a_transformation(tx):
    given = re.escape(f"{tx!r}: write it as a call" if callable(tx) else describe(tx))
    tx = cast(Any, tx)
    with pytest.raises(TypeError, match=f"^named: tx must be an .* transformation, got {given}$"):
        adamx.named("inner", tx)
    with pytest.raises(TypeError, match=f"^make_step: tx must be an .*, got {given}$"):
        adamx.make_step(tx)
    with pytest.raises(TypeError, match=f"^compare: tx_b must be an .*, got {given}$"):
        adamx.compare(adamx.adam(0.1), tx, W, [W])


CLASHES: dict[str, tuple[str, Any]] = {
    "concepts": ("mu", lambda: adamx.chain(adamx.ema(0.9), adamx.ema(0.5))),
    "nested": ("mu", lambda: adamx.chain(adamx.ema(0.9), adamx.chain(adamx.ema(0.5)))),
    "inside a stage": ("nu", lambda: adamx.chain(adamx.scale_by_adam(), adamx.scale_by_rms())),
    "two learning rates": ("learning_rate", lambda: adamx.chain(adamx.sgd(0.1), adamx.sgd(0.1))),
    "foreign": ("trace", lambda: adamx.chain(optax.trace(0.9), optax.trace(0.5))),
    "foreign and concept": ("trace", lambda: adamx.chain(optax.trace(0.9), adamx.trace(0.5))),
    "named": ("mu", lambda: adamx.chain(adamx.named("mu", optax.trace(0.9)), adamx.ema(0.9))),
    "branches": ("mu", lambda: adamx.combine(jnp.add, adamx.ema(0.9), adamx.ema(0.5))),
    "rms branches": (
        "nu",
        lambda: adamx.rms_scaling(adamx.trace(0.9, name="nu"), second_moment=SQUARES),
    ),
    "a user's children": ("mu", lambda: Pair(adamx.ema(0.9), adamx.ema(0.5))),
    "slot and the count": ("count", lambda: adamx.chain(adamx.ema(0.9, name="count"))),
    "name and the count": ("count", lambda: adamx.chain(adamx.named("count", optax.trace(0.9)))),
}


@pytest.mark.parametrize("name", CLASHES)
def test_a_clash_of_names_is_an_error_at_construction(name):
    slot, clash = CLASHES[name]
    with pytest.raises(ValueError, match=f"'{slot}'") as error:
        clash()
    assert "name=" in str(error.value) and "named(name, tx)" in str(error.value)


def test_two_of_a_kind_without_memory_do_not_clash():
    tx = adamx.chain(optax.clip(2.0), optax.clip(1.0), adamx.named("mu", optax.clip(1.0)))
    assert set(adamx.chain(tx, adamx.ema(0.9)).init(W)) == {"count", "mu"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: adamx.ema(0.9, name="count"),
        lambda: adamx.named("count", adamx.ema(0.9)),
    ],
    ids=["slot", "name"],
)
def test_a_state_has_one_count(make):
    with pytest.raises(ValueError, match="'count'"):
        make().init(W)


# -------------------------------------------------------------------- what reads another's slot


def test_an_extrapolation_without_a_difference_is_reported():
    tx = adamx.chain(adamx.ema(0.9), adamx.extrapolation(0.5))
    with pytest.raises(ValueError, match=r"^extrapolation: no piece keeps 'previous', only \['mu"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: adamx.cautious(0.5), "cautious: inner must be an adamx transformation, got 0.5"),  # type: ignore
        (
            lambda: adamx.delayed_rms_scaling(0.5),  # type: ignore
            "delayed_rms_scaling: second_moment must be an adamx transformation, got 0.5",
        ),
    ],
    ids=["cautious", "delayed_rms_scaling"],
)
def test_a_wrong_kind_of_piece_is_refused(make, text):
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        make()


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((0.0, 0.9, 3), "start must be in (0, 1), got 0.0"),
        ((0.5, 1.0, 3), "end must be in (0, 1), got 1.0"),
        ((0.5, 0.9, 0), "steps must be >= 1, got 0"),
    ],
)
def test_a_half_life_schedule_checks_its_numbers(numbers, text):
    with pytest.raises(ValueError, match=f"^half_life_schedule: {re.escape(text)}$"):
        adamx.half_life_schedule(*numbers)


@pytest.mark.parametrize("optimizer", [adamx.sgd, adamx.sgdw])
def test_without_momentum_there_is_nothing_to_store(optimizer):
    name = optimizer.__name__
    with pytest.raises(ValueError, match=f"^{name}: without momentum there are no moments"):
        optimizer(0.1, moments="bfloat16")
