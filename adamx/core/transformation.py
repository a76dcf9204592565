"""What a concept is: a filter with memory, written for one array.

    accumulate:  slots_t = f(u_t, slots_{t-1})       take the incoming update in
    emit:        u'_t    = h(u_t, slots_t)           give the outgoing update

A concept is a subclass of `Transformation` whose annotated fields are its hyperparameters;
`adamx.core.lifting` applies it to every leaf of a tree. The two halves are separate so that a
wrapper can change how slots are *kept* (in 16 bits, or not at all in a bad step) without knowing
the formula: what is emitted comes from what was stored.

A concept is at the same time an `optax.GradientTransformationExtraArgs`, a frozen dataclass, and a
pytree whose leaves are the arrays among its hyperparameters. Everything else in it is static.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
from collections.abc import Callable, Iterator
from typing import Any, dataclass_transform

import jax
import numpy as np
import optax

from adamx.core import errors, lifting
from adamx.core.expressions import Expr, call
from adamx.core.formula import Symbols
from adamx.core.lifting import Slots, State
from adamx.core.precision_warning import warn_of_rounding
from adamx.core.printing import describe, function_name
from adamx.core.static import Static
from adamx.core.step import Step


@dataclass_transform(frozen_default=True, eq_default=False)
class Transformation(optax.GradientTransformationExtraArgs):
    """The base of every concept: subclass it, annotate the hyperparameters, define some methods.

    Subclassing makes the class a frozen dataclass; there is no decorator to add. Concepts held in
    fields, or in tuples in fields, are its children. Their slots, scalars and bindings are taken
    care of, so that a concept made of concepts defines `accumulate` and `emit` only, and only
    `emit` where each child reads the same incoming update.

    Two transformations are equal when they were built alike: the same class, equal numbers, the
    same (identical) arrays and functions. Hash and equality never raise.

    Example:
        The sign of an average, in ten lines:

        >>> import adamx, jax.numpy as jnp
        >>> class sign_of_ema(adamx.Transformation):
        ...     decay: float
        ...     def slots(self, param):
        ...         return {"mu": adamx.zeros(param)}
        ...     def accumulate(self, u, slots, step):
        ...         return {"mu": self.decay * slots["mu"] + (1 - self.decay) * u}
        ...     def emit(self, u, slots, step):
        ...         return jnp.sign(slots["mu"])
        >>> tx = adamx.chain(sign_of_ema(0.5), adamx.scale(-0.5))
        >>> params = jnp.array([1.0, 2.0])
        >>> tx.update(jnp.array([4.0, -8.0]), tx.init(params), params)[0]
        Array([-0.5,  0.5], dtype=float32)
    """

    # ------------------------------------------------- what a concept may define, for one array

    def slots(self, param: jax.Array) -> Slots:
        """Return the start values of the named slots, made from one parameter."""
        return lifting.disjoint(*(child.slots(param) for child in self.children))

    def prepare(self, step: Step) -> Any:
        """Return scalars for `accumulate` and `emit`; runs once a step, outside the kernels."""
        return None

    def measure(self, step: Step, leaves: list[jax.Array]) -> Any:
        """Return scalars as `prepare` does, from the updates of the whole tree in compute dtype.

        Defining it starts a new segment: such a concept stands in a top-level chain.
        """
        return self.prepare(step)

    def record(self, scalars: Any) -> Slots:
        """Return what of the prepared scalars the state keeps, by name."""
        return {}

    def accumulate(self, u: jax.Array, slots: Slots, step: Step) -> Slots:
        """Return the slots that change. `slots` holds all of the leaf's slots, in compute dtype."""
        new: Slots = {}
        for i, child in enumerate(self.children):
            changed = child.accumulate(u, slots | new, step.child(i))
            errors.check_accumulated(child, slots, changed)
            new |= changed
        return new

    def emit(self, u: jax.Array, slots: Slots, step: Step) -> jax.Array:
        """Return the outgoing update, from the new slots as they were stored."""
        return u

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        """Return what `emit` returns as an expression, for `summary`; by default `name(u)`.

        Args:
            u: the incoming update.
            symbols: names the hyperparameters and slots; slots are defined there.
        """
        return call(type(self).__name__, u)

    def reveal(self, slots: Slots) -> Slots:
        """Return one leaf's slots as the formula sees them: where a storage packs, unpacked."""
        inner = {name for child in self.children for name in lifting.slot_names(child)}
        own = {name: x for name, x in slots.items() if name not in inner}
        mine = {name: x for name, x in own.items() if name in lifting.slot_names(self)}
        return lifting.disjoint(mine, *(child.reveal(slots) for child in self.children))

    def conceal(self, seen: Slots) -> Slots:
        """Return one leaf's slots as they are kept, from what `reveal` shows of them."""
        inner = {name for child in self.children for name in lifting.slot_names(child)}
        mine = {name: seen[name] for name in lifting.slot_names(self) if name not in inner}
        return lifting.disjoint(mine, *(child.conceal(seen) for child in self.children))

    def resolve(self, tree: Any) -> Transformation:
        """Return this concept with what depends on the whole tree settled, such as a mask."""
        return self._with_children([child.resolve(tree) for child in self.children])

    def bind(self, path: str, leaf: jax.Array) -> Transformation:
        """Return the variant of this concept that one leaf gets; most have one for all."""
        return self._with_children([child.bind(path, leaf) for child in self.children])

    # ---------------------------------------------------------------- what users and Optax call

    def init(self, params: Any) -> State:  # pyright: ignore
        """Return the state before the first step.

        Args:
            params: any pytree of floating or complex arrays, or of their shapes under
                `jax.eval_shape`; None leaves are left out.

        Returns:
            A dict: `count` (int32 scalar, the number of steps taken), recorded scalars such as
            `learning_rate` (float32), and for each slot a tree shaped like params.

        Raises:
            TypeError: if a leaf is not of floating-point or complex numbers.

        Warns:
            PrecisionWarning: if the parameters are of 16 bits and the optimizer has no masters.
        """
        warn_of_rounding(self, params)
        if lifting.is_concrete(self, params) and lifting.on_many_devices(params):
            return _compiled_init(self, params)  # which puts the scalars on all of them
        return lifting.init(self, params)

    def update(  # pyright: ignore
        self, updates: Any, state: State, params: Any = None, **extra: Any
    ) -> tuple[Any, State]:
        """Return the outgoing updates and the new state.

        Called with arrays it compiles itself; inside jit, vmap, grad or scan it is traced there.
        Nothing is donated: after an error the caller's arrays are as they were.

        Args:
            updates: the gradients: a pytree shaped like the parameters, of any floating dtype;
                None leaves are skipped and keep their slots.
            state: what `init` or the last `update` returned.
            params: the parameters; None only where no concept reads them.
            **extra: passed on to the stages that take them.

        Returns:
            The updates, in the dtypes in which they came, and the new state.

        Raises:
            ValueError: if tree or shapes of updates, params and state do not fit.
            TypeError: if a leaf is not of floating-point or complex numbers.
        """
        if lifting.is_concrete(self, updates, state, extra):
            if not lifting.is_concrete(params):  # an unfiltered module: drop what has no update
                params = lifting.take_apart(updates, params).params_tree()
            if lifting.is_concrete(params):
                return _compiled_update(self, updates, state, params, extra)
        return lifting.update(self, updates, state, params, extra)

    # ------------------------------------------------------ one segment of a chain, over the tree

    init_tree = lifting.init_leaves
    update_tree = lifting.update_leaves
    reveal_tree = lifting.reveal_leaves

    is_foreign = False  # whether it is a transformation from outside adamx
    holds_trees = False  # whether it acts on trees, between the kernels
    takes_steps = False  # whether it makes an optimizer of a chain
    keeps_precision = False  # whether 16-bit parameters train with it
    stands_last = False  # whether nothing may follow it in a chain
    stands_alone = False  # whether it is no stage of a chain at all, since it wraps everything

    def segments(self) -> list[Transformation]:
        """Return the parts that run one after the other over the whole tree."""
        return [self]

    def tree_names(self) -> tuple[str, ...]:
        """Return the names under which the state has a tree beside the parameters'."""
        return lifting.slot_names(self)

    def state_names(self) -> tuple[str, ...]:
        """Return the names this transformation keeps in the state, `count` aside."""
        return (*self.tree_names(), *lifting.recorded_names(self))

    @property
    def children(self) -> tuple[Transformation, ...]:
        """The concepts held in this one's fields, in order."""
        found: list[Transformation] = []
        for value in _fields(self).values():
            many = value if type(value) is tuple else (value,)
            found += [v for v in many if isinstance(v, Transformation)]
        return tuple(found)

    def overrides(self, method: str) -> bool:
        """Say whether this concept itself defines an optional method, such as `measure`."""
        return getattr(type(self), method) is not getattr(Transformation, method)

    @property
    def leafwise(self) -> bool:
        """Whether one leaf's update depends on that leaf alone, so that it may stand anywhere."""
        return not self.overrides("measure") and all(child.leafwise for child in self.children)

    def _with_children(self, children: list[Transformation]) -> Any:
        """Return this concept with other children: the same object for the same children."""
        if all(a is b for a, b in zip(self.children, children, strict=True)):
            return self
        made = vars(self).setdefault(_MADE, {})
        key = tuple(map(id, children))
        if key not in made:
            new = iter(children)
            fields = {
                name: tuple(next(new) if isinstance(v, Transformation) else v for v in value)
                if type(value) is tuple
                else next(new)
                if isinstance(value, Transformation)
                else value
                for name, value in _fields(self).items()
            }
            made[key] = _build(type(self), fields)
        return made[key]

    # --------------------------------------------------- what makes it a value: ==, pickle, pytree

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(init="__init__" not in vars(cls), repr=False, eq=False, frozen=True)(
            cls
        )
        jax.tree_util.register_pytree_node(cls, _flatten, _unflatten)
        make = cls.__init__

        @functools.wraps(make)
        def init_and_check(self: Any, *args: Any, **kwargs: Any) -> None:
            make(self, *args, **kwargs)
            errors.check_unique(self.state_names())

        cls.__init__ = init_and_check

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # a named tuple by type only: what it unpacks to is __iter__'s
        for value in (*args, *kwargs.values()):
            _check_child(cls, value)
        return tuple.__new__(cls)

    def __iter__(self) -> Iterator[Callable[..., Any]]:  # pyright: ignore
        return iter((self.init, self.update))

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: Any) -> Any:
        return (self.init, self.update)[index]

    def _replace(self, **kwargs: Any) -> Any:  # pyright: ignore
        pair: Any = (self.init, self.update)
        return optax.GradientTransformationExtraArgs(*pair)._replace(**kwargs)

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
        return describe(self)

    def __reduce__(self) -> Any:
        for name, value in _fields(self).items():
            for held in value if isinstance(value, tuple) else (value,):
                if callable(held) and not _can_be_pickled(held):
                    function = held.func if isinstance(held, functools.partial) else held
                    raise pickle.PicklingError(
                        f"{type(self).__name__}: {name} holds "
                        f"{getattr(function, '__qualname__', function_name(function))}, which "
                        "pickle cannot store: keep the arguments it was made from, and build the "
                        "transformation anew"
                    )
        return _build, (type(self), _fields(self))

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _build(type(self), copy.deepcopy(_fields(self), memo))


