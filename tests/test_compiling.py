"""What is traced and compiled on the host: once, and no more than it has to be."""

import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, devices, mesh_of, on_cpu, thinned
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from table import TRANSFORMATIONS, of_each_kind

import adamx
from adamx.core import transformation
from adamx.core.checks import ranges_of
from adamx.core.rounding import step_key
from adamx.inspect.compare import _side_by_side
from adamx.wrappers import monitor

pytestmark = pytest.mark.usefixtures("quick_compiler", "standard_promotion")


class Compiled(logging.Handler):
    """Keeps the names of the functions that XLA compiles, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._logging = jax.log_compiles()

    def emit(self, record: logging.LogRecord) -> None:
        self.names += re.findall(r"Finished XLA compilation of jit\((\S+)\)", record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger("jax").addHandler(self)
        self._logging.__enter__()
        return self.names

    def __exit__(self, *raised: Any) -> None:
        self._logging.__exit__(*raised)
        logging.getLogger("jax").removeHandler(self)


def start() -> dict[str, Any]:
    return {"w": jnp.arange(1.0, 17.0).reshape(8, 2) / 4, "b": jnp.ones(8), "c": jnp.ones(3)}


# ------------------------------------------------------------------------------ a step, once


def on_mesh(number, kind):
    def put(x):
        spec = PartitionSpec("data") if x.shape[0] == 8 else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh_of((number,), ("data",), kind), spec))

    return put


PLACES: dict[str, Any] = {
    "committed": lambda x: jax.device_put(x, jax.devices()[0]),
    "another device": lambda x: jax.device_put(x, devices(4)[3]),
    "host": np.asarray,
    "uncommitted": lambda x: x,
    "mesh of 1": on_mesh(1, AxisType.Auto),
    "explicit mesh of 1": on_mesh(1, AxisType.Explicit),
    "mesh of 8": on_mesh(8, AxisType.Auto),
    "explicit mesh of 8": on_mesh(8, AxisType.Explicit),
}


def programs_of_three_steps(tx: Any, state: Any, params: Any) -> dict[str, int]:
    """Return how often `make_step`'s step and a user's are compiled in three steps."""
    grads = jax.tree.map(lambda x: x, params)
    copies = jax.tree.map(lambda x: x.copy(), (params, state))
    step = adamx.make_step(tx)

    @jax.jit
    def of_a_user(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with Compiled() as names:
        runs: Any = ((step, copies), (of_a_user, (params, state)))
        for run, carry in runs:
            for _ in range(3):
                carry = run(*carry, grads)
    return {name: names.count(name) for name in ("step", "of_a_user")}


def check_compiled_once(tx, state, params):
    assert programs_of_three_steps(tx, state, params) == {"step": 1, "of_a_user": 1}


def check_compiled_once_from_the_start(name, place):
    tx, params = TRANSFORMATIONS[name].make(), jax.tree.map(PLACES[place], start())
    if hasattr(tx, "every"):  # with full steps alone: the others have a program of their own
        tx = tx.replace(every=1)
    check_compiled_once(tx, tx.init(params), params)


@pytest.mark.parametrize("place", ["committed", "another device", "uncommitted"])
@of_each_kind
def test_a_fresh_state_is_committed_if_its_parameters_are(name, place):
    params = jax.tree.map(PLACES[place], start())
    state = TRANSFORMATIONS[name].make().init(params)
    kinds = {(x.committed, x.sharding) for x in jax.tree.leaves(state)}
    assert kinds == {(params["w"].committed, params["w"].sharding)}


@pytest.mark.parametrize("place", thinned(PLACES))
def test_a_step_is_compiled_once_wherever_the_parameters_are(place):
    check_compiled_once_from_the_start("adamw", place)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "place"),
    [
        (name, place)
        for i, name in enumerate(name for name, case in TRANSFORMATIONS.items() if case.kind)
        for place in list(PLACES)[i % 2 :: 2]  # each place with half of the kinds
    ],
)
def test_a_step_of_each_kind_is_compiled_once_wherever_the_parameters_are(name, place):
    check_compiled_once_from_the_start(name, place)


@pytest.mark.parametrize("place", thinned(["committed", "mesh of 1", "mesh of 8"], keep=3))
def test_a_step_from_a_saved_state_is_compiled_once(place):
    tx, params = adamx.adamw(0.1), jax.tree.map(PLACES[place], start())
    saved = jax.tree.map(np.asarray, tx.init(params))
    check_compiled_once(tx, adamx.adapt_state(tx, params, saved)[0], params)
    theirs = optax.adamw(0.1).init(params)
    check_compiled_once(tx, adamx.from_optax(theirs, tx, params), params)


def test_the_slots_of_optaxs_stages_are_where_their_parameters_are():
    params = jax.tree.map(PLACES["mesh of 8"], start())
    state = adamx.chain(optax.trace(0.9), adamx.sgd(0.1)).init(params)
    assert state["trace"].trace["w"].sharding == params["w"].sharding


# ------------------------------------------------------------------- outside jit, whatever the rate


FEW = ["adamw_masked", "by_path", "clip_then_adamw"]
OTHERS = [name for name, case in TRANSFORMATIONS.items() if name not in FEW]


def with_rates(tx: Any, factor: float) -> Any:
    """Return a transformation with all of its rates multiplied."""
    inside = tx.with_children([with_rates(child, factor) for child in tx.children])
    rates = [name for name, range_ in ranges_of(type(tx)).items() if range_.is_rate]
    numbers = {name: getattr(tx, name) for name in rates if isinstance(getattr(tx, name), float)}
    return inside.with_fields(**{name: factor * x for name, x in numbers.items()})


@pytest.mark.parametrize("name", FEW + [pytest.param(x, marks=pytest.mark.slow) for x in OTHERS])
def test_outside_jit_other_rates_run_the_same_program(name):
    tx, params = TRANSFORMATIONS[name].make(), start()
    grads, state = jax.tree.map(jnp.sin, params), tx.init(params)
    compiled: Any = transformation._compiled_update
    programs = compiled._cache_size()
    with Compiled() as names:
        found = [with_rates(tx, factor).update(grads, state, params) for factor in (1.0, 0.7, 0.3)]
    if not TRANSFORMATIONS[name].foreign:  # Optax makes new closures each time
        assert names.count("update") <= 1
        assert compiled._cache_size() <= programs + 1
    # where rates are constants, the compiler multiplies two in a row: one rounding less
    assert_close(jax.jit(with_rates(tx, 0.3).update)(grads, state, params), found[-1], ulps=2)


def test_a_rate_is_read_in_each_step_outside_jit():
    params = {"w": jnp.ones(2)}
    state = adamx.sgd(0.5).init(params)
    for rate in (0.5, 0.25, 0.0):
        updates, state = adamx.sgd(rate).update(params, state, params)
        assert (updates["w"] == -rate).all() and float(state["learning_rate"]) == rate


# ------------------------------------------------------------------------- a kernel, a scalar, once


def many(leaves: int) -> dict[str, Any]:
    return {f"leaf{i:04d}": jnp.ones(2 + i % 2) for i in range(leaves)}


def test_a_norm_of_the_whole_tree_is_measured_once_for_all_variants():
    measured = []

    class measuring(adamx.Transformation):
        def tree_scalars(self, step, leaves):
            measured.append(len(leaves))
            return sum(jnp.sum(x) for x in leaves)

        def emit(self, u, slots, step):
            return u * step.scalars

    tx = adamx.chain(measuring(), adamx.adamw(0.1, mask=adamx.all_but("b")))
    state = tx.init(start())
    jax.eval_shape(tx.update, start(), state, start())
    assert measured == [3]
    _, state = tx.update(start(), state, start())
    late = adamx.reset(tx, state, start(), "b")  # which has scalars of its own
    measured.clear()
    jax.eval_shape(tx.update, start(), late, start())
    assert measured == [3]


def test_a_schedule_is_called_once_for_all_variants():
    called = []

    def rate(step):
        called.append(step)
        return 0.1 / (step + jnp.float32(1))

    tx = adamx.chain(adamx.adamw(rate, mask=adamx.all_but("b")), adamx.scale_by_path({"b": 2.0}))
    state = tx.init(start())
    called.clear()
    jax.eval_shape(tx.update, start(), state, start())
    assert len(called) == 1


def test_traced_slots_are_traced_once_a_shape():
    calls = []

    class counted(adamx.Transformation):
        def slots(self, param):
            calls.append(param.shape)
            return {"kept": adamx.zeros(param)}

    tx, params = counted(), many(80)
    assert tx.slot_names() == ("kept",)
    calls.clear()
    jax.eval_shape(tx.init, params)
    assert sorted(calls) == [(2,), (3,)]


def test_a_monitors_statistics_are_traced_once_a_shape(monkeypatch):
    calls, norm = [], monitor._norm
    monkeypatch.setattr(monitor, "_norm", lambda rows: (calls.append(1), norm(rows))[1])
    tx, params = adamx.monitor(adamx.adamw(0.1), every=1), many(20)
    state = tx.init(params)
    calls.clear()
    jax.eval_shape(tx.update, params, state, params)
    assert len(calls) == 2  # the norms of gradients, updates and parameters, of two shapes


def lines_of_adamx(run):
    """Return how many lines of the library run: a clock that every machine reads alike."""
    home, count = os.path.dirname(adamx.__file__), 0

    def line(frame, event, arg):
        nonlocal count
        count += event == "line"
        return line

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: line if frame.f_code.co_filename.startswith(home) else None)
    try:
        run()
    finally:
        sys.settrace(before)
    return count


def lines_of_a_step(tx, layers):
    """Return how many lines `init` and `update` run for a tree of so many matrices and vectors."""
    spec = jax.ShapeDtypeStruct
    layer = {"w": spec((4, 3), jnp.bfloat16), "b": spec((3,), jnp.float32)}
    params = {f"layer{i}": layer for i in range(layers)}
    jax.clear_caches()
    first = lines_of_adamx(lambda: jax.eval_shape(tx.init, params))
    state = jax.eval_shape(tx.init, params)
    jax.clear_caches()
    return first, lines_of_adamx(lambda: jax.eval_shape(tx.update, params, state, params))


def wrapped():
    inner = adamx.chain(adamx.clip_by_global_norm(1.0), adamx.adamw(0.1, mask=adamx.all_but("*b")))
    guarded = adamx.skip_nonfinite(adamx.stacked(inner, {"layer7/*": 1}))
    return adamx.monitor(adamx.accumulate(adamx.master_weights(guarded), 2), every=3)


@pytest.mark.parametrize(
    "make",
    [pytest.param(wrapped, id="wrapped")]
    + [
        pytest.param(case.make, id=name, marks=pytest.mark.slow)
        for name, case in TRANSFORMATIONS.items()
        if case.kind
    ],
)
def test_no_more_lines_run_for_each_leaf_of_a_larger_tree(make):
    """From 100 leaves to 200 twice as many lines run at most: some run once for the whole tree.

    A loop over the leaves inside another one runs four times as often. The bound of 2.1 finds it
    as soon as it has a twentieth of the lines.
    """
    few, many = (lines_of_a_step(make(), layers) for layers in (50, 100))
    assert all(b < 2.1 * a for a, b in zip(few, many, strict=True)), (few, many)


def test_slots_are_paired_in_linear_time():
    count = 4000
    left = {f"mu/block{i}/w": np.ones(2) for i in range(count)}
    right = {f"inner/0/mu/block{i}/w": np.ones(2) for i in range(count)}
    before = time.process_time()
    slots, unmatched = _side_by_side(left, right)
    assert len(slots) == count and unmatched == []
    assert time.process_time() - before < 20  # 0.3; in quadratic time minutes


def test_a_slot_is_paired_with_the_first_that_is_free_and_of_its_shape():
    left = {"a/mu": np.ones(2), "mu": np.ones(3), "nu": np.ones(2), "w/z/nu": np.ones(2)}
    right = {"x/nu": np.ones(3), "y/mu": np.ones(3), "mu": np.ones(2), "z/nu": np.zeros(2)}
    slots, unmatched = _side_by_side(left, right)
    assert {path: found.ulps == 0 for path, found in slots.items()} == {
        "a/mu": True,  # with "mu", of which it is longer
        "mu": True,  # with "y/mu", since "mu" has another shape
        "nu": False,  # with "z/nu"
    }
    assert unmatched == ["w/z/nu", "x/nu"]


def text(tx: Any) -> Any:
    params = start()
    return adamx.make_step(tx).lower(params, tx.init(params), params).compile().as_text()


@pytest.mark.parametrize("eps", [1e-8, 1e-38, 0.0, jnp.float32(1e-8)], ids=str)
def test_a_quotient_is_guarded_only_where_the_divisor_can_be_zero(eps):
    # of float16, whose squares float32 holds: the limit on other gradients is a select too
    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float16), start())
    tx = adamx.scale_by_adam(eps=eps)
    updates, _ = tx.update(zeros, tx.init(start()))
    assert all((u == 0).all() for u in jax.tree.leaves(updates))
    guarded = not isinstance(eps, float) or eps < 1.2e-38  # subnormal numbers are rounded to 0
    program = jax.make_jaxpr(tx.update)(zeros, tx.init(start()))
    assert ("select_n" in str(program)) == guarded


@pytest.mark.parametrize("count", [0, 1, 7, 2**31 - 1])
def test_a_key_is_what_it_is_by_hand(count):
    word = np.uint64(count) + 0x9E3779B9
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        word %= np.uint64(2**32)
        word = (word ^ (word >> np.uint64(shift))) * np.uint64(factor)
    word %= np.uint64(2**32)
    assert int(step_key(count)) == int(word ^ (word >> np.uint64(16)))


def test_the_steps_key_is_computed_once_for_all_leaves():
    on_cpu("a GPU computes a scalar in each kernel again rather than in one of its own")
    jax.config.update("jax_disable_most_optimizations", False)
    program = text(adamx.adamw(0.1, moments="packed16"))
    assert len(re.findall(r"constant\(2246822507\)", program)) == 1


# --------------------------------------------------------------------------- what a kernel holds


ARITHMETIC = {"add", "sub", "mul", "div", "sqrt", "neg", "exp", "log", "reduce_sum", "dot_general"}


def unread(jaxpr: Any, inside: str = "") -> Iterator[str]:
    """Yield the operations in kernels whose results nothing reads."""
    read = {id(v) for v in jaxpr.outvars}
    for equation in reversed(jaxpr.eqns):
        inside_it = str(equation.params.get("name", inside))
        if read.isdisjoint(map(id, equation.outvars)):
            if inside == "kernel":
                yield equation.primitive.name
            continue
        read.update(map(id, equation.invars))
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
            if hasattr(inner, "jaxpr"):
                yield from unread(inner.jaxpr, inside_it)


@pytest.mark.parametrize("name", ["adamw", "adagrad", "rmsprop", "lamb", "lion", "sgdw", "yogi"])
def test_a_kernel_computes_nothing_that_nothing_reads(name):
    """XLA leaves it out, but to trace and to lower it takes a part of a small tree's time.

    Where a stage in front of an average changes the gradient, as a clip does, `emit` traces it
    again.
    """
    tx, params = TRANSFORMATIONS[name].make(), start()
    state = jax.eval_shape(tx.init, params)
    traced = jax.jit(lambda *args: tx.update(*args)).trace(params, state, params)
    assert ARITHMETIC.isdisjoint(unread(traced.jaxpr.jaxpr))
