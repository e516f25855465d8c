"""The programs of generation, compiled for devices that need not be there: no array is ever made."""

import contextlib
import math
import pathlib
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from restkv_jax.caches.axes import axes_of
from restkv_jax.caches.base import Cache
from restkv_jax.caches.paged import InPages
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.generation.checks import CacheDType
from restkv_jax.generation.decoding import feed
from restkv_jax.generation.passes import read_prompt
from restkv_jax.generation.reading import CHUNK_SIZE, Prompt, check_and_pad
from restkv_jax.kernels.distant import SLOTS_AT_ONCE as DISTANT_AT_ONCE
from restkv_jax.kernels.paged import SLOTS_AT_ONCE as PAGED_AT_ONCE
from restkv_jax.kernels.partition import EVERY, spec_of
from restkv_jax.models.build import init_params
from restkv_jax.models.decoder import Decoder
from restkv_jax.models.mesh import beside, check_rows, parameter_shardings
from restkv_jax.planning.counting import Count, count
from restkv_jax.planning.hlo import Shape

CAUSAL_SHARE = 0.5
"""Blocks of keys that a block of queries of a whole prompt sees, of all."""


class OutOfMemory(Exception):
    """A program that does not fit: `needed` and `available` bytes per device."""

    def __init__(self, needed: float, available: float):
        super().__init__(f"{needed:.0f} bytes are needed where {available:.0f} are available")
        self.needed, self.available = needed, available


class Memory(NamedTuple):
    """Bytes of a program on every device, as the compiler lays them out."""

    arguments: int
    results: int
    aliased: int
    temporaries: int

    @property
    def total(self) -> int:
        """While it runs."""
        return self.arguments + self.results - self.aliased + self.temporaries


class Program(NamedTuple):
    """A compiled program.

    Attributes:
      memory: per device.
      count: of one run, per device.
      seconds: that compiling took.
    """

    memory: Memory
    count: Count
    seconds: float


class Compiled(NamedTuple):
    """What a compiler says: of memory, its program as text, and in how many seconds."""

    memory: Any
    text: str
    seconds: float


class Work(NamedTuple):
    """What is to be done.

    Attributes:
      model: with its sharing.
      mesh: as `divided_mesh` gives it for the model.
      rows: prompts at one time.
      length: tokens of each.
      policy: what is kept of them.
      max_new_tokens: slots to reserve.
      dtype: of the weights.
      cache_dtype: as for `prefill`.
    """

    model: Decoder
    mesh: Mesh
    rows: int
    length: int
    policy: EvictionPolicy
    max_new_tokens: int = 64
    dtype: Any = jnp.bfloat16
    cache_dtype: CacheDType = None

    @property
    def data_parallel(self) -> int:
        """Parts that the rows are divided into."""
        return self.mesh.shape["data"]

    @property
    def model_parallel(self) -> int:
        """Devices that share the weights."""
        return math.prod(self.mesh.shape.get(name, 1) for name in EVERY)


def abstract_params(model: Decoder, mesh: Mesh, dtype: Any = jnp.bfloat16) -> Any:
    """The parameters as shapes that say where they lie.

    Raises:
      ValueError: a mesh that does not divide the model.
    """
    shardings = parameter_shardings(model, mesh)
    shapes = jax.eval_shape(lambda key: init_params(model, key, dtype), jax.random.key(0))
    return jax.tree.map(_placed, shapes, shardings)


def compile_reading(work: Work) -> Program:
    """Compiles the prefill.

    Raises:
      ValueError: what `prefill` refuses, or a mesh that does not divide the model or the rows.
      OutOfMemory: it does not fit the devices.
    """
    with _prepared(work) as (params, prompt):
        arrays = _rows(work, prompt.tokens), _rows(work, prompt.mask)
        lowered = read_prompt.lower(prompt.model, params, *arrays, None, prompt.plan)
        compiled = compile_lowered(lowered)
    return _measured(compiled, CAUSAL_SHARE, seen=_seen(work))


def abstract_cache(work: Work) -> Cache:
    """The cache that the prefill leaves, as shapes that say where they lie: nothing is compiled."""
    with _prepared(work) as (params, prompt):
        shapes = jax.eval_shape(
            lambda *arrays: read_prompt(prompt.model, *arrays, None, prompt.plan)[1][0], params, *prompt.arrays[:2]
        )
    axes = axes_of(type(shapes)) or {}

    def place(path: Any, x: Any) -> jax.ShapeDtypeStruct:
        spec = spec_of(axes[jax.tree_util.keystr(path, simple=True, separator=".")], x.shape, work.mesh.shape)
        return _placed(x, NamedSharding(work.mesh, spec))

    return jax.tree_util.tree_map_with_path(place, shapes)


