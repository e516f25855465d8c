"""Attention of many queries on TPUs, by JAX's splash kernels.

They are handed what they are made for, the blocks of keys that a block of queries sees and a function that masks within
a block, but as traced arrays: the places that each query sees follow a chunk's start, padding and windows.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import einops
import flax.struct
import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from restkv_jax.kernels.pairs import Pairs, Queries, largest_divisor, lengthen
from restkv_jax.kernels.ranges import Ranges, Span, over_ranges, ranges_of, widest
from restkv_jax.kernels.softmax import HIDDEN, Softmax, normalised

LANES = 128
BLOCK = 8 * LANES
"""Queries, and keys, of a block at most."""
AT_ONCE = 4 * LANES
"""Keys of a block whose logits exist at one time, at most."""


class Code(NamedTuple):
    """How a range stands in one int32: its end from bit `shift` on, below the number of places, all ones for all."""

    shift: int
    bias: int

    @classmethod
    def of(cls, length: int) -> "Code":
        """The code of ranges in `length` places."""
        bits = length.bit_length()
        return cls(32 - bits, 1 << (bits - 1))

    @property
    def every(self) -> int:
        """Stands for all places from the floor on."""
        return (1 << self.shift) - 1

    def write(self, ranges: Ranges) -> Array:
        number = jnp.clip(ranges.end - ranges.first, 0, self.every)
        number = jnp.where(ranges.see() & (ranges.first <= ranges.floor[..., None]), self.every, number)
        return ((ranges.end - self.bias) << self.shift) | number

    def holds(self, code: Array, place: Array) -> Array:
        """Whether a place from the floor on is in the range."""
        back = (code >> self.shift) + (self.bias - 1) - place
        number = code & self.every
        return (back >= 0) & ((back < number) | (number == self.every))


class Row(flax.struct.PyTreeNode):
    """What one call of the kernels takes: the KV heads of a row that see the same places, and all their query heads.

    `queries`, and `gradient` of the same shape, [H, T, D]; `keys`, `values` [K, N, D]; `code` int32 [T]; `runs` int32
    [q blocks, kv blocks], 1 where queries of one see keys of the other; `floor` int32 scalar; `normaliser` and `rest`
    float32 [H, T].
    """

    queries: Array
    keys: Array
    values: Array
    code: Array
    runs: Array
    floor: Array
    gradient: Array | None = None
    normaliser: Array | None = None
    rest: Array | None = None

    def mask_info(self, axis: int) -> MaskInfo:
        """For kernels whose innermost loop is over the queries' blocks, axis 0, or over the keys', 1."""
        arrays: Any = _next(self.runs, axis)[None], None, self.runs[None], None, self.code  # traced, not NumPy's
        return MaskInfo(*arrays)

    def segments(self) -> splash.SegmentIds:
        """No query is of the segment of what lies before the floor."""
        of_keys = (jnp.arange(self.keys.shape[1]) < self.floor).astype(jnp.int32)
        return splash.SegmentIds(jnp.zeros_like(self.code), of_keys)

    def blocks(self) -> tuple[int, int, int]:
        """Queries of a block, keys of a block, and keys at once."""
        num_q, num_kv = (
            x.shape[1] // count for x, count in zip((self.queries, self.keys), self.runs.shape, strict=True)
        )
        return num_q, num_kv, block_size(num_kv, AT_ONCE)


def refusal(queries: Queries, parts: tuple[Pairs, ...], *_: Any, spans: tuple[Span | None, ...]) -> str | None:
    """Why the kernels cannot take these arguments; None where they can."""
    num_queries, dim = queries.vectors.shape[3:]
    shortest, longest = (f(pairs.keys.shape[2] for pairs in parts) for f in (min, max))
    if min(num_queries, shortest) < LANES:
        return f"{num_queries} queries and {shortest} keys are less than a block of {LANES}"
    if dim % 8:
        return f"the head dimension {dim} is not a multiple of 8"
    if len({queries.vectors.dtype, *(x.dtype for pairs in parts for x in pairs[:2])}) > 1:
        return "queries, keys and values have different dtypes"
    most = Code.of(-(-longest // LANES) * LANES).every  # of the places with padding
    for span in spans:
        width = widest(span, queries)
        if longest > most and (width is None or width >= most):
            return f"windows of {'unknown size' if width is None else width} over {longest} keys are not below {most}"
    return None


def read_parts(
    queries: Queries, parts: tuple[Pairs, ...], *, spans: tuple[Span | None, ...], interpret: bool = False
) -> tuple[Array, Array]:
    """The context [B, K, G, T, D] and the normaliser float32 [B, K, G, T] over the union of sets of pairs."""
    return over_ranges(functools.partial(_read, interpret=interpret), queries, parts, spans)


def _read(ranges: Ranges, queries: Queries, pairs: Pairs, interpret: bool) -> Softmax:
    """The softmax of one range of places."""

    def of_row(row: Row) -> tuple[Array, Array]:
        context, (normaliser,) = splash._splash_attention_forward(
            row.mask_info(1), row.queries, row.keys, row.values, row.segments(), None, is_mqa=False,
            block_sizes=splash.BlockSizes(*row.blocks()), residual_checkpoint_name=None, save_residuals=True,
            **_options(row, queries, interpret),
        )  # fmt: skip
        return context, normaliser

    context, normaliser = (_of_queries(x, queries) for x in _each(of_row, _rows(ranges, queries, pairs)))
    sees = jnp.broadcast_to(ranges.see()[:, :, None], normaliser.shape)
    return normalised(jnp.where(sees, normaliser, HIDDEN), jnp.where(sees[..., None], context, 0))


def part_gradients(
    queries: Queries,
    parts: tuple[Pairs, ...],
    normaliser: Array,
    rest: Array,
    gradient: Array,
    *,
    spans: tuple[Span | None, ...],
    interpret: bool = False,
) -> tuple[Array, tuple[tuple[Array, Array], ...]]:
    """float32 gradients of the queries' vectors, and of each part's keys and values.

    Args:
      queries: those of `read_parts`.
      parts: likewise.
      normaliser: float32 [B, K, G, T], over all parts.
      rest: float32 [B, K, G, T], the product of context and gradient.
      gradient: [B, K, G, T, D], of the context.
      spans: those of `read_parts`.
      interpret: whether the kernels are interpreted.
    """
    of_queries, of_parts = jnp.zeros(queries.vectors.shape, jnp.float32), []
    for span, pairs in zip(spans, parts, strict=True):
        of_pairs = jnp.zeros((2, *pairs.keys.shape), jnp.float32)
        for ranges in ranges_of(span, queries, pairs.positions):
            rows = _rows(ranges, queries, pairs, gradient=gradient, normaliser=normaliser, rest=rest)
            of_range, *new = _each(lambda row: _row_gradients(row, queries, interpret), rows)
            of_queries += _of_queries(of_range, queries)
            of_pairs += jnp.stack([_of_pairs(x, pairs) for x in new])
        of_parts.append((of_pairs[0], of_pairs[1]))
    return of_queries, tuple(of_parts)


def _row_gradients(row: Row, queries: Queries, interpret: bool) -> tuple[Array, Array, Array]:
    """Of the queries, keys and values of a row."""
    given = row.queries, row.keys, row.values, row.segments(), None, row.normaliser, row.gradient, row.rest
    block_q, block_kv, at_once = row.blocks()
    layouts = dict.fromkeys(("q_layout", "k_layout", "v_layout"), splash.QKVLayout.HEAD_DIM_MINOR)
    options: dict = dict(bq=block_q, bkv=block_kv, is_mqa=False, **layouts, **_options(row, queries, interpret))
    of_queries = splash._splash_attention_bwd_dq(*given, mask_info=row.mask_info(1), **options)
    _, *of_pairs = splash._splash_attention_bwd_dkv(
        *given, mask_info=row.mask_info(0), bkv_compute=at_once, use_fused_bwd_kernel=False, **options
    )
    return of_queries, of_pairs[0], of_pairs[1]


def _options(row: Row, queries: Queries, interpret: bool) -> dict[str, Any]:
    return dict(
        mask_value=splash.DEFAULT_MASK_VALUE,
        mask_function=Code.of(row.keys.shape[1]).holds,
        attn_logits_soft_cap=queries.soft_cap,
        interpret=interpret,
    )


def _rows(ranges: Ranges, queries: Queries, pairs: Pairs, **of_result: Array) -> Row:
    """The rows, and the KV heads of a row apart where they see other places; all along one axis, the first.

    `of_result` are the fields of `Row` that belong to what the queries read.
    """
    heads = ranges.first.shape[1]

    def of_queries(x: Array) -> Array:
        return lengthen(einops.rearrange(x, "b (p k) g t ... -> (b p) (k g) t ...", p=heads), 2, LANES)

    def of_keys(x: Array) -> Array:
        return lengthen(einops.rearrange(x, "b (p k) n d -> (b p) k n d", p=heads), 2, LANES)

    vectors, keys = of_queries(queries.vectors), of_keys(pairs.keys)
    code = einops.rearrange(Code.of(keys.shape[2]).write(ranges), "b p t -> (b p) t")
    return Row(
        queries=vectors,
        keys=keys,
        values=of_keys(pairs.values),
        code=lengthen(code, 1, LANES, jnp.iinfo(jnp.int32).min),  # ends at place 0
        runs=_runs(ranges, vectors.shape[2], keys.shape[2]),
        floor=ranges.floor.reshape(-1),
        **{name: of_queries(x) for name, x in of_result.items()},
    )


def _runs(ranges: Ranges, num_queries: int, num_keys: int) -> Array:
    """Which blocks see each other, int32 [rows, q blocks, kv blocks]."""
    block_q, block_kv = (block_size(n, BLOCK) for n in (num_queries, num_keys))

    def by_block(x: Array, empty: int) -> Array:
        x = einops.rearrange(jnp.where(ranges.see(), x, empty), "b p t -> (b p) t")
        return einops.rearrange(lengthen(x, 1, LANES, empty), "r (i q) -> r i q", q=block_q)

    start = jnp.arange(0, num_keys, block_kv)
    first, end = by_block(ranges.first, num_keys).min(-1), by_block(ranges.end, 0).max(-1)
    return ((start < end[..., None]) & (start + block_kv > first[..., None])).astype(jnp.int32)


def _next(runs: Array, axis: int) -> Array:
    """The next block along an axis that runs, this one or a later one, so that it is fetched ahead; else the last."""
    count = runs.shape[axis]
    here = jax.lax.broadcasted_iota(jnp.int32, runs.shape, axis)
    ahead = jax.lax.cummin(jnp.where(runs > 0, here, count), axis, reverse=True)
    return jnp.where(ahead < count, ahead, jnp.where(runs > 0, here, 0).max(axis, keepdims=True))


def block_size(length: int, most: int) -> int:
    """The largest block of at most `most` that divides a multiple of the lanes."""
    return LANES * largest_divisor(length // LANES, most // LANES)


def _each(function: Callable[[Row], Any], rows: Row) -> Any:
    """Applies a function to every row, one after the other."""
    if len(rows.code) == 1:
        return jax.tree.map(lambda x: x[None], function(jax.tree.map(lambda x: x[0], rows)))
    return jax.lax.map(function, rows)


def _of_queries(x: Array, queries: Queries) -> Array:
    """Of rows [R, H, T, ...] to [B, K, G, T, ...]."""
    batch, heads, group, length, _ = queries.vectors.shape
    return x.reshape(batch, heads, group, *x.shape[2:])[:, :, :, :length]


def _of_pairs(x: Array, pairs: Pairs) -> Array:
    """Of rows [R, heads, N, D] to [B, K, N, D]."""
    batch, heads, length, dim = pairs.keys.shape
    return x.reshape(batch, heads, -1, dim)[:, :, :length]
