"""`restkv devices`: what is here to compute on, and which implementation of every kernel programs take on it."""

import collections
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from restkv_jax.commands.options import UsageError, as_usage_error, parse
from restkv_jax.generation.reading import bucket_length
from restkv_jax.kernels.dispatch import target_platform
from restkv_jax.loading import load_config
from restkv_jax.models.checkpoint import EMBEDDED
from restkv_jax.planning.uses import Use, kernel_uses


@dataclasses.dataclass(frozen=True, kw_only=True)
class DevicesOptions:
    """Lists the devices, and which implementation of every kernel a model's programs take on them.

    Args:
      model: a `config.json`, a directory that has one, or a GGUF file; the model that comes with the package if left
        out.
      length: tokens of a prompt.
      dtype: of weights and cache.
      platform: that programs are made for; that of the devices if left out.
    """

    model: pathlib.Path = EMBEDDED
    length: int = 8192
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    platform: Literal["cpu", "cuda", "tpu"] | None = None


def run(args: Sequence[str]) -> None:
    """Prints both tables."""
    options = parse(DevicesOptions, args, "restkv devices")
    if options.length < 1:
        raise UsageError(f"--length {options.length} must be at least 1")
    with as_usage_error():
        config = load_config(options.model)
    console = Console(highlight=False)
    console.print(_devices())
    platform = options.platform or target_platform()
    console.print(_kernels(platform, kernel_uses(config, bucket_length(options.length), jnp.dtype(options.dtype))))


def _devices() -> Table:
    table = Table("devices", "kind", "memory of each")
    kinds = collections.Counter((device.device_kind, _memory(device)) for device in jax.devices())
    for (kind, memory), count in kinds.items():
        table.add_row(str(count), kind, memory)
    return table


def _memory(device: Any) -> str:
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return "that of the host" if limit is None else f"{limit / 2**30:.1f} GiB"


def _kernels(platform: str, all_uses: Iterator[Use]) -> Table:
    table = Table("what", "is computed by", "and not by")
    for use in all_uses:
        reasons = use.kernel.reasons(platform, *use.shapes(), **use.options)
        able = [name for name, reason in reasons.items() if reason is None]
        refused = [f"{name}: {reason}" for name, reason in reasons.items() if reason is not None]
        table.add_row(use.purpose, able[-1], "\n".join(refused))
    return table
