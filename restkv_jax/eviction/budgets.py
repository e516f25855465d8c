"""Budgets: slots per layer and KV head, as a number or as a percentage of a prompt's padded length."""

import re

from restkv_jax.models.arguments import check_integer

FORM = 'give a number of tokens such as 128, or a percentage of padded prompts above 0% and up to 100% such as "10%"'


def check_budget(budget: int | str) -> None:
    """Refuses what is neither a number of slots nor a percentage.

    Raises:
      TypeError: neither an integer nor text.
      ValueError: a number below 1, or text that is not a percentage in (0, 100].
    """
    if not isinstance(budget, str):
        if isinstance(budget, float):
            raise TypeError(f"budget={budget!r} is not a budget; {FORM}")
        check_integer("budget", budget, 1, "slots per layer and KV head")
    elif not (re.fullmatch(r"\d+(\.\d+)?%", budget) and 0 < float(budget[:-1]) <= 100):
        raise ValueError(f"budget={budget!r} is not a budget; {FORM}")


def parse_budget(given: int | str) -> int | str:
    """A budget as files and command lines give it: 128, "128" or "10%".

    Raises:
      ValueError: anything else.
    """
    text = str(given)
    if re.fullmatch(r"[1-9]\d*", text):
        return int(text)
    check_budget(text)
    return text


def budget_slots(budget: int | str, length: int) -> int:
    """Slots per layer and KV head.

    Args:
      budget: a number of them, or a percentage.
      length: what a percentage is of, `bucket_length` of the longest prompt of a batch; rounded to the nearest slot,
        and one slot at least.
    """
    return max(1, round(float(budget[:-1]) * length / 100)) if isinstance(budget, str) else int(budget)
