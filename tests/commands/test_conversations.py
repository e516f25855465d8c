"""`restkv read`, `ask` and `chat`, as a user types them."""

import io
import os
import signal
import subprocess
import sys

import jax
import pytest
import tiny

import restkv_jax as rk
from restkv_jax.caches.stored import read_header
from restkv_jax.commands.cli import main

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)
TEXT = "The grass is green. The sky is blue. Here we go. " * 6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A chat model."""
    directory = tiny.write_model(tmp_path_factory.mktemp("model"))
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return str(directory)


def run(capsys, *args):
    code = main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def document(capsys, model, tmp_path):
    (tmp_path / "essay.txt").write_text(TEXT)
    command = ["read", "--file", tmp_path / "essay.txt", "--model", model, "--budget", "25%"]
    code, out, err = run(capsys, *command, "--output", tmp_path / "essay.cache")
    assert (code, err) == (0, "")
    size = (tmp_path / "essay.cache").stat().st_size
    assert out.startswith(
        f"wrote {tmp_path / 'essay.cache'}: 300 tokens, 80 slots per layer and KV head, {size:,} bytes"
    )
    return tmp_path / "essay.cache"


@pytest.mark.slow
def test_a_document_is_asked_again_and_again(capsys, model, document):
    loaded = rk.load_model(model, dtype="float32")
    before = document.read_bytes()
    whole = [{"role": "user", "content": f"{TEXT}\n\nWhat is blue?"}]
    code, out, err = run(capsys, "ask", document, "What is blue?", "--max-new-tokens", 8)
    assert (code, err) == (0, "")
    again = run(capsys, "ask", document, "What is blue?", "And the grass?", "--max-new-tokens", 8)
    assert again[0] == 0 and again[1].startswith(f"What is blue?\n  {out.strip()}\n\nAnd the grass?\n  ")
    assert document.read_bytes() == before
    # with nothing evicted it is the turn as a whole
    run(capsys, "read", TEXT, "--model", model, "--method", "full", "--output", document)
    code, out, _ = run(capsys, "ask", document, "What is blue?", "--max-new-tokens", 8)
    assert out == rk.generate_text(*loaded, whole, max_new_tokens=8) + "\n"


@pytest.mark.slow
def test_a_document_is_read_in_segments(capsys, model, tmp_path):
    command = ["read", TEXT, "--model", model, "--budget", 64, "--output", tmp_path / "a.cache", "--quiet"]
    assert run(capsys, *command, "--segment-size", 100) == (0, "", "")
    held = rk.load_cache(tmp_path / "a.cache", rk.load_model(model)[0])
    assert held.num_slots == 64 and int(held.next_positions[0]) == 300
    assert run(capsys, "ask", tmp_path / "a.cache", "What?", "--max-new-tokens", 4)[0] == 0


@pytest.mark.slow
def test_a_text_without_template_goes_on(capsys, tmp_path):
    plain = str(tiny.write_model(tmp_path / "plain"))
    run(capsys, "read", TEXT, "--model", plain, "--method", "full", "--output", tmp_path / "a.cache")
    _, out, _ = run(capsys, "ask", tmp_path / "a.cache", " And then", "--max-new-tokens", 6)
    assert out == rk.generate_text(*rk.load_model(plain, dtype="float32"), TEXT + " And then", max_new_tokens=6) + "\n"


def test_files_that_cannot_be_asked(capsys, model, document, tmp_path):
    other = str(tiny.write_model(tmp_path / "other"))
    (tmp_path / "cut.cache").write_bytes(document.read_bytes()[:1000])
    cases = {
        ("ask", document): "no question; give one or several, each in quotes, after the file",
        ("ask", document, " "): "question is empty; give some text",
        ("ask", tmp_path / "no.cache", "What?"): "no.cache is not a file",
        ("ask", tmp_path / "cut.cache", "What?"): "cut.cache is damaged, or not a file of a cache",
        ("ask", document, "What?", "--model", tmp_path / "nothing"): "cannot be loaded",
        ("read", TEXT, "--model", model, "--output", tmp_path / "no" / "a.cache"): "its directory does not exist",
        ("read", TEXT, "--model", model, "--output", tmp_path): "is a directory; give the file to write",
        ("read", TEXT, "--model", model, "--segment-size", "0"): "--segment-size 0 must be at least 1",
        (
            "read",
            TEXT,
            "--model",
            model,
            "--budget",
            "64",
            "--segment-size",
            "20",
        ): "must be at least the method's window",
        ("read", TEXT, "--model", other, "--system", "Be brief."): "needs a chat template",
        ("chat", "--model", other): "has no chat template, which a chat needs",
        ("chat", "--model", model, "--budget", "10%"): "budget='10%' is a percentage of one prompt",
        ("chat", "--model", model, "--resume", document): "holds a cache, but not a chat",
    }
    for command, words in cases.items():
        code, out, err = run(capsys, *command)
        assert (code, out) == (2, "") and words in err and err.count("\n") == 1, (command, err)


def chat(capsys, monkeypatch, model, text, *args):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return run(capsys, "chat", "--model", model, "--max-new-tokens", 8, "--budget", 64, *args)


def test_a_chat_goes_on_from_its_file(capsys, monkeypatch, model, tmp_path):
    saved = tmp_path / "a.cache"
    code, out, err = chat(
        capsys, monkeypatch, model, f"Hello\n\n/stats\n/save {saved}\nAnd then?\n", "--system", "Be brief."
    )
    assert code == 0
    assert "1 turns," in err and "in 72 slots of" in err and f"wrote {saved}" in err
    assert [m["role"] for m in read_header(saved).note["messages"]] == ["system", "user", "assistant"]
    _, resumed, _ = chat(capsys, monkeypatch, model, "And then?\n", "--resume", saved, "--quiet")
    assert out.endswith(resumed) and len(out) > len(resumed)
    _, anew, err = chat(capsys, monkeypatch, model, "Hello\n/reset\nHello\n/save\n/what\n", "--quiet")
    half = len(anew) // 2
    assert anew[:half] == anew[half:], "after /reset all is as at the beginning"
    assert "/save needs a file" in err and "/reset begins anew" in err


def test_a_chat_goes_on_with_the_method_that_it_began_with(capsys, monkeypatch, model, tmp_path):
    def say(text, *args):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        code, out, err = run(capsys, "chat", "--max-new-tokens", 8, *args)
        assert code == 0, err
        return out, err

    saved = tmp_path / "a.cache"
    begun = "--model", model, "--method", "snapkv", "--budget", 40, "--dtype", "bfloat16", "--system", "Be brief."
    said, _ = say(f"Hello\n/save {saved}\nAnd then?\n/stats\n/reset\nHello\n", *begun)
    resumed, err = say("And then?\n/stats\n/reset\nHello\n", "--resume", saved)
    assert said.endswith(resumed) and said[: len(said) - len(resumed)] == said.splitlines(keepends=True)[0]
    assert "in 48 slots" in err
    again = tmp_path / "b.cache"
    _, err = say(f"/reset\nHello\n/stats\n/save {again}\n", "--resume", saved, "--budget", "100", "--page_size", "8")
    assert "in 108 slots" in err
    note = read_header(again).note
    assert (note["method"], note["dtype"], note["system"]) == ("snapkv", "bfloat16", "Be brief.")
    expected = read_header(saved).note["method_options"] | {"budget": "100", "page_size": 8}
    assert note["method_options"] == expected and expected["window"] == 32
    assert (
        run(capsys, "chat", "--resume", saved, "--budget", "much", "--model", "./absent")[2].count("budget='much'") == 1
    )


def test_what_was_read_without_the_models_sharing_goes_on_without(capsys, monkeypatch, model, tmp_path):
    dense, params, tokenizer = rk.load_model(model, dtype="float32")
    shared = dense.clone(sharing=rk.pod.Sharing(rk.pod.LayerGroups([[0, 0], [0, 0]]), 4, 32))
    rk.save_model(tmp_path / "adapted", shared, params, tokenizer)
    saved, adapted = tmp_path / "a.cache", str(tmp_path / "adapted")
    for options in ([], ["--dense"]):
        assert run(capsys, "read", TEXT, "--model", adapted, "--method", "full", "--output", saved, *options)[0] == 0
        code, _, err = run(capsys, "ask", saved, "What is blue?", "--max-new-tokens", 4)
        assert (code, err) == (0, "")
    run(capsys, "read", TEXT, "--model", model, "--method", "full", "--output", tmp_path / "b.cache")
    files = saved, tmp_path / "b.cache"
    answers = [run(capsys, "ask", file, "What is blue?", "--max-new-tokens", 8)[1] for file in files]
    assert answers[0] == answers[1]
    _, said, _ = chat(capsys, monkeypatch, adapted, f"Hello\n/save {saved}\nAnd then?\n", "--quiet", "--dense")
    _, resumed, err = chat(capsys, monkeypatch, adapted, "And then?\n", "--resume", saved, "--quiet")
    assert said.endswith(resumed) and resumed and err == ""


def test_slots_that_are_said_to_hold_the_document_are_those_there_are(capsys, model, tmp_path):
    for options in (
        [],
        ["--while-generating"],
        ["--while-generating", "--cache-dtype", "int8(group_size=8,residual=16)"],
    ):
        args = ["--model", model, "--budget", 64, "--output", tmp_path / "a.cache"]
        code, out, _ = run(capsys, "read", TEXT, *args, *options)
        assert code == 0 and "64 slots per layer" in out


def test_a_chat_is_not_asked_as_a_document(capsys, monkeypatch, model, tmp_path):
    chat(capsys, monkeypatch, model, f"Hello\n/save {tmp_path / 'a.cache'}\n", "--quiet")
    code, out, err = run(capsys, "ask", tmp_path / "a.cache", "What?")
    assert (code, out) == (2, "") and "holds a chat; `restkv chat --resume` goes on with it" in err


def test_turns_that_cannot_be_answered_leave_the_chat_as_it_is(capsys, monkeypatch, model):
    code, out, err = chat(capsys, monkeypatch, model, "/save x.cache\nHello\n", "--quiet")
    assert code == 0 and "/save: nothing was said yet" in err and out


@pytest.mark.slow
def test_an_interrupt_ends_an_answer_and_not_the_chat(tmp_path):
    endless = rk.build_model(tiny.CONFIG | {"eos_token_id": None})
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    rk.save_model(tmp_path / "model", endless, rk.init_params(endless, jax.random.key(0)), tokenizer)
    command = [sys.executable, "-m", "restkv_jax.commands.cli", "chat", "--model", str(tmp_path / "model")]
    command += ["--budget", "64", "--max-new-tokens", "100000"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    with subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, **pipes) as process:
        process.stdin.write("Hello\n")
        process.stdin.flush()
        process.stdout.read(1)  # the answer has begun
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(f"/stats\n/save {tmp_path / 'a.cache'}\n", timeout=120)
    assert process.returncode == 0, err
    assert "1 turns," in err
    header = read_header(tmp_path / "a.cache")
    assert header.note["messages"][-1]["role"] == "assistant"
    assert len(header.note["unread"]) <= 1, "a token that was chosen after the end is not part of the answer"
    assert int(rk.load_cache(tmp_path / "a.cache", endless).most_held()) < 100_000
