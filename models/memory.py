"""What the queries of a layer attend to."""

from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array

from restkv_jax.kernels.attention import attend, attend_shared
from restkv_jax.kernels.pairs import Pairs, Queries


class Memory(Protocol):
    """Something that queries read."""

    def attend(self, queries: Queries) -> tuple[Array, Any]:
        """Causal attention: the context [B, K, G, T, D], and arrays for `LayerView.aux`, or None."""
        ...


class PairMemory(NamedTuple):
    """Pairs in one place."""

    pairs: Pairs

    def attend(self, queries: Queries) -> tuple[Array, None]:
        return attend(queries, self.pairs), None


class SharedMemory(NamedTuple):
    """Pairs whose distant tokens are read by the leaders' keys, [B, K, T, D] (PoD, arXiv 2412.02252).

    For a query at position `q`, proximal are the first `sink` tokens and the last `recent`, `q - recent < p <= q`: the
    layer reads them by its own keys. The rest of the past is distant and read by the leader's. Values are always the
    layer's own, and one softmax goes over both.
    """

    pairs: Pairs
    leader_keys: Array
    sink: int
    recent: int

    def attend(self, queries: Queries) -> tuple[Array, None]:
        return attend_shared(queries, self.pairs, self.leader_keys, sink=self.sink, recent=self.recent), None


def follow(leads: Array, keys: Array, leader_keys: Array) -> Array:
    """The leaders' keys once a layer has put in its own for the KV heads that it leads.

    Args:
      leads: bool [K].
      keys: [B, K, T, D], the layer's.
      leader_keys: [B, K, T, D], those of the running block of every KV head.
    """
    return jnp.where(leads[None, :, None, None], keys, leader_keys)
