"""Records what PyTorch's optimizers do to given weights under given gradients.

Run it as ``python record_torch.py``, with PyTorch installed (CPU; the recording names its version).
It writes ``torch_trajectories.npz`` next to itself, which NumPy alone can read. Each run writes
the same bytes; another processor, with other vector instructions, may differ in the last bits::

    initial/a, initial/b           the weights before the first step, shared by all cases
    gradients/a, gradients/b       [STEPS, *shape], shared by all cases
    CASE/a, CASE/b                 [STEPS, *shape], the weights after each step
    cases                          JSON: {"torch": version, "cases": {CASE: {"class": name,
                                   "arguments": as given, "hyperparameters": all of them}}}

``torch_configurations.npz`` has the same of the configurations that PyTorch's own tests run, whose
CASE is CLASS: DESCRIPTION, with arrays CASE/a and CASE/b and ``cases``;
and ``torch_states.npz``, with what the optimizers keep after STATE_STEPS of these steps::

    CASE/INDEX/FIELD               of optimizer.state_dict()["state"]; the index of a is 0, of b 1
    param_groups                   JSON: {CASE: optimizer.state_dict()["param_groups"]}

All is float64. The gradients are given, not computed from the weights.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

STEPS = 60
STATE_STEPS = 7
SHAPES = {"a": (3, 4), "b": (5,)}
OUTPUT = Path(__file__).with_name("torch_trajectories.npz")
CONFIGURATIONS = Path(__file__).with_name("torch_configurations.npz")
STATES = Path(__file__).with_name("torch_states.npz")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "adam": ("Adam", {"lr": 1e-3}),
    "adam_other_betas": ("Adam", {"lr": 0.01, "betas": (0.5, 0.9), "eps": 1e-4}),
    "adam_l2": ("Adam", {"lr": 0.01, "weight_decay": 0.1}),
    "adam_b1_zero": ("Adam", {"lr": 0.01, "betas": (0.0, 0.999)}),
    "amsgrad": ("Adam", {"lr": 0.01, "amsgrad": True}),
    "amsgrad_other_betas": ("Adam", {"lr": 0.01, "betas": (0.5, 0.9), "amsgrad": True}),
    "adamw": ("AdamW", {}),
    "adamw_strong_decay": ("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    "rmsprop": ("RMSprop", {}),
    "rmsprop_alpha": ("RMSprop", {"alpha": 0.9}),
    "rmsprop_centered": ("RMSprop", {"centered": True}),
    "rmsprop_momentum": ("RMSprop", {"momentum": 0.9}),
    "rmsprop_centered_momentum": ("RMSprop", {"centered": True, "momentum": 0.9}),
    "adagrad": ("Adagrad", {}),
    "adagrad_initial": ("Adagrad", {"initial_accumulator_value": 0.1}),
    "adagrad_eps": ("Adagrad", {"lr_decay": 0, "eps": 1e-3}),
    "adamax": ("Adamax", {}),
    "adamax_other_betas": ("Adamax", {"lr": 0.01, "betas": (0.5, 0.9), "eps": 1e-3}),
    "nadam": ("NAdam", {}),
    "nadam_decoupled": (
        "NAdam",
        {"momentum_decay": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    "radam": ("RAdam", {}),
    "radam_short": ("RAdam", {"lr": 0.01, "betas": (0.5, 0.9), "eps": 1e-3}),
    "sgd": ("SGD", {"lr": 0.1}),
    "sgd_momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "sgd_nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "sgd_dampening": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.9}),
    "sgd_l2": ("SGD", {"lr": 0.1, "weight_decay": 0.1}),
    "sgd_momentum_l2": ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
}


CLASSES = ("SGD", "Adagrad", "RMSprop", "Adam", "AdamW", "Adamax", "NAdam", "RAdam")


def configurations() -> dict[str, tuple[str, dict[str, Any]]]:
    """Returns what PyTorch's tests run on a CPU, by class and description."""
    from torch.testing._internal.common_optimizers import optim_db

    found = {}
    for info in optim_db:
        name = info.optim_cls.__name__
        if name in CLASSES:
            for given in info.optim_inputs_func(device="cpu"):
                found[f"{name}: {given.desc}"] = name, given.kwargs
    return found


