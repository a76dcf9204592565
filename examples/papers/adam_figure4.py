"""Adam, figure 4: a variational autoencoder with and without bias correction.

    python examples/papers/adam_figure4.py
    python examples/papers/adam_figure4.py --quick

Adam without bias correction is Adam's composition without the two pieces of that name. Its first
step is (1 - b1) / sqrt(1 - b2) learning rates long along every axis, and Adam's is one: 100
learning rates with b1 = 0 and b2 = 0.9999. Both are trained at every b1, b2 and learning rate of a
grid; the grid and its seeds are one compiled call, since hyperparameters may be arrays.

The autoencoder is a smaller one than the paper's: one hidden layer of softplus units each way.

Source: Kingma & Ba (2015), section 6.4 and figure 4, https://arxiv.org/abs/1412.6980
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
import shared
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

import adamx
from adamx import (
    bias_correction,
    chain,
    ema,
    ema_of_squares,
    rms_scaling,
    scale_by_learning_rate,
)

NAME = "adam_figure4"
HIDDEN, LATENT = 64, 8
DIVERGED = 100.0  # every loss above it, and NaN, count as this; an untrained one is about 50


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is trained; `epochs` are the two after which the loss is judged."""

    seeds: int
    epochs: tuple[int, int]
    b1: tuple[float, ...]
    b2: tuple[float, ...]
    rates: tuple[float, ...]


RATES = tuple(10 ** np.arange(-4, -0.99, 0.5))
FULL = Size(5, (3, 30), (0.0, 0.9), (0.9, 0.99, 0.999, 0.9999), RATES)
QUICK = Size(2, (1, 2), (0.9,), (0.9, 0.9999), (1e-3, 1e-2))


def corrected(rate: Any, b1: Any, b2: Any) -> adamx.Transformation:
    """Return Adam."""
    scaling = rms_scaling(
        chain(ema(b1), bias_correction(b1)),
        second_moment=chain(ema_of_squares(b2), bias_correction(b2)),
    )
    return chain(scaling, scale_by_learning_rate(rate))


def uncorrected(rate: Any, b1: Any, b2: Any) -> adamx.Transformation:
    """Return Adam without its two corrections."""
    scaling = rms_scaling(ema(b1), second_moment=ema_of_squares(b2))
    return chain(scaling, scale_by_learning_rate(rate))


METHODS = {"with bias correction": corrected, "without": uncorrected}
COLORS = dict(zip(METHODS, ("#D55E00", "#009E73"), strict=True))


