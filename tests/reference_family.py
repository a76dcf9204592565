"""The younger members of the Adam family in float64 NumPy, written from their papers.

As in `reference`: each method acts on ONE array under given gradients, ``method(w, gradients, *,
learning_rate, ...) -> Trajectory``, all in float64, and guards no zero denominator that its source
does not guard. Where the paper, Optax and PyTorch differ, an argument of the method chooses, and
the default is what Optax does if it has the method. ``|g|`` and ``|g|^2`` are those of a complex
number. The sources that ask for the sign of an element, or clip it, have real numbers in mind;
their meaning for complex ones here is the same in every direction of the plane: ``sign(x)`` is
``x / |x|``, a clip limits ``|x|``, and two numbers agree in sign if ``Re(x conj(y))`` says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from reference import (
    LearningRate,
    Recorder,
    Trajectory,
    adam,
    bias_correction,
    decoupled,
    ema,
    one_minus_power,
    square,
    steps,
    widen,
)


def _corrected(m: np.ndarray, g: np.ndarray, b1: float, t: int, nesterov: bool) -> np.ndarray:
    """The numerator of Adam, or that of Nadam with a constant momentum."""
    if not nesterov:
        return m / one_minus_power(b1, t)
    return b1 * m / one_minus_power(b1, t + 1) + (1 - b1) * g / one_minus_power(b1, t)


# --- Other norms and other second moments --------------------------------------------------------


def adamax(
    w: ArrayLike, gradients: ArrayLike, *, learning_rate: LearningRate, b1: float = 0.9,
    b2: float = 0.999, eps: float = 1e-8,
) -> Trajectory:  # fmt: skip
    """AdaMax, Kingma & Ba 2015, Algorithm 2.

    ``nu_t = max(b2 nu_{t-1}, |g_t| + eps)``, ``w_t = w_{t-1} - lr / (1 - b1^t) mu_t / nu_t``. The
    paper has no eps; PyTorch and Optax have it where it stands here. Slots: ``mu``, ``nu``.
    """
    record, m, v = Recorder(w), 0.0, 0.0
    for t, g, lr in steps(gradients, learning_rate):
        m = b1 * m + (1 - b1) * g
        v = np.maximum(b2 * v, np.abs(g) + eps)
        record.add(-lr * m / one_minus_power(b1, t) / v, mu=m, nu=v)
    return record.trajectory()


def adamaxw(
    w: ArrayLike, gradients: ArrayLike, *, learning_rate: LearningRate, weight_decay: float,
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8,
) -> Trajectory:  # fmt: skip
    """`adamax` with the decoupled decay of Loshchilov & Hutter 2019, as in Optax."""
    plain = adamax(w, gradients, learning_rate=1.0, b1=b1, b2=b2, eps=eps)
    return decoupled(w, plain, learning_rate, weight_decay)


def nadam(
    w: ArrayLike, gradients: ArrayLike, *, learning_rate: LearningRate, b1: float = 0.9,
    b2: float = 0.999, eps: float = 1e-8, eps_root: float = 0.0,
    momentum_decay: float = 0.004, average: Literal["constant", "scheduled"] = "constant",
    product_type: type[np.floating[Any]] = np.float64,
) -> Trajectory:  # fmt: skip
    """Nadam with its momentum schedule, Dozat 2016, Algorithm 2.

    ``mu_t = b1 (1 - 0.5 * 0.96^(t momentum_decay))``; the numerator is ``mu_{t+1} m_t /
    (1 - mu_1 ... mu_{t+1}) + (1 - mu_t) g_t / (1 - mu_1 ... mu_t)`` over `adam`'s denominator. In
    PyTorch m_t is the average with the constant decay b1; in the paper ("scheduled") it is
    ``mu_t m_{t-1} + (1 - mu_t) g_t``. Optax has no schedule: `reference.adam(nesterov=True)`.
    PyTorch keeps the product of the mu's in float32, whatever the parameter (product_type).
    Slots: ``mu``, ``nu``.
    """

    def momentum(t: int) -> float:
        return b1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))

    record, m, v, kept = Recorder(w), 0.0, 0.0, product_type(1.0)
    for t, g, lr in steps(gradients, learning_rate):
        decay = b1 if average == "constant" else momentum(t)
        m = decay * m + (1 - decay) * g
        v = b2 * v + (1 - b2) * square(g)
        kept = kept * product_type(momentum(t))
        product = float(kept)
        ahead = momentum(t + 1) * m / (1 - product * momentum(t + 1))
        m_hat = ahead + (1 - momentum(t)) * g / (1 - product)
        v_hat = v / one_minus_power(b2, t)
        record.add(-lr * m_hat / (np.sqrt(v_hat + eps_root) + eps), mu=m, nu=v)
    return record.trajectory()


def nadamw(
    w: ArrayLike, gradients: ArrayLike, *, learning_rate: LearningRate, weight_decay: float,
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, eps_root: float = 0.0,
    momentum_decay: float = 0.004, average: Literal["constant", "scheduled"] = "constant",
    product_type: type[np.floating[Any]] = np.float64,
) -> Trajectory:  # fmt: skip
    """`nadam` with decoupled decay: PyTorch's NAdam with decoupled_weight_decay."""
    plain = nadam(
        w, gradients, learning_rate=1.0, b1=b1, b2=b2, eps=eps, eps_root=eps_root,
        momentum_decay=momentum_decay, average=average, product_type=product_type,
    )  # fmt: skip
    return decoupled(w, plain, learning_rate, weight_decay)


