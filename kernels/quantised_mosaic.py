"""Attention of one query per row over pairs in 8 or 4 bits, by a Pallas kernel for TPU: codes leave HBM as they are."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.kernels.pairs import Queries, lengthen, query_axes
from restkv_jax.kernels.partition import by_device
from restkv_jax.kernels.quantised import Quantisation, QuantisedPairs, decode
from restkv_jax.kernels.scores.mosaic import LANES, SUBLANES, Ref
from restkv_jax.kernels.scores.parts import product, split
from restkv_jax.kernels.softmax import HIDDEN, Softmax, cap_logits

SLOTS_AT_ONCE = 2048
"""Slots of a row and KV head, of 128 dimensions, that the chip holds at one time."""

PACKED = 16
"""Rows of a register of bfloat16, a scale's dtype. So many pages are read at one time, each copied by itself."""

DTYPES = jnp.float32, jnp.bfloat16

DIMS = LANES, 2 * LANES
"""Head dimensions: rows of codes are whole registers."""

SOFTMAX_AXES = Softmax("b k g q", "b k g q", "b k g q d")  # pyright: ignore[reportArgumentType]


class Static(NamedTuple):
    """What the kernel knows when it is compiled.

    Attributes:
      quantisation: of the pairs.
      blocks: in which the groups of a step come, all in one or each by itself.
      at_once: groups of a step.
      slots: of a row and KV head.
      soft_cap: of the logits.
    """

    quantisation: Quantisation
    blocks: int
    at_once: int
    slots: int
    soft_cap: float | None


class Groups(NamedTuple):
    """The groups of all rows and KV heads, `N` of each, `S` tokens in a group.

    Attributes:
      codes: of keys and of values, [..., S / P, D], wherever they stand.
      where: int32 [n], from which `place` knows where.
      block: the shape of a block of codes.
      place: the index of block `i` of a step: `place(row, head, step, i, where, used)`.
      scales: of keys, bfloat16 [..., N, D], and of values, bfloat16 [..., N, C * S].
      head: the index of a row and KV head among them: `head(row, head, where)`.
      positions: int32 [b, k, N * S], -1 where a slot is empty.
      used: int32 [b, k], groups that are read.
    """

    codes: tuple[Array, Array]
    where: Array
    block: tuple[int | None, ...]
    place: Callable[..., tuple[Any, ...]]
    scales: tuple[Array, Array]
    head: Callable[..., tuple[Any, ...]]
    positions: Array
    used: Array


def read_layer(
    queries: Queries, stored: QuantisedPairs, layer: Array, positions: Array, *, interpret: bool = False
) -> Softmax:
    """As `quantised_attention.read_quantised`."""
    quantisation = stored.quantisation

    def alone(queries: Queries, stored: QuantisedPairs, layer: Array, positions: Array) -> Softmax:
        at_once = _groups_at_once(stored)

        def place(row: Any, head: Any, step: Any, _: int, where: Ref, used: Ref) -> tuple[Any, ...]:
            return where[0], row, head, step, 0, 0

        groups = Groups(
            codes=(stored.keys.codes, stored.values.codes),
            where=layer.reshape(1),
            block=(None, None, None, at_once, *stored.keys.codes.shape[-2:]),
            place=place,
            scales=(stored.keys.scales, stored.values.scales),
            head=lambda row, head, where: (where[0], row, head),
            positions=positions,
            used=jnp.full(positions.shape[:2], stored.num_groups, jnp.int32),
        )
        asked = jnp.broadcast_to(queries.positions, positions.shape[:2])
        static = Static(quantisation, 1, at_once, positions.shape[2], queries.soft_cap)
        return _read_groups(static, queries, asked, groups, interpret)

    queries = queries.replace(sliding_window=jnp.asarray(queries.sliding_window, jnp.int32))
    axes = query_axes(queries), jax.tree.map(lambda _: "l b k", stored), "", "b k n"
    return by_device(alone, (queries, stored, layer, positions), axes, SOFTMAX_AXES)


