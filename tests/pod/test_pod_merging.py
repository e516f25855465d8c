"""Groups found by what sharing costs."""

import itertools

import jax
import numpy as np
import optax
import pytest

import restkv_jax as rk
from restkv_jax.models.decoder import logits, read

CONFIG = {
    "model_type": "llama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "initializer_range": 0.3,
}  # fmt: skip
SINK, RECENT = 2, 6


def setting():
    model = rk.build_model(CONFIG)
    rng = np.random.default_rng(0)
    tokens, weights = rng.integers(0, 61, (2, 40)), rng.random((2, 40)) * (rng.random((2, 40)) < 0.5)
    return model, rk.init_params(model, jax.random.key(0)), tokens, weights


def loss_of(groups):
    """Of the model that shares keys by these groups, from its own pass and all logits."""
    model, params, tokens, weights = setting()
    hidden, _ = read(model.clone(sharing=rk.pod.Sharing(groups, SINK, RECENT)), params, tokens)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits(model, params, hidden)[:, :-1], tokens[:, 1:]
    )
    return float((losses * weights[:, 1:]).sum() / weights[:, 1:].sum())


@pytest.mark.slow
def test_every_merge_is_the_one_that_costs_least():
    merged = list(rk.pod.merge_layers(*setting(), sink=SINK, recent=RECENT))
    assert [groups.num_blocks for groups, _ in merged] == [6, 5, 4, 3, 2]
    assert merged[0].groups == rk.pod.LayerGroups.dense(3, 2)
    for (before, _), (after, loss) in itertools.pairwise(merged):
        np.testing.assert_allclose(loss, loss_of(after), rtol=1e-4)
        for layer, head in np.argwhere(before.is_leader[1:]) + np.array([1, 0]):
            leader = np.array(before.leader)
            block = leader[:, head] == layer
            leader[block, head] = leader[layer - 1, head]
            assert loss <= loss_of(rk.pod.LayerGroups(leader)) + 1e-4


def test_a_sample_without_distant_tokens_is_refused():
    with pytest.raises(ValueError, match="tokens has rows of 40, all proximal"):
        next(rk.pod.merge_layers(*setting(), sink=16, recent=24))
