"""lm-evaluation-harness on a small cache: importing this registers the model `restkv`."""

from restkv_jax.evaluate.harness.model import EMBEDDED, RestKV

__all__ = ["EMBEDDED", "RestKV"]
