"""How 16- and 8-bit moments and bfloat16 parameters change training: one command, one page.

    python benchmarks/convergence.py [--quick] [--markdown docs/low-precision.md]

Every method trains the same tasks from the same weights on the same batches as float32, seed by
seed: `convergence_methods.py` and `convergence_tasks.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from convergence_methods import FLOAT32, METHODS, MOMENTS, Method, Pair, reconstruct_weights
from convergence_tasks import (
    QUICK,
    TASKS,
    Settings,
    Task,
    cast,
    digits_mlp,
    sparse_embedding,
    transformer,
)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from scipy import stats
from side_by_side import Table, environment

import adamx

PACKAGES = ("date", "adamx", "jax", "optax")
AGAIN = "float32, other order"
FEW = (FLOAT32, "packed8", "bf16: remainder")


# ----------------------------------------------------------------------------------- the training


def stacked(make: Callable[[int], Any], seeds: int) -> Any:
    """Return the trees of all seeds as one, with a leading axis."""
    return jax.tree.map(lambda *x: jnp.stack(x), *map(make, range(seeds)))


Trainer = Callable[[int], dict[str, np.ndarray]]


def trainer(task: Task, method: Method, **options: float) -> Trainer:
    """Return a function that trains every seed in one jitted program, and measures the results.

    Args:
        task: the task.
        method: the method that trains it.
        **options: Adam's, such as b1.

    Returns:
        A function of the number of the order; it returns a number a seed for each measure.
    """
    init, step = method.make(task.rate, **{"eps": task.eps, **options})

    def run(arguments: tuple[Any, Any, Any]) -> Any:
        params, data, batches = arguments
        params = cast(params, method.dtype)

        def body(carry: tuple[Any, Any], batch: Any) -> tuple[Any, None]:
            loss = lambda params: task.loss(cast(params, jnp.float32), data, batch)  # noqa: E731
            return step(*carry, jax.grad(loss)(carry[0])), None

        (params, _), _ = jax.lax.scan(body, (params, init(params)), batches)
        return cast(params, jnp.float32)

    every = jax.jit(lambda arguments: jax.lax.map(run, arguments))

    def train(order: int = 0) -> dict[str, np.ndarray]:
        draws = task.params, task.data, lambda seed: task.batches(seed, order)
        trained = every(tuple(stacked(draw, task.seeds) for draw in draws))
        each = [jax.tree.map(lambda x, i=i: x[i], trained) for i in range(task.seeds)]
        return {
            name: np.array([measure(params, seed) for seed, params in enumerate(each)])
            for name, measure in task.measures.items()
        }

    return train


# --------------------------------------------------------------------------------------- verdicts


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How a method compares with float32: a paired t-test over the seeds.

    Attributes:
        difference: the mean difference with its 95 % interval.
        words: "yes" if the interval contains zero, "no" and the side otherwise.
        short: both in few characters.
    """

    difference: str
    words: str
    short: str


def compared(values: np.ndarray, baseline: np.ndarray, floor: float = 0.0) -> Verdict:
    """Return the verdict on one number a seed; smaller is better.

    Args:
        values: the method's.
        baseline: float32's.
        floor: the noise floor, 0 if there is none.

    Example:
        >>> compared(np.array([1.0, 2.0, 4.0]), np.array([1.1, 1.9, 4.0])).words
        'yes'
    """
    lost = int(np.sum(~np.isfinite(values)))
    if lost:
        words = f"no: not finite, {lost} of {len(values)} seeds"
        return Verdict("-", words, f"**{lost} of {len(values)} lost**")
    difference = values - baseline
    if not difference.any():
        return Verdict("0", "yes: identical", "0")
    mean = difference.mean()
    low, high = stats.ttest_rel(values, baseline).confidence_interval()
    text, short = f"{mean:+.2g} [{low:+.2g}, {high:+.2g}]", f"{mean:+.2g}"
    if low <= 0 <= high:
        if floor and high - low > 20 * floor:
            return Verdict(text, "undecided: seeds scatter", f"{short} ?")
        return Verdict(text, "yes", short)
    words = "no: worse" if mean > 0 else "no: better"
    if abs(mean) < floor:
        return Verdict(text, f"{words}, by less than the floor", f"*{short}*")
    return Verdict(text, words, f"**{short}**")


