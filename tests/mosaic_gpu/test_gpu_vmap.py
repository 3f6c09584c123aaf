"""`jax.vmap` over GPU kernels, interpreted, beside the same on XLA: a call after another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_interpreter import gpu_interpreter, needs_gpu_interpreter

from attnsel_jax import AttentionMetadata, KVCache, dot_product_attention, paged_attention

needs_gpu_interpreter()

PAGE_SIZE = 16
BATCH = AttentionMetadata.from_lengths((1, 3), (20, 9), [[3, 1], [2, 0]], PAGE_SIZE)
TOKENS = BATCH.slot_mapping.shape[0]


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


def same_on_both(call, chip):
    with gpu_interpreter(chip, detect_races=False):
        found = call(chip)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(call("cpu")), strict=True):
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        np.testing.assert_allclose(one, other, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("chip", ["h200", pytest.param("a100", marks=pytest.mark.sweep)])
def test_dense_and_gradients_for_each_example(chip):
    q, k, v = normal(0, 2, 1, 70, 2, 64), normal(1, 2, 1, 70, 1, 64), normal(2, 1, 70, 1, 64)

    def call(device):
        def loss(q, k, v):
            out = dot_product_attention(q, k, v, is_causal=True, device=device)
            return jnp.sum(out.astype(jnp.float32) ** 2), out

        gradients = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
        return jax.jit(jax.vmap(gradients, in_axes=(0, 0, None)))(q, k, v)

    same_on_both(call, chip)


@pytest.mark.sweep
@pytest.mark.parametrize("chip", ["h200", "a100"])
def test_paged_over_layers(chip):
    q, new, stored = (
        normal(0, 2, TOKENS, 4, 64),
        normal(1, 2, TOKENS, 2, 64),
        normal(2, 2, 2, 4, PAGE_SIZE, 2, 64),
    )

    def call(device):
        def layer(q, new, stored):
            cache = KVCache(stored).converted("stacked" if device == "cpu" else "by_head")
            out, cache = paged_attention(q, new, new, cache, BATCH, device=device)
            return out, cache.converted("stacked").pages

        return jax.jit(jax.vmap(layer))(q, new, stored)

    same_on_both(call, chip)
