"""Prompts in RULER's format, how a model with an evicted cache answers them, and how far its layers' outputs move."""

from restkv_jax.evaluate.accuracy import (
    Accuracy,
    generate_texts,
    is_exact,
    match_share,
    measure_accuracy,
    wilson_interval,
)
from restkv_jax.evaluate.reconstruction import reconstruction_errors
from restkv_jax.evaluate.tasks.making import TASKS, make_prompts
from restkv_jax.evaluate.tasks.needles import Chain, Needles
from restkv_jax.evaluate.tasks.prompts import Prompt, Task
from restkv_jax.evaluate.tasks.words import CommonWords, FrequentWords

__all__ = [
    "TASKS",
    "Accuracy",
    "Chain",
    "CommonWords",
    "FrequentWords",
    "Needles",
    "Prompt",
    "Task",
    "generate_texts",
    "is_exact",
    "make_prompts",
    "match_share",
    "measure_accuracy",
    "reconstruction_errors",
    "wilson_interval",
]
