"""Greedy generation with the full cache gives the tokens that `transformers` gives."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hugging_face import (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    ROPES,
    left_padded,
    newer_spelling,
    older_spelling,
    random_model,
    torch,
    write_model,
)
from transformers import AutoModelForCausalLM

import restkv_jax as rk

NEW = 24
LENGTHS = (40, 33, 1, 12)
NEVER_ENDING = {"eos_token_id": None}
CASES = {
    "llama": LLAMA,
    "llama3 rope, attention bias": older_spelling(LLAMA | {"attention_bias": True}, ROPES["llama3"]),
    "llama, wide heads, linear rope, tied": newer_spelling(LLAMA, ROPES["linear"])
    | {"head_dim": 14, "tie_word_embeddings": True},
    "mistral, sliding window": MISTRAL | {"sliding_window": 7},
    "qwen2, window in upper layer": QWEN2 | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3, yarn": newer_spelling(QWEN3, ROPES["yarn"]),
}


def loaded(directory, config, **generation):
    """A random reference and our model, both read from one directory."""
    write_model(directory, random_model(config), config)
    (directory / "generation_config.json").write_text(json.dumps(generation))
    reference = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    model, params, _ = rk.load_model(directory, jnp.float32)
    return reference, model, params


def reference_tokens(reference, tokens, mask, max_new_tokens=NEW):
    """int32 [B, max_new_tokens], padding after the end."""
    tokens, mask = (torch.tensor(x, dtype=torch.long) for x in (tokens, mask))
    with torch.no_grad():
        out = reference.generate(tokens, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
    new = out[:, tokens.shape[1] :].numpy()
    return np.pad(new, ((0, 0), (0, max_new_tokens - new.shape[1]))).astype(np.int32)


def our_tokens(model, params, tokens, mask, **options):
    @jax.jit
    def run(params, tokens, mask):
        return rk.generate(model, params, tokens, mask, policy=rk.full(), max_new_tokens=NEW, **options)

    return run(params, jnp.asarray(tokens), jnp.asarray(mask))


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_of_unequal_prompts(name, tmp_path):
    reference, model, params = loaded(tmp_path, CASES[name] | NEVER_ENDING, pad_token_id=0)
    tokens, mask = left_padded(1, LENGTHS)
    theirs = reference_tokens(reference, tokens, mask)
    assert len(np.unique(theirs)) > 10
    ours = our_tokens(model, params, tokens, mask, chunk_size=16)
    np.testing.assert_array_equal(ours.tokens, theirs)
    np.testing.assert_array_equal(ours.lengths, NEW)


def test_rows_end_with_any_of_the_ending_ids(tmp_path):
    tokens, mask = left_padded(1, LENGTHS)
    endless = reference_tokens(loaded(tmp_path / "endless", LLAMA | NEVER_ENDING)[0], tokens, mask)
    ends = [int(endless[0, 5]), int(endless[1, 11]), int(endless[2, 2])]
    reference, model, params = loaded(tmp_path / "model", LLAMA, eos_token_id=ends, pad_token_id=0)
    theirs = reference_tokens(reference, tokens, mask)
    ours = rk.generate(model, params, tokens, mask, policy=rk.full(), max_new_tokens=NEW)
    np.testing.assert_array_equal(ours.tokens, theirs)
    for row in range(len(LENGTHS)):
        found = np.isin(endless[row], ends)
        assert ours.lengths[row] == (found.argmax() + 1 if found.any() else NEW)
    assert len(set(np.asarray(ours.lengths).tolist())) > 1


@pytest.mark.filterwarnings("ignore:the prompt's 40 tokens")
def test_dynamic_rope_grows_while_generating(tmp_path):
    config = newer_spelling(LLAMA, ROPES["dynamic"]) | {"max_position_embeddings": 20} | NEVER_ENDING
    _, model, params = loaded(tmp_path, config, pad_token_id=0)
    tokens, mask = left_padded(3, LENGTHS)
    ours = our_tokens(model, params, tokens, mask)
    for row, length in enumerate(LENGTHS):
        # transformers remembers the longest sequence that a model has seen
        reference = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
        theirs = reference_tokens(reference, tokens[row : row + 1, -length:], np.ones((1, length), bool))
        np.testing.assert_array_equal(ours.tokens[row], theirs[0])


@pytest.mark.slow
def test_long_prompt_with_a_sliding_window(tmp_path):
    config = MISTRAL | {"sliding_window": 100, "max_position_embeddings": 2048} | NEVER_ENDING
    reference, model, params = loaded(tmp_path, config, pad_token_id=0)
    tokens, mask = left_padded(4, (1030, 617))
    theirs = reference_tokens(reference, tokens, mask)
    np.testing.assert_array_equal(our_tokens(model, params, tokens, mask, chunk_size=256).tokens, theirs)


@pytest.mark.parametrize("name", ["llama", "llama3 rope, attention bias", "mistral, sliding window"])
def test_further_tokens_are_read_as_transformers_reads_them(tmp_path, name):
    reference, model, params = loaded(tmp_path, CASES[name] | NEVER_ENDING)
    tokens = np.random.default_rng(5).integers(3, 61, (2, 60))
    held, cache, starts = None, None, (0, 31, 32, 50, 60)
    for start, end in itertools.pairwise(starts):
        piece = tokens[:, start:end]
        with torch.no_grad():
            out = reference(torch.tensor(piece), past_key_values=held, use_cache=True)
        held = out.past_key_values
        read_on = (rk.prefill,) if cache is None else (rk.extend, None, cache)
        logits, cache = read_on[0](model, params, piece, *read_on[1:])
        expected = out.logits[:, -1].numpy()
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
