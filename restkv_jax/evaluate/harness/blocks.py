"""Generation in blocks of tokens, so that the caller's own test can end it early."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.generation.generating import decode_step
from restkv_jax.generation.reading import prefill
from restkv_jax.generation.sampling import sample
from restkv_jax.models import Decoder

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
      sampling: `temperature`, `top_k` and `top_p` for `restkv_jax.generation.sampling.sample`.
      block_size: tokens of a block; the last block may be shorter.

    Returns:
      an iterator over int32 numpy arrays [B, at most block_size].
    """
    scores, cache = prefill(model, params, tokens, mask, policy=policy, max_new_tokens=max_new_tokens)
    for start in range(0, max_new_tokens, block_size):
        block, scores, cache = _decode_block(
            model, params, scores, cache, keys, sampling or {}, jnp.int32(start), policy, block_size
        )
        # the last block may run over: its cache is full then, and what is cut off here was never needed
        yield np.asarray(block)[:, : max_new_tokens - start]


@functools.partial(jax.jit, static_argnames=("model", "policy", "block_size"), donate_argnames="cache")
def _decode_block(model, params, scores, cache, keys, sampling, start, policy, block_size):
    def step(carry, index):
        scores, cache = carry
        step_keys = None if keys is None else jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)
        token = sample(scores, step_keys, **sampling)
        return decode_step(model, params, token, cache, policy=policy), token

    (scores, cache), tokens = jax.lax.scan(step, (scores, cache), start + jnp.arange(block_size))
    return tokens.T, scores, cache
