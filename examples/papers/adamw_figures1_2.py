"""AdamW, figures 1 and 2: test error by learning rate and weight decay, L2 against decoupled.

    python examples/papers/adamw_figures1_2.py
    python examples/papers/adamw_figures1_2.py --quick

L2 regularisation and decoupled decay are one piece, `add_decayed_weights`, in two places: before
the average of the gradient, or after it. As in the paper, decoupled decay is multiplied by the
schedule eta_t, a cosine from 1 to 0, and not by the learning rate alpha. There are few training
images, and a fifth of their labels are drawn at random, so that regularisation matters.

The paper's networks are normalised: the scale of a layer's weights does not change the output, and
decay acts through the effective size of the steps. This script runs each method on a small network
with such a normalisation and on the same network without it. A whole grid and its seeds are one
compiled call.

Source: Loshchilov & Hutter (2019), figures 1 and 2, https://arxiv.org/abs/1711.05101
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
import shared
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import adamx
from adamx import add_decayed_weights, chain, scale, scale_by_adam, scale_by_learning_rate, trace

NAME = "adamw_figures1_2"
IMAGES, WRONG, WIDTH, BATCH = 300, 0.2, 48, 50
EVERY = 10  # epochs between two measurements of the test error
BEST = 10  # how many of the best settings are marked, as in the paper


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is trained, and on which of NETWORKS."""

    networks: tuple[str, ...]
    seeds: int
    epochs: int
    adam_rates: tuple[float, ...]
    sgd_rates: tuple[float, ...]
    decays: tuple[float, ...]


def half_decades(low: int, high: int) -> tuple[float, ...]:
    """Return 10^low, 10^(low + 1/2), ..., 10^high."""
    return tuple(10 ** np.arange(low, high + 0.1, 0.5))


BOTH = ("normalised", "plain")
FULL = Size(BOTH, 5, 50, half_decades(-4, 0), half_decades(-3, 1), half_decades(-4, 0))
QUICK = Size(BOTH[:1], 2, 10, (1e-3, 1e-2, 1e-1), (1e-2, 1e-1, 1.0), (1e-3, 1e-2, 1e-1, 1.0))

# ------------------------------------------------------------- the same pieces in another order


Make = Callable[[Any, Any], adamx.Transformation]


def methods(eta: optax.Schedule) -> dict[str, Make]:
    """Return the four methods, each made from a learning rate and a decay."""
    down = scale_by_learning_rate(eta)
    return {
        "Adam, L2": lambda rate, decay: chain(
            add_decayed_weights(decay), scale_by_adam(), scale(rate), down
        ),
        "AdamW": lambda rate, decay: chain(
            scale_by_adam(), scale(rate), add_decayed_weights(decay), down
        ),
        "SGD, L2": lambda rate, decay: chain(
            add_decayed_weights(decay), trace(0.9), scale(rate), down
        ),
        "SGDW": lambda rate, decay: chain(
            trace(0.9), scale(rate), add_decayed_weights(decay), down
        ),
    }


# ------------------------------------------------------------------------------------ the networks


def normalised(x: jax.Array) -> jax.Array:
    """Return each row at mean zero and variance one."""
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6)


def identity(x: jax.Array) -> jax.Array:
    """Return x."""
    return x


NETWORKS = {"normalised": (normalised, 4.0), "plain": (identity, 1.0)}


def classifier(normalise: Callable[[jax.Array], jax.Array], sharpness: float) -> shared.Task:
    """Return the task; it measures the test error in per cent.

    Args:
        normalise: applied to each layer's outputs.
        sharpness: multiplies the logits.
    """
    digits = shared.Digits.load(IMAGES, WRONG)
    images, labels = jnp.asarray(digits.images), jnp.asarray(digits.labels)
    test_images = jnp.asarray(digits.test_images)

    def first(rng: np.random.Generator) -> list[np.ndarray]:
        sizes = (64, WIDTH), (WIDTH, WIDTH), (WIDTH, 10)
        return [shared.normal(rng, *size) * np.float32((2 / size[0]) ** 0.5) for size in sizes]

    def logits(layers: list[jax.Array], x: jax.Array) -> jax.Array:
        for weights in layers[:-1]:
            x = jax.nn.relu(normalise(x @ weights))
        return sharpness * normalise(x @ layers[-1])

    def loss(layers: list[jax.Array], which: jax.Array) -> jax.Array:
        seen = logits(layers, images[which])
        return optax.softmax_cross_entropy_with_integer_labels(seen, labels[which]).mean()

    def error(layers: list[jax.Array]) -> jax.Array:
        return 100 * (logits(layers, test_images).argmax(axis=-1) != digits.test_labels).mean()

    def batches(rng: np.random.Generator) -> np.ndarray:
        return np.concatenate([shared.shuffled(rng, IMAGES, BATCH) for _ in range(EVERY)])

    return shared.Task(first, batches, loss, error)


# ------------------------------------------------------------------------------------- the results


@dataclasses.dataclass(frozen=True)
class Result:
    """The errors, and what they say of the paper's claim.

    Attributes:
        errors: by (network, method), in per cent, of shape (rates, decays, seeds).
        finding: the paper's claim, and whether it held.
    """

    errors: dict[tuple[str, str], np.ndarray]
    finding: shared.Finding


def rates_of(method: str, size: Size) -> tuple[float, ...]:
    """Return the learning rates of a method's grid."""
    return size.adam_rates if method.startswith("Adam") else size.sgd_rates


