"""Judges the papers' figures: that a grid is what it says, and that the methods are the papers'."""

from __future__ import annotations

import importlib
import itertools
import logging
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib import image
from rich.progress import Progress

import adamx

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples" / "papers"))
shared: Any = importlib.import_module("shared")
SCRIPTS: dict[str, Any] = {
    name: importlib.import_module(name)
    for name in ("adam_figure1", "adam_figure4", "adamw_figures1_2", "warm_restarts")
}
adam_figure1, adam_figure4, adamw_figures, warm_restarts = SCRIPTS.values()


@pytest.fixture(scope="module", autouse=True)
def as_users_run_them():
    """Promote as JAX does by default, as users run the scripts."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class Compiled(logging.Handler):
    """Notes the names of the programs that are compiled."""

    def __init__(self):
        super().__init__()
        self.names = []

    def emit(self, record):
        words = record.getMessage().split()
        if words[0] == "Compiling":
            self.names.append(words[1])


@pytest.fixture(scope="module", params=SCRIPTS)
def run(request: pytest.FixtureRequest, tmp_path_factory: Any):
    """Run a script small: its module, result, picture, page, and the programs that it compiled."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    page, picture = folder / "page.md", folder / "picture.png"
    page.write_text(f"before\n<!-- {name} -->\noutdated\n<!-- /{name} -->\nafter\n")
    handler, logger = Compiled(), logging.getLogger("jax")
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            argv = ["--quick", "--no-progress", "--output", str(picture), "--markdown", str(page)]
            result = SCRIPTS[name].main(argv)
    finally:
        logger.removeHandler(handler)
    return SCRIPTS[name], result, picture, page, handler.names


# shapes of what was measured, by the module's name: all cells of the grid, each method once
CELLS = {
    "adam_figure1": (4, (6, 3, 2)),  # epochs, rates, seeds
    "adam_figure4": (2, (2, 1, 2, 2, 2)),  # twice, b1, b2, rates, seeds
    "adamw_figures1_2": (4, (3, 4, 2)),  # rates, decays, seeds
    "warm_restarts": (3, (7, 4, 2)),  # epochs, points, seeds
}


def measured(result: Any) -> dict[Any, np.ndarray]:
    """Return what a script measured, by method."""
    return next(value for value in vars(result).values() if isinstance(value, dict))


@pytest.mark.slow
def test_a_grid_is_one_compiled_program_and_has_all_its_cells(run):
    module, result, _, _, compiled = run
    methods, shape = CELLS[module.NAME]
    assert sum("train_grid" in name for name in compiled) == methods
    found = measured(result)
    assert len(found) == methods
    for name, values in found.items():
        assert values.shape == shape, name
        assert np.isfinite(values).all(), name
        # each seed and each point is another run
        assert len(np.unique(values.reshape(-1, shape[-1])[-1])) == shape[-1], name


@pytest.mark.slow
def test_a_script_draws_its_picture_and_writes_its_section(run):
    module, result, picture, page, _ = run
    pixels = image.imread(picture)
    assert min(pixels.shape[:2]) > 300 and pixels[..., :3].std() > 0.05
    text = page.read_text()
    assert text.startswith(f"before\n<!-- {module.NAME} -->\n## ")
    assert text.endswith(f"\n<!-- /{module.NAME} -->\nafter\n")
    assert "outdated" not in text
    finding = result.finding
    assert f"**The claim:** {finding.claim}" in text
    assert f"**Here it {finding.verdict}:**" in text
    for statement, held in finding.parts:
        assert f"- {'yes' if held else 'no'}: {statement}\n" in text
    for row in finding.rows:
        assert len(row) == len(finding.columns)
        assert "| " + " | ".join(row) + " |\n" in text


def test_the_page_has_a_section_by_each_script():
    text = (ROOT / "docs" / "papers.md").read_text()
    for name in SCRIPTS:
        section = shared.section(name).search(text)
        assert section is not None, name
        assert "**The claim:**" in section[0] and f"images/papers_{name}.png" in section[0]


# --- the shared training ------------------------------------------------------------------------


