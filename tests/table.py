"""Every transformation, once: the contracts in test_contracts.py hold for each line.

A new transformation is tested by adding a line here, with what is particular about it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec

import adamx


@dataclasses.dataclass(frozen=True)
class Case:
    """A transformation, and what is particular about it.

    Attributes:
        make: makes it.
        kind: what it is the example of. The promises that do not depend on a formula (any tree,
            scan, vmap, shard_map, inside Optax, ...) are tested with one of each kind, and in the
            slow tests with all.
        narrow: it has a storage: it has no derivative.
        packed: it packs float32 moments: it refuses float64 and complex parameters.
        masters: it keeps masters: it emits float32 or wider.
        whole: an update depends on a whole leaf or tree: split over devices without telling the
            compiler so (`shard_map`), it sees its part only.
        foreign: it has a stage of Optax, which does not run under strict promotion.
        squares: it emits squares of what it gets, or products with the weights.
        larger: it emits up to sixteen times what it gets.
        varied: its leaves have different slots.
        half_slots: the slots that it keeps in bfloat16 by their dtype, without a storage.
    """

    make: Callable[[], adamx.Transformation]
    kind: str = ""
    narrow: bool = False
    packed: bool = False
    masters: bool = False
    whole: bool = False
    foreign: bool = False
    squares: bool = False
    larger: bool = False
    varied: bool = False
    half_slots: tuple[str, ...] = ()


def _schedule(step):
    return 0.1 / (1.0 + 0.5 * jnp.asarray(step, jnp.float32))


def _rising(step):
    return 1.0 - 0.5 / (1.0 + jnp.asarray(step, jnp.float32))


def _all_but_vectors(params):
    return jax.tree.map(lambda p: jnp.ndim(p) != 1, params)


def _blocks(path, leaf):
    return (leaf.ndim - 1,) if "w" in path and leaf.ndim else ()


def _sides_of_matrices(path, leaf):
    return (0, 1) if leaf.ndim == 2 else ()


def _factors(path, leaf):
    return _schedule if "b" in path else 1.0 + leaf.ndim


def _first_axis(path, leaf):
    return min(leaf.ndim, 1)


# Averages of coarse numbers with these decays are exact in float32, so that every way to run them
# gives the same bits: otherwise the last bit would decide how a storage rounds.
_EXACT: dict[str, Any] = {"b1": 0.5, "b2": 0.75}

TRANSFORMATIONS: dict[str, Case] = {
    # concepts
    "identity": Case(adamx.identity),
    "scale": Case(lambda: adamx.scale(-0.5)),
    "ema": Case(lambda: adamx.ema(0.9), kind="a concept"),
    "ema_of_squares": Case(lambda: adamx.ema_of_squares(0.99), squares=True),
    "sum_of_squares": Case(lambda: adamx.sum_of_squares(0.1), squares=True),
    "bias_correction": Case(lambda: adamx.bias_correction(0.9), larger=True),
    "rms_scaling": Case(lambda: adamx.rms_scaling(second_moment=adamx.ema_of_squares(0.9))),
    "trace": Case(lambda: adamx.trace(0.9), larger=True),
    "trace_nesterov": Case(lambda: adamx.trace(0.9, nesterov=True), larger=True),
    "nesterov_ema": Case(lambda: adamx.nesterov_ema(0.9)),
    "add_decayed_weights": Case(lambda: adamx.add_decayed_weights(0.1)),
    "scale_by_learning_rate": Case(lambda: adamx.scale_by_learning_rate(_schedule)),
    # compositions
    "chain_empty": Case(adamx.chain),
    "combine": Case(
        lambda: adamx.combine(jnp.subtract, adamx.identity(), adamx.ema(0.5)),
        kind="branches that are combined",
    ),
    "chain_foreign": Case(
        lambda: adamx.chain(optax.scale(2.0), adamx.trace(0.9), optax.ema(0.5), adamx.scale(-0.1)),
        kind="stages of Optax",
        foreign=True,
        larger=True,
    ),
    "named": Case(
        lambda: adamx.chain(adamx.named("inner", adamx.ema(0.9)), adamx.trace(0.5)),
        kind="a group of slots under a name",
        larger=True,
    ),
    "scale_by_adam": Case(adamx.scale_by_adam),
    "scale_by_rms": Case(adamx.scale_by_rms),
    # optimizers
    "sgd": Case(lambda: adamx.sgd(0.1)),
    "sgd_momentum": Case(lambda: adamx.sgd(0.1, momentum=0.9), larger=True),
    "sgd_nesterov": Case(lambda: adamx.sgd(0.1, momentum=0.9, nesterov=True), larger=True),
    "momentum": Case(lambda: adamx.momentum(0.1)),
    "adagrad": Case(lambda: adamx.adagrad(0.1)),
    "rmsprop": Case(lambda: adamx.rmsprop(0.1)),
    "rmsprop_corrected": Case(lambda: adamx.rmsprop(0.1, bias_correction=True, eps_in_sqrt=True)),
    "rmsprop_centered": Case(
        lambda: adamx.rmsprop(0.1, centered=True, momentum=0.9, nesterov=True)
    ),
    "adam": Case(lambda: adamx.adam(0.1)),
    "adam_scheduled": Case(lambda: adamx.adam(_schedule)),
    "adam_nesterov": Case(lambda: adamx.adam(0.1, nesterov=True)),
    "adam_mu_dtype": Case(lambda: adamx.adam(0.1, mu_dtype=jnp.bfloat16), half_slots=("mu",)),
    "adamw": Case(lambda: adamx.adamw(0.1), kind="an optimizer"),
    "adamw_masked": Case(
        lambda: adamx.adamw(0.1, weight_decay=_schedule, mask=_all_but_vectors),
        kind="a mask and a schedule",
    ),
    # storages
    "bfloat16": Case(
        lambda: adamx.bfloat16(adamx.ema(0.5)), kind="a storage of any slots", narrow=True
    ),
    "sgd_bfloat16": Case(lambda: adamx.sgd(0.1, momentum=0.5, moments="bfloat16"), narrow=True),
    "rmsprop_bfloat16": Case(
        lambda: adamx.rmsprop(0.1, decay=0.75, moments="bfloat16"), narrow=True
    ),
    "adagrad_bfloat16": Case(lambda: adamx.adagrad(0.1, 0.25, moments="bfloat16"), narrow=True),
    "adam_bfloat16": Case(lambda: adamx.adam(0.1, **_EXACT, moments="bfloat16"), narrow=True),
    "adam_nu_dtype": Case(lambda: adamx.adam(0.1, **_EXACT, nu_dtype=jnp.bfloat16), narrow=True),
    "adam_packed16": Case(
        lambda: adamx.adam(0.1, **_EXACT, moments="packed16"),
        kind="two moments in one word",
        narrow=True,
        packed=True,
    ),
    "adamw_packed8": Case(
        lambda: adamx.adamw(0.1, **_EXACT, moments="packed8"),
        narrow=True,
        packed=True,
    ),
    "nadam_packed16": Case(
        lambda: adamx.adam(0.1, **_EXACT, nesterov=True, moments="packed16"),
        narrow=True,
        packed=True,
    ),
    # masters
    "master_weights": Case(
        lambda: adamx.master_weights(adamx.adamw(0.1)), kind="masters of a remainder", masters=True
    ),
    "master_weights_remainder8": Case(
        lambda: adamx.master_weights(adamx.sgd(0.1), "remainder8"), masters=True
    ),
    "master_weights_float32": Case(
        lambda: adamx.master_weights(
            adamx.chain(optax.clip(1.0), adamx.adam(0.1, **_EXACT, moments="packed8")), "float32"
        ),
        narrow=True,
        packed=True,
        masters=True,
        foreign=True,
    ),
    # lion, adan, ademamix, adopt, sgdw, cautious
    "sign": Case(adamx.sign),
    "interpolated_ema": Case(lambda: adamx.interpolated_ema(0.9, 0.99)),
    "difference": Case(adamx.difference),
    "extrapolation": Case(
        lambda: adamx.combine(jnp.add, adamx.difference(), adamx.extrapolation(0.5)),
    ),
    "seeded_ema_of_squares": Case(lambda: adamx.seeded_ema_of_squares(0.9), squares=True),
    "delayed_rms_scaling": Case(
        lambda: adamx.delayed_rms_scaling(adamx.seeded_ema_of_squares(0.9))
    ),
    "growing_clip": Case(adamx.growing_clip),
    "ema_scheduled": Case(lambda: adamx.ema(adamx.half_life_schedule(0.5, 0.9, 3))),
    "scale_scheduled": Case(lambda: adamx.scale(_schedule)),
    "cautious": Case(lambda: adamx.cautious(adamx.ema(0.5)), whole=True),
    "add_cautious_decayed_weights": Case(
        lambda: adamx.add_cautious_decayed_weights(_schedule, _all_but_vectors)
    ),
    "lion": Case(lambda: adamx.lion(0.1)),
    "lion_bfloat16": Case(
        lambda: adamx.lion(0.1, b1=0.5, b2=0.75, moments="bfloat16"), narrow=True
    ),
    "adan": Case(lambda: adamx.adan(0.1, weight_decay=0.1)),
    "ademamix": Case(lambda: adamx.ademamix(0.1)),
    "ademamix_scheduled": Case(
        lambda: adamx.ademamix(
            0.1, b3=adamx.half_life_schedule(0.5, 0.9, 3), alpha=_schedule, weight_decay=0.1
        )
    ),
    "adopt": Case(lambda: adamx.adopt(0.1)),
    "laprop": Case(lambda: adamx.laprop(0.1, weight_decay=0.1)),
    "atan2_scaling": Case(
        lambda: adamx.atan2_scaling(second_moment=adamx.ema_of_squares(0.9), a=0.5, b=2.0)
    ),
    "adam_atan2": Case(lambda: adamx.adam_atan2(0.1, weight_decay=0.1, a=1.27)),
    "simplified_ademamix": Case(
        lambda: adamx.simplified_ademamix(0.1, alpha=_schedule, weight_decay=0.1), larger=True
    ),
    "adamc": Case(
        lambda: adamx.adamc(
            _schedule,
            weight_decay=0.1,
            mask=_all_but_vectors,
            max_learning_rate=0.1,
            normalized="*",
        )
    ),
    "clip_by_norm": Case(lambda: adamx.clip_by_norm(0.5), whole=True),
    "mars": Case(lambda: adamx.mars(0.1, gamma=0.5, weight_decay=0.1), whole=True),
    "keep_norm": Case(adamx.keep_norm, whole=True),
    "hyperball": Case(
        lambda: adamx.chain(adamx.scale_by_adam(), adamx.hyperball(_schedule)), whole=True
    ),
    "sgdw": Case(lambda: adamx.sgdw(0.1, 0.9, nesterov=True)),
    "cautious_adamw": Case(lambda: adamx.cautious_adamw(0.1), whole=True),
    "cautious_lion": Case(lambda: adamx.cautious_lion(0.1), whole=True),
    # around the update
    "set_to_zero": Case(adamx.set_to_zero),
    "clip_by_global_norm": Case(lambda: adamx.clip_by_global_norm(0.5, record=True), whole=True),
    "clip_then_adamw": Case(
        lambda: adamx.chain(adamx.clip_by_global_norm(1.0), adamx.adamw(0.1)),
        kind="a stage that reads the whole tree",
        whole=True,
    ),
    "clip_last": Case(
        lambda: adamx.chain(adamx.momentum(0.1), adamx.clip_by_global_norm(0.1)), whole=True
    ),
    "skip_nonfinite": Case(
        lambda: adamx.skip_nonfinite(adamx.adamw(_schedule), max_consecutive=2),
        kind="a guard",
        whole=True,
    ),
    "skip_nonfinite_clip": Case(
        lambda: adamx.skip_nonfinite(
            adamx.chain(adamx.clip_by_global_norm(1.0, record=True), adamx.adam(0.1))
        ),
        whole=True,
    ),
    "skip_spikes": Case(
        lambda: adamx.skip_spikes(
            adamx.chain(adamx.clip_by_global_norm(1.0), adamx.adamw(_schedule)),
            4,
            max_consecutive=2,
        ),
        whole=True,
    ),
    "accumulate": Case(lambda: adamx.accumulate(adamx.adamw(_schedule), 2), kind="an accumulation"),
    "monitor": Case(
        lambda: adamx.monitor(adamx.adamw(_schedule), every=2), kind="a monitor", whole=True
    ),
    "monitor_skip": Case(
        lambda: adamx.monitor(adamx.skip_nonfinite(adamx.adamw(0.1)), every=1), whole=True
    ),
    "accumulate_skip": Case(
        lambda: adamx.accumulate(adamx.skip_nonfinite(adamx.momentum(0.1)), 2), whole=True
    ),
    "by_path": Case(
        lambda: adamx.chain(
            adamx.by_path({"*": {"decay": 0.5}}, default=functools.partial(adamx.momentum, 0.1)),
            adamx.scale(0.5),
        ),
        kind="groups of leaves",
    ),
    "stacked": Case(
        lambda: adamx.stacked(
            adamx.lamb(0.1, weight_decay=0.1, mask=_all_but_vectors), _first_axis
        ),
        kind="stacked layers",
        whole=True,
    ),
    "stacked_around": Case(
        lambda: adamx.stacked(
            adamx.skip_nonfinite(
                adamx.chain(
                    adamx.clip_by_global_norm(1.0),
                    adamx.by_path({"*": adamx.adam_mini(0.1)}, default=None),
                )
            ),
            _first_axis,
        ),
        whole=True,
    ),
    "in_shard_map": Case(
        lambda: adamx.in_shard_map(adamx.skip_nonfinite(adamx.lamb(0.1)), PartitionSpec()),
        kind="shards of arrays",
        whole=True,
    ),
    "mean_of_params": Case(lambda: adamx.chain(adamx.momentum(0.1), adamx.mean_of_params())),
    "ema_of_params": Case(
        lambda: adamx.chain(adamx.adamw(0.1), adamx.ema_of_params(0.9)),
    ),
    "adamw_adjustable": Case(
        lambda: adamx.adamw(
            adamx.adjustable(0.1), b1=adamx.adjustable(0.5), weight_decay=adamx.adjustable(0.25)
        ),
        kind="hyperparameters in the state",
    ),
    "adamw_independent": Case(lambda: adamx.adamw_independent(0.1, multiplier=_schedule)),
    "adam_scheduled_decays": Case(lambda: adamx.adam(0.1, b1=_rising, b2=_rising)),
    "adam_nesterov_scheduled": Case(lambda: adamx.adam(0.1, b1=_rising, nesterov=True)),
    "ema_of_params_scheduled": Case(
        lambda: adamx.chain(adamx.sgd(0.1), adamx.ema_of_params(_rising))
    ),
    "sgd_scheduled": Case(lambda: adamx.sgd(0.1, momentum=_rising, nesterov=True)),
    "stable_adamw_scheduled": Case(
        lambda: adamx.stable_adamw(0.1, b1=_rising, b2=_rising), whole=True
    ),
    # other denominators and second moments
    "ratio": Case(lambda: adamx.ratio(denominator=adamx.decaying_max(0.9, 1e-3))),
    "decaying_max": Case(lambda: adamx.decaying_max(0.9, 1e-3)),
    "running_max": Case(lambda: adamx.chain(adamx.decaying_max(0.9), adamx.running_max())),
    "deviation": Case(lambda: adamx.combine(jnp.subtract, adamx.ema(0.9), adamx.deviation())),
    "additive_average_of_squares": Case(
        lambda: adamx.rms_scaling(
            second_moment=adamx.additive_average_of_squares(0.9, initial=1e-6)
        )
    ),
    "scheduled_nesterov_ema": Case(lambda: adamx.scheduled_nesterov_ema(0.9)),
    "rectified": Case(
        lambda: adamx.rectified(
            adamx.rms_scaling(second_moment=adamx.ema_of_squares(0.9)), decay=0.9
        )
    ),
    "adamax": Case(lambda: adamx.adamax(0.1)),
    "adamaxw": Case(lambda: adamx.adamaxw(0.1, mask=_all_but_vectors)),
    "nadam_scheduled": Case(
        lambda: adamx.chain(
            adamx.rms_scaling(
                adamx.scheduled_nesterov_ema(0.9),
                second_moment=adamx.chain(
                    adamx.ema_of_squares(0.999), adamx.bias_correction(0.999)
                ),
            ),
            adamx.scale_by_learning_rate(0.1),
        )
    ),
    "nadamw": Case(lambda: adamx.nadamw(0.1, mask=_all_but_vectors)),
    "amsgrad": Case(lambda: adamx.amsgrad(0.1)),
    "adabelief": Case(lambda: adamx.adabelief(0.1)),
    "radam": Case(lambda: adamx.radam(0.1)),
    "yogi": Case(lambda: adamx.yogi(0.1)),
    "adabelief_packed16": Case(
        lambda: adamx.adabelief(0.1, **_EXACT, moments="packed16"), narrow=True, packed=True
    ),
    "radam_packed8": Case(
        lambda: adamx.radam(0.1, **_EXACT, moments="packed8"), narrow=True, packed=True
    ),
    # clips, ratios and blocks
    "scale_by_path": Case(
        lambda: adamx.chain(
            adamx.scale_by_adam(), adamx.scale_by_path(_factors), adamx.scale_by_path({"*": 0.5})
        ),
        kind="factors of leaves",
    ),
    "clip_by_value": Case(lambda: adamx.clip_by_value(0.5)),
    "clip_by_rms": Case(lambda: adamx.clip_by_rms(0.5), whole=True),
    "adaptive_clip": Case(lambda: adamx.adaptive_clip(0.1), whole=True),
    "clip_to_history": Case(lambda: adamx.clip_to_history(1.0, 0.5, warmup=1), whole=True),
    "clip_by_zscore": Case(lambda: adamx.clip_by_zscore(0.5, 0.5, warmup=1), whole=True),
    "trust_ratio": Case(lambda: adamx.trust_ratio(0.5, eps=1e-3), whole=True),
    "update_clipping": Case(
        lambda: adamx.update_clipping(adamx.scale_by_rms(0.9), 0.9), whole=True
    ),
    "ema_of_mean_squares": Case(lambda: adamx.ema_of_mean_squares(0.9), whole=True, squares=True),
    "lamb": Case(lambda: adamx.lamb(0.1, weight_decay=0.1, mask=_all_but_vectors), whole=True),
    "factored_ema_of_squares": Case(
        lambda: adamx.factored_ema_of_squares(0.9, 2), whole=True, squares=True, varied=True
    ),
    "scale_by_param_block_rms": Case(
        lambda: adamx.scale_by_param_block_rms(0.5), whole=True, squares=True
    ),
    "adafactor": Case(
        lambda: adamx.adafactor(_schedule, 2),
        kind="slots of other shapes than their parameters, other ones in other leaves",
        whole=True,
        varied=True,
    ),
    "adafactor_momentum": Case(
        lambda: adamx.adafactor(
            0.1, 2, momentum=0.5, weight_decay_rate=0.1, weight_decay_mask=_all_but_vectors
        ),
        whole=True,
        varied=True,
    ),
    "orthogonalized": Case(
        lambda: adamx.orthogonalized(ns_steps=2, axes=_sides_of_matrices), whole=True
    ),
    "scale_by_shape": Case(
        lambda: adamx.chain(
            adamx.orthogonalized(ns_steps=1, axes=_sides_of_matrices),
            adamx.scale_by_shape(axes=_sides_of_matrices),
        ),
        whole=True,
    ),
    "muon": Case(
        lambda: adamx.muon(
            _schedule, ns_steps=2, weight_decay=0.1, consistent_rms=0.2, axes=_sides_of_matrices
        ),
        kind="an operation on whole matrices",
        whole=True,
    ),
    "muon_adamw": Case(
        lambda: adamx.muon_adamw(0.1, ns_steps=2, matrices="*", axes=_sides_of_matrices),
        whole=True,
        varied=True,
    ),
    "adam_mini": Case(lambda: adamx.adam_mini(0.1, mask=_all_but_vectors), whole=True),
    "adam_mini_by_path": Case(lambda: adamx.adam_mini(0.1, axes=_blocks), whole=True),
    "adam_mini_bfloat16": Case(
        lambda: adamx.adam_mini(0.1, **_EXACT, moments="bfloat16"), narrow=True, whole=True
    ),
    "stable_adamw": Case(lambda: adamx.stable_adamw(0.1, mask=_all_but_vectors), whole=True),
    "schedule_free": Case(
        lambda: adamx.schedule_free(adamx.sgd(_schedule), _schedule, 0.5, 1.0),
        kind="parameters that are two averages",
    ),
    "schedule_free_adamw": Case(lambda: adamx.schedule_free_adamw(0.1, weight_decay=0.1)),
    "master_weights_schedule_free": Case(
        lambda: adamx.master_weights(adamx.schedule_free_adamw(0.1)), masters=True
    ),
}

every = pytest.mark.parametrize("name", TRANSFORMATIONS)

of_each_kind = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if case.kind else pytest.mark.slow)
        for name, case in TRANSFORMATIONS.items()
    ],
)
"""One of each kind, and all in the slow tests."""


def of_every_other_kind(first: int) -> Any:
    """Return every second kind, from the first or the second on, and all in the slow tests.

    For promises that take long to try and have the same code behind them for all kinds.
    """
    fast = [name for name, case in TRANSFORMATIONS.items() if case.kind][first::2]
    return pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=() if name in fast else pytest.mark.slow)
            for name in TRANSFORMATIONS
        ],
    )


OUTSIDE: dict[str, Any] = {
    "alone": lambda tx: tx,
    "in a chain": adamx.chain,
    "monitor": lambda tx: adamx.monitor(tx, every=100, groups=("*",)),
    "master_weights": adamx.master_weights,
    "skip_nonfinite": adamx.skip_nonfinite,
    "skip_nonfinite, skip_spikes": lambda tx: adamx.skip_nonfinite(adamx.skip_spikes(tx)),
    "monitor, skip_nonfinite, masters": lambda tx: adamx.monitor(
        adamx.skip_nonfinite(adamx.master_weights(tx)), every=100, groups=("*",)
    ),
}
"""Wrappers around an optimizer that accumulates, by name."""
