"""Scores do not depend on the tiles that keys go through in, nor softmaxes on the blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from restkv_jax.kernels import scores, softmax
from restkv_jax.kernels.pairs import Pairs, Queries

B, K, G, W, T, D = 2, 2, 3, 5, 53, 8


def draw(key, *shape):
    return jax.random.normal(jax.random.key(key), shape)


POSITIONS = jnp.where(jnp.arange(T) >= jnp.array([[0], [13]]), jnp.arange(T) - jnp.array([[0], [13]]), -1)
QUERIES = Queries(draw(0, B, K, G, W, D), POSITIONS[:, -W:], 30)
PAIRS = Pairs(draw(1, B, K, T, D), draw(2, B, K, T, D), POSITIONS[:, None])
GRAM = scores.output_gram(draw(3, K, G, D, 16))
WEIGHTS = jnp.linspace(0.1, 0.4, W)
SCORES = {
    "column_sums": lambda: scores.column_sums(QUERIES, PAIRS, WEIGHTS),
    "column_row_norms": lambda: scores.column_row_norms(QUERIES, PAIRS, GRAM),
    "removal_errors": lambda: scores.removal_errors(QUERIES, PAIRS, GRAM),
    "averaged_removal_error": lambda: scores.averaged_removal_error(QUERIES, PAIRS, GRAM, WEIGHTS),
    "averaged_attention_removal_error": lambda: scores.averaged_attention_removal_error(QUERIES, PAIRS, GRAM, WEIGHTS),
    "attention_centres": lambda: scores.attention_centres(QUERIES, PAIRS, count=7),
}


@pytest.mark.parametrize("name", SCORES)
def test_tiles_change_nothing(name, monkeypatch):
    whole = SCORES[name]()
    monkeypatch.setattr(scores.tiles, "LEAST_TILE", 10)
    monkeypatch.setattr(scores.tiles, "ELEMENTS_AT_ONCE", 1)
    tiled = SCORES[name]()
    assert tiled.shape == whole.shape
    np.testing.assert_allclose(tiled, whole, rtol=2e-5, atol=1e-6)


def test_probabilities_of_tiles_are_those_of_all_keys():
    peaks = scores.find_peaks(QUERIES, PAIRS)
    whole = scores.probabilities(QUERIES, PAIRS)
    np.testing.assert_allclose(scores.probabilities(QUERIES, PAIRS, peaks), whole, rtol=1e-6)
    np.testing.assert_allclose(whole.sum(-1), 1, rtol=1e-5)


def test_a_softmax_in_blocks_is_one_softmax():
    seen = jax.random.uniform(jax.random.key(4), (B, K, 1, W, T)) < 0.5
    seen = seen.at[0, 0, :, 1].set(False)
    logits = jnp.where(seen, jnp.einsum("bkgwd,bktd->bkgwt", QUERIES.vectors, PAIRS.keys), -jnp.inf)
    weights = jnp.nan_to_num(jax.nn.softmax(logits, axis=-1))
    expected = jnp.einsum("bkgwt,bktd->bkgwd", weights, PAIRS.values)

    def read(start, stop):
        part = [x[:, :, start:stop] for x in PAIRS[:2]]
        return softmax.read_keys(QUERIES, *part, seen[..., start:stop])

    state = softmax.empty_softmax(QUERIES.vectors)
    for start, stop in ((0, 11), (11, 12), (12, T)):
        state = softmax.join(state, read(start, stop))
    np.testing.assert_allclose(state.context(), expected, atol=1e-5)
    known = jnp.isfinite(logits).any(-1)
    np.testing.assert_allclose(state.normaliser()[known], jax.nn.logsumexp(logits, axis=-1)[known], rtol=1e-5)
    assert (state.context()[0, 0, :, 1] == 0).all()


def test_blocks_of_different_owners_join_theirs():
    """Blocks in any order, several of one owner in one call."""
    flat = QUERIES.vectors.reshape(B * K, G, W, D)
    keys, values = (x.reshape(B * K, T, D) for x in PAIRS[:2])
    blocks, owners = [], []
    for start in (0, 20, 40):
        for owner in (2, 0, 3, 1):
            part = slice(start, min(start + 20, T))
            pad = 20 - (part.stop - part.start)
            padded = [jnp.pad(x[owner, part], ((0, pad), (0, 0))) for x in (keys, values)]
            blocks.append(softmax.read_keys(QUERIES.replace(vectors=flat[owner]), *padded, jnp.arange(20) < 20 - pad))
            owners.append(owner)
    state = softmax.empty_softmax(flat)
    for half in (slice(0, 7), slice(7, 12)):
        parts = jax.tree.map(lambda *xs: jnp.stack(xs), *blocks[half])
        state = softmax.join_by_owner(state, parts, jnp.array(owners[half]))
    whole = softmax.read_keys(QUERIES.replace(vectors=flat), keys, values, jnp.ones(T, bool))
    np.testing.assert_allclose(state.context(), whole.context(), rtol=1e-4, atol=1e-5)
