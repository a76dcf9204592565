"""Transformations as plain data: what is written is what is read, by adamx and by Hydra."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from hydra.utils import instantiate
from jax.sharding import PartitionSpec
from table import TRANSFORMATIONS, every

import adamx

# two objects made alike are not equal where the parts are Optax's functions or arrays
MADE_ANEW = {"chain_foreign", "master_weights_float32"}


def falling(step, first):
    return first / (1.0 + jnp.asarray(step, jnp.float32))


SCHEDULES = {
    "constant": optax.constant_schedule(0.1),
    "linear": optax.linear_schedule(1.0, 0.5, 5, 2),
    "polynomial": optax.polynomial_schedule(0.1, 0.2, 2, 5),
    "cosine": optax.cosine_decay_schedule(0.1, 5, 0.2, 1.5),
    "exponential": optax.exponential_decay(0.1, 5, 0.9, 2, True, 0.01),
    "exponential without end": optax.exponential_decay(0.1, 5, 0.9),
    "piecewise": optax.piecewise_constant_schedule(1.0, {3: 0.1, 7: 0.5}),
    "warm-up": optax.warmup_constant_schedule(0.0, 0.1, 5),
    "warm-up, cosine": optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, 20, 0.01),
    "warm-up, exponential": optax.warmup_exponential_decay_schedule(0.0, 0.1, 5, 20, 0.9),
    "sgdr": optax.sgdr_schedule(
        [
            {"init_value": 0.0, "peak_value": 1.0, "decay_steps": 10, "warmup_steps": 2}
            for _ in range(2)
        ]
    ),
    "one cycle, cosine": optax.cosine_onecycle_schedule(20, 0.1),
    "one cycle, linear": optax.linear_onecycle_schedule(20, 0.1),
    "interpolated": optax.piecewise_interpolate_schedule("linear", 0.1),
    "partial": functools.partial(falling, first=0.5),
    "half-life": adamx.half_life_schedule(0.5, 0.9, 3),
}


def written(tx):
    """Return the data of a transformation, through JSON and YAML."""
    data = adamx.to_dict(tx)
    assert yaml.safe_load(yaml.safe_dump(data)) == data
    return json.loads(json.dumps(data, allow_nan=False))


# to Hydra the two that are one, b1 of the average and of its correction, are two of one name
@every
def test_what_is_written_is_read_back(name):
    tx = TRANSFORMATIONS[name].make()
    data = written(tx)
    readers = [adamx.from_dict, functools.partial(instantiate, _convert_="all")]
    for read in (r(data) for r in readers[: 1 if name == "adamw_adjustable" else 2]):
        assert repr(read) == repr(tx)
        assert adamx.to_dict(read) == data
        assert (read == tx) is (name not in MADE_ANEW)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_written_as_its_arguments(name):
    schedule = SCHEDULES[name]
    with jax.numpy_dtype_promotion("standard"):
        read = adamx.from_dict(written(adamx.scale_by_learning_rate(schedule))).learning_rate
        assert [float(read(i)) for i in range(25)] == [float(schedule(i)) for i in range(25)]


OF_OPTAX = {
    "adamw": lambda: optax.adamw(0.1),
    "in each other": lambda: optax.chain(optax.chain(optax.clip(1.0), optax.adam(0.1))),
    "named": lambda: optax.named_chain(("clip", optax.clip(1.0)), ("adam", optax.scale_by_adam())),
    "masked": lambda: optax.masked(optax.scale_by_adam(), {"a": True, "b": False}),
    "groups": lambda: optax.partition({1: optax.sgd(0.1, 0.9)}, {"a": 1, "b": 1}),
    "guarded": lambda: optax.apply_if_finite(optax.sgd(optax.linear_schedule(1.0, 0.5, 2)), 3),
    "upwards": lambda: optax.chain(
        optax.scale_by_learning_rate(optax.linear_schedule(1.0, 0.5, 2), flip_sign=False)
    ),
    "contrib": lambda: optax.chain(optax.contrib.scale_by_acprop(), optax.contrib.normalize()),
}


@pytest.mark.parametrize("name", OF_OPTAX)
def test_a_stage_of_optax_is_written_as_its_parts(name, standard_promotion):
    tx = adamx.chain(OF_OPTAX[name](), adamx.scale(0.5))
    data = written(tx)
    params = {"a": jnp.array([3.0, -1.0]), "b": jnp.array([0.5])}
    for read in (adamx.from_dict(data), instantiate(data, _convert_="all")):
        assert adamx.to_dict(read) == data
        state, theirs = tx.init(params), read.init(params)
        for _ in range(3):
            expected, state = tx.update(params, state, params)
            updates, theirs = read.update(params, theirs, params)
            for leaf in params:
                np.testing.assert_array_equal(updates[leaf], expected[leaf])


def test_numbers_of_every_kind_and_patterns_come_back_as_they_were(x64):
    rates = [
        np.float32(0.1),
        np.array([0.1, 0.2]),
        np.array([0.1], np.float32),
        jnp.array(0.3),
        True,
        1,
    ]
    for rate in rates:
        tx = adamx.scale(rate)  # which makes numbers of some kinds floats
        read = adamx.from_dict(written(tx)).step_size
        assert type(read) is type(tx.step_size)
        assert np.asarray(read).tobytes() == np.asarray(tx.step_size).tobytes()
        assert getattr(read, "dtype", None) == getattr(tx.step_size, "dtype", None)
    tx = adamx.by_path(
        {re.compile("a|b", re.IGNORECASE): adamx.scale(2.0), "c": None, falling: None},
        default=adamx.adam(0.1, mu_dtype=jnp.bfloat16),
    )
    assert adamx.from_dict(written(tx)) == tx
    tx = adamx.stacked(adamx.ema(0.9), {"a/*": np.int64(1)})  # pyright: ignore
    assert adamx.from_dict(written(tx)) == tx
    specs = {"w": PartitionSpec(("x", "y"), None), "*": PartitionSpec()}
    tx = adamx.in_shard_map(adamx.adamw(0.1, mask={"w": True, "b": False}), specs)
    assert adamx.from_dict(written(tx)) == tx


def test_data_may_be_written_by_hand():
    data = {
        "_target_": "adamx.skip_nonfinite",
        "tx": {"_target_": "adamx.adamw", "learning_rate": 0.1, "mask": "*kernel"},
    }
    assert adamx.from_dict(data) == adamx.skip_nonfinite(adamx.adamw(0.1, mask="*kernel"))


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (lambda: adamx.sgd(lambda step: 0.1), "tx[0].learning_rate is <lambda>"),
        # made of what its functions hold it would be another function
        (
            lambda: adamx.chain(optax.inject_hyperparams(optax.sgd)(0.1), adamx.scale(2.0)),
            "tx[0].tx is inject_hyperparams",
        ),
        (
            lambda: adamx.stacked(adamx.ema(0.9), {(lambda p, x: x.ndim == 2): 1}),
            "tx.leading[0][0][0] is <lambda>",
        ),
    ],
)
def test_what_cannot_be_written_is_named(make, where, standard_promotion):
    with pytest.raises(ValueError) as e:
        adamx.to_dict(make())
    assert where in str(e.value)


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        ({"_target_": "os.getcwd"}, ValueError, "'os.getcwd', which is not a public function"),
        (
            {"_target_": "adamx.core.paths.text", "pattern": "a"},
            ValueError,
            "not a public function",
        ),
        ({"_target_": "adamx.adamv"}, ValueError, "'adamx.adamv', which cannot be imported"),
        ({"learning_rate": 0.1}, TypeError, "must describe a transformation"),
        ([], TypeError, "must describe a transformation"),
        ({"_target_": "optax.constant_schedule", "value": 1.0}, TypeError, "must describe a"),
    ],
)
def test_what_cannot_be_read_is_named(data, error, said):
    with pytest.raises(error) as e:
        adamx.from_dict(data)
    assert said in str(e.value)


def test_only_transformations_of_adamx_are_written():
    with pytest.raises(TypeError, match="must be an adamx transformation"):
        adamx.to_dict(optax.adam(0.1))
    with pytest.raises(ValueError, match=r"learning_rate is float32\[\]"):
        jax.jit(lambda rate: adamx.to_dict(adamx.sgd(rate)) and 0)(0.1)


@pytest.mark.parametrize(
    "schedule",
    [
        optax.warmup_cosine_decay_schedule(0.0, 0.5, 0, 8),
        optax.warmup_constant_schedule(0.0, 0.5, 0),
        optax.linear_schedule(0.5, 0.25, 0),
        optax.exponential_decay(0.5, 0, 0.5),
        optax.sgdr_schedule(
            [
                {
                    "init_value": 0.5,
                    "peak_value": 0.5,
                    "warmup_steps": 0,
                    "decay_steps": n,
                    "end_value": 0.0,
                }
                for n in (2, 4)
            ]
        ),
    ],
    ids=["cosine", "constant", "linear", "exponential", "restarts"],
)
@pytest.mark.usefixtures("standard_promotion")
def test_a_schedule_with_a_part_of_no_steps_is_written(schedule):
    data = adamx.to_dict(adamx.sgd(schedule))
    back = adamx.from_dict(json.loads(json.dumps(data)))
    assert adamx.to_dict(back) == data
    grads = jnp.ones(2)
    states = [tx.init(grads) for tx in (adamx.sgd(schedule), back)]
    for _ in range(6):
        states = [
            tx.update(grads, s)[1]
            for tx, s in zip((adamx.sgd(schedule), back), states, strict=True)
        ]
        assert states[0]["learning_rate"] == states[1]["learning_rate"]
