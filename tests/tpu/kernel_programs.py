"""Kernels that read 131,072 keys of a layer of an 8B model, compiled for a TPU: `python kernel_programs.py v5e:2x2`.

Prints one line of JSON per kernel, bytes that the program reads from HBM and writes to it.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from restkv_jax.kernels import scores
from restkv_jax.kernels.paged import QuantisedPages, read_quantised_pages
from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.kernels.quantised import Quantisation, empty_pairs
from restkv_jax.kernels.quantised_attention import read_quantised
from restkv_jax.models.mesh import make_mesh
from restkv_jax.planning.counting import count

PAGED = "read_quantised_pages int8", "read_quantised_pages int4"

B, K, G, W, T, D = 1, 8, 4, 32, 131072, 128


def main(topology: str, implementation: str = "pallas_tpu") -> None:
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]

    def shaped(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    def shaped_like(function, *arguments):
        shapes = jax.eval_shape(lambda: function(*arguments))
        return jax.tree.map(lambda x: shaped(*x.shape, dtype=x.dtype), shapes)

    vectors, keys = (shaped(*shape, dtype=jnp.bfloat16) for shape in ((B, K, G, W, D), (B, K, T, D)))
    window, of_queries, of_keys = (shaped(*shape, dtype=jnp.int32) for shape in ((), (B, W), (B, 1, T)))
    queries, pairs = Queries(vectors, of_queries, window), Pairs(keys, keys, of_keys)
    gram, weights = shaped(K, G, D, D), shaped(B, W)
    uses = {
        "column_sums": (scores.column_sums, (queries, pairs, weights)),
        "column_row_norms": (scores.column_row_norms, (queries, pairs, gram)),
        "averaged_attention_removal_error": (scores.averaged_attention_removal_error, (queries, pairs, gram, weights)),
        "averaged_removal_error": (scores.averaged_removal_error, (queries, pairs, gram, weights)),
        "attention_centres": (scores.attention_centres, (queries, pairs)),
    }
    one = Queries(shaped(B, K, G, 1, D, dtype=jnp.bfloat16), shaped(B, 1, dtype=jnp.int32), window)
    held = shaped(B, K, T, dtype=jnp.int32)
    for dtype in "int8", "int4":
        q, pages = Quantisation(dtype), 2 * K * T // Quantisation(dtype).group_size  # of two layers
        layers, pool = (shaped_like(empty_pairs, shape, q) for shape in ((2, B, K, T, D), (1, 1, 2 * K * T, D)))
        table, lengths = shaped(B, K, pages // K // 2, dtype=jnp.int32), shaped(B, K, dtype=jnp.int32)
        positions = shaped(1, 1, pages, q.group_size, dtype=jnp.int32)
        uses[f"read_quantised {dtype}"] = read_quantised, (one, layers, shaped(dtype=jnp.int32), held)
        uses[f"read_quantised_pages {dtype}"] = (
            read_quantised_pages,
            (one, QuantisedPages(pool, positions, table, lengths)),
        )
    options = {"attention_centres": {"count": 992}} | {name: {"is_windowed": False} for name in PAGED}
    for name, (kernel, arrays) in uses.items():
        function = functools.partial(kernel.force(implementation), **options.get(name, {}))
        with jax.set_mesh(make_mesh(1, 1, [device])):
            counted = count(jax.jit(function).lower(*arrays).compile().as_text())
        print(json.dumps({"name": name, "read": counted.read, "written": counted.written}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
