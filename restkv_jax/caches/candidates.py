"""Selection across layers: the best pairs of each layer wait until all are scored, then the budget is shared out."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.caches.base import Cache, Keeper
from restkv_jax.caches.dense import put_layer
from restkv_jax.caches.paged import PagedCache, fill_pages, pool_shape
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.eviction.refit import Asked, Wanted
from restkv_jax.eviction.select import (
    judge,
    keep_shares,
    places_to_keep,
    prefix_lengths,
    prefix_scores,
    weighed_scores,
)
from restkv_jax.kernels.gather import gather_pairs
from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.kernels.partition import divide, each_part, on_mesh, parts_of_mesh, undivide
from restkv_jax.kernels.scores import Peaks
from restkv_jax.models.config import UNLIMITED
from restkv_jax.models.decoder import Decoder, LayerView
from restkv_jax.models.memory import PairMemory


class Candidates(flax.struct.PyTreeNode):
    """The best pairs of every layer, row and KV head, `N` places each.

    Attributes:
      keys: [L, B, K, N, D], after RoPE.
      values: [L, B, K, N, D].
      positions: int32 [L, B, K, N], ascending, then -1 where empty.
      scores: float32 [L, B, K, N]; inf in the window, -inf where empty.
      prefix_lengths: int32 [L, B, K], pairs before the window that there were to choose from.
      prompt_lengths: int32 [B].
      queries: [L, B, K, G, r, D], those that a refit looks at, else None.
      query_positions: int32 [B, r], -1 where there is none, else None.
      wanted: what these queries got from all pairs, by layer, else None.
    """

    keys: Array
    values: Array
    positions: Array
    scores: Array
    prefix_lengths: Array
    prompt_lengths: Array
    queries: Array | None = None
    query_positions: Array | None = None
    wanted: Wanted | None = None


class PagedKeeper(Keeper):
    """Shares that differ among layers and KV heads: the budget is given out once all layers are in."""

    @staticmethod
    def takes(model: Decoder, policy: EvictionPolicy, length: int) -> bool:
        return policy.is_ragged(length)

    @property
    def window(self) -> int:
        return self.policy.window_of(self.length)

    def start(self, past: Cache | None, lengths: Array, dtype: Any) -> Candidates:
        config, batch = self.model.config, lengths.shape[0]
        per_sequence = config.num_hidden_layers, config.num_key_value_heads
        places = self.policy.num_candidates(self.total, *per_sequence) + self.window
        heads = config.num_hidden_layers, batch, config.num_key_value_heads
        refit, group = self.policy.refit, config.num_attention_heads // config.num_key_value_heads

        def full(value: float, *shape: int, dtype: Any, axes: str = "l b k") -> Array:
            return on_mesh(jnp.full((*heads, *shape), value, dtype), axes)

        candidates = Candidates(
            keys=full(0, places, config.head_dim, dtype=dtype),
            values=full(0, places, config.head_dim, dtype=dtype),
            positions=full(-1, places, dtype=jnp.int32),
            scores=full(-jnp.inf, places, dtype=jnp.float32),
            prefix_lengths=full(0, dtype=jnp.int32),
            prompt_lengths=lengths,
        )
        if refit is None:
            return candidates
        shown = group, self.window + refit.num_future
        asked = functools.partial(full, 0, *shown, axes="l b k g")
        return candidates.replace(
            queries=asked(config.head_dim, dtype=dtype),
            query_positions=jnp.full((batch, shown[1]), -1, jnp.int32),
            wanted=Wanted(asked(config.head_dim, dtype=jnp.float32), Peaks(*[asked(dtype=jnp.float32)] * 2)),
        )

    def add(self, candidates: Candidates, view: LayerView, memory: PairMemory, known: dict) -> Candidates:
        policy, pairs, view = self.policy, memory.pairs, view.last(self.num_queries)
        judged = judge(policy, view, pairs, known)
        scores = prefix_scores(policy, view, pairs, judged.scores)
        indices = places_to_keep(scores, pairs.positions, self.window, candidates.keys.shape[3])
        best = gather_pairs(pairs, indices)
        entries = {"keys": best.keys, "values": best.values, "positions": best.positions}
        entries["scores"] = weighed_scores(policy, scores, pairs.positions, indices)
        entries["prefix_lengths"] = jnp.broadcast_to(prefix_lengths(scores), scores.shape[:2])
        if judged.asked is not None:
            queries, wanted = judged.asked
            entries |= {"queries": queries.vectors, "wanted": wanted}
            candidates = candidates.replace(query_positions=queries.positions)
        put = functools.partial(jax.tree.map, lambda array, part: put_layer(array, view.index, part))
        return candidates.replace(**{name: put(getattr(candidates, name), part) for name, part in entries.items()})

    def finish(self, candidates: Candidates) -> PagedCache:
        """Shares the budget among layers and KV heads and packs what they keep into pages."""
        filled = self.fill(*self.choose(candidates), self.policy.page_size)
        return PagedCache(**filled, **self.of_sequences(candidates))

    def choose(self, candidates: Candidates) -> tuple[Candidates, Array]:
        """The candidates, refitted where the policy asks for it, and which of them to keep, bool [L, B, K, N]."""
        layers = candidates.keys.shape[0]
        keep = keep_shares(self.policy, candidates.scores, candidates.prefix_lengths, jnp.arange(layers), layers)
        if self.policy.refit is None:
            return candidates, keep
        refitted = self._refitted(candidates, keep)
        return candidates.replace(keys=refitted.keys, values=refitted.values), keep

    def of_sequences(self, candidates: Candidates) -> dict[str, Any]:
        """The fields of a cache in pages besides those of its pairs."""
        return {
            "prompt_lengths": candidates.prompt_lengths,
            "next_positions": candidates.prompt_lengths,
            "is_windowed": min(self.model.config.sliding_windows) < UNLIMITED,
        }

    def fill(self, candidates: Candidates, keep: Array, page_size: int) -> dict[str, Array]:
        """The fields of a `PagedCache` of the pairs to keep, bool [L, B, K, N]."""
        c, policy = candidates, self.policy
        layers, batch, num_kv_heads, places, _ = c.keys.shape
        parts = parts_of_mesh(batch, num_kv_heads)
        # A part holds all pairs that its KV heads may win, at most those of its rows.
        rows, heads = batch // parts.rows, layers * (batch // parts.rows) * (num_kv_heads // parts.heads)
        most = policy.allocation.most(policy.slots_given, self.window, layers, num_kv_heads)
        total = rows * (most + layers * num_kv_heads * self.window)
        shape = pool_shape(min(total, heads * places), places, heads, self.max_new_tokens, page_size)
        fill = functools.partial(fill_pages, shape, max_new_tokens=self.max_new_tokens)
        filled = each_part(fill, *(divide(x, parts, "l") for x in (c.keys, c.values, c.positions, keep)))
        by_head = {name: undivide(filled.pop(name), "l") for name in ("page_table", "lengths")}
        return filled | by_head

    def _refitted(self, candidates: Candidates, keep: Array) -> Pairs:
        """The pairs of all layers, corrected for the loss of those that are not kept."""
        refit, shown_at = self.policy.correction, candidates.query_positions
        assert refit is not None and shown_at is not None
        query_positions: Array = shown_at

        def one_layer(layer: tuple) -> Pairs:
            vectors, wanted, keys, values, positions, sliding_window = layer
            queries = Queries(vectors, query_positions, sliding_window, self.model.config.attn_logit_softcapping)
            return refit.head_by_head(Asked(queries, wanted), Pairs(keys, values, positions))

        c, windows = candidates, jnp.asarray(self.model.config.sliding_windows, jnp.int32)
        positions = jnp.where(keep, c.positions, -1)
        return jax.lax.map(one_layer, (c.queries, c.wanted, c.keys, c.values, positions, windows))
