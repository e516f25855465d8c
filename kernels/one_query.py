"""Attention of one query per row over slots where they stand, by a Pallas kernel for TPU.

Slots are those of a layer, of a block of layers that share keys, or of pages. Their keys and values are as queries are,
or codes, which leave HBM as such and are dequantised in the chip.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from restkv_jax.kernels.pairs import Queries, lengthen, query_axes
from restkv_jax.kernels.partition import by_device
from restkv_jax.kernels.quantised import Quantisation, QuantisedKeys, QuantisedPairs, QuantisedValues, decode
from restkv_jax.kernels.scores.mosaic import LANES, SUBLANES, Ref
from restkv_jax.kernels.scores.parts import product, split
from restkv_jax.kernels.softmax import HIDDEN, Softmax, cap_logits

SLOTS_AT_ONCE = 2048
"""Slots of a row and KV head, of 128 dimensions, that the chip holds at one time."""

PACKED = 16
"""Rows of a register of bfloat16, a scale's dtype. So many pages are read at one time, each copied by itself."""

DTYPES = jnp.float32, jnp.bfloat16

DIMS = LANES, 2 * LANES
"""Head dimensions: rows are whole registers."""

SOFTMAX_AXES = Softmax("b k g q", "b k g q", "b k g q d")  # pyright: ignore[reportArgumentType]

Stored = Array | QuantisedKeys | QuantisedValues
"""Keys or values, [..., N, D]."""


class Static(NamedTuple):
    """What the kernel knows when it is compiled.

    Attributes:
      quantisation: None where slots are as queries are.
      blocks: in which the codes of a step come, all in one or those of each page by themselves.
      at_once: slots of a step.
      slots: of a row and KV head.
      soft_cap: of the logits.
    """

    quantisation: Quantisation | None
    blocks: int
    at_once: int
    slots: int
    soft_cap: float | None

    @property
    def group(self) -> int:
        """Slots of a group; 1 where there are none."""
        return 1 if self.quantisation is None else self.quantisation.group_size


class Block(NamedTuple):
    """An input of the kernel that comes in blocks.

    Attributes:
      array: as it stands.
      shape: of a block, None for an axis of which it has one entry.
      place: the index of the block of a step: `place(row, head, step, used, where)`, the last two in scalar memory.
    """

    array: Array
    shape: tuple[int | None, ...]
    place: Callable[..., tuple[Any, ...]]


def read_layer(
    queries: Queries, stored: QuantisedPairs, layer: Array, positions: Array, *, interpret: bool = False
) -> Softmax:
    """As `quantised_attention.read_quantised`."""

    def alone(queries: Queries, stored: QuantisedPairs, layer: Array, positions: Array) -> Softmax:
        slots = positions.shape[2]
        static = Static(stored.quantisation, 1, _at_once(stored.keys, slots), slots, queries.soft_cap)
        keys, values = (_of_head(static, x, _in_layer) for x in (stored.keys, stored.values))
        asked = jnp.broadcast_to(queries.positions, positions.shape[:2])
        used = jnp.full(positions.shape[:2], slots, jnp.int32)
        return _read(static, queries, asked, used, layer.reshape(1), keys, values, _held(static, positions), interpret)

    queries = queries.replace(sliding_window=jnp.asarray(queries.sliding_window, jnp.int32))
    axes = query_axes(queries), jax.tree.map(lambda _: "l b k", stored), "", "b k n"
    return by_device(alone, (queries, stored, layer, positions), axes, SOFTMAX_AXES)


def read_blocks(
    queries: Queries,
    keys: Array | QuantisedKeys,
    values: Array | QuantisedValues,
    positions: Array,
    layer: Array,
    blocks: Array,
    lengths: Array,
    *,
    interpret: bool = False,
) -> Softmax:
    """The softmax of one query per row and KV head over the slots of blocks of layers that share keys.

    Args:
      queries: [b, k, G, 1, D], at positions int32 [b, k].
      keys: [b, R, N, D] of all blocks.
      values: [L, b, k, N, D] of all layers.
      positions: int32 [b, R, N] of the keys.
      layer: int32 scalar.
      blocks: int32 [b, k], the block of each.
      lengths: int32 [b, k], slots that are read, from the first on.
    """
    num_heads, slots = blocks.shape[1], positions.shape[2]
    quantisation = None if isinstance(keys, Array) else keys.quantisation
    static = Static(quantisation, 1, _at_once(keys, slots), slots, queries.soft_cap)

    of_keys = _of_head(static, keys, lambda row, head, where: (row, where[1 + row * num_heads + head]))
    of_values = _of_head(static, values, _in_layer)
    is_windowed = queries.widest_window != 0
    held = _held(static, positions[jnp.arange(len(blocks))[:, None], blocks] if is_windowed else None)
    where = jnp.concatenate([layer.reshape(1), blocks.reshape(-1)])
    return _read(static, queries, queries.positions, lengths, where, of_keys, of_values, held, interpret)


