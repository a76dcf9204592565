"""Converting Optax's state to adamx's and back, in the middle of a run.

    state[slot][leaf] = the corresponding field of Optax's state, at the same leaf

An Optax state is a tuple of named tuples, nested like the chain, the masks and the wrappers.
`_FIELDS` lists the states that can be converted; any other is an error, since adamx has no slots
for it. A state does not show the hyperparameters and the order of the stages: they have to be the
same on both sides.

Some fields differ from adamx's slots. AdaBelief's `nu` includes a sum of `eps_root`,

    nu_optax = nu + eps_root (1 - b2^t) / (1 - b2)

and `weight_sum` of schedule-free learning is in the unit of the weights, not of the last weight.
Adafactor's rows and columns lack the axis that is averaged over, which has size 1 here, and an
array of one zero stands in the place of what a leaf does not have.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adamx.core import errors, lifting
from adamx.core.concept import parts
from adamx.core.errors import describe
from adamx.core.foreign import as_transformation
from adamx.core.lifting import BEGAN, State
from adamx.core.paths import leaves_by_path
from adamx.core.transformation import Transformation
from adamx.interop.slots import Found, assemble, check_plain, comes_before
from adamx.storage.moments import slot_of_kind
from adamx.transforms.bias_correction import bias_correction, one_minus_power
from adamx.transforms.deviation import deviation
from adamx.transforms.ema_of_squares import ema_of_squares
from adamx.transforms.rms_scaling import rms_scaling
from adamx.transforms.running_max import running_max
from adamx.transforms.schedule_free import schedule_free

_COUNT, _COUNT_FROM_1, _ZERO = "the count", "the count and one", "zero between two steps"
_SCALAR, _INNER, _OWN = "a recorded scalar", "states inside", "Optax's own"
_COUNTED = {"count": _COUNT}
_MOMENTS = {"mu": "mu", "nu": "nu"}

# The meaning of each field of each of Optax's states: a slot of adamx, or one of the above.
_FIELDS: dict[str, dict[str, str]] = {
    "EmaState": {**_COUNTED, "ema": "mu"},
    "FactoredState": {**_COUNTED, "v_row": "nu_row", "v_col": "nu_col", "v": "nu"},
    "MuonState": {**_COUNTED, "mu": "mu", "ns_coeffs": _OWN},
    "ScaleByAdamState": {**_COUNTED, **_MOMENTS},
    "ScaleByAdanState": {"t": _COUNT, "m": "mu", "v": "delta", "n": "nu", "g": "previous"},
    "ScaleByAdemamixState": {
        **{"count": _COUNT, "count_m2": _COUNT},
        **{"m1": "mu", "m2": "mu_slow", "nu": "nu"},
    },
    "ScaleByAmsgradState": {**_COUNTED, **_MOMENTS, "nu_max": "nu_max"},
    "ScaleByBeliefState": {**_COUNTED, **_MOMENTS},
    "ScaleBySimplifiedAdEMAMixState": {"t": _COUNT, "m": "trace", "n": "nu"},
    "ScaleByLionState": {**_COUNTED, "mu": "mu"},
    "ScaleByRStdDevState": _MOMENTS,
    "ScaleByRStdDevWithCountState": {**_COUNTED, **_MOMENTS},
    "ScaleByRmsState": {"nu": "nu"},
    "ScaleByRmsWithCountState": {**_COUNTED, "nu": "nu"},
    "ScaleByRssState": {"sum_of_squares": "sum_of_squares"},
    "TraceState": {"trace": "trace"},
    # schedules
    "ScaleByScheduleState": _COUNTED,
    "WeightDecaySchedule": _COUNTED,
    "WrappedScheduleState": _COUNTED,
    # wrappers
    "ApplyIfFiniteState": {
        **{"notfinite_count": _OWN, "last_finite": _OWN, "total_notfinite": _OWN},
        "inner_state": _INNER,
    },
    "InjectStatefulHyperparamsState": {
        **{"count": _COUNT, "hyperparams": _OWN, "hyperparams_states": _INNER},
        "inner_state": _INNER,
    },
    "MaskedState": {"inner_state": _INNER},
    "MultiStepsState": {
        **{"mini_step": _ZERO, "gradient_step": _COUNT, "acc_grads": _OWN, "skip_state": _OWN},
        "inner_opt_state": _INNER,
    },
    "PartitionState": {"inner_states": _INNER},
    "ScheduleFreeState": {
        **{"b1": _SCALAR, "weight_sum": _SCALAR, "max_lr": _SCALAR, "step_count": _COUNT_FROM_1},
        **{"base_optimizer_state": _INNER, "z": "z"},
    },
}
_SLOTS = {m for fields in _FIELDS.values() for m in fields.values() if " " not in m}

Visit = Callable[[str, Any, str, str], Any]


def _walk(function: str, node: Any, where: str, visit: Visit) -> Any:
    """Rebuild an Optax state with `visit(where, state, field, meaning)` in the place of a field."""
    name = type(node).__name__
    if not jax.tree.leaves(node):
        return node
    if name in _FIELDS and hasattr(node, "_fields"):
        meanings = _FIELDS[name]
        new = {
            field: _walk(function, getattr(node, field), f"{where}.{field}", visit)
            if meaning == _INNER
            else visit(f"{where}.{field}", node, field, meaning)
            for field, meaning in meanings.items()
            if meaning != _OWN
        }
        return node._replace(**new)
    if not hasattr(node, "_fields") and not jax.tree_util.all_leaves([node]):
        inside, treedef = jax.tree_util.tree_flatten_with_path(
            node, is_leaf=lambda x: x is not node
        )
        return treedef.unflatten(
            [_walk(function, x, where + jax.tree_util.keystr(key), visit) for key, x in inside]
        )
    raise TypeError(
        f"{function}: {where} is {describe(node)}, which is not an Optax state that adamx can "
        "convert: convert the other parts of the state alone, such as state[0], and merge the "
        "results; restore a checkpoint that was read as dicts and lists with the state of the "
        "Optax transformation as its target"
    )


def from_optax(state: Any, tx: Transformation, params: Any, *, count: int | None = None) -> State:
    """Return the state of `tx` with which an Optax run goes on in adamx.

    Slots are found by the names of Optax's fields, inside any chains, masks, partitions and
    wrappers, and matched with the parameters by path. They get the dtypes that `tx` uses: 16-bit
    moments of Optax are widened. Arrays whose dtype stays are shared, not copied.

    Args:
        state: an Optax state of arrays, or a part of one: from sgd, rmsprop, adagrad, adam, adamw,
            adamax, nadam, radam, amsgrad, adabelief, yogi, lamb, lion, adan, ademamix, adopt, ema,
            adafactor, muon or schedule_free, in chains, with schedules, in masked, partition,
            inject_hyperparams, apply_if_finite, or in MultiSteps between two steps.
        tx: the adamx transformation to go on with, with float32 slots and the same hyperparameters,
            which a state does not show.
        params: the parameters, as for `tx.init`.
        count: the number of steps taken, >= 0, if the state has no counter (SGD, RMSprop and
            AdaGrad without a schedule); None then means 0, which only schedules notice.

    Returns:
        The state: count, slots, and the recorded scalars after that many steps.

    Raises:
        TypeError: if `tx` is not an adamx transformation, or a part of the state is none of these.
        ValueError: if counters differ, a slot has two candidates, is missing, is left over or has
            another shape, or MultiSteps is in the middle of a sum.

    Example:
        >>> import adamx
        >>> params, tx = jnp.array([1.0, 2.0]), adamx.adam(0.5)
        >>> old = optax.ScaleByAdamState(jnp.int32(3), jnp.array([2.0, -4.0]), jnp.ones(2))
        >>> state = from_optax((old, optax.EmptyState()), tx, params)
        >>> print(state["count"], state["mu"], state["nu"], state["learning_rate"])
        3 [ 2. -4.] [1. 1.] 0.5
    """
    check_plain("from_optax", tx)
    found: Found = {}
    counts: dict[str, int] = {} if count is None else {"count=": count}
    given: dict[str, Any] = {}
    belief = False

    def take(where: str, node: Any, field: str, meaning: str) -> Any:
        nonlocal belief
        value = getattr(node, field)
        if meaning in (_COUNT, _COUNT_FROM_1):
            counts[where] = _number(where, value) - (meaning == _COUNT_FROM_1)
        elif meaning == _ZERO:
            if _number(where, value):
                raise ValueError(
                    f"from_optax: {where} is {value}: MultiSteps is in the middle of a sum of "
                    "gradients: convert after the step that ends it, when it is 0"
                )
        elif meaning == _SCALAR:
            given[field] = jnp.asarray(value, jnp.float32)
        else:
            belief |= type(node).__name__ == "ScaleByBeliefState"
            there = found.setdefault(meaning, {})
            for path, x in leaves_by_path(value).items():
                if type(node).__name__ == "FactoredState" and not _is_kept(node, field, path):
                    continue
                here = f"{where}[{path!r}]" if path else where
                if path in there:
                    raise ValueError(
                        f"from_optax: {there[path][0]} and {here} would both be {meaning!r}: "
                        "convert each part of the Optax state alone, for a transformation whose "
                        "slot has another name"
                    )
                there[path] = here, x
        return value

    _walk("from_optax", state, "state", take)
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"from_optax: the counters differ, {counts}, and adamx has one: replace counters that "
            "were added or restarted later, with state._replace(count=...)"
        )
    steps = next(iter(counts.values()), 0)
    if "nu_max" in found and comes_before(tx, running_max, bias_correction):
        raise ValueError(
            "from_optax: nu_max of Optax's AMSGrad is the maximum of the corrected nu, but tx "
            "corrects the maximum of the raw nu: go on with adamx.amsgrad"
        )
    if belief:
        _take_out_eps_root(tx, found["nu"], steps)
    if "nu_row" in found:
        _put_axes_back(tx, params, found)
    if "weight_sum" in given:
        given["weight_sum"] = _in_units_of_the_last(tx, given)
    return assemble("from_optax", "the Optax state", tx, params, found, steps, given)


def _number(where: str, value: Any) -> int:
    if jnp.shape(value) != ():
        raise ValueError(
            f"from_optax: {where} must be one number, got shape {list(jnp.shape(value))}: convert "
            "the members of a state made under vmap one by one"
        )
    return int(value)


def _take_out_eps_root(tx: Transformation, nu: dict[str, tuple[str, Any]], count: int) -> None:
    """Subtract from AdaBelief's nu the eps_root that Optax added in each step."""
    for part in parts(tx):
        if isinstance(part, rms_scaling):
            inside = [*parts(part.second_moment)]
            decays = [p.decay for p in inside if isinstance(p, ema_of_squares)]
            if any(isinstance(p, deviation) for p in inside) and decays and count:
                total = part.eps_root * one_minus_power(decays[0], jnp.asarray(count))
                for path, (where, x) in nu.items():
                    wide = jnp.asarray(x).astype(jnp.promote_types(x.dtype, jnp.float32))
                    nu[path] = where, jnp.maximum(wide - total.astype(wide.dtype), 0)


