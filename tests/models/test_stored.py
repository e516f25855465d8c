"""Reading tensors: a few rows at a time, so that the host holds little more than the model."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import restkv_jax as rk
from restkv_jax.models import stored

# Embeddings are as large a part of it as of an 8-billion model: each 7 %.
TWO_GIGABYTES = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "num_hidden_layers": 15,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
MEASURE = """
import json, resource, sys
import jax, jax.numpy as jnp
import restkv_jax as rk

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

jax.block_until_ready(jnp.zeros(1) + 1)
before = peak()
params = rk.load_model(sys.argv[1], jnp.bfloat16)[1]
jax.block_until_ready(params)
print(json.dumps({"peak": peak() - before, "size": sum(x.nbytes for x in jax.tree.leaves(params))}))
"""


def peak_memory(path):
    """Bytes that loading `path` adds to a process at most, and bytes of the parameters."""
    run = subprocess.run([sys.executable, "-c", MEASURE, str(path)], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_the_host_holds_little_more_than_the_model_while_it_loads(tmp_path):
    model = rk.build_model(TWO_GIGABYTES)
    shapes = jax.eval_shape(lambda: rk.init_params(model, jax.random.key(0), jnp.bfloat16))
    params = jax.tree.map(lambda x: np.full(x.shape, 0.01, ml_dtypes.bfloat16), shapes)
    rk.save_model(tmp_path, model, params, max_shard_bytes=2**29)
    del params
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    measured = peak_memory(tmp_path)
    shutil.rmtree(tmp_path)
    assert measured["size"] > 1.8e9
    assert measured["peak"] < 1.1 * measured["size"]


@pytest.mark.parametrize("shape", [(7,), (7, 5), (7, 2, 3)])
def test_rows_in_chunks_are_the_tensor(monkeypatch, shape):
    monkeypatch.setattr(stored, "CHUNK", 12)
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    place = np.zeros(shape, np.float32)
    parts = list(stored.read_into(place, stored.StoredTensor(shape, "F32", lambda rows: array[rows])))
    np.testing.assert_array_equal(place, array)
    np.testing.assert_array_equal(np.concatenate(parts), array)
    assert len(parts) == (1 if shape == (7,) else 4)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_jax_takes_an_aligned_array_over_without_a_copy(dtype):
    array = stored.aligned_empty((1000, 30), dtype)
    array[...] = 1
    assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data
