"""Is the train step in place? What its compiled program says, and what to change.

JAX pairs donated arguments with results first come, first served, by shape and dtype. Where that
gives a result the memory of another array than the one it replaces, XLA copies: there is no
warning, and the numbers are right.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from adamx.inspect.program import Instruction, Text

_NEAR = 2  # operations between an array and its successor: w + u, b * m + (1 - b) * g
_NAMES = ("params", "model", "weights")
_NOT_USABLE = "Some donated buffers were not usable"


@dataclasses.dataclass(frozen=True)
class Copy:
    """A copy in a compiled program, as large as an array that the step carries on.

    Attributes:
        array: dtype and shape, on one device.
        argument: the path of the argument that is copied; None where it is no argument, or where
            the program does not tell.
        result: the path of the result that the copy is; None where it is none.
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
    """What `audit` found; prints as the report.

    All bytes are those of one device.

    Attributes:
        program: the name of the compiled program, such as "jit_step".
        platform: "cpu", "gpu", ...
        devices: how many it runs on.
        donated: how many arrays are donated.
        in_place: how many of them hold the result that replaces them.
        copies: the copies of arrays as large as one that is carried on (scalars left out).
        bytes_accessed: what the program reads and writes, by XLA's own count: both sides of a
            branch, and a loop's body once. None where the backend does not say.
        floor_bytes: every array argument that the program reads, once, and every result, once;
            so an array that is updated in place counts twice, and one that is handed through in
            place not at all. Of a model's forward and backward it knows nothing.
        temp_bytes: memory beyond arguments and results. None where the backend does not say.
        params: the name of what the bytes are divided by, and its number of elements on one
            device; None where nothing is carried on.
        advice: what to change, in sentences; empty where there is nothing.
    """

    program: str
    platform: str
    devices: int
    donated: int
    in_place: int
    copies: tuple[Copy, ...]
    bytes_accessed: int | None
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
        per = f"per element of {name}" if size else ""
        where = f"{self.devices} {self.platform} device{'s' if self.devices > 1 else ''}"
        many = ", bytes on each" if self.devices > 1 else ""
        verdict = "ok" if self.ok else f"{len(self.advice)} to change"

        def line(what: str, number: int | None) -> str:
            if number is None:
                return f"  {what:<17} {'not told':>15}"
            return f"  {what:<17} {number:>15,}" + (f" {number / size:>10.2f} {per}" * bool(size))

        rows = [
            f"{self.program} on {where}{many}: {verdict}",
            line("bytes accessed", self.bytes_accessed),
            line("floor", self.floor_bytes) + "  (arguments and results, once)",
            line("temporary bytes", self.temp_bytes),
            f"  donated arrays    {self.donated:>15,}, {self.in_place:,} updated in place",
            f"  copies            {len(self.copies):>15,}",
            *(f"    {copy}" for copy in _few(self.copies)),
        ]
        if self.ok and self.copies:
            rows.append(
                "  Every donated array is paired right: these copies are the compiler's (an array "
                "that is\n  still read when its successor is written, or another layout)."
            )
        rows += [f"  {number}. {text}" for number, text in enumerate(self.advice, start=1)]
        return "\n".join(rows)


