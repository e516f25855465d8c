"""Quantised safetensors: the weights that each layout stands for, and refusals by name."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hugging_face import LLAMA, left_padded, our_logits, random_model, reference_logits, torch
from safetensors.torch import save_file

import restkv_jax as rk
from restkv_jax.models import stored
from restkv_jax.models.quantised import dequantised

CONFIG = LLAMA | {"hidden_size": 64, "intermediate_size": 160, "num_key_value_heads": 2}
FLOAT8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def same_numbers():
    """Scales and codes drawn anew would differ from run to run, and so would the rounding of the logits."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


def linear_layers(model):
    return {name: x for name, x in model.state_dict().items() if "proj" in name}


def write(directory, model, quantise, settings, key="quantization_config"):
    """Writes a model whose projections `quantise` turns into named tensors and the weight that these stand for.

    Returns the model with those weights.
    """
    state = {name: x for name, x in model.state_dict().items() if "proj" not in name}
    reference = random_model(CONFIG)
    for name, weight in linear_layers(model).items():
        parts, meant = quantise(weight)
        state |= {f"{name.removesuffix('.weight')}.{part}": x.contiguous() for part, x in parts.items()}
        reference.get_parameter(name).data = meant.float()
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG | {key: settings}))
    return reference


def agree(directory, reference, atol=3e-5):
    ours, params, _ = rk.load_model(directory, dtype=jnp.float32)
    tokens, mask = left_padded(1, (23, 15), CONFIG["vocab_size"])
    found, expected = our_logits(ours, params, tokens, mask), reference_logits(reference, tokens, mask)
    np.testing.assert_allclose(found[mask], expected[mask], rtol=0, atol=atol)


def grid(weight, rows, columns):
    """The largest magnitude of each block, [⌈r / rows⌉, ⌈c / columns⌉], and the function that spreads such over it."""

    def spread(x):
        return x.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: weight.shape[0], : weight.shape[1]]

    padded = torch.nn.functional.pad(weight.abs(), (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
    return padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).amax((1, 3)), spread


def float8(rows, columns, scale_name, shape=None, dtype=torch.float32):
    def quantise(weight):
        largest, spread = grid(weight, rows or weight.shape[0], columns or weight.shape[1])
        scale = (largest / 448).to(dtype)
        values = (weight / spread(scale.float())).to(FLOAT8)
        stored = scale if shape is None else scale.reshape(shape)
        return {"weight": values, scale_name: stored}, values.float() * spread(scale.float())

    return quantise


BLOCKS = {"quant_method": "fp8", "weight_block_size": [48, 40]}
TENSOR = {"quant_method": "fp8", "activation_scheme": "static"}
FLOATS = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": {}}}
WITH_BLOCKS = FLOATS | {"config_groups": {"group_0": {"weights": {"strategy": "block", "block_structure": [48, 40]}}}}
FLOAT8_LAYOUTS = {
    "blocks": (float8(48, 40, "weight_scale_inv"), BLOCKS),
    "blocks, bfloat16 scales": (float8(48, 40, "weight_scale_inv", dtype=torch.bfloat16), BLOCKS),
    "blocks of 128": (float8(128, 128, "weight_scale_inv"), {"quant_method": "fp8"}),
    "blocks, powers of two": (float8(48, 40, "weight_scale_inv", dtype=torch.float8_e8m0fnu), BLOCKS),
    "tensor": (float8(None, None, "weight_scale_inv", ()), TENSOR | {"weight_block_size": None}),
    "tensor, one number": (float8(None, None, "weight_scale", (1,)), FLOATS),
    "row": (float8(1, None, "weight_scale"), FLOATS),
    "row, flat": (float8(1, None, "weight_scale", (-1,)), {"quant_method": "fbgemm_fp8"}),
    "compressed-tensors, blocks": (float8(48, 40, "weight_scale"), WITH_BLOCKS),
    "nothing said": (float8(1, None, "weight_scale"), None),
}


@pytest.mark.parametrize("name", FLOAT8_LAYOUTS)
def test_floats_of_8_bits(tmp_path, model, name):
    quantise, settings = FLOAT8_LAYOUTS[name]

    def with_scales_of_activations(weight):
        parts, meant = quantise(weight)
        return parts | {"input_scale": torch.tensor(0.5)}, meant

    agree(tmp_path, write(tmp_path, model, with_scales_of_activations, settings))


def packed(values, bits):
    """Natural numbers [r, c] in words of 32 bits [r, ⌈c · bits / 32⌉], bit by bit."""
    rows, columns = values.shape
    words = np.zeros((rows, -(-columns * bits // 32)), np.uint32)
    for (row, column), value in np.ndenumerate(values.numpy().astype(np.uint32)):
        words[row, column * bits // 32] |= value << np.uint32(column * bits % 32)
    return words


def integers(bits, group, symmetric=True, shuffled=False, unordered=False):
    def quantise(weight):
        group_size = group or weight.shape[1]
        order = torch.arange(weight.shape[1]) // group_size
        order = order[torch.randperm(len(order))] if shuffled else order
        scale = torch.rand(weight.shape[0], weight.shape[1] // group_size) * 0.02 + 0.01
        zeros = (
            torch.zeros_like(scale) if symmetric else torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), scale.shape)
        )
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        values = ((weight / scale[:, order]).round() + zeros[:, order]).clamp(low, high)
        words = packed(values - low, bits).view(np.int32)
        parts = {"weight_packed": torch.from_numpy(words), "weight_scale": scale}
        parts["weight_shape"] = torch.tensor(weight.shape)
        if not symmetric:
            parts["weight_zero_point"] = torch.from_numpy(packed((zeros - low).T, bits).view(np.int32).T.copy())
        if shuffled:
            parts["weight_g_idx"] = order.int()
        if unordered:
            parts["weight_g_idx"] = torch.full_like(order, -1).int()
        return parts, (values - zeros[:, order]) * scale[:, order]

    return quantise


PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {}}}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"shuffled": True}, {"unordered": True}])
def test_packed_integers(tmp_path, model, bits, group, options):
    agree(tmp_path, write(tmp_path, model, integers(bits, group, **options), PACKED))


