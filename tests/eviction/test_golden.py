"""Agreement with arrays computed by the ReST-KV authors' code."""

import functools
import json
import pathlib

import einops
import numpy as np
import pytest
from emulated import is_interpreted

import restkv_jax as rk
from restkv_jax.kernels import scores

GOLDEN = pathlib.Path(__file__).parent / "golden"
POOLING = {"avgpool": "avg", "maxpool": "max", "adaptive": "adaptive", "none": "none"}


@functools.cache
def load(size):
    with np.load(GOLDEN / f"eviction_{size}.npz") as arrays:
        return dict(arrays), json.loads(str(arrays["meta"]))


def policy_of(case):
    c = case["config"]
    budget, window = c["max_capacity_prompt"], c["window_size"]
    if case["method"] == "streamingllm":
        return rk.streaming_llm(budget, sinks=budget - window)
    if case["method"] == "pyramidkv":
        return rk.pyramidkv(budget, window, POOLING[c["pooling"]], c["kernel_size"])
    if case["method"] == "adakv":
        return rk.adakv(budget, window, POOLING[c["pooling"]], c["kernel_size"], c["floor"])
    if case["method"] == "snapkv":
        return rk.snapkv(budget, window, POOLING[c["pooling"]], c["kernel_size"])
    return rk.restkv(
        budget,
        window,
        temporal="ema" if c["use_ema"] else "mean",
        alpha=c["alpha"],
        order=c["metric_mode"],
        pooling=POOLING[c["pooling"]],
        kernel_size=c.get("kernel_size", 5),
        scale=c.get("scale", 2000),
        use_output_projection=c["use_wo"],
        allocation="pyramid" if c.get("use_pyramid") else "uniform",
    )


def cases(adaptive):
    for size in ("small", "medium"):
        for name, case in load(size)[1]["cases"].items():
            if (case["method"] == "adakv") == adaptive:
                yield pytest.param(size, name, id=f"{size}-{name}")


@pytest.mark.parametrize(("size", "name"), cases(adaptive=True))
def test_scores_and_lengths_of_heads(size, name):
    """AdaKV's authors average over the window where SnapKV's sum."""
    arrays, ev = evict(size, name)
    window = load(size)[1]["cases"][name]["config"]["window_size"]
    np.testing.assert_allclose(ev.scores / window, arrays[f"{name}/score"], rtol=1e-4)
    np.testing.assert_array_equal(ev.lengths[0], arrays[f"{name}/kept"])


def evict(size, name):
    arrays, meta = load(size)
    case = meta["cases"][name]
    projection = einops.rearrange(arrays["output_projection"], "m (h d) -> h d m", h=meta["shape"]["H"])
    policy = policy_of(case)
    queries = arrays["query"][:, :, -policy.window :]
    depth = {"layer": meta["layer_idx"], "num_layers": meta["num_hidden_layers"]}
    return arrays, rk.evict_layer(policy, queries, arrays["key"], arrays["value"], projection, **depth)


@pytest.mark.parametrize(("size", "name"), cases(adaptive=False))
def test_scores_and_kept_positions(size, name):
    case = load(size)[1]["cases"][name]
    window = case["config"]["window_size"]
    policy = policy_of(case)
    arrays, ev = evict(size, name)
    if case["method"] != "streamingllm":
        assert policy.window == window
        np.testing.assert_allclose(ev.scores, arrays[f"{name}/score"], rtol=1e-4)
    golden = np.sort(arrays[f"{name}/kept"], axis=-1)
    kept = np.asarray(ev.positions)[..., : golden.shape[-1]]
    assert (np.asarray(ev.positions)[..., golden.shape[-1] :] == -1).all()
    assert_same_sets_but_for_ties(kept, golden, arrays[f"{name}/score"])
    np.testing.assert_array_equal(ev.lengths, golden.shape[-1])
    taken = np.take_along_axis(arrays["key"], kept[..., None], axis=2)
    np.testing.assert_array_equal(ev.keys[:, :, : golden.shape[-1]], taken)


def assert_same_sets_but_for_ties(kept, golden, score):
    """Positions kept by one side only must all score what the worst kept key scores: max pooling makes such ties."""
    for head in range(kept.shape[1]):
        differing = np.setxor1d(kept[0, head], golden[0, head])
        if differing.size:
            prefix = golden[0, head][golden[0, head] < score.shape[-1]]
            np.testing.assert_array_equal(score[0, head, differing], score[0, head, prefix].min())


KERNELS = {
    "snapkv": ("column_sums",),
    "restkv": ("averaged_attention_removal_error", "averaged_removal_error"),
}


def scorers():
    """One case for each of the authors' ways to score, by projected values."""
    found = {}
    for name, case in load("small")[1]["cases"].items():
        config = case["config"]
        if case["method"] in KERNELS and config.get("use_wo", True) and config.get("use_ema", True):
            found.setdefault((case["method"], config.get("metric_mode")), name)
    return found.values()


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_triton"])
@pytest.mark.parametrize("name", scorers())
def test_scores_by_kernels(name, implementation, monkeypatch):
    """Their float32 products go in three passes of bfloat16."""
    for method, kernels in KERNELS.items():
        for kernel in kernels:
            of_kernel = getattr(scores, kernel)
            interpret = is_interpreted(of_kernel.implementations[implementation].platform)
            forced = functools.partial(of_kernel.force(implementation), interpret=interpret)
            monkeypatch.setattr(f"restkv_jax.eviction.methods.{method}.{kernel}", forced)
    arrays, ev = evict("small", name)
    np.testing.assert_allclose(ev.scores, arrays[f"{name}/score"], rtol=1e-4)
