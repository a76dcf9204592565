"""One stage after the other: in `chain(f, g)` the updates that f emits go into g.

A chain inside another chain is spliced in, so chaining is associative. Inside a concept (a branch
of a fan-out, say) a chain acts on one array. A top-level chain may also have stages that act on the
whole tree: Optax transformations, and concepts that read all updates.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import optax

from adamx.core.concept import Slots, accumulated, all_adjustables, any_of, emitted, parts
from adamx.core.foreign import as_concept, named, narrow
from adamx.core.lifting import Between
from adamx.core.step import LeafStep
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr
from adamx.formula.symbols import Symbols


class chain(Transformation):
    """Apply the stages one after the other.

    Attributes:
        stages: adamx concepts, chains of them, and Optax transformations, in any order. The state
            of an Optax transformation is stored under the name of the function that made it.

    Raises:
        TypeError: if a stage is not a transformation.
        ValueError: if two stages use the same name in the state, or a stage that must be the last
            is not.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from adamx import ema, scale
        >>> tx = chain(ema(0.5), optax.clip(1.5), scale(-2.0))
        >>> updates, state = tx.update(jnp.array([4.0, 2.0]), tx.init(jnp.zeros(2)))
        >>> updates, state["mu"]
        (Array([-3., -2.], dtype=float32), Array([2., 1.], dtype=float32))
        >>> chain(ema(0.5), chain(scale(2.0), scale(3.0)))
        chain(ema(0.5), scale(2.0), scale(3.0))
    """

    stages: tuple[Transformation, ...]

    def __init__(self, *stages: optax.GradientTransformation) -> None:
        spliced: list[Transformation] = []
        for stage in stages:
            concept = as_concept(stage, "chain: a stage")
            spliced += concept.stages if isinstance(concept, chain) else [concept]
        for stage in spliced[:-1]:
            if stage.place == "last":
                raise ValueError(
                    f"chain: {type(stage).__name__} sets the new parameters, so it must be the "
                    f"last stage, but {spliced[-1]!r} follows it: move it to the end"
                )
        for stage in spliced if len(spliced) > 1 else ():
            for part in parts(stage):
                if part.place == "outermost":
                    raise ValueError(
                        f"chain: {type(part).__name__} wraps the whole optimizer, so it cannot "
                        f"be a stage of it: write {type(part).__name__}(chain(...), ...)"
                    )
        self._set(stages=tuple(spliced))

    @classmethod
    def check_argument(cls, name: str, value: Any) -> None:
        pass  # `as_concept` checks it

    def arguments(self) -> Iterator[tuple[str, Any]]:
        yield from (("", stage) for stage in self.stages)

    def accumulate(self, u: jax.Array, slots: Slots, step: LeafStep) -> Slots:
        new: Slots = {}
        for i, stage in enumerate(self.stages[: self._keeping]):
            new |= accumulated(stage, u, slots | new, step.child(i))
            if i + 1 < self._keeping:
                u = emitted(stage, u, slots | new, step.child(i))
        return new

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        for i, stage in enumerate(self.stages):
            u = emitted(stage, u, slots, step.child(i))
        return u

    def tree_names(self) -> tuple[str, ...]:
        return tuple(name for stage in self.stages for name in stage.tree_names())

    def state_names(self) -> tuple[str, ...]:
        names: list[str] = []
        for stage in self.stages:
            shared = all_adjustables(stage)  # which several stages may read
            names += [name for name in stage.state_names() if name not in shared]
        return (*names, *all_adjustables(self))

    def segments(self) -> list[Transformation]:
        runs: list[list[Transformation]] = []
        for stage in itertools.chain.from_iterable(map(_parts, self.stages)):
            if runs and stage.leafwise and not _over_the_tree(runs[-1][-1]):
                runs[-1].append(stage)
                continue
            if runs and isinstance(stage, named):
                runs.append([narrow()])
            runs.append([stage])
        return [run[0] if len(run) == 1 else chain(*run) for run in runs or [[]]]

    def between(self) -> Between | None:
        return self.stages[0].between() if len(self.stages) == 1 else None

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        for stage in self.stages:
            u = stage.formula(u, symbols)
        return u

    @functools.cached_property
    def _keeping(self) -> int:
        """The number of stages up to the last one that keeps slots: `accumulate` needs no more."""
        keep = [any_of(stage, lambda part: part.overrides("slots")) for stage in self.stages]
        return max((i + 1 for i, slots in enumerate(keep) if slots), default=0)


def _parts(stage: Transformation) -> list[Transformation]:
    """Return a stage, or its segments if it becomes a chain of them once the tree is known."""
    return [stage] if stage.leafwise else stage.segments()


def _over_the_tree(stage: Transformation) -> bool:
    return type(stage).update_tree is not Transformation.update_tree
