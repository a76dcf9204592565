"""Two optimizers side by side, on the same gradients."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from adamx.core import errors
from adamx.core.foreign import as_transformation
from adamx.core.paths import leaves_by_path


@dataclasses.dataclass(frozen=True)
class Difference:
    """The largest difference between two trees.

    Attributes:
        relative: max |a - b| / max(|a|, |b|) over all elements; 0 where both are 0, and inf where
            only one is NaN or infinite.
        ulps: the same in units in the last place of the narrower dtype of the two.
        of_largest: max |a - b| over the largest |a| or |b| of the leaf. It shows whether the
            difference matters if the other two are large because an element is near zero.
        path: the leaf with the largest `ulps`; "" if there is no difference.
    """

    relative: float = 0.0
    ulps: float = 0.0
    of_largest: float = 0.0
    path: str = ""

    def __str__(self) -> str:
        return f"{self.relative:9.2e} {self.ulps:10.3g} {self.of_largest:10.2e}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The result of `compare`; prints as a table.

    Attributes:
        updates: for each step the difference of the updates.
        params: for each step the difference of the parameters after it.
        slots: after the last step, the difference of each entry that both states have at the same
            path, by the path in the first state.
        unmatched: paths that only one of the states has.
        names: the names of the two in the table.
    """

    updates: list[Difference]
    params: list[Difference]
    slots: dict[str, Difference]
    unmatched: list[str]
    names: tuple[str, str]

    def first_beyond(self, *, relative: float = np.inf, ulps: float = np.inf) -> int | None:
        """Return the first step (from 1) whose parameters differ by more than a bound, or None."""
        beyond = [d.relative > relative or d.ulps > ulps for d in self.params]
        return beyond.index(True) + 1 if any(beyond) else None

    def __str__(self) -> str:
        columns = f"{'relative':>9} {'ULP':>10} {'of largest':>10}"
        width = max(len("step"), *(len(path) for path in self.slots), 1)
        rows = [
            f"{'':>{width}}  {'updates':^31}  {'params':^31}",
            f"{'step':>{width}}  {columns}  {columns}  in leaf",
        ]
        steps = len(self.params)
        for number in sorted(n for n in {*_SHOWN, steps} if n <= steps):
            u, p = self.updates[number - 1], self.params[number - 1]
            rows.append(f"{number:>{width}}  {u}  {p}  {p.path}".rstrip())
        if self.slots:
            rows.append(f"slots after step {steps}:")
            rows += [f"{path:>{width}}  {difference}" for path, difference in self.slots.items()]
        if self.unmatched:
            rows.append(f"in one state only: {', '.join(self.unmatched)}")
        return "\n".join([f"{self.names[0]} against {self.names[1]}", *rows])


_SHOWN = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)


def compare(
    tx_a: optax.GradientTransformation | optax.MultiSteps,
    tx_b: optax.GradientTransformation | optax.MultiSteps,
    params: Any,
    gradients: Iterable[Any] | Callable[[int], Any],
    *,
    steps: int | None = None,
    names: tuple[str, str] = ("a", "b"),
) -> Comparison:
    """Run two transformations on the same gradients and report where they diverge.

    Each has its own parameters from the same start; both steps are jitted. Parameters may be
    sharded, also over several processes, which then all call this.

    Args:
        tx_a: an adamx or Optax transformation.
        tx_b: another.
        params: the parameters to start from, as both `init` take them.
        gradients: trees shaped like `params`, one per step; or a function of the step (from 0).
        steps: the number of steps; None means all of `gradients`, unless that is a function.
        names: the names of the two in the table.

    Returns:
        A `Comparison`: differences step by step, `first_beyond(...)`, and the slots side by side,
        matched by path (Optax's `0/mu/w` is adamx's `mu/w`).

    Raises:
        TypeError: if `tx_a` or `tx_b` is not a transformation, or `gradients` is one tree, a dict.
        ValueError: if there is no gradient, or `steps` is missing for a function.

    Example:
        >>> import adamx
        >>> w = {"w": jnp.array([1.0, 2.0])}
        >>> grads = [{"w": jnp.array([0.5, -4.0])}] * 3
        >>> found = compare(adamx.sgd(0.5), optax.sgd(0.5), w, grads)
        >>> found.params[-1].ulps, found.first_beyond(ulps=0)
        (0.0, None)
    """
    tx_a, tx_b = as_transformation(tx_a, "compare: tx_a"), as_transformation(tx_b, "compare: tx_b")
    if isinstance(gradients, Mapping):
        raise TypeError(
            "compare: gradients must be a list of trees, one for each step, or a function of the "
            f"step's number, got one tree, {errors.describe(gradients)}: write [gradients]"
        )
    if callable(gradients):
        if steps is None:
            raise ValueError("compare: steps must be given if gradients is a function, got None")
        gradients = map(gradients, range(steps))
    step_a, step_b = jax.jit(_step(tx_a)), jax.jit(_step(tx_b))
    a, b = (params, tx_a.init(params)), (params, tx_b.init(params))
    updates, followed = [], []
    for grads in itertools.islice(gradients, steps):
        (u_a, *a), (u_b, *b) = step_a(*a, grads), step_b(*b, grads)
        updates.append(_difference(u_a, u_b))
        followed.append(_difference(a[0], b[0]))
    if not followed:
        raise ValueError("compare: gradients must hold at least one tree, got none")
    slots, unmatched = _side_by_side(a[1], b[1])
    return Comparison(updates, followed, slots, unmatched, names)


def _step(tx: optax.GradientTransformation) -> Callable[..., Any]:
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return updates, optax.apply_updates(params, updates), state

    return step


