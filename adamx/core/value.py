"""A value: immutable, and equal to every value that was built alike.

The annotated fields of a subclass of `Value` are its hyperparameters. Values held in them, or in
tuples in them, are its children, unless they say otherwise (`is_part`).

JAX, and everything else that looks into trees or for dataclasses, sees one thing: a pytree without
leaves, which is a part of the key under which a program is compiled. So a value may be a static
argument, a field of any module, or an entry of a config, and nobody donates, casts or saves the
arrays that it holds. Whoever wants those, for vmap, grad or a compiled argument, says `as_pytree`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import pickle
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, dataclass_transform

import jax
import numpy as np

from adamx.core.printing import constructor_call
from adamx.formula.values import Static, function_name

V = TypeVar("V", bound="Value")

_MADE = "__made__"
_MOST_MADE = 16


@dataclass_transform(frozen_default=True, eq_default=False)
class Value:
    """The base of all objects built from hyperparameters; see `adamx.Transformation`."""

    _declared: Any = object  # the hidden dataclass that declares a class's fields
    _own_init: Any = False  # whether the constructor's arguments are others than the fields
    is_part = True  # whether it is a child of a value that holds it; a schedule is not

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        names = inspect.get_annotations(cls)
        hidden = {name: vars(cls)[name] for name in names if name in vars(cls)}
        hidden |= {"__annotations__": names, "__post_init__": Value.__post_init__}
        hidden |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
        hidden |= {"__doc__": "Fields."}  # where there is none, dataclasses writes a signature
        made: Any = type(cls.__name__, (cls._declared,), hidden)
        cls._declared = dataclasses.dataclass(repr=False, eq=False)(made)
        cls._own_init = "__init__" in vars(cls)
        if not cls._own_init:
            type.__setattr__(cls, "__init__", made.__init__)
        jax.tree_util.register_static(cls)

    def __post_init__(self) -> None:
        """Check and convert the fields, once they are set."""

    @classmethod
    def _new(cls) -> Any:
        """Return an instance without fields."""
        return object.__new__(cls)

    @classmethod
    def hyperparameters(cls) -> tuple[dataclasses.Field[Any], ...]:
        """Return the fields' names, types and defaults, in order."""
        return dataclasses.fields(cls._declared)

    @property
    def _held(self) -> dict[str, Any]:
        """The fields' values, by name."""
        return {field.name: vars(self)[field.name] for field in self.hyperparameters()}

    @functools.cached_property
    def children(self) -> tuple[Any, ...]:
        """The values held in this one's fields, in order."""
        found: list[Value] = []
        for value in self._held.values():
            many = value if type(value) is tuple else (value,)
            found += filter(_is_child, many)
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
            made[key] = self._mapped(lambda x: next(new) if _is_child(x) else x)
        return made[key]

    def replace(self: V, **fields: Any) -> V:
        """Return a value with some other hyperparameters, built and checked anew."""
        if not self._own_init:
            return type(self)(**self._held | fields)  # pyright: ignore
        rest, positional, named = self.call()
        if rest:
            positional = fields.pop(rest, positional)
        return type(self)(*positional, **named | fields)  # pyright: ignore

    __replace__ = replace  # for copy.replace

    def with_fields(self, **fields: Any) -> Any:
        """Return this value with other fields, unchecked."""
        return _build(type(self), self._held | fields)

    def arguments(self) -> Iterator[tuple[str, Any]]:
        """Yield the constructor's arguments: names, "" for positional ones, and values."""
        for number, field in enumerate(self.hyperparameters()):
            value = vars(self)[field.name]
            if field.default is dataclasses.MISSING or Static(value) != Static(field.default):
                yield ("" if number == 0 else field.name), value

    def call(self) -> tuple[str, list[Any], dict[str, Any]]:
        """Return the constructor's call: the name of its *args, if any, those, and the others."""
        parameters = list(inspect.signature(type(self)).parameters.values())
        rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "")
        positional: list[Any] = []
        named: dict[str, Any] = {}
        for name, value in self.arguments():
            if name:
                named[name] = value
            elif rest:
                positional.append(value)
            else:
                named[parameters[len(named)].name] = value
        return rest, positional, named

    def _set(self, **fields: Any) -> None:
        """Set fields in `__init__` or `__post_init__`."""
        vars(self).update(fields)
        vars(self).pop("children", None)

    def _mapped(self, change: Callable[[Any], Any]) -> Any:
        """Return this value with a function applied to each field, and to each item of a tuple."""
        new = {
            name: tuple(map(change, x)) if type(x) is tuple else change(x)
            for name, x in self._held.items()
        }
        return _build(type(self), new)

    @functools.cached_property
    def _apart(self) -> tuple[list[Any], Value]:
        """The arrays held here and in the children, and this value with a hole for each."""
        arrays: list[Any] = []

        def taken(x: Any) -> Any:
            if isinstance(x, Value):
                inner, x = x._apart
                arrays.extend(inner)
            elif isinstance(x, jax.Array | np.ndarray):
                arrays.append(x)
                return _HOLE
            return x

        like = self._mapped(taken)
        return arrays, like if arrays else self

    def _filled(self, arrays: Iterator[Any]) -> Any:
        """Return this value with an array in each hole."""

        def put(x: Any) -> Any:
            if isinstance(x, Value):
                return x._filled(arrays)
            return next(arrays) if x is _HOLE else x

        return self._mapped(put)

    @functools.cached_property
    def _key(self) -> tuple[Any, ...]:
        return (type(self), *map(_compared, self._held.values()))

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Value) and self._key == other._key)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return self._hash

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._declared.__dataclass_fields__ and name not in vars(self):
            vars(self)[name] = value  # in `__init__`
            return
        said = f"cannot be changed: replace({name}=...) returns another one"
        if name not in self._declared.__dataclass_fields__:
            said = f"has no field {name!r}: declare it in the class, as `{name}: float`, and the "
            said += "class needs no __init__"
        raise dataclasses.FrozenInstanceError(f"{type(self).__name__} {said}")

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    def __repr__(self) -> str:
        return constructor_call(self)

    def __pdoc__(self, **_: Any) -> Any:  # for Equinox's pretty-printer
        from wadler_lindig import TextDoc

        return TextDoc(repr(self))

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        from treescope.repr_lib import render_object_constructor

        return render_object_constructor(type(self), self._held, path, subtree_renderer)

    def __reduce__(self) -> Any:
        for name, value in self._held.items():
            for held in jax.tree.leaves(value):
                if callable(held) and not _can_be_pickled(held) and not _in_a_larger_pickler():
                    function = held.func if isinstance(held, functools.partial) else held
                    raise pickle.PicklingError(
                        f"{type(self).__name__}: {name} holds "
                        f"{getattr(function, '__qualname__', function_name(function))}, which "
                        "pickle cannot store: save the arguments instead, and build the "
                        "transformation again"
                    )
        return _build, (type(self), self._held)

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _build(type(self), copy.deepcopy(self._held, memo))


