"""Train a digit classifier with adamx and, side by side, with Optax.

    python examples/quickstart.py
    python examples/quickstart.py --optimizer lion --epochs 10
    python examples/quickstart.py --log run.csv

The two runs start from the same weights and get the same batches, so that they differ only by the
optimizer's arithmetic: by rounding and, in Adam and its kin, by the bias correction 1 - b2^t, which
Optax computes in float32, up to 1.3e-5 off. If Optax does not have a method, or has another form of
it, the script says so, and compares two methods.

The script prints the optimizer as a composition of its concepts, a table of both runs with the
largest difference of a parameter so far, and the result of `adamx.compare` on the first gradients.
It draws the curves and ends with both accuracies. With `--log`, `adamx.monitor` measures the adamx
optimizer, and the script writes every tenth step to a CSV file or for TensorBoard.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import adamx

# ------------------------------------------------------------------- the model and its train step


class Classifier(nnx.Module):
    """One hidden layer over the 8 x 8 pixels."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        """Draw the weights.

        Args:
            rngs: the source of the weights, and later of the units that dropout leaves out.
        """
        self.hidden = nnx.Linear(64, 256, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.output = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return a logit for each digit."""
        return self.output(self.dropout(nnx.gelu(self.hidden(images))))


@nnx.jit
def train_step(
    model: Classifier, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, nnx.State]:
    """Update model and optimizer in place; return the loss and its gradient."""

    def loss_function(model: Classifier) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    loss, gradient = nnx.value_and_grad(loss_function)(model)
    optimizer.update(model, gradient)
    return loss, gradient


@nnx.jit
def accuracy(model: Classifier, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the share of images whose largest logit is the label's."""
    return (model(images).argmax(axis=-1) == labels).mean()


@nnx.jit
def largest_difference(model: Classifier, other: Classifier) -> jax.Array:
    """Return the largest absolute difference of any parameter."""
    pair = nnx.state(model, nnx.Param), nnx.state(other, nnx.Param)
    gaps = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), *pair)
    return jax.tree.reduce(jnp.maximum, gaps)


# ----------------------------------------------------------------- each optimizer with its peer


Evaluated = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Pair:
    """An optimizer of adamx and the same one of Optax, or a similar one.

    Attributes:
        learning_rate: the default of the command line.
        ours: makes the adamx transformation from the learning rate.
        peer: makes the Optax transformation.
        unlike: the peer's method if it is another one; empty if it is the same.
        evaluated: two functions of state and parameters, for ours and the peer, that return the
            parameters to evaluate with; None if these are the parameters themselves.
    """

    learning_rate: float
    ours: Callable[..., adamx.Transformation]
    peer: Callable[..., optax.GradientTransformation]
    unlike: str = ""
    evaluated: tuple[Evaluated, Evaluated] | None = None


def optax_momentum(learning_rate: float, decay: float = 0.9) -> optax.GradientTransformation:
    """Return a step along the average of the gradients, which Optax has only as pieces."""
    average = optax.ema(decay, debias=False)
    return optax.chain(average, optax.scale_by_learning_rate(learning_rate))


def optax_sgdw(
    learning_rate: float, momentum: float = 0.9, weight_decay: float = 1e-4
) -> optax.GradientTransformation:
    """Return momentum with decoupled decay, which Optax has only as pieces."""
    pieces = optax.trace(momentum), optax.add_decayed_weights(weight_decay)
    return optax.chain(*pieces, optax.scale_by_learning_rate(learning_rate))


def optax_adamw_independent(
    learning_rate: float, weight_decay: float = 1e-4, **options: float
) -> optax.GradientTransformation:
    """Return AdamW with its weight decay divided by the learning rate that multiplies it."""
    return optax.adamw(learning_rate, weight_decay=weight_decay / learning_rate, **options)


partial, contrib = functools.partial, optax.contrib
free = adamx.schedule_free_eval_params, contrib.schedule_free_eval_params

