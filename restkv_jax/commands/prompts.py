"""The prompt of a command, and the model that reads it."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from restkv_jax.commands.options import PromptOptions, UsageError, as_usage_error, chosen_mesh
from restkv_jax.commands.progress import show_while
from restkv_jax.generation.encoding import encode_messages, encode_text
from restkv_jax.loading import Loaded, load_checkpoint


class LoadedPrompt(NamedTuple):
    """A model with its parameters and tokenizer, a prompt, and the prompt's tokens, int32 [1, T]."""

    loaded: Loaded
    text: str
    tokens: Array


def encode_turn(tokenizer: Any, text: str, system: str | None = None) -> list[int]:
    """The tokens of a user's turn in the tokenizer's chat template, up to where the answer begins.

    Without a template, those of the text as it is.

    Raises:
      UsageError: a system prompt without a template, or a template that refuses it.
    """
    if not tokenizer.chat_template and system is None:
        return encode_text(tokenizer, text)
    if not tokenizer.chat_template:
        raise UsageError("--system needs a chat template, which the model's tokenizer does not have; leave it out")
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": text})
    try:
        return encode_messages(tokenizer, messages)
    except ValueError as error:
        raise UsageError(f"{error}; --raw leaves the template out") from error


def load_prompt(
    options: PromptOptions, encode: Callable[[Any, str], list[int]] = encode_text, quiet: bool = False
) -> LoadedPrompt:
    """Reads the prompt, loads the model and encodes the one for the other.

    Args:
      options: of the command.
      encode: tokens of the prompt, from the tokenizer and the text.
      quiet: do not say that the model is being loaded.

    Raises:
      UsageError: a prompt or a model that cannot be read, or a prompt without tokens.
    """
    text = read_prompt(options)
    with as_usage_error(), show_while("loading the model", quiet=quiet):
        mesh = chosen_mesh(options.model_parallel, options.data_parallel)
        loaded = load_checkpoint(options.model, options.dtype, dense=options.dense, mesh=mesh)
    ids = encode(loaded.tokenizer, text)
    if not ids:
        raise UsageError("the prompt is empty: the tokenizer turns it into no tokens")
    return LoadedPrompt(loaded, text, jnp.asarray([ids], jnp.int32))


def read_prompt(options: PromptOptions) -> str:
    """The prompt from the argument, the file or standard input.

    Raises:
      UsageError: no prompt, two of them, an empty one, or one that is not text.
    """
    if options.prompt is not None and options.file is not None:
        raise UsageError(f"PROMPT and --file {str(options.file)!r} are both given; leave one out")
    source = "PROMPT" if options.file is None else f"--file {str(options.file)!r}"
    try:
        if options.prompt is not None:
            prompt = options.prompt
        elif options.file is not None:
            prompt = options.file.read_text(encoding="utf-8")
        elif sys.stdin is None or sys.stdin.isatty():
            raise UsageError("no PROMPT; give it as an argument, with --file PATH, or on standard input")
        else:
            source, prompt = "standard input", sys.stdin.read()
        # bytes that are not text come as lone surrogates from arguments and standard input
        prompt.encode("utf-8")
    except (OSError, UnicodeError) as error:
        raise UsageError(f"{source} cannot be read as text ({error}); give text in UTF-8") from error
    if not prompt.strip():
        raise UsageError(f"{source} is empty; give a prompt with some text")
    return prompt
