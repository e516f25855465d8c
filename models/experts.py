"""A mixture of experts: each token goes through a few of many MLPs (Mixtral, arXiv 2401.04088)."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from restkv_jax.kernels.partition import mesh_sizes


class Experts(NamedTuple):
    """`router` [M, E]; `gate`, `up` [E, M, F]; `down` [E, F, M]."""

    router: Array
    gate: Array
    up: Array
    down: Array


def mix_experts(x: Array, experts: Experts, per_token: int, normalise: bool, activation: Callable) -> Array:
    """`sum_e p[e] (activation(x gate_e) * (x up_e)) down_e` over the likeliest `per_token` experts of each token.

    Tokens are sorted by expert and multiplied by the weights of theirs only, a grouped product for which TPU and GPU
    have kernels; on the CPU all experts see all tokens. On a mesh each part of the rows is sorted by itself: one order
    of all tokens would bring all of them to every device.

    Args:
      x: [B, ..., M].
      experts: of one layer.
      per_token: experts of a token.
      normalise: whether a token's `p`, softmax of the router's logits over all experts, are made to add up to 1.
      activation: of the gate.

    Returns:
      [B, ..., M]; probabilities in float32.
    """
    mix = functools.partial(_mix, per_token=per_token, normalise=normalise, activation=activation)
    num_parts = mesh_sizes().get("data", 1)
    if num_parts == 1 or x.shape[0] % num_parts:
        return mix(x, experts)
    specs = PartitionSpec("data"), PartitionSpec()
    mix = jax.shard_map(mix, in_specs=specs, out_specs=specs[0], axis_names={"data"}, check_vma=False)
    return mix(x, experts)


def _mix(x: Array, experts: Experts, per_token: int, normalise: bool, activation: Callable) -> Array:
    tokens = x.reshape(-1, x.shape[-1])
    logits = (tokens @ experts.router).astype(jnp.float32)
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits), per_token)
    if normalise:
        weights = weights / weights.sum(-1, keepdims=True)
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    sizes = jnp.bincount(chosen.reshape(-1), length=logits.shape[-1]).astype(jnp.int32)
    owner = order // per_token
    rows = tokens[owner]
    hidden = activation(jax.lax.ragged_dot(rows, experts.gate, sizes)) * jax.lax.ragged_dot(rows, experts.up, sizes)
    output = jax.lax.ragged_dot(hidden, experts.down, sizes) * weights.reshape(-1)[order, None].astype(x.dtype)
    return jnp.zeros_like(tokens).at[owner].add(output).reshape(x.shape)
