"""A tiny random model with a byte-level tokenizer, in a directory that `load_model` loads."""

import pathlib

import jax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import restkv_jax as rk

SPECIAL = ["<pad>", "<s>", "</s>"]
CONFIG = {
    "model_type": "llama",
    "vocab_size": len(SPECIAL) + 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE({piece: i for i, piece in enumerate([*SPECIAL, *alphabet])}, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_.decoder = decoders.ByteLevel()
    pad, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_, pad_token=pad, bos_token=bos, eos_token=eos, padding_side="left"
    )


def write_model(directory: pathlib.Path, with_tokenizer: bool = True) -> pathlib.Path:
    """Saves the model, with random weights, and its tokenizer."""
    model = rk.build_model(CONFIG)
    params = rk.init_params(model, jax.random.key(0))
    rk.save_model(directory, model, params, tokenizer() if with_tokenizer else None)
    return directory
