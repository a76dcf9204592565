"""Is the train step in place? Read from its compiled program, with advice on what to change.

JAX pairs donated arguments with results first come, first served, by shape and dtype. If a result
gets the memory of another array than the one it replaces, XLA copies: there is no warning, and the
numbers are right.
"""

from __future__ import annotations

import dataclasses
import textwrap
import warnings
from typing import Any

import jax

from adamx.core.arithmetic import is_inexact
from adamx.inspect.advice import few, what_to_change
from adamx.inspect.carried import Array, carry, read_arguments, read_results
from adamx.inspect.program import bytes_accessed
from adamx.inspect.text import Instruction, Text

_NAMES = ("params", "model", "weights")
_COMPILERS = (
    "No array is paired wrongly: the compiler copies an array that is still read when its "
    "successor is written, or into another layout."
)
_NOT_USABLE = "Some donated buffers were not usable"


@dataclasses.dataclass(frozen=True)
class Copy:
    """A copy in a compiled program, as large as an array that the step carries on.

    Attributes:
        array: dtype and shape, on one device.
        argument: the path of the copied argument; None if the copy is not of an argument, or the
            program does not show it.
        result: the path of the result that the copy is; None if it is not a result.
    """

    array: str
    argument: str | None
    result: str | None

    def __str__(self) -> str:
        of = f" of {self.argument}" if self.argument else ""
        into = f" as {self.result}" if self.result else ""
        return f"{self.array}{of}{into}" if of or into else f"{self.array} in between"


