"""One stage after the other: `chain(f, g)` feeds what f emits to g.

A chain inside another chain is spliced, so that chaining is associative. Inside a concept (a
branch of a fan-out, say) a chain acts on one array; at the top it also takes what acts on trees:
foreign transformations, and concepts that read the whole tree.
"""

from __future__ import annotations

import jax
import optax

from adamx.core import errors, lifting
from adamx.core.expressions import Expr
from adamx.core.foreign import as_concept
from adamx.core.formula import Symbols
from adamx.core.lifting import Slots
from adamx.core.step import Step
from adamx.core.transformation import Transformation


class chain(Transformation):
    """Apply the stages one after the other.

    Attributes:
        stages: adamx concepts, chains of them, and Optax transformations, in any order. The state
            of an Optax transformation stands under its factory's name.

    Raises:
        TypeError: if a stage is not a transformation.
        ValueError: if two stages keep the same name in the state, or one that has to be the last
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

    holds_trees = True
    variadic = "stages"

    def __init__(self, *stages: optax.GradientTransformation) -> None:
        spliced: list[Transformation] = []
        for stage in stages:
            concept = as_concept(stage, "chain: a stage")
            spliced += concept.stages if isinstance(concept, chain) else [concept]
        for stage in spliced[:-1]:
            if stage.stands_last:
                raise ValueError(
                    f"chain: {type(stage).__name__} settles what the parameters become, so that it "
                    f"has to be the last stage, and {spliced[-1]!r} follows it: put that inside"
                )
        for stage in spliced if len(spliced) > 1 else ():
            for part in lifting.parts(stage):
                if part.stands_alone:
                    raise ValueError(
                        f"chain: {type(part).__name__} wraps the whole optimizer, so that it can "
                        f"be no stage of it: write {type(part).__name__}(chain(...), ...)"
                    )
        object.__setattr__(self, "stages", tuple(spliced))

    def accumulate(self, u: jax.Array, slots: Slots, step: Step) -> Slots:
        new: Slots = {}
        for i, stage in enumerate(self.stages):
            changed = stage.accumulate(u, slots | new, step.child(i))
            errors.check_accumulated(stage, slots, changed)
            new |= changed
            u = _emitted(stage, u, slots | new, step.child(i))
        return new

    def emit(self, u: jax.Array, slots: Slots, step: Step) -> jax.Array:
        for i, stage in enumerate(self.stages):
            u = _emitted(stage, u, slots, step.child(i))
        return u

    def tree_names(self) -> tuple[str, ...]:
        return tuple(name for stage in self.stages for name in stage.tree_names())

    def state_names(self) -> tuple[str, ...]:
        return tuple(name for stage in self.stages for name in stage.state_names())

    def segments(self) -> list[Transformation]:
        runs: list[list[Transformation]] = []
        for stage in self.stages:
            if runs and stage.leafwise and not runs[-1][-1].holds_trees:
                runs[-1].append(stage)
            else:
                runs.append([stage])
        return [run[0] if len(run) == 1 else chain(*run) for run in runs or [[]]]

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        for stage in self.stages:
            u = stage.formula(u, symbols)
        return u


def _emitted(stage: Transformation, u: jax.Array, slots: Slots, step: Step) -> jax.Array:
    out = stage.emit(u, slots, step)
    errors.check_emitted(stage, u, out)
    return out
