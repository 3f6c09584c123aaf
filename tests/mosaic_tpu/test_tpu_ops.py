"""The public ops on a TPU, interpreted: what a user calls, with the cache allocated for it.

Beside the same call on XLA, which other tests compare with the oracle.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from tpu_interpreter import tpu_interpreter

from attnsel_jax import (
    AttentionMetadata,
    KVCache,
    LatentCache,
    allocate_kv_cache,
    allocate_latent_cache,
    dot_product_attention,
    get_attn_backend,
    mla_attention,
    paged_attention,
    sparse_mla_attention,
)
from pallas_kernels.mla import mosaic_tpu
from pallas_kernels.mla.mosaic_tpu_tiles import Tiles

CHIP, PAGE_SIZE = "v5e", 64
BATCH = AttentionMetadata.from_lengths((1, 3), (75, 40), [[3, 1], [5, 0]], PAGE_SIZE)
TOKENS = BATCH.slot_mapping.shape[0]
RANDOM = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RANDOM.standard_normal(shape), jnp.float32)


def close(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def both(call, converted):
    """What a call gives on the TPU and on XLA; `converted` puts the TPU's cache in XLA's layout."""
    with tpu_interpreter(CHIP):
        *found, cache = call(CHIP)
    *expected, xla_cache = call("cpu")
    assert cache.layout != xla_cache.layout
    close((*found, converted(cache).pages), (*expected, xla_cache.pages))


@pytest.mark.once
def test_dense():
    q, kv = normal(1, 70, 4, 64), normal(2, 1, 70, 2, 64)

    def call(device):
        return dot_product_attention(
            q, *kv, is_causal=True, return_residual=True, needs_grad=False, device=device
        )

    with tpu_interpreter(CHIP):
        found = call(CHIP)
    close(found, call("cpu"))


@pytest.mark.once
@pytest.mark.parametrize("head_size", [pytest.param(64, marks=pytest.mark.sweep), 80])
def test_paged(head_size):
    q, new = normal(TOKENS, 4, head_size), normal(2, TOKENS, 2, head_size)
    stored = normal(2, 6, PAGE_SIZE, 2, head_size)

    def call(device):
        empty = allocate_kv_cache(6, PAGE_SIZE, 2, head_size, "float32", device=device)
        cache = KVCache(stored).converted(empty.layout)
        assert (cache.pages.shape, cache.dims) == (empty.pages.shape, empty.dims)
        return paged_attention(q, *new, cache, BATCH, return_lse=True, device=device)

    both(call, lambda cache: cache.converted("stacked"))


@pytest.mark.once
def test_a_layer_takes_a_bare_cache_whose_heads_are_padded():
    q, new = normal(TOKENS, 4, 80), normal(2, TOKENS, 2, 80)
    empty = allocate_kv_cache(6, PAGE_SIZE, 2, 80, "float32", device=CHIP)
    backend = get_attn_backend(80, "float32", "auto", PAGE_SIZE, device=CHIP)
    layer = backend.get_impl_cls()(4, 80, 80**-0.5, 2)
    assert empty.pages.shape == backend.get_kv_cache_shape(6, PAGE_SIZE, 2, 80)
    with tpu_interpreter(CHIP):
        out, cache = layer.forward(q, *new, empty, BATCH)
        of_bare, pages = layer.forward(q, *new, empty.pages, BATCH)
    expected = paged_attention(q, *new, empty.converted("stacked"), BATCH, device="cpu")
    close((out, cache.converted("stacked").pages), (expected[0], expected[1].pages))
    np.testing.assert_array_equal(of_bare, out)
    np.testing.assert_array_equal(pages, cache.pages)
    unsaid = KVCache(empty.pages, layout=empty.layout)
    with pytest.raises(ValueError, match="kv_cache has head_size 128, must be 80, as this layer"):
        layer.forward(q, *new, unsaid, BATCH)
    with pytest.raises(ValueError, match=r"cache.head_size is None .* must be 80 \(as in q\)"):
        paged_attention(q, *new, unsaid, BATCH, device=CHIP)


@pytest.mark.once
@pytest.mark.parametrize("use_sparse", [False, pytest.param(True, marks=pytest.mark.sweep)])
def test_latent(monkeypatch, use_sparse):
    monkeypatch.setattr(mosaic_tpu, "tiles_for", lambda *_, **__: Tiles(64, 128, 2, 1))
    tokens = [normal(TOKENS, *rest) for rest in ((4, 512), (4, 64), (512,), (64,))]
    stored = normal(6, PAGE_SIZE, 576)
    lists = [jnp.asarray(RANDOM.permuted(np.tile(np.arange(128), (TOKENS, 1)), axis=1), jnp.int32)]

    def call(device):
        empty = allocate_latent_cache(
            6, PAGE_SIZE, 512, 64, "float32", use_sparse=use_sparse, device=device
        )
        cache = LatentCache(stored).converted(empty.layout)
        assert cache.pages.shape == empty.pages.shape
        op = sparse_mla_attention if use_sparse else mla_attention
        return op(
            *tokens, *lists * use_sparse, cache, BATCH, scale=0.1, return_lse=True, device=device
        )

    both(call, lambda cache: cache.converted("rows"))
