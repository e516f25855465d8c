"""Adaptation to shared keys: what is learned, what does not move, and what a user types."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import restkv_jax as rk
from restkv_jax.commands.cli import main
from restkv_jax.models.decoder import logits, read
from restkv_jax.models.mesh import make_mesh
from restkv_jax.models.tensors import flatten
from restkv_jax.pod import Adaptation, LayerGroups, Sharing, adapt
from restkv_jax.pod.adaptation import runs
from restkv_jax.pod.adaptation.loss import next_token_loss
from restkv_jax.pod.adaptation.program import make_program
from restkv_jax.pod.adaptation.training import learning_rate

TEXT = "The sky is blue. The grass is green. Here we go. " * 60
GROUPS = LayerGroups([[0, 0], [0, 1]])
SHARING = Sharing(GROUPS, sink=2, recent=6)
SHORT = Adaptation(steps=3, batch_size=4, sequence_length=24, learning_rate=1e-2)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model():
    return rk.build_model(tiny.CONFIG)


@pytest.fixture(scope="module")
def params(model):
    return rk.init_params(model, jax.random.key(1))


def tokens(count, seed=0):
    return np.random.default_rng(seed).integers(3, 259, count)


def assert_close(one, other, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol), one, other)


def run(capsys, *args):
    code = main(["pod", "adapt", *map(str, args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.slow
def test_command_adapts_queries_and_keys_to_shared_keys(capsys, directory, tmp_path):
    model, before, _ = rk.load_model(directory, "float32")
    (tmp_path / "text.txt").write_text(TEXT)
    GROUPS.save(tmp_path / "groups.json", model)
    args = ["--model", directory, "--groups", tmp_path / "groups.json", "--data", tmp_path / "text.txt"]
    args += ["--sink", 2, "--recent", 6, "--steps", 12, "--batch-size", 4, "--sequence-length", 48]
    args += ["--learning-rate", 0.05, "--train", "query|key", "--save-dtype", "float32", "--output", tmp_path / "run"]
    code, out, err = run(capsys, *args)
    assert (code, out) == (0, f"wrote {tmp_path / 'run' / 'model'}\n")
    assert "12/12" in err and "tokens/s" in err

    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert set(lines[0]) == {"step", "loss", "gradient_norm", "learning_rate", "tokens_per_second"}
    assert lines[-1]["loss"] < lines[0]["loss"]

    adapted, after, tokenizer = rk.load_model(tmp_path / "run" / "model", "float32")
    assert adapted == model.clone(sharing=SHARING) and tokenizer("a")["input_ids"]
    assert LayerGroups.load(tmp_path / "run" / "model", adapted) == GROUPS
    for name, leaf in flatten(before).items():
        moved = not np.array_equal(leaf, flatten(after)[name])
        assert moved == name.endswith(("query_projection", "key_projection")), name


@pytest.mark.slow
def test_toy_text_is_learned(model, params):
    data = tokens(24)[None].repeat(8, axis=0)
    adaptation = dataclasses.replace(SHORT, steps=40, sequence_length=None)
    before = jax.tree.map(np.array, params)
    after = adapt(model, params, data, SHARING, adaptation=adaptation, quiet=True)
    jax.tree.map(np.testing.assert_array_equal, before, params)  # those given are not changed
    hidden, _ = read(model.clone(sharing=SHARING), after, jnp.asarray(data[:1], jnp.int32))
    assert (logits(model, after, hidden)[0, :-1].argmax(-1) == data[0, 1:]).all()


@pytest.mark.slow
def test_accumulation_is_a_larger_batch(model, params):
    weights = np.random.default_rng(1).uniform(size=(4, 24)) * (np.arange(24) > np.array([[3], [9], [15], [20]]))
    data = {"tokens": tokens(96).reshape(4, 24), "weights": weights}
    whole, parts = (
        adapt(model, params, data, SHARING, adaptation=dataclasses.replace(SHORT, accumulation=parts), quiet=True)
        for parts in (1, 4)
    )
    # Adam divides by the size of a gradient, so where it is near zero, rounding counts
    assert_close(whole, parts, atol=1e-4)
    assert not np.allclose(whole["embedding"], params["embedding"])


@pytest.mark.slow
@pytest.mark.parametrize("train", [".*", "query|key"])
def test_the_gradient_exists_once_whatever_the_parts(train):
    layers = 16
    model = rk.build_model(tiny.CONFIG | {"hidden_size": 512, "head_dim": 512, "num_hidden_layers": layers})
    adaptation = Adaptation(1, 4, sequence_length=8, accumulation=4, train=train, compute_dtype="float32")
    program = make_program(model, adaptation, make_mesh())
    compiled = program.lower().compile()
    gradient, frozen = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values())
        for leaves in (program.state.params, program.frozen)
    )
    a_layer = (gradient + frozen) / layers
    assert gradient < compiled.memory_analysis().temp_size_in_bytes < gradient + 4 * a_layer < 2 * gradient


@pytest.mark.slow
def test_bfloat16_products_and_float32_weights(model, params):
    adaptation = dataclasses.replace(SHORT, compute_dtype="bfloat16", learning_rate=1e-5)
    after = flatten(adapt(model, params, tokens(96), SHARING, adaptation=adaptation, quiet=True))
    moves = {name: np.abs(leaf - flatten(params)[name]).max() for name, leaf in after.items()}
    assert all(leaf.dtype == jnp.float32 for leaf in after.values())
    # three steps of at most 1e-5 each, which bfloat16 could not add to weights of 0.02
    assert min(moves.values()) > 1e-7 and max(moves.values()) < 4e-5


@pytest.mark.parametrize(("rows", "length", "parts"), [(8, 2048, 8), (8, 512, 4), (6, 600, 3), (4, 24, 1), (1, 9, 1)])
def test_parts_on_a_cpu(rows, length, parts):
    assert runs._parts(rows, length) == parts


def test_loss_in_chunks_is_the_loss_of_all_logits(model, params):
    rng = np.random.default_rng(0)
    ids = jnp.asarray(tokens(46).reshape(2, 23), jnp.int32)
    weights, hidden = rng.uniform(size=ids.shape), rng.normal(size=(*ids.shape, 32))
    weights, hidden = (jnp.asarray(x, jnp.float32) for x in (weights, hidden))

    def whole(params, hidden):
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(
            logits(model, params, hidden[:, :-1]), ids[:, 1:]
        )
        return jnp.sum(losses * weights[:, 1:])

    def chunked(params, hidden):
        return next_token_loss(model, params, hidden, ids, weights, chunk_size=5)

    one, other = (jax.jit(jax.value_and_grad(loss, (0, 1)))(params, hidden) for loss in (whole, chunked))
    assert_close(one, other, atol=1e-5)


def test_rate_warms_up_and_falls_to_zero():
    rate = learning_rate(Adaptation(steps=100, warmup=0.1, learning_rate=1e-3))
    values = np.array([float(rate(step)) for step in range(101)])
    assert 0 < values[0] < 1e-3 and values[10] == pytest.approx(1e-3) and values[100] == pytest.approx(0, abs=1e-9)
    assert (np.diff(values[:11]) > 0).all() and (np.diff(values[10:]) < 0).all()


@pytest.mark.slow
def test_no_array_of_all_pairs_of_tokens(model):
    length = 2**14
    adaptation = Adaptation(1, batch_size=1, sequence_length=length, compute_dtype="float32", loss_chunk=64)
    program = make_program(model.clone(sharing=Sharing(GROUPS, 16, 240)), adaptation, make_mesh())
    compiled = program.lower().compile()
    assert compiled.memory_analysis().temp_size_in_bytes < length**2 / 2


def dense(*args):
    return ["--dense", "--output", "run", *args]


BAD = {
    "no data": (dense(), "--data requires an argument"),
    "neither groups nor dense": (["--data", "text.txt", "--output", "run"], "give --groups FILE"),
    "both": (dense("--groups", "groups.json", "--data", "text.txt"), "give either --groups FILE"),
    "proximal without groups": (dense("--data", "text.txt", "--recent", "64"), "--recent without --groups FILE"),
    "unknown option": (dense("--data", "text.txt", "--rate", "1"), "--rate is not an option"),
    "missing data": (dense("--data", "absent.txt"), "data 'absent.txt' does not exist"),
    "directory": (dense("--data", "."), "data '.' is a directory"),
    "empty file": (dense("--data", "empty.txt"), "'empty.txt' is empty"),
    "bytes": (dense("--data", "bytes.txt"), "'bytes.txt' cannot be read as text"),
    "damaged array": (dense("--data", "bytes.npy"), "data 'bytes.npy' cannot be read as an array"),
    "floats": (dense("--data", "floats.npy"), "data 'floats.npy' holds float64 of shape (3,)"),
    "another vocabulary": (dense("--data", "large.npy", "--sequence-length", "8"), "holds id 259, out of the model's"),
    "long sequences": (dense("--data", "text.txt", "--sequence-length", "2049"), "maximum of 2048 positions"),
    "little data": (dense("--data", "text.txt", "--sequence-length", "2000"), "fewer than sequence_length=2000"),
    "one token": (dense("--data", "text.txt", "--sequence-length", "1"), "sequence_length=1 must be at least 2"),
    "pattern": (dense("--data", "text.txt", "--sequence-length", "8", "--train", "q_proj"), "train='q_proj' matches"),
    "no pattern": (dense("--data", "text.txt", "--train", "("), "train='(' is not a regular expression"),
    "accumulation": (dense("--data", "text.txt", "--accumulation", "3"), "accumulation=3 must divide batch_size=8"),
    "rate": (dense("--data", "text.txt", "--learning-rate", "0"), "learning_rate=0.0 must be positive"),
    "devices": (dense("--data", "text.txt", "--model-parallel", "3"), "model=3 needs 3 devices, but there are 1"),
    "output is a file": (["--dense", "--data", "text.txt", "--output", "text.txt/run"], "can be written"),
    "missing groups": (["--groups", "absent.json", "--data", "text.txt", "--output", "run"], "absent.json"),
    "groups of another model": (["--groups", "other.json", "--data", "text.txt", "--output", "run"], "another model"),
    "unknown command": (None, "command 'pod adpat' is unknown"),
}  # fmt: skip


@pytest.fixture
def bad_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "text.txt").write_text("The sky is blue. " * 20)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"a\xff")
    (tmp_path / "bytes.npy").write_bytes(b"a\xff")
    np.save(tmp_path / "floats.npy", np.ones(3))
    np.save(tmp_path / "large.npy", np.full(99, 259))
    other = rk.build_model(tiny.CONFIG | {"num_hidden_layers": 3})
    LayerGroups.dense(3, 2).save(tmp_path / "other.json", other)


@pytest.mark.parametrize(("args", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(capsys, directory, bad_files, args, message):
    argv = ["pod", "adpat"] if args is None else ["pod", "adapt", "--model", str(directory), *args]
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("restkv: error: ") and captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.slow
def test_loss_that_is_not_finite(model, params, tmp_path):
    adaptation = dataclasses.replace(SHORT, learning_rate=1e30, weight_decay=0.0, warmup=0.0)
    with pytest.raises(FloatingPointError, match=r"step 2 has .*nan; lower learning_rate"):
        adapt(model, params, tokens(96), adaptation=adaptation, output=tmp_path, checkpoint_every=1, quiet=True)
    assert (tmp_path / "checkpoints" / "1").is_dir() and not (tmp_path / "checkpoints" / "2").exists()


def test_batch_that_the_mesh_does_not_divide(model):
    mesh = jax.sharding.AbstractMesh((4, 1), ("data", "model"))
    with pytest.raises(ValueError, match=r"batch_size=8 in accumulation=4 parts is 2 sequences.*data axis, 4"):
        make_program(model, Adaptation(1, 8, 16, accumulation=4, compute_dtype="float32"), mesh)


def test_model_that_the_mesh_does_not_divide(model):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1] * 5).reshape(1, 5), ("data", "model"))
    with pytest.raises(ValueError, match=r"model axis of 5 must divide intermediate_size=\d+; \d+ or \d+ would"):
        make_program(model, Adaptation(1, 8, 16, compute_dtype="float32"), mesh)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"params": {"embedding": np.ones((2, 2))}}, "params are not the model's: missing"),
        ({"save_dtype": "float16"}, "save_dtype='float16' is not supported; supported: bfloat16, float32"),
        ({"checkpoint_every": 0}, "checkpoint_every=0 must be at least 1"),
        ({"sharing": Sharing(LayerGroups.dense(3, 2))}, "groups are of a model with 3 layers"),
        ({"sharing": Sharing(GROUPS)}, "sequence_length=24 is all proximal with sink=16 and recent=4080"),
        ({"adaptation": dataclasses.replace(SHORT, train="q_proj")}, "train='q_proj' matches no parameter"),
    ],
)
def test_arguments_that_cannot_work(model, params, wrong, words):
    arguments = {"model": model, "params": params, "data": tokens(96), "adaptation": SHORT, "quiet": True}
    with pytest.raises(ValueError, match=words):
        adapt(**(arguments | wrong))
