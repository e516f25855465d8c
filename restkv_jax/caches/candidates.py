"""Selection across layers: the best pairs of each layer wait until all are scored, then the budget is shared out."""

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.caches.paged import PagedCache, fill_pages, pool_shape
from restkv_jax.eviction.layer import keep_shares, score_prefix, select, take, weighed_scores
from restkv_jax.eviction.observation import Observation
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.eviction.refit import window_outputs
from restkv_jax.models.config import UNLIMITED, ModelConfig


@flax.struct.dataclass
class Candidates:
    """The best pairs of every layer, row and KV head, `N` places each.

    Attributes:
      keys: [L, B, K, N, D], after RoPE.
      values: [L, B, K, N, D].
      positions: int32 [L, B, K, N], ascending, then -1 where empty.
      scores: float32 [L, B, K, N]; inf in the window, -inf where empty.
      prompt_lengths: int32 [B].
      queries: [L, B, H, w, D], the window's, where the values are refitted, else None.
      outputs: float32 [L, B, H, w, D], what these queries got from the whole prompt, else None.
    """

    keys: Array
    values: Array
    positions: Array
    scores: Array
    prompt_lengths: Array
    queries: Array | None = None
    outputs: Array | None = None


def empty_candidates(
    config: ModelConfig, policy: EvictionPolicy, prompt_lengths: Array, length: int, dtype
) -> Candidates:
    """No candidates yet, with room for those of prompts of `length` tokens; `prompt_lengths` int32 [B]."""
    layers, dim, window = config.num_hidden_layers, config.head_dim, policy.window_of(length)
    places = policy.num_candidates(length) + window
    shape = layers, prompt_lengths.shape[0], config.num_key_value_heads, places
    shown = layers, prompt_lengths.shape[0], config.num_attention_heads, window, dim
    return Candidates(
        keys=jnp.zeros((*shape, dim), dtype),
        values=jnp.zeros((*shape, dim), dtype),
        positions=jnp.full(shape, -1, jnp.int32),
        scores=jnp.full(shape, -jnp.inf, jnp.float32),
        prompt_lengths=prompt_lengths,
        queries=jnp.zeros(shown, dtype) if policy.refit else None,
        outputs=jnp.zeros(shown, jnp.float32) if policy.refit else None,
    )


def offer_layer(
    candidates: Candidates, policy: EvictionPolicy, observation: Observation, judged: Array | None = None
) -> Candidates:
    """Enters the best pairs of one layer, `observation.layer`; `judged` as for `evict`."""
    window = policy.window_of(observation.keys.shape[2])
    scores = score_prefix(policy, observation, window, judged)
    indices = select(scores, observation.positions, window, candidates.keys.shape[3])
    best = take(observation, scores, indices)
    entries = {"keys": best.keys, "values": best.values, "positions": best.positions}
    entries["scores"] = weighed_scores(policy, scores, observation.positions, indices)
    if policy.refit is not None:
        shown = observation._replace(queries=observation.queries[:, :, -window:])
        entries |= {"queries": shown.queries, "outputs": window_outputs(*shown.attention_arguments)}

    def put(array, part):
        return jax.lax.dynamic_update_slice(
            array, part[None].astype(array.dtype), (observation.layer, *[0] * part.ndim)
        )

    return candidates.replace(**{name: put(getattr(candidates, name), part) for name, part in entries.items()})


def share_budget(
    candidates: Candidates, policy: EvictionPolicy, config: ModelConfig, length: int, max_new_tokens: int
) -> PagedCache:
    """Shares the budget among layers and KV heads and packs what they keep into pages.

    Args:
      candidates: of all layers.
      policy: its allocation says how many each keeps, its refit corrects the values.
      config: of the model.
      length: tokens of the padded prompts.
      max_new_tokens: slots to reserve for tokens to come.
    """
    layers, batch, num_kv_heads, places, _ = candidates.keys.shape
    window = policy.window_of(length)
    prefix_lengths = jnp.maximum(candidates.prompt_lengths - window, 0)
    keep = keep_shares(policy, candidates.scores, prefix_lengths, jnp.arange(layers), layers)
    most = policy.allocation.most(policy.budget, window, layers, num_kv_heads) + layers * num_kv_heads * window
    heads = layers * batch * num_kv_heads
    shape = pool_shape(min(batch * most, heads * places), places, heads, max_new_tokens, policy.page_size)
    values = candidates.values if policy.refit is None else _refitted(candidates, policy, config, keep, window)
    pages = fill_pages(shape, candidates.keys, values, candidates.positions, keep, max_new_tokens)
    return PagedCache(
        **pages,
        prompt_lengths=candidates.prompt_lengths,
        next_positions=candidates.prompt_lengths,
        windowed=min(config.sliding_windows) < UNLIMITED,
    )


def _refitted(candidates: Candidates, policy: EvictionPolicy, config: ModelConfig, keep: Array, window: int) -> Array:
    """The values of all layers, corrected for the loss of those that are not kept."""
    query_positions = candidates.prompt_lengths[:, None] + jnp.arange(-window, 0)
    query_positions = jnp.where(query_positions >= 0, query_positions, -1)

    def one_layer(layer):
        queries, outputs, keys, values, positions, sliding_window = layer
        return policy.refit(queries, outputs, keys, values, query_positions, positions, sliding_window)

    c = candidates
    positions = jnp.where(keep, c.positions, -1)
    windows = jnp.asarray(config.sliding_windows, jnp.int32)
    return jax.lax.map(one_layer, (c.queries, c.outputs, c.keys, c.values, positions, windows))
