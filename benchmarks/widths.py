"""The best learning rate of a transformer at three widths, with and without the rules of muP.

    python benchmarks/widths.py --markdown docs/scaling-up.md

A character transformer learns the source of Python's standard library at each width and each rate.
Without the rules all leaves have that rate, and start from 1 / sqrt(fan-in). With them, their
rates and the standard deviations at the start are those of the narrowest model, times the factors
of `adamx.width_rules`. The narrowest model is the same in both.

Source: Yang, Hu and others (2022), figure 1, https://arxiv.org/abs/2203.03466
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from convergence_tasks import entropy, source
from matplotlib.figure import Figure
from report import Table, section, write_section
from rich.console import Console
from rich.progress import track

import adamx


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is trained.

    Attributes:
        widths: of the models; the first is the narrow one.
        powers: of two: the learning rates.
        seeds: how many; a seed decides on first weights and batches, alike at all rates.
        steps: of each run.
        batch: windows of the text in a step.
        context: characters in a window.
        layers: of the transformer.
        size: of a head of the attention, alike at all widths.
        unseen: windows of the held-out text.
    """

    widths: tuple[int, ...] = (64, 128, 256)
    powers: tuple[int, ...] = tuple(range(-11, -3))
    seeds: int = 3
    steps: int = 150
    batch: int = 8
    context: int = 32
    layers: int = 2
    size: int = 16
    unseen: int = 128


QUICK = Settings((16, 32), (-8, -6), seeds=2, steps=5, layers=1, batch=2, unseen=4)
CHARACTERS = 97
WITHOUT, WITH = "one rate for all leaves", "width_rules"


def shapes(width: int, settings: Settings) -> Any:
    """Return the shapes of a model's parameters."""
    layer = {
        "norm": (2, width),
        "mix": (width, 3 * width),
        "out": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }
    sizes = {
        "embed": (CHARACTERS, width),
        "place": (settings.context, width),
        "layers": [layer] * settings.layers,
        "norm": (width,),
        "head": (width, CHARACTERS),
    }
    shape = lambda size: jax.ShapeDtypeStruct(size, jnp.float32)  # noqa: E731
    return jax.tree.map(shape, sizes, is_leaf=lambda x: isinstance(x, tuple))


