"""What devices of a mesh give with rows and heads of their own, and of caches from elsewhere; kernels interpreted.

`python kernels_on_meshes.py` asserts.
"""

import functools
import os
import re

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from restkv_jax.kernels import dispatch, scores
from restkv_jax.kernels.paged import Pages, attend_pages
from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.kernels.partition import project_back
from restkv_jax.kernels.quantised import Quantisation, quantise
from restkv_jax.kernels.quantised_attention import read_quantised
from restkv_jax.models.experts import Experts, mix_experts

B, K, G, W, T, D = 2, 2, 2, 3, 140, 8
AXES = "data", "model", "group"


def draw(key, *shape):
    return jax.random.normal(jax.random.key(key), shape)


positions = jnp.arange(T) - jnp.array([[0], [17]])
queries = Queries(draw(0, B, K, G, W, D), positions[:, -W:], 100)
pairs = Pairs(draw(1, B, K, T, D), draw(2, B, K, T, D), jnp.maximum(positions, -1)[:, None])
gram, weights = scores.output_gram(draw(3, K, G, D, 16)), draw(4, B, W) ** 2
score = functools.partial(scores.averaged_attention_removal_error.force("pallas_tpu"), interpret=True)

stored = quantise(*draw(5, 2, 3, B, K, 192, 128), Quantisation("int8", 64))
held = jnp.broadcast_to(jnp.arange(192), (B, K, 192))
one = Queries(draw(6, B, K, G, 1, 128), jnp.array([[191], [100]]), 150)
read = functools.partial(read_quantised.force("pallas_tpu"), interpret=True)

mesh = jax.make_mesh((2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)
for kernel, arrays in (score, (queries, pairs, gram, weights)), (read, (one, stored, jnp.int32(1), held)):
    alone = jax.jit(kernel)(*arrays)
    with jax.set_mesh(mesh):
        divided = jax.jit(kernel)(*jax.device_put(arrays, NamedSharding(mesh, PartitionSpec())))
    for x, expected in zip(jax.tree.leaves(divided), jax.tree.leaves(alone), strict=True):
        assert x.sharding.spec == PartitionSpec(*AXES), x.sharding
        np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-6)

# of 3 KV heads none is divided, so that every device has the whole sum already
product = functools.partial(project_back, "bkgqd,kgdm->bqm")
for heads in (K, 3):
    arrays = draw(7, B, heads, G, 8, D), draw(8, heads, G, D, 16)
    alone = product(*arrays)
    with jax.set_mesh(mesh):
        divided = jax.jit(product)(*jax.device_put(arrays, NamedSharding(mesh, PartitionSpec())))
    np.testing.assert_allclose(divided, alone, rtol=1e-4, atol=1e-4)

# a cache is read wherever it was made: its parts need not be those of the mesh
page_size, places = 16, 4
for num_rows, num_heads in (2, 2), (1, 1), (2, 1), (1, 2):
    held = (num_rows, num_heads, B * K * places // (num_rows * num_heads))
    pool = draw(9, *held, page_size, 128), draw(10, *held, page_size, 128), jnp.zeros((*held, page_size), jnp.int32)
    table = jnp.arange(held[2]).reshape(B // num_rows, K // num_heads, places)
    pages = Pages(*pool, jnp.tile(table, (num_rows, num_heads, 1)), jnp.array([[50, 64], [1, 17]]))
    asked = Queries(draw(11, B, K, 4, 1, 128), jnp.full((B, 1), 99), 100)
    attend = functools.partial(attend_pages, is_windowed=False)
    alone = jax.jit(attend)(asked, pages)
    with jax.set_mesh(mesh):
        divided = jax.jit(attend)(asked, pages)
        dispatch.target_platform, before = (lambda: "tpu"), dispatch.target_platform
        program = jax.jit(functools.partial(attend)).trace(asked, pages).lower(lowering_platforms=("tpu",))
        dispatch.target_platform = before
    np.testing.assert_allclose(divided, alone, rtol=1e-5, atol=1e-5)
    assert "tpu_custom_call" in program.as_text(), (num_rows, num_heads)

# of a mixture of experts a device multiplies the tokens of its own rows
mix = functools.partial(mix_experts, per_token=2, normalise=True, activation=jax.nn.silu)
x, experts = draw(12, B, T, 16), Experts(draw(13, 16, 4), draw(14, 4, 16, 24), draw(15, 4, 16, 24), draw(16, 4, 24, 16))
with jax.set_mesh(mesh):
    x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    program = jax.jit(mix).lower(x, experts).compile()
    divided = program(x, experts)
np.testing.assert_allclose(divided, mix(x, experts), rtol=1e-4, atol=1e-4)
products = re.findall(r"= f32\[(\d+),\d+\]\S* dot\(", program.as_text())
assert max(map(int, products)) == 2 * T, products
