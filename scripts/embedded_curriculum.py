"""The stages that the embedded model is trained on, from short texts to needle texts of full length."""

import dataclasses

import embedded_data as data
import numpy as np

SHORT = (("one-short", 0.4), ("values-short", 0.2), ("queries-short", 0.2), ("tracking-short", 0.2))
TEXTS = (
    ("one-short", 0.1),
    ("one", 0.15),
    ("values-short", 0.125),
    ("values", 0.2),
    ("queries-short", 0.1),
    ("queries", 0.15),
    ("tracking-short", 0.075),
    ("tracking", 0.1),
)
SPAN = 4400
"""Positions that texts are spread over: a little more than the longest prompts have."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A stage of the curriculum.

    It is left when the running share of exact answers reaches `solved`, or after `patience` steps. Until then it has
    `share` of the steps, and the three stages before it the rest. `rate` scales the learning rates.
    """

    data: data.Stage
    patience: int
    solved: float = 0.95
    share: float = 0.7
    rate: float = 1.0


CURRICULUM = (
    Step(data.Stage("text-176", 24, 176, 64, 5, SHORT, span=SPAN), 250),
    Step(data.Stage("text-288", 16, 288, 80, 12, TEXTS, noise=0.6, span=SPAN), 350, rate=0.5),
    Step(data.Stage("text-528", 8, 528, 128, 30, TEXTS, noise=0.6, span=SPAN), 350, rate=0.4),
    Step(data.Stage("text-1104", 4, 1104, 200, 72, TEXTS, noise=0.7, span=SPAN), 600, 0.99, rate=0.4),
    Step(data.Stage("text-2064", 2, 2064, 240, 72, TEXTS, noise=0.8, span=SPAN), 1000, 0.99, share=0.4, rate=0.4),
)


def choose_stage(current: int, rng: np.random.Generator) -> int:
    """The current stage or one of the three before it."""
    if current == 0 or rng.random() < CURRICULUM[current].share:
        return current
    return max(0, current - 1 - int(rng.integers(3)))
