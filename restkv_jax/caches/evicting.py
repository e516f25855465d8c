"""The cache that evicts while generating: one importance per slot, updated by every new query."""

import dataclasses
from typing import Any, NamedTuple, Self

import einops
import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.caches.base import WHOLE, Cache
from restkv_jax.caches.dense import DenseKeeper, KVCache, empty_cache, put_layer, put_pairs
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.kernels.attention import attend
from restkv_jax.kernels.pairs import Pairs, Queries, ascending, concatenate, take_places, visible
from restkv_jax.kernels.partition import on_mesh
from restkv_jax.kernels.scores import removal_errors
from restkv_jax.models.config import ModelConfig
from restkv_jax.models.decoder import Decoder, LayerView
from restkv_jax.models.memory import PairMemory

UNSEEN = -1.0
"""Importance of a slot that no query has seen; errors are not negative."""


class ByImportance(Cache):
    """What caches of a fixed number of slots, for any number of new tokens, have in common, as `EvictingCache`."""

    positions: Array
    lengths: Array
    importance: Array
    gram: Array
    policy: EvictionPolicy = flax.struct.field(pytree_node=False)

    def least_important(self, layer: Array) -> Array:
        """The slot of least importance that is neither in the window nor a sink, int32 [B, K].

        The policy's, as far as the slots go: the window, the next pair included, comes before the sinks.
        """
        positions = self.positions[layer]
        window = min(self.policy.window, positions.shape[-1])
        is_recent = positions > self.next_positions[:, None, None] - window
        is_sink = (positions >= 0) & (positions < min(self.policy.sinks, positions.shape[-1] - window))
        return jnp.argmin(jnp.where(is_recent | is_sink, jnp.inf, self.importance[layer]), axis=-1)

    def observe(self, view: LayerView, memory: Any) -> Self:
        layer = jnp.asarray(view.index)
        before, pairs = self.importance[layer], self.held(layer)
        importance = update_importance(before, view.queries, pairs, self.gram[view.index], self.policy)
        return self.replace(importance=put_layer(self.importance, view.index, importance))

    def room(self) -> Array:
        return jnp.asarray(jnp.iinfo(jnp.int32).max)

    @property
    def extending_policy(self) -> EvictionPolicy:
        return self.policy

    def memory_beside(self, layer: Array, new: Pairs, carry: None) -> tuple["SeenMemory", None]:
        together = concatenate(self.held(layer), new)
        places = ascending(together.positions)
        unseen = jnp.full(new.keys.shape[:3], UNSEEN, jnp.float32)
        importance = jnp.concatenate([self.importance[layer], unseen], axis=-1)
        pairs = Pairs(*(take_places(x, places) for x in together))
        return SeenMemory(pairs, take_places(importance, places)), carry

    def check_policy(self, policy: EvictionPolicy) -> None:
        if isinstance(policy.budget, str):  # of which percentage it is made is not known here
            policy = policy.replace(budget=self.policy.budget)
        if policy != self.policy:
            raise ValueError("policy is not the one that the cache was made with; pass the prefill's, or none")

    def row_axes(self) -> Any:
        axes = jax.tree.map(lambda x: 0 if x.ndim == 1 else 1, self)
        return axes.replace(gram=WHOLE)


class EvictingCache(ByImportance, KVCache):
    """A `KVCache` of a fixed number of slots, for any number of new tokens.

    Attributes:
      importance: float32 [L, B, K, N], moving average of each slot's removal error; `UNSEEN` until it is first seen.
      gram: float32 [L, K, G, D, D], the quadratic forms of the errors, of the output projection.
      policy: static; its scorer measures the errors, its window is never overwritten.
    """

    def append(self, layer: Array, new: Pairs) -> Self:
        """Puts one new pair per row and KV head into a layer, `T = 1`."""
        slots = jnp.where(new.positions >= 0, self.next_slots(layer)[..., None], self.num_slots)
        importance = put_pairs(self.importance, layer, slots, jnp.full(slots.shape, UNSEEN))
        return super().append(layer, new).replace(importance=importance)

    def next_slots(self, layer: Array) -> Array:
        """The first free slot, else that of least importance."""
        used = self.lengths[layer]
        return jnp.where(used < self.num_slots, used, self.least_important(layer))