def _is_kept(node: Any, field: str, path: str) -> bool:
    """Say whether a leaf has a field of Optax's Adafactor: rows and columns, or all squares."""
    means = [jnp.shape(leaves_by_path(getattr(node, name))[path]) for name in ("v_row", "v_col")]
    return (means != [(1,), (1,)]) == (field != "v")


def _put_axes_back(tx: Transformation, params: Any, found: Found) -> None:
    """Give the rows and columns of Optax's Adafactor the axis of size 1 that they have here."""
    like = jax.eval_shape(functools.partial(lifting.init, tx), params)
    for slot in ("nu_row", "nu_col"):
        for path, start in leaves_by_path(like.get(slot)).items():
            where, x = found[slot].get(path, ("", None))
            if x is not None and _longer(x.shape) == _longer(start.shape):
                found[slot][path] = where, jnp.reshape(x, start.shape)


def _longer(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size != 1]


def _in_units_of_the_last(tx: Transformation, given: Mapping[str, jax.Array]) -> jax.Array:
    powers = [p.weight_lr_power for p in parts(tx) if isinstance(p, schedule_free)]
    last = given["max_lr"] ** jnp.float32(powers[0] if powers else 0)
    return jnp.where(last > 0, given["weight_sum"] / jnp.where(last > 0, last, 1), 0)


