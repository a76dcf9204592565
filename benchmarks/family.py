"""Every optimizer of the family on one page: formula, pieces, memory, traffic, agreement, accuracy.

    python benchmarks/family.py [--quick] [--only NAME ...] [--markdown docs/family.md]

The page is read from the optimizers or measured by this script. It needs the packages of the tests,
since it uses their recorded PyTorch runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import inspect
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from report import Table, compile_step
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from side_by_side import environment

import adamx
from adamx.inspect.program import read_program

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "examples"), str(ROOT / "tests")]
quickstart, old_members, young_members, recordings = map(
    importlib.import_module, ("quickstart", "agreement", "agreement_family", "recordings")
)

NAMES = sorted(quickstart.PAIRS)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        names: the optimizers.
        side: of the square matrix in the compiled step.
        steps: of the comparison with Optax.
        epochs: of the training on the digits.
        seeds: how many trainings there are.
        trained: how many of the optimizers are trained, the first ones; None means all.
    """

    names: Sequence[str] = tuple(NAMES)
    side: int = 1000
    steps: int = 60
    epochs: int = 30
    seeds: int = 3
    trained: int | None = None


QUICK = Settings(steps=5, epochs=1, seeds=1, trained=3)
Row = list[str]


# ---------------------------------------------------------------------------- formulas and pieces


def indented_blocks(text: str) -> list[str]:
    r"""Return the blocks of a docstring that are indented, which are formulas and code.

    Example:
        >>> indented_blocks("Title.\n\n    a = b\n\n    c = (d,\n         e)\nAnd so on.")
        ['a = b', 'c = (d,\n     e)']
    """
    found = re.findall(r"^(?:    .*(?:\n|\Z))+", text, re.MULTILINE)
    return ["\n".join(line[4:] for line in block.splitlines()) for block in found]


def formula(name: str) -> str:
    """Return the formula of an optimizer: its module opens with it."""
    return indented_blocks(sys.modules[getattr(adamx, name).__module__].__doc__ or "")[0]


def default(name: str) -> adamx.Transformation:
    """Return an optimizer with its default options and the quickstart's learning rate."""
    return getattr(adamx, name)(quickstart.PAIRS[name].learning_rate)


def section(name: str) -> str:
    """Return an optimizer's section: its formula and its pieces."""
    blocks = "\n\n".join(f"```text\n{text}\n```" for text in (formula(name), str(default(name))))
    return f"### {name}\n\n{blocks}\n"


# ------------------------------------------------------------------------- memory and traffic


def cost(name: str, settings: Settings) -> Row:
    """Return the bytes that an optimizer keeps and moves, and how often it copies a parameter."""
    like = {"w": jax.ShapeDtypeStruct((settings.side, settings.side), jnp.float32)}
    tx, size = default(name), settings.side**2
    state = jax.eval_shape(tx.init, like)
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    slots = [key for key in state if any(x.size == size for x in jax.tree.leaves(state[key]))]
    program = read_program(compile_step(tx, like), like)
    return [
        name,
        ", ".join(slots) or "-",
        f"{round(kept / size, 3):.3g}",
        f"{program.bytes_per_param:.3g}",
        str(program.copies),
    ]


# ------------------------------------------------------------ agreement with Optax and PyTorch

# decays whose first powers, and so whose first bias corrections, are exact in float32
EXACT = {"b1": 0.5, "b2": 0.75, "b3": 0.875}
AS_OPTAX: dict[str, Callable[..., Any]] = {
    "adan": lambda rate, b2=0.92, **options: adamx.adan(rate, b2=b2, look_ahead=1 - b2, **options)
}


def optax_apart(name: str, options: dict[str, float], steps: int) -> float:
    """Return the largest difference of an update from Optax's, in 2^-23 of the step's largest."""
    pair = quickstart.PAIRS[name]
    ours = AS_OPTAX.get(name, pair.ours)(pair.learning_rate, **options)
    rng = np.random.default_rng(0)
    shape = 32, 16
    params = {"w": rng.normal(size=shape).astype(np.float32)}
    scales = 10 ** rng.uniform(-3, 0, shape)
    gradients = ({"w": (scales * rng.normal(size=shape)).astype("f")} for _ in range(steps))
    found = adamx.compare(ours, pair.peer(pair.learning_rate, **options), params, gradients)
    return max(update.of_largest for update in found.updates) / 2**-23


