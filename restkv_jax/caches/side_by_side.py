"""Caches of different kinds as the rows of one batch: the model's weights are read once for all of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax.numpy as jnp
import numpy as np
from jax import Array

from restkv_jax.caches.base import Cache
from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.models.decoder import LayerView
from restkv_jax.models.memory import Memory


class SideBySide(Cache):
    """Each cache holds its own rows, in this order, and attends to them as it would alone.

    Attributes:
      caches: of the same model, of any kinds and sizes.
    """

    caches: tuple[Cache, ...]

    @property
    def ends(self) -> list[int]:
        """The row behind each cache's last one, but for the last cache."""
        return np.cumsum([cache.next_positions.shape[0] for cache in self.caches])[:-1].tolist()

    def enter(self, layer: Array, new: Pairs) -> tuple[Memory, Self]:
        parts = map(Pairs, *(jnp.split(x, self.ends) for x in new))
        entered = [cache.enter(layer, part) for cache, part in zip(self.caches, parts, strict=True)]
        memories, caches = zip(*entered, strict=True)
        return MemorySideBySide(memories, self.ends), self.replace(caches=caches)

    def observe(self, view: LayerView, memory: "MemorySideBySide") -> Self:
        parts = zip(self.caches, _split(view.queries, self.ends), view.aux, memory.memories, strict=True)
        caches = tuple(cache.observe(view._replace(queries=q, aux=aux), own) for cache, q, aux, own in parts)
        return self.replace(caches=caches)

    def advance(self, count: Array) -> Self:
        parts = zip(self.caches, jnp.split(count, self.ends), strict=True)
        return super().advance(count).replace(caches=tuple(cache.advance(part) for cache, part in parts))


class MemorySideBySide(NamedTuple):
    """What the rows of each cache attend to; `ends` as `SideBySide` has them."""

    memories: tuple[Memory, ...]
    ends: list[int]

    def attend(self, queries: Queries) -> tuple[Array, tuple[Any, ...]]:
        parts = zip(self.memories, _split(queries, self.ends), strict=True)
        contexts, aux = zip(*(memory.attend(part) for memory, part in parts), strict=True)
        return jnp.concatenate(contexts), aux


def line_up(caches: Sequence[Cache]) -> SideBySide:
    """The rows of caches of one model, of `B_1, B_2, ...` of them, as a batch of `B_1 + B_2 + ...` in this order."""

    def joined(name: str) -> Array:
        return jnp.concatenate([getattr(cache, name) for cache in caches])

    return SideBySide(joined("prompt_lengths"), joined("next_positions"), tuple(caches))


def _split(queries: Queries, ends: list[int]) -> list[Queries]:
    parts = zip(jnp.split(queries.vectors, ends), jnp.split(queries.positions, ends), strict=True)
    return [queries.replace(vectors=vectors, positions=positions) for vectors, positions in parts]
