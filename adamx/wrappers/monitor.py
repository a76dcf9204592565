"""The optimizer in numbers: a few statistics of every n-th step, kept in the state.

    grad_norm, update_norm, param_norm    the root of the sum of squares of g, u and w
    update_mean                           the mean of |u|
    signal_to_noise                       the mean of m^2 / v
    eps_share                             the share of elements with root(v^) < eps
    stuck_share                           the share of 16-bit elements with round(w + u) = w, u != 0

for each group of leaves. They are computed from the step's own slots and updates, in a program
before the step: a step that measures takes several times as long, the others take no longer.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamx.core import errors, paths
from adamx.core.arithmetic import (
    compute_dtype,
    divide,
    resharded_like,
    squared_magnitude,
    widen,
)
from adamx.core.concept import parts
from adamx.core.kernel import slots_like
from adamx.core.leaves import Leaves
from adamx.core.lifting import BEGAN, Between, State, age
from adamx.core.norms import count_here, global_norm, reduced_size
from adamx.core.paths import Pattern
from adamx.core.shard import Shard, check_alike, total_of_all
from adamx.core.stacked import each_layer, stacked_axes
from adamx.core.step import Step
from adamx.core.transformation import Transformation
from adamx.core.wrapper import Wrapper
from adamx.storage.moments import decoded_slots, slot_of_kind, without_storages
from adamx.transforms.bias_correction import bias_correction, one_minus_power
from adamx.transforms.rms_scaling import rms_scaling
from adamx.transforms.running_max import running_max

STATISTICS, SINCE = "monitor", "monitor_step"
OTHERS = "others"

Column = Sequence[Any]  # a value for each leaf of a group
Rows = list[tuple[Any, ...]]  # arrays, and which shard the first of them is
# the columns that it needs, which of their rows it takes, and the function of at least one row
Statistic = tuple[tuple[str, ...], Callable[[Rows], Rows], Callable[[Rows], jax.Array]]


class monitor(Wrapper):
    """Keep statistics of every n-th step in the state, for `statistics` and any logger.

    `state["monitor"][name][group]` are float32 scalars of the last step that was measured;
    `monitor_step` (int32) counts the steps since. Without `groups`, a leaf of `stacked` layers has
    an array, with one number for each layer. Parameters and slots are bit for bit the same as
    without it. Every n-th time `make_step` runs a program that measures before the one that steps;
    `update` in a program of your own branches, and writes the updates to memory at every step.

    `signal_to_noise` exists if an `rms_scaling` has `mu` in its numerator and `nu` in its second
    moment, in any storage (taken as they are, without bias correction); `eps_share` if there is one
    eps for all leaves (`rms_scaling` with numbers, and no `running_max` in the second moment); the
    norms of parameters if `update` gets them.

    Attributes:
        tx: the whole optimizer, an adamx or Optax transformation.
        every: measure at every n-th update, >= 1. None never measures and leaves the statistics as
            they are: the state has the same entries, so measuring can be switched on and off.
        groups: patterns of paths such as "*/bias"; a leaf belongs to the first that matches, or to
            "others" if none does. ("*",) is the whole tree; None makes each leaf a group.

    Raises:
        TypeError: if `tx` is not a transformation, or a group not a pattern.
        ValueError: if `every` is neither None nor a whole number >= 1, or, when used, if a pattern
            matches no leaf.

    Example:
        >>> import adamx, jax.numpy as jnp
        >>> tx = monitor(adamx.sgd(0.5), every=1)
        >>> params = {"w": jnp.array([3.0, 4.0])}
        >>> updates, state = tx.update({"w": jnp.array([0.0, 2.0])}, tx.init(params), params)
        >>> statistics(state)["update_norm/w"], statistics(state)["update_to_param/w"]
        (1.0, 0.2)
    """

    every: int | None = 100
    groups: tuple[Pattern, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        every = self.every
        if every is not None and not (isinstance(every, numbers.Integral) and every >= 1):
            raise ValueError(f"monitor: every must be a whole number >= 1 or None, got {every!r}")
        if isinstance(self.groups, str | re.Pattern):
            raise TypeError(
                "monitor: groups must be a tuple of patterns, got one pattern: groups=("
                f"{paths.text(self.groups)!r},)"
            )
        if self.groups is not None:
            for pattern in self.groups:
                paths.check_pattern("monitor", pattern)
            self._set(groups=tuple(self.groups))

    def start(self) -> State:
        return {SINCE: jnp.zeros([], jnp.int32)}

    def state_names(self) -> tuple[str, ...]:
        return (*super().state_names(), STATISTICS)

    def for_tree(self, tree: Any) -> Any:
        paths.check_all_used("monitor", self.groups or (), tree)
        return super().for_tree(tree)

    def init_tree(self, leaves: Leaves) -> State:
        entries = super().init_tree(leaves)
        if not leaves.paths:  # nothing to measure; also how Optax asks which entries are trees
            return entries | {STATISTICS: jnp.zeros(0)}
        like = dataclasses.replace(leaves, params=leaves.values)
        state = entries | {"count": jnp.ones([], jnp.int32)}
        slots = jax.eval_shape(lambda: decoded_slots(self.inner, like, state))
        none: dict[str, dict[str, jax.Array]] = {}
        for name, group, shape, _, _ in self._rows(like, like, slots, state):
            none.setdefault(name, {})[group] = jnp.zeros(shape, jnp.float32)
        return entries | {STATISTICS: none}

    def update_tree(self, leaves: Leaves, step: Step) -> tuple[Leaves, State]:
        before, since = errors.entry(step.state, STATISTICS), errors.counter(step.state, SINCE)
        out, entries = self.run(leaves, step)
        state = {**step.state, **entries}
        now, since_now = before, since + 1
        if self.every is not None:
            due = since_now >= self.every
            measure = lambda: self._measured(leaves, out.narrowed(), state, before)  # noqa: E731
            if leaves.paths:
                now = measure() if self.every == 1 else jax.lax.cond(due, measure, lambda: before)
            since_now = jnp.where(due, 0, since_now)
        old, new = {STATISTICS: before, SINCE: since}, {STATISTICS: now, SINCE: since_now}
        return out, entries | step.in_place_of(old, new)

    def between(self) -> Between | None:
        if self.every == 1:
            found = self.inner_between()
            return found and found._replace(moves=True)  # it reads the parameters
        always = self.replace(every=1)
        return Between(_count(self.inner), SINCE, self.every or sys.maxsize, full=always)

    def _measured(
        self, leaves: Leaves, out: Leaves, state: Mapping[str, Any], before: Mapping[str, Any]
    ) -> dict[str, dict[str, Any]]:
        """Return the statistics by name and group; the old ones where something is missing."""
        slots = decoded_slots(self.inner, leaves, state)
        found = {name: dict(groups) for name, groups in before.items()}
        for name, group, shape, rows, statistic in self._rows(leaves, out, slots, state):
            if group in found.get(name, {}):
                if (kept := jnp.shape(found[name][group])) != shape:
                    raise ValueError(
                        f"monitor: state['monitor'][{name!r}][{group!r}] has the shape "
                        f"{list(kept)} and is measured with {list(shape)}, since its layers were "
                        "not `stacked` as they are now: delete state['monitor'], and "
                        "adapt_state(tx, params, state) starts the statistics anew"
                    )
                now = statistic(rows).astype(jnp.float32)
                found[name][group] = resharded_like(now, before[name][group])
        check_alike(STATISTICS, before, found)
        return found

    def _rows(
        self, leaves: Leaves, out: Leaves, slots: Mapping[str, Column], state: Mapping[str, Any]
    ) -> Iterator[tuple[str, str, tuple[int, ...], Rows, Callable[[Rows], jax.Array]]]:
        """Yield name, group, shape, inputs and function of each statistic that has inputs."""
        updates = [
            jnp.zeros_like(g) if u is None and g is not None else u
            for u, g in zip(out.values, leaves.values, strict=True)
        ]
        columns: dict[str, Column] = {"g": leaves.values, "u": updates}
        if leaves.params is not None:
            pairs = zip(updates, leaves.params, strict=True)
            beside = [u if u is None or w is None else resharded_like(u, w) for u, w in pairs]
            columns |= {"u": beside, "w": leaves.params}
        of_kind = {kind: slot_of_kind(kind, slots) for kind in ("mu", "nu")}
        columns |= {kind: slots[name] for kind, name in of_kind.items() if name}
        shards = {key: leaves.shards for key in columns}
        shards |= {
            kind: self._of_slots(leaves, name, slots[name])
            for kind, name in of_kind.items()
            if name
        }
        groups: dict[str, list[int]] = {}
        for i, path in enumerate(leaves.paths):
            groups.setdefault(self._group(path), []).append(i)
        kinds, decay = _statistics(self.inner)
        if decay is not None:
            columns["weight"] = self._weights(leaves, decay, state)
        layers = self._layers(leaves)
        for group, members in groups.items():
            shape = layers[members[0]]
            for name, (needed, chosen, statistic) in kinds.items():
                if all(key in columns for key in needed):
                    rows = [
                        (*(columns[key][i] for key in needed), shards[needed[0]][i])
                        for i in members
                    ]
                    rows = chosen([row for row in rows if all(x is not None for x in row)])
                    if rows:
                        yield name, group, shape, rows, _of_each_layer(statistic, shape)

    def _of_slots(self, leaves: Leaves, name: str, slots: Column) -> list[Shard]:
        """Return the shards of a slot, which may be smaller than its parameter."""
        found = list(leaves.shards)
        for i, (path, whole) in enumerate(zip(leaves.paths, leaves.whole(), strict=True)):
            if found[i].names and slots[i] is not None:
                tx = without_storages(self.inner.for_leaf(path, whole))
                keeps = next(part for part in parts(tx) if name in part.slot_names())
                found[i] = found[i].of_slot(slots[i], slots_like(keeps)(whole)[name])
        return found

    def _weights(self, leaves: Leaves, decay: float, state: Mapping[str, Any]) -> Column:
        """Return what each leaf's second moment is divided by, with an axis for stacked layers."""
        ages = {path: age(state, path) for path in state.get(BEGAN, {})}
        weights = {path: one_minus_power(decay, t) for path, t in ages.items()}
        others = one_minus_power(decay, state["count"])
        pairs = zip(leaves.paths, self._layers(leaves), strict=True)
        return [jnp.broadcast_to(weights.get(path, others), layers) for path, layers in pairs]

    def _layers(self, leaves: Leaves) -> list[tuple[int, ...]]:
        """Return the sizes of each leaf's stacked axes, () if it is a part of a larger group."""
        if self.groups is not None:
            return [()] * len(leaves.paths)
        each = zip(leaves.paths, leaves.like(), leaves.whole(), strict=True)
        return [
            () if leaf is None else leaf.shape[: stacked_axes(self.inner.for_leaf(path, whole))]
            for path, leaf, whole in each
        ]

    def _group(self, path: str) -> str:
        if self.groups is None:
            return path
        fitting = (paths.text(p) for p in self.groups if paths.matches(p, path))
        return next(fitting, OTHERS)


