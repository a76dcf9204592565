"""Which optimizer: every method on three small tasks, each at the best rate of one grid.

    python benchmarks/which.py --markdown docs/which-optimizer.md      [--quick] [--only adamw lion]

All rates and seeds of a method train in one compiled program. The rate with the best mean loss on
validation data is taken; what is told of it was measured on test data. The steps are then timed on
larger matrices, interleaved. Needs `mnist1d`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from convergence_tasks import cast, digits, entropy, shuffled
from measure import Loop, interleave, ratio
from report import Table, elements, normal, tree
from rich.console import Console
from rich.progress import track
from side_by_side import environment
from widths import Settings as Model
from widths import batches, first_weights
from widths import loss as character_loss

import adamx


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is trained.

    Attributes:
        rates: the grid of learning rates.
        seeds: how many of weights and batches.
        steps: of the two classifications.
        model: the transformer and its batches.
        matrix: the shape of each of the two matrices on which a step is timed.
        rounds: how often.
    """

    rates: tuple[float, ...]
    seeds: int
    steps: int
    model: Model
    matrix: tuple[int, int]
    rounds: int


RATES = tuple(float(f"{x:.1e}") for x in np.logspace(-4, 0.5, 10))
FULL = Settings(
    RATES, 5, 400, Model((32,), (), seeds=5, steps=200, layers=1, batch=8, unseen=128, context=32),
    (512, 2048), 15,
)  # fmt: skip
QUICK = Settings(
    RATES[2:8:3], 2, 10, Model((16,), (), seeds=2, steps=6, layers=1, batch=2, unseen=4, context=8),
    (8, 16), 2,
)  # fmt: skip

Schedule = Callable[[jax.Array], jax.Array]
Make = Callable[[Schedule, jax.Array], adamx.Transformation]


def methods() -> dict[str, Make]:
    """Return how each method is made from its schedule and the largest rate, at its defaults."""
    names = """sgd momentum sgdw adagrad rmsprop adam adamw adamax adamaxw nadam
        nadamw amsgrad adabelief radam yogi lion cautious_lion cautious_adamw adan ademamix
        simplified_ademamix adopt laprop adam_atan2 mars lamb adam_mini stable_adamw adafactor
        muon_adamw""".split()
    scheduled = lambda make: lambda schedule, _: make(schedule)  # noqa: E731
    found: dict[str, Make] = {name: scheduled(getattr(adamx, name)) for name in names}
    found["adamc"] = lambda schedule, rate: adamx.adamc(schedule, max_learning_rate=rate)
    found["adamw_independent"] = lambda schedule, rate: adamx.adamw_independent(
        rate, multiplier=lambda step: schedule(step) / rate
    )
    matrices = lambda path, leaf: leaf.ndim > 1  # noqa: ARG005, E731
    found["adamh_adamw"] = scheduled(
        lambda schedule: adamx.by_path(
            {matrices: adamx.chain(adamx.scale_by_adam(), adamx.hyperball(schedule))},
            default=adamx.adamw(schedule),
        )
    )
    found["schedule_free_adamw"] = lambda _, rate: adamx.schedule_free_adamw(rate)
    return found


@dataclasses.dataclass(frozen=True)
class Task:
    """Something to learn.

    Attributes:
        title: its name.
        note: what is trained, on what.
        measure: what is told of the test data.
        steps: how many.
        better: 1 if more of the measure is better, -1 if less is.
        params: the first weights, from a seed.
        batches: the batches of all steps, from a seed.
        loss: of (params, batch).
        validation: the loss by which the rate is chosen.
        test: the measure.
    """

    title: str
    note: str
    measure: str
    steps: int
    better: int
    params: Callable[[int], Any]
    batches: Callable[[int], Any]
    loss: Callable[[Any, Any], jax.Array]
    validation: Callable[[Any], jax.Array]
    test: Callable[[Any], jax.Array]


def classification(
    title: str, note: str, parts: Sequence[Any], sizes: Sequence[int], settings: Settings
) -> Task:
    """Return a task for a network of fully connected layers.

    Args:
        title: of the task.
        note: what it is.
        parts: inputs and labels for training, validation and test.
        sizes: of the layers.
        settings: of the measurement.
    """
    parts = [(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32)) for x, y in parts]
    train, validation, test = parts

    def params(seed: int) -> Any:
        rng = np.random.default_rng(seed)
        layers = [
            {"w": rng.normal(0, (2 / n) ** 0.5, (n, m)), "b": np.zeros(m)}
            for n, m in itertools.pairwise(sizes)
        ]
        return cast(layers, np.float32)

    def logits(layers: Any, x: jax.Array) -> jax.Array:
        for layer in layers[:-1]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        return x @ layers[-1]["w"] + layers[-1]["b"]

    def loss(layers: Any, batch: Any) -> jax.Array:
        return entropy(logits(layers, batch[0]), batch[1])

    def drawn(seed: int) -> Any:
        rows = shuffled(seed, 0, settings.steps, 64, len(train[1]))
        return train[0][rows], train[1][rows]

    def accuracy(layers: Any) -> jax.Array:
        return 100 * jnp.mean(jnp.argmax(logits(layers, test[0]), -1) == test[1])

    return Task(
        title, note, "accuracy, %", settings.steps, 1, params, drawn, loss,
        lambda layers: loss(layers, validation), accuracy,
    )  # fmt: skip


