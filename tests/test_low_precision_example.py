"""Judges examples/low_precision.py: what it counts, and what its runs do."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib import image

import adamx

STEPS = 12


@pytest.fixture(scope="module", autouse=True)
def as_users_run_them():
    """Promote as JAX does by default: under the tests' strict rules Optax's Adam raises."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """Import the example by its path, with a model that compiles faster."""
    path = Path(__file__).parent.parent / "examples" / "low_precision.py"
    spec = importlib.util.spec_from_file_location("low_precision", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["low_precision"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    vars(module).update(LAYERS=1, BATCH=4)
    return module


@pytest.fixture(scope="module")
def made(example: ModuleType, tmp_path_factory: Any) -> tuple[dict[str, Any], Path, str]:
    """Run it: the runs by name, the picture and what was printed."""
    path = tmp_path_factory.mktemp("low_precision") / "picture.png"
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr(example, "print", said.append, raising=False)
        patch.setattr(example.Console, "print", lambda _, table: said.append(as_text(table)))
        runs = example.main(["--steps", str(STEPS), "--output", str(path), "--no-progress"])
    return {run.variant.name: run for run in runs}, path, "\n".join(said)


def as_text(table: Any) -> str:
    """Return the cells of a table, a line for each row."""
    return "\n".join(" | ".join(row) for row in zip(*(c.cells for c in table.columns), strict=True))


BYTES = {
    "f32": (4, 8),
    "bf16, optax.adamw": (2, 4),
    "bf16, master_weights": (2, 10),
    "bf16, stochastic rounding": (2, 8),
    "f32, packed16": (4, 4),
    "f32, packed8": (4, 2),
    "bf16, remainder8 + packed8": (2, 3),
}


def test_bytes_per_parameter_are_those_of_the_formats(made):
    runs, _, _ = made
    assert list(runs) == list(BYTES)
    for name, (params, state) in BYTES.items():
        run = runs[name]
        scalars = 16 / sum(x.size for x in jax.tree.leaves(run.params))  # count, learning rate
        assert run.bytes_per_parameter[0] == params, name
        assert state < run.bytes_per_parameter[1] <= state + scalars, name


def test_every_run_learns_and_is_in_the_table(made):
    runs, path, said = made
    for name, run in runs.items():
        assert len(run.seconds) == run.steps[-1] == STEPS
        assert {x.dtype for x in jax.tree.leaves(run.params)} == {jnp.dtype(run.variant.dtype)}
        assert run.losses[0] < math.log(128) + 0.1
        assert run.losses[-1] < 4.0, name  # 3.76 at most
        # rounding alone parts the runs this early: by less than 0.02
        assert abs(run.losses[-1] - runs["f32"].losses[-1]) < 0.05, name
        total = sum(BYTES[name])
        row = f"{name} | {run.variant.dtype.__name__} | {run.losses[-1]:.3f} | {total:.2f} | "
        assert row in said
    assert f"Picture: {path}" in said
    pixels = image.imread(path)
    assert min(pixels.shape[:2]) > 300 and pixels[..., :3].std() > 0.05


def test_master_weights_follow_the_float32_trajectory_bit_for_bit(made, example):
    """Against AdamW on float32 weights, whose gradients are taken at the weights in bfloat16."""
    run = made[0]["bf16, master_weights"]
    tx = adamx.adamw(example.schedule(STEPS))

    @jax.jit
    def step(weights, state, grads):
        updates, state = tx.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    weights = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), example.first_weights(0))
    state = tx.init(weights)
    for windows in example.load(STEPS, 0).batches:
        grads = example.gradient(jax.tree.map(rounded, weights), windows)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        weights, state = step(weights, state, grads)
    kept = adamx.masters(run.params, run.state)
    for ours, other, param in zip(*map(jax.tree.leaves, (kept, weights, run.params)), strict=True):
        assert np.array_equal(ours, other)
        assert np.array_equal(param, rounded(other))


def rounded(x: jax.Array) -> jax.Array:
    """Return the nearest bfloat16 numbers, ties away from zero, as remainders need it."""
    bits = np.asarray(x).view(np.uint32) + np.uint32(0x8000)
    return jnp.asarray((bits & np.uint32(0xFFFF0000)).view(np.float32), jnp.bfloat16)


def test_the_first_weights_are_numbers_of_every_format(example):
    for weight in jax.tree.leaves(example.first_weights(0)):
        assert weight.dtype == jnp.bfloat16


def test_windows_depend_on_the_seed_alone(example):
    data, again = example.load(10, 3), example.load(10, 3)
    assert np.array_equal(data.batches, again.batches)
    assert np.array_equal(data.held_out, again.held_out)
    assert data.batches.shape == (10, example.BATCH, example.CONTEXT + 1)
    assert data.batches.min() >= 0 and data.batches.max() < example.CHARACTERS
    assert not np.array_equal(data.batches, example.load(10, 4).batches)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "9"], "--steps: must be at least 10, got 9"),
        (["--seed", "-1"], "--seed: must be at least 0, got -1"),
        (["--output", "nowhere/a.png"], "--output: there is no folder 'nowhere'"),
        (["--output", "a.txt"], "--output: must end in .png, got 'a.txt'"),
    ],
)
def test_bad_arguments_are_explained(example, capsys, argv, message):
    with pytest.raises(SystemExit) as exit_:
        example.main(argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_help_names_every_option(example, capsys):
    with pytest.raises(SystemExit) as exit_:
        example.main(["--help"])
    assert exit_.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for option in ("--steps", "--seed", "--output", "--no-progress", "default: 500"):
        assert option in said
