"""What Optax's names are called here, for the error in which one that adamx does not have ends."""

from __future__ import annotations

from typing import NoReturn

import optax

IN_ITS_PLACE = {
    "MultiSteps": "accumulate",
    "adaptive_grad_clip": "adaptive_clip",
    "apply_if_finite": "skip_nonfinite",
    "clip": "clip_by_value",
    "clip_by_block_rms": "clip_by_rms",
    "freeze": "by_path",
    "inject_hyperparams": "adjustable",
    "masked": "by_path",
    "multi_transform": "by_path",
    "named_chain": "chain",
    "partition": "by_path",
    "scale_by_trust_ratio": "trust_ratio",
}


def missing(name: str) -> NoReturn:
    """Raise AttributeError for a name that adamx does not have, and say where it is."""
    hint = ""
    if name in IN_ITS_PLACE:
        hint = f": adamx.{IN_ITS_PLACE[name]} takes its place, and optax.{name} works too"
    elif not name.startswith("_") and hasattr(optax, name):
        hint = f": use optax.{name}"
    raise AttributeError(f"module 'adamx' has no attribute {name!r}{hint}", name=name)
