"""What the attention of a few queries says of every key: the hot path of eviction.

All functions take `queries` [B, H, w, D] with `query_positions` int32 [B, w], `keys` and `values` [B, K, T, D] with
`key_positions` int32 [B, K, T] (-1 where empty), and a `sliding_window` in tokens (int32 scalar).
Probabilities and scores are float32.
"""

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.kernels.heads import over_query_heads

HIGHEST = jax.lax.Precision.HIGHEST


def output_gram(output_projection: Array) -> Array:
    """Gram matrices `W_h W_h^T` of the output projection: [H, D, M] to float32 [H, D, D].

    `||x W_h||^2 = x^T (W_h W_h^T) x`, so norms after the projection cost `D` instead of `M` per dimension.
    """
    wide = output_projection.astype(jnp.float32)
    return jnp.einsum("hdm,hem->hde", wide, wide, precision=HIGHEST)


def probabilities(
    queries: Array, keys: Array, query_positions: Array, key_positions: Array, sliding_window: Array
) -> tuple[Array, Array]:
    """Attention of one head, [w, D] on [T, D]: float32 [w, T], and which keys each query sees, bool [w, T]."""
    past = query_positions[:, None] - key_positions[None, :]
    visible = (past >= 0) & (past < sliding_window) & (key_positions >= 0)[None, :]
    logits = jnp.einsum("wd,td->wt", queries, keys, preferred_element_type=jnp.float32, precision=HIGHEST)
    logits = jnp.where(visible, logits * queries.shape[-1] ** -0.5, -1e30)
    return jnp.where(visible, jax.nn.softmax(logits, axis=-1), 0.0), visible


def attention_and_rest(queries, keys, query_positions, key_positions, sliding_window) -> tuple[Array, Array]:
    """`probabilities` [w, T], and those of the other keys once each query's most attended one is deleted, [w, T].

    The second softmax is taken over logits: from the first one, small probabilities would have underflowed.
    """
    attention, visible = probabilities(queries, keys, query_positions, key_positions, sliding_window)
    others = visible & (jnp.arange(keys.shape[0]) != attention.argmax(-1, keepdims=True))
    logits = jnp.einsum("wd,td->wt", queries, keys, preferred_element_type=jnp.float32, precision=HIGHEST)
    logits = jnp.where(others, logits * queries.shape[-1] ** -0.5, -1e30)
    return attention, jnp.where(others, jax.nn.softmax(logits, axis=-1), 0.0)


def removal_error(attention: Array, output_rest: Array, values: Array, gram: Array) -> Array:
    """How far a head's projected output moves when one key is deleted and the softmax renormalised, for every key.

    `A / (1 - A) * ||(o - v) W||_2` with `o = sum_n A[n] v[n]`, exact for a single head (ReST-KV, arXiv 2605.08840,
    layer-wise output reconstruction). Both factors cancel for a key that holds nearly all attention; there can be
    one such key, the most attended, and its error is taken in the equal form `A * ||(o_rest - v) W||_2` with
    `o_rest` the output once it is deleted.

    Args:
      attention: float32 [T].
      output_rest: float32 [D], the output once the most attended key is deleted.
      values: [T, D].
      gram: float32 [D, D], `W W^T`.

    Returns:
      float32 [T].
    """
    values = values.astype(jnp.float32)
    is_top = jnp.arange(len(attention)) == attention.argmax()
    output = jnp.einsum("t,td->d", attention, values, precision=HIGHEST)
    moved = jnp.where(is_top[:, None], output_rest, output) - values
    squared = jnp.einsum("td,de,te->t", moved, gram, moved, precision=HIGHEST)
    factor = attention / jnp.where(is_top, 1.0, 1 - attention)
    return factor * jnp.sqrt(jnp.maximum(squared, 0.0))


def rest_of_attention(attention: Array, top: Array) -> Array:
    """`1 - A` of key `top` for every query, summed over the other keys: [w, T] to [w]."""
    return jnp.where(jnp.arange(attention.shape[-1]) == top, 0.0, attention).sum(-1)


def column_sums(queries, keys, query_positions, key_positions, sliding_window, weights) -> Array:
    """`sum_t weights[t] A[t, n]`: attention received by every key, `weights` float32 [w]; float32 [B, H, T]."""

    def one_head(queries, keys, _, query_positions, key_positions):
        attention, _ = probabilities(queries, keys, query_positions, key_positions, sliding_window)
        return jnp.einsum("w,wt->t", weights, attention, precision=HIGHEST)

    return over_query_heads(one_head, queries, keys, keys, _per_head(query_positions, queries), key_positions)


def column_row_norms(queries, keys, values, query_positions, key_positions, sliding_window, gram) -> Array:
    """`||A[:, n]||_2 ||v[n] W_h||_2` over the queries, `gram` float32 [H, D, D] (LaProx); float32 [B, H, T]."""

    def one_head(queries, keys, values, query_positions, key_positions, gram):
        attention, _ = probabilities(queries, keys, query_positions, key_positions, sliding_window)
        values = values.astype(jnp.float32)
        squared = jnp.einsum("td,de,te->t", values, gram, values, precision=HIGHEST)
        return jnp.linalg.norm(attention, axis=0) * jnp.sqrt(jnp.maximum(squared, 0.0))

    return _over_heads_with_gram(one_head, queries, keys, values, query_positions, key_positions, gram)


