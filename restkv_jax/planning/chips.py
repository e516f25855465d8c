"""Slices of TPU chips by name, and what their makers say of a chip.

Peaks are those of Google's pages on TPU v4, v5e, v5p and v6e (cloud.google.com/tpu/docs); the memory is what XLA leaves
to programs, as libtpu 0.0.52 says it.
"""

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

GIB = 2**30


class Chip(NamedTuple):
    """One chip, which is one device.

    Attributes:
      memory: bytes of HBM that programs may use; None where nothing is known.
      bandwidth: bytes per second between HBM and the chip.
      operations: bfloat16 multiplications and additions per second.
      network: bytes per second that it sends to its neighbours, over all links together.
    """

    memory: float | None = None
    bandwidth: float | None = None
    operations: float | None = None
    network: float | None = None


CHIPS = {
    "v4": Chip(30.75 * GIB, 1228e9, 275e12, 300e9),
    "v5e": Chip(15.75 * GIB, 819e9, 197e12, 200e9),
    "v5p": Chip(95.73 * GIB, 2765e9, 459e12, 600e9),
    "v6e": Chip(31.24 * GIB, 1640e9, 918e12, 448e9),
    "cpu": Chip(),
}
"""By the name that a topology begins with; `cpu` are devices that JAX emulates."""

KINDS = {
    "TPU v4": CHIPS["v4"],
    "TPU v5 lite": CHIPS["v5e"],
    "TPU v5": CHIPS["v5p"],
    "TPU v6 lite": CHIPS["v6e"],
    "NVIDIA A100": Chip(bandwidth=2039e9, operations=312e12),
    "NVIDIA H100": Chip(bandwidth=3350e9, operations=989e12),
    "NVIDIA H200": Chip(bandwidth=4800e9, operations=989e12),
}
"""By what the kind of a device begins with; of GPUs without sparsity, as NVIDIA's data sheets say."""

SHAPES = {
    **dict.fromkeys(("v5e", "v6e"), ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
    **dict.fromkeys(("v4", "v5p"), ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")),
}
"""Slices that are rented; the compiler knows more."""


WITHOUT_HARDWARE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Lets libtpu compile where there is no TPU, whatever the topology; it would look for this machine's."""


class Topology(NamedTuple):
    """A slice: its name, its chip and its devices, which need not be there."""

    name: str
    chip: Chip
    devices: Sequence[Any]


def chip_of(kind: str) -> Chip:
    """What a device of some kind (`jax.Device.device_kind`) can do; nothing is known of others than `KINDS`."""
    return next((chip for name, chip in KINDS.items() if kind.startswith(name)), Chip())


def known_topologies() -> str:
    """What `find_topology` takes, for help and messages."""
    return "; ".join(f"{chip}:{', '.join(shapes)}" for chip, shapes in SHAPES.items()) + "; cpu:N"


def find_topology(name: str) -> Topology:
    """The slice of a name such as `v5e:2x4` or, by its number of devices, `cpu:8`.

    Raises:
      ValueError: an unknown name.
      ModuleNotFoundError: a TPU's where libtpu, its compiler, is not installed.
    """
    chip, _, shape = name.partition(":")
    if chip not in CHIPS or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise ValueError(f"topology={name!r} is not known; known: {known_topologies()}")
    if chip == "cpu":
        return Topology(name, CHIPS[chip], _emulated(name, math.prod(map(int, shape.split("x")))))
    return Topology(name, CHIPS[chip], _described(name, chip))


def _emulated(name: str, count: int) -> Sequence[Any]:
    with contextlib.suppress(RuntimeError):  # JAX has its devices already
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if count > len(devices):
        raise ValueError(
            f"topology={name!r} asks for {count} devices, but JAX emulates {len(devices)}; set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return devices[:count]


def _described(name: str, chip: str) -> Sequence[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            "libtpu, which compiles for TPUs, is not installed; `pip install --no-deps libtpu` (no TPU is needed), or "
            "plan for emulated devices with the topology cpu:8",
            name="libtpu",
        )
    for variable, value in WITHOUT_HARDWARE.items():
        os.environ.setdefault(variable, value)
    options = {"chip_config_name": "megacore"} if chip == "v4" else {}  # the two cores of a chip as one device
    try:
        return topologies.get_topology_desc(topology_name=name, platform="tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition(": ")[2] or str(error)
        raise ValueError(f"topology={name!r} is not one that can be ({reason}); known: {known_topologies()}") from error