def compile_step(work: Work) -> Program:
    """Compiles one step of decoding.

    Raises:
      ValueError: as `compile_reading`.
      OutOfMemory: it does not fit the devices.
    """
    cache = abstract_cache(work)
    with _prepared(work) as (params, prompt):
        token, active = (
            jax.ShapeDtypeStruct((work.rows,), dtype, sharding=_row_sharding(work)) for dtype in (jnp.int32, jnp.bool_)
        )
        compiled = compile_lowered(feed.lower(prompt.model, params, token, cache, active))
    return _measured(compiled, 1.0, _kernel_reads(work, cache), _turns(work, cache))


def bytes_on_device(tree: Any) -> int:
    """Bytes of every device of arrays or shapes that say where they lie, without what tiles add."""
    return sum(
        int(jnp.dtype(x.dtype).itemsize) * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree)
    )


@contextlib.contextmanager
def _prepared(work: Work) -> Iterator[tuple[Any, Prompt]]:
    """Parameters and prompt under the mesh, checked as those of users are."""
    check_rows(work.rows, work.mesh)
    params = abstract_params(work.model, work.mesh, work.dtype)
    tokens = jax.ShapeDtypeStruct((work.rows, work.length), jnp.int32)
    options = work.max_new_tokens, CHUNK_SIZE, None
    prompt = _shaped(
        lambda tokens: check_and_pad(
            work.model, params, tokens, None, (work.policy,), *options, cache_dtype=work.cache_dtype
        ),
        tokens,
    )
    with warnings.catch_warnings(action="ignore"), beside(params) as params:
        yield params, prompt


def _shaped(make: Callable[[Array], Prompt], tokens: jax.ShapeDtypeStruct) -> Prompt:
    """A prompt whose arrays are shapes."""
    static: list[Prompt] = []

    def arrays(tokens: Array) -> tuple[Array, Array]:
        static.append(make(tokens))
        return static[0].tokens, static[0].mask

    shapes = jax.eval_shape(arrays, tokens)
    return static[0]._replace(tokens=shapes[0], mask=shapes[1])


def _row_sharding(work: Work) -> NamedSharding:
    return NamedSharding(work.mesh, PartitionSpec("data"))


def _rows(work: Work, shape: Any) -> jax.ShapeDtypeStruct:
    return _placed(shape, _row_sharding(work))


def _placed(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def compile_lowered(lowered: Any) -> Compiled:
    """Compiles, with the program's text as the compiler itself writes it: JAX cannot read back all of libtpu's."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        try:
            compiled = lowered.compile({"xla_dump_to": directory, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            raise _as_out_of_memory(error) from error
        text = next((path.read_text() for path in pathlib.Path(directory).glob("*.after_codegen.txt")), None)
    return Compiled(compiled.memory_analysis(), text or compiled.as_text(), time.perf_counter() - start)


def _as_out_of_memory(error: Exception) -> Exception:
    """An `OutOfMemory` if the compiler says so, else the error itself."""
    sizes = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)", str(error))
    if sizes is None:
        return error
    return OutOfMemory(*(float(sizes[i]) * 2 ** (10 * (1 + "KMGT".index(sizes[i + 1]))) for i in (1, 3)))


def _measured(
    compiled: Compiled,
    taken: float,
    kernel_reads: Callable[[Shape], float] = lambda shape: 1.0,
    unknown_turns: int = 1,
    seen: float = 1.0,
) -> Program:
    m = compiled.memory
    sizes = m.argument_size_in_bytes, m.output_size_in_bytes, m.alias_size_in_bytes, m.temp_size_in_bytes
    return Program(Memory(*sizes), count(compiled.text, taken, kernel_reads, unknown_turns, seen), compiled.seconds)


def _seen(work: Work) -> float:
    """The share of a prompt's keys that one call of an attention kernel reads for a query, on the average.

    With shared keys three calls divide the past: of the first tokens, of the last, and of those between.
    """
    shares = [min(width / work.length, 1.0) for width in work.model.config.sliding_windows]
    return sum(share - share**2 / 2 for share in shares) / len(shares) / (1 if work.model.sharing is None else 3)


def _kernel_reads(work: Work, cache: Cache) -> Callable[[Shape], float]:
    """A kernel is handed the pages of all layers and reads those of one, a share of them on the average."""
    pools = [getattr(cache, name) for name in cache.POOL] if isinstance(cache, InPages) else []
    sizes = {math.prod(pool.sharding.shard_shape(pool.shape)) for pool in jax.tree.leaves(pools)}
    return lambda shape: 1 / work.model.config.num_hidden_layers if shape.size in sizes else 1.0


def _turns(work: Work, cache: Cache) -> int:
    """How often the loops turn, at most or for pages on the average, whose turns follow what a cache holds."""
    config = work.model.config
    heads = work.rows // work.data_parallel * (config.num_key_value_heads // work.mesh.shape["model"])
    if isinstance(cache, InPages):
        slots = cache.num_pages * cache.page_size // config.num_hidden_layers
        return max(1, -(-slots // PAGED_AT_ONCE))
    distant = getattr(cache, "num_distant", 0)
    return max(1, heads * -(-distant // DISTANT_AT_ONCE))
