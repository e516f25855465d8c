"""Pure array functions under the cache, each defined by its plain JAX reference."""

from restkv_jax.kernels.attention import attention

__all__ = ["attention"]