def read_table(
    queries: Queries,
    stored: QuantisedPairs,
    table: Array,
    lengths: Array,
    positions: Array | None,
    *,
    interpret: bool = False,
) -> Softmax:
    """The softmax of one query per row and KV head over quantised pages.

    Args:
      queries: [b, k, G, 1, D], at positions int32 [b, k].
      stored: a group per page.
      table: int32 [b, k, J], the pages of each.
      lengths: int32 [b, k], slots in use.
      positions: int32 [b, k, J * S]; None where all slots in use are seen.
    """
    q, num_heads, num_places = stored.quantisation, *table.shape[1:]
    table = jnp.where(table < len(stored.keys.codes), table, 0)
    pages = min(num_places, PACKED)
    static = Static(q, pages, pages * q.group_size, num_places * q.group_size, queries.soft_cap)

    def page(i: int, row: Any, head: Any, step: Any, used: Ref, where: Ref) -> tuple[Any, ...]:
        last = jnp.maximum(pl.cdiv(used[row, head], q.group_size) - 1, 0)  # there already: not copied again
        return where[(row * num_heads + head) * num_places + jnp.minimum(step * pages + i, last)], 0, 0

    def rows(row: Any, head: Any, step: Any, used: Ref, where: Ref) -> tuple[Any, ...]:
        return row, head, step, 0

    def blocks(x: QuantisedKeys | QuantisedValues) -> list[Block]:
        scales = x.scales[table]
        codes = (Block(x.codes, (1, *x.codes.shape[1:]), functools.partial(page, i)) for i in range(pages))
        return [*codes, Block(scales, (None, None, pages, scales.shape[-1]), rows)]

    held = _held(static, positions)
    both = blocks(stored.keys), blocks(stored.values)
    return _read(static, queries, queries.positions, lengths, table.reshape(-1), *both, held, interpret)


def refusal(queries: Queries, stored: Stored) -> str | None:
    """Why the kernel cannot take queries [B, K, G, T, D] and what is stored of keys."""
    dim = queries.vectors.shape[-1]
    if queries.vectors.dtype not in DTYPES:
        return f"the kernel knows float32 and bfloat16, not {queries.vectors.dtype}"
    if queries.vectors.shape[3] > 1:
        return "the kernel takes one query per row"
    if dim not in DIMS:
        return f"the head dimension {dim} is not {' or '.join(map(str, DIMS))}"
    if isinstance(stored, QuantisedKeys | QuantisedValues):
        return _refusal_of_codes(stored, dim)
    return None if stored.shape[-2] else "there are no slots"


