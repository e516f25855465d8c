"""The kernels that score keys, interpreted, against the plain references that define the scores."""

import functools
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import environment, is_interpreted, made_for_gpu

from restkv_jax.kernels import scores
from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.kernels.scores.mosaic import LANES
from restkv_jax.kernels.scores.parts import product, split

UNLIMITED = 2**30
KERNELS = {
    "column_sums": lambda q, p, gram, weights: (q, p, weights),
    "column_row_norms": lambda q, p, gram, weights: (q, p, gram),
    "averaged_attention_removal_error": lambda q, p, gram, weights: (q, p, gram, weights),
    "averaged_removal_error": lambda q, p, gram, weights: (q, p, gram, weights),
}
# B, K, G, w, T, D and what else differs: one key less than whole tiles, one more, less than a tile, several tiles
CASES = {
    "one short of a tile": ((1, 2, 3, 5, 127, 256), {"window": 40}),
    "one beyond a tile, bfloat16": ((2, 1, 4, 8, 129, 128), {"dtype": jnp.bfloat16, "cap": 20.0}),
    "tiles, rows padded": ((2, 2, 1, 1, 300, 96), {"tile": 128, "positions_of_heads": True}),
    "tiles, bfloat16, one row sees little": ((2, 1, 2, 3, 256, 80), {"tile": 128, "dtype": jnp.bfloat16, "window": 7}),
}


def draw(key, *shape, scale=1.0, dtype=jnp.float32):
    return (scale * jax.random.normal(jax.random.key(key), shape)).astype(dtype)


