"""Judges examples/papers/low_precision.py: what it counts, and what its runs do."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib import image

import adamx

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples" / "papers"))
shared: Any = importlib.import_module("shared")
example: Any = importlib.import_module("low_precision")
SMALL = example.QUICK


@pytest.fixture(scope="module", autouse=True)
def as_users_run_them():
    """Promote as JAX does by default: under the tests' strict rules Optax's Adam raises."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> tuple[Any, Path, str]:
    """Run it: what came out, the picture, and the page."""
    folder = tmp_path_factory.mktemp("low_precision")
    page, path = folder / "page.md", folder / "picture.png"
    page.write_text("before\n<!-- low_precision -->\noutdated\n<!-- /low_precision -->\nafter\n")
    argv = ["--quick", "--no-progress", "--output", str(path), "--markdown", str(page)]
    return example.main(argv), path, page.read_text()


BYTES = {
    "f32": (4, 8),
    "bf16, optax.adamw": (2, 4),
    "bf16, master_weights": (2, 10),
    "bf16, stochastic rounding": (2, 8),
    "f32, packed16": (4, 4),
    "f32, packed8": (4, 2),
    "bf16, remainder8 + packed8": (2, 3),
}


@pytest.mark.slow
def test_bytes_per_parameter_are_those_of_the_formats(made):
    result, _, page = made
    assert list(result.runs) == list(BYTES)
    for name, (params, state) in BYTES.items():
        run = result.runs[name][0]
        scalars = 16 / sum(x.size for x in jax.tree.leaves(run.params))  # count, learning rate
        assert run.bytes_per_parameter[0] == params, name
        assert state < run.bytes_per_parameter[1] <= state + scalars, name
        dtype = jnp.dtype(example.VARIANTS[name].dtype).name
        assert f"\n| {name} | {dtype} | {params + state}.0 | " in page


@pytest.mark.slow
def test_every_run_learns(made):
    result, path, page = made
    assert page.startswith("before\n<!-- low_precision -->\n## ") and "outdated" not in page
    for name, runs in result.runs.items():
        assert len(runs) == SMALL.seeds
        for run, reference in zip(runs, result.runs["f32"], strict=True):
            assert len(run.losses) == len(example.marks(SMALL)) == SMALL.steps
            dtypes = {x.dtype for x in jax.tree.leaves(run.params)}
            assert dtypes == {jnp.dtype(example.VARIANTS[name].dtype)}
            assert run.losses[0] < math.log(128) + 0.1
            assert run.losses[-1] < 4.0, name  # 3.76 at most
            # rounding alone parts the runs this early: by less than 0.02
            assert abs(run.losses[-1] - reference.losses[-1]) < 0.05, name
        assert runs[0].losses[-1] != runs[1].losses[-1]
    pixels = image.imread(path)
    assert min(pixels.shape[:2]) > 300 and pixels[..., :3].std() > 0.05


def test_the_verdict_is_read_from_the_last_losses():
    """Of losses that are made up: only the last ones count, and differences from 1 % on."""

    def judged(nearest: list[float], other: float) -> tuple[tuple[str, bool], ...]:
        made_up = {key: [2.0, 2.2] for key in example.VARIANTS}
        made_up |= {example.NEAREST: nearest, "f32, packed8": [2.0 + other, 2.2 + other]}
        params = {"w": jnp.zeros(1)}
        runs = {
            name: [example.Run(params, params, np.array([9.0, loss])) for loss in losses]
            for name, losses in made_up.items()
        }
        return example.judge(runs, example.Size(2, 2, 1, 1)).finding.parts

    parts = judged([2.1, 2.3], 0.02)
    assert [held for _, held in parts] == [True] * 6
    assert (
        parts[0][0].endswith(": +4.8%")
        and parts[4][0] == "f32, packed8 ends no higher than f32: +1.0%"
    )
    assert not judged([2.1, 2.2], 0.02)[0][1]  # not with every seed
    assert not judged([2.01, 2.21], 0.02)[0][1]  # half a per cent
    assert [held for _, held in judged([2.1, 2.3], 0.022)] == [True] * 4 + [False, True]


def test_the_readme_says_of_losses_what_the_page_says():
    page = shared.section("low_precision").search((ROOT / "docs" / "papers.md").read_text())[0]
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in page.splitlines()]
    less = {row[0]: row[-1] for row in rows if row[0] in example.VARIANTS}
    assert len(less) == len(example.VARIANTS)
    readme = " ".join((ROOT / "README.md").read_text().split())
    worse = less["bf16, optax.adamw"].split()[0]
    assert f"transformer ends {worse} nats per character worse than in float32" in readme
    assert f"it ends no worse ({less['bf16, master_weights']})" in readme
    small = f"{less['f32, packed16'].lstrip('-')} and {less['f32, packed8']}"
    assert f"(differences of {small} nats per character)" in readme


@pytest.mark.slow
def test_master_weights_follow_the_float32_trajectory_bit_for_bit(made):
    """Against AdamW on float32 weights, whose gradients are taken at the weights in bfloat16."""
    run = made[0].runs["bf16, master_weights"][0]
    tx = adamx.adamw(example.schedule(SMALL))

    @jax.jit
    def step(weights, state, grads):
        updates, state = tx.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    weights = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), example.first_weights(SMALL, 0))
    state = tx.init(weights)
    for windows in example.load(SMALL, 0).batches:
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


def test_the_first_weights_are_numbers_of_every_format():
    for weight in jax.tree.leaves(example.first_weights(SMALL, 0)):
        assert weight.dtype == jnp.bfloat16


def test_windows_depend_on_the_seed_alone():
    data, again = example.load(SMALL, 3), example.load(SMALL, 3)
    assert np.array_equal(data.batches, again.batches)
    assert np.array_equal(data.held_out, again.held_out)
    assert data.batches.shape == (SMALL.steps, SMALL.batch, example.CONTEXT + 1)
    assert data.batches.min() >= 0 and data.batches.max() < example.CHARACTERS
    assert not np.array_equal(data.batches, example.load(SMALL, 4).batches)


def test_the_loss_is_taken_evenly_and_at_the_end():
    assert example.marks(example.FULL) == list(range(20, 501, 20))