def removal_errors(queries, keys, values, query_positions, key_positions, sliding_window, gram) -> Array:
    """`removal_error` of every query and key, `gram` float32 [H, D, D]; float32 [B, H, w, T], zero where unseen."""

    def one_head(queries, keys, values, query_positions, key_positions, gram):
        rows = attention_and_rest(queries, keys, query_positions, key_positions, sliding_window)
        return jax.lax.map(lambda row: _row_error(*row, values, gram), rows)

    return _over_heads_with_gram(one_head, queries, keys, values, query_positions, key_positions, gram)


def averaged_removal_error(queries, keys, values, query_positions, key_positions, sliding_window, gram, weights):
    """`sum_t weights[t] I[t, n]` with `I` the `removal_error` of query `t` and key `n` (ReST-KV's formula).

    `gram` float32 [H, D, D], `weights` float32 [w]; float32 [B, H, T].
    """

    def one_head(queries, keys, values, query_positions, key_positions, gram):
        rows = attention_and_rest(queries, keys, query_positions, key_positions, sliding_window)

        def add_row(total, row):
            attention, rest, weight = row
            return total + weight * _row_error(attention, rest, values, gram), None

        return jax.lax.scan(add_row, jnp.zeros(keys.shape[0], jnp.float32), (*rows, weights))[0]

    return _over_heads_with_gram(one_head, queries, keys, values, query_positions, key_positions, gram)


def averaged_attention_removal_error(
    queries, keys, values, query_positions, key_positions, sliding_window, gram, weights
):
    """`removal_error` of the attention averaged over the queries, on the keys before the window.

    `A'[n] = sum_t weights[t] A[t, n]` on the `T - w` keys before the queries' own, `o' = sum_n A'[n] v[n]` over
    the same keys (the ReST-KV authors' `metric_mode="after"`). `gram` float32 [H, D, D], `weights` float32 [w];
    float32 [B, H, T - w].
    """
    prefix = keys.shape[2] - queries.shape[2]

    def one_head(queries, keys, values, query_positions, key_positions, gram):
        attention, _ = probabilities(queries, keys, query_positions, key_positions, sliding_window)
        averaged = jnp.einsum("w,wt->t", weights, attention[:, :prefix], precision=HIGHEST)
        top = averaged.argmax()
        rest = jnp.dot(weights, rest_of_attention(attention, top), precision=HIGHEST)
        others = jnp.where(jnp.arange(prefix) == top, 0.0, averaged) / jnp.maximum(rest, jnp.finfo(jnp.float32).tiny)
        output_rest = jnp.einsum("t,td->d", others, values[:prefix].astype(jnp.float32), precision=HIGHEST)
        return removal_error(averaged, output_rest, values[:prefix], gram)

    return _over_heads_with_gram(one_head, queries, keys, values, query_positions, key_positions, gram)


def attention_centres(queries, keys, query_positions, key_positions, sliding_window, *, count: int) -> Array:
    """Mean position of each query's `count` most attended keys; float32 [B, H, w]."""

    def one_head(queries, keys, _, query_positions, key_positions):
        attention, visible = probabilities(queries, keys, query_positions, key_positions, sliding_window)
        top = visible & top_mask(jnp.where(visible, attention, -1.0), count)
        # Summed as integers in two parts, exact at any length and so the same with any padding.
        high, low = (jnp.where(top, part, 0).sum(-1) for part in (key_positions >> 10, key_positions & 1023))
        return (high * 1024.0 + low) / jnp.maximum(top.sum(-1), 1)

    return over_query_heads(one_head, queries, keys, keys, _per_head(query_positions, queries), key_positions)


def top_mask(values: Array, count: int) -> Array:
    """Marks the `count` largest entries of each row, of equals the first ones, as `jax.lax.top_k` chooses them.

    The threshold is found bit by bit, in 30 passes that count; a sort of the row would cost several times more.

    Args:
      values: float32 [..., T], at most 1; negative ones are taken as equals.
      count: entries to mark.

    Returns:
      bool [..., T].
    """
    ordered = jnp.where(values >= 0, jax.lax.bitcast_convert_type(values, jnp.int32) + 1, 0)

    def raise_threshold(bit, threshold):
        candidate = threshold | (1 << (29 - bit))
        return jnp.where((ordered >= candidate).sum(-1, keepdims=True) >= count, candidate, threshold)

    threshold = jax.lax.fori_loop(0, 30, raise_threshold, jnp.zeros((*values.shape[:-1], 1), jnp.int32))
    above, equal = ordered > threshold, ordered == threshold
    return above | (equal & (jnp.cumsum(equal, axis=-1) <= count - above.sum(-1, keepdims=True)))


def _row_error(attention: Array, rest: Array, values: Array, gram: Array) -> Array:
    """`removal_error` of one query, [T], from its attention and that of the other keys without the top one."""
    output_rest = jnp.einsum("t,td->d", rest, values.astype(jnp.float32), precision=HIGHEST)
    return removal_error(attention, output_rest, values, gram)


def _over_heads_with_gram(one_head, queries, keys, values, query_positions, key_positions, gram) -> Array:
    grams = jnp.broadcast_to(gram, (queries.shape[0], *gram.shape))
    return over_query_heads(one_head, queries, keys, values, _per_head(query_positions, queries), key_positions, grams)


def _per_head(positions: Array, queries: Array) -> Array:
    """[B, w] to [B, H, w]."""
    return jnp.broadcast_to(positions[:, None], queries.shape[:3])
