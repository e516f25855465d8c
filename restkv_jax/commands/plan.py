"""`restkv plan`: whether generation fits a slice of TPUs, and what it moves there, before anyone rents it."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from restkv_jax.commands.method_options import parse_with_method
from restkv_jax.commands.options import UsageError, as_usage_error
from restkv_jax.commands.progress import show_while
from restkv_jax.evaluate.report.units import BYTES, SECONDS, text_of
from restkv_jax.eviction.methods.full import full
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.generation.reading import bucket_length
from restkv_jax.loading import load_config
from restkv_jax.models.checkpoint import EMBEDDED
from restkv_jax.models.decoder import Decoder
from restkv_jax.models.key_groups import LayerGroups, Sharing
from restkv_jax.models.mesh import divided_mesh, make_mesh
from restkv_jax.models.tensors import parameter_shapes
from restkv_jax.planning.chips import Topology, find_topology
from restkv_jax.planning.estimates import PROGRAMS, estimate
from restkv_jax.planning.figures import Figures, figures_of
from restkv_jax.planning.largest import largest_rows
from restkv_jax.planning.programs import OutOfMemory, Program, Work


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Compiles generation for a slice of TPUs that need not be there, and says what it holds, moves and sends.

    Args:
      model: a `config.json`, a directory that has one, or a GGUF file, whose weights are not read; the model that
        comes with the package if left out.
      topology: the slice, by its chip and its shape: v5e:2x4, v6e:2x4, v5p:2x2x2, v4:2x2x1; cpu:8 for emulated devices.
      length: tokens of a prompt.
      batch_size: prompts at one time.
      data_parallel: parts that the prompts are divided into; what the model leaves over if left out.
      model_parallel: chips that share the weights; as many as KV heads allow if left out.
      method: how to choose what the cache keeps; `restkv plan --method NAME --help` lists the method's options.
      max_new_tokens: slots to reserve for new tokens.
      dtype: of weights and cache.
      cache_dtype: as of `restkv generate`.
      pod_groups: file of the layers that share keys, as `restkv pod` writes it.
      sink: tokens at the beginning whose keys each layer keeps; what the file says, or 16, if left out.
      recent: tokens at the end whose keys each layer keeps; what the file says, or 4,080, if left out.
      dense: leave out the sharing of keys that the model was adapted to.
      only: compile the prefill, which takes minutes for a long prompt, or the step of decoding alone.
      max: find the most prompts that fit, too; this compiles several times.
      json: print JSON, in bytes and seconds, instead of a table.
    """

    model: pathlib.Path = EMBEDDED
    topology: str = "v5e:2x4"
    length: int = 32768
    batch_size: int = 1
    data_parallel: int | None = None
    model_parallel: int | None = None
    method: str = "restkv"
    max_new_tokens: int = 64
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    cache_dtype: str | None = None
    pod_groups: pathlib.Path | None = None
    sink: int | None = None
    recent: int | None = None
    dense: bool = False
    only: Literal["prefill", "step"] | None = None
    max: bool = False
    json: bool = False


def run(args: Sequence[str]) -> None:
    """Compiles, and prints what was found."""
    options, policy = parse_with_method(PlanOptions, args, "restkv plan")
    jax.config.update("jax_platforms", "cpu")  # nothing runs: a TPU that is here stays free for others
    works, topology = _works(options, policy)
    found = {name: _figures(options, work, name, topology) for name, work in works.items()}
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        _print(options, next(iter(works.values())), topology, found)


def _works(options: PlanOptions, policy: EvictionPolicy) -> tuple[dict[str, Work], Topology]:
    """What is to be done with the method's cache and with the full one, each by its name."""
    for name in ("length", "batch_size", "max_new_tokens", "data_parallel", "model_parallel"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value} must be at least 1")
    with as_usage_error():
        model = _model(options)
    try:
        with as_usage_error():
            topology = find_topology(options.topology)
    except ModuleNotFoundError as error:
        raise UsageError(str(error)) from error
    if options.max and topology.chip.memory is None:
        raise UsageError(f"--max: how much memory {topology.name} has is not known; give a topology of TPUs")
    with as_usage_error():
        work = Work(model, _mesh(options, model, topology), options.batch_size, options.length, full())
        work = work._replace(max_new_tokens=options.max_new_tokens, dtype=jnp.dtype(options.dtype))
        kinds = options.method, options.cache_dtype, None if model.sharing is None else "shared keys"
        chosen = work._replace(policy=policy, cache_dtype=options.cache_dtype)
        works = {", ".join(filter(None, kinds)): chosen, "full": work._replace(model=model.clone(sharing=None))}
        return works, topology


def _model(options: PlanOptions) -> Decoder:
    model = Decoder(load_config(options.model))
    if options.pod_groups is not None:
        sharing = Sharing.load(options.pod_groups, model) or Sharing(LayerGroups.load(options.pod_groups, model))
    else:
        directory = options.model.parent if options.model.name == "config.json" else options.model
        sharing = None if options.dense or not directory.is_dir() else Sharing.load(directory, model)
    sizes = {name: getattr(options, name) for name in ("sink", "recent") if getattr(options, name) is not None}
    if sizes and sharing is None:
        raise ValueError(f"--{' and --'.join(sizes)} without shared keys; give --pod-groups FILE")
    return model.clone(sharing=sharing and dataclasses.replace(sharing, **sizes))


