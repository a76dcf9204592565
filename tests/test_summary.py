"""Formulas that concepts write are what they compute; bytes are those of the real state."""

import functools
import math
import re
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import mesh_of
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from reference_family import newton_schulz
from table import TRANSFORMATIONS, every

import adamx
from adamx.core.stacked import stacked_axes
from adamx.formula.expressions import REDUCTIONS, Expr, expr, latex, symbol, where
from adamx.inspect.summary import derived

# What the formulas are made of, in NumPy's words. Symbols and reductions are `Follower`'s.
NUMPY = {
    "+": np.add,
    "-": np.subtract,
    "*": np.multiply,
    "/": np.divide,
    "^": np.power,
    "neg": np.negative,
    ">": np.greater,
    ">=": np.greater_equal,
    "where": np.where,
    "sqrt": np.sqrt,
    "abs": np.abs,
    "max": np.maximum,
    "min": np.minimum,
    "sign": np.sign,
    "clip": np.clip,
    "atan2": np.arctan2,
    "orthogonalized": lambda x, steps: newton_schulz(x, int(steps)),
}
KNOWN = {*NUMPY, *REDUCTIONS, "symbol", "number"}


@pytest.fixture(autouse=True, scope="module")
def quick_compiler():
    """Formulas do not depend on optimised code, and compiling takes most of the time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


class Follower:
    """One leaf's formula, followed in float64 from its own definitions and starts."""

    def __init__(self, formula, param, leaves, stacked=0):
        self.formula, self.param, self.leaves, self.stacked = formula, param, leaves, stacked
        self.t, self.grad, self.now = 0, np.zeros_like(param), {}

    def begin(self, param, grad):
        self.before, self.now = self.now, {}
        self.last_grad, self.grad, self.param = self.grad, grad, param
        self.t += 1

    def value(self, x):
        if x.op == "symbol":
            return self.symbol(x, x.args[0])
        if x.op == "number":
            return x.args[0]
        if x.op in REDUCTIONS:
            return self.reduction(x.op, *x.args)
        return NUMPY[x.op](*map(self.value, x.args))

    def reduction(self, op, x, over, axes):
        if over == "all":
            assert op == "norm"
            return np.sqrt(sum(np.sum(leaf.value(x) ** 2) for leaf in self.leaves.values()))
        values = np.broadcast_to(self.value(x), self.param.shape)
        layer = np.zeros(values.shape[self.stacked :])
        axis = None if axes is None else axes(layer)
        of_layer = range(layer.ndim) if axis is None else np.atleast_1d(np.array(axis, int))
        axis = tuple(int(i) % max(layer.ndim, 1) + self.stacked for i in of_layer)
        if op == "norm":
            return np.sqrt(np.sum(values**2, axis=axis, keepdims=True))
        return {"mean": np.mean, "sum": np.sum}[op](values, axis=axis, keepdims=True)

    def symbol(self, x, name: Any):
        given: dict[str, Any] = {"t": self.t, "n": math.prod(self.param.shape[self.stacked :])}
        if name.base in given:
            return given[name.base]
        if name.base == "g" and not name.hats:
            return self.grad if name.shift == 0 else self.last_grad
        if name.base == "w" and name.shift == -1:
            return self.param
        here = x if name.shift is None else Expr("symbol", (name._replace(shift=0),))
        if here in self.formula.values:
            value: Any = self.formula.values[here]
            step = self.t - 1 + (name.shift or 0)  # as schedules count
            if isinstance(value, adamx.adjustable):
                return float(np.float32(value.value))  # the entry, as long as nobody sets it
            return value if isinstance(value, float) else float(value(step))
        if name.shift == -1:
            start = self.formula.starts.get(here, Expr("number", (0.0,)))
            return self.before[here] if self.t > 1 else self.value(start)
        if here not in self.now:
            step = self.formula.step if name.base == "w" else self.formula.definitions[here]
            self.now[here] = self.value(step)
        return self.now[here]


