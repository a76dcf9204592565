"""Reading the text of XLA's compiled programs, for this package and its tests.

The text lists the program's computations, one of them the entry; each is a list of instructions

    %name = f32[4,8]{1,0} opcode(%operand, ...), attributes

and the first line says which result is written over which argument: `input_output_alias`.
The format is XLA's: https://openxla.org/xla/operation_semantics
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_INSTRUCTION = re.compile(r"\s*(ROOT )?%(\S+) = (.+?) ([a-z][\w-]*)\((.*?)\)(.*)")
_COMPUTATION = re.compile(r"\s*(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"([a-z]+\d*)[a-z0-9]*\[([\d,]*)\](?:\{([^}]*)\})?")
_ON_CHIP = re.compile(r"T\(.*S\([1-4]\)")  # TPU's layouts have tiles; 5 is the host's memory
_CALLED = re.compile(
    r"(?:calls|to_apply|body|computation|computations)=(?:\{([^}]*)\}|(%[\w.\-]+))"
)
_ALIAS = re.compile(r"\{(\d*)\}: \((\d+), \{\d*\}, \w+-alias\)")

_SAME = {"bitcast", "bitcast-convert", "copy", "copy-start", "copy-done", "convert", "reshape"}
_SAME |= {"reduce-precision", "optimization-barrier"}
_MOVED = {"all-gather", "all-gather-start", "all-gather-done", "dynamic-slice"}
_FIRST = {"dynamic-update-slice", "scatter"}
_ELEMENTWISE = {"add", "subtract", "multiply", "divide", "maximum", "minimum", "power", "clamp"}
_ELEMENTWISE |= {"negate", "abs", "sign", "sqrt", "rsqrt", "exponential", "log", "tanh"}
_ELEMENTWISE |= {"and", "or", "xor", "not", "shift-left", "shift-right-logical", "broadcast"}
_ELEMENTWISE |= {"shift-right-arithmetic", "floor", "ceil", "round-nearest-even"}
_ELEMENTWISE |= {"round-nearest-afz", "exponential-minus-one", "log-plus-one", "cbrt", "remainder"}


class Array(NamedTuple):
    """One array that an instruction makes, by its number of elements and its bytes.

    Attributes:
        elements: how many.
        bytes: of all of them.
        on_chip: whether it is in a TPU's on-chip memory, which costs no traffic.
    """

    elements: int
    bytes: int
    on_chip: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
        name: unique in the program.
        shape: its result's shape as written: "f32[4,8]{1,0}", or a tuple of such in parentheses.
        opcode: its operation: "copy", "fusion", "parameter".
        operands: names of the instructions whose results it takes.
        computation: the name of the list that it is in.
        in_entry: whether that is the program's entry.
        attributes: the text after the operands, up to the metadata.
        label: the operation in the source; for an argument its path.
        literal: the text between the parentheses, which is a number for "parameter".
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    computation: str
    in_entry: bool
    attributes: str
    label: str
    literal: str

    @property
    def elements(self) -> int:
        """The number of elements of its result, or of its first result."""
        return self.arrays[0].elements if self.arrays else 0

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """Its results."""
        return tuple(
            Array(_elements(dims), _bytes(dtype, dims), bool(_ON_CHIP.search(layout)))
            for dtype, dims, layout in _ARRAY.findall(self.shape)
        )

    @property
    def bytes(self) -> int:
        """The bytes of its results."""
        return sum(array.bytes for array in self.arrays)

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """The computations that it calls, in order."""
        found = _CALLED.findall(self.attributes)
        return tuple(name for many in found for name in _NAME.findall("".join(many)))

    @property
    def array(self) -> str:
        """Dtype and shape of its result, or of its first result: "f32[4,8]"."""
        found = _ARRAY.search(self.shape)
        return found[0].partition("{")[0] if found else self.shape


def _elements(dims: str) -> int:
    return math.prod(map(int, filter(None, dims.split(","))))


def _bytes(dtype: str, dims: str) -> int:
    bits = int("".join(filter(str.isdigit, dtype)) or 8)  # "pred" is a byte
    return _elements(dims) * bits // 8


Value = tuple[str, int | None]
"""A result: the instruction's name, and an index if it has several results."""


