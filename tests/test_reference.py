"""Judges the NumPy reference: against numbers made by hand and against recorded PyTorch runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
from recordings import (
    IN_FAMILY,
    LEAVES,
    RECORDING,
    TORCH,
    assert_same_walk,
    problem,
)
from reference import Trajectory

# --- By hand -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Hand:
    """Two steps of one method worked out by hand, from decays that are exact in binary."""

    method: Callable[..., Trajectory]
    hyperparameters: dict[str, Any]
    gradients: list[complex]
    updates: list[complex]
    slots: dict[str, list[complex]] = dataclasses.field(default_factory=dict)
    w: complex = 0.0
    learning_rate: tuple[float, float] = (1.0, 2.0)


# With these, g = 2, 5 gives m^ = 2, 4 and v^ = 4, 16: (0.5 * 1 + 0.5 * 5) / (1 - 1/4) = 4 and
# (0.75 * 1 + 0.25 * 25) / (1 - 9/16) = 16.
ADAM: dict[str, Any] = {"b1": 0.5, "b2": 0.75, "eps": 1.0}
ADAM_SLOTS: dict[str, list[complex]] = {"mu": [1, 3], "nu": [1, 7]}
# With this, g = 4, -2 gives v = 4, 4 and m = 1, 1/4.
RMS: dict[str, Any] = {"decay": 0.75, "eps": 2.0}
ROOT: dict[str, Any] = {"decay": 0.75, "eps_in_sqrt": True}

r = reference
HANDS: dict[str, Hand] = {
    "momentum": Hand(r.momentum, {"decay": 0.5}, [2, 5], [-1, -6], {"mu": [1, 3]}),
    "momentum_default": Hand(r.momentum, {}, [1, 0], [-0.1, -0.18], {"mu": [0.1, 0.09]}),
    "sgd": Hand(r.sgd, {}, [2, 5], [-2, -10]),
    "sgd_l2": Hand(r.sgd, {"weight_decay": 0.5}, [2, 5], [-7, -13], w=10),
    "sgd_momentum": Hand(r.sgd, {"momentum": 0.5}, [2, 5], [-2, -12], {"trace": [2, 6]}),
    "sgd_nesterov": Hand(
        r.sgd, {"momentum": 0.5, "nesterov": True}, [2, 5], [-3, -16], {"trace": [2, 6]}
    ),
    "sgd_momentum_l2": Hand(
        r.sgd, {"momentum": 0.5, "weight_decay": 0.5}, [2, 5], [-7, -20], {"trace": [7, 10]}, w=10
    ),
    "sgdw": Hand(r.sgdw, {"weight_decay": 0.5}, [2, 5], [-7, -13], w=10),
    "sgdw_momentum": Hand(
        r.sgdw, {"momentum": 0.5, "weight_decay": 0.5}, [2, 5], [-7, -15], {"trace": [2, 6]}, w=10
    ),
    "sgdw_nesterov": Hand(
        r.sgdw,
        {"momentum": 0.5, "nesterov": True, "weight_decay": 0.5},
        [2, 5],
        [-8, -18],
        {"trace": [2, 6]},
        w=10,
    ),
    "adagrad": Hand(
        r.adagrad,
        {"initial_accumulator_value": 7.0, "eps": 2.0},
        [3, 3],
        [-1 / 2, -6 / 7],
        {"sum_of_squares": [16, 25]},
    ),
    "adagrad_eps_in_sqrt": Hand(
        r.adagrad,
        {"initial_accumulator_value": 7.0, "eps": 9.0, "eps_in_sqrt": True},
        [3, 3],
        [-3 / 5, -6 / math.sqrt(34)],
        {"sum_of_squares": [16, 25]},
    ),
    "adagrad_default": Hand(
        r.adagrad,
        {},
        [1, 1],
        [-1 / (math.sqrt(1.1) + 1e-7), -2 / (math.sqrt(2.1) + 1e-7)],
        {"sum_of_squares": [1.1, 2.1]},
    ),
    "adagrad_complex": Hand(
        r.adagrad,
        {"initial_accumulator_value": 0.0, "eps": 5.0},
        [3 + 4j, 0],
        [-0.3 - 0.4j, 0],
        {"sum_of_squares": [25, 25]},
    ),
    "rmsprop": Hand(r.rmsprop, RMS, [4, -2], [-1, 1], {"nu": [4, 4]}),
    "rmsprop_default": Hand(
        r.rmsprop,
        {},
        [1, 1],
        [-1 / (math.sqrt(0.1) + 1e-8), -2 / (math.sqrt(0.19) + 1e-8)],
        {"nu": [0.1, 0.19]},
    ),
    "rmsprop_eps_in_sqrt": Hand(
        r.rmsprop, {**ROOT, "eps": 5.0}, [4, -2], [-4 / 3, 4 / 3], {"nu": [4, 4]}
    ),
    "rmsprop_initial_scale": Hand(
        r.rmsprop,
        {**RMS, "initial_scale": 16.0},
        [4, -2],
        [-2 / 3, 4 / (math.sqrt(13) + 2)],
        {"nu": [16, 13]},
    ),
    "rmsprop_centered": Hand(
        r.rmsprop,
        {**RMS, "centered": True},
        [4, -2],
        [-4 / (math.sqrt(3) + 2), 4 / (math.sqrt(63 / 16) + 2)],
        {"nu": [4, 4], "mu": [1, 1 / 4]},
    ),
    "rmsprop_centered_eps_in_sqrt": Hand(
        r.rmsprop,
        {**ROOT, "eps": 1.0, "centered": True},
        [4, -2],
        [-2, 4 / math.sqrt(79 / 16)],
        {"nu": [4, 4], "mu": [1, 1 / 4]},
    ),
    "rmsprop_centered_complex": Hand(
        r.rmsprop,
        {**ROOT, "eps": 1.0, "centered": True},
        [4j, -2],
        [-2j, 4 / math.sqrt(67 / 16)],
        {"nu": [4, 4], "mu": [1j, -0.5 + 0.75j]},
    ),
    "rmsprop_bias_correction": Hand(
        r.rmsprop,
        {**RMS, "bias_correction": True},
        [4, -2],
        [-2 / 3, 4 / (math.sqrt(64 / 7) + 2)],
        {"nu": [4, 4]},
    ),
    "rmsprop_centered_bias_correction": Hand(
        r.rmsprop,
        {**ROOT, "eps": 4.0, "centered": True, "bias_correction": True},
        [4, -2],
        [-2, 4 / math.sqrt(64 / 7 - 16 / 49 + 4)],
        {"nu": [4, 4], "mu": [1, 1 / 4]},
    ),
    "rmsprop_momentum": Hand(
        r.rmsprop,
        {**RMS, "momentum": 0.5},
        [4, -2],
        [-1, 0.5],
        {"nu": [4, 4], "trace": [-1, 0.5]},
    ),
    "rmsprop_nesterov": Hand(
        r.rmsprop,
        {**RMS, "momentum": 0.5, "nesterov": True},
        [4, -2],
        [-1.5, 1.25],
        {"nu": [4, 4], "trace": [-1, 0.5]},
    ),
    "adam": Hand(r.adam, ADAM, [2, 5], [-2 / 3, -8 / 5], ADAM_SLOTS),
    "adam_default": Hand(
        r.adam,
        {},
        [1, 0],
        [-1 / (1 + 1e-8), -2 * (9 / 19) / (math.sqrt(999 / 1999) + 1e-8)],
        {"mu": [0.1, 0.09], "nu": [0.001, 0.000999]},
    ),
    "adam_eps_root": Hand(
        r.adam,
        {**ADAM, "eps_root": 5.0},
        [2, 5],
        [-1 / 2, -8 / (math.sqrt(21) + 1)],
        ADAM_SLOTS,
    ),
    # 0.5 * 1 / (3/4) + 0.5 * 2 / (1/2) = 8/3 and 0.5 * 3 / (7/8) + 0.5 * 5 / (3/4) = 106/21.
    "nadam": Hand(
        r.adam,
        {**ADAM, "nesterov": True},
        [2, 5],
        [-(8 / 3) / 3, -2 * (106 / 21) / 5],
        ADAM_SLOTS,
    ),
    # g + w = 1 + 1, then 4.5 + 0.5.
    "adam_l2": Hand(
        r.adam,
        {**ADAM, "l2": 1.0},
        [1, 4.5],
        [-0.5, -0.4],
        ADAM_SLOTS,
        w=1,
        learning_rate=(0.75, 0.5),
    ),
    "adam_complex": Hand(
        r.adam,
        {**ADAM, "eps": 5.0},
        [3 + 4j, -10 + 7.5j],
        [-0.3 - 0.4j, -2 * (-17 + 19j) / 45],
        {"mu": [1.5 + 2j, -4.25 + 4.75j], "nu": [6.25, 43.75]},
    ),
    # (1 - 0.75 * 0.4) * 1 - 0.75 * 2/3 = 0.2, then -0.5 * 0.4 * 0.2 - 0.5 * 4/5 = -0.44.
    "adamw": Hand(
        r.adamw,
        {**ADAM, "weight_decay": 0.4},
        [2, 5],
        [-0.8, -0.44],
        ADAM_SLOTS,
        w=1,
        learning_rate=(0.75, 0.5),
    ),
    "adamw_default": Hand(
        r.adamw,
        {"weight_decay": 0.0},
        [1, 0],
        [-1 / (1 + 1e-8), -2 * (9 / 19) / (math.sqrt(999 / 1999) + 1e-8)],
        {"mu": [0.1, 0.09], "nu": [0.001, 0.000999]},
    ),
    "adamw_eps_root": Hand(
        r.adamw,
        {**ADAM, "eps_root": 5.0, "weight_decay": 0.0},
        [2, 5],
        [-1 / 2, -8 / (math.sqrt(21) + 1)],
        ADAM_SLOTS,
    ),
    "nadamw": Hand(
        r.adamw,
        {**ADAM, "nesterov": True, "weight_decay": 0.0},
        [2, 5],
        [-(8 / 3) / 3, -2 * (106 / 21) / 5],
        ADAM_SLOTS,
    ),
}


@pytest.mark.parametrize("name", HANDS)
def test_two_steps_by_hand(name: str) -> None:
    """The tolerance is for numbers like ``1 - 0.999``, which is 9e-16 (relative) off 0.001."""
    hand = HANDS[name]
    run = hand.method(
        np.array([hand.w]),
        np.array(hand.gradients)[:, None],
        learning_rate=hand.learning_rate,
        **hand.hyperparameters,
    )
    np.testing.assert_allclose(run.updates[:, 0], hand.updates, rtol=2e-15)
    np.testing.assert_allclose(run.params[:, 0], hand.w + np.cumsum([0, *hand.updates]), rtol=2e-15)
    assert run.slots.keys() == hand.slots.keys()
    for slot, values in hand.slots.items():
        np.testing.assert_allclose(run.slots[slot][:, 0], values, rtol=2e-15)
        assert np.iscomplexobj(run.slots[slot]) == np.iscomplexobj(values)


def test_rmsprop_centered_variance_is_never_negative() -> None:
    """Under a constant gradient the variance tends to zero, and rounds to less than zero."""
    g = np.full((100, 1), 0.7)
    run = reference.rmsprop([0.0], g, learning_rate=1.0, decay=0.5, eps=1e-3, centered=True)
    below = run.slots["nu"] - run.slots["mu"] ** 2 < 0
    assert np.any(below)
    np.testing.assert_array_equal(run.updates[below], -0.7 / 1e-3)


# --- Building blocks -----------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_averages_are_the_weighted_sums(decay: float) -> None:
    """``m_t`` is the sum over s <= t of ``(1 - decay) decay^(t-s) g_s``.

    It is ``1 - decay^t`` for g = 1.
    """
    g = RECORDING["gradients/a"] + 1j * RECORDING["gradients/a"][::-1]
    age = np.arange(60)[:, None] - np.arange(60)
    weights = np.where(age >= 0, (1 - decay) * decay ** np.maximum(age, 0.0), 0.0)
    scale = np.max(np.abs(g), axis=0)
    m = np.tensordot(weights, g, 1)
    v = np.tensordot(weights, np.abs(g) ** 2, 1) + 3.0 * decay ** np.arange(1, 61)[:, None, None]
    np.testing.assert_array_less(np.abs(reference.ema(g, decay) - m) / scale, 1e-14)
    np.testing.assert_allclose(reference.ema_of_squares(g, decay, 3.0), v, rtol=1e-13)
    np.testing.assert_allclose(
        reference.ema_of_squares(g, decay),
        reference.ema_of_squares(g.real, decay) + reference.ema_of_squares(g.imag, decay),
        rtol=1e-13,
    )
    ones = np.ones((60, 2))
    corrected = reference.bias_correction(reference.ema(ones, decay), decay)
    np.testing.assert_allclose(corrected, ones, rtol=1e-13)


def test_bias_correction_does_not_cancel() -> None:
    """With decay = 1 - d the divisor is ``t d - t (t-1) / 2 d^2 + ...``."""
    d = 2.0**-40
    t = np.arange(1.0, 11.0)
    corrected = reference.bias_correction(np.ones(10), 1 - d)
    np.testing.assert_allclose(corrected, 1 / (t * d - t * (t - 1) / 2 * d**2), rtol=1e-15)


@pytest.mark.parametrize("leaf", LEAVES)
def test_slots_are_the_building_blocks(leaf: str) -> None:
    """The methods write the averages out again; both writings are equal to the last bit."""
    w, g = RECORDING[f"initial/{leaf}"], RECORDING[f"gradients/{leaf}"]
    adam = reference.adam(w, g, learning_rate=0.1, b1=0.8, b2=0.99)
    rmsprop = reference.rmsprop(
        w, g, learning_rate=0.1, decay=0.8, initial_scale=0.5, centered=True
    )
    momentum = reference.momentum(w, g, learning_rate=0.1, decay=0.8)
    for mu in (adam.slots["mu"], rmsprop.slots["mu"], momentum.slots["mu"]):
        np.testing.assert_array_equal(mu, reference.ema(g, 0.8))
    np.testing.assert_array_equal(adam.slots["nu"], reference.ema_of_squares(g, 0.99))
    np.testing.assert_array_equal(rmsprop.slots["nu"], reference.ema_of_squares(g, 0.8, 0.5))


def test_inputs_are_widened_and_left_alone() -> None:
    """Whatever the input's precision, the arithmetic is in float64."""
    w, g = np.array([[0.1, 0.2]], np.float32), np.array([[[0.3, -0.7]]] * 3, np.float32)
    copies = w.copy(), g.copy()
    run = reference.adam(w, g, learning_rate=0.1)
    wide = reference.adam(w.astype(np.float64), g.astype(np.float64), learning_rate=[0.1] * 3)
    np.testing.assert_array_equal(run.params, wide.params)
    np.testing.assert_array_equal(w, copies[0])
    np.testing.assert_array_equal(g, copies[1])
    assert run.params.shape == (4, 1, 2) and run.updates.shape == (3, 1, 2)
    assert {value.dtype.name for value in (run.params, *run.slots.values())} == {"float64"}
    with pytest.raises(ValueError, match="broadcast"):
        reference.adam(w, g, learning_rate=[0.1, 0.1])


