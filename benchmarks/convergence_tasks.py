"""The tasks that convergence.py trains: each with its data, weights, batches, loss and measures."""

from __future__ import annotations

import dataclasses
import functools
import math
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits


@dataclasses.dataclass(frozen=True)
class Settings:
    """How large the tasks are.

    Attributes:
        length: of the training runs, as a part of the full ones.
        seeds: how many at most.
        width: of the transformer.
        layers: of the transformer.
        text: how many bytes of source it reads.
        travel: steps of the small-step table.
        quick: whether only some of the methods and tasks take part.
    """

    length: float = 1.0
    seeds: int = 6
    width: int = 64
    layers: int = 2
    text: int = 2_000_000
    travel: int = 2000
    quick: bool = False


QUICK = Settings(0.02, seeds=2, width=16, layers=1, text=100_000, travel=100, quick=True)


@dataclasses.dataclass(frozen=True)
class Task:
    """Something to train.

    Attributes:
        title: its name.
        note: how it is made.
        seeds: how many runs.
        rate: the learning rate.
        params: from a seed: the first weights.
        data: from a seed: the argument of the loss that is the same at every step.
        batches: from a seed and the number of an order: one batch a step.
        loss: of (params, data, batch).
        measures: by name: from the trained weights and a seed a number, the smaller the better.
        eps: Adam's.
    """

    title: str
    note: str
    seeds: int
    rate: Any
    params: Callable[[int], Any]
    data: Callable[[int], Any]
    batches: Callable[[int, int], Any]
    loss: Callable[[Any, Any, Any], jax.Array]
    measures: Mapping[str, Callable[[Any, int], float]]
    eps: float = 1e-8


def cast(tree: Any, dtype: Any) -> Any:
    """Return a tree of floats in another dtype."""
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's digits: images in [0, 1] and labels, shuffled."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return (images[order] / 16).astype(np.float32), labels[order].astype(np.int32)


def shuffled(seed: int, order: int, steps: int, batch: int, size: int) -> np.ndarray:
    """Return the indices of the batches: epoch after epoch, each shuffled."""
    rng = np.random.default_rng([seed, order])
    epochs = [rng.permutation(size) for _ in range(math.ceil(steps * batch / size))]
    return np.concatenate(epochs)[: steps * batch].reshape(steps, batch)


def digits_mlp(settings: Settings) -> list[Task]:
    """Classify digits with one hidden layer: the loss on the training set, and on the test set."""
    steps, (images, labels), cut = round(1500 * settings.length), digits(), 1437

    def params(seed: int) -> Any:
        rng = np.random.default_rng(seed)
        w = [rng.normal(0, (2 / n) ** 0.5, (n, m)) for n, m in ((64, 128), (128, 10))]
        return cast({"w": w, "b": [np.zeros(128), np.zeros(10)]}, np.float32)

    def logits(p: Any, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ p["w"][0] + p["b"][0]) @ p["w"][1] + p["b"][1]

    def loss(p: Any, data: Any, rows: jax.Array) -> jax.Array:
        return entropy(logits(p, data[0][rows]), data[1][rows])

    def measure(part: slice) -> Callable[[Any, int], float]:
        x, y = jnp.asarray(images[part]), jnp.asarray(labels[part])
        return lambda p, _: float(jnp.log(entropy(logits(p, x), y)))

    return [
        Task(
            "Digits",
            f"64-128-10 on scikit-learn's digits, {steps} batches of 64, cosine from 3e-3.",
            min(6, settings.seeds),
            optax.cosine_decay_schedule(3e-3, steps),
            params,
            lambda _: (jnp.asarray(images), jnp.asarray(labels)),
            lambda seed, order: shuffled(seed, order, steps, 64, cut),
            loss,
            {"log training loss": measure(slice(cut)), "log test loss": measure(slice(cut, None))},
        )
    ]


@functools.cache
def source(size: int) -> np.ndarray:
    """Return Python's own library as printable characters, numbered from 0 to 96."""
    text = b""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= size:
            break
    codes = np.frombuffer(text[:size], np.uint8).astype(np.int32)
    return np.where(codes == 10, 95, np.where((codes < 32) | (codes > 126), 96, codes - 32))