def bare(tx):
    """Return a transformation without its storages, which round what the formula says."""
    if isinstance(tx, adamx.Storage):
        return bare(tx.inner)
    return tx.with_children([bare(child) for child in tx.children])


def formula_of(tx, params, path="w"):
    return derived(tx.for_tree(params).for_leaf(path, params[path]))


def has_formula(formula):
    return formula.operations() <= KNOWN


def example():
    generator = np.random.default_rng(0)
    return {"w": generator.normal(size=(3, 4)), "b": generator.normal(size=3)}


WITHOUT = {"chain_foreign", "named", "master_weights_float32"}
"""Those with a foreign stage."""

STEPS = 8  # rectified begins in the sixth


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", sorted(TRANSFORMATIONS.keys() - WITHOUT))
def test_a_formula_is_what_the_transformation_computes(name):
    made = TRANSFORMATIONS[name].make()
    tx, params, generator = bare(made), example(), np.random.default_rng(1)
    assert str(formula_of(made, params)) == str(formula_of(tx, params))
    leaves = {}
    for path in ["w"] if tx.leafwise else params:  # one leaf takes half the time of two
        bound = tx.for_tree(params).for_leaf(path, params[path])
        leaves[path] = Follower(derived(bound), params[path], leaves, stacked_axes(bound))
        assert has_formula(leaves[path].formula)
    # In float64 some hundred roundings of 1e-16 each lead to each number, which the smallest
    # divisors here multiply by 100 at most. What schedule_free records is float32, whose half ULP
    # is 6e-8, twice in a share. One line rounds mu to bfloat16, by 2^-9 at most in each step.
    narrow = {"schedule_free": 2e-7, "schedule_free_adamw": 2e-7, "adam_mu_dtype": STEPS * 2.0**-9}
    tolerance = narrow.get(name.removeprefix("master_weights_"), 1e-12)
    state = tx.init(jax.tree.map(jnp.asarray, params))
    every = tx.every if isinstance(tx, adamx.accumulate) else 1
    for _ in range(STEPS):
        drawn: list[dict[str, Any]] = [
            {p: generator.normal(size=x.shape) if p in leaves else None for p, x in params.items()}
            for _ in range(every)
        ]
        updates: Any = None
        for grads in drawn:
            updates, state = tx.update(
                jax.tree.map(jnp.asarray, grads), state, jax.tree.map(jnp.asarray, params)
            )
        kept = adamx.moments(state, tx)
        for path, leaf in leaves.items():
            leaf.begin(params[path], np.mean([grads[path] for grads in drawn], axis=0))
        with np.errstate(invalid="ignore", divide="ignore"):  # in the branch not taken
            for path, leaf in leaves.items():
                new = leaf.value(leaf.formula.step)
                for symbol in leaf.formula.definitions:
                    leaf.symbol(symbol, symbol.args[0])
                assert_near(updates[path], new - params[path], new, tolerance)
                for slot, symbol in leaf.formula.slots.items():
                    if slot in kept and symbol in leaf.now:
                        assert_near(kept[slot][path], leaf.now[symbol], 0.0, tolerance)
        params |= {path: params[path] + np.asarray(updates[path]) for path in leaves}


def assert_near(actual, expected, beside, tolerance):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert np.isfinite(expected).all()
    largest = max(np.abs(actual).max(), np.abs(beside).max())
    np.testing.assert_allclose(
        actual.astype(float), np.broadcast_to(expected, actual.shape), rtol=0,
        atol=tolerance * largest,
    )  # fmt: skip


# ------------------------------------------------------------------------------ how it is written

ADAMW = """\
w_t <- (1 - lr*wd) w_{t-1} - lr m^_t / (sqrt(v^_t) + eps)
    m_t = b1 m_{t-1} + (1 - b1) g_t
    m^_t = m_t / (1 - b1^t)
    v_t = b2 v_{t-1} + (1 - b2) g_t^2
    v^_t = v_t / (1 - b2^t)
    m_0 = 0, v_0 = 0
    b1 = 0.9, b2 = 0.999, eps = 1e-08, wd = 0.0001, lr = 0.001"""

