"""Picks an implementation by the platform a program is lowered for."""

import functools
from collections.abc import Callable

import jax


def by_platform(reference: Callable, **fast: Callable) -> Callable:
    """Returns `reference` with faster implementations behind it on some platforms.

    Args:
      reference: a function of arrays (positional) and static options (by keyword); it defines the result.
      **fast: implementations of the same signature by platform: `cpu`, `cuda`, `rocm` or `tpu`.

    Returns:
      a function that lowers to the platform's implementation, or to the reference where there is none.
    """

    @functools.wraps(reference)
    def call(*arrays, **options):
        if not fast:
            return reference(*arrays, **options)
        choices = {platform: functools.partial(f, **options) for platform, f in fast.items()}
        return jax.lax.platform_dependent(*arrays, default=functools.partial(reference, **options), **choices)

    return call
