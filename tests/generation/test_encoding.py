"""Prompts as tokens: texts, conversations, batches of both, and those that make no sense."""

import numpy as np
import pytest
import tiny

from restkv_jax.generation.encoding import encode_messages, encode_prompts

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% if not loop.last or m.role != 'assistant' or add_generation_prompt %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
USER = {"role": "user", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be kind."}


@pytest.fixture
def tokenizer():
    made = tiny.tokenizer()
    made.chat_template = TEMPLATE
    made.pad_token = None  # as Llama's
    return made


def texts_of(tokenizer, prompts):
    tokens, mask = (np.asarray(x) for x in encode_prompts(tokenizer, prompts))
    assert (tokens.dtype, mask.dtype) == (np.int32, bool)
    assert (np.diff(mask.astype(int)) >= 0).all()  # on the left
    return [tokenizer.decode(row[real]) for row, real in zip(tokens, mask, strict=True)]


def test_texts_are_read_as_they_are(tokenizer):
    assert texts_of(tokenizer, "Hello") == ["Hello"]
    assert texts_of(tokenizer, ["Hello", "日本", "a longer one"]) == ["Hello", "日本", "a longer one"]


def test_messages_stand_in_the_chat_template(tokenizer):
    answered = "[user]Hello</s>[assistant]"
    assert texts_of(tokenizer, [USER]) == [answered]
    assert texts_of(tokenizer, [[SYSTEM, USER], [USER]]) == [f"[system]Be kind.</s>{answered}", answered]
    assert texts_of(tokenizer, ["Hello", [USER]]) == ["Hello", answered]
    told = [USER, {"role": "assistant", "content": "Hi!"}, USER]
    assert texts_of(tokenizer, told) == [f"[user]Hello</s>[assistant]Hi!</s>{answered}"]


def test_an_answer_that_was_begun_goes_on(tokenizer):
    begun = [USER, {"role": "assistant", "content": "Well,"}]
    assert texts_of(tokenizer, begun) == ["[user]Hello</s>[assistant]Well,"]


def test_an_empty_system_turn_replaces_that_of_the_template(tokenizer):
    assert texts_of(tokenizer, [SYSTEM | {"content": ""}, USER]) == ["[system]</s>[user]Hello</s>[assistant]"]


@pytest.mark.parametrize(("prompts", "error", "words"), [
    ([], ValueError, "prompts is empty"),
    ([[]], ValueError, r"prompts\[0\] is empty; give at least one message"),
    ("", ValueError, "prompts is empty: the tokenizer turns it into no tokens"),
    (["Hello", ""], ValueError, r"prompts\[1\] is empty: the tokenizer turns it into no tokens"),
    ([USER, {"role": "robot", "content": "x"}], ValueError, r"prompts\[1\]: role='robot' is unknown; choose from"),
    ([[USER], [{"content": "x"}]], ValueError, r"prompts\[1\]\[0\]: role=None is unknown"),
    ([USER | {"content": " \n"}], ValueError, r"prompts\[0\]: the content of this turn \(user\) is empty"),
    ([USER | {"content": None}], TypeError, r"prompts\[0\]: content=None must be a text"),
    ([[USER, "Hello"]], TypeError, r"prompts\[0\]\[1\]='Hello' must be a message"),
    ([USER, {"role": "tool", "content": "x"}], ValueError, "chat template refuses prompts: no tools"),
    (USER, TypeError, r"prompts=\{'role'.* must be texts or lists of messages"),
    ([USER, "Hello"], TypeError, r"prompts\[0\]=\{'role'.* must be a text or a list of messages"),
    (np.ones((1, 3), int), TypeError, "tokens go to restkv_jax.generate"),
    ([3], TypeError, r"prompts\[0\]=3 must be a text or a list of messages"),
])  # fmt: skip
def test_prompts_that_make_no_sense(tokenizer, prompts, error, words):
    with pytest.raises(error, match=words):
        encode_prompts(tokenizer, prompts)


def test_a_tokenizer_without_a_template_or_none_at_all():
    with pytest.raises(ValueError, match="messages needs a chat template, which the tokenizer does not have"):
        encode_messages(tiny.tokenizer(), [USER])
    with pytest.raises(TypeError, match="tokenizer=None must be a tokenizer of transformers"):
        encode_prompts(None, "Hello")