def arguments(shape, window=UNLIMITED, dtype=jnp.float32, cap=None, positions_of_heads=False):
    """Queries, pairs whose second row is padded for a third, Gram matrices and weights."""
    batch, num_kv_heads, group, width, length, dim = shape
    padding = jnp.array([[0], [length // 3]])[:batch]
    positions = jnp.where(jnp.arange(length) >= padding, jnp.arange(length) - padding, -1)
    heads = num_kv_heads if positions_of_heads else 1
    of_keys = jnp.broadcast_to(positions[:, None], (batch, heads, length))
    vectors = draw(0, batch, num_kv_heads, group, width, dim, scale=3 * dim**-0.5, dtype=dtype)
    keys, values = (draw(i, batch, num_kv_heads, length, dim, dtype=dtype) for i in (1, 2))
    queries = Queries(vectors, positions[:, -width:], jnp.int32(window), cap)
    gram = scores.output_gram(draw(3, num_kv_heads, group, dim, 2 * dim))
    return queries, Pairs(keys, values, of_keys), gram, jnp.linspace(0.1, 0.4, width)


def both(name, *arrays, implementation="pallas_tpu", **options):
    kernel = getattr(scores, name)
    reference = jax.jit(functools.partial(kernel.reference, **options))(*arrays)
    options["interpret"] = is_interpreted(kernel.implementations[implementation].platform)
    found = jax.jit(functools.partial(kernel.force(implementation), **options))(*arrays)
    assert found.shape == reference.shape and found.dtype == jnp.float32
    return np.asarray(found), np.asarray(reference)


FAST = "one beyond a tile, bfloat16", "tiles, rows padded"
"""The others too take a second or two, but they are many."""


@pytest.mark.parametrize("case", [pytest.param(x, marks=[] if x in FAST else pytest.mark.slow) for x in CASES])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_agree_with_their_references(name, case, monkeypatch):
    shape, options = CASES[case]
    if "tile" in options:
        options = dict(options)
        monkeypatch.setattr(scores.mosaic, "ELEMENTS", options.pop("tile") * LANES)
    options_of_kernel = {"tau": 0.5} if "cap" in options and "removal" in name else {}
    found, reference = both(name, *KERNELS[name](*arguments(shape, **options)), **options_of_kernel)
    assert (reference > 0).sum() > 10
    np.testing.assert_allclose(found, reference, rtol=1e-5 if "dtype" in options else 1e-4, atol=1e-30)
    np.testing.assert_array_equal(found == 0, reference == 0)


@pytest.mark.parametrize("case", [FAST[0], pytest.param(FAST[1], marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_for_gpu_agree_with_their_references(name, case):
    shape, options = CASES[case]
    options = {key: value for key, value in options.items() if key != "tile"}
    found, reference = both(name, *KERNELS[name](*arguments(shape, **options)), implementation="pallas_triton")
    np.testing.assert_allclose(found, reference, rtol=1e-5 if "dtype" in options else 1e-4, atol=1e-30)


@pytest.mark.parametrize("name", [*KERNELS, "attention_centres"])
def test_kernels_lower_for_cuda(name):
    options = {"count": 90} if name == "attention_centres" else {}
    take = KERNELS.get(name, lambda q, p, gram, weights: (q, p))
    arrays = jax.eval_shape(lambda: take(*arguments((1, 2, 4, 32, 1000, 128), dtype=jnp.bfloat16)))

    def lowered(function):
        with made_for_gpu():
            traced = jax.jit(functools.partial(function, **options)).trace(*arrays)
            return traced.lower(lowering_platforms=("cuda",)).as_text()

    kernel = getattr(scores, name)
    assert "__gpu$xla.gpu.triton" in lowered(kernel.implementations["pallas_triton"].function)
    is_trusted = kernel.implementations["pallas_triton"].trusted
    assert ("__gpu$xla.gpu.triton" in lowered(kernel)) == is_trusted == (name != "attention_centres")


@pytest.mark.parametrize(("dtype", "bits"), [(jnp.float32, 17), (jnp.bfloat16, 22)])
@pytest.mark.parametrize("name", ["averaged_attention_removal_error", "averaged_removal_error"])
def test_errors_do_not_cancel(name, dtype, bits, monkeypatch):
    """All queries attend to key 140 by nearly 1, and the values of some other keys are nearly its value."""
    monkeypatch.setattr(scores.mosaic, "ELEMENTS", 128 * LANES)
    queries, pairs, gram, weights = arguments((1, 1, 2, 4, 200, 64))
    direction = draw(5, 64)
    queries = queries.replace(vectors=jnp.broadcast_to(direction, queries.vectors.shape).astype(dtype))
    keys = (1e-3 * pairs.keys).at[:, :, 140].set(direction * 26 / (direction**2).sum())
    near = pairs.values[0, 0, 140] * (1 + 2e-3 * jnp.arange(1, 41)[:, None])
    values = pairs.values.at[:, :, 20:60].set(near)
    pairs = Pairs(keys.astype(dtype), values.astype(dtype), pairs.positions)
    found, reference = both(name, queries, pairs, gram, weights / weights.sum())
    assert (reference.argmax(-1) == 140).all() and (reference[..., 20] < 1e-2 * reference[..., 60:140].mean()).all()
    # products, and so the logit of 26 and values, are known to so many bits; other keys are all attended to by 5e-12
    np.testing.assert_allclose(found[..., 140], reference[..., 140], rtol=26 * 2.0**-bits)
    others = found[..., :140], reference[..., :140]
    np.testing.assert_allclose(*others, rtol=26 * 2.0**-bits, atol=2.0**-bits * others[1].max())


COUNTS = dict(zip(CASES, (90, 5, 90, 2), strict=True))


@pytest.mark.parametrize(
    ("case", "implementation"),
    [*((case, "pallas_tpu") for case in CASES), *((case, "pallas_triton") for case in FAST)],
)
def test_centres_agree_with_the_reference(case, implementation, monkeypatch):
    """Also where most probabilities are 0 and so equal: of them the first keys count."""
    count = COUNTS[case]
    shape, options = CASES[case]
    options = dict(options)
    monkeypatch.setattr(scores.mosaic, "ELEMENTS", options.pop("tile", 2 * LANES) * LANES)
    monkeypatch.setattr(scores.centres, "HELD", 8 * shape[4])  # a group's queries, at most eight at one time
    queries, pairs, _, _ = arguments(shape, **options)
    queries = queries.replace(vectors=queries.vectors * jnp.where(jnp.arange(shape[3]) % 2, 1, 50)[:, None])
    assert count == 5 or (scores.probabilities(queries, pairs) == 0).mean() > 0.3
    found, reference = both("attention_centres", queries, pairs, implementation=implementation, count=count)
    np.testing.assert_array_equal(found, reference)


def test_a_product_keeps_17_bits_of_float32_and_all_of_bfloat16():
    x, y = draw(0, 64, 128), draw(1, 128, 32)
    exact = np.asarray(x, np.float64) @ np.asarray(y, np.float64)
    size = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(y, np.float64))
    assert (np.abs(product(split(x), split(y)) - exact) < 2.0**-17 * size).all()
    assert (np.abs(product(split(x)[:1], split(y)[:1]) - exact) > 2.0**-12 * size).any()
    rough = y.astype(jnp.bfloat16)
    exact = np.asarray(rough, np.float64).T @ np.asarray(rough, np.float64)
    size = np.abs(np.asarray(rough, np.float64)).T @ np.abs(np.asarray(rough, np.float64))
    assert len(split(rough)) == 1 and (np.abs(product(split(rough), split(rough), (0, 0)) - exact) < 1e-6 * size).all()


@pytest.mark.slow
def test_every_device_of_a_mesh_reads_its_own():
    script = pathlib.Path(__file__).with_name("kernels_on_meshes.py")
    subprocess.run([sys.executable, str(script)], env=environment(8), check=True)


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((1, 1, 1, 1, 8, 12), jnp.float32, "the head dimension 12 is not a multiple of 8 up to 256"),
        ((1, 1, 1, 1, 8, 512), jnp.float32, "the head dimension 512 is not a multiple of 8 up to 256"),
        ((1, 1, 32, 1, 8, 256), jnp.float32, "Gram matrices of 32 query heads of 256 dimensions fill"),
        ((1, 1, 8, 300, 300, 8), jnp.float32, "8 query heads of 300 queries are more than 1024 in all"),
        ((1, 1, 1, 1, 8, 8), jnp.float16, "the kernels know float32 and bfloat16, not float16"),
    ],
)
def test_what_the_kernels_refuse(shape, dtype, reason):
    batch, num_kv_heads, group, width, length, dim = shape
    keys = np.zeros((batch, num_kv_heads, length, dim), dtype)
    queries = Queries(np.zeros((batch, num_kv_heads, group, width, dim), dtype), np.zeros((batch, width), int), 8)
    with pytest.raises(ValueError, match=f"'pallas_tpu' of _column_sums cannot be used: {reason}"):
        scores.column_sums.force("pallas_tpu")(queries, Pairs(keys, keys, np.zeros((batch, 1, length), int)), 1.0)


@pytest.mark.parametrize(("name", "passes"), [("column_sums", 2), ("column_row_norms", 3), ("attention_centres", 8)])
def test_kernels_say_what_they_move(name, passes):
    """Keys and values as often as they are read, but for queries, positions, Gram matrices and the scores."""
    shape = 1, 2, 4, 32, 131072, 128
    arrays = jax.eval_shape(lambda: arguments(shape, dtype=jnp.bfloat16))
    chosen = KERNELS[name](*arrays) if name in KERNELS else arrays[:2]
    options = {} if name in KERNELS else {"count": 90}
    kernel = functools.partial(getattr(scores, name).implementations["pallas_tpu"].function, **options)
    program = str(jax.make_jaxpr(kernel)(*chosen))
    moved = sum(int(found) for found in re.findall(r"bytes_accessed=(\d+)", program))
    keys, written = 2 * 2 * 131072 * 128, 4 * 2 * 4 * 131072
    assert passes * keys <= moved <= 1.1 * (passes * keys + written)
