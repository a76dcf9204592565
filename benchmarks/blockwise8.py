"""A peer, not a part of adamx: Adam with block-wise 8-bit moments, written from the paper.

    stored = (index of the entry of a table nearest to x / s,  s = max |x| over a block of 256)

The table is the dynamic one: seven decades; the larger the decade, the more fraction bits. It is
signed for m, and unsigned for v. The update is computed from the moments before they are stored.

Source: Dettmers et al. (2022), 8-bit optimizers via block-wise quantization, sections 2.1 and 2.2,
https://arxiv.org/abs/2110.02861. Their library leaves arrays of fewer than 4096 elements in
float32; `min_size` does that here, and is 0 unless asked for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


def dynamic_table(signed: bool) -> np.ndarray:
    """Return the 256 numbers of the dynamic table, ascending, in [-1, 1] or [0, 1].

    Example:
        >>> table = dynamic_table(signed=False)
        >>> len(table), float(table[0]), float(table[-1])
        (256, 0.0, 1.0)
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        values += [*means, *(-means if signed else ())]
    return np.sort(np.array(values, np.float32))


class Quantized(NamedTuple):
    """An array in 8 bits.

    Attributes:
        codes: uint8, shaped [blocks, block].
        scales: the largest magnitude of each block, float32.
    """

    codes: jax.Array
    scales: jax.Array


class _State(NamedTuple):
    count: jax.Array
    mu: Any
    nu: Any


def scale_by_adam8(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, block: int = 256, min_size: int = 0
) -> optax.GradientTransformation:
    """Return Adam, without its learning rate, with moments in blocks of 8-bit codes.

    Args:
        b1: weight of the past in the average of gradients.
        b2: weight of the past in the average of squares.
        eps: added to the root.
        block: how many elements share a scale; the last block is filled up with zeros.
        min_size: arrays with fewer elements keep float32 moments.
    """
    signed, unsigned = dynamic_table(True), dynamic_table(False)

    def store(x: jax.Array, table: np.ndarray) -> Any:
        if x.size < min_size:
            return x
        blocks = jnp.pad(x.ravel(), (0, -x.size % block)).reshape(-1, block)
        scales = jnp.max(jnp.abs(blocks), axis=1, keepdims=True)
        ratios = blocks / jnp.where(scales > 0, scales, 1)
        codes = jnp.searchsorted((table[1:] + table[:-1]) / 2, ratios)
        return Quantized(codes.astype(jnp.uint8), scales)

    def load(stored: Any, table: np.ndarray, like: jax.Array) -> jax.Array:
        if not isinstance(stored, Quantized):
            return stored
        return (
            (jnp.asarray(table)[stored.codes] * stored.scales)
            .ravel()[: like.size]
            .reshape(like.shape)
        )

    def init(params: Any) -> _State:
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        mu, nu = (jax.tree.map(lambda x, t=t: store(x, t), zeros) for t in (signed, unsigned))
        return _State(jnp.zeros([], jnp.int32), mu, nu)

    def update(grads: Any, state: _State, params: Any = None) -> tuple[Any, _State]:
        del params
        leaves, treedef = jax.tree.flatten(grads)
        count, out, kept = state.count + 1, [], []
        columns = (treedef.flatten_up_to(state.mu), treedef.flatten_up_to(state.nu))
        for g, mu, nu in zip(leaves, *columns, strict=True):
            m = b1 * load(mu, signed, g) + (1 - b1) * g
            v = b2 * load(nu, unsigned, g) + (1 - b2) * g**2
            root = jnp.sqrt(v / (1 - b2**count)) + eps
            out.append((m / (1 - b1**count) / root).astype(g.dtype))
            kept.append((store(m, signed), store(v, unsigned)))
        mu, nu = (treedef.unflatten(column) for column in zip(*kept, strict=True))
        return treedef.unflatten(out), _State(count, mu, nu)

    return optax.GradientTransformation(init, update)


def adam8(learning_rate: optax.ScalarOrSchedule, **options: Any) -> optax.GradientTransformation:
    """Return Adam with 8-bit moments; the options are those of `scale_by_adam8`."""
    return optax.chain(
        scale_by_adam8(**options),
        optax.scale_by_learning_rate(learning_rate),
    )