def autoencoder() -> shared.Task:
    """Return the task; it measures the training loss, with the same noise each time."""
    images = jnp.asarray(shared.Digits.load(1437).images)
    fixed_noise = shared.normal(np.random.default_rng(0), len(images), LATENT)

    def first(rng: np.random.Generator) -> list[dict[str, np.ndarray]]:
        def layer(inputs: int, outputs: int) -> dict[str, np.ndarray]:
            weights = shared.normal(rng, inputs, outputs) / np.float32(inputs**0.5)
            return {"w": weights, "b": np.zeros(outputs, np.float32)}

        return [
            layer(*size)
            for size in ((64, HIDDEN), (HIDDEN, 2 * LATENT), (LATENT, HIDDEN), (HIDDEN, 64))
        ]

    def batches(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        which = shared.shuffled(rng, len(images), 64)
        return which, shared.normal(rng, *which.shape, LATENT)

    def loss(layers: Any, batch: Any) -> jax.Array:
        """Return minus the evidence lower bound, in nats an image."""
        (which, noise), (inner, code, outer, pixels) = batch, layers
        hidden = jax.nn.softplus(affine(inner, images[which]))
        mean, log_variance = jnp.split(affine(code, hidden), 2, axis=-1)
        latent = mean + jnp.exp(log_variance / 2) * noise
        logits = affine(pixels, jax.nn.softplus(affine(outer, latent)))
        missed = optax.sigmoid_binary_cross_entropy(logits, images[which]).sum(axis=-1)
        divergence = (mean**2 + jnp.exp(log_variance) - log_variance - 1).sum(axis=-1) / 2
        return (missed + divergence).mean()

    def measure(layers: Any) -> jax.Array:
        return loss(layers, (np.arange(len(images)), fixed_noise))

    return shared.Task(first, batches, loss, measure)


def affine(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Return x times the layer's weights, plus its biases."""
    return x @ layer["w"] + layer["b"]


@dataclasses.dataclass(frozen=True)
class Result:
    """The losses, and what they say of the paper's claim.

    Attributes:
        losses: of each method, (2, b1, b2, rates, seeds): after the first epochs and the last.
        finding: the paper's claim, and whether it held.
    """

    losses: dict[str, np.ndarray]
    finding: shared.Finding


def judge(losses: dict[str, np.ndarray], size: Size) -> Result:
    """Compare with and without, at the same rate and each at its best."""
    means = {name: loss.mean(axis=-1) for name, loss in losses.items()}
    best = {name: mean.argmin(axis=-1) for name, mean in means.items()}  # (2, b1, b2)

    def at(name: str, rates: np.ndarray) -> np.ndarray:
        return np.take_along_axis(losses[name], rates[..., None, None], axis=-2)[..., 0, :]

    ours = at("with bias correction", best["with bias correction"])
    others, swapped = at("without", best["without"]), at("without", best["with bias correction"])
    slow = np.array(size.b2) >= 0.999
    worse_at_same = shared.clearly_below(ours, swapped)[..., slow]
    loses_at_best = shared.clearly_below(others, ours)
    cells = shared.clearly_below(*losses.values())
    against = shared.clearly_below(*reversed(losses.values()))
    used = [
        ", ".join(f"{size.rates[place]:.2g}" for place in np.unique(best[name][-1]))
        for name in METHODS
    ]
    finding = shared.Finding(
        title="Adam, figure 4: bias correction",
        setting=(
            f"A variational autoencoder on 1437 digits, 22 steps an epoch; {size.seeds} seeds, "
            f"{len(size.rates)} learning rates for each pair of b1 and b2. The loss is minus the "
            "evidence lower bound on the training set, in nats an image; a loss above "
            f"{DIVERGED:.0f} counts as {DIVERGED:.0f}. Each pair is judged "
            f"after {size.epochs[0]} and after {size.epochs[1]} epochs."
        ),
        claim="Without bias correction a b2 close to 1 makes training unstable; with it Adam does "
        "as well or better, whatever the decays and the rate.",
        parts=(
            (
                "at the rate that is best with correction and b2 >= 0.999, training without it is "
                f"clearly worse in {worse_at_same.sum()} of {worse_at_same.size} cases",
                bool(worse_at_same.all()),
            ),
            (
                "with each at its own best rate, correction never hurts: it is clearly worse in "
                f"{loses_at_best.sum()} of {loses_at_best.size} cases",
                not loses_at_best.any(),
            ),
            (
                "at the same rate, whatever it is, correction never hurts: it is clearly better in "
                f"{cells.sum()} cases and clearly worse in {against.sum()} of {cells.size}",
                not against.any(),
            ),
            (
                f"after {size.epochs[1]} epochs the best rates, over all pairs, spread less with "
                f"correction ({used[0]}) than without it ({used[1]})",
                bool(np.ptp(best["with bias correction"][-1]) < np.ptp(best["without"][-1])),
            ),
        ),
        columns=(
            "b1",
            "b2",
            "with: best rate, loss",
            "without: best rate, loss",
            "without, rate as with",
        ),
        rows=tuple(
            (
                f"{b1:g}",
                f"{b2:g}",
                *(
                    f"{size.rates[best[name][-1, i, j]]:.2g}, "
                    + shared.with_spread(found[-1, i, j], 2)
                    for name, found in zip(METHODS, (ours, others), strict=True)
                ),
                shared.with_spread(swapped[-1, i, j], 2),
            )
            for i, b1 in enumerate(size.b1)
            for j, b2 in enumerate(size.b2)
        ),
    )
    return Result(losses, finding)


def draw(result: Result, size: Size, path: Path) -> None:
    """Draw the loss by rate: a panel for each b1 and b2, as in the paper."""
    with mpl.rc_context(shared.STYLE):
        figure = Figure(figsize=(13, 6.6), layout="constrained")
        shape = len(size.b1), len(size.b2)
        panels = figure.subplots(*shape, sharex=True, sharey=True, squeeze=False)
        lowest = min(loss.min() for loss in result.losses.values())
        for (i, j), axes in np.ndenumerate(panels):
            for name, loss in result.losses.items():
                for when, (epochs, line) in enumerate(zip(size.epochs, ("--", "-"), strict=True)):
                    seen = loss[when, i, j]
                    look = {"color": COLORS[name], "ls": line, "marker": "o", "ms": 4}
                    label = f"{name}, {epochs} epochs"
                    axes.plot(size.rates, seen.mean(axis=-1), **look, label=label)
                    low, high = seen.min(axis=-1), seen.max(axis=-1)
                    axes.fill_between(size.rates, low, high, color=COLORS[name], alpha=0.2, lw=0)
            axes.set(title=f"b1 = {size.b1[i]:g}, b2 = {size.b2[j]:g}", xscale="log")
            axes.set(ylim=(lowest - 1, lowest + 25))
            axes.xaxis.set_minor_locator(NullLocator())
        for axes in panels[-1]:
            axes.set(xlabel="learning rate")
        for axes in panels[:, 0]:
            axes.set(ylabel="loss, nats")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4)
        figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> Result:
    """Run the example; `argv` is the command line, None means the program's own."""
    description = "Adam, figure 4: an autoencoder with and without bias correction."
    options = shared.command_line(NAME, description, argv)
    size = QUICK if options.quick else FULL
    task = autoencoder()
    points = shared.grid(b1=size.b1, b2=size.b2, rate=size.rates)
    shape = len(size.b1), len(size.b2), len(size.rates), size.seeds
    losses = {}
    with shared.progress_bars(options) as progress:
        for name, make in METHODS.items():
            seen = shared.train(
                task,
                make,
                points,
                seeds=size.seeds,
                epochs=size.epochs[1],
                progress=progress,
                name=name,
            )[np.array(size.epochs) - 1]
            losses[name] = np.fmin(seen, DIVERGED).reshape(2, *shape)
    result = judge(losses, size)
    draw(result, size, options.output)
    shared.report(NAME, result.finding, options)
    return result


if __name__ == "__main__":
    main()
