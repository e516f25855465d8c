"""`restkv devices` as a user types it."""

import json

import gguf_files
import jax
import pytest
from safetensors.numpy import load_file

import restkv_jax as rk
from restkv_jax.commands.cli import main

LLAMA = dict(
    model_type="llama", vocab_size=128, hidden_size=512, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=128, eos_token_id=None,
)  # fmt: skip


def said(capsys, *args):
    assert main(["devices", *map(str, args)]) == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_what_is_here_and_what_computes(capsys):
    text = said(capsys)
    assert "1 cpu that of the host" in text
    assert "attention of a prompt reference" in text
    assert "splash: it is for 'tpu', and" in text and "head dimension 64" in text


@pytest.mark.parametrize("platform, name", [("tpu", "splash"), ("cuda", "triton"), ("cpu", "reference")])
def test_another_platform(capsys, tmp_path, platform, name):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    text = said(capsys, "--model", tmp_path, "--platform", platform)
    assert f"attention of a prompt {name}" in text
    assert f"attention over pages {dict(tpu='pallas_tpu', cuda='pallas_gpu', cpu='reference')[platform]}" in text


def test_a_gguf_file_says_what_a_configuration_says(capsys, tmp_path):
    config = LLAMA | {"max_position_embeddings": 512, "bos_token_id": 1}
    model = rk.build_model(config)
    rk.save_model(tmp_path / "model", model, rk.init_params(model, jax.random.key(0)))
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    path = gguf_files.write_gguf(tmp_path / "model.gguf", config, tensors)
    assert said(capsys, "--model", path) == said(capsys, "--model", tmp_path / "model")


def test_what_cannot_be(capsys, tmp_path):
    assert main(["devices", "--length", "0"]) == 2 and "--length 0 must be at least 1" in capsys.readouterr().err
    assert main(["devices", "--model", str(tmp_path)]) == 2 and "config.json" in capsys.readouterr().err
