"""GGUF files of small models, written as llama.cpp's converter writes them."""

import pathlib
from collections.abc import Callable

import gguf
import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

TEMPLATE = "{% for m in messages %}<|s|>{{ m['role'] }}: {{ m['content'] }}<|e|>{% endfor %}"
BYTE_LEVEL = ["<|e|>", "<|s|>", "<|x|>", *"heloĠ", "he", "ll", "Ġhe", "Ġhell", "Ġhello"]
BYTE_LEVEL += [character for character in bytes_to_unicode().values() if character not in "heloĠ"]
MERGES = ["h e", "l l", "Ġ he", "Ġhe ll", "Ġhell o"]
SENTENCEPIECE = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"ehlotw", "▁t", "he", "▁the"]


def write_gguf(
    path: pathlib.Path,
    config: dict,
    tensors: dict[str, np.ndarray],
    fields: dict | None = None,
    without: tuple[str, ...] = (),
    quantisation: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    tokenizer: Callable[[gguf.GGUFWriter, int], None] | None = None,
) -> pathlib.Path:
    """Writes a file.

    Args:
      path: of the file.
      config: of transformers.
      tensors: by their Hugging Face names.
      fields: further ones, by name and of the types float, int, str, bool or list, or other values of those there.
      without: names of fields that are left out.
      quantisation: of all matrices.
      tokenizer: writes it; a byte-level one by default.
    """
    architecture = config["model_type"].replace("mistral", "llama")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    numbers = {
        f"{architecture}.block_count": config["num_hidden_layers"],
        f"{architecture}.context_length": config["max_position_embeddings"],
        f"{architecture}.embedding_length": config["hidden_size"],
        f"{architecture}.feed_forward_length": config["intermediate_size"],
        f"{architecture}.attention.head_count": heads,
        f"{architecture}.attention.head_count_kv": kv_heads,
        f"{architecture}.attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        f"{architecture}.vocab_size": config["vocab_size"],
    }
    if "head_dim" in config:
        sizes = ("attention.key_length", "attention.value_length", "rope.dimension_count")
        numbers |= {f"{architecture}.{name}": config["head_dim"] for name in sizes}
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in (numbers | (fields or {})).items():
        if name not in without:
            _add(writer, name, value)
    (tokenizer or byte_level)(writer, config["vocab_size"])
    for name, tensor in _renamed(config, architecture, tensors).items():
        kind = quantisation if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _renamed(config: dict, architecture: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors by their names in GGUF, the rows of Llama's queries and keys in llama.cpp's order."""
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    renamed = {}
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        for projection, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if architecture == "llama" and module.endswith(projection):
                halves = tensor.reshape(config[heads], 2, -1, *tensor.shape[1:])
                tensor = np.ascontiguousarray(np.moveaxis(halves, 1, 2).reshape(tensor.shape))
        known = names.get_name(module)
        renamed[name if known is None else f"{known}.{suffix}"] = tensor
    return renamed


def _add(writer: gguf.GGUFWriter, name: str, value: bool | int | float | str | list) -> None:
    if isinstance(value, list):
        writer.add_array(name, value)
    else:
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kinds[type(value)](name, value)


def byte_level(writer: gguf.GGUFWriter, vocab_size: int, splits: str = "qwen2") -> None:
    """A byte-level tokenizer, filled up or cut to the size of the vocabulary, at least 13; `splits` names its rule."""
    tokens = (BYTE_LEVEL + [f"<|unused{i}|>" for i in range(vocab_size)])[:vocab_size]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splits)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)


def sentencepiece(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """A tokenizer of sentencepiece, of which the file gives scores instead of merges."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(SENTENCEPIECE)
    writer.add_token_scores([-float(i) for i in range(len(SENTENCEPIECE))])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(SENTENCEPIECE) - 259)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def no_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """Nothing."""
