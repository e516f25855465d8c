"""Trains the embedded model from a seed: `python scripts/train_embedded.py --run build/embedded`.

The curriculum goes from periodic repeats to needle texts; a stage is done when its answers are exact. Earlier stages
keep a share of the steps. A killed run resumes from its last checkpoint.
"""

import concurrent.futures
import dataclasses
import functools
import json
import pathlib
import time
from typing import Any, NamedTuple

import embedded_data as data
import embedded_forward
import embedded_tokenizer
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import rich.progress
import tyro
from embedded_curriculum import CURRICULUM, choose_stage, stage_index

import restkv_jax as rk
from restkv_jax.models.config import ModelConfig

SMALL_VOCABULARY, ANSWER_VOCABULARY = 432, 3200
AVERAGE_RATE = 0.01
CONSTANT_COMPONENTS = 8
EMBEDDING_SCALE = 0.05
CONSTANT_SCALE = 0.15
POSITION_WEIGHTS = (60.0, 40.0, 30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class Options:
    """How to train. `steps` counts optimiser steps of all stages; the last `decay` share lowers the learning rate."""

    run: pathlib.Path
    start: pathlib.Path | None = None
    """a model directory to start from, at the first step `start_step`, which belongs to the stage `start_stage`"""
    start_step: int = 3300
    start_stage: str = "text-2064"
    seed: int = 0
    steps: int = 3450
    hidden_size: int = 192
    intermediate_size: int = 256
    num_layers: int = 6
    num_heads: int = 6
    rope_theta: float = 1e6
    muon_rate: float = 0.02
    adam_rate: float = 0.003
    warmup: int = 30
    decay: float = 0.31
    checkpoint_every: int = 100


class State(NamedTuple):
    """Weights, the optimiser's state, and the running average of the weights, which is what is exported."""

    params: Any
    optimizer: Any
    average: Any


def model_config(options: Options, tokenizer: Any) -> dict[str, Any]:
    """The `config.json` of the embedded model."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(tokenizer),
        "hidden_size": options.hidden_size,
        "intermediate_size": options.intermediate_size,
        "num_hidden_layers": options.num_layers,
        "num_attention_heads": options.num_heads,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 8192,
        "rope_theta": options.rope_theta,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "bfloat16",
    }


def initial_params(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Normal weights of variance 1 / fan-in, small where they write to the residual stream.

    Some embedding components are equal for all tokens; from these, head h of the first layer starts out attending to
    the token h + 1 places before, which induction heads build on.
    """
    hidden, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    kv_heads, dim, inner = config.num_key_value_heads, config.head_dim, config.intermediate_size
    keys = jax.random.split(key, 8)
    small = (2 * layers) ** -0.5

    def normal(i, *shape, std):
        return std * jax.random.normal(keys[i], shape)

    weights = {
        "input_norm": jnp.ones((layers, hidden)),
        "query_projection": normal(1, layers, hidden, heads, dim, std=hidden**-0.5),
        "key_projection": normal(2, layers, hidden, kv_heads, dim, std=hidden**-0.5),
        "value_projection": normal(3, layers, hidden, kv_heads, dim, std=hidden**-0.5),
        "output_projection": normal(4, layers, heads, dim, hidden, std=small * (heads * dim) ** -0.5),
        "post_attention_norm": jnp.ones((layers, hidden)),
        "gate_projection": normal(5, layers, hidden, inner, std=hidden**-0.5),
        "up_projection": normal(6, layers, hidden, inner, std=hidden**-0.5),
        "down_projection": normal(7, layers, inner, hidden, std=small * inner**-0.5),
    }
    query, key_vectors = position_vectors(config, jnp.arange(heads) + 1)
    constant = slice(0, CONSTANT_COMPONENTS)
    weights["query_projection"] = weights["query_projection"].at[0].multiply(0.1).at[0, constant].add(query)
    weights["key_projection"] = weights["key_projection"].at[0].multiply(0.1).at[0, constant].add(key_vectors)
    weights["output_projection"] = weights["output_projection"].at[0].divide(small)
    embedding = normal(0, config.vocab_size, hidden, std=EMBEDDING_SCALE).at[:, constant].set(CONSTANT_SCALE)
    return {"embedding": embedding, "final_norm": jnp.ones(hidden), "layers": weights}


def position_vectors(config: ModelConfig, offsets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What each constant component adds to queries [H, D] and keys [D] so that heads look `offsets` [H] places back.

    Under RoPE the score is then a sum of `POSITION_WEIGHTS` times cosines over the fastest rotations.
    """
    pairs = config.head_dim // 2
    frequencies = dict(config.rope_parameters)["rope_theta"] ** (-jnp.arange(pairs) / pairs)
    amplitude = jnp.zeros(pairs).at[: len(POSITION_WEIGHTS)].set(jnp.sqrt(jnp.array(POSITION_WEIGHTS)))
    mean_square = (
        CONSTANT_COMPONENTS * CONSTANT_SCALE**2 + (config.hidden_size - CONSTANT_COMPONENTS) * EMBEDDING_SCALE**2
    ) / config.hidden_size
    share = mean_square**0.5 / (CONSTANT_COMPONENTS * CONSTANT_SCALE)
    angles = -frequencies * offsets[:, None]
    query = jnp.concatenate([amplitude * jnp.cos(angles), amplitude * jnp.sin(angles)], axis=1)
    return share * query, share * jnp.concatenate([amplitude, jnp.zeros(pairs)])


def make_optimizer(options: Options) -> optax.GradientTransformation:
    """Muon on the matrices, Adam on embedding and norms; the caller scales updates by `rate_scale`."""
    dims = optax.contrib.MuonDimensionNumbers
    matrices = {
        "query_projection": dims(1, (2, 3)),
        "key_projection": dims(1, (2, 3)),
        "value_projection": dims(1, (2, 3)),
        "output_projection": dims((1, 2), 3),
        "gate_projection": dims(1, 2),
        "up_projection": dims(1, 2),
        "down_projection": dims(1, 2),
    }

    def kinds(params):
        return {
            "embedding": None,
            "final_norm": None,
            "layers": {name: matrices.get(name) for name in params["layers"]},
        }

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            options.muon_rate,
            ns_steps=4,
            adam_b2=0.99,
            adam_learning_rate=options.adam_rate,
            muon_weight_dimension_numbers=kinds,
        ),
    )


def rate_scale(options: Options, step: int, rate: float) -> float:
    """Warm-up, constant, then linear to zero, times `rate`."""
    left = (options.steps - step) / max(1, options.decay * options.steps)
    done = step - (options.start_step if options.start else 0)
    return rate * min(1.0, (done + 1) / options.warmup, max(left, 0.0))


def answer_loss(config: ModelConfig, params: Any, batch: data.Batch, vocabulary_size: int):
    """Mean cross entropy of the supervised tokens, and which of them are predicted right, bool [B, N].

    Where several tokens are right, their probabilities add up. Tokens beyond the vocabulary's size are left out.
    """
    hidden = embedded_forward.hidden_states(config, params, batch.tokens, batch.positions, batch.log_copies)
    hidden = jnp.take_along_axis(hidden, batch.index[..., None], axis=1)
    scores = hidden.reshape(-1, hidden.shape[-1]) @ params["embedding"][:vocabulary_size].T
    scores = scores.reshape(*batch.index.shape, -1)
    wanted = jnp.take_along_axis(scores, jnp.clip(batch.target, 0, vocabulary_size - 1), axis=-1)
    wanted = jnp.where(batch.target >= 0, wanted, -1e9)
    weight = (batch.answer >= 0) & (batch.target[..., 0] < vocabulary_size)
    losses = jax.nn.logsumexp(scores, axis=-1) - jax.nn.logsumexp(wanted, axis=-1)
    right = wanted.max(axis=-1) >= scores.max(axis=-1)
    return jnp.where(weight, losses, 0.0).sum() / weight.sum(), right | ~weight


def make_step(config: ModelConfig, optimizer: optax.GradientTransformation, vocabulary_size: int):
    """The jitted step: (state, batch, scale) to (state, loss, right)."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: State, batch: data.Batch, scale):
        loss = functools.partial(answer_loss, config, batch=batch, vocabulary_size=vocabulary_size)
        (value, right), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = jax.tree.map(lambda p, u: p + scale * u, state.params, updates)
        average = jax.tree.map(lambda a, p: a + AVERAGE_RATE * (p - a), state.average, params)
        return State(params, optimizer_state, average), value, right

    return step


def exact_shares(stage: data.Stage, batch: data.Batch, right: np.ndarray) -> dict[str, float]:
    """Share of answers all of whose tokens are right, of all and by the format of their row."""
    rows = np.arange(len(batch.answer))[:, None] * 10_000
    asked = batch.answer >= 0
    numbers, index = np.unique((rows + batch.answer)[asked], return_inverse=True)
    exact = np.bincount(index, weights=~np.asarray(right)[asked]) == 0
    forms = batch.form[numbers // 10_000]
    by_form = {name: exact[forms == i].mean() for i, (name, _) in enumerate(stage.formats) if (forms == i).any()}
    return {name: round(float(share), 4) for name, share in {"all": exact.mean(), **by_form}.items()}


class Progress(NamedTuple):
    """Where a run stands: steps done, stage of the curriculum, steps in it, running share of exact answers by stage."""

    step: int = 0
    stage: int = 0
    since: int = 0
    exact: dict[str, float] = {}  # noqa: RUF012

    def after(self, name: str, exact: float) -> "Progress":
        """Counts a step on the stage called `name`; moves on when the current stage is solved or has had its time."""
        shares = self.exact | {name: 0.9 * self.exact.get(name, 0.0) + 0.1 * exact}
        current = CURRICULUM[self.stage]
        done = shares.get(current.data.name, 0.0) >= current.solved or self.since + 1 >= current.patience
        if done and self.stage + 1 < len(CURRICULUM):
            return Progress(self.step + 1, self.stage + 1, 0, shares)
        return Progress(self.step + 1, self.stage, self.since + 1, shares)


def scored_vocabulary(stage: data.Stage, step: int, full: int) -> int:
    """How many tokens compete in the loss: those that answers are made of, and every third step in texts all."""
    if stage.kind != "text":
        return SMALL_VOCABULARY if stage.pool == 128 else ANSWER_VOCABULARY
    return full if step % 3 == 0 else ANSWER_VOCABULARY


def draw(options: Options, vocabulary: data.Vocabulary, step: int, stage: int) -> tuple[int, data.Batch]:
    """The stage and the batch of a step, the same whenever it is drawn."""
    rng = np.random.default_rng([options.seed, step])
    chosen = choose_stage(stage, rng)
    return chosen, data.make_batch(CURRICULUM[chosen].data, vocabulary, rng)


class Checkpoints:
    """Saves and restores a run with orbax, and writes the averaged weights as a model directory."""

    def __init__(self, run: pathlib.Path, model: Any, tokenizer: Any):
        keep = ocp.CheckpointManagerOptions(max_to_keep=2)
        self.manager = ocp.CheckpointManager((run / "checkpoints").absolute(), options=keep)
        self.run, self.model, self.tokenizer = run, model, tokenizer

    def restore(self, state: State, progress: Progress) -> tuple[State, Progress]:
        """The last checkpoint, or what is given."""
        step = self.manager.latest_step()
        if step is None:
            return state, progress
        kinds = ocp.args.Composite(state=ocp.args.StandardRestore(state), progress=ocp.args.JsonRestore())
        restored = self.manager.restore(step, args=kinds)
        return restored["state"], Progress(**restored["progress"])

    def save(self, state: State, progress: Progress) -> None:
        """Writes the checkpoint, and the averaged weights in bfloat16 to `run/model`."""
        kinds = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress._asdict()))
        self.manager.save(progress.step, args=kinds)
        self.manager.wait_until_finished()
        rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16), state.average)
        rk.save_model(self.run / "model", self.model, rounded, self.tokenizer)


