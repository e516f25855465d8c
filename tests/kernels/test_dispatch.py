"""A kernel with another implementation, as CONTRIBUTING says how to add one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from restkv_jax import kernels
from restkv_jax.kernels.dispatch import Dispatched, Implementation


def _scaled(x, *, factor):
    """The reference."""
    return x * factor


def refusal(x, *, factor):
    return None if x.ndim == 1 else f"x has {x.ndim} axes, and the kernel knows one"


def marked(x, *, factor, interpret=False):
    return x * factor + (200 if interpret else 100)


scaled = Dispatched(
    _scaled, marked=Implementation(marked, "cpu", refusal), other=Implementation(marked, "tpu", refusal)
)


def test_the_platforms_implementation_is_taken_where_it_fits():
    np.testing.assert_array_equal(scaled(jnp.ones(2), factor=3), [103, 103])
    np.testing.assert_array_equal(jax.jit(lambda x: scaled(x, factor=3))(jnp.ones(2)), [103, 103])
    np.testing.assert_array_equal(scaled(jnp.ones((1, 2)), factor=3), [[3, 3]])


def test_others_are_not_traced(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("restkv_jax.kernels.dispatch.target_platform", lambda: "tpu")
        made = jax.jit(lambda x: scaled(x, factor=3)).trace(jnp.ones(2))
        assert "e+02" in made.lower(lowering_platforms=("tpu",)).as_text()  # marked
        assert "e+02" not in made.lower(lowering_platforms=("cpu",)).as_text()  # the reference, on the host
    assert "platform_index" not in str(jax.make_jaxpr(lambda x: scaled(x, factor=3))(jnp.ones((1, 2))))


def test_forced_by_name():
    assert scaled.names == ("reference", "marked", "other") and scaled.__doc__ == "The reference."
    np.testing.assert_array_equal(scaled.force("reference")(jnp.ones(2), factor=3), [3, 3])
    np.testing.assert_array_equal(scaled.force("marked")(jnp.ones(2), factor=3), [103, 103])
    np.testing.assert_array_equal(scaled.force("other")(jnp.ones(2), factor=3, interpret=True), [203, 203])
    with pytest.raises(ValueError, match=r"it is for 'tpu', and programs are made for 'cpu'; take 'reference' or 'mar"):
        scaled.force("other")(jnp.ones(2), factor=3)
    with pytest.raises(
        ValueError, match=r"implementation='splash' of _scaled is unknown; choose from 'reference', 'mar"
    ):
        scaled.force("splash")
    with pytest.raises(ValueError, match=r"cannot be used: x has 2 axes, and the kernel knows one; take 'reference'"):
        scaled.force("marked")(jnp.ones((1, 2)), factor=3)


@pytest.mark.parametrize("name", [name for name in kernels.__all__ if isinstance(getattr(kernels, name), Dispatched)])
def test_every_kernel_can_be_forced(name):
    kernel = getattr(kernels, name)
    assert kernel.names[0] == "reference" and kernel.force("reference") is kernel.reference
    with pytest.raises(ValueError, match=f"of _{name} is unknown"):
        kernel.force("cuda")
