"""Every name that adamx and Optax both have: the same arguments and the same steps, or a reason.

The names are found, not listed: one that becomes common is compared, and if it differs the test
fails until it has a line in DEVIATIONS and on docs/deviations.md.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import thinned

import adamx

pytestmark = pytest.mark.usefixtures("quick_compiler")

STEPS, ULP = 10, 2.0**-23
SLOW = pytest.mark.slow
PAGE = Path(__file__).parents[1] / "docs" / "deviations.md"
COMMON = [name for name in adamx.__all__ if hasattr(optax, name)]
NEWEST = tuple(map(int, optax.__version__.split(".")[:3])) >= (0, 2, 8)

# With these decays the corrections are exact: with its defaults Optax's 1 - b^t is up to 1e-5 off.
GIVEN: dict[str, Any] = {
    "learning_rate": 0.125,
    "b1": 0.5,
    "b2": 0.75,
    "b3": 0.875,
    "decay": 0.5,
    "eps": 0.125,  # large, so that its place shows
    "eps_root": 0.0625,
    "max_norm": 1.0,
    "step_size": 0.5,
    "weight_decay": 0.125,
}


def given(name: str) -> dict[str, Any]:
    """The arguments of the call."""
    known = inspect.signature(getattr(optax, name)).parameters
    return {key: value for key, value in GIVEN.items() if key in known}


@dataclasses.dataclass(frozen=True)
class Deviation:
    """What differs on purpose.

    Attributes:
        reason: why.
        arguments: Optax's arguments that are not there, or elsewhere, or have another default.
        same: makes Optax's steps with adamx, where the same call makes others; "another thing" if
            the two are no counterparts.
    """

    reason: str
    arguments: tuple[str, ...] = ()
    same: Callable[[], Any] | str | None = None


VARIANTS = "a flag that changes an algorithm is another method"
DEVIATIONS: dict[str, Deviation] = {
    "adafactor": Deviation(
        "None is more often forgotten than meant; as wide as the parameters, and no schedule",
        ("learning_rate", "dtype_momentum"),
    ),
    "adagrad": Deviation(
        "eps is outside the root, as in the paper and PyTorch",
        same=lambda: adamx.adagrad(0.125, eps=0.125, eps_in_sqrt=True),
    ),
    "adan": Deviation(
        "the factor of the difference is b2, as in the paper and the authors' code",
        same=lambda: adamx.adan(**given("adan"), look_ahead=0.25),
    ),
    "amsgrad": Deviation(VARIANTS, ("bias_correction_mu", "bias_correction_nu")),
    "bias_correction": Deviation(
        "a concept in a chain, where Optax has a function of trees",
        ("moment", "decay", "count"),
        same="another thing",
    ),
    "ema": Deviation(
        "the average alone: its correction is another concept",
        ("debias", "accumulator_dtype"),
        same=lambda: adamx.chain(adamx.ema(0.5), adamx.bias_correction(0.5)),
    ),
    "monitor": Deviation(
        "a wrapper around the optimizer, where Optax has a stage that measures what comes by",
        ("measures",),
        same="another thing",
    ),
    "nadam": Deviation(VARIANTS, ("nesterov",)),
    "nadamw": Deviation(VARIANTS, ("nesterov",)),
    "rmsprop": Deviation(
        "eps is outside the root, as in PyTorch",
        ("eps_in_sqrt",),
        same=lambda: adamx.rmsprop(0.125, decay=0.5, eps=0.125, eps_in_sqrt=True),
    ),
    "scale_by_learning_rate": Deviation(
        "None is more often forgotten than meant", ("learning_rate",)
    ),
    "scale_by_rms": Deviation(
        "eps is outside the root, as in PyTorch",
        ("eps_in_sqrt",),
        same=lambda: adamx.scale_by_rms(decay=0.5, eps=0.125, eps_in_sqrt=True),
    ),
}


def parameters(function: Any) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(function).parameters.values() if p.name != "_"]


def differing_arguments(name: str) -> set[str]:
    """Optax's arguments that are not at the same place, in the same way, with the same default."""
    ours, theirs = parameters(getattr(adamx, name)), parameters(getattr(optax, name))
    here = {p.name: (p.kind, p.default) for p in ours}
    places = [p.name for p in ours]
    found = set()
    for place, p in enumerate(theirs):
        if p.kind is p.VAR_POSITIONAL:
            if ours[place].kind is not p.kind:
                found.add(p.name)
        elif here.get(p.name) != (p.kind, p.default) or (
            p.kind is p.POSITIONAL_OR_KEYWORD and places[place] != p.name
        ):
            found.add(p.name)
    return found


def made(module: Any, name: str) -> Any:
    """The transformation that one and the same call makes."""
    function = getattr(module, name)
    if name == "chain":
        return function(optax.trace(0.5), optax.scale(-0.5))
    return function(**given(name))


