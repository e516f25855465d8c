"""Caches as files: what was read once is loaded again, by the model that read it."""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from restkv_jax.caches.axes import axes_of, named_arrays
from restkv_jax.caches.base import Cache
from restkv_jax.caches.dense import KVCache
from restkv_jax.caches.evicting import ByImportance, EvictingCache
from restkv_jax.caches.paged import InPages, PagedCache
from restkv_jax.caches.quantised import QuantisedCache
from restkv_jax.caches.quantised_evicting import QuantisedEvictingCache
from restkv_jax.caches.quantised_paged import QuantisedPagedCache
from restkv_jax.caches.quantised_shared import QuantisedSharedCache
from restkv_jax.caches.shared import SharedCache, Skips
from restkv_jax.eviction.described import describe, from_description
from restkv_jax.kernels.quantised import (
    Quantisation,
    QuantisedKeys,
    QuantisedPairs,
    QuantisedValues,
    empty_pairs,
)
from restkv_jax.models.config import ModelConfig
from restkv_jax.models.decoder import Decoder
from restkv_jax.models.digest import checksum
from restkv_jax.models.files import written_whole
from restkv_jax.models.key_groups import LayerGroups, Sharing
from restkv_jax.models.rope import depends_on_longest

FORMAT = "restkv-jax cache, version 1"

KINDS: dict[str, type[Cache]] = {
    kind.__name__: kind
    for kind in (
        KVCache, EvictingCache, PagedCache, SharedCache,
        QuantisedCache, QuantisedEvictingCache, QuantisedPagedCache, QuantisedSharedCache,
    )
}  # fmt: skip

IRRELEVANT = {"initializer_range", "bos_token_id", "eos_token_ids", "pad_token_id", "sampling"}
"""Fields of a model's configuration that say nothing about its keys and values."""

FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)

C = TypeVar("C", bound=Cache)


class Header(NamedTuple):
    """What a file says besides its arrays.

    `kind` of the cache; `static`, its fields that are not arrays; `config` of the model, as plain data; `weights`, the
    checksum of its parameters, or None; `note`, plain data of the caller's.
    """

    kind: str
    static: dict[str, Any]
    config: dict[str, Any]
    weights: str | None
    note: Any


def save_cache(path: str | os.PathLike, cache: Cache, model: Decoder, params: Any = None, note: Any = None) -> int:
    """Writes a cache to a file of safetensors, without the empty slots that a dense cache has behind the others.

    Args:
      path: of the file; it takes the place of another whole.
      cache: as `prefill`, `extend` or `generate` return it.
      model: whose cache it is; `load_cache` refuses others.
      params: its parameters, whose checksum is stored, so that other weights of the same shape are refused too.
      note: plain data that comes back with `read_header`, such as where the model is.

    Returns:
      the size of the file in bytes.

    Raises:
      ValueError: a cache of another model, or of a kind or policy that a file cannot hold.
      OSError: a place that cannot be written.
    """
    cache.check_model(model)
    kind = type(cache).__name__
    if KINDS.get(kind) is not type(cache):
        raise ValueError(f"a cache of type {kind} cannot be stored; those that can: {', '.join(KINDS)}")
    cache = _without_room(cache)
    weights = None if params is None else checksum(params)
    header = Header(kind, _static_fields(cache), _relevant(model.config), weights, note)
    arrays = {name: jnp.asarray(jax.device_get(x)) for name, x in named_arrays(cache).items()}
    path = pathlib.Path(path)
    try:
        with written_whole(path) as unfinished:
            save_file(arrays, unfinished, {"format": FORMAT, "header": json.dumps(header._asdict())})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    return path.stat().st_size


def load_cache(path: str | os.PathLike, model: Decoder, params: Any = None) -> Any:
    """Reads a cache that `save_cache` wrote.

    Args:
      path: of the file.
      model: the one that read what is in it.
      params: its parameters, whose dtype and checksum are compared with the file's; None does not compare.

    Returns:
      the cache, of the kind that was saved.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a damaged file, one that holds something else, or a cache of another model, sharing, dtype or weights.
    """
    header, arrays = _read(path)
    _check_config(path, header, model)
    try:
        cache = _assemble(header, arrays)
        cache.check_model(model)
        _check_contents(cache, model.config)
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"{path} does not hold a cache of this model: {error}") from error
    if params is not None:
        _check_weights(path, header, cache, params)
    return jax.tree.map(jnp.asarray, cache)


