"""Formulas: the step of a composition, written by its concepts.

    concept.formula(u, symbols) = the outgoing update, as an expression of the incoming one

Each concept defines its slots in `Symbols` and passes an expression on, so a composition writes its
own formula. At the end the weights are collected, which turns w + (-lr (x + wd w)) into the papers'
(1 - lr*wd) w - lr x. tests/test_summary.py evaluates the formulas and compares them with the steps.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import numbers
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from adamx.formula.adjustable import adjustable
from adamx.formula.expressions import (
    ONE,
    ZERO,
    Expr,
    Name,
    W,
    abs_,
    at_start,
    call,
    expr,
    following,
    last,
    latex,
    parts_of,
    replaced,
    sqrt,
    symbol,
)
from adamx.formula.values import Static, function_name, value_text

_LETTERS = {
    "mu": "m", "nu": "v", "sum_of_squares": "s", "mu_slow": "slow", "nu_max": "vmax",
    "mu_scaled": "m", "mu_normalized": "m",
    "nu_seeded": "v", "nu_additive": "v", "nu_inf": "v", "nu_mean": "v",
    "nu_deviation": "v", "nu_extrapolated": "v", "trace_of_steps": "trace",
    "mu_correction": "c_m", "nu_correction": "c_v", "bias_correction": "c",
    "nu_row": "R", "nu_col": "C",
    "params_mean": "mean", "params_ema": "ema",
}  # fmt: skip
"""The symbols of slots and scalars of the state; others are called by their names."""


class Symbols:
    """The symbols of one composition, and their definitions.

    Attributes:
        definitions: expressions by symbol, in the order in which they were made.
        starts: values before the first step, by symbol of a slot.
        values: values of hyperparameters, by symbol.
        slots: symbols by name of a slot.
        remarks: sentences, for facts that no expression has.
    """

    def __init__(self) -> None:
        """Start with nothing defined."""
        self.definitions: dict[Expr, Expr] = {}
        self.starts: dict[Expr, Expr] = {}
        self.values: dict[Expr, Any] = {}
        self.slots: dict[str, Expr] = {}
        self.remarks: list[str] = []
        self._used: collections.Counter[str] = collections.Counter()

    def number(self, base: str, value: Any) -> Expr:
        """Return the symbol of a hyperparameter: equal values of one base share it.

        Args:
            base: its name: "lr", "wd", "b" for decays, "eps", or another word.
            value: a number (0, 1 and -1 need no symbol), an array, or a schedule, whose symbol has
                the index t.
        """
        if isinstance(value, numbers.Real) and value in (0, 1, -1):
            return -ONE if value == -1 else expr(value)
        for known, other in self.values.items():
            if known.args[0].base == base and Static(other) == Static(value):
                return known
        found = self._fresh(base, shift=0 if callable(value) else None)
        self.values[found] = value
        return found

    def slot(self, name: str, *, array: bool = True) -> Expr:
        """Return the symbol of a slot after `accumulate`, or of a recorded scalar."""
        return self.slots.setdefault(name, symbol(_LETTERS.get(name, name), 0, array=array))

    def define(self, what: Expr, value: Expr, start: Any = None) -> Expr:
        """Define a symbol; a definition by its `last` value needs the start, too."""
        self.definitions[what] = value
        if start is not None:
            number = isinstance(start, Expr | numbers.Real)
            self.starts[what] = expr(start) if number else self.number("initial", start)
        return what

    def remark(self, remark: str) -> None:
        """Add a sentence, for a fact that no expression has."""
        self.remarks.append(remark)

    def hat(self, u: Expr, value: Expr) -> Expr:
        """Return u with a hat, defined by the value, or the value itself if u is not a symbol."""
        if u.op != "symbol" or u == value:
            return value
        name = u.args[0]
        hatted = Expr("symbol", (name._replace(hats=name.hats + 1),))
        if self.definitions.get(hatted, value) != value:
            return value
        return self.define(hatted, value)

    def named(self, u: Expr, base: str = "u", *, array: bool = True, shift: int | None = 0) -> Expr:
        """Return a symbol for an expression that is needed more than once."""
        if u.op in ("symbol", "number"):
            return u
        for known, value in self.definitions.items():
            if value == u:
                return known
        return self.define(self._fresh(base, shift, array), u)

    def before(self, x: Expr, slots: Sequence[str]) -> Expr:
        """Return an expression with some slots replaced by their values before the step."""
        mine = [self.slots[name] for name in slots if name in self.slots]

        def earlier(found: Expr) -> Expr:
            if found in mine:
                return last(found)
            if found.args[0].hats and found in self.definitions:
                return replaced(self.definitions[found], earlier)
            return found

        return replaced(x, earlier)

    def _fresh(self, base: str, shift: int | None, array: bool = False) -> Expr:
        self._used[base] += 1
        return Expr("symbol", (Name(base, self._used[base], shift=shift, array=array),))

    def finished(self, update: Expr) -> Formula:
        """Return the formula of the step that adds an update to the weights."""

        def final(found: Expr) -> Expr:
            name = found.args[0]
            alone = name.number is not None and self._used[name.base] == 1
            return Expr("symbol", (name._replace(number=None),)) if alone else found

        finish = functools.partial(replaced, replace=final)
        of_w, rest = _collected(update)
        less_w = of_w.op == "-" and of_w.args[1] == ONE  # what is subtracted from the new weights
        return Formula(
            finish((of_w.args[0] if less_w else 1 + of_w) * W + rest),
            {finish(k): finish(v) for k, v in self.definitions.items()},
            {finish(k): finish(v) for k, v in self.starts.items()},
            {finish(k): v for k, v in self.values.items()},
            {name: finish(found) for name, found in self.slots.items()},
            tuple(self.remarks),
        )


def _collected(x: Expr) -> tuple[Expr, Expr]:
    """Return a and b such that an expression is a * w + b; a = 0 if it is not written so."""
    if x == W:
        return ONE, ZERO
    pairs = [_collected(arg) for arg in x.args] if x.op in ("+", "-", "*", "/", "neg") else []
    match x.op, pairs:
        case "+", [(a, b), (c, d)]:
            return a + c, b + d
        case "-", [(a, b), (c, d)]:
            return a - c, b - d
        case "neg", [(a, b)]:
            return -a, -b
        case "/", [(a, b), _]:
            return a / x.args[1], b / x.args[1]
        case "*", [(a, b), _] if a != ZERO:
            return a * x.args[1], b * x.args[1]
        case "*", [_, (a, b)]:
            return x.args[0] * a, x.args[0] * b
    return ZERO, x


@dataclasses.dataclass(frozen=True)
class Formula:
    """The formula of a composition, for one parameter; prints as lines of text.

    Attributes:
        step: the new weights.
        definitions: expressions by symbol, of the symbols in the step and of slots.
        starts: values before the first step, by symbol of a slot.
        values: values of hyperparameters, by symbol.
        slots: symbols by name of a slot.
        remarks: sentences, for facts that no expression has.
    """

    step: Expr
    definitions: dict[Expr, Expr]
    starts: dict[Expr, Expr]
    values: dict[Expr, Any]
    slots: dict[str, Expr]
    remarks: tuple[str, ...]

    def parts(self) -> Iterator[Expr]:
        """Yield the expressions that occur in the step and in the definitions."""
        for x in (self.step, *self.definitions.values()):
            yield from parts_of(x)

    def operations(self) -> set[str]:
        """Return the operations and functions that occur."""
        return {part.op for part in self.parts()}

    def __str__(self) -> str:
        lines = [f"    {what} = {value}" for what, value in self.definitions.items()]
        starts = [f"{at_start(what)} = {at_start(start)}" for what, start in self.starts.items()]
        values = [
            f"{what} = {value_text(value)}{'(t - 1)' if _of_step(value) else ''}"
            for what, value in self.values.items()
        ]
        lines += ["    " + ", ".join(line) for line in (starts, values) if line]
        lines += [f"    ({remark})" for remark in self.remarks]
        return "\n".join([f"w_t <- {self.step}", *lines])

    @property
    def latex(self) -> str:
        """The step and the definitions, for a display equation."""
        rows = [f"{latex(following(W))} &\\leftarrow {latex(self.step)}"]
        rows += [f"{latex(what)} &= {latex(value)}" for what, value in self.definitions.items()]
        return "\\begin{aligned}\n" + " \\\\\n".join(rows) + "\n\\end{aligned}"


def _of_step(value: Any) -> bool:
    return callable(value) and not isinstance(value, adjustable)


def applied(function: Callable[..., Any], *args: Expr) -> Expr:
    """Return a function of arrays as an expression, read from its jaxpr.

    A function may have its formula as an attribute, `formula`. A function with operations that this
    file cannot write is called by its name.

    Example:
        >>> from adamx.formula.expressions import G, T
        >>> print(applied(lambda a, b: jnp.maximum(a, 2 * b), G, T), applied(jnp.cumsum, G))
        max(g_t, 2*t) cumsum(g_t)
    """
    if written := getattr(function, "formula", None):
        return written(*args)
    try:
        closed = jax.make_jaxpr(function)(*[jax.ShapeDtypeStruct((), jnp.float32)] * len(args))
        (found,) = _read(closed.jaxpr, args)
        return found
    except Exception:  # a function may raise anything when it is traced
        return call(function_name(function), *args)


_PRIMITIVES: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
    "neg": operator.neg, "sqrt": sqrt, "abs": abs_, "square": lambda x: x**2,
    "max": functools.partial(call, "max"), "min": functools.partial(call, "min"),
    "sign": functools.partial(call, "sign"), "convert_element_type": lambda x: x,
}  # fmt: skip


def _read(jaxpr: Any, args: Sequence[Expr]) -> list[Expr]:
    known = dict(zip(jaxpr.invars, args, strict=True))

    def value(x: Any) -> Expr:
        return expr(x.val) if hasattr(x, "val") else known[x]  # a literal has its value

    for equation in jaxpr.eqns:
        inputs, name = [value(x) for x in equation.invars], equation.primitive.name
        if "jaxpr" in equation.params:
            outputs = _read(equation.params["jaxpr"].jaxpr, inputs)
        elif name == "integer_pow":
            outputs = [inputs[0] ** equation.params["y"]]
        else:
            outputs = [_PRIMITIVES[name](*inputs)]
        known |= dict(zip(equation.outvars, outputs, strict=True))
    return [value(x) for x in jaxpr.outvars]