ADAMW_IN_LATEX = r"""\begin{aligned}
@{w}_{t} &\leftarrow \left( 1 - \alpha \lambda \right) @{w}_{t-1}
 - \alpha \frac{\hat{@{m}}_{t}}{\sqrt{\hat{@{v}}_{t}} + \varepsilon} \\
@{m}_{t} &= \beta_{1} @{m}_{t-1} + \left( 1 - \beta_{1} \right) @{g}_{t} \\
\hat{@{m}}_{t} &= \frac{@{m}_{t}}{1 - \beta_{1}^{t}} \\
@{v}_{t} &= \beta_{2} @{v}_{t-1} + \left( 1 - \beta_{2} \right) @{g}_{t}^{2} \\
\hat{@{v}}_{t} &= \frac{@{v}_{t}}{1 - \beta_{2}^{t}}
\end{aligned}""".replace("\n -", " -").replace("@", r"\boldsymbol")


def abstract(dtype=jnp.float32):
    shapes = {"embed": (8, 4), "dense": {"kernel": (4, 4), "bias": (4,)}, "norm": {"scale": (4,)}}
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def test_adamw_prints_the_line_of_the_notes():
    found = adamx.summary(adamx.adamw(1e-3), abstract())
    assert found.formula == ADAMW
    assert found.latex == ADAMW_IN_LATEX
    assert found.formula in str(found) and repr(adamx.adamw(1e-3)) in str(found)


