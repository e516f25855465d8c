"""The caller's strict modes of JAX, and meshes with explicit axes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import restkv_jax as rk
from restkv_jax.generation.text import decode_text
from restkv_jax.models.mesh import parameter_shardings

CONFIG = dict(
    model_type="llama", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
    initializer_range=0.3, eos_token_id=None, bos_token_id=None,
)  # fmt: skip
MODES = {
    "NaNs": functools.partial(jax.debug_nans, True),
    "dtypes": functools.partial(jax.numpy_dtype_promotion, "strict"),
    "ranks": functools.partial(jax.numpy_rank_promotion, "raise"),
}
POLICIES = {
    "restkv": rk.restkv(40, 16),
    "laprox": rk.laprox(40, 16),
    "while_generating": rk.restkv(40, 16, while_generating=True),
    "refit": rk.snapkv(40, 16).replace(refit=rk.LeastSquares()),
}
SHARING = rk.pod.Sharing(rk.pod.LayerGroups([[0, 0], [0, 1]]), sink=4, recent=20, skip_threshold=0.5)
MODEL = rk.build_model(CONFIG)
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 90))
MASK = np.arange(90) >= np.array([[0], [30]])


@functools.cache
def params(dtype=jnp.float32):
    return rk.init_params(MODEL, jax.random.key(0), dtype=dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*POLICIES, "shared"])
@pytest.mark.slow
def test_generation_gives_the_same_in_strict_modes(name, mode):
    model = MODEL.clone(sharing=SHARING if name == "shared" else None)
    policy = POLICIES.get(name, rk.snapkv(8, 4))
    expected = rk.generate(model, params(), TOKENS, MASK, policy, 4)
    with MODES[mode]():
        out = rk.generate(model, params(), TOKENS, MASK, policy, 4)
        list(rk.stream(model, params(), TOKENS, MASK, policy, 2, key=jax.random.key(0), temperature=0.7, top_p=0.9))
    np.testing.assert_array_equal(out.tokens, expected.tokens)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.slow
def test_other_functions_run_in_strict_modes(mode):
    keys = jax.random.normal(jax.random.key(0), (1, 2, 90, 8))
    with MODES[mode]():
        rk.generate(MODEL, params(jnp.bfloat16), TOKENS, MASK, POLICIES["restkv"], 2)
        rk.pod.attention_similarity(MODEL, params(), [(TOKENS, MASK)], 8)
        rk.evict_layer(POLICIES["restkv"], keys[:, :, :16], keys, keys, jnp.ones((2, 8, 16)))
        rk.init_params(MODEL, jax.random.key(1))
        texts = decode_text(MODEL, params(), tiny.tokenizer(), TOKENS, MASK, None, 4, key=jax.random.key(0), min_p=0.1)
        for _ in texts:
            texts.rows[0].ended = True


def test_end_tokens_may_be_traced():
    generate = jax.jit(lambda eos: rk.generate(MODEL, params(), TOKENS, MASK, max_new_tokens=6, eos_token_ids=eos))
    free = rk.generate(MODEL, params(), TOKENS, MASK, max_new_tokens=6)
    out = generate(np.array([free.tokens[0, 2], 60]))
    assert out.lengths[0] == list(free.tokens[0]).index(free.tokens[0, 2]) + 1


@pytest.mark.slow
def test_parameters_on_a_mesh_with_explicit_axes():
    """`jax.make_mesh` makes them by default: taken over outside of the caller's jit, refused by name inside."""
    mesh = jax.make_mesh((1, 1), ("data", "model"))
    placed = jax.device_put(params(), parameter_shardings(MODEL, mesh))
    for policy in (POLICIES["restkv"], POLICIES["laprox"]):
        out = rk.generate(MODEL, placed, TOKENS, MASK, policy, 4)
        np.testing.assert_array_equal(out.tokens, rk.generate(MODEL, params(), TOKENS, MASK, policy, 4).tokens)
    with pytest.raises(ValueError, match="params lie on a mesh with explicit axes"):
        jax.jit(lambda p: rk.generate(MODEL, p, TOKENS, MASK, max_new_tokens=2).tokens)(placed)
