"""A hyperparameter that is read from the state, so that it can be changed by hand in a run.

state[name] = value at init,    and every step uses state[name] as it finds it
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class adjustable:
    """A number in the place of a schedule, which you change by hand: the state holds it.

    It may be any argument that may be a schedule. The steps read `state[name]`, a float32 scalar,
    and keep it as it is, so that a new value acts from the next step on, nothing is compiled anew,
    and a checkpoint saves it. Concepts that got the same one from their optimizer share the entry;
    in `by_path` each group has its own.

    A value outside the argument's range counts as the nearest inside it. 1 - b of a decay b is
    computed in float32, as for a schedule.

    Args:
        value: the first value: a number in the range of the argument.
        name: the entry of the state; None means the argument's name, such as `learning_rate`.

    Raises:
        TypeError: if `value` is not a number, or where Optax calls this as a schedule.
        ValueError: if `value` is out of its argument's range, or two different ones have one name.

    Example:
        >>> import adamx, jax.numpy as jnp
        >>> tx, w = adamx.sgd(adjustable(0.5)), jnp.array([4.0])
        >>> step, state = adamx.make_step(tx), tx.init(w)
        >>> w, state = step(w, state, jnp.array([1.0]))
        >>> state["learning_rate"] = jnp.float32(0.25)
        >>> w, state = step(w, state, jnp.array([1.0]))
        >>> w, float(state["learning_rate"])
        (Array([3.25], dtype=float32), 0.25)
    """

    def __init__(self, value: float | np.ndarray | jax.Array, name: str | None = None) -> None:
        """Keep the arguments; what takes this checks the value."""
        try:
            self.value: float = float(value)
        except (TypeError, ValueError, jax.errors.JAXTypeError):
            raise TypeError(f"adjustable: value must be a number, got {value!r}") from None
        self.name = name

    def called(self, name: str) -> adjustable:
        """Return this under a name, unless it has one."""
        return self if self.name else adjustable(self.value, name)

    def first(self) -> jax.Array:
        """Return its entry before the first step."""
        return jnp.asarray(self.value, jnp.float32)

    def __call__(self, count: Any) -> Any:
        """Raise: it is no function of the step's number."""
        del count
        raise TypeError(
            f"{self!r}: only a transformation of adamx reads it from its state; with Optax's write "
            "optax.inject_hyperparams"
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, adjustable) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.value, self.name))

    def __repr__(self) -> str:
        return f"adjustable({self.value!r}" + (f", {self.name!r})" if self.name else ")")
