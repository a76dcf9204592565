"""Adam, figure 1: logistic regression with Adam, AdaGrad, and SGD with Nesterov momentum.

    python examples/papers/adam_figure1.py
    python examples/papers/adam_figure1.py --quick

As in the paper the regression has an L2 penalty, the batches are of 128, and the learning rate in
step t is alpha / sqrt(t). AdaGrad is run with a constant alpha too, since its divisor grows like
sqrt(t) already. Each method takes the alpha of a grid with the lowest mean training cost over the
run. A whole grid and its seeds are one compiled call.

Source: Kingma & Ba (2015), section 6.1 and figure 1, https://arxiv.org/abs/1412.6980
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
import shared
from matplotlib.figure import Figure

import adamx

NAME = "adam_figure1"
PENALTY = 1e-3
CLOSE = 0.05  # costs that differ by less than this share count as alike


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is trained."""

    seeds: int
    epochs: int
    rates: tuple[float, ...]


FULL = Size(10, 45, tuple(10 ** np.arange(-2, 1.01, 0.25)))
QUICK = Size(2, 6, (0.1, 0.3, 1.0))


def over_root(rate: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Return the schedule rate / sqrt(t)."""
    return lambda step: rate / jnp.sqrt(step + 1)


METHODS = {
    "Adam": lambda rate: adamx.adam(over_root(rate)),
    "SGD, Nesterov": lambda rate: adamx.sgd(over_root(rate), momentum=0.9, nesterov=True),
    "AdaGrad": lambda rate: adamx.adagrad(over_root(rate), initial_accumulator_value=0.0),
    "AdaGrad, constant": lambda rate: adamx.adagrad(rate, initial_accumulator_value=0.0),
}
COLORS = dict(zip(METHODS, ("#0072B2", "#D55E00", "#009E73", "#6B6B6B"), strict=True))


def regression() -> shared.Task:
    """Return the task; it measures the cost of all training examples."""
    digits = shared.Digits.load(1437)
    images, labels = jnp.asarray(digits.images), jnp.asarray(digits.labels)

    def cost(layer: dict[str, jax.Array], which: jax.Array) -> jax.Array:
        logits = images[which] @ layer["w"] + layer["b"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[which])
        return losses.mean() + PENALTY / 2 * (layer["w"] ** 2).sum()

    return shared.Task(
        first=lambda _: {"w": np.zeros((64, 10), np.float32), "b": np.zeros(10, np.float32)},
        batches=lambda rng: shared.shuffled(rng, len(labels), 128),
        loss=cost,
        measure=lambda layer: cost(layer, jnp.arange(len(labels))),
    )


@dataclasses.dataclass(frozen=True)
class Result:
    """The costs, and what they say of the paper's claim.

    Attributes:
        costs: of each method, of shape (epochs, rates, seeds).
        best: the number of each method's best rate.
        finding: the paper's claim, and whether it held.
    """

    costs: dict[str, np.ndarray]
    best: dict[str, int]
    finding: shared.Finding


def judge(costs: dict[str, np.ndarray], size: Size) -> Result:
    """Compare the methods, each at its best rate."""
    best = {name: int(np.nanargmin(cost.mean(axis=(0, 2)))) for name, cost in costs.items()}
    means = {name: cost[:, best[name]].mean(axis=0) for name, cost in costs.items()}
    adam = means["Adam"]

    def beats(other: str) -> tuple[str, bool]:
        gain = 1 - adam.mean() / means[other].mean()
        held = gain > CLOSE and bool(shared.clearly_below(adam, means[other]))
        return f"Adam is faster than {other}: its mean cost differs by {-100 * gain:+.1f} %", held

    gap = adam.mean() / means["SGD, Nesterov"].mean() - 1
    finding = shared.Finding(
        title="Adam, figure 1: logistic regression",
        setting=(
            f"Logistic regression with L2 penalty on 1437 digits; {size.seeds} seeds, "
            f"{len(size.rates)} learning rates, {size.epochs} epochs of 11 steps. Costs are of the "
            "training set; the mean cost is over all epochs and measures the speed. Differences "
            f"below {100 * CLOSE:.0f} % count as none."
        ),
        claim="Adam converges as fast as SGD with Nesterov momentum, and faster than AdaGrad.",
        parts=(
            (
                f"Adam is as fast as SGD: its mean cost differs by {100 * gap:+.1f} %",
                abs(gap) < CLOSE,
            ),
            beats("AdaGrad"),
            beats("AdaGrad, constant"),
        ),
        columns=("method", "best rate", "mean cost", "cost after the last epoch"),
        rows=tuple(
            (
                name,
                f"{size.rates[best[name]]:.2g}",
                shared.with_spread(means[name], 4),
                shared.with_spread(cost[-1, best[name]], 4),
            )
            for name, cost in costs.items()
        ),
    )
    return Result(costs, best, finding)


def draw(result: Result, size: Size, path: Path) -> None:
    """Draw the cost by epoch at the best rate, and the mean cost by rate."""
    with mpl.rc_context(shared.STYLE):
        figure = Figure(figsize=(12, 4.8), layout="constrained")
        curves, rates = figure.subplots(1, 2)
        epochs = np.arange(1, size.epochs + 1)
        for name, cost in result.costs.items():
            color = COLORS[name]
            best = cost[:, result.best[name]]
            curves.plot(epochs, best.mean(axis=1), color=color, lw=2, label=name)
            low, high = best.min(axis=1), best.max(axis=1)
            curves.fill_between(epochs, low, high, color=color, alpha=0.2, lw=0)
            means = cost.mean(axis=0)
            rates.plot(size.rates, means.mean(axis=1), color=color, lw=2, marker="o", ms=4)
            low, high = means.min(axis=1), means.max(axis=1)
            rates.fill_between(size.rates, low, high, color=color, alpha=0.2, lw=0)
        curves.set(title="Training cost at the best rate", xlabel="epoch", ylim=(0.25, 0.5))
        curves.legend()
        rates.set(title="Mean cost over the run", xlabel="learning rate of the first step")
        rates.set(xscale="log", ylim=(0.25, 0.8))
        figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> Result:
    """Run the example; `argv` is the command line, None means the program's own."""
    description = "Adam, figure 1: logistic regression with Adam, AdaGrad, SGD with Nesterov."
    options = shared.command_line(NAME, description, argv)
    size = QUICK if options.quick else FULL
    task, points = regression(), shared.grid(rate=size.rates)
    with shared.progress_bars(options) as progress:
        costs = {
            name: shared.train(
                task,
                make,
                points,
                seeds=size.seeds,
                epochs=size.epochs,
                progress=progress,
                name=name,
            )
            for name, make in METHODS.items()
        }
    result = judge(costs, size)
    draw(result, size, options.output)
    shared.report(NAME, result.finding, options)
    return result


if __name__ == "__main__":
    main()
