"""The parts that the papers' figures share: the digits, a grid in one compiled call, the report.

    measured = train(task, make, grid(learning_rate=(0.1, 1.0)), seeds=3, epochs=5, ...)

`train` maps one run over the seeds and over all points of a grid of hyperparameters: that is
possible because a hyperparameter of adamx may be any array, a tracer too. A `Finding` holds the
paper's claim and whether it held here; it is printed, and written into its section of a page.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import adamx

# ------------------------------------------------------------------------------------- the digits


@dataclasses.dataclass(frozen=True)
class Digits:
    """Scikit-learn's 1797 handwritten digits of 8 x 8 pixels in [0, 1]: a fixed, stratified split.

    Attributes:
        images: for training, float32 of shape (size, 64).
        labels: int32 of shape (size,).
        test_images: the others, of shape (1797 - size, 64).
        test_labels: of shape (1797 - size,).
    """

    images: np.ndarray
    test_images: np.ndarray
    labels: np.ndarray
    test_labels: np.ndarray

    @classmethod
    def load(cls, size: int, random_labels: float = 0.0) -> Digits:
        """Take `size` images for training; a share of these gets random labels."""
        images, labels = load_digits(return_X_y=True)
        images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
        parts = cls(
            *train_test_split(images, labels, train_size=size, stratify=labels, random_state=42)
        )
        rng = np.random.default_rng(0)
        chosen = rng.random(size) < random_labels
        drawn = rng.integers(10, size=size, dtype=np.int32)
        return dataclasses.replace(parts, labels=np.where(chosen, drawn, parts.labels))


# ------------------------------------------------------------------------- training a whole grid


@dataclasses.dataclass(frozen=True)
class Task:
    """A learning problem.

    Attributes:
        first: draws the first parameters.
        batches: draws the batches of an epoch: a tree of arrays, whose first axis is the step.
        loss: of parameters and one batch.
        measure: computes a number from the parameters, after each epoch.
    """

    first: Callable[[np.random.Generator], Any]
    batches: Callable[[np.random.Generator], Any]
    loss: Callable[[Any, Any], jax.Array]
    measure: Callable[[Any], jax.Array]


def shuffled(rng: np.random.Generator, examples: int, batch: int) -> np.ndarray:
    """Return the numbers of an epoch's examples, of shape (steps, batch), in a new order.

    The examples that do not fill a batch are left out.
    """
    return rng.permutation(examples)[: examples - examples % batch].reshape(-1, batch)


def grid(**axes: Sequence[float]) -> dict[str, jax.Array]:
    """Return all combinations, the last axis fastest: an array of float32 for each name."""
    combined = np.meshgrid(*axes.values(), indexing="ij")
    return {
        name: jnp.asarray(x.ravel(), jnp.float32) for name, x in zip(axes, combined, strict=True)
    }


def train(
    task: Task,
    make: Callable[..., optax.GradientTransformation],
    points: dict[str, jax.Array],
    *,
    seeds: int,
    epochs: int,
    progress: Progress,
    name: str,
) -> np.ndarray:
    """Train at every point of a grid and from every seed, in one call of one compiled program.

    Args:
        task: the learning problem.
        make: makes the optimizer from the hyperparameters of one point, which are tracers.
        points: the values of each hyperparameter, arrays of shape (points,).
        seeds: how many. A seed decides on first parameters and batches, alike at all points.
        epochs: how long.
        progress: gets a bar, which advances after each epoch.
        name: of the bar.

    Returns:
        The numbers of `task.measure`: (epochs, points, seeds).
    """

    def start(point: dict[str, jax.Array], params: Any) -> tuple[Any, Any]:
        return params, make(**point).init(params)

    def epoch(
        point: dict[str, jax.Array], carry: tuple[Any, Any], batches: Any
    ) -> tuple[tuple[Any, Any], jax.Array]:
        tx = make(**point)

        def step(carry: tuple[Any, Any], batch: Any) -> tuple[tuple[Any, Any], None]:
            params, state = carry
            updates, state = tx.update(jax.grad(task.loss)(params, batch), state, params)
            return (adamx.apply_updates(params, updates), state), None

        carry, _ = jax.lax.scan(step, carry, batches)
        return carry, task.measure(carry[0])

    over_seeds = jax.vmap(start, (None, 0)), jax.vmap(epoch, (None, 0, 0))
    starts, epoch_everywhere = (
        jax.vmap(over_seeds[0], (0, None)),
        jax.vmap(over_seeds[1], (0, 0, None)),
    )
    bar = progress.add_task(name, total=epochs)

    @jax.jit
    def train_grid(points: dict[str, jax.Array], first: Any, batches: Any) -> jax.Array:
        def body(carry: Any, batches: Any) -> tuple[Any, jax.Array]:
            carry, measured = epoch_everywhere(points, carry, batches)
            jax.debug.callback(lambda _: progress.advance(bar), measured.ravel()[0])
            return carry, measured

        return jax.lax.scan(body, starts(points, first), batches)[1]

    rngs = [np.random.default_rng(seed) for seed in range(seeds)]
    first = stacked(task.first(rng) for rng in rngs)
    batches = stacked(stacked(task.batches(rng) for rng in rngs) for _ in range(epochs))
    measured = np.asarray(train_grid(points, first, batches))
    jax.effects_barrier()
    return measured


def stacked(trees: Iterable[Any]) -> Any:
    """Return one tree of arrays with a new first axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Draw normal numbers of float32."""
    return rng.standard_normal(shape, np.float32)


# -------------------------------------------------------------------------------------- the report


@dataclasses.dataclass(frozen=True)
class Finding:
    """A paper's claim, and whether it held here.

    Attributes:
        title: the paper and the figure.
        setting: the training here, and how often it is repeated.
        claim: of the paper, in one sentence.
        parts: the claim as statements with numbers, and whether each held.
        columns: of the table.
        rows: of the table.
    """

    title: str
    setting: str
    claim: str
    parts: tuple[tuple[str, bool], ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def verdict(self) -> str:
        """Whether the claim held: all of its parts, some, or none."""
        held = [held for _, held in self.parts]
        return "held" if all(held) else "held in part" if any(held) else "did not hold"


def with_spread(values: np.ndarray, digits: int) -> str:
    """Return mean and standard deviation over the seeds, as "0.283 ± 0.001"."""
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"


def clearly_below(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return where values are lower than others with every seed; the last axis is the seed."""
    return (values < others).all(axis=-1)


