"""Adapts the tiny model on one device and on a mesh of four; prints the losses and the largest share on a device."""

import dataclasses
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import tiny

import restkv_jax as rk
from restkv_jax.kernels import dispatch
from restkv_jax.models.mesh import beside, make_mesh, parameter_shardings
from restkv_jax.pod import Adaptation, LayerGroups, Sharing, adapt, merging, similarity
from restkv_jax.pod.adaptation.program import make_program

output = pathlib.Path(sys.argv[1])
model = rk.build_model(tiny.CONFIG)
params = rk.init_params(model, jax.random.key(0))
data = np.random.default_rng(0).integers(3, 259, 400)
adaptation = Adaptation(steps=4, batch_size=4, sequence_length=40, accumulation=2, learning_rate=1e-3)
one = jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1])
meshes = {"one": one, "four": make_mesh(model=2)}
sharing = Sharing(LayerGroups([[0, 0], [0, 1]]), sink=2, recent=6)


def run(mesh, name):
    return adapt(model, params, data, sharing, adaptation=adaptation, mesh=mesh, output=output / name, quiet=True)


results = {name: run(mesh, name) for name, mesh in meshes.items()}
restored = run(meshes["four"], "one")  # complete: comes from its checkpoint, onto the other mesh
jax.tree.map(np.testing.assert_array_equal, results["one"], restored)

shares = {
    name: np.prod(leaf.sharding.shard_shape(leaf.shape)) / leaf.size for name, leaf in results["four"]["layers"].items()
}

# What four TPUs would run: each has its part of the attention kernels.
dispatch.target_platform = lambda: "tpu"
wide = rk.build_model(tiny.CONFIG | {"head_dim": 128})
placed = jax.device_put(rk.init_params(wide, jax.random.key(0)), parameter_shardings(wide, meshes["four"]))
longer = dataclasses.replace(adaptation, sequence_length=128, compute_dtype="float32", loss_chunk=64)
text, heads = jnp.zeros((2, 128), jnp.int32), (wide.config.num_hidden_layers, wide.config.num_key_value_heads)
with beside(placed) as there:
    traced = {
        "similarity": similarity._sum_similarity.trace(wide, there, text, text == 0, 8, None, 0, 0),
        "merging": merging._shared_loss.trace(wide, there, np.ones(heads, bool), text, jnp.ones(text.shape), 2, 6),
    }
lowered = {name: each.lower(lowering_platforms=("tpu",)) for name, each in traced.items()}
lowered["step"] = make_program(wide, longer, meshes["four"]).lower(lowering_platforms=("tpu",))
for name, program in lowered.items():
    assert "tpu_custom_call" in program.as_text(), name

print(json.dumps({name: float(share) for name, share in shares.items()}))
