"""Learning rates by depth and width, as data for `adamx.scale_by_path`.

Layer-wise decay, for fine-tuning: layers near the input move less (BEiT, arXiv 2106.08254). With L
layers, layer i = 0, ..., L - 1 has the factor

    ratio^(L - i),    what comes before the layers ratio^(L + 1),    what comes after them 1

muP, for a width that grows: the best learning rate of a narrow model is that of a wide one (Yang
and Hu and others, arXiv 2203.03466, Table 3). With r the fan-in divided by the narrow model's, and
q the fan-out divided by its,

    leaf                                 rate of Adam    rate of SGD    standard deviation at first
    from finite to wide, and vectors     1               q              1
    from wide to wide                    1 / r           1              1 / sqrt(r)
    from wide to finite                  1 / r           1 / r          1 / r

Another batch size, k times as large:

    linear rule, for SGD                lr' = k lr           Goyal et al., arXiv 1706.02677
    square-root rule, for Adam          lr' = sqrt(k) lr     Malladi et al., arXiv 2205.10287
    half-life in tokens, for b1 and b2  b' = b^k             Marek et al., arXiv 2507.07101
    inverse square root, for eps        eps' = eps / sqrt(k) Malladi et al.

For a run of another number of tokens, a batch may be counted as its part of the run: Marin's recipe
for AdamH takes k = (B' / T') / (B / T) for the rate and eps, and the batches alone for b2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp

from adamx.core import paths
from adamx.core.checks import DECAY, NonNegative, Positive, Scalar, checked
from adamx.core.paths import Pattern


def layerwise_decay(
    params: Any,
    ratio: float,
    *,
    layer: str = "",
    stacked: Pattern | None = None,
    before: Sequence[Pattern] = (),
) -> dict[str, Any]:
    r"""Return the factor of each leaf's learning rate, by its layer.

    Args:
        params: any pytree of arrays, or of their shapes.
        ratio: the ratio of the rates of two neighbouring layers, in (0, 1].
        layer: a regular expression, matched against the start of a leaf's path, whose one group is
            the number of its layer, counted from the input.
        stacked: a pattern of the leaves that hold all layers along their first axis. Give either
            `layer` or `stacked`.
        before: patterns of what comes before the first layer, such as an embedding.

    Returns:
        A dict for `scale_by_path`: by path, a float, or for stacked leaves an array that broadcasts
        to the leaf, with one number for each layer.

    Raises:
        ValueError: if `ratio` is outside (0, 1], if not exactly one of `layer` and `stacked` is
            given, if `layer` has not exactly one group, if no leaf is in a layer, if stacked leaves
            have different numbers of layers, or if a pattern in `before` matches no leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> w = jnp.ones(2)
        >>> params = {"embed": w, "layers": [w, w], "head": w}
        >>> layerwise_decay(params, 0.5, layer=r"layers/(\d+)", before=["embed"])
        {'embed': 0.125, 'head': 1.0, 'layers/0': 0.25, 'layers/1': 0.5}
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"layerwise_decay: ratio must be in (0, 1], got {ratio!r}")
    if bool(layer) == (stacked is not None):
        raise ValueError("layerwise_decay: give either layer, a regular expression, or stacked")
    if layer and re.compile(layer).groups != 1:
        raise ValueError(f"layerwise_decay: layer must have one group, the number, got {layer!r}")
    paths.check_all_used("layerwise_decay", before, params)
    leaves = paths.leaves_by_path(params)
    if layer:
        found = {path: re.match(layer, path) for path in leaves}
        numbers = {path: int(match[1]) for path, match in found.items() if match}
        layers = {max(numbers.values()) + 1} if numbers else set()
    else:
        numbers = {path: None for path in leaves if paths.matches(stacked, path)}  # pyright: ignore
        layers = {leaves[path].shape[0] for path in numbers}
    if len(layers) != 1:
        what = f"layers of different numbers, {sorted(layers)}" if layers else "no leaf in a layer"
        raise ValueError(f"layerwise_decay: found {what}, among {list(leaves)[:6]}")
    (last,) = layers
    factors: dict[str, Any] = {}
    for path, leaf in leaves.items():
        if path not in numbers:
            first = any(paths.matches(pattern, path) for pattern in before)
            factors[path] = float(ratio ** (last + 1)) if first else 1.0
        elif (number := numbers[path]) is not None:
            factors[path] = float(ratio ** (last - number))
        else:
            each = jnp.asarray([ratio ** (last - i) for i in range(last)], jnp.float32)
            factors[path] = each.reshape(last, *(1 for _ in leaf.shape[1:]))
    return factors


