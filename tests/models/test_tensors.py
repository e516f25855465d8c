"""Which stored tensor fills which parameter: names with prefixes; heads that are tied, equal, different or alone."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hugging_face import LLAMA, QWEN3, left_padded, our_logits, random_model, reference_logits, torch, write_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

import restkv_jax as rk

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = LLAMA | {"tie_word_embeddings": True}


def edit_tensors(directory, edit):
    tensors = load_file(directory / "model.safetensors")
    save_file(edit(tensors), directory / "model.safetensors", metadata={"format": "pt"})


def assert_loads_as(reference, directory):
    model, params, _ = rk.load_model(directory, jnp.float32)
    tokens, mask = left_padded(1, (12, 9))
    theirs = reference_logits(reference, tokens, mask)
    np.testing.assert_allclose(our_logits(model, params, tokens, mask)[mask], theirs[mask], atol=1e-4, rtol=0)
    return model, params


def changed(array, places=((0, 0),)):
    array = array.copy()
    for place in places:
        array[place] += 0.5
    return array


HEADS = {
    "no head": (lambda t: t, True),
    "equal copy": (lambda t: t | {HEAD: t[EMBEDDING]}, True),
    "equal copy in another dtype": (lambda t: t | {HEAD: t[EMBEDDING].astype(np.float64)}, True),
    "head alone": (lambda t: {HEAD if name == EMBEDDING else name: x for name, x in t.items()}, True),
    "another head": (lambda t: t | {HEAD: t[EMBEDDING][::-1].copy()}, False),
    "another last row": (lambda t: t | {HEAD: changed(t[EMBEDDING], [(-1, -1)])}, False),
}


@pytest.mark.parametrize("name", HEADS)
def test_head_of_a_configuration_that_ties(name, tmp_path):
    edit, is_tied = HEADS[name]
    write_model(tmp_path, random_model(TIED), TIED)
    edit_tensors(tmp_path, edit)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    model, params = assert_loads_as(theirs, tmp_path)
    assert model.config.tie_word_embeddings == is_tied
    rk.save_model(tmp_path / "again", model, params)
    assert_loads_as(theirs, tmp_path / "again")


def test_head_of_a_configuration_that_does_not_tie(tmp_path):
    write_model(tmp_path, random_model(LLAMA), LLAMA)
    edit_tensors(tmp_path, lambda t: t | {HEAD: t[EMBEDDING]})
    assert not rk.load_model(tmp_path)[0].config.tie_word_embeddings
    for lost in (HEAD, EMBEDDING):
        write_model(tmp_path / lost, random_model(LLAMA), LLAMA)
        edit_tensors(tmp_path / lost, lambda t, lost=lost: {name: x for name, x in t.items() if name != lost})
        with pytest.raises(ValueError, match=f"lack '{lost}'"):
            rk.load_model(tmp_path / lost)


def test_head_of_another_shape(tmp_path):
    write_model(tmp_path, random_model(TIED), TIED)
    edit_tensors(tmp_path, lambda t: t | {HEAD: t[EMBEDDING][:-1].copy()})
    with pytest.raises(
        ValueError, match=r"'lm_head\.weight' has the wrong shape: found \(60, 32\), expected \(61, 32\)"
    ):
        rk.load_model(tmp_path)


NAMES = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "torch.compile of each layer": lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."),
    "data parallel": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "part of another model": lambda name: f"language_model.{name}",
    "part of another model, newer": lambda name: name.replace("model.", "model.language_model.", 1),
    "without its head": lambda name: name.removeprefix("model."),
    "fully sharded": lambda name: f"_fsdp_wrapped_module.{name}".replace("layers.0.", "layers.0._fsdp_wrapped_module."),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_with_a_prefix(name, tmp_path):
    write_model(tmp_path, random_model(QWEN3), QWEN3)
    plain = rk.load_model(tmp_path)
    edit_tensors(tmp_path, lambda tensors: {NAMES[name](stored): x for stored, x in tensors.items()})
    prefixed = rk.load_model(tmp_path)
    assert plain[0] == prefixed[0]
    jax.tree.map(np.testing.assert_array_equal, plain[1], prefixed[1])


def test_stored_names_are_those_of_messages(tmp_path):
    write_model(tmp_path, random_model(LLAMA), LLAMA)
    edit_tensors(tmp_path, lambda t: {f"language_model.{name}": x for name, x in t.items()} | {"vision.w": t[HEAD]})
    with pytest.raises(ValueError, match=r"unknown tensors 'vision\.w'"):
        rk.load_model(tmp_path)
    edit_tensors(tmp_path, lambda t: t | {"language_model.model.norm.weight": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match=r"'language_model\.model\.norm\.weight' has the wrong shape"):
        rk.load_model(tmp_path)


def test_a_text_ends_with_the_tokens_of_all_files(tmp_path):
    """Where the tokenizer alone knows the token that ends a turn, generating stops there."""
    tiny.write_model(tmp_path)
    model, params, tokenizer = rk.load_model(tmp_path, jnp.float32)
    prompt = np.asarray([tokenizer("hello")["input_ids"]], np.int32)
    first = int(rk.generate(model, params, prompt, max_new_tokens=2, eos_token_ids=()).tokens[0, 0])
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first)
    rk.save_model(tmp_path, model, params, tokenizer)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    model, params, _ = rk.load_model(tmp_path, jnp.float32)
    assert model.config.eos_token_ids == (7, 2, first)
    assert rk.generate(model, params, prompt, max_new_tokens=6).lengths.tolist() == [1]
    assert len(list(rk.stream(model, params, prompt, max_new_tokens=6))) == 1


def test_an_end_that_the_model_cannot_choose_is_left_out(tmp_path):
    tiny.write_model(tmp_path)
    model, params, tokenizer = rk.load_model(tmp_path)
    tokenizer.add_special_tokens({"eos_token": "<|beyond|>"})
    assert tokenizer.eos_token_id >= model.config.vocab_size
    rk.save_model(tmp_path, model, params, tokenizer)
    assert rk.load_model(tmp_path)[0].config.eos_token_ids == (2,)


def test_a_tokenizer_replaces_all_of_the_one_before(tmp_path):
    tiny.write_model(tmp_path)
    model, params, tokenizer = rk.load_model(tmp_path)
    tokenizer.chat_template = "{{ messages }}"
    rk.save_model(tmp_path, model, params, tokenizer)
    (tmp_path / "notes.txt").write_text("mine")
    tokenizer.chat_template = None
    rk.save_model(tmp_path, model, params)
    assert rk.load_model(tmp_path)[2].chat_template == "{{ messages }}"
    rk.save_model(tmp_path, model, params, tokenizer)
    assert rk.load_model(tmp_path)[2].chat_template is None
    assert (tmp_path / "notes.txt").read_text() == "mine"