def read_table(
    queries: Queries, stored: QuantisedPairs, table: Array, lengths: Array, positions: Array, *, interpret: bool = False
) -> Softmax:
    """The softmax of one query per row and KV head over quantised pages.

    Args:
      queries: [b, k, G, 1, D], at positions int32 [b, k].
      stored: a group per page.
      table: int32 [b, k, J], the pages of each.
      lengths: int32 [b, k], slots in use.
      positions: int32 [b, k, J * S], of the slots in use.
    """
    q, num_places = stored.quantisation, table.shape[2]
    table = jnp.where(table < len(stored.keys.codes), table, 0)

    def place(row: Any, head: Any, step: Any, i: int, where: Ref, used: Ref) -> tuple[Any, ...]:
        last = jnp.maximum(used[row, head] - 1, 0)  # what is there already is not copied again
        first = (row * table.shape[1] + head) * num_places
        return where[first + jnp.minimum(step * at_once + i, last)], 0, 0

    at_once = min(num_places, PACKED)
    groups = Groups(
        codes=(stored.keys.codes, stored.values.codes),
        where=table.reshape(-1),
        block=(1, *stored.keys.codes.shape[-2:]),
        place=place,
        scales=(stored.keys.scales[table], stored.values.scales[table]),
        head=lambda row, head, where: (row, head),
        positions=jnp.where(jnp.arange(positions.shape[2]) < lengths[..., None], positions, -1),
        used=-(-lengths // q.group_size),
    )
    static = Static(q, at_once, at_once, positions.shape[2], queries.soft_cap)
    return _read_groups(static, queries, queries.positions, groups, interpret)


def refusal(queries: Queries, stored: QuantisedPairs, *_: Any, **options: Any) -> str | None:
    """Why the kernel cannot take these arguments."""
    q, dim = stored.quantisation, queries.vectors.shape[-1]
    if q.dtype == "float8_e4m3fn":
        return "the kernel knows codes that are integers"
    if queries.vectors.dtype not in DTYPES:
        return f"the kernel knows float32 and bfloat16, not {queries.vectors.dtype}"
    if queries.vectors.shape[3] > 1:
        return "the kernel takes one query per row"
    if q.group_size // q.in_word % SUBLANES:
        return f"words of groups of {q.group_size} tokens do not fill registers; choose a multiple of {8 * q.in_word}"
    if dim not in DIMS:
        return f"the head dimension {dim} is not {' or '.join(map(str, DIMS))}"
    if q.group_size > (most := 2 * SLOTS_AT_ONCE * LANES // dim // PACKED):
        return f"groups of {q.group_size} tokens are more than the {most} that the chip holds {PACKED} of"
    return None if stored.num_groups else "there are no groups"


def _groups_at_once(stored: QuantisedPairs) -> int:
    """Groups of a step: all, or as many as registers of their scales take."""
    fitting = SLOTS_AT_ONCE * LANES // stored.keys.codes.shape[-1] // stored.quantisation.group_size
    return min(stored.num_groups, max(fitting // PACKED, 1) * PACKED)


def _read_groups(static: Static, queries: Queries, asked: Array, groups: Groups, interpret: bool) -> Softmax:
    """The softmax of queries at positions `asked` int32 [b, k]."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    rows = lengthen(einops.rearrange(queries.vectors, "b k g 1 d -> b k g d"), 2, SUBLANES)
    batch, num_kv_heads, num_rows, dim = rows.shape
    tokens = static.at_once * static.quantisation.group_size

    def of_head(*block: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *block), lambda row, head, *_: (row, head, *[0] * len(block)))

    def of_codes(i: int) -> pl.BlockSpec:
        def place(row: Any, head: Any, step: Any, window: Ref, asked: Ref, used: Ref, where: Ref) -> tuple[Any, ...]:
            return groups.place(row, head, step, i, where, used)

        return pl.BlockSpec(groups.block, place)

    def of_scales(x: Array) -> pl.BlockSpec:
        def place(row: Any, head: Any, step: Any, window: Ref, asked: Ref, used: Ref, where: Ref) -> tuple[Any, ...]:
            return *groups.head(row, head, where), step, 0

        return pl.BlockSpec((*[None] * (x.ndim - 2), static.at_once, x.shape[-1]), place)

    blocks = [of_codes(i) for i in range(static.blocks)]
    of_positions = pl.BlockSpec((None, None, 1, tokens), lambda row, head, step, *_: (row, head, 0, step))
    column = jax.ShapeDtypeStruct((batch, num_kv_heads, num_rows, 1), jnp.float32)
    slots = batch * num_kv_heads * static.slots
    by_slot = 2 * dim * static.quantisation.bits // 8 + groups.positions.dtype.itemsize
    by_group = sum(x.shape[-1] * x.dtype.itemsize for x in groups.scales)
    moved = slots * by_slot + slots // static.quantisation.group_size * by_group
    peak, total, weighted = pl.pallas_call(
        functools.partial(_kernel, static),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(batch, num_kv_heads, pl.cdiv(static.slots, tokens)),
            in_specs=[of_head(num_rows, dim), *blocks, *blocks, *map(of_scales, groups.scales), of_positions],
            out_specs=[of_head(num_rows, 1), of_head(num_rows, 1), of_head(num_rows, dim)],
        ),
        out_shape=[column, column, jax.ShapeDtypeStruct(rows.shape, jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * slots * num_rows * dim, transcendentals=slots * num_rows, bytes_accessed=moved
        ),
        interpret=interpret,
    )(
        jnp.asarray(queries.sliding_window, jnp.int32).reshape(1), asked, groups.used, groups.where,
        rows, *(x for x in groups.codes for _ in blocks), *groups.scales, groups.positions[:, :, None],
    )  # fmt: skip
    group = queries.vectors.shape[2]
    return Softmax(peak[:, :, :group], total[:, :, :group], weighted[:, :, :group, None])


def _kernel(static: Static, window: Ref, asked: Ref, used: Ref, _: Ref, queries: Ref, *blocks: Ref) -> None:
    from jax.experimental import pallas as pl

    *codes, key_scales, value_scales, positions, peak, total, weighted = blocks
    row, head, step = (pl.program_id(axis) for axis in range(3))

    def initialise() -> None:
        peak[...] = jnp.full_like(peak, HIDDEN)
        total[...] = jnp.zeros_like(total)
        weighted[...] = jnp.zeros_like(weighted)

    def read() -> None:
        dtype = queries.dtype
        place = step * positions.shape[1] + jax.lax.broadcasted_iota(jnp.int32, positions.shape, 1)
        held = jnp.where(place < static.slots, positions[...], -1)
        past = asked[row, head] - held
        seen = (past >= 0) & (past < window[0]) & (held >= 0)

        keys = _decoded(static, codes[: static.blocks]) * key_scales[...].astype(jnp.float32)[:, None]
        products = product(split(queries[...]), split(_by_slot(keys).astype(dtype)), over=(1, 1))
        logits = jnp.where(seen, cap_logits(products, static.soft_cap), HIDDEN)
        larger = jnp.maximum(peak[...], logits.max(1, keepdims=True))
        weights = jnp.where(seen, jnp.exp(logits - larger), 0)
        decay = jnp.exp(peak[...] - larger)

        values = _by_slot(_decoded(static, codes[static.blocks :])).astype(jnp.bfloat16)  # exact
        scales = _by_part(value_scales[...].astype(jnp.float32), static.quantisation.group_size)
        peak[...] = larger
        total[...] = total[...] * decay + weights.sum(1, keepdims=True)
        weighted[...] = weighted[...] * decay + _weighted(weights, seen, scales, values, dtype)

    pl.when(step == 0)(initialise)
    pl.when(step * static.at_once < used[row, head])(read)


def _decoded(static: Static, blocks: Sequence[Ref]) -> Array:
    """In the kernel: the codes of a step, float32 [groups, S, D]."""
    return decode(jnp.concatenate([x[...] for x in blocks]), static.quantisation)


def _by_slot(x: Array) -> Array:
    """In the kernel: [groups, S, D] to [groups * S, D]."""
    return x.reshape(-1, x.shape[-1])


def _weighted(weights: Array, seen: Array, scales: Array, codes: Array, dtype: Any) -> Array:
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
