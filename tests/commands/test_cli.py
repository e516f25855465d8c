"""Whole commands as a user types them, good and bad."""

import inspect
import io
import os
import re
import subprocess
import sys

import jax
import pytest
import tiny

import restkv_jax as rk
from restkv_jax.commands.cli import main
from restkv_jax.commands.generate import GenerateOptions
from restkv_jax.commands.method_options import parse_with_method
from restkv_jax.eviction.presets import POLICY_OPTIONS
from restkv_jax.timing import CompilationClock

PROMPT = "The sky is blue. One of the special magic numbers for quiet-fox is: 1234567. Here we go. " * 3
TOKENS = len(PROMPT)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def wide_output(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def run(capsys, *args):
    code = main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def number_in(pattern, text):
    return int(re.search(pattern, text)[1].replace(",", ""))


def test_generate_prints_the_answer_and_what_it_cost(capsys, model):
    code, out, err = run(capsys, "generate", PROMPT, "--model", model, "--budget", "20%", "--max-new-tokens", 6)
    assert (code, err) == (0, "")
    budget = round(0.2 * rk.bucket_length(TOKENS))
    assert number_in(r"prompt tokens *│ ([\d,]+)", out) == TOKENS
    assert number_in(r"cache slots *│ ([\d,]+)", out) == budget + 6
    full = rk.bucket_length(TOKENS) + 6
    assert number_in(r"full cache: ([\d,]+)", out) == full
    share = float(re.search(r"\(([\d.]+)% of the full cache's", out)[1]) / 100
    assert share == pytest.approx((budget + 6) / full, abs=0.01)
    for row in ("compilation", "time to first token", "tokens per second"):
        assert row in out


def test_generate_prints_what_generate_returns(capsys, model):
    args = ["--model", model, "--dtype", "float32", "--method", "snapkv", "--budget", 50, "--window", 8]
    code, out, _ = run(capsys, "generate", PROMPT, *args, "--max-new-tokens", 8, "--quiet")
    decoder, params, tokenizer = rk.load_model(model, dtype="float32")
    tokens = tokenizer(PROMPT, return_tensors="np")["input_ids"]
    expected = rk.generate(decoder, params, tokens, policy=rk.snapkv(50, 8), max_new_tokens=8)
    text = tokenizer.decode(expected.tokens[0, : int(expected.lengths[0])].tolist(), skip_special_tokens=True)
    assert (code, out) == (0, text + "\n")


@pytest.mark.slow
def test_prompt_from_file_and_standard_input_and_a_seed(capsys, model, tmp_path, monkeypatch):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    args = ["--model", model, "--method", "random", "--budget", 40, "--random-seed", 3, "--max-new-tokens", 8]
    args += ["--temperature", 0.9, "--top-k", 50, "--top-p", 0.9, "--seed", 5, "--quiet"]
    from_argument = run(capsys, "generate", PROMPT, *args)
    from_file = run(capsys, "generate", "--file", file, *args)
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    from_standard_input = run(capsys, "generate", *args)
    assert from_argument[0] == 0
    assert from_argument == from_file == from_standard_input


@pytest.mark.slow
def test_while_generating_holds_the_budget(capsys, model):
    args = ["--model", model, "--budget", 40, "--while-generating", "--max-new-tokens", 2000]
    code, out, err = run(capsys, "generate", PROMPT, *args)
    assert code == 0
    assert err.startswith(f"restkv: warning: the prompt's {TOKENS} tokens and max_new_tokens=2000 exceed")
    assert number_in(r"cache slots *│ ([\d,]+)", out) == 40 and "for new tokens" not in out


@pytest.mark.parametrize("name", rk.METHODS)
def test_help_lists_the_options_of_the_method(capsys, name):
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--method", name, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for parameter in inspect.signature(rk.METHODS[name]).parameters:
        assert f"--{parameter.replace('_', '-')}" in out
    if name != "full":
        assert inspect.getdoc(rk.METHODS[name]).partition("\n")[0] in out


@pytest.mark.parametrize(("method", "preset"), [("laprox", rk.laprox), ("best", rk.best), ("full", rk.full)])
def test_options_of_any_method(method, preset):
    plain = ["--method", method]
    assert parse_with_method(GenerateOptions, ["x", *plain], "restkv generate")[1] == preset()
    if method != "full":
        _, policy = parse_with_method(
            GenerateOptions, ["x", *plain, "--sinks", "4", "--page-size=8"], "restkv generate"
        )
        assert policy == preset().replace(sinks=4, page_size=8)


def test_methods_lists_the_registry(capsys):
    code, out, _ = run(capsys, "methods")
    assert code == 0
    for name, preset in rk.METHODS.items():
        assert f"{name}  {inspect.getdoc(preset).partition(chr(10))[0]}" in out
        for parameter in inspect.signature(preset).parameters.values():
            assert f"{parameter.name}={parameter.default}" in out
    for name in POLICY_OPTIONS:
        assert f"{name}=None" in out


@pytest.mark.slow
def test_plot_writes_a_picture(capsys, model, tmp_path):
    path = tmp_path / "kept.png"
    args = [
        "--model",
        model,
        "--budget",
        "30%",
        "--methods",
        "snapkv",
        "full",
        "--highlight",
        "1234567",
        "--output",
        path,
    ]
    code, out, _ = run(capsys, "plot", PROMPT, *args)
    assert (code, out) == (0, f"wrote {path}\n")
    assert path.read_bytes().startswith(b"\x89PNG")
    code, _, err = run(capsys, "plot", "a short one", "--model", model, "--methods", "snapkv", "--output", path)
    assert (code, err) == (0, "restkv: warning: budget=6 is too small for window=32, which shrinks to 3\n")


@pytest.mark.slow
def test_installed_command(model):
    command = [sys.executable, "-m", "restkv_jax.commands.cli", "generate", "--model", model, "--budget", "1%"]
    command += ["--method", "streaming_llm"]
    done = subprocess.run(command, input=PROMPT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert "budget=1% of 320 tokens is 3 slots: budget=3 must exceed sinks=4" in done.stderr


@pytest.mark.parametrize(
    ("budget", "prompt", "slots", "said"),
    [
        ("10%", PROMPT[:100], 11, "budget=11 is too small for window=32, which shrinks to 5"),
        ("20", "twelve bytes", 20, "budget=20 is too small for window=32, which shrinks to 10"),
        pytest.param(
            *("32", PROMPT, 32, "budget=32 is too small for window=32, which shrinks to 16"), marks=pytest.mark.slow
        ),
        pytest.param("50%", PROMPT, 160, None, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("method", ["restkv", pytest.param("laprox", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_window_that_does_not_fit_shrinks_and_it_is_said_once(capsys, model, method, budget, prompt, slots, said):
    args = ["--model", model, "--method", method, "--budget", budget, "--max-new-tokens", 4]
    code, out, err = run(capsys, "generate", prompt, *args)
    assert (code, err) == (0, "" if said is None else f"restkv: warning: {said}\n")
    if method == "restkv":
        assert number_in(r"cache slots *│ ([\d,]+)", out) == slots + 4


def generate(*args):
    return ["generate", "x", *args]


BAD = {
    "no command": ([], "no command given; known: generate, read, ask, chat, devices, methods"),
    "unknown command": (["generat"], "command 'generat' is unknown"),
    "unknown method": (generate("--method", "restvk"), "method='restvk' is unknown; did you mean restkv?"),
    "no method": (generate("--method"), "method='' is unknown"),
    "unknown option": (generate("--windw", "8"), "--windw is not an option of --method restkv; did you mean --window?"),
    "option of another method": (generate("--method", "h2o", "--alpha", "1"), "--alpha is not an option of --method"),
    "budget of all": (generate("--method", "full", "--budget", "9"), "--budget is not an option of --method full"),
    "wrong type": (generate("--window", "many"), '--window: unable to convert "many" into int'),
    "fraction of a token": (generate("--window", "2.5"), "--window: '2.5' is not an integer"),
    "no value": (generate("--window"), "--window requires an argument"),
    "wrong choice": (generate("--pooling", "sum"), 'Invalid value "sum" for --pooling. Choose from'),
    "unquoted prompt": (["generate", "two", "words"], "unexpected argument 'words'; quote a prompt"),
    "small budget": (generate("--method", "streaming_llm", "--budget", "4"), "budget=4 must exceed sinks=4"),
    "budget of nothing": (generate("--budget", "0%"), "budget='0%' is not a budget"),
    "budget above all": (generate("--budget", "120%"), "budget='120%' is not a budget"),
    "negative budget": (generate("--budget=-4"), "budget='-4' is not a budget"),
    "budget in words": (generate("--budget", "ten%"), "budget='ten%' is not a budget"),
    "even kernel": (generate("--kernel-size", "4"), "kernel_size=4 must be odd"),
    "no new tokens": (generate("--max-new-tokens", "0"), "--max-new-tokens 0 must be at least 1"),
    "negative temperature": (generate("--temperature", "-1"), "temperature=-1.0 must not be negative"),
    "top-p above one": (generate("--top-p", "2"), "top_p=2.0 must be in (0, 1]"),
    "min-p above one": (generate("--min-p", "2"), "min_p=2.0 must be in [0, 1]"),
    "empty stop string": (generate("--stop", ""), "has an empty string, which would end every answer"),
    "negative seed": (generate("--top-k", "2", "--seed", "-1"), "--seed -1 must be in"),
    "empty prompt": (["generate", " "], "PROMPT is empty"),
    "missing file": (["generate", "--file", "absent.txt"], "--file 'absent.txt' cannot be read"),
    "two prompts": (generate("--file", "absent.txt"), "are both given"),
    "missing model": (generate("--model", "./absent"), "model './absent' cannot be loaded: does not exist"),
    "empty model": (generate("--model", ""), "model is empty; give a directory"),
    "correction of a method that corrects": (generate("--method", "best", "--refit", "1"), "--refit is not an option"),
    "dtype": (generate("--dtype", "int8"), 'Invalid value "int8" for --dtype'),
    "methods with arguments": (["methods", "restkv"], "unexpected argument 'restkv'"),
    "picture without a directory": (["plot", "x", "--output", "absent/kept.png"], "does not exist; create it first"),
    "picture without a suffix": (["plot", "x", "--output", "kept"], "does not end in the suffix of a picture"),
    "unknown method in a plot": (["plot", "x", "--methods", "snapkv", "all"], "method='all' is unknown"),
}  # fmt: skip


@pytest.mark.parametrize(("args", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(capsys, args, message):
    jax.random.key(0)  # its program is the process's, not this command's
    with CompilationClock() as clock:
        assert_refused(capsys, args, message)
    assert clock.seconds == 0


def test_bad_input_that_needs_the_model_is_one_line_too(capsys, model, tmp_path):
    bare = str(tiny.write_model(tmp_path / "bare", with_tokenizer=False))
    assert_refused(capsys, ["generate", "x", "--model", bare], "has no tokenizer")
    assert_refused(capsys, ["generate", "x", "--model", str(tmp_path)], "has no weights")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert_refused(capsys, ["generate", "x", "--model", str(tmp_path)], "pickled weights (pytorch_model.bin)")
    assert_refused(
        capsys,
        ["generate", "a short one", "--model", model, "--method", "streaming_llm", "--budget", "5%"],
        "budget=5% of 64 tokens is 3 slots: budget=3 must exceed sinks=4",
    )
    assert_refused(capsys, ["plot", PROMPT, "--model", model, "--highlight", "absent"], "'absent' is not in the prompt")


def test_bad_values_are_one_line_without_box_characters(model):
    command = [sys.executable, "-m", "restkv_jax", "generate", "x", "--window", "many"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    expected = (
        'restkv: error: Invalid value for --window: unable to convert "many" into int; see `restkv generate --help`\n'
    )
    assert (done.returncode, done.stderr) == (2, expected)


def test_bytes_that_are_no_text(capsys, monkeypatch, tmp_path):
    (tmp_path / "bytes").write_bytes(b"a\xff")
    assert_refused(capsys, ["generate", "--file", str(tmp_path / "bytes")], "cannot be read as text")
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\udcff"))
    assert_refused(capsys, ["generate"], "standard input cannot be read as text")


def test_no_prompt_at_a_terminal(capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    assert_refused(capsys, ["generate"], "no PROMPT; give it as an argument, with --file PATH, or on standard input")


def assert_refused(capsys, args, message):
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, "")
    assert err.startswith("restkv: error: ") and err.count("\n") == 1
    assert message in err
