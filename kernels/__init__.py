"""Pure array functions under the cache, each defined by its plain JAX reference."""

from restkv_jax.kernels.attention import attend, attend_shared
from restkv_jax.kernels.dispatch import Dispatched
from restkv_jax.kernels.distant import read_distant
from restkv_jax.kernels.gather import gather_pairs
from restkv_jax.kernels.paged import Pages, attend_pages
from restkv_jax.kernels.pairs import Pairs, Queries, visible
from restkv_jax.kernels.scores import (
    attention_centres,
    averaged_attention_removal_error,
    averaged_removal_error,
    column_row_norms,
    column_sums,
    output_gram,
    removal_errors,
)
from restkv_jax.kernels.solve import solve_positive_definite

__all__ = [
    "Dispatched",
    "Pages",
    "Pairs",
    "Queries",
    "attend",
    "attend_pages",
    "attend_shared",
    "attention_centres",
    "averaged_attention_removal_error",
    "averaged_removal_error",
    "column_row_norms",
    "column_sums",
    "gather_pairs",
    "output_gram",
    "read_distant",
    "removal_errors",
    "solve_positive_definite",
    "visible",
]
