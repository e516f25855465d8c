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
QUANTISED = {
    "full": "int8",
    "restkv": "int4",
    "laprox": "int8",
    "while_generating": "int8",
    "shared and evicted": "int8",
}
"""Which policies run again on a quantised cache: one for each kind of cache."""
MODEL = rk.build_model(CONFIG)
# No token twice in a row: RoPE turns the keys of equal tokens, whose norms then tie but for rounding.
ROWS = 8
TOKENS = np.stack([np.random.default_rng(row).permutation(CONFIG["vocab_size"])[:100] for row in range(ROWS)])
MASK = np.arange(100) >= np.array([[0], [20], [60], [5], [0], [41], [99], [3]])


def gathered(compiled) -> list[str]:
    """Shapes of what is gathered or moved between devices; all-reduces are not."""
    found = re.findall(r"= (\S+) (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", compiled.as_text())
    return [re.sub(r"\{.*", "", shape) for shape in found]


EXTENDED = {"full", "restkv", "laprox", "while_generating", "shared", "shared and evicted"}
"""One policy for each kind of cache."""


def run(model, params, policy, is_extended, cache_dtype=None):
    """Logits of prefill, some steps and two extensions, kept positions, and what the first two programs gather."""
    prompt = check_and_pad(model, params, TOKENS, MASK, (policy,), NEW, 64, None, cache_dtype=cache_dtype)
    token, active = jnp.zeros(ROWS, jnp.int32), jnp.ones(ROWS, bool)
    arrays = params, *prompt.arrays
    with beside(params):
        reading = read_prompt.lower(prompt.model, *arrays, prompt.plan).compile()
        logits, (cache,) = reading(*arrays)
        step = feed.lower(model, params, token, cache, active).compile()
        every, kept = [logits], np.asarray(rk.kept_positions(cache))
        for _ in range(STEPS):
            logits, cache = step(params, jnp.asarray(np.argmax(every[-1], -1), jnp.int32), cache, active)
            every.append(logits)
    for judge in (None, policy) if is_extended else ():
        logits, cache = rk.extend(model, params, TOKENS[:, ::3], MASK[:, ::3], cache, judge, 2)
        every.append(logits)
    return np.stack(every), kept, gathered(reading), gathered(step)


def main(meshes: list[str], names: list[str]) -> None:
    params = rk.init_params(MODEL, jax.random.key(0))
    placed = {}
    partition.largest_ring = lambda: 4  # 8 devices scatter in two steps, fewer in one
    for mesh in meshes:
        sizes = map(int, mesh.split("x"))
        placed[mesh] = jax.device_put(params, parameter_shardings(MODEL, rk.make_mesh(*sizes)))
    runs = [(name, None) for name in names or POLICIES]
    for name, dtype in runs if names else [*runs, *QUANTISED.items()]:
        policy, model = POLICIES[name], MODEL.clone(sharing=SHARING) if name.startswith("shared") else MODEL
        options = policy, name in EXTENDED, dtype and rk.Quantisation(dtype, 8, 8)
        expected, kept_alone, _, _ = run(model, params, *options)
        for mesh in chosen(meshes, name, dtype):
            logits, kept, in_reading, in_step = run(model, placed[mesh], *options)
            error = float(np.abs(logits - expected).max() / np.abs(expected).max())
            tokens_equal = bool((logits.argmax(-1) == expected.argmax(-1)).all())
            common = min(kept.shape[-1], kept_alone.shape[-1])
            same = (kept[..., :common] == kept_alone[..., :common]).all()
            found = dict(error=error, tokens=tokens_equal, kept=bool(same and (kept[..., common:] == -1).all()))
            moved = dict(prefill=in_reading, decode=in_step)
            print(json.dumps(dict(mesh=mesh, name=f"{name} {dtype or ''}", **found, **moved)), flush=True)


def chosen(meshes: list[str], name: str, dtype: str | None) -> list[str]:
    """All meshes for one method of each kind of cache, for the others the mesh that divides both rows and heads."""
    return meshes if name in EXTENDED and dtype is None else [mesh for mesh in meshes if mesh == "2x4"]


if __name__ == "__main__":
    main([x for x in sys.argv[1:] if x[0].isdigit()], [x for x in sys.argv[1:] if not x[0].isdigit()])
