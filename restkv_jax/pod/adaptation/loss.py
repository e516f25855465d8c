"""Next-token loss without the logits of a whole sequence."""

from typing import Any

import einops
import jax
import jax.numpy as jnp
import optax
from jax import Array

from restkv_jax.models.decoder import Decoder, logits


def next_token_loss(
    model: Decoder, params: Any, hidden: Array, tokens: Array, weights: Array, chunk_size: int = 512
) -> Array:
    """`Σ_t weights[t + 1] · -log p(tokens[t + 1] | hidden[t])`: a sum, so that parts of a batch add up.

    The sequence goes in chunks whose logits are computed again in the backward pass, so `[B, chunk_size, V]` of them
    exist at one time instead of `[B, T, V]`.

    Args:
      model: a `Decoder`.
      params: its parameters. The unembedding is rounded to the dtype of `hidden` within a chunk, so that its gradient
        is summed over the chunks in its own dtype.
      hidden: [B, T, M], of `read`, before the final norm.
      tokens: int [B, T].
      weights: float32 [B, T], how much the prediction of each token counts; nothing predicts the first.
      chunk_size: tokens per chunk.

    Returns:
      float32 scalar.
    """
    head = {name: leaf for name, leaf in params.items() if name != "layers"}
    targets = jnp.roll(tokens, -1, axis=1)
    weights = jnp.roll(weights, -1, axis=1).at[:, -1].set(0)
    chunk_size = min(chunk_size, tokens.shape[1])

    def chunks(x: Array) -> Array:
        """[B, T, ...] to [T / chunk_size, B, chunk_size, ...]; what is padded has weight 0."""
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % chunk_size)] + [(0, 0)] * (x.ndim - 2))
        return einops.rearrange(x, "b (n c) ... -> n b c ...", c=chunk_size)

    @jax.checkpoint
    def add_chunk(total: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, None]:
        hidden, targets, weights = chunk
        scores = logits(model, jax.tree.map(lambda leaf: leaf.astype(hidden.dtype), head), hidden)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(scores, targets)
        return total + jnp.sum(losses * weights), None

    return jax.lax.scan(add_chunk, jnp.zeros((), jnp.float32), (chunks(hidden), chunks(targets), chunks(weights)))[0]
