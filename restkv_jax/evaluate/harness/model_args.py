"""What `--model_args` of lm-evaluation-harness say: the model, the method and the method's options."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.eviction.presets import check_options, make_policy, suggest
from restkv_jax.kernels.quantised import parse_quantisation
from restkv_jax.loading import DType
from restkv_jax.models.arguments import check_integer


@dataclasses.dataclass(frozen=True)
class ModelArgs:
    """The model and how it is run.

    Args:
      pretrained: directory of a checkpoint in Hugging Face's layout, a GGUF file, or id of a model on the hub; the
        model that comes with the package if left out.
      tokenizer: directory or id of another tokenizer than the checkpoint's.
      method: how to choose what the cache keeps; the method's own options stand beside it.
      dtype: of weights and cache; "auto" is bfloat16, on a CPU float32.
      max_length: most tokens of a prompt and its answer together; the model's own maximum if left out.
      max_gen_toks: most tokens to generate where a task does not say.
      batch_size: prompts read at once, or "auto" for as many as fit into memory.
      seed: of the random draws, where a task samples.
      dense: leave out the sharing of keys that the model was adapted to.
      cache_dtype: what the cache stores keys and values in: int8, int4 or float8_e4m3fn, or with the sizes of groups
        and residual window int4(group_size=32;residual=16); the model's dtype if left out.
      model_parallel: devices that share the weights.
      data_parallel: parts that the rows of a batch are divided into, each on devices of its own.
    """

    pretrained: str | None = None
    tokenizer: str | None = None
    method: str = "restkv"
    dtype: DType = "auto"
    max_length: int | None = None
    max_gen_toks: int = 256
    batch_size: int | Literal["auto"] = 1
    seed: int = 0
    dense: bool = False
    cache_dtype: str | None = None
    model_parallel: int = 1
    data_parallel: int = 1


class ParsedArgs(NamedTuple):
    """The general arguments and the policy of the method."""

    general: ModelArgs
    policy: EvictionPolicy


def parse_model_args(given: Mapping[str, Any]) -> ParsedArgs:
    """Checks arguments as the harness hands them over; those that are None count as left out.

    Args:
      given: by name; strings, numbers and bools.

    Raises:
      ValueError: an unknown method or option, suggesting near ones, or a value of the wrong kind or out of range.
    """
    values = {name: value for name, value in given.items() if value is not None}
    general_names = [field.name for field in dataclasses.fields(ModelArgs)]
    size = str(values.get("batch_size", ""))  # the harness's own `--batch_size` is text
    if size.isdecimal():
        values["batch_size"] = int(size)
    elif size.partition(":")[0] == "auto":  # "auto:4" asks to look anew four times; it is always looked anew
        values["batch_size"] = "auto"
    try:
        general = ModelArgs(**{name: values.pop(name) for name in general_names if name in values})
        check_options(general.method, values, general_names)
        _check_general(general)
        return ParsedArgs(general, make_policy(general.method, values))
    except (TypeError, ValueError) as error:
        raise ValueError(f"model_args: {error}") from error


def _check_general(general: ModelArgs) -> None:
    for name in ("max_length", "max_gen_toks", "batch_size", "model_parallel", "data_parallel"):
        if getattr(general, name) not in (None, "auto"):
            check_integer(name, getattr(general, name), 1, "tokens, prompts or devices")
    check_integer("seed", general.seed, 0, "of random draws")
    if general.cache_dtype is not None:
        parse_quantisation(str(general.cache_dtype))
    if general.dtype not in get_args(DType):
        raise ValueError(f"dtype={general.dtype!r} is unknown; {suggest(str(general.dtype), get_args(DType))}")
