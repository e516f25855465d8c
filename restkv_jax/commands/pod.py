"""`restkv pod`: keys of distant tokens shared across layers."""

import dataclasses
import logging
import pathlib
from collections.abc import Sequence
from typing import Annotated, Literal

from restkv_jax.commands.options import FLAT, UsageError, as_usage_error, parse
from restkv_jax.commands.pod_groups import run as run_groups
from restkv_jax.commands.progress import show_while
from restkv_jax.loading import load_checkpoint
from restkv_jax.models.key_groups import LayerGroups, Sharing
from restkv_jax.models.mesh import make_mesh
from restkv_jax.pod.adaptation.recipe import Adaptation
from restkv_jax.pod.adaptation.runs import MODEL, adapt

USAGE = """usage: restkv pod COMMAND [OPTIONS]

Distant tokens share keys across layers (PoD).

commands:
  groups  find the layers that attend alike, on sample texts
  adapt   train a model further with shared keys, or without them to compare

`restkv pod COMMAND --help` lists a command's options."""


@dataclasses.dataclass(frozen=True)
class AdaptOptions:
    """Trains a model further on next tokens, with the keys of distant tokens shared across layers.

    The same command goes on where one that was killed stopped.

    Args:
      data: text files in UTF-8, one document each (.jsonl: one per line, in "text"); or one array of token ids, .npy
        of [N] or [N, T], or .npz with "tokens" and "weights", how much the prediction of each token counts.
      output: directory of the run: model/ with the result, metrics.jsonl, checkpoints/.
      model: directory of a checkpoint in Hugging Face's layout, a GGUF file, or id of a model on the hub; the model
        that comes with the package if left out.
      groups: the layers that share keys, the file or its directory, as `restkv pod groups` writes them; a model that
        was adapted before goes on with its own.
      dense: train the ordinary model instead, to compare.
      sink: first tokens whose keys are not shared, with --groups; 16 if left out.
      recent: last tokens whose keys are not shared, with --groups; 4080 if left out.
      model_parallel: devices among which the weights are divided; the others are data-parallel.
      save_dtype: of the weights in model/.
      checkpoint_every: steps between checkpoints.
      quiet: print nothing.
    """

    data: tuple[pathlib.Path, ...]
    output: pathlib.Path
    model: str | None = None
    groups: pathlib.Path | None = None
    dense: bool = False
    sink: int | None = None
    recent: int | None = None
    model_parallel: int = 1
    save_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    checkpoint_every: int = 100
    quiet: bool = False


def run(args: Sequence[str]) -> None:
    """Runs one of the commands of `restkv pod`.

    Raises:
      UsageError: an unknown command, or input that the command cannot work with.
    """
    commands = {"groups": run_groups, "adapt": run_adapt}
    if args and args[0] in ("--help", "-h"):
        print(USAGE)
        return
    if not args or args[0] not in commands:
        given = f"command 'pod {args[0]}' is unknown" if args else "no command after 'pod'"
        raise UsageError(f"{given}; known: {', '.join(commands)}; see `restkv pod --help`")
    commands[args[0]](args[1:])


def run_adapt(args: Sequence[str]) -> None:
    """`restkv pod adapt`: trains, and says where the result is."""
    options, adaptation = parse_adapt(args)
    if options.dense and options.groups is not None:
        raise UsageError("give either --groups FILE, to share keys, or --dense, to train the ordinary model")
    proximal = {name: getattr(options, name) for name in ("sink", "recent") if getattr(options, name) is not None}
    if proximal and options.groups is None:
        raise UsageError(f"--{' and --'.join(proximal)} without --groups FILE: a model that shares keys has its own")
    with as_usage_error():
        mesh = make_mesh(model=options.model_parallel)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs with its stack what it raises anyway
    with as_usage_error():
        with show_while("loading the model", quiet=options.quiet):
            model, params, tokenizer = load_checkpoint(options.model, "float32", dense=options.dense, mesh=mesh)
        sharing = None
        if options.groups is not None:
            sharing = Sharing(LayerGroups.load(options.groups, model), **proximal)
        elif model.sharing is None and not options.dense:
            raise UsageError("give --groups FILE, to share keys, or --dense, to train the ordinary model")
        adapt(
            model,
            params,
            options.data,
            sharing,
            adaptation=adaptation,
            output=options.output,
            tokenizer=tokenizer,
            mesh=mesh,
            save_dtype=options.save_dtype,
            checkpoint_every=options.checkpoint_every,
            donate=True,
            quiet=options.quiet,
        )
    if not options.quiet:
        print(f"wrote {options.output / MODEL}")


def parse_adapt(args: Sequence[str]) -> tuple[AdaptOptions, Adaptation]:
    """Options of `restkv pod adapt`.

    Raises:
      UsageError: an unknown option, or a value of the wrong kind or out of range.
    """

    def command(
        *,
        options: Annotated[AdaptOptions, FLAT],
        adaptation: Annotated[Adaptation, FLAT] = Adaptation(),  # noqa: B008
    ) -> tuple[AdaptOptions, Adaptation]:
        return options, adaptation

    command.__doc__ = AdaptOptions.__doc__
    with as_usage_error():
        return parse(command, args, "restkv pod adapt")
