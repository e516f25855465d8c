"""Attention over pages: the plain JAX version against brute force, the Pallas kernels against it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import restkv_jax as rk
from restkv_jax import kernels
from restkv_jax.kernels.paged import paged_attention_cuda, paged_attention_tpu
from restkv_jax.models.config import UNLIMITED


def ragged_pool(seed, batch=2, kv_heads=2, group=2, dim=8, page_size=8, longest=40, spare=3):
    """Heads of random lengths, some empty, whose pages lie anywhere in the pool; positions ascend with gaps."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, longest + 1, (batch, kv_heads)) * (rng.random((batch, kv_heads)) > 0.2)
    pages_per_head = -(-longest // page_size) + 1
    needed = -(-lengths // page_size)
    num_pages = int(needed.sum()) + spare
    free = rng.permutation(num_pages)
    table = np.full((batch, kv_heads, pages_per_head), num_pages)
    positions = np.full((num_pages, page_size), -1)
    for b, k in np.ndindex(batch, kv_heads):
        table[b, k, : needed[b, k]], free = free[: needed[b, k]], free[needed[b, k] :]
        for slot, position in enumerate(np.sort(rng.choice(3 * longest, lengths[b, k], replace=False))):
            positions[table[b, k, slot // page_size], slot % page_size] = position
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return (
        normal(batch, kv_heads * group, 1, dim),
        normal(num_pages, page_size, dim),
        normal(num_pages, page_size, dim),
        *(jnp.asarray(x, jnp.int32) for x in (positions, table, lengths, np.full((batch, 1), 3 * longest))),
    )


def brute_force(queries, key_pages, value_pages, positions, table, lengths, query_positions, sliding_window):
    queries, key_pages, value_pages = (np.asarray(x, np.float64) for x in (queries, key_pages, value_pages))
    batch, heads, _, dim = queries.shape
    kv_heads, page_size = table.shape[1], key_pages.shape[1]
    out = np.zeros(queries.shape)
    for b, h in np.ndindex(batch, heads):
        k = h // (heads // kv_heads)
        slots = np.arange(lengths[b, k])
        places = np.asarray(table)[b, k, slots // page_size], slots % page_size
        seen = query_positions[b, 0] - np.asarray(positions)[places] < sliding_window
        logits = key_pages[places][seen] @ queries[b, h, 0] / np.sqrt(dim)
        weights = np.exp(logits - logits.max(initial=-np.inf))
        out[b, h, 0] = weights @ value_pages[places][seen] / max(weights.sum(), 1e-300)
    return out


@given(seed=st.integers(0, 2**16), sliding_window=st.sampled_from([None, 5, 50]), slots=st.sampled_from([8, 24, 1024]))
@settings(max_examples=25, deadline=None)
def test_equals_brute_force(seed, sliding_window, slots):
    arrays = ragged_pool(seed)
    window = UNLIMITED if sliding_window is None else sliding_window
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("restkv_jax.kernels.paged.SLOTS_AT_ONCE", slots)
        out = kernels.paged_attention(*arrays, window, windowed=sliding_window is not None)
    np.testing.assert_allclose(out, brute_force(*arrays, window), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_gpu_kernel_interpreted_equals_the_reference(seed):
    arrays = ragged_pool(seed, group=4, dim=32, page_size=16, longest=100)
    out = paged_attention_cuda(*arrays, UNLIMITED, windowed=False, interpret=True)
    np.testing.assert_allclose(out, kernels.paged_attention(*arrays, UNLIMITED, windowed=False), rtol=1e-3, atol=1e-4)


def test_gpu_program_holds_the_kernel_where_it_fits():
    def program(**kwargs):
        arrays = ragged_pool(0, group=4, dim=64, page_size=16)
        f = jax.jit(functools.partial(kernels.paged_attention, **kwargs))
        return f.trace(*arrays, 30).lower(lowering_platforms=("cuda",)).as_text()

    assert "triton" in program(windowed=False)
    assert "triton" not in program(windowed=True)


def test_whole_generation_compiles_for_a_tpu_with_the_kernel_in_it():
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    model = rk.build_model(
        dict(
            model_type="llama", vocab_size=256, hidden_size=256, intermediate_size=256, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, head_dim=128, max_position_embeddings=4096,
        )
    )  # fmt: skip
    params = jax.eval_shape(lambda key: rk.init_params(model, key, jnp.bfloat16), jax.random.key(0))
    params, tokens = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        (params, jax.ShapeDtypeStruct((2, 1024), jnp.int32)),
    )
    generate = jax.jit(lambda params, tokens: rk.generate(model, params, tokens, policy=rk.laprox(128)).tokens)
    compiled = generate.lower(params, tokens).compile()
    assert "tpu_custom_call" in compiled.as_text()


def test_tpu_version_falls_back_where_the_kernel_does_not_fit():
    arrays = ragged_pool(1)
    expected = kernels.paged_attention(*arrays, UNLIMITED, windowed=False)
    np.testing.assert_array_equal(paged_attention_tpu(*arrays, UNLIMITED, windowed=False), expected)


@pytest.mark.parametrize("page_size", [1, 4, 12, 0])
def test_page_sizes_that_no_kernel_takes_are_refused(page_size):
    with pytest.raises(ValueError, match=f"page_size={page_size} does not fit"):
        kernels.check_page_size(page_size)
