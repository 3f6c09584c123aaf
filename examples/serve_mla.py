"""Serve one layer of multi-head latent attention (DeepSeek's): prompt, decode, and sparse decode.

A token's keys and values of all heads are made from one latent, and only the latent is cached. A
prompt is attended to over keys and values (fewer operations), later tokens over the cached latents
(fewer bytes). In sparse decoding an indexer names the positions that a token attends to; this one
was never trained, and names any.

    python examples/serve_mla.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import attnsel_jax as attn

WIDTH, HEADS, RANK, NOPE, ROPE = 64, 4, 32, 16, 8
INDEX_HEADS, INDEX_SIZE = 2, 16
PROMPT, NEW, PAGE_SIZE = 21, 6, 8
PAGES = [3, 0, 4, 1]
SCALE = (NOPE + ROPE) ** -0.5


def random_params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "q": (WIDTH, HEADS, NOPE + ROPE), "latent": (WIDTH, RANK), "k_pe": (WIDTH, ROPE),
        "uk": (RANK, HEADS, NOPE), "uv": (RANK, HEADS, NOPE), "out": (HEADS, NOPE, WIDTH),
        "q_index": (WIDTH, INDEX_HEADS, INDEX_SIZE), "k_index": (WIDTH, INDEX_SIZE),
        "weights": (WIDTH, INDEX_HEADS),
    }  # fmt: skip
    return {
        name: jnp.asarray(rng.normal(0, shape[0] ** -0.5, shape), jnp.float32)
        for name, shape in shapes.items()
    }


def rotated(x, positions):
    """x [tokens, ..., ROPE] turned by its token's position."""
    angles = positions[:, None] * 100.0 ** (-jnp.arange(ROPE // 2) / (ROPE // 2))
    angles = angles.reshape(len(positions), *(1,) * (x.ndim - 2), ROPE // 2)
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def projected(params, x, positions):
    """Queries without and with rotation, this step's latents and rotary keys."""
    q_nope, q_pe = jnp.split(jnp.einsum("tw,wnd->tnd", x, params["q"]), [NOPE], axis=-1)
    k_pe = rotated(x @ params["k_pe"], positions)
    return q_nope, rotated(q_pe, positions), x @ params["latent"], k_pe


def over_keys(params, x):
    """Attention of a whole sequence over the keys and values of every head; its latents."""
    q_nope, q_pe, latent, k_pe = projected(params, x, jnp.arange(len(x)))
    k_pe_of_heads = jnp.broadcast_to(k_pe[:, None], q_pe.shape)
    k = jnp.concatenate([jnp.einsum("tr,rnd->tnd", latent, params["uk"]), k_pe_of_heads], axis=-1)
    v = jnp.einsum("tr,rnd->tnd", latent, params["uv"])
    q = jnp.concatenate([q_nope, q_pe], axis=-1)
    out = attn.dot_product_attention(q, k, v, is_causal=True, scale=SCALE)
    return jnp.einsum("tnd,ndw->tw", out, params["out"]), latent, k_pe


@functools.partial(jax.jit, donate_argnums=1)
def prompt_step(params, caches, x, metadata):
    cache, index_pages = caches
    out, latent, k_pe = over_keys(params, x)
    cache = attn.write_latent_cache(cache, latent, k_pe, metadata.slot_mapping)
    k_index = x @ params["k_index"]
    return out, (cache, attn.write_index_keys(index_pages, k_index, metadata.slot_mapping))


@functools.partial(jax.jit, donate_argnums=1, static_argnames="topk")
def decode_step(params, caches, x, metadata, topk=None):
    """Over the cached latents: all of them, or the topk that the indexer names."""
    cache, index_pages = caches
    q_nope, q_pe, latent, k_pe = projected(params, x, metadata.kv_lens - 1)
    ql_nope = jnp.einsum("tnd,rnd->tnr", q_nope, params["uk"])  # absorbed
    k_index = x @ params["k_index"]
    index_pages = attn.write_index_keys(index_pages, k_index, metadata.slot_mapping)
    given = ql_nope, q_pe, latent, k_pe
    if topk is None:
        out, cache = attn.mla_attention(*given, cache, metadata, scale=SCALE)
    else:
        q_index = jnp.einsum("tw,wnd->tnd", x, params["q_index"])
        scores = attn.indexer_scores(q_index, x @ params["weights"], index_pages, metadata)
        named = attn.topk_positions(scores, topk)
        out, cache = attn.sparse_mla_attention(*given, named, cache, metadata, scale=SCALE)
    out = jnp.einsum("tnr,rnd->tnd", out, params["uv"])
    return jnp.einsum("tnd,ndw->tw", out, params["out"]), (cache, index_pages)


def served(params, x, topk=None):
    """Rows of the prompt, then of one token after another."""

    def batch(q_len, kv_len):
        return attn.AttentionMetadata.from_lengths([q_len], [kv_len], [PAGES], PAGE_SIZE)

    cache = attn.allocate_latent_cache(
        6, PAGE_SIZE, RANK, ROPE, "float32", use_sparse=topk is not None
    )
    caches = cache, jnp.zeros((6, PAGE_SIZE, INDEX_SIZE))
    rows, caches = prompt_step(params, caches, x[:PROMPT], batch(PROMPT, PROMPT))
    rows = [rows]
    for n in range(PROMPT, PROMPT + NEW):
        row, caches = decode_step(params, caches, x[n : n + 1], batch(1, n + 1), topk=topk)
        rows.append(row)
    return jnp.concatenate(rows)


def main():
    params = random_params()
    x = jnp.asarray(np.random.default_rng(1).standard_normal((PROMPT + NEW, WIDTH)), jnp.float32)
    want, _, _ = over_keys(params, x)
    for topk in (None, PROMPT + NEW, 8):
        off = jnp.abs(served(params, x, topk) - want)[PROMPT:].mean() / jnp.abs(want).mean()
        what = "all cached positions" if topk is None else f"the best {topk:>2} positions"
        print(f"decoding over {what:<21} differs from the whole sequence's rows by {off:.0e}")
        assert (off < 1e-5) == (topk != 8)


if __name__ == "__main__":
    main()
