"""What `--model_args` of lm-evaluation-harness say: the model, the method and the method's options."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from restkv_jax.eviction.policy import EvictionPolicy, check_integer
from restkv_jax.eviction.presets import budget_slots, check_options, find_preset, is_percentage, make_policy, suggest
from restkv_jax.loading import DType

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
      dense: leave out the sharing of keys that the model was adapted to.
    """

    pretrained: str | None = None
    tokenizer: str | None = None
    method: str = "restkv"
    dtype: DType = "auto"
    max_length: int | None = None
    max_gen_toks: int = 256
    batch_size: int = 1
    seed: int = 0
    dense: bool = False


class ParsedArgs(NamedTuple):
    """The general arguments and the options of the method's preset."""

    general: ModelArgs
    method_options: dict[str, Any]


def parse_model_args(given: Mapping[str, Any]) -> ParsedArgs:
    """Checks arguments as the harness hands them over; those that are None count as left out.

    Args:
      given: by name; strings, numbers and bools.

    Raises:
      ValueError: an unknown method or option, suggesting near ones, or a value of the wrong kind or out of range.
    """
    values = {name: value for name, value in given.items() if value is not None}
    general_names = {field.name for field in dataclasses.fields(ModelArgs)}
    if str(values.get("batch_size", "")).isdecimal():
        values["batch_size"] = int(values["batch_size"])  # the harness's own `--batch_size` is text
    try:
        general = ModelArgs(**{name: values.pop(name) for name in general_names & values.keys()})
        parsed = ParsedArgs(general, values)
        check_options(general.method, values, general_names)
        _check_general(general)
        policy_for(parsed, least_slots(parsed))
    except (TypeError, ValueError) as error:
        raise ValueError(f"model_args: {error}") from error
    return parsed


def _check_general(general: ModelArgs) -> None:
    for name in ("max_length", "max_gen_toks", "batch_size"):
        if getattr(general, name) is not None:
            check_integer(name, getattr(general, name), 1, "tokens or prompts")
    check_integer("seed", general.seed, 0, "of random draws")
    if general.dtype not in get_args(DType):
        raise ValueError(f"dtype={general.dtype!r} is unknown; {suggest(str(general.dtype), get_args(DType))}")


def policy_for(parsed: ParsedArgs, num_tokens: int) -> EvictionPolicy:
    """The policy for a prompt of this many tokens.

    A percentage refers to the prompt's own tokens. It is rounded down by less than an eighth, so that prompts of
    about one length have one policy and share a compiled program; and it is at least `least_slots`.

    Raises:
      ValueError: options that the method does not have, or that exclude each other.
    """
    options = parsed.method_options
    if is_percentage(options.get("budget", "")):
        slots = budget_slots(options["budget"], num_tokens)
        step = max(1, 1 << max(0, slots.bit_length() - FINENESS - 1))
        options = options | {"budget": max(slots // step * step, least_slots(parsed))}
    return make_policy(parsed.general.method, options)


def least_slots(parsed: ParsedArgs) -> int:
    """The fewest slots of a percentage budget: one more than what is always kept, and a page of the paged cache."""
    parameters = inspect.signature(find_preset(parsed.general.method)).parameters
    defaults = {name: parameters[name].default for name in ("window", "sinks") if name in parameters}
    always_kept = max((defaults | parsed.method_options).get(name, 0) for name in ("window", "sinks"))
    return max(always_kept + 1, EvictionPolicy.page_size)
