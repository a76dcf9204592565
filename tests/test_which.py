"""The page "which optimizer": each method at its best rate, by validation data, sorted by test."""

import dataclasses
import importlib
import pkgutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adamx.optimizers

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
which: Any = importlib.import_module("which")
pytestmark = pytest.mark.usefixtures("plain_jax")


def test_every_optimizer_takes_part():
    """Muon and AdamH are for matrices, so that they come with AdamW for the rest."""
    names = {module.name for module in pkgutil.iter_modules(adamx.optimizers.__path__)}
    assert which.methods().keys() == names - {"muon"} | {"muon_adamw", "adamh_adamw"}


def result(validation, test) -> Any:
    return which.Result(np.array(validation), np.array(test), state=8.0)


def test_validation_chooses_the_rate_and_test_data_the_place():
    settings = which.QUICK
    tasks = [which.digits_task(settings), which.characters(settings)]
    up, down = (task.title for task in tasks)
    results = {
        # the second rate is better on test data, the first on validation data
        "a": {up: result([[1.0, 3.0], [2.5, 2.5]], [[80.0, 82.0], [99.0, 99.0]]),
              down: result([[np.inf, 1.0], [2.0, 2.0]], [[1.0, 1.0], [3.0, 3.5]])},
        "b": {up: result([[1.0, 1.0], [2.0, 2.0]], [[90.0, 90.0], [70.0, 70.0]]),
              down: result([[1.0, 1.0], [2.0, 2.0]], [[2.0, 2.0], [1.0, 1.0]])},
    }  # fmt: skip
    assert results["a"][up].best == 0 and results["a"][down].best == 1
    made = which.table(results, {"a": 1.5, "b": 0.625}, tasks, settings)
    first, second = ([cell for cell in row] for row in made.rows)
    low, high = (f"{rate:g}" for rate in settings.rates)
    assert first == ["b", "1.0", f"90.0 ± 0.0, {low}*", f"2.000 ± 0.000, {low}*", "8.00", "0.62"]
    # 3.25 and 0.25 * sqrt(2): two seeds, of a sample
    assert second[:3] == ["a", "2.0", f"81.0 ± 1.4, {low}*"]
    assert second[3] == f"3.250 ± 0.354, {high}*"


def test_rows_for_validation_and_test_are_not_trained_on():
    settings = which.QUICK
    images, _ = which.digits()
    task = which.digits_task(settings)
    seen = np.asarray(task.batches(0)[0]).reshape(-1, 64)
    held_out = {row.tobytes() for row in images[1077:]} - {row.tobytes() for row in images[:1077]}
    assert not held_out & {row.tobytes() for row in seen}


def test_a_run_that_does_not_stay_finite_is_never_the_best():
    settings = dataclasses.replace(which.QUICK, rates=(1e30, 1e-2))
    found = which.trained(which.methods()["sgd"], which.digits_task(settings), settings)
    assert np.isposinf(found.validation[0]).all() and np.isfinite(found.validation[1]).all()
    assert found.best == 1


@pytest.mark.parametrize("name", ["schedule_free_adamw", "adamw"])
def test_what_schedule_free_trained_is_judged_at_its_average(name, monkeypatch):
    judged = []
    average = adamx.schedule_free_eval_params
    monkeypatch.setattr(
        adamx, "schedule_free_eval_params", lambda *given: judged.append(1) or average(*given)
    )
    which.trained(which.methods()[name], which.digits_task(which.QUICK), which.QUICK)
    assert bool(judged) == (name == "schedule_free_adamw")


def test_the_time_of_a_step_is_a_multiple_of_that_of_adamw(monkeypatch):
    seconds = {"sgd": [1.0, 2.0, 9.0], "adamw": [2.0, 4.0, 6.0]}
    monkeypatch.setattr(
        which, "interleave", lambda loops, **_: {name: np.array(seconds[name]) for name in loops}
    )
    chosen = {"sgd": which.methods()["sgd"]}
    assert which.step_times(chosen, which.QUICK) == {"sgd": 0.5}


@pytest.mark.slow
def test_the_page_has_a_row_for_each_method_and_says_how_it_was_made(tmp_path):
    page = tmp_path / "which-optimizer.md"
    chosen = ["sgd", "adamc"]
    made = which.main(["--quick", "--markdown", str(page), "--only", *chosen])
    assert sorted(row[0] for row in made.rows) == sorted(chosen)
    text = page.read_text()
    assert all(f"\n| {name} |" in text for name in chosen) and made.note in text
    assert {row[0]: row[-2] for row in made.rows}["sgd"] == "0.00"  # bytes: a count and a rate