class Text:
    """The text of a program, taken apart.

    Attributes:
        instructions: by name.
        computations: the instructions of each computation, by its name.
        roots: the instruction whose result is the computation's, by the computation's name.
        entry: the name of the computation that is the program.
        aliases: by the number of an argument, the number of the result that is written over it.
        parameters: the instructions of the arguments, by number.
        results: the program's results, in order.
    """

    name: str
    aliases: dict[int, int]
    entry: str
    parameters: dict[int, Instruction]

    def __init__(self, hlo: str) -> None:
        """Take the text of an optimized program apart."""
        self.name = hlo.split(",", 1)[0].removeprefix("HloModule ") if hlo else ""
        self.instructions: dict[str, Instruction] = {}
        self.computations: dict[str, list[Instruction]] = {}
        self.roots: dict[str, Instruction] = {}
        self._callers: dict[str, list[str]] = {}
        computation, in_entry = "", False
        for line in hlo.splitlines():
            if found := _INSTRUCTION.match(line):
                root, name, shape, opcode, literal, rest = found.groups()
                attributes, _, metadata = rest.partition("metadata=")
                label = metadata.partition('op_name="')[2].partition('"')[0].replace("\\'", "'")
                operands = tuple(_NAME.findall(literal))
                self.instructions[name] = x = Instruction(
                    name, shape, opcode, operands, computation, in_entry, attributes, label, literal
                )
                self.computations.setdefault(computation, []).append(x)
                if root:
                    self.roots[computation] = x
                for called in x.called:
                    self._callers.setdefault(called, []).append(name)
            elif found := _COMPUTATION.match(line):
                computation, in_entry = found[2], bool(found[1])
        alias = hlo[: hlo.find("\n")].partition("input_output_alias={")[2]
        self.aliases = {int(i): int(j or 0) for j, i in _ALIAS.findall(alias)}
        self.entry = next((x.computation for x in self.instructions.values() if x.in_entry), "")
        entry = self.computations.get(self.entry, [])
        self.parameters = {int(x.literal): x for x in entry if x.opcode == "parameter"}
        last = self.roots.get(self.entry)
        self.results: list[Value] = []
        if last and last.opcode == "tuple":
            self.results = [(name, None) for name in last.operands]
        elif last and last.shape.startswith("("):
            self.results = [(last.name, i) for i in range(len(_ARRAY.findall(last.shape)))]
        elif last:
            self.results = [(last.name, None)]

    def copies(self, sizes: set[int]) -> Iterator[Instruction]:
        """Yield the copies of one of these sizes, including asynchronous ones.

        What a TPU fetches to its chip, and brings back, is no copy.
        """
        for x in self.instructions.values():
            if x.opcode in ("copy", "copy-start") and x.elements in sizes:
                if not any(array.on_chip for array in x.arrays):
                    yield x

    def source(self, x: Instruction) -> int | None:
        """Return the number of the copied argument, None if the copy is not of an argument."""
        free = _SAME - {"convert", "bitcast-convert", "reduce-precision"}
        return next((number for number, _ in self._reach((x.name, None), free, set())), None)

    def sources(self, result: int) -> dict[int, int]:
        """Return the arguments from which a result is computed elementwise.

        Returns:
            For each such argument its number, and the number of operations between the two: 0 for
            an argument that is handed through, converted, copied or moved to other devices, 1 for w
            in w + u and in w - u, where u counts 2 for its sign.
        """
        return dict(self._reach(self.results[result], _SAME | _MOVED, _ELEMENTWISE))

    def _reach(self, start: Value, free: set[str], counted: set[str]) -> Iterator[tuple[int, int]]:
        """Yield the arguments from which a value is computed, nearest first, with the distance."""
        queue: list[tuple[int, int, Value]] = [(0, 0, start)]
        seen: set[Value] = set()
        pushed = 0
        while queue:
            distance, _, value = heapq.heappop(queue)
            if value in seen or value[0] not in self.instructions:
                continue
            seen.add(value)
            x = self.instructions[value[0]]
            if x.opcode == "parameter" and x.in_entry:
                yield int(x.literal), distance
            for cost, before in self._before(x, value[1], free, counted):
                pushed += 1
                heapq.heappush(queue, (distance + cost, pushed, before))

    def _before(
        self, x: Instruction, index: int | None, free: set[str], counted: set[str]
    ) -> Iterable[tuple[int, Value]]:
        """Return the values from which a result of an instruction is computed, with the cost."""
        if x.opcode == "parameter":
            return [(0, (up, index)) for up in self._above(x)]
        if x.opcode == "get-tuple-element":
            return [(0, (x.operands[0], int(x.attributes.partition("index=")[2].split(",")[0])))]
        if x.opcode == "tuple":
            return [(0, (x.operands[index or 0], None))]
        if x.opcode == "while":
            return [(0, (x.operands[0], index))]
        if x.called and x.opcode in _CALLS:
            return [(0, (self.roots[name].name, index)) for name in x.called if name in self.roots]
        if x.opcode in free:
            return [(0, (x.operands[0], index if x.opcode == "optimization-barrier" else None))]
        if not counted:
            return []
        if x.opcode == "select":
            return [(0, (name, None)) for name in x.operands[1:]]
        if x.opcode in _FIRST:
            return [(1, (x.operands[0], None))]
        if x.opcode in counted:
            scalar = {name for name in x.operands if self._elements_of(name) == 1}
            costs = (0,) if x.opcode == "broadcast" else (1, 2 if x.opcode == "subtract" else 1, 1)
            return [
                (cost, (name, None))
                for cost, name in zip(costs, x.operands, strict=False)
                if name not in scalar or x.elements == 1
            ]
        return []

    def _above(self, x: Instruction) -> Iterator[str]:
        """Yield the operands passed as a computation's parameter, one for each caller."""
        for name in self._callers.get(x.computation, ()):
            caller, number = self.instructions[name], int(x.literal)
            if caller.opcode == "conditional":
                number = 1 + caller.called.index(x.computation)
            if caller.opcode in _CALLS and number < len(caller.operands):
                yield caller.operands[number]

    def bytes_of(self, value: Value) -> int:
        """Return the bytes of a result."""
        x = self.instructions[value[0]]
        return x.bytes if value[1] is None else x.arrays[value[1]].bytes

    def _elements_of(self, name: str) -> int:
        return self.instructions[name].elements if name in self.instructions else 0


_CALLS = {"fusion", "call", "conditional"}
