"""Sharing belongs to the model: it is saved and loaded with it, and whatever decodes shares keys."""

import numpy as np
import pytest
from tiny_pod import GROUPS, NEW, SHARING, prompts, tiny

import restkv_jax as rk
from restkv_jax.caches.shared import SharedCache
from restkv_jax.pod import Sharing


def test_a_model_comes_back_with_its_sharing(tmp_path):
    model, params = tiny()
    sharing = Sharing(GROUPS, sink=3, recent=24, skip_threshold=0.7)
    rk.save_model(tmp_path / "adapted", model.clone(sharing=sharing), params)
    with pytest.warns(UserWarning, match="tokenizer"):
        loaded, weights, _ = rk.load_model(tmp_path / "adapted", "float32")
    assert loaded == model.clone(sharing=sharing)
    out = rk.generate(loaded, weights, *prompts(), max_new_tokens=NEW)
    assert isinstance(out.cache, SharedCache) and out.cache.sharing == sharing
    expected = rk.generate(model, params, *prompts(), max_new_tokens=NEW, sharing=sharing)
    np.testing.assert_array_equal(out.tokens, expected.tokens)


@pytest.mark.filterwarnings("ignore:.*tokenizer")
def test_groups_alone_do_not_make_a_model_share(tmp_path):
    model, params = tiny()
    rk.save_model(tmp_path, model, params)
    GROUPS.save(tmp_path, model)
    assert rk.load_model(tmp_path)[0].sharing is None
    rk.save_model(tmp_path, model.clone(sharing=SHARING), params)
    assert rk.load_model(tmp_path)[0].sharing == SHARING
    rk.save_model(tmp_path, model, params)
    assert rk.load_model(tmp_path)[0].sharing is None, "the dense model was saved in its place"


@pytest.mark.slow
def test_the_models_sharing_is_that_of_the_argument():
    model, params = tiny()
    shared = model.clone(sharing=SHARING)
    ours = rk.generate(shared, params, *prompts(), max_new_tokens=NEW)
    np.testing.assert_array_equal(
        ours.tokens, rk.generate(model, params, *prompts(), max_new_tokens=NEW, sharing=SHARING).tokens
    )
    dense = rk.generate(shared.clone(sharing=None), params, *prompts(), max_new_tokens=NEW)
    np.testing.assert_array_equal(dense.tokens, rk.generate(model, params, *prompts(), max_new_tokens=NEW).tokens)
    each = rk.generate_each(
        shared, params, *prompts(), policies=(rk.full(), rk.snapkv(8, window=4)), max_new_tokens=NEW
    )
    np.testing.assert_array_equal(each[0].tokens, ours.tokens)


def test_a_cache_of_another_sharing_is_refused():
    model, params = tiny()
    shared = model.clone(sharing=SHARING)
    logits, cache = rk.prefill(shared, params, *prompts())
    other = model.clone(sharing=Sharing(GROUPS, sink=3, recent=25))
    with pytest.raises(ValueError, match="sharing is not the one that the cache was made with"):
        rk.decode_step(other, params, logits.argmax(-1), cache)
    _, dense = rk.prefill(model, params, *prompts())
    with pytest.raises(ValueError, match="the cache was made without the model's sharing"):
        rk.decode_step(shared, params, logits.argmax(-1), dense)
    rk.decode_step(shared, params, logits.argmax(-1), cache)


@pytest.mark.parametrize("policy", [
    rk.laprox(40), rk.restkv(40, while_generating=True), rk.snapkv(40).replace(refit=rk.LeastSquares()),
])  # fmt: skip
def test_policies_that_need_a_set_of_tokens_per_layer_are_refused(policy):
    model, params = tiny()
    with pytest.raises(ValueError, match="does not go with sharing"):
        rk.generate(model.clone(sharing=SHARING), params, *prompts(), policy)
