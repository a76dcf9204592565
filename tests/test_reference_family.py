"""Judges the reference of the family: numbers made by hand, recorded PyTorch runs, identities."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from math import sqrt
from typing import Any

import numpy as np
import pytest
import reference
import reference_family
from numpy.typing import ArrayLike
from recordings import IN_FAMILY, LEAVES, RECORDING, TORCH, assert_same_walk, problem
from reference import Trajectory

# --- By hand -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Hand:
    """Two or three steps of one method worked out by hand; numbers stand for arrays of one."""

    method: Callable[..., Trajectory]
    hyperparameters: dict[str, Any]
    gradients: list[Any]
    updates: list[Any]
    slots: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    w: ArrayLike = 0.0
    learning_rate: Any = (1.0, 2.0)


r = reference_family
# With these, g = 2, 5 gives m^ = 2, 4 and v^ = 4, 16 (test_reference.py).
ADAM: dict[str, Any] = {"b1": 0.5, "b2": 0.75, "eps": 1.0}
ADAM_SLOTS: dict[str, list[Any]] = {"mu": [1, 3], "nu": [1, 7]}
EPS_ROOT: dict[str, Any] = {**ADAM, "eps_root": 5.0}
SLOWLY: Any = (0.75, 0.5)  # learning rates
DECAYED: dict[str, Any] = {**ADAM, "weight_decay": 0.4}
# mu_1, mu_2, mu_3 = 0.26, 0.2696, 0.278816; the products of one and two are 0.26 and 0.070096
SCHEDULED: dict[str, Any] = {**ADAM, "momentum_decay": 1.0}
NADAM = [
    0.2696 * 1 / 0.929904 + 2,
    0.278816 * 3 / (1 - 0.070096 * 0.278816) + 0.7304 * 5 / 0.929904,
]
DOZAT = [
    0.2696 * 1.48 / 0.929904 + 2,
    0.278816 * 4.051008 / (1 - 0.070096 * 0.278816) + 0.7304 * 5 / 0.929904,
]
# With b2 = 0.75, rho_inf = 7, rho_1 = 1 and rho_2 = 7 - 4 (9/16) / (7/16) = 13/7. r_1^2 = 7/5 and
# r_2^2 = (15/7 * 1/7) * 7 / (5 * 3 * 13/7) = 1/13.
R1, R2 = sqrt(7 / 5), sqrt(1 / 13)
# With b3 = 0.5 and d = 0, 4: mu^ = 2, 14/3 and delta^ = 0, 16/7. Optax adds 1/4 of d, the paper
# 3/4: the look-ahead gradients are 2 and 7 or 9, nu^ = 4 and 34 or 166/3.
ADAN: dict[str, Any] = {"b1": 0.5, "b2": 0.75, "b3": 0.5, "eps": 1.0, "eps_root": 5.0}
ADAN_SLOTS = {"mu": [1, 3.5], "delta": [0, 1], "nu": [2, 25.5], "previous": [2, 6]}
LOOK_AHEAD = (14 / 3 + 4 / 7) / (sqrt(39) + 1)
# With these, g = 2, 5 gives mu_slow = 0.5, 2.75 and numerators 2 + 2 * 0.5 = 3, 4 + 3 * 2.75.
MIX: dict[str, Any] = {**ADAM, "b3": [0.75, 0.5], "alpha": [2.0, 3.0]}
MIX_SLOTS = {**ADAM_SLOTS, "mu_slow": [0.5, 2.75]}
HALF: dict[str, Any] = {"b1": 0.5, "b2": 0.75}
ROWS = np.array([[1.0, 7.0], [2.0, 2.0]])  # mean squares 25 and 4, of both 29/2
BLOCK = np.array([[5.0], [2.0]])
ALL = sqrt(29 / 2)
COLUMNS = np.array([[5 / 2, 53 / 2]])
# u = (-4/11, 3/7), of the norm A; x = (3, 4) + 5 (4/11, -3/7) / A
_A = np.array([-4 / 11, 3 / 7])
_X = np.array([3.0, 4.0]) - 5 * _A / sqrt(16 / 121 + 9 / 49)
A_TURN = 5 * _X / sqrt(_X[0] ** 2 + _X[1] ** 2)
_C = 1 / 4 - 0.475 / 4  # gamma b1 / (1 - b1) = 0.475
MARS = (
    -2 * (0.95 * 0.025 + 0.05 * _C) / 0.0975
    / (sqrt((0.99 * 0.0025 + 0.01 * _C**2) / 0.0199) + 1e-8)
)  # fmt: skip
LOOKING = 0.95 * 0.05 / (1 - 0.95**2) + 1  # how much longer a first gradient is one step ahead
PULL = 2 * 5 * LOOKING / (5 * LOOKING + 5)  # times 1/2 sqrt(4)
PRODUCT = BLOCK**2 * COLUMNS / (29 / 2)

HANDS: dict[str, Hand] = {
    # max(0, 2 + 1) = 3, max(9/4, 1 + 1) = 9/4; mu^ = 2, 4/3
    "adamax": Hand(r.adamax, ADAM, [2, 1], [-2 / 3, -32 / 27], {"mu": [1, 1], "nu": [3, 9 / 4]}),
    "adamax_default": Hand(
        r.adamax,
        {},
        [1, 0],
        [-1 / (1 + 1e-8), -2 * (9 / 19) / (0.999 * (1 + 1e-8))],
        {"mu": [0.1, 0.09], "nu": [1 + 1e-8, 0.999 * (1 + 1e-8)]},
    ),
    "adamax_without_eps": Hand(
        r.adamax, {**HALF, "eps": 0.0}, [-2, 1], [1, 0], {"mu": [-1, 0], "nu": [2, 3 / 2]}
    ),
    "adamax_complex": Hand(
        r.adamax,
        ADAM,
        [3 + 4j, 0],
        [-0.5 - 4j / 6, -2 * (1 + 4j / 3) / 4.5],
        {"mu": [1.5 + 2j, 0.75 + 1j], "nu": [6, 4.5]},
    ),
    "adamaxw": Hand(
        r.adamaxw,
        DECAYED,
        [2, 1],
        [-0.8, -0.04 - 8 / 27],
        {"mu": [1, 1], "nu": [3, 9 / 4]},
        w=1,
        learning_rate=SLOWLY,
    ),
    "nadam": Hand(r.nadam, SCHEDULED, [2, 5], [-NADAM[0] / 3, -2 * NADAM[1] / 5], ADAM_SLOTS),
    "nadam_eps_root": Hand(
        r.nadam,
        {**SCHEDULED, "eps_root": 5.0},
        [2, 5],
        [-NADAM[0] / 4, -2 * NADAM[1] / (sqrt(21) + 1)],
        ADAM_SLOTS,
    ),
    # 0.96^(t * 0.004) at t = 1, 2 and b1 = 0.9, and m^ = 1 + mu_2 m_1 / (1 - mu_1 mu_2)
    "nadam_default": Hand(
        r.nadam,
        {},
        [1],
        [
            -(
                1
                + 0.9
                * (1 - 0.5 * 0.96**0.008)
                * 0.1
                / (1 - 0.81 * (1 - 0.5 * 0.96**0.004) * (1 - 0.5 * 0.96**0.008))
            )
            / (1 + 1e-8)
        ],
        {"mu": [0.1], "nu": [0.001]},
        learning_rate=(1.0,),
    ),
    # 0.74 * 2 and 0.2696 * 1.48 + 0.7304 * 5
    "nadam_scheduled_average": Hand(
        r.nadam,
        {**SCHEDULED, "average": "scheduled"},
        [2, 5],
        [-DOZAT[0] / 3, -2 * DOZAT[1] / 5],
        {"mu": [1.48, 4.051008], "nu": [1, 7]},
    ),
    "nadamw": Hand(
        r.nadamw,
        {**SCHEDULED, "weight_decay": 0.4},
        [2, 5],
        [-0.3 - NADAM[0] / 4, -0.2 * (0.7 - NADAM[0] / 4) - NADAM[1] / 10],
        ADAM_SLOTS,
        w=1,
        learning_rate=SLOWLY,
    ),
    # g = 4, 0 gives m^ = 4, 4/3; v = 4, 3 and v^ = 16, 48/7
    "amsgrad": Hand(
        r.amsgrad,
        ADAM,
        [4, 0],
        [-4 / 5, -8 / 15],
        {"mu": [2, 1], "nu": [4, 3], "nu_max": [16, 16]},
    ),
    "amsgrad_torch": Hand(
        r.amsgrad,
        {**ADAM, "variant": "torch"},
        [4, 0],
        [-4 / 5, -(8 / 3) / (sqrt(64 / 7) + 1)],
        {"mu": [2, 1], "nu": [4, 3], "nu_max": [4, 4]},
    ),
    "amsgrad_paper": Hand(
        r.amsgrad,
        {**ADAM, "variant": "paper", "eps": 0.0},
        [4, 0],
        [-1, -1],
        {"mu": [2, 1], "nu": [4, 3], "nu_max": [4, 4]},
    ),
    "amsgrad_eps_root": Hand(
        r.amsgrad,
        {**ADAM, "eps_root": 9.0},
        [4, 0],
        [-2 / 3, -4 / 9],
        {"mu": [2, 1], "nu": [4, 3], "nu_max": [16, 16]},
    ),
    "amsgrad_default": Hand(
        r.amsgrad,
        {},
        [1, 0],
        [-1 / (1 + 1e-8), -2 * (9 / 19) / (1 + 1e-8)],
        {"mu": [0.1, 0.09], "nu": [0.001, 0.000999], "nu_max": [1, 1]},
    ),
    # |4 - 2|^2 / 4 + 3 = 4 and 3 + 0 + 3 = 6
    "adabelief": Hand(
        r.adabelief,
        {**ADAM, "eps_root": 3.0},
        [4, 2],
        [-4 / 5, -(16 / 3) / (sqrt(96 / 7) + 1)],
        {"mu": [2, 2], "nu": [4, 6]},
    ),
    "adabelief_complex": Hand(
        r.adabelief,
        {**ADAM, "eps_root": 3.0},
        [4j, 2 + 2j],
        [-0.8j, -2 * (4 / 3 + 8j / 3) / (sqrt(100 / 7) + 1)],
        {"mu": [2j, 1 + 2j], "nu": [4, 6.25]},
    ),
    "adabelief_default": Hand(
        r.adabelief,
        {},
        [1, 0],
        [
            -1 / sqrt(0.81 + 1e-13),
            -2 * (9 / 19) / sqrt((0.00081729 + 1.999e-16) / 0.001999),
        ],
        {"mu": [0.1, 0.09], "nu": [0.00081 + 1e-16, 0.00081729 + 1.999e-16]},
    ),
    "radam_never_rectified": Hand(r.radam, ADAM, [2, 5], [-2, -8], ADAM_SLOTS),
    "radam_at_the_threshold": Hand(
        r.radam, {**ADAM, "threshold": 1.0}, [2, 5], [-R1 * 2 / 3, -R2 * 8 / 5], ADAM_SLOTS
    ),
    "radam_strict": Hand(
        r.radam,
        {**ADAM, "threshold": 1.0, "strict": True},
        [2, 5],
        [-2, -R2 * 8 / 5],
        ADAM_SLOTS,
    ),
    "radam_eps_root": Hand(
        r.radam,
        {**EPS_ROOT, "threshold": 1.0},
        [2, 5],
        [-R1 / 2, -R2 * 8 / (sqrt(21) + 1)],
        ADAM_SLOTS,
    ),
    "radam_eps_on_raw": Hand(
        r.radam,
        {**ADAM, "threshold": 1.0, "eps_on": "raw"},
        [2, 5],
        [-R1 / 2, -R2 * 8 * sqrt(7 / 16) / (sqrt(7) + 1)],
        ADAM_SLOTS,
    ),
    # (1/2 * 1) / (3/4) + (1/2 * 2) / (1/2) = 8/3, and 106/21 (test_reference.py)
    "radam_nesterov": Hand(
        r.radam, {**ADAM, "nesterov": True}, [2, 5], [-8 / 3, -212 / 21], ADAM_SLOTS
    ),
    # |4 - 2|^2 / 4 + 3 = 4, and (1/2 * 2) / (3/4) + (1/2 * 4) / (1/2) = 16/3
    "adabelief_nesterov": Hand(
        r.adabelief,
        {**ADAM, "eps_root": 3.0, "nesterov": True},
        [4],
        [-(16 / 3) / 5],
        {"mu": [2], "nu": [4]},
        learning_rate=(1.0,),
    ),
    # 0 + 4/4, and 1 - (1/4) / 4: the second square is the smaller
    "yogi": Hand(
        r.yogi,
        {**ADAM, "initial_mu": 0.0, "initial_nu": 0.0},
        [2, 0.5],
        [-2 / 3, -2 / (sqrt(15 / 7) + 1)],
        {"mu": [1, 3 / 4], "nu": [1, 15 / 16]},
    ),
    "yogi_uncorrected": Hand(
        r.yogi,
        {**ADAM, "initial_mu": 0.0, "initial_nu": 0.0, "corrected": False},
        [2, 0.5],
        [-1 / 2, -1.5 / (sqrt(15 / 16) + 1)],
        {"mu": [1, 3 / 4], "nu": [1, 15 / 16]},
    ),
    # the sign of 4 - 4 is zero
    "yogi_initial": Hand(
        r.yogi,
        {**ADAM, "initial_mu": 2.0, "initial_nu": 4.0},
        [2, 4],
        [-4 / 5, -8 / (sqrt(128 / 7) + 1)],
        {"mu": [2, 3], "nu": [4, 8]},
    ),
    "yogi_default": Hand(
        r.yogi,
        {},
        [1],
        [-(1 + 0.9e-5) / (sqrt(1.001) + 1e-3)],
        {"mu": [0.1 + 0.9e-6], "nu": [0.001 + 1e-6]},
        learning_rate=(1.0,),
    ),
    # 0.5 * 0.5 - 0.5 * 0.4 > 0, though 0.5 * 0.275 - 0.5 * 0.4 < 0
    "lion": Hand(r.lion, HALF, [2, -0.4], [-1, -2], {"mu": [0.5, 0.275]}),
    "lion_zero": Hand(r.lion, HALF, [0, -3], [0, 2], {"mu": [0, -0.75]}),
    "lion_decay": Hand(
        r.lion, {**HALF, "weight_decay": 0.5}, [2, -0.4], [-6, -6], {"mu": [0.5, 0.275]}, w=10
    ),
    "lion_default": Hand(r.lion, {}, [1, -0.08], [-1, -2], {"mu": [0.01, 0.0091]}),
    "adan": Hand(r.adan, ADAN, [2, 6], [-1 / 2, -2 * LOOK_AHEAD], ADAN_SLOTS),
    "adan_paper": Hand(
        r.adan,
        {**ADAN, "look_ahead": "paper"},
        [2, 6],
        [-1 / 2, -2 * (14 / 3 + 12 / 7) / (sqrt(166 / 3 + 5) + 1)],
        {**ADAN_SLOTS, "nu": [2, 41.5]},
    ),
    "adan_decay": Hand(
        r.adan,
        {**ADAN, "weight_decay": 0.5},
        [2, 6],
        [-5.5, -2 * LOOK_AHEAD - 4.5],
        ADAN_SLOTS,
        w=10,
    ),
    "adan_proximal": Hand(
        r.adan,
        {**ADAN, "weight_decay": 0.5, "proximal": True},
        [2, 6],
        [9.5 / 1.5 - 10, -LOOK_AHEAD - 9.5 / 3],
        ADAN_SLOTS,
        w=10,
    ),
    "ademamix": Hand(r.ademamix, MIX, [2, 5], [-1, -4.9], MIX_SLOTS),
    "ademamix_eps_root": Hand(
        r.ademamix, {**MIX, "eps_root": 5.0}, [2, 5], [-3 / 4, -24.5 / (sqrt(21) + 1)], MIX_SLOTS
    ),
    "ademamix_decay": Hand(
        r.ademamix, {**MIX, "weight_decay": 0.5}, [2, 5], [-6, -8.9], MIX_SLOTS, w=10
    ),
    "ademamix_default": Hand(
        r.ademamix,
        {},
        [1],
        [-(1 + 5 * (1 - 0.9999)) / (1 + 1e-8)],
        {"mu": [0.1], "mu_slow": [1 - 0.9999], "nu": [0.001]},
        learning_rate=(1.0,),
    ),
    # 5/2 is clipped to 1, -20 / sqrt(37/4) = -6.6 to -2^(1/4)
    "adopt": Hand(
        r.adopt,
        ADAM,
        [2, 5, -20],
        [0, -1, -1 + 2 * 2**0.25],
        {"mu": [0, 0.5, 0.25 - 0.5 * 2**0.25], "nu": [4, 37 / 4, 111 / 16 + 100]},
        learning_rate=(1.0, 2.0, 4.0),
    ),
    # m^ = v^ / 2 = 2, then 4 and 16: the root is as long as m^, or 1 / sqrt(3) of it; at last zero
    "adam_atan2": Hand(
        r.adam_atan2,
        {"b1": 0.5, "b2": 0.75, "a": 3.0, "weight_decay": 0.5},
        [2, 5],
        [-3 * np.pi / 4 - 5, -6 * np.pi / 4 - 10 + 3 * np.pi / 4 + 5],
        ADAM_SLOTS,
        w=10,
    ),
    "adam_atan2_root": Hand(
        r.adam_atan2,
        {**HALF, "b": sqrt(3)},
        [-2j],
        [1j * np.pi / 6],
        {"mu": [-1j], "nu": [1]},
        learning_rate=(1.0,),
    ),
    "adam_atan2_default": Hand(
        r.adam_atan2,
        {},
        [0, 2],
        [0, -2 * np.arctan2(0.2 / 0.19, sqrt(0.004 / 0.001999))],
        {"mu": [0, 0.2], "nu": [0, 0.004]},
    ),
    # u = 2/3 and 4/5; half of the decay at half of the rate
    "adamc": Hand(
        r.adamc,
        {**ADAM, "weight_decay": 0.5, "max_learning_rate": 2.0},
        [2, 5],
        [-2 / 3 - 2.5, -8 / 5 - (10 - 2 / 3 - 2.5)],
        ADAM_SLOTS,
        w=10,
    ),
    "adamc_constant": Hand(
        r.adamc,
        {**ADAM, "weight_decay": 0.5},
        [2],
        [-2 / 3 - 5],
        {"mu": [1], "nu": [1]},
        w=10,
        learning_rate=(1.0,),
    ),
    # c = 1/2, then 1/4 + 2 (1/4 - 1/2) = -1/4: m^ = 0, v^ = (3/4 1/16 + 1/4 1/16) / (7/16)
    "mars": Hand(
        r.mars,
        {**ADAM, "gamma": 2.0, "weight_decay": 0.5},
        [1 / 2, 1 / 4],
        [-1 / 3 - 5, -10 + 1 / 3 + 5],
        {"mu": [1 / 4, 0], "nu": [1 / 16, 1 / 16], "previous": [1 / 2, 1 / 4]},
        w=10,
    ),
    # 3, 4 has the norm 5
    "mars_clipped": Hand(
        r.mars,
        {**ADAM, "eps": 0.0},
        [[3, 4]],
        [[-1, -1]],
        {"mu": [[0.3, 0.4]], "nu": [[0.09, 0.16]], "previous": [[3, 4]]},
        w=[0, 0],
        learning_rate=(1.0,),
    ),
    # from zero: 1/2 + 1/2 gamma, not clipped
    "mars_first": Hand(
        r.mars,
        {**ADAM, "gamma": 2.0, "clipped": False, "first": "zero"},
        [1 / 2],
        [-3 / 2 / (3 / 2 + 1)],
        {"mu": [3 / 4], "nu": [9 / 16], "previous": [1 / 2]},
        learning_rate=(1.0,),
    ),
    "mars_default": Hand(
        r.mars,
        {},
        [1 / 2, 1 / 4],
        [-1 / (1 + 2e-8), MARS],
        {
            "mu": [0.025, 0.95 * 0.025 + 0.05 * (1 / 4 - 0.475 / 4)],
            "nu": [0.0025, 0.99 * 0.0025 + 0.01 * (1 / 4 - 0.475 / 4) ** 2],
            "previous": [1 / 2, 1 / 4],
        },
    ),
    # v^ = 4, 16; 2 + 2 alpha, then 1 + 5 + 5 alpha
    "simplified_ademamix": Hand(
        r.simplified_ademamix,
        {**ADAM, "alpha": 3.0, "weight_decay": 0.5},
        [2, 5],
        [-8 / 3 - 5, -2 * 21 / 5 - 10 + 8 / 3 + 5],
        {"trace": [2, 6], "nu": [1, 7]},
        w=10,
    ),
    "simplified_ademamix_root": Hand(
        r.simplified_ademamix,
        EPS_ROOT,
        [2],
        [-1 / 2],
        {"trace": [2], "nu": [1]},
        learning_rate=(1.0,),
    ),
    # v^: 0.05 * 4 / 0.05, 0.19 / 0.0975
    "simplified_ademamix_default": Hand(
        r.simplified_ademamix,
        {},
        [2, 0],
        [-2 / (2 + 1e-8), -2 * 1.98 / (sqrt(0.19 / 0.0975) + 1e-8)],
        {"trace": [2, 1.98], "nu": [0.2, 0.19]},
    ),
    # u = (-4/7 / (4/7 + 1), 3/4 / (3/4 + 1)); then nothing
    "adamh": Hand(
        r.adamh,
        {"b1": 0.0, "b2": 0.0, "eps": 1.0},
        [[-4 / 7, 3 / 4], [0, 0]],
        [[A_TURN[0] - 3, A_TURN[1] - 4], [0, 0]],
        {"mu": [[-4 / 7, 3 / 4], [0, 0]], "nu": [[16 / 49, 9 / 16], [0, 0]]},
        w=[3.0, 4.0],
    ),
    # v^ = 4, 16: scaled 2/3 and 5/5, so that m = 1/3, 1/6 + 1/2, over 1/2 and 3/4
    "laprop": Hand(r.laprop, ADAM, [2, 5], [-2 / 3, -16 / 9], {"mu": [1 / 3, 2 / 3], "nu": [1, 7]}),
    # the average of 2/3 and 2 * 1, of which only the last was doubled
    "laprop_averaged": Hand(
        r.laprop,
        {**ADAM, "weight_decay": 0.5, "rate": "averaged"},
        [2, 5],
        [-2 / 3 - 5, -14 / 9 - 10 + 17 / 3],
        {"mu": [1 / 3, 7 / 6], "nu": [1, 7]},
        w=10,
    ),
    "laprop_uncorrected": Hand(
        r.laprop,
        {**ADAM, "eps_root": 3.0, "corrected": False},
        [2],
        [-2 / 3],
        {"mu": [1 / 3], "nu": [1]},
        learning_rate=(1.0,),
    ),
    "laprop_default": Hand(
        r.laprop, {}, [2], [-1], {"mu": [0.1], "nu": [0.004]}, learning_rate=(1.0,)
    ),
    "adopt_unclipped": Hand(
        r.adopt,
        {**ADAM, "clipped": False},
        [2, 5, -20],
        [0, -2.5, -2.5 + 40 / sqrt(37 / 4)],
        {"mu": [0, 1.25, 0.625 - 10 / sqrt(37 / 4)], "nu": [4, 37 / 4, 111 / 16 + 100]},
        learning_rate=(1.0, 2.0, 4.0),
    ),
    "adopt_eps": Hand(
        r.adopt, {**ADAM, "eps": 2.0}, [0.5, 1], [0, -0.5], {"mu": [0, 0.25], "nu": [0.25, 0.4375]}
    ),
    "adopt_default": Hand(
        r.adopt, {}, [0, 0.5e-6], [0, -0.1], {"mu": [0, 0.05], "nu": [0, 0.25e-12 * (1 - 0.9999)]}
    ),
    # u = 2/3 in both, 2/3 of which is 4/9; then one element of two is kept: a factor 2 / (1 + 1)
    "cautious_adamw": Hand(
        r.cautious_adamw,
        {**ADAM, "weight_decay": 0.0},
        [[2, 2], [5, -0.5]],
        [[-4 / 9, -4 / 9], [-8 / 5, 0]],
        {"mu": [[1, 1], [3, 0.25]], "nu": [[1, 1], [7, 0.8125]]},
        w=[0.0, 0.0],
    ),
    "cautious_adamw_mean": Hand(
        r.cautious_adamw,
        {**EPS_ROOT, "weight_decay": 0.0, "rescale": "mean"},
        [[2, 2], [5, -0.5]],
        [[-1 / 2, -1 / 2], [-16 / (sqrt(21) + 1), 0]],
        {"mu": [[1, 1], [3, 0.25]], "nu": [[1, 1], [7, 0.8125]]},
        w=[0.0, 0.0],
    ),
    "cautious_adamw_decay": Hand(
        r.cautious_adamw,
        DECAYED,
        [[2, 2], [5, -0.5]],
        [[-19 / 30, -1 / 30], [-0.4 - 0.2 * 11 / 30, 0.2 * 31 / 30]],
        {"mu": [[1, 1], [3, 0.25]], "nu": [[1, 1], [7, 0.8125]]},
        w=[1.0, -1.0],
        learning_rate=SLOWLY,
    ),
    "cautious_adamw_decay_last": Hand(
        r.cautious_adamw,
        {**DECAYED, "decay_last": True},
        [[2, 2], [5, -0.5]],
        [[-8 / 15, 1 / 15], [-0.4 - 0.2 * (7 / 15 - 0.4), 0.2 * 14 / 15]],
        {"mu": [[1, 1], [3, 0.25]], "nu": [[1, 1], [7, 0.8125]]},
        w=[1.0, -1.0],
        learning_rate=SLOWLY,
    ),
    # the sign of 0.25 - 0.2 is not that of -0.4
    "cautious_lion": Hand(
        r.cautious_lion,
        {**HALF, "weight_decay": 0.0},
        [[2, -2], [-0.4, -1]],
        [[-2 / 3, 2 / 3], [0, 2]],
        {"mu": [[0.5, -0.5], [0.275, -0.625]]},
        w=[0.0, 0.0],
    ),
    "cautious_lion_decay": Hand(
        r.cautious_lion,
        {**HALF, "weight_decay": 0.5, "rescale": "mean"},
        [[2, -2], [-0.4, -1]],
        [[-6, 1], [-4, 3]],
        {"mu": [[0.5, -0.5], [0.275, -0.625]]},
        w=[10.0, 0.0],
    ),
    # ||w|| / ||u|| = 5 / (2/3 sqrt(2)), and ||w_1||^2 = (3 - 5 / sqrt(2))^2 + (4 - 5 / sqrt(2))^2
    "lamb": Hand(
        r.lamb,
        ADAM,
        [[2, 2], [5, 5]],
        [[-5 / sqrt(2)] * 2, [-sqrt(2) * sqrt(50 - 35 * sqrt(2))] * 2],
        {"mu": [[1, 1], [3, 3]], "nu": [[1, 1], [7, 7]]},
        w=[3.0, 4.0],
    ),
    # u = 2/4 and x = (2, -1.5), half as long as w; then u = 4/6, x = (1, 1) / 6, w_1 = (-1, -1)
    "lamb_decay": Hand(
        r.lamb,
        {**ADAM, "eps": 2.0, "weight_decay": 0.5},
        [[2, 2], [5, 5]],
        [[-4, 3], [-2, -2]],
        {"mu": [[1, 1], [3, 3]], "nu": [[1, 1], [7, 7]]},
        w=[3.0, -4.0],
    ),
    "lamb_zero_weights": Hand(
        r.lamb, EPS_ROOT, [2, -2], [-1 / 2, 1], {"mu": [1, -0.5], "nu": [1, 1.75]}
    ),
    "lamb_zero_gradients": Hand(r.lamb, ADAM, [0, 0], [0, 0], {"mu": [0, 0], "nu": [0, 0]}, w=3.0),
    # mu^ = g, g / 3 and nu^ = 25, 4, then 3/7 of them
    "adam_mini": Hand(
        r.adam_mini,
        {**ADAM, "axes": 1, "weight_decay": 0.0},
        [ROWS, 0 * ROWS],
        [-ROWS / (BLOCK + 1), -2 / 3 * ROWS / (BLOCK * sqrt(3 / 7) + 1)],
        {"mu": [ROWS / 2, ROWS / 4], "nu": [BLOCK**2 / 4, BLOCK**2 * 3 / 16]},
        w=np.zeros((2, 2)),
    ),
    "adam_mini_all": Hand(
        r.adam_mini,
        {**ADAM, "weight_decay": 0.0},
        [ROWS, 0 * ROWS],
        [-ROWS / (ALL + 1), -2 / 3 * ROWS / (ALL * sqrt(3 / 7) + 1)],
        {"mu": [ROWS / 2, ROWS / 4], "nu": [[[29 / 8]], [[87 / 32]]]},
        w=np.zeros((2, 2)),
    ),
    "adam_mini_decay": Hand(
        r.adam_mini, DECAYED, [2, 5], [-0.8, -0.44], ADAM_SLOTS, w=1.0, learning_rate=SLOWLY
    ),
    "adam_mini_default": Hand(
        r.adam_mini,
        {},
        [1],
        [-1 / (1 + 1e-8) - 0.1],
        {"mu": [0.1], "nu": [0.05]},
        w=1.0,
        learning_rate=(1.0,),
    ),
    # RMS^2 = (1 + 0) / 2, then (25/16 + 7/4) / 2 = 53/32; mu^ = 4, 8/3 and nu^ = 16, 64/7
    "stable_adamw": Hand(
        r.stable_adamw,
        {**ADAM, "weight_decay": 0.5},
        [[2, 0], [5, 4]],
        [
            [-17 / 3, 0],
            [
                -2 / sqrt(53 / 32) * (4 / 5 + 13 / 6),
                -2 / sqrt(53 / 32) * (8 / 3) / (sqrt(64 / 7) + 1),
            ],
        ],
        {"mu": [[1, 0], [3, 2]], "nu": [[1, 0], [7, 4]]},
        w=[10.0, 0.0],
    ),
    # 4 / max(16/7, 16) is below one
    "stable_adamw_eps": Hand(
        r.stable_adamw,
        {**ADAM, "eps": 4.0, "weight_decay": 0.0},
        [0, 2],
        [0, -(8 / 3) / (sqrt(16 / 7) + 4)],
        {"mu": [0, 1], "nu": [0, 1]},
    ),
    "stable_adamw_default": Hand(
        r.stable_adamw,
        {},
        [1],
        [-1 / (1 + 1e-6) - 0.01],
        {"mu": [0.1], "nu": [0.01]},
        w=1.0,
        learning_rate=(1.0,),
    ),
    # the singular values 3/5 and 4/5 become 2 s - 3/2 s^3 + 1/2 s^5
    "muon": Hand(
        r.muon,
        {
            **{"beta": 0.5, "eps": 0.0, "nesterov": False, "weight_decay": 0.5, "ns_steps": 1},
            "ns_coeffs": (2.0, -1.5, 0.5),
        },
        [np.diag([3.0, 4.0])],
        [-np.diag([0.91488, 0.99584]) - 0.5],
        {"mu": [np.diag([1.5, 2.0])]},
        w=np.ones((2, 2)),
        learning_rate=(1.0,),
    ),
    "muon_scaled": Hand(
        r.muon,
        {"eps": 5.0, "ns_steps": 1, "ns_coeffs": (2.0, 0.0, 0.0), "consistent_rms": 0.5},
        [[[3.0, 0.0, 0.0, 4.0]]],
        [[[-0.6 * PULL, 0.0, 0.0, -0.8 * PULL]]],
        {"mu": [[[0.15, 0.0, 0.0, 0.2]]]},
        w=np.zeros((1, 4)),
        learning_rate=(1.0,),
    ),
    "muon_wide": Hand(
        r.muon,
        {"eps": 0.0, "ns_steps": 1, "ns_coeffs": (1.0, 0.0, 0.0)},
        [[[3.0, 0.0, 0.0, 4.0]]],
        [[[-1.2, 0.0, 0.0, -1.6]]],
        {"mu": [[[0.15, 0.0, 0.0, 0.2]]]},
        w=np.zeros((1, 4)),
        learning_rate=(1.0,),
    ),
    # rows 25, 4 and columns 5/2, 53/2 of mean 29/2; then 2^-1/2 of these and of 0; rms(w) = 2
    "adafactor": Hand(
        r.adafactor,
        {"decay_rate": 0.5, "clipping_threshold": None, "axes": (0, 1)},
        [ROWS, 0 * ROWS],
        [-2 * ROWS / np.sqrt(PRODUCT), 0 * ROWS],
        {
            "nu_row": [BLOCK**2, BLOCK**2 * (1 - sqrt(1 / 2))],
            "nu_col": [COLUMNS, COLUMNS * (1 - sqrt(1 / 2))],
        },
        w=2 * np.ones((2, 2)),
    ),
    # nu = 9, 1; |u| = sqrt(8) / 3 is cut to 1/2, the least rms(w) is 1e-3; then w / 4 comes back
    "adafactor_momentum": Hand(
        r.adafactor,
        {
            **{"decay_rate": 0.0, "eps": 1.0, "clipping_threshold": 0.5, "momentum": 0.5},
            "weight_decay_rate": 0.25,
        },
        [[sqrt(8), -sqrt(8)], [0, 0]],
        [[-1e-3 / 4, 1e-3 / 4], [-1e-3 / 16, 1e-3 / 16]],
        {"nu": [[9, 9], [1, 1]], "mu": [[1e-3 / 4, -1e-3 / 4], [1e-3 / 8, -1e-3 / 8]]},
        w=[0.0, 0.0],
    ),
    # u = 2/3, 1; z = -2/3, -8/3; c = 1, 4/5: x_2 = -34/15, y_2 = -37/15
    "schedule_free_adamw": Hand(
        r.schedule_free_adamw,
        ADAM,
        [2, 5],
        [-2 / 3, -9 / 5],
        {"z": [-2 / 3, -8 / 3], "nu": [1, 7]},
    ),
    "schedule_free_adamw_decay": Hand(
        r.schedule_free_adamw,
        {**ADAM, "weight_decay": 0.5},
        [2, 5],
        [-17 / 3, -5.7],
        {"z": [13 / 3, -2], "nu": [1, 7]},
        w=10.0,
    ),
    # both weights are those of the first rate: c_2 = 1/2
    "schedule_free_adamw_highest": Hand(
        r.schedule_free_adamw,
        ADAM,
        [2, 5],
        [-4 / 3, -3 / 4],
        {"z": [-4 / 3, -7 / 3], "nu": [1, 7]},
        learning_rate=(2.0, 1.0),
    ),
    "schedule_free_adamw_power": Hand(
        r.schedule_free_adamw,
        {**ADAM, "weight_lr_power": 1.0},
        [2, 5],
        [-2 / 3, -5 / 3],
        {"z": [-2 / 3, -8 / 3], "nu": [1, 7]},
    ),
    "schedule_free_adamw_averaging_rate": Hand(
        r.schedule_free_adamw,
        {**ADAM, "averaging_rate": 1.0},
        [2, 5],
        [-2 / 3, -3 / 2],
        {"z": [-2 / 3, -8 / 3], "nu": [1, 7]},
    ),
    # rates 1/2 and sqrt(7) / 2, weights 1/4 and 7/4; y_2 = z_2 / 2 + x_2 / 2, x_2 = z_2 7/8 - 1/16
    "schedule_free_adamw_paper": Hand(
        r.schedule_free_adamw,
        {**ADAM, "variant": "paper"},
        [2, 5],
        [-1 / 2, 15 / 16 * (-1 / 2 - 2.5 * sqrt(7) / (sqrt(7) + 1)) - 1 / 32 + 1 / 2],
        {"z": [-1 / 2, -1 / 2 - 2.5 * sqrt(7) / (sqrt(7) + 1)], "nu": [1, 7]},
    ),
    "schedule_free_adamw_default": Hand(
        r.schedule_free_adamw,
        {},
        [1, 0],
        [-1 / (1 + 1e-8), 0],
        {"z": [-1 / (1 + 1e-8)] * 2, "nu": [0.001, 0.000999]},
    ),
    # 0.5 * 2/3 + 0.25 * 1, then 2 (0.5 * 4/5 + 0.25 * 5/12)
    "adamw_independent": Hand(
        r.adamw_independent,
        {**ADAM, "weight_decay": 0.25, "multiplier": (1.0, 2.0)},
        [2, 5],
        [-7 / 12, -0.8 - 5 / 24],
        ADAM_SLOTS,
        w=1,
        learning_rate=0.5,
    ),
}


def array(x: Any) -> np.ndarray:
    """A number as an array of one element; more as it is."""
    return np.atleast_1d(np.asarray(x))


@pytest.mark.parametrize("name", HANDS)
def test_steps_by_hand(name: str) -> None:
    """The tolerances are for numbers like ``1 - 0.999``, 9e-16 (relative) off 0.001, and for sums
    of both signs, which may be a tenth of their terms.
    """
    hand = HANDS[name]
    run = hand.method(
        array(hand.w),
        np.stack([array(g) for g in hand.gradients]),
        learning_rate=hand.learning_rate,
        **hand.hyperparameters,
    )
    updates = np.stack([array(u) for u in hand.updates])
    np.testing.assert_allclose(run.updates, updates, rtol=4e-15, atol=4e-16)
    params = np.concatenate([array(hand.w)[None], array(hand.w) + np.cumsum(updates, axis=0)])
    np.testing.assert_allclose(run.params, params, rtol=4e-15, atol=4e-16)
    assert run.slots.keys() == hand.slots.keys()
    for slot, values in hand.slots.items():
        wanted = np.stack([array(value) for value in values])
        np.testing.assert_allclose(run.slots[slot], wanted, rtol=4e-15)
        assert np.iscomplexobj(run.slots[slot]) == np.iscomplexobj(wanted)


def test_cautious_mask_by_hand() -> None:
    """Two of four are kept: a factor 4/3, or 2; where the gradient is zero nothing is kept."""
    u, g = np.array([1.0, -2.0, 3.0, 4.0]), np.array([1.0, 1.0, 0.0, 2.0])
    np.testing.assert_allclose(r.cautious(u, g), [4 / 3, 0, 0, 16 / 3], rtol=1e-15)
    np.testing.assert_array_equal(r.cautious(u, g, "mean"), [2, 0, 0, 8])
    np.testing.assert_array_equal(r.cautious(u, -u), np.zeros(4))
    np.testing.assert_array_equal(r.cautious(u, -u, "mean"), np.zeros(4))
    one = np.arange(2000) == 7
    np.testing.assert_allclose(r.cautious(1.0 * one, 1.0 * one, "mean"), 1000.0 * one, rtol=1e-15)


def test_cautious_decay_by_hand() -> None:
    """Decayed are the first element in both steps, though its second gradient is zero, and the
    second element in the second step alone.
    """
    plain = reference.sgd([1.0, -1.0], [[2.0, 2.0], [0.0, -1.0]], learning_rate=1.0)
    run = r.cautious_decay([1.0, -1.0], plain, learning_rate=(1.0, 2.0), weight_decay=0.5)
    np.testing.assert_array_equal(run.updates, [[-2.5, -2.0], [1.5, 5.0]])
    np.testing.assert_array_equal(run.params, [[1.0, -1.0], [-1.5, -3.0], [0.0, 2.0]])


def test_clips_by_hand() -> None:
    """3, 4 has the norm 5 and the root mean square sqrt(12.5)."""
    np.testing.assert_array_equal(r.clip_by_value(np.array([-3.0, 0.5, 3.0]), 2.0), [-2, 0.5, 2])
    g = np.array([[3.0, 4.0], [0.6, 0.8]])
    np.testing.assert_allclose(
        r.clip_by_rms(g[0], 0.5), [1.5 / sqrt(12.5), 2 / sqrt(12.5)], rtol=1e-15
    )
    np.testing.assert_array_equal(r.clip_by_rms(g[0], 4.0), g[0])
    np.testing.assert_array_equal(r.clip_by_rms(0 * g, 4.0), 0 * g)
    w = np.array([[0.0, 2.0], [0.0, 0.0]])
    # rows: the first may have the norm 2 / 2, the second 0.25 / 2
    np.testing.assert_allclose(
        r.adaptive_clip(g, w, 0.5, 0.25, axis=1), [[0.6, 0.8], [0.075, 0.1]], rtol=1e-15
    )
    # columns, the rule for two axes: 0.25 / 2 and 2 / 2
    columns = g / np.sqrt([[3**2 + 0.6**2, 4**2 + 0.8**2]]) * [[0.125, 1.0]]
    np.testing.assert_allclose(r.adaptive_clip(g, w, 0.5, 0.25), columns, rtol=4e-16)
    np.testing.assert_array_equal(r.adaptive_clip(g, 100 * w + 100, 0.5), g)
    np.testing.assert_allclose(r.adaptive_clip(g[0], w[0], 0.5), [0.6, 0.8], rtol=1e-15)
    np.testing.assert_array_equal(r.adaptive_clip(0 * g, 0 * w, 0.5), 0 * g)
    # of a kernel (height, width, in, out) the units are the last axis
    kernel = np.ones((2, 2, 1, 1)) * [3.0, 0.1]
    np.testing.assert_allclose(
        r.adaptive_clip(kernel, np.ones_like(kernel), 0.5),
        np.ones((2, 2, 1, 1)) * [0.5, 0.1],
        rtol=1e-15,
    )


def test_averages_of_parameters_by_hand() -> None:
    """1, then 1/2 + 5/2 over 1 - 1/4."""
    np.testing.assert_array_equal(r.ema_of_params([2.0, 5.0], 0.5), [2, 4])
    np.testing.assert_array_equal(r.mean_of_params([[2.0], [5.0], [8.0]]), [[2], [3.5], [5]])
    np.testing.assert_array_equal(r.schedule_free_eval_params([7.0], [4.0], 0.75), [8])


def test_schedules_by_hand() -> None:
    """Half-lives grow from 1 step (b = 1/2) to 5 in a straight line: 3 half way."""
    assert [r.ademamix_alpha(t, 8.0, 4) for t in (0, 3, 4, 9)] == [0, 6, 8, 8]
    b3 = [r.ademamix_b3(t, 2 ** (-1 / 5), 0.5, 4) for t in (0, 2, 4, 9)]
    np.testing.assert_allclose(b3, [0.5, 2 ** (-1 / 3), 2 ** (-1 / 5), 2 ** (-1 / 5)], rtol=1e-15)
    assert r.normalised_weight_decay(0.5, batch_size=4, dataset_size=100, epochs=4) == 0.05


# --- Identities ----------------------------------------------------------------------------------


@pytest.mark.parametrize("leaf", LEAVES)
def test_methods_meet(leaf: str) -> None:
    """What one method becomes with particular hyperparameters is another, to 1e-13 of the largest.

    Twice some ten roundings, and `adam` and `amsgrad` divide by corrections rounded apart.
    """
    w, g = problem(leaf)
    decreasing = 0.1 / np.arange(1, 61)
    rates: dict[str, Any] = {"learning_rate": decreasing}
    adam = reference.adam(w, g, **rates, eps=1e-3)
    # rho_inf of b2 = 0.5 is 3, below every threshold
    average = reference.bias_correction(reference.ema(g, 0.9), 0.9)
    momentum = decreasing.reshape(-1, *[1] * w.ndim) * average
    constant: dict[str, Any] = {
        "momentum_decay": 0.0
    }  # every mu_t is half of b1, the decay of the average
    pairs = [
        (r.amsgrad(w, g[:1], learning_rate=0.1, eps=1e-3).updates, adam.updates[:1]),
        (r.ademamix(w, g, **rates, eps=1e-3, alpha=0.0).updates, adam.updates),
        (r.radam(w, g, **rates, b2=0.5).updates, -momentum),
        (r.lamb(0 * w, g[:1], learning_rate=0.1, eps=1e-3).updates, adam.updates[:1]),
        (
            r.nadam(w, g, **rates, eps=1e-3, average="scheduled", **constant).updates,
            reference.adam(w, g, **rates, b1=0.45, eps=1e-3, nesterov=True).updates,
        ),
        (
            r.adan(w, g, **rates, b1=0.0, b2=0.0, b3=0.999, eps=1e-3, eps_root=0.0,
                   look_ahead="paper").updates,
            reference.adam(w, g, **rates, b1=0.0, eps=1e-3).updates,
        ),
        (
            r.adamw_independent(w, g, learning_rate=1.0, multiplier=0.1, weight_decay=0.5).updates,
            reference.adamw(w, g, learning_rate=0.1, weight_decay=0.5).updates,
        ),
        (
            r.schedule_free_adamw(w, g, learning_rate=0.1, b1=0.0).updates,
            reference.adam(w, g, learning_rate=0.1, b1=0.0).updates,
        ),
    ]  # fmt: skip
    for one, other in pairs:
        np.testing.assert_array_less(np.abs(one - other), 1e-13 * np.max(np.abs(other)))


@pytest.mark.parametrize("leaf", LEAVES)
def test_schedule_free_is_evaluated_at_the_average_of_z(leaf: str) -> None:
    """With one rate all weights are equal, and x_t = (z_1 + ... + z_t) / t: `mean_of_params`."""
    w, g = problem(leaf)
    run = r.schedule_free_adamw(w, g, learning_rate=0.1)
    x = r.schedule_free_eval_params(run.params[1:], run.slots["z"])
    np.testing.assert_allclose(x, r.mean_of_params(run.slots["z"]), rtol=1e-12, atol=1e-13)


def test_complex_arrays_are_not_two_real_ones() -> None:
    """The square is |g|^2: turning all gradients by a phase turns the updates."""
    w, g = problem("a")
    g = g + 1j * g[::-1]
    for method in (r.adamax, r.nadam, r.amsgrad, r.adabelief, r.radam, r.yogi, r.adan, r.ademamix):
        options: dict[str, Any] = {"initial_mu": 0.0} if method is r.yogi else {}
        run = method(0 * w, g, learning_rate=0.1, **options)
        turned = method(0 * w, 1j * g, learning_rate=0.1, **options)
        np.testing.assert_allclose(turned.updates, 1j * run.updates, rtol=1e-13)
        assert np.iscomplexobj(run.slots["mu"]) and np.isrealobj(run.slots["nu"])


# --- Against PyTorch -----------------------------------------------------------------------------


def run_case(case: str, w: np.ndarray, g: np.ndarray) -> Trajectory:
    """Runs the reference with PyTorch's hyperparameters of a case."""
    h: dict[str, Any] = TORCH[case]["hyperparameters"]
    b1, b2 = h["betas"]
    options: dict[str, Any] = {"learning_rate": h["lr"], "b1": b1, "b2": b2, "eps": h["eps"]}
    match TORCH[case]["class"]:
        case "Adam" if h["amsgrad"]:
            return r.amsgrad(w, g, **options, variant="torch")
        case "Adamax":
            return r.adamax(w, g, **options)
        case "NAdam":
            options |= {"momentum_decay": h["momentum_decay"], "product_type": np.float32}
            return r.nadamw(w, g, **options, weight_decay=h["weight_decay"])
        case "RAdam":
            return r.radam(w, g, **options, strict=True, eps_on="raw")
        case other:
            raise ValueError(other)


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("case", sorted(IN_FAMILY))
def test_torch(case: str, leaf: str) -> None:
    """To the bound of `assert_same_walk`, where no other number is small and inexact.

    RAdam's rectification begins with rho_6 = 5.99 at b2 = 0.999, and ``rho_inf - 2 t b2^t /
    (1 - b2^t)`` is a difference of numbers near 1999, of which PyTorch's rounded power is off by
    ``2^-54 / 6e-3``, 1e-14 of it: 2e-11 in rho_t, as much in (rho_t - 4) = 2 and half in its root.
    """
    h = TORCH[case]["hyperparameters"]
    inexact = 2e-11 if TORCH[case]["class"] == "RAdam" and h["betas"][1] == 0.999 else 0.0
    run, after = run_case(case, *problem(leaf)), RECORDING[f"{case}/{leaf}"]
    if inexact:
        way = np.cumsum(np.abs(run.updates), axis=0)
        difference = np.abs(run.params[1:] - after)
        np.testing.assert_array_less(difference, inexact * way + 1e-15 * np.abs(run.params[1:]))
        assert_same_walk(dataclasses.replace(run, params=run.params[:6], updates=run.updates[:5]),
                         after[:5])  # fmt: skip
    else:
        assert_same_walk(run, after)


def test_torch_cases_reach_what_they_test() -> None:
    """The maximum of AMSGrad exceeds the average somewhere, RAdam is rectified at some steps only,
    and the two averages of Nadam are apart.
    """
    for leaf in LEAVES:
        for case, more in {"amsgrad": 1.0, "amsgrad_other_betas": 2.0}.items():
            run = run_case(case, *problem(leaf))
            assert np.any(run.slots["nu_max"] > more * run.slots["nu"])
        w, g = problem(leaf)
        rectified = r.radam(w, g, learning_rate=1.0).updates
        plain = r.radam(w, g, learning_rate=1.0, threshold=np.inf).updates
        same = np.array([np.array_equal(a, b) for a, b in zip(rectified, plain, strict=True)])
        assert same[:5].all() and not same[5:].any()
        scheduled = r.nadam(w, g, learning_rate=1.0, average="scheduled").params[-1]
        constant = r.nadam(w, g, learning_rate=1.0).params[-1]
        assert np.max(np.abs(scheduled - constant)) > 0.1
