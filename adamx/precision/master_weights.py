"""Masters: 16-bit parameters trained along the float32 trajectory.

    w_t     = w_{t-1} + u(g_t, w_{t-1}, ...)        in float32, whatever the optimizer inside
    param_t = bfloat16(w_t)                         what the model sees

A step of 1e-3 on a bfloat16 parameter of 1 is below half its spacing, 2^-8: added there it is lost,
every time. So the optimizer works on w, and the update is what takes the old parameter to the new
one. Of w only what the parameter lacks is kept: 16 bits of remainder (`adamx.precision.remainder`),
or 8, or a whole float32.

Source: Micikevicius et al. (2018), Mixed precision training, section 3.1,
https://arxiv.org/abs/1710.03740
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adamx.core import errors, lifting
from adamx.core.arithmetic import compute_dtype
from adamx.core.expressions import Expr
from adamx.core.foreign import as_concept
from adamx.core.formula import Symbols
from adamx.core.lifting import Leaves, Slots, State
from adamx.core.rounding import random_bits, step_key
from adamx.core.step import Step
from adamx.core.transformation import Transformation
from adamx.precision.remainder import join, split, split8

KEEP = ("remainder", "remainder8", "float32")


class master_weights(Transformation):
    """Let an optimizer work on float32 masters of 16-bit parameters.

    The updates come out in float32, such that `optax.apply_updates(params, updates)` gives the
    rounded masters in the parameters' dtype. Parameters of 32 bits and more are what they are, and
    keep nothing.

    With the remainder, parameter and remainder together are the float32 number, bit for bit, and
    the masters follow the trajectory of the same optimizer on float32 parameters bit for bit, both
    steps jitted. (One exception: where a step shrinks a parameter more than 2^15-fold, the float32
    update cannot express the new value exactly: it is off by 2^-24 of the old one. And the claim
    is about what the compiler of jax 0.10 makes of adamx's optimizers: around an Optax optimizer,
    or compiled by jax 0.8, a product and a sum may be contracted in one program and not in the
    other, which changes last bits.) A parameter that was changed outside, by clipping or averaging,
    is adopted to within half its spacing; with "float32" exactly.

    Attributes:
        tx: the whole optimizer, an adamx or Optax transformation.
        keep: what is kept for a bfloat16 parameter: "remainder", an int16; "remainder8", an int8,
            so that masters have 24 bits and are rounded stochastically; or "float32", a copy. For
            float16, which has no remainder, always the copy.

    Raises:
        TypeError: if `tx` is not a transformation; at `update`, if a parameter has another dtype
            than at `init`.
        ValueError: if `keep` is none of these; at `update`, if it is called without params.

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

    tx: optax.GradientTransformation
    keep: str = "remainder"

    holds_trees = True
    keeps_precision = True
    stands_last = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "tx", as_concept(self.tx, "master_weights: tx"))
        if self.keep not in KEEP:
            raise ValueError(f"master_weights: keep must be one of {KEEP}, got {self.keep!r}")

    @property
    def leafwise(self) -> bool:
        return False

    def tree_names(self) -> tuple[str, ...]:
        return (*self._inner.tree_names(), *self._names)

    def state_names(self) -> tuple[str, ...]:
        return (*self._inner.state_names(), *self._names)

    def init_tree(self, leaves: Leaves) -> State:
        wide = [None if p is None else _wide(p) for p in leaves.values]
        inside = dataclasses.replace(leaves, values=wide)
        own = [{} if p is None else _start(self.keep, p) for p in leaves.values]
        entries = (segment.init_tree(inside) for segment in self._inner.segments())
        return lifting.disjoint(*entries, self._trees(leaves, own))

    def update_tree(self, leaves: Leaves, step: Step, last: bool) -> tuple[Leaves, State]:
        indices = [i for i, u in enumerate(leaves.values) if u is not None]
        if leaves.params is None and indices:
            raise ValueError("master_weights: update needs params: update(grads, state, params)")
        params = leaves.params or [None] * len(leaves.values)
        own = self._own(leaves, params, step.state)
        values, masters = list(leaves.values), list(params)
        for i in indices:
            values[i], masters[i] = _wide(values[i]), _master(masters[i], own[i])
        inside = dataclasses.replace(leaves, values=values, params=masters)
        inside, entries = lifting.run(self._inner, inside, step, narrow=False)
        for i in indices:
            if own[i]:
                u = inside.values[i]
                closed, own[i] = _close(self.keep, u, masters[i], params[i], step.count)
                inside.values[i] = step.emitted(closed)
        out = dataclasses.replace(leaves, values=inside.values)
        return out, entries | self._trees(leaves, own)

    def reveal_tree(self, state: Mapping[str, Any]) -> State:
        return lifting.disjoint(*(s.reveal_tree(state) for s in self._inner.segments()))

    @property
    def _inner(self) -> Transformation:
        return self.children[0]

    @property
    def _names(self) -> tuple[str, ...]:
        return ("master",) if self.keep == "float32" else ("remainder", "master")

    def _trees(self, leaves: Leaves, own: list[Slots]) -> State:
        return {name: leaves.tree([slots.get(name) for slots in own]) for name in self._names}

    def _own(self, leaves: Leaves, params: list[Any], state: Mapping[str, Any]) -> list[Slots]:
        """Return what is kept for each leaf; raise where its dtype is not what `init` was given."""
        trees = {name: errors.entry(state, name) for name in self._names}
        columns = {
            name: errors.beside(leaves.treedef, name, tree, leaves.values)
            for name, tree in trees.items()
        }
        own = []
        for i, path in enumerate(leaves.paths):
            slots = {name: c[i] for name, c in columns.items() if c[i] is not None}
            own.append(slots)
            if leaves.values[i] is None:
                continue
            param = params[i]
            wanted = jax.eval_shape(functools.partial(_start, self.keep), param)
            dtypes = {n: getattr(x, "dtype", None) for n, x in slots.items()}
            if dtypes != {n: x.dtype for n, x in wanted.items()}:
                raise TypeError(
                    f"master_weights: leaf {path!r} is {param.dtype}, and init was given another "
                    "dtype there: equinox.apply_updates returns float32 for 16-bit parameters, "
                    "while adamx.apply_updates and optax.apply_updates keep the dtype"
                )
            errors.check_slots(path, slots, wanted)
        return own

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        symbols.remark("w: the float32 masters of 16-bit parameters, which are w rounded")
        return self._inner.formula(u, symbols)


