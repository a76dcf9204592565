"""What someone who comes from Optax or PyTorch tries first: each error names the remedy."""

import inspect
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adamx as library

adamx: Any = library  # a type checker finds most of these mistakes too

pytestmark = pytest.mark.usefixtures("quick_compiler", "plain_jax")

ADAMW = adamx.adamw(1e-3)
PACKED = adamx.adamw(1e-3, moments="packed16")


def params() -> Any:
    return {"embed": jnp.ones((3, 2)), "b": jnp.ones(2)}


def state() -> Any:
    return ADAMW.init(params())


def of_optax() -> Any:
    return optax.adamw(1e-3).init(params())


def a_mask(tree: Any) -> Any:
    return jax.tree.map(lambda _: True, tree)


a_mask.__module__ = "__main__"


class WithInit(adamx.Transformation):
    def __init__(self, beta: float) -> None:
        self.beta = beta


GROUPS = adamx.by_path({"embed": adamx.sgd(0.5)}, default=adamx.sgd(0.25))
ONE, TWO = (lambda tree: True), (lambda path, leaf: True)
MISTAKES: dict[str, tuple[Any, type[Exception], str]] = {
    "lr": (lambda: adamx.adamw(lr=1e-3), TypeError, "no argument 'lr': it is learning_rate here"),
    "betas": (lambda: adamx.adam(1e-3, betas=(0, 0)), TypeError, "it is b1 and b2 here"),
    "another": (lambda: adamx.adam(1e-3, nesterow=True), TypeError, "no argument 'nesterow'"),
    "text": (lambda: adamx.adamw("1e-3"), TypeError, "which is text: YAML reads 1e-3 so"),
    "MultiSteps": (lambda: adamx.MultiSteps, AttributeError, "adamx.accumulate takes its place"),
    "tree_utils": (lambda: adamx.tree_utils, AttributeError, ": use optax.tree_utils"),
    "a private name": (lambda: adamx._src, AttributeError, "has no attribute '_src'$"),
    "no name": (lambda: adamx.adamv, AttributeError, "has no attribute 'adamv'$"),
    "optax's state": (
        lambda: ADAMW.update(params(), of_optax(), params()),
        TypeError,
        r"got tuple: adamx.from_optax\(state, tx, params\) converts",
    ),
    "optax's state adapted": (
        lambda: adamx.adapt_state(ADAMW, params(), of_optax()),
        TypeError,
        r"adamx.from_optax\(state, tx, params\) converts",
    ),
    "a whole checkpoint": (
        lambda: adamx.adapt_state(ADAMW, params(), {"params": params(), "opt": state()}),
        TypeError,
        "is it the entry 'opt' of that",
    ),
    "another storage": (
        lambda: PACKED.update(params(), state(), params()),
        ValueError,
        r"adapt_state\(tx, params, state, saved_by=old_tx\)",
    ),
    "from_optax to another storage": (
        lambda: adamx.from_optax(of_optax(), PACKED, params()),
        ValueError,
        r"adapt_state\(tx, params, state, saved_by=that\)",
    ),
    "adapt_state swapped": (
        lambda: adamx.adapt_state(params(), ADAMW, state()),
        TypeError,
        r"got a dict with .*: the order is adapt_state\(tx, params, saved\)",
    ),
    "from_optax swapped": (
        lambda: adamx.from_optax(ADAMW, of_optax(), params()),
        TypeError,
        r"got tuple: the order is from_optax\(state, tx, params\)",
    ),
    "to_optax swapped": (
        lambda: adamx.to_optax(optax.adamw(1e-3), state(), params()),
        TypeError,
        r"to_optax\(state, tx, params\) expects",
    ),
    "moments swapped": (
        lambda: adamx.moments(ADAMW, state()),
        TypeError,
        r"moments\(state, tx\) expects .* got chain: are the arguments swapped",
    ),
    "reset swapped": (
        lambda: adamx.reset(state(), ADAMW, params(), "b"),
        TypeError,
        r"reset\(tx, state, params, patterns\) expects",
    ),
    "masters swapped": (
        lambda: adamx.masters(state(), params()),
        TypeError,
        r"masters\(params, state\) expects .*: are the arguments swapped",
    ),
    "statistics of parameters": (
        lambda: adamx.statistics(params()),
        TypeError,
        r"statistics\(state\) expects",
    ),
    "apply_updates swapped": (
        lambda: adamx.apply_updates(state(), params()),
        ValueError,
        r"only in params: .* and more .*apply_updates\(params, updates\)",
    ),
    "one tree of gradients": (
        lambda: adamx.compare(ADAMW, ADAMW, params(), params()),
        TypeError,
        r"got one tree, a dict with \['b', 'embed'\]: write \[gradients\]",
    ),
    "a pattern behind a wider one": (
        lambda: adamx.by_path({"*": None, "embed": ADAMW}, default=ADAMW).init(params()),
        ValueError,
        r"all leaves of 'embed' are in the groups of the patterns before it, \['\*'\]",
    ),
    "a predicate behind a wider one": (
        lambda: adamx.by_path({"e*": None, TWO: ADAMW, "b": None}, default=ADAMW).init(params()),
        ValueError,
        "all leaves of 'b' are in the groups of the patterns before it",
    ),
    "a mask of path and leaf": (
        lambda: adamx.adamw(0.5, mask=TWO).init(params()),
        TypeError,
        r"mask is called as f\(params\), and <lambda> is not such a function",
    ),
    "a predicate of the tree": (
        lambda: adamx.by_path({ONE: None}, default=ADAMW),
        TypeError,
        r"is called as f\(path, leaf\), and <lambda> is not such a function",
    ),
    "factors of the tree": (
        lambda: adamx.scale_by_path(ONE),
        TypeError,
        r"factors is called as f\(path, leaf\)",
    ),
    "a rate for all groups": (
        lambda: GROUPS.update(params(), GROUPS.init(params()) | {"learning_rate": 0.5}),
        ValueError,
        r"write state\['learning_rate'\]\['embed'\]",
    ),
    "two optimizers": (
        lambda: adamx.chain(adamx.adam(0.5), adamx.sgd(0.5)),
        ValueError,
        "or leave one out, if both are whole optimizers",
    ),
    "an average in the middle": (
        lambda: adamx.chain(adamx.ema_of_params(0.5), adamx.scale(-1.0)),
        ValueError,
        "follows it: move it to the end",
    ),
    "a mask without a branch": (
        lambda: adamx.adamw(0.5, mask={"embed": True}).init(params()),
        ValueError,
        r"patterns of paths: only in the parameters' tree: \['b'\]$",
    ),
    "an adjustable eps": (
        lambda: adamx.adamw(0.5, eps=adamx.adjustable(1e-8, "eps")),
        TypeError,
        r"rates, decays and bounds change from step to step.* argument is adamx.as_pytree\(tx\)$",
    ),
    "a constructor": (lambda: WithInit(0.5), AttributeError, "as `beta: float`, and the class"),
    "data of a concept of one's own": (
        lambda: adamx.from_dict({"_target_": "mine.concept"}),
        ValueError,
        "hydra.utils.instantiate.data, _convert_='all'.",
    ),
    "a step on a module": (
        lambda: adamx.make_step(ADAMW)({"w": jnp.ones(2), "f": jax.nn.relu}, state(), params()),
        TypeError,
        "leaf 'f' must be a floating-point array, got .*: for an Equinox module",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_error_names_the_remedy(name):
    make, error, said = MISTAKES[name]
    with pytest.raises(error, match=f"(?s){said}"):
        make()


def test_a_function_of_the_program_that_runs_is_no_data(monkeypatch):
    """In another process `__main__` is another module."""
    monkeypatch.setattr(sys.modules["__main__"], "a_mask", a_mask, raising=False)
    with pytest.raises(ValueError, match=r"mask is a_mask, which cannot be written"):
        adamx.to_dict(adamx.adamw(0.5, mask=a_mask))


def test_a_predicate_whose_arguments_are_not_known_is_called():
    with pytest.raises(ValueError, match="no signature"):
        inspect.signature(min)
    assert adamx.by_path({min: None}, default=ADAMW) is not None


def test_a_group_whose_leaves_have_no_gradient_is_no_mistake():
    """A predicate is asked about arrays; without parameters a leaf without a gradient is None."""
    tx = adamx.by_path({(lambda _, leaf: leaf.ndim > 1): ADAMW, "b": None}, default=ADAMW)
    updates, _ = tx.update({"embed": None, "b": jnp.ones(2)}, tx.init(params()))
    assert updates["embed"] is None and not updates["b"].any()


RATE = adamx.scale_by_learning_rate(0.5)
MISPLACED = {
    "clip": (adamx.chain(ADAMW, adamx.clip_by_global_norm(1.0)), "clips the step"),
    "optax's clip": (adamx.chain(ADAMW, optax.clip(1.0)), "clips the step"),
    "decay": (adamx.chain(RATE, adamx.add_decayed_weights(0.5)), "adds to the weights"),
    "wrapped": (
        adamx.skip_nonfinite(adamx.chain(RATE, adamx.add_decayed_weights(0.5))),
        "adds to the weights",
    ),
    "no rate": (adamx.scale_by_adam(), "go up the gradient"),
    "upwards": (adamx.chain(adamx.ema(0.5), adamx.scale(0.5)), "go up the gradient"),
}


@pytest.mark.parametrize("name", MISPLACED)
def test_summary_warns_of_a_stage_in_the_wrong_place(name):
    tx, said = MISPLACED[name]
    assert any(said in warning for warning in adamx.summary(tx, params()).warnings)


@pytest.mark.parametrize(
    "tx",
    [
        adamx.chain(adamx.clip_by_global_norm(1.0), ADAMW),
        adamx.chain(adamx.ema(0.5), adamx.scale(-0.5)),
        adamx.chain(adamx.scale_by_adam(), optax.scale(-0.5)),
        adamx.chain(ADAMW, adamx.scale_by_path({"b": 0.5})),
        adamx.schedule_free_adamw(0.5),
        adamx.hyperball(0.5),
    ],
    ids=repr,
)
def test_summary_does_not_warn_of_the_right_order(tx):
    said = " ".join(adamx.summary(tx, params()).warnings)
    assert not any(text in said for _, text in MISPLACED.values())


def test_the_variables_of_flax_are_told_how_to_become_arrays():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, adamx.monitor(adamx.adamw(0.1), every=1), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: (m(jnp.ones((1, 2))) ** 2).sum())(model))
    with pytest.raises(
        TypeError, match=r"nnx\.to_pure_dict\(nnx\.state\(optimizer\)\)\['opt_state'\]"
    ):
        adamx.statistics(optimizer.opt_state)
    state = nnx.to_pure_dict(nnx.state(optimizer))["opt_state"]
    assert adamx.statistics(state)["learning_rate"] == np.float32(0.1)
