"""Draws `docs/kept.png`: what methods keep of a needle prompt, by layer, with the embedded model."""

import pathlib

import jax.numpy as jnp
import numpy as np

import restkv_jax as rk
from restkv_jax.commands.options import parse
from restkv_jax.evaluate import make_prompts
from restkv_jax.plot import plot_kept, token_span


def main(
    output: pathlib.Path = pathlib.Path("docs/kept.png"),
    methods: tuple[str, ...] = ("restkv", "snapkv", "streaming_llm"),
    num_tokens: int = 1100,
    percent: float = 10.0,
    seed: int = 0,
    model: str | None = None,
) -> None:
    """Writes the picture.

    Args:
      output: file to write.
      methods: one panel each.
      num_tokens: size of the prompt.
      percent: budget, in percent of the prompt.
      seed: of the prompt.
      model: directory of another model; the one that comes with the package by default.
    """
    decoder, params, tokenizer = rk.load_model(model, dtype=jnp.float32)
    prompt = make_prompts("single", tokenizer, num_tokens, 1, seed)[0]
    tokens = np.asarray([tokenizer(prompt.text)["input_ids"]])
    lines = prompt.text.splitlines()
    needle = next(line for line in lines if prompt.answers[0] in line)
    marked = {"needle": needle, "question": lines[-1]}
    spans = {name: token_span(tokenizer, prompt.text, part) for name, part in marked.items()}
    budget = round(tokens.shape[1] * percent / 100)
    caches = {name: rk.prefill(decoder, params, tokens, policy=rk.METHODS[name](budget=budget))[1] for name in methods}
    title = f"What a budget of {budget} slots keeps of a prompt of {tokens.shape[1]:,} tokens"
    plot_kept(caches, spans=spans, title=title).savefig(output, dpi=150)


if __name__ == "__main__":
    parse(main)
