"""The cost and the formula of an optimizer, before anything is allocated.

    bytes moved >= 2 * parameters + 2 * slots + gradients

in a step whose arrays do not fit into a cache: parameters and slots are read and written, gradients
read. If the update depends on a whole array or tree (a norm, a guard), an array as large as the
gradients is read once more.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adamx.core import errors
from adamx.core.concept import any_of, parts
from adamx.core.foreign import as_concept, as_transformation, named
from adamx.core.paths import flatten
from adamx.core.precision_warning import PrecisionWarning
from adamx.core.stacked import stacked_axes
from adamx.core.transformation import Transformation
from adamx.formula.expressions import REDUCTIONS, Expr, G, W
from adamx.formula.symbols import Formula, Symbols
from adamx.formula.values import factory_name
from adamx.wrappers.by_path import by_path
from adamx.wrappers.skip_nonfinite import skip_nonfinite

LARGE_EPS = 1e-3
"""From here on `summary` warns of eps: gradients of single elements are often smaller."""

_FOREIGN = ""  # the name of the state of an Optax transformation


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter in a summary.

    Attributes:
        path: such as "dense/kernel".
        group: the pattern of its `by_path` group; "" if there are no groups.
        param: its shape and dtype.
        slots: by name, the shapes and dtypes of its slots.
        formula: the formula of its update.
        rereads: whether a step reads an array as large as its gradient once more.
        stacked: how many of its leading axes are declared by `stacked`.
    """

    path: str
    group: str
    param: jax.ShapeDtypeStruct
    slots: dict[str, jax.ShapeDtypeStruct]
    formula: Formula
    rereads: bool
    stacked: int = 0

    @property
    def frozen(self) -> bool:
        """Whether it never moves."""
        return self.formula.step == W

    @property
    def decayed(self) -> bool:
        """Whether a weight decay acts on it."""
        return any(symbol.args[0].base == "wd" for symbol in self.formula.values)

    @property
    def layer(self) -> jax.ShapeDtypeStruct:
        """The shape and dtype of the parameter, or of one layer of a stacked one."""
        return jax.ShapeDtypeStruct(self.param.shape[self.stacked :], self.param.dtype)

    @property
    def slot_bytes(self) -> int:
        """The bytes of its slots."""
        return sum(map(_bytes, self.slots.values()))

    @property
    def traffic(self) -> int:
        """The least bytes that a step moves for it; a frozen one is neither read nor written."""
        moved = 0 if self.frozen else 2
        read = int(bool(self.slots) or not self.frozen) + self.rereads
        return (moved + read) * _bytes(self.param) + 2 * self.slot_bytes


@dataclasses.dataclass(frozen=True)
class Summary:
    """The result of `summary`; prints as a table, totals, composition, formula and warnings.

    Attributes:
        leaves: the parameters.
        scalars: the bytes of the state's other entries: the count, recorded scalars.
        composition: the transformation as it prints.
        warnings: likely mistakes, in sentences.
        by: whether a line of the table is a "group" or a "leaf".
    """

    leaves: tuple[Leaf, ...]
    scalars: int
    composition: str
    warnings: tuple[str, ...]
    by: str

    @property
    def size(self) -> int:
        """The number of elements of all parameters."""
        return sum(leaf.param.size for leaf in self.leaves)

    @property
    def bytes(self) -> dict[str, int]:
        """The bytes of "parameters", "gradients" (in the parameters' dtypes) and "slots"."""
        params = sum(_bytes(leaf.param) for leaf in self.leaves)
        slots = sum(leaf.slot_bytes for leaf in self.leaves)
        return {"parameters": params, "gradients": params, "slots": slots}

    @property
    def traffic(self) -> int:
        """The least bytes that a step moves, in one pass over arrays larger than the caches.

        Parameters and slots are read and written, gradients read: 28 bytes per parameter for AdamW
        in float32. A norm or a guard reads an array as large as the gradients once more. The
        compiled step may move more: XLA on CPU makes a kernel for each output, 40 bytes for AdamW.
        """
        return sum(leaf.traffic for leaf in self.leaves)

    @property
    def formula(self) -> str:
        """The composition's formula in text; if leaves differ, one formula for each kind."""
        return self._formulas("for {}:\n{}", str)

    @property
    def latex(self) -> str:
        """The same in LaTeX, for display equations."""
        return self._formulas("% for {}\n{}", lambda formula: formula.latex)

    def _formulas(self, form: str, write: Callable[[Formula], str]) -> str:
        groups = _grouped(self.leaves, lambda leaf: write(leaf.formula))
        if len(groups) == 1:
            return write(groups[0][0].formula)
        return "\n".join(form.format(_some(group), write(group[0].formula)) for group in groups)

    def __str__(self) -> str:
        leafwise = self.by == "leaf"
        groups = [[leaf] for leaf in self.leaves] if leafwise else _grouped(self.leaves, _kind)
        rows = [("parameters", "shape", "dtype", "numbers", "slots", "bytes")]
        rows += [_row(group, leafwise) for group in groups]
        lines = [
            *_table(rows, right=(3, 5)),
            "",
            *_table(self._totals(), right=(1, 2)),
            "",
            self.composition,
            "",
            self.formula,
        ]
        return "\n".join(lines + [f"\nwarning: {warning}" for warning in self.warnings])

    def _totals(self) -> list[tuple[str, ...]]:
        total = self.bytes
        total |= {"together": sum(total.values()), "a step moves at least": self.traffic}
        size = max(self.size, 1)
        rows = [("", "bytes a parameter", "bytes")]
        rows += [(what, f"{number / size:.4g}", _text(number)) for what, number in total.items()]
        return [*rows, ("scalars in the state", "", _text(self.scalars))]


