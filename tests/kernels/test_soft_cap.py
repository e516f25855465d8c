"""Every kernel that reads keys caps their logits, `c tanh(q k / c)`: against the formula written out densely."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import is_interpreted

from restkv_jax.kernels.attention import attend, attend_shared
from restkv_jax.kernels.distant import read_distant
from restkv_jax.kernels.paged import Pages, _attend_pages_gpu, attend_pages
from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.kernels.scores import attention_centres, column_sums, removal_errors
from restkv_jax.kernels.softmax import empty_softmax

CAP = 1.5
LENGTH = 48
POSITIONS = jnp.maximum(jnp.arange(LENGTH) - jnp.array([[0], [9]]), -1)
WINDOW = 30


def arrays(queries=LENGTH, dim=8):
    """Queries [B, K, G, T, D], keys, other keys and values [B, K, N, D]; logits reach several times the cap."""
    rng = np.random.default_rng(0)
    shapes = [(2, 2, 2, queries, dim)] + [(2, 2, LENGTH, dim)] * 3
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def capped(vectors):
    return Queries(vectors, POSITIONS[:, -vectors.shape[3] :], WINDOW, CAP)


def probabilities(queries, keys, distant_keys=None, sink=0, recent=LENGTH):
    """[B, K, G, T, N], those beyond `sink` and `recent` by other keys."""
    places = POSITIONS[:, None, :]
    past = queries.positions[:, :, None] - places
    seen = ((past >= 0) & (past < WINDOW) & (places >= 0))[:, None, None]
    near = ((places < sink) | (past < recent))[:, None, None]
    products = jnp.einsum("bkgtd,bknd->bkgtn", queries.vectors, keys)
    if distant_keys is not None:
        products = jnp.where(near, products, jnp.einsum("bkgtd,bknd->bkgtn", queries.vectors, distant_keys))
    found = jax.nn.softmax(jnp.where(seen, CAP * jnp.tanh(products / CAP), -1e30), where=seen)
    return jnp.where(seen, found, 0.0)


def gradients(function, inputs):
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(inputs[0].shape), jnp.float32)
    argnums = tuple(range(len(inputs)))
    return jax.jit(jax.value_and_grad(lambda *x: (function(*x) * weights).sum(), argnums))(*inputs)


def assert_same_with_gradients(ours, dense, inputs):
    for found, wanted in zip(*(jax.tree.leaves(gradients(f, inputs)) for f in (ours, dense)), strict=True):
        np.testing.assert_allclose(found, wanted, atol=5e-5)


def test_attention_and_its_gradients(monkeypatch):
    monkeypatch.setattr("restkv_jax.kernels.attention.BLOCK", 16)
    vectors, keys, _, values = arrays()

    def ours(vectors, keys, values):
        return attend(capped(vectors), Pairs(keys, values, POSITIONS[:, None]))

    def dense(vectors, keys, values):
        return jnp.einsum("bkgtn,bknd->bkgtd", probabilities(capped(vectors), keys), values)

    assert_same_with_gradients(ours, dense, (vectors, keys, values))
    uncapped = attend(capped(vectors).replace(soft_cap=None), Pairs(keys, values, POSITIONS[:, None]))
    assert jnp.abs(ours(vectors, keys, values) - uncapped).max() > 0.3


def test_shared_keys_and_their_gradients(monkeypatch):
    monkeypatch.setattr("restkv_jax.kernels.attention.BLOCK", 16)

    def ours(vectors, keys, distant_keys, values):
        pairs = Pairs(keys, values, POSITIONS[:, None])
        return attend_shared(capped(vectors), pairs, distant_keys, sink=3, recent=10)

    def dense(vectors, keys, distant_keys, values):
        weights = probabilities(capped(vectors), keys, distant_keys, sink=3, recent=10)
        return jnp.einsum("bkgtn,bknd->bkgtd", weights, values)

    assert_same_with_gradients(ours, dense, arrays())


def test_distant_tokens():
    vectors, keys, _, values = arrays(queries=1)
    queries = capped(vectors)
    positions = jnp.broadcast_to(POSITIONS[:, None], keys.shape[:3])
    stores = keys[None, None], values[None], positions[None, None]
    lengths, is_read = jnp.full(2, LENGTH), jnp.ones((2, 2), bool)
    state = read_distant(empty_softmax(vectors), queries, *stores, jnp.int32(0), jnp.arange(2), lengths, is_read)
    expected = jnp.einsum("bkgtn,bknd->bkgtd", probabilities(queries, keys), values)
    np.testing.assert_allclose(state.context(), expected, atol=1e-5)


def in_pages(keys, values, size=16):
    """All pairs, of one row and KV head after the other."""
    pages = [x.reshape(1, 1, -1, size, x.shape[-1]) for x in (keys, values)]
    positions = jnp.broadcast_to(POSITIONS[:, None], keys.shape[:3]).reshape(1, 1, -1, size)
    table = jnp.arange(pages[0].shape[2], dtype=jnp.int32).reshape(*keys.shape[:2], -1)
    return Pages(*pages, positions, table, jnp.full(keys.shape[:2], LENGTH))


def test_pages():
    vectors, keys, _, values = arrays(queries=1)
    expected = jnp.einsum("bkgtn,bknd->bkgtd", probabilities(capped(vectors), keys), values)
    found = attend_pages(capped(vectors), in_pages(keys, values), is_windowed=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_pages_by_the_kernel_for_gpu():
    vectors, keys, _, values = arrays(queries=1, dim=16)
    queries, pages = capped(vectors), in_pages(keys, values)
    reference = attend_pages.force("reference")(queries, pages, is_windowed=False)
    found = _attend_pages_gpu(queries, pages, is_windowed=False, interpret=is_interpreted("cuda"))
    np.testing.assert_allclose(found, reference, rtol=1e-3, atol=1e-4)


@pytest.fixture
def judged():
    """The last queries, all pairs, and the probabilities between them."""
    vectors, keys, _, values = arrays(queries=6)
    queries = capped(vectors)
    return queries, Pairs(keys, values, POSITIONS[:, None]), probabilities(queries, keys)


def test_attention_that_eviction_sums(judged):
    queries, pairs, attention = judged
    np.testing.assert_allclose(column_sums(queries, pairs, jnp.ones(6)), attention.sum(3), atol=1e-5)


def test_errors_of_removal(judged):
    queries, pairs, attention = judged
    gram = jnp.broadcast_to(jnp.eye(8), (2, 2, 8, 8))
    output = jnp.einsum("bkgtn,bknd->bkgtd", attention, pairs.values)
    moved = jnp.linalg.norm(output[..., None, :] - pairs.values[:, :, None, None], axis=-1)
    expected = attention / (1 - attention) * moved
    np.testing.assert_allclose(removal_errors(queries, pairs, gram), expected, rtol=1e-3, atol=1e-5)


def test_centres_of_attention(judged):
    queries, pairs, attention = judged
    top = jax.lax.top_k(attention, 4)[1]
    expected = jnp.take_along_axis(jnp.broadcast_to(POSITIONS[:, None, None, None], attention.shape), top, axis=-1)
    np.testing.assert_allclose(attention_centres(queries, pairs, count=4), expected.mean(-1), atol=1e-4)