def first_weights(width: int, settings: Settings, seed: int, rules: Any) -> Any:
    """Draw the weights: gains are 1, matrices have the standard deviation 1 / sqrt(fan-in).

    With rules this is the narrow model's deviation times `rules.init`.
    """
    rng = np.random.default_rng(seed)
    base = shapes(settings.widths[0] if rules else width, settings)

    def draw(path: Any, like: Any, narrow: Any) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "norm" in name:
            return jnp.ones(like.shape)
        deviation = narrow.shape[0] ** -0.5 * (rules.init[name] if rules else 1.0)
        return jnp.asarray(deviation * rng.standard_normal(like.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes(width, settings), base)


def normed(x: jax.Array, gain: jax.Array) -> jax.Array:
    """Return x at root mean square one, times the gain."""
    return gain * x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def loss(params: Any, windows: jax.Array, size: int) -> jax.Array:
    """Return the mean cross-entropy of each next character, in nats."""
    x = params["embed"][windows[:, :-1]] + params["place"]
    for layer in params["layers"]:
        mixed = normed(x, layer["norm"][0]) @ layer["mix"]
        query, key, value = jnp.split(mixed.reshape(*x.shape[:2], -1, size), 3, axis=2)
        seen = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + seen.reshape(x.shape) @ layer["out"]
        x = x + jax.nn.gelu(normed(x, layer["norm"][1]) @ layer["up"]) @ layer["down"]
    return entropy(normed(x, params["norm"]) @ params["head"], windows[:, 1:])


def batches(settings: Settings, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the windows of each step, and those of the last tenth of the text."""
    text = source(1_000_000)
    cut, window = len(text) * 9 // 10, np.arange(settings.context + 1)
    rng = np.random.default_rng([seed, 1])
    starts = rng.integers(0, cut - len(window), (settings.steps, settings.batch, 1))
    unseen = np.linspace(cut, len(text) - len(window), settings.unseen).astype(int)
    return text[starts + window], text[unseen[:, None] + window]


def losses(width: int, settings: Settings, with_rules: bool) -> np.ndarray:
    """Return the held-out loss after the last step: an array [rates, seeds]; inf if not finite."""
    base = shapes(settings.widths[0], settings)
    rules = adamx.width_rules(base, shapes(width, settings)) if with_rules else None

    @jax.jit
    def train(rate: jax.Array, params: Any, seen: jax.Array, unseen: jax.Array) -> jax.Array:
        warm = settings.steps // 10
        up_and_down = optax.warmup_cosine_decay_schedule(0.0, 1.0, warm, settings.steps)
        tx = adamx.adam(lambda step: rate * up_and_down(step))
        if rules:
            tx = adamx.chain(tx, adamx.scale_by_path(rules.adam))

        def step(carry: Any, windows: jax.Array) -> tuple[Any, None]:
            params, state = carry
            grads = jax.grad(loss)(params, windows, settings.size)
            updates, state = tx.update(grads, state, params)
            return (adamx.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), seen)
        return loss(params, unseen, settings.size)

    found = np.empty((len(settings.powers), settings.seeds))
    for seed in range(settings.seeds):
        params = first_weights(width, settings, seed, rules)
        seen, unseen = batches(settings, seed)
        for i, power in enumerate(settings.powers):
            found[i, seed] = train(jnp.float32(2.0**power), params, seen, unseen)
    return np.where(np.isfinite(found), found, np.inf)


def measured(settings: Settings) -> dict[str, dict[int, np.ndarray]]:
    """Return the losses of each width, without the rules and with them."""
    narrow, *wider = settings.widths
    cases = [(narrow, False), *itertools.product(wider, (False, True))]
    runs = {case: losses(case[0], settings, case[1]) for case in track(cases, "widths")}
    runs[narrow, True] = runs[narrow, False]  # all factors are 1
    return {
        what: {width: runs[width, rules] for width in settings.widths}
        for what, rules in {WITHOUT: False, WITH: True}.items()
    }


# ------------------------------------------------------------------------------------- the report


def table(found: dict[str, dict[int, np.ndarray]], settings: Settings) -> Table:
    """Return the best rates, and what the best rate of the narrow model costs the others."""
    first = settings.powers.index(best(found[WITHOUT][settings.widths[0]], settings))
    rows = []
    for what, losses in found.items():
        every = losses.values()
        at = [settings.powers.index(best(x, settings)) for x in every]
        rows.append([f"{what}: the best rate", *(power(settings.powers[i]) for i in at)])
        rows.append(["loss at that rate", *(spread(x[i]) for x, i in zip(every, at, strict=True))])
        narrow = f"loss at {power(settings.powers[first])}, the best of width {settings.widths[0]}"
        rows.append([narrow, *(spread(x[first]) for x in every)])
    note = (
        f"A transformer of {settings.layers} layers on characters of Python's standard library, "
        f"heads of {settings.size}, {settings.steps} steps of Adam on {settings.batch} windows of "
        f"{settings.context} characters, cosine to zero after a warmup; rates are powers of two. "
        "Losses are of held-out text after the last step, in nats a character: mean and standard "
        f"deviation of {settings.seeds} seeds. The command: `python benchmarks/widths.py`."
    )
    heads = ["", *(f"width {width}" for width in settings.widths)]
    return Table("The best rate at three widths", note, heads, rows)


def best(losses: np.ndarray, settings: Settings) -> int:
    """Return the power of two that has the smallest mean loss."""
    return settings.powers[int(losses.mean(axis=1).argmin())]


def power(exponent: int) -> str:
    """Return a power of two.

    Example:
        >>> power(-10)
        '2⁻¹⁰'
    """
    return "2" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def spread(losses: np.ndarray) -> str:
    """Return mean and standard deviation over the seeds."""
    return f"{losses.mean():.3f} ± {losses.std(ddof=1):.3f}"


def draw(found: dict[str, dict[int, np.ndarray]], settings: Settings, path: Path) -> None:
    """Draw the loss over the rate, a curve for each width, without the rules and with them."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        both = figure.subplots(1, 2, sharey=True)
        for axes, (what, losses) in zip(both, found.items(), strict=True):
            for (width, x), color in zip(losses.items(), COLORS, strict=False):
                means, i = x.mean(axis=1), int(x.mean(axis=1).argmin())
                axes.plot(settings.powers, means, color=color, lw=2, label=f"width {width}")
                axes.fill_between(
                    settings.powers, x.min(axis=1), x.max(axis=1), color=color, alpha=0.15, lw=0
                )
                axes.plot(settings.powers[i], means[i], "o", color=color, ms=9, mec="white")
            axes.set(title=what, xlabel="learning rate", xticks=settings.powers)
            axes.set_xticklabels([f"$2^{{{power}}}$" for power in settings.powers])
        both[0].set(ylabel="held-out loss, nats a character")
        both[1].legend(title=f"dots: the best rates;\nbands: all {settings.seeds} seeds")
        figure.savefig(path, dpi=100)


COLORS = ("#56B4E9", "#0072B2", "#D55E00")
STYLE: Any = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def main(argv: Sequence[str] | None = None) -> Table:
    """Run the command; `argv` is the command line, None means the program's own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small and short, in seconds")
    parser.add_argument("--output", type=Path, default=Path("widths.png"), help="the picture")
    parser.add_argument("--markdown", type=Path, help="a page with <!-- widths --> to write into")
    options = parser.parse_args(argv)
    settings = QUICK if options.quick else Settings()
    if options.markdown and not section(options.markdown, "widths"):
        parser.error(f"argument --markdown: no section <!-- widths --> in {options.markdown}")
    found = measured(settings)
    made = table(found, settings)
    Console().print(made.rich())
    draw(found, settings, options.output)
    if options.markdown:
        write_section(options.markdown, "widths", made)
    return made


if __name__ == "__main__":
    main()
