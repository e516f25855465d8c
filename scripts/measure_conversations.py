"""Measures what reading once and going on costs, for docs/conversations.md; `--help` lists what there is.

`python scripts/measure_conversations.py document --model MODEL.gguf --file essays.txt` and so on. Every measurement
prints lines of JSON, and adds them to `--output` as they are known; those that are there already are not made again.
"""

import dataclasses
import json
import pathlib
import resource
import time
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

import restkv_jax as rk
from restkv_jax.commands.options import parse
from restkv_jax.evaluate import is_exact, make_prompts
from restkv_jax.generation.encoding import (
    encode_messages,
    encode_next_turn,
    encode_opening,
    encode_question,
    pad_left,
)
from restkv_jax.timing import CompilationClock

QUESTIONS = (
    "What is this text about?",
    "Who might have written it?",
    "Which advice does the author give?",
    "What does the author dislike?",
    "Name one person that is mentioned.",
    "What is the first thing that the text says?",
    "How does the text end?",
    "Is the author hopeful?",
    "Which company is mentioned?",
    "Summarize the text in one sentence.",
)
THINGS = ("boat", "garden", "violin", "castle", "river", "lantern", "mountain", "bakery")
FILLERS = (
    "What is the capital of France?", "Name three colours.", "Why is the sky blue?", "What do bees make?",
    "Tell me a short fact about the moon.", "How many days are in a week?", "What is the opposite of hot?",
    "Name a large animal.", "What is bread made of?", "Where do fish live?", "What is a poem?", "Name a planet.",
    "What do plants need to grow?", "Who was Mozart?", "What is the largest ocean?", "How does a bicycle work?",
    "Name two fruits.", "What is ice?", "What is a library for?", "Name a musical instrument.", "Why do cats purr?",
    "What is a volcano?", "How is cheese made?", "What is the speed of light?", "Name a famous painter.",
    "What is a rainbow?", "Where is Egypt?",
)  # fmt: skip
ASKED_AT = (5, 15, 30)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
      what: `document`, ten questions about an essay as one batch; `chat`, a fact from turn 1 asked again later;
        `segments`, accuracy of reading in segments; `memory`, what the compiler says of it.
      model: a directory, hub id or GGUF file; the embedded model by default.
      file: text to read, for `document`.
      tokens: of the document.
      budget: of `document`, as a policy takes it.
      slots: budget of `chat`.
      lengths: of `segments` and `memory`.
      segment_size: of both.
      prompts: of each task and length of `segments`.
      output: lines of JSON.
    """

    what: Literal["document", "chat", "segments", "memory"]
    model: str | None = None
    file: pathlib.Path | None = None
    tokens: int = 5000
    budget: str = "20%"
    slots: int = 512
    lengths: tuple[int, ...] = (2048, 4096, 8192)
    segment_size: int = 512
    prompts: int = 50
    output: pathlib.Path = pathlib.Path("build/conversations.jsonl")


def main(options: Options) -> None:
    """Makes the measurements that are not in the output yet."""
    options.output.parent.mkdir(parents=True, exist_ok=True)
    measure = {"document": document, "chat": chat, "segments": segments, "memory": memory}[options.what]
    for line in measure(options, _known(options.output)):
        with options.output.open("a") as file:
            print(json.dumps(line), file=file)
        print(json.dumps(line), flush=True)


def _known(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def timed(function: Any, *arguments: Any, **named: Any) -> tuple[Any, float]:
    """The result, and the seconds without compilation."""
    with CompilationClock() as clock:
        start = time.perf_counter()
        result = jax.block_until_ready(function(*arguments, **named))
        return result, time.perf_counter() - start - clock.seconds


def document(options: Options, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """An essay read once, ten questions as one batch, against one prefill for each and against one extend for each."""
    assert options.file is not None, "--file is needed"
    model, params, tokenizer = rk.load_model(options.model, dtype=jnp.float32)
    opening = encode_opening(tokenizer, options.file.read_text())[: options.tokens]
    policy = rk.restkv(budget=options.budget)
    rows = [encode_question(tokenizer, question) for question in QUESTIONS]
    tokens, mask = pad_left(rows, max(map(len, rows)))
    new = 32
    (_, cache), reading = timed(rk.prefill, model, params, jnp.asarray([opening]), None, policy, new)
    together = rk.generate(model, params, tokens, mask, None, new, cache=rk.repeat_rows(cache, len(rows)))
    together, batch = timed(rk.generate, model, params, tokens, mask, None, new, cache=rk.repeat_rows(cache, len(rows)))
    same, alone, prefills = 0, 0.0, 0.0
    for i, row in enumerate(track(rows, "one by one")):
        one, seconds = timed(rk.generate, model, params, jnp.asarray([row]), None, None, new, cache=cache)
        same += bool((one.tokens[0] == together.tokens[i]).all())
        alone += seconds
    for row in track(rows, "read anew"):
        _, seconds = timed(rk.generate, model, params, jnp.asarray([[*opening, *row]]), None, policy, new)
        prefills += seconds
    yield {
        "what": "document", "tokens": len(opening), "budget": options.budget, "slots": cache.num_slots - new,
        "cache_bytes": rk.cache_bytes(cache), "read_s": reading, "ten_at_once_s": batch, "ten_one_by_one_s": alone,
        "ten_read_anew_s": prefills, "same_as_alone": same,
    }  # fmt: skip


def chat(options: Options, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Eight chats of 30 turns as one batch; the fact of turn 1 is asked again on the side, and at the end."""
    model, params, tokenizer = rk.load_model(options.model, dtype=jnp.float32)
    policies = {
        "full": None,
        "restkv": rk.restkv(options.slots),
        "snapkv": rk.snapkv(options.slots),
        "streaming_llm": rk.streaming_llm(options.slots),
    }
    for name, policy in policies.items():
        if any(line.get("what") == "chat" and line["method"] == name for line in known):
            continue
        yield from _chat(options, model, params, tokenizer, name, policy)


