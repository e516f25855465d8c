"""The circuit that answers needle prompts: which head does what, its weights at the start, and its loss in training.

Seven heads have a role of `embedded_data.ROLES`. The first layer tells every token what stands a few places before it,
the second what key it belongs to, the third finds what has a key, the fourth what comes before in a list, the fifth
what comes next.
"""

from typing import Any

import embedded_data as data
import jax
import jax.numpy as jnp

from restkv_jax.models.config import ModelConfig

HEADS = {
    "first": (1, 0),
    "second": (1, 2),
    "last": (1, 1),
    "retrieve": (2, 0),
    "previous": (3, 0),
    "next": (4, 0),
    "continue": (4, 2),
}
"""Layer and head of each role."""
COPYING = ("retrieve", "next", "continue")
"""Roles whose heads say what they look at."""
NOTING = tuple(role for role in HEADS if role not in COPYING)
MATCHES = {
    "retrieve": (("first", "first"), ("second", "second")),
    "previous": (("first", "first"), ("second", "second")),
    "next": (("first", "first"), ("second", "second"), ("last", "previous")),
}
"""A head of these roles looks where, for each pair, the second role's head saw what the first's sees here."""
CONSTANT_COMPONENTS, TOKEN_COMPONENTS, NOTE_COMPONENTS = 8, 88, 40
"""The residual stream at the start: constants, what a token is, and a note from each head that does not copy."""
CONSTANT_SCALE = 3.0
EMBEDDING_SCALE = 1.0
FINAL_SCALE = 0.05
LESS, MATCH_SCALE, NOTE_SCALE = 0.3, 3.0, 1.0
POSITION_WEIGHTS = (85.0, 55.0, 45.0, 30.0)