def _refusal_of_codes(stored: QuantisedKeys | QuantisedValues, dim: int) -> str | None:
    q = stored.quantisation
    if q.dtype == "float8_e4m3fn":
        return "the kernel knows codes that are integers"
    if q.group_size // q.in_word % SUBLANES:
        return f"words of groups of {q.group_size} tokens do not fill registers; choose a multiple of {8 * q.in_word}"
    if q.group_size > (most := 2 * SLOTS_AT_ONCE * LANES // dim // PACKED):
        return f"groups of {q.group_size} tokens are more than the {most} that the chip holds {PACKED} of"
    return None if stored.codes.shape[-3] else "there are no groups"


def _at_once(stored: Stored, slots: int) -> int:
    """Slots of a step: all, or as many as fill registers, of scales where there are."""
    if isinstance(stored, Array):
        dim, multiple = stored.shape[-1], LANES
    else:
        dim, multiple = stored.codes.shape[-1], PACKED * stored.quantisation.group_size
    fitting = SLOTS_AT_ONCE * LANES // dim
    return min(slots, max(fitting // multiple, 1) * multiple)


def _held(static: Static, positions: Array | None) -> Block:
    """Positions int32 [b, k, N] of the slots; 0 of all where there are none, which every query sees."""
    if positions is None:
        everywhere = jnp.zeros((1, 1, 1, static.at_once), jnp.int32)
        return Block(everywhere, (None, None, 1, static.at_once), lambda *_: (0, 0, 0, 0))
    return Block(
        positions[:, :, None],
        (None, None, 1, static.at_once),
        lambda row, head, step, *_: (row, head, 0, step),
    )


def _in_layer(row: Any, head: Any, where: Ref) -> tuple[Any, ...]:
    """The index of a row and KV head of all layers, where the layer is the first number of `where`."""
    return where[0], row, head


def _of_head(static: Static, stored: Stored, index: Callable[..., tuple[Any, ...]]) -> list[Block]:
    """The blocks of what is stored of a row and KV head at `index(row, head, where)`, up to the last that is read."""

    def place(rest: int, row: Any, head: Any, step: Any, used: Ref, where: Ref) -> tuple[Any, ...]:
        last = jnp.maximum(pl.cdiv(used[row, head], static.at_once) - 1, 0)
        return *index(row, head, where), jnp.minimum(step, last), *[0] * rest

    def block(x: Array, rest: int) -> Block:
        shape = *[None] * (x.ndim - rest - 1), static.at_once // static.group, *x.shape[x.ndim - rest :]
        return Block(x, shape, functools.partial(place, rest))

    return [block(stored, 1)] if isinstance(stored, Array) else [block(stored.codes, 2), block(stored.scales, 1)]


def _read(
    static: Static,
    queries: Queries,
    asked: Array,
    used: Array,
    where: Array,
    keys: Sequence[Block],
    values: Sequence[Block],
    held: Block,
    interpret: bool,
) -> Softmax:
    """Runs the kernel.

    Args:
      static: as above.
      queries: [b, k, G, 1, D].
      asked: int32 [b, k], their positions.
      used: int32 [b, k], slots that are read.
      where: int32 [n], for the places of blocks.
      keys: one block of slots, or blocks of codes and one of scales.
      values: likewise.
      held: positions of the slots, int32 [..., 1, N].
      interpret: runs anywhere, slowly.
    """
    rows = lengthen(einops.rearrange(queries.vectors, "b k g 1 d -> b k g d"), 2, SUBLANES)
    batch, num_kv_heads, num_rows, dim = rows.shape

    def of_rows(*block: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *block), lambda row, head, *_: (row, head, 0, 0))

    def spec(block: Block) -> pl.BlockSpec:
        def place(row: Any, head: Any, step: Any, window: Ref, asked: Ref, used: Ref, where: Ref) -> tuple[Any, ...]:
            return block.place(row, head, step, used, where)

        return pl.BlockSpec(block.shape, place)

    # Blocks come out of HBM: a compiler that finds room would copy a store of all layers into the chip at every layer.
    blocks = *keys, *values, held
    column = jax.ShapeDtypeStruct((batch, num_kv_heads, num_rows, 1), jnp.float32)
    steps = pl.cdiv(static.slots, static.at_once)
    logits = batch * num_kv_heads * static.slots * num_rows
    of_step = sum(math.prod(n or 1 for n in x.shape) * x.array.dtype.itemsize for x in blocks)
    peak, total, weighted = pl.pallas_call(
        functools.partial(_kernel, static, len(keys)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(batch, num_kv_heads, steps),
            in_specs=[of_rows(num_rows, dim), *map(spec, blocks)],
            out_specs=[of_rows(num_rows, 1), of_rows(num_rows, 1), of_rows(num_rows, dim)],
        ),
        out_shape=[column, column, jax.ShapeDtypeStruct(rows.shape, jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * logits * dim,
            transcendentals=logits,
            bytes_accessed=batch * num_kv_heads * static.slots * of_step // static.at_once,
        ),
        interpret=interpret,
    )(
        jnp.asarray(queries.sliding_window, jnp.int32).reshape(1), asked, used, where,
        rows, *(x.array if interpret else pltpu.with_memory_space_constraint(x.array, pltpu.HBM) for x in blocks),
    )  # fmt: skip
    group = queries.vectors.shape[2]
    return Softmax(peak[:, :, :group], total[:, :, :group], weighted[:, :, :group, None])


def _kernel(
    static: Static, num_keys: int, window: Ref, asked: Ref, used: Ref, _: Ref, queries: Ref, *blocks: Ref
) -> None:
    *stored, positions, peak, total, weighted = blocks
    row, head, step = (pl.program_id(axis) for axis in range(3))
    rest = used[row, head] - step * static.at_once

    def initialise() -> None:
        peak[...] = jnp.full_like(peak, HIDDEN)
        total[...] = jnp.zeros_like(total)
        weighted[...] = jnp.zeros_like(weighted)

    def read() -> None:
        held = jnp.where(jax.lax.broadcasted_iota(jnp.int32, positions.shape, 1) < rest, positions[...], -1)
        past = asked[row, head] - held
        seen = (past >= 0) & (past < window[0]) & (held >= 0)

        products = product(split(queries[...]), split(_keys(static, stored[:num_keys], queries.dtype)), over=(1, 1))
        logits = jnp.where(seen, cap_logits(products, static.soft_cap), HIDDEN)
        larger = jnp.maximum(peak[...], logits.max(1, keepdims=True))
        weights = jnp.where(seen, jnp.exp(logits - larger), 0)
        decay = jnp.exp(peak[...] - larger)
        peak[...] = larger
        total[...] = total[...] * decay + weights.sum(1, keepdims=True)
        sums = _weighted(static, weights, seen, rest, stored[num_keys:], queries.dtype)
        weighted[...] = weighted[...] * decay + sums

    pl.when(step == 0)(initialise)
    pl.when(rest > 0)(read)


def _keys(static: Static, stored: Sequence[Ref], dtype: Any) -> Array:
    """In the kernel: the keys of a step, [n, D]."""
    if static.quantisation is None:
        return stored[0][...]
    *codes, scales = stored
    return _by_slot(_decoded(static.quantisation, codes) * scales[...].astype(jnp.float32)[:, None]).astype(dtype)


def _weighted(static: Static, weights: Array, seen: Array, rest: Array, stored: Sequence[Ref], dtype: Any) -> Array:
    """In the kernel: the sums of the values of a step, float32 [R, D], with weights [R, n]; `rest` are to be read."""
    if static.quantisation is None:
        values = stored[0][...]
        if static.slots % static.at_once:  # what is behind the last slot may be anything
            values = jnp.where(jax.lax.broadcasted_iota(jnp.int32, values.shape, 0) < rest, values, 0)
        return product(split(weights.astype(dtype)), split(values))
    *codes, scales = stored
    values = _by_slot(_decoded(static.quantisation, codes)).astype(jnp.bfloat16)  # exact
    by_part = _by_part(scales[...].astype(jnp.float32), static.group)
    return _weighted_codes(weights, seen, by_part, values, dtype)


def _decoded(quantisation: Quantisation, blocks: Sequence[Ref]) -> Array:
    """In the kernel: the codes of a step, float32 [groups, S, D]."""
    return decode(jnp.concatenate([x[...] for x in blocks]), quantisation)


def _by_slot(x: Array) -> Array:
    """In the kernel: [groups, S, D] to [groups * S, D]."""
    return x.reshape(-1, x.shape[-1])


def _weighted_codes(weights: Array, seen: Array, scales: Array, codes: Array, dtype: Any) -> Array:
    """In the kernel: sums of values, float32 [R, D], with weights [R, n], `C` scales [C, n] and codes [n, D].

    One product for all parts of the channels, of whose columns each part of the rows then keeps its own.
    """
    rows, parts, dim = weights.shape[0], scales.shape[0], codes.shape[1]
    scaled = [jnp.where(seen, weights * scales[i : i + 1], 0) for i in range(parts)]
    sums = product(split(jnp.concatenate(scaled).astype(dtype)), [codes])
    part = jax.lax.broadcasted_iota(jnp.int32, (rows, dim), 1) // (dim // parts)
    own = (jnp.where(part == i, sums[i * rows : (i + 1) * rows], 0) for i in range(parts))
    return functools.reduce(jnp.add, own)


def _by_part(scales: Array, size: int) -> Array:
    """In the kernel: scales float32 [groups, C * S], `S = size`, to [C, groups * S].

    Rows become columns in registers as they are: each is repeated for all groups of its register, and masked.
    """
    groups, both = scales.shape

    def of_some(some: Array) -> Array:
        count = some.shape[0]
        own = jax.lax.broadcasted_iota(jnp.int32, (count, count * size), 1) // size
        own = own == jax.lax.broadcasted_iota(jnp.int32, own.shape, 0)
        repeated = (jnp.concatenate([some[:, i : i + size]] * count, axis=1) for i in range(0, both, size))
        return jnp.concatenate([jnp.where(own, x, 0).sum(0, keepdims=True) for x in repeated])

    return jnp.concatenate([of_some(scales[i : i + SUBLANES]) for i in range(0, groups, SUBLANES)], axis=1)
