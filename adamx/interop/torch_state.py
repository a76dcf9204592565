"""Converting PyTorch's `optimizer.state_dict()` to adamx's state and back, in the middle of a run.

    state[slot][leaf] = transpose(state_dict["state"][index][field], axes)

    field             of                              slot
    exp_avg           Adam, AdamW, NAdam, RAdam,      mu
                      Adamax
    exp_avg_sq        Adam, AdamW, NAdam, RAdam       nu
    max_exp_avg_sq    Adam, AdamW with amsgrad        nu_max
    exp_inf           Adamax                          nu
    square_avg        RMSprop                         nu
    grad_avg          RMSprop, centered               mu
    momentum_buffer   SGD, RMSprop                    trace, or mu if dampening = momentum
    sum               Adagrad                         sum_of_squares
    mu_product        NAdam                           none: scheduled_nesterov_ema computes it
    step              all but SGD                     count

PyTorch is not imported: its tensors are converted to NumPy arrays, and NumPy arrays are returned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from adamx.core import errors
from adamx.core.concept import parts
from adamx.core.errors import describe
from adamx.core.lifting import State, age
from adamx.core.paths import leaves_by_path, paths_of
from adamx.core.transformation import Transformation
from adamx.interop.slots import Found, assemble, check_plain, comes_before
from adamx.storage.moments import slot_of_kind
from adamx.transforms.bias_correction import bias_correction
from adamx.transforms.running_max import running_max
from adamx.transforms.scale_by_learning_rate import scale_by_learning_rate
from adamx.transforms.scheduled_nesterov_ema import one_minus_product, scheduled_nesterov_ema
from adamx.transforms.trace import trace

Place = int | tuple[int, Sequence[int]]
"""A parameter's index in PyTorch, and the axes that transpose PyTorch's array to ours."""

_SLOTS = {
    "exp_avg": "mu",
    "exp_avg_sq": "nu",
    "max_exp_avg_sq": "nu_max",
    "exp_inf": "nu",
    "square_avg": "nu",
    "grad_avg": "mu",
    "momentum_buffer": "trace",
    "sum": "sum_of_squares",
}
_STEP, _PRODUCT = "step", "mu_product"

# The fields of a parameter's state, by a hyperparameter that the preceding optimizers do not have.
_FIELDS: dict[str, tuple[str, ...]] = {
    "amsgrad": (_STEP, "exp_avg", "exp_avg_sq"),
    "momentum_decay": (_STEP, _PRODUCT, "exp_avg", "exp_avg_sq"),
    "centered": (_STEP, "square_avg"),
    "initial_accumulator_value": (_STEP, "sum"),
    "dampening": (),
    "decoupled_weight_decay": (_STEP, "exp_avg", "exp_avg_sq"),
    "betas": (_STEP, "exp_avg", "exp_inf"),
}
# Further fields, if a hyperparameter is neither False nor 0.
_OPTIONAL = {"amsgrad": "max_exp_avg_sq", "centered": "grad_avg", "momentum": "momentum_buffer"}


def from_torch(
    state_dict: Mapping[str, Any],
    tx: Transformation,
    params: Any,
    *,
    names: Mapping[str, Place],
    count: int | None = None,
) -> State:
    """Return the state of `tx` with which a PyTorch run goes on in adamx.

    Args:
        state_dict: the `optimizer.state_dict()` of Adam, AdamW, NAdam, RAdam, Adamax, RMSprop,
            Adagrad or SGD, with tensors on any device or NumPy arrays, which are copied.
        tx: the adamx transformation to go on with, with float32 slots and the same hyperparameters.
        params: the parameters, as for `tx.init`.
        names: for each leaf's path, such as "dense/kernel", its index in the state_dict, which is
            its place in `model.parameters()`; or (index, axes) if ours is PyTorch's array
            transposed by axes: (1, 0) for the weight of a Linear, (2, 3, 1, 0) of a Conv2d.
        count: the number of steps taken, if PyTorch does not count (SGD); None then means 0, which
            only schedules notice.

    Returns:
        The state: count, slots, and the recorded scalars after that many steps. PyTorch counts the
        steps of each parameter, and none without a gradient: the count is the largest of them, and
        a leaf with fewer, or with no entry yet, has one in `began`, and goes on at its own age.

    Raises:
        TypeError: if `tx` is not an adamx transformation or `state_dict` not an optimizer's.
        ValueError: if `names` does not pair leaves and indices one to one, `count` is not the
            largest step, a slot is missing, is left over or has another shape, or PyTorch's slots
            mean something else:
            squares of complex parts, AMSGrad's maximum of the raw average, NAdam's momenta, a
            dampened sum, a momentum before the learning rate.

    Example:
        >>> import adamx
        >>> moments = {"step": 3.0, "exp_avg": np.ones((2, 1)), "exp_avg_sq": np.ones((2, 1))}
        >>> group = {"params": [0], "amsgrad": False, "lr": 0.1}
        >>> state_dict = {"state": {0: moments}, "param_groups": [group]}
        >>> params = {"kernel": jnp.zeros((1, 2))}
        >>> state = from_torch(
        ...     state_dict, adamx.adamw(0.1), params, names={"kernel": (0, (1, 0))}
        ... )
        >>> print(state["count"], state["mu"]["kernel"])
        3 [[1. 1.]]
    """
    function = "from_torch"
    check_plain(function, tx)
    groups, states = _groups(function, state_dict), state_dict["state"]
    places = _places(function, params, names, groups)
    found: Found = {}
    steps: dict[str, int] = {}
    for path, (index, axes) in places.items():
        for field, x in states.get(index, {}).items():
            if x is None:
                continue
            where = f"state_dict['state'][{index}][{field!r}]"
            if field == _STEP:
                steps[path] = _whole(where, x)
            elif (slot := _slot(function, field, groups[index], tx)) is not None:
                array = _numpy(x)
                found.setdefault(slot, {})[path] = where, _transposed(where, path, array, axes)
    number = max(steps.values(), default=count or 0)
    if count is not None and count != number:
        raise ValueError(
            f"from_torch: count is {count}, and the largest step in state_dict['state'] is "
            f"{number}: leave count out"
        )
    late = {path: number - own for path, own in steps.items() if own < number}
    if steps:  # PyTorch has no entry for a parameter that never had a gradient
        late |= {path: number for path, (index, _) in places.items() if not states.get(index)}
    return assemble(function, "the state_dict", tx, params, found, number, {}, late)


def to_torch(
    state: State,
    tx: Transformation,
    params: Any,
    *,
    names: Mapping[str, Place],
    like: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the state_dict with which an adamx run goes on in PyTorch.

    The arrays are NumPy's, so that PyTorch is not needed here. `optimizer.load_state_dict` wants
    tensors: `found["state"] = jax.tree.map(torch.as_tensor, found["state"])`.

    Args:
        state: a state of `tx`.
        tx: the adamx transformation of the state, with float32 slots.
        params: the parameters, as for `tx.init`.
        names: as for `from_torch`; the arrays are transposed back.
        like: the `state_dict()` of the PyTorch optimizer to go on with, new or used: its groups and
            hyperparameters are copied, and determine the optimizer's fields.

    Returns:
        A state_dict: for each index `step` (float32) and arrays of the slot's dtype (float32 for
        slots of 16 bits), in PyTorch's layout.

    Raises:
        TypeError: if `tx` is not an adamx transformation, or `like` not an optimizer's.
        ValueError: if `names` does not pair leaves and indices one to one, or `tx` and PyTorch's
            optimizer have different slots.

    Example:
        >>> import adamx
        >>> params, tx = {"kernel": jnp.zeros((1, 2))}, adamx.sgd(0.1, momentum=0.9)
        >>> _, state = tx.update({"kernel": jnp.array([[3.0, 4.0]])}, tx.init(params))
        >>> group = {"params": [0], "dampening": 0, "momentum": 0.9}
        >>> like = {"state": {}, "param_groups": [group]}
        >>> found = to_torch(state, tx, params, names={"kernel": (0, (1, 0))}, like=like)
        >>> found["state"][0]["momentum_buffer"].shape
        (2, 1)
    """
    function = "to_torch"
    check_plain(function, tx)
    errors.check_state(state, "to_torch(state, tx, params)")
    groups = _groups(function, like)
    places = _places(function, params, names, groups)
    slots = {name: leaves_by_path(errors.entry(state, name)) for name in tx.tree_names()}
    weights = leaves_by_path(params)
    states: dict[int, Any] = {}
    for path, (index, axes) in places.items():
        left = {slot for slot, leaves in slots.items() if path in leaves}
        states[index] = {}
        for field in _fields(function, groups[index]):
            if field == _STEP:
                states[index][field] = np.array(age(state, path), np.float32)
                continue
            slot = _slot(function, field, groups[index], tx)
            if slot is None:
                states[index][field] = _product(tx, age(state, path))
                continue
            if slot not in left:
                raise ValueError(
                    f"to_torch: PyTorch's optimizer keeps {field!r} of parameter {index}, and the "
                    f"state of adamx has no {slot!r} of {path!r}, only {sorted(left)}: give the "
                    "state_dict of the optimizer that computes the same as tx"
                )
            left.remove(slot)
            value, weight = np.array(slots[slot][path]), weights[path]
            if value.shape != jnp.shape(weight):
                raise ValueError(
                    f"to_torch: state[{slot!r}] of {path!r} has shape {list(value.shape)} for a "
                    f"parameter of shape {list(jnp.shape(weight))}: is it the state of another "
                    "model?"
                )
            if np.iscomplexobj(value) != np.iscomplexobj(weight):
                raise ValueError(
                    f"to_torch: {slot!r} of the complex {path!r} is the average of squared "
                    "magnitudes, but PyTorch keeps the squares of the two parts, which cannot be "
                    "recovered: train the two parts as two real arrays"
                )
            wide = value if value.dtype.itemsize > 2 else value.astype(np.float32)
            back = wide if axes is None else wide.transpose(np.argsort(axes))
            states[index][field] = np.ascontiguousarray(back).reshape(back.shape)
        if left:
            raise ValueError(
                f"to_torch: the state of adamx keeps {sorted(left)} of {path!r}, for which the "
                f"optimizer of parameter {index} has no place: give the state_dict of the "
                "optimizer that computes the same as tx"
            )
    return {**like, "state": states, "param_groups": [dict(g) for g in like["param_groups"]]}


