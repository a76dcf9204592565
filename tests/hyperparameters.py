"""Every number that a public function takes, with the range that it has to be in."""

from typing import Any

import jax.numpy as jnp

import adamx

DECAY, POSITIVE, RATE, FINITE = "decay", "non-negative", "rate", "finite"
OPEN_DECAY, SCHEDULED_DECAY, SCHEDULED = "open decay", "scheduled decay", "scheduled"
SHARE, SCHEDULED_FRACTION = "share", "scheduled fraction"
ABOVE_0, UP_TO_INFINITY = "above 0", "up to infinity"

# every function of adamx that takes hyperparameters, with the range of each
HYPERPARAMETERS: dict[str, dict[str, str]] = {
    "adagrad": {"learning_rate": RATE, "initial_accumulator_value": POSITIVE, "eps": POSITIVE},
    "adam": {
        "learning_rate": RATE,
        "b1": SCHEDULED_DECAY,
        "b2": SCHEDULED_DECAY,
        "eps": POSITIVE,
        "eps_root": POSITIVE,
    },
    "adamw": {
        "learning_rate": RATE,
        "b1": SCHEDULED_DECAY,
        "b2": SCHEDULED_DECAY,
        "eps": POSITIVE,
        "eps_root": POSITIVE,
        "weight_decay": RATE,
    },
    "add_decayed_weights": {"weight_decay": RATE},
    "bias_correction": {"decay": SCHEDULED_DECAY},
    "ema": {"decay": SCHEDULED_DECAY, "initial": FINITE},
    "ema_of_squares": {"decay": SCHEDULED_DECAY, "initial": POSITIVE},
    "momentum": {"learning_rate": RATE, "decay": SCHEDULED_DECAY},
    "nesterov_ema": {"decay": SCHEDULED_DECAY},
    "rms_scaling": {"eps": POSITIVE, "eps_root": POSITIVE},
    "rmsprop": {
        "learning_rate": RATE,
        "decay": SCHEDULED_DECAY,
        "eps": POSITIVE,
        "initial_scale": POSITIVE,
        "momentum": SCHEDULED_FRACTION,
    },
    "scale": {"step_size": SCHEDULED},
    "scale_by_adam": {
        "b1": SCHEDULED_DECAY,
        "b2": SCHEDULED_DECAY,
        "eps": POSITIVE,
        "eps_root": POSITIVE,
    },
    "scale_by_learning_rate": {"learning_rate": RATE},
    "scale_by_rms": {"decay": SCHEDULED_DECAY, "eps": POSITIVE, "initial_scale": POSITIVE},
    "sgd": {"learning_rate": RATE, "momentum": SCHEDULED_FRACTION},
    "sum_of_squares": {"initial": POSITIVE},
    "trace": {"decay": SCHEDULED_FRACTION},
    "adamw_independent": {
        "learning_rate": POSITIVE,
        "b1": SCHEDULED_DECAY,
        "b2": SCHEDULED_DECAY,
        "eps": POSITIVE,
        "weight_decay": RATE,
        "multiplier": RATE,
    },
    "clip_by_global_norm": {"max_norm": UP_TO_INFINITY},
    "ema_of_params": {"decay": SCHEDULED_DECAY},
    # lion, adan, ademamix, adopt, sgdw, cautious
    "add_cautious_decayed_weights": {"weight_decay": RATE},
    "adan": {
        "learning_rate": RATE,
        "b1": SCHEDULED_DECAY,
        "b2": SCHEDULED_DECAY,
        "b3": SCHEDULED_DECAY,
        "eps": POSITIVE,
        "eps_root": POSITIVE,
        "weight_decay": RATE,
        "look_ahead": SCHEDULED,
    },
    "ademamix": {
        "learning_rate": RATE,
        "b1": SCHEDULED_DECAY,
        "b2": SCHEDULED_DECAY,
        "b3": SCHEDULED_DECAY,
        "alpha": SCHEDULED,
        "eps": POSITIVE,
        "eps_root": POSITIVE,
        "weight_decay": RATE,
    },
    "adopt": {"learning_rate": RATE, "b1": SCHEDULED_DECAY, "b2": SCHEDULED_DECAY, "eps": POSITIVE},
    "cautious": {"xi": POSITIVE},
    "cautious_adamw": {
        "learning_rate": RATE,
        "b1": SCHEDULED_DECAY,
        "b2": SCHEDULED_DECAY,
        "eps": POSITIVE,
        "eps_root": POSITIVE,
        "weight_decay": RATE,
    },
    "cautious_lion": {
        "learning_rate": RATE,
        "b1": SCHEDULED_DECAY,
        "b2": OPEN_DECAY,
        "weight_decay": RATE,
    },
    "delayed_rms_scaling": {"eps": POSITIVE},
    "extrapolation": {"factor": SCHEDULED},
    "growing_clip": {"power": POSITIVE},
    "interpolated_ema": {"blend": SCHEDULED_DECAY, "decay": OPEN_DECAY},
    "adam_atan2": {
        "learning_rate": RATE,
        "b1": SCHEDULED_DECAY,
        "b2": SCHEDULED_DECAY,
        "weight_decay": RATE,
        "a": POSITIVE,
        "b": POSITIVE,
    },
    "atan2_scaling": {"a": POSITIVE, "b": POSITIVE},
    "adamc": {
        "b1": SCHEDULED_DECAY,
        "learning_rate": RATE,
        "b2": SCHEDULED_DECAY,
        "eps": POSITIVE,
        "eps_root": POSITIVE,
        "weight_decay": RATE,
        "max_learning_rate": ABOVE_0,
    },
    "clip_by_norm": {"max_norm": POSITIVE},
    "mars": {
        "b1": DECAY,
        "learning_rate": RATE,
        "b2": SCHEDULED_DECAY,
        "eps": POSITIVE,
        "eps_root": POSITIVE,
        "weight_decay": RATE,
        "gamma": POSITIVE,
    },
    "simplified_ademamix": {
        "b1": SCHEDULED_FRACTION,
        "learning_rate": RATE,
        "b2": SCHEDULED_DECAY,
        "eps": POSITIVE,
        "eps_root": POSITIVE,
        "weight_decay": RATE,
        "alpha": SCHEDULED,
    },
    "hyperball": {"learning_rate": RATE},
    "laprop": {
        "learning_rate": RATE,
        "b1": SCHEDULED_DECAY,
        "b2": SCHEDULED_DECAY,
        "eps": POSITIVE,
        "eps_root": POSITIVE,
        "weight_decay": RATE,
    },
    "lion": {"learning_rate": RATE, "b1": SCHEDULED_DECAY, "b2": OPEN_DECAY, "weight_decay": RATE},
    "seeded_ema_of_squares": {"decay": SCHEDULED_DECAY},
    "sgdw": {"learning_rate": RATE, "momentum": SCHEDULED_FRACTION, "weight_decay": RATE},
    # other denominators and second moments
    "adabelief": {"b1": SCHEDULED_DECAY, "b2": DECAY}
    | {"learning_rate": RATE, "eps": POSITIVE, "eps_root": POSITIVE},
    "adamax": {
        "learning_rate": RATE,
        "b1": SCHEDULED_DECAY,
        "b2": SCHEDULED_DECAY,
        "eps": POSITIVE,
    },
    "adamaxw": dict.fromkeys(("b1", "b2"), SCHEDULED_DECAY)
    | {"learning_rate": RATE, "eps": POSITIVE, "weight_decay": RATE},
    "additive_average_of_squares": {"decay": SCHEDULED_DECAY, "initial": POSITIVE},
    "amsgrad": dict.fromkeys(("b1", "b2"), SCHEDULED_DECAY)
    | {"learning_rate": RATE, "eps": POSITIVE, "eps_root": POSITIVE},
    "decaying_max": {"decay": SCHEDULED_DECAY, "eps": POSITIVE},
    "nadam": dict.fromkeys(("b1", "b2"), SCHEDULED_DECAY)
    | {"learning_rate": RATE, "eps": POSITIVE, "eps_root": POSITIVE},
    "nadamw": dict.fromkeys(("b1", "b2"), SCHEDULED_DECAY)
    | {"learning_rate": RATE, "eps": POSITIVE, "eps_root": POSITIVE, "weight_decay": RATE},
    "radam": {"b1": SCHEDULED_DECAY, "b2": DECAY}
    | {"learning_rate": RATE, "eps": POSITIVE, "eps_root": POSITIVE, "threshold": POSITIVE},
    "rectified": {"decay": DECAY, "threshold": POSITIVE},
    "scheduled_nesterov_ema": {"decay": DECAY, "momentum_decay": POSITIVE},
    "yogi": {"learning_rate": RATE, "b1": SCHEDULED_DECAY, "b2": SCHEDULED_DECAY, "eps": POSITIVE},
    # clips, ratios and blocks
    "adafactor": {
        "learning_rate": RATE,
        "decay_rate": POSITIVE,
        "decay_offset": FINITE,
        "clipping_threshold": POSITIVE,
        "momentum": SCHEDULED_DECAY,
        "weight_decay_rate": RATE,
        "eps": POSITIVE,
    },
    "adam_mini": {
        "learning_rate": RATE,
        "b1": SCHEDULED_DECAY,
        "b2": SCHEDULED_DECAY,
        "eps": POSITIVE,
        "weight_decay": RATE,
    },
    "adaptive_clip": {"clipping": POSITIVE, "eps": POSITIVE},
    "clip_by_rms": {"threshold": POSITIVE},
    "clip_by_zscore": {"sigma": POSITIVE, "decay": SCHEDULED_DECAY},
    "clip_to_history": {"factor": POSITIVE, "decay": SCHEDULED_DECAY},
    "clip_by_value": {"max_delta": POSITIVE},
    "ema_of_mean_squares": {"decay": SCHEDULED_DECAY},
    "factored_ema_of_squares": {"decay": SCHEDULED_DECAY, "eps": POSITIVE},
    "muon": {
        "learning_rate": RATE,
        "beta": SCHEDULED_DECAY,
        "eps": POSITIVE,
        "weight_decay": RATE,
        "consistent_rms": POSITIVE,
    },
    "muon_adamw": {
        "learning_rate": RATE,
        "beta": SCHEDULED_DECAY,
        "eps": POSITIVE,
        "weight_decay": RATE,
        "adam_b1": SCHEDULED_DECAY,
        "adam_b2": SCHEDULED_DECAY,
        "adam_eps_root": POSITIVE,
        "adam_weight_decay": RATE,
        "adam_learning_rate": RATE,
        "consistent_rms": POSITIVE,
    },
    "orthogonalized": {"eps": POSITIVE},
    "scale_by_shape": {"consistent_rms": POSITIVE},
    "scale_by_param_block_rms": {"min_scale": POSITIVE},
    "lamb": {
        "learning_rate": RATE,
        "b1": SCHEDULED_DECAY,
        "b2": SCHEDULED_DECAY,
        "eps": POSITIVE,
        "eps_root": POSITIVE,
        "weight_decay": RATE,
    },
    "schedule_free": {"learning_rate": RATE, "b1": SHARE, "weight_lr_power": POSITIVE},
    "schedule_free_adamw": {
        "learning_rate": RATE,
        "b1": SHARE,
        "b2": SCHEDULED_DECAY,
        "eps": POSITIVE,
        "weight_decay": RATE,
        "weight_lr_power": POSITIVE,
    },
    "stable_adamw": {
        "learning_rate": RATE,
        "b1": SCHEDULED_DECAY,
        "b2": SCHEDULED_DECAY,
        "eps": POSITIVE,
        "weight_decay": RATE,
    },
    "trust_ratio": {"trust_coefficient": POSITIVE, "eps": POSITIVE},
    "update_clipping": {"decay": SCHEDULED_DECAY, "eps": POSITIVE},
    "packed8": {"bound": ABOVE_0},
    "skip_spikes": {"sigma": POSITIVE},
}
DERIVED = {
    ("adabelief", "eps_root"),
    ("adamc", "max_learning_rate"),
}  # what is kept is computed from it
DERIVED |= {("mars", "b1"), ("mars", "gamma")}
OPTIONAL = {("rmsprop", "momentum"), ("sgd", "momentum")}
OPTIONAL |= {("adafactor", "clipping_threshold"), ("adafactor", "momentum")}
OPTIONAL |= {("adafactor", "weight_decay_rate"), ("muon_adamw", "adam_learning_rate")}
OPTIONAL |= {(name, "consistent_rms") for name in ("muon", "muon_adamw", "scale_by_shape")}
OPTIONAL |= {("adamc", "max_learning_rate"), ("adan", "look_ahead"), ("sgdw", "momentum")}
SCHEDULES = {
    RATE, SCHEDULED_DECAY, SCHEDULED, SCHEDULED_FRACTION, OPEN_DECAY, UP_TO_INFINITY,
}  # fmt: skip

