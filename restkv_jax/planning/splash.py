"""What a call of the splash attention kernel costs, which XLA does not know.

The kernel goes through the blocks of keys that a block of queries sees once for every query head.
"""

from typing import NamedTuple

from restkv_jax.kernels.splash import BLOCK, block_size
from restkv_jax.planning.hlo import Computation, Instruction, Shape

NAME = "splash_mha_fwd"


class AttentionCost(NamedTuple):
    """Bytes read from HBM, and multiplications and additions of matrix products."""

    read: float
    operations: float


def attention_cost(computation: Computation, instruction: Instruction, seen: float) -> AttentionCost | None:
    """The cost of one call on the average; None for other instructions.

    Args:
      computation: which has its operands.
      instruction: any.
      seen: the share of the keys that a query sees on the average, in a causal prompt 1 / 2.
    """
    if instruction.opcode != "custom-call" or not instruction.name.startswith(NAME):
        return None
    sources = [shape for operand in computation.operands(instruction) for shape in operand.shapes]
    queries, keys, values = (shape for shape in sources if len(shape.dims) == 3 and shape.dtype[0] not in "su")
    heads, num_queries, _ = queries.dims
    kv_heads, num_keys, dim = keys.dims
    share = _share_of_blocks(num_keys, seen)
    times = heads / kv_heads * num_queries / block_size(num_queries, BLOCK) * share
    again = (times - 1) * sum(_moved(x) for x in (keys, values))
    return AttentionCost(sum(map(_moved, sources)) + again, 4.0 * heads * num_queries * num_keys * dim * share)


def _share_of_blocks(num_keys: int, seen: float) -> float:
    """Blocks that are seen in part are read and multiplied as a whole: half a block more for every query."""
    return min(1.0, seen + block_size(num_keys, BLOCK) / num_keys / 2)


def _moved(shape: Shape) -> float:
    return shape.bytes if shape.in_hbm else 0.0
