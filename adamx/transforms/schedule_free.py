"""Schedule-free learning: an average of the weights instead of a decaying learning rate.

    y_t     = (1 - b1) z_t + b1 x_t          the parameters, at which the gradient is taken
    z_{t+1} = z_t + inner(g_t)               the steps of any optimizer without momentum
    x_{t+1} = (1 - c_t) x_t + c_t z_{t+1}    their weighted average, for evaluation
    c_t     = k_t / (k_1 + ... + k_t),  k_t = (max of lr_1 ... lr_t)^weight_lr_power

With x eliminated, y_{t+1} - y_t = c_t (z_{t+1} - y_t) + (1 - c_t) (1 - b1) (z_{t+1} - z_t): only z
is kept, no division by b1 is needed, and a parameter changed from outside changes x alone. All
steps have the same b1: it cannot be a schedule.

The sum of the k_t is kept in units of the last one, so no learning rate is too small for it. The
paper weights by lr_t itself; Optax and the authors' PyTorch code weight by the largest rate so far,
as here, which is the same until the rate falls. In Optax the weights see a schedule one step ahead
of the inner rate; here both see the same step.

Source: Defazio et al. (2024), equations 3 to 5 and Algorithm 1, https://arxiv.org/abs/2405.15682
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from adamx.core import errors
from adamx.core.arithmetic import compute_dtype, real_times_complex
from adamx.core.checks import NonNegative, Range, Rate, Scalar
from adamx.core.concept import Slots, disjoint
from adamx.core.leaves import take_apart
from adamx.core.schedules import scheduled
from adamx.core.step import LeafStep, Step
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, W, call, last
from adamx.formula.symbols import Symbols
from adamx.storage.masters import NAMES, masters

Share = Annotated[
    Scalar,
    Range(  # with 0 the average x would not be in y
        math.ulp(0.0),
        1.0,
        "in (0, 1]",
        constant="y and z alone are kept, and x is made of them with one b1 for all steps",
    ),
]


class schedule_free(Transformation):
    """Let an optimizer move z, and train at y, between z and its average x.

    The parameters hold y. For evaluation, `schedule_free_eval_params(state, params)` gives x.

    Attributes:
        inner: the optimizer. It acts on one array at a time, ends in its learning rate, reads y as
            its parameters, and has no momentum: the interpolation replaces it. A clip by the norm
            of the whole tree comes before, `chain(clip, schedule_free(...))`.
        learning_rate: a number, array or schedule, >= 0. The same as in `inner`, with the warm-up
            and without a decay; here it weights the average.
        b1: weight of the average x in the parameters y, in (0, 1]: a number or array, no schedule.
            It takes the place of momentum's decay.
        weight_lr_power: power of the learning rate in the weights of the average, >= 0; 0 weights
            all steps alike.

    The state has the slot `z`, float32 or wider, and the scalars `weight_sum`, the sum of the
    weights in units of the last one, `max_lr`, the largest learning rate so far, and `b1`.

    Raises:
        TypeError: if `inner` is not an adamx transformation, or `b1` is a schedule.
        ValueError: if a number is out of its range or `inner` reads the whole tree; at `update`, if
            it is called without params.

    Example:
        The first step moves z and x to -1; the second moves z to -2, and x to (-1 - 2) / 2:

        >>> import adamx, jax.numpy as jnp
        >>> tx, y = schedule_free(adamx.sgd(1.0), 1.0, b1=0.5), jnp.zeros(1)
        >>> state = tx.init(y)
        >>> for _ in range(2):
        ...     updates, state = tx.update(jnp.ones(1), state, y)
        ...     y = adamx.apply_updates(y, updates)
        >>> y, state["z"], schedule_free_eval_params(state, y)
        (Array([-1.75], dtype=float32), Array([-2.], dtype=float32), Array([-1.5], dtype=float32))
    """

    inner: Transformation
    learning_rate: Rate
    b1: Share = 0.9
    weight_lr_power: NonNegative = 2.0

    place = "last"

    def slots(self, param: jax.Array) -> Slots:
        # a copy, so that parameter and slot can both be donated
        z = jnp.array(param, compute_dtype(param.dtype), copy=True)
        return disjoint({"z": z}, super().slots(param))

    def scalars(self, step: Step) -> Any:
        if not step.state:  # before the first step
            return {"share": 0.0, "weight_sum": 0.0, "max_lr": 0.0, "b1": self.b1}
        largest, total = (errors.scalar(step.state, name) for name in ("max_lr", "weight_sum"))
        lr = jnp.asarray(scheduled(self, "learning_rate", step.count), jnp.float32)
        new = jnp.maximum(largest, lr)
        shrunk = jnp.where(new > 0, largest / jnp.where(new > 0, new, 1), 1)
        total = total * shrunk**self.weight_lr_power + 1
        return {"share": 1 / total.astype(float), "weight_sum": total, "max_lr": new, "b1": self.b1}

    def record(self, scalars: Any) -> dict[str, Any]:
        return {name: scalars[name] for name in ("weight_sum", "max_lr", "b1")}

    def accumulate(self, u: jax.Array, slots: Slots, step: LeafStep) -> Slots:
        new = super().accumulate(u, slots, step)
        return new | {"z": slots["z"] + self.inner.emit(u, slots | new, step.child(0))}

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        y = step.needs_param(self)
        share, new, old = step.scalars["share"], slots["z"], step.old["z"]
        return share * (new - y) + (1 - share) * (1 - self.b1) * (new - old)

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        rate, b = symbols.number("lr", self.learning_rate), symbols.number("b", self.b1)
        z, total = symbols.slot("z"), symbols.slot("k_sum", array=False)
        if callable(self.learning_rate):
            largest = symbols.slot("lr_max", array=False)
            rate = symbols.define(largest, call("max", last(largest), rate), 0)
        weight = rate ** symbols.number("power", self.weight_lr_power)
        symbols.define(z, last(z) + self.inner.formula(u, symbols), W)
        symbols.define(total, last(total) + weight, 0)
        share = symbols.named(weight / total, "c", array=False)
        return share * (z - W) + (1 - share) * (1 - b) * (z - last(z))


def schedule_free_eval_params(state: Mapping[str, Any], params: Any) -> Any:
    """Return the average x, for evaluation: (y - (1 - b1) z) / b1.

    Args:
        state: the state of a `schedule_free` optimizer, alone, in a chain or in `master_weights`.
        params: the parameters, y, as they go into `update`.

    Returns:
        A tree shaped like params, in their dtypes; computed in float32, from the masters where the
        state has them. A leaf without a slot is returned unchanged.

    Raises:
        TypeError: if `state` is not a state of adamx.
        ValueError: if the state is of another kind of optimizer, or of other parameters.

    Example:
        >>> import adamx, jax.numpy as jnp
        >>> tx, y = adamx.schedule_free_adamw(0.5, eps=0.0), jnp.zeros(1)
        >>> updates, state = tx.update(jnp.ones(1), tx.init(y), y)
        >>> schedule_free_eval_params(state, y + updates).round(3)
        Array([-0.5], dtype=float32)
    """
    errors.check_state(state, "schedule_free_eval_params(state, params)")
    if missing := sorted({"z", "b1", "weight_sum"} - state.keys()):
        raise ValueError(
            f"schedule_free_eval_params: the state has no {missing}, only {sorted(state)}: it is "
            "not the state of a schedule-free optimizer"
        )
    wide = masters(params, state) if {*NAMES} & state.keys() else params
    leaves, ys = take_apart(params, None), take_apart(wide, None)
    zs = leaves.column("z", state["z"])
    b1 = state["b1"]

    def average(param: Any, y: Any, z: Any) -> Any:
        if param is None or z is None:
            return param
        y, wide_b1 = y.astype(z.dtype), b1.astype(jnp.finfo(z.dtype).dtype)
        with real_times_complex(z.dtype):
            return ((y - (1 - wide_b1) * z) / wide_b1).astype(param.dtype)

    columns = zip(leaves.values, ys.values, zs, strict=True)
    return leaves.tree([average(*column) for column in columns])
