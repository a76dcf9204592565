"""Steps on a sphere: each array keeps its norm, and the learning rate is an angle.

    w <- |w| (w - lr |w| u / |u|) / |w - lr |w| u / |u||,    |.| the norm over one array

    hyperball = chain(trust_ratio(), scale_by_learning_rate(lr), keep_norm())

A step at right angles to w turns it by arctan(lr), whatever the size of u and of w. A matrix before
a normalisation has no use for its norm, which weight decay and steps otherwise bring to a balance;
here there is no decay. Arrays that are zero stay zero, and those of which u is zero stay as they
are: biases and norms need another optimizer, by `by_path`. After the scaling of Adam this is AdamH:

    chain(scale_by_adam(), hyperball(lr))

After https://arxiv.org/abs/2606.16899, of which this file has the formula above.
"""

from __future__ import annotations

from adamx.core.chain import chain
from adamx.core.checks import Rate, checked
from adamx.transforms.keep_norm import keep_norm
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate
from adamx.transforms.trust_ratio import trust_ratio


@checked
def hyperball(learning_rate: Rate) -> chain:
    """Return the step that turns each array by an angle, in the place of `scale_by_learning_rate`.

    Args:
        learning_rate: a number, array or schedule, >= 0. It is the tangent of the angle by which a
            step at right angles turns an array.

    Raises:
        ValueError: if `learning_rate` is out of its range; at `update`, if it is called without
            params.

    Example:
        AdamH for matrices, and AdamW for the rest:

        >>> import adamx, jax.numpy as jnp
        >>> adamh = adamx.chain(adamx.scale_by_adam(), hyperball(0.5))
        >>> tx = adamx.by_path({"kernel": adamh}, default=adamx.adamw(1e-3))
        >>> params = {"kernel": jnp.array([[3.0, 4.0]]), "bias": jnp.zeros(2)}
        >>> grads = {"kernel": jnp.array([[-1.0, 1.0]]), "bias": jnp.ones(2)}
        >>> updates, _ = tx.update(grads, tx.init(params), params)
        >>> jnp.linalg.norm(params["kernel"] + updates["kernel"]).round(3)
        Array(5., dtype=float32)
    """
    return chain(trust_ratio(), scale_by_learning_rate(learning_rate), keep_norm())
