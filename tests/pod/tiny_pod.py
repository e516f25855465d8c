"""A small random model whose layers share keys, prompts for it, and its greedy decoding."""

import functools

import jax
import numpy as np

import restkv_jax as rk
from restkv_jax.pod import LayerGroups, Sharing

CONFIG = dict(
    model_type="llama", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
    initializer_range=0.3, eos_token_id=None, bos_token_id=None,
)  # fmt: skip
NEW = 16
GROUPS = LayerGroups([[0, 0], [0, 1], [2, 1], [2, 1]])
SHARING = Sharing(GROUPS, sink=3, recent=24)


@functools.cache
def tiny(**changes):
    model = rk.build_model(CONFIG | changes)
    return model, rk.init_params(model, jax.random.key(0))


def windowed(sliding_window):
    """Changes of the configuration."""
    return {"model_type": "mistral", "sliding_window": sliding_window} if sliding_window else {}


@functools.cache
def prompts(lengths=(60, 20, 2)):
    """One prompt with distant tokens, one that gets some while decoding, one that never leaves the sink and ring."""
    tokens = np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (len(lengths), max(lengths)))
    mask = np.arange(max(lengths)) >= max(lengths) - np.array(lengths)[:, None]
    return np.where(mask, tokens, 7), mask


@functools.cache
def decode(sharing, policy=None, lengths=(60, 20, 2), sliding_window=None):
    """Greedy tokens [B, NEW], logits [B, NEW, V], and the cache."""
    (model, params), (tokens, mask) = tiny(**windowed(sliding_window)), prompts(lengths)
    scores, cache = rk.prefill(model, params, tokens, mask, policy, NEW, sharing=sharing)
    every, chosen = [scores], [scores.argmax(-1)]
    for _ in range(NEW - 1):
        scores, cache = rk.decode_step(model, params, chosen[-1], cache, policy, sharing)
        every.append(scores)
        chosen.append(scores.argmax(-1))
    return np.stack(chosen, 1), np.stack(every, 1), cache