def read_header(path: str | os.PathLike) -> Header:
    """What a file of `save_cache` says besides its arrays.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a damaged file, or one that holds something else.
    """
    with _opened(path) as file:
        return _header(path, file.metadata())


def _without_room(cache: Any) -> Any:
    if type(cache) not in (KVCache, QuantisedCache):
        return cache
    used = max(int(cache.lengths.max()), 1)
    if type(cache) is QuantisedCache:
        return cache.resized(used)
    return jax.tree.map(lambda x: x[:, :, :, :used] if x.ndim > 3 else x, cache)


def _static_fields(cache: Cache) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if isinstance(cache, ByImportance):
        fields["policy"] = describe(cache.policy)
    if isinstance(cache, InPages):
        fields["is_windowed"] = cache.is_windowed
    if isinstance(cache, SharedCache):
        fields["sharing"] = dataclasses.asdict(cache.sharing)
    if cache.quantisation is not None:
        fields["quantisation"] = dataclasses.asdict(cache.quantisation)
    return fields


def _from_static(name: str, value: Any) -> Any:
    if name == "policy":
        return from_description(value)
    if name == "quantisation":
        return Quantisation(**value)
    if name == "sharing":
        return Sharing(**{**value, "groups": LayerGroups(value["groups"]["leader"])})
    return bool(value)


def _relevant(config: ModelConfig) -> dict[str, Any]:
    irrelevant = IRRELEVANT if depends_on_longest(config) else IRRELEVANT | {"max_position_embeddings"}
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in irrelevant}
    return json.loads(json.dumps(fields))  # tuples become lists, as they come back


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Any]:
    """A file of safetensors, open for reading; what is wrong with it is a `ValueError`."""
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(
            f"{path} is not a file; `save_cache`, `restkv read` and /save in `restkv chat` write one"
        )
    try:
        with safe_open(path, framework="flax") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged, or not a file of a cache: {error}") from error


def _header(path: str | os.PathLike, metadata: dict[str, str] | None) -> Header:
    if (metadata or {}).get("format") != FORMAT:
        raise ValueError(f"{path} is not a file of a cache, whose metadata would have format={FORMAT!r}")
    assert metadata is not None
    try:
        return Header(**json.loads(metadata["header"]))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} does not say what it holds: {error}") from error


