"""The protocol carries what is built on it: each concept here uses the public protocol alone.

Storages, guards, groups by path, running maxima of corrected moments, a concept that reads another
one's slot or the old slots, and a scalar of the whole tree in mid-chain.
"""

import fnmatch
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamx
from adamx import Transformation, chain, ema, ema_of_squares, rms_scaling, scale
from adamx.core import lifting

PARAMS = {"w": jnp.array([1.0, -2.0, 3.0]), "b": jnp.array([0.5])}
GRADS = [
    {"w": jnp.array([1.0, -4.0, 0.5]), "b": jnp.array([2.0])},
    {"w": jnp.array([-3.0, 2.0, 0.25]), "b": jnp.array([-1.0])},
    {"w": jnp.array([0.5, 0.5, -8.0]), "b": jnp.array([4.0])},
]


def follow(tx, grads=GRADS, params=PARAMS):
    state, out = tx.init(params), []
    update = jax.jit(tx.update)
    for g in grads:
        updates, state = update(g, state, params)
        out.append(updates)
    return out, state


# ----------------------------------------------------------------- a storage: two moments, one word


class in_one_word(Transformation):
    """Keep mu and nu of the inner concept as two bfloat16 halves of one uint32."""

    inner: Transformation

    def slots(self, param):
        return {"moments": encode(**self.inner.slots(param))}

    def accumulate(self, u, slots, step):
        wide = slots | decode(slots["moments"])
        return {"moments": encode(**self.inner.accumulate(u, wide, step.child(0)))}

    def emit(self, u, slots, step):
        return self.inner.emit(u, slots | decode(slots["moments"]), step.child(0))


def encode(mu, nu):
    high, low = (jax.lax.bitcast_convert_type(x, jnp.uint32) for x in (mu, nu))
    return (high & jnp.uint32(0xFFFF0000)) | (low >> 16)


def decode(word):
    def number(bits):
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    return {"mu": number(word & jnp.uint32(0xFFFF0000)), "nu": number(word << 16)}


def test_a_storage_wraps_a_formula_it_does_not_know():
    inner = adamx.scale_by_adam(b2=0.9)
    packed, state = follow(chain(in_one_word(inner), scale(-0.1)))
    plain, _ = follow(chain(inner, scale(-0.1)))
    assert set(state) == {"count", "moments"}
    assert state["moments"]["w"].dtype == jnp.uint32
    for a, b in zip(packed, plain, strict=True):
        # truncated to 8 bits, m and v are each up to 2^-7 short, and keep that over three steps
        np.testing.assert_allclose(a["w"], b["w"], rtol=0.04)
        assert not np.array_equal(a["w"], b["w"]), "what is emitted comes from what was stored"


# ------------------------------------------------------------------- a guard: a bad step is no step


class guarded(Transformation):
    """Leave slots and parameters as they are where the gradient is not finite.

    The count goes on: that is the state's own, and `skip_nonfinite` holds it.
    """

    inner: Transformation

    def tree_scalars(self, step, leaves):
        ok = jnp.array([jnp.isfinite(u).all() for u in leaves]).all()
        return {
            "ok": ok,
            "skipped": step.state.get("skipped", jnp.int32(0)) + jnp.where(ok, 0, 1),
        }

    def record(self, scalars):
        return {"skipped": scalars["skipped"]}

    def accumulate(self, u, slots, step):
        new = self.inner.accumulate(u, slots, step.child(0))
        return {k: jnp.where(step.scalars["ok"], v, step.old[k]) for k, v in new.items()}

    def emit(self, u, slots, step):
        return jnp.where(step.scalars["ok"], self.inner.emit(u, slots, step.child(0)), 0)


def test_a_guard_wraps_a_whole_optimizer():
    bad = {"w": jnp.array([1.0, jnp.nan, 0.5]), "b": jnp.array([2.0])}
    tx = guarded(adamx.sgd(0.1, momentum=0.9))
    got, state = follow(tx, [GRADS[0], bad, GRADS[1], bad, GRADS[2]])
    wanted, plain = follow(adamx.sgd(0.1, momentum=0.9))
    assert not any(leaf.any() for leaf in jax.tree.leaves((got[1], got[3])))
    for a, b in zip(got[::2], wanted, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_array_max_ulp(x, y, 4), a, b)
    assert int(state["skipped"]) == 2
    for name in plain.keys() - {"count"}:
        jax.tree.map(
            lambda x, y: np.testing.assert_array_max_ulp(x, y, 4), state[name], plain[name]
        )


