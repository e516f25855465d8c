"""Column sums, column norms and removal errors of averaged attention by Pallas kernels for GPU, through Triton.

Every tile of keys is a program of its own; what tiles have to agree on, XLA joins in between.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.kernels.pairs import Pairs, Queries, lengthen
from restkv_jax.kernels.scores import columns
from restkv_jax.kernels.scores.columns import on_devices, per_query
from restkv_jax.kernels.scores.mosaic import UNSEEN, Described, Ref
from restkv_jax.kernels.scores.parts import product, split, split_gram
from restkv_jax.kernels.scores.reference import error_at
from restkv_jax.kernels.scores.removals import Output
from restkv_jax.kernels.softmax import HIDDEN, cap_logits

TILE = 128
"""Keys of a program; half of them for float32, whose parts take more registers."""

LEAST = 16
"""Rows of a matrix that tensor cores take."""

CANDIDATES = 16
"""Numbers that a query's probabilities are compared with at one time."""

DIM_LIMIT = QUERY_LIMIT = 128
"""Gram matrices, and the logits of a query head, that fit into shared memory and registers."""


class Static(NamedTuple):
    """What a kernel knows when it is compiled: keys in all and in a tile, dimensions of a head, and the soft cap."""

    length: int
    tile: int
    dim: int
    soft_cap: float | None


def column_sums(queries: Queries, pairs: Pairs, weights: Array, *, interpret: bool = False) -> Array:
    """As the reference; keys are read twice, values never."""

    def alone(queries: Queries, pairs: Pairs, weights: Array) -> Array:
        inputs = attention_of(queries, pairs, weights, interpret)
        return each_tile(_sums_kernel, queries, pairs, inputs, ["b k g n"], interpret)[0]

    return on_devices(alone, queries, pairs, per_query(weights, queries))


def column_row_norms(queries: Queries, pairs: Pairs, gram: Array, *, interpret: bool = False) -> Array:
    """As the reference; keys are read twice, values once."""

    def alone(queries: Queries, pairs: Pairs, gram: Array) -> Array:
        ones = jnp.ones(queries.positions.shape, jnp.float32)
        gram = split_gram(fill(fill(gram, 2), 3))
        inputs = [*attention_of(queries, pairs, ones, interpret), ("b k n d", pairs.values), ("k p g e f", gram)]
        return each_tile(_norms_kernel, queries, pairs, inputs, ["b k g n"], interpret)[0]

    return on_devices(alone, queries, pairs, ("k g d e", gram))


def averaged_attention_removal_error(
    queries: Queries,
    pairs: Pairs,
    gram: Array,
    weights: Array,
    *,
    window: int | None = None,
    tau: float = 1.0,
    interpret: bool = False,
) -> Array:
    """As the reference; keys and values are read twice."""
    num_prefix = pairs.keys.shape[2] - (queries.vectors.shape[3] if window is None else window)

    def alone(queries: Queries, pairs: Pairs, gram: Array, weights: Array) -> Array:
        inputs = [*attention_of(queries, pairs, weights, interpret), ("b k n d", pairs.values)]
        kernel, outputs = (
            functools.partial(_output_kernel, num_prefix),
            ["b k g n", *["b k t g"] * 3, *["b k t g e"] * 2],
        )
        received, *of_tiles = each_tile(kernel, queries, pairs, inputs, outputs, interpret)
        found, gram = _join(*of_tiles), fill(fill(gram, 2), 3)
        parts = split_gram(gram)
        output, projected, distance = found.measured(gram, parts)
        inputs = [
            ("b k g n", received), ("b k n d", pairs.values), ("k p g e f", parts), ("b k g e", output),
            ("b k g e", projected), ("b k g", found.place[..., 0]), ("b k g", distance[..., 0]),
        ]  # fmt: skip
        return each_tile(functools.partial(_errors_kernel, tau), queries, pairs, inputs, ["b k g n"], interpret)[0]

    return on_devices(alone, queries, pairs, ("k g d e", gram), per_query(weights, queries))[..., :num_prefix]


def refusal(queries: Queries, pairs: Pairs, *arrays: Any, **options: Any) -> str | None:
    """Why the kernels cannot take these arguments."""
    width, dim = queries.vectors.shape[3:]
    if dim > DIM_LIMIT:
        return f"the head dimension {dim} is more than {DIM_LIMIT}"
    if width > QUERY_LIMIT:
        return f"{width} queries are more than {QUERY_LIMIT}"
    return columns.refusal(queries, pairs, *arrays, **options)


def fill(x: Array, axis: int, value: int = 0) -> Array:
    """Extends an axis to a power of two, as all blocks are."""
    return lengthen(x, axis, _filled(x.shape[axis]), value)


