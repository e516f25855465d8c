"""How often a model answers prompts exactly, with confidence intervals."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from restkv_jax.evaluate.batching import even_size, pad_batch
from restkv_jax.evaluate.tasks.prompts import Prompt
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.generation.generating import generate_each
from restkv_jax.generation.reading import bucket_length
from restkv_jax.models.key_groups import Sharing

LIST_NUMBER = re.compile(r"(?:^|\s)\d{1,2}\.\s")


class Accuracy(NamedTuple):
    """`correct` of `total` prompts answered exactly, and the limits of the share's 95 % Wilson interval."""

    correct: int
    total: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """Share of prompts answered exactly."""
        return self.correct / self.total


def measure_accuracy(
    model: Any,
    params: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    policies: Sequence[EvictionPolicy],
    batch_size: int = 10,
    show: Callable[[Iterable[int]], Iterable[int]] = iter,
    sharing: Sharing | None = None,
) -> list[Accuracy]:
    """Generates greedily from every prompt with every policy and counts the exact answers.

    Args:
      model: a `Decoder`.
      params: its parameters.
      tokenizer: of `transformers`.
      prompts: from `make_prompts`.
      policies: what to keep of the prompts; the prompts are read once for all of them.
      batch_size: most prompts generated at once; they are divided evenly, and a batch that has one less is filled up,
        so that one program serves all.
      show: wraps the iteration over batches, for progress.
      sharing: whose keys each layer reads distant tokens by; its own by default.

    Returns:
      one `Accuracy` per policy.

    Raises:
      ValueError: no prompts.
    """
    if not prompts:
        raise ValueError("prompts is empty")
    by_policy = generate_texts(model, params, tokenizer, prompts, policies, batch_size, show, sharing)
    counts = [sum(is_exact(t, p.answers) for t, p in zip(texts, prompts, strict=True)) for texts in by_policy]
    return [Accuracy(correct, len(prompts), *wilson_interval(correct, len(prompts))) for correct in counts]


def generate_texts(
    model: Any,
    params: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    policies: Sequence[EvictionPolicy],
    batch_size: int = 10,
    show: Callable[[Iterable[int]], Iterable[int]] = iter,
    sharing: Sharing | None = None,
) -> list[list[str]]:
    """What the model says after each prompt with each policy, up to a little more than the longest answer."""
    encoded = [tokenizer(prompt.text)["input_ids"] for prompt in prompts]
    length = bucket_length(max(map(len, encoded)))
    answers = (tokenizer(prompt.continuation)["input_ids"] for prompt in prompts)
    max_new_tokens = max(map(len, answers)) + 4
    texts: list[list[str]] = [[] for _ in policies]
    size = even_size(len(prompts), batch_size)
    for start in show(range(0, len(prompts), size)):
        tokens, mask = pad_batch(encoded[start : start + size], size, length)
        outs = generate_each(model, params, tokens, mask, tuple(policies), max_new_tokens, sharing=sharing)
        for said, out in zip(texts, outs, strict=True):
            said += tokenizer.batch_decode(np.asarray(out.tokens), skip_special_tokens=True)
    return [said[: len(prompts)] for said in texts]


def is_exact(text: str, answers: Sequence[str]) -> bool:
    """Whether the words and numbers of the text are those of the answers, in any order, upper or lower case alike.

    The numbers of a list, "1. ", do not count.
    """
    expected = _words(" ".join(answers))
    return expected in (_words(text), _words(LIST_NUMBER.sub(" ", text)))


def _words(text: str) -> list[str]:
    return sorted(re.findall(r"\w+", text.lower()))


def match_share(text: str, answers: Sequence[str]) -> float:
    """Share of the answers that the text contains, upper or lower case alike (string_match_all of RULER)."""
    text = text.lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927)."""
    low, high = scipy.stats.binomtest(correct, total).proportion_ci(confidence, method="wilson")
    return float(low), float(high)
