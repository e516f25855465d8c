"""Groups: how they are checked, stored, found from the similarity of layers, and drawn."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

import restkv_jax as rk
from restkv_jax.models.decoder import Hooks, read
from restkv_jax.pod import LayerGroups, Sharing, attention_similarity, group_layers
from restkv_jax.pod.plot import plot_groups
from restkv_jax.pod.similarity import _sum_similarity, jensen_shannon

CONFIG = dict(
    model_type="llama", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512, initializer_range=0.3,
)  # fmt: skip
LEADER = ((0, 0), (0, 1), (2, 1), (2, 1))


def similarities(heads, layers):
    """Symmetric [K, L, L] with ones on the diagonal."""

    def symmetric(values):
        upper = np.triu(values, 1)
        return upper + np.swapaxes(upper, 1, 2) + np.eye(values.shape[1])

    return st_numpy.arrays(np.float64, (heads, layers, layers), elements=st.floats(0, 1)).map(symmetric)


SIMILARITIES = st.integers(1, 3).flatmap(lambda heads: st.integers(1, 9).flatmap(lambda n: similarities(heads, n)))


@given(similarity=SIMILARITIES, threshold=st.floats(0, 1.2))
def test_a_layer_joins_while_it_is_like_the_leader(similarity, threshold):
    groups = group_layers(similarity, threshold)
    for layer, row in enumerate(groups.leader):
        for head, leader in enumerate(row):
            before = groups.leader[layer - 1][head] if layer else 0
            joins = similarity[head, before, layer] >= threshold or layer == 0
            assert leader == (before if joins else layer)


@given(similarity=SIMILARITIES)
def test_extreme_thresholds_share_everything_and_nothing(similarity):
    heads, layers, _ = similarity.shape
    assert group_layers(similarity, 0).num_blocks == heads
    assert group_layers(similarity, 1.01) == LayerGroups.dense(layers, heads)


@given(similarity=SIMILARITIES, tokens=st.integers(1, 5000), sink=st.integers(0, 20), recent=st.integers(1, 900))
def test_cache_fraction_counts_keys_and_values(similarity, tokens, sink, recent):
    groups = group_layers(similarity, 0.5)
    heads, proximal = groups.num_layers * groups.num_kv_heads, min(tokens, sink + recent)
    held = heads * tokens + heads * proximal + groups.num_blocks * (tokens - proximal)
    assert groups.cache_fraction(tokens, sink, recent) == pytest.approx(held / (2 * heads * tokens))


def test_saving_tends_to_half_of_the_shared_part():
    groups = LayerGroups(LEADER)
    assert groups.num_blocks == 4 and groups.longest_block == 3
    assert 1 - groups.cache_fraction(10**9) == pytest.approx((1 - 4 / 8) / 2, rel=1e-4)
    assert groups.cache_fraction(4096) == 1
    np.testing.assert_array_equal(groups.blocks, [[0, 1], [0, 2], [3, 2], [3, 2]])


def test_groups_are_static_and_take_arrays():
    groups = LayerGroups(np.array(LEADER))
    assert groups == LayerGroups(LEADER) and hash(groups) == hash(LayerGroups([list(row) for row in LEADER]))
    assert Sharing(groups) == Sharing(LayerGroups(LEADER)) and len({Sharing(groups), Sharing(groups, sink=4)}) == 2


@pytest.mark.parametrize(("leader", "words"), [
    ([[0], [2], [2]], r"leader\[1\]\[0\]=2 is above its layer"),
    ([[0], [-1]], r"leader\[1\]\[0\]=-1 is negative"),
    ([[0, 0], [1, 1], [0, 1]], r"leader\[2\]\[0\]=0 is neither .* blocks must be contiguous"),
    ([[0], [0], [1]], r"leader\[2\]\[0\]=1 is neither"),
    ([0, 0], r"leader has shape \(2,\)"),
    ([], r"leader has shape \(0,\)"),
    ([[0, 0], [0]], "its rows differ in length"),
    ([[0.0], [0.5]], "dtype float64, but must hold integers"),
])  # fmt: skip
def test_impossible_groups_are_refused(leader, words):
    with pytest.raises(ValueError, match=words):
        LayerGroups(leader)


@pytest.mark.parametrize(("options", "error", "words"), [
    (dict(groups=LEADER), TypeError, "must be LayerGroups"),
    (dict(sink=-1), ValueError, "sink=-1"),
    (dict(recent=0), ValueError, "recent=0"),
    (dict(recent=2.5), TypeError, "recent=2.5"),
    (dict(skip_threshold=1.5), ValueError, "skip_threshold=1.5"),
])  # fmt: skip
def test_impossible_sharing_is_refused(options, error, words):
    with pytest.raises(error, match=words):
        Sharing(**({"groups": LayerGroups(LEADER)} | options))


def test_groups_are_written_beside_a_checkpoint_and_read_back(tmp_path):
    model, groups = rk.build_model(CONFIG), LayerGroups(LEADER)
    groups.save(tmp_path, model, name="owner/name")
    assert [path.name for path in tmp_path.iterdir()] == ["layer_groups.json"]
    assert LayerGroups.load(tmp_path) == groups
    assert LayerGroups.load(tmp_path / "layer_groups.json", model, "owner/name") == groups


@pytest.mark.parametrize(("changes", "name", "words"), [
    (dict(num_hidden_layers=6), None, "num_hidden_layers is 4 there, 6 here"),
    (dict(num_key_value_heads=4), None, "num_key_value_heads is 2 there, 4 here"),
    (dict(model_type="mistral"), None, "model_type is 'llama' there, 'mistral' here"),
    ({}, "owner/other", "name is 'owner/name' there, 'owner/other' here"),
])  # fmt: skip
def test_groups_of_another_model_are_refused(tmp_path, changes, name, words):
    LayerGroups(LEADER).save(tmp_path, rk.build_model(CONFIG), name="owner/name")
    with pytest.raises(ValueError, match=f"made for another model: {words}"):
        LayerGroups.load(tmp_path, rk.build_model(CONFIG | changes), name)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"leader": 3}', '{"leader": [[0], [2]]}'])
def test_damaged_files_are_named(tmp_path, text):
    (tmp_path / "groups.json").write_text(text)
    with pytest.raises(ValueError, match=r"groups\.json"):
        LayerGroups.load(tmp_path / "groups.json")


def test_saving_refuses_another_shape_and_leaves_the_old_file(tmp_path):
    model = rk.build_model(CONFIG)
    LayerGroups(LEADER).save(tmp_path, model)
    with pytest.raises(ValueError, match="3 layers and 2 KV heads, but this one has 4 and 2"):
        LayerGroups.dense(3, 2).save(tmp_path, model)
    assert json.loads((tmp_path / "layer_groups.json").read_text())["leader"] == [list(row) for row in LEADER]


def store_layer(view, memory, state):
    shown = view.queries.vectors, memory.pairs.keys
    return tuple(whole.at[view.index].set(part) for whole, part in zip(state, shown, strict=True))


def brute_force_similarity(model, params, batches, last_queries, sink, recent):
    """numpy in float64, from the queries and keys of one reading."""
    total, count = np.zeros((2, 4, 4)), 0
    for tokens, mask in batches:
        batch, length = tokens.shape
        empty = jnp.zeros((4, batch, 2, 2, length, 8)), jnp.zeros((4, batch, 2, length, 8))
        shown = read(model, params, tokens, jnp.asarray(mask), Hooks(observe=store_layer, num_queries=length), empty)[1]
        queries, keys = (np.asarray(x, np.float64) for x in shown)
        for row, real in enumerate(mask):
            first = int(np.argmax(real))
            length = len(real) - first
            for t in range(max(0, length - last_queries), length):
                for head in range(2):
                    attention = []
                    for layer in range(4):
                        seen = keys[layer, row, head, first : first + t + 1]
                        logits = queries[layer, row, head, :, first + t] @ seen.T
                        mass = np.exp(logits - logits.max(-1, keepdims=True))
                        mean, places = (mass / mass.sum(-1, keepdims=True)).mean(0), np.arange(t + 1)
                        proximal = (places < sink) | (t - places < recent)
                        attention.append(np.r_[mean[~proximal], [mean[proximal].sum()] if proximal.any() else []])
                    for i, j in np.ndindex(4, 4):
                        p, q = attention[i], attention[j]
                        m = (p + q) / 2
                        total[head, i, j] += 1 - (p @ np.log2(p / m) + q @ np.log2(q / m)) / 2
                count += 1
    return total / count


@pytest.mark.slow
@pytest.mark.parametrize(("sink", "recent"), [(0, 0), (2, 5)])
def test_similarity_against_brute_force(sink, recent):
    """Over batches of different lengths, padded rows, and a row shorter than the queries asked for."""
    model = rk.build_model(CONFIG)
    params = rk.init_params(model, jax.random.key(0))
    rng = np.random.default_rng(0)
    padded = rng.integers(0, 61, (2, 30)), np.arange(30) >= np.array([[0], [25]])
    batches = [padded, (rng.integers(0, 61, (1, 20)), np.ones((1, 20), bool))]
    ours = attention_similarity(model, params, batches, last_queries=8, chunk_size=10, sink=sink, recent=recent)
    assert ours.shape == (2, 4, 4) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, brute_force_similarity(model, params, batches, 8, sink, recent), atol=1e-5)
    np.testing.assert_array_equal(ours[:, range(4), range(4)], 1)
    with pytest.raises(ValueError, match="batches is empty"):
        attention_similarity(model, params, [])
    with pytest.raises(ValueError, match="last_queries=0"):
        attention_similarity(model, params, batches, last_queries=0)


def test_divergence_is_zero_for_equals_and_one_for_strangers():
    one, other = np.eye(4, dtype=np.float32)[:2]
    assert jensen_shannon(one, one) == 0
    assert jensen_shannon(one, other) == 1


@pytest.mark.slow
def test_similarity_never_holds_the_attention_of_all_layers():
    def temporaries(num_layers):
        model = rk.build_model(CONFIG | {"num_hidden_layers": num_layers})
        params = jax.eval_shape(lambda key: rk.init_params(model, key), jax.random.key(0))
        shapes = (jax.ShapeDtypeStruct((1, 2048), dtype) for dtype in ("int32", "bool"))
        return (
            _sum_similarity.lower(model, params, *shapes, 256, 256, 0, 0).compile().memory_analysis().temp_size_in_bytes
        )

    pair = 2 * 256 * 2048 * 4
    assert temporaries(16) - temporaries(4) < pair, "the attention of twelve more layers would be twelve times as much"


@pytest.mark.parametrize(("similarity", "threshold", "words"), [
    (np.ones((2, 3)), 0.5, r"similarity has shape \(2, 3\)"),
    (np.ones((2, 3, 4)), 0.5, r"similarity has shape \(2, 3, 4\)"),
    (np.full((1, 2, 2), np.nan), 0.5, "must be between 0 and 1"),
    (np.full((1, 2, 2), 2.0), 0.5, "must be between 0 and 1"),
    (np.ones((1, 2, 2)), -0.1, "threshold=-0.1"),
])  # fmt: skip
def test_grouping_refuses_what_is_no_similarity(similarity, threshold, words):
    with pytest.raises(ValueError, match=words):
        group_layers(similarity, threshold)


def test_figure_has_a_panel_per_head_and_a_square_per_block(tmp_path):
    similarity = np.random.default_rng(0).random((5, 6, 6))
    groups = LayerGroups(np.array([[0, 0, 0, 3, 3, 3]] * 4 + [[0, 1, 2, 3, 4, 5]]).T)
    figure = plot_groups(similarity, groups)
    panels = [axis for axis in figure.axes if axis.get_title(loc="left")]
    assert [axis.get_title(loc="left") for axis in panels] == [f"KV head {k}" for k in range(5)]
    assert [len(axis.patches) for axis in panels] == [2, 2, 2, 2, 0]
    np.testing.assert_array_equal(panels[1].images[0].get_array(), similarity[1])
    assert "14 blocks" in figure.get_suptitle()
    figure.savefig(tmp_path / "groups.png")
    with pytest.raises(ValueError, match="groups are of 4 layers and 2 KV heads, but similarity of 6 and 5"):
        plot_groups(similarity, LayerGroups(LEADER))
    with pytest.raises(ValueError, match=r"similarity has shape \(6, 6\)"):
        plot_groups(similarity[0])
