"""Pictures and tables of a logged run: each line holds the numbers that were logged."""

import csv
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamx


def logged(steps=3):
    """Train two groups of parameters and log every step."""
    tx = adamx.monitor(adamx.adamw(optax.linear_schedule(0.1, 0.0, 5)), every=1)
    params = {"w": jnp.array([1.0, 2.0]), "b": jnp.ones(3, jnp.bfloat16)}
    state, step = tx.init(params), adamx.make_step(tx)
    log = []
    for t in range(1, steps + 1):
        grads = {"w": jnp.array([0.5, -0.01 * t]), "b": jnp.full(3, 0.1, jnp.bfloat16)}
        params, state = step(params, state, grads)
        log.append({"step": 10 * t, "loss": jnp.float32(2.0**-t)} | adamx.statistics(state))
    return log


@pytest.fixture(scope="module")
def log():
    return logged()


def as_csv(path, log):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(log[0]))
        writer.writeheader()
        writer.writerows(log)
    return path


PANELS = {
    "Loss": "loss",
    "Learning rate": "learning_rate",
    "Gradient norm": "grad_norm",
    "Update norm": "update_norm",
    "Parameter norm": "param_norm",
    "Update / parameter": "update_to_param",
    "Signal to noise": "signal_to_noise",
    "Share below eps": "eps_share",
    "Share stuck": "stuck_share",
}


@pytest.mark.parametrize("source", ["list", "csv", "str"])
def test_every_line_of_the_figure_holds_what_was_logged(log, source, tmp_path):
    path = as_csv(tmp_path / "run.csv", log)
    run = {"list": log, "csv": path, "str": str(path)}[source]
    figure = adamx.plot(run, tmp_path / "run.png")
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(PANELS)
    drawn = set()
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(names) == ["b", "w"]
    handles = figure.legends[0].get_lines()
    colors = {line.get_color(): name for name, line in zip(names, handles, strict=True)}
    for axes in figure.axes:
        kind = PANELS[axes.get_title(loc="left")]
        for line in axes.lines:
            group = colors.get(line.get_color())
            name = f"{kind}/{group}" if group else kind
            drawn.add(name)
            assert list(line.get_xdata()) == [10, 20, 30]
            assert list(line.get_ydata()) == [float(row[name]) for row in log]
    assert drawn == {name for name in log[0] if name.partition("/")[0] in PANELS.values()}
    with (tmp_path / "run.png").open("rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_values_far_apart_have_a_logarithmic_scale(tmp_path):
    log = [{"step": t, "loss": 100.0**-t, "learning_rate": 1.0 - 0.1 * t} for t in range(3)]
    figure = adamx.plot(log, tmp_path / "run.png")
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear"]


def test_what_is_missing_is_no_point(tmp_path):
    log = [
        {"count": 1, "loss": 4.0, "accuracy": None},
        {"count": 2, "loss": 3.0, "accuracy": 0.5, "note": "warm"},
        {"count": 3, "loss": float("nan")},
    ]
    loss, accuracy = adamx.plot(log, tmp_path / "run.svg").axes
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), [4.0, 3.0, np.nan])
    assert list(accuracy.lines[0].get_xdata()) == [2]
    assert list(accuracy.lines[0].get_ydata()) == [0.5]
    # and in a file an empty cell
    path = tmp_path / "run.csv"
    path.write_text("step,loss,accuracy\n1,4,\n2,3,0.5\n")
    _, accuracy = adamx.plot(path, tmp_path / "run.png").axes
    assert list(accuracy.lines[0].get_xdata()) == [2]


def test_many_groups_are_told_apart(tmp_path):
    groups = [f"layer{i}" for i in range(21)]
    figure = adamx.plot([{"step": 1} | {f"grad_norm/{g}": 1.0 for g in groups}], tmp_path / "a.png")
    lines = figure.axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 21
    assert [text.get_text() for text in figure.legends[0].get_texts()] == groups