class _count(Wrapper):
    """Between two measurements: the optimizer inside, and one more step counted."""

    def start(self) -> State:
        return {SINCE: jnp.zeros([], jnp.int32)}

    def between(self) -> Between | None:
        return self.inner_between()

    def update_tree(self, leaves: Leaves, step: Step) -> tuple[Leaves, State]:
        since = errors.counter(step.state, SINCE)
        leaves, entries = self.run(leaves, step)
        return leaves, entries | {SINCE: step.select(since + 1, since)}


def _statistics(tx: Transformation) -> tuple[dict[str, Statistic], float | None]:
    """Return the statistics by name, and the decay of the average that one needs corrected."""
    kinds: dict[str, Statistic] = {
        "grad_norm": (("g",), list, _norm),
        "update_norm": (("u",), list, _norm),
        "param_norm": (("w",), list, _norm),
        "update_mean": (("u",), _filled, _mean(jnp.abs)),
        "stuck_share": (("w", "u"), _narrow, _stuck),
    }
    scalings = set()
    for part in parts(tx):
        if isinstance(part, rms_scaling):
            slots = part.numerator.tree_names(), part.second_moment.tree_names()
            if slot_of_kind("mu", slots[0]) and slot_of_kind("nu", slots[1]):
                noise = _mean(lambda m, v: divide(squared_magnitude(m), v))
                kinds["signal_to_noise"] = ("mu", "nu"), _filled, noise
            below = tuple(parts(part.second_moment))
            scaling = part.eps, *(c.decay for c in below if isinstance(c, bias_correction))
            known = all(isinstance(number, float | int) for number in scaling)
            maximum = any(isinstance(c, running_max) for c in below)
            scalings.add(scaling if known and not maximum else None)
    decay = None
    if len(scalings) == 1 and (only := scalings.pop()):
        eps, *decays = only
        decay = decays[0] if decays else 0.0

        def small(v: jax.Array, weight: jax.Array) -> jax.Array:
            return (jnp.sqrt(v / weight.astype(v.dtype)) < eps).astype(v.dtype)

        kinds["eps_share"] = ("nu", "weight"), _filled, _mean(small)
    # compiled, a statistic is traced once for all groups of one shape
    compiled = {name: (needed, rows, jax.jit(f)) for name, (needed, rows, f) in kinds.items()}
    return compiled, decay


