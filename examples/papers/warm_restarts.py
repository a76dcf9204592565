"""AdamWR: AdamW with warm restarts, and the anytime curve: the test error if training stopped now.

    python examples/papers/warm_restarts.py
    python examples/papers/warm_restarts.py --quick

The rate falls along a cosine and jumps back up; each period is twice as long as the one before. The
decay of a period is normalised by its length: lambda = norm * sqrt(batch / (examples * epochs)). If
training stops, AdamWR takes the weights at the end of the last period, when the rate was zero. It
is compared with AdamW with one cosine over the whole time, which has to know the end beforehand,
and with AdamW at a constant rate; these take the weights at the stop.

Each method has the learning rate and the norm of a grid with the lowest last error. A whole grid
and its seeds are one compiled call. A fifth of the training labels are drawn at random.

Source: Loshchilov & Hutter (2019), section 4.4 and Appendix B.1, https://arxiv.org/abs/1711.05101
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
import shared
from matplotlib.figure import Figure

import adamx

NAME = "warm_restarts"
IMAGES, WRONG, WIDTH, BATCH = 900, 0.2, 64, 20
STEPS = IMAGES // BATCH


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is trained; `periods` are in epochs."""

    seeds: int
    periods: tuple[int, ...]
    rates: tuple[float, ...]
    norms: tuple[float, ...]

    @property
    def epochs(self) -> int:
        """How long the whole training is."""
        return sum(self.periods)

    @property
    def ends(self) -> np.ndarray:
        """The number of epochs at the end of each period."""
        return np.cumsum(self.periods)


FULL = Size(8, (1, 2, 4, 8, 16, 32), (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), (0.05, 0.1, 0.2, 0.4, 0.8))
QUICK = Size(2, (1, 2, 4), (1e-3, 1e-2), (0.05, 0.2))

# ------------------------------------------------------------------------------- the three methods

Make = Callable[[Any, Any], adamx.Transformation]


def normalised_decay(norm: Any, epochs: int) -> Any:
    """Return the decay a step for a training of so many epochs."""
    unit = adamx.normalized_weight_decay(1.0, batch_size=BATCH, examples=IMAGES, epochs=epochs)
    return norm * unit


def with_restarts(size: Size) -> Make:
    """Return AdamWR: a cosine for each period, and the decay that belongs to its length."""
    boundaries = [int(end) * STEPS for end in size.ends[:-1]]
    cosines = [optax.cosine_decay_schedule(1.0, epochs * STEPS) for epochs in size.periods]
    eta = optax.join_schedules(cosines, boundaries)

    def make(rate: Any, norm: Any) -> adamx.Transformation:
        decays = [normalised_decay(norm, epochs) for epochs in size.periods]
        constants = [optax.constant_schedule(decay) for decay in decays]
        decay = optax.join_schedules(constants, boundaries)
        return adamx.adamw_independent(rate, weight_decay=decay, multiplier=eta)

    return make


def one_period(size: Size, multiplier: Any) -> Make:
    """Return AdamW with the decay that belongs to the whole training."""
    return lambda rate, norm: adamx.adamw_independent(
        rate, weight_decay=normalised_decay(norm, size.epochs), multiplier=multiplier
    )


def methods(size: Size) -> dict[str, Make]:
    """Return the three methods."""
    cosine = optax.cosine_decay_schedule(1.0, size.epochs * STEPS)
    return {
        "AdamWR": with_restarts(size),
        "AdamW, one cosine": one_period(size, cosine),
        "AdamW, constant": one_period(size, 1.0),
    }


COLORS = ("#D55E00", "#0072B2", "#6B6B6B")


def classifier() -> shared.Task:
    """Return the task; it measures the test error in per cent."""
    digits = shared.Digits.load(IMAGES, WRONG)
    images, labels = jnp.asarray(digits.images), jnp.asarray(digits.labels)
    test_images = jnp.asarray(digits.test_images)

    def first(rng: np.random.Generator) -> list[np.ndarray]:
        sizes = (64, WIDTH), (WIDTH, 10)
        return [shared.normal(rng, *size) * np.float32((2 / size[0]) ** 0.5) for size in sizes]

    def logits(layers: list[jax.Array], x: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ layers[0]) @ layers[1]

    def loss(layers: list[jax.Array], which: jax.Array) -> jax.Array:
        seen = logits(layers, images[which])
        return optax.softmax_cross_entropy_with_integer_labels(seen, labels[which]).mean()

    def error(layers: list[jax.Array]) -> jax.Array:
        return 100 * (logits(layers, test_images).argmax(axis=-1) != digits.test_labels).mean()

    return shared.Task(first, lambda rng: shared.shuffled(rng, IMAGES, BATCH), loss, error)


# ------------------------------------------------------------------------------------- the results


@dataclasses.dataclass(frozen=True)
class Result:
    """The errors, and what they say of the paper's claim.

    Attributes:
        errors: of each method after each epoch, in per cent, of shape (epochs, points, seeds).
        anytime: of each method at its best point, if training stopped then: (epochs, seeds).
        finding: the paper's claim, and whether it held.
    """

    errors: dict[str, np.ndarray]
    anytime: dict[str, np.ndarray]
    finding: shared.Finding


