"""How far the layers' attention moves with each configuration of a sweep: a measure that needs no answers."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from restkv_jax.evaluate.grid import Grid, is_file, policies
from restkv_jax.evaluate.measuring import EncodedPrompts, RunSettings
from restkv_jax.evaluate.reconstruction import reconstruction_errors
from restkv_jax.evaluate.results import LayerErrors
from restkv_jax.evaluate.sweep import encode_prompts, prompt_sets
from restkv_jax.evaluate.tasks.texts import DIVERGENCE
from restkv_jax.generation.encoding import encode_continuation, pad_left
from restkv_jax.generation.reading import bucket_length
from restkv_jax.loading import Loaded
from restkv_jax.models.mesh import divisible, fetched


def measure_layer_errors(
    loaded: Loaded, grid: Grid, settings: RunSettings, show: Callable[[Iterable[Any]], Iterable[Any]] = iter
) -> tuple[LayerErrors, ...]:
    """`reconstruction_errors` of all configurations for a batch of prompts of every task and length, over the answers.

    Those that evict while they generate, or refit what they keep, have none: what they keep of the prompt changes.

    Args:
      loaded: what to measure.
      grid: its tasks, lengths and configurations count; of several depths the first.
      settings: its batch size, and how many configurations share a prefill.
      show: wraps the iteration over tasks and lengths, for progress.
    """
    first: dict[tuple[str, int], Any] = {}
    for prompt_set in prompt_sets(grid, loaded.tokenizer):
        if not is_file(prompt_set.task) and prompt_set.task != DIVERGENCE:
            first.setdefault((prompt_set.task, prompt_set.length), prompt_set)
    found = []
    for task, length in show(list(first)):
        encoded = encode_prompts(grid, loaded.tokenizer, first[task, length])
        rows, num_following = _texts(loaded.tokenizer, encoded, settings.batch_size)
        configs = {e.label: p for e, p in policies(grid, length).items() if not p.while_generating and p.refit is None}
        count = len(rows)
        rows += [rows[0]] * (divisible(count, loaded.params) - count)
        tokens, mask = pad_left(rows, bucket_length(max(map(len, rows)) - num_following) + num_following)
        labels = list(configs)
        for start in range(0, len(labels), settings.together):
            group = labels[start : start + settings.together]
            chosen = tuple(configs[label] for label in group)
            errors = reconstruction_errors(loaded.model, loaded.params, tokens, mask, chosen, num_following)
            means = fetched(errors)[..., :count].mean(-1, dtype=np.float64).round(6).tolist()
            found += [LayerErrors(task, length, label, tuple(row)) for label, row in zip(group, means, strict=True)]
    return tuple(found)


def _texts(tokenizer: Any, encoded: EncodedPrompts, batch_size: int) -> tuple[list[list[int]], int]:
    """Tokens of prompts with as many tokens of their answers as the shortest answer has, and that number.

    A question that is asked afterwards counts as part of the answer.
    """
    numbers = encoded.batches(batch_size)[0]
    answers = [
        [*encoded.asked.get(i, ()), *encode_continuation(tokenizer, encoded.prompts[i].continuation)] for i in numbers
    ]
    shortest = min(map(len, answers))
    return [encoded.tokens[i] + answer[:shortest] for i, answer in zip(numbers, answers, strict=True)], shortest
