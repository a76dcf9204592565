"""What a compiled program reads and writes, copies and starts, in numbers.

Everything is counted from the program's text, in one way for CPU, GPU and TPU. A kernel, which is
an instruction or a fusion of many, reads each of its operands once and writes each of its results.
XLA has a count of its own: on GPU it is missing, on TPU it includes what stays on the chip.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from adamx.inspect.text import Instruction, Text

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_FREE |= {"optimization-barrier", "opt-barrier", "partition-id", "replica-id", "add-dependency"}
_RUNS = {"call", "while", "conditional"}
_PARTS = {"dynamic-slice", "slice", "gather"}  # they read of their first operand what they return


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program in numbers.

    Attributes:
        bytes_per_param: bytes that its kernels read and write, per parameter: of a branch those of
            the side that moves most, of a loop those of its body, once.
        always: the same without branches, of which a usual step takes none.
        large: the number of kernels outside of branches that read or write an array as large as a
            parameter, without what a TPU moves to and from its chip in the background.
        copies: the number of `copy` instructions whose result is as large as a parameter.
        temp_bytes: memory beyond arguments and results.
    """

    bytes_per_param: float
    always: float
    large: int
    copies: int
    temp_bytes: int


def read_program(compiled: jax.stages.Compiled, params: Any) -> Program:
    """Read a compiled program that works on a tree of parameters, or on their shapes."""
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    text = Text(compiled.as_text() or "")
    memory: Any = compiled.memory_analysis()
    return Program(
        bytes_per_param=bytes_accessed(text) / sum(sizes),
        always=bytes_accessed(text, branches=False) / sum(sizes),
        large=sum(
            any(array.elements in sizes and not array.on_chip for array in _touched(text, x))
            for x in kernels(text, branches=False)
            if not x.opcode.endswith(("-start", "-done"))
        ),
        copies=sum(1 for _ in text.copies(set(sizes))),
        temp_bytes=memory.temp_size_in_bytes,
    )


def kernels(text: Text, branches: bool = True) -> Iterator[Instruction]:
    """Yield the instructions that move something: a fusion is one, whatever it contains.

    These are the instructions of the entry and of the computations that it calls, loops over or
    branches into, except those that move nothing. The two halves of an asynchronous one are two.

    Args:
        text: of the program.
        branches: whether to go into the sides of conditionals.

    Example:
        >>> text = Text('''
        ... %fused (x: f32[8]) -> f32[8] {
        ...   %x = f32[8]{0} parameter(0)
        ...   ROOT %n = f32[8]{0} negate(%x)
        ... }
        ... %wrapped (y: f32[8]) -> f32[8] {
        ...   %y = f32[8]{0} parameter(0)
        ...   ROOT %f = f32[8]{0} fusion(%y), kind=kLoop, calls=%fused
        ... }
        ... ENTRY %main (g: f32[8]) -> (f32[8], f32[8]) {
        ...   %g = f32[8]{0} parameter(0)
        ...   %a = f32[8]{0} call(%g), to_apply=%wrapped
        ...   %c = f32[8]{0} copy(%a)
        ...   ROOT %t = (f32[8]{0}, f32[8]{0}) tuple(%a, %c)
        ... }
        ... ''')
        >>> [x.opcode for x in kernels(text)]
        ['fusion', 'copy']
    """

    def inside(computation: str) -> Iterator[Instruction]:
        for x in text.computations.get(computation, ()):
            if x.opcode in _RUNS:
                for called in x.called if branches or x.opcode != "conditional" else ():
                    yield from inside(called)
            elif x.opcode not in _FREE:
                yield x

    yield from inside(text.entry)


