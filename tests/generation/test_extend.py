"""Further tokens read onto a cache: against one reading, against step-by-step decoding, and each row as alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import restkv_jax as rk
from restkv_jax.eviction.select import places_to_keep, prefix_scores, score
from restkv_jax.generation.reading import bucket_length, cache_shapes
from restkv_jax.kernels.pairs import Pairs
from restkv_jax.models.decoder import Hooks, read

CONFIG = dict(
    model_type="llama", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=1024,
    initializer_range=0.3, eos_token_id=None, bos_token_id=None,
)  # fmt: skip
MODEL = rk.build_model(CONFIG)
SHARING = rk.pod.Sharing(rk.pod.LayerGroups([[0, 0], [0, 1], [2, 1], [2, 1]]), sink=3, recent=24)
SHARED = MODEL.clone(sharing=SHARING)
BUDGET, WINDOW = 40, 8
LENGTHS, NEW_LENGTHS = (100, 50, 20), (7, 30, 18)
KINDS = {
    "dense": (MODEL, rk.restkv(BUDGET, WINDOW)),
    "full": (MODEL, None),
    "evicting": (MODEL, rk.restkv(BUDGET, WINDOW, while_generating=True)),
    "paged": (MODEL, rk.laprox(BUDGET, WINDOW)),
    "shared": (SHARED, None),
    "shared and evicted": (SHARED, rk.snapkv(16, WINDOW)),
    "windowed": (rk.build_model(CONFIG | {"model_type": "mistral", "sliding_window": 30}), rk.snapkv(BUDGET, WINDOW)),
}
"""Models, and policies of the first reading."""


def kinds(quick, *others):
    """Parameters, all but the first marked slow."""
    return [quick, *(pytest.param(name, marks=pytest.mark.slow) for name in others if name != quick)]


@functools.cache
def weights():
    return rk.init_params(MODEL, jax.random.key(0))


@functools.cache
def texts(lengths, seed=0):
    tokens = np.random.default_rng(seed).integers(0, 61, (len(lengths), max(lengths)))
    mask = np.arange(max(lengths)) >= max(lengths) - np.array(lengths)[:, None]
    return np.where(mask, tokens, 7), mask


@functools.cache
def document(kind):
    model, policy = KINDS[kind]
    return rk.prefill(model, weights(), *texts(LENGTHS), policy, 40)[1]


def assert_close(logits, expected):
    """Equal but for the rounding of four layers in another order, on the scale of the largest."""
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def part(tokens, mask, starts, ends):
    """Tokens of each row from one place of it to another, padded on the left."""
    rows = [row[is_token][a:b] for row, is_token, a, b in zip(tokens, mask, starts, ends, strict=True)]
    longest = max(map(len, rows))
    padded = np.array([np.pad(row, (longest - len(row), 0)) for row in rows])
    return padded, np.arange(longest) >= longest - np.array([len(row) for row in rows])[:, None]


@pytest.mark.slow
@settings(deadline=None, max_examples=8)
@given(cuts=st.lists(st.floats(0.02, 0.98), max_size=3).map(sorted))
def test_pieces_of_any_size_equal_one_reading(cuts):
    tokens, mask = texts(LENGTHS)
    expected, whole = rk.prefill(MODEL, weights(), tokens, mask)
    lengths, cache, starts = mask.sum(1), None, np.zeros(3, int)
    for cut in [*cuts, 1.0]:
        ends = np.maximum((lengths * cut).astype(int), starts + 1)
        ends = lengths if cut == 1.0 else np.minimum(ends, lengths - 1)
        if (ends <= starts).any():
            continue
        piece = part(tokens, mask, starts, ends)
        read_on = (lambda *x: rk.prefill(*x)) if cache is None else (lambda *x, held=cache: rk.extend(*x, held))
        scores, cache = read_on(MODEL, weights(), *piece)
        starts = ends
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
    kept, all_kept = rk.kept_positions(cache), rk.kept_positions(whole)
    np.testing.assert_array_equal(kept[..., : max(LENGTHS)], all_kept[..., : max(LENGTHS)])


@pytest.mark.parametrize("kind", kinds("dense", "full", "paged", "shared", "shared and evicted", "windowed"))
@pytest.mark.slow
def test_equals_decoding_token_by_token(kind):
    """Without a policy nothing is evicted, so all at once is one after the other: what decoding reads is known."""
    model, _ = KINDS[kind]
    tokens = texts((9, 9, 9), seed=1)[0]
    scores, cache = rk.extend(model, weights(), tokens, None, document(kind))
    stepwise = jax.tree.map(jnp.copy, document(kind))
    for column in tokens.T:
        expected, stepwise = rk.decode_step(model, weights(), column, stepwise)
    assert_close(scores, expected)
    np.testing.assert_array_equal(cache.next_positions, stepwise.next_positions)
    ours, theirs = (np.sort(np.asarray(x.slot_positions()), -1)[..., -60:] for x in (cache, stepwise))
    np.testing.assert_array_equal(ours, theirs)
    assert int(document(kind).next_positions[0]) == LENGTHS[0], "the cache that was read onto stays"


@pytest.mark.parametrize("kind", kinds("dense", "evicting", "paged"))
def test_new_tokens_see_what_is_kept_and_each_other(kind):
    """A full cache whose positions are emptied where the other was evicted, fed token by token."""
    model, _ = KINDS[kind]
    tokens = texts((9, 9, 9), seed=1)[0]
    scores, _ = rk.extend(model, weights(), tokens, None, document(kind))
    restricted = jax.tree.map(jnp.copy, document("full"))
    kept = np.asarray(document(kind).slot_positions())
    is_kept = (np.asarray(restricted.positions)[..., None] == kept[..., None, :]).any(-1)
    restricted = restricted.replace(positions=jnp.where(is_kept, restricted.positions, -1))
    for column in tokens.T:
        expected, restricted = rk.decode_step(model, weights(), column, restricted)
    assert_close(scores, expected)


@pytest.mark.parametrize("kind", kinds("dense", *KINDS))
@pytest.mark.parametrize("judged", [False, True], ids=["appended", "judged anew"])
def test_every_row_is_read_as_alone(kind, judged):
    model, policy = KINDS[kind]
    policy = policy if judged else None
    tokens, mask = texts(NEW_LENGTHS, seed=2)
    scores, together = rk.extend(model, weights(), tokens, mask, document(kind), policy, 5)
    held = np.asarray(together.slot_positions())
    for row in (1, 2):
        old, real = texts(LENGTHS), mask[row]
        alone = rk.prefill(model, weights(), old[0][row : row + 1, old[1][row]], None, KINDS[kind][1], 40)[1]
        expected, alone = rk.extend(model, weights(), tokens[row : row + 1, real], None, alone, policy, 5)
        assert_close(scores[row], expected[0])
        kept = np.asarray(alone.slot_positions())[:, 0]
        common = min(kept.shape[-1], held.shape[-1])
        np.testing.assert_array_equal(np.sort(held[:, row], -1)[..., -common:], np.sort(kept, -1)[..., -common:])


@pytest.mark.parametrize("kind", kinds("paged", *KINDS))
@pytest.mark.slow
def test_questions_on_copies_of_a_document_equal_each_alone(kind):
    model, policy = KINDS[kind]
    tokens, mask = texts(LENGTHS)
    _, cache = rk.prefill(model, weights(), tokens[:2], mask[:2], policy, 3)
    copies = rk.repeat_rows(cache, 3)
    questions, real = texts((5, 12, 8, 9, 3, 12), seed=3)
    together = rk.generate(model, weights(), questions, real, None, 6, cache=copies)
    for row in range(6):
        of_row = slice(row // 3, row // 3 + 1)
        _, one = rk.prefill(model, weights(), tokens[of_row][:, mask[row // 3]], None, policy, 3)
        alone = rk.generate(model, weights(), questions[row : row + 1, real[row]], None, None, 6, cache=one)
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["restkv", "snapkv", "h2o", "tova", "streaming_llm", "knorm"])
def test_held_and_new_pairs_are_judged_by_the_new_window(name):
    """The first layer's queries do not depend on what was evicted: its choice is made again, by hand."""
    policy = rk.METHODS[name](budget=BUDGET)
    policy = policy.replace(window=min(policy.window, WINDOW))
    tokens, mask = texts(NEW_LENGTHS, seed=2)
    held = rk.prefill(MODEL, weights(), *texts(LENGTHS), policy, 1)[1]
    _, cache = rk.extend(MODEL, weights(), tokens, mask, held, policy, 1)
    padded = np.pad(tokens, ((0, 0), (64 - 30, 0))), np.pad(mask, ((0, 0), (64 - 30, 0)))
    positions = np.where(padded[1], np.cumsum(padded[1], 1) - 1 + np.array(LENGTHS)[:, None], -1)
    found = {}

    def layer_zero(view, memory, state):
        found["view"], found["pairs"] = view, memory.pairs
        return state

    with jax.disable_jit():
        shallow = rk.build_model(CONFIG | {"num_hidden_layers": 1})
        first = jax.tree.map(lambda x: x[:1], weights()["layers"])
        arguments = jnp.asarray(padded[0]), None, Hooks(observe=layer_zero, num_queries=64)
        read(shallow, {**weights(), "layers": first}, *arguments, positions=jnp.asarray(positions))
    old = held.held(0)
    new_positions = np.broadcast_to(positions[:, None], (3, 2, 64))
    together = [np.concatenate([a, b], 2) for a, b in zip(old[:2], found["pairs"][:2], strict=True)]
    together_positions = np.concatenate([old.positions, new_positions], 2)
    order = np.argsort(together_positions, -1, kind="stable")
    pairs = Pairs(
        *(jnp.asarray(np.take_along_axis(x, order[..., None], 2)) for x in together),
        jnp.asarray(np.take_along_axis(together_positions, order, 2)),
    )
    view = found["view"]._replace(index=0)
    scores = prefix_scores(policy, view, pairs, score(policy, view, pairs))
    places = places_to_keep(scores, pairs.positions, policy.window, BUDGET)
    expected = np.take_along_axis(np.pad(pairs.positions, ((0, 0), (0, 0), (0, 1)), constant_values=-1), places, -1)
    np.testing.assert_array_equal(rk.kept_positions(cache)[0][..., :BUDGET], expected)


