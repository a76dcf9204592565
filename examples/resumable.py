"""Train a digit classifier that can be killed at any moment and goes on from its last checkpoint.

    python examples/resumable.py
    python examples/resumable.py --steps 4000 --every 100 --directory run

The first run starts from nothing. Stop it with Ctrl-C, kill it or pull the plug, and give the same
command again: it goes on from the newest whole checkpoint, and ends with the parameters and the
state of a run that was never stopped, bit for bit. For that

- the script saves the parameters and the optimizer's state together, in one checkpoint, which Orbax
  writes under another name and renames when it is complete;
- it saves a digest of them too: a checkpoint whose files were damaged later, as those are that had
  not reached the disk when the power went, is put aside, and the one before is taken;
- everything else is computed from the number of the step: the images of a batch, and the random
  bits with which adamx rounds the moments, kept in 4 bytes a parameter instead of 8.

Orbax writes in the background while the training goes on; the arrays that were passed to `save` may
be donated to the next step at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import adamx

TX = adamx.adamw(3e-3, weight_decay=1e-2, moments="packed16")
BATCH = 64

Report = Callable[[str, int], None]


# ------------------------------------------------------------------- the model and its train step


def start() -> tuple[Any, Any]:
    """Return the first parameters and the optimizer's state."""
    keys = jax.random.split(jax.random.key(0))
    params = {
        "hidden": {"kernel": jax.random.normal(keys[0], (64, 128)) / 8, "bias": jnp.zeros(128)},
        "output": {"kernel": jax.random.normal(keys[1], (128, 10)) / 12, "bias": jnp.zeros(10)},
    }
    return params, TX.init(params)


