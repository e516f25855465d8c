"""What the attention of a few queries says of every key: the hot path of eviction.

`reference` defines the scores in plain JAX; `columns`, `removals`, `removals_by_query` and `centres` compute them by
Pallas kernels for TPU, which `mosaic` runs, and `triton`, `triton_by_query` and `triton_centres` by those for GPU.
"""

from collections.abc import Callable

from restkv_jax.kernels.dispatch import Dispatched, Implementation
from restkv_jax.kernels.scores import (
    centres,
    columns,
    reference,
    removals,
    removals_by_query,
    triton,
    triton_by_query,
    triton_centres,
)
from restkv_jax.kernels.scores.reference import (
    HIGHEST,
    Outputs,
    Peaks,
    einsum,
    find_outputs,
    find_peaks,
    output_gram,
    probabilities,
    read_pairs,
    removal_error,
)
from restkv_jax.kernels.scores.tiles import fold_places, fold_queries, fold_tiles, map_tiles

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
    "fold_queries",
    "fold_tiles",
    "map_tiles",
    "output_gram",
    "probabilities",
    "read_pairs",
    "removal_error",
    "removal_errors",
]


def _kernels(tpu: Callable, gpu: Callable) -> dict[str, Implementation]:
    return {
        "pallas_tpu": Implementation(tpu, "tpu", columns.refusal),
        "pallas_triton": Implementation(gpu, "cuda", triton.refusal),
    }


attention_centres = Dispatched(
    reference._attention_centres,
    pallas_tpu=Implementation(centres.attention_centres, "tpu", centres.refusal),
    pallas_triton=Implementation(triton_centres.attention_centres, "cuda", triton.refusal, trusted=False),
)
averaged_attention_removal_error = Dispatched(
    reference._averaged_attention_removal_error,
    **_kernels(removals.averaged_attention_removal_error, triton.averaged_attention_removal_error),
)
averaged_removal_error = Dispatched(
    reference._averaged_removal_error,
    pallas_tpu=Implementation(removals_by_query.averaged_removal_error, "tpu", removals_by_query.refusal),
    pallas_triton=Implementation(triton_by_query.averaged_removal_error, "cuda", triton.refusal),
)
column_row_norms = Dispatched(
    reference._column_row_norms, **_kernels(columns.column_row_norms, triton.column_row_norms)
)
column_sums = Dispatched(reference._column_sums, **_kernels(columns.column_sums, triton.column_sums))
removal_errors = Dispatched(reference._removal_errors)