@pytest.mark.parametrize("kind", kinds("paged", "dense", "evicting", "shared and evicted"))
@pytest.mark.slow
def test_a_conversation_stays_within_its_budget(kind):
    model, policy = KINDS[kind]
    cache, sizes = document(kind), set()
    for turn in range(6):
        tokens, mask = texts(NEW_LENGTHS, seed=turn)
        out = rk.generate(model, weights(), tokens, mask, policy, 5, cache=cache)
        cache = out.cache
        sizes.add((rk.cache_bytes(cache), jax.tree.structure(cache)))
    assert len(sizes) == 1
    assert int(cache.next_positions[0]) == LENGTHS[0] + 6 * (NEW_LENGTHS[0] + 4)
    recent = np.asarray(cache.slot_positions()).max(-1)
    np.testing.assert_array_equal(recent, np.broadcast_to(cache.next_positions[:, None] - 1, recent.shape))


@pytest.mark.parametrize("kind", kinds("full", "paged"))
def test_a_cache_without_room_grows(kind):
    model, policy = KINDS[kind]
    tokens, mask = texts(LENGTHS)
    _, cache = rk.prefill(model, weights(), tokens, mask, policy, 1)
    for turn in range(4):
        held, slots = np.asarray(cache.slot_positions() >= 0).sum(-1), cache.num_slots
        most = bucket_length(slots + max(NEW_LENGTHS) + 2 - int(cache.room())) + 16  # in whole pages
        _, cache = rk.extend(model, weights(), *texts(NEW_LENGTHS, seed=turn), cache, None, 2)
        assert int(cache.room()) >= 2 and cache.num_slots <= most
        now = np.asarray(cache.slot_positions() >= 0).sum(-1)
        np.testing.assert_array_equal(now - held, np.broadcast_to(np.array(NEW_LENGTHS)[:, None], held.shape))


