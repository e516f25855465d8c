"""Quantised caches: what is in them, bit for bit, and what is read from them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import restkv_jax as rk
from restkv_jax.caches.quantised_paged import QuantisedPagedCache
from restkv_jax.kernels.quantised import LARGEST_CODES, Quantisation, quantise, quantise_keys, quantise_values

CONFIG = dict(
    model_type="llama", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=2048,
    initializer_range=0.3, eos_token_id=None, bos_token_id=None,
)  # fmt: skip
MODEL = rk.build_model(CONFIG)
SHARED = MODEL.clone(sharing=rk.pod.Sharing(rk.pod.LayerGroups([[0, 0], [0, 1], [0, 1]]), sink=3, recent=24))
KINDS = {
    "full": (MODEL, rk.full()),
    "evicted": (MODEL, rk.restkv(60, 8)),
    "while generating": (MODEL, rk.restkv(60, 8, while_generating=True, pooling="max")),
    "in pages": (MODEL, rk.adakv(60, 8)),
    "shared": (SHARED, rk.full()),
    "shared and evicted": (SHARED, rk.restkv(40, 8)),
}
"""By the kind of cache, what makes one."""
DTYPES = tuple(LARGEST_CODES)
LENGTHS = (120, 70, 5)
FIRST = 0
"""The first layer's keys and values follow from the tokens alone, so they are those of the plain cache."""


def of(dtype, group_size=16, residual=8):
    return Quantisation(dtype, group_size, residual)


@functools.cache
def weights():
    return rk.init_params(MODEL, jax.random.key(0))


def texts(lengths, seed=0):
    rng, most = np.random.default_rng(seed), max(lengths)
    return rng.integers(0, 61, (len(lengths), most)), np.arange(most) >= most - np.array(lengths)[:, None]


def as_stored(keys, values, q):
    """What the first tokens [n, D] are once they are quantised, the newest as they are; in plain words."""
    whole = max(len(keys) - q.residual, 0) // q.group_size * q.group_size
    groups = quantise(jnp.asarray(keys[:whole]), jnp.asarray(values[:whole]), q)
    return [np.concatenate([x, y[whole:]]) for x, y in zip(groups.dequantised(keys.dtype), (keys, values), strict=True)]


def assert_stored(ours, plain, layer=FIRST):
    """That a quantised cache holds a plain one's pairs of a layer, in their order, as `as_stored` says."""
    lengths, held, theirs = np.asarray(ours.lengths[layer]), ours.held(layer), plain.held(layer)
    np.testing.assert_array_equal(lengths, plain.lengths[layer])
    for row, head in np.ndindex(lengths.shape):
        n = lengths[row, head]
        np.testing.assert_array_equal(held.positions[row, head, :n], theirs.positions[row, head, :n])
        assert (held.positions[row, head, n:] == -1).all()
        expected = as_stored(theirs.keys[row, head, :n], theirs.values[row, head, :n], ours.quantisation)
        for x, y in zip(held[:2], expected, strict=True):
            np.testing.assert_array_equal(x[row, head, :n], y)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype"), [("full", "int8"), ("evicted", "int4")])
def test_holds_what_was_kept_after_prefill_steps_and_extensions(kind, dtype):
    q, (_, policy) = of(dtype), KINDS[kind]
    states = [rk.prefill(MODEL, weights(), *texts(LENGTHS), policy, 24, cache_dtype=x)[1] for x in (q, None)]
    assert_stored(*states)
    for token in texts((20,) * 3, seed=1)[0].T:
        states = [rk.decode_step(MODEL, weights(), token, cache)[1] for cache in states]
    assert_stored(*states)
    for turn, lengths in enumerate([(3, 40, 77), (90, 1, 18)]):
        states = [rk.extend(MODEL, weights(), *texts(lengths, turn), cache, None, 7)[1] for cache in states]
        assert_stored(*states)