def _of_each_layer(
    statistic: Callable[[Rows], jax.Array], shape: tuple[int, ...]
) -> Callable[[Rows], jax.Array]:
    def of_layer(_: Any, rows: Rows) -> jax.Array:
        return statistic([(*arrays, shard.last(arrays[0].ndim)) for *arrays, shard in rows])

    return lambda rows: each_layer(of_layer, shape, (), rows)


def _filled(rows: Rows) -> Rows:
    return [row for row in rows if row[0].size]


def _narrow(rows: Rows) -> Rows:
    """Return the rows of 16-bit parameters."""
    return [row for row in _filled(rows) if jnp.finfo(row[0].dtype).bits == 16]


def _norm(rows: Rows) -> jax.Array:
    return global_norm(_wide([x for x, _ in rows]), _shards(rows))


def _mean(function: Callable[..., jax.Array]) -> Callable[[Rows], jax.Array]:
    """Return the mean of a function over all elements of a group."""

    def mean(rows: Rows) -> jax.Array:
        return _mean_of_sums([jnp.sum(function(*_wide(row[:-1]))) for row in rows], rows)

    return mean


def _stuck(rows: Rows) -> jax.Array:
    def stays(w: jax.Array, u: jax.Array) -> jax.Array:
        return (w.astype(jnp.float32) + u.astype(jnp.float32)).astype(w.dtype) == w

    return _mean_of_sums(
        [count_here((u != 0) & stays(w, u), jnp.float32) for w, u, _ in rows], rows
    )


