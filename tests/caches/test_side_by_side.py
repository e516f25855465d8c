"""Caches of different kinds that are decoded as the rows of one batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIG

import restkv_jax as rk
from restkv_jax.caches.side_by_side import line_up
from restkv_jax.generation.decoding import feed
from restkv_jax.generation.generating import decode_each
from restkv_jax.generation.reading import prefill_each
from restkv_jax.pod import LayerGroups, Sharing

LAYERS = 5
POLICIES = rk.full(), rk.snapkv(20, window=8), rk.laprox(20, window=8), rk.restkv(20, window=8, while_generating=True)
SHARING = Sharing(LayerGroups([[0, 0], [0, 1], [2, 1], [2, 1], [4, 4]]), sink=2, recent=8)


@functools.cache
def read(cache_dtype=None, sharing=None):
    """Three rows of a random model, the first of them padded, read once for all policies."""
    model = rk.build_model(CONFIG | {"num_hidden_layers": LAYERS, "initializer_range": 0.3}).clone(sharing=sharing)
    params = rk.init_params(model, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(3, CONFIG["vocab_size"], (3, 60))
    mask = np.arange(60) >= np.array([[9], [0], [0]])
    policies = POLICIES if cache_dtype is None and sharing is None else POLICIES[:2]
    logits, caches = prefill_each(model, params, tokens, mask, policies, 8, cache_dtype=cache_dtype)
    return model, params, logits, caches


@pytest.mark.parametrize(
    "options", [{}, {"cache_dtype": "int8(group_size=8,residual=8)"}, {"sharing": SHARING}], ids=str
)
def test_each_attends_as_it_does_alone(options):
    model, params, _, caches = read(**options)
    together = line_up(jax.tree.map(jnp.copy, caches))
    token, active = jnp.array([5, 6, 7]), jnp.array([True, True, False])
    for _ in range(2):
        given = jnp.tile(token, len(caches)), jnp.tile(active, len(caches))
        logits, together = feed(model, params, given[0], together, given[1])
        found = [feed(model, params, token, jax.tree.map(jnp.copy, cache), active) for cache in caches]
        expected, caches = zip(*found, strict=True)
        np.testing.assert_allclose(logits, jnp.concatenate(expected), atol=2e-5)
    for own, alone in zip(together.caches, caches, strict=True):
        np.testing.assert_array_equal(own.next_positions, alone.next_positions)
        np.testing.assert_array_equal(own.slot_positions(), alone.slot_positions())
    np.testing.assert_array_equal(together.next_positions[:3], caches[0].next_positions)


def passes_through_layers():
    """How often the traced program of a decoding runs through the layers."""
    model, params, logits, caches = read()
    traced = jax.make_jaxpr(lambda *given: decode_each(model, *given, 8))(params, [logits] * len(caches), caches)
    return str(traced).count(f"length={LAYERS}\n")


def test_all_kinds_go_through_the_layers_together():
    assert passes_through_layers() == 1


def test_on_a_mesh_each_kind_goes_by_itself():
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2, 1), ("data", "model"))):
        assert passes_through_layers() == len(POLICIES)
