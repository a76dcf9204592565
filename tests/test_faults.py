"""A training that is killed many times ends where an undisturbed one does, bit for bit.

What is killed is `examples/resumable.py`, which saves through orbax while it trains: a process of
its own each time, ended by SIGKILL, which no process can handle or clean up after. When it dies is
drawn from a seed: while it loads, after some step, or so long after it began to save.

The processes are forked by a server that has the modules imported and no backend of JAX started,
since importing takes longer than all the rest.
"""

import dataclasses
import importlib.util
import multiprocessing
import os
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import on_cpu

TESTS = Path(__file__).parent
EVERY = 3
PATIENCE = 300  # seconds until something that has to come is missed

spec = importlib.util.spec_from_file_location("resumable", TESTS.parent / "examples/resumable.py")
assert spec is not None and spec.loader is not None
resumable: Any = importlib.util.module_from_spec(spec)
sys.modules["resumable"] = resumable  # dataclasses look their module up
spec.loader.exec_module(resumable)


def train(steps, directory, pipe):
    """Run the example, in a process of its own, and say through the pipe what it does."""
    pipe.send(("born", 0))
    resumable.train(steps, EVERY, directory, lambda what, step: pipe.send((what, step)))


@dataclasses.dataclass
class Life:
    """What was seen of one process: what it said and when (in seconds from its start), its end."""

    said: list[tuple[str, int, float]]
    exitcode: int | None = None

    def steps(self, what):
        return [step for word, step, _ in self.said if word == what]

    def times(self, what):
        return [when for word, _, when in self.said if word == what]


def live(server, steps, directory, until=None, delay=0.0):
    """Train in a process; kill it so long after it has said (what, how often), if it is to die."""
    pipe, theirs = server.Pipe(duplex=False)
    process = server.Process(target=train, args=(steps, directory, theirs))
    process.start()
    theirs.close()  # so that the end of the process is the end of the pipe
    life, begun = Life([]), time.monotonic()
    try:
        while until is None or len(life.steps(until[0])) < until[1]:
            assert pipe.poll(PATIENCE), f"nothing for {PATIENCE} s after {life.said[-3:]}"
            life.said.append((*pipe.recv(), time.monotonic() - begun))
        until_killed, then = time.monotonic() + delay, len(life.said)
        # not longer than three reports: where the delay was measured, the machine was busier
        while len(life.said) < then + 3 and pipe.poll(max(until_killed - time.monotonic(), 0.0)):
            life.said.append((*pipe.recv(), time.monotonic() - begun))
        os.kill(process.pid, signal.SIGKILL)
        while True:  # what it had said when it died
            life.said.append((*pipe.recv(), time.monotonic() - begun))
    except EOFError:
        process.join(PATIENCE)
    finally:
        process.kill()
    life.exitcode = process.exitcode
    return life


def complete(directory):
    """Return the steps of the checkpoints that are complete."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit())


def last_checkpoint(steps, directory):
    """Return the parameters and the state at the end of the training."""
    with ocp.CheckpointManager(directory, item_handlers=ocp.StandardCheckpointHandler()) as manager:
        params, state, newest = resumable.resume(manager, lambda *_: None)
    assert newest == steps
    return params, state


@pytest.fixture(scope="module")
def server():
    """Return a fork server: its processes start with everything imported."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), *sys.path])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    context.Process(target=int).start()  # so that the server starts with this path
    yield context
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before


@pytest.mark.parametrize(
    ("seed", "steps", "kills", "least"),
    [
        # kills while it loads, after a step, while it saves; and how many processes died before
        # they had loaded, how many left an unfinished checkpoint, how many steps were repeated
        pytest.param(1, 30, (1, 1, 1), (0, 0, 1), id="3"),
        # measured: 14, 16, 161; the plans end after 205 steps, and what a delay lets pass
        pytest.param(0, 300, (14, 16, 20), (5, 3, 20), id="50", marks=pytest.mark.slow),
    ],
)
def test_killed_again_and_again_it_ends_where_an_undisturbed_run_does(
    seed, steps, kills, least, server, tmp_path
):
    on_cpu("on a GPU two processes may multiply matrices in different orders")
    undisturbed, directory = tmp_path / "undisturbed", tmp_path / "killed"
    whole = live(server, steps, undisturbed)
    assert whole.exitcode == 0 and whole.steps("step") == list(range(1, steps + 1))
    loading = whole.times("loaded")[0] - whole.times("born")[0]
    saving = statistics.median(np.diff(whole.times("saving")))  # each waits for the one before

    generator = np.random.default_rng(seed)
    # what to wait for, and which share of a loading or a saving to let pass then
    born, stepped, saved = kills
    plans = [(("born", 1), generator.uniform(0, 1)) for _ in range(born)]
    plans += [(("step", generator.integers(1, 11)), 0.0) for _ in range(stepped)]
    plans += [(("saving", generator.integers(1, 4)), generator.uniform(0, 1)) for _ in range(saved)]
    unloaded, unfinished, repeated, furthest = 0, 0, 0, 0
    for index in generator.permutation(len(plans)):
        until, share = plans[index]
        newest = max(complete(directory), default=0)
        delay = share * (loading if until[0] == "born" else saving)
        life = live(server, steps, directory, until, delay)

        assert life.exitcode == -signal.SIGKILL
        assert life.steps("loaded") in ([], [newest])  # from the newest complete checkpoint
        done = life.steps("step")
        assert done == list(range(newest + 1, newest + 1 + len(done)))
        if life.steps("loaded"):
            loading = min(loading, life.times("loaded")[0] - life.times("born")[0])
        unloaded += not life.steps("loaded")
        tried = life.steps("saving")[-1:]
        unfinished += any((directory / f"{step}.orbax-checkpoint-tmp").exists() for step in tried)
        repeated += sum(step <= furthest for step in done)
        furthest = max(furthest, *done) if done else furthest

    seen = unloaded, unfinished, repeated
    assert all(a >= b for a, b in zip(seen, least, strict=True)), seen
    newest = complete(directory)[-1]
    last = live(server, steps, directory)
    assert last.exitcode == 0 and last.steps("loaded") == [newest]
    expected, found = (last_checkpoint(steps, x) for x in (undisturbed, directory))
    assert found[1]["count"] == steps
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
