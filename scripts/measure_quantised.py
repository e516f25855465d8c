"""Measures quantised caches: divergence from the full cache on texts, and answers to needles; results in a JSON file.

A measurement that the file holds already is not repeated, so an interrupted run goes on where it was.

    python scripts/measure_quantised.py divergence results.json --model MODEL --text essays.txt
    python scripts/measure_quantised.py needles results.json
    python scripts/measure_quantised.py time results.json
    python scripts/measure_quantised.py curve results.json picture.png
"""

import functools
import json
import pathlib
import time
from typing import Any

import cyclopts
import jax
import jax.numpy as jnp
import numpy as np

import restkv_jax as rk
from restkv_jax.evaluate.batching import pad_batch
from restkv_jax.evaluate.tasks.making import make_prompts
from restkv_jax.generation.passes import append

DTYPES = None, "int8", "float8_e4m3fn", "int4"
BUDGETS = None, "5%", "10%", "20%", "40%"

app = cyclopts.App(help=__doc__)


class Results(dict):
    """Measurements by name, in a file."""

    def __init__(self, path: pathlib.Path):
        super().__init__(json.loads(path.read_text()) if path.exists() else {})
        self.path = path

    def add(self, name: str, value: Any) -> None:
        """Notes a measurement and writes the file anew."""
        self[name] = value
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self, indent=1) + "\n")
        unfinished.replace(self.path)
        print(name, value, flush=True)


def policies(length: int) -> dict[str, rk.EvictionPolicy]:
    """By budget, for prompts that are padded to `length`."""
    of = {str(budget): rk.restkv(budget) if budget else rk.full() for budget in BUDGETS}
    return {name: policy.resolved(length) for name, policy in of.items()}


@functools.partial(jax.jit, static_argnames="model")
def log_probabilities(model, params, cache, tokens):
    """Of the next token after each of tokens int32 [B, T] that a cache is fed with one by one: float32 [T, B, V]."""

    def step(cache, token):
        logits, cache = append(model, params, token[:, None], jnp.ones((len(token), 1), bool), cache)
        return cache, jax.nn.log_softmax(logits)

    return jax.lax.scan(step, cache, tokens.T)[1]


@jax.jit
def divergences(reference, other):
    """`KL(reference || other)` in nats per token, and how often the best token is the same; float32 [B] of rows."""
    kl = (jnp.exp(reference) * (reference - other)).sum(-1)
    return kl.mean(0), (reference.argmax(-1) == other.argmax(-1)).mean(0)