def logits(params: Any, images: jax.Array) -> jax.Array:
    """Return a number for each image and digit."""
    hidden = jax.nn.gelu(images @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["output"]["kernel"] + params["output"]["bias"]


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
    """Return the parameters and the state after one step; the old ones are donated."""

    def loss(params: Any) -> jax.Array:
        found = logits(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(found, labels).mean()

    updates, state = TX.update(jax.grad(loss)(params), state, params)
    return adamx.apply_updates(params, updates), state


def load() -> Sequence[Any]:
    """Return training images, test images, training labels and test labels."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    return train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=42)


def batch(number: int, count: int) -> np.ndarray:
    """Return the indices of a step's images, which depend on the step's number alone."""
    epoch, place = divmod(number, count // BATCH)
    return np.random.default_rng(epoch).permutation(count)[place * BATCH : (place + 1) * BATCH]


# ----------------------------------------------------------------------------- train, save, resume


class Damaged(Exception):
    """None of the checkpoints can be read."""


def digest(tree: Any) -> np.ndarray:
    """Return the SHA-256 of the arrays of a tree: 32 numbers, equal only for equal bits."""
    whole = hashlib.sha256()
    for x in jax.tree.leaves(tree):
        whole.update(np.asarray(x).tobytes())
    return np.frombuffer(whole.digest(), np.uint8)


def resume(manager: ocp.CheckpointManager, report: Report) -> tuple[Any, Any, int | None]:
    """Return parameters, state and step of the newest whole checkpoint, or of a fresh start.

    Newer ones, which are damaged, are renamed: 150 becomes 150.damaged.

    Args:
        manager: of the checkpoints.
        report: called with "damaged" and the step for each of those.

    Raises:
        Damaged: if there are checkpoints and none is whole; they stay as they are.
    """
    wanted = ocp.args.StandardRestore(jax.eval_shape(lambda: (*start(), jnp.zeros(32, jnp.uint8))))
    damaged: dict[int, Exception] = {}
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            params, state, expected = manager.restore(step, args=wanted)
            if not np.array_equal(digest((params, state)), expected):
                raise ValueError("the arrays are not those that were saved")
        except Exception as error:  # whatever the damage leads to
            damaged[step] = error
            continue
        break
    else:
        if damaged:
            reason = str(damaged[min(damaged)]).partition("\n")[0]
            raise Damaged(
                f"none of the checkpoints {sorted(damaged)} in {manager.directory} can be read; to "
                f"start from nothing, move them away. The oldest: {reason}"
            )
        return *start(), None
    for number in damaged:
        put_aside(Path(manager.directory), number)
        report("damaged", number)
    manager.reload()
    return params, state, step


def put_aside(directory: Path, step: int) -> None:
    """Rename a checkpoint to 150.damaged, or to 150.damaged.damaged if that is there."""
    aside = directory / f"{step}.damaged"
    while aside.exists():
        aside = aside.with_name(f"{aside.name}.damaged")
    (directory / str(step)).rename(aside)


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a training.

    Attributes:
        params: the parameters at the end.
        state: the optimizer's state at the end.
        resumed_from: the number of steps before the checkpoint; None without a checkpoint.
        accuracy: the share of the test images that are recognised.
    """

    params: Any
    state: Any
    resumed_from: int | None
    accuracy: float


def train(steps: int, every: int, directory: Path, report: Report) -> Result:
    """Train from the newest whole checkpoint, or from nothing, and save on the way.

    Args:
        steps: how many steps the whole training has, those of earlier runs included.
        every: after how many steps to save; the last one is saved in any case.
        directory: where the checkpoints are; the two newest ones are kept.
        report: called with what happens ("damaged", "loaded", "step" or "saving") and the step.

    Raises:
        Damaged: if there are checkpoints and none is whole.
    """
    images, test_images, labels, test_labels = load()
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    handler = ocp.StandardCheckpointHandler()
    with ocp.CheckpointManager(
        directory.absolute(), options=options, item_handlers=handler
    ) as manager:
        params, state, newest = resume(manager, report)
        report("loaded", newest or 0)
        for number in range(newest or 0, steps):
            chosen = batch(number, len(images))
            params, state = train_step(params, state, images[chosen], labels[chosen])
            done = number + 1
            report("step", done)
            if done % every == 0 or done == steps:
                report("saving", done)
                saved = params, state, digest((params, state))
                manager.save(done, args=ocp.args.StandardSave(saved))
        manager.wait_until_finished()
    accuracy = (logits(params, test_images).argmax(axis=-1) == test_labels).mean()
    return Result(params, state, newest, float(accuracy))


# ------------------------------------------------------------------------------- the command line


def above_zero(text: str) -> int:
    """Return a whole number > 0, for argparse."""
    with contextlib.suppress(ValueError):
        if int(text) > 0:
            return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number > 0, got {text!r}")


def folder(text: str) -> Path:
    """Return the path of a folder that exists or can be made, for argparse."""
    path = Path(text)
    existing = next(x for x in (path, *path.absolute().parents) if x.exists())
    if not existing.is_dir():
        raise argparse.ArgumentTypeError(f"is no folder: {str(existing)!r}")
    if not os.access(existing, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot be written to: {str(existing)!r}")
    return path


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description="Train a digit classifier, saving through Orbax. The same command again goes "
        "on from the newest whole checkpoint, bit for bit, however the last run ended.",
    )
    parser.add_argument(
        "--steps",
        metavar="N",
        type=above_zero,
        default=2000,
        help="of the whole training, those of earlier runs included (default: %(default)s)",
    )
    parser.add_argument(
        "--every",
        metavar="N",
        type=above_zero,
        default=50,
        help="save after as many steps (default: %(default)s)",
    )
    parser.add_argument(
        "--directory",
        metavar="FOLDER",
        type=folder,
        default=Path("checkpoints"),
        help="of the checkpoints (default: %(default)s)",
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    return parser


def main(argv: Sequence[str] | None = None) -> Result:
    """Run the example.

    Args:
        argv: the command line; None means the program's own.

    Returns:
        The parameters and the state at the end, and the step from which this run went on.
    """
    options = make_parser().parse_args(argv)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(), disable=options.no_progress
    ) as progress:
        bar = progress.add_task("starting", total=options.steps)

        def report(what: str, step: int) -> None:
            if what == "damaged":
                progress.console.print(
                    f"Checkpoint {step} is damaged: kept as {step}.damaged", highlight=False
                )
                return
            if what == "loaded":
                progress.update(bar, description=f"training, from step {step}")
            progress.update(bar, completed=step)

        result = train(options.steps, options.every, options.directory, report)
    print(f"Steps: {int(result.state['count'])}, resumed from {result.resumed_from}")
    print(f"Checkpoints: {options.directory}")
    print(f"Test accuracy: {result.accuracy:.1%}")
    return result


if __name__ == "__main__":
    try:
        main()
    except Damaged as error:
        sys.exit(f"resumable: {error}")
    except KeyboardInterrupt:
        print("Stopped: the same command goes on from the newest checkpoint.", file=sys.stderr)
        sys.exit(130)
