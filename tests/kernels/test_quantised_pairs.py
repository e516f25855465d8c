"""Codes and scales: a plain numpy quantiser bit for bit, error bounds, and attention over tiles."""

import operator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from restkv_jax.kernels.attention import attend
from restkv_jax.kernels.distant import read_distant
from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.kernels.quantised import (
    LARGEST_CODES,
    Quantisation,
    empty_pairs,
    parse_quantisation,
    quantise,
    quantise_keys,
    quantise_values,
)
from restkv_jax.kernels.quantised_attention import read_quantised
from restkv_jax.kernels.softmax import empty_softmax

DTYPES = tuple(LARGEST_CODES)
FLOATS = st.one_of(st.floats(-(2.0**10), 2.0**10, width=32), st.floats(width=32, allow_nan=False, allow_infinity=False))
TINY = np.finfo(np.float32).tiny


def in_numpy(x, axis, dtype):
    """Codes and scales of float32 numbers, in loops over nothing but whole arrays of numpy."""
    exact = np.abs(x).max(axis, keepdims=True) * np.float32(1 / LARGEST_CODES[dtype])
    scales = exact.astype(ml_dtypes.bfloat16).astype(np.float32)
    usable = np.where(scales < TINY, np.float32(np.inf), scales)
    quotients = np.clip(x / usable, -LARGEST_CODES[dtype], LARGEST_CODES[dtype])
    if dtype == "float8_e4m3fn":
        codes = quotients.astype(ml_dtypes.float8_e4m3fn)
    else:
        codes = np.rint(quotients).astype(np.int8)
    return codes, scales.astype(ml_dtypes.bfloat16)


