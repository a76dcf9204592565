"""Transformations, trees, dtypes, numbers and mistakes drawn at random: an error or a right answer.

A transformation is a line of table.py, an optimizer with hyperparameters from the whole of their
ranges, or a random composition. It takes three steps of gradients made from a few numbers, the
worst of their dtype among them: NaN, infinity, zeros of both signs, the smallest and the largest.

    python -m pytest tests/test_fuzz.py                      some examples, always the same
    python -m pytest tests/test_fuzz.py -m slow              some hundred, always the same
    ADAMX_FUZZ=2000 python -m pytest tests/test_fuzz.py      2000 for each test, others each time

Compiling takes nearly all of the time, so that one compiled step serves several gradients.
"""

import contextlib
import functools
import operator
import os
import re
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, spec
from hyperparameters import HYPERPARAMETERS, build
from hypothesis import strategies as st
from table import TRANSFORMATIONS

import adamx
from adamx.core.concept import any_of
from adamx.storage import masters

pytestmark = pytest.mark.usefixtures("quick_compiler")
EXAMPLES = int(os.environ.get("ADAMX_FUZZ", "0"))


SHARE = 5  # of the examples, one in so many is fast


def fuzzed(number, *strategies):
    """Make a test of so many examples, and a fast one of a share of them, from one of arguments."""

    def decorate(law):
        @pytest.mark.parametrize(
            "examples", [EXAMPLES or number // SHARE, pytest.param(number, marks=pytest.mark.slow)]
        )
        def test(examples):
            settings = hypothesis.settings(
                deadline=None,
                max_examples=examples,
                database=None,
                suppress_health_check=[*hypothesis.HealthCheck],  # pyright: ignore
                phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
            )
            run = settings(hypothesis.given(*strategies)(law))
            if not EXAMPLES:
                run = hypothesis.seed(1)(run)  # always the same
            run()

        test.__name__ = law.__name__
        return test

    return decorate


# ------------------------------------------------------------------------------------- parameters

SHAPES = [(3,), (2, 2), (), (1,), (0,), (1, 0), (2, 1, 3), (1, 2, 1, 2)]
NARROW = ["float32", "bfloat16", "float16"]
DTYPES = [*NARROW, "float64", "complex64"]


def trees(leaf):
    """A small model, or nested dicts, lists and tuples; some leaves are None, some trees empty."""
    names = st.sampled_from(["w", "b", "bias"])

    def deeper(inside):
        many = st.lists(inside, max_size=2)
        return st.one_of(st.dictionaries(names, inside, max_size=2), many, many.map(tuple))

    nested = st.recursive(st.one_of(leaf, leaf, st.none()), deeper, max_leaves=3)
    model = st.fixed_dictionaries({"w": leaf, "b": st.one_of(leaf, st.none())})
    return st.one_of(model, model, leaf, nested)


def leaves(dtypes):
    """Parameters of any shape and of one of the dtypes."""
    return st.builds(
        lambda shape, dtype, palette: fill(np.zeros(shape, jnp.dtype(dtype)), palette),
        st.sampled_from(SHAPES),
        st.sampled_from(dtypes),
        st.lists(st.sampled_from([1.0, -0.5, 0.0, 3.0, 1e-4]), min_size=1, max_size=2),
    )


def fill(like, palette, start=0):
    """Return an array of the shape and dtype of another, of the numbers of a palette in turn."""
    info = jnp.finfo(like.dtype)
    with np.errstate(all="ignore"):
        numbers = np.resize(np.roll(palette, start), like.shape).astype(np.float64)
        limited = np.where(np.isinf(numbers), numbers, np.clip(numbers, info.min, info.max))
        values = limited.astype(info.dtype)
        if jnp.iscomplexobj(like):
            values = values + 1j * np.roll(values, 1)
        return np.asarray(values.astype(like.dtype))


def filled(tree, palette):
    """Fill the leaves of a tree, each a little differently."""
    flat, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([fill(leaf, palette, i) for i, leaf in enumerate(flat)])


ORDINARY = [0.0, 1.0, -0.5, 3.0, 1e-3, -100.0]
FINITE = [*ORDINARY, -0.0, 1e-4, 1e-8, -1e-20, 1e-30, 2.0**-126, 1e-40, 5e-324, -1e5]
FINITE += [1e10, 1e18, -2e19, 1e30, 2e37, -2e37]  # above, sums and corrections leave float32
NORMAL = [x for x in FINITE if x == 0 or abs(x) > 1e-36]
BAD = [*FINITE, 3.3e38, -1.7e308, np.nan, np.inf, -np.inf]


# -------------------------------------------------------------------------------- transformations

USUAL = {
    "decay": [0.0, 0.5, 0.9, 0.999],
    "fraction": [0.0, 0.5, 0.9, 1.0],
    "share": [1.0, 0.5, 0.9],
    "non-negative": [1e-8, 1e-3, 0.5, 1.0],
    "rate": [0.1, 1e-3, 0.0, 1.0],
    "finite": [0.5, -0.5, 1.0, 0.0],
    "open decay": [0.5, 0.9, 0.99],
    "above 0": [1.0, 0.5, 3.0],
}
"""By the kind of hyperparameter."""
SCHEDULED = {"scheduled decay": "decay", "scheduled fraction": "fraction", "scheduled": "finite"}
"""Those that may be a schedule, beside the rate: by the kind of its values."""
NEARLY_ONE = [1 - 2.0**-24, 1 - 2.0**-53]
ENDS = {
    "decay": [5e-324, 1e-30, *NEARLY_ONE],
    "fraction": [5e-324, *NEARLY_ONE],
    "share": [1e-3, 5e-324, *NEARLY_ONE],
    "non-negative": [0.0, 5e-324, 1e-30, 1e-45, 1e30, 3e38],
    # 1e30 times what docs/deviations.md says of squares beyond float32 would be infinite
    "rate": [5e-324, 1e-30, 1e10],
    "finite": [1e-30, -1e30, 3e38],
    "open decay": [5e-324, 1e-30, *NEARLY_ONE],
    "above 0": [1e-30, 1e30],
}


def halved(value, step):
    """A schedule: half of it in the second step, nothing in the third."""
    return jnp.float32(value) * jnp.select([step == 0, step == 1], [1.0, 0.5], 0.0)


@st.composite
def hyperparameters(draw, kind, ends=False):
    """A number, a 0-d array of it, or a schedule that is constant or changes within the range."""
    plain = SCHEDULED.get(kind) or kind
    value = draw(st.sampled_from(USUAL[plain] + (ENDS[plain] if ends else [])))
    narrow = np.float32(value)
    fits = np.isfinite(narrow) and not (narrow == 1 and value < 1) and not (narrow == 0 < value)
    as_what = ["number", *(["array", "numpy"] if fits else [])]
    as_what += ["schedule"] if (kind == "rate" or kind in SCHEDULED) and fits else []
    how = draw(st.sampled_from(as_what))
    if how == "schedule":
        return functools.partial(halved, value)
    return {"number": value, "array": jnp.float32(value) if fits else 0, "numpy": narrow}[how]


@st.composite
def optimizers(draw, ends=False):
    """A public function with some of its hyperparameters drawn."""
    function = draw(st.sampled_from(sorted(HYPERPARAMETERS)))
    kinds = HYPERPARAMETERS[function]
    names = draw(st.lists(st.sampled_from(sorted(kinds)), unique=True, max_size=4))
    names = {*names, *({"step_size", "factor"} & kinds.keys())}
    chosen = {name: draw(hyperparameters(kinds[name], ends)) for name in sorted(names)}
    return build(function, **chosen)


USUALLY = {kind: hyperparameters(kind) for kind in USUAL}


@st.composite
def pieces(draw, depth=2):
    """A concept that acts on one array, or a composition of such; each slot has its own name."""
    h = {kind: draw(strategy) for kind, strategy in USUALLY.items()}
    name = "s" + str(draw(st.integers(0, 99)))
    second = {"decay": h["decay"], "name": name}
    choices = [
        adamx.identity,
        adamx.sign,
        adamx.growing_clip,
        lambda: adamx.scale(h["finite"]),
        lambda: adamx.ema(h["decay"], name=name),
        lambda: adamx.ema(h["decay"], jnp.bfloat16, name=name, initial=h["finite"]),
        lambda: adamx.trace(h["fraction"], nesterov=draw(st.booleans()), name=name),
        lambda: adamx.nesterov_ema(h["decay"], name=name),
        lambda: adamx.scheduled_nesterov_ema(h["decay"], h["non-negative"], name=name),
        lambda: adamx.interpolated_ema(h["decay"], h["open decay"], name=name),
        lambda: adamx.difference(name),
        lambda: adamx.bias_correction(h["decay"], name),
        lambda: adamx.add_decayed_weights(h["rate"], draw(masks)),
        lambda: adamx.add_cautious_decayed_weights(h["rate"], draw(masks)),
        lambda: adamx.scale_by_learning_rate(h["rate"]),
        lambda: adamx.clip_by_value(h["non-negative"]),
        lambda: adamx.clip_by_rms(h["non-negative"]),
        lambda: adamx.adaptive_clip(h["non-negative"], draw(st.sampled_from([1e-3, 0.0]))),
        lambda: adamx.trust_ratio(h["non-negative"], draw(st.sampled_from([1e-6, 0.0]))),
        lambda: adamx.bfloat16(adamx.trace(h["fraction"], name=name)),
        lambda: adamx.scale_by_adam(eps=draw(st.sampled_from([0.0, 1e-8])), moments=draw(STORED)),
        lambda: adamx.ema_of_params(h["decay"], name),
        lambda: adamx.mean_of_params(name),
        adamx.set_to_zero,
    ]
    if depth:
        squares = [
            lambda: adamx.ema_of_squares(h["decay"], h["non-negative"], name=name),
            lambda: adamx.sum_of_squares(h["non-negative"], name),
            lambda: adamx.seeded_ema_of_squares(**second),
            lambda: adamx.additive_average_of_squares(**second),
            lambda: adamx.ema_of_mean_squares(h["decay"], draw(st.sampled_from([None, ()])), name),
            lambda: adamx.chain(adamx.ema_of_squares(**second), adamx.running_max(name + "m")),
        ]
        denominator = draw(st.sampled_from(squares))
        inner = pieces(depth - 1)
        choices += [
            lambda: adamx.chain(draw(inner), draw(inner)),
            lambda: adamx.combine(operator.add, draw(inner), draw(inner)),
            lambda: adamx.cautious(draw(inner), xi=h["non-negative"]),
            lambda: adamx.rms_scaling(draw(inner), second_moment=denominator()),
            lambda: adamx.delayed_rms_scaling(denominator()),
            lambda: adamx.ratio(draw(inner), denominator=adamx.decaying_max(**second)),
            lambda: adamx.rectified(
                adamx.rms_scaling(draw(inner), second_moment=denominator()), decay=h["decay"]
            ),
            lambda: adamx.update_clipping(adamx.scale_by_adam(), h["decay"]),
            lambda: adamx.schedule_free(draw(inner), h["rate"], h["share"]),
            lambda: adamx.bfloat16(draw(inner)),
        ]
    return draw(st.sampled_from(choices))()


STORED = st.sampled_from(["float32", "float32", "bfloat16", "packed16", "packed8"])
masks = st.sampled_from(
    [None, True, False, adamx.all_but("*b"), "*", ("*w", "*"), lambda p: jax.tree.map(bool_of, p)]
)


def bool_of(leaf):
    return jnp.ndim(leaf) != 1


@st.composite
def compositions(draw):
    """A random chain of pieces, of what acts on trees, and of wrappers around the whole."""
    h = {kind: draw(strategy) for kind, strategy in USUALLY.items()}
    foreign = [optax.ema(0.5), optax.trace(0.5), optax.scale(0.5)]
    trees = [
        lambda: adamx.clip_by_global_norm(h["rate"], record=draw(st.booleans())),
        lambda: draw(st.sampled_from(foreign)),
        lambda: adamx.by_path(
            {"*b": draw(st.one_of(st.none(), pieces(1)))}, default=draw(st.one_of(pieces(1)))
        ),
        lambda: adamx.by_path(
            {"*w": {"learning_rate": h["rate"]}, "*": None},
            default=functools.partial(adamx.adamw, learning_rate=0.1),
        ),
    ]
    stages = [
        draw(pieces()) if draw(st.integers(0, 3)) else draw(st.sampled_from(trees))()
        for _ in range(draw(st.integers(1, 3)))
    ]
    tx: Any = adamx.chain(*stages)
    wrappers = [
        lambda tx: adamx.skip_nonfinite(tx, draw(st.sampled_from([None, 0, 1]))),
        lambda tx: adamx.accumulate(tx, draw(st.integers(1, 3))),
        lambda tx: adamx.master_weights(
            tx, draw(st.sampled_from(["remainder", "remainder8", "float32"]))
        ),
    ]
    for _ in range(draw(st.integers(0, 2))):
        tx = draw(st.sampled_from(wrappers))(tx)
    return tx


# ------------------------------------------------------------------------------------------- laws

OWN = re.compile(rf"^(adamx|{'|'.join(adamx.__all__)})(: |\.)")
NO_STORAGE = 'moments="float32"'


def assert_own(error):
    """An error of adamx says in which function, or at which leaf, something is wrong."""
    while error.__context__ is not None and not error.__suppress_context__:
        error = error.__context__
    assert isinstance(error, ValueError | TypeError), repr(error)
    assert OWN.match(str(error)), repr(error)


@st.composite
def made(draw, strategy):
    """A transformation, or None where adamx refuses to make it."""
    try:
        return draw(strategy)
    except (ValueError, TypeError) as error:
        assert_own(error)
        return None


LINES = st.sampled_from(sorted(TRANSFORMATIONS)).map(lambda name: TRANSFORMATIONS[name].make())
ANY = st.one_of(made(LINES), made(optimizers()), made(compositions()))
palettes = st.lists(st.sampled_from(BAD), min_size=1, max_size=3)


@contextlib.contextmanager
def setting(tx, x64):
    """Run with float64 or without; Optax's own stages need dtypes to be promoted."""
    foreign = any_of(tx, lambda part: isinstance(part, adamx.named))
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("standard" if foreign else "strict"):
        yield


def first_state(tx, params):
    """Return the first state, or None where adamx refuses the parameters."""
    try:
        return tx.init(params)
    except (ValueError, TypeError) as error:
        assert_own(error)
        return None


def check_updates(updates, params):
    """Updates are like the gradients; those of masters are float32 where the gradients are 16."""

    def check(u, p):
        wide = jnp.float32 if p.dtype.itemsize == 2 else p.dtype
        assert u.shape == jnp.shape(p) and not u.weak_type
        assert u.dtype in (p.dtype, wide), (u.dtype, p.dtype)

    assert jax.tree.structure(updates) == jax.tree.structure(params)
    jax.tree.map(check, updates, params)


@fuzzed(60, ANY, trees(leaves(DTYPES)), st.lists(palettes, min_size=3, max_size=3), st.booleans())
def test_shapes_and_dtypes_stay_whatever_the_numbers(tx, params, fills, x64):
    if tx is None:
        return
    with setting(tx, x64):
        params = jax.tree.map(jnp.asarray, params)
        if (state := first_state(tx, params)) is None:
            return
        before = spec(state)
        update = jax.jit(tx.update)
        for number, palette in enumerate(fills):
            grads = jax.tree.map(jnp.asarray, filled(params, palette))
            try:
                updates, new = update(grads, state, params)
            except (ValueError, TypeError) as error:
                assert_own(error)
                return
            check_updates(updates, params)
            assert spec(new) == before
            if number == 1 and finite((updates, new)):
                assert_close(tx.update(grads, state, params), (updates, new))
            state = new


def trajectory(tx, params, fills):
    """Take a step for each gradient, and move; return [(updates, state, params), ...]."""
    update, state, steps = jax.jit(tx.update), tx.init(params), []
    for grads in fills:
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
        updates, state = update(grads, state, params)
        params = adamx.apply_updates(params, updates)
        kept = {name: x for name, x in state.items() if name not in masters.NAMES}
        steps.append((updates, kept, params))  # masters of float64 keep nothing
    return steps


def widened(x):
    return np.asarray(x, np.complex128 if jnp.iscomplexobj(x) else np.float64)


def finite(tree):
    return all(np.isfinite(widened(x)).all() for x in jax.tree.leaves(tree))


def in_range(true, tree):
    """Say whether the true values are well within what the dtypes hold."""

    def holds(t, x):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return True
        largest = float(jnp.finfo(x.dtype).max) / 16
        return bool(np.all(np.abs(np.asarray(t, np.complex128)) < largest))

    return all(jax.tree.leaves(jax.tree.map(holds, true, tree)))


@fuzzed(
    50,
    st.one_of(made(LINES), made(optimizers(ends=True)), made(compositions())),
    trees(leaves([*NARROW, "complex64"])),
    st.lists(st.lists(st.sampled_from(FINITE), min_size=1, max_size=3), min_size=3, max_size=3),
)
def test_finite_in_finite_out(tx, params, fills):
    if tx is None:
        return
    fills = [filled(params, palette) for palette in fills]
    with setting(tx, False):
        params = jax.tree.map(jnp.asarray, params)
        try:
            got = trajectory(tx, params, fills)
        except (ValueError, TypeError) as error:
            assert_own(error)
            return
    if all(map(finite, got)):
        return
    with setting(tx, True):
        wide = jax.tree.map(lambda p: jnp.asarray(widened(p)), params)
        try:
            true = trajectory(tx, wide, fills)
        except (ValueError, TypeError) as error:
            assert NO_STORAGE in str(error), error
            return
    for g, t in zip(got, true, strict=True):
        if not in_range((t[0], t[2]), (g[0], g[2])):
            return
        assert finite(g), (g, t)


@fuzzed(
    20,
    st.one_of(made(LINES), made(optimizers())),
    trees(leaves(NARROW)),
    st.lists(st.sampled_from(NORMAL), min_size=1, max_size=3),
    st.integers(1, 2),
)
def test_equal_micro_gradients_make_the_step(tx, params, palette, every):
    if tx is None:
        return
    try:
        outer = adamx.accumulate(tx, every)
    except (ValueError, TypeError) as error:
        return assert_own(error)
    # g + g and half of it are exact where neither overflows nor is flushed
    with setting(tx, False):
        params = jax.tree.map(jnp.asarray, params)
        if (state := first_state(outer, params)) is None:
            return
        grads = jax.tree.map(jnp.asarray, filled(params, palette))
        wanted, _ = jax.jit(tx.update)(grads, tx.init(params), params)
        update = jax.jit(outer.update)
        got, state = update(grads, state, params)
        if every == 2:
            got, state = update(grads, state, params)
        if finite(wanted):  # what bias_correction alone makes of the largest numbers is infinite
            assert_close(got, wanted)


@fuzzed(
    25,
    st.one_of(made(LINES), made(optimizers()), made(compositions())),
    trees(leaves(DTYPES)),
    palettes,
    st.sampled_from([np.nan, np.inf, -np.inf]),
)
def test_a_skipped_step_changes_nothing(tx, params, palette, bad):
    if tx is None:
        return
    try:
        outer = adamx.skip_nonfinite(tx)
    except (ValueError, TypeError) as error:
        return assert_own(error)
    with setting(tx, False):
        params = jax.tree.map(jnp.asarray, params)
        if (state := first_state(outer, params)) is None:
            return
        update = jax.jit(outer.update)
        try:
            updates, state = update(filled(params, ORDINARY), state, params)
        except (ValueError, TypeError) as error:
            return assert_own(error)
        params = adamx.apply_updates(params, updates)
        grads = jax.tree.map(jnp.asarray, filled(params, [bad, *palette]))
        updates, after = update(grads, state, params)
        if finite(grads):
            return
        assert int(after["skipped"]) == 1
        counters = ("skipped", "consecutive_skipped")
        for name in state.keys() - set(counters):
            jax.tree.map(bitwise, after[name], state[name])
        jax.tree.map(bitwise, adamx.apply_updates(params, updates), params)


def bitwise(a, b):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), (a, b)


