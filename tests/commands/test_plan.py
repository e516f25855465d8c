"""`restkv plan` as a user types it, for one emulated device; `tests/tpu` has those of TPUs."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
import tiny

import restkv_jax as rk
from restkv_jax.commands.cli import main
from restkv_jax.commands.plan import PlanOptions, _model, _parts
from restkv_jax.generation.reading import cache_shapes

LENGTH, BUDGET, NEW = 128, 64, 8
SHORT = ["--topology", "cpu:1", "--method", "snapkv", "--budget", BUDGET, "--length", LENGTH, "--max-new-tokens", NEW]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(tiny.CONFIG))
    return path


def run(capsys, *args):
    code = main(["plan", *map(str, args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_bytes_are_those_of_the_arrays_that_generation_makes(capsys, config):
    code, out, err = run(capsys, "--model", config, *SHORT, "--dtype", "float32", "--json")
    assert (code, err) == (0, "")
    model = rk.build_model(config)
    params = rk.init_params(model, jax.random.key(0))
    tokens = jnp.ones((1, LENGTH), jnp.int32)
    for name, policy in (("snapkv", rk.snapkv(BUDGET)), ("full", rk.full())):
        cache = cache_shapes(model, params, tokens, None, policy, NEW)
        found = json.loads(out)[name]
        assert found["weights"] == sum(x.nbytes for x in jax.tree.leaves(params))
        assert (found["cache"], found["slots"]) == (rk.cache_bytes(cache), cache.num_slots)
        assert found["step"]["floor"] == found["weights"] + found["cache"]  # embeddings are tied
        assert found["step"]["total"] > found["cache"] + found["weights"]
        assert found["prefill"]["operations"] > found["step"]["operations"] * LENGTH / 4


@pytest.mark.parametrize(("rows", "chosen"), [(1, 2), (3, 6), (9, 8)])
def test_a_step_reads_the_experts_that_its_tokens_can_choose(capsys, tmp_path, rows, chosen):
    moe = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(tiny.CONFIG | moe))
    code, out, _ = run(
        capsys, "--model", tmp_path / "config.json", *SHORT, "--dtype", "float32", "--json", "--batch-size", rows
    )
    found = json.loads(out)["full"]
    experts = (
        4 * 8 * 3 * tiny.CONFIG["num_hidden_layers"] * tiny.CONFIG["hidden_size"] * tiny.CONFIG["intermediate_size"]
    )
    assert code == 0
    assert found["step"]["floor"] == found["weights"] + found["cache"] - experts * (8 - chosen) // 8


@pytest.mark.slow
def test_a_table_sets_the_method_beside_the_full_cache(capsys, config, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    code, out, _ = run(capsys, "--model", config, *SHORT, "--cache-dtype", "int8(group_size=16,residual=16)")
    assert code == 0
    for text in ("snapkv, int8", "full", "weights", "prefill: reads", "step: reads", f"{LENGTH:,} tokens"):
        assert text in out
    assert "time by" not in out  # nothing is known of an emulated device's peaks


def test_shared_keys_are_those_of_the_file(tmp_path):
    groups = rk.pod.LayerGroups([[0, 0], [0, 0]])
    model, params, tokenizer = rk.load_model(tiny.write_model(tmp_path / "model"))
    rk.save_model(tmp_path / "adapted", model.clone(sharing=rk.pod.Sharing(groups, 4, 112)), params, tokenizer)
    groups.save(tmp_path / "groups.json", model)
    adapted, config, alone = tmp_path / "adapted", tmp_path / "adapted" / "config.json", tmp_path / "groups.json"
    for options, sizes in (
        ({"model": adapted}, (4, 112)),
        ({"model": config}, (4, 112)),
        ({"model": config, "recent": 50}, (4, 50)),
        ({"model": tmp_path / "model", "pod_groups": adapted}, (4, 112)),
        ({"model": tmp_path / "model", "pod_groups": alone}, (16, 4080)),
        ({"model": tmp_path / "model", "pod_groups": alone, "sink": 1, "recent": 50}, (1, 50)),
    ):
        sharing = _model(PlanOptions(**options)).sharing
        assert (sharing.sink, sharing.recent) == sizes, options
    assert _model(PlanOptions(model=adapted, dense=True)).sharing is None


def test_a_vocabulary_that_chips_do_not_divide_does_not_keep_weights_whole(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(tiny.CONFIG | {"vocab_size": 32001, "num_key_value_heads": 4, "num_attention_heads": 8})
    )
    assert _parts(rk.build_model(tmp_path / "config.json"), chips=8, rows=1) == 8
    assert _parts(rk.build_model(tmp_path / "config.json"), chips=8, rows=8) == 4  # as many as KV heads


WITHOUT_LIBTPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--topology", "v5e"], "topology='v5e' is not known; known: v5e:1x1"),
        (["--topology", "h100:8"], "topology='h100:8' is not known"),
        (["--topology", "cpu:4096"], "4096 devices"),
        pytest.param(["--topology", "v5e:2x4"], "pip install --no-deps libtpu", marks=WITHOUT_LIBTPU),
        ([*SHORT, "--max"], "--max: how much memory cpu:1 has"),
        ([*SHORT, "--length", 0], "--length 0 must be at least 1"),
        ([*SHORT, "--model-parallel", 3], "model=3"),
        ([*SHORT, "--budget", "much"], "budget='much'"),
        ([*SHORT, "--model", "no/such"], "no/such"),
        ([*SHORT, "--pod-groups", "no-such.json"], "no-such.json"),
        ([*SHORT, "--recent", 8], "--recent without shared keys; give --pod-groups FILE"),
    ],
)
def test_bad_input_is_said_in_one_line(capsys, config, args, said):
    code, out, err = run(capsys, "--model", config, *args)
    assert (code, out) == (2, "")
    assert said in err and err.count("\n") == 1
