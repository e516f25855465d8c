"""Checks of arguments that all parts share."""

import math
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer


def check_integer(name: str, value: Any, least: int, reason: str, most: int = 2**31 - 1) -> None:
    """Refuses a value that is not an integer or out of range.

    Raises:
      TypeError: not an integer.
      ValueError: less than `least`, or more than `most`.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}={value!r} must be an integer")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}: {reason}")
    if value > most:
        raise ValueError(f"{name}={value} must be at most {most}: {reason}")


def check_number(name: str, value: Any, reason: str) -> None:
    """Refuses a value that is not a finite number.

    Raises:
      TypeError: not a number.
      ValueError: NaN or infinite.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r} must be a number: {reason}")
    if not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be finite: {reason}")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Refuses a value that is not among the choices.

    Raises:
      ValueError: with the choices.
    """
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in choices):
        raise ValueError(f"{name}={value!r} is unknown; choose from {', '.join(map(repr, choices))}")


def as_array(name: str, value: Any) -> Any:
    """A JAX array as it is, all else as a numpy array.

    Raises:
      TypeError: texts, or what a tokenizer returns.
      ValueError: rows of different lengths.
    """
    if isinstance(value, jax.Array):
        return value
    if isinstance(value, Mapping) or hasattr(value, "input_ids"):
        raise TypeError(
            f"{name} is what a tokenizer returns; pass its arrays, tokens=batch['input_ids'] and "
            "mask=batch['attention_mask'], of tokenizer(..., return_tensors='np')"
        )
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} is not an array: do its rows differ in length? Pad them on the left") from error
    if array.dtype.kind in "USO":
        raise TypeError(
            f"{name}={value!r:.60} must be numbers; a text becomes tokens by "
            "tokenizer([text], return_tensors='np')['input_ids']"
        )
    return array


def is_known(array: Any) -> bool:
    """Whether values can be looked at: not under a transform."""
    return not isinstance(array, Tracer)


def check_mask(mask: Any, shape: tuple[int, ...]) -> None:
    """Checks the mask of prompts that are padded on the left, bool [B, T]; its values where they are known.

    Raises:
      ValueError: another shape, values that are neither 0 nor 1, a row that is all padding, padding after real tokens.
    """
    if mask.shape != shape:
        raise ValueError(f"mask has shape {mask.shape}, but the prompts have shape {shape}")
    if not is_known(mask):
        return
    mask = np.asarray(mask)
    is_odd = (mask != 0) & (mask != 1)
    if is_odd.any():
        raise ValueError(f"mask holds {mask[is_odd][0]}; it must be False or 0 on padding, True or 1 on tokens")
    mask = mask.astype(bool)
    if not mask.any(axis=1).all():
        raise ValueError(f"mask has no True in row {np.argmin(mask.any(axis=1))}: the row is all padding")
    ends_early = mask[:, :-1] & ~mask[:, 1:]
    if ends_early.any():
        row = np.argmax(ends_early.any(axis=1))
        raise ValueError(
            f"mask has padding after real tokens in row {row}; pad on the left (tokenizer.padding_side = 'left')"
        )
