"""The training step: gradients of the next-token loss, and AdamW on the weights that are trained."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.ref
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
    """AdamW (Loshchilov & Hutter 2019); `steps` must be given."""

    def is_decayed(params: dict[str, Array]) -> dict[str, bool]:
        return {name: name.endswith(("projection", "embedding")) for name in params}

    return optax.adamw(learning_rate(adaptation), b2=BETA2, weight_decay=adaptation.weight_decay, mask=is_decayed)


def train_step(
    state: TrainState,
    frozen: dict[str, Array],
    batch: Batch,
    *,
    forward: Callable[[Any, Array], Array],
    model: Any,
    optimizer: optax.GradientTransformation,
    clip_norm: float,
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
      clip_norm: to which the gradient's norm over all parameters is clipped.
      compute_dtype: of activations.
      loss_chunk: tokens of a sequence whose logits exist at one time.
    """

    total = jnp.maximum(batch.weights[:, :, 1:].sum(), jnp.finfo(jnp.float32).tiny)

    def part_loss(trained: dict[str, Array], part: Batch) -> Array:
        params = unflatten(frozen | trained)
        rounded = jax.tree.map(lambda leaf: leaf.astype(compute_dtype), params)
        hidden = forward(rounded, part.tokens)
        # divided here, as the quotient of the gradients would be another copy of them
        return next_token_loss(model, params, hidden, part.tokens, part.weights, loss_chunk) / total

    loss, gradient = _loss_and_gradient(part_loss, state.params, batch)
    norm = optax.tree.norm(gradient)
    # a product, which becomes part of what follows; optax clips by a quotient, for which XLA makes a copy
    clipped = optax.tree.scale(jnp.minimum(1, clip_norm / norm), gradient)
    updates, optimizer_state = optimizer.update(clipped, state.optimizer, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    return TrainState(params, optimizer_state), Metrics(loss, norm)


def _loss_and_gradient(
    part_loss: Callable[[dict[str, Array], Batch], Array], params: dict[str, Array], batch: Batch
) -> tuple[Array, dict[str, Array]]:
    """The sum of the losses of a batch's parts, and its gradient.

    Layer by layer the gradient is added where it stays, so that it exists once; the sum of the parts' gradients would
    be another.
    """
    sums = jax.tree.map(lambda leaf: jax.new_ref(jnp.zeros_like(leaf)), params)

    def add_part(total: Array, part: Batch) -> tuple[Array, None]:
        loss, backward = jax.vjp(lambda params: part_loss(params, part), params)
        backward.with_refs(sums)(jnp.ones_like(loss))
        return total + loss, None

    loss, _ = jax.lax.scan(add_part, jnp.zeros((), jnp.float32), batch)
    return loss, jax.tree.map(jax.ref.freeze, sums)
