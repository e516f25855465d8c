"""Needle tasks and how well a model with an evicted cache answers them."""

from restkv_jax.evaluate.accuracy import Accuracy, generate_texts, is_exact, measure_accuracy, wilson_interval
from restkv_jax.evaluate.tasks import TASKS, Prompt, Task, make_prompts

__all__ = [
    "TASKS",
    "Accuracy",
    "Prompt",
    "Task",
    "generate_texts",
    "is_exact",
    "make_prompts",
    "measure_accuracy",
    "wilson_interval",
]