class Bench:
    """Runs the sections with a progress bar."""

    def __init__(self, settings: Settings, progress: Progress) -> None:
        """Take the methods that the settings ask for."""
        self.settings, self.progress = settings, progress
        keep = FEW if settings.quick else tuple(METHODS)
        self.methods = {name: METHODS[name] for name in keep}
        self.moments = {name: m for name, m in self.methods.items() if name in MOMENTS}
        self.narrow = {name: m for name, m in self.methods.items() if name not in MOMENTS}

    def each(self, what: str, items: Sequence[Any]) -> Iterator[Any]:
        """Yield the items, and show the progress."""
        yield from self.progress.track(items, description=what)


def convergence(bench: Bench) -> Iterator[Table]:
    """Compare with float32, seed by seed: a summary, and a table for each measure."""
    tables, summary, heads = [], {name: [] for name in bench.methods}, []
    tasks = [make(bench.settings) for make in TASKS]
    for task in (task for some in tasks for task in some[: 1 if bench.settings.quick else None]):
        runs = {}
        for name in bench.each(task.title, list(bench.methods)):
            train = trainer(task, bench.methods[name])
            runs[name] = train(0)
            if name == FLOAT32:
                runs[AGAIN] = train(1)
        for measure in task.measures:
            found = {name: run[measure] for name, run in runs.items()}
            baseline = found[FLOAT32]
            floor = float(np.sqrt(np.mean((found[AGAIN] - baseline) ** 2)))
            verdicts = {name: compared(x, baseline, floor) for name, x in found.items()}
            rows = []
            for name in found:
                told = [verdicts[name].difference, verdicts[name].words]
                told = ["", ""] if name == FLOAT32 else told
                rows.append([name, f"{found[name].mean():.4g}", *told])
            note = f"{task.note} {task.seeds} seeds. Noise floor: {floor:.2g}."
            columns = ["", measure, "difference [95 %]", "equal within seed noise"]
            tables.append(Table(f"{task.title}: {measure}", note, columns, rows))
            heads.append(f"{task.title}: {measure} ({floor:.2g})")
            for name in bench.methods:
                summary[name].append(verdicts[name].short)
    note = (
        "The mean difference from float32 for each measure, with the noise floor in brackets after "
        "its name; smaller is better. Not equal within seed noise: in bold, or in italics where "
        "the difference is below the noise floor. With a question mark: undecided."
    )
    turned = [[head, *(cells[i] for cells in summary.values())] for i, head in enumerate(heads)]
    rows = [row[:1] + row[2:] for row in turned]
    yield Table("Training compared with float32", note, ["", *list(bench.methods)[1:]], rows)
    yield from tables


@functools.cache
def direction(method: Method, **options: float) -> Pair:
    """Return init and step of a method, with a step that returns -u for the gradients alone."""
    init, step = method.make(1.0, **options)

    def towards(state: Any, grads: Any) -> tuple[Any, Any]:
        return step(jax.tree.map(jnp.zeros_like, grads), state, grads)

    return init, jax.jit(towards)


