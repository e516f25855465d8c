"""What `--model_args` of lm-evaluation-harness say: the model, the method and the method's options."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import tyro

from restkv_jax.commands.options import Budget, DType, UsageError, make_policy, options_of_method, parse
from restkv_jax.eviction.policy import EvictionPolicy

FINENESS = 3
"""Bits of a percentage budget that count after the first: slots are rounded down by less than 1 in 2 ** FINENESS."""


@dataclasses.dataclass(frozen=True)
class ModelArgs:
    """The model and how it is run.

    Args:
      pretrained: directory of a checkpoint in Hugging Face's layout, or id of a model on its hub; the model that comes
        with the package if left out.
      tokenizer: directory or id of another tokenizer than the checkpoint's.
      method: how to choose what the cache keeps; the method's own options stand beside it.
      dtype: of weights and cache; "auto" is bfloat16, on a CPU float32.
      max_length: most tokens of a prompt and its answer together; the model's own maximum if left out.
      max_gen_toks: most tokens to generate where a task does not say.
      batch_size: prompts read at once.
      seed: of the random draws, where a task samples.
    """

    pretrained: str | None = None
    tokenizer: str | None = None
    method: str = "restkv"
    dtype: DType = "auto"
    max_length: int | None = None
    max_gen_toks: int = 256
    batch_size: int = 1
    seed: int = 0


class Parsed(NamedTuple):
    """The general arguments and the options of the method's preset."""

    general: ModelArgs
    method_options: Any


def parse_model_args(given: Mapping[str, Any]) -> Parsed:
    """Checks arguments as the harness hands them over; those that are None count as left out.

    Args:
      given: by name; strings, numbers and bools.

    Raises:
      UsageError: an unknown method or option, suggesting near ones, or a value of the wrong kind or out of range.
    """
    method = str(given.get("method") or ModelArgs.method)
    try:
        parsed = _parse(given, method)
        _check_range(parsed.general)
        policy_for(parsed, least_slots(parsed.method_options))
    except UsageError as error:
        # they are written without dashes here
        names = re.compile(r"--(?!help)([a-z][a-z-]*)")
        raise UsageError("model_args: " + names.sub(lambda m: m[1].replace("-", "_"), str(error))) from error
    return parsed


def _parse(given: Mapping[str, Any], method: str) -> Parsed:
    method_class = options_of_method(method)

    def read(general: tyro.conf.OmitArgPrefixes[ModelArgs], options: tyro.conf.OmitArgPrefixes[method_class]) -> Parsed:
        return Parsed(general, options)

    args = [_as_option(name, value) for name, value in given.items() if value is not None]
    return parse(read, args, "restkv lm-eval", (ModelArgs, method_class), f" of method={method}")


def _as_option(name: str, value: Any) -> str:
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{option}" if value else f"--no-{option}"
    return f"--{option}={value}"


def _check_range(general: ModelArgs) -> None:
    for name in ("max_length", "max_gen_toks", "batch_size"):
        value = getattr(general, name)
        if value is not None and value < 1:
            raise UsageError(f"{name}={value} must be at least 1")


def policy_for(parsed: Parsed, num_tokens: int) -> EvictionPolicy:
    """The policy for a prompt of this many tokens.

    A percentage refers to the prompt's own tokens. It is rounded down by less than an eighth, so that prompts of
    about one length have one policy and share a compiled program; and it is at least `least_slots`.

    Raises:
      UsageError: options that exclude each other.
    """
    options = parsed.method_options
    budget = getattr(options, "budget", None)
    if budget is not None and budget.is_percentage:
        slots = budget.slots(num_tokens)
        step = max(1, 1 << max(0, slots.bit_length() - FINENESS - 1))
        slots = max(slots // step * step, least_slots(options))
        options = dataclasses.replace(options, budget=Budget(slots))
    return make_policy(parsed.general.method, options)


def least_slots(method_options: Any) -> int:
    """The fewest slots of a percentage budget: one more than what is always kept, and a page of the paged cache."""
    always_kept = max(getattr(method_options, name, 0) for name in ("window", "sinks"))
    return max(always_kept + 1, EvictionPolicy.page_size)
