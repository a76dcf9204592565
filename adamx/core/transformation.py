"""A transformation: a concept on a tree, as users and Optax call it.

A concept is a subclass of `Transformation` whose annotated fields are its hyperparameters. It is
also an `optax.GradientTransformationExtraArgs`. Its layers, each a file of its own:

    core/value.py           an immutable value that compares, pickles and prints
    core/concept.py         the methods that it may define for one array
    core/leaves.py          a tree taken apart into its leaves
    core/kernel.py          one leaf's step
    core/lifting.py         from one array to any tree
    core/transformation.py  `init` and `update`
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import optax

from adamx.core import errors, lifting
from adamx.core.checks import as_float, ranges_of
from adamx.core.leaves import completed, take_apart
from adamx.core.lifting import Stage, State
from adamx.core.value import as_pytree
from adamx.formula.adjustable import adjustable

T = TypeVar("T", bound="Transformation")
Updates = TypeVar("Updates")


@dataclass_transform(frozen_default=True, eq_default=False)
class Transformation(Stage, optax.GradientTransformationExtraArgs):
    """The base of every concept: subclass it, annotate the hyperparameters, define some methods.

    The annotated fields are the constructor's arguments, as in a frozen dataclass. Concepts held in
    fields, or in tuples in fields, are its children. Their slots, scalars and variants are handled
    by the base class, so a concept made of concepts defines only `accumulate` and `emit`, and only
    `emit` if each child reads the same incoming update.

    Two transformations are equal if they were built alike: the same class, equal numbers, the same
    (identical) arrays and functions. Hash and equality never raise. `tx.replace(eps=1e-6)` returns
    another one. As a pytree a transformation has no leaves; `adamx.as_pytree` makes its arrays
    leaves.

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

    def init(self, params: Any) -> State:  # pyright: ignore
        """Return the state before the first step.

        Args:
            params: any pytree of floating or complex arrays, or of their shapes under
                `jax.eval_shape`; None leaves are left out.

        Returns:
            A dict: `count` (int32 scalar, the number of steps taken), recorded scalars such as
            `learning_rate` (float32), and for each slot a tree shaped like params. A slot lies
            where its parameter does, scalars on all of the parameters' devices.

        Raises:
            TypeError: if the dtype of a leaf is neither floating nor complex.

        Warns:
            PrecisionWarning: if the parameters have 16 bits and the optimizer has no masters.
        """
        tree = as_pytree(self)
        many = lifting.is_concrete(tree, params) and lifting.on_many_devices(params)
        # compiled, it puts the scalars on all devices
        state = _compiled_init(tree, params) if many else lifting.init(self, params)
        held = set(map(id, jax.tree.leaves((tree, params))))
        state = jax.tree.map(lambda x: jnp.copy(x) if id(x) in held else x, state)
        return lifting.committed_with(params, state)

    def update(  # pyright: ignore
        self, updates: Updates, state: State, params: Any = None, **extra: Any
    ) -> tuple[Updates, State]:
        """Return the outgoing updates and the new state.

        Called with arrays it compiles itself, as `jax.jit` would: Python code in a schedule or a
        mask runs once for each compilation, and later changes of objects that it reads are not
        seen. A rate that is a number, such as the learning rate, is an argument of the program:
        `adam(0.1 / t).update(...)` compiles once. Another decay or eps is compiled anew. Inside
        jit, vmap, grad or scan it is traced. Nothing is donated: the caller's arrays stay usable.

        Args:
            updates: the gradients: a pytree shaped like the parameters, of any floating dtype;
                None leaves are skipped and keep their slots.
            state: the state that `init` or the last `update` returned.
            params: the parameters; None is allowed if no concept reads them.
            **extra: passed on to the stages that take extra arguments.

        Returns:
            The outgoing updates, in the gradients' dtypes, and the new state.

        Raises:
            ValueError: if the trees or shapes of updates, params and state do not fit.
            TypeError: if the dtype of a leaf is neither floating nor complex.
        """
        tree = as_pytree(self.with_rates_as_arrays)
        if lifting.is_concrete(tree, updates, state, extra):
            if not lifting.is_concrete(params):  # an unfiltered module: drop leaves without update
                whole = completed(updates, params)
                params = take_apart(whole, params).params_tree()
            if lifting.is_concrete(params):
                return _compiled_update(tree, updates, state, params, extra)
        return lifting.update(self, updates, state, params, extra)

    # ------------------------------------------------------------------------- how it is made

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        make = cls.__init__

        @functools.wraps(make)
        def init_and_check(self: Any, *args: Any, **kwargs: Any) -> None:
            if _is_pair(args):  # `__new__` returned a transformation that is complete
                return
            make(self, *args, **kwargs)
            for name in ranges_of(cls):
                value = as_float(getattr(self, name))
                self._set(**{name: value.called(name) if isinstance(value, adjustable) else value})
            errors.check_unique(self.state_names())

        type.__setattr__(cls, "__init__", init_and_check)

    def __new__(cls: type[T], *args: Any, **kwargs: Any) -> T:  # noqa: D102
        if _is_pair(args):
            return cls._make(args)
        fields = [field.name for field in cls.hyperparameters()]
        given = [*zip(fields, args, strict=False), *kwargs.items()]
        for name, value in (*given, *(("", value) for value in args[len(fields) :])):
            cls.check_argument(name, value)
        return cls._new()

    @classmethod
    def _new(cls) -> Any:
        items = _Item("init"), _Item("update")
        instance = tuple.__new__(cls, items)
        for item in items:
            item.owner = instance
        return instance

    @classmethod
    def check_argument(cls, name: str, value: Any) -> None:
        """Raise unless a concept that acts on one array can have this as an argument.

        Transformations of whole trees override this.
        """
        if name in ranges_of(cls):
            ranges_of(cls)[name].check(cls.__name__, name, value)
        if isinstance(value, optax.GradientTransformation):
            if not isinstance(value, Transformation):
                raise TypeError(
                    f"{cls.__name__}: got an Optax transformation, which acts on whole trees: it "
                    "can be a stage of a top-level adamx.chain, but not a part of another concept"
                )
            if not value.leafwise:
                raise ValueError(
                    f"{cls.__name__}: got {value!r}, which reads the whole tree: it can be a stage "
                    "of a top-level adamx.chain, but not a part of another concept"
                )
            return
        types = {field.name: field.type for field in cls.hyperparameters()}
        if types.get(name) in ("Transformation", Transformation):
            raise TypeError(
                f"{cls.__name__}: {name} must be an adamx transformation, got {value!r}"
            )

    # A named tuple (init, update) to those who unpack it, or build it anew from its items.

    def __iter__(self) -> Iterator[Callable[..., Any]]:  # pyright: ignore
        return iter((self.init, self.update))

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: Any) -> Any:
        return (self.init, self.update)[index]

    @classmethod
    def _make(cls, iterable: Any) -> Any:  # pyright: ignore
        """Return the transformation whose methods these are, or Optax's pair of two others."""
        init, update = (f.method if isinstance(f, _Item) else f for f in iterable)
        owner = getattr(init, "__self__", None)
        if isinstance(owner, Transformation) and (init, update) == tuple(owner):
            return owner
        return optax.GradientTransformationExtraArgs(init, update)

    def _replace(self, **kwargs: Any) -> Any:  # pyright: ignore
        pair: Any = (self.init, self.update)
        return optax.GradientTransformationExtraArgs(*pair)._replace(**kwargs)


class _Item:
    """`tx.init` or `tx.update` for those who read a tuple's memory, such as optree."""

    owner: Any

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def method(self) -> Callable[..., Any]:
        return getattr(self.owner, self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.method(*args, **kwargs)


def _is_pair(args: tuple[Any, ...]) -> bool:
    """Say whether the arguments are (init, update), one of them at least an adamx method."""
    own = Transformation.init, Transformation.update
    return len(args) == 2 and any(
        isinstance(function, _Item) or getattr(function, "__func__", None) is method
        for function, method in zip(args, own, strict=True)
    )


def init(tree: as_pytree, params: Any) -> State:
    """Return the state before the first step; the name is the compiled program's."""
    return lifting.init(tree.tx, params)


def update(
    tree: as_pytree, updates: Any, state: State, params: Any, extra: Any
) -> tuple[Any, State]:
    """Return (outgoing updates, new state); the name is the compiled program's."""
    return lifting.update(tree.tx, updates, state, params, extra)


_compiled_init = jax.jit(init)
_compiled_update = jax.jit(update)
