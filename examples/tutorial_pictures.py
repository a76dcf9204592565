"""Draw the pictures of the tutorial: one for each concept, one for each composition.

    python examples/tutorial_pictures.py --output docs/images

Each function draws one picture, from the updates that the adamx pieces emit. The compositions walk
down a valley that is 20 times as steep across as along:

    f(w) = 1/2 (w - minimum)^T diag(1, 20) (w - minimum)
"""

from __future__ import annotations

import argparse
import warnings
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

GREY, BLUE, VERMILLION, GREEN = "#6B6B6B", "#0072B2", "#D55E00", "#007A5A"
STYLE = {
    "axes.edgecolor": "#BBBBBB",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "font.size": 11,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "mathtext.fontset": "cm",
}

# ------------------------------------------------------------------------------ runs and valley


def emitted(tx: optax.GradientTransformation, gradients: np.ndarray) -> np.ndarray:
    """Return the updates that a transformation emits for one gradient after the other, stacked."""

    def step(state: object, gradient: jax.Array) -> tuple:
        updates, state = tx.update(gradient, state, start)
        return state, updates

    gradients = jnp.asarray(gradients, jnp.float32)
    start = jnp.zeros_like(gradients[0])
    return np.asarray(jax.lax.scan(step, tx.init(start), gradients)[1])


def weights(tx: optax.GradientTransformation, start: jax.Array, gradients: jax.Array) -> np.ndarray:
    """Return the weights before and after each step, for gradients that do not depend on them."""

    def step(carry: tuple, gradient: jax.Array) -> tuple:
        updates, state = tx.update(gradient, carry[1], carry[0])
        new = adamx.apply_updates(carry[0], updates)
        return (new, state), new.astype(jnp.float32)

    _, way = jax.lax.scan(step, (start, tx.init(start)), gradients)
    return np.concatenate([np.asarray(start, np.float32)[None], way])


T = np.arange(1, 101)


def noisy(steps: int = 100) -> np.ndarray:
    """Return the gradients 1 + noise of so many mini-batches."""
    return 1 + 0.6 * np.random.default_rng(0).normal(size=steps)


CURVATURES = np.array([1, 20], np.float32)  # along the valley and across it
MINIMUM, START = np.array([3, 1], np.float32), np.array([0, 2], np.float32)


def descend(tx: optax.GradientTransformation, steps: int) -> np.ndarray:
    """Return the way down the valley, start included: an array of shape (steps + 1, 2)."""

    def step(carry: tuple, _: None) -> tuple:
        updates, state = tx.update(CURVATURES * (carry[0] - MINIMUM), carry[1], carry[0])
        new = adamx.apply_updates(carry[0], updates)
        return (new, state), new

    start = jnp.asarray(START)
    _, way = jax.lax.scan(step, (start, tx.init(start)), length=steps)
    return np.vstack([START, way])


def valley(axes: Axes, title: str, *ways: tuple[str, str, np.ndarray]) -> None:
    """Draw the valley and the ways down: label, colour and points of each."""
    x, y = np.meshgrid(np.linspace(-0.4, 3.8, 200), np.linspace(-0.3, 2.4, 130))
    height = np.tensordot(CURVATURES, (np.stack([x, y]) - MINIMUM[:, None, None]) ** 2, 1) / 2
    axes.contour(x, y, height, np.geomspace(0.05, 30, 9), colors="#CCCCCC", linewidths=0.8)
    for label, color, way in ways:
        axes.plot(*way.T, "o-", color=color, lw=1.5, ms=3, label=label)
    axes.plot(*MINIMUM, "*", color="black", ms=13, zorder=5)
    axes.plot(*START, "o", color="white", mec="black", ms=8, zorder=5)
    axes.set(xlim=(-0.4, 3.8), ylim=(-0.3, 2.4), xticks=[], yticks=[], title=title)
    axes.legend(loc="upper right")


# ------------------------------------------------------------------------------ the concepts


def ema(axes: Axes) -> None:
    """Averages of noisy gradients: the longer the memory, the smoother and the slower."""
    axes.plot(T, noisy(), ".", color=GREY, label="$g_t$")
    for beta, color in ((0.5, VERMILLION), (0.9, BLUE), (0.98, GREEN)):
        axes.plot(T, emitted(adamx.ema(beta), noisy()), color=color, label=rf"$m_t,\ \beta={beta}$")
    axes.axhline(1, color="black", lw=0.8, ls=":")
    axes.set(title=r"$m_t = \beta\, m_{t-1} + (1-\beta)\, g_t$", xlabel="t")
    axes.legend(ncols=4, loc="lower right")


