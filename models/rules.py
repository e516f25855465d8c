"""JAX's settings that the caller may have changed and that programs of this package do not follow."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


@contextlib.contextmanager
def usual_promotion() -> Iterator[None]:
    """Dtypes and ranks promote as they do by default, whatever `jax_numpy_{dtype,rank}_promotion` say."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def with_usual_promotion(function: Callable[P, R]) -> Callable[P, R]:
    """The function, run under `usual_promotion`."""

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        with usual_promotion():
            return function(*args, **options)

    return call
