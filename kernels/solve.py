"""Linear systems of many heads."""

import jax
from jax import Array

from restkv_jax.kernels.dispatch import Dispatched, Implementation, never


def _solve_positive_definite(systems: Array, targets: Array) -> Array:
    """Solves `systems @ x = targets` by Cholesky's factors.

    Args:
      systems: float32 [n, n], symmetric and positive definite.
      targets: float32 [n, D].

    Returns:
      float32 [n, D].
    """
    return jax.scipy.linalg.solve(systems, targets, assume_a="pos")


_one_by_one = jax.custom_batching.sequential_vmap(_solve_positive_definite)
"""One system after the other. XLA's CPU calls of LAPACK spread a batch over the threads that run the program and wait
for them: independent batches in one program, such as those of two policies, can wait for each other forever."""

solve_positive_definite = Dispatched(_solve_positive_definite, one_by_one=Implementation(_one_by_one, "cpu", never))