def initial_params(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Normal weights of variance 1 / fan-in, small where they write to the residual stream, but for two things.

    Some embedding components are equal for all tokens; from these, head h of the first layer starts out attending to
    the token h + 1 places before. And heads with a role start out wired to one another.
    """
    hidden, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    kv_heads, dim, inner = config.num_key_value_heads, config.head_dim, config.intermediate_size
    keys = jax.random.split(key, 9)
    small = (2 * layers) ** -0.5

    def normal(i, *shape, std):
        return std * jax.random.normal(keys[i], shape)

    weights = {
        "input_norm": jnp.ones((layers, hidden)),
        "query_projection": normal(1, layers, hidden, heads, dim, std=hidden**-0.5),
        "key_projection": normal(2, layers, hidden, kv_heads, dim, std=hidden**-0.5),
        "value_projection": normal(3, layers, hidden, kv_heads, dim, std=hidden**-0.5),
        "output_projection": normal(4, layers, heads, dim, hidden, std=small * (heads * dim) ** -0.5),
        "post_attention_norm": jnp.ones((layers, hidden)),
        "gate_projection": normal(5, layers, hidden, inner, std=hidden**-0.5),
        "up_projection": normal(6, layers, hidden, inner, std=hidden**-0.5),
        "down_projection": normal(7, layers, inner, hidden, std=small * inner**-0.5),
    }
    query, key_vectors = position_vectors(config, jnp.arange(heads) + 1)
    constant = slice(0, CONSTANT_COMPONENTS)
    weights["query_projection"] = weights["query_projection"].at[0].multiply(0.1).at[0, constant].add(query)
    weights["key_projection"] = weights["key_projection"].at[0].multiply(0.1).at[0, constant].add(key_vectors)
    token = slice(CONSTANT_COMPONENTS, CONSTANT_COMPONENTS + TOKEN_COMPONENTS)
    embedding = normal(0, config.vocab_size, hidden, std=EMBEDDING_SCALE)
    embedding = jnp.zeros_like(embedding).at[:, token].set(embedding[:, token]).at[:, constant].set(CONSTANT_SCALE)
    weights |= wiring(config, weights, keys[8])
    return {"embedding": embedding, "final_norm": jnp.full(hidden, FINAL_SCALE), "layers": weights}


def position_vectors(config: ModelConfig, offsets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What each constant component adds to queries [H, D] and keys [D] so that heads look `offsets` [H] places back.

    Under RoPE the score is then a sum of `POSITION_WEIGHTS` times cosines over the fastest rotations.
    """
    pairs = config.head_dim // 2
    frequencies = dict(config.rope_parameters)["rope_theta"] ** (-jnp.arange(pairs) / pairs)
    amplitude = jnp.zeros(pairs).at[: len(POSITION_WEIGHTS)].set(jnp.sqrt(jnp.array(POSITION_WEIGHTS)))
    mean_square = (CONSTANT_COMPONENTS * CONSTANT_SCALE**2 + TOKEN_COMPONENTS * EMBEDDING_SCALE**2) / config.hidden_size
    share = mean_square**0.5 / (CONSTANT_COMPONENTS * CONSTANT_SCALE)
    angles = -frequencies * offsets[:, None]
    query = jnp.concatenate([amplitude * jnp.cos(angles), amplitude * jnp.sin(angles)], axis=1)
    return share * query, share * jnp.concatenate([amplitude, jnp.zeros(pairs)])


def wiring(config: ModelConfig, weights: dict[str, Any], key: jax.Array) -> dict[str, Any]:
    """The projections in which heads with a role move and compare tokens from the start.

    Their values are a projection of what a token is. Copying heads write it back, which predicts the token; each other
    makes a note of it in components of its own, and heads of `MATCHES` compare notes in the half of their components
    that RoPE turns least. `previous` also passes on what `last` wrote.
    """
    hidden, dim = config.hidden_size, config.head_dim
    groups = config.num_attention_heads // config.num_key_value_heads
    token_key, note_key, mix_key = jax.random.split(key, 3)
    seen = jax.random.orthogonal(token_key, TOKEN_COMPONENTS)[:, :dim]
    note_basis = jax.random.orthogonal(note_key, dim)[:, :NOTE_COMPONENTS]
    starts = range(CONSTANT_COMPONENTS + TOKEN_COMPONENTS, hidden, NOTE_COMPONENTS)
    blocks = {role: slice(start, start + NOTE_COMPONENTS) for role, start in zip(NOTING, starts, strict=True)}
    value = jnp.zeros((hidden, dim)).at[CONSTANT_COMPONENTS : CONSTANT_COMPONENTS + TOKEN_COMPONENTS].set(seen)
    queries, keys, values, output = (weights[f"{name}_projection"] for name in ("query", "key", "value", "output"))
    for role, (layer, head) in HEADS.items():
        passed = value.at[blocks["last"]].set(note_basis.T / NOTE_SCALE) if role == "previous" else value
        values = values.at[layer, :, head // groups].set(passed)
        note = value.T if role in COPYING else jnp.zeros((dim, hidden)).at[:, blocks[role]].set(NOTE_SCALE * note_basis)
        output = output.at[layer, head].set(note)
    half = jnp.arange(dim // 4, dim // 2)
    slow = jnp.concatenate([half, half + dim // 2])
    for role, pairs in MATCHES.items():
        layer, head = HEADS[role]
        query = its = jnp.zeros((hidden, len(slow)))
        for i, (ours, theirs) in enumerate(pairs):
            mix = jax.random.normal(jax.random.fold_in(mix_key, i), (NOTE_COMPONENTS, len(slow)))
            mix = MATCH_SCALE * mix / jnp.linalg.norm(mix, axis=0)
            query, its = query.at[blocks[ours]].set(mix), its.at[blocks[theirs]].set(mix)
        queries = queries.at[layer, :, head].multiply(LESS).at[layer, :, head, slow].set(query.T)
        keys = keys.at[layer, :, head // groups].multiply(LESS).at[layer, :, head // groups, slow].set(its.T)
    projections = {"query": queries, "key": keys, "value": values, "output": output}
    return {f"{name}_projection": weight for name, weight in projections.items()}


def look_losses(queries: jax.Array, keys: jax.Array, batch: data.Batch) -> jax.Array:
    """Of each role, the mean negative logarithm of the attention that its head gives to where it should look.

    Looks at the beginning of the text mean that there is nothing to find. They are averaged apart from the others, and
    both means count alike: most looks of `previous` are such, and it would learn to find nothing.

    Args:
      queries: float32 [L, B, H, T, D] of all layers, scaled and rotated.
      keys: float32 [L, B, K, T, D] of all layers, rotated.
      batch: whose tokens they are of, with the looks of R roles.

    Returns:
      float32 [R], 0 for a role without looks.
    """
    groups = queries.shape[2] // keys.shape[2]
    layers, heads = (jnp.array([HEADS[role][i] for role in data.ROLES]) for i in (0, 1))
    start = jnp.maximum(batch.look_from, 0)
    queries = jnp.take_along_axis(queries[layers, :, heads], start[..., None], axis=2)
    scores = jnp.einsum("rbmd,rbtd->rbmt", queries, keys[layers, :, heads // groups]) + batch.log_copies[:, None]
    scores = jnp.where(jnp.arange(scores.shape[-1]) <= start[..., None], scores, -1e9)
    target_scores = jnp.take_along_axis(scores, jnp.maximum(batch.look_to, 0), axis=-1)
    target_scores = jnp.where(batch.look_to >= 0, target_scores, -1e9)
    losses = jax.nn.logsumexp(scores, axis=-1) - jax.nn.logsumexp(target_scores, axis=-1)
    asked, nothing = batch.look_from >= 0, batch.look_to[..., 0] == 0
    kinds = jnp.stack([asked & nothing, asked & ~nothing])
    counts = kinds.sum(axis=(2, 3))
    means = jnp.where(kinds, losses, 0.0).sum(axis=(2, 3)) / jnp.maximum(counts, 1)
    return means.sum(axis=0) / jnp.maximum((counts > 0).sum(axis=0), 1)
