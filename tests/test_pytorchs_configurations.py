"""Every configuration that PyTorch's own tests run of the family is a composition of adamx.

data/record_torch.py recorded them, in float64: 60 steps on given gradients.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pytorch import composed
from recordings import LEAVES, RECORDING, recorded_beside

import adamx

CONFIGURATIONS = recorded_beside("torch_configurations.npz")
CASES = json.loads(str(CONFIGURATIONS["cases"]))["cases"]


def test_all_eight_classes_are_there():
    assert {name.partition(":")[0] for name in CASES} == {
        *("SGD", "Adagrad", "RMSprop", "Adam", "AdamW", "Adamax", "NAdam", "RAdam")
    }
    assert len(CASES) == 52
    assert all(name.partition(":")[0] == case["class"] for name, case in CASES.items())


@functools.cache
def run() -> dict[str, dict[str, np.ndarray]]:
    """The weights after each step, of all configurations in one program."""
    with jax.enable_x64(True):
        txs = {
            name: composed(case["class"], case["hyperparameters"]) for name, case in CASES.items()
        }

        @jax.jit
        def steps(start: Any, gradients: Any) -> Any:
            def step(carry: Any, grads: Any) -> Any:
                params, states = carry
                pairs = {k: tx.update(grads, states[k], params[k]) for k, tx in txs.items()}
                params = {k: adamx.apply_updates(params[k], u) for k, (u, _) in pairs.items()}
                return (params, {k: state for k, (_, state) in pairs.items()}), params

            carry = {k: start for k in txs}, {k: tx.init(start) for k, tx in txs.items()}
            return jax.lax.scan(step, carry, gradients)[1]

        given = (
            {leaf: jnp.asarray(RECORDING[f"{x}/{leaf}"]) for leaf in LEAVES}
            for x in ("initial", "gradients")
        )
        return jax.device_get(steps(*given))


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("name", CASES)
def test_sixty_steps_are_pytorchs(name: str, leaf: str) -> None:
    """To 1e-12 of the way gone, `sum_s |w_s - w_{s-1}|`, and the rounding of w itself.

    PyTorch's corrections are 1.4e-14 off (recordings.py says why). Each program rounds w at each
    step by 2^-53 |w| at most, PyTorch twice more for a decoupled decay. A decay that is a part of
    the gradient brings the rounding of w into it: another four a step.
    """
    start, after = RECORDING[f"initial/{leaf}"], CONFIGURATIONS[f"{name}/{leaf}"]
    path = np.concatenate([start[None], after])
    way = np.cumsum(np.abs(np.diff(path, axis=0)), axis=0)
    t = np.arange(1, 61).reshape(-1, *[1] * start.ndim)
    rounding = t * 8 * 2.0**-53 * np.max(np.abs(path), axis=0)
    difference = np.abs(run()[name][leaf] - after)
    np.testing.assert_array_less(difference, 1e-12 * way + rounding)
