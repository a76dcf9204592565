# pyright: reportUnnecessaryTypeIgnoreComment=true
"""What a type checker sees: pyright, which CI runs, fails if a line here means something else.

A mistake has the comment that silences it; where pyright no longer finds the mistake, the comment
is unnecessary, which is an error too.
"""

from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np

import adamx


class sign_of_ema(adamx.Transformation):
    decay: float
    scale: float = 1.0


assert_type(adamx.chain(adamx.ema(0.9)), adamx.chain)
assert_type(adamx.clip_by_global_norm(1.0), adamx.clip_by_global_norm)
assert_type(adamx.ema(0.9).replace(decay=0.5), adamx.ema)
assert_type(adamx.skip_nonfinite(adamx.sgd(0.1)), adamx.skip_nonfinite)
assert_type(adamx.by_path({"b": adamx.sgd(0.1)}, default=adamx.adam(0.1)), adamx.by_path)
assert_type(sign_of_ema(0.9, scale=2), sign_of_ema)
for rate in (1, 0.1, np.float32(0.1), np.array(0.1), jnp.float32(0.1), lambda step: 0.1):
    adamx.adamw(rate, moments="packed16")

# what a training loop holds keeps its type
Params = dict[str, jax.Array]


def loop(params: Params, grads: Params, tx: adamx.Transformation) -> None:
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
    assert_type(updates, Params)
    assert_type(state["count"], Any)
    assert_type(adamx.apply_updates(params, updates), Params)
    assert_type(adamx.make_step(tx)(params, state, grads), tuple[Params, dict[str, Any]])
    assert_type(adamx.moments(state, tx)["mu"], Any)
    assert_type(adamx.statistics(state)["learning_rate"], float)


adamx.chain(1.0, nonsense=3)  # pyright: ignore[reportCallIssue]
adamx.ema(0.9, nonsense=3)  # pyright: ignore[reportCallIssue]
adamx.ema("0.9")  # pyright: ignore[reportArgumentType]
sign_of_ema(0.9, other=1)  # pyright: ignore[reportCallIssue]
adamx.adamw(0.1, moments="packed17")  # pyright: ignore[reportArgumentType]
