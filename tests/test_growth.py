"""A leaf that grew keeps the slots of its old rows; its new rows start as `init` starts them."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, devices, draw, mesh_of, spec
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from table import TRANSFORMATIONS, of_every_other_kind

import adamx

pytestmark = pytest.mark.usefixtures("quick_compiler")

ROWS = {"embed": 0, "head": -1}
GREW = {"embed": (0, 3), "head": (1, 3)}  # axis and old rows of each
AFTER = draw({"embed": jnp.ones((5, 2)), "head": jnp.ones((2, 5)), "w": jnp.ones(2)})


def old_rows(path: str, x: Any) -> Any:
    axis, number = GREW.get(path, (0, None))
    return x[:number] if axis == 0 else x[:, :number]


def new_rows(path: str, x: Any) -> Any:
    axis, number = GREW[path]
    return x[number:] if axis == 0 else x[:, number:]


def before(tree: Any) -> Any:
    return {path: old_rows(path, x) for path, x in tree.items()}


def after_steps(tx: Any, params: Any, steps: int = 2) -> Any:
    state = tx.init(params)
    for step in range(steps):
        _, state = tx.update(before(draw(AFTER, step)), state, params)
    return state


def by_leaf(state: Any) -> dict[tuple[str, str], np.ndarray]:
    """Return the arrays of a state by entry and by leaf, whichever containers are between."""
    flat = jax.tree_util.tree_flatten_with_path(state)[0]
    keys = [
        [k for k in jax.tree_util.keystr(p, simple=True, separator="/").split("/")] for p, _ in flat
    ]
    return {("/".join(k[:-1]), k[-1]): np.asarray(x) for k, (_, x) in zip(keys, flat, strict=True)}


def assert_grown(state: Any, saved: Any, first: Any, report: adamx.Adaptation) -> None:
    """Compare a state with the saved rows and, after them, those of a first state.

    That a leaf grew shows only in slots with rows; others of its slots are told then.
    """
    found, old, start = map(by_leaf, (state, saved, first))
    assert found.keys() == old.keys()
    grown, shared = set(), set()
    for (entry, leaf), x in found.items():
        was = old[entry, leaf]
        if x.shape == was.shape:
            np.testing.assert_array_equal(x, was)
            shared |= {f"{entry}/{leaf}"} if leaf in GREW and x.ndim else set()
        else:
            grown.add(f"{entry}/{leaf}")
            np.testing.assert_array_equal(old_rows(leaf, x), was)
            np.testing.assert_array_equal(new_rows(leaf, x), new_rows(leaf, start[entry, leaf]))
    told = {f"{entry}/{leaf}" for entry, leaf in found for g in grown if g.endswith(f"/{leaf}")}
    assert (set(report.grown), set(report.shared)) == (grown, shared & told)
    assert (report.filled, report.dropped, report.late) == ((), (), ())


@pytest.mark.usefixtures("promotion_of_foreign_stages")
@of_every_other_kind(0)
def test_old_rows_keep_their_slots_and_new_ones_start(name):
    tx, params = TRANSFORMATIONS[name].make(), before(AFTER)
    saved, first = after_steps(tx, params), tx.init(AFTER)
    state, report = adamx.adapt_state(tx, AFTER, jax.tree.map(np.asarray, saved), rows=ROWS)
    assert spec(state) == spec(first)
    assert_grown(state, saved, first, report)
    updates, _ = tx.update(draw(AFTER, 7), state, AFTER)
    if not TRANSFORMATIONS[name].whole:
        expected, _ = tx.update(before(draw(AFTER, 7)), saved, params)
        assert_close(before(updates), expected)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("float32", "packed16"),
        pytest.param("packed16", "packed8", marks=pytest.mark.slow),
        pytest.param("packed8", "bfloat16", marks=pytest.mark.slow),
        pytest.param("packed8", "packed8", marks=pytest.mark.slow),
    ],
)
def test_rows_are_added_where_the_storage_changes(old, new):
    params = before(AFTER)
    tx, by = (adamx.adamw(0.1, moments=moments) for moments in (new, old))
    state, report = adamx.adapt_state(tx, AFTER, after_steps(by, params), saved_by=by, rows=ROWS)
    expected, _ = adamx.adapt_state(tx, params, after_steps(by, params), saved_by=by)
    first, read = tx.init(AFTER), adamx.moments
    assert spec(state) == spec(first)
    assert_grown(read(state, tx), read(expected, tx), read(first, tx), report)


def test_new_rows_start_as_the_transformation_to_go_on_with_starts_them():
    old, new = adamx.adagrad(0.1, 0.25), adamx.adagrad(0.1, 0.5, moments="bfloat16")
    saved = after_steps(old, before(AFTER))
    state, _ = adamx.adapt_state(new, AFTER, saved, saved_by=old, rows=ROWS)
    np.testing.assert_array_equal(state["sum_of_squares"]["embed"][3:], 0.5)


@pytest.mark.parametrize(
    "keep", ["remainder", pytest.param("remainder8", marks=pytest.mark.slow), "float32"]
)
def test_new_rows_have_the_masters_of_their_parameters(keep):
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), AFTER)
    tx = adamx.master_weights(adamx.adam(0.01), keep)
    step, state, params = adamx.make_step(tx), tx.init(before(low)), before(low)
    params, state = step(params, state, before(low))
    masters = adamx.masters(params, state)
    grown = {n: jnp.concatenate([params[n], new_rows(n, low[n])], GREW[n][0]) for n in GREW}
    grown["w"] = params["w"]
    state, _ = adamx.adapt_state(tx, grown, state, rows=ROWS)
    found = adamx.masters(grown, state)
    for n in GREW:
        np.testing.assert_array_equal(old_rows(n, found[n]), masters[n])
        np.testing.assert_array_equal(
            new_rows(n, found[n]), new_rows(n, low[n]).astype(jnp.float32)
        )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_slots_are_where_init_puts_them(kind):
    """From the host, from one device, and from the same mesh; 8 rows become 12 on four devices."""
    mesh = mesh_of((4, 2), ("x", "y"), kind)
    where = {"embed": PartitionSpec("x", "y"), "w": PartitionSpec()}

    def put(tree):
        return {n: jax.device_put(x, NamedSharding(mesh, where[n])) for n, x in tree.items()}

    params = {"embed": jnp.arange(24.0).reshape(12, 2), "w": jnp.ones(2)}
    old = {"embed": params["embed"][:8], "w": params["w"]}
    tx = adamx.adam_mini(0.1, axes=lambda path, leaf: (leaf.ndim - 1,))
    first, one = tx.init(put(params)), tx.init(old)
    one = tx.update(old, one, old)[1]
    same = jax.jit(tx.init)(put(old))
    same = tx.update(put(old), same, put(old))[1]
    for saved in (one, jax.tree.map(np.asarray, one), jax.device_put(one, devices(2)[1]), same):
        state, report = adamx.adapt_state(tx, put(params), saved, rows={"embed": 0})
        assert report.grown == ("mu/embed", "nu_mean/embed")
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(first), strict=True):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
            assert a.sharding.mesh == b.sharding.mesh
        np.testing.assert_array_equal(np.asarray(state["mu"]["embed"])[:8], saved["mu"]["embed"])
        assert not np.asarray(state["mu"]["embed"])[8:].any()


def test_layers_are_added_to_a_stack_and_one_array_is_a_leaf_too():
    tx = adamx.stacked(adamx.lamb(0.1), lambda path, leaf: 1)
    small, large = jnp.ones((2, 3)), jnp.ones((4, 3))
    _, saved = tx.update(small, tx.init(small), small)
    state, report = adamx.adapt_state(tx, large, saved, rows={"*": 0})
    assert report.grown == ("mu", "nu") and report.shared == ()
    assert str(report) == "adapt_state: added rows to 2: mu, nu."
    np.testing.assert_array_equal(state["nu"][:, 0] > 0, [True, True, False, False])


def test_rows_are_added_under_a_trace_and_once():
    tx, params = adamx.adam(0.1), before(AFTER)
    saved = after_steps(tx, params)
    grow = lambda saved: adamx.adapt_state(tx, AFTER, saved, rows=ROWS)[0]  # noqa: E731
    state = grow(saved)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(grow)(saved), state)
    again, report = adamx.adapt_state(tx, AFTER, state, rows=ROWS)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert str(report) == "adapt_state: everything was carried over."


def test_the_first_match_counts_and_the_age_is_the_leafs():
    tx, params = adamx.adam(0.1), before(AFTER)
    saved = adamx.reset(tx, after_steps(tx, params), params, "embed")
    rows = {"embed": 0, re.compile("e.*"): 1, "h*": 1}
    state, report = adamx.adapt_state(tx, AFTER, saved, rows=rows)
    assert report.grown == ("mu/embed", "mu/head", "nu/embed", "nu/head")
    assert int(state["began"]["embed"]["count"]) == 2 and int(state["count"]) == 2


@pytest.mark.parametrize(
    ("rows", "error", "said"),
    [
        ("embed", TypeError, "rows must map patterns to axes"),
        ({3: 0}, TypeError, "adapt_state: a pattern must be a string"),
        ({"embed": True}, TypeError, r"rows\['embed'\] must be an axis, .* got True"),
        ({"embed": 0.0}, TypeError, r"rows\['embed'\] must be an axis, .* got 0.0"),
        ({"embde": 0}, ValueError, "adapt_state: the pattern 'embde' matches no leaf"),
        ({"w": 1}, ValueError, r"axis 1, which leaf 'w' of shape \[2\] does not have"),
        ({"w": -2}, ValueError, r"axis -2, which leaf 'w' of shape \[2\] does not have"),
        ({"embed": 1}, ValueError, r"'mu/embed' was saved with shape \[3, 2\].*grew along one"),
        ({}, ValueError, r"'mu/embed' was saved with shape \[3, 2\].*grew along one"),
    ],
)
def test_what_is_no_growth_is_refused(rows: Any, error, said):
    tx = adamx.adam(0.1)
    with pytest.raises(error, match=said):
        adamx.adapt_state(tx, AFTER, after_steps(tx, before(AFTER)), rows=rows)


def test_a_leaf_that_shrank_and_a_state_of_two_sizes_are_refused():
    tx, params = adamx.adam(0.1), before(AFTER)
    saved = after_steps(tx, params)
    with pytest.raises(
        ValueError, match=r"'mu/embed' was saved with 5 rows along axis 0 and has 3"
    ):
        adamx.adapt_state(tx, params, tx.init(AFTER), rows=ROWS)
    torn = saved | {"nu": saved["nu"] | {"embed": jnp.ones((4, 2))}}
    with pytest.raises(ValueError, match=r"'nu/embed' was saved with 4 rows .* of 'embed' with 3"):
        adamx.adapt_state(tx, AFTER, torn, rows=ROWS)


def test_a_leaf_whose_path_ends_anothers_path_is_not_taken_for_it():
    """Both have as many rows as the other: only one is said to have grown."""
    small = {"w": jnp.ones(2), "a": {"w": jnp.ones(2)}}
    large = small | {"w": jnp.ones(3)}
    tx = adamx.chain(adamx.named("inner", adamx.trace(0.5)), adamx.momentum(0.1))
    _, saved = tx.update(small, tx.init(small), small)
    state, report = adamx.adapt_state(tx, large, saved, rows={"w": 0})
    assert report.grown == ("inner/trace/w", "mu/w") and report.shared == ()
    np.testing.assert_array_equal(state["inner"]["trace"]["w"], [1.0, 1.0, 0.0])
    with pytest.raises(ValueError, match="'inner/trace/a/w' was saved with shape"):
        adamx.adapt_state(tx, large | {"a": {"w": jnp.ones(3)}}, saved, rows={"w": 0})


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="XLA cannot compile it for devices")
def test_rows_are_added_to_slots_in_the_memory_of_the_host():
    def params(rows):
        where = NamedSharding(mesh_of((2,), ("data",)), PartitionSpec(None, "data"))
        return {"embed": jax.device_put(jnp.ones((rows, 2)), where)}

    tx, few = adamx.adamw(0.1), params(3)
    on_host = adamx.state_sharding(tx, few, memory_kind="pinned_host")
    state = jax.jit(tx.init, out_shardings=on_host)(few)
    state, adaptation = adamx.adapt_state(tx, params(5), state, rows={"embed": 0})
    assert adaptation.grown == ("mu/embed", "nu/embed") and state["mu"]["embed"].shape == (5, 2)


def test_a_rate_for_each_layer_may_come_in_the_middle_of_a_run_and_grow():
    def rates(layers):
        return adamx.stacked(adamx.adamw(0.1 * jnp.arange(1.0, layers + 1)), {"layers": 1})

    def params(layers):
        return {"layers": jnp.ones((layers, 2))}

    one = adamx.adamw(0.1)
    _, state = one.update(params(2), one.init(params(2)), params(2))
    state = adamx.reset(one, state, params(2), "layers")  # it has records of its own, too
    state, _ = adamx.adapt_state(rates(2), params(2), state)
    _, state = rates(2).update(params(2), state, params(2))
    np.testing.assert_allclose(state["learning_rate"], [0.1, 0.2])
    state, _ = adamx.adapt_state(rates(3), params(3), state, rows={"layers": 0})
    _, state = rates(3).update(params(3), state, params(3))
    np.testing.assert_allclose(state["learning_rate"], [0.1, 0.2, 0.3], rtol=1e-6)
    np.testing.assert_allclose(
        state["began"]["layers"]["learning_rate"], [0.1, 0.2, 0.3], rtol=1e-6
    )