def ema_of_squares(axes: Axes) -> None:
    """The average of the squares of the same gradients, and its limit."""
    axes.plot(T, noisy() ** 2, ".", color=GREY, label="$g_t^2$")
    for beta, color in ((0.9, BLUE), (0.98, GREEN)):
        average = emitted(adamx.ema_of_squares(beta), noisy())
        axes.plot(T, average, color=color, label=rf"$v_t,\ \beta={beta}$")
    mean = r"$\mathrm{E}[g^2] = \mathrm{E}[g]^2 + \mathrm{Var}[g]$"
    axes.axhline(1 + 0.6**2, color="black", lw=0.8, ls=":", label=mean)
    axes.set(title=r"$v_t = \beta\, v_{t-1} + (1-\beta)\, g_t^2$", xlabel="t", ylim=(0, 5.9))
    axes.legend(ncols=4, loc="upper left")


def bias_correction(axes: Axes) -> None:
    """An average that starts at zero, and the same divided by 1 - beta^t."""
    average, correction = adamx.ema(0.98), adamx.bias_correction(0.98)
    axes.plot(T, noisy(), ".", color=GREY, label="$g_t$")
    axes.plot(T, emitted(average, noisy()), color=VERMILLION, label="$m_t$")
    corrected = emitted(adamx.chain(average, correction), noisy())
    axes.plot(T, corrected, color=BLUE, label=r"$\hat m_t$")
    axes.axhline(1, color="black", lw=0.8, ls=":")
    axes.set(title=r"$\hat m_t = m_t\,/\,(1-\beta^t),\ \beta = 0.98$", xlabel="t")
    axes.legend(ncols=3, loc="lower right")


def rms_scaling(axes: Axes) -> None:
    """Gradients of three sizes, and the updates that the scaling makes of them."""
    sizes, colors = (1e-3, 1.0, 1e3), (BLUE, GREEN, VERMILLION)
    gradients = np.stack([size * noisy(60) for size in sizes], axis=1)
    second_moment = adamx.chain(adamx.ema_of_squares(0.9), adamx.bias_correction(0.9))
    scaled = emitted(adamx.rms_scaling(second_moment=second_moment), gradients)
    for i, (size, color) in enumerate(zip(sizes, colors, strict=True)):
        axes.semilogy(
            T[:60], np.abs(gradients[:, i]), ".", color=color, label=f"$|g_t|$, size {size:g}"
        )
        # the three coincide: the thickest is at the bottom
        axes.semilogy(T[:60], np.abs(scaled[:, i]), color=color, lw=8 - 3 * i, label="$|u_t|$")
    axes.set(title=r"$u_t = g_t\,/\,(\sqrt{\hat v_t} + \varepsilon)$", xlabel="t", xlim=(0, 89))
    axes.legend(loc="center right")


def weight_decay(axes: Axes) -> None:
    """Weights under large and small noise, with L2 in the gradient and with decoupled decay."""
    noise = np.random.default_rng(0).normal(size=(400, 50, 2)) * [10, 0.1]
    decay, scaling = adamx.add_decayed_weights(0.5), adamx.scale_by_adam()
    step = adamx.scale_by_learning_rate(0.01)
    for label, color, tx in (
        ("L2", VERMILLION, adamx.chain(decay, scaling, step)),
        ("decoupled", BLUE, adamx.chain(scaling, decay, step)),
    ):
        start = jnp.full((50, 2), 5.0)
        mean = weights(tx, start, jnp.asarray(noise, jnp.float32)).mean(axis=1)
        axes.plot(mean[:, 0], color=color, label=f"{label}, large gradients")
        axes.plot(mean[:, 1], color=color, ls="--", label=f"{label}, small gradients")
    axes.plot(5 * 0.995 ** np.arange(401), ":", color="black", label=r"$(1-\alpha\lambda)^t\, w_0$")
    title = r"$w_t = (1-\alpha\lambda)\, w_{t-1} - \alpha\, u_t$, the mean of 50 weights"
    axes.set(title=title, xlabel="t", ylim=(0, 6.9))
    axes.legend(ncols=3, loc="upper right", fontsize=9)


