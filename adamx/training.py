"""The last two lines of a training step: add the updates, and do it in place.

w_t = w_{t-1} + u_t, rounded to the parameter's dtype: to nearest, or up or down at random
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Collection
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from adamx.core import errors, lifting
from adamx.core.arithmetic import cast, compute_dtype, resharded_like
from adamx.core.foreign import as_transformation
from adamx.core.leaves import is_on_host, on_device, take_apart
from adamx.core.lifting import Between
from adamx.core.precision_warning import PrecisionWarning
from adamx.core.rounding import NARROW, mix, random_bits, round_stochastically, step_key
from adamx.core.transformation import Transformation

Params = TypeVar("Params")
State = TypeVar("State")

ROUNDINGS = ("nearest", "stochastic")


def apply_updates(
    params: Params, updates: Any, *, rounding: str = "nearest", count: Any = None
) -> Params:
    """Return params + updates, in the parameters' dtypes.

    Args:
        params: the parameters.
        updates: the updates that `update` returned; where one is None the parameter stays.
        rounding: the rounding of 16-bit parameters: "nearest", as in `optax.apply_updates`, which
            loses every update below half their spacing; or "stochastic", up or down such that the
            mean is right. Other parameters are rounded to nearest.
        count: the step number, `state["count"]`, an int32 scalar. The random bits depend on it and
            on each element's place and value, so a run repeats bit for bit, in any sharding under
            jit. Needed for "stochastic", None for "nearest".

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
            'apply_updates: rounding="stochastic" needs the step number: count=state["count"]'
        )
    leaves = take_apart(updates, None)
    column = leaves.column("params", params)
    new = [
        param if u is None else _added(errors.check_shape(path, u, param), u, rounding, count)
        for path, u, param in zip(leaves.paths, leaves.values, column, strict=True)
    ]
    return leaves.tree(new)


def _added(param: jax.Array, update: jax.Array, rounding: str, count: Any) -> jax.Array:
    wide, update = compute_dtype(param.dtype, update.dtype), resharded_like(update, param)
    total = jax.lax.add(cast(param, wide), cast(update, wide))
    if rounding == "nearest" or total.dtype != jnp.float32 or param.dtype not in NARROW:
        return cast(total, param.dtype)
    place = jnp.zeros(param.shape, jnp.uint32)
    for axis, size in enumerate(param.shape):
        place = place * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(
            jnp.uint32, param.shape, axis
        )
    noise = mix(random_bits(step_key(count), total) ^ place)
    return round_stochastically(total, noise, param.dtype)


@runtime_checkable
class StepFunction(Protocol):
    """The result of `make_step`."""

    def __call__(
        self, params: Params, state: State, grads: Any, **extra: Any
    ) -> tuple[Params, State]:
        """Return the new (params, state); the old ones are donated."""
        ...

    def init(self, params: Any) -> Any:
        """Return the state before the first step; with stochastic rounding, without a warning."""
        ...

    def lower(self, params: Any, state: Any, grads: Any, **extra: Any) -> jax.stages.Lowered:
        """Lower without running, to look at the compiled program."""
        ...


