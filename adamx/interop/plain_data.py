"""A transformation as plain data, for JSON, YAML and config systems, and back.

    {"_target_": "adamx.ema", "decay": 0.9}    is    adamx.ema(decay=0.9)

This is the form of Hydra's `instantiate`, which reads it as well: `_target_` is what is called,
`_args_` has its positional arguments, `_partial_` makes a `functools.partial`, and
`hydra.utils.get_object` gives a function itself, by its path, instead of calling it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import PartitionSpec

from adamx.core.paths import _AllBut
from adamx.core.value import Value
from adamx.formula.adjustable import adjustable
from adamx.formula.values import factory_name, function_name, value_text

TARGET, ARGS, PARTIAL = "_target_", "_args_", "_partial_"
OBJECT = "hydra.utils.get_object"

_HOMES = ("adamx", "optax", "optax.contrib", "jax.numpy", "numpy")
_CALLED = ("jax.sharding.PartitionSpec", "re.compile")


def to_dict(tx: Any) -> dict[str, Any]:
    """Return a transformation as plain data: dicts, lists, strings, numbers, bools and None.

    The data has each part of the composition with those arguments that differ from the defaults.
    A schedule or transformation of Optax is written as the call that makes it, an array as its
    numbers, and a function as its path, so it has to be one that can be imported.

    Args:
        tx: an adamx transformation.

    Returns:
        What `from_dict` takes, and `hydra.utils.instantiate`. `json.dumps` and YAML's `safe_dump`
        can write it and give it back as it was.

    Raises:
        TypeError: if `tx` is not an adamx transformation.
        ValueError: if it holds something that has no name: a lambda, a function inside a function,
            a function of `__main__`, a traced array, or an Optax object whose arguments cannot be
            read back, such as `inject_hyperparams`.

    Example:
        >>> import adamx, optax
        >>> to_dict(adamx.scale_by_learning_rate(optax.linear_schedule(0.5, 0.0, 10)))
        {'_target_': 'adamx.scale_by_learning_rate', \
'learning_rate': {'_target_': 'optax.polynomial_schedule', \
'init_value': 0.5, 'end_value': 0.0, 'power': 1, 'transition_steps': 10, 'transition_begin': 0}}
    """
    if not isinstance(tx, Value):
        raise TypeError(f"to_dict: tx must be an adamx transformation, got {tx!r}")
    return _data(tx, "tx")


def from_dict(data: Mapping[str, Any]) -> Any:
    """Return the transformation that such data describes.

    It may be written by hand, too: `{"_target_": "adamx.adamw", "learning_rate": 1e-3}`. It calls
    functions in the namespaces of adamx, Optax, `jax.numpy` and NumPy only, but imports the module
    of each function that the data names, as every config system does: read no data that you do not
    trust.

    Args:
        data: what `to_dict` returned, also after JSON or YAML.

    Returns:
        A transformation that equals the one given to `to_dict`, except that its arrays, and its
        schedules and transformations of Optax, are new objects, which are equal to themselves only.

    Raises:
        TypeError: if `data` is not a mapping that describes a transformation.
        ValueError: if a `_target_` is none of these functions, a path leads to nothing, or the
            function that is called raises it.

    Example:
        >>> import adamx
        >>> adamx.from_dict({"_target_": "adamx.sgd", "learning_rate": 0.5})
        chain(scale_by_learning_rate(0.5))
        >>> tx = adamx.adamw(1e-3, mask=adamx.all_but("*bias"))
        >>> adamx.from_dict(adamx.to_dict(tx)) == tx
        True
    """
    made = _made(data, "data", {}) if isinstance(data, Mapping) else None
    if not isinstance(made, optax.GradientTransformation):
        raise TypeError(
            'from_dict: data must describe a transformation, as {"_target_": "adamx.adamw", '
            f'"learning_rate": 1e-3}}, got {data!r}'
        )
    return made


def _data(x: Any, where: str) -> Any:
    """Return an argument as plain data."""
    if x is None or type(x) in (bool, int, float, str):
        return x
    if type(x) in (list, tuple):  # a constructor takes one for the other
        return [_data(item, f"{where}[{i}]") for i, item in enumerate(x)]
    if type(x) is dict and all(type(key) is str for key in x) and TARGET not in x:
        return {key: _data(item, f"{where}[{key!r}]") for key, item in x.items()}
    if isinstance(x, Mapping):
        return _call(dict, where, [[key, item] for key, item in x.items()])
    if isinstance(x, Value):
        _, positional, named = x.call()
        return _call(type(x), where, *positional, **named)
    if isinstance(x, adjustable):
        return _call(adjustable, where, **vars(x))
    if isinstance(x, _AllBut):
        return {TARGET: "adamx.all_but", ARGS: _data(x.patterns, where)}
    if isinstance(x, PartitionSpec):  # newer versions of JAX call the class P
        return {TARGET: "jax.sharding.PartitionSpec", ARGS: _data(tuple(x), where)}
    if isinstance(x, re.Pattern):
        return _call(re.compile, where, x.pattern, x.flags)
    if isinstance(x, np.generic) and not np.iscomplexobj(x):
        return _call(type(x), where, x.item())
    if isinstance(x, jax.Array | np.ndarray) and not isinstance(x, Tracer):
        if not np.iscomplexobj(x):
            made = np.asarray if isinstance(x, np.ndarray) else jax.numpy.asarray
            return _call(made, where, x.tolist(), dtype=x.dtype.name)
    if isinstance(x, functools.partial):
        return _call(x.func, where, *x.args, **x.keywords) | {PARTIAL: True}
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return _call(type(x), where, **{f.name: getattr(x, f.name) for f in dataclasses.fields(x)})
    if (path := _path(x)) is not None:
        return {TARGET: OBJECT, "path": path}
    if isinstance(x, optax.GradientTransformation):
        x = _without_extra_arguments(x)
    if (call := _call_of_optax(x)) is not None:
        return _call(call.func, where, *call.args, **call.keywords)
    raise ValueError(
        f"to_dict: {where} is {value_text(x)}, which cannot be written as data: give a number, a "
        "pattern, a schedule of Optax, or a function that can be imported by its name"
    )


def _call(called: Any, where: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return a call as data; its arguments may be under `_args_` already."""
    args = (*args, *kwargs.pop(ARGS, ()))
    path = _path(called)
    if path is None:
        raise ValueError(f"to_dict: {where} is made by {called!r}, which cannot be imported")
    data: dict[str, Any] = {TARGET: path}
    if args:
        data[ARGS] = _data(args, where)
    return data | {name: _data(x, f"{where}.{name}") for name, x in kwargs.items()}


