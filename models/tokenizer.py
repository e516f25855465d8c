"""Tokenizers of transformers, loaded from data alone: code of a checkpoint never runs."""

import importlib.util
import os
import pathlib
import warnings
from typing import Any

from restkv_jax.models.files import one_line, read_json, refuse_pointer

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
FILES = (*VOCABULARIES, *SETTINGS, "merges.txt", "chat_template.*", "additional_chat_templates")
"""Patterns of all that a tokenizer may be in."""
SENTENCEPIECE = 'install what reads it with `pip install "transformers[sentencepiece,tiktoken]"`'


def load_tokenizer(path_or_id: str | os.PathLike) -> Any:
    """Loads the tokenizer of a directory or of a model on the Hugging Face hub.

    Args:
      path_or_id: a directory, or a model id, whose tokenizer is downloaded.

    Returns:
      the tokenizer of `transformers`.

    Raises:
      FileNotFoundError: a directory without one.
      ValueError: one line that names the file: a tokenizer that needs code of the checkpoint, has no vocabulary or is
        damaged, a package that is not installed.
    """
    directory = pathlib.Path(path_or_id)
    if not directory.is_dir():
        return _from_transformers(path_or_id, str(path_or_id))
    settings = read_json(directory / SETTINGS[0]) if (directory / SETTINGS[0]).is_file() else {}
    _refuse_code(directory / SETTINGS[0], settings.get("auto_map"))
    vocabulary = next((directory / name for name in VOCABULARIES if (directory / name).is_file()), None)
    if vocabulary is None:
        raise _no_vocabulary(directory)
    refuse_pointer(vocabulary)
    if vocabulary.name == "vocab.json" and (directory / "merges.txt").is_file():
        refuse_pointer(directory / "merges.txt")
    _check_packages(vocabulary)
    tokenizer = _from_transformers(directory, str(vocabulary), config=_bare_config(directory), local_files_only=True)
    if not set(tokenizer.get_vocab()) - {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}:
        raise ValueError(f"{vocabulary} gives the tokenizer no vocabulary; add the tokenizer.json of the model")
    return tokenizer


def tokenizer_beside(directory: pathlib.Path) -> Any | None:
    """The tokenizer beside a model's weights; None, with a warning, where there is none.

    Raises:
      ValueError: as `load_tokenizer`.
    """
    try:
        return load_tokenizer(directory)
    except FileNotFoundError as error:
        warnings.warn(f"{error}; load_model returns None for it", stacklevel=4)
        return None


def _from_transformers(path_or_id: str | os.PathLike, source: str, **options: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_id, trust_remote_code=False, **options)
        tokenizer("")  # settings of the wrong type show only in use
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    # the Rust library behind tokenizers panics with an exception of its own, which is not an Exception
    except BaseException as error:
        raise ValueError(
            f"the tokenizer of {source} cannot be loaded: {type(error).__name__}: {one_line(error)[:500]}"
        ) from error


def _bare_config(directory: pathlib.Path) -> Any:
    """A config for the choice of the tokenizer's class, without the fields that have no say in it."""
    from transformers import AutoConfig, PreTrainedConfig

    fields = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
    try:
        config = AutoConfig.for_model(str(fields.get("model_type")))
    except ValueError:
        config = PreTrainedConfig()
    if isinstance(fields.get("tokenizer_class"), str):
        config.tokenizer_class = fields["tokenizer_class"]
    return config


def _refuse_code(path: pathlib.Path, auto_map: Any) -> None:
    code = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    if code:
        raise ValueError(
            f"{path} names code of the checkpoint for its tokenizer (auto_map: {str(code)[:200]}): refused, since it "
            "would run here; where its tokenizer.json is enough, remove auto_map, and set tokenizer_class to "
            "PreTrainedTokenizerFast"
        )


def _no_vocabulary(directory: pathlib.Path) -> Exception:
    if (directory / "tekken.json").is_file():
        return ValueError(
            f"{directory / 'tekken.json'} is the only vocabulary, in Mistral's own format, which is not supported; add "
            "the tokenizer.json of the model"
        )
    found = ", ".join(name for name in SETTINGS if (directory / name).is_file())
    alone = f" ({found} alone is not enough)" if found else ""
    return FileNotFoundError(f"{directory} has no tokenizer{alone}; add the model's tokenizer.json")


def _check_packages(vocabulary: pathlib.Path) -> None:
    """transformers reads `tokenizer.model` by one of two packages, depending on what is in it."""
    if vocabulary.suffix == ".model" and not (_installed("sentencepiece") or _installed("tiktoken")):
        raise ValueError(f"{vocabulary} is the only vocabulary; {SENTENCEPIECE}, or add the model's tokenizer.json")


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
