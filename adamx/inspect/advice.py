"""What to change in a train step that is not in place: the advice of `audit`, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from adamx.inspect.carried import Array

_SMALL = 100  # an argument smaller by this factor than all carried arrays need not be donated


def what_to_change(
    arguments: list[Array], results: list[Array], carried: dict[int, int], placed: dict[int, int]
) -> Iterator[str]:
    """Yield what to change: one sentence or two for each kind of fault."""
    pairs = [(x, results[carried[x.place]]) for x in arguments if x.place in carried]
    cast = [f"{x} goes in as {x.kind}, comes out as {y.kind}" for x, y in pairs if x.kind != y.kind]
    if cast:
        yield (
            f"{_listed(cast)}: a donated array cannot hold that, and the second call compiles the "
            "step anew. Give the result the shape and dtype of the argument: x.astype(old.dtype), "
            "as adamx.apply_updates does for the parameters."
        )
    if weak := [x for x, y in pairs if x.kind == y.kind and x.weak != y.weak]:
        yield (
            f"{_listed(weak)} has the dtype of a Python number on one side of the step and a dtype "
            "of its own on the other: the second call compiles the step anew. Start from an array, "
            "such as jnp.zeros((), jnp.int32), and cast the result to its dtype."
        )
    if moved := [(x, y) for x, y in pairs if x.kind == y.kind and _is_moved(x, y)]:
        where = [f"{x} goes in on {_spec(x)}, comes out on {_spec(y)}" for x, y in moved]
        yield (
            f"{_listed(where)}: a donated array cannot hold that, and the second call compiles the "
            "step anew. Keep it where it was: out_shardings, or jax.lax.with_sharding_constraint."
        )
    altered = {x.place for x, y in pairs if x.kind != y.kind or _is_moved(x, y)}
    alike = [x for x in arguments if x.aval.size > 1 and x.place not in altered]
    owner = {result: argument for argument, result in carried.items()}
    wrong = [
        f"{results[j]} is written over {x}"
        for x in alike
        if (j := placed.get(x.place)) is not None
        and (carried.get(x.place, j) != j or owner.get(j, x.place) != x.place)
    ]
    if wrong:
        yield (
            f"{_listed(wrong)}: JAX pairs donated arguments with results by shape and dtype, first "
            f"come, first served, and XLA copies what it would lose. {_order(arguments, carried)}"
        )
    if in_vain := [x for x in alike if x.donated and x.place not in {*placed, *carried}]:
        names = _tops(in_vain, arguments)
        yield (
            f"No result takes the memory of the donated {_listed(names)}: the caller loses it for "
            f"nothing. Do not donate {'them' if len(names) > 1 else 'it'}."
        )
    size = {x.place: x.aval.size * x.aval.dtype.itemsize for x in arguments}
    missed = [x for x in alike if not x.donated and x.place in carried]
    enough = sum(size[place] for place in carried) / _SMALL
    missed = [x for x in missed if sum(size[y.place] for y in missed if y.top == x.top) >= enough]
    if missed and not wrong:
        names = _tops(missed, arguments)
        yield (
            f"{_listed(names)} could be updated in place and {'are' if len(names) > 1 else 'is'} "
            f"not donated: the results take as much memory again. {_order(arguments, carried)}"
        )


def _order(arguments: list[Array], carried: dict[int, int]) -> str:
    """Say which arguments to donate, and in which order."""
    names = {x.top: x.name for x in arguments}
    first: dict[Any, int] = {}
    for x in arguments:
        if x.place in carried and x.aval.size > 1:
            first[x.top] = min(first.get(x.top, carried[x.place]), carried[x.place])
    donate = sorted(first, key=lambda top: first[top])
    rest = [names[top] for top in names if top not in first]
    listed = ", ".join(names[top] for top in donate)
    if len(donate) == 1:
        return f"Donate {listed} alone; the result must have its arrays in the same order."
    if donate == list(first):
        return f"Donate ({listed}) and nothing else, and return them in that order."
    return (
        f"Donate ({listed}) and return them in that order: as the results stand, the step should "
        f"take ({', '.join([listed, *rest])})."
    )


def _is_moved(x: Array, y: Array) -> bool:
    if x.sharding is None or y.sharding is None:
        return False
    return not x.sharding.is_equivalent_to(y.sharding, len(x.aval.shape))


def _spec(x: Array) -> str:
    return str(getattr(x.sharding, "spec", x.sharding))


def _tops(arrays: list[Array], arguments: list[Array]) -> list[str]:
    """Return the names of arguments that have no other arrays, and the paths of other arrays."""
    ours = {x.place for x in arrays}
    partly = {x.top for x in arguments if x.aval.size > 1 and x.place not in ours}
    return list(dict.fromkeys(str(x) if x.top in partly else x.name for x in arrays))


def few(many: Sequence[Any], most: int) -> list[str]:
    """Return at most so many texts, of which the last may be a number: "and 3 more"."""
    more = [f"and {len(many) - most + 1} more"] if len(many) > most else []
    return [*map(str, many[: most - 1 if more else most]), *more]


def _listed(many: Sequence[Any]) -> str:
    return ", ".join(few(many, 3))
