"""How tests compile: on CPUs, which may emulate several devices and other platforms, and with little effort."""

import contextlib
import os
from collections.abc import Iterator

# Tests compile many small programs once each: the compiler's optimisations would cost more than they save, and its
# newer emitters of loops take three quarters of the time that a program takes to compile.
FLAGS = (
    "--xla_backend_optimization_level=0",
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters,xla_cpu_disable_tiled_emitter",
)


def is_interpreted(platform: str) -> bool:
    """Whether kernels for a platform have to be interpreted here; `make test-gpu` runs those for GPUs."""
    from restkv_jax.kernels.dispatch import target_platform

    return platform != target_platform()


@contextlib.contextmanager
def made_for_gpu() -> Iterator[None]:
    """Programs that are traced and lowered meanwhile are made for a GPU that need not be there."""
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    device = AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    with use_abstract_mesh(AbstractMesh((1, 1), ("data", "model"), abstract_device=device)):
        yield


def environment(devices: int, **further: str) -> dict[str, str]:
    """The environment of a process that has so many devices."""
    flags = (f"--xla_force_host_platform_device_count={devices}", *FLAGS)
    return os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"} | further