def bytes_accessed(text: Text, branches: bool = True) -> int:
    """Return the bytes that a program's kernels read and write in the device's memory.

    Args:
        text: of the program.
        branches: whether to count conditionals, by the side that moves most.

    Example:
        The fusion reads 32 bytes and 16, and writes 32 and, on the chip, 8 that do not count:

        >>> text = Text('''
        ... %branch (x: f32[8]) -> f32[] {
        ...   %x = f32[8] parameter(0)
        ...   ROOT %r = f32[] negate(%x)
        ... }
        ... ENTRY %main (g: f32[8], p: bf16[2,4]) -> f32[8] {
        ...   %g = f32[8]{0} parameter(0)
        ...   %p = bf16[2,4]{1,0} parameter(1)
        ...   %c = (f32[]) conditional(%s, %g, %g), branch_computations={%branch, %branch}
        ...   %two = (f32[8]{0:T(128)}, f32[2]{0:T(128)S(1)}) fusion(%g, %p), kind=kLoop
        ...   ROOT %first = f32[8]{0} get-tuple-element(%two), index=0
        ... }
        ... ''')
        >>> bytes_accessed(text, branches=False), bytes_accessed(text)
        (80, 116)
    """

    def moved(computation: str) -> int:
        return sum(map(moved_by, text.computations.get(computation, ())))

    def moved_by(x: Instruction) -> int:
        if x.opcode == "conditional":
            return max(map(moved, x.called)) if branches and x.called else 0
        if x.opcode in _RUNS:
            return sum(map(moved, x.called))
        return 0 if x.opcode in _FREE else sum(_read(text, x)) + sum(_written(text, x))

    return moved(text.entry)


def count_copies(hlo: str, sizes: set[int]) -> int:
    """Return how many copies in a program's text have one of these sizes.

    Sizes are numbers of elements, so a copy into another layout or shape counts too.

    Example:
        >>> hlo = '''
        ...   %copy.1 = f32[4,8]{1,0} copy(%params)
        ...   %copy.2 = s32[] copy(%count)
        ...   %start = (f32[32]{0}, f32[32]{0}, u32[]) copy-start(%mu)
        ... '''
        >>> count_copies(hlo, {32})
        2
    """
    return sum(1 for _ in Text(hlo).copies(sizes))


def count_kernels(hlo: str) -> tuple[int, int]:
    """Return how many kernels a program starts, and how many of them are fusions."""
    found = [x for x in kernels(Text(hlo)) if not x.opcode.endswith("-done")]
    return len(found), sum(x.opcode == "fusion" for x in found)


# ------------------------------------------------------------------------------------- one kernel
#
# An asynchronous instruction reads where it starts, and writes where it is done.


def _operands(text: Text, x: Instruction) -> list[tuple[int, Instruction]]:
    """Return the instructions whose arrays it takes, each once, with their first position."""
    if x.opcode.endswith("-done"):
        return []
    names = dict.fromkeys(x.operands)
    found = [
        (x.operands.index(name), text.instructions[name])
        for name in names
        if name in text.instructions
    ]
    return [(i, y) for i, y in found if not y.shape.startswith("(")]


def _touched(text: Text, x: Instruction) -> list[Any]:
    """Return the arrays that it takes and makes."""
    return [*x.arrays, *(array for _, y in _operands(text, x) for array in y.arrays)]


def _read(text: Text, x: Instruction) -> Iterator[int]:
    """Yield the bytes that it reads of each operand."""
    for position, y in _operands(text, x):
        if not y.arrays[0].on_chip:
            yield min(_read_of(text, x, position, y.bytes), y.bytes)


def _read_of(text: Text, x: Instruction, position: int, whole: int) -> int:
    """Return how much of an operand an instruction reads, if it takes parts of it only."""
    if position == 0 and x.opcode in _PARTS:
        return x.bytes
    if x.opcode == "slice-start":
        return x.arrays[1].bytes  # after the operand, which the tuple holds too
    if position == 0 and x.opcode == "dynamic-update-slice":
        return 0  # in place
    if x.opcode != "fusion":
        return whole
    inside = [y for name in x.called for y in text.computations.get(name, ())]
    inner = [y for y in inside if y.opcode == "parameter" and y.literal == str(position)]
    users = [(y, i) for y in inside for i, name in enumerate(y.operands) if name == inner[0].name]
    return sum(_read_of(text, y, i, whole) for y, i in users) if users else whole


def _written(text: Text, x: Instruction) -> Iterator[int]:
    """Yield the bytes that it writes of each result."""
    if x.opcode.endswith("-start"):
        return
    parts = [x]
    if x.opcode == "fusion" and x.called and (root := text.roots.get(x.called[0])):
        names = root.operands if root.opcode == "tuple" else (root.name,)
        parts = [text.instructions[name] for name in names]
    if len(parts) != len(x.arrays):
        parts = [x] * len(x.arrays)
    for part, array in zip(parts, x.arrays, strict=True):
        if not array.on_chip:
            updates = part.opcode == "dynamic-update-slice"
            update = text.instructions.get(part.operands[1]) if updates else None
            yield update.bytes if update else array.bytes