# Two defaults differ: adamx adds eps to the root, as the papers do; Optax adds it under the root.
PAIRS = {
    "adamw": Pair(3e-3, adamx.adamw, optax.adamw),
    "adam": Pair(3e-3, adamx.adam, optax.adam),
    "adamw_independent": Pair(3e-3, adamx.adamw_independent, optax_adamw_independent),
    "rmsprop": Pair(1e-3, adamx.rmsprop, partial(optax.rmsprop, eps_in_sqrt=False)),
    "momentum": Pair(0.5, adamx.momentum, optax_momentum),
    "sgd": Pair(0.5, adamx.sgd, optax.sgd),
    "sgdw": Pair(0.1, partial(adamx.sgdw, momentum=0.9), optax_sgdw),
    "adagrad": Pair(0.1, partial(adamx.adagrad, eps_in_sqrt=True), optax.adagrad),
    "adamax": Pair(1e-2, adamx.adamax, optax.adamax),
    "adamaxw": Pair(1e-2, adamx.adamaxw, optax.adamaxw),
    "nadam": Pair(3e-3, adamx.nadam, optax.nadam),
    "nadamw": Pair(3e-3, adamx.nadamw, optax.nadamw),
    "amsgrad": Pair(3e-3, adamx.amsgrad, optax.amsgrad),
    "adabelief": Pair(3e-3, adamx.adabelief, optax.adabelief),
    "radam": Pair(1e-2, adamx.radam, optax.radam),
    "yogi": Pair(1e-2, adamx.yogi, optax.yogi),
    "lion": Pair(1e-3, adamx.lion, optax.lion),
    "adan": Pair(3e-3, adamx.adan, optax.adan, "optax.adan, which looks ahead by 1 - b2, not b2"),
    "ademamix": Pair(3e-3, adamx.ademamix, contrib.ademamix),
    "adopt": Pair(3e-3, adamx.adopt, contrib.adopt),
    "adam_atan2": Pair(3e-3, adamx.adam_atan2, optax.adam, "optax.adam"),
    "adamc": Pair(3e-3, adamx.adamc, optax.adamw),
    "mars": Pair(3e-3, adamx.mars, optax.adamw, "optax.adamw"),
    "simplified_ademamix": Pair(1e-3, adamx.simplified_ademamix, contrib.simplified_ademamix),
    "laprop": Pair(3e-3, adamx.laprop, optax.adamw, "optax.adamw"),
    "lamb": Pair(5e-3, adamx.lamb, optax.lamb),
    "adam_mini": Pair(3e-3, adamx.adam_mini, optax.adamw, "optax.adamw"),
    "adafactor": Pair(
        3e-2,
        partial(adamx.adafactor, min_dim_size_to_factor=32),
        partial(optax.adafactor, min_dim_size_to_factor=32),
    ),
    "muon_adamw": Pair(2e-2, adamx.muon_adamw, contrib.muon),
    "stable_adamw": Pair(3e-3, adamx.stable_adamw, optax.adamw, "optax.adamw"),
    "cautious_adamw": Pair(3e-3, adamx.cautious_adamw, optax.adamw, "optax.adamw"),
    "cautious_lion": Pair(1e-3, adamx.cautious_lion, optax.lion, "optax.lion"),
    "schedule_free_adamw": Pair(
        1e-2, adamx.schedule_free_adamw, contrib.schedule_free_adamw, evaluated=free
    ),
}

# ---------------------------------------------------------------------------- training, twice over


@dataclasses.dataclass(frozen=True)
class Digits:
    """Scikit-learn's handwritten digits, pixels in [0, 1]: a fixed, stratified split."""

    train_images: np.ndarray
    test_images: np.ndarray
    train_labels: np.ndarray
    test_labels: np.ndarray