# --- Against PyTorch -----------------------------------------------------------------------------


def run_case(case: str, w: np.ndarray, g: np.ndarray) -> Trajectory:
    """Runs the reference with PyTorch's hyperparameters of a case."""
    h = TORCH[case]["hyperparameters"]
    match TORCH[case]["class"]:
        case "Adam":
            b1, b2 = h["betas"]
            return reference.adam(
                w, g, learning_rate=h["lr"], b1=b1, b2=b2, eps=h["eps"], l2=h["weight_decay"]
            )
        case "AdamW":
            b1, b2 = h["betas"]
            wd = h["weight_decay"]
            return reference.adamw(
                w, g, learning_rate=h["lr"], b1=b1, b2=b2, eps=h["eps"], weight_decay=wd
            )
        case "RMSprop":
            return reference.rmsprop(
                w,
                g,
                learning_rate=h["lr"],
                decay=h["alpha"],
                eps=h["eps"],
                centered=h["centered"],
                momentum=h["momentum"] or None,
            )
        case "Adagrad":
            initial = h["initial_accumulator_value"]
            return reference.adagrad(
                w, g, learning_rate=h["lr"], eps=h["eps"], initial_accumulator_value=initial
            )
        case "SGD" if h["dampening"] == 0:
            return reference.sgd(
                w,
                g,
                learning_rate=h["lr"],
                momentum=h["momentum"] or None,
                nesterov=h["nesterov"],
                weight_decay=h["weight_decay"],
            )
        case other:
            raise ValueError(other)


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("case", sorted(TORCH.keys() - IN_FAMILY - {"sgd_dampening"}))
def test_torch(case: str, leaf: str) -> None:
    """Each recorded case that the reference has under the same name."""
    assert_same_walk(run_case(case, *problem(leaf)), RECORDING[f"{case}/{leaf}"])