def _mesh(options: PlanOptions, model: Decoder, topology: Topology) -> Mesh:
    """The chips as `data` x `model`."""
    chips, data, parts = len(topology.devices), options.data_parallel, options.model_parallel
    if parts is None:
        parts = _parts(model, chips, options.batch_size) if data is None else max(1, chips // data)
    return divided_mesh(model, make_mesh(data, parts, topology.devices))


def _parts(model: Decoder, chips: int, rows: int) -> int:
    """How many chips share the weights: as many as KV heads can be divided among, more where rows are too few."""
    config = model.config
    features = math.gcd(chips, config.intermediate_size)
    able = [n for n in range(1, features + 1) if features % n == 0 and rows % (chips // n) == 0]
    return max(able, key=lambda n: (config.num_key_value_heads % n == 0, n), default=features)


def _figures(options: PlanOptions, work: Work, name: str, topology: Topology) -> Figures:
    names = tuple(PROGRAMS) if options.only is None else (options.only,)
    with as_usage_error():
        found = estimate(work, names, lambda program: show_while(f"compiling {WHAT[program]}, {name} cache"))
    most = {"largest": {program: _largest(work, program, topology) for program in names}} if options.max else {}
    return figures_of(found, topology.chip, bucket_length(work.length)) | most


def _largest(work: Work, program: str, topology: Topology) -> int:
    """The most rows of a program that fit."""
    available = topology.chip.memory or 0.0

    def total_of(rows: int) -> float:
        with show_while(f"compiling {WHAT[program]} of {rows} prompts"):
            return _total(lambda: PROGRAMS[program](work._replace(rows=rows)), available)

    return largest_rows(total_of, available, work.data_parallel)


def _total(compile_: Callable[[], Program], available: float) -> float:
    """Bytes per device; what compiles fits, and what does not does not, whatever the sum says."""
    try:
        return min(compile_().memory.total, available)
    except OutOfMemory as error:
        return max(error.needed, available + 1)


def _print(options: PlanOptions, work: Work, topology: Topology, found: dict[str, Figures]) -> None:
    """A column for each method."""
    table = Table(title=_title(options, work, topology), title_justify="left", caption_justify="left", title_style="")
    table.add_column(f"each of {work.data_parallel} data x {work.model_parallel} model")
    for name in found:
        table.add_column(name, justify="right")
    sections = [[dict(section) for section in _sections(one)] for one in found.values()]
    for section in zip(*sections, strict=True):
        for row in dict.fromkeys(name for column in section for name in column):
            table.add_row(row, *(column.get(row, "-") for column in section))
        table.add_section()
    table.caption = CAPTION
    Console(highlight=False).print(table)


WHAT = {"prefill": "the prefill", "step": "a step of decoding"}
CAPTION = (
    "Counted from the compiled programs: nothing ran. A step cannot read less than the weights, without the embedding "
    "that it looks up and experts beyond those that its tokens can choose, and the cache; nor send less than "
    "Megatron-LM, two sums of activations per layer and one for the embedding. Times are bounds by the chip's peaks "
    "for HBM, matrix products and links."
)


def _title(options: PlanOptions, work: Work, topology: Topology) -> str:
    config = work.model.config
    weights = sum(math.prod(shape) for shape in parameter_shapes(work.model).values()) / 1e9
    return (
        f"{options.model}: {config.model_type}, {weights:.3g} billion weights in {options.dtype}, on {topology.name}; "
        f"{work.rows} x {work.length:,} tokens, {work.max_new_tokens:,} new"
    )


def _sections(one: Figures) -> Iterator[list[tuple[str, str]]]:
    """Rows of the table, by section."""
    yield [("weights", _bytes(one["weights"])), ("cache", f"{_bytes(one['cache'])} ({one['slots']:,} slots)")]
    for program in PROGRAMS:
        if program in one:
            yield list(_program_rows(program, one[program], one["available"]))
    yield [(f"most prompts: {program}", f"{count:,}") for program, count in one.get("largest", {}).items()]


def _program_rows(name: str, one: Figures, available: float | None) -> Iterator[tuple[str, str]]:
    """Memory, HBM, matrix products and links of a program."""
    limit = "" if available is None else f" of {_bytes(available)}, {'fits' if one['fits'] else 'DOES NOT FIT'}"
    yield f"{name}: holds", _bytes(one["total"]) + limit
    if not one["fits"]:
        return
    yield f"{name}: temporaries", _bytes(one["temporaries"])
    floor = f" ({one['read'] / one['floor']:.2f} of {_bytes(one['floor'])})" if one.get("floor") else ""
    yield f"{name}: reads", _bytes(one["read"]) + floor
    yield f"{name}: writes", _bytes(one["written"])
    if one["operations"] > 0:
        yield f"{name}: computes", f"{one['operations'] / 1e12:.3g} TFLOP"
    if one["sent"] > 0:
        share = f" ({one['sent'] / one['megatron']:.2f} of Megatron's)" if one["megatron"] else ""
        yield f"{name}: sends", _bytes(one["sent"]) + share
    for kind, c in one["collectives"].items():
        yield f"{name}: {kind}s", f"{c['times']:,.0f}, {_bytes(c['bytes'])}"
    for resource, seconds in one["seconds"].items():
        if seconds:
            yield f"{name}: {LONGEST[resource]}", f"at least {text_of(seconds, SECONDS)}"


LONGEST = {"memory": "time by HBM", "products": "time by products", "network": "time by links"}


def _bytes(count: float) -> str:
    return text_of(count, BYTES)