def amsgrad(
    w: ArrayLike, gradients: ArrayLike, *, learning_rate: LearningRate, b1: float = 0.9,
    b2: float = 0.999, eps: float = 1e-8, eps_root: float = 0.0,
    variant: Literal["optax", "torch", "paper"] = "optax",
) -> Trajectory:  # fmt: skip
    """AMSGrad, Reddi et al. 2018, Algorithm 2.

    ``nu_max_t = max(nu_max_{t-1}, x_t)`` takes the place of nu_t in Adam. "paper": x is the average
    of squares, and nothing is corrected (nor is there an eps). "torch": the same x, and nu_max and
    mu are corrected afterwards. "optax": x is the corrected average; mu is corrected.
    Slots: ``mu``, ``nu``, ``nu_max``.
    """
    record, m, v, largest = Recorder(w), 0.0, 0.0, 0.0
    for t, g, lr in steps(gradients, learning_rate):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * square(g)
        correction = one_minus_power(b2, t)
        largest = np.maximum(largest, v / correction if variant == "optax" else v)
        m_hat = m if variant == "paper" else m / one_minus_power(b1, t)
        second = largest / correction if variant == "torch" else largest
        update = -lr * m_hat / (np.sqrt(second + eps_root) + eps)
        record.add(update, mu=m, nu=v, nu_max=largest)
    return record.trajectory()


def adabelief(
    w: ArrayLike, gradients: ArrayLike, *, learning_rate: LearningRate, b1: float = 0.9,
    b2: float = 0.999, eps: float = 1e-16, eps_root: float = 1e-16, nesterov: bool = False,
) -> Trajectory:  # fmt: skip
    """AdaBelief, Zhuang et al. 2020, Algorithm 2.

    ``nu_t = b2 nu_{t-1} + (1 - b2) |g_t - mu_t|^2 + eps_root``, kept with its eps_root and then
    corrected and put in Adam's place. The paper's one epsilon is both eps and eps_root; Optax has
    the two, and the numerator of `reference.adam`'s Nadam if asked for. Slots: ``mu``, ``nu``.
    """
    record, m, v = Recorder(w), 0.0, 0.0
    for t, g, lr in steps(gradients, learning_rate):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * square(g - m) + eps_root
        m_hat, v_hat = _corrected(m, g, b1, t, nesterov), v / one_minus_power(b2, t)
        record.add(-lr * m_hat / (np.sqrt(v_hat) + eps), mu=m, nu=v)
    return record.trajectory()


def radam(
    w: ArrayLike, gradients: ArrayLike, *, learning_rate: LearningRate, b1: float = 0.9,
    b2: float = 0.999, eps: float = 1e-8, eps_root: float = 0.0, threshold: float = 5.0,
    strict: bool = False, eps_on: Literal["corrected", "raw"] = "corrected",
    nesterov: bool = False,
) -> Trajectory:  # fmt: skip
    """Rectified Adam, Liu et al. 2020, Algorithm 2.

    With ``rho_inf = 2 / (1 - b2) - 1``, ``rho_t = rho_inf - 2 t b2^t / (1 - b2^t)`` and
    ``r_t^2 = (rho_t - 4)(rho_t - 2) rho_inf / ((rho_inf - 4)(rho_inf - 2) rho_t)``: while rho_t is
    low, ``w_t = w_{t-1} - lr m^_t``; then ``w_{t-1} - lr r_t m^_t / (root of v^_t)``. Rectified if
    rho_t > 4 in the paper (threshold=4, strict), >= 5 in Optax, > 5 in PyTorch (strict). eps is
    added to ``sqrt(v^_t + eps_root)`` in Optax, to ``sqrt(v_t)`` before its correction in PyTorch
    ("raw"), and is missing in the paper. nesterov is Optax's, as in `adabelief`.
    Slots: ``mu``, ``nu``.
    """
    record, m, v = Recorder(w), 0.0, 0.0
    decay = Fraction(b2)  # exact: rho_1 is one, and large numbers cancel in the others
    rho_inf = 2 / (1 - decay) - 1
    for t, g, lr in steps(gradients, learning_rate):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * square(g)
        correction = one_minus_power(b2, t)
        u = _corrected(m, g, b1, t, nesterov)
        rho = rho_inf - 2 * t * decay**t / (1 - decay**t)
        if rho > threshold or (rho == threshold and not strict):
            r_squared = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
            if eps_on == "corrected":
                u = u / (np.sqrt(v / correction + eps_root) + eps)
            else:
                u = u * math.sqrt(correction) / (np.sqrt(v + eps_root) + eps)
            u = math.sqrt(float(r_squared)) * u
        record.add(-lr * u, mu=m, nu=v)
    return record.trajectory()


def yogi(
    w: ArrayLike, gradients: ArrayLike, *, learning_rate: LearningRate, b1: float = 0.9,
    b2: float = 0.999, eps: float = 1e-3, initial_mu: float = 1e-6, initial_nu: float = 1e-6,
    corrected: bool = True,
) -> Trajectory:  # fmt: skip
    """Yogi, Zaheer et al. 2018, Algorithm 2.

    ``nu_t = nu_{t-1} - (1 - b2) sign(nu_{t-1} - |g_t|^2) |g_t|^2`` in Adam's place. The paper
    corrects no bias and begins with mu = 0; Optax corrects both and begins with 1e-6 in both.
    Slots: ``mu``, ``nu``.
    """
    record, m, v = Recorder(w), initial_mu, initial_nu
    for t, g, lr in steps(gradients, learning_rate):
        m = b1 * m + (1 - b1) * g
        v = v - (1 - b2) * np.sign(v - square(g)) * square(g)
        m_hat = m / one_minus_power(b1, t) if corrected else m
        v_hat = v / one_minus_power(b2, t) if corrected else v
        record.add(-lr * m_hat / (np.sqrt(v_hat) + eps), mu=m, nu=v)
    return record.trajectory()


# --- Other momenta -------------------------------------------------------------------------------