# --------------------------------------------------------------------------------------- mistakes

WRONG_LEAVES: dict[str, Any] = {
    "another shape": lambda x: jnp.ones((*jnp.shape(x), 2)),
    "one axis more": lambda x: jnp.ones((1, *jnp.shape(x))),
    "integers": lambda x: jnp.ones(jnp.shape(x), jnp.int32),
    "booleans": lambda x: jnp.ones(jnp.shape(x), bool),
    "complex": lambda x: jnp.ones(jnp.shape(x), jnp.complex64),
    "half": lambda x: jnp.ones(jnp.shape(x), jnp.float16),
    "None": lambda _: None,
    "a string": lambda _: "w",
    "a number": lambda _: 1.5,
    "a branch": lambda x: {"w": x},
    "an object": lambda _: object(),
    "a key": lambda _: jax.random.key(0),
}
WRONG_TREES: dict[str, Any] = {
    "nothing": lambda _: None,
    "a list of it": lambda tree: [tree],
    "an empty dict": lambda _: {},
    "an empty list": lambda _: [],
    "one leaf": lambda _: jnp.ones(3),
    "one more": lambda tree: {"w": tree, "more": jnp.ones(2)},
    "less": lambda tree: dict(list(tree.items())[1:]) if isinstance(tree, dict) else (),
    "a state of Optax": lambda tree: optax.sgd(0.1, 0.9).init(tree),
    "another state": lambda _: adamx.adamw(0.1).init({"w": jnp.ones(3), "b": None}),
}


