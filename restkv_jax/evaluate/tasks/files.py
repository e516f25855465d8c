"""Prompts of one's own, from files of JSON lines."""

import json
import pathlib
from typing import Any

from restkv_jax.evaluate.tasks.prompts import Prompt


def read_prompts(path: str) -> list[Prompt]:
    """Prompts from JSON lines with "answers", strings, and "prompt", a string, or "messages", a conversation.

    A line may have a "question", which follows the prompt or the user's last turn, and an "answer_prefix", with which
    the answer begins. Messages may end with a turn of the assistant, which the answer goes on with.

    Raises:
      OSError, ValueError: a file that cannot be read, is empty, or has a line that is not a prompt, with its number.
    """
    lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError("the file is empty")
    return [_prompt(line, number) for number, line in numbered]


def _prompt(line: str, number: int) -> Prompt:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} is not JSON: {error}") from error
    if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
        raise ValueError(f'line {number} must have either "prompt", a string, or "messages", a list')
    answers = value.get("answers")
    if not isinstance(answers, list) or not answers:
        raise ValueError(f'line {number} must have "answers", a list that is not empty')
    turns = [] if "prompt" in value else _turns(value["messages"], number)
    prefix = value.get("answer_prefix") or (turns.pop()[1] if turns and turns[-1][0] == "assistant" else "")
    if "messages" in value and (not turns or turns[-1][0] != "user"):
        raise ValueError(
            f'line {number}: "messages" must end with a turn of the user, or one of the assistant after it'
        )
    text, question = value.get("prompt", turns[-1][1] if turns else None), value.get("question", "")
    if not all(isinstance(part, str) for part in (text, question, prefix)):
        raise ValueError(f'line {number}: "prompt", "question" and "answer_prefix" must be strings')
    history = tuple(turns[:-1]) if "messages" in value else None
    return Prompt(text + question + prefix, tuple(map(str, answers)), "", question, prefix, history)


def _turns(messages: Any, number: int) -> list[tuple[str, str]]:
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        raise ValueError(f'line {number}: "messages" must be a list of {{"role": ..., "content": ...}}')
    return [(message["role"], message["content"]) for message in messages]
