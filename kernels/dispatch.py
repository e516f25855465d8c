"""Picks an implementation by the platform that a program is made for, or by its name."""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")

REFERENCE = "reference"
"""The name of the implementation that defines the result; it runs everywhere."""


class Implementation(NamedTuple):
    """A faster `function` for programs of one `platform`, as `jax.lax.platform_dependent` names it.

    `refusal(*arrays, **options)` says why it cannot take these arguments, None where it can; shapes count, not values.
    One that is not `trusted` is taken by name alone.
    """

    function: Callable
    platform: str
    refusal: Callable[..., str | None]
    trusted: bool = True


class Dispatched(Generic[P, R]):
    """A kernel: a reference in plain JAX, which defines the result, and implementations that must agree with it.

    Called, it lowers to the implementation of `target_platform` that takes the arguments, else to the reference.
    """

    def __init__(self, reference: Callable[P, R], **implementations: Implementation):
        self.reference = reference
        self.implementations = implementations
        self.__doc__, self.__name__ = reference.__doc__, reference.__name__

    @property
    def names(self) -> tuple[str, ...]:
        """What `force` takes."""
        return REFERENCE, *self.implementations

    def __call__(self, *arrays: P.args, **options: P.kwargs) -> R:
        def bound(function: Callable) -> Callable:
            return lambda *xs: function(*xs, **options)

        # Others are not even traced. On a host of this platform a program may still be lowered for its CPU.
        platform = target_platform()
        for one in self.implementations.values():
            if one.platform == platform and one.trusted and one.refusal(*arrays, **options) is None:
                choice = {platform: bound(one.function)}
                return jax.lax.platform_dependent(*arrays, default=bound(self.reference), **choice)
        return self.reference(*arrays, **options)

    def force(self, name: str) -> Callable[..., R]:
        """One implementation and no other: for tests and benchmarks.

        With `interpret=True` a kernel is interpreted, which every platform can.

        Raises:
          ValueError: an unknown name; when it is called, arguments that the implementation does not take, or another
            platform than its own.
        """
        if name == REFERENCE:
            return self.reference
        if name not in self.implementations:
            raise ValueError(
                f"implementation={name!r} of {self.__name__} is unknown; choose from {', '.join(map(repr, self.names))}"
            )

        def forced(*arrays: Any, interpret: bool = False, **options: Any) -> Any:
            reasons = self.reasons(target_platform(), *arrays, anywhere=interpret, by_name=True, **options)
            if (reason := reasons[name]) is not None:
                able = [repr(other) for other, why in reasons.items() if why is None]
                raise ValueError(
                    f"implementation={name!r} of {self.__name__} cannot be used: {reason}; take {' or '.join(able)}"
                )
            if interpret:
                options["interpret"] = True
            return self.implementations[name].function(*arrays, **options)

        return forced

    def reasons(
        self, platform: str, *arrays: Any, anywhere: bool = False, by_name: bool = False, **options: Any
    ) -> dict[str, str | None]:
        """Why each implementation is not taken for these arguments, None where it can be.

        Args:
          platform: that programs are made for.
          arrays: the kernel's, or their shapes.
          anywhere: whether the platform does not count.
          by_name: whether those count that are taken by name alone.
          options: the kernel's.
        """

        def reason(one: Implementation) -> str | None:
            refused = one.refusal(*arrays, **options)
            if refused is None and one.platform != platform and not anywhere:
                return f"it is for {one.platform!r}, and programs are made for {platform!r}"
            return "it is taken by name alone" if refused is None and not (one.trusted or by_name) else refused

        return {REFERENCE: None, **{name: reason(one) for name, one in self.implementations.items()}}


def target_platform() -> str:
    """The platform that programs are made for, as `jax.lax.platform_dependent` names it.

    That of the mesh of the context (`jax.set_mesh`), else the one that JAX computes on by default.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    backend = jax.default_backend() if device is None else device.platform
    return "cuda" if backend == "gpu" else backend


def never(*arrays: Any, **options: Any) -> None:
    """The refusal of an implementation that takes everything."""