def shadowed(
    task: Task, methods: Mapping[str, Method], **options: float
) -> dict[str, tuple[float, ...]]:
    """Train seed 0 in float32, and show every method the same gradients.

    Returns:
        For each method the largest |u| / lr; the rms difference of its updates from float32's,
        relative to the rms of float32's; and its gain, the factor by which float32's fit best.
    """
    options = {"eps": task.eps, **options}
    init, step = METHODS[FLOAT32].make(task.rate, **options)
    others = {name: direction(method, **options) for name, method in methods.items()}
    truth = direction(METHODS[FLOAT32], **options)[1]

    def product(one: Any, other: Any) -> jax.Array:
        return sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), one, other)))

    def run(params: Any, data: Any, batches: Any) -> Any:
        def body(carry: Any, batch: Any) -> tuple[Any, Any]:
            params, state, true, states = carry
            grads = jax.grad(task.loss)(params, data, batch)
            params, state = step(params, state, grads)
            exact, true = truth(true, grads)
            told, after = {}, {}
            for name, (_, towards) in others.items():
                u, after[name] = towards(states[name], grads)
                largest = jnp.max(jnp.stack([jnp.abs(x).max() for x in jax.tree.leaves(u)]))
                off = jax.tree.map(jnp.subtract, u, exact)
                sums = product(off, off), product(off, exact), product(exact, exact)
                told[name] = largest, jnp.stack(sums)
            return (params, state, true, after), told

        states = {name: start(params) for name, (start, _) in others.items()}
        return jax.lax.scan(body, (params, init(params), init(params), states), batches)[1]

    told = jax.jit(run)(task.params(0), task.data(0), task.batches(0, 0))
    found = {}
    for name in methods:  # jit has sorted the keys
        largest, (off, along, size) = told[name][0].max(), told[name][1].sum(axis=0)
        found[name] = float(largest), float(jnp.sqrt(off / size)), float(1 + along / size)
    return found


def trajectories(bench: Bench) -> Iterator[Table]:
    """Compare single updates with those of float32, for the same gradients."""
    heads, columns = [], []
    makes = TASKS[:1] if bench.settings.quick else (digits_mlp, transformer, sparse_embedding)
    tasks = [make(bench.settings)[0] for make in makes]
    for task in bench.each("updates", tasks):
        found = shadowed(task, bench.moments)
        columns += [[f"{x[k]:.3g}" for x in found.values()] for k in range(3)]
        heads += [f"{task.title}: largest", "rms error", "gain"]
    rows = [list(row) for row in zip(bench.moments, *columns, strict=True)]
    note = (
        "On float32's trajectory of seed 0, every method given the same gradients: the largest "
        "|u| / lr of all steps and elements; the rms difference from float32's updates as a part "
        "of their rms; and the gain, the factor by which float32's updates fit the method's best."
    )
    yield Table("Single updates", note, ["", *heads], rows)


def after(method: Method, grads: Sequence[Any]) -> np.ndarray:
    """Return the last u / lr of a few steps on one array."""
    init, towards = direction(method)
    state, u = init(jnp.zeros_like(grads[0])), None
    for g in grads:
        u, state = towards(state, g)
    return -np.asarray(u)


def extremes(bench: Bench) -> Iterator[Table]:
    """Show what one extreme, infinite or NaN element does to itself and to its neighbours."""
    sizes = ("0", "1e-30", "1e-20", "1e5", "1e12", "3e38")
    spikes = ("1e5", "1e12", "3e38", "inf", "nan")
    normal = np.random.default_rng(0).normal(size=(20, 1024)).astype(np.float32)
    rows, hurt = [], []
    for name, method in bench.each("extremes", list(bench.moments.items())):
        cells, lost = [], []
        exact = after(bench.moments[FLOAT32], list(normal))
        for size in sizes:
            grads = normal[:10].copy()
            grads[:, 7] = float(size)
            u = after(method, list(grads))
            others = int(np.sum(~np.isfinite(np.delete(u, 7))))
            cells.append(f"{u[7] + 0.0:.3g}" + (f" (and {others} others lost)" if others else ""))
        for size in spikes:
            grads = normal.copy()
            grads[4, 7] = float(size)
            u = after(method, list(grads))
            off = int(np.sum(~(np.abs(np.delete(u - exact, 7)) <= 0.5)))
            lost.append(f"{int(np.sum(~np.isfinite(u)))}, {off}")
        rows.append([name, *cells])
        hurt.append([name, *lost])
    heads = [f"g = {size}" for size in sizes]
    note = (
        "One element has the same extreme gradient in 10 steps, 1023 others have ordinary ones: "
        "the element's u / lr, and how many others are not finite, if any."
    )
    yield Table("Extreme gradients", note, ["", *heads], rows)
    note = (
        "One gradient of this size in one element of 1024, in step 5 of 20: how many elements are "
        "not finite at the end, and how many of the 1023 others have a u / lr that is more than "
        "0.5 from float32's without it (or not finite). In float32 infinity and NaN stay in their "
        "element for ever."
    )
    yield Table("One bad element", note, ["", *spikes], hurt)