def command_line(name: str, description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, which all of the papers' figures share."""
    parser = argparse.ArgumentParser(description=description)
    output = Path(f"{name}.png")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        default=output,
        help="the picture (default: %(default)s)",
    )
    parser.add_argument(
        "--markdown",
        metavar="FILE",
        type=Path,
        help=f"a page; its section between <!-- {name} --> and <!-- /{name} --> is replaced",
    )
    parser.add_argument("--quick", action="store_true", help="a small grid, in seconds")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    options = parser.parse_args(argv)
    if not options.output.parent.is_dir():
        parser.error(f"argument --output: there is no folder {str(options.output.parent)!r}")
    if options.output.suffix != ".png":
        parser.error(f"argument --output: must end in .png, got {str(options.output)!r}")
    if options.markdown and not (
        options.markdown.is_file() and section(name).search(options.markdown.read_text())
    ):
        parser.error(f"argument --markdown: no page with <!-- {name} -->: {options.markdown}")
    return options


def progress_bars(options: argparse.Namespace) -> Progress:
    """Return the display with a bar for each method."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(), disable=options.no_progress)


def report(name: str, finding: Finding, options: argparse.Namespace) -> None:
    """Print the finding; write it into the page, if there is one."""
    table = Table(title=finding.title, title_justify="left")
    for column in finding.columns:
        table.add_column(column)
    for row in finding.rows:
        table.add_row(*row)
    Console().print(table)
    print(f"The claim: {finding.claim}")
    print(f"Here it {finding.verdict}.")
    for statement, held in finding.parts:
        print(f"  {'yes' if held else 'no'}: {statement}")
    print(f"Picture: {options.output}")
    if options.markdown:
        text = as_markdown(name, finding, options)
        page = options.markdown.read_text()
        options.markdown.write_text(section(name).sub(lambda _: text, page))


def section(name: str) -> re.Pattern[str]:
    """Return a pattern that finds the section of a page that belongs to a script."""
    return re.compile(f"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)


def as_markdown(name: str, finding: Finding, options: argparse.Namespace) -> str:
    """Return the section of the page."""
    picture = os.path.relpath(options.output, options.markdown.parent)
    rows = (finding.columns, ("---",) * len(finding.columns), *finding.rows)
    return "\n".join(
        (
            f"<!-- {name} -->",
            f"## {finding.title}\n",
            f"![{finding.title}]({picture})\n",
            f"{finding.setting}\n",
            f"**The claim:** {finding.claim}\n",
            f"**Here it {finding.verdict}:**\n",
            *(f"- {'yes' if held else 'no'}: {text}" for text, held in finding.parts),
            "",
            *("| " + " | ".join(row) + " |" for row in rows),
            "",
            f"The command: `python examples/papers/{name}.py`",
            f"<!-- /{name} -->",
        )
    )


STYLE = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "legend.frameon": False,
}
