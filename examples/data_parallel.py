"""Train on handwritten digits in several processes, each with its own part of every batch.

    python examples/data_parallel.py
    python examples/data_parallel.py --processes 4 --check
    python examples/data_parallel.py --checkpoints digits

One command starts the processes on this machine's CPU and joins them by `jax.distributed` on the
loopback address. The optimizer needs no change: parameters and state are replicated, the batch is
split, and the compiler inserts the sum of the gradients over the processes.

The starter watches over the processes. If one dies, fails, or stays silent for `--timeout` seconds,
the starter ends the others too, says which one was lost, and exits with status 1. The same command
then goes on from the last checkpoint, to the same parameters bit for bit. Each checkpoint has a
digest of its arrays: before it starts the processes, the starter puts a damaged newest checkpoint
aside, and the one before is taken.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import multiprocessing
import os
import shlex
import shutil
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sklearn.datasets import load_digits

import adamx

TESTING = 360  # images that are not trained on: the first ones
NOTICED = 3  # exit status of a process that noticed the end of another one
STARTING = 300  # seconds for imports, joining and the first compilation, on a busy machine

Params = dict[str, jax.Array]

# ---------------------------------------------------------------------------------------- training


def draw(seed: int) -> dict[str, np.ndarray]:
    """Draw the weights of one hidden layer over the 8 x 8 pixels."""
    rng = np.random.default_rng(seed)
    params = {
        "hidden": rng.standard_normal((64, 128)) / 8,
        "hidden_bias": np.zeros(128),
        "output": rng.standard_normal((128, 10)) / 12,
        "output_bias": np.zeros(10),
    }
    return {name: x.astype(np.float32) for name, x in params.items()}


def logits(params: Params, images: jax.Array) -> jax.Array:
    """Return a number for each image and digit."""
    hidden = jax.nn.relu(images @ params["hidden"] + params["hidden_bias"][None])
    return hidden @ params["output"] + params["output_bias"][None]


def loss_function(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the mean loss over the batch: over all processes."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, images), labels)
    return losses.mean()


def load() -> tuple[np.ndarray, np.ndarray]:
    """Return the images, between 0 and 1, and the labels."""
    images, labels = load_digits(return_X_y=True)
    return (images / 16).astype(np.float32), labels.astype(np.int32)


def accuracy(params: Params) -> float:
    """Return the share of the test images whose largest logit is the label's."""
    images, labels = load()
    right = logits(params, jnp.asarray(images[:TESTING])).argmax(axis=-1) == labels[:TESTING]
    return float(right.mean())


def optimizer(options: argparse.Namespace) -> adamx.Transformation:
    """Return the optimizer of the command line."""
    return adamx.adamw(options.learning_rate)


def rows(count: int, step: int, options: argparse.Namespace) -> np.ndarray:
    """Return this process's rows of a step's batch; the batch depends on seed and step alone."""
    batch = np.random.default_rng([options.seed, step]).choice(
        count, options.batch_size, replace=False
    )
    return np.split(batch, jax.process_count())[jax.process_index()]


def train(options: argparse.Namespace, tell: Callable[[Any], None]) -> Params:
    """Train on all devices of all processes, from the newest checkpoint if there is one.

    Args:
        options: the command line.
        tell: called with (step, loss) after each step.

    Returns:
        The parameters after the last step.
    """
    images, labels = (x[TESTING:] for x in load())
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
    split, replicated = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("batch",), ()))
    tx = optimizer(options)

    def step(
        params: Params, state: Any, images: jax.Array, labels: jax.Array
    ) -> tuple[Params, Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_function)(params, images, labels)
        updates, state = tx.update(grads, state, params)
        return adamx.apply_updates(params, updates), state, loss

    train_step = jax.jit(step, donate_argnums=(0, 1))
    everywhere = functools.partial(jax.make_array_from_process_local_data, replicated)
    params = jax.tree.map(everywhere, draw(options.seed))
    state = jax.jit(tx.init, out_shardings=replicated)(params)
    with manager_of(options.checkpoints) as manager:
        if manager.latest_step() is not None:
            like = params, state, everywhere(digest(()))
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
            params, state, _ = manager.restore(None, args=ocp.args.StandardRestore(like))
        for number in range(int(state["count"]) + 1, options.steps + 1):
            mine = rows(len(labels), number, options)
            batch = (
                jax.make_array_from_process_local_data(split, x[mine]) for x in (images, labels)
            )
            params, state, loss = train_step(params, state, *batch)
            tell((number, float(loss)))
            if number % options.every == 0:
                saved = params, state, everywhere(digest((params, state)))
                manager.save(number, args=ocp.args.StandardSave(saved))
    return params


# ------------------------------------------------------------------------------------- checkpoints


class Damaged(Exception):
    """None of the checkpoints can be read."""


