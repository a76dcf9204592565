"""Two processes joined by `jax.distributed`: they agree with one, and none outlives a lost peer."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, str(ROOT / "examples" / "data_parallel.py"), "--no-progress"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
TIMEOUT = 4  # seconds without a sign of life after which a process counts as lost
FOREVER = "1000000"  # steps
NEVER = 120  # seconds, for what takes a few; a machine may be busy


class Started:
    """The command, running in a session of its own, so that what it leaves behind can be seen."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.log, self.folder = folder.with_suffix(".log"), folder
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*COMMAND, "--checkpoints", str(folder), *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=ENVIRONMENT,
                start_new_session=True,
            )

    def said(self) -> str:
        return self.log.read_text()

    def ends(self) -> int:
        """Wait for the end of all its processes; return the exit status."""
        status = self.process.wait(NEVER)
        until(lambda: not self.left_behind())
        return status

    def pid_in_training(self, number: int) -> int:
        """Return a process's id once there is a checkpoint."""
        until(lambda: saved(self.folder) or self.process.poll() is not None)
        found = re.search(rf"process {number} is (\d+)", self.said())
        assert found and self.process.poll() is None, self.said()
        return int(found.group(1))

    def left_behind(self) -> bool:
        """Say whether any process of the session is there, a zombie or Python's helper included."""
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[Started]:
    """Start the command; leave nothing of it behind, whatever the test finds."""
    command = Started(folder, *arguments)
    try:
        yield command
    finally:
        if command.left_behind():
            os.killpg(command.process.pid, signal.SIGKILL)
        command.ends()


def until(holds) -> None:
    deadline = time.monotonic() + NEVER
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def saved(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints: orbax renames a folder when it is complete."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_the_next_one_ends_where_one_process_does(tmp_path):
    folder = tmp_path / "kept"
    with started(folder, "--steps", FOREVER, "--every", "10") as command:
        lost = command.pid_in_training(1)
        os.kill(lost, signal.SIGKILL)
        # the connections of a killed process are closed at once: the heartbeats are not waited for
        assert command.ends() == 1
        assert f"\nprocess 1 (pid {lost}) was killed by SIGKILL.\n" in command.said()
        assert command.said().endswith(f"run the same command with --checkpoints {folder}\n")

    steps = saved(folder)[-1] + 15
    with started(folder, "--steps", str(steps), "--every", "10", "--check") as command:
        assert command.ends() == 0, command.said()
        found = re.findall(r"^(.*): accuracy (\S+)%, parameters (\w+)$", command.said(), re.M)
        assert [name for name, _, _ in found] == ["process 0", "process 1", "alone"]
        # bit for bit: the only sum over processes has two terms, in whatever order
        assert len({parameters for _, _, parameters in found}) == 1
        assert float(found[0][1]) > 50  # a guess is right in 10 %


@pytest.mark.slow
def test_a_silent_process_is_noticed_by_its_heartbeats_and_does_not_outlive_the_run(tmp_path):
    arguments = "--steps", FOREVER, "--every", "10", "--timeout", str(TIMEOUT)
    with started(tmp_path / "kept", *arguments) as command:
        lost = command.pid_in_training(0)  # the one that the others' heartbeats go to
        start = time.monotonic()
        os.kill(lost, signal.SIGSTOP)
        assert command.ends() == 1
        # JAX: the time that was given, and up to half of it between two heartbeats; ours: a second
        # for each process to end by itself; and as much again for a busy machine
        assert time.monotonic() - start < 2 * (1.5 * TIMEOUT + 2)
        assert f"process 0 (pid {lost}) gave no sign of life for {TIMEOUT} s" in command.said()


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_cannot_save_ends_the_run(tmp_path, number):
    """Its files may not exceed 1 kB, as if the disk were full; the other one waits for it."""
    arguments = "--steps", FOREVER, "--every", "10", "--timeout", str(TIMEOUT)
    with started(tmp_path / "kept", *arguments) as command:
        pid = command.pid_in_training(number)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1024, 1024))
        assert command.ends() == 1
        assert f"process {number} (pid {pid}) " in command.said()
        assert "run the same command with" in command.said()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--processes", "5"], "--batch-size: must be a multiple of --processes, 5, got 96"),
        pytest.param(
            ["--steps", "0"],
            "--steps: must be a whole number > 0, got '0'",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_cannot_run_is_refused(arguments, said):
    found = subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert found.returncode == 2
    assert said in found.stderr


COMPARING = """
import sys

import jax

number, port = map(int, sys.argv[1:])
jax.config.update("jax_num_cpu_devices", 2 if number >= 0 else 4)
if number >= 0:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, number)

import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adamx

mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))


def put(x, *spec):
    where = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.make_array_from_callback(x.shape, where, lambda index: x[index])


def draw(seed):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((8, 3), np.float32)
    w[seed % 8] *= 2.0 ** (20 * seed)  # the largest difference is in one process alone
    return {"b": put(rng.standard_normal(3, np.float32)), "w": put(w, "x")}


params = draw(9)
assert (number < 0) == params["w"].is_fully_addressable
found = adamx.compare(adamx.adam(0.1), optax.adam(0.1, b2=0.9), params, draw, steps=3)
print(repr(found))
"""


@pytest.mark.slow
def test_what_several_processes_compare_is_what_one_does():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    def start(number: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", COMPARING, str(number), str(port)]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=ENVIRONMENT, **pipes)

    started = [start(number) for number in (0, 1, -1)]
    try:
        said = [process.communicate(timeout=NEVER) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0, 0], said
    first, second, alone = (out.splitlines()[-1] for out, _ in said)
    assert first == second == alone and alone.startswith("Comparison(")