def trajectory(tx: Any) -> np.ndarray:
    """The parameters after each of ten steps; gradients and parameters of all sizes and signs."""
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    grads = jnp.asarray(rng.normal(size=(STEPS, 3, 4)), jnp.float32)

    def step(carry: Any, g: Any) -> Any:
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return np.asarray(jax.lax.scan(step, (params, tx.init(params)), grads)[1], np.float64)


def assert_equal(a: np.ndarray, b: np.ndarray) -> None:
    """At most 32 roundings in an update, and two where it is added, in each step.

    The updates are 1 at most, save those of a concept alone, which adds what it gets (up to 6).
    """
    moved = max(1.0, float(np.abs(np.diff(b, axis=0)).max()))
    largest = float(np.abs(b).max())
    np.testing.assert_allclose(a, b, rtol=0, atol=STEPS * ULP * (32 * moved + 2 * largest))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", ["simplified_ademamix", pytest.param("ademamix", marks=SLOW)])
def test_those_of_contrib_take_the_same_arguments_and_make_the_same_steps(name):
    ours, theirs = getattr(adamx, name), getattr(optax.contrib, name)
    alike = [(p.name, p.kind, p.default) for p in parameters(theirs)]
    assert [(p.name, p.kind, p.default) for p in parameters(ours)][: len(alike)] == alike
    options = {key: x for key, x in GIVEN.items() if key in inspect.signature(theirs).parameters}
    assert_equal(*(trajectory(tx(**options, alpha=2.0)) for tx in (ours, theirs)))


TRANSFORMATIONS = [
    name
    for name in COMMON
    if name != "apply_updates" and getattr(DEVIATIONS.get(name), "same", None) != "another thing"
]


def test_the_names_are_found():
    assert len(COMMON) >= 29 and {"adamw", "ema", "chain", "apply_updates"} <= {*COMMON}
    assert all(callable(getattr(module, name)) for module in (adamx, optax) for name in COMMON)
    assert DEVIATIONS.keys() <= {*COMMON} | (set() if NEWEST else {"monitor"})


@pytest.mark.parametrize("name", COMMON)
def test_arguments_order_and_defaults_are_optaxs_or_a_deviation(name):
    found = differing_arguments(name)
    known = set(DEVIATIONS[name].arguments) if name in DEVIATIONS else set()
    assert found == known if NEWEST else found <= known


@pytest.mark.parametrize("name", thinned(TRANSFORMATIONS, 3))
@pytest.mark.usefixtures("standard_promotion")
def test_the_same_call_makes_the_same_ten_steps_or_is_a_deviation(name):
    theirs, ours = trajectory(made(optax, name)), trajectory(made(adamx, name))
    same = DEVIATIONS[name].same if name in DEVIATIONS else None
    if callable(same):
        with pytest.raises(AssertionError):
            assert_equal(ours, theirs)
        ours = trajectory(same())
    assert_equal(ours, theirs)


def _amsgrad_of_the_paper() -> Any:
    squares = adamx.chain(adamx.ema_of_squares(0.75), adamx.running_max())
    scaling = adamx.rms_scaling(adamx.ema(0.5), second_moment=squares, eps=0.125, eps_root=0.0625)
    return adamx.chain(scaling, adamx.scale_by_learning_rate(0.125))


FLAGS: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    "amsgrad": ({"bias_correction_mu": False, "bias_correction_nu": False}, _amsgrad_of_the_paper),
    "nadam": ({"nesterov": False}, lambda: adamx.adam(**given("nadam"))),
    "nadamw": ({"nesterov": False}, lambda: adamx.adamw(**given("nadamw"))),
}


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.usefixtures("standard_promotion")
def test_a_flag_of_optax_is_another_composition(name):
    flags, same = FLAGS[name]
    if not flags.keys() <= inspect.signature(getattr(optax, name)).parameters.keys():
        pytest.skip("this Optax has no such flag")
    assert_equal(trajectory(same()), trajectory(getattr(optax, name)(**given(name), **flags)))


@pytest.mark.usefixtures("standard_promotion")
def test_apply_updates_is_optaxs():
    rng = np.random.default_rng(0)
    for dtype in (jnp.float32, jnp.bfloat16):
        params = {"w": jnp.asarray(rng.normal(size=9), dtype), "b": jnp.ones(2, dtype)}
        updates = {"w": jnp.asarray(rng.normal(size=9), jnp.float32), "b": jnp.ones(2)}
        a, b = (module.apply_updates(params, updates) for module in (adamx, optax))
        jax.tree.map(np.testing.assert_array_equal, a, b)
        assert a["w"].dtype == b["w"].dtype


@pytest.mark.parametrize("name", DEVIATIONS)
def test_each_deviation_is_on_the_page(name):
    """One row of the table names the function, and rows that do so name the arguments."""
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    mine = [row for row in rows if re.search(rf"`{name}\b", row.split("|")[1])]
    assert mine, name
    for argument in DEVIATIONS[name].arguments:
        assert any(re.search(rf"\b{argument}\b", row) for row in mine), (name, argument)
