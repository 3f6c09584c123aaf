"""The model of swap_backends_in_a_model.py on 2 x 4 devices, trained and served: the mesh is new.

Eight virtual devices stand for eight chips. Trained with the batch over `data` and the heads over
`model`; served with the heads over both, where two kv heads are fewer than eight shards, so the
cache holds each four times. Losses and tokens are those of one device, and the attention itself
sends nothing.

    python examples/on_a_mesh.py
"""

import contextlib
import os

EIGHT = "--xla_force_host_platform_device_count=8"
if "device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " " + EIGHT

import jax
import jax.numpy as jnp
import numpy as np
import swap_backends_in_a_model as model
from jax.sharding import AxisType, NamedSharding

import attnsel_jax
from attnsel_jax import MeshAxes, use_mesh_axes

BATCH, LENGTH, STEPS, RATE = 4, 32, 12, 0.3
# Where the model's weights lie: columns, or rows, over `model`; everything else whole everywhere.
COLUMNS, ROWS = ("wq", "gate", "up"), ("wo", "down")


def loss(params, tokens):
    """Cross entropy of each next token; the model is as it was, its attention dense."""

    def attend(i, q, k, v):
        q, k, v = (x.reshape(BATCH, LENGTH, *x.shape[1:]) for x in (q, k, v))
        out = attnsel_jax.dot_product_attention(q, k, v, is_causal=True)
        return out.reshape(BATCH * LENGTH, *out.shape[2:])

    positions = jnp.tile(jnp.arange(LENGTH), BATCH)
    logits = model.forward(params, tokens[:, :-1].reshape(-1), positions, attend)
    said = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(said, tokens[:, 1:].reshape(-1, 1), axis=-1))


@jax.jit
def train_step(params, tokens):
    value, gradients = jax.value_and_grad(loss)(params, tokens)
    size = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradients)))
    return jax.tree.map(lambda p, g: p - RATE * g / size, params, gradients), value


def placed(params, mesh):
    """The weights on the mesh."""

    def place(path, weight):
        name = path[-1].key
        cut = (
            jax.P(None, "model") if name in COLUMNS else jax.P("model") if name in ROWS else jax.P()
        )
        return jax.device_put(weight, NamedSharding(mesh, cut))

    return jax.tree_util.tree_map_with_path(place, params)


def train_and_serve(mesh=None):
    """Losses, and tokens generated after training; on one device, or over a mesh."""
    params = model.random_params()
    text = np.frombuffer((" ".join(model.PROMPTS) * 2).encode(), np.uint8).astype(np.int32)
    starts = np.arange(BATCH) * 7
    tokens = np.stack([text[start : start + LENGTH + 1] for start in starts])
    training = serving = contextlib.nullcontext()
    cache_heads = model.NUM_KV_HEADS
    if mesh is not None:
        training = use_mesh_axes(MeshAxes(batch="data", heads="model", mesh=mesh))
        serving = use_mesh_axes(MeshAxes(heads=("data", "model"), mesh=mesh))
        params, cache_heads = placed(params, mesh), mesh.size
        tokens = jax.device_put(tokens, NamedSharding(mesh, jax.P("data")))
    losses = []
    with training:
        for _ in range(STEPS):
            params, value = train_step(params, tokens)
            losses.append(float(value))
    with serving:
        generated, _ = model.generate(params, model.PROMPTS[:2], 6, cache_heads)
    return losses, generated


def main():
    mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)
    (one, tokens), (eight, same) = train_and_serve(), train_and_serve(mesh)
    for step in range(0, STEPS, 4):
        print(f"step {step:>2}: loss {one[step]:.4f} on one device, {eight[step]:.4f} on eight")
    assert one[-1] < one[0] - 0.5
    assert np.allclose(one, eight, rtol=1e-3)
    print(f"tokens served on eight devices equal those of one: {bool((tokens == same).all())}")
    assert (tokens == same).all()


if __name__ == "__main__":
    main()
