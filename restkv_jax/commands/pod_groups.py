"""`restkv pod groups`: which layers attend alike, and so may share the keys of distant tokens."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from restkv_jax.commands.options import UsageError, as_usage_error, parse
from restkv_jax.commands.plot import check_picture
from restkv_jax.commands.progress import show_while
from restkv_jax.loading import DType, Loaded, load_checkpoint
from restkv_jax.models.key_groups import FILE, LayerGroups, check_groups_file
from restkv_jax.pod.adaptation.data import Sequences, check_vocabulary, read_sequences
from restkv_jax.pod.plot import plot_groups
from restkv_jax.pod.similarity import attention_similarity, group_layers
from restkv_jax.progress import make_progress

COLUMNS = (
    TextColumn("comparing layers"),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("texts"),
    TimeElapsedColumn(),
    TextColumn("left:"),
    TimeRemainingColumn(),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupsOptions:
    """Finds the layers that attend alike on sample texts, and writes them for `restkv pod adapt --groups`.

    Args:
      data: text files or one array of token ids, as `restkv pod adapt` takes them.
      model: directory of a checkpoint in Hugging Face's layout, a GGUF file, or id of a model on the hub; the model
        that comes with the package if left out. Sharing that it was adapted to does not count.
      dtype: of the weights; "auto" is bfloat16, on a CPU float32.
      output: the file to write, or a checkpoint's directory, which gets a layer_groups.json.
      threshold: least similarity to the lowest layer of a block, 1 minus the Jensen-Shannon divergence of attention;
        lower makes larger blocks.
      samples: texts to compare on, evenly spaced in the data.
      sequence_length: tokens of each; the rows' length, else the model's maximum, at most 32,768, if left out.
      last_queries: of each text, whose attention is compared.
      joined: count proximal tokens, which each layer will read by its own keys, as one in the comparison; PoD's paper
        compares them all.
      sink: first tokens whose keys are not shared.
      recent: last tokens whose keys are not shared.
      plot: picture of the similarities and blocks to write as well; the suffix chooses the format.
      quiet: print nothing.
    """

    data: tuple[pathlib.Path, ...]
    model: str | None = None
    dtype: DType = "auto"
    output: pathlib.Path = pathlib.Path(FILE)
    threshold: float = 0.5
    samples: int = 16
    sequence_length: int | None = None
    last_queries: int = 64
    joined: bool = False
    sink: int = 16
    recent: int = 4080
    plot: pathlib.Path | None = None
    quiet: bool = False


def run(args: Sequence[str]) -> None:
    """Compares, groups, writes, and says what sharing by these groups saves."""
    options = parse(GroupsOptions, args, "restkv pod groups")
    _check(options)
    with as_usage_error():
        with show_while("loading the model", quiet=options.quiet):
            loaded = load_checkpoint(options.model, options.dtype, dense=True)
        longest = loaded.model.config.context_length
        sequences = read_sequences(options.data, options.sequence_length, longest, loaded.tokenizer)
        similarity = _similarity(options, loaded, sequences)
        groups = group_layers(similarity, options.threshold)
        groups.save(options.output, loaded.model)
    if options.plot is not None:
        plot_groups(similarity, groups).savefig(options.plot, dpi=150)
    if not options.quiet:
        print(_description(options, groups, sequences.tokens.shape[1]))


def _check(options: GroupsOptions) -> None:
    if not options.output.resolve().parent.is_dir():
        raise UsageError(f"--output {str(options.output)!r}: its directory does not exist; create it first")
    with as_usage_error("--output: "):
        check_groups_file(options.output)
    if options.samples < 1:
        raise UsageError(f"--samples {options.samples} must be at least 1")
    if not options.threshold >= 0:
        raise UsageError(f"--threshold {options.threshold} must not be negative")
    if options.plot is not None:
        check_picture("--plot", options.plot)


def _similarity(options: GroupsOptions, loaded: Loaded, sequences: Sequences) -> np.ndarray:
    chosen = np.unique(np.linspace(0, len(sequences) - 1, options.samples).astype(int))
    proximal = {"sink": options.sink, "recent": options.recent} if options.joined else {}
    with make_progress(*COLUMNS, quiet=options.quiet) as progress:
        shown = progress.add_task("", total=len(chosen))

        def texts():
            for done, index in enumerate(chosen):
                progress.update(shown, completed=done)
                tokens = sequences[int(index)]["tokens"]
                check_vocabulary(tokens, loaded.model.config.vocab_size)
                yield tokens[None]
            progress.update(shown, completed=len(chosen))

        return attention_similarity(loaded.model, loaded.params, texts(), options.last_queries, **proximal)


def _description(options: GroupsOptions, groups: LayerGroups, length: int) -> str:
    """How many blocks, and the bytes of the cache."""
    most = groups.num_layers * groups.num_kv_heads
    fraction = groups.cache_fraction(length, options.sink, options.recent)
    by_head = ", ".join(map(str, groups.is_leader.sum(0)))
    return (
        f"{groups.num_blocks} blocks of {most} layers and KV heads ({by_head} by head)\n"
        f"{fraction:.1%} of the cache's bytes at {length:,} tokens, towards {(1 + groups.num_blocks / most) / 2:.1%} "
        f"at greater lengths\nwrote {options.output}"
    )
