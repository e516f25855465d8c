"""What the attention of a few queries says of every key: the hot path of eviction.

`reference` defines the scores in plain JAX; `columns`, `removals`, `removals_by_query` and `centres` compute them by
Pallas kernels for TPU, which `mosaic` runs.
"""

from collections.abc import Callable

from restkv_jax.kernels.dispatch import Dispatched, Implementation
from restkv_jax.kernels.scores import centres, columns, reference, removals, removals_by_query
from restkv_jax.kernels.scores.reference import (
    HIGHEST,
    Outputs,
    Peaks,
    einsum,
    find_outputs,
    find_peaks,
    output_gram,
    probabilities,
    removal_error,
)
from restkv_jax.kernels.scores.tiles import fold_places, fold_tiles, map_tiles

__all__ = [
    "HIGHEST",
    "Outputs",
    "Peaks",
    "attention_centres",
    "averaged_attention_removal_error",
    "averaged_removal_error",
    "column_row_norms",
    "column_sums",
    "einsum",
    "find_outputs",
    "find_peaks",
    "fold_places",
    "fold_tiles",
    "map_tiles",
    "output_gram",
    "probabilities",
    "removal_error",
    "removal_errors",
]


def _on_tpu(function: Callable) -> Implementation:
    return Implementation(function, "tpu", columns.refusal)


attention_centres = Dispatched(
    reference._attention_centres,
    pallas_tpu=Implementation(centres.attention_centres, "tpu", centres.refusal),
)
averaged_attention_removal_error = Dispatched(
    reference._averaged_attention_removal_error, pallas_tpu=_on_tpu(removals.averaged_attention_removal_error)
)
averaged_removal_error = Dispatched(
    reference._averaged_removal_error, pallas_tpu=_on_tpu(removals_by_query.averaged_removal_error)
)
column_row_norms = Dispatched(reference._column_row_norms, pallas_tpu=_on_tpu(columns.column_row_norms))
column_sums = Dispatched(reference._column_sums, pallas_tpu=_on_tpu(columns.column_sums))
removal_errors = Dispatched(reference._removal_errors)