def transformer(settings: Settings) -> list[Task]:
    """Predict the next character of Python's standard library: the loss on unseen files."""
    steps, width, length, heads = round(300 * settings.length), settings.width, 64, 4
    text = source(settings.text)
    cut = int(len(text) * 0.9)

    def params(seed: int) -> Any:
        rng = np.random.default_rng(seed)

        def normal(*shape: int) -> Any:
            return jnp.asarray(rng.normal(0, shape[0] ** -0.5, shape), jnp.float32)

        def layer() -> Any:
            return {
                "gains": jnp.ones((2, width)),
                "mix": normal(width, 3, width),
                "out": normal(width, width) / 2,
                "up": normal(width, 4 * width),
                "down": normal(4 * width, width) / 2,
            }

        embed = {
            "embed": normal(97, width),
            "place": normal(length, width),
            "gain": jnp.ones(width),
        }
        return embed | {"layers": [layer() for _ in range(settings.layers)]}

    def norm(x: jax.Array, gain: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * gain

    def logits(p: Any, tokens: jax.Array) -> jax.Array:
        x = p["embed"][tokens] + p["place"]
        for layer in p["layers"]:
            mixed = jnp.einsum("bti,ijk->jbtk", norm(x, layer["gains"][0]), layer["mix"])
            q, k, v = mixed.reshape(3, *tokens.shape, heads, width // heads)
            mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
            x = x + mixed @ layer["out"]
            x = x + jax.nn.gelu(norm(x, layer["gains"][1]) @ layer["up"]) @ layer["down"]
        return norm(x, p["gain"]) @ p["embed"].T

    def loss(p: Any, data: jax.Array, starts: jax.Array) -> jax.Array:
        windows = data[starts[:, None] + jnp.arange(length + 1)]
        return entropy(logits(p, windows[:, :-1]), windows[:, 1:])

    def batches(seed: int, order: int) -> np.ndarray:
        return np.random.default_rng([seed, order]).integers(0, cut - length - 1, (steps, 16))

    unseen = np.linspace(cut, len(text) - length - 1, 200).astype(int)
    test = jax.jit(lambda p: loss(p, jnp.asarray(text), jnp.asarray(unseen)))
    return [
        Task(
            "Characters",
            f"A transformer of {settings.layers} layers, width {width} and context {length} on "
            f"Python's standard library, {steps} batches of 16, cosine from 3e-3 after a warmup.",
            min(3, settings.seeds),
            optax.warmup_cosine_decay_schedule(0, 3e-3, max(1, steps // 10), steps),
            params,
            lambda _: jnp.asarray(text),
            batches,
            loss,
            {"test loss, nats": lambda p, _: float(test(p))},
        )
    ]


def sparse_embedding(settings: Settings) -> list[Task]:
    """Learn a table from noisy targets; a batch touches few rows, and most rows rarely."""
    rows, width, batch, steps = 4096, 16, 64, round(1500 * settings.length)
    chance = 1 / np.arange(1, rows + 1) ** 1.1
    chance /= chance.sum()

    def data(seed: int) -> Any:
        return jnp.asarray(np.random.default_rng([seed, 1]).normal(size=(rows, width)), jnp.float32)

    def batches(seed: int, order: int) -> Any:
        rng = np.random.default_rng([seed, 2, order])
        ids = rng.choice(rows, (steps, batch), p=chance)
        noise = rng.standard_t(3, (steps, batch))
        return ids, cast((rng.normal(size=(steps, batch, width)), 0.3 * noise), np.float32)

    def loss(table: jax.Array, truth: jax.Array, drawn: Any) -> jax.Array:
        ids, (context, noise) = drawn
        missing = jnp.sum((table[ids] - truth[ids]) * context, axis=1)
        return jnp.mean((missing - noise) ** 2)

    def measure(table: jax.Array, seed: int) -> float:
        return float(np.log(chance @ np.sum((np.asarray(table) - data(seed)) ** 2, axis=1)))

    return [
        Task(
            "Sparse embedding",
            f"{rows} rows of {width}, drawn with chances like 1 / rank^1.1, Student's noise with 3 "
            f"degrees of freedom, {steps} batches of {batch}, cosine from 2e-2.",
            min(5, settings.seeds),
            optax.cosine_decay_schedule(2e-2, steps),
            lambda _: jnp.zeros((rows, width)),
            data,
            batches,
            loss,
            {"log error": measure},
        )
    ]


DECAY = 1e-2  # of the logistic regression: half the square of the weights


def newton(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the optimal weights of the logistic regression, in float64."""
    w, hot = np.zeros((x.shape[1], 10)), np.eye(10)[y]
    while True:
        z = x @ w
        p = np.exp(z - z.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        gradient = x.T @ (p - hot) / len(x) + DECAY * w
        if np.abs(gradient).max() < 1e-14:
            return w
        curved = np.einsum("nk,kl->nkl", p, np.eye(10)) - p[:, :, None] * p[:, None]
        hessian = np.einsum("nkl,ni,nj->ikjl", curved, x, x, optimize=True) / len(x)
        hessian = hessian.reshape(w.size, w.size) + DECAY * np.eye(w.size)
        move = np.linalg.solve(hessian, gradient.ravel()).reshape(w.shape)
        rate = 1.0
        while objective(w - rate * move, x, y) > objective(w, x, y) + 1e-14:
            rate /= 2
        w = w - rate * move


def objective(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    """Return the objective of the logistic regression, in float64."""
    z = x @ w
    top = z.max(axis=1)
    likelihood = z[np.arange(len(y)), y] - top - np.log(np.exp(z - top[:, None]).sum(axis=1))
    return float(DECAY / 2 * np.sum(w * w) - likelihood.mean())


def logistic(settings: Settings) -> list[Task]:
    """Fit a logistic regression to high accuracy, with all of its data at every step."""
    steps, count = round(3000 * settings.length), 300

    @functools.cache
    def data(seed: int) -> tuple[np.ndarray, np.ndarray]:
        images, labels = digits()
        chosen = np.random.default_rng([seed, 3]).choice(len(labels), count, replace=False)
        return np.pad(images[chosen], ((0, 0), (0, 1)), constant_values=1), labels[chosen]

    @functools.cache
    def optimum(seed: int) -> float:
        x, y = data(seed)
        return objective(newton(x.astype(np.float64), y), x.astype(np.float64), y)

    def loss(w: jax.Array, data: Any, order: jax.Array) -> jax.Array:
        x, y = (jnp.where(order, a[::-1], a) for a in data)
        return entropy(x @ w, y) + DECAY / 2 * jnp.sum(w * w)

    def measure(w: jax.Array, seed: int) -> float:
        x, y = data(seed)
        excess = objective(np.asarray(w, np.float64), x.astype(np.float64), y) - optimum(seed)
        return float(np.log10(max(excess, 1e-16)))

    def task(name: str, rate: Any) -> Task:
        return Task(
            f"Logistic regression, {name}",
            f"Full batch: {count} digits, another choice for each seed, {steps} steps, rate 3e-2. "
            "Other order: backwards. The excess is over the optimum that Newton's method finds in "
            "float64; below 1e-16 it counts as that.",
            min(5, settings.seeds),
            rate,
            lambda seed: jnp.asarray(
                np.random.default_rng([seed, 4]).normal(size=(65, 10)), jnp.float32
            ),
            lambda seed: jax.tree.map(jnp.asarray, data(seed)),
            lambda _, order: jnp.full(steps, bool(order)),
            loss,
            {"log10 excess": measure},
        )

    constant, cosine = 3e-2, optax.cosine_decay_schedule(3e-2, steps)
    return [task("constant rate", constant), task("cosine rate", cosine)]


def scales(settings: Settings) -> list[Task]:
    """Reach a point from noisy gradients that are scaled differently, elementwise or by leaf."""
    steps = round(1000 * settings.length)

    def task(title: str, note: str, factors: Callable[[int], list[np.ndarray]]) -> Task:
        def draw(seed: int, number: int, *front: int) -> list[Any]:
            rng = np.random.default_rng([seed, number])
            return [
                jnp.asarray(rng.normal(size=(*front, len(s))), jnp.float32) for s in factors(seed)
            ]

        def data(seed: int) -> Any:
            return cast(factors(seed), np.float32), draw(seed, 5)

        def loss(w: Any, data: Any, noise: Any) -> jax.Array:
            each = zip(w, *data, noise, strict=True)
            return sum(jnp.sum(s * ((w - t) ** 2 / 2 + n * w)) for w, s, t, n in each)

        def measure(w: Any, seed: int) -> float:
            error = [np.mean((a - b) ** 2) for a, b in zip(w, draw(seed, 5), strict=True)]
            return float(np.log10(np.mean(error)))

        return Task(
            title,
            f"{note} {steps} steps, cosine from 2e-2, eps=1e-15; noise as large as the gradients.",
            min(5, settings.seeds),
            optax.cosine_decay_schedule(2e-2, steps),
            lambda seed: [jnp.zeros(len(s)) for s in factors(seed)],
            data,
            lambda seed, order: draw(seed, 6 + order, steps),
            loss,
            {"log10 error": measure},
            eps=1e-15,
        )

    leaves = [np.full(64, 10.0**k) for k in range(-12, 4)]
    return [
        task(
            "Scales, a leaf each",
            "16 leaves of 64, whose gradients have the scales 1e-12 ... 1e3.",
            lambda _: leaves,
        ),
        task(
            "Scales within a leaf",
            "One leaf of 4096, whose gradients have the scales 10^U(-6, 0).",
            lambda seed: [10 ** np.random.default_rng([seed, 7]).uniform(-6, 0, 4096)],
        ),
    ]


TASKS = (digits_mlp, transformer, sparse_embedding, logistic, scales)
