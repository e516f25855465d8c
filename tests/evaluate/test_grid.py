"""Grids: what is refused, and how methods are named with their options."""

import pytest

import restkv_jax as rk
from restkv_jax.evaluate.grid import Grid, check_grid, parse_method, policies


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("singel",)}, "task 'singel' is unknown; did you mean single"),
        ({"methods": ("snapkw",)}, "'snapkw' is unknown; did you mean snapkv"),
        ({"methods": ("restkv(temporl=mean)",)}, "temporl is not an option of method=restkv; did you mean temporal"),
        ({"methods": ("restkv(temporal=never)",)}, "temporal='never' is unknown"),
        ({"methods": ("restkv(",)}, "must be a name, or a name with options"),
        ({"methods": ("full", "full")}, "given twice"),
        ({"tasks": ("single", "single")}, "tasks are given twice"),
        ({"methods": ("restkv(use_output_projection=no)",)}, "use_output_projection='no' must be true or false"),
        ({"dtype": "bf16"}, "dtype 'bf16' is unknown; did you mean bfloat16"),
        ({"budgets": ("much",)}, "budget='much' is not a budget"),
        ({"budgets": ("0.1%",)}, "budget=0.1% of 1,024 tokens is 1 slots: budget=1 must exceed sinks=4"),
        ({"depths": (1.5,)}, "depth 1.5 must be between 0"),
        ({"prompts": 0}, "prompts=0 must be at least 1"),
        ({"lengths": ()}, "lengths is empty"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(changes, message):
    with pytest.raises(ValueError) as error:
        check_grid(Grid(**changes))
    assert message in str(error.value)


def test_options_of_methods_are_names_or_python_values():
    assert parse_method("restkv(temporal=mean, alpha=0.5)") == ("restkv", {"temporal": "mean", "alpha": 0.5})
    assert parse_method("laprox") == ("laprox", {})
    assert parse_method("restkv(use_output_projection=false)").options == {"use_output_projection": False}
    grid = Grid(methods=("restkv(refit=0.1, window=8)", "laprox(candidates=300, page_size=8)"), budgets=("64",))
    refitted, laprox = policies(grid, 1024).values()
    assert refitted == rk.restkv(64, window=8).replace(refit=rk.LeastSquares(0.1))
    assert laprox == rk.laprox(64).replace(candidates=300, page_size=8)


def test_budgets_follow_the_one_rule():
    grid = Grid(methods=("full", "snapkv", "laprox(window=300)"), budgets=("2%", "10%", "2000"))
    check_grid(grid)
    made = {config.label: policy for config, policy in policies(grid, 1100).items()}  # of which 1,280 is the bucket
    assert made["full"] == rk.full()
    assert made["snapkv 2%"] == rk.snapkv(26, window=13)
    assert made["snapkv 10%"] == rk.snapkv(128, window=32)
    assert made["snapkv 2000"] == rk.snapkv(2000)
    assert made["laprox(window=300) 10%"] == rk.laprox(128, window=64)
