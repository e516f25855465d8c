"""What a layer shows of itself to those who judge its keys."""

from typing import ClassVar, NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array

from restkv_jax.models.config import UNLIMITED


class Observation(NamedTuple):
    """What a scorer may look at in one layer.

    `queries` [B, H, w, D] of the last `w` tokens (all `T` where the scorer asks for them); `keys`, `values`
    [B, K, T, D] after RoPE; `output_projection` [H, D, M]; `positions` int32 [B, T], -1 on padding, which is on the
    left; `sliding_window` int32 scalar in tokens; `layer` int32 scalar.
    """

    queries: Array
    keys: Array
    values: Array
    output_projection: Array
    positions: Array
    sliding_window: Array | int = UNLIMITED
    layer: Array | int = 0

    @property
    def query_positions(self) -> Array:
        """int32 [B, w]."""
        return self.positions[:, self.positions.shape[1] - self.queries.shape[2] :]

    @property
    def key_positions(self) -> Array:
        """int32 [B, K, T]."""
        return jnp.broadcast_to(self.positions[:, None], self.keys.shape[:3])

    @property
    def attention_arguments(self) -> tuple[Array, ...]:
        """Queries, keys, values, positions of queries and keys, and the sliding window."""
        return self.queries, self.keys, self.values, self.query_positions, self.key_positions, self.sliding_window


class Scorer(Protocol):
    """Judges the keys before the window: the larger the score, the sooner a key is kept.

    A frozen dataclass, hashable and so static under jit. `all_queries` asks for the queries of the whole
    prompt instead of the window's. A scorer whose scores are not negative, so that an allocation may divide them by
    their sum, says so with `additive = True`. A scorer that can go on judging while tokens are generated also has
    `alpha`, the weight of the newest query, and `gram(output_projection) -> [H, D, D]`, the quadratic form of its
    errors.
    """

    all_queries: ClassVar[bool]

    def __call__(self, observation: Observation, window: int) -> Array:
        """float32 [B, H, T - window]."""
