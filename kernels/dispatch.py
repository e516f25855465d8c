"""Picks an implementation by the platform a program is lowered for, or by its name."""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")

REFERENCE = "reference"
"""The name of the implementation that defines the result; it runs everywhere."""


class Implementation(NamedTuple):
    """A faster `function` for programs of one `platform`, as `jax.lax.platform_dependent` names it; None by name alone.

    `refusal(*arrays, **options)` says why it cannot take these arguments, None where it can; shapes count, not values.
    """

    function: Callable
    platform: str | None
    refusal: Callable[..., str | None]


class Dispatched(Generic[P, R]):
    """A kernel: a reference in plain JAX, which defines the result, and implementations that must agree with it.

    Called, it lowers to the implementation of the platform that takes the arguments, else to the reference.
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

        choices = {
            i.platform: bound(i.function)
            for i in self.implementations.values()
            if i.platform is not None and i.refusal(*arrays, **options) is None
        }
        if not choices:
            return self.reference(*arrays, **options)
        return jax.lax.platform_dependent(*arrays, default=bound(self.reference), **choices)

    def force(self, name: str) -> Callable[P, R]:
        """One implementation, whatever the platform: for tests and benchmarks.

        Raises:
          ValueError: an unknown name; when it is called, arguments that the implementation does not take.
        """
        if name == REFERENCE:
            return self.reference
        if name not in self.implementations:
            raise ValueError(
                f"implementation={name!r} of {self.__name__} is unknown; choose from {', '.join(map(repr, self.names))}"
            )

        def forced(*arrays: Any, **options: Any) -> Any:
            chosen = self.implementations[name]
            reason = chosen.refusal(*arrays, **options)
            if reason is not None:
                raise ValueError(
                    f"implementation={name!r} of {self.__name__} cannot be used: {reason}; take 'reference'"
                )
            return chosen.function(*arrays, **options)

        return forced


def never(*arrays: Any, **options: Any) -> None:
    """The refusal of an implementation that takes everything."""
