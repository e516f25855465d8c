"""Reconstruction error on the tokens after a prompt: against its definition in float64, and what follows from it."""

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import restkv_jax as rk
from restkv_jax.evaluate import make_prompts, reconstruction_errors
from restkv_jax.models import Hooks

FOLLOWING, LENGTH = 6, 70
MODELS = {
    "grouped queries": tiny.CONFIG,
    "sliding window": tiny.CONFIG | {"model_type": "mistral", "sliding_window": 30},
}
POLICIES = {
    "restkv": rk.restkv(budget=12, window=4),
    "laprox": rk.laprox(budget=16, window=4),
}


@pytest.fixture(scope="module")
def embedded():
    return rk.load_model(dtype=jnp.float32)


def build(config=tiny.CONFIG):
    """A model whose attention is far from even."""
    model = rk.build_model(config)
    params = rk.init_params(model, jax.random.key(0))
    return model, jax.tree.map(lambda x: x * 12 if x.ndim > 2 else x, params)


def texts():
    """Two rows, the second padded."""
    tokens = np.random.default_rng(0).integers(3, tiny.CONFIG["vocab_size"], (2, LENGTH + FOLLOWING), dtype=np.int32)
    return tokens, np.arange(LENGTH + FOLLOWING) >= np.array([[0], [17]])


def seen_layers(model, params, tokens, mask):
    """Queries, keys, values and output projections of every layer, as float64."""
    c, (batch, length) = model.config, tokens.shape
    shape = c.num_hidden_layers, batch
    state = (
        jnp.zeros((*shape, c.num_attention_heads, length, c.head_dim)),
        jnp.zeros((*shape, c.num_key_value_heads, length, c.head_dim)),
        jnp.zeros((*shape, c.num_key_value_heads, length, c.head_dim)),
        jnp.zeros((c.num_hidden_layers, c.num_attention_heads, c.head_dim, c.hidden_size)),
    )

    def observe(view, memory, state):
        queries = einops.rearrange(view.queries.vectors, "b k g t d -> b (k g) t d") * c.head_dim**0.5
        projection = einops.rearrange(view.output_projection, "k g d m -> (k g) d m")
        parts = queries, memory.pairs.keys, memory.pairs.values, projection
        return tuple(whole.at[view.index].set(part) for whole, part in zip(state, parts, strict=True))

    state = rk.read(model, params, tokens, mask, Hooks(observe=observe, num_queries=length), state)[1]
    return [np.asarray(x, np.float64) for x in state]


def output(queries, keys, values, projection, seen):
    """What one query gets, [H, D] on [K, N, D] of which each head sees `seen`, bool [K, N]: float64 [M]."""
    group = len(queries) // len(keys)
    total = 0
    for head, query in enumerate(queries):
        of = head // group
        logits = np.where(seen[of], keys[of] @ query / np.sqrt(len(query)), -np.inf)
        weights = np.exp(logits - logits.max())
        total = total + weights @ values[of] / weights.sum() @ projection[head]
    return total


def brute_force(model, layers, mask, kept):
    """float64 [L, B] of kept positions [L, B, K, C], one token, row, layer and head after the other."""
    queries, keys, values, projection = layers
    num_layers, batch, num_kv_heads = kept.shape[:3]
    errors = np.zeros((num_layers, batch, FOLLOWING))
    for layer, row, token in np.ndindex(errors.shape):
        places, place, padding = np.arange(LENGTH + FOLLOWING), LENGTH + token, (~mask[row]).sum()
        past = (places >= padding) & (places <= place) & (places > place - model.config.sliding_windows[layer])
        holds = [np.isin(places - padding, head[head >= 0]) | (places >= LENGTH) for head in kept[layer, row]]
        arrays = queries[layer, row, :, place], keys[layer, row], values[layer, row], projection[layer]
        full = output(*arrays, np.tile(past, (num_kv_heads, 1)))
        errors[layer, row, token] = np.linalg.norm(output(*arrays, past & holds) - full) / np.linalg.norm(full)
    return errors.mean(-1)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["grouped queries", "sliding window"])
def test_equals_the_definition_in_float64(config):
    model, params = build(MODELS[config])
    tokens, mask = texts()
    ours = reconstruction_errors(model, params, tokens, mask, tuple(POLICIES.values()), FOLLOWING, chunk_size=32)
    assert ours.shape == (len(POLICIES), 2, 2)
    assert ours.dtype == jnp.float32
    layers, prompt = seen_layers(model, params, tokens, mask), (tokens[:, :LENGTH], mask[:, :LENGTH])
    outs = rk.generate_each(model, params, *prompt, tuple(POLICIES.values()), 1, chunk_size=32)
    for errors, out in zip(ours, outs, strict=True):
        expected = brute_force(model, layers, mask, np.asarray(rk.kept_positions(out.cache)))
        assert (expected > 0.01).all()
        np.testing.assert_allclose(errors, expected, rtol=1e-3)


def test_nothing_is_missing_where_everything_is_kept():
    tokens, mask = texts()
    policies = rk.full(), rk.laprox(budget=LENGTH)
    assert not reconstruction_errors(*build(), tokens, mask, policies, FOLLOWING).any()


@pytest.mark.slow
def test_policies_and_rows_are_apart_and_padding_is_nothing():
    model, params = build()
    tokens, mask = texts()
    together = reconstruction_errors(model, params, tokens, mask, tuple(POLICIES.values()), FOLLOWING, chunk_size=32)
    alone = reconstruction_errors(model, params, tokens[1:, 17:], None, (POLICIES["laprox"],), FOLLOWING)
    np.testing.assert_allclose(alone[0, :, 0], together[1, :, 1], rtol=1e-3)


@pytest.mark.slow
def test_larger_budgets_reconstruct_better(embedded):
    model, params, tokenizer = embedded
    texts = [prompt.text for prompt in make_prompts("multikey", tokenizer, 512, 4, seed=1)]
    batch = tokenizer(texts, return_tensors="np", padding=True)
    policies = tuple(rk.restkv(budget=budget, window=16) for budget in (24, 96, 320))
    errors = reconstruction_errors(model, params, batch["input_ids"], batch["attention_mask"], policies, 24)
    means = np.asarray(errors.mean((1, 2)))
    assert (np.diff(means) < 0).all()
    assert 0 < means[-1] < 0.5 * means[0] < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policies": ()}, "policies is empty"),
        ({"policies": (rk.snapkv(12, 4).replace(refit=rk.LeastSquares()),)}, "refit"),
        ({"policies": (rk.restkv(budget=12, window=4, while_generating=True),)}, "while_generating"),
        ({"num_following": 0}, "num_following=0"),
        ({"num_following": LENGTH + FOLLOWING}, f"num_following={LENGTH + FOLLOWING}"),
        ({"num_following": LENGTH}, "row 1"),
        ({"chunk_size": 0}, "chunk_size=0"),
    ],
)
def test_impossible_requests_are_named(options, message):
    tokens, mask = texts()
    with pytest.raises(ValueError, match=message):
        reconstruction_errors(
            *build(), tokens, mask, **{"policies": (rk.full(),), "num_following": FOLLOWING} | options
        )


def test_a_model_that_shares_keys_is_refused():
    """Its layers do not read distant tokens by their own keys."""
    model, params = build()
    shared = model.clone(sharing=rk.pod.Sharing(rk.pod.LayerGroups.dense(2, 2)))
    with pytest.raises(ValueError, match="model shares keys"):
        reconstruction_errors(shared, params, *texts(), (rk.full(),), FOLLOWING)
