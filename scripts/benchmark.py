"""Measures memory of the prefill, time per decoded token and time of the prefill, small cache against full cache.

Prints the tables of docs/performance.md: `python scripts/benchmark.py`. Memory is what the compiler says of the
programs (`memory_analysis`), nothing is run for it. Times are medians of one run on this machine.
"""

import dataclasses
import functools
import json
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

import restkv_jax as rk
from restkv_jax.caches.paged import fill_pages, pool_shape
from restkv_jax.commands.options import parse
from restkv_jax.eviction.allocation import ALLOCATIONS, ModelWide, make_allocation
from restkv_jax.models.decoder import Decoder
from restkv_jax.models.mesh import make_mesh
from restkv_jax.pod.adaptation.program import make_program

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure. The model has the shape of Llama 3.2 1B; for times, fewer layers and a smaller vocabulary.

    Args:
      model: a `config.json` of another shape, for time per token and time of the prefill.
      dtype: of weights and cache where times are measured.
      only: print only the tables in whose title this regular expression is found.
    """

    model: pathlib.Path | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"

    lengths: tuple[int, ...] = (4096, 16384, 65536)
    budget: int = 512
    mean_budget: int = 1024
    timed_layers: int = 4
    timed_vocabulary: int = 32768
    steps: int = 15
    prefill_lengths: tuple[int, ...] = (2048, 8064)
    repeats: int = 5
    only: str = ""


def llama(layers: int = 16, vocabulary: int = 128256) -> Decoder:
    """Llama 3.2 1B in shape, or some layers of it."""
    return rk.build_model(
        dict(
            model_type="llama", vocab_size=vocabulary, hidden_size=2048, intermediate_size=8192,
            num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
            max_position_embeddings=131072, rope_theta=500000.0, tie_word_embeddings=True,
        )
    )  # fmt: skip


def timed_model(options: Options) -> Decoder:
    """The model whose times are measured."""
    if options.model is None:
        return llama(options.timed_layers, options.timed_vocabulary)
    smaller = dict(num_hidden_layers=options.timed_layers, vocab_size=options.timed_vocabulary)
    smaller |= dict(bos_token_id=None, eos_token_id=None)
    return rk.build_model(json.loads(options.model.read_text()) | smaller)


def policies(options: Options) -> dict[str, rk.EvictionPolicy]:
    """The two sides of every comparison."""
    return {"full": rk.full(), "restkv": rk.restkv(budget=options.budget)}


def prefill_program(model: Any, policy: rk.EvictionPolicy, length: int, dtype: Any):
    """The lowered prefill of one prompt: (params, tokens) to (logits, cache)."""
    params = jax.eval_shape(lambda key: rk.init_params(model, key, dtype), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return jax.jit(lambda params, tokens: rk.prefill(model, params, tokens, policy=policy)).lower(params, tokens)


def memory_of(compiled: jax.stages.Compiled) -> tuple[float, float]:
    """Temporaries and outputs of a program, in MiB."""
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes / MIB, memory.output_size_in_bytes / MIB


def prefill_memory(options: Options) -> list[str]:
    """Peak memory beyond the weights: temporaries and the cache that comes out."""
    model = llama()
    rows = ["| prompt | cache | temporaries | cache that stays | sum | share |", "|---|---|---|---|---|---|"]
    for length in track(options.lengths, "prefill memory"):
        sums = {}
        for name, policy in policies(options).items():
            temporary, output = memory_of(prefill_program(model, policy, length, jnp.float32).compile())
            sums[name] = temporary + output
            share = f"{sums[name] / sums['full']:.0%}"
            rows.append(
                f"| {length:,} | {name} | {temporary:,.0f} MiB | {output:,.0f} MiB | {sums[name]:,.0f} MiB | {share} |"
            )
    return rows


def filled_cache(
    model: Any, policy: rk.EvictionPolicy, length: int, new_tokens: int, dtype: Any = jnp.float32
) -> rk.KVCache:
    """The cache after a prefill, its keys and values drawn at random: the time of a step does not depend on them."""
    params = jax.eval_shape(lambda key: rk.init_params(model, key, dtype), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    prefill = lambda p, t: rk.prefill(model, p, t, policy=policy, max_new_tokens=new_tokens)[1]  # noqa: E731
    shapes = jax.eval_shape(prefill, params, tokens)
    rng, kept = np.random.default_rng(0), policy.slots(length)
    positions = np.where(np.arange(shapes.num_slots) < kept, np.arange(shapes.num_slots) + length - kept, -1)
    drawn = rng.standard_normal(shapes.keys.shape[1:], np.float32)
    pairs = jnp.broadcast_to(jnp.asarray(drawn, shapes.keys.dtype), shapes.keys.shape)
    length_of_row = jnp.full((1,), length, jnp.int32)
    return rk.KVCache(
        keys=pairs,
        values=pairs + 0,
        positions=jnp.broadcast_to(jnp.asarray(positions, jnp.int32), shapes.positions.shape),
        lengths=jnp.full(shapes.lengths.shape, kept, jnp.int32),
        prompt_lengths=length_of_row,
        next_positions=length_of_row + 0,
    )


def decode_times(options: Options) -> list[str]:
    """Median seconds of a decode step, the two sides in turn."""
    model, dtype = timed_model(options), jnp.dtype(options.dtype)
    shapes = jax.eval_shape(lambda key: rk.init_params(model, key, dtype), jax.random.key(0))
    params = jax.tree.map(lambda s: jnp.full(s.shape, 0.01, s.dtype), shapes)
    rows = [
        "| prompt | full: cache | time per token | restkv: cache | time per token | full / restkv |",
        "|---" * 6 + "|",
    ]
    for length in track(options.lengths, "time per token"):
        caches = {n: filled_cache(model, p, length, options.steps + 2, dtype) for n, p in policies(options).items()}
        sizes = {name: rk.cache_bytes(cache) / MIB for name, cache in caches.items()}

        def step(name, caches=caches):
            token, policy = jnp.zeros(1, jnp.int32), policies(options)[name]
            logits, caches[name] = rk.decode_step(model, params, token, caches[name], policy=policy)
            jax.block_until_ready((logits, caches[name]))

        seconds = alternate({name: functools.partial(step, name) for name in caches}, options.steps)
        cells = " | ".join(f"{sizes[name]:,.0f} MiB | {1000 * seconds[name]:,.1f} ms" for name in ("full", "restkv"))
        rows.append(f"| {length:,} | {cells} | {seconds['full'] / seconds['restkv']:.1f} |")
        del caches
    return rows


def allocation_bytes(options: Options) -> list[str]:
    """Bytes of the cache arrays under every allocation, from shapes alone: Llama 3.1 8B, bfloat16."""
    model = rk.build_model(
        dict(
            model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=131072,
        )
    )  # fmt: skip
    params = jax.eval_shape(lambda key: rk.init_params(model, key, jnp.bfloat16), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, options.lengths[-1]), jnp.int32)
    rows = ["| allocation | slots | cache | of uniform |", "|---" * 4 + "|"]
    uniform = None
    for allocation in ALLOCATIONS:
        policy = rk.restkv(options.mean_budget).replace(allocation=make_allocation(allocation))
        prefill = lambda p, t, policy=policy: rk.prefill(model, p, t, policy=policy)[1]  # noqa: E731
        cache = jax.eval_shape(prefill, params, tokens)
        held = rk.cache_bytes(cache)
        uniform = held if uniform is None else uniform
        rows.append(f"| {allocation} | {cache.positions.size:,} | {held / MIB:,.1f} MiB | {held / uniform:.3f} |")
    return rows


def model_wide_memory(options: Options) -> list[str]:
    """Peak memory of a prefill that shares its budget over the whole model, beyond the weights."""
    model, length = llama(), options.lengths[-1]
    compared = {
        "full": rk.full(),
        "uniform": rk.snapkv(options.budget),
        "model": rk.snapkv(options.budget).replace(allocation=ModelWide()),
    }
    rows = ["| cache | temporaries | cache that stays | sum |", "|---" * 4 + "|"]
    for name, policy in track(compared.items(), "model-wide selection"):
        temporary, output = memory_of(prefill_program(model, policy, length, jnp.float32).compile())
        rows.append(f"| {name} | {temporary:,.0f} MiB | {output:,.0f} MiB | {temporary + output:,.0f} MiB |")
    return rows


def ragged_cache(dense: rk.KVCache, new_tokens: int) -> rk.PagedCache:
    """As many pairs as a dense cache, in pages, with lengths that differ by head from nothing to several times more."""
    rng, heads, total = np.random.default_rng(0), dense.lengths.size, int(dense.lengths.sum())
    widest = 4 * total // heads
    lengths = np.minimum((rng.dirichlet(np.full(heads, 1.0)) * total).astype(int), widest)
    while lengths.sum() < total:
        lengths = np.minimum(lengths + -(-(total - lengths.sum()) // heads), widest)
    keep = jnp.asarray(np.arange(widest) < lengths.reshape(*dense.lengths.shape, 1))
    pairs = jnp.zeros((*keep.shape, dense.keys.shape[-1]))
    shape = pool_shape(int(lengths.sum()), widest, heads, new_tokens, 16)
    positions = jnp.broadcast_to(jnp.arange(widest), keep.shape)
    pages: dict[str, Any] = fill_pages(shape, pairs, pairs, positions, keep, new_tokens)
    pages |= {name: pages[name][None, None] for name in ("keys", "values", "positions")}
    return rk.PagedCache(
        **pages, prompt_lengths=dense.prompt_lengths + 0, next_positions=jnp.maximum(dense.next_positions, widest)
    )


def ragged_times(options: Options) -> list[str]:
    """Median seconds of a decode step on pages and on a dense cache with as many pairs."""
    model = llama(options.timed_layers, options.timed_vocabulary)
    shapes = jax.eval_shape(lambda key: rk.init_params(model, key), jax.random.key(0))
    params = jax.tree.map(lambda s: jnp.full(s.shape, 0.01, s.dtype), shapes)
    rows = ["| mean budget | longest head | dense | paged | paged / dense |", "|---" * 5 + "|"]
    for budget in track((options.budget, options.mean_budget, 4 * options.mean_budget), "time per token on pages"):
        policy = rk.restkv(budget)
        caches: dict[str, Any] = {"dense": filled_cache(model, policy, 65536, options.steps + 2)}
        caches["paged"] = ragged_cache(caches["dense"], options.steps + 2)
        longest = int(caches["paged"].lengths.max())

        def step(name, caches=caches, policy=policy):
            logits, caches[name] = rk.decode_step(model, params, jnp.zeros(1, jnp.int32), caches[name], policy=policy)
            jax.block_until_ready((logits, caches[name]))

        seconds = alternate({name: functools.partial(step, name) for name in caches}, options.steps)
        dense, paged = (1000 * seconds[name] for name in ("dense", "paged"))
        rows.append(f"| {budget:,} | {longest:,} | {dense:,.0f} ms | {paged:,.0f} ms | {paged / dense:.2f} |")
    return rows


def prefill_times(options: Options) -> list[str]:
    """Seconds of the prefill, policies in turn: of the embedded model, or of another with random weights."""
    if options.model is None:
        model, params, _ = rk.load_model(dtype=jnp.dtype(options.dtype))
    else:
        model = timed_model(options)
        params = rk.init_params(model, jax.random.key(0), jnp.dtype(options.dtype))
    compared = policies(options) | {"best": rk.best(options.budget)}
    rows = ["| prompt | full | restkv | best | restkv / full | best / full |", "|---|---|---|---|---|---|"]
    for length in track(options.prefill_lengths, "time of the prefill"):
        tokens = np.random.default_rng(0).integers(5, model.config.vocab_size, (1, length))
        medians = alternate(
            {name: _prefill_call(model, params, tokens, policy) for name, policy in compared.items()},
            options.repeats,
        )
        seconds = " | ".join(f"{medians[name]:.2f} s" for name in compared)
        ratios = " | ".join(f"{medians[name] / medians['full']:.2f}" for name in ("restkv", "best"))
        rows.append(f"| {length:,} | {seconds} | {ratios} |")
    return rows


def _prefill_call(model: Any, params: Any, tokens: np.ndarray, policy: rk.EvictionPolicy) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(rk.prefill(model, params, tokens, policy=policy))


def shared_cache(model: Any, sharing: rk.pod.Sharing, length: int, new_tokens: int) -> rk.pod.SharedCache:
    """The cache after a prefill with shared keys, its keys and values constant."""
    params = jax.eval_shape(lambda key: rk.init_params(model, key), jax.random.key(0))
    prefill = functools.partial(rk.prefill, model, max_new_tokens=new_tokens, sharing=sharing)
    shapes = jax.eval_shape(prefill, params, jax.ShapeDtypeStruct((1, length), jnp.int32))[1]
    cache = jax.tree.map(lambda s: jnp.full(s.shape, 0.01, s.dtype), shapes)
    positions = sharing.sink + np.arange(cache.distant_positions.shape[-1])
    row = lambda value: jnp.full((1,), value, jnp.int32)  # noqa: E731
    return cache.replace(
        distant_positions=jnp.broadcast_to(jnp.asarray(positions, jnp.int32), shapes.distant_positions.shape),
        kept=row(length - sharing.proximal),
        prompt_lengths=row(length),
        next_positions=row(length),
    )


def shared_times(options: Options) -> list[str]:
    """Median seconds of a decode step with shared keys, distant tokens read everywhere or in leaders only."""
    model = llama(options.timed_layers, options.timed_vocabulary)
    shapes = jax.eval_shape(lambda key: rk.init_params(model, key), jax.random.key(0))
    params = jax.tree.map(lambda s: jnp.full(s.shape, 0.01, s.dtype), shapes)
    groups = rk.pod.LayerGroups(np.zeros((options.timed_layers, 8), int))
    sides = {"read": None, "skipped": 0.0}
    rows = [
        "| prompt | full: cache | time | shared: cache | time | distant skipped: time | read / skipped |",
        "|---" * 7 + "|",
    ]
    for length in track(options.lengths, "time per token with shared keys"):
        caches: dict[str, Any] = {"full": filled_cache(model, rk.full(), length, options.steps + 2)}
        for name, threshold in sides.items():
            sharing = rk.pod.Sharing(groups, recent=1008, skip_threshold=threshold)
            caches[name] = shared_cache(model, sharing, length, options.steps + 2)
        sizes = {name: rk.cache_bytes(cache) / MIB for name, cache in caches.items()}

        def step(name, caches=caches):
            logits, caches[name] = rk.decode_step(model, params, jnp.zeros(1, jnp.int32), caches[name])
            jax.block_until_ready((logits, caches[name]))

        seconds = alternate({name: functools.partial(step, name) for name in caches}, options.steps)
        full, read, skipped = (f"{1000 * seconds[name]:,.0f} ms" for name in ("full", "read", "skipped"))
        held = f"{sizes['full']:,.0f} MiB | {full} | {sizes['read']:,.0f} MiB | {read} | {skipped}"
        rows.append(f"| {length:,} | {held} | {seconds['read'] / seconds['skipped']:.1f} |")
        del caches
    return rows


def alternate(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each call, after one warm-up each, the calls taking turns."""
    for call in calls.values():
        call()
    seconds = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def training_memory(options: Options) -> list[str]:
    """Peak memory of a training step of the embedded model, one text, with shared keys and without."""
    model, _, _ = rk.load_model()
    groups = rk.pod.LayerGroups(np.repeat(np.arange(model.config.num_hidden_layers) // 2 * 2, 2).reshape(-1, 2))
    rows = ["| tokens | arithmetic | own keys | shared keys | shared / own |", "|---" * 5 + "|"]
    for dtype in ("float32", "bfloat16"):
        training = rk.pod.Adaptation(steps=1, batch_size=1, sequence_length=options.lengths[0], compute_dtype=dtype)
        peaks = []
        for sharing in (None, rk.pod.Sharing(groups, recent=1008)):
            program = make_program(model.clone(sharing=sharing), training, make_mesh())
            compiled = program.lower().compile()
            peaks.append(memory_of(compiled)[0])
        own, shared = peaks
        rows.append(f"| {options.lengths[0]:,} | {dtype} | {own:.0f} MiB | {shared:.0f} MiB | {shared / own:.2f} |")
    return rows


def main(options: Options) -> None:
    """Prints all tables."""
    tables = (
        ("Peak memory of the prefill", prefill_memory),
        ("Time per token", decode_times),
        ("Time of the prefill", prefill_times),
        ("Bytes of the cache under every allocation", allocation_bytes),
        ("Peak memory of model-wide selection", model_wide_memory),
        ("Time per token on pages", ragged_times),
        ("Time per token with shared keys", shared_times),
        ("Peak memory of a training step", training_memory),
    )
    for title, measure in tables:
        if re.search(options.only, title):
            print(f"\n### {title}\n", *measure(options), sep="\n", flush=True)


if __name__ == "__main__":
    main(parse(Options))