def load() -> Digits:
    """Load the 1797 images, which come with scikit-learn; a fifth of them is for testing."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        (images / 16).astype(np.float32),
        labels.astype(np.int32),
        test_size=0.2,
        stratify=labels,
        random_state=42,
    )
    return Digits(*parts)


def arrays_of(tree: Any) -> Any:
    """Return a tree with arrays instead of Flax's variables."""
    return jax.tree.map(lambda x: x[...], tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


class Run:
    """One model in training, with its losses and accuracies.

    Attributes:
        model: the classifier.
        optimizer: holds the transformation's state, and updates the model.
        evaluated: returns the parameters to evaluate with, if they are not those of training.
        losses: the mean training loss of each epoch.
        accuracies: the test accuracy after each epoch.
    """

    def __init__(
        self, tx: optax.GradientTransformation, seed: int, evaluated: Evaluated | None = None
    ) -> None:
        """Start from the weights that belong to the seed."""
        self.model = Classifier(nnx.Rngs(seed))
        self.optimizer = nnx.Optimizer(self.model, tx, wrt=nnx.Param)
        self.evaluated = evaluated
        self.losses: list[float] = []
        self.accuracies: list[float] = []

    def finish_epoch(self, losses: list[jax.Array], data: Digits) -> None:
        """Note the mean loss and the test accuracy."""
        self.losses.append(float(np.mean(losses)))
        self.accuracies.append(self.accuracy(data))

    def accuracy(self, data: Digits) -> float:
        """Return the test accuracy of the model as it is."""
        model = nnx.clone(self.model)
        model.eval()  # no dropout
        if self.evaluated:
            state = arrays_of(self.optimizer.opt_state)
            nnx.update(model, self.evaluated(state, arrays_of(nnx.state(model, nnx.Param))))
        return float(accuracy(model, data.test_images, data.test_labels))


@dataclasses.dataclass(frozen=True)
class Result:
    """Both runs and their comparison.

    Attributes:
        adamx: the run with adamx.
        optax: the run with Optax.
        differences: the largest difference of any parameter after each step.
        steps_per_epoch: how many steps an epoch has.
        comparison: the result of `adamx.compare` on the first 50 gradients.
        exit_status: 1 if the default settings missed the accuracy they promise, else 0.
    """

    adamx: Run
    optax: Run
    differences: list[float]
    steps_per_epoch: int
    comparison: adamx.Comparison
    exit_status: int = 0

    @property
    def largest_difference(self) -> float:
        """The largest difference that any parameter had after any step."""
        return max(self.differences)

    def difference_up_to(self, epoch: int) -> float:
        """Return the largest difference up to the end of an epoch, counted from 1."""
        return max(self.differences[: epoch * self.steps_per_epoch])


def batches(count: int, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield the indices of one epoch's full batches, in a new order."""
    yield from rng.permutation(count)[: count - count % size].reshape(-1, size)


LOG_EVERY = 10  # steps

Write = Callable[[dict[str, float]], None]


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[Write]:
    """Yield a function that writes a row into a CSV file, or into a folder for TensorBoard."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=())

            def write(row: dict[str, float]) -> None:
                if not writer.fieldnames:
                    writer.fieldnames = list(row)
                    writer.writeheader()
                writer.writerow(row)
                file.flush()

            yield write
    else:
        from tensorboardX import SummaryWriter  # slow to import

        with SummaryWriter(str(path)) as folder:

            def write(row: dict[str, float]) -> None:
                for name, value in row.items():
                    if name != "step":
                        folder.add_scalar(name, value, row["step"])

            yield write


def train(
    pair: Pair,
    data: Digits,
    options: argparse.Namespace,
    progress: Progress,
    write: Write | None = None,
) -> Result:
    """Train one model with each of the pair, on the same batches; log the statistics of ours."""
    ours, peer = pair.ours(options.learning_rate), pair.peer(options.learning_rate)
    evaluated = pair.evaluated or (None, None)
    steps = len(data.train_labels) // options.batch_size
    every = min(LOG_EVERY, options.epochs * steps)
    watched = adamx.monitor(ours, every=every) if write else ours
    runs = Run(watched, options.seed, evaluated[0]), Run(peer, options.seed, evaluated[1])
    start = nnx.to_pure_dict(nnx.state(runs[0].model, nnx.Param))
    rng = np.random.default_rng(options.seed)
    bar = progress.add_task("training both", total=options.epochs * steps)
    gradients, differences = [], []
    for _ in range(options.epochs):
        losses: tuple[list[jax.Array], list[jax.Array]] = [], []
        for index in batches(len(data.train_labels), options.batch_size, rng):
            images, labels = data.train_images[index], data.train_labels[index]
            for run, seen in zip(runs, losses, strict=True):
                loss, gradient = train_step(run.model, run.optimizer, images, labels)
                seen.append(loss)
                if run is runs[0] and len(gradients) < 50:
                    gradients.append(nnx.to_pure_dict(gradient))
            differences.append(largest_difference(runs[0].model, runs[1].model))
            if write and len(differences) % every == 0:
                row = {"step": len(differences), "loss": float(losses[0][-1])}
                row["accuracy"] = runs[0].accuracy(data)
                write(row | adamx.statistics(arrays_of(runs[0].optimizer.opt_state)))
            progress.advance(bar)
        for run, seen in zip(runs, losses, strict=True):
            run.finish_epoch(seen, data)
        accuracies = " and ".join(f"{run.accuracies[-1]:.1%}" for run in runs)
        progress.update(bar, description=f"training both, test accuracy {accuracies}")
    comparison = adamx.compare(ours, peer, start, gradients, names=("adamx", "optax"))
    return Result(*runs, [float(gap) for gap in differences], steps, comparison)


# -------------------------------------------------------------------------------------- the report


def selected(epochs: int) -> list[int]:
    """Return the epochs to print: the first few, some in between, and the last."""
    return sorted(
        {1, 2, 3, 5, *range(10, epochs, max(5, round(epochs / 40) * 5)), epochs}
        & set(range(1, epochs + 1))
    )


def as_table(result: Result) -> Table:
    """Return both runs side by side."""
    table = Table(
        title="Training loss and test accuracy: the same start, the same batches",
        title_justify="left",
    )
    columns = ("epoch", "loss\nadamx", "loss\noptax", "accuracy\nadamx", "accuracy\noptax")
    for column in (*columns, "largest difference of\na parameter so far"):
        table.add_column(column, justify="right", vertical="bottom")
    runs = (result.adamx, result.optax)
    for epoch in selected(len(result.adamx.losses)):
        table.add_row(
            str(epoch),
            *(f"{run.losses[epoch - 1]:.4f}" for run in runs),
            *(f"{run.accuracies[epoch - 1]:.1%}" for run in runs),
            f"{result.difference_up_to(epoch):.1e}",
        )
    return table


BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#555555"
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
}


def draw(result: Result, images: np.ndarray, title: str, path: Path) -> None:
    """Draw some digits, the curves of both runs, and the difference of their parameters."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(13, 4), layout="constrained")
        digits, loss, share, difference = figure.subplots(1, 4, width_ratios=(0.62, 1, 1, 1))
        figure.get_layout_engine().set(wspace=0.04)
        figure.suptitle(title + "\n", fontsize=15, x=0.008, ha="left")
        tiles = np.pad(images[:24].reshape(6, 4, 8, 8), ((0, 0), (0, 0), (1, 1), (1, 1)))
        digits.imshow(tiles.transpose(0, 2, 1, 3).reshape(60, 40), cmap="gray_r")
        digits.set(title="Handwritten digits", xticks=[], yticks=[])
        digits.spines[:].set_visible(False)
        runs = (result.adamx, result.optax)
        _draw_pair(loss, [run.losses for run in runs])
        loss.set(title="Training loss", xlabel="epoch", yscale="log")
        loss.legend(frameon=False)
        _draw_pair(share, [[100 * a for a in run.accuracies] for run in runs])
        shares = " and ".join(f"{run.accuracies[-1]:.1%}" for run in runs)
        last = f"after the last epoch\n{shares}"
        share.annotate(last, (0.97, 0.06), xycoords="axes fraction", ha="right", color=BLUE)
        share.set(title="Test accuracy in %", xlabel="epoch")
        _draw_difference(difference, result)
        for axes in (loss, share, difference):
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        figure.savefig(path, dpi=100)


def _draw_pair(axes: Axes, curves: Sequence[Sequence[float]]) -> None:
    ours, peer = curves
    epochs = np.arange(1, len(ours) + 1)
    axes.plot(epochs, ours, color=BLUE, lw=1.8, marker="o", ms=3.5, zorder=3, label="adamx")
    axes.plot(epochs, peer, color=ORANGE, lw=7, alpha=0.55, label="Optax, underneath")


def _draw_difference(axes: Axes, result: Result) -> None:
    gaps = np.array(result.differences)
    epochs = np.arange(1, len(gaps) + 1) / result.steps_per_epoch
    weights = jax.tree.leaves(nnx.state(result.adamx.model, nnx.Param))
    largest = max(float(np.abs(w).max()) for w in weights)
    axes.axhline(largest, color=GREY, lw=1.5, ls="--")
    axes.set(title=r"Largest |adamx $-$ Optax|", xlabel="epoch", yscale="log")
    axes.set(xlim=(0, epochs[-1]), ylim=(1e-9, largest * 20))
    note = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
    axes.annotate("the largest parameter", (0.03, largest), (0, 5), color=GREY, **note)
    highest = gaps.max()
    if highest == 0:
        axes.annotate(
            "none: the runs are equal bit for bit", (0.03, 1e-9), (0, 8), color=BLUE, **note
        )
        return
    axes.plot(epochs, np.where(gaps > 0, gaps, np.nan), color=BLUE, lw=1.8)
    mantissa, exponent = f"{highest:.1e}".split("e")
    said = rf"at most ${mantissa} \cdot 10^{{{int(exponent)}}}$ in any parameter"
    if highest < largest / 30:
        axes.annotate(said, (0.03, highest), (0, 6), color=BLUE, **note)
    else:  # there is no room between the lines
        axes.annotate(said, (0.97, highest), (0, -40), color=BLUE, ha="right", **note)


# ------------------------------------------------------------------------------- the command line


def above(bound: int, kind: type) -> Callable[[str], float]:
    """Return a parser of finite numbers above a bound, for argparse."""
    noun = "a whole number" if kind is int else "a finite number"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > bound):
            raise argparse.ArgumentTypeError(f"must be {noun} > {bound}, got {text!r}")
        return value

    return parse


def picture(text: str) -> Path:
    """Return the path, if a picture can be written there."""
    path = Path(text)
    known = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in known:
        raise argparse.ArgumentTypeError(f"must end in one of {', '.join(known)}, got {text!r}")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)) or path.is_dir():
        raise argparse.ArgumentTypeError(f"cannot be written: {text!r}")
    return path


