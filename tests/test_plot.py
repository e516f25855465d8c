"""The picture of what is kept: its numbers and its parts."""

import jax
import numpy as np
import pytest
import tiny
from matplotlib.colors import to_hex

import restkv_jax as rk
from restkv_jax.plot import SPAN_COLORS, bin_shares, kept_shares, plot_kept, token_span

LENGTH = 90


@pytest.fixture(scope="module")
def caches():
    model = rk.build_model(tiny.CONFIG)
    params = rk.init_params(model, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, LENGTH))
    mask = np.arange(LENGTH) >= np.array([[0], [30]])
    policies = {"full": rk.full(), "snapkv": rk.snapkv(40, 8), "streaming_llm": rk.streaming_llm(24, sinks=4)}
    return {name: rk.prefill(model, params, tokens, mask, policy=p)[1] for name, p in policies.items()}


def test_shares_count_the_heads_that_hold_a_position(caches):
    shares = kept_shares(caches["snapkv"])
    kept = np.asarray(rk.kept_positions(caches["snapkv"]))[:, 0]
    expected = [[np.mean([(head == n).any() for head in layer]) for n in range(LENGTH)] for layer in kept]
    np.testing.assert_allclose(shares, expected)
    assert shares.mean() == pytest.approx(40 / LENGTH)


def test_shares_of_a_padded_row_cover_its_own_prompt(caches):
    np.testing.assert_array_equal(kept_shares(caches["full"], row=1), np.ones((tiny.CONFIG["num_hidden_layers"], 60)))
    sinks_and_recent = kept_shares(caches["streaming_llm"], row=1)[0]
    np.testing.assert_array_equal(np.flatnonzero(sinks_and_recent), [*range(4), *range(40, 60)])


def test_bins_keep_the_sum_of_shares():
    shares = np.random.default_rng(1).random((3, 1000))
    means, edges = bin_shares(shares, 64)
    assert means.shape == (3, 64) and edges[0] == 0 and edges[-1] == 1000
    np.testing.assert_allclose((means * np.diff(edges)).sum(1), shares.sum(1))


def test_short_prompts_are_not_binned():
    shares = np.random.default_rng(1).random((3, 10))
    means, edges = bin_shares(shares, 64)
    np.testing.assert_array_equal(means, shares)
    np.testing.assert_array_equal(edges, range(11))


def test_figure_has_a_panel_per_method_and_marks_spans(caches, tmp_path):
    spans = {"needle": (20, 30), "question": (80, 90)}
    figure = plot_kept(caches, spans=spans, title="Kept")
    panels = figure.axes[:3]
    assert figure.get_suptitle() == "Kept"
    titles = [panel.get_title(loc="left") for panel in panels]
    assert titles[0] == "full: 100% kept, 100% of the needle, 100% of the question"
    assert titles[2] == "streaming_llm: 27% kept, 0% of the needle, 100% of the question"
    for panel in panels:
        assert [to_hex(patch.get_edgecolor()).upper() for patch in panel.patches] == list(SPAN_COLORS[:2])
        assert [patch.get_x() for patch in panel.patches] == [20, 80]
    assert [text.get_text() for text in panels[0].get_legend().get_texts()] == list(spans)
    figure.savefig(tmp_path / "kept.png")
    assert (tmp_path / "kept.png").stat().st_size > 10_000


def test_one_cache_is_one_panel(caches):
    figure = plot_kept(caches["snapkv"])
    assert figure.axes[0].get_title(loc="left") == "44% kept"
    mesh = figure.axes[0].collections[0]
    np.testing.assert_allclose(mesh.get_array(), kept_shares(caches["snapkv"]))


def test_bad_input_is_named(caches):
    with pytest.raises(ValueError, match="caches is empty"):
        plot_kept({})
    with pytest.raises(ValueError, match=r"spans\['needle'\]=\(80, 91\) is not in the prompt of 90 tokens"):
        plot_kept(caches["full"], spans={"needle": (80, 91)})


def test_token_span():
    tokenizer, text = tiny.tokenizer(), "The sky is blue. The code is 1234567. Here we go."
    start, stop = token_span(tokenizer, text, "The code is 1234567.")
    assert tokenizer.decode(tokenizer(text)["input_ids"][start:stop]).strip() == "The code is 1234567."
    with pytest.raises(ValueError, match="'absent' is not in the prompt"):
        token_span(tokenizer, text, "absent")
    with pytest.raises(ValueError, match="is not in the prompt"):
        token_span(tokenizer, text, "")
