"""What the tests of this folder read instead of the essays that pip would download."""

import pytest

from restkv_jax import fetching
from restkv_jax.evaluate.tasks import essays

SENTENCES = [f"Essay {i} says in so many words that nothing is written." for i in range(400)]


@pytest.fixture(autouse=True, scope="module")
def essay_file(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cache")
    (directory / essays.FILE).write_text("\n".join(SENTENCES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetching, "cache_directory", lambda: directory)
        yield directory / essays.FILE
