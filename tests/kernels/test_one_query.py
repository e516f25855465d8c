"""The TPU's kernel for one query per row, interpreted, against plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from restkv_jax.kernels.distant import read_distant
from restkv_jax.kernels.paged import QuantisedPages, read_quantised_pages
from restkv_jax.kernels.pairs import Queries
from restkv_jax.kernels.quantised import Quantisation, quantise, quantise_keys, quantise_values
from restkv_jax.kernels.quantised_attention import read_quantised
from restkv_jax.kernels.softmax import Softmax

B, K = 2, 2


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def check_agrees(found: Softmax, expected: Softmax, dtype):
    tolerance = 2e-5 if dtype == jnp.float32 else 4e-3  # of the largest
    for one, other in ((found.context(), expected.context()), (found.normaliser(), expected.normaliser())):
        one, other = np.asarray(one), np.asarray(other)
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other[np.abs(other) < 1e29]).max())


QUICK = [
    (jnp.float32, "int8", 128, 64, 1, 1, {}),
    (jnp.float32, "int8", 128, 64, 33, 8, {"sliding_window": 700}),
    (jnp.bfloat16, "int8", 128, 32, 70, 3, {"sliding_window": 1}),
    (jnp.bfloat16, "int4", 128, 64, 37, 4, {}),
]
SLOW = [
    (jnp.float32, "int8", 128, 64, 32, 4, {}),  # as many as are read at one time
    (jnp.float32, "int8", 256, 32, 35, 1, {"soft_cap": 5.0}),
    (jnp.float32, "int4", 128, 192, 5, 12, {}),
    (jnp.bfloat16, "int4", 256, 128, 17, 2, {"soft_cap": 30.0, "sliding_window": 900}),
]


@pytest.mark.parametrize(
    ("dtype", "codes", "dim", "group_size", "groups", "group", "options"),
    [*QUICK, *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW)],
)
def test_groups_of_a_layer(dtype, codes, dim, group_size, groups, group, options):
    slots, q = groups * group_size, Quantisation(codes, group_size)
    stored = quantise(normal(0, 2, B, K, slots, dim), normal(1, 2, B, K, slots, dim), q)
    is_there = jnp.asarray(np.random.default_rng(2).random((B, K, slots)) > 0.3)
    positions = jnp.where(is_there, jnp.arange(slots), -1)
    vectors = normal(3, B, K, group, 1, dim, dtype=dtype) * 0.3
    options = {"sliding_window": slots} | options
    queries = Queries(vectors.astype(dtype), jnp.array([[slots - 1], [slots // 2]]), **options)
    arrays = queries, stored, jnp.int32(1), positions
    found = read_quantised.force("pallas_tpu")(*arrays, interpret=True)
    check_agrees(found, read_quantised.force("reference")(*arrays), dtype)


def test_nothing_seen_is_nothing_read():
    q = Quantisation("int8", 64)
    stored = quantise(normal(0, 1, 1, 1, 128, 128), normal(1, 1, 1, 1, 128, 128), q)
    queries = Queries(normal(2, 1, 1, 1, 1, 128), jnp.array([[50]]), 100)
    arrays = queries, stored, jnp.int32(0), jnp.full((1, 1, 128), -1)
    found = read_quantised.force("pallas_tpu")(*arrays, interpret=True)
    assert not found.total.any()
    assert not found.weighted.any()
    assert not found.context().any()


@pytest.mark.parametrize("is_windowed", [False, True])
@pytest.mark.parametrize(("dtype", "codes", "places"), [(jnp.float32, "int8", 37), (jnp.bfloat16, "int4", 16)])
def test_pages(dtype, codes, places, is_windowed):
    """Heads of all lengths, one empty and one with all its pages, in a pool in any order."""
    size, dim, rng = 64, 128, np.random.default_rng(0)
    held = np.array([[places, 3], [0, 16]])
    pool = rng.permutation(held.sum() + 2)
    table = np.full((B, K, places), len(pool))
    first = np.cumsum(held.reshape(-1)) - held.reshape(-1)
    for row, start, count in zip(table.reshape(-1, places), first, held.reshape(-1), strict=True):
        row[:count] = pool[start : start + count]
    slots = len(pool) * size
    stored = quantise(normal(1, 1, 1, slots, dim), normal(2, 1, 1, slots, dim), Quantisation(codes, size))
    positions = jnp.asarray(rng.integers(0, 4000, (1, 1, len(pool), size)), jnp.int32)
    pages = QuantisedPages(stored, positions, jnp.asarray(table, jnp.int32), jnp.asarray(held * size, jnp.int32))
    vectors = (normal(3, B, K, 3, 1, dim) * 0.3).astype(dtype)
    queries = Queries(vectors, jnp.array([[4000], [2000]]), 1500 if is_windowed else 2**30)
    found = read_quantised_pages.force("pallas_tpu")(queries, pages, is_windowed=is_windowed, interpret=True)
    expected = read_quantised_pages.force("reference")(queries, pages, is_windowed=is_windowed)
    check_agrees(found, expected, dtype)
    assert not found.context()[1, 0].any(), "that head holds nothing"


@pytest.mark.parametrize("parts", [(1, 1), (1, 2)])
@pytest.mark.parametrize(
    ("dtype", "codes", "slots"),
    [
        (jnp.float32, None, 130),
        (jnp.bfloat16, None, 2500),
        (jnp.float32, "int8", 2240),
        pytest.param(jnp.bfloat16, "int4", 128, marks=pytest.mark.slow),
    ],
)
def test_distant_tokens_of_blocks(dtype, codes, slots, parts):
    """Three blocks of keys for the KV heads of four layers; one head reads nothing, one row has room left."""
    rows, heads = parts
    keys = normal(0, rows, heads, B // rows, 3, slots, 128, dtype=dtype)
    values = normal(1, 4, B, K, slots, 128, dtype=dtype)
    positions = jnp.broadcast_to(jnp.arange(slots), (rows, heads, B // rows, 3, slots))
    if codes is not None:
        q = Quantisation(codes, 64)
        keys, values = quantise_keys(keys, q), quantise_values(values, q)
    queries = Queries((normal(2, B, K, 3, 1, 128) * 0.3).astype(dtype), jnp.array([[slots], [90]]), slots - 20)
    rest = jnp.int32(2), jnp.array([2, 0]), jnp.array([slots, 77]), jnp.array([[True, True], [False, True]])
    before = Softmax(*(jnp.abs(normal(3, *shape)) for shape in ((B, K, 3, 1), (B, K, 3, 1), (B, K, 3, 1, 128))))
    arrays = before, queries, keys, values, positions, *rest
    found = read_distant.force("pallas_tpu")(*arrays, interpret=True)
    check_agrees(found, read_distant.force("reference")(*arrays), dtype)
    np.testing.assert_array_equal(found.context()[1, 0], before.context()[1, 0])


@pytest.mark.parametrize(
    ("codes", "dim", "group_size", "dtype", "message"),
    [
        ("float8_e4m3fn", 128, 64, jnp.float32, "codes that are integers"),
        ("int8", 64, 64, jnp.float32, "head dimension 64 is not 128 or 256"),
        ("int8", 128, 16, jnp.float32, "groups of 16 tokens do not fill registers; choose a multiple of 32"),
        ("int4", 128, 32, jnp.float32, "choose a multiple of 64"),
        ("int8", 128, 288, jnp.float32, "groups of 288 tokens are more than the 256 that the chip holds 16 of"),
        ("int8", 128, 64, jnp.float16, "float32 and bfloat16, not float16"),
    ],
)
def test_what_the_kernel_cannot_take_is_said(codes, dim, group_size, dtype, message):
    shapes = jax.eval_shape(
        lambda: quantise(*jnp.zeros((2, 1, 1, 1, group_size, dim)), Quantisation(codes, group_size))
    )
    queries = Queries(jax.ShapeDtypeStruct((1, 1, 1, 1, dim), dtype), jnp.zeros((1, 1), jnp.int32), 100)
    with pytest.raises(ValueError, match=message):
        read_quantised.force("pallas_tpu")(queries, shapes, jnp.int32(0), jnp.zeros((1, 1, group_size)), interpret=True)
