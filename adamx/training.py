"""The two lines around an optimizer: add the updates, and do it in place.

w_t = w_{t-1} + u_t, rounded to the parameter's dtype: to nearest, or up or down at random
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adamx.core import errors, lifting
from adamx.core.arithmetic import compute_dtype
from adamx.core.precision_warning import ROUNDED
from adamx.core.rounding import mix, random_bits, round_stochastically, step_key
from adamx.core.transformation import Transformation
from adamx.wrappers.accumulate import MICRO, SUM, accumulate
from adamx.wrappers.monitor import SINCE, STATISTICS, monitor

ROUNDINGS = ("nearest", "stochastic")


def apply_updates(
    params: Any, updates: Any, *, rounding: str = "nearest", count: Any = None
) -> Any:
    """Return params + updates, in the parameters' dtypes.

    Args:
        params: the parameters.
        updates: what `update` returned; where it is None the parameter stays as it is.
        rounding: of parameters of 16 bits: "nearest", as `optax.apply_updates`, which loses
            every update below half their spacing; or "stochastic", up or down such that the mean
            is right. Other parameters are rounded to nearest.
        count: the number of the step, `state["count"]`, an int32 scalar, from which the random bits
            are made, together with the place of the element and its value: a run repeats bit for
            bit, in any sharding under jit. Needed for "stochastic", None for "nearest".

    Raises:
        ValueError: if `rounding` is neither, if it is "stochastic" without a count, or if the trees
            or shapes of params and updates do not fit.

    Example:
        A step of 1/16 of the spacing moves one parameter in 16, by the whole spacing:

        >>> params, updates = jnp.ones(1600, jnp.bfloat16), jnp.full(1600, 2.0**-11)
        >>> print(apply_updates(params, updates).mean(dtype=jnp.float32))
        1.0
        >>> new = apply_updates(params, updates, rounding="stochastic", count=1)
        >>> bool(abs((new - 1).astype(jnp.float32).mean() * 2**11 - 1) < 0.25)
        True
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"apply_updates: rounding must be one of {ROUNDINGS}, got {rounding!r}")
    if rounding == "stochastic" and count is None:
        raise ValueError(
            'apply_updates: rounding="stochastic" needs the number of the step: '
            'count=state["count"]'
        )
    leaves = lifting.take_apart(updates, None)
    beside = errors.beside(leaves.treedef, "params", params, leaves.values)
    new = [
        param if u is None else _added(errors.fitting(path, u, param), u, rounding, count)
        for path, u, param in zip(leaves.paths, leaves.values, beside, strict=True)
    ]
    return leaves.tree(new)


def _added(param: jax.Array, update: jax.Array, rounding: str, count: Any) -> jax.Array:
    wide = compute_dtype(param.dtype, update.dtype)
    total = param.astype(wide) + update.astype(wide)
    if rounding == "nearest" or total.dtype != jnp.float32 or param.dtype.itemsize > 2:
        return total.astype(param.dtype)
    place = jnp.zeros(param.shape, jnp.uint32)
    for axis, size in enumerate(param.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, param.shape, axis)
    noise = mix(random_bits(step_key(count), total) ^ place)
    return round_stochastically(total, noise, param.dtype)


class StepFunction(Protocol):
    """What `make_step` returns."""

    def __call__(self, params: Any, state: Any, grads: Any, **extra: Any) -> tuple[Any, Any]:
        """Return the new (params, state); the old ones are donated."""
        ...

    def lower(self, params: Any, state: Any, grads: Any, **extra: Any) -> jax.stages.Lowered:
        """Lower without running, to look at the compiled program."""
        ...


def make_step(
    tx: optax.GradientTransformation, *, rounding: str = "nearest", out_shardings: Any = None
) -> StepFunction:
    """Return the jitted step `(params, state, grads) -> (params, state)`, which works in place.

    Params and state are donated: their buffers hold the results, so that a step needs no memory
    beyond them, and the arrays that were passed are gone. The order matters: JAX pairs donated
    arguments with outputs first come, first served, by shape and dtype; with the gradients in
    front, or the state before the params, every array would be copied, without a warning.
    Arguments that do not fit raise before anything is donated. A parameter whose gradient is None
    stays as it is.

    Args:
        tx: any adamx or Optax transformation.
        rounding: of parameters of 16 bits: "nearest", or "stochastic", for adamx transformations:
            the update is added in float32 and the sum rounded such that its mean is right (see
            `apply_updates`). Made before `tx.init`, it keeps that from warning.
        out_shardings: of (params, state), as for `jax.jit`; needed where the slots lie elsewhere
            than their parameters (`state_sharding`). None leaves it to the compiler, which keeps
            both where they are if they lie alike.

    Returns:
        The jitted function; its `lower` shows the compiled program. Keyword arguments go on to
        `tx.update`. For `accumulate` and `monitor` it is two programs, chosen by a number in the
        state; `lower` shows the one that the call would run or, for an abstract state, the one that
        steps or measures.

    Raises:
        TypeError: if `tx` is not a transformation, or not one of adamx where that is needed.
        ValueError: if `rounding` is neither.

    Example:
        >>> import adamx, jax.numpy as jnp
        >>> tx = adamx.sgd(0.5)
        >>> params = {"w": jnp.array([1.0, 2.0])}
        >>> step = make_step(tx)
        >>> params, state = step(params, tx.init(params), {"w": jnp.array([2.0, -2.0])})
        >>> params
        {'w': Array([0., 3.], dtype=float32)}
    """
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(f"make_step: tx must be an adamx or Optax transformation, got {tx!r}")
    if rounding not in ROUNDINGS:
        raise ValueError(f"make_step: rounding must be one of {ROUNDINGS}, got {rounding!r}")
    if rounding == "stochastic" and not isinstance(tx, Transformation):
        raise TypeError(
            f'make_step: rounding="stochastic" counts the steps with the state of adamx, got {tx!r}'
        )
    if rounding == "stochastic":
        vars(tx)[ROUNDED] = True
    program = _program(tx, rounding, out_shardings)
    if isinstance(tx, accumulate):
        return _InTwoPrograms(MICRO, tx.every, _Adding(tx, out_shardings), program)
    if isinstance(tx, monitor) and tx.every not in (None, 1):
        return _InTwoPrograms(SINCE, tx.every, _Unseen(tx, rounding, out_shardings), program)
    return program


