"""Groups found by what sharing costs: blocks are merged where the loss rises least."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from restkv_jax.kernels.pairs import Pairs
from restkv_jax.models.decoder import Decoder, Hooks, read
from restkv_jax.models.key_groups import LayerGroups
from restkv_jax.models.memory import SharedMemory, follow
from restkv_jax.models.mesh import beside
from restkv_jax.pod.adaptation.loss import next_token_loss


class Merged(NamedTuple):
    """Groups, and the mean loss per weighted token of the model that shares keys by them, untrained, in nats."""

    groups: LayerGroups
    loss: float


def merge_layers(
    model: Decoder, params: Any, tokens: Any, weights: Any | None = None, sink: int = 16, recent: int = 4080
) -> Iterator[Merged]:
    """Merges blocks one by one, from one per layer to one per KV head, always the two whose union costs least.

    Similar attention is a guess at what sharing will cost; here the cost itself is measured. `L K` blocks need about
    `(L K)^2 / 2` readings of the sample in one compiled program.

    Args:
      model: a `Decoder`.
      params: its parameters.
      tokens: int32 [B, T], a sample of what the model is for, longer than `sink + recent`.
      weights: float32 [B, T], how much the prediction of each token counts; all alike by default.
      sink: tokens at the beginning whose keys each layer keeps.
      recent: tokens at the end whose keys each layer keeps.

    Yields:
      `L K - K + 1` times groups with one block less; stop when the loss is too high, or `cache_fraction` low enough.

    Raises:
      ValueError: a sample without distant tokens.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    if tokens.shape[1] <= sink + recent:
        raise ValueError(
            f"tokens has rows of {tokens.shape[1]}, all proximal with sink={sink} and recent={recent}: sharing would "
            "change nothing; give longer ones"
        )
    weights = jnp.ones(tokens.shape) if weights is None else jnp.asarray(weights, jnp.float32)
    config = model.config
    is_leader = np.ones((config.num_hidden_layers, config.num_key_value_heads), bool)

    def measure(is_leader: np.ndarray) -> float:
        with beside(params) as placed:
            return float(_shared_loss(model, placed, is_leader, tokens, weights, sink, recent))

    loss = measure(is_leader)
    while True:
        yield Merged(_groups(is_leader), loss)
        borders = np.add(np.argwhere(is_leader[1:]), [1, 0])
        if not len(borders):
            return
        merged = [_without(is_leader, *border) for border in borders]
        losses = [measure(candidate) for candidate in merged]
        loss, is_leader = min(losses), merged[int(np.argmin(losses))]


@functools.partial(jax.jit, static_argnames=("model", "sink", "recent"))
def _shared_loss(model: Decoder, params: Any, is_leader: Array, tokens: Array, weights: Array, sink, recent) -> Array:
    """Mean loss where the layers marked in `is_leader`, bool [L, K], lead: one program for all groups."""

    def make_memory(index: Array, pairs: Pairs, leader_keys: Array) -> tuple[SharedMemory, Array]:
        leader_keys = follow(is_leader[index], pairs.keys, leader_keys)
        return SharedMemory(pairs, leader_keys, sink, recent), leader_keys

    config, (batch, length) = model.config, tokens.shape
    shape = batch, config.num_key_value_heads, length, config.head_dim
    hidden, _ = read(model, params, tokens, None, Hooks(make_memory), jnp.zeros(shape, params["embedding"].dtype))
    return next_token_loss(model, params, hidden, tokens, weights) / weights[:, 1:].sum()


def _without(is_leader: np.ndarray, layer: int, head: int) -> np.ndarray:
    merged = is_leader.copy()
    merged[layer, head] = False
    return merged


def _groups(is_leader: np.ndarray) -> LayerGroups:
    layers = np.arange(len(is_leader))[:, None]
    return LayerGroups(np.maximum.accumulate(np.where(is_leader, layers, 0), axis=0))
