"""Pure array functions under the cache, each defined by its plain JAX reference."""

from restkv_jax.kernels import distant, gather, paged, scores, solve
from restkv_jax.kernels.attention import attention, largest_divisor, shared_key_attention
from restkv_jax.kernels.dispatch import by_platform
from restkv_jax.kernels.paged import check_page_size
from restkv_jax.kernels.scores import output_gram
from restkv_jax.kernels.softmax import add_keys, empty_softmax

attention_centres = by_platform(scores.attention_centres)
averaged_attention_removal_error = by_platform(scores.averaged_attention_removal_error)
averaged_removal_error = by_platform(scores.averaged_removal_error)
column_row_norms = by_platform(scores.column_row_norms)
column_sums = by_platform(scores.column_sums)
gather_pairs = by_platform(gather.gather_pairs)
paged_attention = by_platform(paged.paged_attention, cuda=paged.paged_attention_cuda, tpu=paged.paged_attention_tpu)
read_distant = by_platform(distant.read_distant)
removal_errors = by_platform(scores.removal_errors)
solve_positive_definite = by_platform(solve.solve_positive_definite, cpu=solve.solve_positive_definite_cpu)

__all__ = [
    "add_keys",
    "attention",
    "attention_centres",
    "averaged_attention_removal_error",
    "averaged_removal_error",
    "check_page_size",
    "column_row_norms",
    "column_sums",
    "empty_softmax",
    "gather_pairs",
    "largest_divisor",
    "output_gram",
    "paged_attention",
    "read_distant",
    "removal_errors",
    "shared_key_attention",
    "solve_positive_definite",
]