def _can_be_pickled(function: Any) -> bool:
    try:
        pickle.dumps(function)
    except Exception:  # pickle and the function's own __reduce__ may raise anything
        return False
    return True


def _build(cls: type, fields: dict[str, Any]) -> Any:
    """Make an instance from its fields alone: they were checked when it was first made."""
    instance = tuple.__new__(cls)
    vars(instance).update(fields)
    return instance


def _check_child(cls: type[Transformation], value: Any) -> None:
    """Raise where a concept that acts on whole trees is given to one that acts on one array."""
    if isinstance(value, optax.GradientTransformation) and not cls.holds_trees:
        if not isinstance(value, Transformation):
            raise TypeError(
                f"{cls.__name__}: got a foreign transformation, which acts on whole trees: it can "
                "stand in a top-level adamx.chain, not inside another concept"
            )
        if not value.leafwise:
            raise ValueError(
                f"{cls.__name__}: got {value!r}, which reads the whole tree: it can stand in a "
                "top-level adamx.chain, not inside another concept"
            )


@lifting.remembered
def _flatten(tx: Transformation) -> tuple[list[Any], Any]:
    fields = _fields(tx)
    dynamic = vars(tx).get(_DYNAMIC)  # known where jax has put other objects in the arrays' place
    if dynamic is None:
        dynamic = tuple(name for name, value in fields.items() if _is_dynamic(value))
    static = tuple((name, Static(v)) for name, v in fields.items() if name not in dynamic)
    return [fields[name] for name in dynamic], (type(tx), dynamic, static)


def _unflatten(aux: Any, children: Any) -> Any:
    cls, dynamic, static = aux
    fields = dict(zip(dynamic, children, strict=True)) | {name: box.value for name, box in static}
    return _build(cls, fields | {_DYNAMIC: dynamic})


def _fields(tx: Any) -> dict[str, Any]:
    return {field.name: vars(tx)[field.name] for field in dataclasses.fields(tx)}


def _is_dynamic(value: Any) -> bool:
    many = value if type(value) is tuple else (value,)
    return bool(many) and all(isinstance(v, Transformation | jax.Array | np.ndarray) for v in many)


_DYNAMIC, _MADE = "__dynamic__", "__made__"
_compiled_init = jax.jit(lifting.init)
_compiled_update = jax.jit(lifting.update)
