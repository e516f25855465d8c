"""Prompts as tokens: texts as they are, conversations in the chat template of the tokenizer."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import jinja2
import numpy as np
from jax import Array

ROLES = ("system", "user", "assistant", "tool")


def encode_prompts(tokenizer: Any, prompts: Any) -> tuple[Array, Array]:
    """Encodes one prompt or several, each a text or a conversation.

    Args:
      tokenizer: a tokenizer of `transformers`; it needs no padding token.
      prompts: a text, which is read as it is; a conversation, which is a list of messages such as
        `{"role": "user", "content": "Hello"}` and stands in the tokenizer's chat template; or a list of either.

    Returns:
      tokens int32 [B, T], zeros on the left, and mask bool [B, T].

    Raises:
      TypeError: something that is neither, or not a tokenizer.
      ValueError: no prompts, one without tokens, or as `encode_messages`.
    """
    if not hasattr(tokenizer, "decode"):
        raise TypeError(f"tokenizer={tokenizer!r:.60} must be a tokenizer of transformers, as load_model returns it")
    if is_one_prompt(prompts):
        rows = [_encode(tokenizer, prompts, "prompts")]
    elif isinstance(prompts, Sequence):
        rows = [_encode(tokenizer, prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
    else:
        raise TypeError(f"prompts={prompts!r:.60} must be texts or lists of messages; tokens go to restkv_jax.generate")
    if not rows:
        raise ValueError("prompts is empty; give a text, a list of messages, or a list of either")
    return pad_left(rows, max(map(len, rows)))


def is_one_prompt(prompts: Any) -> bool:
    """Whether it is a text or a conversation, not a list of them."""
    return isinstance(prompts, str) or (
        isinstance(prompts, Sequence) and bool(prompts) and all(isinstance(part, Mapping) for part in prompts)
    )


def _encode(tokenizer: Any, prompt: Any, name: str) -> list[int]:
    if isinstance(prompt, str):
        ids = encode_text(tokenizer, prompt)
    elif isinstance(prompt, Sequence):
        ids = encode_messages(tokenizer, prompt, name)
    else:
        raise TypeError(f"{name}={prompt!r:.60} must be a text or a list of messages")
    if not ids:
        raise ValueError(f"{name} is empty: the tokenizer turns it into no tokens")
    return ids


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text as it is, with those that the tokenizer puts before every text."""
    return tokenizer(text)["input_ids"]


def encode_messages(tokenizer: Any, messages: Sequence[Mapping[str, Any]], name: str = "messages") -> list[int]:
    """The tokens of a conversation in the tokenizer's chat template, up to where the next answer begins.

    If the last turn is the assistant's, the answer goes on in it, as in transformers' pipelines.

    Args:
      tokenizer: a tokenizer of `transformers`.
      messages: with "role" and "content" each.
      name: of the messages, for errors.

    Raises:
      TypeError: messages or contents of the wrong type.
      ValueError: no messages, an unknown role, an empty turn of the user or the assistant, no chat template, or one
        that refuses the messages.
    """
    _check_messages(messages, name)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{name} needs a chat template, which the tokenizer does not have; pass the prompt as a text, or set "
            "tokenizer.chat_template"
        )
    goes_on = messages[-1]["role"] == "assistant"
    try:
        encoded = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            return_dict=True,
        )
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise ValueError(f"the tokenizer's chat template refuses {name}: {error}") from error
    return encoded["input_ids"]


def _check_messages(messages: Sequence[Mapping[str, Any]], name: str) -> None:
    if not messages:
        raise ValueError(f'{name} is empty; give at least one message, {{"role": "user", "content": ...}}')
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f'{name}[{i}]={message!r:.60} must be a message, {{"role": "user", "content": ...}}')
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"{name}[{i}]: role={role!r:.60} is unknown; choose from {', '.join(ROLES)}")
        if message.get("tool_calls"):
            continue  # a turn that calls tools may say nothing
        if not isinstance(content, str):
            raise TypeError(f"{name}[{i}]: content={content!r:.60} must be a text")
        if not content.strip() and role in ("user", "assistant"):
            raise ValueError(f"{name}[{i}]: the content of this turn ({role}) is empty; give some text or leave it out")


def pad_left(rows: Sequence[Sequence[int]], length: int) -> tuple[Array, Array]:
    """Token ids int32 [B, length], zeros on the left, and their mask bool [B, length]."""
    tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for b, row in enumerate(rows):
        tokens[b, length - len(row) :], mask[b, length - len(row) :] = row, True
    return jnp.asarray(tokens), jnp.asarray(mask)