def main(options: Options) -> None:
    """Trains until `steps` are done; the model stands in `run/model` from the first checkpoint on."""
    options.run.mkdir(parents=True, exist_ok=True)
    tokenizer = embedded_tokenizer.build_tokenizer()
    vocabulary = data.Vocabulary(tokenizer)
    model = rk.build_model(model_config(options, tokenizer))
    optimizer = make_optimizer(options)
    params, progress = initial_params(model.config, jax.random.key(options.seed)), Progress()
    if options.start:
        params = jax.tree.map(jnp.array, rk.load_model(options.start, dtype=jnp.float32)[1])
        progress = Progress(options.start_step, stage_index(options.start_stage))
    checkpoints = Checkpoints(options.run, model, tokenizer)
    state = State(params, optimizer.init(params), jax.tree.map(jnp.copy, params))
    state, progress = checkpoints.restore(state, progress)
    sizes = SMALL_VOCABULARY, ANSWER_VOCABULARY, len(tokenizer)
    steps = {size: make_step(model.config, optimizer, size) for size in sizes}

    columns = *rich.progress.Progress.get_default_columns(), rich.progress.TextColumn("{task.fields[status]}")
    with (
        concurrent.futures.ThreadPoolExecutor(1) as pool,
        rich.progress.Progress(*columns) as bar,
        (options.run / "metrics.jsonl").open("a") as log,
    ):
        shown = bar.add_task("training", total=options.steps, completed=progress.step, status="")
        upcoming = pool.submit(draw, options, vocabulary, progress.step, progress.stage)
        while progress.step < options.steps:
            started, (chosen, batch) = time.monotonic(), upcoming.result()
            upcoming = pool.submit(draw, options, vocabulary, progress.step + 1, progress.stage)
            stage = CURRICULUM[chosen].data
            size = scored_vocabulary(stage, progress.step, len(tokenizer))
            state, loss, right = steps[size](
                state, batch, rate_scale(options, progress.step, CURRICULUM[progress.stage].rate)
            )
            shares, seconds = exact_shares(stage, batch, right), time.monotonic() - started
            exact = shares.pop("all")
            record = {
                "step": progress.step,
                "stage": stage.name,
                "loss": round(float(loss), 4),
                "exact": exact,
                "by_format": shares,
            }
            record |= {"tokens_per_second": round(batch.tokens.size / seconds), "time": round(time.time())}
            print(json.dumps(record), file=log, flush=True)
            before, progress = progress, progress.after(stage.name, exact)
            if progress.stage != before.stage:
                name = CURRICULUM[before.stage].data.name
                bar.console.print(f"step {before.step}: {name} left at {progress.exact.get(name, 0.0):.3f} exact")
            status = f"{stage.name} loss {loss:.3f} exact {progress.exact[stage.name]:.3f}"
            bar.update(shown, completed=progress.step, status=f"{status} {record['tokens_per_second']} tok/s")
            if progress.step % options.checkpoint_every == 0 or progress.step == options.steps:
                checkpoints.save(state, progress)


if __name__ == "__main__":
    main(tyro.cli(Options))