def _groups(function: str, state_dict: Any) -> dict[int, Mapping[str, Any]]:
    """Return the group of each parameter, by index."""
    if not (isinstance(state_dict, Mapping) and {"state", "param_groups"} <= state_dict.keys()):
        raise TypeError(
            f"{function}: expected the state_dict of a PyTorch optimizer, with 'state' and "
            f"'param_groups', got {describe(state_dict)}: is it the model's?"
        )
    return {index: group for group in state_dict["param_groups"] for index in group["params"]}


def _places(
    function: str, params: Any, names: Mapping[str, Place], groups: Mapping[int, Any]
) -> dict[str, tuple[int, Sequence[int] | None]]:
    """Return index and axes of each leaf; raise unless `names` pairs them one to one."""
    leaves = leaves_by_path(params)
    places: dict[str, tuple[int, Sequence[int] | None]] = {
        path: (int(place), None) if isinstance(place, int | np.integer) else place
        for path, place in names.items()
    }
    if places.keys() != leaves.keys():
        raise ValueError(
            f"{function}: names must have an entry for each leaf of params: it lacks "
            f"{sorted(leaves.keys() - places.keys())}, and has {sorted(places.keys() - leaves)} "
            f"too many; the leaves are {paths_of(params)[:6]}"
        )
    taken = sorted(index for index, _ in places.values())
    if taken != sorted(groups):
        raise ValueError(
            f"{function}: names must have each index of the state_dict once: they are "
            f"{sorted(groups)}, got {taken}"
        )
    return places