def to_optax(state: State, tx: optax.GradientTransformation, params: Any) -> Any:
    """Return the Optax state with which an adamx run goes on in Optax.

    The reverse of `from_optax`. Every counter of the Optax state becomes the count, so schedules
    continue, and arrays get Optax's dtypes: the parameters'.

    Args:
        state: a state of adamx with float32 slots.
        tx: the Optax transformation to go on with, of the same hyperparameters.
        params: the parameters, as for `tx.init`.

    Returns:
        A state with the tree of `tx.init(params)`.

    Raises:
        TypeError: if `state` is not a state of adamx, `tx` is not an Optax transformation, or adamx
            has no counterpart of its state.
        ValueError: if a slot is missing, is left over or has another shape, or if `tx` is Optax's
            AdaBelief or schedule-free: their states depend on b2, eps_root and weight_lr_power,
            which an Optax transformation does not show; or if a leaf began late.

    Example:
        >>> import adamx
        >>> params, tx = jnp.array([1.0, 2.0]), adamx.adam(0.5, b1=0.5, b2=0.75)
        >>> _, state = tx.update(jnp.array([4.0, -8.0]), tx.init(params))
        >>> found = to_optax(state, optax.adam(0.5, b1=0.5, b2=0.75), params)[0]
        >>> print(found.count, found.mu, found.nu)
        1 [ 2. -4.] [ 4. 16.]
    """
    errors.check_state(state, "to_optax(state, tx, params)")
    tx = as_transformation(tx, "to_optax: tx")
    if isinstance(tx, Transformation):
        raise TypeError(f"to_optax: tx must be the Optax transformation to go on with, got {tx!r}")
    if BEGAN in state:
        raise ValueError(
            f"to_optax: the leaves {sorted(state[BEGAN])[:4]} began late, and Optax has one count "
            "for all leaves, with which it would correct their moments as if they were old"
        )
    count = state["count"]
    slots = {
        name: leaves_by_path(tree)
        for name, tree in state.items()
        if any(slot_of_kind(slot, [name]) for slot in _SLOTS)
        or any(jnp.ndim(x) > 0 for x in jax.tree.leaves(tree))
    }
    used: set[str] = set()

    def fill(where: str, node: Any, field: str, meaning: str) -> Any:
        start = getattr(node, field)
        kind = type(node).__name__
        said = f"to_optax: {where} cannot be computed: it "
        if meaning == _SCALAR:
            raise ValueError(f"{said}needs weight_lr_power, which no Optax transformation shows")
        if kind == "ScaleByBeliefState" and meaning == "nu":
            raise ValueError(
                f"{said}holds eps_root (1 - b2^t) / (1 - b2), and an Optax transformation does not "
                "show its b2 and eps_root: convert for optax.scale_by_adam, whose fields are the "
                "same, and add that to nu"
            )
        if meaning in (_COUNT, _COUNT_FROM_1):
            return (count + int(meaning == _COUNT_FROM_1)).astype(jnp.asarray(start).dtype)
        if meaning == _ZERO:
            return start
        slot = slot_of_kind(meaning, slots) or meaning
        used.add(slot)
        flat, treedef = jax.tree_util.tree_flatten_with_path(start)
        return treedef.unflatten([_slot_of(slots, where, slot, p, x) for p, x in flat])

    new = _walk("to_optax", tx.init(params), "state", fill)
    if unused := sorted(slots.keys() - used):
        raise ValueError(
            f"to_optax: the state keeps {unused}, for which tx has no place, only for "
            f"{sorted(used)}: give the Optax transformation that computes the same; remove slots "
            "without a counterpart, such as masters, from the state"
        )
    return new


def _slot_of(slots: Mapping[str, Any], where: str, slot: str, path: Any, start: Any) -> jax.Array:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    factored = where.endswith((".v", ".v_row", ".v_col"))
    if factored and name not in slots.get(slot, {}) and jnp.shape(start) == (1,):
        return start
    if name not in slots.get(slot, {}):
        raise ValueError(
            f"to_optax: tx keeps {slot!r} of {name!r} ({where}), and the state of adamx has only "
            f"{sorted(slots)}: give the Optax transformation that computes the same, and for "
            "packed moments the state {'count': ..., **adamx.moments(state, tx)}"
        )
    value = slots[slot][name]
    if factored and _longer(jnp.shape(value)) == _longer(jnp.shape(start)):
        value = jnp.reshape(value, jnp.shape(start))
    if jnp.shape(value) != jnp.shape(start) or jnp.iscomplexobj(value) != jnp.iscomplexobj(start):
        raise ValueError(
            f"to_optax: state[{slot!r}] of {name!r} is {describe(value)} where these parameters "
            f"need {describe(start)}: is it the state of another model?"
        )
    return jnp.asarray(value).astype(start.dtype)
