"""Policies as plain data, for files: nothing but this package's own classes is ever made of it."""

import dataclasses
from typing import Any

import numpy as np

from restkv_jax.eviction.allocation import ALLOCATIONS
from restkv_jax.eviction.future import FutureQueries
from restkv_jax.eviction.methods.restkv import Reconstruction
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.eviction.pooling import (
    AdaptivePooling,
    AnswerPooling,
    AveragePooling,
    MaxPooling,
    NoPooling,
    SuccessorPooling,
)
from restkv_jax.eviction.refit import LeastSquares

KNOWN = (
    EvictionPolicy,
    Reconstruction,
    NoPooling,
    SuccessorPooling,
    AnswerPooling,
    AveragePooling,
    MaxPooling,
    AdaptivePooling,
    LeastSquares,
    FutureQueries,
    *ALLOCATIONS.values(),
)
"""What a policy that evicts while generating is made of."""

BY_NAME = {kind.__name__: kind for kind in KNOWN}


def describe(part: Any) -> Any:
    """A policy, or a part of one, as what JSON holds.

    Raises:
      ValueError: a part of a class that is not this package's, which could not be made again.
    """
    if not dataclasses.is_dataclass(part):
        return part.item() if isinstance(part, np.generic) else part
    name = type(part).__name__
    if BY_NAME.get(name) is not type(part):
        raise ValueError(f"{name} is not among the classes that a file can name: {', '.join(BY_NAME)}")
    fields = {field.name: describe(getattr(part, field.name)) for field in dataclasses.fields(part)}
    return {"class": name} | fields


def from_description(described: Any) -> Any:
    """The reverse of `describe`.

    Raises:
      ValueError, TypeError: anything that `describe` does not give.
    """
    if not isinstance(described, dict):
        return described
    fields = {name: from_description(value) for name, value in described.items() if name != "class"}
    name = described.get("class")
    if name not in BY_NAME:
        raise ValueError(f"the class {name!r} is unknown; known: {', '.join(BY_NAME)}")
    return BY_NAME[name](**fields)
