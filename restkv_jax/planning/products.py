"""Floating-point operations of matrix products, which a TPU writes as convolutions."""

import math
import re
from collections.abc import Iterator

import numpy as np

from restkv_jax.planning.hlo import Computation, Instruction, Module


def operations(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Multiplications and additions of the matrix products in an instruction, those of what it calls included."""
    if instruction.opcode == "dot":
        return _dot(computation, instruction)
    if instruction.opcode == "convolution":
        return _convolution(computation, instruction)
    if instruction.opcode == "custom-call":
        return float(instruction.search(r'"cost_estimate":\{[^}]*"flops":"(\d+)"') or 0)
    called = instruction.called("calls") if instruction.opcode in ("fusion", "async-start") else None
    inner = module.computations.get(called or "")
    return sum(operations(module, inner, i) for i in inner.instructions) if inner else 0.0


def _dot(computation: Computation, dot: Instruction) -> float:
    left = computation.by_name[dot.operands[0]].shapes[0]
    contracted = math.prod(left.dims[i] for i in dot.integers("lhs_contracting_dims"))
    return 2.0 * dot.shapes[0].size * contracted


def _convolution(computation: Computation, convolution: Instruction) -> float:
    """Input features times the places of the window that lie on the input and not on padding, for every output.

    `dim_labels=bf0_io0->bf0` names the dimensions of input, kernel and output.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    if labels is None:
        return 0.0
    shapes = [computation.by_name[name].shapes[0] for name in convolution.operands[:2]] + [convolution.shapes[0]]
    named = [dict(zip(names, shape.dims, strict=True)) for names, shape in zip(labels.groups(), shapes, strict=True)]
    source, kernel, output = named
    total = 2.0 * convolution.shapes[0].size * kernel["i"]
    for name, window in zip("0123456789", _windows(convolution, len(output) - 2), strict=False):
        total *= _places(source[name], output[name], window) / output[name]
    return total


def _windows(convolution: Instruction, rank: int) -> Iterator[dict[str, int]]:
    """`window={size=4 stride=3 pad=3_3 lhs_dilate=4}` by spatial dimension."""
    found = re.search(r"window=\{([^}]*)\}", convolution.attributes)
    fields = dict(field.split("=") for field in found[1].split()) if found else {}
    for i in range(rank):
        values = {name: fields[name].split("x")[i] for name in fields}
        yield {
            "size": int(values.get("size", 1)),
            "stride": int(values.get("stride", 1)),
            "before": int(values.get("pad", "0_0").split("_")[0]),
            "apart": int(values.get("lhs_dilate", 1)),
            "spread": int(values.get("rhs_dilate", 1)),
        }


def _places(source: int, output: int, window: dict[str, int]) -> int:
    """Pairs of an output and a place of the window that meet an element of the input."""
    met = 0
    for first in range(0, output, 4096):
        starts = np.arange(first, min(first + 4096, output))[:, None] * window["stride"] - window["before"]
        at = starts + np.arange(window["size"]) * window["spread"]
        met += int(((at >= 0) & (at <= (source - 1) * window["apart"]) & (at % window["apart"] == 0)).sum())
    return met
