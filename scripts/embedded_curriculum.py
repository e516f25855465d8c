"""The stages that the embedded model is trained on, from periodic repeats to needle texts of full length."""

import dataclasses

import embedded_data as data
import numpy as np

LINES = (("lines", 1.0),)
BARE = (("bare", 0.8), ("lines", 0.2))
QUESTIONS = (("lines", 0.3), ("short", 0.4), ("one", 0.3))
TEXTS = (("short", 0.4), ("one", 0.6))
LATER = 0.6


@dataclasses.dataclass(frozen=True)
class Step:
    """A stage of the curriculum.

    It is left when the running share of exact answers reaches `solved`, or after `patience` steps. Until then it has
    `share` of the steps, and the three stages before it the rest. `rate` scales the learning rates.
    """

    data: data.Stage
    solved: float = 0.95
    patience: int = 400
    share: float = 0.7
    rate: float = 1.0


CURRICULUM = (
    Step(data.Stage("periodic", "periodic", batch=64, length=48, targets=38)),
    Step(data.Stage("pairs", "pairs", batch=64, length=34, targets=8)),
    Step(data.Stage("periodic-wide", "periodic", batch=64, length=48, targets=38, pool=2900)),
    Step(data.Stage("pairs-wide", "pairs", 64, 64, 8, pool=10_000, separators=True)),
    Step(data.Stage("pairs-2-1", "pairs", 48, 80, 8, pool=10_000, key_size=2, separators=True), 0.8, 200),
    Step(
        data.Stage("pairs-2-3", "pairs", 40, 112, 24, pool=10_000, key_size=2, value_size=3, separators=True), 0.8, 200
    ),
    Step(data.Stage("lines", "text", 24, 192, 40, max_needles=6, formats=LINES), 0.9, 200),
    Step(data.Stage("bare", "text", 24, 172, 32, max_needles=8, formats=BARE), 0.9, 300, rate=LATER),
    Step(
        data.Stage("questions", "text", 16, 256, 40, max_needles=8, span=512, formats=QUESTIONS, noise=0.3),
        0.7,
        rate=LATER,
    ),
    Step(
        data.Stage("text-288", "text", 16, 288, 48, max_needles=12, span=4400, formats=TEXTS, noise=0.7),
        0.85,
        rate=LATER,
    ),
    Step(
        data.Stage("text-528", "text", 8, 528, 96, max_needles=30, span=4400, formats=TEXTS, noise=0.7),
        0.85,
        150,
        rate=LATER,
    ),
    Step(data.Stage("text-1040", "text", 4, 1040, 160, max_needles=62, formats=TEXTS, noise=0.7), 0.9, rate=LATER),
    Step(
        data.Stage("text-2064", "text", 2, 2064, 240, max_needles=62, formats=TEXTS, noise=0.8), share=0.15, rate=LATER
    ),
)


def choose_stage(current: int, rng: np.random.Generator) -> int:
    """The current stage or one of the three before it."""
    if current == 0 or rng.random() < CURRICULUM[current].share:
        return current
    return max(0, current - 1 - int(rng.integers(3)))


def stage_index(name: str) -> int:
    """The place of a stage in the curriculum."""
    return [step.data.name for step in CURRICULUM].index(name)