@jax.tree_util.register_pytree_node_class
class as_pytree:
    """A transformation as a pytree of the arrays among its hyperparameters.

    A transformation by itself is a pytree without leaves: a compiled function has its arrays as
    constants, and is compiled again for other arrays. Give the function `as_pytree(tx)` and read
    `.tx` inside, and its arrays are traced, mapped over, differentiated, or carried by a scan.

    Args:
        tx: an adamx transformation. Arrays in its fields, and in the fields of its parts, become
            the leaves, in order; numbers, schedules, masks and Optax stages do not.

    Raises:
        TypeError: if `tx` is not an adamx transformation.

    Example:
        Two rates side by side, and a derivative with respect to the rate:

        >>> import adamx, jax.numpy as jnp
        >>> def moved(tree):
        ...     tx, w = tree.tx, jnp.array(1.0)
        ...     return w + tx.update(jnp.array(2.0), tx.init(w), w)[0]
        >>> rates = jnp.array([0.5, 0.25])
        >>> jax.vmap(moved)(as_pytree(adamx.sgd(rates)))
        Array([0. , 0.5], dtype=float32)
        >>> jax.grad(moved)(as_pytree(adamx.sgd(rates[0]))).tx
        chain(scale_by_learning_rate(float32[]))
    """

    def __init__(self, tx: Any) -> None:  # noqa: D107
        if not isinstance(tx, Value):
            raise TypeError(f"as_pytree: tx must be an adamx transformation, got {tx!r}")
        self._arrays, self._like = tx._apart

    @property
    def tx(self) -> Any:
        """The transformation, with the leaves as its arrays."""
        return self._like._filled(iter(self._arrays)) if self._arrays else self._like

    def __repr__(self) -> str:
        return f"as_pytree({self.tx!r})"

    def tree_flatten(self) -> tuple[list[Any], Value]:
        """Return the arrays, and the transformation with a hole for each."""
        return self._arrays, self._like

    @classmethod
    def tree_unflatten(cls, like: Value, arrays: Any) -> Any:
        """Return a pytree like another one, with other leaves."""
        new = object.__new__(cls)
        new._arrays, new._like = list(arrays), like
        return new


class _Hole:
    def __repr__(self) -> str:
        return "_"

    def __reduce__(self) -> str:
        return "_HOLE"


_HOLE = _Hole()


@dataclasses.dataclass(frozen=True, eq=False)
class _Same:
    """A box that compares by identity."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _is_child(x: Any) -> bool:
    return isinstance(x, Value) and x.is_part


def _compared(value: Any) -> Any:
    """Return the object by which a field is compared and hashed: an array by its identity."""
    if type(value) is tuple:
        return tuple(map(_compared, value))
    if isinstance(value, Value):
        return value
    return (_Same if isinstance(value, jax.Array | np.ndarray) else Static)(value)


def _build(cls: Any, fields: dict[str, Any]) -> Any:
    """Make an instance from fields that have been checked already."""
    instance = cls._new()
    vars(instance).update(fields)
    return instance


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