@pytest.mark.parametrize("leaf", LEAVES)
def test_torch_momentum_is_scaled_sgd(leaf: str) -> None:
    """The heavy-ball trace is the average over ``1 - momentum``."""
    w, g = problem(leaf)
    run = reference.momentum(w, g, learning_rate=0.1 / (1 - 0.9), decay=0.9)
    assert_same_walk(run, RECORDING[f"sgd_momentum/{leaf}"])


@pytest.mark.parametrize("leaf", LEAVES)
def test_torch_momentum_is_dampened_sgd(leaf: str) -> None:
    """PyTorch does not dampen the first gradient, which leaves ``momentum^t g_1`` in its buffer."""
    w, g = problem(leaf)
    run = reference.momentum(w, g, learning_rate=0.1, decay=0.9)
    excess = np.multiply.outer(0.9 ** np.arange(1, len(g) + 1), g[0])
    after = RECORDING[f"sgd_dampening/{leaf}"] + 0.1 * np.cumsum(excess, axis=0)
    assert_same_walk(run, after)


@pytest.mark.parametrize("leaf", LEAVES)
def test_torch_sgdw_is_sgd_with_l2_without_momentum(leaf: str) -> None:
    """Without momentum, decoupled and L2 decay are the same."""
    w, g = problem(leaf)
    run = reference.sgdw(w, g, learning_rate=0.1, weight_decay=0.1)
    assert_same_walk(run, RECORDING[f"sgd_l2/{leaf}"])


@pytest.mark.parametrize("leaf", LEAVES)
def test_torch_adam_without_momentum_is_corrected_rmsprop(leaf: str) -> None:
    """So is Nadam without momentum."""
    w, g = problem(leaf)
    after = RECORDING[f"adam_b1_zero/{leaf}"]
    assert_same_walk(
        reference.rmsprop(w, g, learning_rate=0.01, decay=0.999, bias_correction=True), after
    )
    assert_same_walk(reference.adam(w, g, learning_rate=0.01, b1=0.0, nesterov=True), after)
