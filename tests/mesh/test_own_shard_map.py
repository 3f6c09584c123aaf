"""Ops inside a `jax.shard_map` of the caller's, which checks what varies over the mesh or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh
from tpu_interpreter import tpu_interpreter

from attnsel_jax import (
    AttentionMetadata,
    KVCache,
    LatentCache,
    dot_product_attention,
    indexer_scores,
    mla_attention,
    paged_attention,
    sparse_mla_attention,
    topk_positions,
)
from pallas_kernels import jax_settings

BATCH = AttentionMetadata.from_lengths((3, 1), (5, 6), [[3, 0], [1, 2]], 4)
TOKENS = BATCH.slot_mapping.shape[0]
BY_HEAD = jax.P(None, None, "model")
# Unchecked is what ops over a mesh use themselves.
checked = pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.sweep)])


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def own(call, on, in_specs, out_specs, check_vma=True):
    return jax.jit(
        jax.shard_map(call, mesh=on, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)
    )


def close(found, expected):
    jax.tree.map(lambda *pair: np.testing.assert_allclose(*pair, rtol=2e-5, atol=2e-5),
                 found, expected)  # fmt: skip


def test_what_jax_does_not_show_is_there():
    """The setting of a checked `shard_map` is private; without it nothing here is told apart."""
    seen = []
    own(lambda x: (seen.append(jax_settings.varying_axes([x])), x)[1], mesh(False, model=2),
        jax.P("model"), jax.P("model"))(jnp.ones(2))  # fmt: skip
    assert seen == [frozenset({"model"})]


@checked
@pytest.mark.parametrize("backend", ["XLA", "XLA_REFERENCE"])
def test_dense_and_gradients_of_what_devices_share(check_vma, backend):
    """A kv head and sinks are one device's or all devices': gradients of these are summed."""
    on = mesh(False, data=2, model=2)
    q, kv, sinks = normal(0, 2, 9, 4, 16), normal(1, 2, 2, 9, 1, 16), normal(2, 4)
    weights = normal(3, *q.shape)

    def attend(q, k, v, sinks):
        return dot_product_attention(q, k, v, is_causal=True, sinks=sinks, backend=backend)

    by_batch = jax.P("data")
    mapped = own(
        attend, on, (jax.P("data", None, "model"), by_batch, by_batch, jax.P("model")),
        jax.P("data", None, "model"), check_vma,
    )  # fmt: skip

    def result(function):
        def loss(*arguments):
            out = function(*arguments)
            return jnp.sum(out * weights), out

        return jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(q, *kv, sinks)

    close(result(mapped), result(attend))


@pytest.mark.once
@checked
@pytest.mark.parametrize("over", ["layers", "a batch"])
def test_dense_under_scan_and_vmap(check_vma, over):
    """Which JAX evaluates again, to differentiate them, after they were traced."""
    on = mesh(False, model=2)
    q, kv = normal(0, 2, 1, 9, 4, 16), normal(1, 2, 1, 9, 1, 16)

    def attend(q, kv):
        return dot_product_attention(q, kv, kv, is_causal=True, backend="XLA")

    def layers(q, kv):
        return jax.lax.scan(lambda x, kv: (x + attend(x, kv), None), q[0], kv)[0][None]

    call = layers if over == "layers" else jax.vmap(attend)
    heads = jax.P(None, None, None, "model")
    mapped = own(call, on, (heads, jax.P()), heads, check_vma)

    def gradients(function):
        return jax.grad(lambda *x: jnp.sum(function(*x) ** 2), argnums=(0, 1))(q, kv)

    close(gradients(mapped), gradients(call))


@checked
def test_paged(check_vma):
    on = mesh(False, model=2)
    q, new, stored = normal(0, TOKENS, 4, 16), normal(1, TOKENS, 2, 16), normal(2, 2, 4, 4, 2, 16)

    def step(q, new, stored):
        out, cache = paged_attention(q, new, new, KVCache(stored), BATCH, backend="XLA")
        return out, cache.pages

    heads, cached = jax.P(None, "model"), jax.P(None, None, None, "model")
    mapped = own(step, on, (heads, heads, cached), (heads, cached), check_vma)
    close(mapped(q, new, stored), step(q, new, stored))


@pytest.mark.once
@checked
@pytest.mark.parametrize("use_sparse", [False, True], ids=["mla", "sparse_mla"])
def test_latents_that_devices_share(check_vma, use_sparse):
    """Queries are cut by head, latents and cache are whole."""
    on = mesh(False, model=2)
    q, latent, stored = normal(0, TOKENS, 4, 24), normal(1, TOKENS, 24), normal(2, 4, 4, 24)
    lists = jnp.tile(jnp.arange(8, dtype=jnp.int32), (TOKENS, 1))

    def step(q, latent, stored, lists):
        op = sparse_mla_attention if use_sparse else mla_attention
        return op(
            q[..., :16], q[..., 16:], latent[:, :16], latent[:, 16:], *[lists] * use_sparse,
            LatentCache(stored), BATCH, scale=0.2,
        )[0]  # fmt: skip

    mapped = own(step, on, (jax.P(None, "model"), *[jax.P()] * 3), jax.P(None, "model"), check_vma)
    close(mapped(q, latent, stored, lists), step(q, latent, stored, lists))


@checked
def test_indexer_and_topk(check_vma):
    on = mesh(False, model=2)
    q, weights, keys = normal(0, TOKENS, 4, 16), normal(1, TOKENS, 4), normal(2, 4, 4, 16)

    def choose(q, weights, keys):
        scores = indexer_scores(q, weights, keys, BATCH)
        return scores[:, None], topk_positions(scores, 4)[:, None]

    heads = jax.P(None, "model")
    found = own(choose, on, (heads, heads, jax.P()), (heads, heads), check_vma)(q, weights, keys)
    halves = [choose(q[:, at], weights[:, at], keys) for at in (slice(0, 2), slice(2, 4))]
    close(found, jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *halves))


@pytest.mark.once
def test_a_tpu_kernel_and_its_gradients():
    on = mesh(False, model=2)
    q, kv = normal(0, 1, 9, 2, 64), normal(1, 2, 1, 9, 1, 64)

    def gradients(device):
        def attend(q, k, v):
            return dot_product_attention(q, k, v, is_causal=True, device=device)

        mapped = own(attend, on, (BY_HEAD, jax.P(), jax.P()), BY_HEAD)
        return jax.grad(lambda *qkv: jnp.sum(mapped(*qkv) ** 2), argnums=(0, 1, 2))(q, *kv)

    with tpu_interpreter("v5e", detect_races=False):
        found = gradients("v5e")
    close(found, gradients("cpu"))
