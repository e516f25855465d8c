"""Measures what shared keys cost a model: `python scripts/measure_sharing.py --model M --groups groups.json ...`.

Prints the tables of docs/pod.md: how far each variant's next-token distribution diverges from the dense model's on text
that nothing was trained on, its loss there, and how many needles it finds. Every variant's figures are kept in the
run's directory, where the same command goes on.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import restkv_jax as rk
from restkv_jax.caches.base import Cache
from restkv_jax.commands.options import parse
from restkv_jax.evaluate import make_prompts
from restkv_jax.evaluate.accuracy import generate_texts, match_share
from restkv_jax.evaluate.tasks.texts import NUM_FOLLOWING, cut_pieces
from restkv_jax.generation.passes import append_all
from restkv_jax.generation.reading import prefill_each
from restkv_jax.models.decoder import logits


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compare, and on what."""

    run: pathlib.Path
    model: str
    text: pathlib.Path
    """that no variant was trained on"""
    groups: tuple[pathlib.Path, ...] = ()
    """files of `restkv pod groups`, measured untrained"""
    adapted: tuple[pathlib.Path, ...] = ()
    """directories of `restkv pod adapt`"""
    sink: int = 16
    recent: int = 112
    length: int = 1024
    budget: int = 100
    """distant tokens kept per block and KV head, with eviction; the dense model keeps as many bytes"""
    task: str = "essays"
    pieces: int = 20
    prompts: int = 20
    batch_size: int = 4
    seed: int = 11


class Variant(NamedTuple):
    """Lines of the table: a model that shares keys in its way, and what it evicts."""

    name: str
    model: Any
    params: Any
    policies: dict[str, rk.EvictionPolicy]


def variants(options: Options, model: Any, params: Any) -> Iterator[Variant]:
    """The dense model, then the others, each loaded when its turn comes."""
    evicting = {"": rk.full(), ", evicted": rk.restkv(options.budget)}
    # as many bytes as the first groups leave with eviction
    dense = {"": rk.full(), ", evicted": rk.restkv(dense_budget(options, model))}
    yield Variant("dense", model, params, dense)
    for path in options.groups:
        sharing = rk.pod.Sharing(rk.pod.LayerGroups.load(path, model), options.sink, options.recent)
        yield Variant(path.stem, model.clone(sharing=sharing), params, evicting)
    for path in options.adapted:
        other, trained, _ = rk.load_model(path / "model", jnp.float32)
        yield Variant(path.name, other, trained, evicting if other.sharing else dense)


def dense_budget(options: Options, model: Any) -> int:
    """Slots of a dense cache with as many bytes as one of the first groups' with the distant tokens of the budget."""
    proximal = options.sink + options.recent
    if not options.groups:
        return proximal + options.budget
    groups = rk.pod.LayerGroups.load(options.groups[0], model)
    share = (1 + groups.num_blocks / (groups.num_layers * groups.num_kv_heads)) / 2
    return proximal + round(share * options.budget)


@functools.partial(jax.jit, static_argnames=("model", "policies"))
def hidden_after(model: Any, params: Any, tokens: Array, following: Array, policies: tuple) -> Array:
    """The last hidden states of tokens read onto what each policy keeps of those before, [P, B, NUM_FOLLOWING, M]."""

    def step(cache: Cache, token: Array) -> tuple[Cache, Array]:
        hidden, cache = append_all(model, params, token[:, None], jnp.ones((len(token), 1), bool), cache)
        return cache, hidden[:, 0]

    _, caches = prefill_each(model, params, tokens, None, policies, NUM_FOLLOWING)
    return jnp.stack([jnp.moveaxis(jax.lax.scan(step, cache, following.T)[1], 0, 1) for cache in caches])


@functools.partial(jax.jit, static_argnames="model")
def compare(model: Any, dense: tuple[Any, Array], variant: tuple[Any, Array], following: Array) -> Array:
    """Of pieces [B], the mean over following tokens: divergence from the dense model, and the loss; float32 [2, B]."""

    def of_token(hidden: tuple[Array, Array], target: Array) -> Array:
        p, q = (jax.nn.log_softmax(logits(model, w, h)) for w, h in zip((dense[0], variant[0]), hidden, strict=True))
        return jnp.stack([(jnp.exp(p) * (p - q)).sum(-1), -jnp.take_along_axis(q, target[:, None], -1)[:, 0]])

    # the hidden states after a token predict the next, so the last one of the following has no target
    hidden = tuple(jnp.moveaxis(h[:, :-1], 1, 0) for h in (dense[1], variant[1]))
    return jax.lax.map(lambda x: of_token(*x), (hidden, following[:, 1:].T)).mean(0)


