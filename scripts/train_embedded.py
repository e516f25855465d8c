"""Trains the embedded model from a seed: `python scripts/train_embedded.py --run build/embedded`.

The curriculum goes from short texts to long ones; earlier stages keep a share of the steps. Besides what answers cost,
heads are shown where to look (`embedded_circuit`). A killed run resumes from its last checkpoint.
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
from embedded_circuit import initial_params, look_losses
from embedded_curriculum import CURRICULUM, choose_stage

import restkv_jax as rk
from restkv_jax.commands.options import parse
from restkv_jax.models.config import ModelConfig

LOOK_WEIGHT = 0.5
AVERAGE_RATE = 0.01
WHOLE_VOCABULARY_EVERY = 4


@dataclasses.dataclass(frozen=True)
class Options:
    """How to train. `steps` counts optimiser steps of all stages; the last `decay` share lowers the learning rate."""

    run: pathlib.Path
    seed: int = 0
    steps: int = 1800
    hidden_size: int = 256
    intermediate_size: int = 256
    num_layers: int = 6
    num_heads: int = 4
    head_dim: int = 64
    rope_theta: float = 1e8
    muon_rate: float = 0.02
    adam_rate: float = 0.003
    warmup: int = 30
    decay: float = 0.6
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
        "head_dim": options.head_dim,
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
    return rate * min(1.0, (step + 1) / options.warmup, max(left, 0.0))


def answer_loss(params: Any, hidden: jax.Array, batch: data.Batch, vocabulary_size: int):
    """Mean cross entropy of the supervised tokens, and which of them are predicted right, bool [B, N].

    Tokens beyond the vocabulary's size are left out.
    """
    hidden = jnp.take_along_axis(hidden, batch.index[..., None], axis=1)
    logits = hidden @ params["embedding"][:vocabulary_size].T
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.target)
    weight = (batch.answer >= 0) & (batch.target < vocabulary_size)
    right = logits.argmax(axis=-1) == batch.target
    return jnp.where(weight, losses, 0.0).sum() / weight.sum(), right | ~weight


def make_step(config: ModelConfig, optimizer: optax.GradientTransformation, vocabulary_size: int):
    """The jitted step: (state, batch, scale) to (state, loss, loss of the looks by role, right)."""

    def total(params, batch):
        hidden, queries, keys = embedded_forward.hidden_states(
            config, params, batch.tokens, batch.positions, batch.log_copies
        )
        loss, right = answer_loss(params, hidden, batch, vocabulary_size)
        looks = look_losses(queries, keys, batch)
        return loss + LOOK_WEIGHT * looks.sum(), (loss, looks, right)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: State, batch: data.Batch, scale):
        gradient, (loss, looks, right) = jax.grad(total, has_aux=True)(state.params, batch)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = jax.tree.map(lambda p, u: p + scale * u, state.params, updates)
        average = jax.tree.map(lambda a, p: a + AVERAGE_RATE * (p - a), state.average, params)
        return State(params, optimizer_state, average), loss, looks, right

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
    checkpoints = Checkpoints(options.run, model, tokenizer)
    state = State(params, optimizer.init(params), jax.tree.map(jnp.copy, params))
    state, progress = checkpoints.restore(state, progress)
    answers = 1 + max(tokenizer(embedded_tokenizer.answer_tokens(), add_special_tokens=False)["input_ids"])[0]
    steps = {size: make_step(model.config, optimizer, size) for size in (answers, len(tokenizer))}

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
            size = answers if progress.step % WHOLE_VOCABULARY_EVERY else len(tokenizer)
            state, loss, looks, right = steps[size](
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
                "looks": {role: round(float(x), 3) for role, x in zip(data.ROLES, looks, strict=True)},
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
    main(parse(Options))
