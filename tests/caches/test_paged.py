"""Attention over pages: the plain JAX version against brute force, the Pallas kernels against it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import is_interpreted, made_for_gpu
from hypothesis import given, settings
from hypothesis import strategies as st

import restkv_jax as rk
from restkv_jax.kernels.paged import Pages, _attend_pages_gpu, attend_pages, check_page_size
from restkv_jax.kernels.pairs import Queries
from restkv_jax.models.config import UNLIMITED


def ragged_pool(seed, batch=2, kv_heads=2, group=2, dim=8, page_size=8, longest=40, spare=3, window=UNLIMITED):
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
    vectors = normal(batch, kv_heads, group, 1, dim) / np.sqrt(dim)
    keys, values = normal(1, 1, num_pages, page_size, dim), normal(1, 1, num_pages, page_size, dim)
    positions, table, lengths = (jnp.asarray(x, jnp.int32) for x in (positions[None, None], table, lengths))
    queries = Queries(vectors, jnp.full((batch, 1), 3 * longest), window)
    return queries, Pages(keys, values, positions, table, lengths)


def brute_force(queries, pages):
    vectors, keys, values = (np.asarray(x, np.float64) for x in (queries.vectors, pages.keys[0, 0], pages.values[0, 0]))
    positions, table, lengths = (np.asarray(x) for x in (pages.positions[0, 0], pages.table, pages.lengths))
    page_size, out = keys.shape[1], np.zeros(vectors.shape)
    for b, k, g in np.ndindex(vectors.shape[:3]):
        slots = np.arange(lengths[b, k])
        places = table[b, k, slots // page_size], slots % page_size
        seen = np.asarray(queries.positions)[b, 0] - positions[places] < queries.sliding_window
        logits = keys[places][seen] @ vectors[b, k, g, 0]
        weights = np.exp(logits - logits.max(initial=-np.inf))
        out[b, k, g, 0] = weights @ values[places][seen] / max(weights.sum(), 1e-300)
    return out


@pytest.mark.slow
@given(seed=st.integers(0, 2**16), sliding_window=st.sampled_from([None, 5, 50]), slots=st.sampled_from([8, 24, 1024]))
@settings(max_examples=25, deadline=None)
def test_equals_brute_force(seed, sliding_window, slots):
    queries, pages = ragged_pool(seed, window=UNLIMITED if sliding_window is None else sliding_window)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("restkv_jax.kernels.paged.SLOTS_AT_ONCE", slots)
        out = attend_pages(queries, pages, is_windowed=sliding_window is not None)
    np.testing.assert_allclose(out, brute_force(queries, pages), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_gpu_kernel_equals_the_reference(seed):
    queries, pages = ragged_pool(seed, group=4, dim=32, page_size=16, longest=100)
    out = _attend_pages_gpu(queries, pages, is_windowed=False, interpret=is_interpreted("cuda"))
    reference = attend_pages.force("reference")(queries, pages, is_windowed=False)
    np.testing.assert_allclose(out, reference, rtol=1e-3, atol=1e-4)
    forced = attend_pages.force("pallas_gpu")(queries, pages, is_windowed=False, interpret=is_interpreted("cuda"))
    np.testing.assert_array_equal(forced, out)


def test_implementations_are_forced_by_name_and_refused_by_reason():
    assert attend_pages.names == ("reference", "pallas_tpu", "pallas_gpu")
    with pytest.raises(
        ValueError, match=r"implementation='triton' of .*unknown; choose from 'reference', 'pallas_tpu'"
    ):
        attend_pages.force("triton")
    small, wide = ragged_pool(0), ragged_pool(0, dim=32, page_size=8)
    with pytest.raises(ValueError, match="the head dimension 8 does not fill registers of 128"):
        attend_pages.force("pallas_tpu")(*small, is_windowed=False)
    with pytest.raises(ValueError, match="the head dimension 8 is not a power of two from 16 on"):
        attend_pages.force("pallas_gpu")(*small, is_windowed=False)
    with pytest.raises(ValueError, match="pages of 8 slots are less than 16"):
        attend_pages.force("pallas_gpu")(*wide, is_windowed=False)
    queries, pages = ragged_pool(0, dim=128, page_size=16)
    with pytest.raises(ValueError, match="a table of 1,050,624 bytes does not fit into scalar memory"):
        large = pages._replace(table=jnp.zeros((114, 8, 288), jnp.int32))
        attend_pages.force("pallas_tpu")(queries, large, is_windowed=False)
    with pytest.raises(ValueError, match="sums of values in the dtype of the queries, which float16 may not hold"):
        half = queries.replace(vectors=queries.vectors.astype(jnp.float16))
        attend_pages.force("pallas_gpu")(half, pages, is_windowed=False)
    for name in ("pallas_tpu", "pallas_gpu"):
        with pytest.raises(ValueError, match=r"'pallas_.pu'.* no sliding window; take 'reference'"):
            attend_pages.force(name)(*ragged_pool(0, dim=128, page_size=16), is_windowed=True)


def test_gpu_program_holds_the_kernel_where_it_fits():
    def program(**kwargs):
        arrays = ragged_pool(0, group=4, dim=64, page_size=16, window=30)
        f = jax.jit(functools.partial(attend_pages, **kwargs))
        with made_for_gpu():
            return f.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()

    assert "triton" in program(is_windowed=False)
    assert "triton" not in program(is_windowed=True)


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
    with jax.set_mesh(rk.make_mesh(1, 1, topology.devices[:1])):
        compiled = generate.lower(params, tokens).compile()
    assert "tpu_custom_call" in compiled.as_text()


@pytest.mark.parametrize(("dim", "is_windowed", "fits"), [(128, False, True), (8, False, False), (128, True, False)])
def test_tpu_program_holds_the_kernel_only_where_it_fits(dim, is_windowed, fits, monkeypatch):
    monkeypatch.setattr("restkv_jax.kernels.dispatch.target_platform", lambda: "tpu")
    arrays = ragged_pool(1, dim=dim, page_size=16)
    program = jax.jit(functools.partial(attend_pages, is_windowed=is_windowed)).trace(*arrays)
    assert ("tpu_custom_call" in program.lower(lowering_platforms=("tpu",)).as_text()) == fits


@pytest.mark.parametrize("page_size", [1, 4, 12, 0])
def test_page_sizes_that_no_kernel_takes_are_refused(page_size):
    with pytest.raises(ValueError, match=f"page_size={page_size} does not fit"):
        check_page_size(page_size)