def _path(x: Any) -> str | None:
    """Return the path by which an object is imported, the public one if there is one."""
    name = getattr(x, "__qualname__", None) or getattr(x, "__name__", None)
    home = getattr(x, "__module__", None)
    if not name:
        return None
    home = None if home == "__main__" else home  # which is another module in each process
    modules = [*_HOMES, "jax.sharding", "operator", "builtins", home]
    paths = (f"{module}.{name}" for module in modules if module)
    return next((path for path in paths if _found(path) is x), None)


def _found(path: str) -> Any:
    """Return the object at a path such as "jax.numpy.subtract", or None."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError):
        return None


def _without_extra_arguments(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return what Optax's wrappers and chains call inside `with_extra_args_support`."""
    if function_name(tx.update) == optax.with_extra_args_support.__name__:
        return _free_variables(tx.update)["tx"]
    return tx


def _call_of_optax(x: Any) -> functools.partial[Any] | None:
    """Return the call with which Optax made an object, if its arguments can be read from it.

    Its functions hold them as free variables, of the same names but for those in `_HELD`. They are
    the arguments if a call with them gives functions that hold the same.
    """
    is_tx = isinstance(x, optax.GradientTransformation)
    functions = x if is_tx else (x,)
    if not all(inspect.isfunction(f) and f.__module__.startswith("optax.") for f in functions):
        return None
    name = factory_name(x) if is_tx else function_name(x)
    maker: Any = getattr(optax, name, None) or getattr(optax.contrib, name, None)
    held: dict[str, Any] = {}
    for function in functions:
        held |= _free_variables(function)
    if not is_tx and held.keys() == {"init_value"}:  # of no step at all, such as no warm-up
        if all(np.array_equal(x(step), held["init_value"]) for step in (0, 10**6)):
            return functools.partial(optax.constant_schedule, value=held["init_value"])
    try:
        read = _HELD[name](held) if name in _HELD else None
        names = inspect.signature(maker).parameters
        call = read or functools.partial(maker, **{key: held[key] for key in names if key in held})
        return call if _alike(call(), x) else None
    except Exception:  # a foreign function, called with what may not be its arguments
        return None


