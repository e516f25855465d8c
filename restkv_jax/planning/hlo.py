"""Optimised HLO as text, as `jax.stages.Compiled.as_text` returns it: computations, instructions, shapes.

The grammar is that of XLA's printer; what stands in a layout beyond the order of the dimensions is the TPU's: tiles,
`T(8,128)(2,1)`, and the memory, `S(1)` for the chip's vector memory, nothing for its HBM.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BITS = {
    "pred": 8, "s1": 1, "u1": 1, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "f4e2m1fn": 4, "s8": 8, "u8": 8, "f8e4m3fn": 8,
    "f8e5m2": 8, "f8e4m3b11fnuz": 8, "f8e8m0fnu": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32,
    "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")


class Shape(NamedTuple):
    """One array: `order` names its dimensions from the minor one on, `tile` divides the last of them."""

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    memory: int = 0

    @property
    def in_hbm(self) -> bool:
        """Whether it lies in the device's main memory."""
        return self.memory == 0

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Bytes with the padding of tiles."""
        order = self.order or range(len(self.dims))[::-1]
        minor_first = [self.dims[i] for i in order]
        if len(self.tile) > 1:  # one-dimensional tiles only say in what blocks a vector lies
            for i, size in enumerate(self.tile[::-1][: len(minor_first)]):
                minor_first[i] = -(-minor_first[i] // size) * size
        return math.prod(minor_first) * BITS[self.dtype] / 8

    @property
    def plain_bytes(self) -> float:
        """Bytes without padding, as devices send them to each other."""
        return self.size * BITS[self.dtype] / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; a tuple's `shapes` are those of its elements, however nested."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    is_root: bool = False

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute, such as `calls` or `body`, names."""
        return self.search(rf"\b{attribute}=%?([\w.\-]+)")

    def integers(self, attribute: str) -> tuple[int, ...]:
        """The numbers of an attribute in braces, such as `lhs_contracting_dims={1}`."""
        return _integers(self.search(rf"\b{attribute}=\{{([\d,]*)\}}") or "")

    def names(self, attribute: str) -> tuple[str, ...]:
        """The computations of an attribute in braces, such as `branch_computations={%a, %b}`."""
        found = self.search(rf"\b{attribute}=\{{([^}}]*)\}}")
        return tuple(re.findall(r"[\w.\-]+", found or ""))

    def search(self, pattern: str) -> str | None:
        """The first group of a pattern in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from."""
        return self.search(r'op_name="([^"]*)"') or ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in their order."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {i.name: i for i in self.instructions}

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """Which instructions take a value, and as which operand."""
        found: dict[str, list[tuple[Instruction, int]]] = {i.name: [] for i in self.instructions}
        for instruction in self.instructions:
            for place, operand in enumerate(instruction.operands):
                found.setdefault(operand, []).append((instruction, place))
        return found

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.literal): i for i in self.instructions if i.opcode == "parameter"}

    @property
    def root(self) -> Instruction:
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])

    def operands(self, instruction: Instruction) -> Iterator[Instruction]:
        """The instructions whose values it takes."""
        return (self.by_name[name] for name in instruction.operands if name in self.by_name)


class Module(NamedTuple):
    """A program: its computations by name, and the one that is run."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Reads a program.

    Raises:
      ValueError: text without an entry computation.
    """
    computations: dict[str, Computation] = {}
    lines: list[Instruction] = []
    name = entry = None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if name is None and (header := _COMPUTATION.match(line)):
            name, lines = header[2], []
            entry = name if header[1] else entry
        elif (line == "}" or line.startswith("}, ")) and name is not None:  # `}, execution_thread="sparsecore"`
            computations[name] = Computation(name, tuple(lines))
            name = None
        elif name is not None and (found := _INSTRUCTION.match(line)):
            lines.append(_instruction(found[2], found[3], is_root=bool(found[1])))
    if entry is None:
        raise ValueError("the text holds no ENTRY computation: it is not HLO as Compiled.as_text returns it")
    return Module(computations, entry)


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    """Reads what follows `name =`."""
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    end = _closing(rest, opening)
    inside, attributes = rest[opening + 1 : end - 1], rest[end:]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, rest[:opening], shapes_of(shape), operands, inside, attributes, is_root)


def _closing(text: str, start: int) -> int:
    """The place behind the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return len(text)


def shapes_of(text: str) -> tuple[Shape, ...]:
    """The arrays of a type, flat: `(f32[8], (bf16[2,4]{1,0:T(8,128)S(1)}))` has two."""
    return tuple(
        _shape(found[1], _integers(found[2]), found[3] or "") for found in _ARRAY.finditer(text) if found[1] in BITS
    )


def _shape(dtype: str, dims: tuple[int, ...], layout: str) -> Shape:
    order, _, rest = layout.partition(":")
    tile, memory = _TILE.search(rest), re.search(r"S\((\d+)\)", rest)
    return Shape(dtype, dims, _integers(order), _integers(tile[1]) if tile else (), int(memory[1]) if memory else 0)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n.strip())