@pytest.mark.slow
def test_is_judged_in_full_precision():
    """What a prefill keeps, logits included, is what it keeps without quantisation."""
    tokens, mask = texts(LENGTHS)
    expected, plain = rk.prefill(MODEL, weights(), tokens, mask, rk.restkv(60, 8), 8)
    logits, cache = rk.prefill(MODEL, weights(), tokens, mask, rk.restkv(60, 8), 8, cache_dtype=of("int4"))
    np.testing.assert_array_equal(logits, expected)
    np.testing.assert_array_equal(rk.kept_positions(cache), rk.kept_positions(plain))
    for layer in range(3):
        assert_stored(cache, plain, layer)


@pytest.mark.parametrize("dtype", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_a_step_reads_what_is_held(dtype):
    """As a plain cache whose pairs were quantised and dequantised."""
    _, cache = rk.prefill(MODEL, weights(), *texts(LENGTHS), None, 8, cache_dtype=of(dtype))
    _, plain = rk.prefill(MODEL, weights(), *texts(LENGTHS), None, 8)
    held = [cache.held(layer) for layer in range(3)]
    plain = plain.replace(keys=jnp.stack([x.keys for x in held]), values=jnp.stack([x.values for x in held]))
    token = np.array([3, 5, 7])
    logits, _ = rk.decode_step(MODEL, weights(), token, cache)
    np.testing.assert_allclose(logits, rk.decode_step(MODEL, weights(), token, plain)[0], rtol=1e-4, atol=2e-5)


def test_an_extension_judges_what_the_cache_holds():
    """It keeps what it would of a plain cache whose pairs were quantised and dequantised, and reads the same."""
    _, cache = rk.prefill(MODEL, weights(), *texts(LENGTHS), None, 8, cache_dtype=of("int4"))
    _, plain = rk.prefill(MODEL, weights(), *texts(LENGTHS), None, 8)
    held = [cache.held(layer) for layer in range(3)]
    alike = plain.replace(keys=jnp.stack([x.keys for x in held]), values=jnp.stack([x.values for x in held]))
    further = texts((30, 12, 25), 2), rk.restkv(60, 8), 4
    (logits, ours), (expected, theirs), (_, exact) = (
        rk.extend(MODEL, weights(), *further[0], x, *further[1:]) for x in (cache, alike, plain)
    )
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=2e-5)
    np.testing.assert_array_equal(rk.kept_positions(ours), rk.kept_positions(theirs))
    assert (np.asarray(rk.kept_positions(ours)) != rk.kept_positions(exact)).any(), "or it would not matter"


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.slow
def test_evicts_while_generating_what_a_plain_cache_does(dtype):
    """Every pair held is that of its token: to the last bit in the residual window, else within the scale's reach."""
    q, policy = of(dtype), rk.restkv(40, 6, while_generating=True, pooling="max")
    states = [rk.prefill(MODEL, weights(), *texts(LENGTHS), policy, 200, cache_dtype=x)[1] for x in (q, None)]
    _, full = rk.prefill(MODEL, weights(), *texts(LENGTHS), None, 100)
    ours, plain = states
    np.testing.assert_array_equal(rk.kept_positions(ours), rk.kept_positions(plain))
    for token in texts((70,) * 3, seed=1)[0].T:
        ours, plain, full = (rk.decode_step(MODEL, weights(), token, cache)[1] for cache in (ours, plain, full))
    held, true, recent = ours.held(FIRST), full.held(FIRST), ours.recent(FIRST)
    positions = np.asarray(held.positions)
    assert ours.num_slots == 40 and (positions.max(-1) == np.asarray(ours.next_positions)[:, None] - 1).all()
    np.testing.assert_array_equal(recent.positions, positions[..., -8:])
    places = np.argsort(np.where(true.positions < 0, 2**30, true.positions), -1)  # of the full cache, by position
    places = np.take_along_axis(places, positions, -1)[..., None]
    loose = {"int8": 0.03, "float8_e4m3fn": 0.1, "int4": 0.25}[dtype]
    for x, y, newest in zip(held[:2], true[:2], recent[:2], strict=True):
        exact = np.take_along_axis(np.asarray(y), places, 2)
        np.testing.assert_array_equal(newest, exact[:, :, -8:])
        np.testing.assert_allclose(x, exact, rtol=0, atol=loose * np.abs(exact).max())
    if dtype == "int8":
        both = [np.sort(cache.positions, -1) for cache in (ours, plain)]
        common = [len(np.intersect1d(*(x[place] for x in both))) for place in np.ndindex(3, 3, 2)]
        assert np.mean(common) >= 0.9 * 40


