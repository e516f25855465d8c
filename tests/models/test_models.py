"""The decoder against the PyTorch models of `transformers`."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hugging_face import (
    ARCHITECTURES,
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    ROPES,
    left_padded,
    newer_spelling,
    older_spelling,
    our_logits,
    random_model,
    reference_logits,
    torch,
    write_model,
)
from transformers import AutoConfig

import restkv_jax as rk
from restkv_jax.models.config import UNLIMITED, read_config, to_hugging_face
from restkv_jax.models.decoder import logits, read

LENGTHS = (40, 33, 1, 12)
BY_LENGTH = [name for name in ROPES if name.startswith(("dynamic", "longrope"))]
ALL_CONFIGS = ARCHITECTURES | {f"rope {name}": newer_spelling(LLAMA, rope) for name, rope in ROPES.items()}
WITHOUT_OPTION = {
    "llama, large eps": {"rms_norm_eps": 1e-6},
    "mistral, sliding window": {"sliding_window": None},
    "qwen2, window in upper layers": {"max_window_layers": 3},
    "qwen3, window in upper layers": {"max_window_layers": 0},
}
OF_EACH_FAMILY = {
    "llama": older_spelling(LLAMA | {"attention_bias": True, "mlp_bias": True}, ROPES["llama3"]),
    "mistral": MISTRAL | {"sliding_window": 7},
    "qwen2": QWEN2 | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": newer_spelling(QWEN3, ROPES["yarn"]),
}


def assert_same_logits(ours, theirs, mask):
    assert theirs[mask].std() > 0.3
    np.testing.assert_allclose(ours[mask], theirs[mask], atol=1e-4, rtol=0)


def loaded(directory, config, seed=0):
    """A random reference, and our model with the same weights."""
    reference = random_model(config, seed)
    model, params, _ = rk.load_model(write_model(directory, reference, config), jnp.float32)
    return reference, model, params


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_of_every_architecture(name, tmp_path):
    config = ARCHITECTURES[name]
    reference, model, params = loaded(tmp_path, config)
    tokens, mask = left_padded(1, LENGTHS)
    theirs = reference_logits(reference, tokens, mask)
    assert_same_logits(our_logits(model, params, tokens, mask), theirs, mask)
    if name in WITHOUT_OPTION:
        other = reference_logits(random_model(config | WITHOUT_OPTION[name]), tokens, mask)
        assert np.abs(other - theirs)[mask].max() > 0.05


@pytest.mark.parametrize("name", [name for name in ROPES if name not in BY_LENGTH])
def test_logits_of_every_rope_scaling(name, tmp_path):
    base = LLAMA | {"head_dim": 16}
    reference, model, params = loaded(tmp_path, older_spelling(base, ROPES[name]))
    tokens, mask = left_padded(2, LENGTHS)
    theirs = reference_logits(reference, tokens, mask)
    assert_same_logits(our_logits(model, params, tokens, mask), theirs, mask)
    other = reference_logits(random_model(base), tokens, mask)
    assert np.abs(other - theirs)[mask].max() > 0.05


@pytest.mark.parametrize("name", BY_LENGTH)
def test_rope_takes_the_length_of_each_row(name, tmp_path):
    config = newer_spelling(LLAMA, ROPES[name]) | {"max_position_embeddings": 20}
    reference, model, params = loaded(tmp_path, config)
    tokens, mask = left_padded(3, LENGTHS)
    ours = our_logits(model, params, tokens, mask)
    for row, length in enumerate(LENGTHS):
        # transformers takes the longest row for all, and remembers the longest sequence that a model has seen
        fresh = copy.deepcopy(reference)
        theirs = reference_logits(fresh, tokens[row : row + 1, -length:], np.ones((1, length), bool))
        np.testing.assert_allclose(ours[row, -length:], theirs[0], atol=1e-4, rtol=0)
    unscaled = random_model(newer_spelling(LLAMA, ROPES["default"]))
    assert np.abs(reference_logits(unscaled, tokens, mask) - ours)[0].max() > 0.05


@pytest.mark.parametrize("type_key", ["rope_type", "type"])
@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("base", [LLAMA, MISTRAL, QWEN2, QWEN3], ids=lambda config: config["model_type"])
def test_both_rope_spellings_mean_the_same(base, name, type_key):
    older = read_config(older_spelling(base | {"head_dim": 8}, ROPES[name], type_key))
    newer = read_config(newer_spelling(base | {"head_dim": 8}, ROPES[name]))
    assert older == newer
    assert to_hugging_face(newer)["rope_parameters"].items() >= ROPES[name].items()


def test_long_padded_prompt_with_a_sliding_window(tmp_path):
    config = MISTRAL | {"sliding_window": 100, "max_position_embeddings": 2048}
    reference, model, params = loaded(tmp_path, config)
    tokens, mask = left_padded(4, (1030, 617))
    theirs = reference_logits(reference, tokens, mask)
    assert_same_logits(our_logits(model, params, tokens, mask), theirs, mask)


@pytest.mark.parametrize(
    ("family", "chunk_size"),
    [("llama", 1), ("llama", 24), ("llama", 100), ("mistral", 6), ("qwen2", 8), ("qwen3", 12)],
)
def test_chunks_change_nothing(family, chunk_size, tmp_path):
    reference, model, params = loaded(tmp_path, OF_EACH_FAMILY[family])
    tokens, mask = left_padded(5, (24, 17, 2))

    @jax.jit
    def run(params, tokens, mask):
        return logits(model, params, read(model, params, tokens, mask, chunk_size=chunk_size)[0])

    assert_same_logits(np.asarray(run(params, tokens, mask)), reference_logits(reference, tokens, mask), mask)


def test_bfloat16_is_as_close_as_in_pytorch(tmp_path):
    reference, _, _ = loaded(tmp_path, LLAMA)
    model, params, _ = rk.load_model(tmp_path)
    tokens, mask = left_padded(6, (40, 31))
    exact = reference_logits(reference, tokens, mask)
    theirs = np.abs(reference_logits(random_model(LLAMA, dtype=torch.bfloat16), tokens, mask) - exact)[mask].mean()
    ours = our_logits(model, params, tokens, mask)
    assert ours.dtype == np.float32
    assert jax.eval_shape(lambda p: read(model, p, tokens, mask)[0], params).dtype == jnp.bfloat16
    assert np.abs(ours - exact)[mask].mean() < 1.5 * theirs


def test_gradients_of_the_loss(tmp_path):
    reference, model, params = loaded(tmp_path, OF_EACH_FAMILY["llama"])
    tokens, mask = left_padded(7, (16, 16))

    def loss(params):
        scores = jax.nn.log_softmax(logits(model, params, read(model, params, tokens)[0]))
        return -jnp.take_along_axis(scores[:, :-1], tokens[:, 1:, None], axis=-1).mean()

    ours = jax.jit(jax.grad(loss))(params)
    long = torch.tensor(tokens, dtype=torch.long)
    reference(input_ids=long, labels=long).loss.backward()
    for parameter, tensor in [("query_projection", "self_attn.q_proj"), ("down_projection", "mlp.down_proj")]:
        for layer in range(2):
            theirs = reference.get_parameter(f"model.layers.{layer}.{tensor}.weight").grad.numpy().T
            mine = ours["layers"][parameter][layer].reshape(theirs.shape)
            np.testing.assert_allclose(mine, theirs, atol=1e-5)
    assert mask.all()


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_configuration_round_trip(name):
    config = read_config(ALL_CONFIGS[name])
    assert read_config(to_hugging_face(config)) == config


def test_sliding_windows_per_layer():
    windows = {name: read_config(ARCHITECTURES[name]).sliding_windows for name in ARCHITECTURES}
    assert windows["mistral, sliding window"] == (7, 7)
    assert windows["mistral"] == windows["qwen2, window unused"] == (UNLIMITED, UNLIMITED)
    assert windows["qwen2, window in upper layers"] == (UNLIMITED, 5, 5)


def test_build_model_takes_every_form_of_a_configuration(tmp_path):
    config = OF_EACH_FAMILY["qwen2"]
    AutoConfig.for_model(**config).save_pretrained(tmp_path)
    models = [rk.build_model(x) for x in (config, AutoConfig.for_model(**config), tmp_path, tmp_path / "config.json")]
    assert len(set(models)) == 1


def test_configuration_is_left_as_it_was():
    config = older_spelling(LLAMA, ROPES["linear"], "type")
    before = copy.deepcopy(config)
    rk.build_model(config)
    assert config == before


def test_init_params_under_eval_shape():
    model = rk.build_model(ARCHITECTURES["qwen3, attention bias, tied"])

    def init(key):
        return rk.init_params(model, key, jnp.bfloat16)

    params, shapes = jax.jit(init)(jax.random.key(0)), jax.eval_shape(init, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
    layers = params["layers"]["query_projection"].astype(jnp.float32)
    assert float(layers.std()) == pytest.approx(model.config.initializer_range, rel=0.1)
    assert not np.array_equal(layers[0], layers[1])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "gpt2"}, ["gpt2", "llama, mistral, qwen2, qwen3"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "silu"]),
        ({"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}}, ["'su'", "llama3", "yarn"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads=4", "num_key_value_heads=3"]),
        ({"num_attention_heads": 5}, ["hidden size (32)", "attention heads (5)"]),
        ({"head_dim": 7}, ["head_dim", "7", "even"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["rope", "linear", "factor"]),
    ],
)
def test_unsupported_configurations_name_the_field(fields, words):
    with pytest.raises(ValueError) as error:
        rk.build_model(LLAMA | fields)
    assert all(word in str(error.value) for word in words), str(error.value)