def as_numbers(hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """Returns hyperparameters with a learning rate that is a tensor as a number."""
    return {k: x.item() if isinstance(x, torch.Tensor) else x for k, x in hyperparameters.items()}


def problem() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Makes the initial weights and the gradients, with scales from 1e-3 to 10 and some zeros."""
    rng = np.random.default_rng(0)
    initial, gradients = {}, {}
    for name, shape in SHAPES.items():
        initial[name] = rng.normal(size=shape)
        scale = 10 ** rng.uniform(-3, 1, size=shape)
        gradients[name] = scale * rng.normal(size=(STEPS, *shape))
        gradients[name][rng.random((STEPS, *shape)) < 0.1] = 0.0
        gradients[name][:3, ..., 0] = 0.0  # some elements have no gradient at first
    return initial, gradients


def record(
    class_name: str,
    arguments: dict[str, Any],
    initial: dict[str, np.ndarray],
    gradients: dict[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
    """Runs one optimizer: the weights after each step, its hyperparameters, an early state."""
    parameters = {name: torch.tensor(value, requires_grad=True) for name, value in initial.items()}
    implementation: dict[str, Any] = {"foreach": False}
    if class_name in ("Adam", "AdamW", "Adagrad", "SGD"):
        implementation["fused"] = False
    optimizer = getattr(torch.optim, class_name)(
        list(parameters.values()), **arguments, **implementation
    )
    after: dict[str, list[np.ndarray]] = {name: [] for name in parameters}
    state: dict[str, Any] = {}
    for t in range(STEPS):
        if t == STATE_STEPS:
            state = copy.deepcopy(optimizer.state_dict())
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(gradients[name][t])
        optimizer.step()
        for name, parameter in parameters.items():
            after[name].append(parameter.detach().numpy().copy())
    weights = {name: np.stack(values) for name, values in after.items()}
    return weights, dict(optimizer.defaults), state


def record_configurations(initial: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> None:
    """Records PyTorch's own configurations and writes them to `CONFIGURATIONS`.

    NAdam keeps a product, and a test's learning rate is a tensor, in the default dtype.
    """
    torch.set_default_dtype(torch.float64)
    arrays, cases = {}, {}
    for case, (class_name, arguments) in configurations().items():
        after, hyperparameters, _ = record(class_name, arguments, initial, gradients)
        arrays |= {f"{case}/{name}": value for name, value in after.items()}
        cases[case] = {"class": class_name, "hyperparameters": as_numbers(hyperparameters)}
    arrays["cases"] = np.array(json.dumps({"torch": torch.__version__, "cases": cases}))
    np.savez(CONFIGURATIONS, allow_pickle=False, **arrays)
    torch.set_default_dtype(torch.float32)


def main() -> None:
    """Records all cases and writes them to `OUTPUT` and `STATES`."""
    initial, gradients = problem()
    arrays = {f"initial/{name}": value for name, value in initial.items()}
    arrays |= {f"gradients/{name}": value for name, value in gradients.items()}
    described = {}
    states: dict[str, np.ndarray] = {}
    groups = {}
    for case, (class_name, arguments) in CASES.items():
        after, hyperparameters, state = record(class_name, arguments, initial, gradients)
        arrays |= {f"{case}/{name}": value for name, value in after.items()}
        for index, fields in state["state"].items():
            for field, value in fields.items():
                if value is not None:
                    states[f"{case}/{index}/{field}"] = np.asarray(value)
        groups[case] = state["param_groups"]
        described[case] = {
            "class": class_name,
            "arguments": arguments,
            "hyperparameters": hyperparameters,
        }
    description = {"torch": torch.__version__, "cases": described}
    arrays["cases"] = np.array(json.dumps(description))
    record_configurations(initial, gradients)
    # Not compressed: the bytes then do not depend on the version of zlib.
    np.savez(OUTPUT, allow_pickle=False, **arrays)
    states["param_groups"] = np.array(json.dumps(groups))
    np.savez(STATES, allow_pickle=False, **states)


if __name__ == "__main__":
    main()
