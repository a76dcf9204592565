"""A value: immutable, equal to every value built alike, and a pytree of its arrays.

A subclass of `Value` is a frozen dataclass without a decorator. Values held in its fields, or in
tuples in its fields, are its children. The arrays among the fields are its leaves as a pytree; all
other fields are static and belong to the key under which JAX caches compiled programs.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from adamx.core.printing import constructor_call
from adamx.formula.values import Static, function_name

_DYNAMIC, _MADE = "__dynamic__", "__made__"
_MOST_MADE = 16


class Value:
    """The base of all objects built from hyperparameters; see `adamx.Transformation`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(init="__init__" not in vars(cls), repr=False, eq=False, frozen=True)(
            cls
        )
        jax.tree_util.register_pytree_node(cls, _flatten, _unflatten)

    @property
    def children(self) -> tuple[Any, ...]:
        """The values held in this one's fields, in order."""
        found: list[Value] = []
        for value in _fields(self).values():
            many = value if type(value) is tuple else (value,)
            found += [v for v in many if isinstance(v, Value)]
        return tuple(found)

    def with_children(self, children: list[Any]) -> Any:
        """Return this value with other children; the same children give the same object."""
        if all(a is b for a, b in zip(self.children, children, strict=True)):
            return self
        made = vars(self).setdefault(_MADE, {})
        key = tuple(map(id, children))  # the cached value keeps the children alive
        if key not in made:
            if len(made) == _MOST_MADE:
                made.pop(next(iter(made)))
            new = iter(children)
            made[key] = _build(
                type(self),
                {
                    name: tuple(next(new) if isinstance(v, Value) else v for v in value)
                    if type(value) is tuple
                    else next(new)
                    if isinstance(value, Value)
                    else value
                    for name, value in _fields(self).items()
                },
            )
        return made[key]

    def with_fields(self, **fields: Any) -> Any:
        """Return this value with other fields, unchecked."""
        return _build(type(self), _fields(self) | fields)

    def arguments(self) -> Iterator[tuple[str, Any]]:
        """Yield the constructor's arguments: names, "" for positional ones, and values."""
        for number, field in enumerate(dataclasses.fields(self)):  # pyright: ignore
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING or Static(value) != Static(field.default):
                yield ("" if number == 0 else field.name), value

    def _set(self, **fields: Any) -> None:
        """Set fields in `__init__` or `__post_init__`."""
        vars(self).update(fields)

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return False
        mine, my_def = jax.tree.flatten(self)
        theirs, their_def = jax.tree.flatten(other)
        return my_def == their_def and all(a is b for a, b in zip(mine, theirs, strict=True))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        leaves, treedef = jax.tree.flatten(self)
        return hash((type(self), treedef, *map(id, leaves)))

    def __repr__(self) -> str:
        return constructor_call(self)

    def __reduce__(self) -> Any:
        for name, value in _fields(self).items():
            for held in value if isinstance(value, tuple) else (value,):
                if callable(held) and not _can_be_pickled(held) and not _in_a_larger_pickler():
                    function = held.func if isinstance(held, functools.partial) else held
                    raise pickle.PicklingError(
                        f"{type(self).__name__}: {name} holds "
                        f"{getattr(function, '__qualname__', function_name(function))}, which "
                        "pickle cannot store: save the arguments instead, and build the "
                        "transformation again"
                    )
        return _build, (type(self), _fields(self))

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _build(type(self), copy.deepcopy(_fields(self), memo))

    @functools.cached_property
    def _flat(self) -> tuple[list[Any], Any]:
        fields = _fields(self)
        dynamic = vars(self).get(_DYNAMIC)  # known if JAX replaced the arrays by other objects
        if dynamic is None:
            dynamic = tuple(name for name, value in fields.items() if _is_dynamic(value))
        static = tuple((name, Static(v)) for name, v in fields.items() if name not in dynamic)
        return [fields[name] for name in dynamic], (type(self), dynamic, static)


def _build(cls: Any, fields: dict[str, Any]) -> Any:
    """Make an instance from fields that have been checked already."""
    instance = tuple.__new__(cls) if issubclass(cls, tuple) else object.__new__(cls)
    vars(instance).update(fields)
    return instance


def _flatten(value: Value) -> tuple[list[Any], Any]:
    return value._flat


def _unflatten(aux: Any, children: Any) -> Any:
    cls, dynamic, static = aux
    fields = dict(zip(dynamic, children, strict=True)) | {name: box.value for name, box in static}
    return _build(cls, fields | {_DYNAMIC: dynamic})


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: vars(value)[field.name] for field in dataclasses.fields(value)}


def _is_dynamic(value: Any) -> bool:
    many = value if type(value) is tuple else (value,)
    return bool(many) and all(isinstance(v, Value | jax.Array | np.ndarray) for v in many)


def _can_be_pickled(function: Any) -> bool:
    try:
        pickle.dumps(function)
    except Exception:  # pickle and the function's own __reduce__ may raise anything
        return False
    return True


def _in_a_larger_pickler() -> bool:
    """Say whether a pickler written in Python is at work, which stores more: cloudpickle, dill."""
    frame = sys._getframe()
    while frame := frame.f_back:
        if isinstance(frame.f_locals.get("self"), pickle.Pickler | pickle._Pickler):  # pyright: ignore
            return True
    return False
