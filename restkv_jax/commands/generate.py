"""`restkv generate`: an answer on a small cache, and what it cost."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from restkv_jax.caches.base import cache_bytes
from restkv_jax.caches.paged import InPages
from restkv_jax.commands.answering import AnswerOptions, check_answer, describe_sampling, with_own
from restkv_jax.commands.method_options import parse_with_method
from restkv_jax.commands.options import CacheOptions, PromptOptions, UsageError, as_usage_error
from restkv_jax.commands.progress import show_while
from restkv_jax.commands.prompts import LoadedPrompt, encode_turn, load_prompt
from restkv_jax.eviction.methods.full import full
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.generation.encoding import encode_text
from restkv_jax.generation.reading import bucket_length, cache_shapes
from restkv_jax.generation.text import decode_text
from restkv_jax.timing import CompilationClock


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions(AnswerOptions, CacheOptions, PromptOptions):
    """Generates from a prompt on a small cache and prints the answer as it comes.

    Args:
      method: how to choose what the cache keeps; `restkv generate --method NAME --help` lists the method's options,
        `restkv methods` all methods.
      segment_size: read so many tokens at a time and evict after each, so that memory does not follow the prompt's
        length; all at once if left out.
      system: what the model is told before the prompt, in a chat template.
      raw: read the prompt as it is, not as a turn in the chat template that the model's tokenizer may have.
      quiet: print nothing but the answer.
    """

    method: str = "restkv"
    segment_size: int | None = None
    system: str | None = None
    raw: bool = False
    quiet: bool = False


class Timing(NamedTuple):
    """Seconds: compilation, the first token (prefill) without it, the other tokens without it; number of tokens."""

    compilation: float
    first: float
    rest: float
    num_tokens: int


def run(args: Sequence[str]) -> None:
    """Streams the answer, then says what it cost."""
    options, policy = parse_with_method(GenerateOptions, args, "restkv generate")
    chosen = check_answer(options)
    if options.raw and options.system is not None:
        raise UsageError("--system and --raw are both given; a system prompt needs the chat template")
    encode = encode_text if options.raw else functools.partial(encode_turn, system=options.system)
    prompt = load_prompt(options, encode, options.quiet)
    if options.sample:
        chosen = with_own(prompt.loaded.model.config.sampling, chosen)
    timing = _print_answer(prompt, policy, options, chosen)
    if not options.quiet:
        Console().print(_cost_table(prompt, policy, options, timing, describe_sampling(chosen)))


def _print_answer(
    prompt: LoadedPrompt, policy: EvictionPolicy, options: GenerateOptions, chosen: dict[str, Any]
) -> Timing:
    """Prints the answer as it comes."""
    model, params, tokenizer = prompt.loaded
    encoded = (prompt.tokens, None, policy, options.max_new_tokens)
    with CompilationClock() as clock:
        start = time.perf_counter()
        with as_usage_error():
            how = {"segment_size": options.segment_size, "cache_dtype": options.cache_dtype}
            text = decode_text(model, params, tokenizer, *encoded, **how, **chosen)
        steps = iter(text)
        with show_while("reading the prompt, which compiles what is new", quiet=options.quiet):
            pieces = next(steps)
        print(*pieces, end="", flush=True)
        first, first_compilation = time.perf_counter() - start, clock.seconds
        for pieces in steps:
            print(*pieces, end="", flush=True)
        print()
        rest = time.perf_counter() - start - first
        rest_compilation = clock.seconds - first_compilation
    return Timing(clock.seconds, first - first_compilation, rest - rest_compilation, len(text.rows[0].tokens))


def _cost_table(
    prompt: LoadedPrompt, policy: EvictionPolicy, options: GenerateOptions, timing: Timing, sampling: str
) -> Table:
    """Slots and bytes as they are allocated, against the full cache's for the same prompt, and times."""
    length = prompt.tokens.shape[1]
    model, params, _ = prompt.loaded
    cache, everything = (
        cache_shapes(model, params, prompt.tokens, None, one, options.max_new_tokens, *how)
        for one, how in ((policy, (options.segment_size, options.cache_dtype)), (full(), (None, None)))
    )
    bytes_, full_bytes = cache_bytes(cache), cache_bytes(everything)
    rest = timing.num_tokens - 1
    on_average = " (on average)" if isinstance(cache, InPages) else ""
    table = Table(show_header=False)
    table.add_row("method", options.method)
    if options.cache_dtype is not None:
        table.add_row("cache dtype", options.cache_dtype)
    table.add_row("sampling", sampling)
    table.add_row("prompt tokens", f"{length:,}")
    table.add_row("cache slots", f"{cache.num_slots:,} (full cache: {everything.num_slots:,})")
    table.add_row("cache bytes", f"{bytes_:,} ({bytes_ / full_bytes:.1%} of the full cache's {full_bytes:,})")
    table.add_row("compilation", f"{timing.compilation:.2f} s, not in the times below")
    table.add_row("time to first token", f"{timing.first:.2f} s")
    table.add_row(
        "tokens per second", f"{rest / timing.rest:.1f} ({rest} after the first)" if rest else "one token only"
    )
    table.add_row("device", jax.devices()[0].device_kind)
    reserved = "" if policy.while_generating else f", with {options.max_new_tokens:,} for new tokens"
    table.caption = (
        f"Slots are allocated per layer and KV head{on_average}{reserved}; "
        f"the full cache holds the prompt padded to {bucket_length(length):,} tokens."
    )
    return table