class WidthRules(NamedTuple):
    """What muP changes in a model that is wider than another: by path, factors of the narrow one's.

    Attributes:
        adam: of the learning rate of Adam, AdamW and others whose step has the size of the rate.
        sgd: of the learning rate of SGD and momentum.
        init: of the standard deviation at the start, where the narrow model has its own.

    Example:
        >>> import jax.numpy as jnp
        >>> width_rules({"scale": jnp.ones(64)}, {"scale": jnp.ones(256)})
        WidthRules(adam={'scale': 1.0}, sgd={'scale': 4.0}, init={'scale': 1.0})
    """

    adam: dict[str, float]
    sgd: dict[str, float]
    init: dict[str, float]


def width_rules(base: Any, params: Any) -> WidthRules:
    """Return the factors of muP for a model, from its shapes and those of a narrow one.

    An axis is wide where the two models differ. Of two wide axes the first is the fan-in, as in
    JAX's kernels [in, out], [in, heads, size] and [heads, size, out]; of three, two are the heads
    and their size, and the fan-in grows as the third. A leaf with one wide axis leads from a finite
    size to a wide one, as embeddings, biases and scales do, if that is its last axis or the leaf is
    named "bias", as one for [heads, size] is; otherwise from a wide to a finite one, as the last
    kernel of a network does.

    The factor of the start is against the narrow model's standard deviation: keep that, or start
    from a library's rule 1 / sqrt(fan_in), which already is right for all but the last kernel.
    Attention has to be divided by the size of a head, and not by its root, where that grows.

    Args:
        base: the narrow model's parameters, or their shapes.
        params: the wide model's, of the same tree.

    Raises:
        ValueError: if the trees differ, or a leaf has another number of axes.

    Example:
        >>> import jax
        >>> def shapes(width):
        ...     sizes = {"embed": (50, width), "dense": (width, width), "head": (width, 10)}
        ...     return {k: jax.ShapeDtypeStruct(v, "float32") for k, v in sizes.items()}
        >>> rules = width_rules(shapes(64), shapes(256))
        >>> rules.adam
        {'dense': 0.25, 'embed': 1.0, 'head': 0.25}
        >>> rules.sgd
        {'dense': 1.0, 'embed': 4.0, 'head': 0.25}
        >>> rules.init
        {'dense': 0.5, 'embed': 1.0, 'head': 0.25}
    """
    narrow, wide = paths.leaves_by_path(base), paths.leaves_by_path(params)
    if differing := sorted(narrow.keys() ^ wide.keys()):
        raise ValueError(f"width_rules: only one of the models has {differing[:4]}")
    rules = {path: _rules(path, narrow[path].shape, x.shape) for path, x in wide.items()}
    return WidthRules(*({path: own[i] for path, own in rules.items()} for i in range(3)))


def _rules(path: str, base: tuple[int, ...], shape: tuple[int, ...]) -> tuple[float, float, float]:
    if len(base) != len(shape):
        raise ValueError(
            f"width_rules: leaf {path!r} has the shapes {list(base)} and {list(shape)}: a model "
            "grows in the sizes of its axes"
        )
    axes = [i for i, (a, b) in enumerate(zip(base, shape, strict=True)) if a != b]
    if not axes:
        return 1.0, 1.0, 1.0
    ratios = [shape[i] / base[i] for i in axes]
    ratio = ratios[0] if len(axes) < 3 else max(ratios, key=lambda x: abs(math.log(x)))
    if path.rpartition("/")[2] == "bias":
        return 1.0, math.prod(ratios), 1.0
    if len(axes) > 1:
        return 1 / ratio, 1.0, 1 / math.sqrt(ratio)
    if axes[0] == len(shape) - 1:
        return 1.0, ratio, 1.0
    return 1 / ratio, 1 / ratio, 1 / ratio


