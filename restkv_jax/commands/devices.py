"""`restkv devices`: what is here to compute on, and which implementation of every kernel programs take on it."""

import collections
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from restkv_jax.commands.options import UsageError, as_usage_error, parse
from restkv_jax.commands.plan import EMBEDDED
from restkv_jax.generation.reading import CHUNK_SIZE, bucket_length
from restkv_jax.kernels.attention import part_gradients, read_parts
from restkv_jax.kernels.dispatch import Dispatched, target_platform
from restkv_jax.kernels.paged import Pages, attend_pages
from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.models.build import build_model
from restkv_jax.models.config import ModelConfig

PAGE_SIZE, PAGES = 16, 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class DevicesOptions:
    """Lists the devices, and which implementation of every kernel a model's programs take on them.

    Args:
      model: a `config.json`, or a directory that has one; the model that comes with the package if left out.
      length: tokens of a prompt.
      dtype: of weights and cache.
      platform: that programs are made for; that of the devices if left out.
    """

    model: pathlib.Path = EMBEDDED
    length: int = 8192
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    platform: Literal["cpu", "cuda", "tpu"] | None = None


class Use(NamedTuple):
    """What a kernel is for, and the shapes that it is called with."""

    purpose: str
    kernel: Dispatched
    arrays: tuple[Any, ...]
    options: dict[str, Any]


def run(args: Sequence[str]) -> None:
    """Prints both tables."""
    options = parse(DevicesOptions, args, "restkv devices")
    if options.length < 1:
        raise UsageError(f"--length {options.length} must be at least 1")
    with as_usage_error():
        config = build_model(options.model).config
    console = Console(highlight=False)
    console.print(_devices())
    platform = options.platform or target_platform()
    console.print(_kernels(platform, uses(config, bucket_length(options.length), jnp.dtype(options.dtype))))


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
        reasons = use.kernel.reasons(platform, *use.arrays, **use.options)
        able = [name for name, reason in reasons.items() if reason is None]
        refused = [f"{name}: {reason}" for name, reason in reasons.items() if reason is not None]
        table.add_row(use.purpose, able[-1], "\n".join(refused))
    return table


def uses(config: ModelConfig, length: int, dtype: Any) -> Iterator[Use]:
    """The kernels with the shapes of a model, for one prompt.

    Args:
      config: the model's.
      length: tokens of the prompt.
      dtype: of keys and values.
    """
    heads, dim = config.num_key_value_heads, config.head_dim
    group = config.num_attention_heads // heads

    def array(*shape: int, dtype: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def queries(count: int) -> Queries:
        places: Any = array(1, count, dtype=jnp.int32), array(dtype=jnp.int32)
        vectors: Any = array(1, heads, group, count, dim)
        return Queries(vectors, *places, soft_cap=config.attn_logit_softcapping, widest_window=config.widest_window)

    keys, of_keys = array(1, heads, length, dim), array(1, 1, length, dtype=jnp.int32)
    arrays: Any = keys, keys, of_keys
    pairs = Pairs(*arrays)
    chunk = queries(min(CHUNK_SIZE, length))
    yield Use("attention of a prompt", read_parts, (chunk, (pairs,)), dict(spans=(None,)))
    yield Use("its gradient", part_gradients, (queries(length), (pairs,)), dict(spans=(None,)))
    page: Any = array(1, 1, PAGES, PAGE_SIZE, dim)
    pool: Any = page, page, array(1, 1, PAGES, PAGE_SIZE, dtype=jnp.int32)
    in_use: Any = array(1, heads, PAGES // heads or 1, dtype=jnp.int32), array(1, heads, dtype=jnp.int32)
    pages = Pages(*pool, *in_use)
    is_windowed = config.widest_window > 0
    yield Use("attention over pages", attend_pages, (queries(1), pages), dict(is_windowed=is_windowed))
