"""Policies by name, as command lines and files give them."""

import pytest

import restkv_jax as rk
from restkv_jax.eviction.presets import make_policy


def test_the_width_of_the_smoothing_is_the_authors_for_a_benchmark():
    assert rk.restkv() == rk.restkv(benchmark="infinitebench") == rk.restkv(kernel_size=21)
    assert rk.restkv(benchmark="longbench") == rk.restkv(benchmark="needle") == rk.restkv(kernel_size=5)
    assert rk.restkv(benchmark="longbench", kernel_size=11) == rk.restkv(kernel_size=11)


@pytest.mark.parametrize("name", rk.METHODS)
def test_every_method_is_made_from_its_name(name):
    assert make_policy(name, {}) == rk.METHODS[name]()


def test_options_are_those_of_the_preset_and_of_any_policy():
    options = {"budget": "10%", "window": 8, "refit": 0.1, "candidates": 300, "page_size": 8}
    expected = rk.snapkv(100, 8).replace(refit=rk.LeastSquares(0.1), candidates=300, page_size=8)
    assert make_policy("snapkv", options).resolved(1000) == expected
    assert make_policy("best", {"refit": None}) == rk.best().replace(refit=None)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("restvk", {}, "method='restvk' is unknown; did you mean restkv"),
        ("snapkv", {"windw": 8}, "windw is not an option of method=snapkv; did you mean window"),
        ("full", {"budget": 8}, "budget is not an option of method=full"),
        ("restkv", {"use_output_projection": "no"}, "use_output_projection='no' must be true or false"),
        ("restkv", {"kernel_size": 4}, "kernel_size=4 must be odd"),
        ("restkv", {"budget": "ten%"}, "budget='ten%' is not a budget"),
        ("laprox", {"budget": 2.5}, "budget='2.5' is not a budget"),
        ("restkv", {"benchmark": "rouler"}, "benchmark='rouler' is unknown; choose from 'ruler'"),
        ("restkv", {"refit": 0}, "ridge=0 must be above 0"),
        ("best", {"refit": 0.1}, "best has a correction of its own; give its ridge"),
    ],
)
def test_bad_options_are_named(method, options, message):
    with pytest.raises(ValueError, match=message):
        make_policy(method, options)
