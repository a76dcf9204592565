"""A logged run as a figure, or as a table in the terminal.

A log has the result of `statistics` at some steps, with the loss. Each kind of statistic is a
panel, and each group of parameters a line in it:

    grad_norm/dense/kernel  ->  the line dense/kernel in the panel grad_norm
"""

from __future__ import annotations

import csv
import importlib
import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

KINDS = {
    "loss": "Loss",
    "accuracy": "Accuracy",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "update_norm": "Update norm",
    "param_norm": "Parameter norm",
    "update_to_param": "Update / parameter",
    "signal_to_noise": "Signal to noise",
    "eps_share": "Share below eps",
    "stuck_share": "Share stuck",
}
GREY = "#333333"
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#999999")
STYLE: dict[str, Any] = {"axes.titleweight": "bold", "axes.titlelocation": "left"}
STYLE |= {"axes.axisbelow": True}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
STYLE |= {"grid.color": "#E6E6E6", "lines.linewidth": 1.6, "lines.marker": ".", "font.size": 11}
BARS, WIDTH = "▁▂▃▄▅▆▇█", 20

Curves = dict[str, tuple[list[float], list[float]]]  # steps and values, by group


def plot(log: str | Path | Sequence[Mapping[str, Any]], path: str | Path | None = None) -> Any:
    """Draw a logged run: loss, learning rate, norms, and all other statistics of `monitor`.

    Args:
        log: the path of a CSV file with a header, as the quickstart's `--log` writes it, whose last
            line is left out while it has no line end: a run is writing it or was killed; or a list
            of flat dicts, one per logged step: the result of `statistics` and, if known, "loss",
            "accuracy" and "step" (otherwise "count" is the step). A missing value, None or an empty
            cell leaves out this point of its line. Other names are not drawn.
        path: the picture to write, in a format of matplotlib's, such as "run.png". None prints a
            table to the terminal instead: first, last, least and largest value, and the course.

    Returns:
        The matplotlib figure, with a panel for each kind of statistic in the log and a line for
        each group of parameters; None if the table was printed.

    Raises:
        ImportError: if matplotlib, or rich for the terminal, is not installed.
        TypeError: if the log is neither a path nor a list, or a row is not a dict.
        ValueError: if a row has no step, or a value that is not a number; if a line of the file and
            the header differ in length; if there is nothing to draw.

    Example:
        >>> plot([{"step": 10, "loss": 4}, {"step": 20, "loss": 1}])
        ... # doctest: +NORMALIZE_WHITESPACE
        steps 10 to 20  first  last  least  most  course
        Loss                4     1      1     4  █▁
    """
    panels = _panels(_read(Path(log)) if isinstance(log, str | Path) else log)
    return _print(panels) if path is None else _draw(panels, Path(path))


def _read(path: Path) -> list[dict[Any, Any]]:
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]  # what follows may end in the middle of a number
    rows = list(csv.DictReader(io.StringIO(whole)))
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ValueError(
                f"plot: row {number} of {str(path)!r} must have one value for each name in the "
                f"header, got {list(row.values())}"
            )
    return rows


def _panels(log: Sequence[Mapping[str, Any]]) -> dict[str, Curves]:
    if not isinstance(log, Sequence) or not all(isinstance(row, Mapping) for row in log):
        raise TypeError(f"plot: log must be a path or a list of dicts, got {repr(log)[:80]}")
    panels: dict[str, Curves] = {kind: {} for kind in KINDS}
    for number, row in enumerate(log, 1):
        known = {name: value for name, value in row.items() if value not in (None, "")}
        steps = [name for name in ("step", "count") if name in known][:1]
        if not steps:
            raise ValueError(f'plot: row {number} of the log must have a "step", got {dict(row)!r}')
        for name in [name for name in known if name.partition("/")[0] in KINDS] + steps:
            try:
                known[name] = float(known[name])
            except (TypeError, ValueError):
                raise ValueError(
                    f"plot: {name!r} in row {number} must be a number, got {known[name]!r}"
                ) from None
        for name, value in known.items():
            kind, _, group = name.partition("/")
            if kind in KINDS:
                xs, ys = panels[kind].setdefault(group, ([], []))
                xs.append(known[steps[0]])
                ys.append(value)
    if not any(panels.values()):
        raise ValueError(
            f"plot: the log has {len(log)} rows and nothing to draw in them: a row needs at least "
            "the loss, or the result of adamx.statistics(state)"
        )
    return {kind: curves for kind, curves in panels.items() if curves}


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _is_wide(values: Iterable[float]) -> bool:
    """Say whether values need a logarithmic scale."""
    finite = _finite(values)
    return bool(finite) and 0 < 10 * min(finite) < max(finite)


