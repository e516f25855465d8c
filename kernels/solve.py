"""Linear systems of many heads."""

import jax
from jax import Array


def solve_positive_definite(systems: Array, targets: Array) -> Array:
    """Solves `systems @ x = targets` by Cholesky's factors.

    Args:
      systems: float32 [n, n], symmetric and positive definite.
      targets: float32 [n, D].

    Returns:
      float32 [n, D].
    """
    return jax.scipy.linalg.solve(systems, targets, assume_a="pos")


solve_positive_definite_cpu = jax.custom_batching.sequential_vmap(solve_positive_definite)
"""One system after the other. XLA's CPU calls of LAPACK spread a batch over the threads that run the program and wait
for them: independent batches in one program, such as those of two policies, can wait for each other forever."""