def test_integers_of_8_bits_that_are_not_packed(tmp_path, model):
    def quantise(weight):
        scale = weight.abs().amax(1, keepdim=True) / 127
        values = (weight / scale).round()
        return {"weight": values.to(torch.int8), "weight_scale": scale}, values * scale

    agree(tmp_path, write(tmp_path, model, quantise, PACKED | {"format": "int-quantized"}))


@pytest.mark.parametrize("order", ["plain", "shuffled", "never stored"])
def test_integers_of_8_bits_with_a_scale_for_each_group_of_columns(tmp_path, model, order):
    def quantise(weight):
        groups = torch.arange(weight.shape[1]) // 32
        groups = groups[torch.randperm(len(groups))] if order == "shuffled" else groups
        scale = torch.rand(weight.shape[0], weight.shape[1] // 32) * 0.002 + 0.001
        values = (weight / scale[:, groups]).round().clamp(-128, 127)
        stored = {"shuffled": groups.int(), "never stored": torch.full_like(groups, -1).int()}
        parts = {"weight": values.to(torch.int8), "weight_scale": scale}
        return parts | ({"weight_g_idx": stored[order]} if order in stored else {}), values * scale[:, groups]

    agree(tmp_path, write(tmp_path, model, quantise, PACKED | {"format": "int-quantized"}))


@pytest.mark.parametrize("bits, strategy, symmetric", [(4, "group", True), (4, "group", False), (8, "channel", True)])
def test_what_compressed_tensors_packs(tmp_path, model, bits, strategy, symmetric):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    size = 32 if strategy == "group" else None
    weights = {"num_bits": bits, "strategy": strategy, "group_size": size, "symmetric": symmetric}
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=quantization.QuantizationArgs(**weights))

    def quantise(weight):
        shape = (weight.shape[0], weight.shape[1] // (size or weight.shape[1]))
        state = {"weight": weight, "weight_scale": torch.rand(shape) * 0.02 + 0.01}
        state["weight_zero_point"] = torch.randint(-3, 4, shape).to(torch.int8) * (not symmetric)
        parts = compressors.PackedQuantizationCompressor.compress(state, scheme)
        return parts, compressors.PackedQuantizationCompressor.decompress(dict(parts), scheme)["weight"]

    settings = PACKED | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    agree(tmp_path, write(tmp_path, model, quantise, settings))


def mlx(bits, group):
    def quantise(weight):
        scales, biases = (torch.randn(weight.shape[0], weight.shape[1] // group) * 0.1 for _ in range(2))
        scales /= 2**bits
        values = torch.randint(0, 2**bits, weight.shape)
        spread = torch.arange(weight.shape[1]) // group
        words = torch.from_numpy(packed(values, bits))
        return {"weight": words, "scales": scales, "biases": biases}, values * scales[:, spread] + biases[:, spread]

    return quantise


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
@pytest.mark.parametrize("bits, group", [(4, 32), (8, 32), (2, 16)])
def test_mlx(tmp_path, model, bits, group, key):
    agree(tmp_path, write(tmp_path, model, mlx(bits, group), {"group_size": group, "bits": bits}, key))


@pytest.mark.parametrize("bits", [4, 8])
def test_what_mlx_quantises(tmp_path, model, bits):
    mx = pytest.importorskip("mlx.core")

    def quantise(weight):
        parts = mx.quantize(mx.array(weight.numpy()), group_size=32, bits=bits)
        meant = torch.from_numpy(np.array(mx.dequantize(*parts, group_size=32, bits=bits)))
        words, scales, biases = (torch.from_numpy(np.array(part)) for part in parts)
        return {"weight": words, "scales": scales, "biases": biases}, meant

    agree(tmp_path, write(tmp_path, model, quantise, {"group_size": 32, "bits": bits}, "quantization"))


def test_mlx_groups_may_differ_by_layer(tmp_path, model):
    reference = write(tmp_path, model, mlx(4, 16), {"group_size": 32, "bits": 4}, "quantization")
    modules = [name.removesuffix(".weight") for name in linear_layers(model)]
    settings = {"group_size": 32, "bits": 4} | {module: {"group_size": 16, "bits": 4} for module in modules}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"quantization": settings}))
    agree(tmp_path, reference)