def packed(codes, dtype):
    """In words: of S tokens, S / P words hold one of every P-th part each, the first in the lowest bits."""
    bits = 4 if dtype == "int4" else 8
    *before, _, dim = codes.shape
    parts = codes.view(np.uint8).astype(np.uint64).reshape(*before, 32 // bits, -1, dim) % 2**bits
    return sum(parts[..., i, :, :] << np.uint64(bits * i) for i in range(32 // bits)).astype(np.uint32)


def as_pairs(keys, values, quantisation):
    """What `quantise` shall return, and the dequantised keys and values."""
    q, (*before, length, dim) = quantisation, keys.shape
    by_group = keys.reshape(*before, length // q.group_size, q.group_size, dim)
    by_channels = values.reshape(*before, length, -1, min(q.group_size, dim))
    (key_codes, key_scales), (codes, scales) = in_numpy(by_group, -2, q.dtype), in_numpy(by_channels, -1, q.dtype)
    wide = [
        (c.astype(np.float32) * s.astype(np.float32)).reshape(keys.shape)
        for c, s in ((key_codes, key_scales), (codes, scales))
    ]
    by_part = np.swapaxes(scales[..., 0].reshape(*by_group.shape[:-1], -1), -1, -2)
    return {
        "keys.codes": packed(key_codes, q.dtype),
        "keys.scales": key_scales[..., 0, :],
        "values.codes": packed(codes.reshape(by_group.shape), q.dtype),
        "values.scales": by_part.reshape(*by_group.shape[:-2], -1),
    }, wide


def bits(x):
    x = np.asarray(x)
    return x if x.dtype == np.uint32 else x.view(np.uint16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e4, 1e36])
def test_equals_numpy_bit_for_bit(dtype, spread):
    rng = np.random.default_rng(0)
    shape = 2, 3, 64, 32
    keys, values = (np.float32(spread) * rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    q = Quantisation(dtype, group_size=16)
    ours = jax.jit(quantise, static_argnums=2)(keys, values, q)
    expected, wide = as_pairs(keys, values, q)
    for name, array in expected.items():
        found = operator.attrgetter(name)(ours)
        assert found.shape == array.shape
        np.testing.assert_array_equal(bits(found), bits(array), err_msg=name)
    for x, y in zip(ours.dequantised(jnp.float32), wide, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
@given(x=arrays.arrays(np.float32, (8, 8), elements=FLOATS))
@settings(max_examples=150, deadline=None)
def test_errors_are_bounded(dtype, x):
    q = Quantisation(dtype, group_size=8)
    stored = quantise(jnp.asarray(x), jnp.asarray(x), q)
    both = zip(stored.dequantised(jnp.float32), (stored.keys.scales, stored.values.scales), (0, 1), strict=True)
    for wide, scales, axis in both:
        wide, scales = np.asarray(wide), np.asarray(scales, np.float64).reshape((1, 8) if axis == 0 else (8, 1))
        assert np.isfinite(wide).all()
        error = np.abs(wide.astype(np.float64) - x)
        if dtype == "float8_e4m3fn":  # three bits of mantissa, and numbers below the least normal one, 2^-6
            bound = np.maximum(np.abs(x) * 2.0**-4, scales * 2.0**-10)
        else:
            bound = scales / 2 + np.where(np.abs(x) > 3.36e38, scales / 2, 0)  # a scale rounded up would overflow
        # below the least float32 that is normal, scales and quotients may be flushed to zero
        assert (error <= bound * (1 + 1e-6) + LARGEST_CODES[dtype] * float(TINY)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_magnitudes_that_float16_scales_could_not_hold(dtype):
    x = np.float32([[1e38, -3.4028235e38, 0, 1e37] * 4] * 16)
    stored = quantise(jnp.asarray(x), jnp.asarray(x), Quantisation(dtype, group_size=16))
    for wide in stored.dequantised(jnp.float32):
        assert np.isfinite(wide).all()
        np.testing.assert_allclose(np.abs(wide).max(), 3.4028235e38, rtol=0.01)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_give_the_attention_over_dequantised_pairs(dtype, monkeypatch):
    monkeypatch.setattr("restkv_jax.kernels.quantised_attention.SLOTS_AT_ONCE", 48)
    rng = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    q = Quantisation(dtype, group_size=16)
    stored = quantise(normal(3, 2, 2, 112, 16), normal(3, 2, 2, 112, 16), q)
    positions = jnp.where(jnp.asarray(rng.random((2, 2, 112)) > 0.3), jnp.arange(112), -1)
    queries = Queries(normal(2, 2, 3, 1, 16), jnp.array([[111], [90]]), 100)
    layer = jax.tree.map(lambda x: x[2], stored)
    expected = attend(queries, Pairs(*layer.dequantised(jnp.float32), positions))
    state = read_quantised(queries, stored, jnp.int32(2), positions)
    np.testing.assert_allclose(state.context(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_values_are_kept_in_float16_beside_a_sink(dtype):
    """A sink's weight is 1 and those of the others e^-10: times a scale of 1e-4 they are below what float16 holds."""
    normal = np.random.default_rng(9).standard_normal
    keys, values = 0.01 * normal((1, 1, 1, 1024, 16)), 0.05 + 0.01 * normal((1, 1, 1, 1024, 16))
    keys[..., 0, :], values[..., 0, :] = 10 / 16, 1e-4
    stored = quantise(jnp.asarray(keys, jnp.float16), jnp.asarray(values, jnp.float16), Quantisation(dtype, 16))
    positions = jnp.arange(1024)[None, None]
    queries = Queries(jnp.ones((1, 1, 1, 1, 16), jnp.float16), jnp.array([[1023]]), 2**30)
    pairs = Pairs(*jax.tree.map(lambda x: x[0], stored).dequantised(jnp.float32), positions)
    exact = attend(queries.replace(vectors=queries.vectors.astype(jnp.float32)), pairs)
    found = read_quantised(queries, stored, jnp.int32(0), positions).context()
    assert jnp.linalg.norm(found - exact) < 0.005 * jnp.linalg.norm(exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_of_distant_tokens_give_the_softmax_over_dequantised_ones(dtype, monkeypatch):
    """Three blocks of distant keys for two KV heads in four layers, read 40 slots at a time: two groups of 16."""
    monkeypatch.setattr("restkv_jax.kernels.distant.SLOTS_AT_ONCE", 40)
    rng, q = np.random.default_rng(2), Quantisation(dtype, group_size=16)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    keys, values = quantise_keys(normal(1, 1, 2, 3, 112, 16), q), quantise_values(normal(4, 2, 2, 112, 16), q)
    positions = jnp.broadcast_to(jnp.arange(112), (1, 1, 2, 3, 112))
    queries = Queries(normal(2, 2, 3, 1, 16), jnp.array([[111], [90]]), 100)
    rest = positions, jnp.int32(2), jnp.array([2, 0]), jnp.array([112, 77]), jnp.array([[True, True], [False, True]])
    found, expected = (
        read_distant(empty_softmax(queries.vectors), queries, *stores, *rest)
        for stores in ((keys, values), (keys.dequantised(jnp.float32), values.dequantised(jnp.float32)))
    )
    np.testing.assert_allclose(found.context(), expected.context(), rtol=1e-5, atol=1e-6)
    assert not np.asarray(found.context())[1, 0].any(), "nothing was to be read"


@pytest.mark.parametrize(("dtype", "most"), [("int4", 0.28), ("int8", 0.53), ("float8_e4m3fn", 0.53)])
@pytest.mark.parametrize("dim", [64, 128])
def test_bytes_are_what_is_promised(dtype, most, dim):
    stored = jax.eval_shape(lambda: empty_pairs((4, 1, 2, 4096, dim), Quantisation(dtype, 64)))
    bytes_ = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(stored))
    assert bytes_ <= most * 2 * 2 * (4 * 2 * 4096 * dim)


@pytest.mark.parametrize(("fields", "error", "words"), [
    (dict(dtype="int2"), ValueError, "cache_dtype='int2' is unknown; choose from 'int8', 'int4', 'float8_e4m3fn'"),
    (dict(dtype="int8", group_size=1), ValueError, "group_size=1 must be at least 2"),
    (dict(dtype="int8", residual=0), ValueError, "residual=0 must be at least 1"),
    (dict(dtype="int8", residual=1.5), TypeError, "residual=1.5 must be an integer"),
    (dict(dtype="int4", group_size=12), ValueError, "group_size=12 does not fill words of 8 codes of int4"),
])  # fmt: skip
def test_quantisations_that_make_no_sense(fields, error, words):
    with pytest.raises(error, match=words):
        Quantisation(**fields)


def test_groups_that_do_not_divide_the_head_dimension():
    with pytest.raises(ValueError, match=r"group_size=64 does not divide the head dimension 80, .* 8, 10, 16, 20"):
        Quantisation("int8", 64).check_dim(80)
    Quantisation("int4", 64).check_dim(48)  # a group of all channels


def test_quantisations_are_written_as_text():
    assert parse_quantisation("int8") == Quantisation("int8")
    assert parse_quantisation(" int4(residual=64; group_size=16) ") == Quantisation("int4", 16, 64)
    with pytest.raises(ValueError, match=r"'group=3' is not group_size=N or residual=N"):
        parse_quantisation("int8(group=3)")
    with pytest.raises(ValueError, match=r"cache_dtype='int8\(' is not written as int8"):
        parse_quantisation("int8(")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pair_put_into_a_group_leaves_the_others_where_its_scale_reaches(dtype):
    rng, q = np.random.default_rng(3), Quantisation(dtype, group_size=8)
    keys, values = (rng.standard_normal((5, 8, 16)).astype(np.float32) for _ in range(2))
    group = jax.tree.map(lambda x: x[:, 0], quantise(keys, values, q))

    def wide(group):
        return [np.asarray(x).reshape(keys.shape) for x in group.dequantised(jnp.float32)]

    member = np.arange(5)
    small, large = np.float32(0.01) * keys[:, 0], 4 * np.abs(keys).max() * np.ones((5, 16), np.float32)
    others = np.arange(8) != member[:, None]
    for x, y in zip(wide(group.put(member, small, small)), wide(group), strict=True):
        np.testing.assert_array_equal(x[others], y[others])
    after = group.put(member, large, large)
    for x, y in zip(wide(after), wide(group), strict=True):
        np.testing.assert_allclose(x[~others], np.broadcast_to(large[:, None], keys.shape)[~others], rtol=2.0**-7)
        bound = 0.51 * np.asarray(after.keys.scales, np.float32).max() * {"float8_e4m3fn": 32}.get(dtype, 1)
        assert np.abs(x[others] - y[others]).max() <= bound
