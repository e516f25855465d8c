"""How prompts are put: as turns of a chat, and with the question asked once the text before it is compressed."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

pytest.importorskip("wonderwords")
pytest.importorskip("yaml")

import restkv_jax as rk
from restkv_jax.caches.base import Cache
from restkv_jax.caches.dense import KVCache
from restkv_jax.commands.cli import main
from restkv_jax.evaluate import TASKS, make_prompts
from restkv_jax.evaluate.grid import Grid, cache_configs, policy_of
from restkv_jax.evaluate.results import read_lines
from restkv_jax.evaluate.tasks.encoding import Form, encode_prompt
from restkv_jax.evaluate.tasks.files import read_prompts
from restkv_jax.generation.encoding import encode_messages

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
METHODS = ("snapkv(window=8)",)
OWN = [{"prompt": f"No. {10**i} is {i}. " * 5, "question": "Which?", "answers": [str(i)]} for i in range(3)]


@pytest.fixture(scope="module")
def chatting():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, OWN)))
    return str(path)


def evaluate(output, model, *args):
    given = ["--output", str(output), "--model", str(model), "--budgets", "25%", "--no-costs", "--prompts", "2"]
    return main(["evaluate", *given, "--compilation-cache", "none", "--quiet", *args])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("form", [Form(), Form(ask="after"), Form(chat=True), Form(True, "after")], ids=str)
def test_a_prompt_in_any_form_is_the_templates_text_with_the_beginning_of_the_answer(chatting, task, form):
    def length_of(prompt):
        return encode_prompt(chatting, prompt, form).length

    (prompt,) = make_prompts(task, chatting, 2000, 1, seed=0, length_of=length_of)
    read, asked = encode_prompt(chatting, prompt, form)
    assert 1800 < len(read) + len(asked) <= 2000
    text = chatting.decode([*read, *asked])
    assert prompt.question.endswith(("?", ".")) and prompt.answer_prefix.startswith((" The special", " Answer:"))
    if form.chat:
        turn = [{"role": "user", "content": prompt.text.removesuffix(prompt.answer_prefix)}]
        rendered = chatting.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        assert text == rendered + prompt.answer_prefix.strip()
    else:
        assert text == prompt.text
    assert bool(asked) == (form.ask == "after")
    assert not asked or chatting.decode(asked).startswith(prompt.question)


def test_messages_of_ones_own_are_read_as_generate_reads_them(chatting, tmp_path):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "A long text. "},
    ]
    lines = [
        {"messages": turns, "answers": ["x"]},
        {"messages": [*turns, {"role": "assistant", "content": "It is"}], "answers": ["x"]},
        {"messages": turns, "question": "And now?", "answers": ["x"]},
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    plain, begun, asking = read_prompts(str(path))
    assert encode_prompt(chatting, plain, Form()).read == encode_messages(chatting, turns)
    assert encode_prompt(chatting, begun, Form()).read == encode_messages(chatting, lines[1]["messages"])
    whole = encode_messages(chatting, [*turns[:-1], {"role": "user", "content": "A long text. And now?"}])
    read, asked = encode_prompt(chatting, asking, Form(ask="after"))
    assert [*read, *asked] == whole and chatting.decode(asked).startswith("And now?")
    with pytest.raises(ValueError, match='no "question"'):
        encode_prompt(chatting, plain, Form(ask="after"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ('{"answers": ["x"]}', 'line 2 must have either "prompt"'),
        ('{"prompt": "Who?", "answers": []}', 'line 2 must have "answers", a list'),
        ('{"prompt": 3, "answers": ["x"]}', "must be strings"),
        ('{"messages": [{"role": "system", "content": "x"}], "answers": ["x"]}', "must end with"),
        ('{"messages": ["Hello"], "answers": ["x"]}', '"messages" must be a list of'),
    ],
)
def test_a_line_that_is_not_a_prompt_is_named(tmp_path, line, message):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "Who?", "answers": ["x"]}\n' + line)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(path))


def test_asked_afterwards_is_extend_by_hand(tmp_path, model, own):
    args = ["--tasks", own, "--ask", "after", "--methods", *METHODS, "--batch-size", "2"]
    assert evaluate(tmp_path / "out", model, *args) == 0
    decoder, params, tokenizer = rk.load_model(model, dtype=jnp.float32)
    lines = read_lines(tmp_path / "out")
    assert len(lines) == 3
    item, line = next((item, line) for item, line in lines.items() if item.index == 2)
    document, question = (jnp.asarray([tokenizer(OWN[2][name])["input_ids"]]) for name in ("prompt", "question"))
    assert line.prompt_tokens == document.size + question.size
    for config in cache_configs(Grid(methods=METHODS, budgets=("25%",))):
        policy = policy_of(config, item.length)
        _, cache = rk.prefill(decoder, params, document, None, policy, 16)
        out = rk.generate(decoder, params, question, None, None, 16, cache=cache)
        text = tokenizer.decode(np.asarray(out.tokens)[0], skip_special_tokens=True)
        assert line.said[config.label] == text, config.label


def test_what_cannot_be_put_so_is_one_line(tmp_path, capsys, model, own, monkeypatch):
    assert evaluate(tmp_path / "out", model, "--tasks", own, "--methods", "full", "--chat") == 2
    assert "the model's tokenizer does not have; leave --chat out" in capsys.readouterr().err

    monkeypatch.setattr(KVCache, "with_room", Cache.with_room)
    assert evaluate(tmp_path / "out", model, "--tasks", own, "--methods", "full", "--ask", "after") == 2
    expected = "method 'full' cannot be asked afterwards (KVCache does not grow); leave it out, or give --ask within"
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