@checked
def linear_rule(
    learning_rate: NonNegative, *, batch_size: Positive, new_batch_size: Positive
) -> Scalar:
    """Return learning_rate * new_batch_size / batch_size, SGD's learning rate for another batch.

    k steps on small batches and one on a batch k times as large then go equally far, as long as the
    gradient hardly changes on the way. The source trains ResNet-50 so from 256 up to 8192 images,
    with a warm-up, and not beyond.

    Args:
        learning_rate: the rate at `batch_size`, >= 0. 1.0 gives the factor of a schedule.
        batch_size: the examples or tokens in a step, > 0.
        new_batch_size: those in a step of the other training, > 0, in the same unit.

    Returns:
        The learning rate at `new_batch_size`.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> linear_rule(0.5, batch_size=256, new_batch_size=1024)
        2.0
    """
    return learning_rate * (new_batch_size / batch_size)


@checked
def square_root_rule(
    learning_rate: NonNegative, *, batch_size: Positive, new_batch_size: Positive
) -> Scalar:
    """Return learning_rate * sqrt(new_batch_size / batch_size), Adam's rate for another batch.

    Adam divides the gradient by its size, which is noise for the most part: a batch k times as
    large has noise that is sqrt(k) times as small. Once the noise is small beside the gradient, as
    it is in large batches, the rule asks for too much. The source changes b1 and b2 as well, in
    proportion to k in 1 - b; `half_life_rule` is nearly that for a b near 1.

    Args:
        learning_rate: the rate at `batch_size`, >= 0. 1.0 gives the factor of a schedule.
        batch_size: the examples or tokens in a step, > 0.
        new_batch_size: those in a step of the other training, > 0, in the same unit.

    Returns:
        The learning rate at `new_batch_size`.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> square_root_rule(0.5, batch_size=256, new_batch_size=1024)
        1.0
    """
    return learning_rate * (new_batch_size / batch_size) ** 0.5


@checked
def inverse_square_root_rule(
    eps: NonNegative, *, batch_size: Positive, new_batch_size: Positive
) -> Scalar:
    """Return eps / sqrt(new_batch_size / batch_size), Adam's eps for another batch.

    eps has the unit of the gradient, and most of a gradient is noise, which is 1 / sqrt(k) times as
    large in a batch k times as large. The rule keeps the ratio of the two. It belongs to
    `square_root_rule`.

    Args:
        eps: the number at `batch_size`, >= 0.
        batch_size: the examples or tokens in a step, > 0.
        new_batch_size: those in a step of the other training, > 0, in the same unit.

    Returns:
        The eps at `new_batch_size`.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> inverse_square_root_rule(0.5, batch_size=256, new_batch_size=1024)
        0.25
    """
    return eps * (batch_size / new_batch_size) ** 0.5


@checked
def half_life_rule(
    decay: Annotated[Scalar, DECAY], *, batch_size: Positive, new_batch_size: Positive
) -> Scalar:
    """Return decay ** (new_batch_size / batch_size), which forgets as much in as many tokens.

    The half-life of an average with decay b is ln(1/2) / ln(b) steps, so batch_size times that in
    tokens. The source keeps that of b2 and so trains language models down to a batch of one; a
    decay of a batch k times as large is soon near zero.

    Args:
        decay: b1 or b2 at `batch_size`, in [0, 1): a number.
        batch_size: the examples or tokens in a step, > 0.
        new_batch_size: those in a step of the other training, > 0, in the same unit.

    Returns:
        The decay at `new_batch_size`.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        One step in the place of two, of which each halves:

        >>> half_life_rule(0.5, batch_size=256, new_batch_size=512)
        0.25
    """
    return decay ** (new_batch_size / batch_size)
