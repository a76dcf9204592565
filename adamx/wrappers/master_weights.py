"""Masters: 16-bit parameters trained along the float32 trajectory.

    w_t     = w_{t-1} + u(g_t, w_{t-1}, ...)        in float32, whatever the optimizer inside
    param_t = bfloat16(w_t)                         seen by the model

A step of 1e-3 on a bfloat16 parameter of 1 is below half its spacing, 2^-8: added there it is lost,
every time. So the optimizer works on w, and the update is the difference between the old and the
new parameter. The state holds the bits of w that the parameter lacks: a remainder of 16 bits
(`adamx.storage.remainder`) or of 8, or a whole float32.

Source: Micikevicius et al. (2018), Mixed precision training, section 3.1,
https://arxiv.org/abs/1710.03740
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from adamx.core import errors
from adamx.core.arithmetic import compute_dtype, divided_like
from adamx.core.concept import Slots, disjoint
from adamx.core.leaves import Leaves
from adamx.core.lifting import Between, State
from adamx.core.rounding import random_bits, step_key
from adamx.core.step import Step
from adamx.core.wrapper import Wrapper
from adamx.formula.expressions import Expr
from adamx.formula.symbols import Symbols
from adamx.storage.masters import joined, names, rounded, start
from adamx.storage.remainder import split, split8

KEEP = ("remainder", "remainder8", "float32")


class master_weights(Wrapper):
    """Let an optimizer work on float32 masters of 16-bit parameters.

    The updates are float32, such that `optax.apply_updates(params, updates)` gives the rounded
    masters in the parameters' dtype. Parameters of 32 bits and more are their own masters.

    With the remainder, parameter and remainder together are the float32 number, bit for bit, and
    the masters follow the trajectory of the same optimizer on float32 parameters bit for bit, if
    both steps are jitted. (One exception: if a step shrinks a parameter more than 2^15-fold, the
    float32 update cannot express the new value exactly: it is off by 2^-24 of the old one. And the
    claim holds for adamx's optimizers compiled by jax 0.10: around an Optax optimizer, or compiled
    by jax 0.8, a product and a sum may be contracted in one program and not in the other, which
    changes last bits.) A parameter that was changed outside, by clipping or averaging, is adopted
    to within half its spacing; with "float32" exactly.

    The parameter of a finite master is finite, at most the largest number of its dtype; with a
    remainder the master itself is at most 3.395e38. An infinite master stays infinite.

    The updates are float32 whatever the gradients are, since a 16-bit update from 1 reaches no
    parameter near 1e-3. `optax.apply_if_finite`, `conditionally_mask` and `conditionally_transform`
    return updates like the gradients in their other branch, so they need float32 gradients:
    `jax.tree.map(lambda g: g.astype(jnp.float32), grads)`, which under jit costs nothing.

    Attributes:
        tx: the whole optimizer, an adamx or Optax transformation.
        keep: the slot of a bfloat16 parameter: "remainder", an int16; "remainder8", an int8, so
            that masters have 24 bits and are rounded stochastically; or "float32", a copy. float16,
            which has no remainder, always gets the copy.

    Raises:
        TypeError: if `tx` is not a transformation; at `update`, if a parameter has another dtype
            than at `init`.
        ValueError: if `keep` is none of these; at `update`, without params.

    Example:
        A thousand steps of 1e-3, each too small for a bfloat16:

        >>> import adamx, jax.numpy as jnp
        >>> tx = master_weights(adamx.sgd(1e-3))
        >>> params = jnp.array([1.0], jnp.bfloat16)
        >>> state, step = tx.init(params), adamx.make_step(tx)
        >>> for _ in range(1000):
        ...     params, state = step(params, state, jnp.ones(1, jnp.bfloat16))
        >>> bool(abs(params[0]) < 1e-4), state["remainder"].dtype
        (True, dtype('int16'))
    """

    keep: str = "remainder"

    place = "last"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep not in KEEP:
            raise ValueError(f"master_weights: keep must be one of {KEEP}, got {self.keep!r}")

    def slots(self, param: jax.Array) -> Slots:
        return start(self.keep, param)

    def slot_names(self) -> tuple[str, ...]:
        return names(self.keep)

    def init_tree(self, leaves: Leaves) -> State:
        wide = leaves.with_values([None if p is None else _wide(p) for p in leaves.values])
        own = self.first_slots(leaves)
        return disjoint(*(segment.init_tree(wide) for segment in self.inner.segments()), own)

    def update_tree(self, leaves: Leaves, step: Step) -> tuple[Leaves, State]:
        indices = [i for i, u in enumerate(leaves.values) if u is not None]
        if leaves.params is None and indices:
            raise ValueError("master_weights: update needs params: update(grads, state, params)")
        params = leaves.params or [None] * len(leaves.values)
        columns = self.own(leaves, step)
        own = [{n: x[i] for n, x in columns.items() if x[i] is not None} for i in indices]
        values, wide, emit = list(leaves.values), list(params), list(leaves.emit)
        halves = list(params)
        for i, slots in zip(indices, own, strict=True):
            u, halves[i] = divided_like(slots.values(), values[i], params[i])
            values[i], wide[i], emit[i] = _wide(u), joined(halves[i], slots), None
        inside = dataclasses.replace(leaves, values=values, params=wide, emit=emit)
        out, entries = self.run(inside, step)
        for i, slots in zip(indices, own, strict=True):
            if slots:
                u, new = _close(self.keep, out.values[i], wide[i], halves[i], step.count)
                out.values[i] = step.emitted(u)
                for name, value in new.items():
                    columns[name][i] = value
        own = {name: leaves.tree(column) for name, column in columns.items()}
        return dataclasses.replace(out, params=leaves.params), entries | own

    def own(self, leaves: Leaves, step: Step) -> dict[str, list[Any]]:
        columns = {n: leaves.column(n, errors.entry(step.state, n)) for n in self.slot_names()}
        for i, (path, param) in enumerate(zip(leaves.paths, leaves.like(), strict=True)):
            if leaves.values[i] is None:
                continue
            wanted = {n: x.dtype for n, x in jax.eval_shape(self.slots, param).items()}
            found = {n: x[i].dtype for n, x in columns.items() if hasattr(x[i], "dtype")}
            if found != wanted:
                raise TypeError(
                    f"master_weights: leaf {path!r} is {param.dtype} and had another dtype at "
                    "init: equinox.apply_updates returns float32 for 16-bit parameters, while "
                    "adamx.apply_updates and optax.apply_updates keep the dtype"
                )
        return super().own(leaves, step)

    def between(self) -> Between | None:
        found = self.inner_between()  # if no parameter moves, the masters stay as well
        return found if found is None or found.moves else self.inner.between()

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        symbols.remark("w: the float32 masters of 16-bit parameters, which are w rounded")
        return super().formula(u, symbols)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(compute_dtype(x.dtype))


@functools.partial(jax.jit, static_argnums=0)
def _close(
    keep: str, u: jax.Array, master: jax.Array, param: jax.Array, count: jax.Array
) -> tuple[jax.Array, Slots]:
    """Return the update from the parameter to the rounded new master, and the new slots."""
    new = master + u
    if param.dtype != jnp.bfloat16 or keep == "float32":
        return _between(_wide(rounded(new, param.dtype)), _wide(param)), {"master": new}
    # On CPU a division by one, or by the master if that is NaN. XLA:CPU makes a kernel for each
    # result and never repeats a division, so it computes the new master once, into 4 bytes of
    # temporary memory. Otherwise both results would share the root and the quotient inside u, in 12
    # bytes. On TPU the division would do that in place of one kernel for all results.
    new = jax.lax.platform_dependent(
        new,
        master,
        cpu=lambda new, master: new / jnp.where(jnp.isnan(master), master, 1),
        default=lambda new, _: new,
    )
    if keep == "remainder8":
        high, rest = split8(new, random_bits(step_key(count), new))
    else:
        high, rest = split(new)
    return _between(high, _wide(param)), {keep: rest}


def _between(new: jax.Array, old: jax.Array) -> jax.Array:
    """Return the update from old to new; infinity, since inf - inf is NaN, leads to itself."""
    return jnp.where(jnp.isfinite(new), new - old, new)