CASES = {
    "sgd": ("sgd", "sgd_momentum", "sgd_nesterov"),
    "momentum": ("sgd_dampening",),
    "adagrad": ("adagrad", "adagrad_initial", "adagrad_eps"),
    "rmsprop": (
        *("rmsprop", "rmsprop_alpha", "rmsprop_centered", "rmsprop_momentum"),
        "rmsprop_centered_momentum",
    ),
    "adam": ("adam", "adam_other_betas", "adam_b1_zero"),
    "adamw": ("adamw", "adamw_strong_decay"),
    "adamax": ("adamax", "adamax_other_betas"),
    "nadam": ("nadam",),
    "nadamw": ("nadam_decoupled",),
    "amsgrad": ("amsgrad", "amsgrad_other_betas"),
    "radam": ("radam", "radam_short"),
}
"""The recorded runs of PyTorch that an optimizer, or another order of its pieces, should repeat."""


def torch_apart(case: str) -> float:
    """Return how far 60 float64 steps are from PyTorch's: as a part of each weight's distance."""
    recording = recordings.RECORDING
    leaves = recordings.LEAVES
    start = {leaf: recording[f"initial/{leaf}"] for leaf in leaves}
    gradients = {leaf: recording[f"gradients/{leaf}"] for leaf in leaves}
    with jax.enable_x64(True):
        if case in recordings.IN_FAMILY:
            tx = young_members.as_in_torch(case)[0]
        else:
            tx = old_members.as_in_torch(case)

        def step(carry: Any, grads: Any) -> Any:
            updates, state = tx.update(grads, carry[1], carry[0])
            params = adamx.apply_updates(carry[0], updates)
            return (params, state), params

        params = jax.tree.map(jnp.asarray, start)
        walk = jax.jit(functools.partial(jax.lax.scan, step))((params, tx.init(params)), gradients)
        ours = jax.device_get(walk[1])
    worst = 0.0
    for leaf in leaves:
        theirs = recording[f"{case}/{leaf}"]
        if case == "sgd_dampening":  # momentum^t of the first gradient stays in PyTorch's buffer
            excess = np.multiply.outer(0.9 ** np.arange(1, 61), gradients[leaf][0])
            theirs = theirs + 0.1 * np.cumsum(excess, axis=0)
        path = np.concatenate([start[leaf][None], theirs])
        way = np.abs(np.diff(path, axis=0)).sum(axis=0)
        worst = max(worst, float(np.max(np.abs(ours[leaf] - theirs).max(axis=0) / way)))
    return worst


def agreement(name: str, settings: Settings) -> Row:
    """Return how far an optimizer is from Optax's and from PyTorch's."""
    cells = ["-", "-", "-"]
    pair = quickstart.PAIRS[name]
    if not pair.unlike or name in AS_OPTAX:
        known = inspect.signature(pair.ours).parameters
        options = {key: value for key, value in EXACT.items() if key in known}
        cells[0] = f"{optax_apart(name, {}, settings.steps):.3g}"
        cells[1] = f"{optax_apart(name, options, settings.steps):.3g}" if options else "-"
    if cases := CASES.get(name):
        runs = ", ".join(f"{case} {torch_apart(case):.0e}" for case in cases)
        cells[2] = f"{recordings.TORCH[cases[0]]['class']}: {runs}"
    return [name, *cells]


# ----------------------------------------------------------------------- accuracy on the digits


def digits(name: str, settings: Settings) -> Row:
    """Return the accuracies that the quickstart reaches with adamx and with Optax."""
    pair, data = quickstart.PAIRS[name], quickstart.load()
    # the same objects in all trainings, so that there is one program
    ours, peer = pair.ours(pair.learning_rate), pair.peer(pair.learning_rate)
    pair = dataclasses.replace(pair, ours=lambda _: ours, peer=lambda _: peer)
    reached = []
    for seed in range(settings.seeds):
        options = argparse.Namespace(
            learning_rate=pair.learning_rate, epochs=settings.epochs, batch_size=64, seed=seed
        )
        result = quickstart.train(pair, data, options, Progress(disable=True))
        reached.append([result.adamx.accuracies[-1], result.optax.accuracies[-1]])
    mean, lowest = np.mean(reached, axis=0), np.min(reached, axis=0)
    return [
        name,
        f"{pair.learning_rate:g}",
        *(f"{m:.1%} ({low:.1%})" for m, low in zip(mean, lowest, strict=True)),
        pair.unlike.partition(",")[0] or "the same",
    ]


