"""Small cases of published packages, trained with their own code; `clients.py` runs them.

    python benchmarks/clients_cases.py numpyro      prints what was measured as one line of JSON

A case is a function of a transformation. It is called with Optax's and with adamx's.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import io
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import Loop, Sample, interleave, ratio

import adamx

ROUNDS = {"step": 20, "fit": 9}


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a case gives back.

    Attributes:
        losses: of the steps, or of the epochs; the last decides how well it trained.
        params: the final parameters.
        sample: measures the seconds of a step or of a fit.
    """

    losses: Any
    params: Any
    sample: Sample


@dataclasses.dataclass(frozen=True)
class Case:
    """A small case of a package.

    Attributes:
        package: its name, which the case is called by.
        requires: what is installed for it, beside what adamx needs.
        what: is trained.
        optimizer: an expression, which is evaluated with the names of Optax, and with adamx's.
        also: an expression with adamx's names.
        fit: trains with a transformation.
        bound: of the differences, relative to the largest magnitude.
        timed: "step", "fit" where the package's code does not give its step away, or "" if a fit
            takes too long to be repeated.
        note: what adamx does on purpose otherwise, or what else is to be known.
    """

    package: str
    requires: tuple[str, ...]
    what: str
    optimizer: str
    also: str
    fit: Callable[[Any], Fit]
    bound: float
    timed: str
    note: str


CASES: dict[str, Case] = {}


def case(
    package: str,
    *requires: str,
    what: str,
    optimizer: str,
    also: str,
    bound: float = 1e-4,
    timed: str = "step",
    note: str = "",
) -> Callable[[Callable[[Any], Fit]], Callable[[Any], Fit]]:
    """Return a decorator that makes a function one of the cases; see `Case`."""

    def register(fit: Callable[[Any], Fit]) -> Callable[[Any], Fit]:
        needed = requires or (package,)
        CASES[package] = Case(package, needed, what, optimizer, also, fit, bound, timed, note)
        return fit

    return register


# ---------------------------------------------------------------------------------- measuring one


def transformation(expression: str, library: Any) -> Any:
    """Return what an expression makes with a library's names, and with Optax's `..._schedule`.

    Example:
        >>> transformation("adam(cosine_decay_schedule(0.5, 10), b1=0.75)", adamx).update is None
        False
    """
    schedules = {name: value for name, value in vars(optax).items() if name.endswith("_schedule")}
    return eval(expression, schedules | vars(library))


def difference(a: Any, b: Any) -> float:
    """Return the largest difference between two trees over the largest magnitude in the second.

    Raises:
        ValueError: if the trees or the shapes are not the same, or something is not finite.

    Example:
        >>> difference({"w": [1.0, 2.5]}, {"w": [1.0, 2.0]})
        0.25
    """
    if (have := jax.tree.structure(a)) != (wanted := jax.tree.structure(b)):
        raise ValueError(f"the trees differ: {have} and {wanted}")
    pairs = [
        tuple(map(np.asarray, pair)) for pair in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    ]
    for x, y in pairs:
        if x.shape != y.shape:
            raise ValueError(f"the shapes differ: {x.shape} and {y.shape}")
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise ValueError("not everything is finite")
    largest = max(float(np.max(np.abs(y), initial=0.0)) for _, y in pairs)
    apart = max(float(np.max(np.abs(x - y), initial=0.0)) for x, y in pairs)
    return apart / largest if largest else apart


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collect an entry for each program that XLA compiles."""
    seen: list[str] = []

    def listen(event: str, _: float, **__: Any) -> None:
        if event.endswith("backend_compile_duration"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def measured(of: Case) -> dict[str, Any]:
    """Train a case with Optax, with adamx, and with what only adamx has.

    Returns:
        `versions` of the packages; the differences of `losses` and `params`; `compiled`, with Optax
        and with adamx; `ratio`, the times'; `last`, the last losses of all three.
    """
    fits, compiled = [], []
    transformations = [transformation(of.optimizer, library) for library in (optax, adamx)]
    for tx in (transformation(of.also, adamx), *transformations):
        jax.clear_caches()
        with compilations() as seen:
            fits.append(of.fit(tx))
        compiled.append(len(seen))
    also, theirs, ours = fits
    samples = {"optax": theirs.sample, "adamx": ours.sample}
    times = interleave(samples, rounds=ROUNDS[of.timed], seed=0) if of.timed else {}
    names = [re.split(r"[<>=]", requirement)[0] for requirement in of.requires]
    return {
        "versions": {name: importlib.metadata.version(name) for name in (*names, "jax", "optax")},
        "losses": difference(ours.losses, theirs.losses),
        "params": difference(ours.params, theirs.params),
        "compiled": compiled[1:],
        "ratio": f"{ratio(times['adamx'], times['optax'])}, {of.timed}s" if of.timed else "-",
        "last": [float(np.ravel(fit.losses)[-1]) for fit in (theirs, ours, also)],
    }


def loop(step: Callable[..., Any], *carry: Any) -> Loop:
    """Return a sample of a step; a step may return more than its arguments, which is dropped."""
    count = len(carry)
    return Loop(lambda *carry: tuple(step(*carry))[:count], carry)


def timed(fit: Callable[[], Any]) -> Sample:
    """Return a sample of a whole fit."""

    def sample() -> float:
        start = time.perf_counter()
        jax.block_until_ready([x for x in jax.tree.leaves(fit()) if isinstance(x, jax.Array)])
        return time.perf_counter() - start

    return sample


def in_place_of(name: str, tx: Any) -> Any:
    """Return a context in which a function of Optax, whatever its arguments, gives `tx`."""
    return mock.patch.object(optax, name, lambda *_, **__: tx)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    """Return standard normal numbers."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def plain_step(tx: Any, loss: Callable[[Any], jax.Array]) -> Callable[[Any, Any], Any]:
    """Return the step (params, state) -> (params, state, loss) of a plain loop."""

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def steps_of(step: Callable[..., Any], params: Any, state: Any, count: int) -> tuple[Any, Any, Any]:
    """Return parameters, state and losses after some steps."""
    losses = []
    for _ in range(count):
        params, state, value = step(params, state)
        losses.append(value)
    return params, state, losses