# ------------------------------------------------ groups by path, with other slots for other leaves


class by_path(Transformation):
    """Give each leaf the concept of the first pattern that its path matches."""

    patterns: tuple[str, ...]
    concepts: tuple[Transformation, ...]

    def for_leaf(self, path, leaf):
        for pattern, concept in zip(self.patterns, self.concepts, strict=True):
            if fnmatch.fnmatch(path, pattern):
                return concept.for_leaf(path, leaf)
        raise ValueError(f"by_path: nothing matches {path!r}")


def test_groups_by_path_have_slots_of_their_own():
    grouped = by_path(("b*", "*"), (scale(-1.0), rms_scaling(ema(0.9), second_moment=squares())))
    out, state = follow(chain(grouped, scale(0.5)))
    np.testing.assert_array_equal(out[0]["b"], -0.5 * GRADS[0]["b"])
    assert state["mu"]["b"] is None and state["nu"]["b"] is None
    assert state["mu"]["w"].shape == (3,)
    alone, _ = follow(chain(rms_scaling(ema(0.9), second_moment=squares()), scale(0.5)))
    for a, b in zip(out, alone, strict=True):
        np.testing.assert_array_max_ulp(a["w"], b["w"], 2)


def squares():
    return ema_of_squares(0.99)


# ------------------------------------- AMSGrad: the running maximum of the corrected second moment


class running_max(Transformation):
    name: str = "nu_max"

    def slots(self, param):
        return {self.name: adamx.zeros(param)}

    def accumulate(self, u, slots, step):
        return {self.name: jnp.maximum(slots[self.name], u)}

    def emit(self, u, slots, step):
        return slots[self.name]


def test_a_running_maximum_of_a_corrected_moment():
    nu_hat = chain(squares(), adamx.bias_correction(0.99))
    tx = rms_scaling(second_moment=chain(nu_hat, running_max()), eps=0.0)
    out, state = follow(tx)
    nu, largest = np.zeros(3), np.zeros(3)
    for t, (g, u) in enumerate(zip(GRADS, out, strict=True), start=1):
        w = np.asarray(g["w"], np.float64)
        nu = 0.99 * nu + 0.01 * w**2
        largest = np.maximum(largest, nu / (1 - 0.99**t))
        # 1 - 0.99^t is good to 4e-7, and the root halves that
        np.testing.assert_allclose(u["w"], w / np.sqrt(largest), rtol=1e-6)
    assert set(state) == {"count", "nu", "nu_max"}


# ------------------------------------------------- AdaBelief: reads the slot that another one wrote


class deviation(Transformation):
    slot: str = "mu"

    def emit(self, u, slots, step):
        return u - slots[self.slot]


def test_a_concept_reads_the_slot_of_an_earlier_one():
    tx = rms_scaling(ema(0.5), second_moment=chain(deviation(), ema_of_squares(0.75)), eps=0.0)
    out, state = follow(tx, GRADS[:1])
    # mu = g / 2, s = (g - g / 2)^2 / 4 = g^2 / 16: u = (g / 2) / (|g| / 4)
    np.testing.assert_allclose(out[0]["w"], 2 * np.sign(GRADS[0]["w"]), rtol=1e-6)
    np.testing.assert_allclose(state["nu"]["w"], np.square(GRADS[0]["w"]) / 16, rtol=1e-6)


# ------------------------------------------------- Adan and ADOPT: read what the slots were before


class difference(Transformation):
    name: str = "previous"

    def slots(self, param):
        return {self.name: adamx.zeros(param)}

    def accumulate(self, u, slots, step):
        return {self.name: u}

    def emit(self, u, slots, step):
        return jnp.where(step.count == 1, 0, u - step.old[self.name])


class delayed(Transformation):
    """Emit from the slots as they were before this step."""

    inner: Transformation

    def emit(self, u, slots, step):
        return self.inner.emit(u, slots | step.old, step.child(0))


def test_a_concept_reads_the_old_slots():
    out, _ = follow(difference())
    np.testing.assert_array_equal(out[0]["w"], 0)
    np.testing.assert_array_equal(out[1]["w"], GRADS[1]["w"] - GRADS[0]["w"])
    late, _ = follow(delayed(ema(0.5)))
    prompt, _ = follow(ema(0.5))
    np.testing.assert_array_equal(late[0]["w"], 0)
    np.testing.assert_array_equal(late[2]["w"], prompt[1]["w"])