def mixed_precision(axes: Axes) -> None:
    """Steps of 1e-3: float32, bfloat16 alone, and bfloat16 with masters."""
    tx, steps = adamx.sgd(1e-3), 40
    for label, color, style, start, run in (
        ("float32", GREY, "-", jnp.ones(1), tx),
        ("bfloat16 alone", VERMILLION, "-", jnp.ones(1, jnp.bfloat16), tx),
        ("bfloat16 with masters", BLUE, ".", jnp.ones(1, jnp.bfloat16), adamx.master_weights(tx)),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", adamx.PrecisionWarning)  # the picture shows its point
            way = weights(run, start, jnp.ones((steps, 1), start.dtype))
        axes.plot(way[:, 0], style, color=color, label=label)
    axes.set(title=r"$w_t = w_{t-1} - 10^{-3}$", xlabel="t")
    axes.legend()


# --------------------------------------------------------------------------- the compositions


def momentum(axes: Axes) -> None:
    """Momentum and gradient descent with the same rate."""
    rate = 0.09
    title = r"Momentum: $w_{t+1} = w_t - \alpha\, m_t$"
    ways = descend(adamx.sgd(rate), 40), descend(adamx.momentum(rate, 0.8), 40)
    valley(axes, title, ("gradient descent", GREY, ways[0]), (r"$\beta = 0.8$", BLUE, ways[1]))


def rmsprop(axes: Axes) -> None:
    """RMSprop and gradient descent."""
    title = r"RMSprop: $w_t = w_{t-1} - \alpha\, g_t\,/\,(\sqrt{v_t} + \varepsilon)$"
    ways = descend(adamx.sgd(0.045), 40), descend(adamx.rmsprop(0.06), 40)
    valley(axes, title, ("gradient descent", GREY, ways[0]), ("RMSprop", VERMILLION, ways[1]))


def adam(axes: Axes) -> None:
    """Adam with and without bias correction."""
    title = r"Adam: $w_t = w_{t-1} - \alpha\, \hat m_t\,/\,(\sqrt{\hat v_t} + \varepsilon)$"
    uncorrected = adamx.chain(
        adamx.rms_scaling(adamx.ema(0.9), second_moment=adamx.ema_of_squares(0.999)),
        adamx.scale_by_learning_rate(0.08),
    )
    ways = descend(uncorrected, 60), descend(adamx.adam(0.08), 60)
    valley(axes, title, ("without correction", GREY, ways[0]), ("Adam", GREEN, ways[1]))


def adamw(axes: Axes) -> None:
    """AdamW with a large decay, and Adam: the decay pulls towards zero."""
    title = r"AdamW: $w_t = (1-\alpha\lambda)\,w_{t-1} - \alpha\, \hat m_t\,/\,(\ldots)$"
    ways = descend(adamx.adam(0.08), 80), descend(adamx.adamw(0.08, weight_decay=0.2), 80)
    valley(axes, title, ("Adam", GREY, ways[0]), (r"AdamW, $\lambda = 0.2$", BLUE, ways[1]))
    axes.plot(0, 0, "+", color="black", ms=12, mew=2)


PICTURES = (
    *(ema, ema_of_squares, bias_correction, rms_scaling, weight_decay, mixed_precision),
    *(momentum, rmsprop, adam, adamw),
)


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Draw the pictures.

    Args:
        argv: the command line; None means the program's own.

    Returns:
        The files.
    """
    parser = argparse.ArgumentParser(description="Draw the pictures of the tutorial.")
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        type=Path,
        default=".",
        help="for the files tutorial_NAME.png (default: the current folder)",
    )
    options = parser.parse_args(argv)
    if not options.output.is_dir():
        parser.error(f"argument --output: there is no folder {str(options.output)!r}")
    paths = []
    with mpl.rc_context(STYLE):
        for draw in PICTURES:
            figure = Figure(figsize=(8.4, 3.8), layout="constrained")
            draw(figure.subplots())
            path = options.output / f"tutorial_{draw.__name__}.png"
            figure.savefig(path, dpi=90)
            print(f"Picture: {path}")
            paths.append(path)
    return paths


if __name__ == "__main__":
    main()
