"""Conversations on one cache: each turn equals reading the whole conversation anew, as long as nothing is evicted."""

import functools

import jax
import numpy as np
import pytest
from test_detokenising import with_byte_fallback
from tiny import CONFIG, tokenizer

import restkv_jax as rk
from restkv_jax.generation.encoding import (
    MARK,
    encode_continuation,
    encode_in_parts,
    encode_messages,
    encode_next_turn,
    encode_opening,
    encode_question,
    encode_text,
)

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)
FORGETFUL = "{{ messages[-1]['content'] }}"
POLICY = rk.restkv(budget=48, window=16)


@functools.cache
def chat_tokenizer(template=TEMPLATE):
    made = tokenizer()
    made.chat_template = template
    return made


@functools.cache
def tiny():
    model = rk.build_model(CONFIG | {"initializer_range": 0.3})
    return model, rk.init_params(model, jax.random.key(3))


def say(conversation, text, policy=None, new=12, **options):
    answer = rk.answer(*tiny(), chat_tokenizer(), conversation, text, policy, new, **options)
    pieces = list(answer)
    assert "".join(pieces) == answer.text
    return answer.text, answer.conversation


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.slow
def test_every_turn_equals_reading_all_of_it(system):
    conversation, made = rk.start_conversation(*tiny(), system=system), chat_tokenizer()
    history = [] if system is None else [{"role": "system", "content": system}]
    tokens: list[int] = []
    for text in ("Hello", "And then?", "Who are you, ünïcödé?"):
        question = {"role": "user", "content": text}
        tokens += encode_next_turn(made, history, text) if tokens else encode_messages(made, [*history, question])
        said, conversation = say(conversation, text)
        out = rk.generate(*tiny(), np.array([tokens]), max_new_tokens=12)
        given = np.asarray(out.tokens[0, : out.lengths[0]]).tolist()
        assert said == made.decode(given, skip_special_tokens=True)
        history += [question, {"role": "assistant", "content": said}]
        tokens += [token for token in given if token != made.eos_token_id]
    assert list(conversation.messages) == history


def test_the_cache_never_exceeds_its_budget_and_never_changes_its_shape():
    conversation = rk.start_conversation(*tiny(), POLICY, max_new_tokens=12)
    shapes = {str(jax.tree.map(lambda x: x.shape, conversation.cache))}
    for turn in range(8):
        _, conversation = say(conversation, f"Turn {turn} of many, which says something.", POLICY)
        shapes.add(str(jax.tree.map(lambda x: x.shape, conversation.cache)))
        assert int(conversation.cache.most_held()) <= POLICY.budget + 12
    assert len(shapes) == 1
    assert conversation.num_tokens > 300


def test_an_answer_can_be_ended_and_the_chat_goes_on():
    start = rk.start_conversation(*tiny())
    answer = rk.answer(*tiny(), chat_tokenizer(), start, "Hello", None, 12)
    pieces = iter(answer)
    first = next(pieces)
    answer.end()
    assert "".join([first, *pieces]) == answer.text
    held = int(answer.conversation.cache.next_positions[0])
    assert held == len(encode_messages(chat_tokenizer(), [{"role": "user", "content": "Hello"}]))
    text, conversation = say(answer.conversation, "Go on")
    assert text and conversation.num_tokens > held


class EndedAt:
    """Steps of an answer that is ended while the one of a number runs, as by a signal."""

    def __init__(self, answer, number):
        self.answer, self.steps, self.number = answer, answer._stream._states, number
        answer._stream._states = self

    def __next__(self):
        return next(self.steps)

    def send(self, going):
        self.number -= 1
        if not self.number:
            self.answer.end()
        return self.steps.send(going)


@pytest.mark.parametrize("step", [0, 1, 3])
def test_an_answer_that_is_ended_while_a_step_runs_is_held_as_it_was_said(step):
    start = rk.start_conversation(*tiny())
    answer = rk.answer(*tiny(), chat_tokenizer(), start, "Hello", None, 12)
    whole, _ = say(start, "Hello")
    if step:
        EndedAt(answer, step)
    else:
        answer.end()
    "".join(answer)
    assert whole.startswith(answer.text) and len(answer._stream.rows[0].tokens) == step
    history = [{"role": "user", "content": "Hello"}]
    tokens = encode_messages(chat_tokenizer(), history) + answer._stream.rows[0].tokens
    assert answer.conversation.num_tokens == len(tokens)
    tokens += encode_next_turn(chat_tokenizer(), answer.conversation.messages, "Go on")
    out = rk.generate(*tiny(), np.array([tokens]), max_new_tokens=12)
    text, _ = say(answer.conversation, "Go on")
    given = np.asarray(out.tokens[0, : out.lengths[0]]).tolist()
    assert text == chat_tokenizer().decode(given, skip_special_tokens=True)