def _mean_of_sums(sums: Sequence[jax.Array], rows: Rows) -> jax.Array:
    """Return the mean over a group, from the sum over each shard."""
    size = sum(reduced_size(row[0], shard=row[-1]) for row in rows)
    narrow = [x.astype(jnp.float32) for x in sums]
    return total_of_all(narrow, [row[0] for row in rows], _shards(rows)) / size


def _shards(rows: Rows) -> list[Shard]:
    return [row[-1] for row in rows]


def _wide(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    return [widen(x, compute_dtype(x.dtype)) for x in arrays]


def statistics(state: Mapping[str, Any]) -> dict[str, float]:
    """Return every scalar in a state, by path, as Python numbers: ready for any logger.

    Args:
        state: of any adamx transformation. A state of `monitor` gives "grad_norm/dense/kernel" and
            so on ("grad_norm/layers/kernel/3" for the fourth of `stacked` layers), and two ratios:
            "update_to_param/..." = update_norm / param_norm, and "step_size/..." = update_mean /
            learning_rate if there is one learning rate. A ratio to 0, such as a bias at its start
            or a learning rate before its warm-up, is NaN.

    Returns:
        A flat dict. The call waits for the step that made the state.

    Raises:
        TypeError: if it is not a state of adamx.

    Example:
        >>> import adamx, jax.numpy as jnp
        >>> statistics(adamx.adam(0.5).init(jnp.zeros(3)))
        {'count': 0, 'learning_rate': 0.5}
    """
    errors.check_state(state, "statistics(state)")
    named = paths.leaves_by_path(state)
    measured = f"{STATISTICS}/"
    scalars = jax.device_get(
        {n: x for n, x in named.items() if jnp.ndim(x) == 0 or n.startswith(measured)}
    )
    found = {
        "/".join([name.removeprefix(measured).rstrip("/"), *map(str, place)]): value[place].item()
        for name, value in scalars.items()
        for place in np.ndindex(value.shape)
    }
    for name, value in list(found.items()):
        kind, slash, group = name.partition("/")
        if kind == "update_norm" and (below := f"param_norm{slash}{group}") in found:
            found[f"update_to_param{slash}{group}"] = _ratio(value, found[below])
        if kind == "update_mean" and "learning_rate" in found:
            found[f"step_size{slash}{group}"] = _ratio(value, found["learning_rate"])
    return found


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.nan