def digits_task(settings: Settings) -> Task:
    """Return scikit-learn's digits."""
    images, labels = digits()
    parts = [(images[a:b], labels[a:b]) for a, b in ((0, 1077), (1077, 1437), (1437, None))]
    note = f"64-128-10 on scikit-learn's digits, {settings.steps} batches of 64"
    return classification("Digits", note, parts, (64, 128, 10), settings)


def mnist1d_task(settings: Settings) -> Task:
    """Return MNIST-1D, which its package generates."""
    from mnist1d.data import get_dataset_args, make_dataset

    made = make_dataset(get_dataset_args())
    x, y = made["x"], made["y"]
    parts = [(x[:3000], y[:3000]), (x[3000:], y[3000:]), (made["x_test"], made["y_test"])]
    note = f"40-100-100-10 on MNIST-1D, {settings.steps} batches of 64"
    return classification("MNIST-1D", note, parts, (40, 100, 100, 10), settings)


def characters(settings: Settings) -> Task:
    """Return the transformer of widths.py; half of what it did not see chooses the rate."""
    model = settings.model
    unseen = np.asarray(batches(model, 0)[1])
    note = (
        f"a transformer of {model.layers} layer, width {model.widths[0]} and context "
        f"{model.context} on Python's standard library, {model.steps} batches of {model.batch}"
    )

    def held_out(part: slice) -> Callable[[Any], jax.Array]:
        return lambda params: character_loss(params, jnp.asarray(unseen[part]), model.size)

    return Task(
        "Characters", note, "loss, nats", model.steps, -1,
        lambda seed: first_weights(model.widths[0], model, seed, None),
        lambda seed: batches(model, seed)[0],
        lambda params, windows: character_loss(params, windows, model.size),
        held_out(slice(0, None, 2)), held_out(slice(1, None, 2)),
    )  # fmt: skip


TASKS = (digits_task, mnist1d_task, characters)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a method did on a task.

    Attributes:
        validation: losses, [rates, seeds]; infinite where a run did not stay finite.
        test: the measure, [rates, seeds].
        state: bytes a parameter.
    """

    validation: np.ndarray
    test: np.ndarray
    state: float

    @property
    def best(self) -> int:
        """The number of the rate with the best mean loss on validation data."""
        return int(np.argmin(self.validation.mean(1)))


def trained(make: Make, task: Task, settings: Settings) -> Result:
    """Train with all rates and seeds in one program."""
    warm = max(1, task.steps // 10)
    up_and_down = optax.warmup_cosine_decay_schedule(0.0, 1.0, warm, task.steps)

    def run(rate: jax.Array, params: Any, batches: Any) -> tuple[jax.Array, jax.Array]:
        tx = make(lambda step: rate * up_and_down(step), rate)

        def step(carry: Any, batch: Any) -> tuple[Any, None]:
            params, state = carry
            updates, state = tx.update(jax.grad(task.loss)(params, batch), state, params)
            return (adamx.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), batches)
        if "weight_sum" in state:
            params = adamx.schedule_free_eval_params(state, params)
        return task.validation(params), task.test(params)

    stack = lambda draw: jax.tree.map(lambda *x: jnp.stack(x), *map(draw, range(settings.seeds)))  # noqa: E731
    over_seeds = jax.vmap(run, in_axes=(None, 0, 0))
    arguments = jnp.asarray(settings.rates), stack(task.params), stack(task.batches)
    program = jax.jit(jax.vmap(over_seeds, in_axes=(0, None, None)))
    validation, test = map(np.asarray, program(*arguments))
    like = task.params(0)
    tx = make(lambda step: 0.1 * up_and_down(step), jnp.float32(0.1))
    state = jax.eval_shape(tx.init, like)
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / elements(like)
    finite = np.where(np.isfinite(validation), validation, np.inf)
    return Result(finite, test, held)


def step_times(chosen: Mapping[str, Make], settings: Settings) -> dict[str, float]:
    """Return the time of each method's step, in place, as a multiple of AdamW's."""
    like = tree([settings.matrix], 2)
    timed = dict(chosen) | {"adamw": methods()["adamw"]}

    def loop(make: Make) -> Loop:
        tx = make(lambda step: jnp.float32(1e-6) + 0 * step, jnp.float32(1e-6))
        params = normal(like, 0)
        return Loop(adamx.make_step(tx), (params, tx.init(params)), normal(like, 1))

    candidates = {name: loop(make) for name, make in timed.items()}
    times = interleave(candidates, rounds=settings.rounds, seed=0)
    return {name: ratio(times[name], times["adamw"]).median for name in chosen}


def cell(result: Result, settings: Settings) -> str:
    """Return mean and spread over the seeds at the best rate."""
    values = result.test[result.best]
    digits = 3 if values.mean() < 10 else 1
    edge = "*" if result.best in (0, len(settings.rates) - 1) else ""
    return (
        f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}, "
        f"{settings.rates[result.best]:g}{edge}"
    )


def score(results: Mapping[str, Mapping[str, Result]], tasks: Sequence[Task], name: str) -> float:
    """Return a method's mean place on the tasks, 1 where it is the best."""
    places = []
    for task in tasks:
        means = {
            key: -task.better * found[task.title].test[found[task.title].best].mean()
            for key, found in results.items()
        }
        places.append(1 + sum(x < means[name] for x in means.values()))
    return float(np.mean(places))