@dataclasses.dataclass(frozen=True)
class Audit:
    """The result of `audit`; prints as the report.

    All bytes are per device.

    Attributes:
        program: the name of the compiled program, such as "jit_step".
        platform: "cpu", "gpu", ...
        devices: the number of devices that it runs on.
        donated: the number of donated arrays, without scalars.
        in_place: how many of them hold the result that replaces them.
        copies: the copies of arrays as large as one that is carried on, without scalars.
        bytes_accessed: the bytes that the program's kernels read and write in the device's memory:
            of a branch the side that moves most, and a loop's body once.
        floor_bytes: the bytes of every array argument that the program reads and of every result;
            an array that is updated in place counts twice, one that is handed through in place not
            at all. The forward and backward pass of a model are not included.
        temp_bytes: memory beyond arguments and results. None if the backend does not report it.
        params: the name of the argument by whose size the report divides, and its number of
            elements on one device; None if nothing is carried on.
        advice: what to change, in sentences; empty if there is nothing to change.

    Example:
        SGD reads w, g, the count and the learning rate, and writes all but g:

        >>> import adamx, jax.numpy as jnp
        >>> tx, w = adamx.sgd(0.1), jax.ShapeDtypeStruct((1000,), jnp.float32)
        >>> found = audit(adamx.make_step(tx), w, jax.eval_shape(tx.init, w), w)
        >>> found.floor_bytes == (4000 + 4000 + 4 + 4) + (4000 + 4 + 4)
        True
    """

    program: str
    platform: str
    devices: int
    donated: int
    in_place: int
    copies: tuple[Copy, ...]
    bytes_accessed: int
    floor_bytes: int
    temp_bytes: int | None
    params: tuple[str, int] | None
    advice: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether there is nothing to change. Copies that XLA makes in any case may remain."""
        return not self.advice

    def __str__(self) -> str:
        name, size = self.params or ("", 0)
        where = f"{self.devices} {self.platform} device{'s' if self.devices > 1 else ''}"
        many = ", bytes on each" if self.devices > 1 else ""
        count = len(self.advice)
        verdict = "ok" if self.ok else f"{count} thing{'s' if count > 1 else ''} to change"

        def line(what: str, number: int | None) -> str:
            share = f"{number / size:>12.2f}" if size and number is not None else ""
            return f"  {what:<18}{'not told' if number is None else f'{number:,}':>16}{share}"

        rows = [
            f"{self.program} on {where}{many}: {verdict}",
            f"{'bytes':>36}" + (f"   per element of {name}" if size else ""),
            line("accessed", self.bytes_accessed),
            line("floor", self.floor_bytes),
            line("temporary", self.temp_bytes),
            f"  donated arrays: {self.donated:,}, {self.in_place:,} of them updated in place",
            f"  copies: {len(self.copies):,}",
            *(f"    {copy}" for copy in few(self.copies, 6)),
        ]
        if self.ok and self.copies:
            rows.append(_filled("  ", _COMPILERS))
        rows += [_filled(f"  {i}. ", text) for i, text in enumerate(self.advice, start=1)]
        return "\n".join(rows)


def audit(step: Any, *args: Any, device: Any = None, **kwargs: Any) -> Audit:
    """Compile a train step, and report whether it is in place and what to change.

    The step does not run, and nothing is allocated beyond the program. Compiling takes as long as
    at the step's first call.

    A result is taken to replace the argument from which it is computed elementwise, as w + u from
    w, and whose path ends like its own.

    Args:
        step: a function from `jax.jit`, `adamx.make_step`, `nnx.jit` or `eqx.filter_jit`, with any
            optimizer in it; or the result of its `lower(...)` or `lower(...).compile()`, without
            further arguments.
        *args: the step's arguments, or their shapes (`jax.ShapeDtypeStruct`, with shardings if
            there are several devices). `eqx.filter_jit` needs arrays.
        device: compile the step for this device, which need not be there: one of
            `jax.experimental.topologies.get_topology_desc(...).devices`. Only the shapes of the
            arguments count then, so that it does not work with `eqx.filter_jit`. None compiles for
            the devices of the arguments; for several devices of a topology, give shapes with
            shardings over a mesh of them.
        **kwargs: the step's keyword arguments, likewise.

    Returns:
        An `Audit` with `ok`, `advice`, `copies`, `bytes_accessed`, `floor_bytes`, `temp_bytes`; it
        prints as the report. For the step of `accumulate`, which has two programs, it describes and
        names the one that `make_step(tx).lower` chooses.

    Raises:
        TypeError: if `step` is not jitted, or is compiled already and there are arguments or a
            device; if `device` is not a device.

    Example:
        The gradients come first, and the new parameters get the memory of `mu`:

        >>> import adamx, jax.numpy as jnp, optax
        >>> tx = adamx.momentum(0.1)
        >>> def step(grads, state, params):
        ...     updates, state = tx.update(grads, state, params)
        ...     return optax.apply_updates(params, updates), state
        >>> w = jax.ShapeDtypeStruct((1000,), jnp.float32)
        >>> state = jax.eval_shape(tx.init, w)
        >>> found = audit(jax.jit(step, donate_argnums=(1, 2)), w, state, w)
        >>> found.ok, len(found.copies) > 0
        (False, True)
        >>> audit(adamx.make_step(tx), w, state, w).ok
        True
    """
    if device is not None:
        args, kwargs = _placed((args, kwargs), step, device)
    lowered, compiled = _compiled(step, args, kwargs)
    text = Text(compiled.as_text() or "")
    arguments = read_arguments(lowered, compiled, text)
    results = read_results(lowered, compiled, text)
    carried = carry(arguments, results, text)
    by_number = {x.number: x for x in arguments if x.number is not None}
    placed = {by_number[i].place: j for i, j in text.aliases.items() if i in by_number}
    memory: Any = compiled.memory_analysis()
    devices = {d for x in results if x.sharding is not None for d in x.sharding.device_set}
    return Audit(
        program=text.name,
        platform=next(iter(devices)).platform if devices else jax.default_backend(),
        devices=max(len(devices), 1),
        donated=sum(x.donated and x.aval.size > 1 for x in arguments),
        in_place=sum(
            carried.get(place) == j and arguments[place].aval.size > 1
            for place, j in placed.items()
        ),
        copies=_copies(text, by_number, results, carried),
        bytes_accessed=bytes_accessed(text),
        floor_bytes=_floor(text, by_number, placed),
        temp_bytes=memory.temp_size_in_bytes if memory else None,
        params=_params(text, arguments, carried),
        advice=tuple(what_to_change(arguments, results, carried, placed)),
    )


# ------------------------------------------------------------------------------------ the program


def _placed(arguments: Any, step: Any, device: Any) -> Any:
    """Return the shapes of the arguments on a device."""
    if not isinstance(device, jax.Device):
        raise TypeError(
            "audit: device must be a jax.Device, such as jax.experimental.topologies."
            f'get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0], got {device!r}'
        )
    if isinstance(step, jax.stages.Lowered | jax.stages.Compiled):
        raise TypeError(
            "audit: step is already lowered or compiled for its devices, so there must be no "
            "device: give the jitted function and its arguments"
        )
    sharding = jax.sharding.SingleDeviceSharding(device)

    def place(x: Any) -> Any:
        if not hasattr(x, "dtype") or not hasattr(x, "shape"):
            return x
        weak = getattr(x, "weak_type", False)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding, weak_type=weak)

    return jax.tree.map(place, arguments)


def _compiled(step: Any, args: Any, kwargs: Any) -> tuple[Any, jax.stages.Compiled]:
    """Return the lowered program, which has the shapes, and the compiled one."""
    with warnings.catch_warnings():  # the report names arrays that were donated in vain
        warnings.filterwarnings("ignore", message=_NOT_USABLE)
        if isinstance(step, jax.stages.Lowered | jax.stages.Compiled):
            if args or kwargs:
                raise TypeError(
                    "audit: step is already lowered or compiled for its arguments, so there must "
                    f"be none, got {len(args) + len(kwargs)}"
                )
            lowered = step
        else:
            if isinstance(step, str) or not callable(getattr(step, "lower", None)):
                raise TypeError(
                    "audit: step must be a jitted function, whose program can be read: "
                    "audit(jax.jit(step, donate_argnums=(0, 1)), *args) for a step (params, state, "
                    f"...) -> (params, state), got {step!r}"
                )
            lowered = step.lower(*args, **kwargs)
            lowered = getattr(lowered, "lowered", lowered)  # Equinox and Flax NNX wrap it
        if not isinstance(lowered, jax.stages.Lowered | jax.stages.Compiled):
            raise TypeError(
                "audit: step.lower(...) must return a jax.stages.Lowered, as with jax.jit, got "
                f"{type(lowered).__name__}"
            )
        return lowered, lowered if isinstance(lowered, jax.stages.Compiled) else lowered.compile()


def _copies(
    text: Text, by_number: dict[int, Array], results: list[Array], carried: dict[int, int]
) -> tuple[Copy, ...]:
    reused = [i for i, x in by_number.items() if x.donated or x.place in carried]
    sizes = {text.parameters[i].elements for i in reused or by_number} - {0, 1}
    result_of = {name: str(results[i]) for i, (name, _) in enumerate(text.results)}
    done = {x.operands[0]: x.name for x in text.instructions.values() if x.opcode == "copy-done"}

    def describe(x: Instruction) -> Copy:
        number = text.source(x)
        argument = None if number is None else str(by_number[number])
        result = result_of.get(x.name) or result_of.get(done.get(x.name, ""))
        return Copy(x.array, argument, result)

    return tuple(map(describe, text.copies(sizes)))


def _floor(text: Text, by_number: dict[int, Array], placed: dict[int, int]) -> int:
    used = {name for x in text.instructions.values() for name in x.operands}
    used |= {name for name, _ in text.results}
    read = sum(x.bytes for i in by_number if (x := text.parameters[i]).name in used)
    written = sum(text.bytes_of(value) for value in text.results)
    through = sum(
        2 * text.parameters[number].bytes
        for number, x in by_number.items()
        if x.place in placed
        and text.results[placed[x.place]] == (text.parameters[number].name, None)
    )
    return read + written - through


def _params(text: Text, arguments: list[Array], carried: dict[int, int]) -> tuple[str, int] | None:
    """Return name and size of the argument called params, or of the first that may be it.

    It is carried on, and holds no whole numbers, as the count in an optimizer's state.
    """
    found = sorted((x for x in arguments if x.place in carried), key=lambda x: carried[x.place])
    if not any(x.aval.size > 1 for x in found):  # a program that measures, and moves nothing
        found = [x for x in arguments if x.number is not None]
    if not found:
        return None
    for name in _NAMES:
        if chosen := [x for x in found if name in (x.name, *x.path[:1])]:
            break
    else:
        others = {x.top for x in found if not is_inexact(x.aval)}
        first = next((x for x in found if x.top not in others), found[0])
        name, chosen = first.name, [x for x in found if x.top == first.top]
    return name, sum(text.parameters[x.number].elements for x in chosen if x.number is not None)


def _filled(start: str, text: str) -> str:
    """Return a paragraph of lines of at most 100 characters."""
    wrapper = textwrap.TextWrapper(100, start, " " * len(start))
    wrapper.break_long_words = wrapper.break_on_hyphens = False
    return wrapper.fill(text)
