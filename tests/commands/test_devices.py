"""Commands on several devices, as a user types them."""

import subprocess
import sys

import pytest
from emulated import environment

PROMPT = "The passcode of Rome is 4711. Bread is made of flour and water. " * 8 + "The passcode of Rome is"


def restkv(*args, devices=2, text=None):
    command = [sys.executable, "-m", "restkv_jax", *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment(devices), input=text)


@pytest.mark.slow
def test_an_answer_is_the_same_on_two_devices():
    options = "generate", PROMPT, "--budget", "64", "--max-new-tokens", "8", "--quiet"
    alone, divided = restkv(*options), restkv(*options, "--model-parallel", "2")
    assert alone.returncode == divided.returncode == 0, divided.stderr
    assert alone.stdout == divided.stdout and alone.stdout.strip()
    assert "does not divide vocab_size=11933" in divided.stderr


@pytest.mark.slow
def test_a_document_is_read_and_asked_on_two_devices(tmp_path):
    cache = str(tmp_path / "document.cache")
    read = restkv("read", PROMPT, "--budget", "64", "--output", cache, "--raw", "--model-parallel", "2")
    assert read.returncode == 0, read.stderr
    asked = [
        restkv("ask", cache, " The passcode of Rome is", "--max-new-tokens", "6", *more)
        for more in ((), ("--model-parallel", "2"))
    ]
    assert [each.returncode for each in asked] == [0, 0], asked[1].stderr
    assert asked[0].stdout == asked[1].stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model-parallel", "3"], "--model-parallel 3 --data-parallel 1: data=1 times model=3 needs 3 devices"),
        (["--model-parallel", "0"], "model=0"),
        (["--data-parallel", "2"], "a batch of 1 rows cannot be divided along the mesh's data axis of 2; take 2 rows"),
    ],
)
def test_devices_that_there_are_not_and_rows_that_do_not_divide(options, message):
    done = restkv("generate", PROMPT, *options)
    assert done.returncode == 2 and message in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error") == 1
