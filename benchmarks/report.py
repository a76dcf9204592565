"""The settings, tables, trees and loops that the benchmarks share."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import Loop, Sample, interleave, ratio
from rich.progress import Progress
from rich.table import Table as RichTable

import adamx

Shapes = tuple[tuple[int, ...], ...]

ADAMX, OPTAX, AGAIN, TORCH = "adamx", "optax", "optax again", "torch"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The sizes of the measurements, and how long they last.

    Attributes:
        sizes: numbers of elements of the single array in the step.
        leaves: how many arrays there are in a tree of many.
        many: how many in the tree that is only traced and lowered.
        small: shapes that the leaves have in turn, if the work outside the kernels counts.
        large: shapes that the leaves have in turn, as in a network.
        methods_size: number of elements of the single array for the other methods.
        around_size: number of elements of the single array for `around.py`.
        memory: number of elements of the tree whose memory is read.
        width: of the network in the train step.
        rounds: for the steps.
        slow_rounds: for tracing, for compiling, and for `update` outside jit.
        seconds: how long a sample of a step lasts.
        seed: of the data, and of the order within the rounds.
    """

    sizes: tuple[int, ...] = (2**20, 2**24, 2**26)
    leaves: int = 150
    many: int = 2000
    small: Shapes = ((64,), (32, 16), (8, 8, 4), (128,))
    large: Shapes = ((256,), (256, 256), (256, 1024), (1024,))
    methods_size: int = 2**22
    around_size: int = 2**24
    memory: int = 100_000_000
    width: int = 512
    rounds: int = 60
    slow_rounds: int = 5
    seconds: float = 0.03
    seed: int = 0


QUICK = Settings(
    sizes=(2**20,),
    leaves=20,
    many=100,
    methods_size=2**20,
    around_size=2**20,
    memory=2**20,
    rounds=5,
    slow_rounds=1,
    seconds=0.02,
)


# -------------------------------------------------------------------------------------- tables


@dataclasses.dataclass(frozen=True)
class Table:
    """A section of the report.

    Attributes:
        title: of the section.
        note: how.
        columns: the heads.
        rows: the cells, as text.
    """

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def rich(self) -> RichTable:
        """Return it for the terminal."""
        table = RichTable(title=self.title, caption=self.note, title_style="bold")
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """Return it as GitHub markdown."""
        lines = [self.columns, [":--", *["--:"] * (len(self.columns) - 1)], *self.rows]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"## {self.title}\n\n{body}\n\n{self.note}\n"


class Meter:
    """Takes samples for the sections and shows the progress."""

    def __init__(self, progress: Progress, seed: int) -> None:
        """Show on a progress bar; shuffle with a seed."""
        self.progress, self.seed = progress, seed

    def __call__(
        self, what: str, candidates: Mapping[str, Sample], rounds: int
    ) -> dict[str, np.ndarray]:
        """Return the samples of every candidate."""
        task = self.progress.add_task(what, total=len(candidates) * (rounds + 1))
        tick = lambda: self.progress.advance(task)  # noqa: E731
        return interleave(candidates, rounds=rounds, seed=self.seed, tick=tick)


def verdict(value: float, bar: float) -> str:
    """Return a bar, and whether a value meets it.

    Example:
        >>> verdict(0.25, 0.4), verdict(2, 0)
        ('<= 0.4: met', '<= 0: not met')
    """
    return f"<= {bar:g}: {'met' if value <= bar else 'not met'}"


def against_optax(times: Mapping[str, np.ndarray], name: str, part: Any = ...) -> str:
    """Return a candidate's ratio to Optax as a cell, or a dash if it was not measured."""
    if name not in times:
        return "-"
    return str(ratio(times[name][part], times[OPTAX][part]))


def median(times: np.ndarray, unit: float = 1.0) -> str:
    """Return the median as a cell, in units of so many seconds."""
    return f"{np.median(times) / unit:.3g}"


# ----------------------------------------------------------------------------- trees and loops


def single(size: int) -> Any:
    """Return the shape of one float32 array."""
    return jax.ShapeDtypeStruct((size,), jnp.float32)


def tree(shapes: Shapes, leaves: int) -> dict[str, Any]:
    """Return a tree of float32 leaves, without data, that have the shapes in turn."""
    turns = (shapes[i % len(shapes)] for i in range(leaves))
    return {f"leaf{i:04d}": jax.ShapeDtypeStruct(s, jnp.float32) for i, s in enumerate(turns)}


def elements(like: Any) -> int:
    """Return the number of elements of a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(like))


def normal(like: Any, seed: int) -> Any:
    """Return a tree of standard normal numbers."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), like)


def compile_step(tx: optax.GradientTransformation, like: Any) -> jax.stages.Compiled:
    """Return the in-place step, compiled anew at each call."""
    return adamx.make_step(tx).lower(like, jax.eval_shape(tx.init, like), like).compile()


def torch_loop(params: Any, grads: Any, seconds: float) -> Loop:
    """Return PyTorch's fused AdamW as a loop, with one thread a processor as XLA has."""
    # its threads must not spin on a core that the next candidate needs
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    torch.set_num_threads(processors())
    tensors = [torch.from_numpy(np.array(x)) for x in jax.tree.leaves(params)]
    for tensor, grad in zip(tensors, jax.tree.leaves(grads), strict=True):
        tensor.grad = torch.from_numpy(np.array(grad))
    optimizer = torch.optim.AdamW(tensors, lr=1e-3, weight_decay=1e-4, fused=True)

    def step() -> tuple[()]:
        optimizer.step()
        return ()

    return Loop(step, (), seconds=seconds)


def processors() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def section(page: Path, name: str) -> re.Match[str] | None:
    """Find the part of a page that a command writes: `<!-- name -->` to `<!-- /name -->`."""
    marks = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    return re.search(marks, page.read_text(), re.DOTALL)


def write_section(page: Path, name: str, table: Table) -> None:
    """Put a table, without its heading, into a part of a page."""
    found = section(page, name)
    assert found is not None, name
    rows = table.markdown().partition("\n\n")[2]
    text = found.string
    page.write_text(f"{text[: found.end(1)]}\n{rows}\n{text[found.start(2) :]}")
