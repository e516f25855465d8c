"""Adapts the tiny model on one device and on a mesh of four; prints the losses and the largest share on a device."""

import json
import pathlib
import sys

import jax
import numpy as np
import tiny

import restkv_jax as rk
from restkv_jax.models.mesh import make_mesh, parameter_shardings
from restkv_jax.pod import Adaptation, LayerGroups, Sharing, adapt

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

shares = jax.tree.map(
    lambda leaf, sharding: np.prod(sharding.shard_shape(leaf.shape)) / leaf.size,
    params["layers"],
    parameter_shardings(model, meshes["four"])["layers"],
)
print(json.dumps({name: float(share) for name, share in shares.items()}))