REQUIRED = ("learning_rate", "decay", "blend", "max_norm", "clipping", "threshold", "max_delta")


def build(function, **hyperparameters):
    required: dict[str, Any] = {name: 0.5 for name in REQUIRED if name in HYPERPARAMETERS[function]}
    if function in ("rms_scaling", "delayed_rms_scaling", "atan2_scaling"):
        required = {"second_moment": adamx.ema_of_squares(0.9)}
    if function == "rectified":
        required |= {"scaling": build("rms_scaling")}
    if function in ("muon", "muon_adamw", "orthogonalized", "scale_by_shape"):
        required |= {"axes": ()}  # any array
    if function == "muon_adamw":
        required["matrices"] = "*"
    if function == "adamc":
        required["max_learning_rate"] = 0.5
        required["learning_rate"] *= "max_learning_rate" not in hyperparameters  # no larger one
    if function == "packed8":
        required = {"inner": adamx.scale_by_adam(), "bound": 1.0}
    if function == "skip_spikes":
        required = {"tx": adamx.sgd(0.5)}
    if function == "cautious":
        required = {"inner": adamx.ema(0.9)}
    if function == "extrapolation":  # it reads what a difference keeps
        here = adamx.extrapolation(**hyperparameters)
        return adamx.combine(jnp.add, adamx.difference(), here)
    if function in ("update_clipping", "schedule_free"):
        required["inner"] = adamx.scale_by_rms()
    return getattr(adamx, function)(**(required | hyperparameters))