def log(text: str) -> Path:
    """Return the path, if a CSV file or a folder can be written there."""
    path = Path(text)
    if not path.parent.is_dir() or (path.is_dir() if path.suffix == ".csv" else path.is_file()):
        raise argparse.ArgumentTypeError(f"cannot be written: {text!r}")
    return path


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description="Train a digit classifier with adamx and, side by side, with Optax: the same "
        "start, the same batches. Prints the optimizer as a composition, a table of both runs, "
        "adamx.compare on the first 50 gradients and, last, both test accuracies; draws the "
        "curves.",
        epilog="Exit status: 0, or 1 if the default settings end below 97 % test accuracy.",
    )
    rates = ", ".join(f"{name} {pair.learning_rate:g}" for name, pair in PAIRS.items())
    parser.add_argument(
        "--optimizer",
        metavar="NAME",
        choices=PAIRS,
        default="adamw",
        help=f"one of {', '.join(PAIRS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--learning-rate",
        metavar="RATE",
        type=above(0, float),
        help=f"the same for both (default: one that suits the optimizer: {rates})",
    )
    parser.add_argument(
        "--epochs",
        metavar="N",
        type=above(0, int),
        default=30,
        help="passes over the 1437 training images (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=above(0, int),
        default=64,
        help="images a step (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=above(-1, int),
        default=0,
        help="of the first weights, the batches and dropout (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=picture,
        default="quickstart.png",
        help="the picture of the curves (default: %(default)s)",
    )
    parser.add_argument(
        "--log",
        metavar="PATH",
        type=log,
        help="write loss, accuracy and the statistics of adamx.monitor, every "
        f"{LOG_EVERY} steps: a CSV file if it ends in .csv, else a folder for TensorBoard",
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    return parser


def main(argv: Sequence[str] | None = None) -> Result:
    """Run the example.

    Args:
        argv: the command line; None means the program's own.

    Returns:
        Losses, accuracies and differences of the two runs.
    """
    parser = make_parser()
    options = parser.parse_args(argv)
    settings = ("optimizer", "learning_rate", "epochs", "batch_size", "seed")
    promised = all(getattr(options, name) == parser.get_default(name) for name in settings)
    pair = PAIRS[options.optimizer]
    if options.learning_rate is None:
        options.learning_rate = pair.learning_rate
    data = load()
    if options.batch_size > len(data.train_labels):
        parser.error(
            f"argument --batch-size: must be at most {len(data.train_labels)}, the number of "
            f"training images, got {options.batch_size}"
        )

    console = Console()
    print(f"adamx.{options.optimizer} is")
    print(pair.ours(options.learning_rate), end="\n\n")
    title = f"{options.optimizer} of adamx and of Optax, from the same start, on the same batches"
    if pair.unlike:
        title = f"adamx.{options.optimizer}, beside it {pair.unlike}"
        print(f"Beside it runs {pair.unlike}: another method. The differences are not rounding.\n")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    logging = log_to(options.log) if options.log else contextlib.nullcontext()
    bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=options.no_progress)
    with logging as write, bar as progress:
        result = train(pair, data, options, progress, write)
    console.print(as_table(result))
    print("\nadamx.compare on the first gradients of the run. Read the columns `of largest`, the")
    print("difference over the array's largest element: the others are large as soon as any")
    print("element is close to zero.\n")
    print(result.comparison, end="\n\n")
    draw(result, data.test_images, title, options.output)
    print(f"Curves: {options.output}")
    if options.log:
        print(f"Log: {options.log}")
    accuracies = result.adamx.accuracies[-1], result.optax.accuracies[-1]
    print(f"Test accuracy: adamx {accuracies[0]:.1%}, optax {accuracies[1]:.1%}")
    if promised and accuracies[0] < 0.97:
        print("The default settings should reach 97 %: something is wrong.", file=sys.stderr)
        result = dataclasses.replace(result, exit_status=1)
    return result


if __name__ == "__main__":
    sys.exit(main().exit_status)
