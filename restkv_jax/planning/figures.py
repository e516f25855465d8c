"""What an estimate says, as numbers by name: bytes of one device, operations and seconds."""

from typing import Any

from restkv_jax.planning.chips import Chip
from restkv_jax.planning.estimates import Estimate, bounds, megatron
from restkv_jax.planning.programs import OutOfMemory, Program

Figures = dict[str, Any]


def figures_of(estimate: Estimate, chip: Chip, tokens: int) -> Figures:
    """Everything that is known, for JSON and tables.

    Args:
      estimate: of one method.
      chip: which it is for.
      tokens: of a prompt, as it is padded.
    """
    found: Figures = {"available": chip.memory, "weights": estimate.weights}
    found |= {"cache": estimate.cache, "slots": estimate.slots}
    for name, program in estimate.programs.items():
        least_sent = megatron(estimate.work, tokens if name == "prefill" else 1).sent
        found[name] = _of_program(program, chip, least_sent)
    if "step" in found:
        found["step"]["floor"] = estimate.floor
    return found


def _of_program(program: Program | OutOfMemory, chip: Chip, least_sent: float) -> Figures:
    if isinstance(program, OutOfMemory):
        return {"fits": False, "total": program.needed}
    memory, count = program.memory, program.count
    return {
        "fits": True,
        "total": memory.total,
        "temporaries": memory.temporaries,
        "read": count.read,
        "written": count.written,
        "operations": count.operations,
        "sent": count.sent(),
        "megatron": least_sent,
        "collectives": {
            kind: {"times": c.times, "bytes": c.times * c.bytes, "devices": c.group}
            for kind, c in count.by_kind().items()
        },
        "unknown_loops": len(count.unknown_loops),
        "seconds": bounds(program, chip)._asdict(),
        "compiled_in": program.seconds,
    }
