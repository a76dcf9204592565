"""Draw what each concept of the Adam family contributes: one picture, four optimizers.

    python examples/four_optimizers.py --output four_optimizers.png

Momentum, RMSprop, Adam and AdamW walk down the same valley, each together with the same composition
without the concept that it adds. The compositions are written out from their pieces; those with the
concept equal the results of `adamx.momentum`, `adamx.rmsprop`, `adamx.adam` and `adamx.adamw`.

    f(w) = 1/2 (w - minimum)^T diag(1, 50) (w - minimum)

The gradients are exact, except in AdamW's panel. There they are noisy, as mini-batches make them:
each step shifts the minimum of the valley at random. Without noise the second moment forgets the
slope in the long run, and Adam's steps end in the minimum for any decay.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import adamx
from adamx import (
    add_decayed_weights,
    bias_correction,
    chain,
    ema,
    ema_of_squares,
    rms_scaling,
    scale_by_learning_rate,
)

# ------------------------------------------------------------------ the valley, and the way down

CURVATURES = np.array([1, 50], np.float32)  # along the valley and across it
MINIMUM = np.array([3, 1.5], np.float32)
START = np.array([-1, 2.7], np.float32)


def descend(tx: optax.GradientTransformation, steps: int, noise: float = 0.0) -> np.ndarray:
    """Walk down the valley.

    Args:
        tx: any adamx or Optax transformation.
        steps: how many.
        noise: standard deviation of the minimum's place from one step to the next, along each
            axis; the same shifts for every transformation.

    Returns:
        The way, start included: an array of shape (steps + 1, 2).
    """
    shifts = noise * jax.random.normal(jax.random.key(0), (steps, 2))

    def step(carry: tuple, shift: jax.Array) -> tuple:
        weights, state = carry
        gradient = CURVATURES * (weights - MINIMUM - shift)
        updates, state = tx.update(gradient, state, weights)
        weights = adamx.apply_updates(weights, updates)
        return (weights, state), weights

    start = jnp.asarray(START)
    _, way = jax.lax.scan(step, (start, tx.init(start)), shifts)
    return np.vstack([START, way])


# ------------------------------------------------- the compositions, with and without the concept

RATE = {"momentum": 0.038, "rmsprop": 0.07, "adam": 0.05, "adamw": 0.02}
DECAY, NOISE = 0.3, 0.5

GRADIENT_DESCENT = scale_by_learning_rate(RATE["momentum"])
MOMENTUM = chain(ema(0.9), scale_by_learning_rate(RATE["momentum"]))

SLOW_DESCENT = scale_by_learning_rate(RATE["momentum"] / 2)
RMSPROP = chain(
    rms_scaling(second_moment=ema_of_squares(0.9)),
    scale_by_learning_rate(RATE["rmsprop"]),
)

ADAM_UNCORRECTED = chain(
    rms_scaling(ema(0.9), second_moment=ema_of_squares(0.999)),
    scale_by_learning_rate(RATE["adam"]),
)
ADAM_SCALING = rms_scaling(
    chain(ema(0.9), bias_correction(0.9)),
    second_moment=chain(ema_of_squares(0.999), bias_correction(0.999)),
)
ADAM = chain(ADAM_SCALING, scale_by_learning_rate(RATE["adam"]))

ADAM_NO_DECAY = chain(ADAM_SCALING, scale_by_learning_rate(RATE["adamw"]))
ADAM_L2 = chain(add_decayed_weights(DECAY), ADAM_SCALING, scale_by_learning_rate(RATE["adamw"]))
ADAMW = chain(ADAM_SCALING, add_decayed_weights(DECAY), scale_by_learning_rate(RATE["adamw"]))


@dataclasses.dataclass(frozen=True)
class Facts:
    """The numbers in the picture; in a pair, the first is without the concept.

    Attributes:
        crossings: how often gradient descent and Momentum cross the valley floor.
        first_steps: how many times as far the first step goes across the valley as along it, for
            gradient descent and for RMSprop.
        adam_steps: the first step along an axis in learning rates, without and with correction.
        adam_longest: the longest step along an axis, in the same unit.
        ends: where Adam, Adam with L2 and AdamW settle: the mean over the second half of the way.
    """

    crossings: tuple[int, int]
    first_steps: tuple[float, float]
    adam_steps: tuple[float, float]
    adam_longest: tuple[float, float]
    ends: tuple[np.ndarray, np.ndarray, np.ndarray]


# ------------------------------------------------------------------------------------ the picture

WITHOUT, BLUE, VERMILLION, GREEN, PURPLE = "#6B6B6B", "#0072B2", "#D55E00", "#007A5A", "#A0408A"
SHADES = [str(shade) for shade in np.linspace(0.79, 0.97, 10)]  # the lower, the darker
STYLE = {
    "font.size": 12,
    "mathtext.fontset": "cm",
    "axes.edgecolor": "#BBBBBB",
    "xtick.bottom": False,
    "ytick.left": False,
    "xtick.labelbottom": False,
    "ytick.labelleft": False,
}


def prepare(axes: Axes, title: str, formula: str, caption: str) -> None:
    """Draw the valley and write the panel's title, formula and caption."""
    x, y = np.meshgrid(np.linspace(-1.45, 4.05, 240), np.linspace(-0.3, 3, 150))
    height = np.tensordot(CURVATURES, (np.stack([x, y]) - MINIMUM[:, None, None]) ** 2, 1) / 2
    levels = np.geomspace(0.1, 50, 9)
    axes.contourf(x, y, np.log(height), [-20, *np.log(levels), 20], colors=SHADES)
    axes.contour(x, y, height, levels, colors="white", linewidths=0.8)
    axes.plot(*MINIMUM, "*", color="black", ms=14, zorder=8)
    axes.plot(*START, "o", color="white", mec="black", mew=1.5, ms=8, zorder=6)
    axes.set_aspect("equal")
    axes.text(0, 1.15, title, transform=axes.transAxes, fontsize=14, fontweight="bold")
    axes.text(0, 1.045, formula, transform=axes.transAxes, fontsize=15.5)
    axes.set_xlabel(caption, loc="left", fontsize=12, labelpad=7)


