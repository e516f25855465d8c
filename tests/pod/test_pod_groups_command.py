"""`restkv pod groups`, as a user types it."""

import json

import numpy as np
import pytest
import tiny

import restkv_jax as rk
from restkv_jax.commands.cli import main
from restkv_jax.pod import LayerGroups, attention_similarity, group_layers

LENGTH = 48


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A model with its groups' place, and data: a text and token rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    tiny.write_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The sky is blue. The grass is green. Here we go. " * 20)
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).integers(3, 259, (5, LENGTH)))
    return tmp_path


def run(capsys, *args):
    code = main(["pod", "groups", "--model", "model", *args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("joined", [(), ("--joined",)])
def test_groups_are_those_of_the_library(capsys, files, joined):
    args = ["--data", "rows.npy", "--samples", "3", "--last-queries", "8", "--sink", "2", "--recent", "6", *joined]
    model, params, _ = rk.load_model("model", "float32")
    rows = np.load("rows.npy")[[0, 2, 4]]
    proximal = {"sink": 2, "recent": 6} if joined else {}
    similarity = attention_similarity(model, params, [rows], 8, **proximal)
    threshold = float(np.median(similarity[:, 0, 1]))  # some heads share, others do not
    expected = group_layers(similarity, threshold - 1e-4)
    code, out, _ = run(capsys, *args, "--threshold", str(threshold - 1e-4), "--plot", "groups.png")
    fraction = expected.cache_fraction(LENGTH, 2, 6)
    assert code == 0 and out.startswith(f"{expected.num_blocks} blocks of 4 layers and KV heads")
    assert f"\n{fraction:.1%} of the cache's bytes at {LENGTH} tokens" in out
    assert out.endswith("\nwrote layer_groups.json\n")
    assert LayerGroups.load("layer_groups.json", model) == expected
    assert (files / "groups.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_adapt_takes_the_groups_of_text_and_keeps_how_to_generate(capsys, files):
    own = {"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.1, "eos_token_id": [2, 5], "pad_token_id": 7}
    (files / "model" / "generation_config.json").write_text(json.dumps(own))
    code, out, err = run(capsys, "--data", "text.txt", "--sequence-length", "40", "--threshold", "0", "--samples", "2")
    assert code == 0 and out.startswith("2 blocks of 4") and err.count("\n") == 2 and "2/2 texts" in err
    args = ["--groups", ".", "--data", "text.txt", "--output", "run", "--sequence-length", "40", "--steps", "1"]
    assert main(["pod", "adapt", "--model", "model", *args, "--recent", "8", "--quiet"]) == 0
    adapted = rk.load_model("run/model")[0]
    assert adapted.sharing.groups == LayerGroups([[0, 0], [0, 0]])
    assert adapted.config == rk.load_model("model")[0].config
    kept = json.loads((files / "run" / "model" / "generation_config.json").read_text())
    assert kept == own | {"bos_token_id": 1}


BAD = {
    "no data": ((), "--data"),
    "no directory": (("--data", "text.txt", "--output", "absent/groups.json"), "--output 'absent/groups.json': its"),
    "samples": (("--data", "text.txt", "--samples", "0"), "--samples 0 must be at least 1"),
    "threshold": (("--data", "text.txt", "--threshold", "-1"), "--threshold -1.0 must not be negative"),
    "picture": (("--data", "text.txt", "--plot", "groups.txt"), "--plot 'groups.txt' does not end in the suffix"),
    "no sequences": (("--data", "rows.npy", "--sequence-length", "0"), "sequence_length=0 must be at least 2"),
    "little text": (("--data", "text.txt"), "fewer than sequence_length=2048"),
    "missing data": (("--data", "absent.txt"), "data 'absent.txt' does not exist"),
    "queries": (("--data", "rows.npy", "--last-queries", "0"), "last_queries=0 must be at least 1"),
}


@pytest.mark.parametrize(("args", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(capsys, files, args, message):
    code, out, err = run(capsys, *args, "--quiet")
    assert (code, out) == (2, "") and err.startswith("restkv: error: ") and err.count("\n") == 1
    assert message in err and not (files / "layer_groups.json").exists()


def test_what_an_adapted_model_shares_is_not_written_over(capsys, files):
    model, params, tokenizer = rk.load_model("model")
    shared = model.clone(sharing=rk.pod.Sharing(LayerGroups([[0, 0], [0, 0]]), 4, 112))
    rk.save_model("adapted", shared, params, tokenizer)
    code, out, err = run(capsys, "--data", "rows.npy", "--output", "adapted", "--quiet")
    assert (code, out) == (2, "") and "says how an adapted model shares keys" in err
    with pytest.raises(ValueError, match="adapted model"):
        shared.sharing.groups.save("adapted", model)
    assert rk.load_model("adapted")[0].sharing == shared.sharing
