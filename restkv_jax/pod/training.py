"""The training step: gradients of the next-token loss, and AdamW on the weights that are trained."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from restkv_jax.models.tensors import flatten, unflatten
from restkv_jax.pod.loss import next_token_loss

BETA2 = 0.95
"""AdamW's decay of squared gradients, as usual for language models (Touvron et al. 2023, Llama 2)."""


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """How to train; the result depends on these alone, whatever the devices, to rounding.

    Args:
      steps: optimizer steps; one pass over the data if left out.
      batch_size: sequences per step.
      sequence_length: tokens per sequence. Left out, that of the rows of a two-dimensional array, else the model's
        maximum, at most 32,768.
      accumulation: parts of the batch that go through the model one after the other; less memory, the same gradient.
      learning_rate: the highest; AdamW's.
      warmup: share of the steps over which the rate rises to it; then it falls to zero along a cosine.
      weight_decay: AdamW's, of matrices.
      clip_norm: largest norm of the gradient over all parameters.
      train: regular expression; parameters whose dotted name has a match are trained, such as
        "query_projection|key_projection".
      compute_dtype: of activations and of the weights in products; the weights themselves are trained in float32.
        "auto" is bfloat16, on a CPU float32.
      loss_chunk: tokens of a sequence whose logits exist at one time.
      seed: of the order of the sequences.
    """

    steps: int | None = None
    batch_size: int = 8
    sequence_length: int | None = None
    accumulation: int = 1
    learning_rate: float = 1e-5
    warmup: float = 0.05
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    train: str = ".*"
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    loss_chunk: int = 512
    seed: int = 0

    def __post_init__(self):
        for name in ("batch_size", "accumulation", "loss_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")
        if self.sequence_length is not None and self.sequence_length < 2:
            raise ValueError(f"sequence_length={self.sequence_length} must be at least 2: one token predicts the next")
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation={self.accumulation} must divide batch_size={self.batch_size}")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay={self.weight_decay} must not be negative")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup} must be in [0, 1), a share of the steps")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be in [0, 2**32)")
        try:
            re.compile(self.train)
        except re.error as error:
            raise ValueError(f"train={self.train!r} is no regular expression: {error}") from error


class Batch(NamedTuple):
    """Sequences of one step in `A` parts: tokens int32 [A, b, T], weights float32 [A, b, T] of their prediction."""

    tokens: Any
    weights: Any


class TrainState(NamedTuple):
    """What a step changes: the trained parameters by dotted name, in float32, and the optimizer's state."""

    params: dict[str, Array]
    optimizer: Any


class Metrics(NamedTuple):
    """Of one step, float32 scalars: mean loss per token in nats, norm of the gradient before clipping."""

    loss: Array
    gradient_norm: Array


def split_params(params: Any, pattern: str) -> tuple[dict[str, Array], dict[str, Array]]:
    """Trained and frozen parameters, both by dotted name.

    Raises:
      ValueError: no name matches the pattern.
    """
    flat = flatten(params)
    trained = {name: leaf for name, leaf in flat.items() if re.search(pattern, name)}
    if not trained:
        raise ValueError(f"train={pattern!r} matches no parameter; there are: {', '.join(flat)}")
    return trained, {name: leaf for name, leaf in flat.items() if name not in trained}


def learning_rate(adaptation: Adaptation) -> optax.Schedule:
    """Linear warm-up, then a cosine to zero (Loshchilov & Hutter 2017). `steps` must be given."""
    rate, steps = adaptation.learning_rate, adaptation.steps
    warmup = int(adaptation.warmup * steps)
    return optax.warmup_cosine_decay_schedule(rate / (warmup + 1), rate, warmup, steps)


def make_optimizer(adaptation: Adaptation) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) after clipping by the global norm; `steps` must be given."""

    def is_decayed(params: dict[str, Array]) -> dict[str, bool]:
        return {name: name.endswith(("projection", "embedding")) for name in params}

    return optax.chain(
        optax.clip_by_global_norm(adaptation.clip_norm),
        optax.adamw(learning_rate(adaptation), b2=BETA2, weight_decay=adaptation.weight_decay, mask=is_decayed),
    )


def train_step(
    state: TrainState,
    frozen: dict[str, Array],
    batch: Batch,
    *,
    forward: Callable[[Any, Array], Array],
    model: Any,
    optimizer: optax.GradientTransformation,
    compute_dtype: Any,
    loss_chunk: int,
) -> tuple[TrainState, Metrics]:
    """One step of the optimizer on `Σ losses / Σ weights` of the whole batch, whatever its parts.

    Args:
      state: before the step.
      frozen: parameters that are not trained, by dotted name.
      batch: a `Batch`.
      forward: parameters and tokens int32 [b, T] to hidden states [b, T, M].
      model: the `Decoder`.
      optimizer: of `state`.
      compute_dtype: of activations.
      loss_chunk: tokens whose logits exist at one time.
    """

    def part_loss(trained: dict[str, Array], part: Batch) -> Array:
        params = unflatten(frozen | trained)
        rounded = jax.tree.map(lambda leaf: leaf.astype(compute_dtype), params)
        hidden = forward(rounded, part.tokens)
        return next_token_loss(model, params, hidden, part.tokens, part.weights, loss_chunk)

    def add_part(sums: tuple[Array, Any], part: Batch) -> tuple[tuple[Array, Any], None]:
        return jax.tree.map(jnp.add, sums, jax.value_and_grad(part_loss)(state.params, part)), None

    zeros = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.params)
    sums, _ = jax.lax.scan(add_part, zeros, batch)
    total = jnp.maximum(batch.weights[:, :, 1:].sum(), jnp.finfo(jnp.float32).tiny)
    loss, gradient = jax.tree.map(lambda x: x / total, sums)
    updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, optimizer_state), Metrics(loss, optax.tree.norm(gradient))
