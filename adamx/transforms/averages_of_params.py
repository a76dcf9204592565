"""Averages of the parameters, whose slot is the averaged model.

    ema_of_params     average_t = average_{t-1} + (1 - decay) / (1 - decay^t) (w_t - average_{t-1})
    mean_of_params    average_t = average_{t-1} + 1 / t                       (w_t - average_{t-1})

w_t are the parameters after step t. The first is the exponential moving average with its bias
correction, avg_t / (1 - decay^t), as one recurrence: the slot itself can be evaluated from the
first step on. With a scheduled decay the factor is (1 - decay_t) / (1 - decay_1 ... decay_t). The
second is the mean of Polyak and Ruppert over all steps.

Source: Kingma & Ba (2015), section 7.2, https://arxiv.org/abs/1412.6980; Polyak & Juditsky (1992),
https://doi.org/10.1137/0330046
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from adamx.core.arithmetic import compute_dtype
from adamx.core.checks import Decay
from adamx.core.concept import Slots
from adamx.core.schedules import scheduled
from adamx.core.step import LeafStep, Step
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, T, W, following, last
from adamx.formula.symbols import Symbols
from adamx.transforms.bias_correction import weight_in_formula, weight_of_past


class mean_of_params(Transformation):
    """Keep the mean of the parameters over all steps; the updates pass unchanged.

    It is the last stage of an optimizer, since it averages the new parameters: the parameter in
    compute dtype plus the update, before rounding. Inside `master_weights` these are the masters.

    Attributes:
        name: the slot that keeps the average: float32 or wider, shaped like the parameter, which it
            equals before the first step.

    Raises:
        ValueError: at `update`, if it is called without params.

    Example:
        w goes 4, 3, 2, and the slot keeps the mean of 3 and 2:

        >>> import adamx, jax.numpy as jnp
        >>> tx, w = adamx.chain(adamx.sgd(1.0), mean_of_params()), jnp.array([4.0])
        >>> state, step = tx.init(w), adamx.make_step(tx)
        >>> for _ in range(2):
        ...     w, state = step(w, state, jnp.array([1.0]))
        >>> w, state["params_mean"]
        (Array([2.], dtype=float32), Array([2.5], dtype=float32))
    """

    name: str = "params_mean"

    place = "last"

    def slots(self, param: jax.Array) -> Slots:
        return {self.name: jnp.array(param, compute_dtype(param.dtype))}

    def scalars(self, step: Step) -> Any:
        return 1 / step.count.astype(float)

    def accumulate(self, u: jax.Array, slots: Slots, step: LeafStep) -> Slots:
        return _towards_params(self, step.scalars, u, slots, step)

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        mean = symbols.slot(self.name)
        symbols.define(mean, last(mean) + (following(W) - last(mean)) / T, W)
        return u


class ema_of_params(Transformation):
    """Keep an exponential moving average of the parameters; the updates pass unchanged.

    It is the last stage of an optimizer, like `mean_of_params`.

    Attributes:
        decay: weight of the past, in [0, 1): a number, array or schedule. Its memory is some
            1 / (1 - decay) steps.
        name: the slot that keeps the average, with its bias corrected: float32 or wider, shaped
            like the parameter, which it equals before the first step. With a scheduled decay the
            state has `<name>_correction` too: 1 minus the product of the decays.

    Raises:
        ValueError: if `decay` is out of its range; at `update`, if it is called without params.

    Example:
        w goes 4, 3, 2: the averages are 3, and 3 - (2/3) = (0.5 * 0.5 * 3 + 0.5 * 2) / 0.75

        >>> import adamx, jax.numpy as jnp
        >>> tx, w = adamx.chain(adamx.sgd(1.0), ema_of_params(0.5)), jnp.array([4.0])
        >>> state, step = tx.init(w), adamx.make_step(tx)
        >>> for _ in range(2):
        ...     w, state = step(w, state, jnp.array([1.0]))
        >>> print(f"{float(state['params_ema'][0]):.4f}")
        2.3333
    """

    decay: Decay = 0.999
    name: str = "params_ema"

    place = "last"

    @property
    def _correction(self) -> str:
        return f"{self.name}_correction"

    def slots(self, param: jax.Array) -> Slots:
        return {self.name: jnp.array(param, compute_dtype(param.dtype))}

    def scalars(self, step: Step) -> Any:
        past = weight_of_past(self, step, self._correction)
        decay = scheduled(self, "decay", step.count)
        if callable(self.decay):
            decay = jnp.asarray(decay, past.dtype)
        return (1 - decay) / past, past

    def record(self, scalars: Any) -> dict[str, Any]:
        return {self._correction: scalars[1]} if callable(self.decay) else {}

    def accumulate(self, u: jax.Array, slots: Slots, step: LeafStep) -> Slots:
        share, _ = step.scalars
        return _towards_params(self, share, u, slots, step)

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        b, average = symbols.number("b", self.decay), symbols.slot(self.name)
        share = (1 - b) / weight_in_formula(self.decay, symbols, self._correction)
        symbols.define(average, last(average) + share * (following(W) - last(average)), W)
        return u


def _towards_params(concept: Any, share: Any, u: jax.Array, slots: Slots, step: LeafStep) -> Slots:
    """Move the average towards the new parameters by a share of the difference."""
    past = slots[concept.name]
    return {concept.name: past + share * ((step.needs_param(concept) + u) - past)}