def lion(
    w: ArrayLike, gradients: ArrayLike, *, learning_rate: LearningRate, b1: float = 0.9,
    b2: float = 0.99, weight_decay: float = 0.0,
) -> Trajectory:  # fmt: skip
    """Lion, Chen et al. 2023, Algorithm 2.

    ``u_t = sign(b1 mu_{t-1} + (1 - b1) g_t)`` from the old average, then ``mu_t = b2 mu_{t-1} +
    (1 - b2) g_t``; ``w_t = w_{t-1} - lr (u_t + weight_decay w_{t-1})``. Slot: ``mu``.
    """
    record, m = Recorder(w), np.zeros_like(widen(w))
    for _, g, lr in steps(gradients, learning_rate):
        u = np.sign(b1 * m + (1 - b1) * g)
        m = b2 * m + (1 - b2) * g
        record.add(-lr * (u + weight_decay * record.w), mu=m)
    return record.trajectory()


def adan(
    w: ArrayLike, gradients: ArrayLike, *, learning_rate: LearningRate, b1: float = 0.98,
    b2: float = 0.92, b3: float = 0.99, eps: float = 1e-8, eps_root: float = 1e-8,
    weight_decay: float = 0.0, look_ahead: Literal["optax", "paper"] = "optax",
    proximal: bool = False,
) -> Trajectory:  # fmt: skip
    """Adan, Xie et al. 2022, Algorithm 1, with the bias corrections of the authors' code.

    With ``d_t = g_t - g_{t-1}``, ``d_1 = 0`` and decays that are one minus the paper's betas:
    ``mu_t``, ``delta_t``, ``nu_t`` are the averages of ``g_t`` (b1), ``d_t`` (b2) and
    ``|g_t + a d_t|^2`` (b3); ``u_t = (mu^_t + a delta^_t) / (sqrt(nu^_t + eps_root) + eps)``. a is
    the paper's ``1 - beta_2``, which is b2 here and in the authors' code ("paper"); Optax 0.2.8
    takes 1 - b2. Decay: ``w_{t-1} - lr (u_t + weight_decay w_{t-1})`` in Optax,
    ``(w_{t-1} - lr u_t) / (1 + lr weight_decay)`` in the paper (proximal).
    Slots: ``mu``, ``delta``, ``nu``, ``previous`` (the gradient).
    """
    record, m, d, v, previous = Recorder(w), 0.0, 0.0, 0.0, None
    a = b2 if look_ahead == "paper" else 1 - b2
    for t, g, lr in steps(gradients, learning_rate):
        change = np.zeros_like(g) if previous is None else g - previous
        m = b1 * m + (1 - b1) * g
        d = b2 * d + (1 - b2) * change
        v = b3 * v + (1 - b3) * square(g + a * change)
        previous = g
        m_hat = m / one_minus_power(b1, t) + a * d / one_minus_power(b2, t)
        v_hat = v / one_minus_power(b3, t)
        u = m_hat / (np.sqrt(v_hat + eps_root) + eps)
        update = -lr * (u + weight_decay * record.w)
        if proximal:
            update = (record.w - lr * u) / (1 + lr * weight_decay) - record.w
        record.add(update, mu=m, delta=d, nu=v, previous=g)
    return record.trajectory()


def ademamix(
    w: ArrayLike, gradients: ArrayLike, *, learning_rate: LearningRate, b1: float = 0.9,
    b2: float = 0.999, b3: float | Sequence[float] = 0.9999,
    alpha: float | Sequence[float] = 5.0, eps: float = 1e-8, eps_root: float = 0.0,
    weight_decay: float = 0.0,
) -> Trajectory:  # fmt: skip
    """AdEMAMix, Pagliardini et al. 2024, Algorithm 1.

    ``u_t = (mu^_t + alpha_t mu_slow_t) / (sqrt(nu^_t + eps_root) + eps)``, where the slow average
    ``mu_slow_t = b3_t mu_slow_{t-1} + (1 - b3_t) g_t`` is not corrected; alpha and b3 are one
    number or one per step. Decoupled decay. Slots: ``mu``, ``mu_slow``, ``nu``.
    """
    record, m, slow, v = Recorder(w), 0.0, 0.0, 0.0
    slow_decays = np.broadcast_to(widen(b3), len(widen(gradients)))
    weights = np.broadcast_to(widen(alpha), len(widen(gradients)))
    for t, g, lr in steps(gradients, learning_rate):
        decay = slow_decays[t - 1]
        m = b1 * m + (1 - b1) * g
        slow = decay * slow + (1 - decay) * g
        v = b2 * v + (1 - b2) * square(g)
        numerator = m / one_minus_power(b1, t) + weights[t - 1] * slow
        u = numerator / (np.sqrt(v / one_minus_power(b2, t) + eps_root) + eps)
        record.add(-lr * (u + weight_decay * record.w), mu=m, mu_slow=slow, nu=v)
    return record.trajectory()


def ademamix_alpha(t: float, alpha: float, warmup: int) -> float:
    """``min(t / T, 1) alpha`` (Pagliardini et al. 2024, section 3)."""
    return min(t / warmup, 1.0) * alpha


def ademamix_b3(t: float, b3: float, b_start: float, warmup: int) -> float:
    """``min(exp(ln b_start ln b3 / ((1 - t/T) ln b3 + t/T ln b_start)), b3)``, as `alpha`.

    The half-life ``ln 0.5 / ln b`` then grows linearly from that of b_start to that of b3.
    """
    x, start, end = t / warmup, math.log(b_start), math.log(b3)
    return min(math.exp(start * end / ((1 - x) * end + x * start)), b3) if x < 1 else b3


