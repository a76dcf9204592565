"""Low precision: one small transformer in seven precisions, and the bytes and the loss of each.

    python examples/papers/low_precision.py
    python examples/papers/low_precision.py --quick

Zamirai et al., "Revisiting BFloat16 Training" (2020), find that training in 16 bits is worse since
weights are rounded to nearest, and remedy this by rounding them stochastically, or by keeping the
missing bits. Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (2022), keep the
moments in a byte each. Here a character model learns the source of Python's standard library. All
runs of a seed start from the same weights, which bfloat16 holds exactly, and get the same batches
and learning rates. The forward pass widens the parameters to float32, so that the runs differ only
in how parameters and optimizer state are kept between the steps:

    f32                         float32, the reference
    bf16, optax.adamw           bfloat16 parameters and moments, rounded to nearest
    bf16, master_weights        bfloat16 parameters, an int16 each of missing bits, f32 moments
    bf16, stochastic rounding   bfloat16 parameters, rounded up or down at random, f32 moments
    f32, packed16               float32 parameters, both moments in 4 bytes
    f32, packed8                float32 parameters, both moments in 2 bytes
    bf16, remainder8 + packed8  bfloat16 parameters, an int8 each, both moments in 2 bytes
"""

from __future__ import annotations

import dataclasses
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
import shared
from jax.typing import DTypeLike
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import adamx

NAME = Path(__file__).stem


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is trained.

    Attributes:
        seeds: how many; a seed decides on first weights and batches.
        steps: of each run.
        layers: of the transformer.
        batch: windows of the text in a step.
    """

    seeds: int
    steps: int
    layers: int
    batch: int


FULL = Size(seeds=5, steps=500, layers=2, batch=16)
QUICK = Size(seeds=2, steps=12, layers=1, batch=4)
MARKS = 25  # how often the held-out loss is measured
NO_DIFFERENCE = 0.01  # of float32's loss: smaller differences count as none

# ----------------------------------------------------------------------------------- the seven runs


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to keep parameters and optimizer state.

    Attributes:
        color: in the picture.
        dtype: of the parameters.
        make: makes the optimizer from the learning rate.
        rounding: of the parameters, for `adamx.make_step`.
    """

    color: str
    dtype: DTypeLike
    make: Callable[[optax.Schedule], optax.GradientTransformation]
    rounding: str = "nearest"


F32, BF16 = jnp.float32, jnp.bfloat16
REFERENCE, NEAREST = "f32", "bf16, optax.adamw"
VARIANTS = {
    REFERENCE: Variant("#000000", F32, adamx.adamw),
    NEAREST: Variant("#D55E00", BF16, optax.adamw),
    "bf16, master_weights": Variant(
        "#0072B2", BF16, lambda rate: adamx.master_weights(adamx.adamw(rate))
    ),
    "bf16, stochastic rounding": Variant("#56B4E9", BF16, adamx.adamw, rounding="stochastic"),
    "f32, packed16": Variant("#E69F00", F32, lambda rate: adamx.adamw(rate, moments="packed16")),
    "f32, packed8": Variant("#CC79A7", F32, lambda rate: adamx.adamw(rate, moments="packed8")),
    "bf16, remainder8 + packed8": Variant(
        "#009E73",
        BF16,
        lambda rate: adamx.master_weights(adamx.adamw(rate, moments="packed8"), keep="remainder8"),
    ),
}

# ------------------------------------------------------------------------- the text and the model

CHARACTERS, CONTEXT = 128, 64
WIDTH, HEADS = 64, 4
LEARNING_RATE = 3e-3


@dataclasses.dataclass(frozen=True)
class Data:
    """Windows of the text: CONTEXT characters and the one that follows each.

    Attributes:
        batches: one for each step, of shape (steps, batch, CONTEXT + 1).
        held_out: from the last tenth of the text, which no batch overlaps.
    """

    batches: np.ndarray
    held_out: np.ndarray


def load(size: Size, seed: int) -> Data:
    """Cut windows out of the first megabyte of the standard library, in alphabetical order."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(source.read_bytes() for source in sources)[:1_000_000]
    if len(text) < 100_000:
        raise SystemExit("low_precision: this Python comes without the source of its library")
    codes = np.frombuffer(text, np.uint8).clip(max=CHARACTERS - 1).astype(np.int32)
    train, held_out = np.split(codes, [len(codes) * 9 // 10])
    rng = np.random.default_rng(seed)

    def windows(codes: np.ndarray, *shape: int) -> np.ndarray:
        starts = rng.integers(len(codes) - CONTEXT, size=(*shape, 1))
        return codes[starts + np.arange(CONTEXT + 1)]

    return Data(windows(train, size.steps, size.batch), windows(held_out, 128))


def first_weights(size: Size, seed: int) -> Any:
    """Draw the weights; they are bfloat16 numbers, so that every run can start from them."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int, scale: float) -> np.ndarray:
        return (scale * rng.normal(size=shape)).astype(BF16)

    def block() -> dict[str, np.ndarray]:
        outer, inner = WIDTH**-0.5, (2 * size.layers) ** -0.5
        return {
            "norm1": np.ones(WIDTH, BF16),
            "qkv": draw(WIDTH, 3 * WIDTH, scale=outer),
            "mix": draw(WIDTH, WIDTH, scale=outer * inner),
            "norm2": np.ones(WIDTH, BF16),
            "up": draw(WIDTH, 4 * WIDTH, scale=outer),
            "down": draw(4 * WIDTH, WIDTH, scale=outer * inner / 2),
        }

    return {
        "embedding": draw(CHARACTERS, WIDTH, scale=0.02),
        "position": draw(CONTEXT, WIDTH, scale=0.02),
        "blocks": [block() for _ in range(size.layers)],
        "norm": np.ones(WIDTH, BF16),
    }


