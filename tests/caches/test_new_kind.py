"""A kind of cache that the package does not know, made in this file: one cache, one keeper, one entry in `KEEPERS`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import restkv_jax as rk
from restkv_jax.caches import keepers
from restkv_jax.caches.base import Cache, Keeper, check_shape, check_unshared
from restkv_jax.kernels.pairs import Pairs
from restkv_jax.models.memory import PairMemory

CONFIG = dict(
    model_type="llama", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
    initializer_range=0.3, eos_token_id=None, bos_token_id=None,
)  # fmt: skip
SIZE, NEW = 16, 8


@dataclasses.dataclass(frozen=True)
class LastTokens(rk.EvictionPolicy):
    """Keeps the last `SIZE` tokens, of prompt and answer alike."""


class RingCache(Cache):
    """The token at position `p` is in slot `p % N`: keys and values [L, B, K, N, D]."""

    keys: jax.Array
    values: jax.Array

    @property
    def num_slots(self):
        return self.keys.shape[3]

    @property
    def dtype(self):
        return self.keys.dtype

    def _positions(self, newest):
        slots = jnp.arange(self.num_slots)
        held = newest[:, None] - (newest[:, None] - slots) % self.num_slots
        return jnp.where(held >= 0, held, -1)

    def memory(self, layer):
        return PairMemory(Pairs(self.keys[layer], self.values[layer], self._positions(self.next_positions)[:, None]))

    def append(self, layer, new):
        positions = new.positions[:, 0, 0]
        slots = jnp.where(positions >= 0, positions % self.num_slots, self.num_slots)
        rows = jnp.arange(len(slots))

        def put(array, new):
            return array.at[layer, rows, :, slots].set(new[:, :, 0].astype(array.dtype), mode="drop")

        return self.replace(keys=put(self.keys, new.keys), values=put(self.values, new.values))

    def room(self):
        return jnp.asarray(2**31 - 1)

    @property
    def extending_policy(self):
        return LastTokens()

    def held(self, layer):
        positions = self._positions(self.next_positions - 1)[:, None]
        return Pairs(self.keys[layer], self.values[layer], positions)

    def slot_positions(self):
        positions = self._positions(self.next_positions - 1)
        return jnp.broadcast_to(positions[None, :, None], self.keys.shape[:4])

    def check_model(self, model):
        num_layers, _, num_kv_heads, _, dim = self.keys.shape
        check_shape(model, num_layers, num_kv_heads, dim)
        check_unshared(model)


class RingKeeper(Keeper):
    """The last tokens of every layer, each in its slot."""

    @staticmethod
    def takes(model, policy, length):
        return isinstance(policy, LastTokens)

    def start(self, past, lengths, dtype):
        config = self.model.config
        shape = config.num_hidden_layers, len(lengths), config.num_key_value_heads, SIZE, config.head_dim
        empty = jnp.zeros(shape, dtype)
        return RingCache(prompt_lengths=lengths, next_positions=lengths, keys=empty, values=empty)

    def add(self, cache, view, memory, scored):
        held = cache._positions(cache.prompt_lengths - 1)
        places = jnp.where(held >= 0, held + (self.length - cache.prompt_lengths)[:, None], 0)[:, None, :, None]

        def put(array, new):
            return array.at[view.index].set(jnp.take_along_axis(new, places, axis=2))

        return cache.replace(keys=put(cache.keys, memory.pairs.keys), values=put(cache.values, memory.pairs.values))


@pytest.fixture
def ring(monkeypatch):
    monkeypatch.setattr(keepers, "KEEPERS", [RingKeeper, *keepers.KEEPERS])
    model = rk.build_model(CONFIG)
    tokens = np.random.default_rng(0).integers(0, 61, (3, 50))
    mask = np.arange(50) >= np.array([[0], [20], [45]])
    return model, rk.init_params(model, jax.random.key(0)), tokens, mask


def test_generates_on_a_cache_of_a_new_kind(ring):
    out = rk.generate(*ring, LastTokens(), NEW)
    assert out.cache.num_slots == SIZE and out.cache.keys.shape[3] == SIZE
    streamed = np.stack(list(rk.stream(*ring, LastTokens(), NEW)), axis=1)
    np.testing.assert_array_equal(streamed, out.tokens)

    model, params, tokens, mask = ring
    logits, cache = rk.prefill(model, params, tokens, mask, LastTokens(), NEW)
    for step in range(NEW - 1):
        np.testing.assert_array_equal(logits.argmax(-1), out.tokens[:, step])
        logits, cache = rk.decode_step(model, params, logits.argmax(-1), cache, LastTokens())
    np.testing.assert_array_equal(logits.argmax(-1), out.tokens[:, -1])


def test_gives_what_a_window_of_the_last_tokens_gives(ring):
    """As streaming without sinks that drops a token for every new one: by hand on the full cache's pairs."""
    model, params, tokens, mask = ring
    logits, ours = rk.prefill(model, params, tokens, mask, LastTokens(), NEW)
    _, full = rk.prefill(model, params, tokens, mask, rk.full(), NEW)
    for _ in range(NEW):
        token = logits.argmax(-1)
        logits, ours = rk.decode_step(model, params, token, ours)
        newest = full.next_positions[:, None, None]
        full = full.replace(positions=jnp.where(full.positions > newest - SIZE, full.positions, -1))
        expected, full = rk.decode_step(model, params, token, full)
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_goes_on_with_further_tokens(ring):
    """The last tokens are a window without gaps, so two readings leave what one does."""
    model, params, tokens, mask = ring
    _, first = rk.prefill(model, params, tokens[:, :30], mask[:, :30] | (np.arange(30) == 29), LastTokens(), NEW)
    _, second = rk.extend(model, params, tokens[:, 30:], None, first, None, NEW)
    held = rk.kept_positions(second)
    assert type(second) is RingCache and (held >= 0).sum(-1).max() == SIZE
    np.testing.assert_array_equal(held.max(-1), np.broadcast_to(second.next_positions[:, None] - 1, (3, 3, 2)))


@pytest.mark.slow
def test_several_policies_at_once(ring):
    outs = rk.generate_each(*ring, (LastTokens(), rk.full(), rk.snapkv(40)), NEW)
    np.testing.assert_array_equal(outs[0].tokens, rk.generate(*ring, LastTokens(), NEW).tokens)
    assert [type(out.cache).__name__ for out in outs] == ["RingCache", "KVCache", "KVCache"]


def test_another_model_is_refused(ring):
    model, params, tokens, mask = ring
    _, cache = rk.prefill(model, params, tokens, mask, LastTokens(), NEW)
    other = rk.build_model(CONFIG | {"num_hidden_layers": 2})
    with pytest.raises(ValueError, match="the cache is not of this model: it has num_hidden_layers=3, the model 2"):
        rk.decode_step(other, rk.init_params(other, jax.random.key(0)), np.zeros(3, int), cache)
