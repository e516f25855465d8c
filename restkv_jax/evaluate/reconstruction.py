"""How far eviction moves what the layers' attention says to the tokens after a prompt: a measure without answers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from restkv_jax.caches.base import kept_positions
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.generation.checks import check_tokens
from restkv_jax.generation.reading import CHUNK_SIZE, bucket_length, prefill_each
from restkv_jax.kernels.pairs import largest_divisor
from restkv_jax.kernels.scores import read_pairs
from restkv_jax.models.arguments import check_integer
from restkv_jax.models.decoder import Decoder, Hooks, LayerView, positions_of, read
from restkv_jax.models.memory import PairMemory
from restkv_jax.models.mesh import beside
from restkv_jax.models.rules import with_usual_promotion


@with_usual_promotion
def reconstruction_errors(
    model: Decoder,
    params: Any,
    tokens: ArrayLike,
    mask: ArrayLike | None = None,
    policies: tuple[EvictionPolicy, ...] = (),
    num_following: int = 64,
    chunk_size: int = CHUNK_SIZE,
) -> Array:
    """Relative error of each layer's attention output for the tokens after a prompt, evicted cache against full one.

    `||o'_t - o_t|| / ||o_t||`, the mean over a text's last `num_following` tokens `t`; those before are the prompt.
    `o_t = sum_h sum_n A_h[t, n] v_h[n] W_h` is the layer's attention output after the output projection, without its
    bias, over all tokens so far; `o'_t` is the same with `A` renormalised over the pairs that the policy keeps of the
    prompt and those of the tokens after it. Both have the hidden states of the full cache, so that a layer's error is
    its own: the error that ReST-KV (arXiv 2605.08840) scores by, here of tokens that the policy did not see.

    The prompts are read once for the selections of all policies, the texts once more for the errors; the attention of
    one policy and the last queries exists at one time.

    Args:
      model: a `Decoder`.
      params: its parameters.
      tokens: int32 [B, N], texts padded on the left.
      mask: bool [B, N], False on padding; None if there is none.
      policies: `P` of them, what to keep of the prompt.
      num_following: tokens at the end of each text that are measured; the `N` less these are the prompt.
      chunk_size: bound on the tokens whose activations exist at one time.

    Returns:
      float32 [P, L, B].

    Raises:
      ValueError: no policies; a policy that changes what it keeps, by a refit or while generating; `num_following` that
        leaves no prompt in some row; other arguments that make no sense, each named.
      TypeError: tokens that are not integers, policies that are not an `EvictionPolicy`.
    """
    policies = tuple(policies)
    if model.sharing is not None:
        raise ValueError(
            "model shares keys, so that its layers do not read distant tokens by their own, whose error is measured; "
            "give model.clone(sharing=None)"
        )
    tokens, mask = check_tokens(model, tokens, mask)
    check_integer("num_following", num_following, 1, "the tokens that are measured")
    length = tokens.shape[1] - num_following
    if length < 1:
        raise ValueError(
            f"num_following={num_following} of texts of {tokens.shape[1]} tokens leaves no prompt; give longer texts"
        )
    for policy in policies:
        for name in ("refit", "while_generating"):
            if getattr(policy, name, None):
                raise ValueError(
                    f"policies have one with {name}={getattr(policy, name)!r}: the error is of pairs that stay as they "
                    f"were in the prompt; leave {name} out"
                )
    prompt = tokens[:, :length], mask[:, :length]
    _, caches = prefill_each(model, params, *prompt, policies, max_new_tokens=1, chunk_size=chunk_size)
    kept = tuple(map(kept_positions, caches))
    with beside(params) as params:
        return _errors(model, params, tokens, mask, kept, num_following, chunk_size)


@functools.partial(jax.jit, static_argnames=("model", "num_following", "chunk_size"))
def _errors(model, params, tokens, mask, kept, num_following, chunk_size) -> Array:
    """The errors of the selections `kept`, each int32 [L, B, K, C] of prompt positions: float32 [P, L, B]."""
    missing = bucket_length(tokens.shape[1]) - tokens.shape[1]
    tokens, mask = (jnp.pad(x, ((0, 0), (missing, 0))) for x in (tokens, mask))
    positions = positions_of(mask)
    visible = jnp.stack([_visible(x, positions, num_following) for x in kept])  # [P, L, B, K, N]

    def observe(view: LayerView, memory: PairMemory, errors: Array) -> Array:
        queries, pairs = view.last(num_following).queries, memory.pairs

        def output(key_positions: Array) -> Array:
            context, _ = read_pairs(queries, pairs._replace(positions=key_positions))
            return jnp.einsum("bkgfd,kgdm->bfm", context, view.output_projection, precision="highest")

        def error(visible: Array) -> Array:
            moved = output(jnp.where(visible, pairs.positions, -1)) - whole
            return jnp.linalg.norm(moved, axis=-1) / jnp.linalg.norm(whole, axis=-1)

        whole = output(pairs.positions)
        of_layer = jax.lax.map(error, visible[:, view.index]).mean(-1)
        return errors.at[:, view.index].set(of_layer)

    hooks = Hooks(observe=observe, num_queries=num_following)
    empty = jnp.zeros(visible.shape[:3], jnp.float32)
    chunk_size = largest_divisor(tokens.shape[1], chunk_size)
    return read(model, params, tokens, mask, hooks, empty, chunk_size=chunk_size)[1]


def _visible(kept: Array, positions: Array, num_following: int) -> Array:
    """Which of the tokens at `positions`, int32 [B, N], are among the kept ones or the following: bool [L, B, K, N]."""
    num_layers, batch, num_kv_heads, _ = kept.shape
    length = positions.shape[1]
    padding = length - 1 - positions[:, -1]
    places = jnp.where(kept >= 0, kept + padding[:, None, None], length)
    index = jnp.ogrid[:num_layers, :batch, :num_kv_heads, :1][:3]
    is_kept = jnp.zeros((num_layers, batch, num_kv_heads, length), bool).at[*index, places].set(True, mode="drop")
    return is_kept | (jnp.arange(length) >= length - num_following)
