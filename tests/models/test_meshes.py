"""Parameters on meshes: what is divided, what is repeated, what is refused; checkpoints that several processes read."""

import json
import pathlib
import socket
import subprocess
import sys

import gguf_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import environment
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

import restkv_jax as rk
from restkv_jax.kernels.partition import spec_of
from restkv_jax.models.mesh import check_rows, divided_mesh, mesh_of, parameter_shardings

SCRIPT = pathlib.Path(__file__).with_name("on_hosts.py")
CONFIG = dict(
    model_type="llama", vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=4, head_dim=8, max_position_embeddings=512,
    initializer_range=0.3, eos_token_id=None, bos_token_id=None, rms_norm_eps=1e-5, rope_theta=10000.0,
)  # fmt: skip


def abstract(data, model):
    """A mesh of devices that there need not be."""
    device = jax.devices()[0]
    return Mesh(np.array([device] * (data * model)).reshape(data, model), ("data", "model"))


def shardings(model_parallel, **fields):
    return parameter_shardings(rk.build_model(CONFIG | fields), abstract(1, model_parallel))


def test_a_layer_is_divided_as_megatron_divides_it():
    found = shardings(4)
    layers = {name: x.spec for name, x in found["layers"].items()}
    assert found["embedding"].spec == PartitionSpec("model", None)
    assert layers["query_projection"] == layers["key_projection"] == PartitionSpec(None, None, "model", None)
    assert layers["output_projection"] == PartitionSpec(None, "model", None, None)
    assert layers["up_projection"] == PartitionSpec(None, None, "model")
    assert layers["down_projection"] == PartitionSpec(None, "model", None)
    assert layers["input_norm"] == PartitionSpec(None, None)


@pytest.mark.parametrize(
    ("model_parallel", "kv_heads", "heads", "apart"),
    [(8, 4, 8, (4, 2, 1)), (16, 4, 8, (4, 2, 2)), (6, 4, 8, (2, 1, 3)), (2, 3, 9, (1, 1, 2)), (4, 4, 4, None)],
)
def test_more_devices_than_kv_heads(model_parallel, kv_heads, heads, apart, recwarn):
    fields = {"num_key_value_heads": kv_heads, "num_attention_heads": heads, "vocab_size": 96, "hidden_size": 8 * heads}
    mesh = divided_mesh(rk.build_model(CONFIG | fields), abstract(2, model_parallel))
    if apart is None:
        assert mesh.axis_names == ("data", "model")
        return
    assert tuple(mesh.shape.values()) == (2, *apart) and mesh.axis_names == ("data", "model", "group", "repeat")
    warned = [str(w.message) for w in recwarn]
    assert bool(warned) == (apart[-1] > 1) and all("attention is repeated" in text for text in warned)
    layers = shardings(model_parallel, **fields)["layers"]
    everywhere = [name for name, size in zip(("model", "group", "repeat"), apart, strict=True) if size > 1]
    (axis,) = [entry for entry in layers["up_projection"].spec if entry is not None]
    assert (list(axis) if isinstance(axis, tuple) else [axis]) == everywhere
    assert "repeat" not in str(layers["query_projection"].spec)


def test_what_a_mesh_cannot_divide_is_said_with_what_it_can():
    with pytest.raises(ValueError, match=r"model axis of 5 must divide intermediate_size=48; 4 or 6 would"):
        shardings(5)
    with pytest.warns(UserWarning, match=r"does not divide vocab_size=129: .* 3 would|1 or 3 would divide it"):
        assert shardings(2, vocab_size=129)["embedding"].spec == PartitionSpec(None, None)
    with pytest.warns(UserWarning, match=r"divides 3 KV heads and 9 query heads into 1: .* 1 or 3 would divide it"):
        shardings(2, num_key_value_heads=3, num_attention_heads=9, hidden_size=72)
    with pytest.raises(ValueError, match=r"a batch of 6 rows cannot be divided .* axis of 4; take 4 or 8 rows"):
        check_rows(6, abstract(4, 1))
    with pytest.raises(ValueError, match="take 4 rows, or a mesh with data=1"):
        check_rows(3, abstract(4, 1))