@pytest.mark.slow
def test_a_cell_of_the_grid_is_the_run_that_a_loop_makes():
    rng = np.random.default_rng(0)
    inputs, targets = jnp.asarray(rng.normal(size=(2, 12, 3)), jnp.float32)

    def cost(weights: Any, which: Any) -> Any:
        return ((inputs[which] * weights - targets[which]) ** 2).mean()

    task = shared.Task(
        first=lambda rng: shared.normal(rng, 3),
        batches=lambda rng: shared.shuffled(rng, 12, 5),
        loss=cost,
        measure=lambda weights: cost(weights, np.arange(12)),
    )
    points = shared.grid(rate=(0.1, 0.3), b1=(0.5, 0.9))
    with Progress(disable=True) as progress:
        kept = {"seeds": 2, "epochs": 3, "progress": progress, "name": ""}
        found = shared.train(task, lambda rate, b1: adamx.adam(rate, b1), points, **kept)
        assert progress.tasks[0].completed == 3
    assert found.shape == (3, 4, 2)
    for place, (rate, b1) in enumerate(itertools.product((0.1, 0.3), (0.5, 0.9))):
        tx, draw = adamx.adam(rate, b1), np.random.default_rng(1)
        # the seed draws its start first, then the batches of each epoch
        weights = jnp.asarray(task.first(draw))
        state = tx.init(weights)
        for epoch in range(3):
            for which in task.batches(draw):
                updates, state = tx.update(jax.grad(cost)(weights, which), state, weights)
                weights = weights + updates
            # 2 steps an epoch, each off by some ULPs of 6e-8, since sums are in another order
            np.testing.assert_allclose(found[epoch, place, 1], task.measure(weights), rtol=2e-5)


def test_an_epoch_sees_each_example_at_most_once():
    seen = shared.shuffled(np.random.default_rng(0), 17, 5)
    assert seen.shape == (3, 5)
    assert len(set(seen.ravel())) == 15 and seen.max() < 17


def test_clearly_below_is_below_with_every_seed():
    values, others = np.array([[1.0, 2.0], [1.0, 2.0]]), np.array([[2.0, 3.0], [9.0, 2.0]])
    assert shared.clearly_below(values, others).tolist() == [True, False]
    assert not shared.clearly_below(others, values).any()


def test_a_share_of_the_training_labels_is_random_and_no_other():
    clean, noisy = shared.Digits.load(300), shared.Digits.load(300, 0.2)
    # a fifth is drawn, of which a tenth is right by chance: 54 on average, standard deviation 6.7
    assert 30 < (clean.labels != noisy.labels).sum() < 80
    assert np.array_equal(clean.test_labels, noisy.test_labels)
    assert clean.images.shape == (300, 64) and clean.test_images.shape == (1497, 64)


# --- the methods --------------------------------------------------------------------------------


def steps_of(tx: Any, gradients: list[float], weight: float) -> np.ndarray:
    """Return the updates of one weight, which stays where it is."""
    w = jnp.array([weight])

    def step(state: Any, gradient: Any) -> Any:
        update, state = tx.update(gradient, state, w)
        return state, update

    return np.asarray(jax.lax.scan(step, tx.init(w), jnp.array(gradients)[:, None])[1])[:, 0]


def test_adam_figure1_divides_the_rate_by_the_root_of_the_step():
    steps = steps_of(adam_figure1.METHODS["Adam"](0.5), [2.0] * 4, 0.0)
    np.testing.assert_allclose(steps, -0.5 / np.sqrt([1, 2, 3, 4]), rtol=1e-6)
    steps = steps_of(adam_figure1.METHODS["AdaGrad, constant"](0.5), [2.0] * 4, 0.0)
    np.testing.assert_allclose(steps, -0.5 / np.sqrt([1, 2, 3, 4]), rtol=1e-6)
    steps = steps_of(adam_figure1.METHODS["AdaGrad"](0.5), [2.0] * 4, 0.0)
    np.testing.assert_allclose(steps, [-0.5, -0.25, -0.5 / 3, -0.125], rtol=1e-6)
    nesterov = steps_of(adam_figure1.METHODS["SGD, Nesterov"](0.5), [2.0, 0.0], 0.0)
    np.testing.assert_allclose(nesterov, [-0.5 * 3.8, -0.5 * 0.81 * 2 / np.sqrt(2)], rtol=1e-6)


def test_adam_figure4_leaves_out_the_two_corrections_and_nothing_else():
    assert str(adam_figure4.corrected(0.1, 0.9, 0.999)) == str(adamx.adam(0.1))
    for b1, b2 in ((0.0, 0.9999), (0.9, 0.99)):
        with_, without = (
            abs(steps_of(make(0.1, b1, b2), [3.0] * 200, 0.0))
            for make in adam_figure4.METHODS.values()
        )
        np.testing.assert_allclose(with_, 0.1, rtol=1e-5)
        # 1 - b2 in float32 is off by up to 6e-8 / 1e-4 = 6e-4, of which the root is half
        np.testing.assert_allclose(without[0], 0.1 * (1 - b1) / np.sqrt(1 - b2), rtol=3e-4)
        t = np.arange(1, 201)
        expected = 0.1 * (1 - b1**t) / np.sqrt(1 - b2**t)
        np.testing.assert_allclose(without, expected, rtol=3e-4)