def masters(params: Any, state: Mapping[str, Any]) -> Any:
    """Return the float32 weights that the optimizer works on.

    For evaluation in full precision, and for export.

    Args:
        params: the parameters, as they go into `update`.
        state: the state of an optimizer in `master_weights`.

    Returns:
        A tree shaped like params: float32 for 16-bit parameters, the parameter itself for others.

    Raises:
        ValueError: if the state keeps no masters.

    Example:
        >>> import adamx, jax.numpy as jnp
        >>> tx = master_weights(adamx.sgd(2**-10))
        >>> params = jnp.ones(1, jnp.bfloat16)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> masters(adamx.apply_updates(params, updates), state)
        Array([0.99902344], dtype=float32)
    """
    leaves = lifting.take_apart(params, None)
    names = [name for name in ("remainder", "master") if name in state]
    if not names:
        raise ValueError(f"masters: the state keeps none, only {sorted(state)}")
    columns = [errors.beside(leaves.treedef, n, state[n], leaves.values) for n in names]
    found = []
    for param, *kept in zip(leaves.values, *columns, strict=True):
        slots = {name: x for name, x in zip(names, kept, strict=True) if x is not None}
        found.append(None if param is None else _master(param, slots))
    return leaves.tree(found)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(compute_dtype(x.dtype))


def _start(keep: str, param: jax.Array) -> Slots:
    """Return what is kept for one parameter before the first step; nothing from 32 bits on."""
    if jnp.finfo(param.dtype).bits >= 32:
        return {}
    if param.dtype != jnp.bfloat16 or keep == "float32":
        return {"master": _wide(param)}
    return {"remainder": jnp.zeros_like(param, jnp.int8 if keep == "remainder8" else jnp.int16)}


@jax.jit
def _master(param: jax.Array, slots: Slots) -> jax.Array:
    """Return one parameter's master: the one kept, where the parameter is still its rounding."""
    if "remainder" in slots:
        return join(param, slots["remainder"])
    if "master" in slots:
        kept = slots["master"]
        return jnp.where(kept.astype(param.dtype) == param, kept, _wide(param))
    return param


@functools.partial(jax.jit, static_argnums=0)
def _close(
    keep: str, u: jax.Array, master: jax.Array, param: jax.Array, count: jax.Array
) -> tuple[jax.Array, Slots]:
    """Return the update that takes the parameter to the rounded new master, and what is kept."""
    new = master + u
    if param.dtype != jnp.bfloat16 or keep == "float32":
        rounded, kept = new.astype(param.dtype), {"master": new}
        return _wide(rounded) - _wide(param), kept
    # A division by one, or by the NaN that the master is. XLA:CPU makes a kernel for each result
    # and never repeats a division: so the new master is computed once, into 4 bytes of temporary
    # memory. Else both results would share the root and the quotient inside u, in 12 bytes.
    new = new / jnp.where(jnp.isnan(master), master, 1)
    if keep == "remainder8":
        rounded, rest = split8(new, random_bits(step_key(count), new))
        kept = {"remainder": rest}
    else:
        rounded, rest = split(new)
        kept = {"remainder": rest}
    return rounded - _wide(param), kept