@pytest.mark.parametrize("policy", [None, POLICY])
def test_turns_that_were_said_before_are_read_with_the_first(policy):
    history = [{"role": "user", "content": "My name is Bob."}, {"role": "assistant", "content": "Hi Bob."}]
    start = rk.start_conversation(*tiny(), policy, system="Be brief.")
    _, conversation = say(start._replace(messages=(*start.messages, *history)), "Who am I?", policy, 1)
    whole = [*start.messages, *history, {"role": "user", "content": "Who am I?"}]
    assert int(conversation.cache.next_positions[0]) == len(encode_messages(chat_tokenizer(), whole))


def test_a_conversation_may_be_answered_twice():
    _, conversation = say(rk.start_conversation(*tiny(), POLICY), "Hello", POLICY)
    assert say(conversation, "Once", POLICY)[0] == say(conversation, "Once", POLICY)[0]


@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.replace("<s>", "")])
def test_a_turn_in_parts_is_the_turn(template):
    made = with_byte_fallback()
    made.chat_template = template
    whole = encode_messages(made, [{"role": "user", "content": "a b a\n\nb"}])
    assert encode_opening(made, "a b a") + encode_question(made, "b") == whole
    parts = encode_in_parts(made, [{"role": "user", "content": f"a b{MARK} a\n\nb"}])
    assert [*parts[0], *parts[1]] == whole and len(parts) == 2


@pytest.mark.parametrize("text", ["ab", " a", "b a\n", "\nb", "aab"])
def test_a_text_goes_on_without_a_space_of_the_tokenizers(text):
    made = with_byte_fallback()
    assert encode_text(made, "a") + encode_continuation(made, text) == encode_text(made, "a" + text)


def test_a_question_follows_a_document_as_one_turn():
    made = chat_tokenizer()
    opened = encode_opening(made, "A long text.", "Be brief.")
    following = encode_question(made, "What is it?")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "A long text.\n\nWhat is it?"},
    ]
    assert opened + following == encode_messages(made, messages)
    plain = tokenizer()
    assert encode_opening(plain, "A text.") + encode_question(plain, " And?") == encode_text(plain, "A text. And?")


def test_what_a_stop_string_cuts_off_is_not_read():
    whole, ended = say(rk.start_conversation(*tiny()), "Hello")
    place = next(i for i in range(2, len(whole)) if whole.index(whole[i]) == i)
    said, conversation = say(rk.start_conversation(*tiny()), "Hello", stop=whole[place])
    assert said == whole[:place] and conversation.unread == ()
    messages, made = [{"role": "user", "content": "Hello"}], chat_tokenizer()
    assert conversation.num_tokens == len(encode_messages(made, messages)) + len(said)  # a token each
    assert np.asarray(ended.cache.next_positions) > np.asarray(conversation.cache.next_positions)
    said, _ = say(rk.start_conversation(*tiny()), "Hello", stop="</s>", eos_token_ids=())
    assert said == whole


def test_bad_turns():
    made, start = chat_tokenizer(), rk.start_conversation(*tiny())
    for text in ("", "  \n"):
        with pytest.raises(ValueError, match="empty"):
            rk.answer(*tiny(), made, start, text)
    _, conversation = say(start, "Hello")
    with pytest.raises(ValueError, match="the user's turn is empty; give some text"):
        rk.answer(*tiny(), made, conversation, " ")
    with pytest.raises(ValueError, match="the tokenizer has no chat template, which a conversation needs"):
        rk.answer(*tiny(), tokenizer(), start, "Hello")
    with pytest.raises(ValueError, match="leaves earlier answers out"):
        rk.answer(*tiny(), chat_tokenizer(FORGETFUL), conversation, "And?")
    with pytest.raises(ValueError, match="budget='10%' is a percentage of one prompt"):
        rk.start_conversation(*tiny(), rk.restkv(budget="10%"))
    unknown = start._replace(messages=({"role": "wizard", "content": "x"},))
    with pytest.raises(ValueError, match=r"messages\[0\]: role='wizard' is unknown"):
        rk.answer(*tiny(), made, unknown, "Hello")