def manager_of(folder: Path) -> ocp.CheckpointManager:
    """Return the manager of the two newest checkpoints in a folder."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    handler = ocp.StandardCheckpointHandler()
    return ocp.CheckpointManager(folder, options=options, item_handlers=handler)


def digest(tree: Any) -> np.ndarray:
    """Return the SHA-256 of the arrays of a tree: 32 numbers, equal only for equal bits."""
    whole = hashlib.sha256()
    for x in jax.tree.leaves(tree):
        whole.update(np.asarray(x).tobytes())
    return np.frombuffer(whole.digest(), np.uint8)


def put_damaged_aside(options: argparse.Namespace) -> list[Path]:
    """Rename the checkpoints that are newer than the newest whole one: 40 becomes 40.damaged.

    Returns:
        Their new names.

    Raises:
        Damaged: if there are checkpoints and none is whole; they stay as they are.
    """
    params = draw(options.seed)
    like = params, jax.eval_shape(optimizer(options).init, params), digest(())
    like = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    damaged: dict[int, Exception] = {}
    with manager_of(options.checkpoints) as manager:
        for number in sorted(manager.all_steps(), reverse=True):
            try:
                *arrays, expected = manager.restore(number, args=ocp.args.StandardRestore(like))
                if not np.array_equal(digest(arrays), expected):
                    raise ValueError("the arrays are not those that were saved")
            except Exception as error:  # whatever the damage leads to
                damaged[number] = error
            else:
                break
        else:
            if damaged:
                reason = str(damaged[min(damaged)]).partition("\n")[0]
                raise Damaged(
                    f"none of the checkpoints in {options.checkpoints} can be read; to start from "
                    f"nothing, move them away. The oldest: {reason}"
                )
    folder = options.checkpoints
    return [(folder / f"{n}").rename(free(folder / f"{n}.damaged")) for n in damaged]


def free(path: Path) -> Path:
    """Return the path, or a longer one if something is there."""
    return free(path.with_name(f"{path.name}.damaged")) if path.exists() else path


# ------------------------------------------------------------------------------------ one process


def work(
    number: int, processes: int, devices: int, address: str, options: argparse.Namespace, told: Any
) -> None:
    """Be one of the processes.

    Args:
        number: which one, from 0.
        processes: how many there are.
        devices: how many CPU devices each has.
        address: host and port of process 0.
        options: the command line.
        told: the end of a pipe; the process sends (step, loss) after each step, and the
            parameters at the end.
    """
    # end together with the process that started this one
    starter: Any = multiprocessing.parent_process()
    threading.Thread(target=lambda: (starter.join(), os._exit(1)), daemon=True).start()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            address,
            num_processes=processes,
            process_id=number,
            cluster_detection_method="deactivate",
            coordinator_bind_address=address,
            heartbeat_timeout_seconds=options.timeout,
        )
        params = train(options, told.send)
        told.send(jax.tree.map(np.asarray, params))
        jax.distributed.shutdown()
    except Exception as error:
        # an orderly end would wait for the other processes
        if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
            print(f"process {number}: {error}", file=sys.stderr, flush=True)
            os._exit(NOTICED)
        traceback.print_exc()  # the error does not come from the connections
        sys.stderr.flush()
        os._exit(1)


# ------------------------------------------------------------------------------------ the starter


class Lost(Exception):
    """A process ended before the work was done; says which one, and how it ended."""


def run(
    processes: int, devices: int, options: argparse.Namespace, progress: Progress
) -> list[Params]:
    """Start the processes and watch over them; all have ended when this returns or raises.

    Args:
        processes: how many.
        devices: how many CPU devices each has.
        options: the command line.
        progress: shows the step and the loss of process 0.

    Returns:
        The parameters at the end of each process.

    Raises:
        Lost: if a process dies or falls silent.
    """
    context = multiprocessing.get_context("spawn")
    with socket.create_server(("127.0.0.1", 0)) as server:  # a free port
        address = "127.0.0.1:{1}".format(*server.getsockname())
    children: list[BaseProcess] = []
    pipes: list[Connection] = []
    try:
        for number in range(processes):
            pipe, told = context.Pipe(duplex=False)
            arguments = number, processes, devices, address, options, told
            child = context.Process(target=work, args=arguments, name=f"process {number}")
            child.start()
            told.close()  # only the child has this end now: the pipe ends with the child
            children.append(child)
            pipes.append(pipe)
        pids = ", ".join(f"{child.name} is {child.pid}" for child in children)
        progress.console.print(
            f"{processes} x {devices} devices; {pids}", highlight=False, soft_wrap=True
        )
        return listen(children, pipes, options, progress)
    finally:
        for child in children:
            child.kill()
            child.join()


def listen(
    children: list[BaseProcess],
    pipes: list[Connection],
    options: argparse.Namespace,
    progress: Progress,
) -> list[Params]:
    """Read from the children's pipes until all have ended; see `run`."""
    bar = progress.add_task("training", total=options.steps)
    said: dict[Connection, Any] = dict.fromkeys(pipes)
    left = set(pipes)
    while left:
        # JAX notices a silent process by its heartbeats; whatever else makes all wait, this ends
        training = all(x is not None for x in said.values())
        ready = wait(left, 2 * options.timeout if training else STARTING)
        if not ready:
            raise Lost(who_was_lost(children, options))
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                said[pipe] = pipe.recv()
            except (EOFError, OSError):  # the end, perhaps in the middle of a message
                left.remove(pipe)
                child = children[pipes.index(pipe)]
                child.join(1)
                if child.exitcode != 0:
                    raise Lost(who_was_lost(children, options)) from None
            if pipe is pipes[0] and isinstance(said[pipe], tuple):
                step, loss = said[pipe]
                progress.update(bar, completed=step, description=f"training, loss {loss:.4f}")
    return list(said.values())


