"""Loading and saving checkpoints: bit-equal both ways, and errors that say what is wrong."""

import json
import tracemalloc

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hugging_face import LLAMA, MISTRAL, QWEN2, QWEN3, ROPES, newer_spelling, random_model, torch, write_model
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import restkv_jax as rk
from restkv_jax.models import saving

CONFIGS = {
    "llama": newer_spelling(LLAMA, ROPES["llama3"]) | {"attention_bias": True, "mlp_bias": True, "head_dim": 10},
    "llama, tied": newer_spelling(LLAMA, ROPES["linear"]) | {"tie_word_embeddings": True},
    "mistral": MISTRAL | {"sliding_window": 7},
    "qwen2": QWEN2 | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": newer_spelling(QWEN3, ROPES["yarn, mscale"]) | {"attention_bias": True},
}
SHARD = 6000
Q = "model.layers.1.self_attn.q_proj.weight"


def assert_equal_params(one, other):
    def same(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))

    jax.tree.map(same, one, other)


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def edit_weights(directory, edit):
    """Rewrites `model.safetensors` after `edit(tensors)` has changed the dict."""
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def edit_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def model():
    return rk.build_model(CONFIGS["llama"])


def random_params(model, dtype=jnp.bfloat16):
    shapes = jax.eval_shape(lambda: rk.init_params(model, jax.random.key(0), dtype))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)


@pytest.fixture
def params(model):
    return random_params(model)


@pytest.fixture
def directory(tmp_path, model, params):
    rk.save_model(tmp_path / "model", model, params)
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path, model, params):
    rk.save_model(tmp_path / "sharded", model, params, max_shard_bytes=SHARD)
    return tmp_path / "sharded"


@pytest.mark.parametrize("shard_bytes", [2**32, SHARD], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_through_transformers_is_bit_equal(name, dtype, shard_bytes, tmp_path):
    theirs = random_model(CONFIGS[name], dtype=getattr(torch, dtype))
    write_model(tmp_path / "theirs", theirs, CONFIGS[name], max_shard_size=shard_bytes)
    model, params, tokenizer = rk.load_model(tmp_path / "theirs", dtype)
    assert tokenizer is None
    rk.save_model(tmp_path / "ours", model, params, max_shard_bytes=shard_bytes)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists() == (shard_bytes == SHARD)

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert again.dtype == theirs.dtype
    state, found = theirs.state_dict(), again.state_dict()
    assert state.keys() == found.keys()
    assert all(torch.equal(state[key], found[key]) for key in state)
    tokens = torch.arange(20)[None]
    assert torch.equal(again(tokens).logits, theirs(tokens).logits)

    again.save_pretrained(tmp_path / "again", max_shard_size=shard_bytes)
    model_again, params_again, _ = rk.load_model(tmp_path / "again", dtype)
    assert model_again == model
    assert_equal_params(params, params_again)


def test_shards_hold_at_most_what_is_asked(sharded):
    files = sorted(sharded.glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        tensors = load_file(file)
        assert sum(x.nbytes for x in tensors.values()) <= SHARD or len(tensors) == 1


def test_dtype_is_the_one_asked_for(directory, params):
    for dtype in (jnp.bfloat16, "float32", np.float16):
        _, loaded, _ = rk.load_model(directory, dtype)
        assert_equal_params(loaded, jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params))


def test_host_memory_stays_near_one_copy(tmp_path):
    model = rk.build_model(LLAMA | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 12})
    params = random_params(model, jnp.float32)
    rk.save_model(tmp_path / "model", model, params)
    rk.load_model(tmp_path / "model", jnp.float32)
    tracemalloc.start()
    rk.load_model(tmp_path / "model", jnp.float32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * sum(x.nbytes for x in jax.tree.leaves(params))


def test_tokenizer_goes_along(tmp_path, model, params):
    words = {"[PAD]": 0, "[UNK]": 1, "[EOS]": 2, "needle": 3, "hay": 4}
    backend = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", padding_side="left"
    )
    rk.save_model(tmp_path / "model", model, params, tokenizer)
    _, _, loaded = rk.load_model(tmp_path / "model")
    texts = ["hay hay needle hay", "needle straw"]
    assert loaded(texts, padding=True)["input_ids"] == tokenizer(texts, padding=True)["input_ids"]
    assert loaded.decode([4, 3]) == "hay needle"


