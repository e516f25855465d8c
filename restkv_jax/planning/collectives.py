"""What devices send each other."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from restkv_jax.planning.hlo import Computation, Instruction, Module

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")


class Collective(NamedTuple):
    """A collective of `group` devices, run `times` times.

    `bytes` are those of the whole array: the result of an all-reduce or all-gather, what a reduce-scatter divides.
    """

    kind: str
    bytes: float
    group: int
    times: float = 1.0

    @property
    def sent(self) -> float:
        """Bytes that each device sends, all times together, in a ring.

        `2 (n - 1) / n` of an all-reduce, which is a reduce-scatter and an all-gather of `(n - 1) / n` each.
        """
        share = (self.group - 1) / self.group
        each = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.times * self.bytes * each


def collectives_of(
    module: Module, computation: Computation, instruction: Instruction, times: float = 1.0
) -> Iterator[Collective]:
    """The collectives in an instruction, those of a fusion, or of what runs asynchronously, included."""
    kind = instruction.opcode.removesuffix("-start")
    if kind in KINDS:
        shapes = instruction.shapes
        if instruction.opcode in ("all-gather-start", "collective-permute-start"):
            shapes = shapes[len(instruction.operands) : 2 * len(instruction.operands)]
        if kind == "reduce-scatter":
            shapes = [shape for operand in computation.operands(instruction) for shape in operand.shapes]
        if kind == "all-reduce" and _is_only_sliced(computation, instruction):
            kind = "reduce-scatter"
        size = sum(shape.plain_bytes for shape in shapes)
        if (group := group_size(instruction.attributes)) > 1:
            yield Collective(kind, size, group, times)
    if inner := module.computations.get(instruction.called("calls") or ""):
        for called in inner.instructions:
            yield from collectives_of(module, inner, called, times)


def _is_only_sliced(computation: Computation, value: Instruction) -> bool:
    """Whether every device uses its part alone: a TPU fuses such an all-reduce with its slice and scatters."""
    users = [user for user, _ in computation.users[value.name]]
    return bool(users) and all(
        user.opcode == "dynamic-slice" or (user.opcode == "bitcast" and _is_only_sliced(computation, user))
        for user in users
    )


def group_size(attributes: str) -> int:
    """Devices of a group, in any of the forms of `replica_groups`; of permutations, all that send.

    `{{0,1},{2,3}}`, `[4,2]<=[8]` (four groups of two), `mesh['data'=2,'model'=4] {'model'}`.
    """
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=", attributes):
        return int(found[1].split(",")[-1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    return len(re.findall(r"\{\d+,\d+\}", attributes.partition("source_target_pairs=")[2].partition("}}")[0] + "}"))