@app.command
def divergence(
    results: pathlib.Path, text: pathlib.Path, model: str | None = None, length: int = 2048, steps: int = 32,
    samples: int = 6, rows: int = 2, residual: int = 32, group_size: int = 64,
):  # fmt: skip
    """KL per token on pieces of a text: `steps` tokens after a prompt of `length`."""
    found, (decoder, params, tokenizer) = Results(results), rk.load_model(model)
    tokens = np.array(tokenizer(text.read_text()[: 12 * samples * (length + steps)])["input_ids"])
    pieces = tokens[: samples * (length + steps)].reshape(samples, -1).astype(np.int32)
    chosen = policies(length)
    for start in range(0, samples, rows):
        prompt, after = np.split(pieces[start : start + rows], [length], axis=1)
        reference = None
        for dtype in DTYPES:
            names = {budget: f"divergence {start} {dtype} {budget}" for budget in chosen}
            if dtype is not None and all(name in found for name in names.values()):
                continue
            stored = None if dtype is None else rk.Quantisation(dtype, group_size, residual)
            _, caches = rk.prefill_each(
                decoder, params, prompt, None, tuple(chosen.values()), steps, cache_dtype=stored
            )
            for name, cache in zip(names.values(), caches, strict=True):
                said = log_probabilities(decoder, params, cache, after)
                reference = said if reference is None else reference
                kl, same = (np.asarray(x).tolist() for x in divergences(reference, said))
                found.add(name, {"kl": kl, "same": same, "bytes": rk.cache_bytes(cache) // rows})


@app.command
def curve(results: pathlib.Path, picture: pathlib.Path):
    """Draws the divergence over the bytes of the cache, a line per dtype and a point per budget."""
    import matplotlib.pyplot as plt

    found = json.loads(results.read_text())
    _, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for dtype, marker in zip(DTYPES, "o^vs", strict=True):
        points = []
        for budget in BUDGETS:
            of = [
                x for name, x in found.items() if name.startswith("divergence") and name.endswith(f" {dtype} {budget}")
            ]
            if of and (dtype, budget) != (None, None):
                points.append(
                    (of[0]["bytes"] / 1e6, np.mean([kl for x in of for kl in x["kl"]]), str(budget or "full"))
                )
        points.sort()
        axes.plot(*zip(*[point[:2] for point in points], strict=True), marker=marker, label=dtype or "bfloat16")
        for point in points if dtype in (None, "int4") else ():
            axes.annotate(point[2], point[:2], textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="cache of one row, MB", ylabel="KL from the full cache, nats per token")
    axes.set_xticks([2, 5, 10, 20, 50], labels=["2", "5", "10", "20", "50"])
    axes.xaxis.set_minor_formatter("")
    axes.legend()
    plt.savefig(picture, dpi=150)


@app.command
def needles(
    results: pathlib.Path, model: str | None = None, task: str = "single", length: int = 1024, count: int = 200,
    rows: int = 10, residual: int = 32, group_size: int = 64, seed: int = 0,
):  # fmt: skip
    """Greedy answers to needles: how many are right, and the same as those of the cache that is not quantised."""
    found, (decoder, params, tokenizer) = Results(results), rk.load_model(model)
    prompts = make_prompts(task, tokenizer, length, count, seed)
    encoded = [tokenizer(prompt.text)["input_ids"] for prompt in prompts]
    chosen = policies(rk.bucket_length(length))
    for start in range(0, count, rows):
        batch = pad_batch(encoded[start : start + rows], rows, rk.bucket_length(length))
        answers = [prompt.answers for prompt in prompts[start : start + rows]]
        plain = None
        for dtype in DTYPES:
            names = {budget: f"needles {task} {start} {dtype} {budget}" for budget in chosen}
            if dtype is not None and all(name in found for name in names.values()):
                continue
            stored = None if dtype is None else rk.Quantisation(dtype, group_size, residual)
            outs = rk.generate_each(decoder, params, *batch, tuple(chosen.values()), 12, cache_dtype=stored)
            tokens = [np.asarray(out.tokens) for out in outs]
            plain = tokens if plain is None else plain
            for name, ours, theirs in zip(names.values(), tokens, plain, strict=True):
                said = tokenizer.batch_decode(ours, skip_special_tokens=True)
                right = [all(a in text for a in one) for text, one in zip(said, answers, strict=False)]
                same = (ours == theirs).all(1)[: len(answers)]
                found.add(name, {"right": sum(right), "same": int(same.sum()), "count": len(answers)})


@app.command(name="time")
def measure_time(results: pathlib.Path, model: str | None = None, slots: int = 16384, steps: int = 20):
    """Seconds per decoded token of one row at a full cache of `slots`, in float32 but for the codes."""
    found, (decoder, params, _) = Results(results), rk.load_model(model, jnp.float32)
    tokens = np.zeros((1, 64), np.int32)
    for repetition in range(3):
        for dtype in DTYPES:
            empty: Any = rk.prefill(decoder, params, tokens, None, None, slots, cache_dtype=dtype)[1]
            full = empty.replace(
                lengths=jnp.full_like(empty.lengths, slots - steps - 2),
                positions=jnp.broadcast_to(jnp.arange(empty.num_slots), empty.positions.shape).astype(jnp.int32),
                next_positions=empty.next_positions + slots,
            )
            times = []
            for _ in range(steps):
                start = time.perf_counter()
                logits, full = rk.decode_step(decoder, params, np.zeros(1, int), full)
                logits.block_until_ready()
                times.append(time.perf_counter() - start)
            name = f"time {slots} {dtype} {repetition}"
            found.add(name, {"least": min(times[2:]), "median": float(np.median(times[2:]))})


HALF_OF_8B = dict(
    model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=16,
    num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=131072,
)  # fmt: skip
"""Of the shape of Llama 3.1 8B, half of its layers: as much as one chip of 16 GB holds."""


@app.command
def memory(results: pathlib.Path, slots: int = 16384, topology: str = "v5e:2x2"):
    """Bytes of a decoding step compiled for one TPU: of the cache, of what is written in place, of temporaries."""
    from jax.experimental import topologies

    found, decoder = Results(results), rk.build_model(HALF_OF_8B)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    place = jax.sharding.SingleDeviceSharding(devices[0])
    one_device = rk.make_mesh(1, 1, devices[:1])

    def laid(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    params = laid(jax.eval_shape(lambda key: rk.init_params(decoder, key, jnp.bfloat16), jax.random.key(0)))
    prompt, token = laid((jax.ShapeDtypeStruct((1, slots - 64), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)))
    for dtype in DTYPES:

        def read(params, tokens, dtype=dtype):
            return rk.prefill(decoder, params, tokens, max_new_tokens=64, cache_dtype=dtype)[1]

        cache = laid(jax.eval_shape(read, params, prompt))
        step = jax.jit(functools.partial(rk.decode_step, decoder), donate_argnums=2)
        with jax.set_mesh(one_device):  # says for which platform
            compiled = step.lower(params, token, cache).compile()
        analysis: Any = compiled.memory_analysis()
        layer = 2 * decoder.config.num_key_value_heads * decoder.config.head_dim * slots * 2
        found.add(
            f"memory {topology} {slots} {dtype}",
            {
                "cache": rk.cache_bytes(cache),
                "in place": analysis.alias_size_in_bytes,
                "temporaries": analysis.temp_size_in_bytes,
                "a layer in bfloat16": layer,
            },
        )


if __name__ == "__main__":
    app()