# ------------------------------------------------------------------------------------ the report


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural if needed.

    Example:
        >>> counted(1, "seed"), counted(3, "seed")
        ('1 seed', '3 seeds')
    """
    return f"{number} {noun}{'s' if number != 1 else ''}"


def report(settings: Settings, progress: Progress) -> Iterator[Table]:
    """Measure all optimizers, table by table."""

    def rows(
        what: str, measure: Callable[[str, Settings], Row], first: int | None = None
    ) -> list[Row]:
        names = settings.names[:first]
        task = progress.add_task(what, total=len(names))
        found = []
        for name in names:
            progress.update(task, description=f"{what}: {name}")
            found.append(measure(name, settings))
            progress.advance(task)
        return found

    yield Table(
        "Memory and traffic",
        "Bytes a float32 parameter, of the state and of the reads and writes of the kernels of the "
        f"in-place step, for one matrix of {settings.side} x {settings.side}; `copy` instructions "
        "as large as the matrix.",
        ["", "slots as large as the parameter", "bytes kept", "bytes moved", "copies"],
        rows("programs", cost),
    )
    yield Table(
        "Agreement with Optax and PyTorch",
        f"Optax: the largest difference of an update in {settings.steps} float32 steps, in 2^-23 "
        "of the step's largest update; at the defaults, with which Optax rounds its corrections "
        "1 - b^t, and with b1 = 0.5, b2 = 0.75, b3 = 0.875, with which the corrections are exact "
        "or nearly so; with Optax's look-ahead in Adan, and the same place of eps in AdaGrad and "
        "RMSprop. "
        "PyTorch: the class and its recorded runs in `tests/data/torch_trajectories.npz`, each "
        "with the largest difference of a weight in 60 float64 steps, as a part of the distance "
        "that the weight travelled; AMSGrad and NAdam with PyTorch's pieces, and momentum apart "
        "from the first gradient, as described above. A dash: there is no such method, no "
        "correction, or no such run.",
        ["", "Optax, defaults", "Optax, exact decays", "PyTorch"],
        rows("agreement", agreement),
    )
    yield Table(
        "Accuracy on the digits",
        f"`examples/quickstart.py`, {counted(settings.epochs, 'epoch')}: the mean test "
        f"accuracy of {counted(settings.seeds, 'seed')}, and the lowest in brackets, of adamx and "
        "of Optax's method; SGDW with momentum 0.9. Of the 360 images one is 0.3 %. The learning "
        "rates were chosen on the same images, for a good accuracy and not the best: the table "
        "does not rank the methods.",
        ["", "learning rate", "adamx", "Optax", "Optax's method"],
        rows("digits", digits, settings.trained),
    )


MARK = "<!-- tables -->"


def page(tables: Sequence[Table], settings: Settings, quick: bool, old: str) -> str:
    """Return the page: the part above the mark, which is written by hand, and the measured one."""
    above = old.partition(MARK)[0] or "# The family\n\n"
    facts = environment()
    said = ", ".join(f"{k} {facts[k]}" for k in ("date", "adamx", "jax", "optax"))
    command = f"python benchmarks/family.py{' --quick' if quick else ''} --markdown docs/family.md"
    made = f"Below: written by `{command}`, not by hand ({said}, {jax.default_backend()})."
    shown = "The formula of each optimizer, and its pieces as `print` shows them."
    opening = f"## Formulas and pieces\n\n{shown}\n"
    sections = [opening, *(section(name) for name in settings.names)]
    return above + "\n".join([MARK, "", made, "", *(t.markdown() for t in tables), *sections])


def parse(arguments: Sequence[str] | None = None) -> tuple[Settings, bool, Path | None]:
    """Return the settings, whether they are the quick ones, and where to write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small: one seed and epoch, 3 trained")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help="some of them")
    parser.add_argument("--markdown", type=Path, help="write the page to this file too")
    options = parser.parse_args(arguments)
    settings = QUICK if options.quick else Settings()
    if options.only:
        settings = dataclasses.replace(settings, names=tuple(options.only))
    return settings, options.quick, options.markdown


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    settings, quick, path = parse(arguments)
    start, tables = time.perf_counter(), []
    console = Console()
    console.width = max(console.width, 140)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeElapsedColumn(), console=Console(stderr=True), redirect_stdout=False
    ) as progress:
        for table in report(settings, progress):
            tables.append(table)
            console.print("", table.rich())
    console.print(f"\n{math.ceil(time.perf_counter() - start)} s in all")
    if path:
        old = path.read_text() if path.exists() else ""
        path.write_text(page(tables, settings, quick, old))


if __name__ == "__main__":
    main()
