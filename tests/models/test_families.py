"""Families besides Llama's own against the PyTorch models of `transformers`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hugging_face import FAMILIES, left_padded, our_logits, random_model, reference_logits, write_model
from transformers import AutoModelForCausalLM

import restkv_jax as rk
from restkv_jax.models.config import read_config, to_hugging_face

LENGTHS = (40, 33, 1, 12)


@functools.cache
def reference_of(name):
    return random_model(FAMILIES[name])


@pytest.fixture
def loaded(tmp_path):
    """A function that gives the reference of a family and our model with the same weights."""

    def load(name):
        reference = reference_of(name)
        return reference, *rk.load_model(write_model(tmp_path / "model", reference, FAMILIES[name]), jnp.float32)[:2]

    return load


@pytest.mark.parametrize("name", FAMILIES)
def test_logits(name, loaded):
    reference, model, params = loaded(name)
    tokens, mask = left_padded(1, LENGTHS)
    theirs = reference_logits(reference, tokens, mask)
    assert theirs[mask].std() > 0.3
    np.testing.assert_allclose(our_logits(model, params, tokens, mask)[mask], theirs[mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_configuration_round_trip(name):
    config = read_config(FAMILIES[name])
    assert read_config(to_hugging_face(config)) == config


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_saved_is_what_was_loaded(name, loaded, tmp_path):
    reference, model, params = loaded(name)
    rk.save_model(tmp_path / "saved", model, params)
    again, same, _ = rk.load_model(tmp_path / "saved", jnp.float32)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, same, params)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager").eval()
    tokens, mask = left_padded(2, (20, 9))
    expected = reference_logits(reference, tokens, mask)
    np.testing.assert_allclose(reference_logits(theirs, tokens, mask)[mask], expected[mask], atol=1e-5, rtol=0)