def _program(tx: Any, rounding: str, out_shardings: Any) -> StepFunction:
    """Return the jitted step, in place."""
    update = optax.with_extra_args_support(tx).update

    def step(params: Any, state: Any, grads: Any, **extra: Any) -> tuple[Any, Any]:
        if rounding == "nearest":
            updates, state = update(grads, state, params, **extra)
            return apply_updates(params, updates), state
        updates, state = lifting.update(tx, grads, state, params, extra, narrow=False)
        return apply_updates(params, updates, rounding=rounding, count=state["count"]), state

    return jax.jit(step, donate_argnames=("params", "state"), out_shardings=out_shardings)


class _InTwoPrograms:
    """The step of `accumulate` or `monitor`: one program for every n-th call, another in between.

    Which it is depends on a number in the state. That of the state that was last returned is known
    here, so that the device is asked only at the start, and never waited for.
    """

    def __init__(self, counter: str, every: int, between: StepFunction, last: StepFunction) -> None:
        self._counter, self._every = counter, every
        self._between, self._last = between, last
        self._known: tuple[Any, int] = None, 0

    def __call__(self, params: Any, state: Any, grads: Any, **extra: Any) -> tuple[Any, Any]:
        errors.check_state(state)
        number = self._number(state)
        if number is None:  # the last knows what to do at any number
            return self._last(params, state, grads, **extra)
        step = self._last if number + 1 >= self._every else self._between
        params, state = step(params, state, grads, **extra)
        self._known = state[self._counter], (number + 1) % self._every
        return params, state

    def lower(self, params: Any, state: Any, grads: Any, **extra: Any) -> jax.stages.Lowered:
        number = self._number(state)
        last = number is None or number + 1 >= self._every
        return (self._last if last else self._between).lower(params, state, grads, **extra)

    def _number(self, state: Any) -> int | None:
        """Return how many calls the state has seen; None where a trace or vmap hides it."""
        array, number = self._known
        counter = errors.counter(state, self._counter)
        if counter is array:
            return number
        return int(counter) if lifting.is_concrete(counter) else None


class _Adding:
    """The program of `accumulate` that adds a gradient: it is given two entries of the state."""

    def __init__(self, tx: accumulate, out_shardings: Any) -> None:
        own = None if out_shardings is None else _two(out_shardings[1])
        self._add = jax.jit(tx.add, donate_argnums=0, out_shardings=own)

    def __call__(self, params: Any, state: Any, grads: Any, **extra: Any) -> tuple[Any, Any]:
        return params, state | self._add(_two(state), grads)

    def lower(self, params: Any, state: Any, grads: Any, **extra: Any) -> jax.stages.Lowered:
        return self._add.lower(_two(state), grads)


def _two(state: Any) -> Any:
    if not isinstance(state, dict):
        return state  # one sharding for all of it
    return {name: state[name] for name in (SUM, MICRO)}


class _Unseen:
    """The program of `monitor` that does not measure: that of the optimizer inside.

    The statistics, hundreds of scalars perhaps, are handed on without it: each would be copied.
    """

    def __init__(self, tx: monitor, rounding: str, out_shardings: Any) -> None:
        if out_shardings is not None:
            out_shardings = out_shardings[0], _inside(out_shardings[1])
        self._step = _program(tx.children[0], rounding, out_shardings)

    def __call__(self, params: Any, state: Any, grads: Any, **extra: Any) -> tuple[Any, Any]:
        own = {STATISTICS: errors.entry(state, STATISTICS), SINCE: state[SINCE] + 1}
        params, new = self._step(params, _inside(state), grads, **extra)
        merged = new | own
        return params, {name: merged[name] for name in state}

    def lower(self, params: Any, state: Any, grads: Any, **extra: Any) -> jax.stages.Lowered:
        return self._step.lower(params, _inside(state), grads, **extra)


def _inside(state: Any) -> Any:
    """Return a state, or its shardings, without what `monitor` keeps."""
    if not isinstance(state, dict):
        return state  # one sharding for all of it
    return {name: x for name, x in state.items() if name not in (STATISTICS, SINCE)}