def audit(step: Any, *args: Any, **kwargs: Any) -> Audit:
    """Compile a train step, and report whether it is in place and what to change.

    Nothing of the step is run, and nothing is allocated beyond the program. The step is compiled,
    which takes as long as it takes at its first call.

    What is the successor of what is read from the program: a result belongs to the argument that
    it is made of element by element, as w + u of w, and whose path ends like its own.

    Args:
        step: a function from `jax.jit`, `adamx.make_step`, `nnx.jit` or `eqx.filter_jit`, with any
            optimizer in it; or what its `lower(...)` or `lower(...).compile()` returned, and then
            without arguments.
        *args: the step's arguments, or their shapes (`jax.ShapeDtypeStruct`, with shardings where
            there are several devices). `eqx.filter_jit` needs arrays.
        **kwargs: the step's keyword arguments, likewise.

    Returns:
        An `Audit`: `ok`, `advice`, `copies`, `bytes_accessed`, `floor_bytes`, `temp_bytes`; it
        prints as the report. The step of `accumulate` is two programs: it is about the one that
        `make_step(tx).lower` chooses, and names it.

    Raises:
        TypeError: if `step` is not jitted, or is compiled already and there are arguments.

    Example:
        The gradients stand in front, and the memory of `mu` is taken for the new parameters:

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
    lowered, compiled = _compiled(step, args, kwargs)
    text = Text(compiled.as_text() or "")
    arguments = _arguments(lowered, compiled, text)
    results = _results(lowered, compiled)
    if len(results) != len(text.results):
        raise ValueError(
            f"audit: the program has {len(text.results)} results where the step has {len(results)}:"
            " its text is in a form that is not known here"
        )
    carried = _carried(arguments, results, text)
    by_number = {x.number: x for x in arguments if x.number is not None}
    placed = {by_number[i].place: j for i, j in text.aliases.items() if i in by_number}
    cost: Any = compiled.cost_analysis() or {}
    memory: Any = compiled.memory_analysis()
    devices = {d for x in results if x.sharding is not None for d in x.sharding.device_set}
    return Audit(
        program=text.name,
        platform=next(iter(devices)).platform if devices else jax.default_backend(),
        devices=max(len(devices), 1),
        donated=sum(x.donated for x in arguments),
        in_place=sum(carried.get(place) == j for place, j in placed.items()),
        copies=_copies(text, arguments, results, carried),
        bytes_accessed=int(cost["bytes accessed"]) if "bytes accessed" in cost else None,
        floor_bytes=_floor(text, by_number, placed),
        temp_bytes=memory.temp_size_in_bytes if memory else None,
        params=_params(text, arguments, carried),
        advice=tuple(_advice(arguments, results, carried, placed)),
    )


# ---------------------------------------------------------------------------- arguments and results


@dataclasses.dataclass(frozen=True)
class _Array:
    """One array among the arguments or the results.

    Attributes:
        place: its position among them.
        top: the argument that it is in, or the position in a tuple of results, as JAX names it.
        name: of that argument.
        path: where in it, in components.
        aval: shape, dtype and whether the dtype is weak.
        sharding: None where the program does not use it.
        donated: whether it is.
        number: its number in the program; None where the program does not use it.
    """

    place: int
    top: Any
    name: str
    path: tuple[str, ...]
    aval: Any
    sharding: Any
    donated: bool = False
    number: int | None = None

    def __str__(self) -> str:
        return "/".join((self.name, *self.path))

    @property
    def kind(self) -> str:
        weak = " (weak)" if getattr(self.aval, "weak_type", False) else ""
        return f"{self.aval.dtype}{list(self.aval.shape)}{weak}"


def _compiled(step: Any, args: Any, kwargs: Any) -> tuple[Any, jax.stages.Compiled]:
    """Return what holds the shapes, and the compiled program."""
    with warnings.catch_warnings():  # what was donated in vain is reported
        warnings.filterwarnings("ignore", message=_NOT_USABLE)
        if isinstance(step, jax.stages.Lowered | jax.stages.Compiled):
            if args or kwargs:
                raise TypeError(
                    "audit: step is lowered or compiled for its arguments already, and must come "
                    f"without any, got {len(args) + len(kwargs)}"
                )
            lowered = step
        else:
            if isinstance(step, str) or not callable(getattr(step, "lower", None)):
                raise TypeError(
                    "audit: step must be a jitted function, which has a program to look at: "
                    "audit(jax.jit(step, donate_argnums=(0, 1)), *args) for a step (params, state, "
                    f"...) -> (params, state), got {step!r}"
                )
            lowered = step.lower(*args, **kwargs)
            lowered = getattr(lowered, "lowered", lowered)  # Equinox and Flax NNX wrap it
        if not isinstance(lowered, jax.stages.Lowered | jax.stages.Compiled):
            raise TypeError(
                "audit: step.lower(...) must give a jax.stages.Lowered, as that of jax.jit does, "
                f"got {type(lowered).__name__}"
            )
        return lowered, lowered if isinstance(lowered, jax.stages.Compiled) else lowered.compile()


def _arguments(lowered: Any, compiled: Any, text: Text) -> list[_Array]:
    flat, _ = jax.tree_util.tree_flatten_with_path(lowered.args_info)
    avals = jax.tree.leaves(lowered.in_avals)
    shardings = _leaves(compiled.input_shardings)
    used = [i for i, sharding in enumerate(shardings) if sharding is not None]
    first = len(text.parameters) - len(used)  # constants of the step may come before
    numbers = {place: first + k for k, place in enumerate(used)}
    names: dict[Any, str] = {}
    for place, (path, _) in enumerate(flat):
        label = text.parameters[numbers[place]].label if place in numbers else ""
        if found := re.match(r"[A-Za-z_]\w*", label):
            names.setdefault(path[:2], found[0])
    return [
        _Array(
            place,
            path[:2],
            names.get(path[:2], f"argument {_components(path[1:2])[0]}"),
            _components(path[2:]),
            aval,
            sharding,
            info.donated,
            numbers.get(place),
        )
        for place, ((path, info), aval, sharding) in enumerate(
            zip(flat, avals, shardings, strict=True)
        )
    ]


def _results(lowered: Any, compiled: Any) -> list[_Array]:
    flat, _ = jax.tree_util.tree_flatten_with_path(lowered.out_info)
    shardings = _leaves(compiled.output_shardings)
    found = []
    for place, ((path, info), sharding) in enumerate(zip(flat, shardings, strict=True)):
        in_tuple = path and isinstance(path[0], jax.tree_util.SequenceKey)
        head, rest = (path[:1], path[1:]) if in_tuple else ((), path)
        name = "/".join(("result", *_components(head)))
        found.append(_Array(place, head, name, _components(rest), info, sharding))
    return found


def _leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda x: x is None)


def _components(path: Sequence[Any]) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


# ------------------------------------------------------------------------------ what replaces what


def _carried(arguments: list[_Array], results: list[_Array], text: Text) -> dict[int, int]:
    """Return for each argument that has a successor among the results the place of that result."""
    by_number = {x.number: x for x in arguments if x.number is not None}
    pairs = []
    for result in results:
        near = [
            (by_number[number], distance)
            for number, distance in text.sources(result.place).items()
            if number in by_number
        ]
        alike = [_alike(argument.path, result.path) for argument, _ in near]
        for (argument, distance), common in zip(near, alike, strict=True):
            named = common > 0 and common == max(alike) and alike.count(common) == 1
            same_shape = argument.aval.shape == result.aval.shape
            likely = named or argument.donated or distance <= _NEAR
            if named if argument.aval.size == 1 or not same_shape else likely:
                rank = (-common, not argument.donated, distance, argument.place)
                pairs.append((rank, argument.place, result.place))
    carried: dict[int, int] = {}
    taken: set[int] = set()
    for _, argument, result in sorted(pairs):
        if argument not in carried and result not in taken:
            carried[argument] = result
            taken.add(result)
    return carried


def _alike(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """Return how many components two paths have in common at their ends."""
    common = 0
    while common < min(len(a), len(b)) and a[-1 - common] == b[-1 - common]:
        common += 1
    return common


def _copies(
    text: Text, arguments: list[_Array], results: list[_Array], carried: dict[int, int]
) -> tuple[Copy, ...]:
    by_number = {x.number: x for x in arguments if x.number is not None}
    kept = [x for x in by_number.values() if x.donated or x.place in carried]
    sizes = {text.parameters[x.number].elements for x in kept or by_number.values()} - {0, 1}
    result_of = {name: str(results[i]) for i, (name, _) in enumerate(text.results)}
    done = {x.operands[0]: x.name for x in text.instructions.values() if x.opcode == "copy-done"}

    def describe(x: Instruction) -> Copy:
        number = text.source(x)
        argument = by_number.get(number)
        result = result_of.get(x.name) or result_of.get(done.get(x.name, ""))
        return Copy(x.array, str(argument) if argument else None, result)

    return tuple(map(describe, text.copies(sizes)))


def _floor(text: Text, by_number: dict[Any, _Array], placed: dict[int, int]) -> int:
    read = sum(text.parameters[number].bytes for number in by_number)
    written = sum(text.bytes_of(value) for value in text.results)
    through = sum(
        2 * text.parameters[number].bytes
        for number, x in by_number.items()
        if x.place in placed
        and text.results[placed[x.place]] == (text.parameters[number].name, None)
    )
    return read + written - through


def _params(text: Text, arguments: list[_Array], carried: dict[int, int]) -> tuple[str, int] | None:
    """Return what to divide bytes by: what is called params, or the first that is carried on."""
    kept = sorted((x for x in arguments if x.place in carried), key=lambda x: carried[x.place])
    if not kept:
        return None
    for name in _NAMES:
        chosen = [x for x in kept if name in (x.name, *x.path[:1])]
        if chosen:
            break
    else:
        name, chosen = kept[0].name, [x for x in kept if x.top == kept[0].top]
    return name, sum(text.parameters[x.number].elements for x in chosen if x.number is not None)


# ------------------------------------------------------------------------------------- what to change


def _advice(
    arguments: list[_Array], results: list[_Array], carried: dict[int, int], placed: dict[int, int]
) -> Iterable[str]:
    owner = {result: argument for argument, result in carried.items()}
    changed = [
        (x, results[carried[x.place]])
        for x in arguments
        if x.place in carried and _changes(x, results[carried[x.place]])
    ]
    other = {x.place for x, _ in changed}
    kept = [x for x in arguments if x.aval.size > 1 and x.place not in other]
    wrong = [
        (x, results[placed[x.place]])
        for x in kept
        if (x.place in placed and carried.get(x.place, placed[x.place]) != placed[x.place])
        or (x.place in placed and owner.get(placed[x.place], x.place) != x.place)
    ]
    replaced = {owner[result.place] for _, result in wrong if result.place in owner}
    in_vain = [x for x in kept if x.donated and x.place not in placed and x.place not in replaced]
    missed = [x for x in kept if not x.donated and x.place in carried]
    order = _Order(arguments, carried)
    if changed:
        pairs = [f"{x} goes in as {x.kind}, comes out as {y.kind}" for x, y in changed]
        if any(x.kind == y.kind for x, y in changed):
            pairs = [
                f"{x} goes in as {x.kind} {_spec(x)}, comes out as {y.kind} {_spec(y)}"
                for x, y in changed
            ]
        yield (
            f"{_listed(pairs)}: the step is compiled again at its second call, and cannot be in "
            "place. Give the result the kind of the argument: astype (adamx.apply_updates does it "
            "for params), an init without Python numbers, out_shardings."
        )
    if wrong:
        pairs = [f"{y} is written over {x}" for x, y in wrong]
        yield (
            f"{_listed(pairs)}: JAX pairs donated arguments with results by shape and dtype, first "
            f"come, first served, and XLA copies what stands in the way. {order.advice()}"
        )
    if in_vain:
        yield (
            f"No result takes the memory of the donated {_listed(_tops(in_vain))}: the arrays are "
            "gone, and nothing is gained. Do not donate "
            f"{'them' if len(_tops(in_vain)) > 1 else 'it'}."
        )
    if missed and not wrong:
        yield (
            f"{_listed(_tops(missed))} could be updated in place and "
            f"{'are' if len(_tops(missed)) > 1 else 'is'} not donated: the results take as much "
            f"memory again. {order.advice()}"
        )


class _Order:
    """Which arguments to donate, and in which order."""

    def __init__(self, arguments: list[_Array], carried: dict[int, int]) -> None:
        first: dict[Any, int] = {}
        self.names: dict[Any, str] = {}
        self.given: list[Any] = []
        for x in arguments:
            if x.top not in self.names:
                self.names[x.top] = x.name
                self.given.append(x.top)
            if x.place in carried and x.aval.size > 1:
                first[x.top] = min(first.get(x.top, carried[x.place]), carried[x.place])
        self.donate = sorted(first, key=lambda top: first[top])

    def advice(self) -> str:
        """Say it."""
        among = [top for top in self.given if top in self.donate]
        names = f"({', '.join(self.names[top] for top in self.donate)})"
        rest = [self.names[top] for top in self.given if top not in self.donate]
        if among == self.donate:
            return f"Donate {names} and nothing else, and return them in that order."
        signature = ", ".join([*(self.names[top] for top in self.donate), *rest])
        return (
            f"Donate {names} and return them in that order: the step should take ({signature}), "
            "as the results stand."
        )


def _changes(x: _Array, y: _Array) -> bool:
    if x.kind != y.kind:
        return True
    if x.sharding is None or y.sharding is None:
        return False
    return not x.sharding.is_equivalent_to(y.sharding, len(x.aval.shape))


def _spec(x: _Array) -> str:
    return f"as {getattr(x.sharding, 'spec', x.sharding)}"


def _tops(arrays: Iterable[_Array]) -> list[str]:
    """Return the names of the arguments that they are in."""
    return list(dict.fromkeys(x.name for x in arrays))


def _few(many: Sequence[Any], most: int = 6) -> list[str]:
    more = [f"and {len(many) - most + 1} more"] if len(many) > most else []
    return [*map(str, many[: most - 1 if more else most]), *more]


def _listed(many: Sequence[Any]) -> str:
    return ", ".join(_few(many, 3))
