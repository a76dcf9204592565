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
from adamx.formula.expressions import REDUCTIONS, G
from adamx.formula.symbols import Formula, Symbols
from adamx.formula.values import factory_name
from adamx.inspect.leaf import Leaf, bytes_of, some
from adamx.inspect.mistakes import likely_mistakes
from adamx.wrappers.by_path import by_path
from adamx.wrappers.guard import guard

_FOREIGN = ""  # the name of the state of an Optax transformation


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
        params = sum(bytes_of(leaf.param) for leaf in self.leaves)
        slots = sum(leaf.slot_bytes for leaf in self.leaves)
        return _by_kind(params, slots)

    @property
    def bytes_per_device(self) -> dict[str, int]:
        """The same on each device, where slots are sharded like their parameters.

        A parameter without a sharding is whole on each device.
        """
        params, slots = self._on_a_device("parameter"), self._on_a_device("slots")
        return _by_kind(params, slots)

    def _on_a_device(self, what: str) -> int:
        return sum(leaf.per_device[what] for leaf in self.leaves)

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
        return "\n".join(form.format(some(group), write(group[0].formula)) for group in groups)

    def __str__(self) -> str:
        leafwise = self.by == "leaf"
        groups = [[leaf] for leaf in self.leaves] if leafwise else _grouped(self.leaves, _kind)
        rows = [("parameters", "shape", "dtype", "numbers", "slots", "bytes")]
        rows += [_row(group, leafwise) for group in groups]
        lines = [
            *_table(rows, right=(3, 5)),
            "",
            *_table(self._totals(), right=(1, 2, 3)),
            "",
            self.composition,
            "",
            self.formula,
        ]
        return "\n".join(lines + [f"\nwarning: {warning}" for warning in self.warnings])

    def _totals(self) -> list[tuple[str, ...]]:
        columns = [(self.bytes, self.traffic)]
        if any(leaf.sharding and leaf.sharding.num_devices > 1 for leaf in self.leaves):
            columns.append((self.bytes_per_device, self._on_a_device("traffic")))
        totals = [
            {**b, "together": sum(b.values()), "a step moves at least": traffic}
            for b, traffic in columns
        ]
        size = max(self.size, 1)
        rows = [("", "bytes a parameter", "bytes", "bytes a device")[: 2 + len(totals)]]
        for what, number in totals[0].items():
            rows.append((what, f"{number / size:.4g}", *(_text(each[what]) for each in totals)))
        return [*rows, ("scalars in the state", "", *[_text(self.scalars)] * len(totals))]


def summary(
    tx: optax.GradientTransformation | optax.MultiSteps, params: Any, *, by: str = "group"
) -> Summary:
    """Return the cost and the formula of an optimizer for these parameters; allocate nothing.

    Args:
        tx: an adamx or Optax transformation. For an Optax transformation the table lists the arrays
            of its state, and the formula is its name.
        params: the parameters or their shapes, as from `jax.eval_shape`; None leaves are left out.
            If they have shardings over several devices, the bytes on each are counted too.
        by: the lines of the printed table: "leaf", or "group": the leaves of one `by_path` group
            with the same formula, dtype and storage.

    Returns:
        A `Summary` with `bytes`, `bytes_per_device`, `traffic`, `formula`, `latex`, `warnings` and
        `leaves`; it prints as a report.

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
    guarded = any_of(concept, lambda part: isinstance(part, guard))
    leaves = []
    shardings = [getattr(leaf, "sharding", None) for leaf in given]
    for path, shape, variant, own, where in zip(
        paths, shapes, bound, slots, shardings, strict=True
    ):
        if shape is not None and variant is not None:
            formula = formulas[variant]
            rereads = guarded or not formula.operations().isdisjoint(REDUCTIONS)
            group = " / ".join(part.label(path, shape) for part in groups)
            number = stacked_axes(variant)
            leaves.append(Leaf(path, group, shape, own, formula, rereads, number, where))
    said = []
    for warning in caught:
        if issubclass(warning.category, PrecisionWarning):
            said.append(str(warning.message).removeprefix("adamx: "))
        else:
            warnings.warn(warning.message, stacklevel=2)
    said += likely_mistakes(tx, leaves)
    composition = repr(tx) if isinstance(tx, Transformation) else f"{factory_name(tx)}(...)"
    return Summary(tuple(leaves), scalars, composition, tuple(said), by)


def _by_kind(params: int, slots: int) -> dict[str, int]:
    """Return bytes by what they are of; gradients have the parameters' dtypes and shardings."""
    return {"parameters": params, "gradients": params, "slots": slots}


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
                    scalars += bytes_of(x)
                else:
                    slots[i][slot] = x
        else:
            scalars += sum(map(bytes_of, jax.tree.leaves(entry)))
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
        label + some(group),
        shape,
        str(first.param.dtype),
        f"{sum(leaf.param.size for leaf in group):,}",
        "frozen" if first.frozen and not slots else ", ".join(slots) or "none",
        _text(sum(bytes_of(leaf.param) + leaf.slot_bytes for leaf in group)),
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


def _text(number: int) -> str:
    """Return a number of bytes with its unit.

    Example:
        >>> _text(1000), _text(4 * 2**20)
        ('1000 B', '4 MiB')
    """
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = max(min(int(math.log(number, 1024)), 4), 0) if number >= 10_000 else 0
    return f"{number / 1024**power:.{3 if power else 4}g} {units[power]}"
