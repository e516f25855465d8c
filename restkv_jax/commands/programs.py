"""Compiled programs, which JAX keeps on disk so that the next command need not compile them."""

import os
import warnings

import jax

from restkv_jax.fetching import cache_directory


def keep_programs() -> None:
    """Lets JAX keep compiled programs in `cache_directory`, unless it already keeps them elsewhere or cannot there."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        directory = cache_directory()
        existing = next(path for path in (directory, *directory.parents) if os.path.exists(path))
        if os.path.isdir(existing) and os.access(existing, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", str(directory))
        else:
            warnings.warn(
                f"compiled programs are not kept: {str(existing)!r} cannot be written to; set "
                "JAX_COMPILATION_CACHE_DIR to a directory that can",
                stacklevel=2,
            )
