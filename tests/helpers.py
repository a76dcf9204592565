"""Trees: filled with numbers, described, compared; and which cases of many are fast."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType


def draw(tree, seed=0):
    """Fill a tree with normal numbers of its own shapes and dtypes."""
    leaves, treedef = jax.tree.flatten(tree)
    generator = np.random.default_rng(seed)

    def numbers(leaf):
        values = np.round(8 * generator.normal(size=leaf.shape)) / 8  # coarse: see table.py
        if jnp.iscomplexobj(leaf):
            values = values + 1j * generator.normal(size=leaf.shape)
        return jnp.asarray(values.astype(leaf.dtype) if leaf.shape else leaf.dtype.type(values))

    return treedef.unflatten([numbers(leaf) for leaf in leaves])


def spec(tree):
    """Tree, shapes and dtypes; weak types count, since scan would refuse a change of them."""
    return jax.tree.map(lambda x: (jnp.shape(x), x.dtype, x.weak_type), tree)


def assert_close(a, b, ulps=32):
    """Compare trees leaf by leaf, in ULPs of the leaf's largest element.

    Two compilations of one formula differ where the compiler contracts a * b + c into a single
    rounding: half a ULP of the largest operand for each of the handful of operations in a formula,
    over the few steps of these tests. An element that cancels to near zero keeps that error.
    """
    assert spec(a) == spec(b)

    def check(x, y):
        exact = jnp.issubdtype(x.dtype, jnp.integer)
        eps = 0.0 if exact else float(jnp.finfo(x.dtype).eps)
        wide = np.complex128 if jnp.iscomplexobj(x) else np.float64
        x, y = np.asarray(x).astype(wide), np.asarray(y).astype(wide)
        largest = max(np.abs(x).max(initial=0), np.abs(y).max(initial=0))
        np.testing.assert_allclose(x, y, rtol=0, atol=ulps * eps * largest)

    jax.tree.map(check, a, b)


def devices(number: int) -> list[Any]:
    """Return so many devices; skip the test where there are fewer, as beside a single GPU."""
    found = jax.devices()
    if len(found) < number:
        pytest.skip(f"needs {number} devices, and here there are {len(found)}")
    return found[:number]


def on_cpu(why: str) -> None:
    """Skip the test where JAX runs on another platform, with the reason."""
    if jax.default_backend() != "cpu":
        pytest.skip(f"holds on a CPU: {why}")


def mesh_of(
    shape: tuple[int, ...], names: tuple[str, ...], kind: AxisType = AxisType.Auto
) -> jax.sharding.Mesh:
    """Return a mesh of devices; skip the test where there are too few."""
    kinds = (kind,) * len(shape)
    return jax.make_mesh(shape, names, kinds, devices=devices(math.prod(shape)))


def thinned(values: Iterable[Any], keep: int = 2) -> list[Any]:
    """Return the values of a parameter, of which each n-th is fast and the others are slow."""
    slow = pytest.mark.slow
    return [v if i % keep == 0 else pytest.param(v, marks=slow) for i, v in enumerate(values)]


def by_paper(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state with the slots' names as in the papers, which the references share."""
    names = {"trace_of_steps": "trace", "mu_scaled": "mu", "mu_normalized": "mu"}
    names |= {"nu_inf": "nu", "nu_seeded": "nu"}
    names |= {f"nu_{kind}": "nu" for kind in ("additive", "deviation", "extrapolated", "mean")}
    return {names.get(name, name): x for name, x in state.items()}


def numbers_of_programs(step: Any) -> list[int]:
    """Return a list to which each call of a step adds the numbers of the programs that it runs.

    -1 - i stands for the entries that a full step of level i computes apart.
    """
    ran: list[int] = []

    def counting(number: int, program: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            ran.append(number)
            return program(*args, **kwargs)

        return run

    step._programs = [counting(i, program) for i, program in enumerate(step._programs)]
    step._apart = [x and counting(-1 - i, x) for i, x in enumerate(step._apart)]
    return ran