def draw(axes: Axes, way: np.ndarray, color: str, **style: object) -> None:
    """Draw a way with a dot for each step."""
    axes.plot(*way.T, **({"color": color, "lw": 1.6, "marker": "o", "ms": 3} | style))


def mark(axes: Axes, place: np.ndarray, color: str) -> None:
    """Draw a large dot."""
    axes.plot(*place, "o", color=color, mec="white", mew=1.5, ms=12, zorder=7)


def draw_pair(axes: Axes, ways: Sequence[np.ndarray], color: str) -> None:
    """Draw the way without the concept in grey, the one with it in colour, and both ends."""
    draw(axes, ways[0], WITHOUT, lw=1)
    draw(axes, ways[1], color, lw=2.2)
    for way, shade in zip(ways, (WITHOUT, color), strict=True):
        mark(axes, way[-1], shade)


def say(axes: Axes, text: str, place: tuple[float, float], color: str, **style: object) -> None:
    """Write next to a curve."""
    axes.text(*place, text, color=color, **({"fontweight": "bold", "va": "center"} | style))


def momentum_panel(axes: Axes) -> tuple[int, int]:
    """Show the average of the gradients; return how often the valley floor is crossed."""
    ways = [descend(tx, steps=60) for tx in (GRADIENT_DESCENT, MOMENTUM)]
    crossings = [int(np.sum(np.diff(np.sign(way[:, 1] - MINIMUM[1])) != 0)) for way in ways]
    prepare(
        axes,
        "Momentum: averaging smooths the zigzag",
        r"$m_t = \beta m_{t-1} + (1-\beta)\,g_t \qquad w \leftarrow w - \alpha\, m_t$",
        f"In {len(ways[0]) - 1} steps it crosses the valley floor {crossings[1]} times, "
        f"not {crossings[0]} times.",
    )
    draw_pair(axes, ways, BLUE)
    say(axes, "gradient descent", (-0.35, 2.55), WITHOUT)
    say(axes, "Momentum", (0.75, 0.5), BLUE)
    return crossings[0], crossings[1]


def rmsprop_panel(axes: Axes) -> tuple[float, float]:
    """Show the RMS scaling; return the ratio of the first step across and along the valley."""
    ways = [descend(tx, steps=60) for tx in (SLOW_DESCENT, RMSPROP)]
    ratios = [abs(float((way[1] - way[0])[1] / (way[1] - way[0])[0])) for way in ways]
    prepare(
        axes,
        "RMSprop: the root equalises the axes",
        r"$v_t = \beta v_{t-1} + (1-\beta)\,g_t^2 \qquad"
        r" w \leftarrow w - \alpha\, g_t \,/\, (\sqrt{v_t}+\varepsilon)$",
        f"The first step, across to along the valley: {ratios[1]:.0f} to 1, "
        f"not {ratios[0]:.0f} to 1.",
    )
    draw_pair(axes, ways, VERMILLION)
    say(axes, "gradient descent", (-0.9, 1.25), WITHOUT)
    say(axes, "RMSprop", (0.1, 2.1), VERMILLION)
    return ratios[0], ratios[1]