def _filled(size: int) -> int:
    return max(LEAST, 1 << (size - 1).bit_length())


def each_tile(
    kernel: Callable[..., None],
    queries: Queries,
    pairs: Pairs,
    inputs: Sequence[Described],
    outputs: Sequence[str],
    interpret: bool,
) -> list[Array]:
    """Runs `kernel(static, *blocks)` for every tile of keys.

    The blocks are those that `logits_of_heads` takes, then inputs, then outputs. Outputs are float32, described by
    their axes: also `t`, tiles; `q`, a head's queries; `e`, its dimensions, both filled up; `c`, candidates. All of
    `n` is one block.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    batch, num_kv_heads, group, width, dim = queries.vectors.shape
    length, tile = pairs.keys.shape[2], TILE if pairs.keys.dtype == jnp.bfloat16 else TILE // 2
    steps = {"b": batch, "k": num_kv_heads, "t": pl.cdiv(length, tile)}
    sizes = steps | {"g": group, "n": length, "q": _filled(width), "e": _filled(dim), "c": CANDIDATES}
    shapes = [jax.ShapeDtypeStruct([sizes[a] for a in axes.split()], jnp.float32) for axes in outputs]
    described = [
        ("w", jnp.asarray(queries.sliding_window, jnp.int32).reshape(1)),
        ("b q", fill(queries.positions, 1, value=-1)), ("b k g q e", fill(fill(queries.vectors, 3), 4)),
        ("b k n d", pairs.keys), ("b k n", pairs.positions), *inputs,
    ]  # fmt: skip

    def block(axes: str, x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        letters = axes.split()

        def place(*step):
            places = dict(zip(steps, step, strict=True))
            return tuple(places.get(a, 0) if n > 1 else 0 for a, n in zip(letters, x.shape, strict=True))

        return pl.BlockSpec(tuple(None if a in steps else n for a, n in zip(letters, x.shape, strict=True)), place)

    call = pl.pallas_call(
        functools.partial(kernel, Static(length, tile, dim, queries.soft_cap)),
        grid=tuple(steps.values()),
        in_specs=[block(*x) for x in described],
        out_specs=[block(*x) for x in zip(outputs, shapes, strict=True)],
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
    )
    return call(*(x for _, x in described))


def peaks_of(queries: Queries, pairs: Pairs, interpret: bool) -> tuple[Array, Array]:
    """Every query's largest logit, and the sum of exponentials relative to it: float32 [B, K, G, Q]."""
    peaks, totals = each_tile(_peaks_kernel, queries, pairs, [], ["b k t g q", "b k t g q"], interpret)
    peak = peaks.max(2)
    return peak, (totals * jnp.exp(peaks - peak[:, :, None])).sum(2)


def attention_of(queries: Queries, pairs: Pairs, weights: Array, interpret: bool) -> list[Described]:
    """What `weights_of_heads` takes beside keys: every query's peak, and `weights[t]` over its normaliser."""
    peak, total = peaks_of(queries, pairs, interpret)
    return [("b k g q", peak), ("b k g q", fill(weights, 1)[:, None, None] / jnp.where(total > 0, total, 1.0))]


def _join(share: Array, place: Array, rest: Array, value: Array, others: Array) -> Output:
    """The `Output` of all tiles from those of each, [B, K, tiles, G] or [B, K, tiles, G, D]."""
    best = share.argmax(2, keepdims=True)
    is_best = jnp.arange(share.shape[2])[:, None] == best

    def take(x: Array) -> Array:
        return jnp.where(is_best, x, 0.0).sum(2)[..., None]

    lost = jnp.where(is_best, 0.0, share)
    top_value = jnp.where(is_best[..., None], value, 0.0).sum(2)
    all_others = (others + lost[..., None] * value).sum(2)
    return Output(take(share), take(place), top_value, all_others, (rest + lost).sum(2)[..., None])


def places_of(static: Static) -> Array:
    """In a kernel: where the keys of its tile stand, int32 [n]."""
    from jax.experimental import pallas as pl

    return pl.program_id(2) * static.tile + jnp.arange(static.tile, dtype=jnp.int32)


def _here(static: Static) -> Any:
    from jax.experimental import pallas as pl

    return pl.ds(pl.program_id(2) * static.tile, static.tile)