def _chain(held: dict[str, Any]) -> functools.partial[Any]:
    pairs = zip(held["init_fns"], held["update_fns"], strict=True)
    return functools.partial(
        optax.chain, *(optax.GradientTransformationExtraArgs(*pair) for pair in pairs)
    )


def _interpolation(held: dict[str, Any]) -> functools.partial[Any]:
    return functools.partial(
        optax.piecewise_interpolate_schedule,
        held["interpolate_fn"].__name__.strip("_").partition("_")[0],
        held["init_value"],
        dict(zip(held["boundaries"], held["scales"], strict=True)),
    )


def _learning_rate(held: dict[str, Any]) -> functools.partial[Any] | None:
    inner = held["step_size_fn"]
    if function_name(inner) != optax.scale_by_learning_rate.__name__:
        return None
    held = _free_variables(inner)
    flipped = {} if held["m"] == -1 else {"flip_sign": False}
    return functools.partial(optax.scale_by_learning_rate, held["learning_rate"], **flipped)


_HELD: dict[str, Callable[[dict[str, Any]], functools.partial[Any] | None]] = {
    "chain": _chain,
    "named_chain": lambda held: functools.partial(optax.named_chain, *held["transforms"]),
    "piecewise_interpolate_schedule": _interpolation,
    "scale_by_schedule": _learning_rate,
}
"""How a call is read from free variables that are not called as the arguments are."""


def _free_variables(function: Any) -> dict[str, Any]:
    """Return what a function holds, by name, without variables that were never set."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    held: dict[str, Any] = {}
    for name, cell in cells:
        with contextlib.suppress(ValueError):  # an empty cell
            held[name] = cell.cell_contents
    return held


def _alike(a: Any, b: Any) -> bool:
    """Say whether two objects compute the same: functions with the same code and free variables."""
    if inspect.isfunction(a) and inspect.isfunction(b):
        return a.__code__ is b.__code__ and _alike(_free_variables(a), _free_variables(b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, jax.Array | np.ndarray):
        return np.array_equal(a, b)
    return a is b or bool(type(a) is type(b) and a == b)


def _made(data: Any, where: str, shared: dict[Any, Any]) -> Any:
    """Return the object that plain data describes; equal adjustables are one, kept in `shared`."""
    if isinstance(data, list | tuple):
        return [_made(x, f"{where}[{i}]", shared) for i, x in enumerate(data)]
    if not isinstance(data, Mapping):
        return data
    if TARGET not in data:
        return {key: _made(x, f"{where}[{key!r}]", shared) for key, x in data.items()}
    target = data[TARGET]
    names = [name for name in data if name not in (TARGET, ARGS, PARTIAL)]
    kwargs = {name: _made(data[name], f"{where}.{name}", shared) for name in names}
    if target == OBJECT:
        return _imported(kwargs.get("path"), where)
    args = _made(data.get(ARGS, []), where, shared)
    if target == "builtins.dict":
        return {key: value for key, value in args[0]}
    public = str(target).rpartition(".")[0] in _HOMES or target in _CALLED
    if not data.get(PARTIAL) and not public:
        raise ValueError(
            f"from_dict: {where} has the {TARGET} {target!r}, which is not a public function of "
            "adamx, Optax, jax.numpy or NumPy: hydra.utils.instantiate(data, _convert_='all') "
            "reads data that call other functions, if you trust them"
        )
    call = functools.partial(_imported(target, where), *args, **kwargs)
    if data.get(PARTIAL):
        return call
    made = call()
    return shared.setdefault(made, made) if isinstance(made, adjustable) else made


def _imported(path: Any, where: str) -> Callable[..., Any]:
    found = _found(path) if isinstance(path, str) else None
    if found is None:
        raise ValueError(f"from_dict: {where} names {path!r}, which cannot be imported")
    return found
