"""What commands that answer share: how tokens are drawn, the options of it, and what a file of theirs says."""

import dataclasses
import pathlib
from typing import Annotated, Any

import jax
from cyclopts import Parameter

from restkv_jax.caches.stored import read_header
from restkv_jax.commands.options import UsageError, as_usage_error, print_notice
from restkv_jax.generation.checks import check_sampling
from restkv_jax.generation.detokenising import check_stop
from restkv_jax.models.sampling_defaults import SamplingDefaults

SAMPLING = ("temperature", "top_k", "top_p", "min_p")
"""Options of drawing, by their names in `generate`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How an answer is generated.

    Args:
      max_new_tokens: most tokens to generate.
      stop: a string before which the answer ends; may be given several times.
      sample: draw with the model's own temperature, top-k, top-p and min-p; options given here go before them.
      temperature: divides the logits; greedy decoding without it and the other options of drawing.
      top_k: draw among the k best tokens.
      top_p: draw among the best tokens that hold this probability mass.
      min_p: draw among the tokens that are at least this times as probable as the best.
      seed: of the random draws.
    """

    max_new_tokens: int = 64
    stop: Annotated[tuple[str, ...], Parameter(consume_multiple=False)] = ()
    sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0


def check_answer(options: AnswerOptions) -> dict[str, Any]:
    """Keyword arguments of `decode_text`, checked before the model is loaded.

    Raises:
      UsageError: options that make no sense.
    """
    if options.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {options.max_new_tokens} must be at least 1")
    with as_usage_error():
        stop = check_stop(options.stop)
    given = {name: getattr(options, name) for name in SAMPLING if getattr(options, name) is not None}
    if not given and not options.sample:
        return {"stop": stop}
    if not 0 <= options.seed < 2**32:
        raise UsageError(f"--seed {options.seed} must be in [0, 2**32)")
    key = jax.random.key(options.seed)
    with as_usage_error():
        check_sampling(key, *(given.get(name) for name in SAMPLING))
    return given | {"key": key, "stop": stop}


def read_note(path: pathlib.Path) -> dict[str, Any]:
    """What `restkv read` or `restkv chat` noted in a file of a cache; nothing in one that was written otherwise.

    Raises:
      ValueError, OSError: no such file.
    """
    note = read_header(path).note
    return note if isinstance(note, dict) else {}


def with_own(own: SamplingDefaults, given: dict[str, Any]) -> dict[str, Any]:
    """What `check_answer` gave, and the model's own settings for what was not given."""
    if not own.options:
        print_notice(f"--sample: the model has no sampling settings of its own; taken: {describe_sampling(given)}")
    return own.options | given


def describe_sampling(chosen: dict[str, Any]) -> str:
    """How tokens are drawn, for people."""
    if "key" not in chosen:
        return "greedy"
    options = {"temperature": 1} | {name: chosen[name] for name in SAMPLING if name in chosen}
    return ", ".join(f"{name}={value:g}" for name, value in options.items())