def test_under_jit():
    model, policy = KINDS["dense"]
    tokens, mask = texts(NEW_LENGTHS, seed=2)
    extend = jax.jit(rk.extend, static_argnames=("model", "policy", "max_new_tokens"))
    for judged in (None, policy):
        expected, _ = rk.extend(model, weights(), tokens, mask, document("dense"), judged, 5)
        scores, cache = extend(model, weights(), tokens, mask, document("dense"), policy=judged, max_new_tokens=5)
        assert_close(scores, expected)
        assert int(cache.room()) >= 5


@pytest.mark.slow
def test_stream_and_generate_each_go_on_as_generate_does():
    model, policy = KINDS["dense"]
    tokens, mask = texts(NEW_LENGTHS, seed=2)
    out = rk.generate(model, weights(), tokens, mask, policy, 6, cache=document("dense"))
    steps = list(rk.stream(model, weights(), tokens, mask, policy, 6, cache=document("dense")))
    np.testing.assert_array_equal(np.stack(steps, 1), out.tokens)
    policies = policy, None, rk.laprox(BUDGET, WINDOW)
    each = rk.generate_each(model, weights(), tokens, mask, policies, 6, cache=document("dense"))
    for policy, one in zip(policies, each, strict=True):
        alone = rk.generate(model, weights(), tokens, mask, policy, 6, cache=document("dense"))
        np.testing.assert_array_equal(one.tokens, alone.tokens)