def make_step(
    tx: optax.GradientTransformation | optax.MultiSteps,
    *,
    rounding: str = "nearest",
    out_shardings: Any = None,
) -> StepFunction:
    """Return the jitted step `(params, state, grads) -> (params, state)`, which works in place.

    Params and state are donated: their buffers hold the results, so a step needs no further memory,
    and the arrays that were passed are deleted. The order matters: JAX pairs donated arguments with
    outputs first come, first served, by shape and dtype; with the gradients first, or the state
    before the params, every array would be copied, without a warning. Arguments that do not fit
    raise before anything is donated. A parameter whose gradient is None stays as it is. Slots in
    the host's memory are copied to the device for the step, and back (from JAX 0.10 on).

    An array that occurs twice, as tied weights do, or the first parameters that the first state of
    a method such as `optax.contrib.prodigy` holds, is copied before it is donated. The step looks
    for such arrays when params and state are not the ones that it returned last, and when JAX
    refuses them.

    Args:
        tx: any adamx or Optax transformation.
        rounding: the rounding of 16-bit parameters: "nearest", or "stochastic", for adamx
            transformations: the update is added in float32 and the sum rounded such that its mean
            is right (see `apply_updates`).
        out_shardings: the shardings of (params, state), as for `jax.jit`; needed if the slots are
            not sharded like their parameters (`state_sharding`). None leaves it to the compiler,
            which keeps both shardings if slots and parameters are sharded alike.

    Returns:
        The jitted function. Keyword arguments are passed to `tx.update`; a function among them,
        such as `value_fn` of `optax.lbfgs`, has to be a `jax.tree_util.Partial`. Its `init` is
        `tx.init`, but with stochastic rounding it does not warn of 16-bit parameters. For a
        transformation with cheaper calls between full steps, such as `accumulate` and `monitor`, it
        chooses among several programs by a number in the state; a step that `monitor` measures runs
        two, of which the first measures and moves nothing. `lower` returns the first program that
        the call would run or, for an abstract state, the one that is right for every call.

    Raises:
        TypeError: if `tx` is not a transformation, or must be one of adamx and is not.
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
    tx = as_transformation(tx, "make_step: tx")
    if rounding not in ROUNDINGS:
        raise ValueError(f"make_step: rounding must be one of {ROUNDINGS}, got {rounding!r}")
    if rounding == "stochastic" and not isinstance(tx, Transformation):
        raise TypeError(
            'make_step: rounding="stochastic" needs the step count in the state of an adamx '
            f"transformation, got {tx!r}"
        )
    return _Step(tx, rounding, out_shardings)


class _Step:
    """The step: one program for full steps, and others for the calls between them.

    Counters in the state decide which one runs. Those of the last returned state are remembered as
    Python numbers, so the device is read only at the start, and never waited for.
    """

    def __init__(self, tx: Any, rounding: str, out_shardings: Any) -> None:
        self._tx, self._rounding = tx, rounding
        self._programs: list[Any] = [_program(tx, rounding, out_shardings)]
        self._between: list[Between] = []
        self._apart: list[Any] = []  # the program of `Between.full`, or None
        while isinstance(tx, Transformation) and (found := tx.between()):
            self._programs.append(_PartOfState(found, rounding, out_shardings))
            self._apart.append(found.full and _program_apart(found, rounding, out_shardings))
            self._between.append(found)
            tx = found.tx
        self._known: dict[str, tuple[Any, int]] = {}
        self._last: list[Any] = []

    def init(self, params: Any) -> Any:
        with warnings.catch_warnings():
            if self._rounding == "stochastic":
                warnings.simplefilter("ignore", PrecisionWarning)
            return self._tx.init(params)

    def __call__(self, params: Any, state: Any, grads: Any, **extra: Any) -> tuple[Any, Any]:
        if grads is params or not self._made(params, state):
            errors.check_arrays(params)
            params, state = _apart((params, state), (grads, extra))
        numbers = self._numbers(state, extra)
        first, chosen = self._choose(numbers)
        apart = [self._apart[i](params, state, grads, **extra) for i in first]
        program = self._programs[chosen]
        try:
            params, state = program(params, state, grads, **extra)
        except (ValueError, RuntimeError):  # perhaps of an array that was put in twice since then
            given, (params, state) = (params, state), _apart((params, state), (grads, extra))
            if _same(given, (params, state)):
                raise
            params, state = program(params, state, grads, **extra)
        for entries in apart:
            state = state | entries
        for i, (found, number) in enumerate(zip(self._between, numbers, strict=True)):
            if number is None or ((i >= chosen or i in first) and not found.always_counts):
                self._known.pop(found.counter, None)
            else:
                self._known[found.counter] = state[found.counter], (number + 1) % found.every
        self._last = [x if x is None else weakref.ref(x) for x in map(_first, (params, state))]
        return params, state

    def lower(self, params: Any, state: Any, grads: Any, **extra: Any) -> jax.stages.Lowered:
        first, chosen = self._choose(self._numbers(state, extra))
        program = self._apart[first[0]] if first else self._programs[chosen]
        return program.lower(params, state, grads, **extra)

    def trace(self, params: Any, state: Any, grads: Any, **extra: Any) -> Any:
        """Trace a full step without lowering it, like a jitted function."""
        return self._programs[0].trace(params, state, grads, **extra)

    def _cache_size(self) -> int:
        """Return how many programs have been compiled, like a jitted function."""
        programs = (*self._programs, *filter(None, self._apart))
        return sum(program._cache_size() for program in programs)

    def _made(self, params: Any, state: Any) -> bool:
        """Say whether the last call made these, so that no two arrays share their memory."""
        before = [ref and ref() for ref in self._last]
        now = [_first(params), _first(state)]
        return len(before) == 2 and all(a is b for a, b in zip(before, now, strict=True))

    def _choose(self, numbers: list[int | None]) -> tuple[list[int], int]:
        """Return the indices of the programs to run: of entries apart, and of the step.

        The step's is the first program that does everything else that is due.
        """
        first: list[int] = []
        for i, (found, number) in enumerate(zip(self._between, numbers, strict=True)):
            if number is None:
                return first, i  # program i is right for any number
            if number + 1 >= found.every:
                if not found.full:
                    return first, i
                first.append(i)
        return first, len(self._between)

    def _numbers(self, state: Any, extra: dict[str, Any]) -> list[int | None]:
        """Return the counters; None for one that a trace or vmap hides.

        A counter whose full step is asked for stands at its end; None if an array on the device
        says so or not.
        """
        if self._between:
            errors.check_state(state)
        numbers: list[int | None] = []
        for found in self._between:
            array, number = self._known.get(found.counter, (None, 0))
            counter = errors.counter(state, found.counter)
            exact = found.always_counts or not found.full or number + 1 < found.every
            if counter is not array or not exact:
                concrete = lifting.is_concrete(counter)
                number = int(jax.device_get(counter)) if concrete else None
            ended = extra.get(found.ended_by, False)
            if not isinstance(ended, bool | np.bool_):
                number = None
            elif ended and number is not None:
                number = found.every - 1
            numbers.append(number)
        return numbers


def _first(tree: Any) -> Any:
    """Return the first array of a tree without a look at the others; None if it has none."""
    level = jax.tree_util.default_registry.flatten_one_level(tree)
    if level is None:
        return tree
    return next((x for x in map(_first, level[0]) if x is not None), None)


def _same(a: Any, b: Any) -> bool:
    """Say whether two trees have the same arrays."""
    return all(x is y for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def _apart(donated: Any, read: Any) -> Any:
    """Return the donated trees with a copy of each array that occurs in them, or in `read`, before.

    JAX donates no buffer twice, and none that the same call reads.
    """
    seen: set[Any] = set()

    def one(x: Any, copy: bool) -> Any:
        if not isinstance(x, jax.Array) or isinstance(x, Tracer) or x.is_deleted():
            return x  # JAX says itself that one is deleted
        buffers = {(s.device, s.data.unsafe_buffer_pointer()) for s in x.addressable_shards}
        if copy and buffers & seen:
            return jnp.copy(x)
        seen.update(buffers)
        return x

    jax.tree.map(lambda x: one(x, copy=False), read)
    return jax.tree.map(lambda x: one(x, copy=True), donated)


def _step(tx: Any, rounding: str, moves: bool = True) -> Any:
    """Return the step as a function to be jitted; one that moves nothing returns no parameters."""
    update = optax.with_extra_args_support(tx).update

    def step(params: Any, state: Any, grads: Any, **extra: Any) -> tuple[Any, Any]:
        given, state = state, on_device(state)
        if rounding == "nearest" or not moves:
            updates, state = update(grads, state, params, **extra)
            params = apply_updates(params, updates) if moves else None
        else:
            updates, state = lifting.update(tx, grads, state, params, extra, wide=True)
            params = apply_updates(params, updates, rounding=rounding, count=state["count"])
        return params, _in_memory_of(given, state)

    return step


def _in_memory_of(like: Any, tree: Any) -> Any:
    """Return a tree with its arrays in the host's memory where those of another are there."""
    if not any(map(is_on_host, jax.tree.leaves(like))):
        return tree
    put = lambda old, x: jax.device_put(x, jax.memory.Space.Host) if is_on_host(old) else x  # noqa: E731
    return jax.tree.map(put, like, tree)


