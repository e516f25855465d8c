"""GGUF: the model that was converted, its tokenizer, and refusals that name the file."""

import pathlib
import re
import runpy
import subprocess
import sys

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import BYTE_LEVEL, SENTENCEPIECE, byte_level, no_tokenizer, sentencepiece, write_gguf
from hugging_face import (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    left_padded,
    newer_spelling,
    our_logits,
    random_model,
    reference_logits,
    torch,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.gguf import dequant
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import restkv_jax as rk
from restkv_jax.models.gguf import read_gguf

ROOT = pathlib.Path(__file__).parents[2]
TYPES = gguf.GGMLQuantizationType
QUERY = "model.layers.0.self_attn.q_proj.weight"
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SCALING = "llama.rope.scaling."
MODELS = {
    "llama": (newer_spelling(LLAMA, {"rope_type": "default", "rope_theta": 500.0}), {"llama.rope.freq_base": 500.0}),
    "llama, no base": (LLAMA, {}),
    "llama, one key for all queries, tied": (LLAMA | {"num_key_value_heads": 1, "tie_word_embeddings": True}, {}),
    "llama, wide heads": (LLAMA | {"head_dim": 14}, {}),
    "llama, biases": (LLAMA | {"attention_bias": True, "mlp_bias": True}, {}),
    "llama, linear": (
        newer_spelling(LLAMA, {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}),
        {SCALING + "type": "linear", SCALING + "factor": 3.0},
    ),
    "llama, older linear": (
        newer_spelling(LLAMA, {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}),
        {"llama.rope.scale_linear": 3.0},
    ),
    "llama, linear without a type": (
        newer_spelling(LLAMA, {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}),
        {SCALING + "factor": 3.0},
    ),
    "llama, factor 0": (LLAMA, {SCALING + "factor": 0.0}),
    "llama, yarn": (
        newer_spelling(
            LLAMA,
            {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
        ),
        {SCALING + "type": "yarn", SCALING + "factor": 4.0, SCALING + "original_context_length": 16},
    ),
    "mistral": (MISTRAL, {}),
    "qwen2, tied": (QWEN2 | {"tie_word_embeddings": True}, {}),
    "qwen3": (newer_spelling(QWEN3, {"rope_type": "default", "rope_theta": 1e6}), {"qwen3.rope.freq_base": 1e6}),
}
WIDE = LLAMA | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 20}


def weights(model, config):
    tied = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
    return {name: x.numpy() for name, x in model.state_dict().items() if name not in tied}


def random_tensors(config):
    return weights(random_model(config), config)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", LLAMA, random_tensors(LLAMA))


def agree(path, model, config):
    ours, params, _ = rk.load_model(path, dtype=jnp.float32)
    tokens, mask = left_padded(1, (29, 17), config["vocab_size"])
    found, expected = our_logits(ours, params, tokens, mask), reference_logits(model, tokens, mask)
    np.testing.assert_allclose(found[mask], expected[mask], rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_model_that_was_converted(tmp_path, name):
    config, fields = MODELS[name]
    model = random_model(config)
    agree(write_gguf(tmp_path / "model.gguf", config, weights(model, config), fields), model, config)


def test_the_frequencies_of_llama_3_are_recovered(tmp_path):
    config = newer_spelling(LLAMA | {"head_dim": 16}, {"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3)
    model = random_model(config)
    unscaled = 5e5 ** -(np.arange(0, 16, 2) / 16)
    divisors = (unscaled / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    assert divisors.max() > 1 and ((divisors > 1.01) & (divisors < 7.99)).any()
    tensors, fields = weights(model, config) | {"rope_freqs.weight": divisors}, {"llama.rope.freq_base": 5e5}
    agree(write_gguf(tmp_path / "model.gguf", config, tensors, fields), model, config)
    other = tensors | {"rope_freqs.weight": np.sqrt(divisors)}
    with pytest.raises(ValueError, match=r"other\.gguf: rope_freqs.weight does not hold the frequencies of Llama 3"):
        rk.load_model(write_gguf(tmp_path / "other.gguf", config, other, fields))


def random_blocks(kind, elements):
    """Bytes in which whatever is read as a float16 is finite."""
    size, stored = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(kind.value).integers(0, 256, elements // size * stored, dtype=np.uint8)
    return random & 0xBB


def test_every_quantisation_is_what_transformers_makes_of_it(tmp_path, monkeypatch):
    tensors = {name: x for name, x in random_tensors(WIDE).items() if x.ndim == 1 or "self_attn" in name}
    embedding = {"model.embed_tokens.weight": np.zeros((20, 256), np.float32)}
    for kind in (TYPES(kind) for kind in dequant.GGML_BLOCK):
        blocks = random_blocks(kind, 256 * 256).reshape(256, -1)
        monkeypatch.setattr(gguf, "quantize", lambda x, _: blocks[: len(x)] if x.ndim > 1 else x)  # noqa: B023
        path = write_gguf(tmp_path / "model.gguf", WIDE, tensors | embedding, quantisation=kind)
        stored = read_gguf(path).tensors
        expected = dequant.dequantize(torch.from_numpy(blocks.reshape(-1)), kind.value).reshape(256, 256).numpy()
        value, query = stored["model.layers.0.self_attn.o_proj.weight"], stored[QUERY]
        np.testing.assert_allclose(value.read(slice(3, 90)), expected[3:90], rtol=1e-6, err_msg=kind.name)
        halves = expected.reshape(4, 32, 2, 256).swapaxes(1, 2).reshape(256, 256)
        np.testing.assert_allclose(query.read(slice(30, 99)), halves[30:99], rtol=1e-6, err_msg=kind.name)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"])
def test_quantised_weights_are_near_those_that_were_quantised(tmp_path, kind):
    tensors = random_tensors(WIDE)
    stored = read_gguf(write_gguf(tmp_path / "model.gguf", WIDE, tensors, quantisation=TYPES[kind])).tensors
    assert set(stored) == set(tensors)
    bits = {"F16": 11, "BF16": 8, "Q8_0": 7, "Q5_0": 4, "Q5_1": 4, "Q4_0": 3, "Q4_1": 3}[kind]
    for name, tensor in tensors.items():
        np.testing.assert_allclose(stored[name].read(slice(None)), tensor, atol=np.abs(tensor).max() / 2**bits)


TEXTS = ["hello, the  world\n\nheLLo 1234", "<|s|>hello<|e|>", "größer ▁ 漢字 🙂", "", " ", "<s>the</s> t"]


@pytest.mark.parametrize("writer, size", [(byte_level, len(BYTE_LEVEL)), (sentencepiece, len(SENTENCEPIECE))])
def test_the_tokenizer_is_that_of_transformers(tmp_path, writer, size):
    config = LLAMA | {"vocab_size": size}
    write_gguf(tmp_path / "model.gguf", config, random_tensors(config), tokenizer=writer)
    expected, found = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf"), rk.load_model(tmp_path)[2]
    for text in TEXTS:
        ids = expected(text)["input_ids"]
        assert found(text)["input_ids"] == ids
        assert found.decode(ids) == expected.decode(ids)
        assert found.decode(ids, skip_special_tokens=True) == expected.decode(ids, skip_special_tokens=True)
    assert found.special_tokens_map == expected.special_tokens_map
    assert found.chat_template == expected.chat_template
    if found.chat_template:
        chat = [{"role": "user", "content": "hello"}]
        assert found.apply_chat_template(chat, tokenize=False) == "<|s|>user: hello<|e|>"


@pytest.mark.parametrize("fields, first", [({}, [1]), ({"tokenizer.ggml.add_bos_token": False}, [])])
def test_texts_of_llama_3_begin_with_its_token_unless_the_file_says_otherwise(tmp_path, fields, first):
    def llama3(writer, vocab_size):
        byte_level(writer, vocab_size, "llama-bpe")

    path = write_gguf(tmp_path / "model.gguf", LLAMA, random_tensors(LLAMA), fields, tokenizer=llama3)
    assert rk.load_model(path)[2]("hello")["input_ids"] == [*first, 8, 9, 6]  # he, ll, o


def test_both_end_tokens_end_a_text(tmp_path):
    fields = {"tokenizer.ggml.eot_token_id": 5}
    path = write_gguf(tmp_path / "model.gguf", LLAMA, random_tensors(LLAMA), fields)
    assert rk.load_model(path)[0].config.eos_token_ids == (0, 5)


def test_pytorch_is_not_needed(path):
    code = """
import importlib.util, sys

class WithoutTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(name)

found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "torch" else found(name, package)
sys.meta_path.insert(0, WithoutTorch())
import restkv_jax as rk
assert rk.load_model(sys.argv[1])[2].decode([3, 4]) == 'he'
"""
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, cwd=ROOT)


def test_a_directory_with_one_file_is_that_file(tmp_path, path):
    (tmp_path / "any.gguf").symlink_to(path)
    assert rk.load_model(tmp_path)[0] == rk.load_model(path)[0]
    (tmp_path / "other.gguf").symlink_to(path)
    with pytest.raises(ValueError, match=r"several GGUF files \(any.gguf, other.gguf\); give the path of one"):
        rk.load_model(tmp_path)


REFUSED = {
    "another architecture": ({"general.architecture": "mamba"}, "architecture 'mamba' is not supported in GGUF"),
    "experts": ({"llama.expert_count": 8}, "llama.expert_count=8 is not supported"),
    "partial rotation": (
        {"llama.rope.dimension_count": 4},
        "rope.dimension_count=4 is not supported where heads have 8",
    ),
    "another scaling": ({SCALING + "type": "longrope"}, "rope.scaling.type='longrope' is not supported"),
    "too many layers": ({"llama.block_count": 10**9}, "llama.block_count=1000000000 exceeds the number of tensors"),
    "no width": ({"llama.embedding_length": 0}, "llama.embedding_length=0 must be one positive number"),
    "heads by layer": ({"llama.attention.head_count": [4, 2]}, r"head_count=\[4, 2\] must be one positive number"),
    "a part": ({"split.count": 3}, "it is one of 3 parts; join them"),
    "a token beyond": ({"tokenizer.ggml.unknown_token_id": 99}, "its tokenizer cannot be read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_by_name(tmp_path, name):
    fields, message = REFUSED[name]
    path = write_gguf(tmp_path / "model.gguf", LLAMA, random_tensors(LLAMA), fields)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: .*{message}[^\n]*$"):
        rk.load_model(path)


def test_missing_parts_are_named(tmp_path):
    tensors = random_tensors(LLAMA)
    path = write_gguf(tmp_path / "model.gguf", LLAMA, tensors, without=("llama.block_count",))
    with pytest.raises(ValueError, match=r"model.gguf: 'llama.block_count' is missing"):
        rk.load_model(path)
    path = write_gguf(tmp_path / "bare.gguf", LLAMA, tensors, tokenizer=no_tokenizer)
    with pytest.raises(ValueError, match=r"bare.gguf: it has no tokenizer"):
        rk.load_model(path)
    path = write_gguf(tmp_path / "less.gguf", LLAMA, {k: x for k, x in tensors.items() if k != QUERY})
    with pytest.raises(ValueError, match=rf"less.gguf: the weights lack '{QUERY}'"):
        rk.load_model(path)
    path = write_gguf(tmp_path / "more.gguf", LLAMA, tensors | {"blk.0.strange.weight": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match=r"more.gguf: unknown tensors 'blk.0.strange.weight'"):
        rk.load_model(path)


def test_a_quantisation_that_cannot_be_undone_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "quantize", lambda x, _: np.zeros((len(x), 40), np.uint8) if x.ndim > 1 else x)
    path = write_gguf(tmp_path / "model.gguf", LLAMA, random_tensors(LLAMA), quantisation=TYPES.Q8_1)
    with pytest.raises(ValueError, match=r"model.gguf: tensor '.*' is quantised as Q8_1, which"):
        rk.load_model(path)


@pytest.mark.parametrize("length", [0, 3, 4, 12, 24, 300, 2000, -32, -1])
def test_a_truncated_file_is_refused(tmp_path, path, length):
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"cut.gguf is (damaged|not a GGUF file)[^\n]*$"):
        rk.load_model(tmp_path / "cut.gguf")


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'missing.gguf' does not exist; give a directory .* a GGUF file"):
        rk.load_model("missing.gguf")
    (tmp_path / "model.gguf").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match=r"model.gguf is a pointer of git-lfs, not the file itself"):
        rk.load_model(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(ValueError, match=r"model.gguf is not a GGUF file: it begins with b'PK"):
        rk.load_model(tmp_path)


def test_a_corrupted_header_is_refused_or_harmless(tmp_path, path):
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    header = whole.index(b"blk.0.attn_norm.weight")
    broken = tmp_path / "broken.gguf"
    for _ in range(150):
        copy = bytearray(whole)
        start = int(rng.choice([rng.integers(0, 400), rng.integers(0, header + 1500)]))
        copy[start : start + 8] = rng.choice([b"\xff" * 8, b"\0" * 8, rng.bytes(8), b"\0" * 7 + b"\x80"])
        broken.write_bytes(copy)
        try:
            read_gguf(broken)
        except ValueError as error:
            assert str(broken) in str(error)


@pytest.fixture(scope="session")
def smollm2():
    return runpy.run_path(str(ROOT / "scripts" / "fetch_smollm2.py"))["fetch_smollm2"]()


def transformers_model(path):
    """What `from_pretrained` gives for the file, without the package `accelerate` that it asks for."""
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    return model


@pytest.mark.slow
def test_smollm2_is_the_model_of_transformers(smollm2):
    ours, params, tokenizer = rk.load_model(smollm2, dtype=jnp.float32)
    theirs = transformers_model(smollm2)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="np")
    reference = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    assert (
        reference.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] == prompt["input_ids"][0].tolist()
    )
    tokens, mask = prompt["input_ids"].astype(np.int32), prompt["attention_mask"].astype(bool)
    expected = reference_logits(theirs, tokens, mask)
    np.testing.assert_allclose(our_logits(ours, params, tokens, mask), expected, rtol=0, atol=1e-3)

    longer = [{"role": "user", "content": "Explain in a few sentences why the sky is blue."}]
    prompt = tokenizer.apply_chat_template(longer, add_generation_prompt=True, return_dict=True, return_tensors="np")
    greedy = theirs.generate(**{k: torch.tensor(x) for k, x in prompt.items()}, max_new_tokens=30, do_sample=False)
    found = rk.generate(ours, params, *map(jnp.asarray, prompt.values()), policy=rk.full(), max_new_tokens=30)
    assert found.tokens[0].tolist() == greedy[0, prompt["input_ids"].shape[1] :].tolist()
    answer = rk.generate(ours, params, tokens, mask, policy=rk.full(), max_new_tokens=30)
    assert "Paris" in tokenizer.decode(answer.tokens[0, : int(answer.lengths[0])])
