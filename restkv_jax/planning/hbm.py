"""Bytes that an instruction takes out of a device's HBM and puts into it.

A fusion reads what it slices, not the whole of what it slices from, and writes what it updates in place. What lies in
the chip's vector memory costs nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

from restkv_jax.planning.hlo import Computation, Instruction, Module, Shape

SLICES = {"slice", "dynamic-slice", "gather"}
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""What they write is this operand of theirs."""
MOVES_NOTHING = {
    "AllocateBuffer", "Sharding", "ConcatBitcast", "AssumeGatherIndicesInBound", "SliceToDynamic", "PadToStatic",
}  # fmt: skip
"""Custom calls of XLA's own that only rename."""


class Traffic(NamedTuple):
    """Bytes read from HBM and written to it."""

    read: float = 0.0
    written: float = 0.0


def whole(operand: Shape) -> float:
    """The part of an operand that a kernel reads: all of it."""
    return 1.0


def traffic(
    module: Module, computation: Computation, instruction: Instruction, kernel_reads: Callable[[Shape], float] = whole
) -> Traffic:
    """The traffic of one instruction that is not control flow.

    Args:
      module: which has the computations that it calls.
      computation: which has its operands.
      instruction: of the computation.
      kernel_reads: the part that a hand-written kernel reads of an operand, where it does not say what it moves.
    """
    opcode = instruction.opcode.removesuffix("-start")
    called = module.computations.get(instruction.called("calls") or "")
    if called is not None:
        return _of_called(module, computation, instruction, called)
    results = _results(instruction)
    sources = [shape for operand in computation.operands(instruction) for shape in operand.shapes]
    if opcode == "custom-call":
        if any(f'custom_call_target="{name}"' in instruction.attributes for name in MOVES_NOTHING):
            return Traffic()
        written = _sum(results)
        read = sum(_moved(shape) * kernel_reads(shape) for shape in sources)
        if said := instruction.search(r'"cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"'):
            claimed = max(0.0, int(said) - written)  # of pages, as if each head had as many as one can have
            return Traffic(min(claimed, read) if any(kernel_reads(x) < 1 for x in sources) else claimed, written)
        return Traffic(read, written)
    if opcode in SLICES:
        return Traffic(sum(x.bytes for x in results) if sources and sources[0].in_hbm else 0.0, _sum(results))
    if opcode in UPDATES:
        update = sources[UPDATES[opcode]]
        return Traffic(_moved(update), update.bytes if results[0].in_hbm else 0.0)
    return Traffic(_sum(sources), _sum(results))


def _results(instruction: Instruction) -> tuple[Shape, ...]:
    """The arrays that it makes: what starts an asynchronous copy also returns its source and a flag."""
    shapes, opcode = instruction.shapes, instruction.opcode
    if not opcode.endswith("-start") or opcode == "all-reduce-start":
        return shapes
    if opcode == "copy-start":
        return shapes[:1]
    count = len(instruction.operands)
    return shapes[count : 2 * count]


def _of_called(module: Module, computation: Computation, instruction: Instruction, called: Computation) -> Traffic:
    """The traffic of a fusion, or of what runs asynchronously."""
    read = sum(
        _read(module, called, called.parameters[place])
        for place, operand in enumerate(instruction.operands)
        if place in called.parameters and _in_hbm(computation, operand)
    )
    root = called.root
    values = list(called.operands(root)) if root.opcode == "tuple" else [root]
    shapes = instruction.shapes if instruction.opcode == "fusion" else _results(instruction)
    pairs = zip(values, shapes, strict=False)
    return Traffic(read, sum(_written(module, called, value) for value, shape in pairs if shape.in_hbm))


def _in_hbm(computation: Computation, operand: str) -> bool:
    source = computation.by_name.get(operand)
    return source is not None and any(shape.in_hbm for shape in source.shapes)


def _read(module: Module, called: Computation, value: Instruction) -> float:
    """Bytes that a fused computation reads of a parameter, or of another name of it."""
    size = sum(shape.bytes for shape in value.shapes)
    total = 0.0
    for user, place in called.users[value.name]:
        inner = module.computations.get(user.called("calls") or "") if user.opcode == "fusion" else None
        if user.opcode in SLICES and place == 0:
            total += sum(shape.bytes for shape in user.shapes)
        elif user.opcode in UPDATES and place == 0:
            continue
        elif user.opcode == "bitcast":
            total += _read(module, called, user)
        elif inner is not None and place in inner.parameters:
            total += _read(module, inner, inner.parameters[place])
        else:
            return size
    return min(total, size)


def _written(module: Module, called: Computation, value: Instruction) -> float:
    """Bytes that a fused computation writes of a result."""
    if value.opcode == "bitcast":
        return sum(_written(module, called, source) for source in called.operands(value))
    if value.opcode in UPDATES:
        return sum(shape.bytes for shape in called.by_name[value.operands[UPDATES[value.opcode]]].shapes)
    inner = module.computations.get(value.called("calls") or "") if value.opcode == "fusion" else None
    if inner is not None and inner.root.opcode != "tuple":
        return _written(module, inner, inner.root)
    return sum(shape.bytes for shape in value.shapes)


def _moved(shape: Shape) -> float:
    return shape.bytes if shape.in_hbm else 0.0


def _sum(shapes) -> float:
    return sum(map(_moved, shapes))
