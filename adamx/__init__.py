"""The Adam family for JAX, rebuilt from its concepts.

Every concept is a pure `init`/`update` gradient transformation, written for one array; `chain`
applies one after the other, and in a fan-out such as `rms_scaling` several read the same gradient.

    method     =  pieces
    sgd           scale_by_learning_rate
    heavy ball    trace -> scale_by_learning_rate
    momentum      ema -> scale_by_learning_rate
    adagrad       g / root(sum_of_squares) -> scale_by_learning_rate
    rmsprop       g / root(ema_of_squares) -> scale_by_learning_rate
    adam          (ema -> bias_correction) / root(ema_of_squares -> bias_correction)
                  -> scale_by_learning_rate
    adamw         adam with add_decayed_weights before the learning rate
    adam_atan2    adam by atan2_scaling in the place of the quotient
    adamax        adam over decaying_max in the place of the root
    nadam         adam with nesterov_ema in the numerator
    adamc         adamw whose decay has lr / max(lr) as a factor
    amsgrad       adam with running_max last under the root
    adabelief     adam with deviation first under the root
    radam         adam, rectified
    yogi          adam with additive_average_of_squares under the root
    lion          interpolated_ema -> sign -> scale_by_learning_rate
    adan          adam with an ema of the difference in the numerator, extrapolation under the root
    ademamix      adam with a second, slow ema in the numerator
    laprop        g / root(ema_of_squares -> bias_correction) -> ema -> bias_correction -> ...
    simplified_.. adam with trace plus g in the numerator
    mars          adamw behind g plus its difference -> clip_by_norm
    adopt         g / root(the old average of squares) -> growing_clip -> ema -> ...
    lamb          adamw with trust_ratio before the learning rate
    adafactor     g / root(factored_ema_of_squares) -> clip_by_rms -> scale_by_learning_rate
                  -> scale_by_param_block_rms
    muon          nesterov_ema -> orthogonalized -> scale_by_shape -> scale_by_learning_rate
    adam_mini     adamw with ema_of_mean_squares under the root
    stable_adamw  adamw with update_clipping around its scaling
    cautious_...  cautious around adamw's and lion's scaling
    adamh         adam with hyperball in the place of scale_by_learning_rate
    schedule_free around adamw without its ema of g

`scale_by_path` gives each leaf a factor of its own, such as those of `layerwise_decay` and
`width_rules`.
`skip_nonfinite`, `skip_spikes`, `accumulate`, `monitor` and `master_weights` wrap a whole
optimizer, `by_path` gives each group of parameters its own, `stacked` takes layers stacked for a
scan as arrays of their own, `in_shard_map` takes shards as parts of whole arrays, and a `Storage`
is the format of the slots in the state.

Every transformation is an `optax.GradientTransformationExtraArgs`, and `chain` takes any Optax
transformation as a stage.
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from adamx.core.arithmetic import zeros
from adamx.core.chain import chain
from adamx.core.combine import combine
from adamx.core.foreign import named
from adamx.core.identity import identity
from adamx.core.paths import all_but
from adamx.core.precision_warning import PrecisionWarning
from adamx.core.shard import ShardWarning
from adamx.core.sharding import state_sharding
from adamx.core.stacked import stacked
from adamx.core.step import LeafStep, Step
from adamx.core.transformation import Transformation
from adamx.core.value import as_pytree
from adamx.core.wrapper import Wrapper
from adamx.formula.adjustable import adjustable
from adamx.inspect.audit import Audit, audit
from adamx.inspect.compare import Comparison, compare
from adamx.inspect.plots import plot
from adamx.inspect.summary import Summary, summary
from adamx.interop.names import missing as _missing
from adamx.interop.optax_state import from_optax, to_optax
from adamx.interop.plain_data import from_dict, to_dict
from adamx.interop.torch_state import from_torch, to_torch
from adamx.late_start import reset
from adamx.optimizers.adabelief import adabelief
from adamx.optimizers.adafactor import adafactor
from adamx.optimizers.adagrad import adagrad
from adamx.optimizers.adam import adam, scale_by_adam
from adamx.optimizers.adam_atan2 import adam_atan2
from adamx.optimizers.adam_mini import adam_mini
from adamx.optimizers.adamax import adamax
from adamx.optimizers.adamaxw import adamaxw
from adamx.optimizers.adamc import adamc
from adamx.optimizers.adamw import adamw
from adamx.optimizers.adamw_independent import adamw_independent, normalized_weight_decay
from adamx.optimizers.adan import adan
from adamx.optimizers.ademamix import ademamix
from adamx.optimizers.adopt import adopt
from adamx.optimizers.amsgrad import amsgrad
from adamx.optimizers.cautious_adamw import cautious_adamw
from adamx.optimizers.cautious_lion import cautious_lion
from adamx.optimizers.lamb import lamb
from adamx.optimizers.laprop import laprop
from adamx.optimizers.lion import lion
from adamx.optimizers.mars import mars
from adamx.optimizers.momentum import momentum
from adamx.optimizers.muon import muon, muon_adamw
from adamx.optimizers.nadam import nadam
from adamx.optimizers.nadamw import nadamw
from adamx.optimizers.radam import radam
from adamx.optimizers.rmsprop import rmsprop, scale_by_rms
from adamx.optimizers.schedule_free_adamw import schedule_free_adamw
from adamx.optimizers.sgd import sgd
from adamx.optimizers.sgdw import sgdw
from adamx.optimizers.simplified_ademamix import simplified_ademamix
from adamx.optimizers.stable_adamw import stable_adamw
from adamx.optimizers.yogi import yogi
from adamx.scaling import (
    WidthRules,
    half_life_rule,
    inverse_square_root_rule,
    layerwise_decay,
    linear_rule,
    square_root_rule,
    width_rules,
)
from adamx.state import Adaptation, adapt_state
from adamx.storage.bfloat16 import bfloat16
from adamx.storage.choice import stored
from adamx.storage.masters import masters
from adamx.storage.moments import moments
from adamx.storage.packed8 import packed8, ratio_bound
from adamx.storage.packed16 import packed16
from adamx.storage.storage import Storage
from adamx.training import apply_updates, make_step
from adamx.transforms.adaptive_clip import adaptive_clip
from adamx.transforms.add_cautious_decayed_weights import add_cautious_decayed_weights
from adamx.transforms.add_decayed_weights import add_decayed_weights
from adamx.transforms.additive_average_of_squares import additive_average_of_squares
from adamx.transforms.atan2_scaling import atan2_scaling
from adamx.transforms.averages_of_params import ema_of_params, mean_of_params
from adamx.transforms.bias_correction import bias_correction
from adamx.transforms.cautious import cautious
from adamx.transforms.clip_by_global_norm import clip_by_global_norm
from adamx.transforms.clip_by_norm import clip_by_norm
from adamx.transforms.clip_by_rms import clip_by_rms
from adamx.transforms.clip_by_value import clip_by_value
from adamx.transforms.clip_by_zscore import clip_by_zscore
from adamx.transforms.clip_to_history import clip_to_history
from adamx.transforms.decaying_max import decaying_max
from adamx.transforms.delayed_rms_scaling import delayed_rms_scaling
from adamx.transforms.deviation import deviation
from adamx.transforms.difference import difference
from adamx.transforms.ema import ema
from adamx.transforms.ema_of_mean_squares import ema_of_mean_squares
from adamx.transforms.ema_of_squares import ema_of_squares
from adamx.transforms.extrapolation import extrapolation
from adamx.transforms.factored_ema_of_squares import factored_ema_of_squares
from adamx.transforms.growing_clip import growing_clip
from adamx.transforms.half_life_schedule import half_life_schedule
from adamx.transforms.hyperball import hyperball
from adamx.transforms.interpolated_ema import interpolated_ema
from adamx.transforms.keep_norm import keep_norm
from adamx.transforms.nesterov_ema import nesterov_ema
from adamx.transforms.orthogonalized import orthogonalized
from adamx.transforms.power_decay_schedule import power_decay_schedule
from adamx.transforms.ratio import ratio
from adamx.transforms.rectified import rectified
from adamx.transforms.rms_scaling import rms_scaling
from adamx.transforms.running_max import running_max
from adamx.transforms.scale import scale
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate
from adamx.transforms.scale_by_param_block_rms import scale_by_param_block_rms
from adamx.transforms.scale_by_path import scale_by_path
from adamx.transforms.scale_by_shape import scale_by_shape
from adamx.transforms.schedule_free import schedule_free, schedule_free_eval_params
from adamx.transforms.scheduled_nesterov_ema import scheduled_nesterov_ema
from adamx.transforms.seeded_ema_of_squares import seeded_ema_of_squares
from adamx.transforms.set_to_zero import set_to_zero
from adamx.transforms.sign import sign
from adamx.transforms.sum_of_squares import sum_of_squares
from adamx.transforms.trace import trace
from adamx.transforms.trust_ratio import trust_ratio
from adamx.transforms.update_clipping import update_clipping
from adamx.wrappers.accumulate import accumulate
from adamx.wrappers.by_path import by_path
from adamx.wrappers.in_shard_map import in_shard_map
from adamx.wrappers.master_weights import master_weights
from adamx.wrappers.monitor import monitor, statistics
from adamx.wrappers.skip_nonfinite import skip_nonfinite
from adamx.wrappers.skip_spikes import skip_spikes

__version__ = "0.1.0"

if not _TYPE_CHECKING:  # a type checker knows that there are no other names
    __getattr__ = _missing

__all__ = [
    "Adaptation",
    "Audit",
    "Comparison",
    "LeafStep",
    "PrecisionWarning",
    "ShardWarning",
    "Step",
    "Storage",
    "Summary",
    "Transformation",
    "WidthRules",
    "Wrapper",
    "accumulate",
    "adabelief",
    "adafactor",
    "adagrad",
    "adam",
    "adam_atan2",
    "adam_mini",
    "adamax",
    "adamaxw",
    "adamc",
    "adamw",
    "adamw_independent",
    "adan",
    "adapt_state",
    "adaptive_clip",
    "add_cautious_decayed_weights",
    "add_decayed_weights",
    "additive_average_of_squares",
    "ademamix",
    "adjustable",
    "adopt",
    "all_but",
    "amsgrad",
    "apply_updates",
    "as_pytree",
    "atan2_scaling",
    "audit",
    "bfloat16",
    "bias_correction",
    "by_path",
    "cautious",
    "cautious_adamw",
    "cautious_lion",
    "chain",
    "clip_by_global_norm",
    "clip_by_norm",
    "clip_by_rms",
    "clip_by_value",
    "clip_by_zscore",
    "clip_to_history",
    "combine",
    "compare",
    "decaying_max",
    "delayed_rms_scaling",
    "deviation",
    "difference",
    "ema",
    "ema_of_mean_squares",
    "ema_of_params",
    "ema_of_squares",
    "extrapolation",
    "factored_ema_of_squares",
    "from_dict",
    "from_optax",
    "from_torch",
    "growing_clip",
    "half_life_rule",
    "half_life_schedule",
    "hyperball",
    "identity",
    "in_shard_map",
    "interpolated_ema",
    "inverse_square_root_rule",
    "keep_norm",
    "lamb",
    "laprop",
    "layerwise_decay",
    "linear_rule",
    "lion",
    "make_step",
    "mars",
    "master_weights",
    "masters",
    "mean_of_params",
    "moments",
    "momentum",
    "monitor",
    "muon",
    "muon_adamw",
    "nadam",
    "nadamw",
    "named",
    "nesterov_ema",
    "normalized_weight_decay",
    "orthogonalized",
    "packed8",
    "packed16",
    "plot",
    "power_decay_schedule",
    "radam",
    "ratio",
    "ratio_bound",
    "rectified",
    "reset",
    "rms_scaling",
    "rmsprop",
    "running_max",
    "scale",
    "scale_by_adam",
    "scale_by_learning_rate",
    "scale_by_param_block_rms",
    "scale_by_path",
    "scale_by_rms",
    "scale_by_shape",
    "schedule_free",
    "schedule_free_adamw",
    "schedule_free_eval_params",
    "scheduled_nesterov_ema",
    "seeded_ema_of_squares",
    "set_to_zero",
    "sgd",
    "sgdw",
    "sign",
    "simplified_ademamix",
    "skip_nonfinite",
    "skip_spikes",
    "square_root_rule",
    "stable_adamw",
    "stacked",
    "state_sharding",
    "statistics",
    "stored",
    "sum_of_squares",
    "summary",
    "to_dict",
    "to_optax",
    "to_torch",
    "trace",
    "trust_ratio",
    "update_clipping",
    "width_rules",
    "yogi",
    "zeros",
]
