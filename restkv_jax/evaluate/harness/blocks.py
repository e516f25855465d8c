"""Generation in blocks of tokens, so that the caller's own test can end it early."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.generation.decoding import begin, run
from restkv_jax.generation.reading import prefill
from restkv_jax.generation.sampling import Sampling
from restkv_jax.models.decoder import Decoder

BLOCK_SIZE = 16
"""Tokens decoded by one compiled program, between two looks at the text."""


def stream_blocks(
    model: Decoder,
    params: Any,
    tokens: Array,
    mask: Array,
    policy: EvictionPolicy,
    max_new_tokens: int,
    keys: Array | None = None,
    sampling: dict[str, Any] | None = None,
    block_size: int = BLOCK_SIZE,
    cache_dtype: str | None = None,
) -> Iterator[np.ndarray]:
    """Yields what follows the prompts in blocks; rows do not end at an end-of-sequence token, the caller cuts them.

    Args:
      model: a `Decoder`.
      params: its parameters.
      tokens: int32 [B, T], padded on the left.
      mask: bool [B, T], False on padding.
      policy: what to keep of the prompts.
      max_new_tokens: upper bound on the tokens of a row.
      keys: JAX random keys [B], one per row; None decodes greedily.
      sampling: `temperature`, `top_k`, `top_p` and `min_p` as for `generate`.
      block_size: tokens of a block; the first is a single token, the last may be shorter.
      cache_dtype: what keys and values are stored in; see `prefill`.

    Returns:
      an iterator over int32 numpy arrays [B, at most block_size].
    """
    options = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None} | (sampling or {})
    chooser = Sampling(keys, **options, eos_token_ids=jnp.zeros(0, jnp.int32), pad_token_id=0)
    logits, cache = prefill(model, params, tokens, mask, policy, max_new_tokens, cache_dtype=cache_dtype)
    now = begin(logits, cache, chooser)
    yield np.asarray(now.token)[:, None]
    for done in range(1, max_new_tokens, block_size):
        # the last block may run over: its cache is full then, and what is cut off here was never needed
        block, _, now = run(model, params, now, chooser, block_size)
        yield np.asarray(block)[:, : max_new_tokens - done]