def table(
    results: Mapping[str, Mapping[str, Result]],
    times: Mapping[str, float],
    tasks: Sequence[Task],
    settings: Settings,
) -> Table:
    """Return a row for each method, the best mean place first."""
    places = {name: score(results, tasks, name) for name in results}
    rows = []
    for name in sorted(results, key=lambda key: places[key]):
        found = results[name]
        rows.append([
            name,
            f"{places[name]:.1f}",
            *(cell(found[task.title], settings) for task in tasks),
            f"{found[tasks[-1].title].state:.2f}",
            f"{times[name]:.2f}",
        ])  # fmt: skip
    heads = [f"{task.title}: {task.measure}, and best rate" for task in tasks]
    columns = ["method", "mean place", *heads, "state, bytes/param", "time / adamw"]
    return Table("Every method at its best rate", note(tasks, settings), columns, rows)


def note(tasks: Sequence[Task], settings: Settings) -> str:
    """Return what the table shows."""
    runs = "; ".join(f"{task.title}: {task.note}" for task in tasks)
    grid = ", ".join(f"{x:g}" for x in settings.rates)
    return (
        f"Mean ± standard deviation over {settings.seeds} seeds on test data, and the rate: that "
        f"of {grid} with the least mean loss on validation data; a * marks an end of this grid. "
        "Each rate is warmed up over a tenth of the steps and falls to 0 along a cosine, but for "
        "schedule_free_adamw, which keeps it. All other hyperparameters are the defaults. "
        f"{runs}. The bytes are the last task's. A step is timed in place on two matrices of "
        f"{settings.matrix[0]} x {settings.matrix[1]}: the median of {settings.rounds} ratios to "
        "AdamW's in the same round."
    )


PAGE = """# Which optimizer

Start with `adamw`, and change it for a reason: fewer bytes (`moments="packed8"`, `adafactor`,
`adam_mini`, `lion`; [low precision](low-precision.md)), steps that blow up (`stable_adamw`, clips,
`skip_spikes`; [around the update](around-the-update.md)), no schedule (`schedule_free_adamw`), or
large matrices (`muon_adamw`; `hyperball`, in the table below as adamh_adamw: AdamH for arrays of
two axes or more, AdamW for the others). [The family](family.md) has each method's formula, and the
bytes that its step moves.

Written by `python benchmarks/which.py --markdown docs/which-optimizer.md`, not by hand.

{facts}

The three tasks (scikit-learn's digits, [MNIST-1D](https://github.com/greydanus/mnist1d), and
characters of Python's standard library) are small, short and easy. They show that every method
learns, and which rates suit it. They do not show which is the best for a large model: there the
batch, the length of the run, the decay and the architecture decide, and a step's time is small
beside the gradient's. Methods whose means differ by less than their spread are equal here. Muon,
LAMB, Lion and Adafactor were made for sizes that do not occur here.

*mean place* is the mean of a method's places on the three tasks by its test result, 1 for the best.
Beside each result is the rate with which it was reached.

{table}
"""


def main(argv: Sequence[str] | None = None) -> Table:
    """Run the command; `argv` is the command line, None means the program's own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small and short")
    parser.add_argument("--only", nargs="+", help="names of methods")
    parser.add_argument("--markdown", type=Path, help="write the page to this file")
    options = parser.parse_args(argv)
    settings, every = (QUICK if options.quick else FULL), methods()
    if unknown := sorted(set(options.only or ()) - every.keys()):
        parser.error(f"argument --only: no method is called {unknown[0]!r}")
    chosen = {name: every[name] for name in options.only or every}
    tasks = [make(settings) for make in TASKS]
    results = {
        name: {task.title: trained(make, task, settings) for task in tasks}
        for name, make in track(chosen.items(), "methods", console=Console(stderr=True))
    }
    made = table(results, step_times(chosen, settings), tasks, settings)
    console = Console()
    console.width = max(console.width, 150)
    console.print(made.rich())
    if options.markdown:
        facts = "\n".join(f"- {name}: {value}" for name, value in environment().items())
        text = PAGE.format(facts=facts, table=made.markdown().partition("\n")[2].strip())
        options.markdown.write_text(text)
    return made


if __name__ == "__main__":
    main()
