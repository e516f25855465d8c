"""Measures what is kept of needle prompts on the embedded model: `python scripts/measure_selection.py`.

How often a bound on the candidates changes a selection over the whole model, and how far the least-squares refit
brings the window's output back. Prints the tables of docs/embedded.md.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.progress
from jax import Array

import restkv_jax as rk
from restkv_jax.caches.base import Cache
from restkv_jax.commands.options import parse
from restkv_jax.evaluate import is_exact, make_prompts
from restkv_jax.eviction.layer import evict
from restkv_jax.eviction.select import judge
from restkv_jax.generation.encoding import pad_left
from restkv_jax.kernels.pairs import Pairs
from restkv_jax.kernels.scores import read_pairs
from restkv_jax.models.decoder import Hooks, LayerView
from restkv_jax.models.memory import PairMemory


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure. Budgets are shares of the prompt; the window is at most half of one."""

    model: str | None = None
    """a directory or hub id; the embedded model by default"""
    tasks: tuple[str, ...] = ("multikey", "haystack")
    length: int = 1024
    budgets: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)
    candidates: tuple[int, ...] = (1, 2, 4)
    """bounds to compare with the exact selection, in budgets"""
    ridge: float = 0.01
    prompts: int = 100
    seed: int = 7
    batch_size: int = 10
    max_new_tokens: int = 16


def sized(preset: Any, options: Options, share: float, **parameters: Any) -> rk.EvictionPolicy:
    """A policy with a budget of a share of the prompts."""
    budget = round(share * options.length)
    return preset(budget=budget, window=min(32, budget // 2), **parameters)


def batches(options: Options, tokenizer: Any, prompts: Sequence[Any], name: str):
    """Prompts with their tokens int32 [B, T] and mask bool [B, T]."""
    for start in rich.progress.track(range(0, len(prompts), options.batch_size), name):
        part = prompts[start : start + options.batch_size]
        yield part, *pad_left([tokenizer(prompt.text)["input_ids"] for prompt in part], options.length)


def kept_sets(cache: Cache) -> list[list[set[int]]]:
    """Kept positions of every row, layer by layer and head by head."""
    kept = np.asarray(rk.kept_positions(cache))
    return [[set(head[head >= 0].tolist()) for layer in kept for head in layer[row]] for row in range(kept.shape[1])]


def candidate_rows(options: Options, model: Any, params: Any, tokenizer: Any, task: str) -> list[str]:
    """Selections with bounded candidates against exact ones, LaProx's scores."""
    prompts = make_prompts(task, tokenizer, options.length, options.prompts, options.seed)
    bounds = {f"{times} C": times for times in options.candidates} | {"all": None}
    policies = {}
    for share in options.budgets:
        for name, times in bounds.items():
            count = options.length if times is None else times * round(share * options.length)
            policies[share, name] = sized(rk.laprox, options, share, candidates=count)
    found = {key: [] for key in policies}
    for part, tokens, mask in batches(options, tokenizer, prompts, f"{task}: candidates"):
        outs = rk.generate_each(model, params, tokens, mask, tuple(policies.values()), options.max_new_tokens)
        for key, out in zip(policies, outs, strict=True):
            texts = tokenizer.batch_decode(np.asarray(out.tokens), skip_special_tokens=True)
            right = [is_exact(text, prompt.answers) for text, prompt in zip(texts, part, strict=True)]
            found[key] += zip(kept_sets(out.cache), right, strict=True)
    return [
        f"| {task} | {share:.0%} | {name} | {compare(found[share, name], found[share, 'all'])} |"
        for share in options.budgets
        for name in bounds
        if name != "all"
    ]


def compare(bounded: list, exact: list) -> str:
    """Prompts and pairs that differ, and right answers of both."""
    pairs = [(ours, theirs) for (ours, _), (theirs, _) in zip(bounded, exact, strict=True)]
    differing = sum(ours != theirs for ours, theirs in pairs)
    lost = sum(len(b - a) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))
    total = sum(len(b) for _, theirs in pairs for b in theirs)
    right = (sum(r for _, r in found) for found in (bounded, exact))
    return f"{differing} of {len(exact)} | {lost / total:.2%} | {' / '.join(map(str, right))}"


def output_errors(model: Any, params: Any, tokens: Array, mask: Array, policies: Sequence[rk.EvictionPolicy]) -> Array:
    """Relative error of each layer's attention output for the window's tokens: float32 [L, B, policies]."""
    num_queries = max(policy.window for policy in policies)

    def observe(view: LayerView, memory: PairMemory, errors: Array) -> Array:
        pairs, num_layers = memory.pairs, model.config.num_hidden_layers
        known: dict = {}

        def error(policy: rk.EvictionPolicy) -> Array:
            shown = view.last(policy.window)
            kept = evict(policy, shown, pairs, policy.slots_given, num_layers, judge(policy, shown, pairs, known))
            exact, _ = read_pairs(shown.queries, pairs)
            missing = exact - read_pairs(shown.queries, Pairs(kept.keys, kept.values, kept.positions))[0]
            project = functools.partial(jnp.einsum, "bkgwd,kgdm->bwm", precision="highest")
            sizes = (jnp.linalg.norm(project(x, shown.output_projection), axis=(1, 2)) for x in (missing, exact))
            return jnp.divide(*sizes)

        return errors.at[view.index].set(jnp.stack([error(policy) for policy in policies], axis=-1))

    empty = jnp.zeros((model.config.num_hidden_layers, len(tokens), len(policies)))
    return rk.read(model, params, tokens, mask, Hooks(observe=observe, num_queries=num_queries), empty)[1]


def refit_rows(options: Options, model: Any, params: Any, tokenizer: Any, task: str) -> list[str]:
    """The window's error before and after the refit, mean over prompts and layers."""
    prompts = make_prompts(task, tokenizer, options.length, options.prompts, options.seed)
    refit = rk.LeastSquares(options.ridge)
    cells = {
        (share, name): sized(preset, options, share)
        for share in options.budgets
        for name, preset in (("snapkv", rk.snapkv), ("restkv", rk.restkv))
    }
    policies = tuple(p for plain in cells.values() for p in (plain, plain.replace(refit=refit)))
    measure = jax.jit(functools.partial(output_errors, model, policies=policies))
    errors = np.concatenate(
        [measure(params, tokens, mask) for _, tokens, mask in batches(options, tokenizer, prompts, f"{task}: refit")],
        axis=1,
    )
    rows = []
    for (share, name), pair in zip(cells, np.moveaxis(errors, -1, 0).reshape(-1, 2, *errors.shape[:2]), strict=True):
        before, after = pair
        grown = int((after > before * 1.0001 + 1e-6).sum())
        rows.append(
            f"| {task} | {share:.0%} | {name} | {before.mean():.3f} | {after.mean():.3f} | "
            f"{after.mean() / before.mean():.2f} | {grown} of {before.size} |"
        )
    return rows


def main(options: Options) -> None:
    """Prints both tables."""
    model, params, tokenizer = rk.load_model(options.model, dtype=jnp.float32)
    candidates = [row for task in options.tasks for row in candidate_rows(options, model, params, tokenizer, task)]
    refits = [row for task in options.tasks for row in refit_rows(options, model, params, tokenizer, task)]
    print(
        "\n| prompts | budget C | candidates | selections that differ | pairs lost | right answers, bounded / exact |"
    )
    print("|---" * 6 + "|", *candidates, sep="\n")
    print("\n| prompts | budget | scores | error | error refitted | ratio | prompts and layers where it grew |")
    print("|---" * 7 + "|", *refits, sep="\n")


if __name__ == "__main__":
    main(parse(Options))
