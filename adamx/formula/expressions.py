r"""Expressions as values: they print in text and in LaTeX, and can be evaluated.

    (1 - b) * g_t  ->  "(1 - b) g_t",  r"(1 - \beta) \boldsymbol{g}_{t}"

An expression is a tree of operations over symbols: the gradient g_t, the weights w_{t-1}, slots
such as m_t, hyperparameters such as b1. The only algebra is that 0 and 1 vanish, and that signs and
quotients move outwards in products.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Name(NamedTuple):
    """The name of a symbol.

    Attributes:
        base: such as "m" or "b".
        number: counts symbols of one base, from 1; None if there is only one.
        hats: the number of hats.
        shift: the time: 0 for t, -1 for t - 1; None if it does not change.
        array: whether it is shaped like the parameter; LaTeX then sets it in bold.
    """

    base: str
    number: int | None = None
    hats: int = 0
    shift: int | None = None
    array: bool = False


@dataclasses.dataclass(frozen=True)
class Expr:
    """An operation and its arguments; + - * / ** of expressions and numbers make new ones.

    Attributes:
        op: "symbol", "number", "+", "-", "*", "/", "^", "neg", ">", ">=", "where", a reduction
            ("norm", "mean", "sum"), or the name of a function.
        args: a `Name`, a number, or expressions; a reduction has the expression, the name of its
            domain ("array", "all", ...), and a function from the array to its axes, or None.

    Example:
        >>> str((1 - T) * G / (W + 2)), (G * 1 + 0) == G
        ('(1 - t) g_t / (w_{t-1} + 2)', True)
    """

    op: str
    args: tuple[Any, ...]

    def __add__(self, other: Any) -> Expr:
        other = expr(other)
        if self == ZERO or other == ZERO:
            return other if self == ZERO else self
        return self - other.args[0] if other.op == "neg" else Expr("+", (self, other))

    def __sub__(self, other: Any) -> Expr:
        other = expr(other)
        if self == ZERO or other == ZERO:
            return -other if self == ZERO else self
        return self + other.args[0] if other.op == "neg" else Expr("-", (self, other))

    def __mul__(self, other: Any) -> Expr:
        other = expr(other)
        if ZERO in (self, other):
            return ZERO
        if ONE in (self, other):
            return other if self == ONE else self
        if "neg" in (self.op, other.op):
            return -(self.args[0] * other) if self.op == "neg" else -(self * other.args[0])
        if self.op == "/":
            return self.args[0] * other / self.args[1]
        if self.op == "*":
            return self.args[0] * (self.args[1] * other)
        return Expr("*", (self, other))

    def __truediv__(self, other: Any) -> Expr:
        other = expr(other)
        if self == ZERO or other == ONE:
            return self
        return -(self.args[0] / other) if self.op == "neg" else Expr("/", (self, other))

    def __pow__(self, other: Any) -> Expr:
        other = expr(other)
        if other == ZERO:
            return ONE
        return self if self in (ZERO, ONE) or other == ONE else Expr("^", (self, other))

    def __neg__(self) -> Expr:
        return self if self == ZERO else self.args[0] if self.op == "neg" else Expr("neg", (self,))

    def __radd__(self, other: Any) -> Expr:
        return expr(other) + self

    def __rsub__(self, other: Any) -> Expr:
        return expr(other) - self

    def __rmul__(self, other: Any) -> Expr:
        return expr(other) * self

    def __rtruediv__(self, other: Any) -> Expr:
        return expr(other) / self

    def __str__(self) -> str:
        return _written(self, False)[0]


def expr(x: Any) -> Expr:
    """Return an expression unchanged, and a number as an expression."""
    return x if isinstance(x, Expr) else Expr("number", (float(x),))


def symbol(base: str, shift: int | None = None, *, array: bool = False) -> Expr:
    """Return a symbol."""
    return Expr("symbol", (Name(base, shift=shift, array=array),))


ZERO, ONE = expr(0), expr(1)
G, W, T = symbol("g", 0, array=True), symbol("w", -1, array=True), symbol("t")
"""The gradient, the weights before the step, and the number of the step, 1 in the first."""

REDUCTIONS = ("norm", "mean", "sum")


def call(function: str, *args: Any) -> Expr:
    """Return a function of expressions, by its name: "sqrt", "abs", "max", "min", "sign", "clip".

    Any other name stands for a function without a formula.

    Example:
        >>> print(call("max", abs_(G), 2), call("my_own", G))
        max(|g_t|, 2) my_own(g_t)
    """
    return Expr(function, tuple(map(expr, args)))


def sqrt(x: Any) -> Expr:
    """Return the square root."""
    return call("sqrt", x)


def abs_(x: Any) -> Expr:
    """Return the magnitude of each element."""
    return call("abs", x)


def reduced(how: str, x: Expr, over: str, axes: Callable[[Any], Any] | None = None) -> Expr:
    """Return the norm, mean or sum of an expression over an array or another domain.

    Args:
        how: "norm", "mean" or "sum".
        x: the expression.
        over: the name of the domain; "all" means every parameter.
        axes: a function of the array that returns the axes; None means all of them.
    """
    return Expr(how, (x, over, axes))


def where(condition: Expr, yes: Any, no: Any) -> Expr:
    """Return yes if a condition holds, else no; it is `Expr(">", (a, b))` or with ">="."""
    return Expr("where", (condition, expr(yes), expr(no)))


def last(x: Expr) -> Expr:
    """Return a symbol one step earlier."""
    name = x.args[0]
    return Expr("symbol", (name._replace(shift=name.shift - 1),))


def following(x: Expr) -> Expr:
    """Return a symbol one step later, or itself if it does not change."""
    name = x.args[0]
    return x if name.shift is None else Expr("symbol", (name._replace(shift=name.shift + 1),))


def replaced(x: Any, replace: Callable[[Expr], Expr]) -> Any:
    """Return an expression with its symbols replaced."""
    if not isinstance(x, Expr):
        return x
    if x.op == "symbol":
        return replace(x)
    return Expr(x.op, tuple(replaced(arg, replace) for arg in x.args))


def parts_of(x: Any) -> Iterator[Expr]:
    """Yield an expression and all expressions in it."""
    if isinstance(x, Expr):
        yield x
        for arg in x.args:
            yield from parts_of(arg)


# ------------------------------------------------------------------------------ text and LaTeX


class _Form(NamedTuple):
    """How to write an operation: its precedence, and the least precedence of its arguments."""

    binds: int
    text: str
    needs: tuple[int, ...]
    latex: str
    needs_in_latex: tuple[int, ...] | None = None


_CASES = r"\begin{{cases}} {1} & \text{{if }} {0} \\ {2} & \text{{otherwise}} \end{{cases}}"
_FORMS = {
    "where": _Form(0, "{1} if {0} else {2}", (0, 1, 0), _CASES, (0, 0, 0)),
    ">": _Form(0, "{} > {}", (1, 1), "{} > {}"),
    ">=": _Form(0, "{} >= {}", (1, 1), r"{} \ge {}"),
    "+": _Form(1, "{} + {}", (1, 1), "{} + {}"),
    "-": _Form(1, "{} - {}", (1, 2), "{} - {}"),
    "neg": _Form(1, "-{}", (2,), "-{}"),
    "*": _Form(2, "{} {}", (2, 2), "{} {}"),
    "/": _Form(2, "{} / {}", (2, 3), r"\frac{{{}}}{{{}}}", (0, 0)),
    "^": _Form(3, "{}^{}", (4, 4), "{}^{{{}}}", (4, 0)),
    "sqrt": _Form(4, "sqrt({})", (0,), r"\sqrt{{{}}}"),
    "abs": _Form(4, "|{}|", (0,), r"\lvert {} \rvert"),
    "exp": _Form(3, "exp({})", (0,), "e^{{{}}}"),
    "norm": _Form(4, "|{}|_{}", (0,), r"\lVert {} \rVert_{{\mathrm{{{}}}}}"),
    "mean": _Form(4, "mean_{1}({0})", (0,), r"\mathrm{{mean}}_{{\mathrm{{{1}}}}}({0})"),
    "sum": _Form(4, "sum_{1}({0})", (0,), r"\mathrm{{sum}}_{{\mathrm{{{1}}}}}({0})"),
}


_LATEX = {
    "lr": r"\alpha", "b": r"\beta", "wd": r"\lambda", "eps": r"\varepsilon", "rho": r"\rho",
    "eps_root": r"\varepsilon_{\mathrm{root}}", "delta": r"\delta",
    "slow": r"m^{\mathrm{slow}}", "vmax": r"v^{\max}",
}  # fmt: skip
"""The LaTeX of symbols with more than one letter."""


def latex(x: Expr) -> str:
    r"""Return an expression in LaTeX.

    Example:
        >>> print(latex(G / (sqrt(T) + 1)))
        \frac{\boldsymbol{g}_{t}}{\sqrt{t} + 1}
    """
    return _written(x, True)[0]


def _written(x: Expr, tex: bool) -> tuple[str, int]:
    """Return an expression as text or LaTeX, and its precedence."""
    if x.op == "symbol":
        name = x.args[0]
        return _name(name, tex), 3 if name.hats and not tex else 4
    if x.op == "number":
        return _number(x.args[0], tex), 4 if x.args[0] >= 0 else 1
    form = _FORMS.get(x.op)
    if form is None:
        inside = ", ".join(_written(arg, tex)[0] for arg in x.args)
        if not tex:
            return f"{x.op}({inside})", 4
        function = rf"\{x.op}" if x.op in ("max", "min") else _upright(x.op)
        return rf"{function}\left( {inside} \right)", 4
    needs = (form.needs_in_latex if tex else None) or form.needs
    parts = [_enclosed(arg, need, tex) for arg, need in zip(x.args, needs, strict=False)]
    parts += [str(arg) for arg in x.args[len(parts) : 2]]  # the domain of a reduction
    written = form.latex if tex else form.text
    if x.op == "*":
        right = x.args[1].args[0] if x.args[1].op == "*" else x.args[1]
        if tex and right.op == "number":
            written = r"{} \cdot {}"
        elif not tex and _is_scalar(x.args[0]) and _is_scalar(right):
            written = "{}*{}"
    return written.format(*parts), form.binds


def _enclosed(x: Expr, need: int, tex: bool) -> str:
    written, binds = _written(x, tex)
    if binds >= need:
        return written
    left, right = "[]" if x.op in (">", ">=") else "()"
    return rf"\left{left} {written} \right{right}" if tex else f"{left}{written}{right}"


def _is_scalar(x: Expr) -> bool:
    return x.op == "number" or (x.op == "symbol" and not x.args[0].array)


def _name(name: Name, tex: bool, time: str | None = None) -> str:
    """Return a symbol's name, at another time if one is given."""
    if time is None and name.shift is not None:
        time = {0: "t", -1: "t-1", 1: "t+1"}[name.shift]
    number = "" if name.number is None else str(name.number)
    if not tex:
        below = "" if time is None else f"_{time}" if len(time) == 1 else f"_{{{time}}}"
        return f"{name.base}{number}{'^' * name.hats}{below}"
    letter = _LATEX.get(name.base, name.base if len(name.base) == 1 else _upright(name.base))
    letter = rf"\boldsymbol{{{letter}}}" if name.array else letter
    for _ in range(name.hats):
        letter = rf"\hat{{{letter}}}"
    below = ",".join(part for part in (number, time) if part)
    return f"{letter}_{{{below}}}" if below else letter


def _upright(word: str) -> str:
    escaped = word.replace("_", r"\_")
    return rf"\mathrm{{{escaped}}}"


def at_start(x: Expr) -> str:
    """Return the text of an expression; a symbol gets the index 0."""
    return _name(x.args[0], False, "0") if x.op == "symbol" else str(x)


def _number(x: float, tex: bool) -> str:
    text = str(int(x)) if x == int(x) and abs(x) < 1e6 else repr(x)
    mantissa, e, exponent = text.partition("e")
    if not tex or not e:
        return text
    power = f"10^{{{int(exponent)}}}"
    return power if mantissa == "1" else rf"{mantissa} \cdot {power}"
