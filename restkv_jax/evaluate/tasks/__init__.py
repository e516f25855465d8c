"""Prompts in the text format of RULER's tasks (Hsieh et al. 2024), sized in tokens of any tokenizer."""

from restkv_jax.evaluate.tasks.making import TASKS, make_prompts

__all__ = ["TASKS", "make_prompts"]
