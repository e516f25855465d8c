"""Prefill and decoding of every method on a mesh of emulated devices: collectives of the programs, and results.

`python on_meshes.py 1x8 2x4 8x1` prints one line of JSON per policy and mesh; `test_mesh.py` reads them.
"""

import json
import os
import re
import sys

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

import restkv_jax as rk
from restkv_jax.generation.decoding import feed
from restkv_jax.generation.passes import read_prompt
from restkv_jax.generation.reading import check_and_pad
from restkv_jax.kernels import partition
from restkv_jax.models.mesh import beside, parameter_shardings

CONFIG = dict(
    model_type="llama", vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=4, head_dim=8, max_position_embeddings=512,
    initializer_range=0.3, eos_token_id=None, bos_token_id=None,
)  # fmt: skip
BUDGET, WINDOW, NEW, STEPS = 40, 16, 6, 3
GROUPS = rk.pod.LayerGroups([[0, 0, 0, 0], [0, 1, 0, 1]])
SHARING = rk.pod.Sharing(GROUPS, sink=4, recent=20)
SIZED = {name: preset(budget=BUDGET) for name, preset in rk.METHODS.items() if name != "full"}
POLICIES = {
    "full": rk.full(),
    **{name: policy.replace(window=min(policy.window, WINDOW)) for name, policy in SIZED.items()},
    "before": rk.restkv(BUDGET, WINDOW, order="before"),
    "while_generating": rk.restkv(BUDGET, WINDOW, while_generating=True),
    "shared": rk.full(),
    "shared and evicted": rk.snapkv(BUDGET, WINDOW),
}
EXTENDED = {"full", "restkv", "laprox", "while_generating", "shared", "shared and evicted"}
"""One policy for each kind of cache, on all meshes; the others on the mesh that divides both rows and heads."""
READINGS = [
    ([name for name in POLICIES if not name.startswith("shared")], None),
    (["shared", "shared and evicted"], None),
    (["full", "laprox", "while_generating"], "int8"),
    (["restkv"], "int4"),
    (["shared and evicted"], "int8"),
]
"""What is read at one time, and how it is stored."""
MODEL = rk.build_model(CONFIG)
# No token twice in a row: RoPE turns the keys of equal tokens, whose norms then tie but for rounding.
ROWS = 8
TOKENS = np.stack([np.random.default_rng(row).permutation(CONFIG["vocab_size"])[:100] for row in range(ROWS)])
MASK = np.arange(100) >= np.array([[0], [20], [60], [5], [0], [41], [99], [3]])


def gathered(compiled) -> list[str]:
    """Shapes of what is gathered or moved between devices; all-reduces are not."""
    found = re.findall(r"= (\S+) (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", compiled.as_text())
    return [re.sub(r"\{.*", "", shape) for shape in found]


def run(model, params, names, dtype):
    """By name: logits of prefill, steps and extensions, kept positions, what two programs gather, and the cache."""
    policies, quantisation = tuple(POLICIES[name] for name in names), dtype and rk.Quantisation(dtype, 8, 8)
    prompt = check_and_pad(model, params, TOKENS, MASK, policies, NEW, 64, None, cache_dtype=quantisation)
    arrays = params, *prompt.arrays
    with beside(params):
        reading = read_prompt.lower(prompt.model, *arrays, prompt.plan).compile()
        logits, caches = reading(*arrays)
        moved, read = gathered(reading), jax.device_get(caches)  # steps write into the caches
        return {
            name: (*go_on(model, params, name, logits, cache, dtype), moved, held)
            for name, cache, held in zip(names, caches, read, strict=True)
        }


def go_on(model, params, name, logits, cache, dtype):
    """What follows a reading: the logits, kept positions, and what a step gathers."""
    token, active = jnp.zeros(ROWS, jnp.int32), jnp.ones(ROWS, bool)
    step = feed.lower(model, params, token, cache, active).compile()
    every, kept = [np.asarray(logits)], np.asarray(jax.jit(rk.kept_positions)(cache))
    for _ in range(STEPS):
        logits, cache = step(params, jnp.asarray(every[-1].argmax(-1), jnp.int32), cache, active)
        every.append(np.asarray(logits))
    for judge in (None, POLICIES[name]) if name in EXTENDED and dtype is None else ():
        logits, cache = rk.extend(model, params, TOKENS[:, ::3], MASK[:, ::3], cache, judge, 2)
        every.append(np.asarray(logits))
    return np.stack(every), kept, gathered(step)


def main(meshes: list[str]) -> None:
    params = rk.init_params(MODEL, jax.random.key(0))
    partition.largest_ring = lambda: 4  # 8 devices scatter in two steps, fewer in one
    for names, dtype in READINGS:
        model = MODEL.clone(sharing=SHARING) if names[0].startswith("shared") else MODEL
        expected = run(model, params, names, dtype)
        for mesh in meshes:
            chosen = [name for name in names if mesh == "2x4" or (name in EXTENDED and dtype is None)]
            if chosen:
                placed = jax.device_put(params, parameter_shardings(MODEL, rk.make_mesh(*map(int, mesh.split("x")))))
                for name, (*found, cache) in run(model, placed, chosen, dtype).items():
                    alone = expected[name][:4]
                    if dtype is not None and model is MODEL:
                        # by an ulp a scale is rounded to another bfloat16, so both go on from the pairs of the mesh
                        same = [
                            np.mean(np.isclose(*x, 2**-7))
                            for x in zip(*map(pairs_of, (expected[name][4], cache)), strict=True)
                        ]
                        assert min(same) > 0.995, (name, same)
                        logits, *_ = go_on(model, params, name, alone[0][0], jax.tree.map(jnp.asarray, cache), dtype)
                        alone = logits, *alone[1:]
                    print(json.dumps({"mesh": mesh, "name": name, "dtype": dtype, **compared(found, alone)}))


def pairs_of(cache):
    """Keys and values of every layer, dequantised."""
    layers = [jax.tree.map(jnp.asarray, cache).held(jnp.int32(layer)) for layer in range(2)]
    return [np.stack([np.asarray(getattr(pairs, name)) for pairs in layers]) for name in ("keys", "values")]


def compared(found, expected) -> dict:
    """How a run on a mesh differs from that on one device, and what it moves."""
    logits, kept, in_step, in_reading = found
    logits_alone, kept_alone, _, _ = expected
    error = float(np.abs(logits - logits_alone).max() / np.abs(logits_alone).max())
    tokens_equal = bool((logits.argmax(-1) == logits_alone.argmax(-1)).all())
    common = min(kept.shape[-1], kept_alone.shape[-1])
    same = (kept[..., :common] == kept_alone[..., :common]).all() and (kept[..., common:] == -1).all()
    return dict(error=error, tokens=tokens_equal, kept=bool(same), prefill=in_reading, decode=in_step)


if __name__ == "__main__":
    main(sys.argv[1:])