def with_a_mistake(tree, where, wrong):
    """Return a tree with one wrong leaf, or with a wrong tree at one of its branches."""
    if wrong in WRONG_TREES:
        return WRONG_TREES[wrong](tree)
    flat, treedef = jax.tree.flatten(tree)  # beside None anything may stand
    if flat:
        flat[where % len(flat)] = WRONG_LEAVES[wrong](flat[where % len(flat)])
    return treedef.unflatten(flat)


@fuzzed(
    150,
    made(st.one_of(LINES, optimizers(), compositions())),
    trees(leaves([*NARROW, "complex64"])),
    st.integers(0, 2),
    st.integers(0, 20),
    st.sampled_from([*WRONG_LEAVES, *WRONG_TREES]),
)
def test_a_mistake_is_an_error_or_does_no_harm(tx, params, which, where, wrong):
    if tx is None:
        return
    with setting(tx, False):
        params = jax.tree.map(jnp.asarray, params)
        if (state := first_state(tx, params)) is None:
            return
        given = [params, state, params]  # updates, state, params
        given[which] = with_a_mistake(given[which], where, wrong)
        try:
            updates, new = jax.eval_shape(lambda: tx.update(*given))
        except (ValueError, TypeError) as error:
            return assert_own(error)
        for before, after in ((given[0], updates), (given[1], new)):
            assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, before)
        assert all(jnp.issubdtype(u.dtype, jnp.inexact) for u in jax.tree.leaves(updates))