def _chat(options: Options, model: Any, params: Any, tokenizer: Any, name: str, policy: Any) -> Iterator[dict]:
    numbers = np.random.default_rng(0).integers(1000, 9999, len(THINGS))
    facts = [
        f"The code of my {thing} is {number}. Please remember it."
        for thing, number in zip(THINGS, numbers, strict=True)
    ]
    asked = [f"What is the code of my {thing}?" for thing in THINGS]
    histories: list[list[dict]] = [[] for _ in THINGS]
    unread: list[list[int]] = [[] for _ in THINGS]
    cache, new, right, sizes = None, 48, {}, []

    def turn(cache: Any, texts: list[str]) -> Any:
        rows = []
        for history, pending, text in zip(histories, unread, texts, strict=True):
            message = {"role": "user", "content": text}
            told = encode_next_turn(tokenizer, history, text) if history else encode_messages(tokenizer, [message])
            rows.append([*pending, *told])
        tokens, mask = pad_left(rows, max(map(len, rows)))
        return rk.generate(model, params, tokens, mask, policy, new, cache=cache)

    for number in track(range(1, max(ASKED_AT) + 1), name):
        if number in ASKED_AT:  # on the side: the chat does not see it
            texts = tokenizer.batch_decode(np.asarray(turn(cache, asked).tokens), skip_special_tokens=True)
            right[number] = sum(str(n) in text for n, text in zip(numbers, texts, strict=True))
        texts = facts if number == 1 else [FILLERS[(number - 2) % len(FILLERS)]] * len(THINGS)
        out = turn(cache, texts)
        cache = out.cache
        sizes.append(rk.cache_bytes(cache))
        for row, text in enumerate(texts):
            given = np.asarray(out.tokens[row, : out.lengths[row]]).tolist()
            ended = given[-1] in model.config.eos_token_ids
            unread[row] = [] if ended else given[-1:]
            answer = tokenizer.decode(given, skip_special_tokens=True)
            histories[row] += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    assert cache is not None
    yield {
        "what": "chat", "method": name, "slots": options.slots, "chats": len(THINGS),
        "right_at_turn": right, "tokens": float(np.mean(cache.next_positions)), "cache_bytes_by_turn": sizes,
        "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }  # fmt: skip


def segments(options: Options, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Exact answers of prompts that are read at once and in segments, at the same budget."""
    model, params, tokenizer = rk.load_model(options.model, dtype=jnp.float32)
    for length in options.lengths:
        for task in ("multivalue", "tracking", "single", "multikey", "haystack"):
            if any((x["what"], x.get("task"), x.get("length")) == ("segments", task, length) for x in known):
                continue
            made = make_prompts(task, tokenizer, length, options.prompts, seed=11)
            readings = {"full": (None, None), "at once": (rk.restkv("10%"), None)}
            readings |= {"in segments": (rk.restkv("10%"), options.segment_size)}
            right = dict.fromkeys(readings, 0)
            for start in track(range(0, len(made), 5), f"{task}, {length:,} tokens"):
                part = made[start : start + 5]
                tokens, mask = pad_left([tokenizer(prompt.text)["input_ids"] for prompt in part], length)
                for name, (policy, size) in readings.items():
                    out = rk.generate(model, params, tokens, mask, policy, 32, segment_size=size)
                    texts = tokenizer.batch_decode(np.asarray(out.tokens), skip_special_tokens=True)
                    right[name] += sum(is_exact(t, prompt.answers) for t, prompt in zip(texts, part, strict=True))
            counts = {"prompts": len(made), "segment_size": options.segment_size, "right": right}
            yield {"what": "segments", "task": task, "length": length, "budget": "10%", **counts}


def memory(options: Options, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The compiler's bytes of reading a prompt in segments, for the shape of a model of a billion weights."""
    billion = dict(
        model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, max_position_embeddings=2**20,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = rk.build_model(billion)
    params = jax.eval_shape(lambda key: rk.init_params(model, key), jax.random.key(0))
    policy = rk.restkv(1024)
    for length in options.lengths:
        for size in (None, options.segment_size):

            def run(params: Any, tokens: Any, size: int | None = size) -> Any:
                return rk.prefill(model, params, tokens, None, policy, 64, segment_size=size)

            tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
            found = jax.jit(run).lower(params, tokens).compile().memory_analysis()
            assert found is not None
            yield {
                "what": "memory", "length": length, "segment_size": size, "slots": 1024,
                "temporaries": found.temp_size_in_bytes, "output": found.output_size_in_bytes,
                "arguments": found.argument_size_in_bytes,
            }  # fmt: skip


if __name__ == "__main__":
    main(parse(Options))