def whole(params: Any, state: Any) -> np.ndarray:
    """Return one array of parameters, with the bits that the state keeps of them."""
    if isinstance(state, dict):
        kept = {"master", "remainder"} & set(state)
        return np.asarray(adamx.masters(params, state) if kept else params, np.float64)
    if hasattr(state, "ecc"):
        params = reconstruct_weights(params, state.ecc)
    return np.asarray(params, np.float64)


def travel(bench: Bench) -> Iterator[Table]:
    """Show how far bfloat16 parameters travel in small steps."""
    steps, sizes = bench.settings.travel, (1e-6, 4e-6, 1e-5)
    start = np.random.default_rng(0).uniform(1, 2, 16384)
    rows = []
    methods = {FLOAT32: METHODS[FLOAT32]} | bench.narrow
    for name, method in bench.each("small steps", list(methods.items())):
        cells = []
        for size in sizes:
            init, step = method.make(size)
            first = jnp.asarray(start, method.dtype)
            carry, grads, step = (first, init(first)), -jnp.ones_like(first), jax.jit(step)
            for _ in range(steps):
                carry = step(*carry, grads)
            way = (whole(*carry) - np.asarray(jnp.asarray(start, method.dtype))) / (steps * size)
            cells += [f"{way.mean():.3f}", f"{np.sqrt(np.mean((way - 1) ** 2)):.2g}"]
        rows.append([name, *cells])
    heads = [cell for size in sizes for cell in (f"u = {size:g}", "rms error")]
    note = (
        f"{steps} equal steps of u, by Adam with a constant gradient, on {len(start)} parameters "
        "between 1 and 2: the mean share of the distance that the parameters travelled, and the "
        "rms error of the single parameters as a share of the distance; of the masters, if there "
        "are any."
    )
    yield Table("Small steps", note, ["", *heads], rows)


def betas(bench: Bench) -> Iterator[Table]:
    """Compare the packed moments with float32 for other decays."""
    task = dataclasses.replace(digits_mlp(bench.settings)[0], seeds=min(4, bench.settings.seeds))
    measure = next(iter(task.measures))
    pairs = [(b1, b2) for b1 in (0.0, 0.5, 0.9, 0.99) for b2 in (0.9, 0.999, 0.9999) if b1**2 < b2]
    packed = {name: m for name, m in bench.moments.items() if name in ("packed16", "packed8")}
    rows = []
    for b1, b2 in bench.each("betas", pairs[-1:] if bench.settings.quick else pairs):
        errors = shadowed(task, packed, b1=b1, b2=b2)
        baseline = trainer(task, METHODS[FLOAT32], b1=b1, b2=b2)(0)[measure]
        cells = [f"{b1:g}", f"{b2:g}", f"{adamx.ratio_bound(b1, b2):.3g}", f"{baseline.mean():.3g}"]
        for name, method in packed.items():
            verdict = compared(trainer(task, method, b1=b1, b2=b2)(0)[measure], baseline)
            cells += [f"{errors[name][1]:.2g}", verdict.difference, verdict.words]
        rows.append(cells)
    heads = ["b1", "b2", "ratio bound", f"float32, {measure}"]
    for name in packed:
        heads += [f"{name}: rms error", "difference [95 %]", "equal"]
    note = (
        f"The digits, {task.seeds} seeds, trained with other decays (packed8 needs b1^2 < b2): "
        "the rms error of single updates as above, and the difference from float32 with the same "
        "decays."
    )
    yield Table("Other betas", note, heads, rows)


