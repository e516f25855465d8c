"""Kernels that score 131,072 keys of one layer of an 8B model, compiled for a TPU: `python score_programs.py v5e:2x2`.

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
from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.models.mesh import make_mesh
from restkv_jax.planning.counting import count

B, K, G, W, T, D = 1, 8, 4, 32, 131072, 128


def main(topology: str, implementation: str = "pallas_tpu") -> None:
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]

    def shaped(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    vectors, keys = (shaped(*shape, dtype=jnp.bfloat16) for shape in ((B, K, G, W, D), (B, K, T, D)))
    window, of_queries, of_keys = (shaped(*shape, dtype=jnp.int32) for shape in ((), (B, W), (B, 1, T)))
    queries, pairs = Queries(vectors, of_queries, window), Pairs(keys, keys, of_keys)
    gram, weights = shaped(K, G, D, D), shaped(B, W)
    arguments = {
        "column_sums": (queries, pairs, weights),
        "column_row_norms": (queries, pairs, gram),
        "averaged_attention_removal_error": (queries, pairs, gram, weights),
        "averaged_removal_error": (queries, pairs, gram, weights),
        "attention_centres": (queries, pairs),
    }
    for name, arrays in arguments.items():
        options = {"count": 992} if name == "attention_centres" else {}
        function = functools.partial(getattr(scores, name).force(implementation), **options)
        with jax.set_mesh(make_mesh(1, 1, [device])):
            counted = count(jax.jit(function).lower(*arrays).compile().as_text())
        print(json.dumps({"name": name, "read": counted.read, "written": counted.written}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
