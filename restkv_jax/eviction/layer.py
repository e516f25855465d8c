"""Eviction of one layer's pairs: score, smooth, select, gather, refit."""

import functools
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.eviction.select import (
    Judged,
    judge,
    keep_shares,
    places_to_keep,
    prefix_lengths,
    prefix_scores,
    weighed_scores,
)
from restkv_jax.kernels.gather import gather_pairs
from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.models.arguments import check_mask
from restkv_jax.models.config import UNLIMITED
from restkv_jax.models.decoder import LayerView, positions_of
from restkv_jax.models.rope import Rope
from restkv_jax.models.rules import with_usual_promotion


class Eviction(NamedTuple):
    """One layer after eviction.

    `scores` float32 [B, K, T - w], -inf on padding; `positions` int32 [B, K, C], prompt positions ascending, -1 where
    empty; `lengths` int32 [B, K]; `keys`, `values` [B, K, C, D].
    """

    scores: Array
    positions: Array
    lengths: Array
    keys: Array
    values: Array


@with_usual_promotion
def evict_layer(
    policy: EvictionPolicy,
    queries: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    output_projection: ArrayLike,
    mask: ArrayLike | None = None,
    layer: int = 0,
    num_layers: int = 1,
    rope: Rope | None = None,
) -> Eviction:
    """Applies a policy to one layer of a prompt.

    Args:
      policy: what to keep; a percentage is of `T`.
      queries: [B, H, w, D], after RoPE, those of the last `w` tokens: at least the policy's window (of more, the
        last count), the whole prompt's for scorers that score by all queries.
      keys: [B, K, T, D], after RoPE.
      values: [B, K, T, D].
      output_projection: [H, D, M], the block of the output projection that each head's output multiplies.
      mask: bool [B, T], False on left padding.
      layer: which layer it is; for budgets that differ by layer.
      num_layers: of the model; for budgets that differ by layer.
      rope: the rotation that turned queries and keys, for scorers that look at what they were before it; with None they
        are taken as they are, like those of a layer without RoPE.

    Returns:
      an `Eviction` with `C = budget` slots (`T` without a budget, and where KV heads share one: see `lengths`); scores
      are always computed, also where the budget holds the whole prompt. A budget for the whole model is shared among
      the heads of this layer.

    Raises:
      ValueError: shapes that do not agree, fewer queries than the policy's window, a mask of another shape or with
        padding on the right.
    """
    given = dict(queries=queries, keys=keys, values=values, output_projection=output_projection)
    arrays = {name: _as_array(name, x) for name, x in given.items()}
    pairs = Pairs(arrays["keys"], arrays["values"], jnp.zeros(0, jnp.int32))
    batch, num_kv_heads, length, dim = pairs.keys.shape
    _check_shapes(**arrays)
    policy = policy.resolved(length)
    is_token = jnp.ones((batch, length), bool) if mask is None else jnp.asarray(mask, bool)
    check_mask(is_token, (batch, length))
    positions = positions_of(is_token)
    scoring = _scoring_queries(policy, arrays["queries"], length)
    vectors = einops.rearrange(scoring * dim**-0.5, "b (k g) w d -> b k g w d", k=num_kv_heads)
    projection = einops.rearrange(arrays["output_projection"], "(k g) d m -> k g d m", k=num_kv_heads)
    shown = Queries(vectors, positions[:, length - vectors.shape[3] :], UNLIMITED)
    slots = length if policy.budget is None or not policy.allocation.uniform else policy.slots_given
    view, pairs = LayerView(layer, shown, projection, rope=rope), pairs._replace(positions=positions[:, None])
    return evict(policy, view, pairs, slots, num_layers, judge(policy, view, pairs, {}))


def _as_array(name: str, given: ArrayLike) -> Array:
    array = jnp.asarray(given)
    rank = 3 if name == "output_projection" else 4
    if array.ndim != rank:
        raise ValueError(f"{name} has shape {array.shape}, but must have {rank} axes")
    return array


def _check_shapes(queries: Array, keys: Array, values: Array, output_projection: Array) -> None:
    batch, num_kv_heads, _, dim = keys.shape
    num_heads, width = queries.shape[1], output_projection.shape[2]
    for name, array, shape in (
        ("queries", queries, (batch, num_heads, queries.shape[2], dim)),
        ("values", values, keys.shape),
        ("output_projection", output_projection, (num_heads, dim, width)),
    ):
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, but must have {shape} to agree with the others")
    if num_heads % num_kv_heads:
        raise ValueError(f"queries have {num_heads} heads, which is not a multiple of the {num_kv_heads} of keys")


def _scoring_queries(policy: EvictionPolicy, queries: Array, length: int) -> Array:
    needed = policy.num_queries(length)
    if queries.shape[2] < needed:
        reason = f"window={policy.window}"
        if needed > policy.num_scoring_queries(length):
            reason = f"{policy.asking_again()}, which asks earlier queries again,"
        elif needed > policy.window:
            reason = "scorer, which looks at all queries,"
        raise ValueError(
            f"queries has shape {queries.shape}: {queries.shape[2]} queries, but policy.{reason} needs {needed} of a "
            f"prompt of {length} tokens"
        )
    return queries[:, :, -needed:]


@functools.partial(jax.jit, static_argnames=("policy", "slots", "num_layers"))
def evict(
    policy: EvictionPolicy, view: LayerView, pairs: Pairs, slots: int, num_layers: int, judged: Judged
) -> Eviction:
    """Selects, gathers and refits one layer's pairs in `slots` places per KV head; `judged` as `judge` gives it."""
    length = pairs.keys.shape[2]
    window = policy.window_of(length)
    scores = prefix_scores(policy, view, pairs, judged.scores)
    indices = places_to_keep(scores, pairs.positions, window, slots)
    if not policy.allocation.uniform:
        compared = weighed_scores(policy, scores, pairs.positions, indices)[None]
        keep = keep_shares(policy, compared, prefix_lengths(scores)[None], jnp.asarray(view.index)[None], num_layers)[0]
        indices = jnp.sort(jnp.where(keep, indices, length), axis=-1)
    kept = gather_pairs(pairs, indices)
    if (refit := policy.correction) is not None:
        assert judged.asked is not None
        correct = refit if policy.allocation.uniform else refit.head_by_head
        kept = correct(judged.asked, kept)
    lengths = (kept.positions >= 0).sum(-1, dtype=jnp.int32)
    return Eviction(scores, kept.positions, lengths, kept.keys, kept.values)
