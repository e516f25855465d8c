"""Quantised weights in safetensors, dequantised a few rows at a time when they are read.

Three layouts: values of 8 bits with scales, as fp8 checkpoints and compressed-tensors' have them; compressed-tensors'
integers packed into words of 32 bits; MLX's. In all of them `weight = (values - zero points) · scales`.
"""

import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from restkv_jax.models.stored import StoredTensor

FLOAT8 = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),  # of scales
}
KEYS = ("quantization_config", "quantization")
"""Where `config.json` says how weights are quantised; MLX takes the latter, or both."""

METHODS = ("compressed-tensors", "fp8", "fbgemm_fp8")
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")
"""Formats of compressed-tensors."""

BITS = (2, 4, 8)
SCALES = ("weight_scale", "weight_scale_inv")
OF_WEIGHTS = {*SCALES, "weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx", "scales", "biases"}
OF_ACTIVATIONS = {"input_scale", "activation_scale", "output_scale", "q_scale", "k_scale", "v_scale"}
"""Scales with which other software rounds activations or the cache; here these keep their precision."""

Tensors = Mapping[str, StoredTensor]


def dequantised(fields: dict[str, Any], tensors: Tensors, source: Any) -> tuple[dict[str, Any], Tensors]:
    """The configuration and the tensors of the model that was quantised; both as they are if it was not, or otherwise.

    Args:
      fields: of `config.json`.
      tensors: of the files, by name.
      source: the directory, for the messages.

    Raises:
      ValueError: a variant of these layouts that is not supported, shapes that do not belong together.
    """
    settings = next((fields[key] for key in KEYS if fields.get(key)), {})
    if not isinstance(settings, Mapping) or not _is_known(settings, tensors):
        return fields, tensors
    try:
        _check_settings(settings)
        return {key: fields[key] for key in fields if key not in KEYS}, dict(_dequantised(settings, tensors))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    except (TypeError, AttributeError, KeyError, IndexError, ArithmeticError) as error:
        raise ValueError(
            f"{source}: how its weights are quantised cannot be read from config.json: {error!r}"
        ) from error


def read_float8(path: pathlib.Path, name: str, rows: slice) -> np.ndarray:
    """Rows of a tensor of floats of 8 bits, which the package `safetensors` does not give to NumPy."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size))[name]
    start = 8 + size + entry["data_offsets"][0]
    return np.memmap(path, FLOAT8[entry["dtype"]], "r", start, tuple(entry["shape"]))[rows]


def _is_known(settings: Mapping[str, Any], tensors: Tensors) -> bool:
    if "quant_method" in settings:
        return settings["quant_method"] in METHODS
    is_float8 = any(tensor.dtype in FLOAT8 for tensor in tensors.values())
    return is_float8 or any(name.endswith(".scales") and _is_mlx(_module(name), tensors) for name in tensors)


def _check_settings(settings: Mapping[str, Any]) -> None:
    format = settings.get("format", "dense")
    if settings.get("quant_method") == "compressed-tensors" and format not in FORMATS:
        raise ValueError(f"weights in the format {format!r} are not supported; supported: {', '.join(FORMATS)}")
    if settings.get("mode", "affine") != "affine":
        raise ValueError(f"MLX weights of mode={settings['mode']!r} are not supported; supported: affine")
    if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise ValueError("sparse weights (sparsity_config) are not supported; use the checkpoint that is dense")
    if (settings.get("transform_config") or {}).get("config_groups"):
        raise ValueError("transforms of activations (transform_config) are not supported")


def _dequantised(settings: Mapping[str, Any], tensors: Tensors) -> Iterator[tuple[str, StoredTensor]]:
    for name, tensor in tensors.items():
        module, part = _module(name), name.rpartition(".")[2]
        near = {suffix: tensors[f"{module}.{suffix}"] for suffix in OF_WEIGHTS if f"{module}.{suffix}" in tensors}
        if part == "weight_packed":
            yield f"{module}.weight", _unpacked(name, tensor, near)
        elif part == "weight" and _is_mlx(module, tensors):
            yield name, _from_mlx(name, tensor, near, settings)
        elif part == "weight" and (tensor.dtype in FLOAT8 or tensor.dtype == "I8"):
            yield name, _scaled(name, tensor, near, _block_shape(settings))
        elif part not in OF_WEIGHTS | OF_ACTIVATIONS:
            yield name, tensor


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _is_mlx(module: str, tensors: Tensors) -> bool:
    weight = tensors.get(f"{module}.weight")
    return weight is not None and weight.dtype == "U32" and f"{module}.scales" in tensors


def _block_shape(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale where scales have two axes."""
    groups = (settings.get("config_groups") or {}).values()
    weights = [group.get("weights") or {} for group in groups]
    blocks = [settings.get("weight_block_size"), *(each.get("block_structure") for each in weights)]
    rows, columns = next((block for block in blocks if block), (128, 128))
    if not (isinstance(rows, int) and isinstance(columns, int) and rows > 0 and columns > 0):
        raise ValueError(f"blocks of {rows!r} x {columns!r} weights with one scale are not possible")
    return rows, columns


