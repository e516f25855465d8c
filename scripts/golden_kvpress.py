"""Writes tests/eviction/golden/kvpress.npz: what kvpress 0.5.5 scores and keeps on fixed inputs.

It runs once, in an environment of its own, for kvpress wants other versions than this project:

    python -m venv kvpress-env
    kvpress-env/bin/pip install torch==2.13.0 "transformers==5.2.*"
    kvpress-env/bin/pip install requests "cachetools<6" datasets "pandas<3" fire
    kvpress-env/bin/pip install --no-deps kvpress==0.5.5
    kvpress-env/bin/python scripts/golden_kvpress.py

Every case is one prompt in one attention layer of a random Llama or Qwen 3, in float64 but for what the presses
themselves compute in float32. An array `CASE/NAME` in float32:

- `query` [H, T, D], `key` [K, T, D], `value` [K, T, D]: after RoPE.
- `frequencies` [D / 2]: of the rotation.
- `sketch` [K, D, S]: drawn by the press, for Compactor.
- `score` [K, T] and `kept` [K, C]: the press's own.

`meta` is a JSON string: per case its `method`, the `options` of the press and the budget `C`.
"""
# pyright: reportMissingImports=false, reportCallIssue=false, reportAttributeAccessIssue=false

import json
import math
import pathlib

import numpy as np
import torch
from kvpress import CompactorPress, ExpectedAttentionPress, KeyDiffPress
from kvpress.utils import get_prerope_key_states, get_prerope_query_states
from transformers import LlamaConfig, LlamaModel, Qwen3Config, Qwen3Model
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

PRESSES = {"keydiff": KeyDiffPress, "expected_attention": ExpectedAttentionPress, "compactor": CompactorPress}
CASES = {  # name: model, press, tokens, options
    "keydiff": ("llama", "keydiff", 60, {"compression_ratio": 0.5}),
    "keydiff_few": ("qwen3", "keydiff", 80, {"compression_ratio": 0.8}),
    "expected_attention": ("llama", "expected_attention", 90, {"compression_ratio": 0.5}),
    "expected_attention_qwen3": ("qwen3", "expected_attention", 70, {"compression_ratio": 0.7}),
    "expected_attention_mean": (
        "llama",
        "expected_attention",
        60,
        {"compression_ratio": 0.5, "use_covariance": False, "n_future_positions": 64, "epsilon": 0.02},
    ),
    "expected_attention_no_values": (
        "llama",
        "expected_attention",
        60,
        {"compression_ratio": 0.5, "use_vnorm": False, "n_sink": 2},
    ),
    "compactor": ("llama", "compactor", 150, {"compression_ratio": 0.5}),
    "compactor_chunks": ("llama", "compactor", 12 + 96, {"compression_ratio": 0.6, "chunk_size": 32}),
    "compactor_last_chunk": (
        "qwen3",
        "compactor",
        100,
        {"compression_ratio": 0.4, "chunk_size": 32, "sketch_dimension": 10, "blending": 0.35},
    ),
}
SHAPE = dict(
    vocab_size=32, hidden_size=48, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, head_dim=16
)


def layer_of(kind: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The attention of a random model, with its rotation as presses expect it, and the model."""
    config, model = {"llama": (LlamaConfig, LlamaModel), "qwen3": (Qwen3Config, Qwen3Model)}[kind]
    rope = {"rope_type": "default", "rope_theta": 1000.0}
    model = model(config(**SHAPE, num_key_value_heads=2, initializer_range=0.15, rope_parameters=rope)).double()
    layer = model.layers[0].self_attn
    layer.rotary_emb = model.rotary_emb
    return layer, model


def case(kind: str, method: str, length: int, options: dict, seed: int) -> tuple[dict, int] | None:
    """The arrays of a case and its budget; None where the press evicts the last token, which we always keep."""
    torch.manual_seed(seed)
    layer, model = layer_of(kind)
    # neighbours are alike, some tokens stand out
    hidden = torch.randn(1, length, SHAPE["hidden_size"], dtype=torch.float64).cumsum(1) * 0.1
    hidden += torch.randn_like(hidden) * (1 + 2 * (torch.rand(1, length, 1) > 0.8))
    rotation = model.rotary_emb(hidden, torch.arange(length)[None])
    rotation = tuple(x.double() for x in rotation)
    query, key = get_prerope_query_states(layer, hidden), get_prerope_key_states(layer, hidden)
    query, key = apply_rotary_pos_emb(query, key, *rotation)
    value = layer.v_proj(hidden).view(1, length, 2, -1).transpose(1, 2)
    press = PRESSES[method](**options)
    given = layer, hidden, key, value, None, {"position_embeddings": rotation}
    torch.manual_seed(seed + 1)
    score = press.score(*given)[0]
    torch.manual_seed(seed + 1)
    pressed = press.compress(*given)[0]
    kept = (pressed[0, :, :, None] == key[0, :, None]).all(-1).int().argmax(-1).sort(-1).values
    window = 4 if method == "compactor" else 1
    if not (kept[:, -window:] == torch.arange(length - window, length)).all():
        return None
    arrays = {"query": query[0], "key": key[0], "value": value[0], "score": score, "kept": kept}
    arrays["frequencies"] = model.rotary_emb.inv_freq
    if method == "compactor":
        torch.manual_seed(seed + 1)
        size = press.sketch_dimension
        arrays["sketch"] = torch.randn(1, 2, 16, size, dtype=key.dtype)[0] / math.sqrt(size)
    return {name: x.detach().numpy() for name, x in arrays.items()}, pressed.shape[2]


def main() -> None:
    """Makes all cases, each with the first seed that it is possible with."""
    stored, meta = {}, {}
    for name, (kind, method, length, options) in CASES.items():
        made = next(made for seed in range(0, 1000, 2) if (made := case(kind, method, length, options, seed)))
        for array, x in made[0].items():
            stored[f"{name}/{array}"] = x.astype(np.int32 if array == "kept" else np.float32)
        meta[name] = {"method": method, "options": options, "budget": made[1]}
    path = pathlib.Path(__file__).parents[1] / "tests" / "eviction" / "golden" / "kvpress.npz"
    np.savez_compressed(path, meta=json.dumps(meta), **stored)
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