@pytest.mark.parametrize(
    ("tx", "first"),
    [
        (adamx.momentum(0.1), "w_t <- w_{t-1} - lr m_t"),
        (adamx.rmsprop(0.1), "w_t <- w_{t-1} - lr g_t / (sqrt(v_t) + eps)"),
        (adamx.adam(0.1), "w_t <- w_{t-1} - lr m^_t / (sqrt(v^_t) + eps)"),
        (adamx.adam(0.1, eps=0.0), "w_t <- w_{t-1} - lr m^_t / sqrt(v^_t)"),
        (
            adamx.lion(0.1),
            "w_t <- (1 - lr*wd) w_{t-1} - lr sign(b1 m_{t-1} + (1 - b1) g_t)",
        ),
        (adamx.lamb(0.1), "w_t <- w_{t-1} - lr*r_t u_t"),
        (adamx.set_to_zero(), "w_t <- w_{t-1}"),
        (adamx.keep_norm(), "w_t <- r_t w_{t-1} + r_t g_t"),
        (adamx.sgd(optax.constant_schedule(0.1)), "w_t <- w_{t-1} - lr_t g_t"),
        (
            adamx.chain(adamx.add_decayed_weights(0.1), adamx.sgd(0.5, 0.9)),
            "w_t <- w_{t-1} - lr trace_t",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_the_step_of_an_optimizer_is_one_line(tx, first):
    found = adamx.summary(tx, jax.ShapeDtypeStruct((3,), jnp.float32))
    assert found.formula.splitlines()[0] == first


class halved(adamx.Transformation):
    def emit(self, u, slots, step):
        return u / 2


def test_what_has_no_formula_stands_by_its_name():
    tx = adamx.chain(halved(), optax.clip(1.0), adamx.sgd(0.1))
    formula = formula_of(tx, {"w": jnp.zeros(3)})
    assert str(formula.step) == "w_{t-1} - lr clip(halved(g_t))"
    assert not has_formula(formula)


def test_a_function_of_combine_is_read_where_it_can_be():
    def step(fn):
        return str(formula_of(adamx.combine(fn, adamx.identity(), adamx.ema(0.5)), example()).step)

    assert step(lambda g, m: jnp.maximum(g, 0.0) - 3 * m**2) == (
        "w_{t-1} + max(g_t, 0) - 3 m_t^2"
    )  # fmt: skip
    assert step(jnp.hypot) == "w_{t-1} + hypot(g_t, m_t)"


@every
def test_latex_is_balanced(name):
    text = formula_of(
        TRANSFORMATIONS[name].make(), {"w": jnp.zeros((3, 4)), "b": jnp.zeros(3)}
    ).latex
    for opening, closing in ("{}", (r"\left", r"\right"), (r"\begin", r"\end")):
        assert text.replace(r"\leftarrow", "").count(opening) == text.count(closing)


def x(base):
    return symbol(base, 0, array=True)


@pytest.mark.parametrize(
    ("made", "text", "in_latex"),
    [
        (x("a") - (x("h") - x("c")), "a_t - (h_t - c_t)",
         r"A_t - \left( H_t - C_t \right)"),
        (x("a") / x("h") * x("c"), "a_t c_t / h_t", r"\frac{A_t C_t}{H_t}"),
        (x("a") / (x("h") * x("c")), "a_t / (h_t c_t)", r"\frac{A_t}{H_t C_t}"),
        (x("a") / (x("h") / x("c")), "a_t / (h_t / c_t)", r"\frac{A_t}{\frac{H_t}{C_t}}"),
        ((x("a") + x("h")) ** 2, "(a_t + h_t)^2", r"\left( A_t + H_t \right)^{2}"),
        (x("a") + -x("h") * x("c"), "a_t - h_t c_t", r"A_t - H_t C_t"),
        (-(x("a") + x("h")), "-(a_t + h_t)", r"-\left( A_t + H_t \right)"),
        (x("a") * expr(-2), "a_t (-2)", r"A_t \cdot \left( -2 \right)"),
        (x("a") * expr(1e-6), "a_t 1e-06", r"A_t \cdot 10^{-6}"),
        (x("a") ** x("h") ** 2, "a_t^(h_t^2)", r"A_t^{H_t^{2}}"),
        (0 * x("a") + 1 * x("h") - 0, "h_t", "H_t"),
        (where(Expr(">", (x("a"), x("h"))), 1, 0) * x("c"), "(1 if a_t > h_t else 0) c_t",
         r"\left( \begin{cases} 1 & \text{if } A_t > H_t \\ 0 & \text{otherwise} \end{cases}"
         r" \right) C_t"),
        (x("c") * Expr(">=", (x("a"), x("h"))), "c_t [a_t >= h_t]",
         r"C_t \left[ A_t \ge H_t \right]"),
    ],
    ids=str,
)  # fmt: skip
def test_brackets_stand_where_they_are_needed(made, text, in_latex):
    assert str(made) == text
    for letter in "ahc":
        in_latex = in_latex.replace(f"{letter.upper()}_t", rf"\boldsymbol{{{letter}}}_{{t}}")
    assert latex(made) == in_latex


# --------------------------------------------------------------------------------- what it costs


@every
def test_slots_and_scalars_are_all_of_the_state(name):
    params = jax.eval_shape(lambda: {"w": jnp.zeros((3, 4)), "b": jnp.zeros(3)})
    tx = TRANSFORMATIONS[name].make()
    found = adamx.summary(tx, params)
    state_of = jax.eval_shape(tx.init, params)
    state = jax.tree.leaves(state_of)
    assert found.bytes["slots"] + found.scalars == sum(x.size * x.dtype.itemsize for x in state)
    assert found.scalars <= (80 if {"monitor", "recent_norms"} & state_of.keys() else 40)


def test_nothing_is_allocated():
    huge = {"w": jax.ShapeDtypeStruct((2**40, 8), jnp.float32)}  # 32 TiB
    found = adamx.summary(adamx.adamw(1e-3, moments="packed8"), huge)
    assert (found.size, found.bytes["slots"]) == (2**43, 2**44)


@pytest.mark.parametrize(
    ("tx", "dtype", "slots", "traffic"),
    [
        (adamx.sgd(0.1), jnp.float32, 0, 12),
        (adamx.momentum(0.1), jnp.float32, 4, 20),
        (adamx.rmsprop(0.1), jnp.float32, 4, 20),
        (adamx.adamw(0.1), jnp.float32, 8, 28),
        (adamx.adamw(0.1, moments="packed16"), jnp.float32, 4, 20),
        (adamx.adamw(0.1, moments="packed8"), jnp.float32, 2, 16),
        (adamx.chain(adamx.clip_by_global_norm(1.0), adamx.adamw(0.1)), jnp.float32, 8, 32),
        (adamx.skip_nonfinite(adamx.adamw(0.1)), jnp.float32, 8, 32),
        (
            adamx.skip_nonfinite(adamx.chain(adamx.clip_by_global_norm(1.0), adamx.adamw(0.1))),
            jnp.float32, 8, 32,
        ),
        (adamx.skip_spikes(adamx.adamw(0.1)), jnp.float32, 8, 32),
        (adamx.chain(adamx.clip_by_zscore(), adamx.adamw(0.1)), jnp.float32, 8, 32),
        (adamx.master_weights(adamx.adamw(0.1)), jnp.bfloat16, 10, 26),
        (optax.adamw(0.1), jnp.float32, 8, 28),
        (adamx.set_to_zero(), jnp.float32, 0, 0),
    ],
    ids=lambda x: "optax" if type(x) is optax.GradientTransformationExtraArgs else str(x),
)  # fmt: skip
def test_bytes_of_slots_and_of_a_step(tx, dtype, slots, traffic):
    found = adamx.summary(tx, abstract(dtype))
    size = found.size
    width = jnp.dtype(dtype).itemsize * size
    assert size == 56
    assert found.bytes == {"parameters": width, "gradients": width, "slots": slots * size}
    assert found.traffic == traffic * size


@pytest.mark.parametrize("tx", [adamx.sgd(0.1), adamx.adamw(0.1)], ids=["sgd", "adamw"])
def test_the_compiled_step_moves_no_less(tx):
    params = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
    state = jax.eval_shape(tx.init, params)
    compiled = adamx.make_step(tx).lower(params, state, params).compile()
    cost: Any = compiled.cost_analysis()
    moved = (cost[0] if isinstance(cost, list) else cost)["bytes accessed"]
    found = adamx.summary(tx, params)
    floor = found.traffic
    # SGD is one kernel, so that the floor is what it moves; the scalars are a few bytes
    assert (
        floor
        <= moved
        <= (1.0001 * floor if state.keys() == {"count", "learning_rate"} else 2 * floor)
    )


def test_groups_are_lines_with_their_patterns():
    tx = adamx.by_path(
        {"embed": None, "*/bias": {"weight_decay": 0.0, "moments": "packed16"}},
        default=functools.partial(adamx.adamw, 0.1, weight_decay=0.5, mask=adamx.all_but("norm*")),
    )
    found = adamx.summary(tx, abstract())
    table = str(found).split("\n\n")[0].splitlines()
    assert [line.split("  ")[0] for line in table[1:]] == [
        "*/bias: dense/bias",
        "default: dense/kernel",
        "embed: embed",
        "default: norm/scale",
    ]
    assert "packed16 uint32" in table[1] and "frozen" in table[3]
    assert [leaf.frozen for leaf in found.leaves] == [False, False, True, False]
    assert "for dense/bias, norm/scale:\nw_t <- w_{t-1} - lr m^_t" in found.formula
    assert "for embed:\nw_t <- w_{t-1}" in found.formula
    assert found.warnings == ()


def test_a_line_a_leaf_shows_the_shapes():
    found = adamx.summary(adamx.adam_mini(0.1, mask="*kernel"), abstract(), by="leaf")
    assert "dense/kernel  [4, 4]  float32       16  mu float32, nu_mean float32[1, 4]" in str(found)
    assert adamx.summary(adamx.sgd(0.1), {"a": None, "b": jnp.zeros(2)}).size == 2


def test_a_foreign_state_is_listed_as_it_is():
    found = adamx.summary(optax.chain(optax.scale_by_adam(), optax.scale(-0.1)), abstract())
    assert list(found.leaves[0].slots) == ["0/mu", "0/nu"] and found.scalars == 4
    assert found.formula == "w_t <- w_{t-1} + chain(g_t)" and found.composition == "chain(...)"
    inside = adamx.chain(optax.scale_by_adam(), adamx.scale_by_learning_rate(0.1))
    found = adamx.summary(inside, abstract())
    assert list(found.leaves[0].slots) == ["scale_by_adam/mu", "scale_by_adam/nu"]
    assert found.formula.startswith("w_t <- w_{t-1} - lr scale_by_adam(g_t)")
    single = adamx.summary(optax.adam(0.1), jax.ShapeDtypeStruct((3,), jnp.float32))
    assert single.bytes["slots"] == 24 and single.scalars == 4


def sharded(mesh: Any) -> Any:
    """Return shapes: a matrix over both axes of a mesh, a vector over one, one that is whole."""
    specs = {"b": ((8,), ("y",)), "place": ((3, 4), ()), "w": ((8, 4), ("x", "y"))}
    return {
        name: jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec))
        )
        for name, (shape, spec) in specs.items()
    }