def plain_fit(tx: Any, loss: Callable[[Any], jax.Array], params: Any, count: int) -> Fit:
    """Train in a plain loop, where the package has none of its own."""
    step = plain_step(tx, loss)
    params, state, losses = steps_of(step, params, tx.init(params), count)
    return Fit(losses, params, loop(step, params, state))


def small_network() -> tuple[Any, Callable[[Any], jax.Array]]:
    """Return the parameters and the loss of a network, for cases that are about something else."""
    x = normal(64, 4)

    def loss(params: Any) -> jax.Array:
        return jnp.mean((jnp.tanh(x @ params["w"]) @ params["out"] - jnp.sin(x[:, :1])) ** 2)

    return {"w": 0.3 * normal(4, 8, seed=1), "out": 0.3 * normal(8, 1, seed=2)}, loss


# -------------------------------------------------------------------------------------- the cases


@case(
    "numpyro",
    "numpyro",
    "optax",
    what="SVI of a logistic regression, 300 steps",
    optimizer="adam(cosine_decay_schedule(0.05, 300))",
    also="skip_nonfinite(adam(0.05, moments='packed16'))",
)
def numpyro(tx: Any) -> Fit:
    """Fit a normal guide by `SVI.run`."""
    import numpyro
    from numpyro import distributions as dist
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal

    x = normal(200, 4)
    y = (x @ jnp.array([1.0, -2.0, 0.5, 0.0]) > 0).astype(jnp.float32)

    def model(x: jax.Array, y: jax.Array) -> None:
        w = numpyro.sample("w", dist.Normal(jnp.zeros(4), 3.0).to_event(1))
        bias = numpyro.sample("bias", dist.Normal(0.0, 3.0))
        numpyro.sample("y", dist.Bernoulli(logits=x @ w + bias), obs=y)

    svi = SVI(model, AutoNormal(model), tx, Trace_ELBO())
    result = svi.run(jax.random.key(0), 300, x, y, progress_bar=False)
    step = jax.jit(lambda state: svi.update(state, x, y))
    return Fit(result.losses, result.params, loop(step, result.state))


@case(
    "netket",
    what="VMC of an Ising chain by SR, complex RBM, all states, 60 steps, float64",
    optimizer="sgd(0.05, momentum=0.5)",
    also="chain(clip_by_global_norm(1.0), adam(0.02))",
    bound=1e-9,
)
def netket(tx: Any) -> Fit:
    """Find a ground state by `VMC.run`."""
    import netket as nk

    hilbert = nk.hilbert.Spin(0.5, 8)
    energy = nk.operator.IsingJax(hilbert, graph=nk.graph.Chain(8), h=1.0)
    state = nk.vqs.FullSumState(hilbert, nk.models.RBM(alpha=1, param_dtype=complex), seed=0)
    sr = nk.optimizer.SR(diag_shift=0.01, holomorphic=True)
    driver = nk.driver.VMC(energy, tx, variational_state=state, preconditioner=sr)
    log = nk.logging.RuntimeLog()
    driver.run(60, out=log, show_progress=False)
    params = jax.tree.map(jnp.copy, state.parameters)

    def step() -> tuple[()]:
        driver.run(1, show_progress=False)
        jax.block_until_ready(state.parameters)
        return ()

    return Fit(np.real(log.data["Energy"]["Mean"]), params, loop(step))


