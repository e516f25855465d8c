"""The training step: gradients of the next-token loss, and AdamW on the weights that are trained."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from restkv_jax.models.tensors import flatten, unflatten
from restkv_jax.pod.adaptation.loss import next_token_loss
from restkv_jax.pod.adaptation.recipe import Adaptation

BETA2 = 0.95
"""AdamW's decay of squared gradients, as usual for language models (Touvron et al. 2023, Llama 2)."""


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

    loss: Any
    gradient_norm: Any


def split_params(params: Any, pattern: str) -> tuple[dict[str, Any], dict[str, Any]]:
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
    rate, steps = adaptation.learning_rate, adaptation.num_steps
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
    params: Any = optax.apply_updates(state.params, updates)
    return TrainState(params, optimizer_state), Metrics(loss, optax.tree.norm(gradient))
