"""Every transformation, once: the contracts in test_contracts.py hold for each line.

A new transformation is tested by adding a line here.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import adamx


def _schedule(step):
    return 0.1 / (1.0 + 0.5 * jnp.asarray(step, jnp.float32))


def _rising(step):
    return 1.0 - 0.5 / (1.0 + jnp.asarray(step, jnp.float32))


def _all_but_vectors(params):
    return jax.tree.map(lambda p: jnp.ndim(p) != 1, params)


def _blocks(path, leaf):
    return (leaf.ndim - 1,) if "w" in path and leaf.ndim else ()


# Averages of coarse numbers with these decays are exact in float32, so that every way to run them
# gives the same bits: otherwise the last bit would decide how a storage rounds.
_EXACT: dict[str, Any] = {"b1": 0.5, "b2": 0.75}

TRANSFORMATIONS: dict[str, Callable[[], adamx.Transformation]] = {
    # concepts
    "identity": adamx.identity,
    "scale": lambda: adamx.scale(-0.5),
    "ema": lambda: adamx.ema(0.9),
    "ema_of_squares": lambda: adamx.ema_of_squares(0.99),
    "sum_of_squares": lambda: adamx.sum_of_squares(0.1),
    "bias_correction": lambda: adamx.bias_correction(0.9),
    "rms_scaling": lambda: adamx.rms_scaling(second_moment=adamx.ema_of_squares(0.9)),
    "trace": lambda: adamx.trace(0.9),
    "trace_nesterov": lambda: adamx.trace(0.9, nesterov=True),
    "nesterov_ema": lambda: adamx.nesterov_ema(0.9),
    "add_decayed_weights": lambda: adamx.add_decayed_weights(0.1),
    "scale_by_learning_rate": lambda: adamx.scale_by_learning_rate(_schedule),
    # compositions
    "chain_empty": adamx.chain,
    "combine": lambda: adamx.combine(jnp.subtract, adamx.identity(), adamx.ema(0.5)),
    "chain_foreign": lambda: adamx.chain(
        optax.scale(2.0), adamx.trace(0.9), optax.ema(0.5), adamx.scale(-0.1)
    ),
    "named": lambda: adamx.chain(adamx.named("inner", adamx.ema(0.9)), adamx.trace(0.5)),
    "scale_by_adam": adamx.scale_by_adam,
    "scale_by_rms": adamx.scale_by_rms,
    # optimizers
    "sgd": lambda: adamx.sgd(0.1),
    "sgd_momentum": lambda: adamx.sgd(0.1, momentum=0.9),
    "sgd_nesterov": lambda: adamx.sgd(0.1, momentum=0.9, nesterov=True),
    "momentum": lambda: adamx.momentum(0.1),
    "adagrad": lambda: adamx.adagrad(0.1),
    "rmsprop": lambda: adamx.rmsprop(0.1),
    "rmsprop_corrected": lambda: adamx.rmsprop(0.1, bias_correction=True, eps_in_sqrt=True),
    "rmsprop_centered": lambda: adamx.rmsprop(0.1, centered=True, momentum=0.9, nesterov=True),
    "adam": lambda: adamx.adam(0.1),
    "adam_scheduled": lambda: adamx.adam(_schedule),
    "adam_nesterov": lambda: adamx.adam(0.1, nesterov=True),
    "adam_mu_dtype": lambda: adamx.adam(0.1, mu_dtype=jnp.bfloat16),
    "adamw": lambda: adamx.adamw(0.1),
    "adamw_masked": lambda: adamx.adamw(0.1, weight_decay=_schedule, mask=_all_but_vectors),
    # storages
    "bfloat16": lambda: adamx.bfloat16(adamx.ema(0.5)),
    "sgd_bfloat16": lambda: adamx.sgd(0.1, momentum=0.5, moments="bfloat16"),
    "rmsprop_bfloat16": lambda: adamx.rmsprop(0.1, decay=0.75, moments="bfloat16"),
    "adagrad_bfloat16": lambda: adamx.adagrad(0.1, 0.25, moments="bfloat16"),
    "adam_bfloat16": lambda: adamx.adam(0.1, **_EXACT, moments="bfloat16"),
    "adam_nu_dtype": lambda: adamx.adam(0.1, **_EXACT, nu_dtype=jnp.bfloat16),
    "adam_packed16": lambda: adamx.adam(0.1, **_EXACT, moments="packed16"),
    "adamw_packed8": lambda: adamx.adamw(0.1, **_EXACT, moments="packed8"),
    "nadam_packed16": lambda: adamx.adam(0.1, **_EXACT, nesterov=True, moments="packed16"),
    # masters
    "master_weights": lambda: adamx.master_weights(adamx.adamw(0.1)),
    "master_weights_remainder8": lambda: adamx.master_weights(adamx.sgd(0.1), "remainder8"),
    "master_weights_float32": lambda: adamx.master_weights(
        adamx.chain(optax.clip(1.0), adamx.adam(0.1, **_EXACT, moments="packed8")), "float32"
    ),
    # lion, adan, ademamix, adopt, sgdw, cautious
    "sign": adamx.sign,
    "interpolated_ema": lambda: adamx.interpolated_ema(0.9, 0.99),
    "difference": adamx.difference,
    "extrapolation": lambda: adamx.combine(jnp.add, adamx.difference(), adamx.extrapolation(0.5)),
    "seeded_ema_of_squares": lambda: adamx.seeded_ema_of_squares(0.9),
    "delayed_rms_scaling": lambda: adamx.delayed_rms_scaling(adamx.seeded_ema_of_squares(0.9)),
    "growing_clip": adamx.growing_clip,
    "ema_scheduled": lambda: adamx.ema(adamx.half_life_schedule(0.5, 0.9, 3)),
    "scale_scheduled": lambda: adamx.scale(_schedule),
    "cautious": lambda: adamx.cautious(adamx.ema(0.5)),
    "add_cautious_decayed_weights": lambda: adamx.add_cautious_decayed_weights(
        _schedule, _all_but_vectors
    ),
    "lion": lambda: adamx.lion(0.1),
    "lion_bfloat16": lambda: adamx.lion(0.1, b1=0.5, b2=0.75, moments="bfloat16"),
    "adan": lambda: adamx.adan(0.1, weight_decay=0.1),
    "ademamix": lambda: adamx.ademamix(0.1),
    "ademamix_scheduled": lambda: adamx.ademamix(
        0.1, b3=adamx.half_life_schedule(0.5, 0.9, 3), alpha=_schedule, weight_decay=0.1
    ),
    "adopt": lambda: adamx.adopt(0.1),
    "sgdw": lambda: adamx.sgdw(0.1, 0.9, nesterov=True),
    "cautious_adamw": lambda: adamx.cautious_adamw(0.1),
    "cautious_lion": lambda: adamx.cautious_lion(0.1),
    # around the update
    "set_to_zero": adamx.set_to_zero,
    "clip_by_global_norm": lambda: adamx.clip_by_global_norm(0.5, record=True),
    "clip_then_adamw": lambda: adamx.chain(adamx.clip_by_global_norm(1.0), adamx.adamw(0.1)),
    "clip_last": lambda: adamx.chain(adamx.momentum(0.1), adamx.clip_by_global_norm(0.1)),
    "skip_nonfinite": lambda: adamx.skip_nonfinite(adamx.adamw(_schedule), max_consecutive=2),
    "skip_nonfinite_clip": lambda: adamx.skip_nonfinite(
        adamx.chain(adamx.clip_by_global_norm(1.0, record=True), adamx.adam(0.1))
    ),
    "accumulate": lambda: adamx.accumulate(adamx.adamw(_schedule), 2),
    "monitor": lambda: adamx.monitor(adamx.adamw(_schedule), every=2),
    "monitor_skip": lambda: adamx.monitor(adamx.skip_nonfinite(adamx.adamw(0.1)), every=1),
    "accumulate_skip": lambda: adamx.accumulate(adamx.skip_nonfinite(adamx.momentum(0.1)), 2),
    "by_path": lambda: adamx.chain(
        adamx.by_path({"*": {"decay": 0.5}}, default=functools.partial(adamx.momentum, 0.1)),
        adamx.scale(0.5),
    ),
    "mean_of_params": lambda: adamx.chain(adamx.momentum(0.1), adamx.mean_of_params()),
    "ema_of_params": lambda: adamx.chain(adamx.adamw(0.1), adamx.ema_of_params(0.9)),
    "adamw_independent": lambda: adamx.adamw_independent(0.1, multiplier=_schedule),
    "adam_scheduled_decays": lambda: adamx.adam(0.1, b1=_rising, b2=_rising),
    "adam_nesterov_scheduled": lambda: adamx.adam(0.1, b1=_rising, nesterov=True),
    "ema_of_params_scheduled": lambda: adamx.chain(adamx.sgd(0.1), adamx.ema_of_params(_rising)),
    "sgd_scheduled": lambda: adamx.sgd(0.1, momentum=_rising, nesterov=True),
    "stable_adamw_scheduled": lambda: adamx.stable_adamw(0.1, b1=_rising, b2=_rising),
    # other denominators and second moments
    "ratio": lambda: adamx.ratio(denominator=adamx.decaying_max(0.9, 1e-3)),
    "decaying_max": lambda: adamx.decaying_max(0.9, 1e-3),
    "running_max": lambda: adamx.chain(adamx.decaying_max(0.9), adamx.running_max()),
    "deviation": lambda: adamx.combine(jnp.subtract, adamx.ema(0.9), adamx.deviation()),
    "additive_average_of_squares": lambda: adamx.rms_scaling(
        second_moment=adamx.additive_average_of_squares(0.9, initial=1e-6)
    ),
    "scheduled_nesterov_ema": lambda: adamx.scheduled_nesterov_ema(0.9),
    "rectified": lambda: adamx.rectified(
        adamx.rms_scaling(second_moment=adamx.ema_of_squares(0.9)), decay=0.9
    ),
    "adamax": lambda: adamx.adamax(0.1),
    "adamaxw": lambda: adamx.adamaxw(0.1, mask=_all_but_vectors),
    "nadam_scheduled": lambda: adamx.chain(
        adamx.rms_scaling(
            adamx.scheduled_nesterov_ema(0.9),
            second_moment=adamx.chain(adamx.ema_of_squares(0.999), adamx.bias_correction(0.999)),
        ),
        adamx.scale_by_learning_rate(0.1),
    ),
    "nadamw": lambda: adamx.nadamw(0.1, mask=_all_but_vectors),
    "amsgrad": lambda: adamx.amsgrad(0.1),
    "adabelief": lambda: adamx.adabelief(0.1),
    "radam": lambda: adamx.radam(0.1),
    "yogi": lambda: adamx.yogi(0.1),
    "adabelief_packed16": lambda: adamx.adabelief(0.1, **_EXACT, moments="packed16"),
    "radam_packed8": lambda: adamx.radam(0.1, **_EXACT, moments="packed8"),
    # clips, ratios and blocks
    "clip_by_value": lambda: adamx.clip_by_value(0.5),
    "clip_by_rms": lambda: adamx.clip_by_rms(0.5),
    "adaptive_clip": lambda: adamx.adaptive_clip(0.1),
    "trust_ratio": lambda: adamx.trust_ratio(0.5, eps=1e-3),
    "update_clipping": lambda: adamx.update_clipping(adamx.scale_by_rms(0.9), 0.9),
    "ema_of_mean_squares": lambda: adamx.ema_of_mean_squares(0.9),
    "lamb": lambda: adamx.lamb(0.1, weight_decay=0.1, mask=_all_but_vectors),
    "adam_mini": lambda: adamx.adam_mini(0.1, mask=_all_but_vectors),
    "adam_mini_by_path": lambda: adamx.adam_mini(0.1, axes=_blocks),
    "adam_mini_bfloat16": lambda: adamx.adam_mini(0.1, **_EXACT, moments="bfloat16"),
    "stable_adamw": lambda: adamx.stable_adamw(0.1, mask=_all_but_vectors),
    "schedule_free": lambda: adamx.schedule_free(adamx.sgd(_schedule), _schedule, 0.5, 1.0),
    "schedule_free_adamw": lambda: adamx.schedule_free_adamw(0.1, weight_decay=0.1),
    "master_weights_schedule_free": lambda: adamx.master_weights(adamx.schedule_free_adamw(0.1)),
}

NARROW = {name for name in TRANSFORMATIONS if "packed" in name or "bfloat16" in name}
NARROW |= {"adam_nu_dtype", "master_weights_float32"}
"""Those with a storage: they have no derivative."""

PACKED = {name for name in NARROW if "packed" in name} | {"master_weights_float32"}
"""Those that pack float32 moments: they refuse float64 and complex parameters."""

MASTERS = {name for name in TRANSFORMATIONS if name.startswith("master_weights")}
"""Those that keep masters: they emit float32 or wider."""

WHOLE = {"clip_by_global_norm", "clip_then_adamw", "clip_last", "skip_nonfinite_clip"}
WHOLE |= {"skip_nonfinite", "accumulate_skip", "monitor", "monitor_skip"}
WHOLE |= {"cautious", "cautious_adamw", "cautious_lion"}
WHOLE |= {"clip_by_rms", "adaptive_clip", "trust_ratio", "update_clipping", "ema_of_mean_squares"}
WHOLE |= {"lamb", "stable_adamw", "stable_adamw_scheduled"}
WHOLE |= {"adam_mini", "adam_mini_by_path", "adam_mini_bfloat16"}
"""Those for which an update depends on a whole leaf or tree: split over devices without telling
the compiler so (`shard_map`), they see their part only."""