def by_hand(model, tokens, mask, policy, size):
    """Segments of a left-padded prompt, one extension after the other; rows that have not begun wait."""
    cache = None
    for start in range(0, tokens.shape[1], size):
        piece = tokens[:, start : start + size], mask[:, start : start + size]
        if cache is None:
            scores, cache = rk.prefill(model, weights(), *piece, policy, 4)
        else:
            scores, cache = rk.extend(model, weights(), *piece, cache, policy, 4)
    return scores, cache


@pytest.mark.parametrize("kind", kinds("dense", *KINDS))
def test_segments_are_one_extension_after_the_other(kind):
    model, policy = KINDS[kind]
    tokens, mask = texts((256,), seed=5)
    scores, cache = rk.prefill(model, weights(), tokens, mask, policy, 4, segment_size=64)
    expected, alone = by_hand(model, tokens, mask, policy, 64)
    assert_close(scores, expected)
    ours, theirs = (np.sort(np.asarray(x.slot_positions()), -1) for x in (cache, alone))
    common = min(ours.shape[-1], theirs.shape[-1])
    np.testing.assert_array_equal(ours[..., -common:], theirs[..., -common:])


@pytest.mark.slow
def test_segments_of_rows_of_unequal_length():
    model, policy = KINDS["dense"]
    tokens, mask = texts((250, 130, 40), seed=6)
    scores, cache = rk.prefill(model, weights(), tokens, mask, policy, 4, segment_size=64)
    for row in range(3):
        alone = tokens[row : row + 1, mask[row]]
        # a row of segments ends where a segment ends, so its first one is shorter
        expected, one = rk.prefill(model, weights(), alone, None, policy, 4, segment_size=64)
        if alone.shape[1] > 64:
            assert_close(scores[row], expected[0])
            np.testing.assert_array_equal(cache.positions[:, row], one.positions[:, 0])


@pytest.mark.parametrize("size", [64, 100, 300])
def test_a_percentage_is_of_the_prompts_bucket_whatever_the_segments(size):
    tokens, mask = texts((250,), seed=6)
    assert rk.bucket_length(250) == 256
    shapes = cache_shapes(MODEL, weights(), tokens, mask, rk.snapkv("25%", window=8), 4, segment_size=size)
    assert shapes == cache_shapes(MODEL, weights(), tokens, mask, rk.snapkv(64, window=8), 4, segment_size=size)