@pytest.mark.parametrize(
    "tx",
    [
        adamx.adam_mini(0.1),
        adamx.master_weights(adamx.adamw(0.1, moments="packed8")),
        adamx.skip_nonfinite(adamx.by_path({"b": None}, default=adamx.adam(0.1))),
        optax.adam(0.1),
    ],
    ids=["smaller slots", "packed8", "a group that is frozen", "Optax"],
)
def test_bytes_on_a_device_are_those_of_the_arrays_there(tx):
    mesh = mesh_of((4, 2), ("x", "y"))
    params = {n: jax.device_put(jnp.ones(x.shape), x.sharding) for n, x in sharded(mesh).items()}
    found = adamx.summary(tx, params)

    def there(tree):
        arrays = [x for x in jax.tree.leaves(tree) if x.ndim]
        return sum(x.addressable_shards[0].data.nbytes for x in arrays)

    on_device = found.bytes_per_device
    state = jax.device_put(tx.init(params), adamx.state_sharding(tx, params))
    assert on_device == {
        "parameters": there(params),
        "gradients": there(params),
        "slots": there(state),
    }
    total = re.search(r"together +\S+ +\S+ B +(\d+) B\n", str(found))
    assert total and int(total[1]) == sum(on_device.values())


def test_shapes_on_a_mesh_that_is_not_there_have_bytes_on_a_device_too():
    found = adamx.summary(adamx.adamw(0.1), sharded(AbstractMesh((4, 2), ("x", "y"))))
    assert found.bytes["slots"] == 8 * (8 + 12 + 32)
    assert found.bytes_per_device["slots"] == 8 * (4 + 12 + 4)
    assert re.search(rf"at least +28 .* {28 * (4 + 12 + 4)} B\n", str(found))
    whole = adamx.summary(adamx.adamw(0.1), abstract())
    assert whole.bytes_per_device == whole.bytes and "a device" not in str(whole)


