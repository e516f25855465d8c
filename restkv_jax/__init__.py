"""Long prompts on a small KV cache: ReST-KV and its relatives for Llama-family models in JAX."""

from restkv_jax.models import build_model, init_params

__all__ = ["build_model", "init_params"]