def test_adamw_figures_put_one_piece_in_two_places():
    make = adamw_figures.methods(optax.constant_schedule(0.5))  # eta
    rate, decay, gradient, weight = 0.1, 0.25, 4.0, 2.0
    steps = {name: steps_of(tx(rate, decay), [gradient] * 2, weight) for name, tx in make.items()}
    # L2 keeps Adam's steps at a sign, decoupled decay adds eta * decay * w, whatever the rate
    np.testing.assert_allclose(steps["Adam, L2"], [-0.05, -0.05], rtol=1e-5)
    np.testing.assert_allclose(steps["AdamW"], [-0.05 - 0.25, -0.05 - 0.25], rtol=1e-5)
    np.testing.assert_allclose(steps["SGD, L2"], [-0.05 * 4.5, -0.05 * 4.5 * 1.9], rtol=1e-5)
    np.testing.assert_allclose(steps["SGDW"], [-0.2 - 0.25, -0.2 * 1.9 - 0.25], rtol=1e-5)
    of_library = adamx.adamw_independent(rate, weight_decay=decay, multiplier=0.5)
    np.testing.assert_allclose(steps_of(of_library, [gradient] * 2, weight), steps["AdamW"])


@pytest.mark.slow
def test_normalised_networks_do_not_feel_the_scale_of_their_weights():
    first = adamw_figures.classifier(*adamw_figures.NETWORKS["normalised"])
    plain = adamw_figures.classifier(*adamw_figures.NETWORKS["plain"])
    layers, which = first.first(np.random.default_rng(0)), np.arange(50)
    doubled = [2 * weights for weights in layers]
    # the variance has 1e-6 added to it, which is less than 1e-4 of it
    np.testing.assert_allclose(first.loss(doubled, which), first.loss(layers, which), rtol=1e-4)
    assert plain.loss(doubled, which) > 1.5 * plain.loss(layers, which)


def test_coupling_tells_a_diagonal_valley_from_a_straight_one():
    rates, decays = np.meshgrid(np.arange(9.0), np.arange(9.0), indexing="ij")
    diagonal, straight = abs(rates + decays - 8), abs(decays - 3) + 1e-3 * rates
    assert adamw_figures.coupling(diagonal[..., None]) < -0.9
    # nine of the ten best stand in the valley, and one beside it
    assert abs(adamw_figures.coupling(straight[..., None])) < 0.1
    assert abs(adamw_figures.coupling(straight.T[..., None])) < 0.1


def test_restarts_raise_the_rate_again_and_normalise_the_decay():
    size = warm_restarts.Size(1, (1, 2), (0.1,), (0.4,))
    steps = warm_restarts.STEPS
    tx = warm_restarts.with_restarts(size)(0.1, 0.4)
    shrinkage = -steps_of(tx, [0.0] * 3 * steps, 1.0)  # eta_t times the decay
    norms = [0.4 * np.sqrt(warm_restarts.BATCH / (warm_restarts.IMAGES * n)) for n in (1, 2)]
    np.testing.assert_allclose(shrinkage[[0, steps]], norms, rtol=1e-5)
    for start, length, norm in ((0, steps, norms[0]), (steps, 2 * steps, norms[1])):
        cosine = (1 + np.cos(np.pi * np.arange(length) / length)) / 2
        expected = norm * cosine
        # a cosine near -1 plus 1 keeps an absolute precision of 6e-8
        found = shrinkage[start : start + length]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-7 * norm)


def test_who_stops_takes_the_weights_of_the_last_period():
    size = warm_restarts.Size(1, (2, 4), (0.1,), (0.1,))
    found = warm_restarts.at_ends(np.arange(1.0, 7.0)[:, None], size)[:, 0]
    assert found.tolist() == [1, 2, 2, 2, 2, 6]


# --- the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--output", "nowhere/a.png"], "--output: there is no folder 'nowhere'"),
        (["--output", "a.txt"], "--output: must end in .png, got 'a.txt'"),
        (["--markdown", "nowhere.md"], "--markdown: no page with <!-- adam_figure1 -->"),
    ],
)
def test_bad_arguments_are_explained(capsys, argv, message):
    with pytest.raises(SystemExit) as exit_:
        adam_figure1.main(argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_help_names_every_option(capsys):
    for name, script in SCRIPTS.items():
        with pytest.raises(SystemExit) as exit_:
            script.main(["--help"])
        assert exit_.value.code == 0
        said = " ".join(capsys.readouterr().out.split())
        for option in ("--output", "--markdown", "--quick", "--no-progress", f"{name}.png"):
            assert option in said