def summary(
    tx: optax.GradientTransformation | optax.MultiSteps, params: Any, *, by: str = "group"
) -> Summary:
    """Return the cost and the formula of an optimizer for these parameters; allocate nothing.

    Args:
        tx: an adamx or Optax transformation. For an Optax transformation the table lists the arrays
            of its state, and the formula is its name.
        params: the parameters or their shapes, as from `jax.eval_shape`; None leaves are left out.
        by: the lines of the printed table: "leaf", or "group": the leaves of one `by_path` group
            with the same formula, dtype and storage.

    Returns:
        A `Summary` with `bytes`, `traffic`, `formula`, `latex`, `warnings` and `leaves`; it prints
        as a report.

    Raises:
        TypeError: if `tx` is not a transformation, or a leaf not a floating-point array or shape.
        ValueError: if `by` is neither; if a pattern or mask in `tx` does not fit the parameters.

    Example:
        >>> import adamx, jax
        >>> params = {"kernel": jax.ShapeDtypeStruct((1000, 1000), "float32")}
        >>> found = summary(adamx.momentum(0.1), params)
        >>> found.bytes["slots"], found.traffic // found.size
        (4000000, 20)
        >>> print(found)
        parameters  shape         dtype      numbers  slots          bytes
        kernel      [1000, 1000]  float32  1,000,000  mu float32  7.63 MiB
        <BLANKLINE>
                               bytes a parameter     bytes
        parameters                             4  3.81 MiB
        gradients                              4  3.81 MiB
        slots                                  4  3.81 MiB
        together                              12  11.4 MiB
        a step moves at least                 20  19.1 MiB
        scalars in the state                           8 B
        <BLANKLINE>
        chain(ema(0.9), scale_by_learning_rate(0.1))
        <BLANKLINE>
        w_t <- w_{t-1} - lr m_t
            m_t = b m_{t-1} + (1 - b) g_t
            m_0 = 0
            b = 0.9, lr = 0.1
    """
    tx = as_transformation(tx, "summary: tx")
    concept = as_concept(tx, "summary: tx")
    if by not in ("group", "leaf"):
        raise ValueError(f"summary: by must be 'group' or 'leaf', got {by!r}")
    paths, given, treedef = flatten(params)
    shapes = [_shape(path, leaf) for path, leaf in zip(paths, given, strict=True)]
    bound: list[Transformation | None] = [None] * len(paths)
    groups: list[by_path] = []

    def look(params: Any) -> Any:
        resolved = concept.for_tree(params)
        groups.extend(part for part in parts(resolved) if isinstance(part, by_path))
        for i, (path, leaf) in enumerate(zip(paths, treedef.flatten_up_to(params), strict=True)):
            bound[i] = None if leaf is None else resolved.for_leaf(path, leaf)
        return tx.init(params)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = jax.eval_shape(look, treedef.unflatten(shapes))
    entries = state if isinstance(tx, Transformation) else {_FOREIGN: state}
    slots, scalars = _slots(concept, entries, paths, shapes, treedef)
    formulas = {b: derived(b) for b in dict.fromkeys(bound) if b is not None}
    guarded = any_of(concept, lambda part: isinstance(part, skip_nonfinite))
    leaves = []
    for path, shape, variant, own in zip(paths, shapes, bound, slots, strict=True):
        if shape is not None and variant is not None:
            formula = formulas[variant]
            rereads = guarded or not formula.operations().isdisjoint(REDUCTIONS)
            group = " / ".join(part.label(path, shape) for part in groups)
            number = stacked_axes(variant)
            leaves.append(Leaf(path, group, shape, own, formula, rereads, number))
    said = []
    for warning in caught:
        if issubclass(warning.category, PrecisionWarning):
            said.append(str(warning.message).removeprefix("adamx: "))
        else:
            warnings.warn(warning.message, stacklevel=2)
    said += [*_foreign_precision(tx, leaves), *_undeclared_layers(leaves)]
    said += [*_decayed_vectors(leaves), *_large_eps(leaves)]
    composition = repr(tx) if isinstance(tx, Transformation) else f"{factory_name(tx)}(...)"
    return Summary(tuple(leaves), scalars, composition, tuple(said), by)