def at_ends(errors: np.ndarray, size: Size) -> np.ndarray:
    """Return the errors at the end of the last period; before the first end, the current ones."""
    last = [max((end for end in size.ends if end <= now), default=now) for now in each(size)]
    return errors[np.array(last) - 1]


def each(size: Size) -> range:
    """Return the epochs, counted from 1."""
    return range(1, size.epochs + 1)


def judge(errors: dict[str, np.ndarray], size: Size) -> Result:
    """Compare the anytime curves and the last errors."""
    best = {name: int(found[-1].mean(axis=-1).argmin()) for name, found in errors.items()}
    points = list(itertools.product(size.rates, size.norms))
    anytime = {
        name: at_ends(found[:, best[name]], size) if name == "AdamWR" else found[:, best[name]]
        for name, found in errors.items()
    }
    means = {name: found.mean(axis=0) for name, found in anytime.items()}
    last = {name: found[-1] for name, found in anytime.items()}
    restarts, cosine, constant = anytime
    better = shared.clearly_below(anytime[restarts], anytime[cosine]).mean()
    worse = shared.clearly_below(anytime[cosine], anytime[restarts]).mean()

    def sooner(other: str) -> tuple[str, bool]:
        gap = f"{means[restarts].mean():.1f} % against {means[other].mean():.1f} %"
        held = bool(shared.clearly_below(means[restarts], means[other]))
        return f"averaged over all epochs its error is lower than with {other}: {gap}", held

    finding = shared.Finding(
        title="AdamW with warm restarts: the anytime curve",
        setting=(
            f"One hidden layer of {WIDTH} units, {IMAGES} training images, {100 * WRONG:.0f} % "
            f"of their labels random, {1797 - IMAGES} test images; {size.seeds} seeds, "
            f"{len(points)} settings of rate and norm, {size.epochs} epochs of {STEPS} steps, "
            f"periods of {', '.join(map(str, size.periods))} epochs. Each method "
            "at the setting with the lowest last error; errors in per cent of the test images."
        ),
        claim="With restarts AdamW is better whenever training is stopped, and not worse at the "
        "end.",
        parts=(
            sooner(cosine),
            sooner(constant),
            (
                f"after most epochs its error is clearly lower than with {cosine}: after "
                f"{100 * better:.0f} % of them, and clearly higher after {100 * worse:.0f} %",
                bool(better > 0.5),
            ),
            (
                f"its last error is not clearly higher than with {cosine}: "
                f"{last[restarts].mean():.1f} % against {last[cosine].mean():.1f} %",
                not shared.clearly_below(last[cosine], last[restarts]),
            ),
        ),
        columns=("method", "best rate", "best norm", "error, all epochs", "last error"),
        rows=tuple(
            (
                name,
                *(f"{value:g}" for value in points[best[name]]),
                shared.with_spread(means[name], 2),
                shared.with_spread(last[name], 2),
            )
            for name in anytime
        ),
    )
    return Result(errors, anytime, finding)


def draw(result: Result, size: Size, path: Path) -> None:
    """Draw the anytime curves, and the last error over the grid."""
    with mpl.rc_context(shared.STYLE):
        figure = Figure(figsize=(13, 4.8), layout="constrained")
        curves, settings = figure.subplots(1, 2, width_ratios=(1.4, 1))
        for color, (name, found) in zip(COLORS, result.anytime.items(), strict=True):
            steps = {"drawstyle": "steps-post"} if name == "AdamWR" else {}
            curves.plot(each(size), found.mean(axis=-1), color=color, lw=2, label=name, **steps)
            low, high = found.min(axis=-1), found.max(axis=-1)
            band = {"step": "post"} if steps else {}
            curves.fill_between(each(size), low, high, color=color, alpha=0.12, lw=0, **band)
            last = result.errors[name][-1].mean(axis=-1).reshape(len(size.rates), -1)
            settings.plot(size.rates, last.min(axis=1), color=color, lw=2, marker="o", ms=4)
        for end in size.ends:
            curves.axvline(end, color="#D55E00", lw=0.8, ls=":")
        final = min(found[-1].mean() for found in result.anytime.values())
        curves.set(title="Test error if one stopped now, %", xlabel="epoch", xscale="log")
        curves.set(ylim=(final - 1, final + 15), xticks=size.ends)
        curves.set_xticklabels(size.ends)
        curves.minorticks_off()
        curves.legend()
        settings.set(title="Last error at the best norm, %", xlabel="learning rate", xscale="log")
        figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> Result:
    """Run the example; `argv` is the command line, None means the program's own."""
    description = "AdamW with warm restarts, one cosine and a constant rate: the anytime curve."
    options = shared.command_line(NAME, description, argv)
    size = QUICK if options.quick else FULL
    task, points = classifier(), shared.grid(rate=size.rates, norm=size.norms)
    with shared.progress_bars(options) as progress:
        errors = {
            name: shared.train(
                task,
                make,
                points,
                seeds=size.seeds,
                epochs=size.epochs,
                progress=progress,
                name=name,
            )
            for name, make in methods(size).items()
        }
    result = judge(errors, size)
    draw(result, size, options.output)
    shared.report(NAME, result.finding, options)
    return result


if __name__ == "__main__":
    main()
