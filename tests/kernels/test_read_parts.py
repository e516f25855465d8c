"""The kernels of attention, interpreted, against the reference; which ranges of places stand for what is visible."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import is_interpreted, made_for_gpu
from hypothesis import given, settings
from hypothesis import strategies as st

import restkv_jax as rk
from restkv_jax.kernels import attention, splash
from restkv_jax.kernels.attention import attend, attend_shared, part_gradients, read_parts
from restkv_jax.kernels.pairs import Pairs, Queries, proximal, visible
from restkv_jax.kernels.ranges import Ranges, Span, count_below, find_below, ranges_of
from restkv_jax.models import decoder

UNLIMITED = 2**30
NEAR, FAR = Span(4, 50, is_proximal=True), Span(4, 50, is_proximal=False)


def prompt(pads, length, num_queries):
    """Positions of rows that are padded on the left: of the last queries, and of all keys."""
    positions = np.maximum(np.arange(length) - np.array(pads)[:, None], -1)
    return positions[:, -num_queries:], positions[:, None]


def kept(rows, heads, length, num_queries):
    """Positions as after an eviction: every KV head has other old keys, and empty slots first and last."""
    rng = np.random.default_rng(0)
    old = [np.sort(rng.permutation(2 * length)[: length - num_queries - 12]) for _ in range(rows * heads)]
    new = np.arange(2 * length, 2 * length + num_queries)
    keys = [np.concatenate([[-1] * 5, places, new, [-1] * 7]) for places in old]
    return np.broadcast_to(new, (rows, num_queries)), np.reshape(keys, (rows, heads, length))


def arrays(places, group=2, dim=64, dtype=jnp.float32, heads=2, spans=(None,), window=UNLIMITED, cap=None):
    """Queries and one set of pairs for each span, the values in common."""
    of_queries, of_keys = (jnp.asarray(x, jnp.int32) for x in places)
    batch, num_queries, length = *of_queries.shape, of_keys.shape[2]
    draw = iter(jax.random.split(jax.random.key(0), 2 + len(spans)))

    def normal(*shape):
        return jax.random.normal(next(draw), shape, dtype)

    vectors = normal(batch, heads, group, num_queries, dim) * dim**-0.5
    values = normal(batch, heads, length, dim)
    parts = tuple(Pairs(normal(batch, heads, length, dim), values, of_keys) for _ in spans)
    return Queries(vectors, of_queries, jnp.int32(window), cap), parts


CONFIG = dict(
    model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.3, eos_token_id=None,
)  # fmt: skip
CASES = {
    "one block": (dict(places=prompt([0], 256, 256)), (None,)),
    "a chunk behind padding": (dict(places=prompt([37, 200], 384, 128)), (None,)),
    "a window, padding longer than a block": (dict(places=prompt([0, 300], 384, 256), window=70), (None,)),
    "soft cap": (dict(places=prompt([0], 256, 128), dim=128, group=4, cap=3.0), (None,)),
    "no whole blocks": (dict(places=prompt([7], 333, 200), dim=80, group=3), (None,)),
    "other places for every head": (dict(places=kept(2, 2, 400, 128), dim=96), (None,)),
    "shared keys": (dict(places=prompt([0, 150], 384, 256)), (NEAR, FAR)),
    "shared keys and a window": (dict(places=prompt([0, 150], 384, 256), window=90), (NEAR, FAR)),
    "bfloat16": (dict(places=prompt([0], 512, 256), dim=256, group=1, heads=1, dtype=jnp.bfloat16), (None,)),
}


FAST = "a window, padding longer than a block", "other places for every head", "shared keys"
"""The others too take a few seconds, but they are many."""


@pytest.mark.parametrize("implementation", ["splash", "triton"])
@pytest.mark.parametrize("case", [pytest.param(x, marks=[] if x in FAST else pytest.mark.slow) for x in CASES])
def test_agrees_with_the_reference(case, implementation):
    options, spans = CASES[case]
    queries, parts = arrays(**options, spans=spans)
    interpret = is_interpreted(read_parts.implementations[implementation].platform)
    context, normaliser = read_parts.force(implementation)(queries, parts, spans=spans, interpret=interpret)
    expected, total = read_parts.reference(queries, parts, spans=spans)
    assert context.dtype == expected.dtype
    tolerance = 1e-2 if context.dtype == jnp.bfloat16 else 2e-6
    np.testing.assert_allclose(context.astype(jnp.float32), expected.astype(jnp.float32), atol=tolerance)
    np.testing.assert_allclose(normaliser, total, rtol=1e-6, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["a chunk behind padding", "soft cap", "no whole blocks", "shared keys", "bfloat16"])
def test_gradients_agree_with_the_reference(case):
    options, spans = CASES[case]
    queries, parts = arrays(**options, spans=spans)
    context, normaliser = read_parts.reference(queries, parts, spans=spans)
    gradient = jax.random.normal(jax.random.key(1), context.shape, context.dtype)
    given = queries, parts, normaliser, (context.astype(jnp.float32) * gradient).sum(-1), gradient
    found = part_gradients.force("splash")(*given, spans=spans, interpret=True)
    expected = part_gradients.reference(*given, spans=spans)
    tolerance = 1e-2 if context.dtype == jnp.bfloat16 else 4e-6
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=tolerance * float(jnp.abs(theirs).max()))


@settings(deadline=None, max_examples=100)
@given(data=st.data(), span=st.sampled_from([None, NEAR, FAR]), window=st.sampled_from([UNLIMITED, 1, 30, 200]))
def test_ranges_are_what_is_visible(data, span, window):
    positions = sorted(data.draw(st.sets(st.integers(0, 150), max_size=60)))
    before = data.draw(st.integers(0, 64 - len(positions)))
    keys = jnp.asarray([[[-1] * before + positions + [-1] * (64 - len(positions) - before)]], jnp.int32)
    own = jnp.asarray([sorted(data.draw(st.lists(st.integers(-1, 170), min_size=9, max_size=9)))], jnp.int32)
    queries = Queries(jnp.zeros((1, 1, 1, 9, 8)), own, jnp.int32(window))
    expected = visible(queries, keys)
    if span is not None:
        near = proximal(queries, keys, span.sink, span.recent)
        expected &= near if span.is_proximal else ~near
    ranges = jax.jit(ranges_of, static_argnums=0)(span, queries, keys)
    places = jnp.arange(keys.shape[2])
    inside = [(places >= r.first[..., None]) & (places < r.end[..., None]) for r in ranges]
    np.testing.assert_array_equal(sum(x.astype(int) for x in inside), expected)
    assert all((jnp.where(r.see(), r.first, UNLIMITED) >= r.floor[..., None]).all() for r in ranges)


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_counting_finds_what_looking_up_finds(data):
    places = st.lists(st.integers(-1, 40), min_size=12, max_size=12)
    positions = jnp.asarray([[sorted(data.draw(places))], [sorted(data.draw(places))]], jnp.int32)
    bounds = jnp.asarray([[data.draw(places)], [data.draw(places)]], jnp.int32)
    expected = [[(row[0] < bound).sum() for bound in bounds[i, 0]] for i, row in enumerate(np.asarray(positions))]
    np.testing.assert_array_equal(count_below(positions, bounds)[:, 0], expected)
    np.testing.assert_array_equal(find_below(positions, bounds)[:, 0], expected)


@settings(deadline=None, max_examples=100)
@given(data=st.data(), length=st.sampled_from([1, 2, 127, 128, 4096, 65535, 131072, 2**18 + 5]))
def test_a_range_in_one_integer(data, length):
    code = splash.Code.of(length)
    floor = data.draw(st.integers(0, length))
    end = data.draw(st.integers(0, length))
    least = floor if data.draw(st.booleans()) else max(floor, end - code.every + 1)
    first = data.draw(st.integers(least, max(least, end))) if least != floor else floor
    written = code.write(Ranges(*(jnp.full(shape, x, jnp.int32) for shape, x in (((1, 1, 1), first), ((1, 1, 1), end))),
                                jnp.full((1, 1), floor, jnp.int32)))  # fmt: skip
    places = np.clip([floor, first - 1, first, end - 1, end, length - 1], floor, length)
    np.testing.assert_array_equal(code.holds(written[0, 0], jnp.asarray(places)), (places >= first) & (places < end))


@pytest.mark.parametrize("case", FAST)
def test_a_gpu_program_holds_the_kernel(case):
    options, spans = CASES[case]
    given = arrays(**options, spans=spans)
    with made_for_gpu():
        program = jax.jit(functools.partial(read_parts, spans=spans)).trace(*given)
        assert "attend_ranges" in program.lower(lowering_platforms=("cuda",)).as_text()
        assert "attend_ranges" not in program.lower(lowering_platforms=("cpu",)).as_text()


def refused(length, **options):
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    places = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((1, 128), (), (1, 1, length)))
    positions, window, of_keys = places
    queries = Queries(shape((1, 1, 1, 128, 64)), positions, window, None, options.get("widest"))
    pairs = Pairs(shape((1, 1, length, 64)), shape((1, 1, length, 64)), of_keys)
    return splash.refusal(queries, (pairs,), spans=(options.get("span"),))


def test_what_the_kernels_cannot_take():
    assert refused(65408) is None and refused(131072, widest=0) is None and refused(131072, widest=4096) is None
    assert "windows of unknown size over 131072 keys are not below 16383" in refused(131072)
    assert "over 65472 keys are not below 32767" in refused(65472, widest=40000), "they are padded to 65536"
    assert "windows of 32768 over 131072 keys" in refused(131072, widest=32768)
    assert "windows of 20000 over" in refused(131072, widest=0, span=Span(4, 20000, True))
    assert "128 queries and 64 keys are less than a block" in refused(64)
    queries, parts = arrays(prompt([0], 256, 128), dim=12)
    with pytest.raises(ValueError, match=r"'splash' of _read_parts .*dimension 12 is not a multiple of 8; take 'ref"):
        attend(queries, parts[0], implementation="splash")
    with pytest.raises(ValueError, match="8 queries are less than a block of 16"):
        attend(queries.last(8), parts[0], implementation="triton")
    queries, parts = arrays(prompt([0], 256, 128))
    with pytest.raises(ValueError, match="it is for 'tpu', and programs are made for 'cpu'; take 'reference'"):
        attend_shared(queries, parts[0], parts[0].keys, sink=4, recent=9, implementation="splash")


@pytest.mark.slow
def test_a_whole_prefill_and_its_gradient(monkeypatch):
    model = rk.build_model(CONFIG)
    params = rk.init_params(model, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 256), 0, model.config.vocab_size)
    mask = jnp.arange(256) >= jnp.array([[0], [90]])

    def outcome():
        logits, cache = rk.prefill(model, params, tokens, mask, rk.restkv(64), chunk_size=128)
        loss = lambda params: decoder.logits(model, params, rk.read(model, params, tokens, mask)[0]).std()  # noqa: E731
        return logits, rk.kept_positions(cache), jax.grad(loss)(params)

    expected = outcome()
    jax.clear_caches()
    for name in ("read_parts", "part_gradients"):
        kernel = functools.partial(getattr(splash, name), interpret=True)
        monkeypatch.setattr(attention, name, kernel)
    found = outcome()
    jax.clear_caches()
    np.testing.assert_array_equal(found[1], expected[1])
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * float(jnp.abs(theirs).max()))