class SeenMemory(NamedTuple):
    """Pairs [B, K, N, D] with the importance that they have so far, float32 [B, K, N]."""

    pairs: Pairs
    importance: Array

    def attend(self, queries: Queries) -> tuple[Array, None]:
        return attend(queries, self.pairs), None

    def importance_at(self, positions: Array) -> Array:
        """Of the pairs at positions int32 [B, K, C], float32 [B, K, C]."""
        places = jnp.vectorize(jnp.searchsorted, signature="(n),(c)->(c)")(self.pairs.positions, positions)
        return jnp.where(positions >= 0, take_places(self.importance, places), UNSEEN)


def update_importance(importance: Array, queries: Queries, pairs: Pairs, gram: Array, policy: EvictionPolicy) -> Array:
    """`e <- alpha x + (1 - alpha) e` over the queries, oldest first; the first sight of a slot sets `e = x`.

    Args:
      importance: float32 [B, K, N], before.
      queries: [B, K, G, w, D].
      pairs: [B, K, N, D], those in the slots.
      gram: float32 [K, G, D, D].
      policy: its scorer says `alpha`, its `group_reduce` how query heads agree.
    """
    errors = removal_errors(queries, pairs, gram, tau=policy.query_scorer.tau)
    errors = einops.reduce(errors, "b k g w n -> w b k n", policy.group_reduce)
    seen = jnp.moveaxis(visible(queries.replace(sliding_window=jnp.iinfo(jnp.int32).max), pairs.positions), 2, 0)
    alpha = policy.query_scorer.alpha

    def step(importance, query):
        errors, is_seen = query
        smoothed = jnp.where(importance < 0, errors, alpha * errors + (1 - alpha) * importance)
        return jnp.where(is_seen, smoothed, importance), None

    return jax.lax.scan(step, importance, (errors, seen))[0]


class EvictingKeeper(DenseKeeper):
    """Gives the kept slots the importance that the window's queries, one after the other, see in them."""

    @staticmethod
    def takes(model: Decoder, policy: EvictionPolicy, length: int) -> bool:
        return policy.while_generating

    @property
    def num_slots(self) -> int:
        """Of the cache, tokens to come included."""
        return self.policy.slots(self.policy.slots(self.total) + self.max_new_tokens)

    def start(self, past: Cache | None, lengths: Array, dtype: Any) -> Any:
        dense = empty_cache(self.model.config, lengths, self.num_slots, dtype)
        fields = {field.name: getattr(dense, field.name) for field in dataclasses.fields(KVCache)}
        return EvictingCache(**fields, **empty_importance(self.model.config, dense.positions, self.policy))

    def add(self, cache: Any, view: LayerView, memory: PairMemory | SeenMemory, known: dict) -> Any:
        kept = self.choose(view, memory.pairs, known)
        gram = self.policy.query_scorer.gram(view.output_projection)
        is_known = isinstance(memory, SeenMemory)
        before = memory.importance_at(kept.positions) if is_known else jnp.full(kept.positions.shape, UNSEEN)
        queries = view.queries.last(self.evicting.num_scoring_queries(self.length))
        importance = update_importance(before, queries, kept, gram, self.policy)
        cache = self.write(cache, view, kept)
        assert isinstance(cache, ByImportance)
        return cache.replace(
            importance=put_layer(cache.importance, view.index, importance),
            gram=put_layer(cache.gram, view.index, gram),
        )


def empty_importance(config: ModelConfig, positions: Array, policy: EvictionPolicy) -> dict[str, Any]:
    """The fields of a `ByImportance` cache besides those of its pairs, for slots int32 [L, B, K, N]."""
    num_kv_heads, dim = config.num_key_value_heads, config.head_dim
    gram_shape = config.num_hidden_layers, num_kv_heads, config.num_attention_heads // num_kv_heads, dim, dim
    return {
        "importance": on_mesh(jnp.full(positions.shape, UNSEEN, jnp.float32), "l b k n"),
        "gram": on_mesh(jnp.zeros(gram_shape, jnp.float32), "l k g d e"),
        "policy": policy,
    }
