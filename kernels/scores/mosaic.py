"""Pallas kernels for TPU that go through a KV head's keys and values in tiles."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.kernels.pairs import Queries, lengthen
from restkv_jax.kernels.softmax import HIDDEN

SUBLANES, LANES = 8, 128
"""Rows and columns of a float32 vector register."""

ELEMENTS = 2**17
"""Of the largest float32 temporary of a tile: half a MiB, of which some ten exist at one time."""

MAX_TILE = 2048
"""Keys of a tile at most."""


KEYS = 3
"""The axis of a grid along which keys go."""

UNSEEN = HIDDEN / 2
"""The peak of a query that sees nothing: a hidden logit is so far below it that its exponential is 0."""

Ref = Any
"""The block of an array that a kernel has before it."""

Described = tuple[str, jax.Array | jax.ShapeDtypeStruct]
"""The axes of an array, by letters, and the array: `b` rows and `k` KV heads, one at a time; `n` keys, in tiles."""


class Rows(NamedTuple):
    """Queries as the rows of one matrix per KV head, `R = G w'`, where `w'` is `w` up to whole registers.

    `vectors` [B, K, R, D]; `positions` int32 [B, R, 1], -1 in rows that fill up; `group`, static, is `G`.
    """

    vectors: Array
    positions: Array
    group: int


def rows_of(queries: Queries) -> Rows:
    """The queries of all heads of a KV head, one head after the other."""
    batch, num_kv_heads, group, _, dim = queries.vectors.shape
    vectors = lengthen(queries.vectors, 3, SUBLANES)
    positions = jnp.broadcast_to(
        lengthen(queries.positions, 1, SUBLANES, -1)[:, None], (batch, group, vectors.shape[3])
    )
    return Rows(vectors.reshape(batch, num_kv_heads, -1, dim), positions.reshape(batch, -1, 1), group)


def num_rows(queries: Queries) -> int:
    """How many `Rows` they make."""
    group, width = queries.vectors.shape[2:4]
    return group * (width + -width % SUBLANES)


def as_column(x: Array) -> Array:
    """Numbers of queries, float32 [B, K, G, w], as a column beside their `Rows`: [B, K, R, 1], 0 in what fills up."""
    return lengthen(x, 3, SUBLANES).reshape(*x.shape[:2], -1, 1)


def tile_of(rows: int, length: int, limit: int = MAX_TILE) -> int:
    """Keys of a tile, whole registers, for matrices of `rows` rows."""
    fitting = max(1, min(limit, ELEMENTS // rows) // LANES) * LANES
    return min(fitting, -(-length // LANES) * LANES)


class Grid(NamedTuple):
    """The steps of a kernel: rows, and KV heads, one at a time; queries, `at_once` of them; keys, in tiles."""

    batch: int
    num_kv_heads: int
    queries: int
    at_once: int
    keys: int
    tile: int


def over_tiles(
    kernel: Callable[..., None],
    scalar: Array | int,
    inputs: Sequence[Described],
    outputs: Sequence[Described],
    grid: Grid,
    interpret: bool,
    scratch: Sequence[tuple[tuple[int, ...], Any]] = (),
) -> list[Array]:
    """Runs a kernel for every step of a grid.

    Args:
      kernel: called with the scalar in an array of one, then with the block of every input and output, then scratch.
      scalar: int32, in the memory of scalars.
      inputs: those of size 1 along an axis of the grid are the same for all its steps.
      outputs: shapes; those without the axis of keys stay in the chip from tile to tile, which then go in order.
      grid: the steps.
      interpret: runs anywhere, slowly.
      scratch: shapes and dtypes of arrays in the chip.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    taken = {"b": None, "k": None, "r": grid.at_once, "n": grid.tile}

    def block(axes: str, x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        letters = axes.split()

        def place(*step_and_scalar):
            step = dict(zip(taken, step_and_scalar, strict=False))
            return tuple(step.get(a, 0) if n > 1 else 0 for a, n in zip(letters, x.shape, strict=True))

        return pl.BlockSpec(tuple(taken.get(a, n) for a, n in zip(letters, x.shape, strict=True)), place)

    steps = *grid[:2], pl.cdiv(grid.queries, grid.at_once), pl.cdiv(grid.keys, grid.tile)
    specs = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=steps,
        in_specs=[block(*x) for x in inputs],
        out_specs=[block(*x) for x in outputs],
        scratch_shapes=[pltpu.VMEM(*x) for x in scratch],
    )
    independent = all("n" in axes.split() for axes, _ in outputs)
    order = "parallel", "parallel", "parallel", "parallel" if independent else "arbitrary"
    params, shapes = pltpu.CompilerParams(dimension_semantics=order), [x for _, x in outputs]
    blocks = *zip(inputs, specs.in_specs, strict=True), *zip(outputs, specs.out_specs, strict=True)
    cost = _cost(grid, steps, blocks)
    call = pl.pallas_call(
        kernel, grid_spec=specs, out_shape=shapes, compiler_params=params, interpret=interpret, cost_estimate=cost
    )
    return call(jnp.asarray(scalar, jnp.int32).reshape(1), *(x for _, x in inputs))


def _cost(grid: Grid, steps: tuple[int, ...], blocks: Sequence[tuple[Described, Any]]) -> Any:
    """For compilers and `restkv plan`: a block is moved when the next step asks for another; products are of logits."""
    from jax.experimental import pallas as pl

    moved = 0
    for (axes, x), spec in blocks:
        letters = axes.split()
        differs = [a in letters and x.shape[letters.index(a)] > 1 for a in "bkrn"]
        innermost = max((i for i, d in enumerate(differs, 1) if d), default=0)
        moved += math.prod(steps[:innermost]) * math.prod(n for n in spec.block_shape if n) * x.dtype.itemsize
    logits = grid.batch * grid.num_kv_heads * grid.queries * grid.keys
    dim = next(x.shape[-1] for (axes, x), _ in blocks if axes == "b k n d")
    return pl.CostEstimate(flops=2 * logits * dim, transcendentals=logits, bytes_accessed=moved)


def places_of(tile: int) -> Array:
    """In a kernel: where the keys of its tile stand, int32 [1, n]."""
    from jax.experimental import pallas as pl

    return pl.program_id(KEYS) * tile + jax.lax.broadcasted_iota(jnp.int32, (1, tile), 1)


def at_first_tile(function: Callable[[], None]) -> None:
    """In a kernel: calls a function at the first tile alone."""
    from jax.experimental import pallas as pl

    pl.when(pl.program_id(KEYS) == 0)(function)


def at_last_tile(function: Callable[[], None]) -> None:
    """In a kernel: calls a function at the last tile alone."""
    from jax.experimental import pallas as pl

    pl.when(pl.program_id(KEYS) == pl.num_programs(KEYS) - 1)(function)


def part(start: Array, size: int, multiple: int) -> Any:
    """In a kernel: the index of `size` entries from a multiple of some number on."""
    from jax.experimental import pallas as pl

    return pl.ds(pl.multiple_of(start, multiple), size)
