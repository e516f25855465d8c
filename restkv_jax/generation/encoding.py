"""Prompts as tokens: texts as they are, conversations in the chat template of the tokenizer."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import jinja2
import numpy as np
from jax import Array

ROLES = ("system", "user", "assistant", "tool")

MARK = "\u2402MARK\u2403"
"""Stands for a place in a conversation while a chat template is filled in; no text has it."""

SPACE = "\u2581"
"""What stands for a space in the tokens of SentencePiece."""


def encode_prompts(tokenizer: Any, prompts: Any, goes_on: bool = False) -> tuple[Array, Array]:
    """Encodes one prompt or several, each a text or a conversation.

    Args:
      tokenizer: a tokenizer of `transformers`; it needs no padding token.
      prompts: a text, which is read as it is; a conversation, which is a list of messages such as
        `{"role": "user", "content": "Hello"}` and stands in the tokenizer's chat template; or a list of either.
      goes_on: texts go on after others, without the tokens that the tokenizer puts before every text.

    Returns:
      tokens int32 [B, T], zeros on the left, and mask bool [B, T].

    Raises:
      TypeError: something that is neither, or not a tokenizer.
      ValueError: no prompts, one without tokens, or as `encode_messages`.
    """
    if not hasattr(tokenizer, "decode"):
        raise TypeError(f"tokenizer={tokenizer!r:.60} must be a tokenizer of transformers, as load_model returns it")
    if is_one_prompt(prompts):
        rows = [_encode(tokenizer, prompts, "prompts", goes_on)]
    elif isinstance(prompts, Sequence):
        rows = [_encode(tokenizer, prompt, f"prompts[{i}]", goes_on) for i, prompt in enumerate(prompts)]
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


def _encode(tokenizer: Any, prompt: Any, name: str, goes_on: bool) -> list[int]:
    if isinstance(prompt, str):
        ids = encode_continuation(tokenizer, prompt) if goes_on else encode_text(tokenizer, prompt)
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
      ValueError: no messages, an unknown role, an empty turn of the user, no chat template, or one that refuses the
        messages.
    """
    _check_messages(messages, name)
    goes_on = messages[-1]["role"] == "assistant"
    options = dict(add_generation_prompt=not goes_on, continue_final_message=goes_on, return_dict=True)
    return _apply_template(tokenizer, messages, name, **options)["input_ids"]


def encode_in_parts(tokenizer: Any, messages: Sequence[Mapping[str, Any]], name: str = "messages") -> list[list[int]]:
    """As `encode_messages`, in parts that are read one after the other, divided where a content holds `MARK`."""
    _check_messages(messages, name)
    goes_on = messages[-1]["role"] == "assistant"
    options = dict(add_generation_prompt=not goes_on, continue_final_message=goes_on, tokenize=False)
    rendered = _apply_template(tokenizer, messages, name, **options)
    first, *others = rendered.split(MARK)
    return [encode_beginning(tokenizer, first), *(encode_continuation(tokenizer, part) for part in others)]


def encode_opening(tokenizer: Any, document: str, system: str | None = None) -> list[int]:
    """The tokens of a user's turn that begins with a document and is not over, for `encode_question` to go on with.

    Without a chat template they are those of the document as it is.

    Raises:
      ValueError: a system prompt without a template, or a template that refuses.
    """
    if not has_template(tokenizer) and system is None:
        return encode_text(tokenizer, document)
    messages = [] if system is None else [{"role": "system", "content": system}]
    opened = _render(tokenizer, [*messages, {"role": "user", "content": document + MARK}]).partition(MARK)[0]
    return encode_beginning(tokenizer, opened)


def encode_question(tokenizer: Any, question: str) -> list[int]:
    """The tokens that follow those of `encode_opening`: the question, the end of the turn, and where the answer begins.

    Raises:
      ValueError: an empty question.
    """
    _check_turn(question, "question")
    if not has_template(tokenizer):
        return encode_continuation(tokenizer, question)
    rendered = _render(tokenizer, [{"role": "user", "content": f"{MARK}\n\n{question}"}], add_generation_prompt=True)
    return encode_continuation(tokenizer, rendered.partition(MARK)[2])


def encode_next_turn(tokenizer: Any, messages: Sequence[Mapping[str, Any]], text: str) -> list[int]:
    """The tokens that follow the assistant's last answer: the end of that turn, the user's, and the next beginning.

    Args:
      tokenizer: a tokenizer of `transformers` with a chat template.
      messages: the conversation so far; the last one is the assistant's.
      text: of the user's turn.

    Raises:
      ValueError: an empty turn, or a template that refuses, or that leaves out earlier answers.
    """
    _check_turn(text, "the user's turn")
    turns = [*messages[:-1], {**messages[-1], "content": MARK}, {"role": "user", "content": text}]
    _, mark, following = _render(tokenizer, turns, add_generation_prompt=True).rpartition(MARK)
    if not mark:
        raise ValueError("the tokenizer's chat template leaves earlier answers out, so that a chat cannot go on in it")
    return encode_continuation(tokenizer, following)


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def encode_continuation(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that goes on after another, without those that the tokenizer puts before every text."""
    ids = encode_beginning(tokenizer, text)
    if not _puts_space_first(tokenizer):
        return ids
    before, whole = (encode_beginning(tokenizer, part) for part in ("\n", "\n" + text))
    return whole[len(before) :] if whole[: len(before)] == before else ids


def encode_beginning(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text in which special tokens are written out, as a rendered chat template is."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _puts_space_first(tokenizer: Any) -> bool:
    """Whether a tokenizer puts a space before every text, as SentencePiece's do, which no option leaves out."""
    first = encode_beginning(tokenizer, "a")[:1]
    return any(token.startswith(SPACE) for token in tokenizer.convert_ids_to_tokens(first))


def _render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    return _apply_template(tokenizer, messages, "messages", tokenize=False, **options)


def _apply_template(tokenizer: Any, messages: Sequence[Mapping[str, Any]], name: str, **options: Any) -> Any:
    _check_messages(messages, name)
    if not has_template(tokenizer):
        raise ValueError(
            f"{name} needs a chat template, which the tokenizer does not have; pass the prompt as a text, or set "
            "tokenizer.chat_template"
        )
    try:
        return tokenizer.apply_chat_template([dict(message) for message in messages], **options)
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise ValueError(f"the tokenizer's chat template refuses {name}: {error}") from error


def _check_turn(text: str, name: str) -> None:
    if not text.strip():
        raise ValueError(f"{name} is empty; give some text")


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
        if not content.strip() and role == "user":  # a model may have answered nothing
            raise ValueError(f"{name}[{i}]: the content of this turn ({role}) is empty; give some text or leave it out")


def pad_left(rows: Sequence[Sequence[int]], length: int) -> tuple[Array, Array]:
    """Token ids int32 [B, length], zeros on the left, and their mask bool [B, length]."""
    tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for b, row in enumerate(rows):
        tokens[b, length - len(row) :], mask[b, length - len(row) :] = row, True
    return jnp.asarray(tokens), jnp.asarray(mask)