def normed(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Return x at root mean square one, times the weight."""
    return weight * x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6)


def loss(params: Any, windows: jax.Array) -> jax.Array:
    """Return the mean cross-entropy of each next character, in nats."""
    params = jax.tree.map(lambda weight: weight.astype(F32), params)
    x = params["embedding"][windows[:, :-1]] + params["position"]
    for block in params["blocks"]:
        qkv = (normed(x, block["norm1"]) @ block["qkv"]).reshape(*x.shape[:2], 3, HEADS, -1)
        query, key, value = jnp.moveaxis(qkv, 2, 0)
        seen = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + seen.reshape(x.shape) @ block["mix"]
        x = x + jax.nn.gelu(normed(x, block["norm2"]) @ block["up"]) @ block["down"]
    logits = normed(x, params["norm"]) @ params["embedding"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


held_out_loss = jax.jit(loss)
gradient = jax.jit(jax.grad(loss))

# ---------------------------------------------------------------------------------------- training


@dataclasses.dataclass(frozen=True)
class Run:
    """The results of one variant and one seed.

    Attributes:
        params: the parameters after the last step.
        state: the optimizer's state.
        losses: the held-out losses after the marked steps, of shape (marks,).
    """

    params: Any
    state: Any
    losses: np.ndarray

    @property
    def bytes_per_parameter(self) -> tuple[float, float]:
        """The bytes of the parameters, and those of the optimizer's state."""
        count = sum(x.size for x in jax.tree.leaves(self.params))
        params, state = (
            sum(x.nbytes for x in jax.tree.leaves(t)) for t in (self.params, self.state)
        )
        return params / count, state / count


def schedule(size: Size) -> optax.Schedule:
    """Return the learning rate: up in a tenth of the steps, then down to zero along a cosine."""
    return optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, size.steps // 10, size.steps)


def marks(size: Size) -> list[int]:
    """Return the steps after which the held-out loss is measured, counted from 1."""
    return sorted({*np.linspace(0, size.steps, MARKS + 1).astype(int).tolist()} - {0})


def train(variant: Variant, size: Size, tell: Callable[[], Any]) -> list[Run]:
    """Train the model from every seed; call `tell` after each step."""
    tx = variant.make(schedule(size))
    step = adamx.make_step(tx, rounding=variant.rounding)
    init = jax.jit(step.init)
    runs = []
    for seed in range(size.seeds):
        data, losses = load(size, seed), []
        params = jax.tree.map(
            lambda weight: jnp.array(weight, variant.dtype), first_weights(size, seed)
        )
        state = init(params)
        for number, windows in enumerate(data.batches, 1):
            params, state = step(params, state, gradient(params, windows))
            if number in marks(size):
                losses.append(float(held_out_loss(params, data.held_out)))
            tell()
        runs.append(Run(params, state, np.array(losses)))
    return runs


# ------------------------------------------------------------------------------------- the results


@dataclasses.dataclass(frozen=True)
class Result:
    """The runs, and what they say of the papers' claim.

    Attributes:
        runs: of each variant, one for each seed.
        finding: the papers' claim, and whether it held.
    """

    runs: dict[str, list[Run]]
    finding: shared.Finding


def curves(runs: Sequence[Run]) -> np.ndarray:
    """Return the held-out losses of the seeds, of shape (marks, seeds)."""
    return np.stack([run.losses for run in runs], axis=-1)


def judge(runs: dict[str, list[Run]], size: Size) -> Result:
    """Compare the last held-out losses with those of float32, seed by seed."""
    last = {name: curves(found)[-1] for name, found in runs.items()}
    reference = last[REFERENCE]

    def gap(name: str) -> float:
        return float((last[name] - reference).mean() / reference.mean())

    above = gap(NEAREST) > NO_DIFFERENCE and shared.clearly_below(reference, last[NEAREST])
    others = [name for name in runs if name not in (REFERENCE, NEAREST)]
    parts = [
        (f"{NEAREST}, all of it rounded to nearest, ends clearly above f32", NEAREST, bool(above)),
        *((f"{x} ends no higher than f32", x, gap(x) < NO_DIFFERENCE) for x in others),
    ]
    finding = shared.Finding(
        title="Low precision: bfloat16 weights, moments in 4 and 2 bytes",
        setting=(
            f"A transformer of {size.layers} layers and width {WIDTH} on characters of the source "
            f"of Python's standard library; {size.seeds} seeds, {size.steps} steps of "
            f"{size.batch} windows of {CONTEXT} characters. Losses are of held-out text, in nats "
            f"a character. Differences below {NO_DIFFERENCE:.0%} count as none."
        ),
        claim=(
            "With weights in bfloat16, rounding to nearest makes training worse, while rounding "
            "stochastically or keeping the missing bits trains as well as 32 bits (Zamirai et "
            "al.), and so do moments of 8 bits (Dettmers et al.)."
        ),
        parts=tuple((f"{said}: {gap(name):+.1%}", held) for said, name, held in parts),
        columns=("run", "parameters", "bytes a parameter", "held-out loss", "minus f32's"),
        rows=tuple(
            (
                name,
                jnp.dtype(VARIANTS[name].dtype).name,
                f"{sum(found[0].bytes_per_parameter):.1f}",
                shared.with_spread(last[name], 3),
                shared.with_spread(last[name] - reference, 3),
            )
            for name, found in runs.items()
        ),
    )
    return Result(runs, finding)


def draw(result: Result, size: Size, path: Path) -> None:
    """Draw the bytes, the losses, and how far they are from float32's."""
    with mpl.rc_context(shared.STYLE):
        figure = Figure(figsize=(13, 4.8), layout="constrained")
        sizes, losses, gaps = figure.subplots(1, 3, width_ratios=(0.85, 1, 1))
        figure.get_layout_engine().set(wspace=0.05)
        title = "One transformer in seven precisions, from the same start, on the same batches"
        figure.suptitle(title + "\n", fontsize=16, x=0.008, ha="left")
        draw_sizes(sizes, result.runs)
        steps, reference = marks(size), curves(result.runs[REFERENCE])
        for name, runs in result.runs.items():
            color, found = VARIANTS[name].color, curves(runs)
            look = {"color": color, "lw": 4 if name == REFERENCE else 2}
            losses.plot(steps, found.mean(axis=-1), **look)
            gap = found - reference
            gaps.plot(steps, gap.mean(axis=-1), **look)
            band = {"color": color, "alpha": 0.12, "lw": 0}
            gaps.fill_between(steps, gap.min(axis=-1), gap.max(axis=-1), **band)
            if name == NEAREST:
                say = {"color": color, "textcoords": "offset points", "ha": "right"}
                end = gap[-1].mean()
                gaps.annotate(f"{name}: {end:+.3f}", (steps[-1], end), (0, 10), **say)
        late = reference[len(steps) // 6 :].mean(axis=-1)
        losses.set(title="Held-out loss, nats a character", xlabel="step")
        losses.set(ylim=(late.min() - 0.05, late.max() + 0.15))
        gaps.set(title="Less that of f32; bands: all seeds", xlabel="step")
        gaps.margins(y=0.1)
        for axes in (losses, gaps):
            axes.set(xlim=(0, size.steps * 1.02))
        figure.savefig(path, dpi=100)


def draw_sizes(axes: Axes, runs: dict[str, list[Run]]) -> None:
    """Draw a bar for each variant, which is also the legend of its curves."""
    note = {"textcoords": "offset points", "va": "center"}
    for place, (name, found) in enumerate(runs.items()):
        color, (own, state) = VARIANTS[name].color, found[0].bytes_per_parameter
        axes.barh(place, own, height=0.4, color=color)
        axes.barh(place, state, height=0.4, left=own, color=color, alpha=0.4)
        axes.annotate(name, (0, place), (0, 16), **note)
        axes.annotate(f"{own + state:.0f}", (own + state, place), (5, 0), weight="bold", **note)
    axes.set(title="Bytes per parameter", xlim=(0, 13.4), xticks=range(0, 13, 2))
    axes.set(ylim=(len(runs) - 0.7, -0.8), yticks=[], xlabel="parameters; paler: optimizer state")
    axes.spines.left.set_visible(False)


def main(argv: Sequence[str] | None = None) -> Result:
    """Run the example; `argv` is the command line, None means the program's own."""
    description = "One small transformer in seven precisions: held-out loss, and bytes a parameter."
    options = shared.command_line(NAME, description, argv)
    size = QUICK if options.quick else FULL
    runs = {}
    with shared.progress_bars(options) as progress:
        for name, variant in VARIANTS.items():
            bar = progress.add_task(name, total=size.seeds * size.steps)
            runs[name] = train(variant, size, lambda bar=bar: progress.advance(bar))
    result = judge(runs, size)
    draw(result, size, options.output)
    shared.report(NAME, result.finding, options)
    return result


if __name__ == "__main__":
    main()