def _program_apart(between: Between, rounding: str, out_shardings: Any) -> Any:
    """Return the jitted function that returns what a full step changes and `between.tx` does not.

    It changes nothing in place: the program that runs after it reads the same arrays.
    """
    full: Any = between.full
    names = {between.counter} | {*full.state_names()} - {*between.tx.state_names()}
    step = _step(full, rounding)

    def entries_apart(params: Any, state: Any, grads: Any, **extra: Any) -> Any:
        _, new = step(params, state, grads, **extra)
        return _part(new, names)

    where = None if out_shardings is None else _part(out_shardings[1], names)
    return jax.jit(entries_apart, out_shardings=where)


def _program(tx: Any, rounding: str, out_shardings: Any, moves: bool = True) -> Any:
    """Return the jitted step, in place; one that moves nothing gets None for the parameters."""
    step = _step(tx, rounding, moves)
    if not moves:
        step.__name__ = "between_steps"  # the program's name, as `audit` reports it
    return jax.jit(step, donate_argnames=("params", "state"), out_shardings=out_shardings)


class _PartOfState:
    """A program between full steps: it gets only the arrays that it changes.

    The other entries of the state, perhaps hundreds of scalars, bypass it; so do the parameters if
    it does not move them.
    """

    def __init__(self, between: Between, rounding: str, out_shardings: Any) -> None:
        self._names = {"count", lifting.BEGAN, *between.tx.state_names()}
        self._moves = between.moves
        if out_shardings is not None:
            params, state = out_shardings
            out_shardings = (params if self._moves else None, _part(state, self._names))
        self._program = _program(between.tx, rounding, out_shardings, self._moves)

    def __call__(self, params: Any, state: Any, grads: Any, **extra: Any) -> tuple[Any, Any]:
        given = params if self._moves else None
        moved, new = self._program(given, _part(state, self._names), grads, **extra)
        return (moved if self._moves else params), state | new

    def lower(self, params: Any, state: Any, grads: Any, **extra: Any) -> jax.stages.Lowered:
        given = params if self._moves else None
        return self._program.lower(given, _part(state, self._names), grads, **extra)

    def _cache_size(self) -> int:
        return self._program._cache_size()


def _part(state: Any, names: Collection[str]) -> Any:
    """Return the entries with these names of a state, or of its shardings."""
    if not isinstance(state, dict):
        return state  # one sharding for the whole state
    return {name: x for name, x in state.items() if name in names}