def _fields(function: str, group: Mapping[str, Any]) -> list[str]:
    """Return the fields of PyTorch's state of a parameter in this group."""
    for hyperparameter, fields in _FIELDS.items():
        if hyperparameter in group:
            return [*fields, *(field for name, field in _OPTIONAL.items() if group.get(name))]
    raise ValueError(
        f"{function}: the group with {sorted(group)} belongs to no optimizer that adamx can "
        "convert: they are Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad and SGD"
    )


def _slot(function: str, field: str, group: Mapping[str, Any], tx: Transformation) -> str | None:
    """Return a field's slot, None for a field that follows from the count; raise if neither.

    Also raises if the composition shows that field and slot have different meanings.
    """
    if field == _PRODUCT:
        if not any(isinstance(part, scheduled_nesterov_ema) for part in parts(tx)):
            raise ValueError(
                f"{function}: mu_product is the product of the momenta of PyTorch's NAdam, which "
                "rise from half of betas[0], while adamx.nadam has constant momenta: give "
                "chain(rms_scaling(scheduled_nesterov_ema(b1), second_moment=chain("
                "ema_of_squares(b2), bias_correction(b2)), eps=eps), scale_by_learning_rate(lr))"
            )
        return None
    if field == "max_exp_avg_sq" and not comes_before(tx, running_max, bias_correction):
        raise ValueError(
            f"{function}: max_exp_avg_sq is the maximum of the raw averages of squares, which "
            "PyTorch corrects afterwards, but tx (as adamx.amsgrad) takes the maximum of corrected "
            "averages, which does not follow from it: give a composition with second_moment="
            "chain(ema_of_squares(b2), running_max(), bias_correction(b2))"
        )
    if field != "momentum_buffer":
        if field not in _SLOTS:
            raise ValueError(
                f"{function}: PyTorch's optimizer keeps {field!r}, which adamx cannot convert: the "
                f"known fields are {sorted(_SLOTS)}"
            )
        return slot_of_kind(_SLOTS[field], tx.tree_names()) or _SLOTS[field]
    if comes_before(tx, scale_by_learning_rate, trace):
        raise ValueError(
            f"{function}: PyTorch's momentum_buffer comes before the learning rate, but the trace "
            "of tx (as in adamx.rmsprop) comes after it: give chain(scale_by_rms(decay, eps), "
            "trace(momentum), scale_by_learning_rate(lr))"
        )
    dampening, names = group.get("dampening", 0), tx.tree_names()
    averages = "mu" in names and "trace" not in names
    if dampening == 0 and not averages:
        return "trace"
    if dampening and dampening == group["momentum"] and averages:
        return "mu"
    raise ValueError(
        f"{function}: momentum_buffer of SGD with dampening={dampening} is a sum of (1 - dampening)"
        f" g, but tx keeps {[*names]}: without dampening give adamx.sgd(lr, momentum), which keeps "
        "a sum (trace); with dampening = momentum give adamx.momentum(lr, momentum), which keeps "
        "an average (mu); no other dampening can be converted"
    )


