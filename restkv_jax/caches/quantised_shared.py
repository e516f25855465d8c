"""The cache of a model that shares keys, its distant tokens in 8 or 4 bits."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.caches.dense import put_pairs
from restkv_jax.caches.quantised import take_groups
from restkv_jax.caches.shared import SharedCache
from restkv_jax.caches.shared_keeper import SharedKeeper
from restkv_jax.kernels.partition import on_mesh
from restkv_jax.kernels.quantised import (
    Quantisation,
    QuantisedKeys,
    QuantisedValues,
    empty_keys,
    empty_values,
    quantise_keys,
    quantise_values,
)


class QuantisedSharedCache(SharedCache):
    """As `SharedCache`; proximal tokens, its residual window, are as they are, and distant ones in whole groups.

    The token that leaves the ring is quantised into its group at once: a channel's scale grows where its key needs it.

    Attributes:
      distant_keys: with axes [A, M, B / A, R] before the `G` groups of `S` tokens; `N = G * S`.
      distant_values: with axes [L, B, K] before them.
    """

    distant_keys: QuantisedKeys
    distant_values: QuantisedValues

    @property
    def quantisation(self) -> Quantisation:
        return self.distant_keys.quantisation

    def wide(self, store: QuantisedKeys | QuantisedValues) -> Array:
        return store.dequantised(self.dtype)

    def stored_keys(self, keys: Array) -> QuantisedKeys:
        return quantise_keys(_whole(keys, self.quantisation), self.quantisation)

    def stored_values(self, values: Array) -> QuantisedValues:
        return quantise_values(_whole(values, self.quantisation), self.quantisation)

    @staticmethod
    def put_keys(store: QuantisedKeys, rows: Array, blocks: Array, slots: Array, keys: Array) -> QuantisedKeys:
        if not store.codes.shape[-3]:
            return store
        where = rows, blocks, slots // store.quantisation.group_size
        group = jax.tree.map(lambda x: x.at[where].get(mode="clip"), store)
        group = group.put(slots % store.quantisation.group_size, keys)
        return jax.tree.map(lambda x, new: x.at[where].set(new, mode="drop"), store, group)

    def put_values(self, layer: Array, slots: Array, values: Array) -> QuantisedValues:
        size, store = self.quantisation.group_size, self.distant_values
        if not self.num_distant:
            return store
        groups = slots // size
        within = jnp.minimum(groups, self.num_distant // size - 1)
        new = take_groups(store, layer, within).put(slots % size, values)
        return jax.tree.map(lambda whole, part: put_pairs(whole, layer, groups, part), store, new)


class QuantisedSharedKeeper(SharedKeeper):
    """Quantises distant tokens as they are kept, from full precision."""

    def empty(self, lengths: Array, num_tokens: Array, dtype: Any) -> QuantisedSharedCache:
        plain, q = super().empty(lengths, num_tokens, dtype), self.quantisation
        assert q is not None
        keys, values = (_whole(x, q).shape for x in (plain.distant_keys, plain.distant_values))
        rest = [(0, 0)] * 4 + [(0, keys[-2] - plain.num_distant)]
        distant = {
            "distant_keys": jax.tree.map(lambda x: on_mesh(x, "A M"), empty_keys(keys, q)),
            "distant_values": jax.tree.map(lambda x: on_mesh(x, "l b k"), empty_values(values, q)),
            "distant_positions": jnp.pad(plain.distant_positions, rest, constant_values=-1),
        }
        return QuantisedSharedCache(**vars(plain) | distant)


def _whole(x: Array, quantisation: Quantisation) -> Array:
    """Tokens [..., N, D] with zeros up to a whole group."""
    rest = -x.shape[-2] % quantisation.group_size
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, rest), (0, 0)])