def derived(tx: Transformation) -> Formula:
    """Return the formula of a transformation that is bound to one leaf.

    Example:
        >>> import adamx
        >>> print(derived(adamx.momentum(0.1)))
        w_t <- w_{t-1} - lr m_t
            m_t = b m_{t-1} + (1 - b) g_t
            m_0 = 0
            b = 0.9, lr = 0.1
    """
    symbols = Symbols()
    return symbols.finished(tx.formula(G, symbols))


def _shape(path: str, leaf: Any) -> jax.ShapeDtypeStruct | None:
    if leaf is None:
        return None
    if isinstance(leaf, float | complex):
        leaf = jnp.asarray(leaf)
    if not hasattr(leaf, "shape") or not jnp.issubdtype(leaf.dtype, jnp.inexact):
        what = f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "shape") else None
        raise TypeError(
            f"summary: leaf {path!r} must be a floating-point array or its shape, got "
            f"{what or errors.describe(leaf)}: set leaves that are not trained to None"
        )
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _slots(
    concept: Transformation, state: Any, paths: list[str], shapes: list[Any], treedef: Any
) -> tuple[list[dict[str, Any]], int]:
    """Return each leaf's slots, and the bytes of the state's other entries."""
    slots: list[dict[str, Any]] = [{} for _ in paths]
    foreign = {part.name for part in parts(concept) if isinstance(part, named)}
    foreign.add(_FOREIGN)
    scalars = 0
    for name, entry in state.items():
        if name in concept.tree_names():
            for own, x in zip(slots, treedef.flatten_up_to(entry), strict=True):
                own |= {} if x is None else {name: x}
        elif name in foreign:
            for i, slot, x in _matched(name, entry, paths, shapes):
                if i is None:
                    scalars += _bytes(x)
                else:
                    slots[i][slot] = x
        else:
            scalars += sum(map(_bytes, jax.tree.leaves(entry)))
    return slots, scalars


def _matched(
    name: str, entry: Any, paths: list[str], shapes: list[Any]
) -> Iterator[tuple[int | None, str, Any]]:
    """Yield each array of a foreign state with its leaf's index and its slot's name.

    The path of the array ends with the path of its leaf; a leaf without a path has its shape.
    """
    where = {path: i for i, path in enumerate(paths) if shapes[i] is not None}
    for path, x in jax.tree_util.tree_flatten_with_path(entry)[0]:
        keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
        for start in range(len(keys) + 1):
            i = where.get("/".join(keys[start:]))
            if i is not None and (start < len(keys) or x.shape == shapes[i].shape):
                yield i, "/".join(filter(None, [name, *keys[:start]])), x
                break
        else:
            yield None, name, x


# ------------------------------------------------------------------------------------ warnings


def _foreign_precision(tx: Any, leaves: list[Leaf]) -> Iterator[str]:
    """Warn of 16-bit parameters in a foreign transformation; the `init` of adamx's warns itself."""
    narrow = [leaf for leaf in leaves if jnp.finfo(leaf.param.dtype).bits < 32]
    if narrow and not isinstance(tx, Transformation):
        yield (
            f"{len(narrow)} of the parameters' leaves are {narrow[0].param.dtype}, and an Optax "
            "transformation may lose small steps by rounding: adamx.master_weights(tx) does not"
        )


def _decayed_vectors(leaves: list[Leaf]) -> Iterator[str]:
    """Warn of a weight decay on leaves of rank 0 and 1, if there are others."""
    vectors = [leaf for leaf in leaves if leaf.decayed and leaf.layer.ndim <= 1]
    if vectors and any(leaf.layer.ndim > 1 for leaf in leaves):
        yield (
            f"weight decay acts on {_some(vectors)}, of rank 1 or less: biases and the scales of "
            "norms are usually left out, with mask=adamx.all_but(...)"
        )


def _undeclared_layers(leaves: list[Leaf]) -> Iterator[str]:
    """Warn of leaves that look like stacked layers, if the optimizer takes each as one array.

    So look all leaves below one place in the tree if they have the same first size L, and are
    matrices [L, m, n] as well as biases and norms [L, n].
    """
    seen: set[str] = set()
    for place, found in _by_place(leaves).items():
        sizes = {leaf.layer.shape[:1] for leaf in found}
        ranks = {leaf.layer.ndim for leaf in found}
        alike = len(sizes) == 1 and sizes != {(1,)} and min(ranks) == 2 < max(ranks)
        inside = any(f"{place}/".startswith(above) for above in seen)
        if alike and not inside and any(map(_takes_layers_as_one, found)):
            seen.add(f"{place}/" if place else "")
            pattern = f"{place}/*" if place else "*"
            yield (
                f"{_some(found)} look like {sizes.pop()[0]} layers stacked along the first axis, "
                f'and this optimizer takes each leaf as one array: adamx.stacked(tx, {{"{pattern}":'
                f" {found[0].stacked + 1}}}) takes each layer as an array"
            )


