"""The text of a row as its tokens come: whole characters, stop strings."""

import functools
import importlib.resources
import itertools
import pathlib

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from restkv_jax.generation.detokenising import RowText, StopStrings, TokenDecoder
from restkv_jax.models.gguf import read_gguf
from restkv_jax.models.tokenizer import load_tokenizer

SMOLLM2 = pathlib.Path.home() / ".cache" / "restkv-jax" / "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = st.text(
    st.sampled_from("ab .,\n日本語한국어éñ👋🏽👨\u200d👩\u200d👧🇫🇷e\u0301\u0302ßع") | st.characters(codec="utf-8"),
    max_size=40,
)


def with_byte_fallback():
    """Words with a mark for the space before them, all else as bytes: as Llama 2's."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "a", "b"]
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")


@functools.cache
def tokenizer(name):
    if name == "embedded":
        return load_tokenizer(str(importlib.resources.files("restkv_jax") / "embedded"))
    if name == "smollm2":
        return read_gguf(SMOLLM2).tokenizer if SMOLLM2.is_file() else pytest.skip("SmolLM2 is not at hand")
    return {"bytes": tiny.tokenizer, "byte fallback": with_byte_fallback}[name]()


def pieces_of(name, ids):
    decoder = TokenDecoder(tokenizer(name))
    return [*map(decoder.push, ids), decoder.finish()]


@pytest.mark.parametrize("name", ["embedded", "bytes", "byte fallback", "smollm2"])
@given(text=TEXTS)
@settings(max_examples=60, deadline=None)
def test_pieces_are_whole_characters_and_make_up_the_text(name, text):
    ids = tokenizer(name)(text)["input_ids"]
    whole = tokenizer(name).decode(ids, skip_special_tokens=True)
    pieces = pieces_of(name, ids)
    assert "".join(pieces) == whole
    assert "\ufffd" in whole or pieces[-1] == ""  # nothing is held back at the end of a whole character


@pytest.mark.parametrize("name", ["embedded", "bytes", "smollm2"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_tokens_that_are_not_text_give_what_decode_gives(name, data):
    ids = data.draw(st.lists(st.integers(0, len(tokenizer(name)) - 1), max_size=30))
    assert "".join(pieces_of(name, ids)) == tokenizer(name).decode(ids, skip_special_tokens=True)


def test_bytes_after_whole_characters_do_not_take_them_back():
    fallback = tokenizer("byte fallback")
    ids = fallback.convert_tokens_to_ids(["▁a", "<0xC3>", "<0xA9>", "<0xF0>", "b", "▁a"])
    assert fallback.decode(ids) == "a\ufffd\ufffd\ufffdb a"
    pieces = pieces_of("byte fallback", ids)
    assert pieces[:3] == ["a", "", "é"]
    assert "".join(pieces).startswith("aé\ufffd") and "".join(pieces).endswith("b a")


def test_spaces_and_characters_of_several_tokens():
    assert pieces_of("bytes", tiny.tokenizer()("a é")["input_ids"]) == ["a", " ", "", "é", ""]
    words = with_byte_fallback().convert_tokens_to_ids(["▁a", "▁a", "▁", "▁a", "</s>"])
    assert pieces_of("byte fallback", words) == ["a", " a", " ", " a", "", ""]


def before_stop(text, stop):
    """By the definition: the first character with which the text contains a stop string, the longest that it ends."""
    for end in range(len(text) + 1):
        whole = [string for string in stop if text[:end].endswith(string)]
        if whole:
            return text[: end - max(map(len, whole))]
    return text


@given(
    text=st.text("abc", max_size=20),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3).map(tuple),
    cuts=st.lists(st.integers(0, 20)),
)
@settings(max_examples=300, deadline=None)
def test_stop_strings_in_any_pieces(text, stop, cuts):
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    found = StopStrings(stop)
    given_so_far = "".join(found.push(text[a:b]) for a, b in itertools.pairwise(places))
    assert given_so_far + found.finish() == before_stop(text, stop)
    assert found.found == any(string in text for string in stop)


def test_only_what_may_be_a_stop_string_is_held_back():
    found = StopStrings(("END", "\n\n"))
    pieces = [found.push(piece) for piece in ("a E", "N", "G\n", "b", " EN", "D c")]
    assert pieces == ["a ", "", "ENG", "\nb", " ", ""]
    assert (found.found, found.finish(), found.push("d")) == (True, "", "")


def test_an_end_token_gives_what_is_held_back():
    row = RowText(tokenizer("bytes"), ("xyz",))
    pieces = [row.push(token, token != 2) for token in [*tokenizer("bytes")("a xy")["input_ids"], 2, 0]]
    assert (pieces, row.text, row.ended) == (["a", " ", "", "", "xy", ""], "a xy", True)
    assert row.tokens[-1] == 2