@pytest.mark.parametrize(
    ("config", "generation", "eos", "pad"),
    [
        ({}, None, (2,), 0),
        ({"eos_token_id": [2, 9]}, None, (2, 9), 0),
        ({}, {"eos_token_id": [5, 6, 7], "pad_token_id": 8}, (5, 6, 7, 2), 8),
        ({"eos_token_id": [2, 9]}, {"eos_token_id": [9, 5]}, (9, 5, 2), 0),
        ({}, {"eos_token_id": 5}, (5, 2), 0),
        ({}, {"temperature": 0.6}, (2,), 0),
        ({"eos_token_id": None, "pad_token_id": None}, {"eos_token_id": None}, (), None),
    ],
)
def test_ending_ids(directory, config, generation, eos, pad):
    edit_json(directory / "config.json", eos_token_id=2, pad_token_id=0)
    edit_json(directory / "config.json", **config)
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    model, params, _ = rk.load_model(directory)
    assert (model.config.eos_token_ids, model.config.pad_token_id) == (eos, pad)
    rk.save_model(directory, model, params)
    assert rk.load_model(directory)[0] == model


def test_saving_replaces_the_model_and_keeps_other_files(sharded, model, params):
    (sharded / "notes.md").write_text("mine")
    (sharded / "generation_config.json").write_text(json.dumps({"eos_token_id": 60}))
    other = jax.tree.map(lambda x: -x, params)
    rk.save_model(sharded, model, other)
    assert contents(sharded).keys() == {"config.json", "model.safetensors", "notes.md"}
    loaded_model, loaded, _ = rk.load_model(sharded)
    assert loaded_model == model
    assert_equal_params(loaded, other)
    assert [path.name for path in sharded.parent.iterdir()] == [sharded.name]


def test_interrupted_saving_leaves_the_old_model(directory, model, params, monkeypatch):
    before = contents(directory)

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(saving, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        rk.save_model(directory, model, params)
    with pytest.raises(OSError, match="no space left"):
        rk.save_model(directory.parent / "new", model, params)
    assert contents(directory) == before
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_params_of_another_model_are_not_saved(tmp_path, model, params):
    fewer = {name: leaf for name, leaf in params.items() if name != "unembedding"}
    with pytest.raises(ValueError, match=r"missing \['unembedding'\]"):
        rk.save_model(tmp_path / "model", model, fewer)
    with pytest.raises(ValueError, match=r"'final_norm'.*found \(31,\), expected \(32,\)"):
        rk.save_model(tmp_path / "model", model, params | {"final_norm": params["final_norm"][:31]})
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file"):
        rk.save_model(tmp_path / "file", model, params)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_hub_id_downloads_only_what_is_needed(directory, params, monkeypatch):
    asked = {}

    def snapshot_download(model_id, allow_patterns):
        asked.update(id=model_id, patterns=allow_patterns)
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert_equal_params(rk.load_model("owner/name")[1], params)
    assert asked["id"] == "owner/name"
    wanted = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"]
    kept = list(huggingface_hub.utils.filter_repo_objects(wanted, allow_patterns=asked["patterns"]))
    assert kept == wanted
    unwanted = ["pytorch_model.bin", "consolidated.safetensors", "original/model.pth", "README.md", "run.py"]
    assert not list(huggingface_hub.utils.filter_repo_objects(unwanted, allow_patterns=asked["patterns"]))


def test_hub_that_does_not_answer(monkeypatch):
    def snapshot_download(model_id, allow_patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find an appropriate snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match=r"path_or_id='owner/name'.*neither a directory.*appropriate snapshot"):
        rk.load_model("owner/name")


@pytest.mark.parametrize("path", ["/no/such/place", "./missing", "a/b/c", "..", ""])
def test_path_that_does_not_exist(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        rk.load_model(path)
    assert "does not exist" in str(error.value) or "no weights" in str(error.value)


def test_path_of_a_file(directory):
    with pytest.raises(NotADirectoryError, match=r"path_or_id=.*model\.safetensors' is a file"):
        rk.load_model(directory / "model.safetensors")


def test_dtype_that_is_not_supported(directory):
    with pytest.raises(ValueError, match=r"dtype='int8' is not supported; supported: float32, bfloat16, float16"):
        rk.load_model(directory, jnp.int8)


def test_directory_without_weights(directory):
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights: neither model\.safetensors nor"):
        rk.load_model(directory)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused(directory, file):
    (directory / "model.safetensors").rename(directory / file)
    with pytest.raises(ValueError, match=rf"pickled weights \({file}\): refused, since unpickling runs code"):
        rk.load_model(directory)


def test_directory_without_configuration(directory):
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        rk.load_model(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        rk.load_model(directory)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "gpt2"}, r"model_type='gpt2' is not a supported architecture; supported: llama, mistral"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised weights .*not supported"),
    ],
)
def test_configuration_that_is_not_supported(directory, fields, words):
    edit_json(directory / "config.json", **fields)
    with pytest.raises(ValueError, match=words):
        rk.load_model(directory)