CHIPS = {  # the columns of the table: optimizer, and the parameters' dtype
    "float32": (lambda: adamx.adamw(1e-3), jnp.float32),
    "packed16": (lambda: adamx.adamw(1e-3, moments="packed16"), jnp.float32),
    "packed8": (lambda: adamx.adamw(1e-3, moments="packed8"), jnp.float32),
    "remainder8": (
        lambda: adamx.master_weights(adamx.adamw(1e-3, moments="packed8"), "remainder8"),
        jnp.bfloat16,
    ),
}


def test_the_table_of_bytes_on_each_chip_is_what_summary_counts():
    page = (Path(__file__).parents[1] / "docs" / "scaling-up.md").read_text()
    rows = re.findall(r"^\| (\d+)B, (\d+) \| (.*) \|$", page, re.MULTILINE)
    assert len(rows) == 6
    for billions, chips, cells in rows:
        where = NamedSharding(AbstractMesh((int(chips),), ("data",)), PartitionSpec("data"))
        size = int(billions) * 10**9
        for cell, (make, dtype) in zip(cells.split(" | "), CHIPS.values(), strict=True):
            like = jax.ShapeDtypeStruct((512, size // 512), dtype, sharding=where)
            found = sum(adamx.summary(make(), like).bytes_per_device.values()) / 1e9
            assert cell == f"{found:.3g}"


# ------------------------------------------------------------------------- what it warns of


def warnings_of(tx, params):
    return [warning.split(":")[0] for warning in adamx.summary(tx, params).warnings]


def test_narrow_parameters_without_masters_are_warned_of():
    narrow = abstract(jnp.bfloat16)
    assert "of the parameters' leaves are bfloat16" in warnings_of(adamx.adam(0.1), narrow)[0]
    assert "may lose small steps" in warnings_of(optax.adam(0.1), narrow)[0]
    assert warnings_of(adamx.master_weights(adamx.adam(0.1)), narrow) == []
    assert warnings_of(adamx.adam(0.1), abstract()) == []


def test_a_decay_of_biases_and_norms_is_warned_of():
    (found,) = warnings_of(adamx.adamw(0.1), abstract())
    assert found == "weight decay acts on dense/bias, norm/scale, of rank 1 or less"
    for tx in (
        adamx.adamw(0.1, mask=adamx.all_but("*bias", "*scale")),
        adamx.adamw(0.1, weight_decay=0.0),
        adamx.adam(0.1),
    ):
        assert warnings_of(tx, abstract()) == []
    assert warnings_of(adamx.adamw(0.1), {"w": jnp.zeros(3)}) == []  # nothing else to decay


def test_an_eps_that_dominates_is_warned_of():
    assert warnings_of(adamx.adam(0.1, eps=1e-3), abstract()) == ["eps = 0.001"]
    assert warnings_of(adamx.adam(0.1, eps_root=1e-6), abstract()) == ["eps_root = 1e-06"]
    assert warnings_of(adamx.adam(0.1, eps=9e-4, eps_root=9e-7), abstract()) == []
    assert warnings_of(adamx.chain(adamx.adaptive_clip(0.1), adamx.sgd(0.1)), abstract()) == []


def test_other_warnings_are_passed_on():
    def init(params):
        warnings.warn(f"an init of one's own, of {len(params)}", UserWarning, stacklevel=2)
        return optax.EmptyState()

    tx = optax.GradientTransformation(init, optax.identity().update)
    with pytest.warns(UserWarning, match="an init of one's own"):
        adamx.summary(tx, abstract())


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: adamx.summary(adamx.adam, abstract()), TypeError,  # pyright: ignore
         "summary: tx must be an adamx or Optax transformation.*write it as a call"),
        (lambda: adamx.summary(adamx.adam(0.1), abstract(), by="layer"), ValueError,
         "summary: by must be 'group' or 'leaf', got 'layer'"),
        (lambda: adamx.summary(adamx.adam(0.1), {"w": jnp.zeros(2), "f": jax.nn.relu}), TypeError,
         "summary: leaf 'f' must be a floating-point array or its shape, got .*None"),
        (lambda: adamx.summary(adamx.adam(0.1), {"i": jnp.zeros(2, int)}), TypeError,
         r"summary: leaf 'i' .*got int32\[2\]"),
        (lambda: adamx.summary(adamx.adamw(0.1, mask="*bais"), abstract()), ValueError,
         "the pattern '\\*bais' matches no leaf"),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
