"""The tasks by name, and prompts of theirs that are filled up to a number of tokens."""

import copy
import dataclasses
import functools
import random
from collections.abc import Callable
from typing import Any

from restkv_jax.evaluate.tasks.needles import Chain, Needles
from restkv_jax.evaluate.tasks.prompts import Draft, Prompt, Task, largest_fitting
from restkv_jax.evaluate.tasks.words import CommonWords, FrequentWords

TASKS: dict[str, Task] = {
    "single": Needles(),
    "multikey": Needles(num_keys=8),
    "haystack": Needles(haystack="needles"),
    "essays": Needles(haystack="essays"),
    "essays_multikey": Needles(num_keys=4, haystack="essays"),
    "multivalue": Needles(num_values=4),
    "multiquery": Needles(num_keys=4, num_asked=4),
    "tracking": Chain(num_hops=4),
    "common_words": CommonWords(),
    "frequent_words": FrequentWords(),
}
"""The tasks by name: RULER's niah_single_1, niah_multikey (8 keys in noise, and all needles), niah_single_2 and
niah_multikey_1 (essays, with one and four keys), niah_multivalue and niah_multiquery (in noise, not in essays), vt
(without its solved example), cwe, fwe.
"""


def make_prompts(
    task: Task | str,
    tokenizer: Any,
    num_tokens: int,
    num_prompts: int,
    seed: int,
    depth: float | None = None,
    length_of: Callable[[Prompt], int] | None = None,
) -> list[Prompt]:
    """Fresh prompts of at most `num_tokens` tokens, filled as far as whole sentences or words go.

    Args:
      task: a `Task` or a name in `TASKS`.
      tokenizer: called as `tokenizer(text)["input_ids"]`; its special tokens count.
      num_tokens: the size of each prompt.
      num_prompts: how many.
      seed: of Python's generator; equal seeds give equal prompts.
      depth: where the asked needle stands among the sentences, 0 at their beginning to 1 at their end; anywhere by
        default. For tasks that ask for one needle.
      length_of: how many tokens a prompt takes, where it is not read as the text that it is.

    Raises:
      OSError: essays that cannot be fetched.
      ValueError: an unknown task, `num_tokens` too small for what is asked and the question, or a depth out of [0, 1]
        or one for a task that does not ask for one needle.
    """
    name = task
    if isinstance(task, str):
        if task not in TASKS:
            raise ValueError(f"task={task!r} is unknown; known: {', '.join(TASKS)}")
        task = TASKS[task]
    if depth is not None:
        if not (isinstance(task, Needles) and task.asks_one):
            raise ValueError(f"task={name!r} does not ask for one needle that depth={depth} could place; leave it out")
        task = dataclasses.replace(task, depth=depth)

    @functools.lru_cache(maxsize=8)
    def count(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    rng, prompts, size = random.Random(seed), [], None
    for _ in range(num_prompts):
        draft = task.draft(rng, count, num_tokens)
        # Parts of two prompts are alike in size.
        length = length_of or (lambda prompt: count(prompt.text))
        size = _size(draft, length, num_tokens, rng, draft.most if size is None else size)
        if size is None:
            raise ValueError(f"num_tokens={num_tokens} cannot hold what task={name!r} asks and the question; raise it")
        prompts.append(draft.prompt(size, rng))
    return prompts


def _size(draft: Draft, length: Callable[[Prompt], int], num_tokens: int, rng: random.Random, guess: int) -> int | None:
    """How many parts of a draft make a prompt of at most `num_tokens` tokens; the generator stays as it is."""

    def tokens(n: int) -> int:
        return length(draft.prompt(n, copy.copy(rng)))

    return largest_fitting(tokens, draft.least, draft.most, num_tokens, guess)
