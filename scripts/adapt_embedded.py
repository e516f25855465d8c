"""Shares keys across the embedded model's layers: `python scripts/adapt_embedded.py --run build/pod`.

Finds groups, trains with each and without any on the same tokens, and prints tables of what each answers and
holds. Every step leaves its result in the run's directory, where the same command goes on.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any, NamedTuple

import embedded_data as data
import jax
import jax.numpy as jnp
import numpy as np
import rich.progress
from embedded_curriculum import CURRICULUM

import restkv_jax as rk
from restkv_jax.commands.options import parse
from restkv_jax.evaluate import make_prompts, measure_accuracy
from restkv_jax.generation.encoding import pad_left
from restkv_jax.pod.adaptation.loss import next_token_loss
from restkv_jax.pod.plot import plot_groups


@dataclasses.dataclass(frozen=True)
class Options:
    """What to share, how to train, what to measure. Proximal sizes are the paper's, scaled from 32k to the prompts."""

    run: pathlib.Path
    savings: tuple[float, ...] = (0.15, 0.29, 0.33)
    """share of the cache that the groups are to save at `length` tokens"""
    length: int = 1024
    sink: int = 16
    recent: int = 112
    sample_prompts: int = 24
    last_queries: int = 64
    steps: int = 120
    batch_size: int = 4
    learning_rate: float = 5e-4
    budget: int = 100
    """distant tokens kept per block and KV head, with eviction"""
    tasks: tuple[str, ...] = ("multikey", "haystack")
    prompts: int = 200
    seed: int = 11
    evaluation_batch: int = 10


class Variant(NamedTuple):
    """A line of the table: a model, how it shares keys, and what it evicts."""

    name: str
    params: Any
    sharing: rk.pod.Sharing | None
    policy: rk.EvictionPolicy = rk.full()


STAGE = next(step.data for step in CURRICULUM if step.data.name == "text-1104")


def sequences(tokenizer: Any, count: int, seed: int) -> dict[str, np.ndarray]:
    """Needle texts with many questions: tokens int32 [N, T], and weights of 1 on answers, float32 [N, T]."""
    vocabulary, rng = data.Vocabulary(tokenizer), np.random.default_rng(seed)
    rows, weights = [], []
    while len(rows) * STAGE.batch < count:
        batch = data.make_batch(STAGE, vocabulary, rng)
        marked = np.zeros(batch.tokens.shape, np.float32)
        asked = batch.answer >= 0
        marked[np.nonzero(asked)[0], batch.index[asked] + 1] = 1
        rows.append(batch.tokens)
        weights.append(marked)
    return {"tokens": np.concatenate(rows)[:count], "weights": np.concatenate(weights)[:count]}