def test_meshes_that_are_none():
    model = rk.build_model(CONFIG)
    with pytest.raises(ValueError, match=r"needs 12 devices, but there are \d+"):
        rk.make_mesh(data=3, model=4)
    with pytest.raises(TypeError, match=r"model=2\.5"):
        rk.make_mesh(model=2.5)
    with pytest.raises(ValueError, match="data=0"):
        rk.make_mesh(data=0)
    other = Mesh(np.array(jax.devices()[:1]), ("x",))
    with pytest.raises(ValueError, match=r"mesh has axes \('x',\), but must have 'data' and 'model'"):
        rk.load_model(mesh=other)
    with pytest.raises(TypeError, match="must be a Mesh"):
        rk.load_model(mesh="2x4")
    with pytest.raises(ValueError, match="'data' and 'model'"):
        parameter_shardings(model, other)


def test_parameters_on_several_meshes_are_refused():
    class Leaf:
        def __init__(self, mesh):
            self.sharding = NamedSharding(mesh, PartitionSpec())

    assert mesh_of({"embedding": np.zeros(3)}) is None and mesh_of({"embedding": Leaf(abstract(1, 1))}) is not None
    with pytest.raises(ValueError, match=r"'final_norm' lies on another mesh \(data=1, model=4 .*\) than 'embedding'"):
        mesh_of({"embedding": Leaf(abstract(2, 2)), "final_norm": Leaf(abstract(1, 4))})
    with pytest.raises(ValueError, match="must have 'data' and 'model'"):
        mesh_of({"embedding": Leaf(Mesh(np.array(jax.devices()[:1] * 2), ("rows",)))})


def test_axes_that_do_not_divide_stay_whole():
    sizes = {"data": 2, "model": 4, "group": 2, "repeat": 1}
    assert spec_of("l b k n d", (3, 4, 8, 5, 16), sizes) == PartitionSpec(None, "data", "model", None, None)
    assert spec_of("l b k n d", (3, 3, 6, 5, 16), sizes) == PartitionSpec(None, None, None, None, None)
    assert spec_of("v m", (16, 4), sizes) == PartitionSpec(("model", "group"), None)
    assert spec_of("A M p", (2, 1, 7), sizes) == PartitionSpec("data", None, None)


@pytest.mark.slow
def test_two_processes_read_each_its_own_half(tmp_path):
    model = rk.build_model(CONFIG)
    params = rk.init_params(model, jax.random.key(0))
    for name, scale in (("model", 1), ("other0", 1), ("other1", 2)):
        scaled = jax.tree.map(lambda x, scale=scale: x * scale, params)
        rk.save_model(tmp_path / name, model, scaled)
    path = gguf_files.write_gguf(tmp_path / "model.gguf", CONFIG, load_file(tmp_path / "model" / "model.safetensors"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    places = [str(tmp_path / "model"), str(path), str(tmp_path / "saved"), str(tmp_path / "other")]
    command = [sys.executable, str(SCRIPT)]
    arguments = [[*command, str(p), coordinator, *places] for p in range(2)]
    running = [subprocess.Popen(each, env=environment(4), stdout=subprocess.PIPE, text=True) for each in arguments]
    lines = [json.loads(process.communicate(timeout=500)[0].splitlines()[-1]) for process in running]
    whole = sum(x.size for x in jax.tree.leaves(params))
    for line in lines:
        # half of what is divided, and the norms; two devices hold the same KV heads
        assert line["read"] <= 0.51 * whole and line["held"] <= 0.16 * whole
        assert line["gguf"] == 0
        assert "process 1 has another checkpoint there than process 0" in line["refused"]
        assert line["found"] == lines[0]["found"]
        assert line["streamed"] == line["found"]["restkv"]["tokens"]
    for name, policy in policies().items():
        out = rk.generate(model, params, tokens(), None, policy, 6)
        assert lines[0]["found"][name]["tokens"] == np.asarray(out.tokens).tolist()
        _, cache = rk.prefill(model, params, tokens(), None, policy, 6)
        logits, _ = rk.decode_step(model, params, np.array([5, 6]), cache)
        assert_close(lines[0]["found"][name]["logits"], logits)
    logits, _ = rk.extend(model, params, tokens()[:, :7], None, out.cache, max_new_tokens=2)
    assert_close(lines[0]["extended"], logits)
    again = rk.load_model(tmp_path / "saved", jnp.float32)[1]
    jax.tree.map(np.testing.assert_array_equal, again, params)


def assert_close(found, logits):
    np.testing.assert_allclose(np.array(found), logits, atol=1e-5 * np.abs(logits).max(), rtol=0)


def tokens():
    return np.random.default_rng(0).permutation(128)[:120].reshape(2, 60)


def policies():
    found = {"full": rk.full(), "restkv": rk.restkv(24, 8), "laprox": rk.laprox(24, 8)}
    return found | {"while_generating": rk.restkv(24, 8, while_generating=True)}