@pytest.mark.slow
def test_pages_hold_what_was_kept_after_prefill_steps_and_extensions():
    q, (_, policy) = of("int4"), KINDS["in pages"]
    states = [rk.prefill(MODEL, weights(), *texts(LENGTHS), policy, 24, cache_dtype=x)[1] for x in (q, None)]
    assert [type(cache) for cache in states] == [QuantisedPagedCache, rk.PagedCache]
    assert_paged(*states)
    for token in texts((20,) * 3, seed=1)[0].T:
        states = [rk.decode_step(MODEL, weights(), token, cache)[1] for cache in states]
    assert_paged(*states)
    states = [rk.extend(MODEL, weights(), *texts((3, 40, 77)), cache, None, 7)[1] for cache in states]
    assert_paged(*states)


def assert_paged(ours, plain):
    """As `assert_stored`, once the pairs of every row and KV head stand in their order."""
    lengths, pairs = np.asarray(ours.lengths[FIRST]), [cache.held(FIRST) for cache in (ours, plain)]
    np.testing.assert_array_equal(lengths, plain.lengths[FIRST])
    for row, head in np.ndindex(lengths.shape):
        positions = [np.asarray(x.positions[row, head]) for x in pairs]
        places = [np.argsort(np.where(x < 0, 2**30, x), kind="stable")[: lengths[row, head]] for x in positions]
        np.testing.assert_array_equal(*(x[place] for x, place in zip(positions, places, strict=True)))
        (keys, values), theirs = ([x[row, head][place] for x in y[:2]] for y, place in zip(pairs, places, strict=True))
        for x, y in zip((keys, values), as_stored(*map(np.asarray, theirs), ours.quantisation), strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("kind", "dtype"), [("shared", "int8"), ("shared and evicted", "int4")])
@pytest.mark.slow
def test_distant_tokens_are_in_groups_and_what_leaves_the_ring_joins_one(kind, dtype):
    model, policy = KINDS[kind]
    options = model, weights(), *texts(LENGTHS), policy, 30
    ours, plain = (rk.prefill(*options, cache_dtype=x)[1] for x in (of(dtype), None))
    np.testing.assert_array_equal(rk.kept_positions(ours)[..., : plain.num_slots], rk.kept_positions(plain))
    keys, values = (in_groups(x) for x in distant(plain))
    expected = quantise_keys(keys, of(dtype)), quantise_values(values, of(dtype))
    for found, x in zip(distant(ours), expected, strict=True):
        np.testing.assert_array_equal(found, x.dequantised(jnp.float32))

    for token in texts((30,) * 3, seed=1)[0].T:
        ours, plain = (rk.decode_step(model, weights(), token, cache)[1] for cache in (ours, plain))
    np.testing.assert_array_equal(ours.keys[0], plain.keys[0])
    np.testing.assert_array_equal(ours.distant_lengths, plain.distant_lengths)
    steps = {"int8": 127, "float8_e4m3fn": 14, "int4": 7}[dtype]
    for exact, found in zip(distant(plain, 1), distant(ours, 1), strict=True):
        exact = in_groups(exact)
        # of one step at the group's largest number; a scale that grew has rounded its group twice
        assert np.abs(found - exact).max() <= 1.01 * np.abs(exact).max() / steps