def load(static: Static, x: Ref, dims: int | None = None, empty: float = 0) -> Array:
    """In a kernel: its tile's part of an array [N], or [N, D] filled up to `dims`."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    inside = places_of(static) < static.length
    if dims is None:
        return plgpu.load(x.at[_here(static)], mask=inside, other=empty)
    mask = inside[:, None] & (jnp.arange(dims) < static.dim)[None]
    return plgpu.load(x.at[_here(static), pl.ds(0, dims)], mask=mask, other=empty)


def load_head(static: Static, x: Ref, head: int) -> Array:
    """In a kernel: its tile's part of one query head's row of an array [G, N]."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    inside = places_of(static) < static.length
    return plgpu.load(x.at[pl.ds(head, 1), _here(static)], mask=inside[None], other=0.0)[0]


def store(static: Static, x: Ref, head: int, scores: Array) -> None:
    """In a kernel: writes its tile's scores of one query head."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    inside = places_of(static) < static.length
    plgpu.store(x.at[pl.ds(head, 1), _here(static)], scores[None], mask=inside[None])


def logits_of_heads(
    static: Static, window: Ref, positions: Ref, queries: Ref, keys: Ref, key_positions: Ref
) -> list[Array]:
    """In a kernel: every query head's logits of its tile, float32 [w, n], `HIDDEN` where `visible` hides a key."""
    present = load(static, key_positions, empty=-1)[None]
    past = positions[...][:, None] - present
    seen = (past >= 0) & (past < window[0]) & (present >= 0)
    parts = split(load(static, keys, queries.shape[2]))

    def of_head(head: int) -> Array:
        products = product(split(queries[head]), parts, over=(1, 1))
        return jnp.where(seen, cap_logits(products, static.soft_cap), HIDDEN)

    return [of_head(head) for head in range(queries.shape[0])]


def weights_of_heads(static: Static, *blocks: Ref) -> list[Array]:
    """In a kernel: every query head's attention times the weights of `attention_of`, float32 [w, n]."""
    *of_logits, peak, scale = blocks
    logits = enumerate(logits_of_heads(static, *of_logits))
    return [jnp.exp(x - peak[head][:, None]) * scale[head][:, None] for head, x in logits]


def _peaks_kernel(static: Static, *blocks: Ref) -> None:
    *of_logits, peak, total = blocks
    for head, logits in enumerate(logits_of_heads(static, *of_logits)):
        largest = jnp.maximum(logits.max(1), UNSEEN)
        peak[head] = largest
        total[head] = jnp.exp(logits - largest[:, None]).sum(1)


def _sums_kernel(static: Static, *blocks: Ref) -> None:
    *attention, sums = blocks
    for head, weights in enumerate(weights_of_heads(static, *attention)):
        store(static, sums, head, weights.sum(0))


def _norms_kernel(static: Static, *blocks: Ref) -> None:
    *attention, values, gram, norms = blocks
    tile = load(static, values, gram.shape[2])
    for head, weights in enumerate(weights_of_heads(static, *attention)):
        squared = (tile.astype(jnp.float32) * product(split(tile), [gram[0, head], gram[1, head]])).sum(1)
        columns = jnp.sqrt((weights * weights).sum(0))
        store(static, norms, head, columns * jnp.sqrt(jnp.maximum(squared, 0.0)))


def _output_kernel(num_prefix: int, static: Static, *blocks: Ref) -> None:
    """Attention received, and the `Output` of each tile."""
    *attention, values, received, share, place, rest, value, others = blocks
    places, tile = places_of(static), load(static, values, value.shape[1]).astype(jnp.float32)
    for head, weights in enumerate(weights_of_heads(static, *attention)):
        sums = weights.sum(0)
        store(static, received, head, sums)
        shares = jnp.where(places < num_prefix, sums, 0.0)
        best = jnp.where(shares == shares.max(0), places, static.length).min(0)
        is_best = (places == best) & (places < num_prefix)
        share[head], place[head] = shares.max(0), best.astype(jnp.float32)
        rest[head] = jnp.where(is_best, 0.0, sums).sum(0)
        value[head] = jnp.where(is_best[:, None], tile, 0.0).sum(0)
        others[head] = (jnp.where(is_best, 0.0, shares)[:, None] * tile).sum(0)


def _errors_kernel(tau: float, static: Static, *blocks: Ref) -> None:
    received, values, gram, output, projected_output, place, top_distance, errors = blocks[5:]
    tile = load(static, values, gram.shape[2])
    for head in range(gram.shape[1]):
        attention = load_head(static, received, head)
        moved = output[head][None] - tile.astype(jnp.float32)
        projected = projected_output[head][None] - product(split(tile), [gram[0, head], gram[1, head]])
        is_top = places_of(static).astype(jnp.float32) == place[head]
        distance = jnp.where(is_top, top_distance[head], jnp.sqrt(jnp.maximum((moved * projected).sum(1), 0.0)))
        store(static, errors, head, error_at(distance, attention, is_top, tau))
