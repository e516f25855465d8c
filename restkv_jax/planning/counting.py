"""What a program costs a device: bytes in and out of HBM, operations, bytes sent to others.

XLA's own `cost_analysis` counts the body of a loop once and every operand of a fusion as a whole; here loops count as
often as they turn, and fusions what they touch.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

from restkv_jax.planning.collectives import Collective, collectives_of
from restkv_jax.planning.hbm import traffic, whole
from restkv_jax.planning.hlo import Computation, Instruction, Module, Shape, parse
from restkv_jax.planning.products import operations
from restkv_jax.planning.splash import attention_cost

FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id", "iota",
    "opt-barrier", "optimization-barrier", "domain",
}  # fmt: skip


class Executed(NamedTuple):
    """An instruction of a computation, run `times` times."""

    times: float
    computation: Computation
    instruction: Instruction


@dataclasses.dataclass(frozen=True)
class Count:
    """What one run of a program costs every device.

    Attributes:
      read: bytes out of HBM.
      written: bytes into HBM.
      operations: multiplications and additions of matrix products.
      collectives: what is sent to other devices, equal ones together.
      unknown_loops: names of loops whose turns depend on data.
    """

    read: float
    written: float
    operations: float
    collectives: tuple[Collective, ...]
    unknown_loops: tuple[str, ...] = ()

    def sent(self) -> float:
        """Bytes that each device sends to others."""
        return sum(c.sent for c in self.collectives)

    def by_kind(self) -> dict[str, Collective]:
        """Of every kind of collective the bytes and times together."""
        found: dict[str, Collective] = {}
        for c in self.collectives:
            before = found.get(c.kind, Collective(c.kind, 0.0, c.group, 0.0))
            times = before.times + c.times
            mean = (before.bytes * before.times + c.bytes * c.times) / times
            found[c.kind] = Collective(c.kind, mean, max(before.group, c.group), times)
        return found


def count(
    text: str,
    taken: float = 1.0,
    kernel_reads: Callable[[Shape], float] = whole,
    unknown_turns: int = 1,
    seen: float = 1.0,
) -> Count:
    """Counts what a program costs each of its devices.

    Args:
      text: optimised HLO.
      taken: how often the heaviest branch of a conditional is taken; 1 gives an upper bound.
      kernel_reads: the part that a hand-written kernel reads of an operand, by its shape.
      unknown_turns: how often loops turn whose turns depend on data.
      seen: the share of its keys that a query of a splash kernel sees on the average.
    """
    module = parse(text)
    read = written = total = 0.0
    sent: dict[tuple[str, float, int], float] = {}
    unknown = []
    for times, computation, instruction in executed(module, taken, unknown_turns):
        if instruction.opcode == "while":
            unknown.append(instruction.name)
            continue
        moved = traffic(module, computation, instruction, kernel_reads)
        products = operations(module, computation, instruction)
        if attention := attention_cost(computation, instruction, seen):
            moved, products = moved._replace(read=attention.read), attention.operations
        read, written = read + times * moved.read, written + times * moved.written
        total += times * products
        for c in collectives_of(module, computation, instruction, times):
            kind = c.kind, c.bytes, c.group
            sent[kind] = sent.get(kind, 0.0) + c.times
    return Count(read, written, total, tuple(Collective(*key, times) for key, times in sent.items()), tuple(unknown))


def executed(module: Module, taken: float = 1.0, unknown_turns: int = 1) -> Iterator[Executed]:
    """All instructions that run, each with how often; of control flow only loops whose turns are not known."""
    return _Run(module, taken, unknown_turns).instructions(module.entry, 1.0)


class _Run(NamedTuple):
    """How a program is walked through."""

    module: Module
    taken: float
    unknown_turns: int

    def instructions(self, name: str, times: float) -> Iterator[Executed]:
        """Those of a computation that runs `times` times, and of what it calls."""
        computation = self.module.computations[name]
        for instruction in computation.instructions:
            if instruction.opcode == "while":
                turns = turns_of(self.module, computation, instruction)
                if turns is None:
                    yield Executed(times, computation, instruction)
                turns = self.unknown_turns if turns is None else turns
                yield from self.instructions(instruction.called("body") or "", times * turns)
            elif instruction.opcode == "conditional":
                for branch, share in self._branches(instruction):
                    yield from self.instructions(branch, times * share)
            elif instruction.opcode == "call":
                yield from self.instructions(instruction.called("to_apply") or "", times)
            elif instruction.opcode not in FREE and not instruction.opcode.endswith(("-done", "-update")):
                yield Executed(times, computation, instruction)

    def _branches(self, conditional: Instruction) -> list[tuple[str, float]]:
        """The branches and how often each is taken."""
        names = conditional.names("branch_computations") or tuple(
            name for side in ("true", "false") if (name := conditional.called(f"{side}_computation"))
        )
        heaviest = max(names, key=self._weight)
        others = (1 - self.taken) / max(1, len(names) - 1)
        return [(name, self.taken if name == heaviest else others) for name in names]

    def _weight(self, name: str) -> tuple[float, float]:
        """Operations, then bytes."""
        run = [one for one in self.instructions(name, 1.0) if one.instruction.opcode != "while"]
        return (
            sum(times * operations(self.module, computation, i) for times, computation, i in run),
            sum(times * sum(traffic(self.module, computation, i)) for times, computation, i in run),
        )


def turns_of(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often a loop turns, from XLA's note or from its condition, `i < constant`; None where data decide."""
    if found := loop.search(r"known_trip_count[^\d]*(\d+)"):
        return int(found)
    condition = module.computations[loop.called("condition") or ""]
    compared = list(condition.operands(condition.root))
    if len(compared) != 2 or "direction=LT" not in condition.root.attributes:
        return None
    index, limit = compared[0].search(r"index=(\d+)"), _constant(condition, compared[1])
    if index is None or limit is None:
        return None
    start = _constant(computation, _element(computation, computation.by_name[loop.operands[0]], int(index)))
    body = module.computations[loop.called("body") or ""]
    return -(-(limit - (start or 0)) // _step(body, _element(body, body.root, int(index))))


def _element(computation: Computation, state: Instruction, index: int) -> Instruction | None:
    return computation.by_name[state.operands[index]] if state.opcode == "tuple" else None


def _step(body: Computation, counter: Instruction | None) -> int:
    """By how much a loop's counter grows: 1, or where XLA has put several turns into one, their number."""
    added = [_constant(body, x) for x in body.operands(counter)] if counter and counter.opcode == "add" else []
    return next((step for step in added if step), 1)


def _constant(computation: Computation, value: Instruction | None) -> int | None:
    while value is not None and value.opcode in ("copy", "bitcast") and value.operands:
        value = computation.by_name[value.operands[0]]
    is_known = value is not None and value.opcode == "constant" and value.literal.lstrip("-").isdigit()
    return int(value.literal) if value is not None and is_known else None
