"""Compiled programs, which JAX keeps on disk so that the next command need not compile them."""

import os
import pathlib
import warnings

import jax


def cache_directory() -> pathlib.Path:
    """`~/.cache/restkv-jax`, or that place in `XDG_CACHE_HOME` where that is set."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "restkv-jax"


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
