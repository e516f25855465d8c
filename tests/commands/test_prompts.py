"""Prompts of the commands: texts as they are, and turns of a chat."""

import pytest
import tiny

from restkv_jax.commands.cli import main
from restkv_jax.commands.options import UsageError
from restkv_jax.commands.prompts import encode_turn
from restkv_jax.generation.encoding import encode_text

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def tokenizer():
    made = tiny.tokenizer()
    made.chat_template = TEMPLATE
    return made


def test_a_turn_stands_in_the_chat_template(tokenizer):
    assert tokenizer.decode(encode_turn(tokenizer, "Hello")) == "[user]Hello</s>[assistant]"
    with_system = encode_turn(tokenizer, "Hello", system="Be kind.")
    assert tokenizer.decode(with_system) == "[system]Be kind.</s>[user]Hello</s>[assistant]"


def test_without_a_template_it_is_the_text():
    plain = tiny.tokenizer()
    assert encode_turn(plain, "Hello") == encode_text(plain, "Hello") == plain("Hello")["input_ids"]
    with pytest.raises(UsageError, match="--system needs a chat template"):
        encode_turn(plain, "Hello", system="Be kind.")


def test_a_template_that_fails_is_one_line(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UsageError, match="roles must alternate; --raw leaves the template out"):
        encode_turn(tokenizer, "Hello")


def test_generate_reads_a_turn_unless_it_is_told_not_to(tmp_path, capsys, tokenizer):
    tiny.write_model(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = ["generate", "Hello", "--model", str(tmp_path / "model"), "--method", "full", "--max-new-tokens", "2"]
    assert main(command) == 0
    assert "prompt tokens       │ 23" in capsys.readouterr().out  # [user]Hello, the end token, [assistant]
    assert main([*command, "--raw"]) == 0
    assert "prompt tokens       │ 5" in capsys.readouterr().out
    assert main([*command, "--raw", "--system", "Be kind."]) == 2
    assert "--system and --raw are both given" in capsys.readouterr().err
