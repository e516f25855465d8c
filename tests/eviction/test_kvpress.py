"""Agreement with arrays computed by kvpress 0.5.5 (scripts/golden_kvpress.py)."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import restkv_jax as rk
from restkv_jax.eviction.methods.compactor import LeverageAndAttention
from restkv_jax.models.rope import Rope

OPTIONS = {
    "n_future_positions": "future",
    "n_sink": "sinks",
    "use_vnorm": "use_value_norm",
    "use_covariance": "use_covariance",
    "epsilon": "epsilon",
    "chunk_size": "chunk_size",
    "sketch_dimension": "sketch_dimension",
    "blending": "blending",
}


@functools.cache
def load():
    with np.load(pathlib.Path(__file__).parent / "golden" / "kvpress.npz") as arrays:
        return dict(arrays), json.loads(str(arrays["meta"]))


def policy_of(case):
    options = {OPTIONS[name]: value for name, value in case["options"].items() if name in OPTIONS}
    if case["method"] == "compactor":
        options.setdefault("blending", case["options"]["compression_ratio"])
    return rk.METHODS[case["method"]](case["budget"], **options)


@pytest.mark.parametrize("name", load()[1])
def test_scores_and_kept_positions(name, monkeypatch):
    arrays, meta = load()
    query, key, value, frequencies, score, kept = (
        arrays[f"{name}/{array}"][None] for array in ("query", "key", "value", "frequencies", "score", "kept")
    )
    if f"{name}/sketch" in arrays:  # the press draws at random, and we with other random numbers
        monkeypatch.setattr(LeverageAndAttention, "sketch", lambda self, dim: jnp.asarray(arrays[f"{name}/sketch"]))
    policy, rope = policy_of(meta[name]), Rope(jnp.asarray(frequencies), 1.0)
    projection = np.zeros((query.shape[1], key.shape[-1], 8), np.float32)
    ev = jax.jit(rk.evict_layer, static_argnums=0)(policy, query, key, value, projection, rope=rope)
    of_zero = 1e-5 if meta[name]["method"] == "compactor" else 0  # standardised scores cross it
    judged = slice(policy.sinks, score.shape[-1] - policy.window)  # of sinks the press says the largest of the others
    np.testing.assert_allclose(ev.scores[..., judged], score[..., judged], rtol=1e-4, atol=of_zero)
    np.testing.assert_array_equal(ev.positions, kept)