@case(
    "optimistix",
    "optimistix",
    "optax",
    what="`minimise` by `OptaxMinimiser` of Rosenbrock's function of 10 variables, 100 steps",
    optimizer="chain(clip_by_global_norm(10.0), adam(0.02))",
    also="chain(adaptive_clip(1.0), adam(0.02, nu_dtype='bfloat16'))",
    timed="fit",
)
def optimistix(tx: Any) -> Fit:
    """Minimise until the steps are small."""
    import optimistix as optx

    def rosenbrock(x: jax.Array, _: Any) -> jax.Array:
        return jnp.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)

    solver = optx.OptaxMinimiser(tx, rtol=0.0, atol=0.0)

    def solve() -> jax.Array:
        return optx.minimise(rosenbrock, solver, jnp.zeros(10), max_steps=100, throw=False).value

    found = solve()
    return Fit(rosenbrock(found, None), found, timed(solve))


@case(
    "equinox",
    "equinox",
    "diffrax",
    "optax",
    what="a neural ODE by diffrax's adjoint, 100 steps",
    optimizer="adabelief(3e-3)",
    also="adamw(3e-3, mask='*/weight', moments='packed8')",
)
def equinox(tx: Any) -> Fit:
    """Learn a spiral's vector field."""
    import diffrax
    import equinox as eqx

    times = jnp.linspace(0.0, 1.0, 8)
    turns = jnp.array([[-0.2, 2.0], [-2.0, -0.2]])
    starts = normal(16, 2)
    paths = jax.vmap(lambda t: starts @ jax.scipy.linalg.expm(turns * t).T, out_axes=1)(times)
    model = eqx.nn.MLP(2, 2, 16, 2, activation=jnp.tanh, key=jax.random.key(0))

    def solved(model: Any, start: jax.Array) -> jax.Array:
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda _, y, model: model(y)), diffrax.Tsit5(), 0.0, 1.0, 0.05, start,
            args=model, saveat=diffrax.SaveAt(ts=times),
        ).ys  # fmt: skip

    def loss(model: Any) -> jax.Array:
        return jnp.mean((jax.vmap(solved, (None, 0))(model, starts) - paths) ** 2)

    @eqx.filter_jit
    def step(model: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        value, grads = eqx.filter_value_and_grad(loss)(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, value

    losses, state = [], tx.init(eqx.filter(model, eqx.is_inexact_array))
    for _ in range(100):
        model, state, value = step(model, state)
        losses.append(value)
    params = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    return Fit(losses, params, loop(step, model, state))


@case(
    "GPJax",
    "GPJax>=1",
    what="`fit` of a Gaussian process of 40 points, 200 steps",
    optimizer="chain(clip_by_global_norm(5.0), adamw(0.02, weight_decay=1e-3))",
    also="chain(clip_by_global_norm(5.0), lion(0.02))",
    timed="fit",
)
def gpjax(tx: Any) -> Fit:
    """Fit the hyperparameters of a kernel."""
    import gpjax as gpx

    x = jnp.sort(normal(40, 1), 0)
    data = gpx.Dataset(X=x, y=jnp.sin(3 * x) + 0.1 * normal(40, 1, seed=1))
    prior = gpx.gps.Prior(mean_function=gpx.mean_functions.Zero(), kernel=gpx.kernels.RBF())
    posterior = prior * gpx.likelihoods.Gaussian()

    def fit() -> Any:
        return gpx.fit(
            model=posterior, objective=lambda p, d: -gpx.objectives.conjugate_mll(p, d),
            train_data=data, optim=tx, num_iters=200, key=jax.random.key(0), verbose=False,
        )  # fmt: skip

    model, losses = fit()
    return Fit(losses, jax.tree.leaves(model), timed(fit))


@case(
    "dynamax",
    what="`fit_sgd` of a Gaussian HMM of 3 states, 60 epochs",
    optimizer="adam(0.02)",
    also="skip_spikes(chain(clip_by_global_norm(1.0), adam(0.02)))",
    timed="",
    note="The first gradients are so large that Adam remembers them for a thousand steps, but for "
    "a clip, as the one below. With a clip the last loss depends on the last bits: a rate changed "
    "by a millionth moves it from 32 to 44, with either library.",
)
def dynamax(tx: Any) -> Fit:
    """Fit a hidden Markov model to a path of its own."""
    from dynamax.hidden_markov_model import GaussianHMM

    hmm = GaussianHMM(3, 2)
    true, _ = hmm.initialize(jax.random.key(1))
    _, emissions = hmm.sample(true, jax.random.key(2), 100)
    params, properties = hmm.initialize(jax.random.key(0))

    def fit() -> Any:
        return hmm.fit_sgd(params, properties, emissions[None], optimizer=tx, num_epochs=60)

    fitted, losses = fit()
    return Fit(losses, jax.tree.leaves(fitted), timed(fit))


@case(
    "flowMC",
    "flowMC",
    what="`train` of a RealNVP flow of 2 dimensions, 20 epochs of 4 batches",
    optimizer="radam(3e-3)",
    also="adan(3e-3, weight_decay=1e-3)",
)
def flowmc(tx: Any) -> Fit:
    """Train a normalizing flow."""
    import equinox as eqx
    from flowMC.resource.model.nf_model.realNVP import RealNVP

    x = normal(256, 2)
    data = jnp.stack([x[:, 0], x[:, 1] + 0.5 * x[:, 0] ** 2], axis=1)
    flow = RealNVP(2, 2, 16, jax.random.key(0))
    state = tx.init(eqx.filter(flow, eqx.is_inexact_array))
    _, best, state, losses = flow.train(jax.random.key(1), data, tx, state, 20, 64, verbose=False)
    step = lambda model, state: model.train_step(data[:64], tx, state)[1:]  # noqa: E731
    params = jax.tree.leaves(eqx.filter(best, eqx.is_inexact_array))
    return Fit(losses, params, loop(step, best, state))


@case(
    "jaxopt",
    "jaxopt",
    "optax",
    what="`OptaxSolver` of a logistic regression, 200 steps",
    optimizer="lamb(0.02, weight_decay=0.0)",
    also="schedule_free_adamw(0.1)",
)
def jaxopt(tx: Any) -> Fit:
    """Solve by `OptaxSolver.run`."""
    import jaxopt

    x = normal(100, 5)
    y = (x[:, 0] + 0.5 * normal(100, seed=1) > 0).astype(jnp.int32)

    def loss(w: jax.Array) -> jax.Array:
        return jnp.mean(jaxopt.loss.binary_logistic_loss(y, x @ w)) + 1e-3 * jnp.sum(w**2)

    solver = jaxopt.OptaxSolver(opt=tx, fun=loss, maxiter=200, tol=0.0)
    start = jnp.full(5, 0.1)
    params, state = solver.run(start)
    step = jax.jit(solver.update)
    return Fit(state.value, params, loop(step, params, state))


@case(
    "evosax",
    what="OpenES of a quartic of 8 variables, 60 generations of 32",
    optimizer="sgd(0.05, momentum=0.9)",
    also="adamw(0.05, moments='packed16')",
)
def evosax(tx: Any) -> Fit:
    """Minimise by ask and tell."""
    from evosax.algorithms import Open_ES

    start = jnp.full(8, 1.5)
    es = Open_ES(32, start, optimizer=tx, std_schedule=optax.constant_schedule(0.1))
    settings = es.default_params

    @jax.jit
    def step(state: Any, key: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
        key, ask, tell = jax.random.split(key, 3)
        population, state = es.ask(ask, state, settings)
        fitness = jnp.sum(population**4 + population**2, axis=1)
        state, _ = es.tell(tell, population, fitness, state, settings)
        return state, key, jnp.mean(fitness)

    state, key, losses = es.init(jax.random.key(0), start, settings), jax.random.key(1), []
    for _ in range(60):
        state, key, value = step(state, key)
        losses.append(value)
    return Fit(losses, es.get_mean(state), loop(step, state, key))


@case(
    "brax",
    "brax",
    "jax<0.10",
    what="PPO, SAC and ES on `fast`, a few updates each",
    optimizer="adam(1e-3)",
    also="skip_nonfinite(chain(clip_by_global_norm(1.0), adam(1e-3)))",
    timed="",
    note="The three make their optimizers themselves: `optax.adam` is replaced for their call. PPO "
    "fails with JAX 0.10 or newer, without `jax.device_put_replicated`.",
)
def brax(tx: Any) -> Fit:
    """Train three agents for so few updates that equal actions are drawn."""
    from brax import envs
    from brax.training.agents.es import train as es
    from brax.training.agents.ppo import train as ppo
    from brax.training.agents.sac import train as sac

    settings = {"episode_length": 8, "num_evals": 2, "num_eval_envs": 2, "max_devices_per_host": 1}

    def fit() -> Any:
        with in_place_of("adam", tx):
            environment = envs.get_environment("fast")
            trained = [
                ppo.train(
                    environment, num_timesteps=128, num_envs=4, unroll_length=4, batch_size=4,
                    num_minibatches=2, num_updates_per_batch=2, **settings,
                ),
                sac.train(
                    environment, num_timesteps=64, num_envs=4, batch_size=8, min_replay_size=16,
                    **settings,
                ),
                es.train(environment, num_timesteps=256, population_size=4, **settings),
            ]  # fmt: skip
        return trained

    trained = fit()
    losses = [
        value for _, _, metrics in trained for name, value in metrics.items() if "loss" in name
    ]
    return Fit(losses, [params for _, params, _ in trained], timed(fit))


@case(
    "haliax",
    "haliax>=1.4.dev453",
    "jax<0.9",
    "equinox",
    "optax",
    what="an MLP with named axes, 100 steps",
    optimizer="rmsprop(3e-3, eps_in_sqrt=False)",
    also="by_path({'*/bias/*': sgd(0.01)}, default=adamw(3e-3))",
    note="Optax's `rmsprop` has eps inside the root by default, adamx's outside. haliax 1.3 fails "
    "with JAX 0.8 or newer, its development release with 0.9 or newer.",
)
def haliax(tx: Any) -> Fit:
    """Train on named arrays."""
    import equinox as eqx
    import haliax as hax

    Batch, In, Out = hax.make_axes(Batch=64, In=4, Out=1)
    model = hax.nn.MLP.init(In, Out, 16, 2, key=jax.random.key(0), activation=hax.nn.relu)
    x = hax.named(normal(64, 4), (Batch, In))
    y = hax.named(jnp.sin(normal(64, 4).sum(-1, keepdims=True)), (Batch, Out))

    @eqx.filter_jit
    def step(model: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        loss = lambda model: hax.mean((model(x) - y) ** 2).scalar()  # noqa: E731
        value, grads = eqx.filter_value_and_grad(loss)(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, value

    state, losses = tx.init(eqx.filter(model, eqx.is_inexact_array)), []
    for _ in range(100):
        model, state, value = step(model, state)
        losses.append(value)
    params = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    return Fit(losses, params, loop(step, model, state))


@case(
    "penzai",
    "penzai",
    "optax",
    what="`StatefulTrainer` of an MLP, 100 steps",
    optimizer="chain(clip_by_global_norm(1.0), nadamw(3e-3))",
    also="chain(lamb(3e-3), ema_of_params(0.9))",
)
def penzai(tx: Any) -> Fit:
    """Train by `StatefulTrainer.step`."""
    from penzai import pz
    from penzai.models import simple_mlp
    from penzai.toolshed import basic_training

    model = simple_mlp.MLP.from_config(
        name="mlp", init_base_rng=jax.random.key(0), feature_sizes=[4, 16, 1]
    )
    x = pz.nx.wrap(normal(64, 4)).tag("batch", "features")
    y = pz.nx.wrap(jnp.sin(normal(64, 4).sum(-1, keepdims=True))).tag("batch", "features")

    def loss(model: Any, rng: Any, state: Any) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
        del rng
        error = (model(x) - y).untag("batch", "features").unwrap()
        return jnp.mean(error**2), state, {"loss": jnp.mean(error**2)}

    trainer = basic_training.StatefulTrainer.build(
        root_rng=jax.random.key(1), model=model, optimizer_def=tx, loss_fn=loss,
        initial_loss_fn_state=None,
    )  # fmt: skip
    losses = [trainer.step()["loss"] for _ in range(100)]
    params = jax.tree.leaves(jax.tree.map(jnp.copy, pz.freeze_params(trainer.model)))

    def step() -> tuple[jax.Array]:
        return (trainer.step()["loss"],)

    return Fit(losses, params, Loop(lambda _: step(), (jnp.zeros(()),)))


@case(
    "google-tunix",
    what="`PeftTrainer` of a small language model, 20 steps of 2 micro-batches in `MultiSteps`",
    optimizer="chain(clip_by_global_norm(1.0), adamw(cosine_decay_schedule(0.02, 20)))",
    also="master_weights(adamw(0.02, moments='packed8'))",
    timed="fit",
    note="A fit is traced anew, and the compiled step comes out of a cache: tracing adamx's step "
    "takes two to three times as long as Optax's, for five arrays of as many shapes.",
)
def tunix(tx: Any) -> Fit:
    """Fine-tune by `PeftTrainer.train`."""
    from flax import nnx
    from tunix.sft import peft_trainer

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.embed = nnx.Embed(16, 8, rngs=rngs)
            self.hidden, self.out = nnx.Linear(8, 32, rngs=rngs), nnx.Linear(32, 16, rngs=rngs)

        def __call__(self, tokens: jax.Array, *_: Any) -> tuple[jax.Array, None]:
            return self.out(nnx.relu(self.hidden(self.embed(tokens)))), None

    tokens = np.random.default_rng(0).integers(0, 15, (40, 4, 8))
    tokens[..., 1::2] = tokens[..., ::2] + 1  # every other token follows from the one before it
    ones = np.ones_like(tokens)
    batches = [{"input_tokens": t, "input_mask": ones[0]} for t in tokens]

    def inputs(batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "positions": ones[0], "attention_mask": ones[0]}

    def fit() -> Any:
        model, losses = Model(nnx.Rngs(0)), []
        config = peft_trainer.TrainingConfig(
            eval_every_n_steps=1000, max_steps=20, gradient_accumulation_steps=2
        )
        trainer = peft_trainer.PeftTrainer(model, tx, config).with_gen_model_input_fn(inputs)
        write = trainer._log_metrics
        trainer._log_metrics = lambda loss, *rest, **kw: (
            losses.append(loss),
            write(loss, *rest, **kw),
        )
        # the trainer's logger clears the listeners, of which one counts compilations
        with mock.patch.object(jax.monitoring, "clear_event_listeners"):
            trainer.train(batches)
        return nnx.to_pure_dict(nnx.state(model, nnx.Param)), losses

    params, losses = fit()
    return Fit(losses, params, timed(fit))


@case(
    "jraph",
    "jraph",
    "optax",
    what="a graph convolution on a ring, 100 steps",
    optimizer="adagrad(0.1)",
    also="chain(clip_by_value(1.0), adamw(0.01, nu_dtype='bfloat16'))",
    note="Optax's `adagrad` has eps inside the root, adamx's outside by default. Its state is 2 "
    "arrays, adamx's 4: with the count and the rate a call takes some 10 microseconds more.",
)
def jraph(tx: Any) -> Fit:
    """Predict for each node of a graph."""
    import jraph

    nodes, ring = normal(20, 3), jnp.arange(20)
    graph = jraph.GraphsTuple(
        nodes=nodes, edges=None, senders=ring, receivers=(ring + 1) % 20, globals=None,
        n_node=jnp.array([20]), n_edge=jnp.array([20]),
    )  # fmt: skip
    wanted = jnp.roll(nodes, 1, 0).sum(-1, keepdims=True)
    params = {"w": 0.3 * normal(3, 8, seed=1), "out": 0.3 * normal(8, 1, seed=2)}

    def loss(params: Any) -> jax.Array:
        layer = jraph.GraphConvolution(lambda nodes: nodes @ params["w"], add_self_edges=True)
        return jnp.mean((jnp.tanh(layer(graph).nodes) @ params["out"] - wanted) ** 2)

    return plain_fit(tx, loss, params, 100)


@case(
    "keras",
    "keras",
    "jax",
    "optax",
    what="a model on JAX, trained by `stateless_call`, 100 steps",
    optimizer="amsgrad(5e-3)",
    also="adam_mini(5e-3)",
    note="Keras's own `fit` takes Keras's optimizers only.",
)
def keras(tx: Any) -> Fit:
    """Train Keras's variables, a list, in a loop as its guide to JAX shows."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.layers.Input((4,)),
        keras.layers.Dense(16, "relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Dense(1),
    ])  # fmt: skip
    x = normal(64, 4)
    y = jnp.sin(x.sum(-1, keepdims=True))
    fixed = [v.value for v in model.non_trainable_variables]

    def loss(params: Any) -> jax.Array:
        predicted, _ = model.stateless_call(params, fixed, x, training=True)
        return jnp.mean((predicted - y) ** 2)

    return plain_fit(tx, loss, [v.value for v in model.trainable_variables], 100)


@case(
    "orbax",
    "orbax-checkpoint",
    "optax",
    what="saved after 20 of 40 steps, and restored into abstract arrays",
    optimizer="chain(clip_by_global_norm(1.0), adamw(cosine_decay_schedule(0.05, 40)))",
    also="master_weights(lion(0.01, moments='bfloat16'))",
)
def orbax(tx: Any) -> Fit:
    """Go on from a checkpoint; it must be what it was, bit for bit."""
    import orbax.checkpoint as ocp

    params, loss = small_network()
    step = plain_step(tx, loss)
    params, state, first = steps_of(step, params, tx.init(params), 20)
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder) / "saved", (params, state))
        checkpointer.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, (params, state))
        back = checkpointer.restore(Path(folder) / "saved", like)
    jax.tree.map(np.testing.assert_array_equal, back, (params, state))
    params, state, second = steps_of(step, *back, 20)
    return Fit(first + second, params, loop(step, params, state))


@case(
    "cloudpickle",
    "cloudpickle",
    "optax",
    what="20 steps here, 20 in another process, which gets the transformation and its state",
    optimizer="chain(clip_by_global_norm(1.0), yogi(linear_schedule(0.05, 0.0, 40)))",
    also="by_path({lambda path, _: path == 'out': sgd(0.1)}, default=adam(lambda t: 1 / (20 + t)))",
)
def cloudpickle(tx: Any) -> Fit:
    """Send what is needed to a new interpreter, lambdas too, and get the rest of the run back."""
    import cloudpickle

    params, loss = small_network()
    step = plain_step(tx, loss)
    params, state, first = steps_of(step, params, tx.init(params), 20)
    held = jax.tree.map(np.asarray, (params, state))
    rest = functools.partial(finished, tx, loss, held)
    cloudpickle.register_pickle_by_value(sys.modules[plain_step.__module__])
    program = "import cloudpickle, sys; print(cloudpickle.load(sys.stdin.buffer)())"
    there = subprocess.run(
        [sys.executable, "-c", program], input=cloudpickle.dumps(rest), capture_output=True
    )
    if there.returncode:
        raise RuntimeError(there.stderr.decode())
    params, second = pickle.loads(bytes.fromhex(there.stdout.decode()))
    return Fit([*first, *second], params, loop(step, params, state))


def finished(tx: Any, loss: Any, held: Any) -> str:
    """Go on for 20 steps and return parameters and losses as text."""
    params, _, losses = steps_of(plain_step(tx, loss), *jax.tree.map(jnp.asarray, held), 20)
    return pickle.dumps(jax.tree.map(np.asarray, (params, losses))).hex()


@case(
    "jaxtyping",
    "jaxtyping",
    "beartype",
    "optax",
    what="a step whose types beartype checks, 100 steps",
    optimizer="adamax(0.02)",
    also="adafactor(0.05)",
)
def jaxtyping(tx: Any) -> Fit:
    """Declare that updates have the shapes of the parameters, and the state the tree it had."""
    from beartype import beartype
    from jaxtyping import Array, Float, PyTree, jaxtyped

    params, loss = small_network()
    Params = PyTree[Float[Array, "?*shape"], "Tree"]
    State = PyTree[Array, "State"]
    Loss = Float[Array, ""]

    @jax.jit
    @jaxtyped(typechecker=beartype)
    def step(params: Params, state: State) -> tuple[Params, State, Loss]:
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    @jaxtyped(typechecker=beartype)
    def checked(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
        return optax.with_extra_args_support(tx)

    params, state, losses = steps_of(step, params, checked(tx).init(params), 100)
    return Fit(losses, params, loop(step, params, state))


@case(
    "qdax",
    what="40 updates of TD3, the policy's in a branch of `lax.cond`, from random transitions",
    optimizer="adam(1e-3)",
    also="adam(1e-3, moments='packed16')",
    note="TD3 makes its optimizers itself: `optax.adam` is replaced for its calls.",
)
def qdax(tx: Any) -> Fit:
    """Train TD3's critics and policy."""
    from qdax.baselines.td3 import TD3, TD3Config
    from qdax.core.neuroevolution.buffers.buffer import ReplayBuffer, Transition

    td3 = TD3(
        TD3Config(batch_size=16, critic_hidden_layer_size=(16,), policy_hidden_layer_size=(16,)),
        action_size=2,
    )
    dummy = Transition.init_dummy(observation_dim=3, action_dim=2)
    buffer = ReplayBuffer.init(buffer_size=64, transition=dummy)
    x = normal(64, 3)
    buffer = buffer.insert(
        Transition(
            obs=x, next_obs=0.9 * x, rewards=-jnp.sum(x**2, 1), dones=jnp.zeros(64),
            truncations=jnp.zeros(64), actions=jnp.tanh(normal(64, 2, seed=1)),
        )
    )  # fmt: skip

    @jax.jit
    def step(state: Any, buffer: Any) -> Any:
        state, buffer, metrics = td3.update(state, buffer)
        return state, buffer, metrics["critic_loss"]

    with in_place_of("adam", tx):
        state, losses = td3.init(jax.random.key(0), action_size=2, observation_size=3), []
        for _ in range(40):
            state, buffer, value = step(state, buffer)
            losses.append(value)
    params = [state.critic_params, state.policy_params]
    return Fit(losses, params, loop(step, state, buffer))


@case(
    "kauldron",
    what="a `Trainer` of an MLP in Linen, 40 steps of its `trainstep`",
    optimizer="chain(clip_by_global_norm(1.0), adamw(0.01, weight_decay=1e-3))",
    also="accumulate(adamw(0.01, mask='*/kernel'), 2)",
)
def kauldron(tx: Any) -> Fit:
    """Step with the trainer's own state."""
    import flax.linen as nn
    from kauldron import kd

    class Model(nn.Module):
        def __kontext_keys__(self) -> dict[str, str]:
            return {"x": "batch.x"}

        @nn.compact
        def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
            return {"y": nn.Dense(1)(nn.relu(nn.Dense(16)(x)))}

    x = np.asarray(normal(64, 4))
    rows = [{"x": row, "y": np.sin(row[:1])} for row in x]
    trainer = kd.train.Trainer(
        train_ds=kd.data.py.DataSource(
            data_source=rows, shuffle=False, batch_size=16, num_workers=0, seed=0
        ),
        model=Model(),
        train_losses={"l2": kd.losses.L2(preds="preds.y", targets="batch.y")},
        num_train_steps=40,
        optimizer=tx,
    )
    state, losses = trainer.init_state(), []
    for batch in itertools.islice(trainer.train_ds, 40):
        state, aux = trainer.trainstep.step(state, batch, return_losses=True)
        losses.append(aux.loss_states["l2"].compute())
    params = jax.tree.map(jnp.copy, state.params)
    return Fit(losses, params, loop(lambda state: trainer.trainstep.step(state, batch), state))


@case(
    "levanter",
    "levanter==1.2.dev1644",
    "haliax==1.4.dev453",
    "chex",
    "gitpython",
    "jax<0.9",
    what="`TrainerState.take_step` of a linear layer with named axes, 60 steps",
    optimizer="chain(clip_by_global_norm(1.0), adamw(0.01))",
    also="skip_spikes(adamw(0.01, moments='packed16'))",
    note="The release, 1.1, needs haliax 1.3, which fails with JAX 0.8 or newer. "
    "chex and gitpython are imported, and not required by it.",
)
def levanter(tx: Any) -> Fit:
    """Step by the state of levanter's trainer."""
    import equinox as eqx
    import haliax as hax
    import jmp
    from levanter.trainer_state import TrainerState

    Batch, In, Out = hax.make_axes(Batch=64, In=4, Out=1)
    x = hax.named(normal(64, 4), (Batch, In))
    y = hax.named(jnp.sin(normal(64, 4).sum(-1, keepdims=True)), (Batch, Out))
    model = hax.nn.MLP.init(In, Out, 16, 1, key=jax.random.key(0), activation=hax.nn.relu)

    policy, key, losses = jmp.get_policy("f32"), jax.random.key(1), []

    @eqx.filter_jit
    def step(state: Any) -> tuple[Any, jax.Array]:
        loss = lambda model: hax.mean((model(x) - y) ** 2).scalar()  # noqa: E731
        value, grads = eqx.filter_value_and_grad(loss)(state.model)
        state, _ = state.take_step(grads, key=key)
        return state, value

    state = TrainerState.init(tx, model, key=key, is_trainable=True, mp=policy)
    for _ in range(60):
        state, value = step(state)
        losses.append(value)
    params = jax.tree.leaves(eqx.filter(state.model, eqx.is_inexact_array))
    return Fit(losses, params, loop(step, state))


# ------------------------------------------------------------------------------------ the command


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; `argv` is the command line, None means the program's own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--cache", help="a folder in which JAX keeps what it compiles")
    options = parser.parse_args(argv)
    jax.config.update("jax_compilation_cache_dir", options.cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    with contextlib.redirect_stdout(io.StringIO()):  # the packages' progress
        found = measured(CASES[options.case])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
