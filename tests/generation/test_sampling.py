"""Drawing tokens: what is kept of the logits is what `transformers` keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from restkv_jax.generation.sampling import sample, truncate

SCORES = np.random.default_rng(0).standard_normal((6, 50)).astype(np.float32) * 3


@given(
    top_k=st.none() | st.integers(1, 60), top_p=st.none() | st.floats(0.05, 0.95), min_p=st.none() | st.floats(0.001, 1)
)
@settings(max_examples=60, deadline=None)
def test_what_is_kept_is_what_transformers_keeps(top_k, top_p, min_p):
    torch = pytest.importorskip("torch")
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    theirs = torch.tensor(SCORES)
    for warper, value in ((TopKLogitsWarper, top_k), (TopPLogitsWarper, top_p), (MinPLogitsWarper, min_p)):
        theirs = theirs if value is None else warper(value)(None, theirs)
    ours = truncate(jnp.asarray(SCORES), top_k, top_p, min_p)
    np.testing.assert_array_equal(ours, theirs.numpy())


def test_min_p_sees_tempered_probabilities():
    probabilities = np.array([0.5, 0.3, 0.15, 0.05], np.float32)
    keys = jax.random.split(jax.random.key(0), 4000)
    rows = jnp.broadcast_to(np.log(probabilities), (4000, 4))

    def drawn(temperature, min_p):
        return set(np.asarray(sample(rows, keys, temperature, min_p=min_p)).tolist())

    assert drawn(1.0, 0.2) == {0, 1, 2}
    assert drawn(0.5, 0.2) == {0, 1}  # squared, the third has 0.09 of the best one's
    assert drawn(1.0, 0.0) == {0, 1, 2, 3}
    assert drawn(1.0, 1.0) == {0}
    assert drawn(0.0, 0.0) == {0}
