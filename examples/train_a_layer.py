"""Train one attention layer through `dot_product_attention`: gradients, on any backend.

The task needs attention: each token is to return the token that came three before it. A layer with
a learned bias for each distance (as T5 has) learns it; gradients flow to the bias too.

    python examples/train_a_layer.py
"""

import jax
import jax.numpy as jnp
import numpy as np

import attnsel_jax

LENGTH, VOCABULARY, NUM_HEADS, HEAD_SIZE, BACK = 64, 16, 2, 16, 3
WIDTH = NUM_HEADS * HEAD_SIZE


def random_params(seed=0):
    rng = np.random.default_rng(seed)

    def matrix(deviation, *shape):
        return jnp.asarray(rng.normal(0, deviation, shape), jnp.float32)

    return {
        "embedding": matrix(1.0, VOCABULARY, WIDTH),
        "wqkv": matrix(0.1, WIDTH, 3 * WIDTH),
        "out": matrix(0.1, WIDTH, VOCABULARY),
        "distance_bias": jnp.zeros((NUM_HEADS, LENGTH), jnp.float32),
    }


def logits(params, tokens):
    """[batch, LENGTH, VOCABULARY]."""
    batch = tokens.shape[0]
    x = params["embedding"][tokens] @ params["wqkv"]
    q, k, v = jnp.split(x.reshape(batch, LENGTH, 3 * NUM_HEADS, HEAD_SIZE), 3, axis=2)
    distance = np.maximum(np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH)), 0)
    bias = params["distance_bias"][None, :, distance]  # [1, heads, queries, keys]
    out = attnsel_jax.dot_product_attention(q, k, v, bias, is_causal=True)
    return out.reshape(batch, LENGTH, WIDTH) @ params["out"]


def loss(params, tokens):
    """Cross entropy of the token that came BACK before, at the positions that have one."""
    said = jax.nn.log_softmax(logits(params, tokens)[:, BACK:])
    return -jnp.mean(jnp.take_along_axis(said, tokens[:, :-BACK, None], axis=-1))


@jax.jit
def train_step(params, momentum, tokens):
    value, gradients = jax.value_and_grad(loss)(params, tokens)
    momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, gradients)
    params = jax.tree.map(lambda p, m: p - 0.3 * m, params, momentum)
    return params, momentum, value


def main():
    rng = np.random.default_rng(0)

    def some_tokens():
        return rng.integers(0, VOCABULARY, (8, LENGTH), np.int32)

    tokens = some_tokens()
    gradients = {}
    for name in ("XLA", "XLA_REFERENCE"):
        with attnsel_jax.global_force_attn_backend_context_manager(name):
            gradients[name] = jax.jit(jax.grad(loss))(random_params(), tokens)
    for leaf, gradient in gradients["XLA"].items():
        off = jnp.abs(gradient - gradients["XLA_REFERENCE"][leaf]).max()
        print(f"d loss / d {leaf:<14} XLA and XLA_REFERENCE differ by {off:.0e} of "
              f"{jnp.abs(gradient).max():.0e}")  # fmt: skip
        assert off <= 1e-4 * jnp.abs(gradient).max()

    params = random_params()
    momentum = jax.tree.map(jnp.zeros_like, params)
    for i in range(41):
        params, momentum, value = train_step(params, momentum, some_tokens())
        if i % 10 == 0:
            print(f"step {i:>3}: loss {value:.3f}")
    best = params["distance_bias"].argmax(axis=1)
    print(f"the layer looks back by {best.tolist()} (its heads' largest bias)")
    assert value < 0.1
    assert BACK in best.tolist()


if __name__ == "__main__":
    main()
