"""The embedded model's tokenizer: byte-level BPE in which the words of needle prompts are single tokens."""

import itertools
import json
import string
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from restkv_jax.evaluate.tasks import needles, vocabulary

PAD, BOS, EOS = "<pad>", "<s>", "</s>"

PATTERN = "|".join(
    (
        r" ?VAR(?!\p{L})",
        r"[ -]?\p{Lu}?\p{Ll}+",  # a word; " quick-fox" is " quick" and "-fox"
        r" ?\p{Lu}{1,2}(?!\p{Ll})",  # names of capitals, two letters at a time
        r" ?\p{L}+",
        r" ?\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+",
        r"\s+(?!\S)|\s+",
    )
)
NUM_MERGES = 400


def split_text() -> pre_tokenizers.PreTokenizer:
    """Splits at `PATTERN` and maps bytes to printable characters, losing nothing."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def answer_tokens() -> list[str]:
    """The pieces that answers are made of: digit groups and pairs of capitals, with and without a leading space."""
    groups = ["".join(digits) for n in (1, 2, 3) for digits in itertools.product(string.digits, repeat=n)]
    pairs = ["".join(pair) for pair in itertools.product(string.ascii_uppercase, repeat=2)]
    return [space + piece for piece in (*groups, *pairs) for space in ("", " ")]


def word_tokens() -> list[str]:
    """The words of the templates and of the keys, as `PATTERN` splits them."""
    splitter = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    texts = [
        *needles.TEMPLATES,
        *(f" {word}" for word in vocabulary.adjectives()),
        *(f"-{word}" for word in vocabulary.nouns()),
    ]
    return [piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that encodes any text exactly; the tokens of answers come first in its vocabulary.

    A piece that is in the vocabulary is taken whole; every other goes through merges learnt from the word lists.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = split_text()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + NUM_MERGES, initial_alphabet=alphabet, show_progress=False)
    words = [prefix + word for word in vocabulary.nouns() + vocabulary.adjectives() for prefix in ("", " ")]
    trained.train_from_iterator(words, trainer)
    merges: Any = [tuple(pair) for pair in _merges(trained)]
    to_characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    whole = (to_characters(piece)[0][0] for piece in [*answer_tokens(), *word_tokens()])
    pieces = dict.fromkeys([PAD, BOS, EOS, *alphabet, *whole, *("".join(pair) for pair in merges)])

    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = split_text()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, BOS, EOS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )


def _merges(tokenizer: Tokenizer) -> list[list[str]]:
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