def batches(options: Options, tokenizer: Any) -> Iterator[tuple[Array, Array]]:
    """Pieces of the text: tokens int32 [B, T] and those that follow, [B, NUM_FOLLOWING]."""
    pieces = cut_pieces(tokenizer, options.text.read_text(), options.length, options.pieces, options.seed)
    for start in range(0, len(pieces), options.batch_size):
        batch = pieces[start : start + options.batch_size]
        yield jnp.array([piece.prefix for piece in batch]), jnp.array([piece.following for piece in batch])


def reference(options: Options, tokenizer: Any, dense: Variant) -> list[Array]:
    """The dense model's last hidden states of the following tokens, [B, NUM_FOLLOWING, M] of every batch."""
    path = options.run / "reference.npz"
    if not path.exists():
        read = jax.jit(lambda params, tokens: rk.read(dense.model, params, tokens)[0][:, -NUM_FOLLOWING:])
        found = [read(dense.params, jnp.concatenate(batch, axis=1)) for batch in batches(options, tokenizer)]
        np.savez(path, *found)
    return [jnp.asarray(hidden) for hidden in np.load(path).values()]


def measure(options: Options, tokenizer: Any, dense: Variant, variant: Variant) -> dict[str, dict]:
    """Divergences, losses and scores by piece or prompt, for each policy's name."""
    policies = variant.policies
    found = {name: {"divergence": [], "loss": []} for name in policies}
    of_batches = zip(reference(options, tokenizer, dense), batches(options, tokenizer), strict=True)
    for theirs, (tokens, following) in of_batches:
        ours = hidden_after(variant.model, variant.params, tokens, following, tuple(policies.values()))
        for hidden, values in zip(ours, found.values(), strict=True):
            both = compare(dense.model, (dense.params, theirs), (variant.params, hidden), following)
            for name, of_pieces in zip(("divergence", "loss"), np.asarray(both, float), strict=True):
                values[name] += of_pieces.tolist()
    prompts = make_prompts(options.task, tokenizer, options.length, options.prompts, options.seed)
    texts = generate_texts(
        variant.model, variant.params, tokenizer, prompts, tuple(policies.values()), options.batch_size
    )
    for said, values in zip(texts, found.values(), strict=True):
        values["found"] = [match_share(text, prompt.answers) for text, prompt in zip(said, prompts, strict=True)]
    return found


def cache_fraction(options: Options, dense: Variant, variant: Variant, policy: rk.EvictionPolicy) -> float:
    """Bytes of the cache of one prompt, of the dense model's full one."""
    tokens = jax.ShapeDtypeStruct((1, options.length), jnp.int32)

    def size(of: Variant, policy: rk.EvictionPolicy) -> int:
        prefill = functools.partial(rk.prefill, of.model, policy=policy, max_new_tokens=1)
        return rk.cache_bytes(jax.eval_shape(lambda params, tokens: prefill(params, tokens)[1], of.params, tokens))

    return size(variant, policy) / size(dense, rk.full())


def line(name: str, fraction: float, values: dict[str, list[float]]) -> str:
    """A row of the table: means with their standard errors."""

    def text(name: str, unit: float = 1, digits: int = 3) -> str:
        of = unit * np.array(values[name])
        return f"{of.mean():z.{digits}f} ± {of.std(ddof=1) / len(of) ** 0.5:.{digits}f}"

    return f"| {name} | {fraction:.1%} | {text('divergence')} | {text('loss')} | {text('found', 100, 0)} |"


def main(options: Options) -> None:
    """Measures what is not there yet, and prints the table."""
    options.run.mkdir(parents=True, exist_ok=True)
    model, params, tokenizer = rk.load_model(options.model, jnp.float32)
    model = model.clone(sharing=None)
    dense = Variant("dense", model, params, {})
    print("| variant | bytes | divergence | loss | needles found, % |")
    print("|---" * 5 + "|", flush=True)
    for variant in variants(options, model, params):
        path = options.run / f"{variant.name}.json"
        if not path.exists():
            path.write_text(json.dumps(measure(options, tokenizer, dense, variant)))
        for name, values in json.loads(path.read_text()).items():
            fraction = cache_fraction(options, dense, variant, variant.policies[name])
            print(line(variant.name + name, fraction, values), flush=True)


if __name__ == "__main__":
    main(parse(Options))
