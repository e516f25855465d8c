"""`restkv plot`: the picture of what each method keeps of a prompt."""

import dataclasses
import pathlib
from collections.abc import Sequence

from matplotlib.backend_bases import FigureCanvasBase

from restkv_jax.commands.options import PromptOptions, UsageError, as_usage_error, parse
from restkv_jax.commands.progress import show_while
from restkv_jax.commands.prompts import load_prompt
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.eviction.presets import make_policy, takes_budget
from restkv_jax.generation.reading import prefill
from restkv_jax.plot import plot_kept, token_span


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlotOptions(PromptOptions):
    """Draws which positions of a prompt each layer keeps and which are evicted.

    Args:
      methods: one panel each, with the method's default options.
      budget: slots per layer and KV head, in tokens or as a percentage of the prompt padded to its bucket.
      highlight: part of the prompt to mark, such as the sentence that holds the answer.
      output: picture to write; the suffix chooses the format (png, pdf, svg).
    """

    methods: tuple[str, ...] = ("restkv", "snapkv", "streaming_llm")
    budget: str = "10%"
    highlight: str | None = None
    output: pathlib.Path = pathlib.Path("kept.png")


def run(args: Sequence[str]) -> None:
    """Writes the picture, and says where."""
    options = parse(PlotOptions, args, "restkv plot")
    check_picture("--output", options.output)
    with as_usage_error():
        policies = _policies(options)
    (model, params, tokenizer), text, tokens = load_prompt(options)
    spans = {}
    with as_usage_error("--highlight: "):
        if options.highlight is not None:
            spans = {"highlighted text": token_span(tokenizer, text, options.highlight)}
    caches = {}
    with as_usage_error(), show_while("reading the prompt, which compiles what is new"):
        for name, policy in policies.items():
            title = name if policy.budget is None else f"{name}, budget {options.budget}"
            _, caches[title] = prefill(model, params, tokens, policy=policy)
    plot_kept(caches, spans=spans).savefig(options.output, dpi=150)
    print(f"wrote {options.output}")


def _policies(options: PlotOptions) -> dict[str, EvictionPolicy]:
    """The policies by the names of their methods."""
    budget = {"budget": options.budget}
    return {name: make_policy(name, budget if takes_budget(name) else {}) for name in options.methods}


def check_picture(option: str, path: pathlib.Path) -> None:
    """Refuses a path where no picture can be written.

    Raises:
      UsageError: no such directory, or a suffix of another kind of file; names the option.
    """
    if not path.resolve().parent.is_dir():
        raise UsageError(
            f"{option} {str(path)!r}: the directory {str(path.resolve().parent)!r} does not exist; create it first"
        )
    suffixes = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.removeprefix(".") not in suffixes:
        raise UsageError(
            f"{option} {str(path)!r} does not end in the suffix of a picture; choose from {', '.join(suffixes)}"
        )
