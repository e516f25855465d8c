"""What reads 131,072 keys of a layer of an 8B model, compiled for a TPU: `python kernel_programs.py v5e:2x2`.

Prints one line of JSON per program: bytes that it reads from HBM and writes to it, and how often it sorts.
"""

import functools
import json
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from restkv_jax.kernels import scores
from restkv_jax.kernels.gather import gather_pairs
from restkv_jax.kernels.paged import QuantisedPages, read_quantised_pages
from restkv_jax.kernels.pairs import Pairs, Queries
from restkv_jax.kernels.quantised import Quantisation, empty_pairs
from restkv_jax.kernels.quantised_attention import read_quantised
from restkv_jax.kernels.top import places, top_mask
from restkv_jax.models.mesh import make_mesh
from restkv_jax.planning.counting import count
from restkv_jax.planning.programs import compile_lowered

B, K, G, W, T, D = 1, 8, 4, 32, 131072, 128
KEPT = 1024


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def queries(width):
    return Queries(array(B, K, G, width, D, dtype=jnp.bfloat16), numbers(B, width), numbers())


def numbers(*shape):
    return array(*shape, dtype=jnp.int32)


def score_programs():
    keys = array(B, K, T, D, dtype=jnp.bfloat16)
    pairs, gram, weights = Pairs(keys, keys, numbers(B, 1, T)), array(K, G, D, D), array(B, W)
    for name, others, options in (
        ("column_sums", [weights], {}),
        ("column_row_norms", [gram], {}),
        ("averaged_attention_removal_error", [gram, weights], {}),
        ("averaged_removal_error", [gram, weights], {}),
        ("attention_centres", [], {"count": 992}),
    ):
        kernel = getattr(scores, name).force("pallas_tpu")
        yield name, functools.partial(kernel, **options), (queries(W), pairs, *others)


def quantised_programs():
    for dtype in "int8", "int4":
        q = Quantisation(dtype)
        layers, pool = (
            jax.eval_shape(functools.partial(empty_pairs, shape, q))
            for shape in ((2, B, K, T, D), (1, 1, 2 * K * T, D))  # more than a chip's vector memory holds
        )
        pages = T // q.group_size
        paged = QuantisedPages(pool, numbers(1, 1, 2 * K * pages, q.group_size), numbers(B, K, pages), numbers(B, K))
        read, read_pages = (kernel.force("pallas_tpu") for kernel in (read_quantised, read_quantised_pages))
        yield f"read_quantised {dtype}", read, (queries(1), layers, numbers(), numbers(B, K, T))
        yield f"read_quantised_pages {dtype}", functools.partial(read_pages, is_windowed=False), (queries(1), paged)


def selection_programs():
    def keep(scores, pairs):
        return gather_pairs(pairs, places(top_mask(scores, KEPT), KEPT))

    keys = array(B, K, T, D, dtype=jnp.bfloat16)
    yield "selection", keep, (array(B, K, T), Pairs(keys, keys, numbers(B, 1, T)))


def main(topology: str) -> None:
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    place = SingleDeviceSharding(device)
    for name, function, arrays in (*score_programs(), *quantised_programs(), *selection_programs()):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arrays)
        with jax.set_mesh(make_mesh(1, 1, [device])):
            text = compile_lowered(jax.jit(function).lower(*shapes)).text
        counted, sorts = count(text), len(re.findall(r" sort\(", text))
        print(json.dumps(dict(name=name, read=counted.read, written=counted.written, sorts=sorts)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
