"""Which result of a step replaces which argument.

A new value is computed elementwise from the old one, w + u from w, and is at the same place: the
paths of result and argument end alike. The program shows the first, the trees the second.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax

from adamx.inspect.text import Text

_FAR = 1000
_NEAR = 2  # operations between an array and its successor: w + u, b * m + (1 - b) * g


@dataclasses.dataclass(frozen=True)
class Array:
    """One array among the arguments or the results.

    Attributes:
        place: its position among them.
        top: JAX's key of the argument that holds it, or of its position in a tuple of results.
        name: the name of that argument.
        path: the path inside the argument, in components.
        aval: its shape and dtype, and whether the dtype is weak.
        sharding: its sharding; None if the program does not use the array.
        donated: whether it is donated.
        number: its number in the program; None if the program does not use it.
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
        """Dtype and shape: "float32[4,8]"."""
        return f"{self.aval.dtype}[{','.join(map(str, self.aval.shape))}]"

    @property
    def weak(self) -> bool:
        """Whether its dtype is weak, as a Python number's."""
        return getattr(self.aval, "weak_type", False)


def read_arguments(lowered: Any, compiled: Any, text: Text) -> list[Array]:
    """Return the arguments in the order of their tree, with their names in the program."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(lowered.args_info)
    avals = jax.tree.leaves(lowered.in_avals)
    shardings = treedef.flatten_up_to(compiled.input_shardings)
    used = [i for i, sharding in enumerate(shardings) if sharding is not None]
    _check("arguments", len(used), len(text.parameters))
    numbers = {place: number for number, place in enumerate(used)}
    names: dict[Any, str] = {}
    for place, (path, _) in enumerate(flat):
        label = text.parameters[numbers[place]].label if place in numbers else ""
        if found := re.match(r"[A-Za-z_]\w*", label):
            names.setdefault(path[:2], found[0])
    return [
        Array(
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


def read_results(lowered: Any, compiled: Any, text: Text) -> list[Array]:
    """Return the results in the order of their tree."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(lowered.out_info)
    _check("results", len(flat), len(text.results))
    shardings = treedef.flatten_up_to(compiled.output_shardings)
    found = []
    for place, ((path, info), sharding) in enumerate(zip(flat, shardings, strict=True)):
        in_tuple = path and isinstance(path[0], jax.tree_util.SequenceKey)
        head, rest = (path[:1], path[1:]) if in_tuple else ((), path)
        name = "/".join(("result", *_components(head)))
        found.append(Array(place, head, name, _components(rest), info, sharding))
    return found


def _check(what: str, expected: int, found: int) -> None:
    if expected != found:
        raise ValueError(
            f"audit: the text of the program should have {expected} {what}, got {found}: this "
            "form of text is not known"
        )


def _components(path: Sequence[Any]) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def carry(arguments: list[Array], results: list[Array], text: Text) -> dict[int, int]:
    """Return the place of each argument's successor among the results, by the argument's place."""
    by_number = {x.number: x for x in arguments if x.number is not None}
    donated: dict[Any, list[Array]] = {}
    for x in arguments:
        if x.donated and x.path:
            donated.setdefault((x.path, x.aval.shape, x.aval.dtype), []).append(x)
    pairs = []
    for result in results:
        # an array that makes room for another argument, as the gradient before does for the next
        same = donated.get((result.path, result.aval.shape, result.aval.dtype), [])
        if len(same) == 1:
            pairs.append(((-len(result.path), False, _FAR, 0), same[0].place, result.place))
        near = [(by_number[i], distance) for i, distance in text.sources(result.place).items()]
        alike = [_alike(argument.path, result.path) for argument, _ in near]
        for (argument, distance), common in zip(near, alike, strict=True):
            if argument.aval.size == 1 or argument.aval.shape != result.aval.shape:
                likely = common > 0
            else:
                named = common > 0 and common == max(alike) and alike.count(common) == 1
                likely = named or argument.donated or distance <= _NEAR
            if likely:
                rank = (-common, not argument.donated, distance, argument.place)
                pairs.append((rank, argument.place, result.place))
    carried: dict[int, int] = {}
    taken: set[int] = set()
    for _, argument, result in sorted(pairs):
        if argument not in carried and result not in taken:
            carried[argument] = result
            taken.add(result)
    # if the new value is no longer computed elementwise: the path alone, if it is unique
    for x in (x for x in arguments if x.donated and x.place not in carried):
        kind = (x.aval.shape, x.aval.dtype)
        left = [y for y in results if y.place not in taken and (y.aval.shape, y.aval.dtype) == kind]
        alike = [_alike(x.path, y.path) for y in left]
        if (most := max(alike, default=0)) and alike.count(most) == 1:
            carried[x.place] = left[alike.index(most)].place
            taken.add(carried[x.place])
    return carried


def _alike(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """Return how many components at their ends two paths share."""
    common = 0
    while common < min(len(a), len(b)) and a[-1 - common] == b[-1 - common]:
        common += 1
    return common
