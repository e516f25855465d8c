"""`restkv read`: a document, read once into a small cache and kept in a file that questions are asked of."""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from rich.console import Console
from rich.progress import track

from restkv_jax.caches.base import Cache
from restkv_jax.caches.stored import save_cache
from restkv_jax.commands.method_options import parse_with_method
from restkv_jax.commands.options import CacheOptions, PromptOptions, UsageError, as_usage_error
from restkv_jax.commands.progress import show_while
from restkv_jax.commands.prompts import LoadedPrompt, load_prompt
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.generation.encoding import encode_opening, encode_text
from restkv_jax.generation.reading import bucket_length, extend, prefill


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadOptions(CacheOptions, PromptOptions):
    """Reads a document into a small cache, which is written to a file for `restkv ask`.

    Args:
      output: the file to write.
      method: how to choose what the cache keeps; `restkv read --method NAME --help` lists the method's options.
      segment_size: read so many tokens at a time and evict after each, so that memory does not follow the document's
        length; all at once if left out.
      system: what the model is told before the document, in a chat template.
      raw: read the document as it is, not as the beginning of a turn in the tokenizer's chat template.
      quiet: print nothing.
    """

    output: pathlib.Path = pathlib.Path("document.cache")
    method: str = "restkv"
    segment_size: int | None = None
    system: str | None = None
    raw: bool = False
    quiet: bool = False


def run(args: Sequence[str]) -> None:
    """Reads, and says what was kept of how much."""
    options, policy = parse_with_method(ReadOptions, args, "restkv read")
    _check(options)
    prompt = load_prompt(options, lambda tokenizer, text: _encode(options, tokenizer, text), options.quiet)
    (model, params, _), _, tokens = prompt
    with as_usage_error():
        policy = policy.resolved(bucket_length(tokens.shape[1]))
        cache = _read(prompt, policy, options)
        note = {"model": options.model, "dense": options.dense, "dtype": str(cache.dtype)}
        note |= {"raw": options.raw, "tokens": tokens.shape[1]}
        size = save_cache(options.output, cache, model, params, note)
    if not options.quiet:
        num_slots = cache.num_slots - (0 if policy.while_generating else 1)  # one is for a new token
        Console(highlight=False).print(
            f"wrote {options.output}: {tokens.shape[1]:,} tokens, {num_slots:,} slots per layer and KV head, "
            f"{size:,} bytes",
            soft_wrap=True,
        )


def _check(options: ReadOptions) -> None:
    if not options.output.resolve().parent.is_dir():
        raise UsageError(f"--output {str(options.output)!r}: its directory does not exist; create it first")
    if options.output.is_dir():
        raise UsageError(f"--output {str(options.output)!r} is a directory; give the file to write")
    if options.raw and options.system is not None:
        raise UsageError("--system and --raw are both given; a system prompt needs the chat template")
    if options.segment_size is not None and options.segment_size < 1:
        raise UsageError(f"--segment-size {options.segment_size} must be at least 1")


def _encode(options: ReadOptions, tokenizer, text: str) -> list[int]:
    if options.raw:
        return encode_text(tokenizer, text)
    with as_usage_error():
        return encode_opening(tokenizer, text, options.system)


def _read(prompt: LoadedPrompt, policy: EvictionPolicy, options: ReadOptions) -> Cache:
    (model, params, _), _, tokens = prompt
    stored = {"max_new_tokens": 1, "cache_dtype": options.cache_dtype}
    if options.segment_size is None or options.segment_size >= tokens.shape[1]:
        with show_while("reading the document, which compiles what is new", quiet=options.quiet):
            return prefill(model, params, tokens, None, policy, **stored)[1]
    if options.segment_size < policy.window:
        raise UsageError(f"--segment-size {options.segment_size} must be at least the method's window={policy.window}")
    segments = _segments(tokens, options.segment_size)
    console = Console(stderr=True)
    is_shown = console.is_terminal and not options.quiet
    _, cache = prefill(model, params, segments[0], None, policy, **stored)
    for segment in track(segments[1:], "reading", console=console, disable=not is_shown):
        _, cache = extend(model, params, segment, None, cache, policy, max_new_tokens=1)
    return cache


def _segments(tokens: Array, size: int) -> list[Array]:
    """Parts of tokens [1, T] of `size` each, the first one shorter."""
    first = tokens.shape[1] % size or size
    return [tokens[:, :first], *jnp.split(tokens[:, first:], (tokens.shape[1] - first) // size, axis=1)]