def adopt(
    w: ArrayLike, gradients: ArrayLike, *, learning_rate: LearningRate, b1: float = 0.9,
    b2: float = 0.9999, eps: float = 1e-6, clipped: bool = True,
) -> Trajectory:  # fmt: skip
    """ADOPT, Taniguchi et al. 2024, Algorithm 2, or Algorithm 1 without clipping.

    The first gradient only makes ``nu_1 = |g_1|^2``. From the second on, with the old nu,
    ``n_t = g_t / max(sqrt(nu_{t-1}), eps)``, clipped to ``+-(t - 1)^(1/4)`` element by element
    (the paper numbers the first gradient 0), ``mu_t = b1 mu_{t-1} + (1 - b1) n_t``,
    ``w_t = w_{t-1} - lr mu_t``, and then ``nu_t = b2 nu_{t-1} + (1 - b2) |g_t|^2``.
    Slots: ``mu``, ``nu``.
    """
    record, m, v = Recorder(w), 0.0, 0.0
    for t, g, lr in steps(gradients, learning_rate):
        if t == 1:
            m, v = 0.0 * g, square(g)
        else:
            normalised = g / np.maximum(np.sqrt(v), eps)
            if clipped:
                normalised = clip_by_value(normalised, (t - 1) ** 0.25)
            m = b1 * m + (1 - b1) * normalised
            v = b2 * v + (1 - b2) * square(g)
        record.add(-lr * m, mu=m, nu=v)
    return record.trajectory()


def adam_atan2(
    w: ArrayLike, gradients: ArrayLike, *, learning_rate: LearningRate, b1: float = 0.9,
    b2: float = 0.999, weight_decay: float = 0.0, a: float = 1.0, b: float = 1.0,
) -> Trajectory:  # fmt: skip
    """Adam-atan2, Everett et al. 2024.

    ``u_t = a atan2(mu^_t, b sqrt(nu^_t))`` with `adam`'s corrected averages; for a complex mu the
    angle of its magnitude, in its direction. Decoupled decay. Slots: ``mu``, ``nu``.
    """
    record, m, v = Recorder(w), 0.0, 0.0
    for t, g, lr in steps(gradients, learning_rate):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * square(g)
        m_hat, v_hat = m / one_minus_power(b1, t), v / one_minus_power(b2, t)
        length = np.abs(m_hat)
        direction = m_hat / np.where(length > 0, length, 1.0)
        u = a * direction * np.arctan2(length, b * np.sqrt(v_hat))
        record.add(-lr * (u + weight_decay * record.w), mu=m, nu=v)
    return record.trajectory()