# ------------------------------------------------------- a clip by the global norm, in mid-chain


class clip_by_global_norm(Transformation):
    max_norm: float

    def tree_scalars(self, step, leaves):
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(u)) for u in leaves))
        return {"factor": jnp.minimum(1, self.max_norm / norm), "grad_norm": norm}

    def record(self, scalars):
        return {"grad_norm": scalars["grad_norm"]}

    def emit(self, u, slots, step):
        return u * step.scalars["factor"]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_scalar_of_the_whole_tree_in_mid_chain(place):
    stages: list[Any] = [scale(3.0), ema(0.5)]
    stages.insert(place, clip_by_global_norm(1.0))
    tx = chain(*stages)
    assert float(tx.init(PARAMS)["grad_norm"]) == 0
    out, state = follow(tx, GRADS[:1])
    w, b = (np.asarray(GRADS[0][k], np.float64) * (1, 3, 1.5)[place] for k in ("w", "b"))
    norm = np.sqrt(np.sum(w**2) + np.sum(b**2))
    np.testing.assert_allclose(state["grad_norm"], norm, rtol=3e-7)
    after = (1.5, 0.5, 1.0)[place]  # what the stages behind the clip multiply by
    np.testing.assert_allclose(out[0]["w"], after * w / norm, rtol=5e-7)
    np.testing.assert_allclose(
        state["mu"]["w"],
        (1.5, 0.5, 1.5)[place] * (w / norm if place < 2 else np.asarray(GRADS[0]["w"])),
        rtol=5e-7,
    )


def test_a_concept_that_reads_the_tree_cannot_stand_in_a_branch():
    with pytest.raises(ValueError, match=r"reads the whole tree.*top-level adamx\.chain"):
        rms_scaling(clip_by_global_norm(1.0), second_moment=squares())


# ------------------------------------------------------------------ tree-wide scalars and arguments


class scaled_by_loss(Transformation):
    def scalars(self, step):
        return step.extra["value"]

    def record(self, scalars):
        return {"loss": scalars}

    def emit(self, u, slots, step):
        return u * step.scalars


def test_extra_arguments_reach_the_concept_that_reads_them():
    class at_init(scaled_by_loss):
        def scalars(self, step):
            return step.extra.get("value", 0.0)

    tx = chain(at_init(), scale(-1.0))
    state = tx.init(PARAMS)
    updates, state = tx.update(GRADS[0], state, PARAMS, value=jnp.float32(2.0))
    np.testing.assert_array_equal(updates["w"], -2 * GRADS[0]["w"])
    assert float(state["loss"]) == 2


# --------------------------------------------------------- leaf functions are traced once a shape


def test_a_kernel_is_traced_once_for_each_shape_and_dtype():
    traces = []

    class counted(Transformation):
        def emit(self, u, slots, step):
            traces.append((u.shape, step.grad_dtype))
            return u

    tree = {
        f"{i}": jnp.zeros((3 + i % 2,), [jnp.float32, jnp.bfloat16][i % 4 // 2]) for i in range(40)
    }
    tx = chain(counted(), ema(0.9))
    jax.jit(tx.update).trace(tree, tx.init(tree))
    # accumulate and emit of a chain each run a stage's emit
    assert len(set(traces)) == 4
    assert len(traces) == 2 * 4


MANY = {
    "adamw": adamx.adamw(optax.linear_schedule(0.1, 0.0, 9)),
    "schedule_free": adamx.schedule_free_adamw(0.1),
    "masters": adamx.master_weights(adamx.adamw(0.1, moments="packed16")),
    "groups": adamx.by_path({"w": adamx.sgd(0.1, 0.9)}, default=adamx.yogi(0.1)),
}


@pytest.mark.parametrize("name", MANY)
def test_a_tree_of_many_leaves_starts_like_one_of_few(name, monkeypatch):
    params = {"w": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3), "b": jnp.ones(3)}
    few = MANY[name].init(params)
    monkeypatch.setattr(lifting, "_MANY_LEAVES", 0)
    many = MANY[name].init(params)
    jax.tree.map(np.testing.assert_array_equal, many, few)
    kinds = [[(x.dtype, x.weak_type) for x in jax.tree.leaves(state)] for state in (many, few)]
    assert kinds[0] == kinds[1]
    places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, many, few))]
    assert len(set(places)) == len(places)