def find_similarity(options: Options, model: Any, params: Any, tokenizer: Any) -> np.ndarray:
    """Of the layers, over prompts of all tasks: float32 [K, L, L]."""
    path = options.run / "similarity.npy"
    if not path.exists():
        each = max(1, options.sample_prompts // len(options.tasks))
        batches = []
        for task in options.tasks:
            prompts = make_prompts(task, tokenizer, options.length, each, options.seed + 1)
            batches.append(pad_left([tokenizer(prompt.text)["input_ids"] for prompt in prompts], options.length))
        proximal = {"sink": options.sink, "recent": options.recent}
        np.save(path, rk.pod.attention_similarity(model, params, batches, options.last_queries, **proximal))
    return np.load(path)


def saved(options: Options, groups: rk.pod.LayerGroups) -> float:
    """Share of the cache that groups save."""
    return 1 - groups.cache_fraction(options.length, options.sink, options.recent)


def find_groups(options: Options, model: Any, params: Any, tokenizer: Any) -> list[rk.pod.LayerGroups]:
    """For every saving in the options the groups that come closest, on the way of least loss; prints the way."""
    path = options.run / "merged.json"
    if not path.exists():
        sample = sequences(tokenizer, options.sample_prompts // 3, options.seed + 4)
        merged = rk.pod.merge_layers(model, params, **sample, sink=options.sink, recent=options.recent)
        path.write_text(json.dumps([(groups.leader, loss) for groups, loss in merged]))
    found = [(rk.pod.LayerGroups(leader), loss) for leader, loss in json.loads(path.read_text())]
    print("\n| blocks | bytes saved | loss, untrained | leaders of the KV heads, layer by layer |")
    print("|---" * 4 + "|")
    for groups, loss in found:
        leaders = ", ".join("".join(map(str, head)) for head in zip(*groups.leader, strict=True))
        print(f"| {groups.num_blocks} | {saved(options, groups):.1%} | {loss:.3f} | {leaders} |", flush=True)
    return [min((g for g, _ in found), key=lambda g: abs(saved(options, g) - saving)) for saving in options.savings]


def adapted(options: Options, model: Any, params: Any, tokenizer: Any, sharing: rk.pod.Sharing | None, name: str):
    """Parameters after training on the same tokens, whatever is shared."""
    training = rk.pod.Adaptation(
        steps=options.steps, batch_size=options.batch_size, learning_rate=options.learning_rate, seed=options.seed
    )
    rows = sequences(tokenizer, options.steps * options.batch_size, options.seed)
    return rk.pod.adapt(
        model, params, rows, sharing, adaptation=training, output=options.run / name, tokenizer=tokenizer
    )


def held_out_loss(model: Any, rows: dict[str, np.ndarray], variant: Variant) -> float:
    """Mean loss of answer tokens in new texts, nats; nothing is evicted."""

    @jax.jit
    def loss(params, tokens, weights):
        hidden, _ = rk.read(model.clone(sharing=variant.sharing), params, tokens)
        return next_token_loss(model, params, hidden, tokens, weights)

    parts = range(0, len(rows["tokens"]), STAGE.batch)
    sums = [loss(variant.params, *(rows[name][i : i + STAGE.batch] for name in ("tokens", "weights"))) for i in parts]
    return float(sum(sums) / rows["weights"][:, 1:].sum())


def cache_bytes(options: Options, model: Any, variant: Variant) -> int:
    """Bytes of the cache of one prompt."""
    prefill = functools.partial(rk.prefill, model, policy=variant.policy, max_new_tokens=16, sharing=variant.sharing)
    tokens = jax.ShapeDtypeStruct((1, options.length), jnp.int32)
    return rk.cache_bytes(jax.eval_shape(lambda params, tokens: prefill(params, tokens)[1], variant.params, tokens))


def measure(options: Options, model: Any, tokenizer: Any, held_out: dict[str, np.ndarray], variant: Variant) -> dict:
    """The cells of a line, from the run's file where they are there already."""
    path = options.run / f"{variant.name.replace(' ', '_').replace('%', '').replace(',', '')}.json"
    if path.exists():
        return json.loads(path.read_text())
    cells = {"loss": held_out_loss(model, held_out, variant), "bytes": cache_bytes(options, model, variant)}
    for task in options.tasks:
        prompts = make_prompts(task, tokenizer, options.length, options.prompts, options.seed + 2)
        show = functools.partial(rich.progress.track, description=f"{variant.name}: {task}")
        (accuracy,) = measure_accuracy(
            model, variant.params, tokenizer, prompts, (variant.policy,), options.evaluation_batch, show,
            sharing=variant.sharing,
        )  # fmt: skip
        cells[task] = accuracy._asdict()
    path.write_text(json.dumps(cells))
    return cells


def line(options: Options, variant: Variant, cells: dict, full_bytes: int) -> str:
    """A row of the table."""
    answers = (
        f"{a['correct'] / a['total']:.1%} ({100 * a['low']:.1f}-{100 * a['high']:.1f})"
        for a in (cells[task] for task in options.tasks)
    )
    return " | ".join(
        ["", variant.name, *answers, f"{cells['loss']:.3f}", f"{cells['bytes'] / full_bytes:.1%}", ""]
    ).strip()


def main(options: Options) -> None:
    """Runs all steps and prints the table."""
    options.run.mkdir(parents=True, exist_ok=True)
    model, params, tokenizer = rk.load_model(dtype=jnp.float32)
    similarity = find_similarity(options, model, params, tokenizer)
    held_out = sequences(tokenizer, 64, options.seed + 3)
    variants = [
        Variant("full", params, None),
        Variant("dense, trained", adapted(options, model, params, tokenizer, None, "dense"), None),
    ]
    for groups in find_groups(options, model, params, tokenizer):
        name = f"{saved(options, groups):.0%}"
        plot_groups(similarity, groups).savefig(options.run / f"groups-{name.rstrip('%')}.png", dpi=150)
        sharing = rk.pod.Sharing(groups, options.sink, options.recent)
        trained = adapted(options, model, params, tokenizer, sharing, name.rstrip("%"))
        variants += [
            Variant(f"shared, {name} saved", params, sharing),
            Variant(f"shared, {name} saved, adapted", trained, sharing),
        ]
    # Distant tokens thinned as well, with the groups before those that save most.
    name, trained, sharing, _ = variants[-3]
    evicting = {"snapkv": rk.snapkv(options.budget), "restkv": rk.restkv(options.budget)}
    variants += [Variant(f"{name}, {method}", trained, sharing, policy) for method, policy in evicting.items()]
    lines = [(variant, measure(options, model, tokenizer, held_out, variant)) for variant in variants]
    print("\n| cache |", " | ".join(options.tasks), "| loss | bytes |")
    print("|---" * (len(options.tasks) + 3) + "|")
    for variant, cells in lines:
        print(line(options, variant, cells, lines[0][1]["bytes"]))


if __name__ == "__main__":
    main(parse(Options))