def _difference(a: Any, b: Any) -> Difference:
    there = _arrays(b)
    leaves = _differences([(path, x, there[path]) for path, x in _arrays(a).items()])
    worst = max(leaves, key=lambda leaf: leaf.ulps, default=Difference())
    return dataclasses.replace(
        worst,
        relative=max((leaf.relative for leaf in leaves), default=0.0),
        of_largest=max((leaf.of_largest for leaf in leaves), default=0.0),
    )


def _differences(triples: Sequence[tuple[str, Any, Any]]) -> list[Difference]:
    """Return the difference of each two arrays, with their path.

    Of arrays that several processes hold, each looks at its own shards, and they exchange the
    numbers of `_measured`, of which the largest count.
    """
    found = np.zeros((len(triples), 4))
    for row, (_, a, b) in zip(found, triples, strict=True):
        for x, y in _parts(a, b):
            row[:] = np.maximum(row, _measured(x, y))
    if any(map(_is_spread, (x for _, *two in triples for x in two))):
        words = multihost_utils.process_allgather(found.view(np.uint32))  # float64, bit for bit
        found = np.asarray(words).view(np.float64).max(axis=0)
    differences = []
    for (path, *_), (relative, ulps, gap, largest) in zip(triples, found.tolist(), strict=True):
        of_largest = np.inf if np.isinf(relative) else gap / largest if gap else 0.0
        told = Difference(relative, ulps, of_largest, path)
        differences.append(told if ulps else Difference())
    return differences


def _is_spread(x: Any) -> bool:
    """Say whether no process holds the whole array."""
    shared = isinstance(x, jax.Array) and not x.is_fully_addressable
    return shared and not x.is_fully_replicated


def _parts(a: Any, b: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield two arrays, or the shards of them that this process holds."""
    if not _is_spread(a) and not _is_spread(b):
        yield np.asarray(a), np.asarray(b)
        return
    where = (a if _is_spread(a) else b).sharding
    a, b = jax.device_put((a, b), where)
    others = {shard.device: shard.data for shard in b.addressable_shards}
    for shard in a.addressable_shards:
        yield np.asarray(shard.data), np.asarray(others[shard.device])


def _measured(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float, float]:
    """Return the largest difference relative and in ULPs, the largest one, the largest number.

    The first two are infinite where only one is NaN or infinite, or where integers differ.
    """
    if a.size == 0 or not jnp.issubdtype(a.dtype, jnp.inexact):
        off = 0.0 if np.array_equal(a, b) else np.inf
        return off, off, 0.0, 0.0
    spacing = max(jnp.finfo(a.dtype).eps, jnp.finfo(b.dtype).eps)
    smallest = max(jnp.finfo(a.dtype).tiny, jnp.finfo(b.dtype).tiny)
    wide = np.complex128 if np.iscomplexobj(a) else np.float64
    a, b = a.astype(wide), b.astype(wide)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.where(same, 0.0, np.abs(a - b))
        bad = ~same & ~(np.isfinite(a) & np.isfinite(b))
        scale = np.where(same | bad, 1.0, np.maximum(np.abs(a), np.abs(b)))
    relative = np.where(bad, np.inf, gap / scale)
    # one ULP of x is eps * 2^floor(log2 |x|); below the smallest normal number it is constant
    exponent = np.floor(np.log2(np.maximum(scale, float(smallest))))
    ulps = np.where(bad, np.inf, gap / (float(spacing) * np.exp2(exponent)))
    finite = np.isfinite(a) & np.isfinite(b)
    largest = np.where(finite, np.maximum(np.abs(a), np.abs(b)), 0).max()
    return relative.max(), ulps.max(), np.where(finite, gap, 0).max(), largest


def _side_by_side(a: Any, b: Any) -> tuple[dict[str, Difference], list[str]]:
    """Match entries of the same path, then entries of which one path ends with the other."""
    left, right = _arrays(a), _arrays(b)
    shapes = {path: np.shape(y) for path, y in right.items()}
    order = {path: i for i, path in enumerate(right)}
    pairs = {path: path for path, x in left.items() if shapes.get(path) == np.shape(x)}
    taken = set(pairs)
    ending = collections.defaultdict[str, list[str]](list)  # with a path, in order
    for other in right:
        for end in _ends(other):
            ending[end].append(other)
    for path, x in left.items():
        shorter = [end for end in _ends(path) if end in right]
        free = (other for other in (*ending[path], *shorter) if other not in taken)
        alike = (other for other in free if shapes[other] == np.shape(x))
        first = min(alike, key=order.__getitem__, default=None)
        if path not in pairs and first is not None:
            pairs[path] = first
            taken.add(first)
    paired = [(path, left[path], right[pairs[path]]) for path in left if path in pairs]
    slots = {
        path: dataclasses.replace(difference, path=path)
        for (path, *_), difference in zip(paired, _differences(paired), strict=True)
    }
    unmatched = [p for p in left if p not in slots]
    return slots, unmatched + [p for p in right if p not in taken]


def _ends(path: str) -> list[str]:
    """Return the path and what follows each of its slashes."""
    return [path, *(path[i + 1 :] for i, letter in enumerate(path) if letter == "/")]


def _arrays(tree: Any) -> dict[str, Any]:
    """Return the arrays of a tree by path, on the host unless several processes hold them."""

    def array(x: Any) -> Any:
        is_key = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.extended)
        x = jax.random.key_data(x) if is_key else x
        return x if _is_spread(x) else np.asarray(x)

    return {path: array(x) for path, x in leaves_by_path(tree).items()}
