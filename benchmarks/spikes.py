"""What bad batches cost a transformer: plain, clipped, and with the steps skipped.

    python benchmarks/spikes.py --markdown docs/around-the-update.md

The character transformer of `widths.py` learns the source of Python's standard library. In one step
of fifty its batch is bad: the characters are random, or the gradients are a thousand times too
large. All methods see the same batches, and the same without the bad ones.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib as mpl
import numpy as np
import optax
from matplotlib.figure import Figure
from report import Table, section, write_section
from rich.console import Console
from rich.progress import track
from widths import CHARACTERS, STYLE, batches, first_weights, loss, spread
from widths import Settings as Model

import adamx


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is trained.

    Attributes:
        model: the transformer and its batches.
        rate: the learning rate at its highest.
        good: how many steps at the start have no bad batch.
        often: one step of how many is bad after them, on average.
        factor: of a bad gradient.
        window: of `skip_spikes`.
        warmup: of the two clips that compare with the past.
    """

    model: Model
    rate: float = 2.0**-7
    good: int = 50
    often: int = 50
    factor: float = 1000.0
    window: int = 64
    warmup: int = 25


FULL = Settings(Model((64,), (), seeds=5, steps=300))
SMALL = Model((16,), (), seeds=2, steps=12, layers=1, batch=2, unseen=4)
QUICK = Settings(SMALL, good=6, often=3, window=4, warmup=2)
CLEAN, RANDOM, LARGE = "no bad batch", "random characters", "1000 times the gradient"


def methods(settings: Settings) -> dict[str, Callable[[Any], Any]]:
    """Return what is put around Adam, by name."""
    warmup = settings.warmup
    return {
        "adam": lambda adam: adam,
        "clip_by_global_norm(1.0)": lambda adam: adamx.chain(adamx.clip_by_global_norm(1.0), adam),
        "clip_to_history": lambda adam: adamx.chain(adamx.clip_to_history(warmup=warmup), adam),
        "clip_by_zscore": lambda adam: adamx.chain(adamx.clip_by_zscore(warmup=warmup), adam),
        "skip_spikes": lambda adam: adamx.skip_spikes(adam, settings.window),
    }


@dataclasses.dataclass(frozen=True)
class Runs:
    """The runs of one method with one kind of bad batches.

    Attributes:
        losses: of the batches, [seeds, steps]; NaN where the batch was bad.
        after: held-out losses after the last step, [seeds].
        skipped: steps, [seeds].
    """

    losses: np.ndarray
    after: np.ndarray
    skipped: np.ndarray


def planted(settings: Settings, seed: int) -> np.ndarray:
    """Say of each step whether its batch is bad."""
    rng = np.random.default_rng([seed, 2])
    bad = rng.uniform(size=settings.model.steps) < 1 / settings.often
    bad[: settings.good] = False
    return bad


def trained(around: Callable[[Any], Any], settings: Settings) -> dict[str, Runs]:
    """Return the runs of a method with each kind of bad batches."""
    model = settings.model
    warm = model.steps // 10
    rates = optax.warmup_cosine_decay_schedule(0.0, settings.rate, warm, model.steps)
    tx = around(adamx.adam(rates))

    @jax.jit
    def train(params: Any, seen: jax.Array, factors: jax.Array, unseen: jax.Array) -> Any:
        def step(carry: Any, batch: Any) -> tuple[Any, jax.Array]:
            (params, state), (windows, factor) = carry, batch
            value, grads = jax.value_and_grad(loss)(params, windows, model.size)
            grads = jax.tree.map(lambda g: factor * g, grads)
            updates, state = tx.update(grads, state, params, loss=value)
            return (adamx.apply_updates(params, updates), state), value

        (params, state), losses = jax.lax.scan(step, (params, tx.init(params)), (seen, factors))
        return losses, loss(params, unseen, model.size), state.get("spikes", 0)

    found: dict[str, list[Any]] = {CLEAN: [], RANDOM: [], LARGE: []}
    for seed in range(model.seeds):
        params = first_weights(model.widths[0], model, seed, None)
        (seen, unseen), bad = batches(model, seed), planted(settings, seed)
        noise = np.random.default_rng([seed, 3]).integers(0, CHARACTERS, seen.shape)
        for kind, runs in found.items():
            windows = np.where(bad[:, None, None] & (kind == RANDOM), noise, seen).astype(np.int32)
            factors = np.where(bad & (kind == LARGE), settings.factor, 1.0).astype(np.float32)
            losses, after, skipped = train(params, windows, factors, unseen)
            good = np.where(bad & (kind == RANDOM), np.nan, losses)
            runs.append((good, float(after), int(skipped)))
    return {kind: Runs(*map(np.array, zip(*runs, strict=True))) for kind, runs in found.items()}