def test_rows_are_read_in_chunks(tmp_path, model, monkeypatch):
    monkeypatch.setattr(stored, "CHUNK", 1000)
    for i, (quantise, settings) in enumerate(
        [FLOAT8_LAYOUTS["blocks"], (integers(4, 32, symmetric=False), PACKED), (mlx(4, 32), {"group_size": 32})]
    ):
        directory = tmp_path / str(i)
        directory.mkdir()
        agree(directory, write(directory, model, quantise, settings))


def changed(quantise, **changes):
    """The layout with parts replaced, or left out where the replacement is None."""

    def change(weight):
        parts, meant = quantise(weight)
        parts |= {name: x(parts[name]) if callable(x) else x for name, x in changes.items()}
        return {name: x for name, x in parts.items() if x is not None}, meant

    return change


REFUSED = {
    "no scale": (changed(FLOAT8_LAYOUTS["row"][0], weight_scale=None), FLOATS, "F8_E4M3 without a weight_scale"),
    "other scales": (
        changed(FLOAT8_LAYOUTS["blocks"][0], weight_scale_inv=lambda _: torch.ones(7, 3)),
        BLOCKS,
        r"of shape \(64, 160\) has scales of shape \(7, 3\), not \(2, 4\)",
    ),
    "empty blocks": (FLOAT8_LAYOUTS["blocks"][0], BLOCKS | {"weight_block_size": [0, 40]}, "blocks of 0 x 40 weights"),
    "a list": (FLOAT8_LAYOUTS["row"][0], FLOATS | {"config_groups": [1]}, "cannot be read from config.json"),
    "nvfp4": (integers(4, 32), PACKED | {"format": "nvfp4-pack-quantized"}, "'nvfp4-pack-quantized' are not supported"),
    "3 bits": (
        changed(integers(4, 32), weight_packed=lambda x: x[:, : x.shape[1] * 3 // 4]),
        PACKED,
        "columns into .* words, 3 bits each",
    ),
    "another shape": (
        changed(integers(8, None), weight_scale=lambda x: x[:5]),
        PACKED,
        r"weight_packed' has scales of shape \(5, 1\), expected",
    ),
    "no shape": (changed(integers(4, 32), weight_shape=None), PACKED, r"packed as I32, \['weight_shape'\]"),
    "transforms": (integers(4, 32), PACKED | {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
    "sparse": (integers(4, 32), PACKED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    "mxfp4 of MLX": (mlx(4, 32), {"group_size": 32, "mode": "mxfp4"}, "mode='mxfp4'"),
    "no biases": (changed(mlx(4, 32), biases=None), {"group_size": 32}, "scales without biases"),
    "other groups": (mlx(4, 32), {"group_size": 64}, "wrong shape: found"),
    "gptq": (integers(4, 32), {"quant_method": "gptq"}, "quantised"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_by_name(tmp_path, model, name):
    quantise, settings, message = REFUSED[name]
    write(tmp_path, model, quantise, settings)
    with pytest.raises(ValueError, match=message) as caught:
        rk.load_model(tmp_path)
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


def test_a_model_that_is_not_quantised_is_left_alone():
    tensors = {"a.weight": stored.StoredTensor((3, 2), "BF16", lambda rows: np.zeros((3, 2), ml_dtypes.bfloat16)[rows])}
    assert dequantised({"a": 1}, tensors, "here") == ({"a": 1}, tensors)
