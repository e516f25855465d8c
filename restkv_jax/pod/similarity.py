"""How alike layers attend, and the groups that follow from it."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from restkv_jax.generation.checks import check_tokens
from restkv_jax.kernels.pairs import Pairs, Queries, largest_divisor, proximal
from restkv_jax.kernels.scores import probabilities
from restkv_jax.models.arguments import check_integer
from restkv_jax.models.decoder import Decoder, Hooks, LayerView, positions_of, read
from restkv_jax.models.key_groups import LayerGroups
from restkv_jax.models.memory import PairMemory
from restkv_jax.models.mesh import beside
from restkv_jax.models.rules import with_usual_promotion


@with_usual_promotion
def attention_similarity(
    model: Decoder,
    params: Any,
    batches: Iterable[Any],
    last_queries: int = 64,
    chunk_size: int | None = None,
    sink: int = 0,
    recent: int = 0,
) -> np.ndarray:
    """How alike the layers of each KV head attend, over some sample texts (PoD, arXiv 2412.02252).

    `1 - JS(a_i[t], a_j[t])` with base-2 logarithms, so between 0 and 1, where `a_i[t]` is layer `i`'s attention of
    query `t`, the mean over the head's query heads. Averaged over the last queries of all rows of all batches.

    Each layer goes on reading proximal tokens by its own keys, so how it divides its attention among them need not be
    alike: with `sink` and `recent` they count as one token. The paper compares all, the default here.

    The prompt is read once per batch; the keys and last queries of all layers are held, `L B K T D` and `L B H q D`
    numbers. The attention is computed again for every pair of layers, one row and KV head at a time: at most
    `2 q T` probabilities besides the one query head's that is being added.

    Args:
      model: a `Decoder`.
      params: its parameters.
      batches: of texts: tokens int32 [B, T], or a pair of tokens and mask bool [B, T], False on left padding.
      last_queries: `q`, of each row; a shorter text shows all it has.
      chunk_size: tokens of the prompt whose activations exist at one time; all by default.
      sink: tokens at the beginning that each layer will read by its own keys.
      recent: tokens at the end, up to and with a query's own, that each layer will read by its own keys.

    Returns:
      float32 [K, L, L], symmetric, 1 on the diagonal.

    Raises:
      ValueError, TypeError: no batch, or one that makes no sense.
    """
    check_integer("last_queries", last_queries, 1, "the queries that are compared")
    check_integer("sink", sink, 0, "tokens at the beginning")
    check_integer("recent", recent, 0, "tokens at the end")
    total, count = np.zeros(()), 0
    for batch in batches:
        tokens, mask = batch if isinstance(batch, tuple) else (batch, None)
        tokens, mask = check_tokens(model, tokens, mask)
        with beside(params) as placed:
            sums, queries = _sum_similarity(model, placed, tokens, mask, last_queries, chunk_size, sink, recent)
        total, count = total + np.asarray(sums, np.float64), count + int(queries)
    if not count:
        raise ValueError("batches is empty; give at least one text")
    return (total / count).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("model", "last_queries", "chunk_size"))
def _sum_similarity(model, params, tokens, mask, last_queries, chunk_size, sink, recent) -> tuple[Array, Array]:
    """The similarity summed over rows and queries, float32 [K, L, L], and how many queries these were."""
    positions = positions_of(mask)
    queries, keys = _last_queries_and_keys(model, params, tokens, positions, last_queries, chunk_size)
    windows = jnp.asarray(model.config.sliding_windows, jnp.int32)
    query_positions = positions[:, -queries.shape[4] :]
    num_layers, batch, num_kv_heads = keys.shape[:3]

    def with_those_above(index: tuple[Array, Array, Array]) -> Array:
        row, head, layer = index

        def attend(layer: Array) -> Array:
            vectors, cap = queries[layer, row, head][None, None], model.config.attn_logit_softcapping
            one = Queries(vectors, query_positions[row][None], windows[layer], cap)
            key = keys[layer, row, head][None, None]
            return _group_attention(one, Pairs(key, key, positions[row][None, None]), sink, recent)

        def compare(above: Array) -> Array:
            alike = 1 - jensen_shannon(attention, attend(above))
            return jnp.where(query_positions[row] >= 0, alike, 0.0).sum()

        attention = attend(layer)
        return jax.lax.map(
            lambda other: jax.lax.cond(other > layer, compare, lambda _: 0.0, other), jnp.arange(num_layers)
        )

    grid = jnp.meshgrid(jnp.arange(batch), jnp.arange(num_kv_heads), jnp.arange(num_layers), indexing="ij")
    above = jax.lax.map(with_those_above, tuple(x.reshape(-1) for x in grid))
    above = above.reshape(batch, num_kv_heads, num_layers, num_layers).sum(0)
    count = (query_positions >= 0).sum()
    return above + jnp.swapaxes(above, 1, 2) + count * jnp.eye(num_layers), count


def _last_queries_and_keys(model, params, tokens, positions, last_queries, chunk_size) -> tuple[Array, Array]:
    """Last queries [L, B, K, G, q, D] and keys [L, B, K, T, D] of all layers."""
    config, (batch, length) = model.config, tokens.shape
    dtype, num_kv_heads = params["embedding"].dtype, config.num_key_value_heads
    group, shown = config.num_attention_heads // num_kv_heads, min(last_queries, length)
    shape = config.num_hidden_layers, batch, num_kv_heads
    empty = (
        jnp.zeros((*shape, group, shown, config.head_dim), dtype),
        jnp.zeros((*shape, length, config.head_dim), dtype),
    )

    def observe(view: LayerView, memory: PairMemory, state: tuple[Array, Array]) -> tuple[Array, ...]:
        parts = view.last(shown).queries.vectors, memory.pairs.keys
        return tuple(whole.at[view.index].set(part) for whole, part in zip(state, parts, strict=True))

    hooks = Hooks(observe=observe, num_queries=shown)
    chunk_size = None if chunk_size is None else largest_divisor(length, chunk_size)
    return read(model, params, tokens, None, hooks, empty, positions=positions, chunk_size=chunk_size)[1]


def _group_attention(queries: Queries, pairs: Pairs, sink: Array, recent: Array) -> Array:
    """The mean attention of the query heads of one row and KV head: float32 [q, 1 + T]; one head's at a time.

    First what each query gives to proximal tokens together, then to every other token, zero where proximal.
    """

    def add(total: Array, head: Array) -> tuple[Array, None]:
        one = queries.replace(vectors=head[None, None, None])
        return total + probabilities(one, pairs)[0, 0, 0], None

    heads = queries.vectors[0, 0]
    empty = jnp.zeros((heads.shape[1], pairs.keys.shape[2]), jnp.float32)
    attention = jax.lax.scan(add, empty, heads)[0] / len(heads)
    is_near = proximal(queries, pairs.positions, sink, recent)[0, 0]
    together = jnp.where(is_near, attention, 0.0).sum(-1, keepdims=True)
    return jnp.concatenate([together, jnp.where(is_near, 0.0, attention)], axis=-1)


def jensen_shannon(first: Array, second: Array) -> Array:
    """The Jensen-Shannon divergence in bits, `(KL(p || m) + KL(q || m)) / 2` with `m = (p + q) / 2`, of [..., T]."""
    middle = (first + second) / 2

    def divergence(p):
        seen = p > 0
        return (p * jnp.log2(jnp.where(seen, p, 1) / jnp.where(seen, middle, 1))).sum(-1)

    return jnp.clip((divergence(first) + divergence(second)) / 2, 0, 1)


def group_layers(similarity: Any, threshold: float = 0.5) -> LayerGroups:
    """Joins layers into blocks, going up from the lowest: per KV head, greedily (PoD, arXiv 2412.02252).

    A layer joins the running block while its similarity to the block's lowest layer is at least `threshold`, else it
    opens the next block.

    Args:
      similarity: [K, L, L], as `attention_similarity` gives it.
      threshold: the least similarity to the leader; more than 1 shares nothing.

    Raises:
      ValueError: another shape, or values that are not similarities.
    """
    similarity = np.asarray(similarity)
    if similarity.ndim != 3 or similarity.shape[1] != similarity.shape[2] or 0 in similarity.shape:
        raise ValueError(f"similarity has shape {similarity.shape}, but must be [KV heads, layers, layers]")
    if not ((similarity >= -1e-6) & (similarity <= 1 + 1e-6)).all():
        raise ValueError("similarity must be between 0 and 1 everywhere; is there a NaN in it?")
    if not threshold >= 0:
        raise ValueError(f"threshold={threshold} must not be negative")
    heads, leader = np.arange(len(similarity)), [np.zeros(len(similarity), int)]
    for layer in range(1, similarity.shape[1]):
        alike = similarity[heads, leader[-1], layer] >= threshold
        leader.append(np.where(alike, leader[-1], layer))
    return LayerGroups(np.stack(leader))
