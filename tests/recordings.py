"""The recorded PyTorch runs (data/record_torch.py), and what those share who judge by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from reference import Trajectory


def recorded_beside(name: str) -> Any:
    """Return the arrays of a file in data/."""
    return np.load(Path(__file__).with_name("data") / name)


RECORDING = recorded_beside("torch_trajectories.npz")
TORCH = json.loads(str(RECORDING["cases"]))["cases"]
LEAVES = ("a", "b")


# Judged in test_reference_family.py.
IN_FAMILY = {
    name
    for name, case in TORCH.items()
    if case["class"] in {"Adamax", "NAdam", "RAdam"} or case["hyperparameters"].get("amsgrad")
}


def assert_same_walk(run: Trajectory, after: np.ndarray) -> None:
    """Holds the weights of a run against the recorded ones, element by element.

    The difference is relative to the way that the element has gone, ``sum_s |w_s - w_{s-1}|``. The
    travel ``|w_t - w_0|`` itself would not do: gradients change sign, and where an element passes
    its start again the same absolute difference is any relative one.

    1e-13: PyTorch computes ``1 - b2**t`` from the rounded power, off by 2^-54 in a number that is
    2e-3 at the least where it is not exact (b2 = 0.999, t = 2), so 2.8e-14, and its root 1.4e-14.
    It falls with t. A step has some ten roundings more, 1e-15 together.

    To this comes what storing the weights costs, which is relative to the weight and not to the
    way: each program rounds w at each step, by at most 2^-53 |w|, PyTorch's AdamW a second time,
    for the decay, and once in ``1 - lr * wd``: four times 2^-53 |w| a step. It is the larger term
    where an element moves slowly.
    """
    way = np.cumsum(np.abs(run.updates), axis=0)
    largest = np.maximum.accumulate(np.abs(run.params))[1:]
    t = np.arange(1, len(way) + 1).reshape(-1, *[1] * (way.ndim - 1))
    bound = 1e-13 * way + t * 4 * 2.0**-53 * largest
    np.testing.assert_array_less(np.abs(run.params[1:] - after), bound)


def problem(leaf: str) -> tuple[np.ndarray, np.ndarray]:
    """The initial weights and the gradients of one leaf."""
    return RECORDING[f"initial/{leaf}"], RECORDING[f"gradients/{leaf}"]
