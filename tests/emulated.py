"""How tests compile: on CPUs, which may emulate several devices, and with little effort."""

import os

# Tests compile many small programs once each: the compiler's optimisations would cost more than they save, and its
# newer emitters of loops take three quarters of the time that a program takes to compile.
FLAGS = (
    "--xla_backend_optimization_level=0",
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters,xla_cpu_disable_tiled_emitter",
)


def environment(devices: int, **further: str) -> dict[str, str]:
    """The environment of a process that has so many devices."""
    flags = (f"--xla_force_host_platform_device_count={devices}", *FLAGS)
    return os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"} | further
