"""Settings for all tests."""

import os

import pytest
from emulated import FLAGS

if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
    os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *FLAGS))
os.environ.setdefault("MPLBACKEND", "agg")
# Commands keep compiled programs where the user has them; tests neither read nor write there.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

LONGEST = ("test_mesh.py", "test_readme.py", "test_families.py", "test_extend.py", "test_harness.py", "test_sweep.py")
"""Files that take minutes, which begin first: one that began last would run alone."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Frees the programs of a file's tests: each takes memory maps, of which a process may have some 65,000."""
    yield
    import jax

    jax.clear_caches()