def _needed(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"plot needs {module.partition('.')[0]}: pip install 'adamx[plots]'"
        ) from error


def _draw(panels: Mapping[str, Curves], path: Path) -> Any:
    columns, rows = min(3, len(panels)), math.ceil(len(panels) / 3)
    groups = list(dict.fromkeys(group for curves in panels.values() for group in curves if group))
    looks = list(itertools.product(("-", "--", ":"), COLORS))
    with _needed("matplotlib").rc_context(STYLE):
        size = 4.4 * columns, 2.7 * rows + 0.25 * math.ceil(len(groups) / (columns + 1))
        figure = _needed("matplotlib.figure").Figure(figsize=size, layout="constrained")
        figure.get_layout_engine().set(hspace=0.06, wspace=0.06)
        lines: dict[str, Any] = {}
        for place, (kind, curves) in enumerate(panels.items(), 1):
            axes = figure.add_subplot(rows, columns, place)
            for group, (steps, values) in curves.items():
                i = groups.index(group) if group else 0
                dash, color = looks[i % len(looks)] if group else ("-", GREY)
                (lines[group],) = axes.plot(steps, values, ls=dash, color=color, ms=4)
            wide = _is_wide(itertools.chain(*(values for _, values in curves.values())))
            axes.set(title=KINDS[kind], yscale="log" if wide else "linear")
            if place > len(panels) - columns:
                axes.set_xlabel("step")
        if groups:
            handles = [lines[group] for group in groups]
            many = {"loc": "outside upper left", "ncols": columns + 1, "frameon": False}
            figure.legend(handles, groups, **many)
        figure.savefig(path, dpi=100)
    return figure


def _print(panels: Mapping[str, Curves]) -> None:
    markup, table = _needed("rich.markup"), _needed("rich.table").Table(box=None, pad_edge=False)
    steps = [step for curves in panels.values() for xs, _ in curves.values() for step in xs]
    table.add_column(f"steps {min(steps):g} to {max(steps):g}")
    for name in ("first", "last", "least", "most"):
        table.add_column(name, justify="right")
    table.add_column("course", no_wrap=True)
    for kind, curves in panels.items():
        if "" not in curves:
            table.add_row(f"[bold]{KINDS[kind]}")
        for group, (_, values) in curves.items():
            finite = _finite(values) or [math.nan]
            facts = values[0], values[-1], min(finite), max(finite)
            name = f"  {markup.escape(group)}" if group else f"[bold]{KINDS[kind]}"
            table.add_row(name, *(f"{fact:.3g}" for fact in facts), _course(values))
    _needed("rich.console").Console().print(table)


def _course(values: Sequence[float]) -> str:
    """Return a bar for each value, or for every n-th of many; "!" if it is not finite."""
    wide, every = _is_wide(values), math.ceil(len(values) / WIDTH)
    heights = [math.log(x) if wide and math.isfinite(x) else x for x in values[::-every][::-1]]
    low, high = min(_finite(heights), default=0), max(_finite(heights), default=0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0
    return "".join(BARS[round(scale * (x - low))] if math.isfinite(x) else "!" for x in heights)