def adam_panel(axes: Axes) -> tuple[tuple[float, float], tuple[float, float]]:
    """Show the bias correction; return the first and the longest steps in learning rates."""
    ways = [descend(tx, steps=120) for tx in (ADAM_UNCORRECTED, ADAM)]
    moves = [np.abs(np.diff(way[:, 0])) / RATE["adam"] for way in ways]
    first, longest = [float(m[0]) for m in moves], [float(m.max()) for m in moves]
    prepare(
        axes,
        "Adam: both, and a corrected start",
        r"$\hat m_t = \frac{m_t}{1-\beta_1^t} \quad \hat v_t = \frac{v_t}{1-\beta_2^t} \qquad"
        r" w \leftarrow w - \alpha\, \hat m_t \,/\, (\sqrt{\hat v_t}+\varepsilon)$",
        rf"The first step is {first[1]:.1f} $\alpha$ along each axis, not {first[0]:.1f} $\alpha$.",
    )
    draw_pair(axes, ways, GREEN)
    say(axes, "without correction", (2.1, 2.1), WITHOUT)
    say(axes, "Adam", (0.2, 1.75), GREEN)
    inset = axes.inset_axes((0.6, 0.1, 0.37, 0.2))
    steps = np.arange(1, 41)
    inset.plot(steps, moves[0][:40], color=WITHOUT, lw=1.6)
    inset.plot(steps, moves[1][:40], color=GREEN, lw=2.2)
    inset.set_title(r"size of steps 1 to 40, in $\alpha$", fontsize=10, loc="left", pad=3)
    inset.set(xlim=(1, 40), ylim=(0, 6.6), xticks=[1, 20, 40], yticks=[0, 1, 3, 5])
    inset.tick_params(labelbottom=True, labelleft=True, labelsize=9, length=0)
    return (first[0], first[1]), (longest[0], longest[1])


def adamw_panel(axes: Axes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Show the decoupled decay; return where each variant settles."""
    ways = [descend(tx, steps=6000, noise=NOISE) for tx in (ADAM_NO_DECAY, ADAM_L2, ADAMW)]
    _, l2, adamw = ends = tuple(way[len(way) // 2 :].mean(axis=0) for way in ways)
    shrinkage = [
        "{:.0f} % along and {:.0f} % across".format(*100 * (1 - end / MINIMUM))
        for end in (adamw, l2)
    ]
    prepare(
        axes,
        "AdamW: decoupled decay pulls towards zero",
        r"$w \leftarrow (1-\alpha\lambda)\,w"
        r" - \alpha\, \hat m_t \,/\, (\sqrt{\hat v_t}+\varepsilon)$",
        f"Noisy gradients. {shrinkage[0]} nearer to zero;\nwith L2 in the gradient {shrinkage[1]}.",
    )
    for way, end, color in zip(ways, ends, (WITHOUT, PURPLE, BLUE), strict=True):
        draw(axes, way[:700], color, ms=0, lw=1, alpha=0.8)
        mark(axes, end, color)
    axes.plot(0, 0, "+", color="black", ms=12, mew=2)
    say(axes, "zero", (0.15, 0.02), "black")
    axes.annotate("", (0.2, 0.1), adamw, arrowprops={"arrowstyle": "->", "ls": ":"})
    say(axes, "Adam", (3.15, 1.72), WITHOUT)
    say(axes, "Adam with L2", (1.35, 1.85), PURPLE)
    say(axes, "AdamW", (2.5, 1.05), BLUE)
    return ends


def main(argv: Sequence[str] | None = None) -> Facts:
    """Draw the picture.

    Args:
        argv: the command line; None means the program's own.

    Returns:
        The numbers in the picture.
    """
    parser = argparse.ArgumentParser(
        description="Draw Momentum, RMSprop, Adam and AdamW in one valley, each with and without "
        "the concept that it adds."
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        default="four_optimizers.png",
        help="the picture (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    if not options.output.parent.is_dir():
        parser.error(f"argument --output: there is no folder {str(options.output.parent)!r}")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12, 10.4))
        figure.subplots_adjust(0.03, 0.071, 0.97, 0.838, wspace=0.06, hspace=0.412)
        panels = figure.subplots(2, 2).flat
        facts = Facts(
            momentum_panel(panels[0]),
            rmsprop_panel(panels[1]),
            *adam_panel(panels[2]),
            adamw_panel(panels[3]),
        )
        figure.text(0.03, 0.955, "Four optimizers, and what each adds", fontsize=22)
        figure.text(
            0.03,
            0.927,
            "From the circle towards the star, a dot a step. The valley is "
            f"{CURVATURES[1]:.0f} times as steep across as along. Grey: without the concept.",
            fontsize=13,
            color="#444444",
        )
        figure.savefig(options.output, dpi=90)
    print(f"Picture: {options.output}")
    return facts


if __name__ == "__main__":
    main()
