"""Small calls of every op, right in themselves, for tests to spoil or to repeat."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from attnsel_jax import AttentionMetadata, KVCache, LatentCache

Q_LENS, KV_LENS, PAGES = (3, 1), (5, 6), ([4, 1], [0, 5])
PAGE_SIZE, NUM_PAGES, NUM_TOKENS = 4, 6, 5


def normal(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def dense(batch=2, q_len=5, kv_len=7, heads=4, kv_heads=2, size=8, dtype="float32"):
    """Sharp logits, values that tell positions apart."""
    v = normal(3, batch, kv_len, kv_heads, size) + jnp.arange(kv_len)[:, None, None] / 4
    return {
        "query": 3 * normal(1, batch, q_len, heads, size, dtype=dtype),
        "key": normal(2, batch, kv_len, kv_heads, size, dtype=dtype),
        "value": v.astype(dtype),
    }


def batch(**more):
    """Two sequences of 3 and 1 new tokens, one token and one row of padding, shuffled pages."""
    return AttentionMetadata.from_lengths(
        Q_LENS, KV_LENS, PAGES, PAGE_SIZE, num_tokens=NUM_TOKENS, max_num_seqs=3, **more
    )


def filled(seed, *shape, dtype="float32"):
    """Pages [..., num_pages, page_size, *row] with NaN but where earlier positions lie."""
    lead = shape[: shape.index(NUM_PAGES)]
    row = shape[len(lead) + 2 :]
    flat = np.full((*lead, NUM_PAGES * PAGE_SIZE, *row), np.nan, np.float32)
    slots = [
        pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE
        for q_len, kv_len, pages in zip(Q_LENS, KV_LENS, PAGES, strict=True)
        for p in range(kv_len - q_len)
    ]
    where = (slice(None),) * len(lead) + (slots,)
    flat[where] = np.random.default_rng(seed).standard_normal(flat[where].shape)
    return jnp.asarray(flat.reshape(shape), dtype)


def paged(heads=4, kv_heads=2, size=8, dtype="float32"):
    return {
        "q": 3 * normal(1, NUM_TOKENS, heads, size, dtype=dtype),
        "k": normal(2, NUM_TOKENS, kv_heads, size, dtype=dtype),
        "v": normal(3, NUM_TOKENS, kv_heads, size, dtype=dtype),
        "cache": KVCache(filled(4, 2, NUM_PAGES, PAGE_SIZE, kv_heads, size, dtype=dtype)),
        "metadata": batch(),
    }


def mla(heads=4, rank=8, rope=4, dtype="float32"):
    return {
        "ql_nope": 2 * normal(1, NUM_TOKENS, heads, rank, dtype=dtype),
        "q_pe": normal(2, NUM_TOKENS, heads, rope, dtype=dtype),
        "kv_c": normal(3, NUM_TOKENS, rank, dtype=dtype),
        "k_pe": normal(4, NUM_TOKENS, rope, dtype=dtype),
        "cache": LatentCache(filled(5, NUM_PAGES, PAGE_SIZE, rank + rope, dtype=dtype)),
        "metadata": batch(),
        "scale": 0.3,
    }


def sparse(**sizes):
    topk = jnp.asarray([[0, 2, -1], [3, 1, 0], [-1, 4, 0], [5, 0, 3], [-1, -1, -1]], jnp.int32)
    return mla(**sizes) | {"topk_indices": topk}


def replaced(call, path, value):
    """The call with one argument, or one field of one ("metadata.kv_lens"), replaced."""
    name, _, field = path.partition(".")
    if field:
        value = dataclasses.replace(call[name], **{field: value})
    return call | {name: value}
