"""How a model is adapted."""

import dataclasses
import re
from typing import Literal

from restkv_jax.models.arguments import check_integer


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """How to train; the result depends on these alone, whatever the devices, to rounding.

    Args:
      steps: optimizer steps; one pass over the data if left out.
      batch_size: sequences per step.
      sequence_length: tokens per sequence. Left out, that of the rows of a two-dimensional array, else the model's
        maximum, at most 32,768.
      accumulation: parts of the batch that go through the model one after the other; less memory, the same gradient.
        Left out, it is 1, on a CPU as many as leave each at least 1,024 tokens, which keep it busy.
      learning_rate: the highest; AdamW's.
      warmup: share of the steps over which the rate rises to it; then it falls to zero along a cosine.
      weight_decay: AdamW's, of matrices but a mixture's router.
      clip_norm: largest norm of the gradient over all parameters.
      train: regular expression; parameters whose dotted name has a match are trained, such as
        "query_projection|key_projection".
      compute_dtype: of activations and of the weights in products; the weights themselves are trained in float32.
        "auto" is bfloat16, on a CPU float32.
      loss_chunk: tokens whose logits exist at one time on a device. Left out, it is 512, on a CPU 128.
      seed: of the order of the sequences.
    """

    steps: int | None = None
    batch_size: int = 8
    sequence_length: int | None = None
    accumulation: int | None = None
    learning_rate: float = 1e-5
    warmup: float = 0.05
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    train: str = ".*"
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    loss_chunk: int | None = None
    seed: int = 0

    @property
    def num_steps(self) -> int:
        """`steps`, where they are given."""
        assert self.steps is not None
        return self.steps

    @property
    def num_parts(self) -> int:
        """`accumulation`, 1 where it is left out."""
        return self.accumulation or 1

    @property
    def tokens_with_logits(self) -> int:
        """`loss_chunk`, 512 where it is left out."""
        return self.loss_chunk or 512

    def __post_init__(self):
        check_integer("batch_size", self.batch_size, 1, "sequences per step")
        check_integer("seed", self.seed, 0, "of the order of the sequences")
        if self.accumulation is not None:
            check_integer("accumulation", self.accumulation, 1, "parts of the batch")
        if self.loss_chunk is not None:
            check_integer("loss_chunk", self.loss_chunk, 1, "tokens whose logits exist at one time")
        if self.steps is not None:
            check_integer("steps", self.steps, 1, "of the optimizer")
        if self.sequence_length is not None:
            check_integer("sequence_length", self.sequence_length, 2, "one token predicts the next")
        if self.batch_size % self.num_parts:
            raise ValueError(f"accumulation={self.accumulation} must divide batch_size={self.batch_size}")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay={self.weight_decay} must not be negative")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup} must be in [0, 1), a share of the steps")
        if self.seed >= 2**32:
            raise ValueError(f"seed={self.seed} must be below 2**32")
        try:
            re.compile(self.train)
        except re.error as error:
            raise ValueError(f"train={self.train!r} is not a regular expression: {error}") from error
