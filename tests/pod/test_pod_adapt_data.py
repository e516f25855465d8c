"""Sequences from text and arrays: how they are packed, in what order they come, and what is refused."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from restkv_jax.pod import Adaptation
from restkv_jax.pod.adaptation.data import batches, make_batch, read_sequences

BOS, EOS = tiny.CONFIG["bos_token_id"], tiny.CONFIG["eos_token_id"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_text_is_packed_with_an_end_after_every_document(tokenizer, tmp_path):
    (tmp_path / "one.txt").write_text("Sky.\r\nGrass.")
    (tmp_path / "two.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("here", "wé go")))
    paths = [tmp_path / "one.txt", tmp_path / "two.jsonl"]
    sequences = read_sequences(paths, 7, 100, tokenizer, tmp_path / "run")
    texts = ("Sky.\r\nGrass.", "here", "wé go")
    expected = [id for text in texts for id in [*encode(tokenizer, text), EOS]]
    assert sequences.tokens.shape == (len(expected) // 7, 7)
    np.testing.assert_array_equal(sequences.tokens.ravel(), expected[: sequences.tokens.size])
    np.testing.assert_array_equal(read_sequences(paths, 7, 100, tokenizer).tokens, sequences.tokens)


def test_begin_where_the_tokenizer_adds_it(tokenizer, tmp_path):
    class Beginning:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, text, add_special_tokens=True, **options):
            ids = encode(tokenizer, text)
            return {"input_ids": [BOS, *ids] if add_special_tokens else ids}

    (tmp_path / "text.txt").write_text("Sky")
    sequences = read_sequences(tmp_path / "text.txt", 5, 100, Beginning())
    np.testing.assert_array_equal(sequences.tokens[0], [BOS, *encode(tokenizer, "Sky"), EOS])


def test_text_is_encoded_once_and_again_when_it_changes(tokenizer, tmp_path):
    calls = []

    class Counting:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, text, **options):
            calls.append(text)
            return tokenizer(text, **options)

    path = tmp_path / "text.txt"

    def read():
        calls.clear()
        return read_sequences(path, 4, 100, Counting(), tmp_path / "run").tokens, "".join(calls)

    path.write_text("The sky.\n" * 3)
    assert read()[1] == "The sky.\n" * 3
    tokens, text = read()
    assert text == "" and isinstance(tokens, np.memmap)
    path.write_text("The grass.\n")
    assert read()[1] == "The grass.\n"


def test_a_long_text_goes_in_pieces_and_is_the_same(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("The sky is blue.\nThe grass is green.\n" * 20)
    whole = read_sequences(tmp_path / "text.txt", 50, 100, tokenizer).tokens
    monkeypatch.setattr("restkv_jax.pod.adaptation.text.PIECE", 30)
    np.testing.assert_array_equal(read_sequences(tmp_path / "text.txt", 50, 100, tokenizer).tokens, whole)


def test_arrays_are_mapped_and_what_is_left_is_not_used(tmp_path):
    ids = np.arange(100, dtype=np.uint16)
    np.save(tmp_path / "ids.npy", ids)
    np.save(tmp_path / "rows.npy", ids.reshape(10, 10))
    packed = read_sequences(tmp_path / "ids.npy", 30, 100)
    assert isinstance(packed.tokens, np.memmap)
    np.testing.assert_array_equal(packed.tokens, ids[:90].reshape(3, 30))
    rows = read_sequences(str(tmp_path / "rows.npy"), None, 100)
    np.testing.assert_array_equal(rows[3]["tokens"], ids[30:40])
    assert rows[3]["tokens"].dtype == np.int32 and (rows[3]["weights"] == 1).all()


def test_arrays_of_jax_are_arrays():
    tokens = np.arange(40).reshape(4, 10)
    for data in (jnp.asarray(tokens), {"tokens": jnp.asarray(tokens), "weights": jnp.ones((4, 10))}):
        np.testing.assert_array_equal(read_sequences(data, None, 100)[2]["tokens"], tokens[2])


def test_weights_of_tokens(tmp_path):
    weights = np.linspace(0, 1, 40).reshape(4, 10)
    np.savez(tmp_path / "answers.npz", tokens=np.ones((4, 10), int), weights=weights)
    sequences = read_sequences(tmp_path / "answers.npz", None, 100)
    np.testing.assert_array_equal(sequences[2]["weights"], weights[2].astype(np.float32))


def test_every_pass_has_all_sequences_in_another_order():
    sequences = read_sequences(np.arange(48).reshape(6, 8), None, 100)
    adaptation = Adaptation(batch_size=3, seed=4)

    def order(adaptation):
        dataset = batches(sequences, adaptation)
        return np.array([dataset[step]["tokens"][:, 0] // 8 for step in range(6)]).reshape(3, 6)

    passes = order(adaptation)
    assert (np.sort(passes) == np.arange(6)).all()
    assert len(np.unique(passes, axis=0)) == 3
    np.testing.assert_array_equal(order(adaptation), passes)
    assert (order(Adaptation(batch_size=3, seed=5)) != passes).any()


def test_parts_of_a_batch():
    arrays = {"tokens": np.arange(24).reshape(4, 6), "weights": np.ones((4, 6))}
    batch = make_batch(arrays, 2, vocabulary=24)
    np.testing.assert_array_equal(batch.tokens, np.arange(24).reshape(2, 2, 6))
    with pytest.raises(ValueError, match="holds id 23, out of the model's vocabulary of 23 tokens"):
        make_batch(arrays, 2, vocabulary=23)


def test_checksum_sees_order_shape_and_weights():
    tokens = np.arange(60).reshape(6, 10)
    alternatives = [tokens, tokens[::-1], tokens.reshape(10, 6), {"tokens": tokens, "weights": tokens}]
    sums = {read_sequences(data, None, 100).checksum() for data in alternatives}
    assert len(sums) == len(alternatives)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (np.ones((2, 3, 4), int), r"data holds int64 of shape \(2, 3, 4\); give integer ids"),
        (np.ones(0, int), "data is empty"),
        ([], "data is empty"),
        ({"tokens": np.ones(9, int), "mask": np.ones(9)}, r"holds \['mask', 'tokens'\]; expected 'tokens'"),
        ({"tokens": np.ones(9, int), "weights": np.ones(8)}, r"weights of shape \(8,\), but tokens of shape \(9,\)"),
        ({"tokens": np.ones(9, int), "weights": np.zeros(9)}, "negative, not finite, or all zero"),
        ({"tokens": np.ones(9, int), "weights": np.full(9, np.nan)}, "negative, not finite, or all zero"),
        (np.ones((2, 1), int), "has rows of one token"),
        (np.ones((2, 7), int), "has rows of 7 tokens, but sequence_length=4"),
    ],
)
def test_data_that_cannot_work(data, words):
    with pytest.raises(ValueError, match=words):
        read_sequences(data, 4, 100)


def test_files_that_cannot_work(tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text("Sky")
    np.save(tmp_path / "ids.npy", np.arange(9))
    with pytest.raises(ValueError, match="one array, or text files only"):
        read_sequences([tmp_path / "text.txt", tmp_path / "ids.npy"], 2, 100, tokenizer)
    for line in ('{"title": "sky"}', '{"text": null}', '{"text": ["sky"]}', "[]", "sky"):
        (tmp_path / "lines.jsonl").write_text(f'{{"text": "sky"}}\n{line}\n')
        with pytest.raises(ValueError, match=r"lines.jsonl', line 2, is no JSON object with a string \"text\""):
            read_sequences(tmp_path / "lines.jsonl", 2, 100, tokenizer, tmp_path / "run")
        assert os.listdir(tmp_path / "run") == []
    with pytest.raises(ValueError, match="data is text, but there is no tokenizer"):
        read_sequences(tmp_path / "text.txt", 2, 100)