def _product(tx: Transformation, count: Any) -> np.ndarray:
    """Return the product b_1 ... b_t of NAdam's momenta."""
    (found,) = [p for p in parts(tx) if isinstance(p, scheduled_nesterov_ema)]
    t = jnp.maximum(count, 1).astype(float)
    rate = -np.log(0.96) * found.momentum_decay
    return np.array(jnp.where(count > 0, 1 - one_minus_product(found.decay, rate, t), 1.0))


def _numpy(x: Any) -> np.ndarray:
    """Return a copy of a tensor or array; bfloat16, which NumPy lacks, becomes float32.

    It has to be a copy: PyTorch updates its tensors in place, and JAX may share NumPy's memory.
    """
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = (x.float() if "bfloat16" in str(x.dtype) else x).numpy()
    return np.array(x)


def _whole(where: str, x: Any) -> int:
    value = _numpy(x)
    if value.shape != () or not np.isfinite(value) or value != int(value):
        raise ValueError(f"from_torch: {where} must be one whole number, got {value}")
    return int(value)


def _transposed(where: str, path: str, array: np.ndarray, axes: Sequence[int] | None) -> np.ndarray:
    if axes is None:
        return array
    if sorted(axes) != list(range(array.ndim)):
        raise ValueError(
            f"from_torch: names[{path!r}] has axes {tuple(axes)} for {where} of shape "
            f"{list(array.shape)}: they must be a permutation of {tuple(range(array.ndim))}"
        )
    return array.transpose(axes)
