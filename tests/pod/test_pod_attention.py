"""Attention with shared keys against brute force: results, gradients, and the model around it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import restkv_jax as rk
from restkv_jax.kernels.attention import attend, attend_shared
from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.models.config import UNLIMITED
from restkv_jax.models.decoder import Hooks, positions_of, read
from restkv_jax.models.layer import rms_norm
from restkv_jax.pod import LayerGroups, Sharing

CONFIG = dict(
    model_type="llama", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512, initializer_range=0.3,
)  # fmt: skip
GROUPS = LayerGroups([[0, 0], [0, 1], [2, 1], [2, 1]])
SHARING = Sharing(GROUPS, sink=3, recent=10)


@functools.cache
def tiny(**changes):
    model = rk.build_model(CONFIG | changes)
    return model, rk.init_params(model, jax.random.key(0))


def normed(model, params, tokens, mask=None, **options):
    """The hidden states after the final norm."""
    hidden, _ = read(model, params, tokens, mask, **options)
    return rms_norm(hidden, params["final_norm"], model.config.rms_norm_eps)


def arrays(length, keys, seed=0, batch=2, group=2, kv_heads=2, dim=8):
    """Queries, not yet scaled, keys, keys of distant tokens, and values."""
    rng = np.random.default_rng(seed)
    shapes = [(batch, kv_heads, group, length, dim)] + [(batch, kv_heads, keys, dim)] * 3
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def scaled(queries, positions, window):
    return Queries(queries * queries.shape[-1] ** -0.5, positions, window)


def brute_force(queries, keys, distant_keys, values, query_positions, key_positions, window, sink, recent):
    """One softmax over both sets, and the two attentions joined by the gate; numpy, in float64."""
    joint, gated = np.zeros(queries.shape), np.zeros(queries.shape)
    for b, k, g, t in np.ndindex(queries.shape[:4]):
        q = query_positions[b, t]
        past = q - key_positions[b]
        seen = (past >= 0) & (past < window) & (key_positions[b] >= 0)
        near = (key_positions[b] < sink) | (past < recent)
        query = queries[b, k, g, t].astype(np.float64) / np.sqrt(queries.shape[-1])
        mass = np.where(near, np.exp(keys[b, k] @ query), np.exp(distant_keys[b, k] @ query)) * seen
        if mass.any():
            joint[b, k, g, t] = mass @ values[b, k] / mass.sum()
            gate = mass[near].sum() / mass.sum()
            outputs = [mass[p] @ values[b, k, p] / max(mass[p].sum(), 1e-300) for p in (near, ~near)]
            gated[b, k, g, t] = gate * outputs[0] + (1 - gate) * outputs[1]
    return joint, gated


@pytest.mark.parametrize("window", [UNLIMITED, 21])
@pytest.mark.parametrize(("sink", "recent"), [(3, 10), (0, 1), (5, 100)])
def test_one_softmax_over_own_and_shared_keys(window, sink, recent):
    inputs = arrays(50, 50)
    positions = positions_of(jnp.arange(50) >= jnp.array([[0], [13]]))
    expected, gated = brute_force(*inputs, *[np.asarray(positions)] * 2, window, sink, recent)
    queries, keys, distant_keys, values = inputs
    pairs = Pairs(keys, values, positions[:, None])
    ours = attend_shared(scaled(queries, positions, window), pairs, distant_keys, sink=sink, recent=recent)
    np.testing.assert_allclose(ours, expected, atol=2e-6)
    np.testing.assert_allclose(gated, expected, atol=1e-12)


@pytest.fixture
def small_blocks(monkeypatch):
    """Sequences of many blocks that are fast to compute."""
    monkeypatch.setattr("restkv_jax.kernels.attention.BLOCK", 16)


@pytest.mark.parametrize("length", [64, 53])
def test_blocks_and_gradients_against_a_dense_softmax(small_blocks, length):
    """Against automatic differentiation of the dense formula, in sequences that blocks divide and do not divide."""
    inputs = arrays(length, length)
    positions = positions_of(jnp.arange(length) >= jnp.array([[0], [9]]))
    weights = np.random.default_rng(1).standard_normal(inputs[0].shape).astype(np.float32)

    def dense(queries, keys, distant_keys, values):
        past = positions[:, :, None] - positions[:, None, :]
        seen = ((past >= 0) & (past < 40) & (positions >= 0)[:, None])[:, None, None]
        near = ((positions < 3)[:, None] | (past < 10))[:, None, None]
        own, leader = (jnp.einsum("bkgtd,bknd->bkgtn", queries, k) * 8**-0.5 for k in (keys, distant_keys))
        attention = jax.nn.softmax(jnp.where(seen, jnp.where(near, own, leader), -1e30), where=seen)
        attention = jnp.where(seen, attention, 0.0)
        return jnp.einsum("bkgtn,bknd->bkgtd", attention, values)

    def ours(queries, keys, distant_keys, values):
        pairs = Pairs(keys, values, positions[:, None])
        return attend_shared(scaled(queries, positions, 40), pairs, distant_keys, sink=3, recent=10)

    def plain(queries, keys, distant_keys, values):
        return attend(scaled(queries, positions, 40), Pairs(keys, values, positions[:, None]))

    def gradients(function, inputs):
        return jax.jit(jax.value_and_grad(lambda *x: (function(*x) * weights).sum(), argnums=(0, 1, 2, 3)))(*inputs)

    for function, keys in ((ours, inputs[2]), (plain, inputs[1])):
        given = inputs[0], inputs[1], keys, inputs[3]
        value, gradient = gradients(function, given)
        expected_value, expected = gradients(dense, given)
        np.testing.assert_allclose(value, expected_value, rtol=1e-4)
        if function is plain:
            gradient, expected = ((g[0], g[1] + g[2], g[3]) for g in (gradient, expected))
        for found, wanted in zip(gradient, expected, strict=True):
            np.testing.assert_allclose(found, wanted, atol=2e-5)


@pytest.mark.slow
def test_one_block_per_layer_is_the_ordinary_model(small_blocks):
    model, params = tiny()
    tokens = np.random.default_rng(0).integers(0, 61, (2, 60))
    mask = np.arange(60) >= np.array([[0], [21]])
    dense = Sharing(LayerGroups.dense(4, 2), sink=3, recent=10)
    plain = normed(model, params, tokens, mask)
    for sharing in (dense, None):
        ours = jax.jit(functools.partial(normed, model.clone(sharing=sharing)))(params, tokens, mask)
        np.testing.assert_allclose(ours[mask], plain[mask], atol=2e-5)


def leading_by_lookup(sharing):
    """The same model: a layer looks its leaders up in a store of all layers' keys and takes a dense softmax."""

    class Lookup:
        def __init__(self, pairs, distant_keys):
            self.pairs, self.distant_keys = pairs, distant_keys

        def attend(self, queries):
            keys, values, positions = self.pairs
            positions = positions[:, 0]
            past = queries.positions[:, None, None, :, None] - positions[:, None, None, None, :]
            seen = (past >= 0) & (past < queries.sliding_window) & (positions >= 0)[:, None, None, None]
            near = (positions < sharing.sink)[:, None, None, None] | (past < sharing.recent)
            own, leader = (jnp.einsum("bkgtd,bknd->bkgtn", queries.vectors, x) for x in (keys, self.distant_keys))
            logits = jnp.where(seen, jnp.where(near, own, leader), -1e30)
            attention = jnp.where(seen, jax.nn.softmax(logits), 0)
            return jnp.einsum("bkgtn,bknd->bkgtd", attention, values), None

    def remember(index, pairs, store):
        store = store.at[index].set(pairs.keys)
        leader = jnp.asarray(sharing.groups.leader)[index]
        return Lookup(pairs, jnp.stack([store[leader[k], :, k] for k in range(2)], axis=1)), store

    return Hooks(remember)