def table(capsys):
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_the_terminal_shows_every_group_with_its_course(log, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert adamx.plot(log) is None
    lines = table(capsys)
    assert lines[0].split() == "steps 10 to 30 first last least most course".split()
    assert [line.split("  ")[0] for line in lines[1:] if line[0] != " "] == list(PANELS)
    assert lines[1].split() == ["Loss", "0.5", "0.125", "0.125", "0.5", "█▃▁"]
    place = lines.index("Gradient norm")
    norms = [row["grad_norm/w"] for row in log]
    facts = norms[0], norms[-1], min(norms), max(norms)
    assert [line.split()[0] for line in lines[place + 1 : place + 3]] == ["b", "w"]
    assert lines[place + 2].split()[1:5] == [f"{fact:.3g}" for fact in facts]


def test_the_course_keeps_the_last_of_many_values_and_marks_what_is_not_finite(capsys):
    log = [{"step": t, "loss": 100.0 + t, "grad_norm/[a]*": 10.0**t} for t in range(1, 42)]
    log[-1]["loss"] = float("inf")
    adamx.plot(log)
    loss, _, norm = table(capsys)[1:]
    assert loss.split()[1:5] == ["101", "inf", "101", "140"]
    # every third of 41, from the last backwards: 2, 5, ..., 41
    assert loss.split()[5] == "▁▂▂▃▃▄▅▅▆▆▇▇█!"
    # equal steps of the exponent; a pattern with brackets is no markup
    assert norm.split()[0] == "[a]*" and norm.split()[5] == "▁▂▂▃▃▄▄▅▅▆▆▇▇█"


@pytest.mark.parametrize(
    ("library", "path"), [("matplotlib", "run.png"), ("rich", None)], ids=["matplotlib", "rich"]
)
def test_a_missing_library_is_named_with_the_remedy(log, library, path, monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.setitem(sys.modules, name, None)  # what import takes for "not there"
    with pytest.raises(ImportError, match=rf"plot needs {library}: pip install 'adamx\[plots\]'"):
        adamx.plot(log, path and tmp_path / path)


@pytest.mark.parametrize(
    ("log", "error", "message"),
    [
        ([], ValueError, "the log has 0 rows and nothing to draw"),
        ([{"step": 1, "monitor_step": 0}], ValueError, "1 rows and nothing to draw"),
        (
            [{"loss": 1.0}],
            ValueError,
            r"""row 1 of the log must have a "step", got {'loss': 1.0}""",
        ),
        ([{"step": 1, "loss": "low"}], ValueError, "'loss' in row 1 must be a number, got 'low'"),
        (
            [{"step": 1, "loss": 1.0}, {"step": 2, "grad_norm/w": [1.0, 2.0]}],
            ValueError,
            r"'grad_norm/w' in row 2 must be a number, got \[1.0, 2.0\]",
        ),
        ({"step": 1, "loss": 1.0}, TypeError, "log must be a path or a list of dicts, got {'step'"),
        ([1.0], TypeError, r"log must be a path or a list of dicts, got \[1.0\]"),
    ],
)
def test_a_log_that_is_none_is_explained(log, error, message):
    with pytest.raises(error, match=f"plot: .*{message}"):
        adamx.plot(log)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0 rows and nothing to draw"),
        ("step,loss\n", "0 rows and nothing to draw"),
        ("step,loss\n1,2\n2\n", r"row 2 of '.*run.csv' must have one value for each name"),
        ("step,loss\n1,2,3\n", r"row 1 of '.*run.csv' must have one value for each name"),
        ("step,loss\n1,two\n", "'loss' in row 1 must be a number, got 'two'"),
        ("1,2\n2,3\n", 'row 1 of the log must have a "step"'),
    ],
)
def test_a_file_that_is_no_log_is_explained(text, message, tmp_path):
    (tmp_path / "run.csv").write_text(text)
    with pytest.raises(ValueError, match=f"plot: .*{message}"):
        adamx.plot(tmp_path / "run.csv")


@pytest.mark.parametrize("cut", ["", "3", "30,0.2", "30,0.25"])
def test_a_last_line_without_its_end_is_left_out(cut, tmp_path):
    """A run is writing it, or was killed: whether its last number is whole cannot be seen."""
    path = tmp_path / "run.csv"
    path.write_text("step,loss\n10,1.0\n20,0.5\n" + cut)
    figure = adamx.plot(path, tmp_path / "run.png")
    assert list(figure.axes[0].lines[0].get_xdata()) == [10, 20]
