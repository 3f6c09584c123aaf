"""Two processes with four devices each give the numbers that one gives."""

import os
import pathlib
import re
import socket
import subprocess
import sys

import attnsel_jax

ROOT = pathlib.Path(attnsel_jax.__file__).parents[1]
PROGRAM = """
import sys

import jax
import numpy as np

process, address = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(address, num_processes=2, process_id=process)
assert jax.process_count() == 2 and jax.device_count() == 8 and jax.local_device_count() == 4

import attnsel_jax
from attnsel_jax import KVCache, AttentionMetadata, MeshAxes


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def put(x, mesh, *spec):
    sharding = jax.NamedSharding(mesh, jax.P(*spec))
    return jax.make_array_from_callback(np.shape(x), sharding, lambda at: np.asarray(x)[at])


def check(got, expected):
    for shard in got.addressable_shards:
        wanted = np.asarray(expected)[shard.index]
        np.testing.assert_allclose(shard.data, wanted, rtol=1e-5, atol=1e-5)


def attend(q, k, v, form="ring"):
    axes = MeshAxes(form=form)
    return attnsel_jax.dot_product_attention(q, k, v, is_causal=True, mesh_axes=axes,
                                             backend="XLA_REFERENCE")


qkv = [normal(i, 2, 16, heads, 8) for i, heads in enumerate((8, 4, 4))]
expected = jax.jit(attend)(*qkv)
mesh = jax.make_mesh((2, 4), ("data", "model"))
check(jax.jit(attend)(*(put(x, mesh, "data", None, "model") for x in qkv)), expected)
print("same: heads and batch.")

mesh = jax.make_mesh((8,), ("seq",))


def loss(*qkv):
    return (attend(*qkv) ** 2).sum()


gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
cut = [put(x, mesh, None, "seq") for x in qkv]
for got, wanted in zip(jax.tree.leaves(gradients(*cut)), jax.tree.leaves(gradients(*qkv))):
    check(got, wanted)
print("same: ring.")

metadata = AttentionMetadata.from_lengths([1, 2], [13, 6], [[3, 6, 0, 5], [2, 7]], 4)
tokens = [normal(i, 3, heads, 8) for i, heads in enumerate((4, 2, 2))]
pages = normal(9, 2, 8, 4, 2, 8)
step = jax.jit(attnsel_jax.paged_attention)
out, cache = step(*tokens, KVCache(pages), metadata)
spread = KVCache(put(pages, mesh, None, "seq"))
got, written = step(*tokens, spread, jax.tree.map(np.asarray, metadata))
check(got, out)
check(written.pages, cache.pages)
print("same: spread pages.")
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_processes(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    address = f"127.0.0.1:{free_port()}"
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    environment = {name: value for name, value in os.environ.items() if "_BACKEND" not in name}
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(
            [sys.executable, program, str(process), address], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for process in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, text in zip(running, said, strict=True):
        assert process.returncode == 0, text
        said = re.findall(r"same: (.*)\.", text)  # among Gloo's lines, which mix with each other
        assert said == ["heads and batch", "ring", "spread pages"], text
