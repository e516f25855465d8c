"""Caches as files: what comes back is what was saved, and anything else is refused in one line."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import restkv_jax as rk
from restkv_jax.caches.stored import read_header

CONFIG = dict(
    model_type="llama", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
    initializer_range=0.3, eos_token_id=None, bos_token_id=None,
)  # fmt: skip
MODEL = rk.build_model(CONFIG)
GROUPS = rk.pod.LayerGroups([[0, 0], [0, 1], [0, 1]])
SHARED = MODEL.clone(sharing=rk.pod.Sharing(GROUPS, sink=3, recent=24))
SKIPPING = MODEL.clone(sharing=rk.pod.Sharing(GROUPS, sink=3, recent=24, skip_threshold=0.5))
KINDS = {
    "dense": (MODEL, rk.restkv(40, 8)),
    "evicting": (MODEL, rk.restkv(40, 8, while_generating=True, pooling="max")),
    "paged": (MODEL, rk.laprox(40, 8)),
    "shared": (SHARED, rk.snapkv(16, 8)),
    "skipping": (SKIPPING, None),
}


@functools.cache
def weights():
    return rk.init_params(MODEL, jax.random.key(0))


def cache_of(kind, new=4):
    model, policy = KINDS[kind]
    tokens = np.random.default_rng(0).integers(0, 61, (2, 90))
    mask = np.arange(90) >= np.array([[0], [40]])
    return model, rk.prefill(model, weights(), tokens, mask, policy, new)[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_goes_on_from_its_file(kind, tmp_path):
    model, cache = cache_of(kind)
    size = rk.save_cache(tmp_path / "a.cache", cache, model, weights(), note={"model": "a model"})
    assert size == (tmp_path / "a.cache").stat().st_size < rk.cache_bytes(cache) + 20_000
    again = rk.load_cache(tmp_path / "a.cache", model, weights())
    assert jax.tree.structure(again) == jax.tree.structure(cache)
    assert read_header(tmp_path / "a.cache").note == {"model": "a model"}
    questions = np.random.default_rng(1).integers(0, 61, (2, 9))
    expected = rk.generate(model, weights(), questions, None, None, 6, cache=cache)
    out = rk.generate(model, weights(), questions, None, None, 6, cache=again)
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    np.testing.assert_array_equal(rk.kept_positions(again)[..., :40], rk.kept_positions(cache)[..., :40])


def test_empty_slots_are_not_stored(tmp_path):
    model, cache = cache_of("dense", new=500)
    assert rk.save_cache(tmp_path / "a.cache", cache, model) < rk.cache_bytes(cache) / 8


def test_bfloat16_comes_back_bit_for_bit(tmp_path):
    halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights())
    _, cache = rk.prefill(MODEL, halved, np.ones((1, 70), int), None, rk.snapkv(40), 1)
    rk.save_cache(tmp_path / "a.cache", cache, MODEL)
    again = rk.load_cache(tmp_path / "a.cache", MODEL)
    used = again.num_slots
    np.testing.assert_array_equal(again.keys.view(jnp.uint16), cache.keys[..., :used, :].view(jnp.uint16))
    with pytest.raises(ValueError, match="holds bfloat16, but the model's parameters are float32"):
        rk.load_cache(tmp_path / "a.cache", MODEL, weights())


@pytest.fixture
def saved(tmp_path):
    model, cache = cache_of("paged")
    rk.save_cache(tmp_path / "a.cache", cache, model, weights())
    return tmp_path / "a.cache"


def test_other_models_are_refused(saved):
    with pytest.raises(ValueError, match="another model: its num_hidden_layers is 3, the model's 2"):
        rk.load_cache(saved, rk.build_model(CONFIG | {"num_hidden_layers": 2}))
    with pytest.raises(ValueError, match="another model: its rope_parameters"):
        rk.load_cache(saved, rk.build_model(CONFIG | {"rope_theta": 5e5}))
    with pytest.raises(ValueError, match="made without the model's sharing"):
        rk.load_cache(saved, SHARED)
    with pytest.raises(ValueError, match="another model: the weights' checksum is not"):
        rk.load_cache(saved, MODEL, rk.init_params(MODEL, jax.random.key(1)))
    rk.load_cache(saved, MODEL, weights())


def test_keys_that_were_turned_otherwise_are_refused(saved, tmp_path):
    dynamic = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    tokens = np.random.default_rng(0).integers(0, 61, (1, 20))
    model = rk.build_model(CONFIG | dynamic)
    _, cache = rk.prefill(model, weights(), tokens, None, None, 4)
    rk.save_cache(tmp_path / "b.cache", cache, model, weights())
    rk.load_cache(tmp_path / "b.cache", model, weights())
    longer = {"max_position_embeddings": 2048}
    with pytest.raises(ValueError, match="its max_position_embeddings is 512, the model's 2048"):
        rk.load_cache(tmp_path / "b.cache", rk.build_model(CONFIG | dynamic | longer), weights())
    rk.load_cache(saved, rk.build_model(CONFIG | longer), weights())  # which do not depend on it


def test_a_policy_of_numpys_numbers_is_stored(tmp_path):
    policy = rk.restkv(np.int64(40), np.int32(8), while_generating=True)
    tokens = np.random.default_rng(0).integers(0, 61, (1, 90))
    _, cache = rk.prefill(MODEL, weights(), tokens, None, policy, 4)
    rk.save_cache(tmp_path / "a.cache", cache, MODEL, weights())
    assert rk.load_cache(tmp_path / "a.cache", MODEL, weights()).policy == cache.policy


def test_sharing_of_another_kind_is_refused(tmp_path):
    model, cache = cache_of("shared")
    rk.save_cache(tmp_path / "a.cache", cache, model)
    other = MODEL.clone(sharing=rk.pod.Sharing(GROUPS, sink=4, recent=24))
    with pytest.raises(ValueError, match="sharing is not the one that the cache was made with"):
        rk.load_cache(tmp_path / "a.cache", other)


def test_missing_truncated_and_foreign_files(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.cache is not a file"):
        rk.load_cache(tmp_path / "nothing.cache", MODEL)
    whole = saved.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.cache").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.cache is damaged, or not a file of a cache"):
            rk.load_cache(tmp_path / "cut.cache", MODEL)
    save_file({"x": np.zeros(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="is not a file of a cache"):
        rk.load_cache(tmp_path / "weights.safetensors", MODEL)


def tampered(saved, header=lambda x: None, **arrays):
    """The file with some arrays in the place of others and a changed header."""
    from safetensors import safe_open

    with safe_open(saved, "numpy") as file:
        metadata = file.metadata()
    fields = json.loads(metadata["header"])
    header(fields)
    save_file(load_file(saved) | arrays, saved, metadata | {"header": json.dumps(fields)})
    return saved


@pytest.mark.parametrize(("name", "change"), [
    ("page_table", lambda x: x + 10**6),
    ("page_table", lambda x: x - 1),
    ("lengths", lambda x: x + 1000),
    ("lengths", lambda x: x[:, :1]),
    ("positions", lambda x: x + 500),
    ("positions", lambda x: x.astype(np.float32)),
    ("keys", lambda x: x[..., :4]),
    ("keys", lambda x: x.astype(np.int32)),
    ("values", lambda x: x.astype(np.float16)),
    ("next_positions", lambda x: x - 10**4),
    ("next_positions", lambda x: x[None]),
])  # fmt: skip
def test_hostile_arrays(saved, name, change):
    changed = np.ascontiguousarray(change(load_file(saved)[name]))
    with pytest.raises(ValueError, match="does not hold a cache of this model"):
        rk.load_cache(tampered(saved, **{name: changed}), MODEL)


@pytest.mark.parametrize("header", [
    lambda x: x.update(kind="Cache"),
    lambda x: x.update(kind="KVCache"),
    lambda x: x.update(kind="EvictingCache", static={"policy": {"class": "system", "budget": 1}}),
    lambda x: x.update(kind="SharedCache", static={}),
    lambda x: x.update(static={"is_windowed": False, "other": 1}),
    lambda x: x.pop("static"),
    lambda x: x.update(config=None),
    lambda x: x.update(more=1),
])  # fmt: skip
def test_hostile_headers(saved, header):
    with pytest.raises(ValueError):
        rk.load_cache(tampered(saved, header, lengths=load_file(saved)["lengths"]), MODEL)


@settings(deadline=None, max_examples=60)
@given(place=st.floats(0, 1), byte=st.integers(0, 255))
def test_a_changed_byte_never_does_worse_than_a_refusal(tmp_path_factory, place, byte):
    directory = tmp_path_factory.mktemp("cache")
    model, cache = cache_of_paged()
    rk.save_cache(directory / "a.cache", cache, model)
    data = bytearray((directory / "a.cache").read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    data[int(place * (header - 1))] = byte
    (directory / "a.cache").write_bytes(data)
    try:
        rk.load_cache(directory / "a.cache", model)
    except ValueError as error:
        assert "a.cache" in str(error)


@functools.cache
def cache_of_paged():
    return cache_of("paged")


def test_places_that_cannot_be_written(tmp_path):
    model, cache = cache_of("dense")
    with pytest.raises(OSError):
        rk.save_cache(tmp_path / "no" / "a.cache", cache, model)
    with pytest.raises(ValueError, match="the cache is not of this model"):
        rk.save_cache(tmp_path / "a.cache", cache, rk.build_model(CONFIG | {"num_hidden_layers": 2}))
