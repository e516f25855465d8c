"""The splash kernels, compiled for TPUs that are not there: their shapes, and what they hold beside their arguments."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import pytest

import restkv_jax as rk
from restkv_jax.kernels.attention import attend, attend_shared
from restkv_jax.kernels.pairs import Pairs, Queries

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: make test-tpu"),
]
CASES = {
    "8B, 128k": dict(chunk=1024, length=131072, heads=8),
    "head dimension 64": dict(dim=64),
    "head dimension 80": dict(dim=80),
    "head dimension 96": dict(dim=96),
    "head dimension 256, soft cap": dict(dim=256, soft_cap=50.0),
    "float32": dict(dtype=jnp.float32, dim=256),
    "rows": dict(rows=3),
    "other places for every head": dict(heads_apart=True),
}


@pytest.fixture(scope="module", params=["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def device(request):
    from jax.experimental import topologies

    os.environ |= dict(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    return topologies.get_topology_desc(platform="tpu", topology_name=request.param).devices[0]


def arguments(
    device, chunk=512, length=4096, heads=2, dim=128, dtype=jnp.bfloat16, rows=1, soft_cap=None, heads_apart=False
):
    place = jax.sharding.SingleDeviceSharding(device)

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    places = array(rows, chunk, dtype=jnp.int32), array(dtype=jnp.int32)
    queries = Queries(array(rows, heads, 4, chunk, dim), *places, soft_cap, 0)
    of_keys = array(rows, heads if heads_apart else 1, length, dtype=jnp.int32)
    return queries, Pairs(*[array(rows, heads, length, dim)] * 2, of_keys)


def compiled(device, function, *arrays):
    with jax.set_mesh(rk.make_mesh(1, 1, [device])):
        return jax.jit(function).lower(*arrays).compile()


@pytest.mark.parametrize("case", CASES)
def test_compiles_and_holds_little(case, device):
    program = compiled(device, lambda *xs: attend(*xs, implementation="splash"), *arguments(device, **CASES[case]))
    assert "splash_mha_fwd" in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < 48 * 2**20


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_gradients_compile_with_shared_keys(dtype, device):
    queries, pairs = arguments(device, chunk=1024, length=1024, dtype=dtype)

    def gradient(vectors, keys, distant_keys, values):
        def loss(vectors, keys, distant_keys, values):
            ours = pairs._replace(keys=keys, values=values, positions=jnp.zeros(pairs.positions.shape, jnp.int32))
            those = queries.replace(vectors=vectors, positions=jnp.zeros(queries.positions.shape, jnp.int32))
            those = those.replace(sliding_window=jnp.int32(2**30))
            return attend_shared(those, ours, distant_keys, sink=4, recent=64, implementation="splash").sum()

        return jax.grad(loss, argnums=(0, 1, 2, 3))(vectors, keys, distant_keys, values)

    program = compiled(device, gradient, queries.vectors, pairs.keys, pairs.keys, pairs.values)
    assert {"splash_mha_dq", "splash_mha_dkv"} <= {
        name for name in ("splash_mha_dq", "splash_mha_dkv") if name in program.as_text()
    }