def _read(path: str | os.PathLike) -> tuple[Header, dict[str, Any]]:
    with _opened(path) as file:
        header = _header(path, file.metadata())
        return header, {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118


def _check_config(path: str | os.PathLike, header: Header, model: Decoder) -> None:
    ours = _relevant(model.config)
    for name in ours:
        stored = header.config.get(name) if isinstance(header.config, dict) else None
        if stored != ours[name]:
            raise ValueError(f"{path} holds a cache of another model: its {name} is {stored}, the model's {ours[name]}")


def _assemble(header: Header, arrays: dict[str, Any]) -> Any:
    kind = KINDS[header.kind]
    static = {name: _from_static(name, value) for name, value in header.static.items()}
    if issubclass(kind, SharedCache):
        skips = {name: arrays.pop(f"skips.{name}", None) for name in ("gates", "skipped", "total")}
        static["skips"] = None if any(x is None for x in skips.values()) else Skips(**skips)
    q = static.pop("quantisation", None)

    def quantised(name: str, kind: Any) -> Any:
        return kind(arrays.pop(f"{name}.codes"), arrays.pop(f"{name}.scales"), q)

    if q is not None and issubclass(kind, SharedCache):
        static["distant_keys"] = quantised("distant_keys", QuantisedKeys)
        static["distant_values"] = quantised("distant_values", QuantisedValues)
    elif q is not None:
        pairs = quantised("stored.keys", QuantisedKeys), quantised("stored.values", QuantisedValues)
        static["stored"] = QuantisedPairs(*pairs)
    return kind(**static, **arrays)


def _check_contents(cache: Any, config: ModelConfig) -> None:
    """Refuses arrays of other shapes and dtypes than the cache's kind has, and numbers that point outside of it."""
    arrays, sizes = named_arrays(cache), {}
    expected = {"l": config.num_hidden_layers, "k": config.num_key_value_heads, "d": config.head_dim}
    if cache.dtype not in FLOATS:
        raise ValueError(f"keys and values have dtype {cache.dtype}")
    if cache.quantisation is not None:
        expected |= _quantised_sizes(cache, config.head_dim)
    for name, axes in (axes_of(type(cache)) or {}).items():
        array = arrays.pop(name, None)
        if array is None and name.startswith("skips."):
            continue
        if array is None or array.ndim != len(axes.split()) or array.dtype != _dtype_of(name, cache):
            raise ValueError(f"{name} is not an array of {_dtype_of(name, cache)} with the axes {axes}")
        for axis, size in zip(axes.split(), array.shape, strict=True):
            if sizes.setdefault(axis, expected.get(axis, size)) != size:
                raise ValueError(f"{name} has shape {array.shape}, but the axis {axis} has {sizes[axis]} elsewhere")
    if arrays:
        raise ValueError(f"{next(iter(arrays))} is not an array of a {type(cache).__name__}")
    if (
        sizes["b"] % sizes.get("A", 1)
        or sizes["k"] % sizes.get("M", 1)
        or 0 in (sizes["b"], sizes.get("A"), sizes.get("M"))
    ):
        raise ValueError(f"its parts make no sense: {sizes}")
    _check_ranges(cache, sizes)


def _check_ranges(cache: Any, sizes: dict[str, int]) -> None:
    ends = int(cache.next_positions.max())
    slots = sizes["j"] * sizes["s"] + sizes.get("w", 0) if "j" in sizes else sizes.get("n", 0)
    bounds = {
        "next_positions": (0, 2**30),
        "prompt_lengths": (0, ends),
        "positions": (-1, ends - 1),
        "recent_positions": (-1, ends - 1),
        "distant_positions": (-1, ends - 1),
        "lengths": (0, slots),
        "kept": (0, slots),
        "page_table": (0, sizes.get("p", 0)),
    }
    for name, (least, most) in bounds.items():
        array = getattr(cache, name, None)
        if array is not None and array.size and not least <= array.min() <= array.max() <= most:
            raise ValueError(f"{name} goes from {array.min()} to {array.max()}, out of [{least}, {most}]")
    if isinstance(cache, SharedCache):
        _, blocks = cache.sharing.groups.in_parts(sizes["M"])
        if (blocks, sizes["A"] * sizes["o"]) != (sizes["r"], sizes["b"]):
            raise ValueError(
                f"distant_keys has {sizes['r']} blocks of {sizes['A'] * sizes['o']} rows, unlike the sharing"
            )


def _quantised_sizes(cache: Any, dim: int) -> dict[str, int]:
    q = cache.quantisation
    q.check_dim(dim)
    group = jax.eval_shape(lambda: empty_pairs((q.group_size, dim), q))
    sizes = {"s": q.group_size, "e": q.group_size // q.in_word, "x": group.values.scales.shape[-1]}
    if isinstance(cache, QuantisedSharedCache):
        return sizes | {"n": cache.distant_keys.codes.shape[4] * q.group_size}
    if isinstance(cache, QuantisedPagedCache):
        return sizes | {"w": q.residual + q.group_size - 1}
    grouped, recent = cache.layout(q, cache.num_slots)
    return sizes | {"q": grouped // q.group_size, "w": recent}


def _dtype_of(name: str, cache: Any) -> Any:
    if name.endswith(".scales"):
        return jnp.dtype(jnp.bfloat16)
    if name.endswith(".codes"):
        return jnp.dtype(jnp.uint32)
    if name.split("_")[-1] in ("keys", "values"):
        return cache.dtype
    return np.dtype(np.float32 if name in ("importance", "gram", "skips.gates") else np.int32)


def _check_weights(path: str | os.PathLike, header: Header, cache: Cache, params: Any) -> None:
    dtype = params["embedding"].dtype
    if cache.dtype != dtype:
        raise ValueError(
            f"{path} holds {cache.dtype}, but the model's parameters are {dtype}; load the model with that dtype"
        )
    if header.weights is not None and header.weights != checksum(params):
        raise ValueError(f"{path} holds a cache of another model: the weights' checksum is not {header.weights}")
