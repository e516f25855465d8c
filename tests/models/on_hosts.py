"""One of two processes with four emulated devices each: loads a checkpoint onto a mesh of all, uses and saves it.

`python on_hosts.py PROCESS COORDINATOR MODEL GGUF OUTPUT OTHER` prints a line of JSON; `OTHER` is a checkpoint that
differs between the processes.
"""

import json
import os
import sys

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

import restkv_jax as rk
from restkv_jax.models import checkpoint
from restkv_jax.models.mesh import fetched
from restkv_jax.models.stored import read_into

process, coordinator, directory, gguf, output, other = sys.argv[1:]
jax.distributed.initialize(coordinator, 2, int(process))
elements = [0]


def counted(place, tensor):
    """`read_into`, noting how many elements are read."""
    elements[0] += place.size
    return read_into(place, tensor)


checkpoint.read_into = counted
mesh = rk.make_mesh(data=1, model=8)
model, params, _ = rk.load_model(directory, jnp.float32, mesh=mesh)
read = elements[0]
size = sum(x.size for x in jax.tree.leaves(params))
held = {x.device.id: 0 for x in params["embedding"].addressable_shards}
for leaf in jax.tree.leaves(params):
    for shard in leaf.addressable_shards:
        held[shard.device.id] += shard.data.size

tokens = np.random.default_rng(0).permutation(128)[:120].reshape(2, 60)
policies = {"full": rk.full(), "restkv": rk.restkv(24, 8), "laprox": rk.laprox(24, 8)}
policies["while_generating"] = rk.restkv(24, 8, while_generating=True)
found = {}
for name, policy in policies.items():
    out = rk.generate(model, params, tokens, None, policy, 6)
    logits, cache = rk.decode_step(
        model, params, np.array([5, 6]), rk.prefill(model, params, tokens, None, policy, 6)[1]
    )
    found[name] = {"tokens": fetched(out.tokens).tolist(), "logits": fetched(logits).tolist()}
logits, _ = rk.extend(model, params, tokens[:, :7], None, out.cache, max_new_tokens=2)
streamed = [step.tolist() for step in rk.stream(model, params, tokens, None, policies["restkv"], 6)]
rk.save_model(output, model, params)
same = rk.load_model(gguf, jnp.float32, mesh=mesh)[1]
differences = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params, same)
try:
    rk.load_model(other + process, jnp.float32, mesh=mesh)
    refused = ""
except ValueError as error:
    refused = str(error)
line = {"read": read, "size": size, "held": max(held.values()), "found": found, "refused": refused}
line |= {
    "extended": fetched(logits).tolist(),
    "streamed": np.transpose(streamed).tolist(),
    "gguf": max(jax.tree.leaves(differences)),
}
print(json.dumps(line), flush=True)