def _by_place(leaves: list[Leaf]) -> dict[str, list[Leaf]]:
    """Return the leaves below each place in the tree, the root first."""
    found: dict[str, list[Leaf]] = {}
    for depth in range(max((leaf.path.count("/") for leaf in leaves), default=0) + 1):
        for leaf in leaves:
            steps = leaf.path.split("/")
            if depth < len(steps):
                found.setdefault("/".join(steps[:depth]), []).append(leaf)
    return found


def _takes_layers_as_one(leaf: Leaf) -> bool:
    """Say whether a leaf's update would be another one if it were stacked layers."""
    first = (_axes(part.args[2], leaf.layer) for part in leaf.formula.parts() if _of_array(part))
    return any(0 in axes for axes in first) or (leaf.decayed and leaf.layer.ndim == 2)


def _of_array(part: Expr) -> bool:
    return part.op in REDUCTIONS and part.args[1] != "all"


def _axes(function: Callable[[Any], Any] | None, x: jax.ShapeDtypeStruct) -> set[int]:
    """Return the axes of an array that a reduction is over."""
    axes = None if function is None else function(x)
    if axes is None:
        return set(range(x.ndim))
    return {axis % x.ndim for axis in (axes if isinstance(axes, tuple) else (axes,))}


def _large_eps(leaves: list[Leaf]) -> Iterator[str]:
    """Warn of an eps from LARGE_EPS on, of an eps under the root from its square on."""
    values = [(s.args[0].base, x) for leaf in leaves for s, x in leaf.formula.values.items()]
    for base, least in (("eps", LARGE_EPS), ("eps_root", LARGE_EPS**2)):
        for eps in [x for b, x in values if b == base and isinstance(x, float) and x >= least][:1]:
            size = eps if base == "eps" else math.sqrt(eps)
            yield (
                f"{base} = {eps:g}: elements whose gradients stay below {size:g} are divided by "
                "that and not by their own size, so their steps are as small as their gradients"
            )


# ----------------------------------------------------------------------------------- the table


def _grouped(leaves: Iterable[Leaf], key: Callable[[Leaf], Any]) -> list[list[Leaf]]:
    groups: dict[Any, list[Leaf]] = {}
    for leaf in leaves:
        groups.setdefault(key(leaf), []).append(leaf)
    return list(groups.values())


def _kind(leaf: Leaf) -> Any:
    slots = tuple((name, str(x.dtype)) for name, x in leaf.slots.items())
    layers = leaf.param.shape[: leaf.stacked]
    return leaf.group, str(leaf.formula), str(leaf.param.dtype), slots, layers


def _some(leaves: list[Leaf]) -> str:
    paths = [leaf.path or "the array" for leaf in leaves[:3]]
    return ", ".join(paths) + (f" and {len(leaves) - 3} more" if len(leaves) > 3 else "")


def _row(group: list[Leaf], leafwise: bool) -> tuple[str, ...]:
    first = group[0]
    label = f"{first.group}: " if first.group else ""
    shape = str(list(first.layer.shape)) if len(group) == 1 else f"{len(group)} leaves"
    if first.stacked:
        layers = math.prod(first.param.shape[: first.stacked])
        shape = f"{layers} arrays {shape}" if len(group) == 1 else f"{shape} of {layers} arrays"
    slots = [
        f"{name} {x.dtype}{list(x.shape) if leafwise and x.shape != first.param.shape else ''}"
        for name, x in first.slots.items()
    ]
    return (
        label + _some(group),
        shape,
        str(first.param.dtype),
        f"{sum(leaf.param.size for leaf in group):,}",
        "frozen" if first.frozen and not slots else ", ".join(slots) or "none",
        _text(sum(_bytes(leaf.param) + leaf.slot_bytes for leaf in group)),
    )


def _table(rows: list[tuple[str, ...]], right: tuple[int, ...]) -> list[str]:
    """Return the rows in columns; `right` are the indices of right-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _bytes(x: Any) -> int:
    return x.size * x.dtype.itemsize


def _text(number: int) -> str:
    """Return a number of bytes with its unit.

    Example:
        >>> _text(1000), _text(4 * 2**20)
        ('1000 B', '4 MiB')
    """
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = max(min(int(math.log(number, 1024)), 4), 0) if number >= 10_000 else 0
    return f"{number / 1024**power:.{3 if power else 4}g} {units[power]}"