def test_segments_of_a_full_cache_equal_one_reading():
    tokens, mask = texts((250, 130, 40), seed=6)
    expected, whole = rk.prefill(MODEL, weights(), tokens, mask)
    scores, cache = rk.prefill(MODEL, weights(), tokens, mask, segment_size=48)
    assert_close(scores, expected)
    np.testing.assert_array_equal(rk.kept_positions(cache)[..., :250], rk.kept_positions(whole)[..., :250])


@pytest.mark.parametrize("kind", kinds("dense", "paged", "shared and evicted"))
def test_memory_follows_the_segment_and_not_the_prompt(kind):
    model, policy = KINDS[kind]

    def temporaries(length):
        def run(params, tokens):
            return rk.prefill(model, params, tokens, None, policy, 4, segment_size=128)

        arguments = weights(), jax.ShapeDtypeStruct((1, length), jnp.int32)
        memory = jax.jit(run).lower(*arguments).compile().memory_analysis()
        return memory.temp_size_in_bytes - 2 * 5 * length, memory.output_size_in_bytes

    (short, kept), (long, kept_of_long) = temporaries(1024), temporaries(16 * 1024)
    assert kept == kept_of_long
    assert long < 1.05 * short, "but for the tokens themselves and their mask"


@pytest.mark.parametrize(("changes", "error", "words"), [
    (dict(tokens=np.ones((3, 0), int)), ValueError, "the prompt is empty"),
    (dict(tokens=np.full((3, 4), 61)), ValueError, "out of the vocabulary of 61"),
    (dict(tokens=np.ones((2, 4), int)), ValueError, r"tokens has 2 rows, but the cache 3; restkv_jax.repeat_rows"),
    (dict(cache="essay.cache"), TypeError, "cache is of type str"),
    (dict(policy="restkv"), TypeError, "policy='restkv' must be an EvictionPolicy"),
    (dict(max_new_tokens=0), ValueError, "max_new_tokens=0"),
    (dict(sharing=SHARING), ValueError, "made without the model's sharing"),
])  # fmt: skip
def test_extensions_that_make_no_sense(changes, error, words):
    arguments = dict(tokens=np.ones((3, 4), int), mask=None, cache=document("dense")) | changes
    with pytest.raises(error, match=words):
        rk.extend(MODEL, weights(), **arguments)


def test_caches_that_do_not_fit():
    narrow = rk.build_model(CONFIG | {"num_hidden_layers": 2})
    with pytest.raises(ValueError, match="the cache is not of this model: it has num_hidden_layers=4, the model 2"):
        rk.extend(narrow, rk.init_params(narrow, jax.random.key(0)), np.ones((3, 4), int), None, document("dense"))
    halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights())
    with pytest.raises(TypeError, match="the cache holds float32, but the parameters are bfloat16"):
        rk.extend(MODEL, halved, np.ones((3, 4), int), None, document("dense"))
    _, used = rk.prefill(MODEL, weights(), *texts(LENGTHS), None, 4)
    rk.decode_step(MODEL, weights(), np.ones(3, int), used)
    with pytest.raises(ValueError, match="the cache was used by an earlier step"):
        rk.extend(MODEL, weights(), np.ones((3, 4), int), None, used)
    with pytest.raises(ValueError, match="segment_size=64 and a cache exclude each other"):
        rk.generate(MODEL, weights(), np.ones((3, 4), int), cache=document("dense"), segment_size=64)
    with pytest.raises(ValueError, match="segment_size=4 must be at least the policy's window=8"):
        rk.prefill(MODEL, weights(), np.ones((3, 40), int), None, KINDS["dense"][1], segment_size=4)
    with pytest.raises(ValueError, match="count=0 must be at least 1"):
        rk.repeat_rows(document("dense"), 0)
    with pytest.warns(UserWarning, match=r"the prompt's 1097 tokens .* exceed the model's maximum of 1024"):
        far = document("dense").replace(next_positions=jnp.array([1090, 50, 20]))
        rk.extend(MODEL, weights(), np.ones((3, 7), int), None, far)
