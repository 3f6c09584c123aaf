"""`jax.vmap` over TPU kernels, interpreted, beside the same on XLA: a call after another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from strict_settings import strict_settings
from tpu_interpreter import tpu_interpreter

from attnsel_jax import (
    AttentionMetadata,
    KVCache,
    dot_product_attention,
    paged_attention,
    topk_positions,
)

CHIP, PAGE_SIZE = "v5e", 16
BATCH = AttentionMetadata.from_lengths((1, 3), (20, 9), [[3, 1], [2, 0]], PAGE_SIZE)
TOKENS = BATCH.slot_mapping.shape[0]
pytestmark = pytest.mark.once


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.fixture(autouse=True)
def _strict_settings():
    """The strictest: what vmap traces again is traced under the kernels' own all the same."""
    with strict_settings():
        yield


def same_on_both(call, tolerance=2e-4):
    with tpu_interpreter(CHIP, detect_races=False):
        found = call(CHIP)
    expected = call("cpu")
    jax.tree.map(
        lambda *pair: np.testing.assert_allclose(*pair, rtol=tolerance, atol=tolerance),
        found, expected,
    )  # fmt: skip


def test_dense_and_gradients_for_each_example():
    """Sinks and lengths are each example's, values are everyone's."""
    q, k, v, sinks = (
        normal(0, 2, 1, 9, 2, 64),
        normal(1, 2, 1, 9, 1, 64),
        normal(2, 1, 9, 1, 64),
        normal(3, 2, 2),
    )
    lengths = jnp.array([[9], [5]], jnp.int32)

    def call(device):
        def loss(q, k, sinks, v, lengths):
            out = dot_product_attention(
                q, k, v, key_value_seq_lengths=lengths, sinks=sinks, device=device
            )
            return jnp.sum(out**2)

        gradients = jax.grad(loss, argnums=(0, 1, 2, 3))
        return jax.jit(jax.vmap(gradients, in_axes=(0, 0, 0, None, 0)))(q, k, sinks, v, lengths)

    same_on_both(call)


def test_paged_over_layers():
    q, new, stored = (
        normal(0, 2, TOKENS, 4, 64),
        normal(1, 2, TOKENS, 2, 64),
        normal(2, 2, 2, 4, PAGE_SIZE, 2, 64),
    )
    layout = {CHIP: "side_by_side", "cpu": "stacked"}

    def call(device):
        def layer(q, new, stored):
            cache = KVCache(stored).converted(layout[device])
            out, cache = paged_attention(q, new, new, cache, BATCH, device=device)
            return out, cache.converted("stacked").pages

        return jax.jit(jax.vmap(layer))(q, new, stored)

    same_on_both(call)


@pytest.mark.sweep
def test_topk():
    scores = normal(0, 2, 9, 300)
    same_on_both(lambda device: jax.vmap(lambda x: topk_positions(x, 128, device=device))(scores))
