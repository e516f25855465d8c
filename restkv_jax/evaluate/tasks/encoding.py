"""Prompts as tokens: as the text that they are or as a turn of a chat, with the question inside or asked afterwards."""

from typing import Any, Literal, NamedTuple

from restkv_jax.evaluate.tasks.prompts import Prompt
from restkv_jax.generation.encoding import MARK, encode_continuation, encode_in_parts, encode_text

Ask = Literal["within", "after"]
"""Whether the question is within what is compressed, or read after it."""


class Form(NamedTuple):
    """How prompts are put: all as turns of a chat or not, and where the question stands."""

    chat: bool = False
    ask: Ask = "within"


class EncodedPrompt(NamedTuple):
    """Token ids: those that are read and compressed, and those that are read onto what is left; empty for none."""

    read: list[int]
    asked: list[int]

    @property
    def length(self) -> int:
        """All tokens."""
        return len(self.read) + len(self.asked)


def encode_prompt(tokenizer: Any, prompt: Prompt, form: Form) -> EncodedPrompt:
    """The tokens of a prompt.

    A chat's user says all but the answer's beginning, with which the assistant's turn begins, without the blank before
    it.

    Raises:
      ValueError: a chat without a template or with turns that it refuses, or a prompt without question to ask
        afterwards.
    """
    if form.ask == "after" and not prompt.question:
        raise ValueError('a prompt has no "question" that could be asked afterwards')
    turn = prompt.document + (MARK if form.ask == "after" else "") + prompt.question
    if form.chat or prompt.history is not None:
        turns = [*(prompt.history or ()), ("user", turn)]
        turns += [("assistant", prompt.answer_prefix.lstrip())] if prompt.answer_prefix.strip() else []
        parts = encode_in_parts(tokenizer, [{"role": role, "content": content} for role, content in turns])
    else:
        read, *asked = (turn + prompt.answer_prefix).split(MARK)
        parts = [encode_text(tokenizer, read), *(encode_continuation(tokenizer, part) for part in asked)]
    return EncodedPrompt(parts[0], parts[1] if len(parts) > 1 else [])
