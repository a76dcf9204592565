"""Clip the norm of the whole tree where it is an outlier beside its own moving average.

    n_t = sqrt(sum over all elements of |u_t|^2),    d_t = n_t - mean_{t-1}
    c_t = mean_{t-1} + sigma^2 variance_{t-1} / d_t    where d_t > sigma root(variance_{t-1})
    c_t = n_t                                          elsewhere, and in the first `warmup` steps
    u'_t = u_t c_t / n_t

    mean_t     = decay mean_{t-1} + (1 - decay) c_t
    variance_t = decay variance_{t-1} + (1 - decay) (c_t - mean_t)^2

After the warm-up mean and variance are those of its norms. With the z-score z = d / root(variance),
c = mean + root(variance) sigma^2 / z: the farther out a norm is, the closer to the mean it comes.
This is the paper's reciprocal form (`adaptive_scaling` in its code), without the code's 1e-6 beside
the deviation.

Source: Kumar et al. (2025), ZClip, https://arxiv.org/abs/2504.02507
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamx.core import errors
from adamx.core.arithmetic import root
from adamx.core.checks import Decay, NonNegative, whole_number
from adamx.core.concept import Slots
from adamx.core.norms import global_norm
from adamx.core.schedules import scheduled_decay
from adamx.core.step import LeafStep, Step
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, T, last, reduced, sqrt, where
from adamx.formula.symbols import Symbols


class _History(NamedTuple):
    mean: jax.Array
    variance: jax.Array
    steps: jax.Array


class clip_by_zscore(Transformation):
    """Scale the updates down where the norm of the whole tree is far above its moving average.

    It reads the whole tree, so it belongs in a top-level chain, and as the first stage shares one
    reading of the gradients with the guards. Before `adamw` it clips the gradient. After the
    scaling by the second moment it clips the update. `clip_to_history` compares each array with
    itself.

    The state has `norm_mean` and `norm_variance`, in the dtype in which the norm is computed, and
    `norm_steps` (int32), how many steps they are of, at most `warmup`. A norm that is not finite
    does not enter them. After the warm-up an infinite norm makes the updates 0; NaN stays.

    Attributes:
        sigma: how many standard deviations above the mean a usual value is at most, >= 0.
        decay: weight of the past, in [0, 1): a number, array or schedule.
        warmup: how many steps clip nothing, >= 1.
        name: how the names of the entries begin, where a chain has two of it.

    Raises:
        TypeError: if `warmup` is not a whole number.
        ValueError: if a number is out of its range.

    Example:
        The norms 1 and 3 have the mean 2 and the variance 1, so that 10 becomes 2 + 2^2 / 8:

        >>> import jax.numpy as jnp
        >>> tx = clip_by_zscore(2.0, 0.5, warmup=2)
        >>> state = tx.init(jnp.zeros(2))
        >>> for g in (1.0, 3.0, 10.0):
        ...     updates, state = tx.update(jnp.array([g, 0.0]), state)
        >>> updates, float(state["norm_mean"])
        (Array([2.5, 0. ], dtype=float32), 2.25)
    """

    sigma: NonNegative = 2.5
    decay: Decay = 0.97
    _: dataclasses.KW_ONLY
    warmup: int = 25
    name: str = "norm"

    measures_norm = True  # pyright: ignore

    def __post_init__(self) -> None:
        self._set(warmup=whole_number("clip_by_zscore", "warmup", self.warmup))

    def tree_scalars(self, step: Step, leaves: list[jax.Array]) -> Any:
        norm = global_norm(leaves, step.shards)
        mean, variance, steps = self._history(step, norm)
        clips, above = steps >= self.warmup, norm - mean
        usual = self.sigma * root(variance)
        beyond = clips & (above > usual)
        limit = mean + usual * (usual / jnp.where(beyond, above, 1))
        factor = jnp.where(beyond, limit / jnp.where(beyond, norm, 1), 1)
        decay, weight = scheduled_decay(self, step.count)
        # one norm after the other gives the mean and variance of all in the warm-up
        share = 1 / (steps + 1).astype(norm.dtype)
        old = jnp.where(clips, jnp.asarray(decay, norm.dtype), 1 - share)
        new = jnp.where(clips, jnp.asarray(weight, norm.dtype), share)
        apart = jnp.where(beyond, limit, norm) - mean
        spread = new * jnp.where(clips, old, 1) * old * apart
        later = _History(
            mean + new * apart,
            old * variance + spread * apart,
            jnp.minimum(steps + 1, self.warmup),
        )
        enters = jnp.isfinite(norm)
        before = _History(mean, variance, steps)
        return factor, jax.tree.map(lambda a, b: jnp.where(enters, a, b), later, before)

    def record(self, scalars: Any) -> dict[str, Any]:
        _, history = scalars
        return dict(zip(self._names, history, strict=True))

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        factor, _ = step.scalars
        return factor * u

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        u = symbols.named(u)
        k, b = symbols.number("sigma", self.sigma), symbols.number("b", self.decay)
        mean, variance, _ = (symbols.slot(name, array=False) for name in self._names)
        norm = symbols.named(reduced("norm", u, "all"), "norm", array=False)
        later = Expr(">", (T, symbols.number("warmup", float(self.warmup))))
        above = norm - last(mean)
        limit = last(mean) + k**2 * last(variance) / above
        limit = where(Expr(">", (above, k * sqrt(last(variance)))), limit, norm)
        clipped = symbols.named(where(later, limit, norm), "clipped", array=False)
        new = symbols.named(where(later, 1 - b, 1 / T), "weight", array=False)
        symbols.define(mean, last(mean) + new * (clipped - last(mean)), 0)
        spread = where(later, (clipped - mean) ** 2, (clipped - mean) * (clipped - last(mean)))
        symbols.define(variance, (1 - new) * last(variance) + new * spread, 0)
        return clipped / norm * u

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(f"{self.name}_{field}" for field in _History._fields)

    def _history(self, step: Step, norm: jax.Array) -> _History:
        """Return the history before this step; zeros before the first."""
        if not step.state:
            return _History(jnp.zeros_like(norm), jnp.zeros_like(norm), jnp.zeros([], jnp.int32))
        *moments, steps = self._names
        mean, variance = (errors.scalar(step.state, name).astype(norm.dtype) for name in moments)
        return _History(mean, variance, errors.counter(step.state, steps))