def best_settings(errors: np.ndarray, count: int = BEST) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of the best settings, best first: numbers of their rates and decays."""
    order = np.argsort(errors.mean(axis=-1), axis=None, kind="stable")[:count]
    rates, decays = np.unravel_index(order, errors.shape[:2])
    return rates, decays


def coupling(errors: np.ndarray) -> float:
    """Return how many decades rate or decay shifts for a decade of the other, at the best settings.

    It is their covariance over the larger of their variances: -1 if only the product of rate and
    decay matters, 0 if each can be chosen by itself.
    """
    covariance = np.cov(*best_settings(errors))
    return float(covariance[0, 1] / covariance.diagonal().max())


def judge(errors: dict[tuple[str, str], np.ndarray], size: Size) -> Result:
    """Compare the best errors, and how rate and decay are coupled at the best settings."""

    def at_best(found: np.ndarray) -> np.ndarray:
        rates, decays = best_settings(found, 1)
        return found[rates[0], decays[0]]

    parts, rows = [], []
    for network in size.networks:
        grids = {method: errors[network, method] for method in ("Adam, L2", "AdamW")}
        l2, decoupled = (at_best(found) for found in grids.values())
        statement = (
            f"{network}: the best error is lower with AdamW ({decoupled.mean():.1f} %) than with "
            f"Adam, L2 ({l2.mean():.1f} %)"
        )
        parts.append((statement, bool(shared.clearly_below(decoupled, l2))))
        for pair in (("Adam, L2", "AdamW"), ("SGD, L2", "SGDW")):
            l2, decoupled = (coupling(errors[network, method]) for method in pair)
            statement = (
                f"{network}: rate and decay are less coupled with {pair[1]} ({decoupled:+.2f}) "
                f"than with {pair[0]} ({l2:+.2f})"
            )
            parts.append((statement, abs(decoupled) < abs(l2)))
    for (network, method), found in errors.items():
        rates, decays = best_settings(found, 1)
        rows.append(
            (
                network,
                method,
                f"{rates_of(method, size)[rates[0]]:.2g}",
                f"{size.decays[decays[0]]:.2g}",
                shared.with_spread(found[rates[0], decays[0]], 1),
                f"{coupling(found):+.2f}",
            )
        )
    shape = len(size.adam_rates), len(size.decays)
    finding = shared.Finding(
        title="AdamW, figures 1 and 2: L2 and decoupled weight decay",
        setting=(
            f"Two hidden layers of {WIDTH} units, {IMAGES} training images, {100 * WRONG:.0f} % "
            f"of their labels random; {1797 - IMAGES} test images; {size.seeds} seeds, "
            f"{size.epochs} epochs of {IMAGES // BATCH} steps, {shape[0]} learning rates "
            f"by {shape[1]} decays. Test error in per cent; circles mark the {BEST} best "
            "settings. Their coupling is how many decades rate or decay shifts for a decade of the "
            "other: -1 if only the product matters, 0 if each can be chosen by itself."
        ),
        claim="With decoupled decay Adam generalises better than with L2, and the best learning "
        "rate and the best decay can be chosen separately.",
        parts=tuple(parts),
        columns=("network", "method", "best rate", "best decay", "test error", "coupling"),
        rows=tuple(rows),
    )
    return Result(errors, finding)


def draw_heatmap(axes: Axes, found: np.ndarray, rates: Sequence[float], size: Size) -> Any:
    """Draw the mean error over the grid, with circles around the best settings."""
    means = found.mean(axis=-1)
    drawn = axes.imshow(means, origin="lower", cmap="viridis_r", vmin=7, vmax=30, aspect="auto")
    places = best_settings(found)
    axes.scatter(*reversed(places), s=70, facecolors="none", edgecolors="black", linewidths=1.5)
    for axis, values in ((axes.xaxis, size.decays), (axes.yaxis, rates)):
        every = range(0, len(values), 2)
        axis.set_ticks(every, [f"$10^{{{np.log10(values[place]):.0f}}}$" for place in every])
    return drawn


def draw(result: Result, size: Size, path: Path) -> None:
    """Draw a heatmap for each network and method."""
    with mpl.rc_context(shared.STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(13.5, 3.5 * len(size.networks)), layout="constrained")
        panels = figure.subplots(len(size.networks), 4, squeeze=False)
        for axes, ((network, method), found) in zip(
            panels.flat, result.errors.items(), strict=True
        ):
            drawn = draw_heatmap(axes, found, rates_of(method, size), size)
            axes.set_title(f"{method}\n{network}, best {found.mean(axis=-1).min():.1f} %")
        for axes in panels[-1]:
            axes.set_xlabel("weight decay")
        for axes in panels[:, 0]:
            axes.set_ylabel("learning rate")
        figure.colorbar(drawn, ax=panels, label="test error, %", extend="both", shrink=0.6)
        figure.savefig(path, dpi=90)


def main(argv: Sequence[str] | None = None) -> Result:
    """Run the example; `argv` is the command line, None means the program's own."""
    description = "AdamW, figures 1 and 2: test error by rate and decay, L2 against decoupled."
    options = shared.command_line(NAME, description, argv)
    size = QUICK if options.quick else FULL
    errors = {}
    with shared.progress_bars(options) as progress:
        for network in size.networks:
            task = classifier(*NETWORKS[network])
            eta = optax.cosine_decay_schedule(1.0, size.epochs * (IMAGES // BATCH))
            for method, make in methods(eta).items():
                rates = rates_of(method, size)
                seen = shared.train(
                    task,
                    make,
                    shared.grid(rate=rates, decay=size.decays),
                    seeds=size.seeds,
                    epochs=size.epochs // EVERY,
                    progress=progress,
                    name=f"{method}, {network}",
                )
                shape = len(rates), len(size.decays), size.seeds
                errors[network, method] = seen[-1].reshape(shape)
    result = judge(errors, size)
    draw(result, size, options.output)
    shared.report(NAME, result.finding, options)
    return result


if __name__ == "__main__":
    main()