@pytest.mark.slow
@pytest.mark.parametrize("sliding_window", [None, 24])
def test_whole_sequences_against_leaders_looked_up(small_blocks, sliding_window):
    model, params = tiny(**({"model_type": "mistral", "sliding_window": 24} if sliding_window else {}))
    tokens = np.random.default_rng(0).integers(0, 61, (2, 64))
    mask = np.arange(64) >= np.array([[0], [21]])
    store = jnp.zeros((4, 2, 2, 64, 8))

    def expected(params):
        return normed(model, params, tokens, mask, hooks=leading_by_lookup(SHARING), state=store)

    def ours(params, chunk_size=None, checkpoint=False):
        options = {"chunk_size": chunk_size, "checkpoint": checkpoint}
        return normed(model.clone(sharing=SHARING), params, tokens, mask, **options)

    weights = np.random.default_rng(1).standard_normal((2, 64, 32)) * mask[..., None]

    def loss(function):
        def total(params):
            hidden = function(params)
            return (hidden * weights).sum(), hidden

        return jax.jit(jax.value_and_grad(total, has_aux=True))(params)

    chunked = jax.jit(lambda p: ours(p, chunk_size=16))(params)
    ((_, hidden), gradient), ((_, wanted_hidden), wanted) = loss(ours), loss(expected)
    np.testing.assert_allclose(chunked[mask], wanted_hidden[mask], atol=5e-5)
    np.testing.assert_allclose(hidden[mask], wanted_hidden[mask], atol=5e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-3 * np.abs(y).max() + 1e-5), gradient, wanted)
    assert np.abs(normed(model, params, tokens, mask) - hidden)[mask].max() > 0.05, "sharing must matter"


def test_groups_of_another_model_are_refused():
    model, params = tiny()
    with pytest.raises(ValueError, match="3 layers and 2 KV heads, but this one has 4 and 2"):
        rk.prefill(model.clone(sharing=Sharing(LayerGroups.dense(3, 2))), params, np.ones((1, 8), int))