def who_was_lost(children: list[BaseProcess], options: argparse.Namespace) -> str:
    """Return a sentence on the process whose end made the others end.

    A process that notices the end of another exits with NOTICED, or is aborted by JAX if the
    heartbeats stop. If all that ended did so, the lost process is one that still runs, silently.
    """
    for child in children:
        child.join(1)
    consequences = (0, None, NOTICED, -signal.SIGABRT)
    ended = [child for child in children if child.exitcode not in consequences]
    silent = [child for child in children if child.exitcode is None]
    return " and ".join(how_it_ended(child, options) for child in ended or silent or children)


def how_it_ended(child: BaseProcess, options: argparse.Namespace) -> str:
    """Return a sentence on how a process ended."""
    if child.exitcode is None:
        return f"{child.name} (pid {child.pid}) gave no sign of life for {options.timeout} s"
    if child.exitcode < 0:
        return (
            f"{child.name} (pid {child.pid}) was killed by {signal.Signals(-child.exitcode).name}"
        )
    return f"{child.name} (pid {child.pid}) ended with status {child.exitcode}, see above"


# ------------------------------------------------------------------------------- the command line


def above(bound: int) -> Callable[[str], int]:
    """Return a parser of whole numbers above a bound, for argparse."""

    def parse(text: str) -> int:
        if not (text.isdecimal() and int(text) > bound):
            raise argparse.ArgumentTypeError(f"must be a whole number > {bound}, got {text!r}")
        return int(text)

    return parse


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
        description=(__doc__ or "").partition("\n")[0],
        epilog="Exit status: 0; 1 if a process was lost, or if parameters differ that should not.",
    )
    for name, bound, default, help in (
        ("processes", 0, 2, "how many to start"),
        ("steps", 0, 200, "how many to train for"),
        ("batch-size", 0, 96, "images a step, over all processes; a multiple of their number"),
        ("seed", -1, 0, "of the first weights and the batches"),
        ("every", 0, 20, "steps between checkpoints"),
        ("timeout", 0, 10, "seconds without a sign of life after which a process counts as lost"),
    ):
        parser.add_argument(
            f"--{name}",
            metavar="N",
            type=above(bound),
            default=default,
            help=f"{help} (default: %(default)s)",
        )
    parser.add_argument(
        "--learning-rate",
        metavar="RATE",
        type=float,
        default=3e-3,
        help="of AdamW (default: %(default)s)",
    )
    parser.add_argument(
        "--checkpoints",
        metavar="FOLDER",
        type=folder,
        help="the folder of the checkpoints; a run goes on from the newest one (default: a "
        "temporary folder, which stays if a process is lost)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="train in one process too, with as many devices, and compare the parameters",
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example.

    Args:
        argv: the command line; None means the program's own.

    Returns:
        The exit status.
    """
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.batch_size % options.processes:
        parser.error(
            f"argument --batch-size: must be a multiple of --processes, {options.processes}, got "
            f"{options.batch_size}"
        )
    given, options.checkpoints = options.checkpoints, options.checkpoints or Path(mkdtemp())
    options.checkpoints = options.checkpoints.absolute()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), disable=options.no_progress) as progress:
        try:
            for path in put_damaged_aside(options):
                progress.console.print(f"a damaged checkpoint: kept as {path}", highlight=False)
            found = run(options.processes, 1, options, progress)
        except Damaged as error:
            progress.stop()
            print(f"data_parallel: {error}", file=sys.stderr)
            return 1
        except Lost as lost:
            progress.stop()
            print(
                f"\n{lost}.\nA sum over the processes needs all of them: the others were ended too."
                "\nTo go on from the last checkpoint, run the same command with "
                f"--checkpoints {shlex.quote(str(options.checkpoints))}",
                file=sys.stderr,
            )
            return 1
        if not given:
            shutil.rmtree(options.checkpoints)
        alone = []
        if options.check:
            with TemporaryDirectory() as folder:
                options.checkpoints = Path(folder)
                alone = run(1, options.processes, options, progress)
    sums = [digest(params)[:8].tobytes().hex() for params in found + alone]
    names = [f"process {number}" for number in range(options.processes)]
    for name, params, digits in zip([*names, "alone"], found + alone, sums, strict=False):
        print(f"{name}: accuracy {accuracy(params):.1%}, parameters {digits}")
    if len(set(sums)) > 1:
        print("The parameters should be equal, bit for bit: something is wrong.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