# ------------------------------------------------------------------------------------- the report


def table(found: dict[str, dict[str, Runs]], settings: Settings) -> Table:
    """Return the held-out losses of each method, and how many steps it skipped."""
    model = settings.model
    rows = [
        [
            f"`{method}`",
            *(spread(runs.after) for runs in kinds.values()),
            " / ".join(f"{runs.skipped.mean():.1f}" for runs in kinds.values()),
        ]
        for method, kinds in found.items()
    ]
    bad = np.mean([planted(settings, seed).sum() for seed in range(model.seeds)])
    note = (
        f"A transformer of {model.layers} layers of width {model.widths[0]} on characters of "
        f"Python's standard library, {model.steps} steps of Adam on {model.batch} windows of "
        f"{model.context} characters, learning rate 2⁻⁷, cosine to zero after a warmup. After step "
        f"{settings.good} one batch of {settings.often} is bad, {bad:.1f} in a run. Losses are of "
        "held-out text after the last step, in nats a character: mean and standard deviation of "
        f"{model.seeds} seeds. Histories: window {settings.window}, warm-up {settings.warmup}. The "
        "command: `python benchmarks/spikes.py`."
    )
    return Table("Bad batches", note, ["around Adam", CLEAN, RANDOM, LARGE, "steps skipped"], rows)


def draw(found: dict[str, dict[str, Runs]], settings: Settings, path: Path) -> None:
    """Draw the loss over the steps, a curve for each method, with each kind of bad batches."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        both = figure.subplots(1, 2, sharey=True)
        for axes, kind in zip(both, (RANDOM, LARGE), strict=True):
            for (method, kinds), color in zip(found.items(), COLORS, strict=True):
                mean = smooth(kinds[kind].losses)
                axes.plot(np.arange(len(mean)), mean, color=color, lw=2, label=method)
            axes.set(title=kind, xlabel="step")
        both[0].set(ylabel="loss of the good batches, nats a character")
        both[1].legend(title=f"mean of {settings.model.seeds} seeds and 10 steps")
        figure.savefig(path, dpi=100)


def smooth(x: np.ndarray, number: int = 10) -> np.ndarray:
    """Return the means of all seeds' last ten values, or of those there are, NaN aside.

    Example:
        >>> smooth(np.array([[1.0, 3.0, 5.0]]), 2).tolist()
        [1.0, 2.0, 4.0]
    """
    steps = range(1, x.shape[1] + 1)
    return np.array([np.nanmean(x[:, max(step - number, 0) : step]) for step in steps])


COLORS = ("#555555", "#E69F00", "#56B4E9", "#0072B2", "#D55E00")


def main(argv: Sequence[str] | None = None) -> Table:
    """Run the command; `argv` is the command line, None means the program's own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small and short, in seconds")
    parser.add_argument("--output", type=Path, default=Path("spikes.png"), help="the picture")
    parser.add_argument("--markdown", type=Path, help="a page with <!-- spikes --> to write into")
    options = parser.parse_args(argv)
    settings = QUICK if options.quick else FULL
    if options.markdown and not section(options.markdown, "spikes"):
        parser.error(f"argument --markdown: no section <!-- spikes --> in {options.markdown}")
    around = methods(settings)
    found = {name: trained(around[name], settings) for name in track(around, "bad batches")}
    made = table(found, settings)
    Console().print(made.rich())
    draw(found, settings, options.output)
    if options.markdown:
        write_section(options.markdown, "spikes", made)
    return made


if __name__ == "__main__":
    main()