def adamc(
    w: ArrayLike, gradients: ArrayLike, *, learning_rate: LearningRate, b1: float = 0.9,
    b2: float = 0.999, eps: float = 1e-8, eps_root: float = 0.0, weight_decay: float = 0.0,
    max_learning_rate: float | None = None,
) -> Trajectory:  # fmt: skip
    """AdamC, Defazio 2025, for an array that a normalisation follows: AdamW for a constant rate.

    ``w_t = w_{t-1} - lr_t (u_t + lr_t / max_learning_rate weight_decay w_{t-1})`` with `adam`'s
    u_t. Slots: ``mu``, ``nu``.
    """
    plain = adam(w, gradients, learning_rate=1.0, b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    record = Recorder(w)
    for t, u, lr in steps(-plain.updates, learning_rate):
        share = 1.0 if max_learning_rate is None else lr / max_learning_rate
        slots = {name: values[t - 1] for name, values in plain.slots.items()}
        record.add(-lr * u - lr * share * weight_decay * record.w, **slots)
    return record.trajectory()


def mars(
    w: ArrayLike, gradients: ArrayLike, *, learning_rate: LearningRate, b1: float = 0.95,
    b2: float = 0.99, eps: float = 1e-8, eps_root: float = 0.0, weight_decay: float = 0.0,
    gamma: float = 0.025, clipped: bool = True, first: Literal["none", "zero"] = "none",
) -> Trajectory:  # fmt: skip
    """MARS-AdamW in its approximate form, Yuan et al. 2024.

    ``c_t = g_t + gamma b1 / (1 - b1) (g_t - g_{t-1})``, divided by its norm where that is above
    one (clipped), then AdamW on c. The first difference is zero; in the authors' code ("zero") it
    is from zero. Slots: ``mu``, ``nu``, ``previous`` (the gradient).
    """
    record, m, v, previous = Recorder(w), 0.0, 0.0, None
    for t, g, lr in steps(gradients, learning_rate):
        if previous is None:
            previous = g if first == "none" else 0 * g
        c = g + gamma * b1 / (1 - b1) * (g - previous)
        previous = g
        if clipped:
            c = c / max(1.0, _norm(c))
        m = b1 * m + (1 - b1) * c
        v = b2 * v + (1 - b2) * square(c)
        m_hat, v_hat = m / one_minus_power(b1, t), v / one_minus_power(b2, t)
        u = m_hat / (np.sqrt(v_hat + eps_root) + eps)
        record.add(-lr * (u + weight_decay * record.w), mu=m, nu=v, previous=g)
    return record.trajectory()


def simplified_ademamix(
    w: ArrayLike, gradients: ArrayLike, *, learning_rate: LearningRate, b1: float = 0.99,
    b2: float = 0.95, alpha: float = 0.0, eps: float = 1e-8, eps_root: float = 0.0,
    weight_decay: float = 0.0,
) -> Trajectory:  # fmt: skip
    """Simplified AdEMAMix, Morwani et al. 2025, as in Optax.

    ``trace_t = b1 trace_{t-1} + g_t``, ``u_t = (trace_t + alpha g_t) / (root of nu^_t)`` with
    `adam`'s denominator. Decoupled decay. Slots: ``trace``, ``nu``.
    """
    record, m, v = Recorder(w), 0.0, 0.0
    for t, g, lr in steps(gradients, learning_rate):
        m = b1 * m + g
        v = b2 * v + (1 - b2) * square(g)
        u = (m + alpha * g) / (np.sqrt(v / one_minus_power(b2, t) + eps_root) + eps)
        record.add(-lr * (u + weight_decay * record.w), trace=m, nu=v)
    return record.trajectory()


def adamh(
    w: ArrayLike, gradients: ArrayLike, *, learning_rate: LearningRate, b1: float = 0.9,
    b2: float = 0.999, eps: float = 1e-8, kept: bool = True,
) -> Trajectory:  # fmt: skip
    """AdamH, after arXiv 2606.16899: `adam`'s direction u_t on the sphere of each array.

    ``x = w_{t-1} - lr |w_{t-1}| u_t / |u_t|``, ``w_t = |w_{t-1}| x / |x|``; not kept, x is w_t.
    Arrays and directions that are zero stay as they are. Slots: ``mu``, ``nu``.
    """
    plain = adam(w, gradients, learning_rate=1.0, b1=b1, b2=b2, eps=eps)
    record = Recorder(w)
    for t, u, lr in steps(-plain.updates, learning_rate):
        slots = {name: values[t - 1] for name, values in plain.slots.items()}
        length, of_u, new = _norm(record.w), _norm(u), record.w
        if length > 0 and of_u > 0:
            new = record.w - lr * length * u / of_u
            new = new * length / _norm(new) if kept else new
        record.add(new - record.w, **slots)
    return record.trajectory()


def laprop(
    w: ArrayLike, gradients: ArrayLike, *, learning_rate: LearningRate, b1: float = 0.9,
    b2: float = 0.999, eps: float = 1e-15, eps_root: float = 0.0, weight_decay: float = 0.0,
    rate: Literal["last", "averaged"] = "last", corrected: bool = True,
) -> Trajectory:  # fmt: skip
    """LaProp, Ziyin et al. 2020, Algorithm 1.

    ``nu_t = b2 nu_{t-1} + (1 - b2) |g_t|^2`` and ``mu_t = b1 mu_{t-1} + (1 - b1) g_t /
    (sqrt(nu_t / (1 - b2^t) + eps_root) + eps)``; the step is ``-lr mu_t / (1 - b1^t)``. The
    authors' code averages ``lr_t`` times that ("averaged"). corrected=False leaves nu as it is.
    Decoupled decay as in AdamW. Slots: ``mu``, ``nu``.
    """
    record, m, v = Recorder(w), 0.0, 0.0
    for t, g, lr in steps(gradients, learning_rate):
        v = b2 * v + (1 - b2) * square(g)
        second = v / one_minus_power(b2, t) if corrected else v
        inside = lr if rate == "averaged" else 1.0
        m = b1 * m + (1 - b1) * inside * g / (np.sqrt(second + eps_root) + eps)
        u = m / one_minus_power(b1, t) * (lr / inside)
        record.add(-u - lr * weight_decay * record.w, mu=m, nu=v)
    return record.trajectory()


# --- Caution -------------------------------------------------------------------------------------


def cautious(
    u: np.ndarray, g: np.ndarray, rescale: Literal["count", "mean"] = "count"
) -> np.ndarray:
    """The mask of Liang et al. 2024 on one array's direction u, given its gradient.

    ``phi = [u g > 0]``; ``u phi d / (k + 1)`` with d elements of which k are kept ("count", the
    paper's alpha); "mean" is the authors' code, ``u phi / max(mean(phi), 1e-3)``.
    """
    kept = np.real(u * np.conj(g)) > 0
    k, d = np.sum(kept), u.size
    return u * kept * (d / (k + 1) if rescale == "count" else 1 / max(k / d, 1e-3))


def _cautiously(
    w: ArrayLike, gradients: ArrayLike, plain: Trajectory, rate: LearningRate, weight_decay: float,
    rescale: Literal["count", "mean"], decay_last: bool,
) -> Trajectory:  # fmt: skip
    """Decoupled decay of w, and the cautious form of the steps -u_t that ``plain`` took."""
    record = Recorder(w)
    for t, g, lr in steps(gradients, rate):
        step = -lr * cautious(-plain.updates[t - 1], g, rescale)
        decayed = record.w + step if decay_last else record.w
        slots = {name: values[t - 1] for name, values in plain.slots.items()}
        record.add(step - lr * weight_decay * decayed, **slots)
    return record.trajectory()


def cautious_adamw(
    w: ArrayLike, gradients: ArrayLike, *, learning_rate: LearningRate, weight_decay: float,
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, eps_root: float = 0.0,
    rescale: Literal["count", "mean"] = "count", decay_last: bool = False,
) -> Trajectory:  # fmt: skip
    """C-AdamW, Liang et al. 2024: `cautious` on Adam's direction, and decoupled decay beside it.

    The decay is not masked. In AdamW it is of w_{t-1}; the authors' code decays what the step has
    left (decay_last), which differs by lr^2 weight_decay u_t. Slots: ``mu``, ``nu``.
    """
    plain = adam(w, gradients, learning_rate=1.0, b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    return _cautiously(w, gradients, plain, learning_rate, weight_decay, rescale, decay_last)


def cautious_lion(
    w: ArrayLike, gradients: ArrayLike, *, learning_rate: LearningRate, weight_decay: float,
    b1: float = 0.9, b2: float = 0.99, rescale: Literal["count", "mean"] = "count",
    decay_last: bool = False,
) -> Trajectory:  # fmt: skip
    """C-Lion, Liang et al. 2024: `cautious` on Lion's sign; the rest as `cautious_adamw`."""
    plain = lion(w, gradients, learning_rate=1.0, b1=b1, b2=b2)
    return _cautiously(w, gradients, plain, learning_rate, weight_decay, rescale, decay_last)


def cautious_decay(
    w: ArrayLike, plain: Trajectory, *, learning_rate: LearningRate, weight_decay: float
) -> Trajectory:
    """Cautious weight decay, Chen et al. 2025, around the steps -u_t that ``plain`` took.

    ``w_t = w_{t-1} - lr (u_t + weight_decay [u_t w_{t-1} >= 0] w_{t-1})``, element by element: an
    element is decayed where the step also leads it towards zero, and where there is no step.
    ``plain`` has the learning rate 1 and its u_t does not depend on w.
    """
    record = Recorder(w)
    for t, u, lr in steps(-plain.updates, learning_rate):
        decayed = np.where(np.real(u * np.conj(record.w)) >= 0, record.w, 0.0)
        slots = {name: values[t - 1] for name, values in plain.slots.items()}
        record.add(-lr * (u + weight_decay * decayed), **slots)
    return record.trajectory()


# --- Methods that read a whole array -------------------------------------------------------------


def _norm(x: np.ndarray) -> float:
    return math.sqrt(np.sum(square(x)))


def _rms(x: np.ndarray) -> float:
    return math.sqrt(np.mean(square(x)))


def lamb(
    w: ArrayLike, gradients: ArrayLike, *, learning_rate: LearningRate, b1: float = 0.9,
    b2: float = 0.999, eps: float = 1e-6, eps_root: float = 0.0, weight_decay: float = 0.0,
) -> Trajectory:  # fmt: skip
    """LAMB, You et al. 2020, Algorithm 2, with phi the identity.

    ``w_t = w_{t-1} - lr ||w_{t-1}|| / ||x_t|| x_t`` with ``x_t = u_t + weight_decay w_{t-1}`` and
    Adam's u_t. Where a norm is zero the ratio is one (Optax). Slots: ``mu``, ``nu``.
    """
    plain = adam(w, gradients, learning_rate=1.0, b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    record = Recorder(w)
    for t, u, lr in steps(-plain.updates, learning_rate):
        x = u + weight_decay * record.w
        norms = _norm(record.w), _norm(x)
        ratio = norms[0] / norms[1] if all(norms) else 1.0
        record.add(-lr * ratio * x, mu=plain.slots["mu"][t - 1], nu=plain.slots["nu"][t - 1])
    return record.trajectory()


def adam_mini(
    w: ArrayLike, gradients: ArrayLike, *, learning_rate: LearningRate, b1: float = 0.9,
    b2: float = 0.95, eps: float = 1e-8, weight_decay: float = 0.1,
    axes: int | tuple[int, ...] | None = None,
) -> Trajectory:  # fmt: skip
    """Adam-mini, Zhang et al. 2024, Algorithm 1: AdamW with one second moment a block.

    ``nu_t = b2 nu_{t-1} + (1 - b2) mean(|g_t|^2)``, the mean over the given axes, which stay with
    size 1 (None: over all), and then AdamW. Slots: ``mu``, ``nu``.
    """
    record, m, v = Recorder(w), 0.0, 0.0
    for t, g, lr in steps(gradients, learning_rate):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * np.mean(square(g), axis=axes, keepdims=True)
        m_hat, v_hat = m / one_minus_power(b1, t), v / one_minus_power(b2, t)
        u = m_hat / (np.sqrt(v_hat) + eps)
        record.add(-lr * (u + weight_decay * record.w), mu=m, nu=v)
    return record.trajectory()


def stable_adamw(
    w: ArrayLike, gradients: ArrayLike, *, learning_rate: LearningRate, b1: float = 0.9,
    b2: float = 0.99, eps: float = 1e-6, weight_decay: float = 1e-2,
) -> Trajectory:  # fmt: skip
    """StableAdamW, Wortsman et al. 2023, Algorithm 2.

    Averages with the corrected decays ``b (1 - b^(t-1)) / (1 - b^t)`` are Adam's corrected m^_t and
    v^_t. ``RMS_t`` is the root of the mean over the array of ``|g_t|^2 / max(v^_t, eps^2)``, and
    ``w_t = w_{t-1} - lr / max(1, RMS_t) (m^_t / (sqrt(v^_t) + eps) + weight_decay w_{t-1})``: the
    decay, too, is slowed down. Slots: ``mu``, ``nu``, the averages before correction.
    """
    record, m, v = Recorder(w), 0.0, 0.0
    for t, g, lr in steps(gradients, learning_rate):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * square(g)
        m_hat, v_hat = m / one_minus_power(b1, t), v / one_minus_power(b2, t)
        slower = max(1.0, math.sqrt(np.mean(square(g) / np.maximum(v_hat, eps**2))))
        u = m_hat / (np.sqrt(v_hat) + eps)
        record.add(-lr / slower * (u + weight_decay * record.w), mu=m, nu=v)
    return record.trajectory()


def adafactor(
    w: ArrayLike, gradients: ArrayLike, *, learning_rate: LearningRate, decay_rate: float = 0.8,
    decay_offset: int = 0, eps: float = 1e-30, clipping_threshold: float | None = 1.0,
    multiply_by_parameter_scale: bool = True, momentum: float | None = None,
    weight_decay_rate: float = 0.0, axes: tuple[int, int] | None = None,
) -> Trajectory:  # fmt: skip
    """Adafactor, Shazeer & Stern 2018, Algorithms 4 and 5, with the sums over rows and columns.

    ``b2_t = 1 - t^-decay_rate``, ``R_t = b2_t R_{t-1} + (1 - b2_t) (|g_t|^2 + eps) 1``, C_t the
    same with ``1^T (...)``, ``V_t = R_t C_t / (1^T R_t)``, ``u_t = g_t / sqrt(V_t)``; clipped:
    ``u_t / max(1, RMS(u_t) / d)``; times ``alpha_t = max(1e-3, RMS(w_{t-1})) rho_t``. With axes
    None V_t is the average of the squares. Momentum and decay are Optax's: an average of
    alpha_t u_t, and weight_decay_rate w_{t-1} added to it. Slots: ``nu``, or ``nu_row`` and
    ``nu_col`` as means, the axes staying with size 1; and ``mu``.
    """
    record, m = Recorder(w), 0.0
    state: list[Any] = [0.0, 0.0]
    for t, g, lr in steps(gradients, learning_rate):
        b2 = 1 - max(t - decay_offset, 1) ** -decay_rate
        x, over = square(g) + eps, [()] if axes is None else [(axes[1],), (axes[0],)]
        sums = [np.sum(x, axis=axis, keepdims=True) for axis in over]
        state = [b2 * old + (1 - b2) * new for old, new in zip(state, sums, strict=False)]
        if axes is None:
            (v,), slots = state, {"nu": state[0]}
        else:
            row, col = state
            v = row * col / np.sum(row, axis=axes[0], keepdims=True)
            slots = {"nu_row": row / g.shape[axes[1]], "nu_col": col / g.shape[axes[0]]}
        u = g / np.sqrt(v)
        if clipping_threshold is not None:
            u = u / max(1.0, _rms(u) / clipping_threshold)
        u = lr * u * (max(1e-3, _rms(record.w)) if multiply_by_parameter_scale else 1.0)
        if momentum is not None:
            m = momentum * m + (1 - momentum) * u
            u, slots = m, {**slots, "mu": m}
        record.add(-u - weight_decay_rate * record.w, **slots)
    return record.trajectory()


def newton_schulz(
    x: np.ndarray, steps: int = 5, coefficients: Sequence[float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-8,
) -> np.ndarray:  # fmt: skip
    """Newton-Schulz' quintic, Jordan et al. 2024, by what it does to the singular values.

    ``U S V^H`` becomes ``U p(...p(S / (||S|| + eps))) V^H`` with ``p(s) = a s + b s^3 + c s^5``.
    """
    a, b, c = coefficients
    u, s, v = np.linalg.svd(x, full_matrices=False)
    s = s / (math.sqrt(np.sum(s**2)) + eps)
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ v


def muon(
    w: ArrayLike, gradients: ArrayLike, *, learning_rate: LearningRate, beta: float = 0.95,
    eps: float = 1e-8, weight_decay: float = 0.0, nesterov: bool = True, ns_steps: int = 5,
    ns_coeffs: Sequence[float] = (3.4445, -4.7750, 2.0315), consistent_rms: float | None = None,
) -> Trajectory:  # fmt: skip
    """Muon, Jordan et al. 2024, with Optax's corrected average; Liu et al. 2025, equation 4.

    ``w_t = w_{t-1} - lr (s newton_schulz(m^_t) + weight_decay w_{t-1})``, m^_t that of Adam or
    Nadam; s is ``sqrt(max(1, m / n))`` for a matrix n x m (in, out), or ``consistent_rms
    sqrt(max(n, m))``. An array that is not a matrix has neither. Slots: ``mu``.
    """
    record, m = Recorder(w), 0.0
    for t, g, lr in steps(gradients, learning_rate):
        m = beta * m + (1 - beta) * g
        u = _corrected(m, g, beta, t, nesterov)
        if u.ndim == 2:
            n, k = u.shape
            s = math.sqrt(max(1, k / n))
            s = s if consistent_rms is None else consistent_rms * math.sqrt(max(n, k))
            u = s * newton_schulz(u, ns_steps, ns_coeffs, eps)
        record.add(-lr * (u + weight_decay * record.w), mu=m)
    return record.trajectory()


# --- Averages of the parameters ------------------------------------------------------------------


def schedule_free_adamw(
    w: ArrayLike, gradients: ArrayLike, *, learning_rate: LearningRate, b1: float = 0.9,
    b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0, weight_lr_power: float = 2.0,
    averaging_rate: LearningRate | None = None, variant: Literal["optax", "paper"] = "optax",
) -> Trajectory:  # fmt: skip
    """Schedule-free AdamW, Defazio et al. 2024, Algorithm 1; the parameters are y.

    ``z_t = z_{t-1} - lr_t (g_t / (sqrt(nu^_t) + eps) + weight_decay y_{t-1})``, ``x_t = (1 - c_t)
    x_{t-1} + c_t z_t``, ``y_t = (1 - b1) z_t + b1 x_t``; ``c_t`` is the weight of step t over the
    sum of all so far, the weight being the highest rate so far to the power weight_lr_power (which
    is 2 in the paper). x is where to evaluate: `schedule_free_eval_params`.

    Optax's warm-up takes the rate of the step before for z: ``averaging_rate`` gives the rates of
    the weights where they differ. "paper": the rate is ``lr_t sqrt(1 - b2^t)``, also in the weights
    (where it is not the highest so far) and before the decay, over ``sqrt(nu_t) + eps`` with the
    uncorrected nu. Slots: ``z``, ``nu``.
    """
    record, v, total, highest = Recorder(w), 0.0, 0.0, 0.0
    x = z = record.w
    rates = learning_rate if averaging_rate is None else averaging_rate
    for (t, g, lr), (_, _, weight) in zip(
        steps(gradients, learning_rate), steps(gradients, rates), strict=True
    ):
        v = b2 * v + (1 - b2) * square(g)
        correction = one_minus_power(b2, t)
        if variant == "paper":
            lr, highest = lr * math.sqrt(correction), weight * math.sqrt(correction)
            u = g / (np.sqrt(v) + eps)
        else:
            highest = max(highest, weight)
            u = g / (np.sqrt(v / correction) + eps)
        z = z - lr * (u + weight_decay * record.w)
        total = total + highest**weight_lr_power
        c = highest**weight_lr_power / total
        x = (1 - c) * x + c * z
        record.add((1 - b1) * z + b1 * x - record.w, z=z, nu=v)
    return record.trajectory()


def schedule_free_eval_params(y: ArrayLike, z: ArrayLike, b1: float = 0.9) -> np.ndarray:
    """``x = (y - (1 - b1) z) / b1`` (Defazio et al. 2024, equation (1) solved for x)."""
    return (widen(y) - (1 - b1) * widen(z)) / b1


def ema_of_params(params: ArrayLike, decay: float) -> np.ndarray:
    """``p_t = decay p_{t-1} + (1 - decay) w_t``, ``p_t / (1 - decay^t)``: Kingma & Ba 2015, 7.2.

    ``params`` holds w_1, w_2, ...: the initial w_0 has no part.
    """
    return bias_correction(ema(params, decay), decay)


def mean_of_params(params: ArrayLike) -> np.ndarray:
    """``(w_1 + ... + w_t) / t``: Polyak & Juditsky 1992, in Kingma & Ba 2015, 7.2."""
    w = widen(params)
    return np.cumsum(w, axis=0) / np.arange(1, len(w) + 1).reshape(-1, *[1] * (w.ndim - 1))


# --- Other decays --------------------------------------------------------------------------------


def adamw_independent(
    w: ArrayLike, gradients: ArrayLike, *, learning_rate: float, weight_decay: float,
    multiplier: LearningRate = 1.0, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8,
) -> Trajectory:  # fmt: skip
    """AdamW as Loshchilov & Hutter 2019, Algorithm 2, line 12, write it.

    ``w_t = w_{t-1} - eta_t (alpha u_t + lambda w_{t-1})``: the schedule multiplier eta_t is before
    the decay, the learning rate alpha is not. Slots: ``mu``, ``nu``.
    """
    plain = adam(w, gradients, learning_rate=learning_rate, b1=b1, b2=b2, eps=eps)
    return decoupled(w, plain, multiplier, weight_decay)


def normalised_weight_decay(
    normalised: float, *, batch_size: int, dataset_size: int, epochs: float
) -> float:
    """``lambda = lambda_norm sqrt(b / (B T))``: Loshchilov & Hutter 2019, Appendix B.1."""
    return normalised * math.sqrt(batch_size / (dataset_size * epochs))


# --- Clips, of one array's gradient --------------------------------------------------------------


def clip_by_value(g: np.ndarray, max_delta: float) -> np.ndarray:
    """``min(max(g, -max_delta), max_delta)`` element by element."""
    if np.iscomplexobj(g):
        return g * np.minimum(1.0, max_delta / np.maximum(np.abs(g), max_delta))
    return np.clip(g, -max_delta, max_delta)


def clip_by_rms(g: np.ndarray, threshold: float) -> np.ndarray:
    """``g / max(1, RMS(g) / threshold)`` (Shazeer & Stern 2018, Algorithm 4)."""
    return g / max(1.0, _rms(g) / threshold)


def adaptive_clip(
    g: np.ndarray, w: np.ndarray, clipping: float, eps: float = 1e-3,
    axis: int | tuple[int, ...] | None = None,
) -> np.ndarray:  # fmt: skip
    """Adaptive gradient clipping, Brock et al. 2021, equation (3).

    Unit by unit ``g <- clipping max(||w||, eps) / ||g|| g`` where ||g|| is more than that. A unit
    is what remains when the norm is over ``axis``; None is Optax's rule for weights whose last axis
    is the outputs: a scalar's or vector's whole, axis 0 of two or three, all but the last of more.
    """
    if axis is None:
        axis = tuple(range(g.ndim)) if g.ndim < 2 else 0 if g.ndim < 4 else tuple(range(g.ndim - 1))
    g_norm = np.sqrt(np.sum(square(g), axis=axis, keepdims=True))
    largest = clipping * np.maximum(np.sqrt(np.sum(square(w), axis=axis, keepdims=True)), eps)
    return np.where(g_norm > largest, g * (largest / np.where(g_norm > 0, g_norm, 1.0)), g)


# --- Clips by the history of a norm, of a run's gradients -----------------------------------------


def clip_to_history(
    gradients: np.ndarray, factor: float, decay: float, warmup: int
) -> tuple[np.ndarray, np.ndarray]:
    """One array's clip in AdaGC, Wang et al. 2025; also return the average after each step.

    A norm that is 0 or not finite is left out of the average, which is 0 without any norm.
    """
    average, clipped, averages = 0.0, [], []
    for t, g in enumerate(gradients, 1):
        size = float(np.sqrt(np.sum(square(g))))
        scale = 1.0
        if t > warmup and average > 0:
            scale = min(1.0, factor * average / size) if size > 0 else 1.0
        if 0 < size < math.inf:
            if average == 0:
                average = size
            elif t <= warmup:
                average = min(average, size)
            else:
                average = decay * average + (1 - decay) * scale * size
        clipped.append(scale * g)
        averages.append(average)
    return np.array(clipped), np.array(averages)


def zclip(
    norms: np.ndarray, sigma: float, decay: float, warmup: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ZClip's norms after the clip, Kumar et al. 2025, with means and variances after each step."""
    seen: list[float] = []
    mean = variance = 0.0
    found = []
    for norm in norms:
        clipped = norm
        if len(seen) < warmup:
            seen.append(norm)
            mean, variance = float(np.mean(seen)), float(np.var(seen))
        else:
            z = (norm - mean) / math.sqrt(variance)
            if z > sigma:
                clipped = mean + sigma**2 / z * math.sqrt(variance)
            mean = decay * mean + (1 - decay) * clipped
            variance = decay * variance + (1 - decay) * (clipped - mean) ** 2
        found.append((clipped, mean, variance))
    clipped, means, variances = np.array(found).T
    return clipped, means, variances