def test_missing_shard(sharded):
    (sharded / sorted(sharded.glob("*.safetensors"))[1].name).unlink()
    with pytest.raises(FileNotFoundError, match=r"shard 'model-00002-of-\d+\.safetensors', which is missing"):
        rk.load_model(sharded)


def test_shard_that_the_index_does_not_name(sharded):
    index = sharded / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    last = max(files.values())
    lost = [name for name, file in files.items() if file == last]
    edit_json(index, weight_map={name: file for name, file in files.items() if file != last})
    with pytest.raises(ValueError, match=rf"weights lack '{lost[0]}'"):
        rk.load_model(sharded)


def test_index_without_map(sharded):
    (sharded / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="no 'weight_map'"):
        rk.load_model(sharded)


def test_damaged_file(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        rk.load_model(directory)


def test_missing_tensor(directory):
    edit_weights(directory, lambda tensors: tensors.pop(Q))
    with pytest.raises(ValueError, match=rf"weights lack '{Q}'"):
        rk.load_model(directory)


@pytest.mark.parametrize("name", [Q, "model.embed_tokens.weight", "model.norm.weight"])
def test_tensor_of_the_wrong_shape(directory, name):
    shapes = {}

    def shorten(tensors):
        shapes["expected"] = tensors[name].shape
        tensors[name] = np.ascontiguousarray(tensors[name][:-1])
        shapes["found"] = tensors[name].shape

    edit_weights(directory, shorten)
    with pytest.raises(ValueError) as error:
        rk.load_model(directory)
    assert f"{name!r} has the wrong shape: found {shapes['found']}, expected {shapes['expected']}" in str(error.value)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite(directory, number):
    def spoil(tensors):
        tensors[Q] = tensors[Q].copy()
        tensors[Q][3, 4] = number

    edit_weights(directory, spoil)
    for dtype in ("bfloat16", "float32"):
        with pytest.raises(ValueError, match=rf"'{Q}' holds NaN or infinity"):
            rk.load_model(directory, dtype)


def test_overflow_of_float16_is_named(directory):
    edit_weights(directory, lambda tensors: tensors.update({Q: tensors[Q] * ml_dtypes.bfloat16(1e6)}))
    with pytest.raises(ValueError, match=rf"'{Q}'.*read as float16"):
        rk.load_model(directory, jnp.float16)
    rk.load_model(directory, jnp.bfloat16)


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "base_model.lora_A.weight", "score.weight"])
def test_unknown_tensor(directory, name):
    edit_weights(directory, lambda tensors: tensors.update({name: np.zeros(3, np.float32)}))
    with pytest.raises(ValueError, match=rf"unknown tensors '{name}'"):
        rk.load_model(directory)


def test_integer_tensor(directory):
    edit_weights(directory, lambda tensors: tensors.update({Q: np.zeros(tensors[Q].shape, np.int8)}))
    with pytest.raises(ValueError, match=rf"'{Q}' is stored as I8, which is not supported; supported"):
        rk.load_model(directory)


def test_harmless_tensors_are_ignored(tmp_path):
    model = rk.build_model(CONFIGS["llama, tied"])
    params = random_params(model)
    rk.save_model(tmp_path / "model", model, params)
    extra = {
        "model.rotary_emb.inv_freq": np.zeros(4, np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32),
    }
    edit_weights(tmp_path / "model", lambda tensors: tensors.update(extra))
    assert_equal_params(rk.load_model(tmp_path / "model")[1], params)