def memory(bench: Bench) -> Iterator[Table]:
    """Count the bytes that every method keeps."""
    rows = []
    for name, method in bench.each("bytes", list(bench.methods.items())):
        params = jnp.zeros((512, 512), method.dtype)
        state = sum(x.nbytes for x in jax.tree.leaves(method.make(1e-3)[0](params))) / params.size
        rows.append(
            [name, *(f"{x:.3g}" for x in (params.itemsize, state, params.itemsize + state))]
        )
    note = "Bytes a parameter, counted on an array of 512 x 512; gradients not included."
    yield Table("Memory", note, ["", "parameters", "state", "together"], rows)


SECTIONS = (memory, convergence, trajectories, extremes, travel, betas)


# ------------------------------------------------------------------------------------- the command

READING = """\
## How to read the tables

Every method starts from float32's weights, in its own dtype, and gets float32's batches, seed by
seed. Methods whose name begins with *bf16* have bfloat16 parameters: the loss widens them to
float32 and computes in float32, the gradients are bfloat16, and the model is measured with the
bfloat16 parameters. The other methods have float32 parameters. The moments of *remainder*,
*remainder8*, *float32 masters* and *stochastic* are float32.

A difference is the mean over the seeds of a method's number minus float32's, with the 95 % interval
of a paired t-test. The *noise floor* is the rms difference between float32 and float32 with another
order of the same data. *Equal within seed noise* is *yes* if the interval contains zero, and
*undecided* if it contains zero but is wider than 20 noise floors. For a method that is equal, one
table in twenty says *no* by chance. Few seeds give wide intervals, so that *yes* is weak evidence
in tables with 3 seeds.

Three methods are not adamx's. *Optax* is `optax.adam` on bfloat16 parameters, with its own dtypes.
*block-wise 8-bit* is `benchmarks/blockwise8.py`, written from the paper of Dettmers et al. (2022):
dynamic table, blocks of 256, used for every array; their library leaves arrays of fewer than 4096
elements in float32, and advises another embedding layer. *FlashOptim* is `flashoptim-jax` 0.1.0 on
its pure-XLA path, with float32 parameters or with bfloat16 ones and a correction of 8 bits.
"""
MARK = "<!-- tables -->"


def page(tables: Sequence[Table], settings: Settings, old: str) -> str:
    """Return the page: the part above the mark, which is written by hand, and new tables."""
    above = old.partition(MARK)[0] or "# Low precision\n\n"
    facts = ", ".join(f"{k} {v}" for k, v in environment().items() if k in PACKAGES)
    how = f"`python benchmarks/convergence.py{' --quick' if settings.quick else ''}"
    made = f"Below: written by {how} --markdown docs/low-precision.md`, not by hand ({facts}, CPU)."
    below = [MARK, "", made, "", READING, *(table.markdown() for table in tables)]
    return above + "\n".join(below)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small and short, under a minute")
    parser.add_argument("--markdown", type=Path, help="write the page to this file too")
    options = parser.parse_args()
    settings = QUICK if options.quick else Settings()
    start, tables = time.perf_counter(), []
    console = Console()
    console.width = max(console.width, 200)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeElapsedColumn(), console=Console(stderr=True), redirect_stdout=False
    ) as progress:
        bench = Bench(settings, progress)
        for section in SECTIONS:
            for table in section(bench):
                tables.append(table)
                console.print("", table.rich())
    console.print(f"\n{time.perf_counter() - start:.0f} s in all")
    if options.markdown:
        old = options.markdown.read_text() if options.markdown.exists() else ""
        options.markdown.write_text(page(tables, settings, old))


if __name__ == "__main__":
    main()