def distant(cache, first=None):
    """Distant keys of all blocks, [B, R, N, D], and values [L, B, K, N, D], or those of the `first` only."""
    return (
        np.asarray(cache.wide(cache.distant_keys))[0, 0, :, :first],
        np.asarray(cache.wide(cache.distant_values))[:first],
    )


def in_groups(x):
    return np.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % 16), (0, 0)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_generated_as_alone(kind):
    (model, policy), (tokens, mask), (further, unpadded) = KINDS[kind], texts(LENGTHS), texts((9, 4, 30), 2)
    out = rk.generate(model, weights(), tokens, mask, policy, 40, cache_dtype=of("int8"))
    asked = rk.generate(model, weights(), further, unpadded, policy, 20, cache=out.cache)
    for row, length in enumerate(LENGTHS[:2]):
        own = tokens[row : row + 1, -length:], None
        alone = rk.generate(model, weights(), *own, policy, 40, cache_dtype=of("int8"))
        np.testing.assert_array_equal(out.tokens[row], alone.tokens[0])
        own = further[row : row + 1], unpadded[row : row + 1]
        alone = rk.generate(model, weights(), *own, policy, 20, cache=alone.cache)
        np.testing.assert_array_equal(asked.tokens[row], alone.tokens[0])


@pytest.mark.slow
def test_segments_further_questions_and_several_policies():
    q, (tokens, mask) = of("int8"), texts(LENGTHS)
    options = dict(policy=rk.restkv(60, 8), max_new_tokens=6)
    out = rk.generate(MODEL, weights(), tokens, mask, **options, cache_dtype=q, segment_size=32)
    assert out.cache.quantisation == q
    asked = rk.generate(MODEL, weights(), *texts((9, 4, 30), 2), **options, cache=out.cache)
    assert asked.cache.quantisation == q
    streamed = rk.stream(MODEL, weights(), *texts((9, 4, 30), 2), **options, cache=out.cache)
    np.testing.assert_array_equal(np.stack(list(streamed), 1), asked.tokens)
    copies = rk.repeat_rows(out.cache, 2)
    twice = rk.generate(MODEL, weights(), *(np.repeat(x, 2, 0) for x in texts((9, 4, 30), 2)), **options, cache=copies)
    np.testing.assert_array_equal(twice.tokens, np.repeat(asked.tokens, 2, 0))
    policies = rk.restkv(60, 8), rk.full(), rk.snapkv(60, 8)
    each = rk.generate_each(MODEL, weights(), tokens, mask, policies, 6, cache_dtype=q)
    for policy, one in zip(policies, each, strict=True):
        alone = rk.generate(MODEL, weights(), tokens, mask, policy, 6, cache_dtype=q)
        np.testing.assert_array_equal(one.tokens, alone.tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_comes_back_from_a_file(kind, tmp_path):
    (model, policy), dtype = KINDS[kind], DTYPES[list(KINDS).index(kind) % 3]
    _, cache = rk.prefill(model, weights(), *texts(LENGTHS), policy, 30, cache_dtype=of(dtype))
    rk.save_cache(tmp_path / "a.cache", cache, model, weights())
    loaded = rk.load_cache(tmp_path / "a.cache", model, weights())
    assert loaded.quantisation == cache.quantisation
    if kind in ("full", "evicted"):
        assert loaded.num_slots == cache.lengths.max(), "the room is not stored"
        for layer in range(3):
            for x, y in zip(loaded.held(layer), cache.held(layer), strict=True):
                np.testing.assert_array_equal(x, y[:, :, : loaded.num_slots])
    else:
        jax.tree.map(np.testing.assert_array_equal, loaded, cache)


def test_a_cache_from_a_file_goes_on_and_keeps_its_dtype(tmp_path):
    _, cache = rk.prefill(MODEL, weights(), *texts(LENGTHS), rk.restkv(60, 8), 30, cache_dtype=of("int4"))
    rk.save_cache(tmp_path / "a.cache", cache, MODEL, weights())
    loaded, questions = rk.load_cache(tmp_path / "a.cache", MODEL, weights()), texts((9, 4, 30), 2)
    expected = rk.generate(MODEL, weights(), *questions, max_new_tokens=8, cache=cache)
    again = rk.generate(MODEL, weights(), *questions, max_new_tokens=8, cache=loaded)
    np.testing.assert_array_equal(again.tokens, expected.tokens)
    with pytest.raises(ValueError, match=r"the cache stores Quantisation.*leave cache_dtype out"):
        rk.extend(MODEL, weights(), *questions, loaded, cache_dtype="int8")


@pytest.mark.parametrize(("dtype", "most"), [("int4", 0.28), ("int8", 0.53), ("float8_e4m3fn", 0.53)])
@pytest.mark.parametrize(("dim", "length"), [(128, 16384), (64, 32768)])
def test_bytes_are_what_is_promised(dim, length, dtype, most):
    model = rk.build_model(CONFIG | {"head_dim": dim})
    params = jax.eval_shape(lambda key: rk.init_params(model, key, jnp.bfloat16), jax.random.key(0))
    prompts = jax.ShapeDtypeStruct((1, length), jnp.int32)
    sizes = [
        rk.cache_bytes(
            jax.eval_shape(
                lambda params, tokens, x=x: rk.prefill(model, params, tokens, max_new_tokens=64, cache_dtype=x)[1],
                params,
                prompts,
            )
        )
        for x in (dtype, None)
    ]
    assert sizes[0] <= most * sizes[1]


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_step_never_holds_a_layer_in_full_precision(dtype):
    """Temporaries of a step do not follow the slots; the cache is rewritten in place."""

    def temporaries(slots):
        shape = jax.eval_shape(
            lambda params, tokens: rk.prefill(MODEL, params, tokens, max_new_tokens=slots, cache_dtype=dtype)[1],
            weights(),
            jax.ShapeDtypeStruct((1, 64), jnp.int32),
        )
        step = jax.jit(functools.partial(rk.decode_step, MODEL), donate_argnums=2)
        memory = step.lower(weights(), jax.ShapeDtypeStruct((1,), jnp.int32), shape).compile().memory_analysis()
        assert memory.alias_size_in_bytes >= rk.cache_bytes(shape)
        return memory.temp_size_in_bytes - 4 * 2 * slots * 2 * 1, shape

    (short, _), (long, cache) = temporaries(4 * 1024), temporaries(32 * 1024)
    layer = 2 * 2 * cache.num_slots * 16 * 4
    assert long - short < 0.25 * layer, "positions and which of them are seen, but no keys and values"


@pytest.mark.parametrize(("options", "error", "words"), [
    (dict(cache_dtype="int2"), ValueError, "cache_dtype='int2' is unknown; choose from 'int8', 'int4'"),
    (dict(cache_dtype=8), TypeError, "cache_dtype=8 must be a name such as 'int8'"),
    (dict(cache_dtype=of("int8", 12)), ValueError, "group_size=12 does not divide the head dimension 16"),
    (dict(cache_dtype="int8", policy=rk.restkv(20, 8)), ValueError, "budget=20 holds no whole group of group_size=64"),
])  # fmt: skip
def test_what_makes_no_sense(options, error, words):
    with pytest.raises(error, match=words):
        rk.prefill(MODEL, weights(), *texts(LENGTHS), **options)


def test_a_budget_of_distant_tokens_that_fills_no_group():
    with pytest.raises(ValueError, match=r"budget=40 holds no whole group of group_size=64 tokens: nothing would be"):
        rk.prefill(SHARED, weights(), *texts(LENGTHS), rk.restkv(40, 8), cache_dtype=of("int8", group_size=64))


def test_a_plain_cache_is_not_quantised_later():
    _, plain = rk.prefill(MODEL, weights(), *texts(LENGTHS))
    with pytest.raises(ValueError, match="cache_dtype='int8', but the cache stores pairs as they are; leave"):
        rk.extend(MODEL, weights(), *texts((9, 4, 30)), plain, cache_dtype="int8")
