"""Checkpoints that are refused: by name, in one line, before anything is allocated or any of their code runs."""

import builtins
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

import restkv_jax as rk
from restkv_jax.commands.cli import main
from restkv_jax.models import tokenizer as tokenizers

Q = "model.layers.1.self_attn.q_proj.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
INDEX = "model.safetensors.index.json"
DEEP = "[" * 100_000
RUN_ME = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nclass Own: pass\n"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture
def directory(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


def edit_json(path, **fields):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | fields))


def add_tensors(directory, **arrays):
    """Adds tensors beside the query projection of layer 1, by the suffix of their names."""
    tensors = load_file(directory / "model.safetensors")
    tensors |= {Q.removesuffix(".weight") + "." + suffix: array for suffix, array in arrays.items()}
    save_file(tensors, directory / "model.safetensors")


def rename_weights(directory, name):
    (directory / "model.safetensors").rename(directory / name)


def rename_tensors(directory, rename):
    tensors = load_file(directory / "model.safetensors")
    save_file({rename(name): x for name, x in tensors.items()}, directory / "model.safetensors")


def set_index(directory, weight_map):
    rename_weights(directory, "model-1.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def write_raw(directory, header, data=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(header) if length is None else length
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", length) + header + data)


def tensor(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def only_tokenizer(directory, name, content=""):
    (directory / "tokenizer.json").unlink()
    (directory / name).write_text(content)


def assert_refused(directory, capsys, monkeypatch, words):
    """`load_model` raises one line, and the command line prints it and returns 2."""
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked a question"))
    with pytest.raises((ValueError, OSError), match=words) as error:
        rk.load_model(directory)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    capsys.readouterr()
    code = main(["generate", "Hello", "--model", str(directory), "--budget", "50", "--max-new-tokens", "2"])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert "cannot be loaded" in err and "Traceback" not in err


SMALL = np.ones(3, np.float32)
INTEGERS = np.ones((4, 4), np.int32)
FORMATS = {
    "MLX by its configuration": (
        lambda d: edit_json(d / "config.json", quantization={"group_size": 64, "bits": 3}),
        r"quantised weights \(quantization in config.json: MLX\)",
    ),
    "MLX by its tensors": (lambda d: add_tensors(d, scales=SMALL, biases=SMALL), r"MLX: '.*q_proj\.biases'"),
    "GPTQ by its configuration": (
        lambda d: edit_json(d / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        r"quantised weights \(quantization_config in config.json: gptq\)",
    ),
    "GPTQ by its tensors": (
        lambda d: add_tensors(d, qweight=INTEGERS, qzeros=INTEGERS, g_idx=INTEGERS[0], scales=SMALL),
        r"GPTQ or AWQ: '.*q_proj\.g_idx'",
    ),
    "AWQ by its tensors": (lambda d: add_tensors(d, qweight=INTEGERS, qzeros=INTEGERS, scales=SMALL), "GPTQ or AWQ"),
    "fp8 with scales": (lambda d: add_tensors(d, weight_scale_inv=SMALL), r"fp8 .*'.*q_proj\.weight_scale_inv'"),
    "fp8 by its dtype": (
        lambda d: add_tensors(d, weight=np.ones((32, 32), ml_dtypes.float8_e4m3fn)),
        f"'{Q}' is stored as F8_E4M3",
    ),
    "bitsandbytes": (
        lambda d: add_tensors(d, **{"weight.absmax": SMALL, "weight.quant_state.bitsandbytes__nf4": INTEGERS}),
        r"bitsandbytes: '.*q_proj\.weight\.absmax'",
    ),
    "bitsandbytes, 8 bits": (lambda d: add_tensors(d, SCB=SMALL), r"bitsandbytes: '.*q_proj\.SCB'"),
    "quantised by an unknown method": (
        lambda d: edit_json(d / "config.json", quantization_config=["new"]),
        r"quantization_config in config.json: an unknown method",
    ),
    "adapter by its tensors": (
        lambda d: add_tensors(d, **{"lora_A.weight": SMALL}),
        r"unknown tensors '.*lora_A\.weight', which are those of an adapter",
    ),
    "adapter alone": (
        lambda d: (
            rename_weights(d, "adapter_model.safetensors"),
            edit_json(d / "adapter_config.json", peft_type="LORA"),
            (d / "config.json").unlink(),
        ),
        r"holds an adapter \(adapter_config\.json, adapter_model\.safetensors\).*merge_and_unload",
    ),
    "adapter beside the model": (
        lambda d: edit_json(d / "adapter_config.json", peft_type="LORA"),
        r"holds an adapter \(adapter_config\.json\)",
    ),
    "Mistral's own format": (
        lambda d: (rename_weights(d, "consolidated.safetensors"), edit_json(d / "params.json", dim=32)),
        r"no weights.*consolidated\.safetensors belongs to Mistral's own format",
    ),
    "shards without an index": (
        lambda d: rename_weights(d, "model-00001-of-00002.safetensors"),
        r"no weights: neither .*, but model-00001-of-00002\.safetensors",
    ),
    "index of pickled files": (
        lambda d: set_index(d, {Q: "pytorch_model-1.pt"}),
        r"only pickled weights \(pytorch_model-1\.pt\): refused, since unpickling runs code",
    ),
    "index of pickled files alone": (
        lambda d: (rename_weights(d, "x"), edit_json(d / "pytorch_model.bin.index.json", weight_map={})),
        r"only pickled weights \(pytorch_model\.bin\): refused",
    ),
    "names of another layout": (
        lambda d: rename_tensors(d, lambda name: f"transformer.h.{name}"),
        r"lack 'model\.embed_tokens\.weight'.*stored are 'transformer\.h\.model\.embed_tokens\.weight'",
    ),
    "names that meet": (
        lambda d: add_tensors(d, **{"_orig_mod.weight": np.ones((32, 32), np.float32)}),
        rf"'.*_orig_mod\.weight' .*'{Q}' are both|'{Q}' and '.*_orig_mod\.weight' are both",
    ),
    "head of another shape": (
        lambda d: rename_tensors(d, lambda name: "lm_head.weight" if name == "model.norm.weight" else name),
        r"lack 'model\.norm\.weight'",
    ),
    "pointer of git-lfs: weights": (
        lambda d: (d / "model.safetensors").write_text(POINTER),
        r"model\.safetensors is a git-lfs pointer",
    ),
    "pointer of git-lfs: shard": (
        lambda d: (set_index(d, {Q: "model-1.safetensors"}), (d / "model-1.safetensors").write_text(POINTER)),
        r"model-1\.safetensors is a git-lfs pointer",
    ),
    "pointer of git-lfs: index": (
        lambda d: (set_index(d, {}), (d / INDEX).write_text(POINTER)),
        r"index\.json is a git-lfs pointer",
    ),
    "pointer of git-lfs: configuration": (
        lambda d: (d / "config.json").write_text(POINTER),
        r"config\.json is a git-lfs pointer",
    ),
    "pointer of git-lfs: tokenizer": (
        lambda d: (d / "tokenizer.json").write_text(POINTER),
        r"tokenizer\.json is a git-lfs pointer",
    ),
    "pointer of git-lfs: tokenizer.model": (
        lambda d: only_tokenizer(d, "tokenizer.model", POINTER),
        r"tokenizer\.model is a git-lfs pointer",
    ),
}
"""What makes a good checkpoint a bad one, and the words that name the cause."""

TOKENIZERS = {
    "code for the tokenizer": (
        lambda d: (
            (d / "own.py").write_text(RUN_ME),
            edit_json(d / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]}),
        ),
        r"tokenizer_config\.json names code .*own\.Own.*: refused",
    ),
    "code for the tokenizer, older": (
        lambda d: (
            (d / "own.py").write_text(RUN_ME),
            edit_json(d / "tokenizer_config.json", auto_map=["own.Own", None]),
        ),
        r"tokenizer_config\.json names code",
    ),
    "tekken.json alone": (lambda d: only_tokenizer(d, "tekken.json", "{}"), r"tekken\.json is the only vocabulary"),
    "not JSON": (lambda d: (d / "tokenizer.json").write_text("{"), r"tokenizer\.json cannot be loaded"),
    "a list": (lambda d: (d / "tokenizer.json").write_text("[]"), r"tokenizer\.json cannot be loaded"),
    "nothing in it": (lambda d: (d / "tokenizer.json").write_text("{}"), r"tokenizer\.json cannot be loaded"),
    "nested deeply": (lambda d: (d / "tokenizer.json").write_text(DEEP), r"tokenizer\.json cannot be loaded"),
    "not UTF-8": (lambda d: (d / "tokenizer.json").write_bytes(b'{"a": "\xff"}'), r"tokenizer\.json cannot be loaded"),
    "cut off": (
        lambda d: (d / "tokenizer.json").write_text((d / "tokenizer.json").read_text()[:1000]),
        r"tokenizer\.json cannot be loaded",
    ),
    "settings in a list": (lambda d: (d / "tokenizer_config.json").write_text("[]"), r"tokenizer_config\.json holds a"),
    "settings nested deeply": (
        lambda d: (d / "tokenizer_config.json").write_text(DEEP),
        r"tokenizer_config\.json is not valid JSON.*nested too deeply",
    ),
    "settings of another type": (
        lambda d: edit_json(d / "tokenizer_config.json", added_tokens_decoder=[1]),
        r"tokenizer\.json cannot be loaded",
    ),
    "settings that fail in use": (
        lambda d: edit_json(d / "tokenizer_config.json", model_max_length="long"),
        r"tokenizer\.json cannot be loaded",
    ),
    "vocabulary in a list": (
        lambda d: only_tokenizer(d, "vocab.json", "[1]"),
        r"vocab\.json (cannot be loaded|gives the tokenizer no vocabulary)|the tokenizer of .*vocab\.json cannot be",
    ),
    "tokenizer.model that is text": (
        lambda d: only_tokenizer(d, "tokenizer.model", "text"),
        r"tokenizer\.model (is the only vocabulary; install .*pip install|cannot be loaded)",
    ),
}

SCALAR = {"a": tensor([1], [0, 4])}
HEADERS = {
    "empty": (lambda d: (d / "model.safetensors").write_bytes(b""), "header"),
    "seven bytes": (lambda d: (d / "model.safetensors").write_bytes(b"1234567"), "header"),
    "header beyond the file": (lambda d: write_raw(d, SCALAR, b"1234", 10**6), "header"),
    "header of 2^63": (lambda d: write_raw(d, SCALAR, b"1234", 2**63), "header"),
    "header that is a list": (lambda d: write_raw(d, [1]), "header"),
    "header nested deeply": (lambda d: write_raw(d, b'{"a":' * 100_000), "header"),
    "header that is not UTF-8": (lambda d: write_raw(d, b"\xff\xfe"), "header"),
    "negative offset": (lambda d: write_raw(d, {"a": tensor([1], [-4, 4])}, b"1234"), "header"),
    "negative size": (lambda d: write_raw(d, {"a": tensor([-1], [0, 4])}, b"1234"), "header"),
    "huge size": (lambda d: write_raw(d, {"a": tensor([2**62, 4], [0, 4])}, b"1234"), "overflow"),
    "huge offset": (lambda d: write_raw(d, {"a": tensor([1], [2**60, 2**60 + 4])}, b"1234"), "offset"),
    "overlap": (lambda d: write_raw(d, {"a": tensor([2], [0, 8]), "b": tensor([1], [4, 8])}, b"12345678"), "offset"),
    "hole": (lambda d: write_raw(d, {"a": tensor([1], [4, 8])}, b"12345678"), "offset"),
    "data cut off": (lambda d: write_raw(d, {"a": tensor([2], [0, 8])}, b"1234"), "not fully covered"),
    "data left over": (lambda d: write_raw(d, SCALAR, b"12345678"), "not fully covered"),
    "unknown dtype": (lambda d: write_raw(d, {"a": tensor([1], [0, 4], "Q9")}, b"1234"), "Q9"),
}

SHARDS = {
    "above": "../model-1.safetensors",
    "above, further down": "a/../../model-1.safetensors",
    "absolute": "/etc/passwd",
    "hidden": ".model-1.safetensors",
    "on another system": "..\\model-1.safetensors",
    "nothing": "",
    "a number": 3,
    "null": None,
    "a list": ["model-1.safetensors"],
    "an object": {"model-1.safetensors": 1},
    "long": "m" * 10_000,
    "a byte of zero": "model-1.safetensors\0",
}

FILES = {
    "configuration in a list": ("config.json", "[]", r"config\.json holds a JSON list where an object belongs"),
    "configuration of text": ("config.json", '"llama"', r"config\.json holds a JSON str"),
    "configuration nested deeply": ("config.json", DEEP, r"config\.json is not valid JSON.*nested too deeply"),
    "objects nested deeply": ("config.json", '{"a":' * 100_000, r"config\.json is not valid JSON.*nested too deeply"),
    "configuration that is not UTF-8": ("config.json", b"\xff", r"config\.json is not valid JSON"),
    "number of many digits": ("config.json", '{"a": ' + "9" * 5000 + "}", r"config\.json is not valid JSON"),
    "generation in a list": ("generation_config.json", "[2]", r"generation_config\.json holds a JSON list"),
    "end beyond the vocabulary": (
        "generation_config.json",
        '{"eos_token_id": [2, 1000000000000]}',
        r"generation_config\.json: eos_token_id=1000000000000",
    ),
    "end of text": (
        "generation_config.json",
        '{"eos_token_id": "</s>"}',
        r"generation_config\.json: eos_token_id='</s>'",
    ),
    "padding in a list": ("generation_config.json", '{"pad_token_id": [1]}', r"config\.json: pad_token_id=\[1\]"),
    "negative padding": ("generation_config.json", '{"pad_token_id": -1}', r"generation_config\.json: pad_token_id=-1"),
}


def every(cases, prefix):
    return {f"{prefix}: {name}": case for name, case in cases.items()}


BAD = (
    every(FORMATS, "format")
    | every(TOKENIZERS, "tokenizer")
    | every({name: (spoil, rf"safetensors is damaged .*{word}") for name, (spoil, word) in HEADERS.items()}, "file")
    | every(
        {
            name: (
                lambda d, file=file: set_index(d, {Q: "model-1.safetensors", "x": file}),
                r"index\.json names the shard .*, which is not the name of a file in the same directory",
            )
            for name, file in SHARDS.items()
        },
        "shard",
    )
    | every(
        {
            name: (lambda d, file=file, text=text: (d / file).write_bytes(
                text if isinstance(text, bytes) else text.encode()
            ), words)
            for name, (file, text, words) in FILES.items()
        },
        "JSON",
    )
    | {
        "index: a list": (lambda d: (set_index(d, {}), (d / INDEX).write_text("[]")), r"holds a JSON list"),
        "index: map in a list": (lambda d: set_index(d, [Q]), "no 'weight_map'"),
        "index: empty map": (lambda d: set_index(d, {}), "no 'weight_map'"),
        "index: vast sizes": (lambda d: edit_json(d / "config.json", vocab_size=2**24), "has the wrong shape"),
        "index: vast heads": (lambda d: edit_json(d / "config.json", num_attention_heads=10**12), "attention_heads="),
        "index: no RoPE": (lambda d: edit_json(d / "config.json", rope_parameters={"rope_theta": 0}), "rope_theta=0"),
    }
)  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused_by_name(name, directory, capsys, monkeypatch):
    spoil, words = BAD[name]
    spoil(directory)
    assert_refused(directory, capsys, monkeypatch, words)
    assert not (directory / "ran").exists()


def test_tensor_in_two_shards(directory, capsys, monkeypatch):
    tensors = load_file(directory / "model.safetensors")
    save_file({Q: tensors[Q]}, directory / "model-2.safetensors")
    set_index(directory, {Q: "model-2.safetensors", "x": "model-1.safetensors"})
    assert_refused(directory, capsys, monkeypatch, f"tensor '{Q}' is in another shard too")


@pytest.mark.parametrize("settings", [None, {"tokenizer_class": "LlamaTokenizer"}])
def test_tokenizer_that_is_missing_is_not_passed_over_in_silence(directory, settings, capsys):
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").unlink()
    if settings is not None:
        edit_json(directory / "tokenizer_config.json", **settings)
    with pytest.warns(UserWarning, match=r"has no tokenizer.*add the model's tokenizer\.json.*None"):
        assert rk.load_model(directory)[2] is None
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        tokenizers.load_tokenizer(directory)
    assert main(["generate", "Hello", "--model", str(directory), "--budget", "50"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err


def test_sentencepiece_model_says_what_to_install(directory, monkeypatch):
    only_tokenizer(directory, "tokenizer.model", "anything")
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=r'pip install "transformers\[sentencepiece,tiktoken\]"`, or add'):
        rk.load_model(directory)


def test_sentencepiece_model_alone(directory):
    sentencepiece = pytest.importorskip("sentencepiece")
    only_tokenizer(directory, "tokenizer.model")
    text = [f"the quick brown fox {i} jumps over {i * 7} lazy dogs" for i in range(500)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=80,
        model_type="bpe",
        hard_vocab_limit=False,
    )
    tokenizer = rk.load_model(directory)[2]
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    assert tokenizer.encode("the lazy fox", add_special_tokens=False) == theirs.encode("the lazy fox")


@pytest.mark.slow
def test_files_are_utf8_whatever_the_locale(directory):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "é{{ messages[0]['content'] }}"
    model, params, _ = rk.load_model(directory)
    rk.save_model(directory, model, params, tokenizer)
    fields = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(fields | {"name": "é"}, ensure_ascii=False), encoding="utf-8")
    code = "import sys, restkv_jax as rk; rk.save_model(sys.argv[1] + '2', *rk.load_model(sys.argv[1]))"
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, "-c", code, str(directory)], check=True, env=ascii_only)
    assert rk.load_model(f"{directory}2")[2].chat_template == tokenizer.chat_template


def test_nothing_is_allocated_for_what_is_refused(directory):
    edit_json(directory / "config.json", vocab_size=2**24, hidden_size=2**24, intermediate_size=2**24)
    with pytest.raises(ValueError, match="has the wrong shape"):
        rk.load_model(directory)
    with pytest.raises(ValueError, match="num_hidden_layers=1000000000000 must be an integer from 1 to"):
        rk.build_model(tiny.CONFIG | {"model_type": "qwen2", "num_hidden_layers": 10**12})
    assert jax.eval_shape(lambda: jnp.zeros(1)).shape == (1,)
