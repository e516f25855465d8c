"""Ours: LaProx's scores, spread to what follows attended keys, sinks always kept, budgets by head with a floor."""

from restkv_jax.eviction.allocation import AdaptiveHeads
from restkv_jax.eviction.methods.laprox import ColumnRowNorm
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.eviction.pooling import SuccessorPooling


def best(
    budget: int | str = 128,
    window: int | None = None,
    kernel_size: int = 12,
    own: float = 0.3,
    sinks: int = 4,
    floor: float = 0.2,
    candidates: int | None = None,
) -> EvictionPolicy:
    """The policy of this library that measured best on a real model (docs/policies.md).

    `||A[:, n]||_2 ||v[n] W_h||_2` (LaProx, arXiv 2605.07234) says which keys the window's output needs. Their scores
    spread to the keys that follow, where a model that copies goes next. Sinks have small values, so that such scores
    give them up, and free text suffers most from that. Each layer shares its budget among its KV heads (AdaKV).

    Args:
      budget: mean slots per layer and KV head, the window and the sinks included.
      window: last tokens of the prompt, whose queries score the others; a sixth of the budget, from 8 to 32, if left
        out.
      kernel_size: keys that a score is spread over, in tokens; see `SuccessorPooling`.
      own: the part of a score that stays with its key.
      sinks: first tokens of the prompt, always kept.
      floor: the part of the budget that all heads get evenly.
      candidates: keys before the window that each layer and KV head carries to the selection; 4 times the budget by
        default.
    """
    return EvictionPolicy(
        budget=budget,
        window=32 if window is None else window,
        window_share=1 / 6 if window is None else None,
        scorer=ColumnRowNorm(),
        pooling=SuccessorPooling(kernel_size, own),
        sinks=sinks,
        allocation=AdaptiveHeads(floor=floor, normalize=False),
        candidates=candidates,
    )