def _scaled(name: str, weight: StoredTensor, near: Tensors, block: tuple[int, int]) -> StoredTensor:
    """Values of 8 bits with one scale each tensor, row, group of a row, or block of rows and columns."""
    stored = next((near[suffix] for suffix in SCALES if suffix in near), None)
    if stored is None:
        raise ValueError(f"tensor {name!r} is stored as {weight.dtype} without a weight_scale, so it cannot be read")
    rows, columns = weight.shape
    grid = stored.shape if len(stored.shape) == 2 else (math.prod(stored.shape), 1)
    blocks = (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    if grid != blocks and (grid[0] not in (1, rows) or grid[1] < 1 or columns % grid[1]):
        raise ValueError(f"tensor {name!r} of shape {weight.shape} has scales of shape {stored.shape}, not {blocks}")
    tall, wide = block if grid == blocks else (rows // grid[0], columns // grid[1])
    zeros = near.get("weight_zero_point")

    def read(part: slice) -> np.ndarray:
        place = np.ix_(_indices(part, rows) // tall, _groups_of_columns(name, near, columns, grid[1], wide))
        values = weight.read(part).astype(np.float32)
        if zeros is not None:
            values -= _whole(zeros).reshape(grid)[place]
        return values * _whole(stored).reshape(grid)[place]

    return StoredTensor(weight.shape, "F32", read)


def _groups_of_columns(name: str, near: Tensors, columns: int, groups: int, wide: int) -> np.ndarray:
    """Which scale of a row each column has: neighbours share one, unless an order is stored (-1 where it never was)."""
    if "weight_g_idx" not in near or (order := _whole(near["weight_g_idx"]).astype(int)).min(initial=0) < 0:
        return np.arange(columns) // wide
    if order.shape != (columns,) or order.max(initial=0) >= groups:
        raise ValueError(f"tensor {name!r} has a weight_g_idx of shape {order.shape} that does not fit {groups} groups")
    return order


def _unpacked(name: str, packed: StoredTensor, near: Tensors) -> StoredTensor:
    """Integers from -2^(bits-1), packed along rows, with one scale each row or group of columns."""
    missing = [part for part in ("weight_scale", "weight_shape") if part not in near]
    if packed.dtype != "I32" or missing:
        raise ValueError(f"tensor {name!r} is packed as {packed.dtype}, {missing or 'which'} is not supported")
    rows, columns = (int(size) for size in _whole(near["weight_shape"]))
    groups, zeros = near["weight_scale"].shape[-1], near.get("weight_zero_point")
    bits = _bits(name, packed.shape[-1], columns)
    _check_shapes(name, (rows, groups), scales=near["weight_scale"].shape)
    _check_shapes(name, (rows, math.ceil(columns * bits / 32)), values=packed.shape)
    if zeros is not None:
        _check_shapes(name, (math.ceil(rows * bits / 32), groups), zeros=zeros.shape)

    def read(part: slice) -> np.ndarray:
        group = _groups_of_columns(name, near, columns, groups, columns // groups)
        values = _unpack(packed.read(part), bits)[:, :columns].astype(np.float32)
        if zeros is None:
            values -= 2 ** (bits - 1)
        else:
            values -= _unpack(_raw(zeros).T, bits).T[:rows][part][:, group]
        return values * near["weight_scale"].read(part).astype(np.float32)[:, group]

    return StoredTensor((rows, columns), "F32", read)


def _from_mlx(name: str, packed: StoredTensor, near: Tensors, settings: Mapping[str, Any]) -> StoredTensor:
    """Natural numbers packed along rows: `weight = values · scale + bias`, with both for each group of columns."""
    own = settings.get(_module(name))
    size = int((own if isinstance(own, Mapping) else settings).get("group_size", 64))
    if "biases" not in near:
        raise ValueError(f"tensor {name!r} has scales without biases, which is not supported")
    scales, biases = near["scales"], near["biases"]
    rows, columns = packed.shape[0], scales.shape[-1] * size
    bits = _bits(name, packed.shape[-1], columns)
    _check_shapes(name, (rows, columns // size), scales=scales.shape, biases=biases.shape)
    _check_shapes(name, (rows, columns * bits // 32), values=packed.shape)

    def read(part: slice) -> np.ndarray:
        values = _unpack(packed.read(part), bits).astype(np.float32)
        group = np.arange(columns) // size
        return values * scales.read(part).astype(np.float32)[:, group] + biases.read(part).astype(np.float32)[:, group]

    return StoredTensor((rows, columns), "F32", read)


def _unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Words of 32 bits [rows, n] to natural numbers uint8 [rows, n · 32 / bits], the lowest bits first."""
    octets = np.ascontiguousarray(words).astype("<i4" if words.dtype.kind == "i" else "<u4").view(np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((octets[..., None] >> shifts) & (2**bits - 1)).reshape(len(words), -1)


def _bits(name: str, words: int, columns: int) -> int:
    bits = 32 * words // max(1, columns)
    if bits not in BITS:
        raise ValueError(
            f"tensor {name!r} packs {columns} columns into {words} words, {bits} bits each; supported are {BITS}"
        )
    return bits


def _check_shapes(name: str, expected: tuple[int, int], **found: tuple[int, ...]) -> None:
    for part, shape in found.items():
        if tuple(shape) != expected:
            raise ValueError(f"tensor {name!r} has {part} of shape {tuple(shape)}, expected {expected}")


def _indices(part: slice, size: int) -> np.ndarray:
    return np.arange(size)[part]


def _raw(tensor: StoredTensor) -> np.ndarray:
    return tensor.read(slice(None))


def _whole(tensor: StoredTensor) -> np.ndarray:
    return _raw(tensor).astype(np.float32)
