"""MLA with its latents expanded to keys and values of every head: the form for prefill.

The same mathematics as `mla_attention` on absorbed queries, in another order. A pair of query and
key costs qk_dim + v_dim multiplications a head, 320 in DeepSeek, where absorbing costs 1088; but
each latent is expanded first, at 512 * 256 a head. So a block of latents is expanded once, and all
queries of its sequence that see it attend to it before the next: it pays from about 170 queries on.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnsel_jax.xla import online_softmax
from attnsel_jax.xla.latent_cache import check_rows, read_latents, write_latents
from pallas_kernels import empty_calls
from pallas_kernels.jax_settings import under_own_settings
from pallas_kernels.shape_checks import FLOATS, check_positive

# Queries of a tile, keys of a block. Intel Xeon, family 6 model 207, 2 cores, jax 0.10.2,
# 2026-11-24, bfloat16, 512 + 64 to 128 and 128; times faster than `mla_attention`. Prefill of 512,
# 128 heads: 128 x 256 3.5, 256 x 256 4.2, 256 x 512 4.0, 512 x 512 3.7; of 1024, 16 heads: 2.2,
# 2.0, 1.9, 1.8.
BLOCK_Q, BLOCK_KV = 256, 256

_QUERIES = {
    "q_nope": ("num_tokens num_q_heads nope_dim", FLOATS),
    "q_pe": ("num_tokens num_q_heads rope_dim", FLOATS),
    "w_uk": ("kv_lora_rank num_q_heads nope_dim", FLOATS),
    "w_uv": ("kv_lora_rank num_q_heads v_dim", FLOATS),
}


@under_own_settings
def mla_attention_materialized(
    q_nope: jax.Array,
    q_pe: jax.Array,
    kv_c: jax.Array | None,
    k_pe: jax.Array | None,
    latent_pages: jax.Array,
    w_uk: jax.Array,
    w_uv: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
    slot_mapping: jax.Array | None,
    *,
    scale: float,
    soft_cap: float | None = None,
    kv_scale: jax.Array | None = None,
    kv_cache_dtype: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """MLA of a ragged batch over a paged latent cache, keys and values of each head made first.

    For head n, `k = latent @ w_uk[:, n]`, `v = latent @ w_uv[:, n]`, and
    `logit = scale * (dot(q_nope, k) + dot(q_pe, k_pe))`: what `mla_attention` gives on
    `ql_nope = einsum("tnd,rnd->tnr", q_nope, w_uk)`, its out multiplied by w_uv.

    Args:
        q_nope: [num_tokens, num_q_heads, nope_dim]; float32, bfloat16 or float16.
        q_pe: [num_tokens, num_q_heads, rope_dim], q_nope's dtype, like all that follow.
        kv_c: [num_tokens, kv_lora_rank], written to the cache first; or None.
        k_pe: [num_tokens, rope_dim]; or None.
        latent_pages: as in the contract of `mla`.
        w_uk: [kv_lora_rank, num_q_heads, nope_dim].
        w_uv: [kv_lora_rank, num_q_heads, v_dim].
        page_table: as in the contract, like all that follow.
        kv_lens: int32 [max_num_seqs].
        cu_q_lens: int32 [max_num_seqs + 1].
        num_seqs: int32 [].
        slot_mapping: int32 [num_tokens]; or None.
        scale: factor on the logits.
        soft_cap: static; None = none.
        kv_scale: float32 []; None = 1.
        kv_cache_dtype: static; "fp8_ds_mla" or None.

    Returns:
        out [num_tokens, num_q_heads, v_dim] in q_nope's dtype; lse float32 [num_tokens,
        num_q_heads]; latent_pages with this step's rows written.

    Numerics: keys, values, logits, softmax and sums are float32; dots as in `mla_attention`.

    Raises:
        ValueError: as `mla_attention`.
    """
    dims = check_rows(
        locals(),
        _QUERIES,
        kv_cache_dtype,
    )
    check_positive("soft_cap", soft_cap)
    if empty_calls.is_empty(dims):
        return empty_calls.ragged(q_nope, latent_pages, w_uv.shape[2])
    cache = {"kv_scale": kv_scale, "kv_cache_dtype": kv_cache_dtype}
    latent_pages = write_latents(latent_pages, kv_c, k_pe, slot_mapping, **cache)
    num_tokens, num_heads, _ = q_nope.shape
    block_q = min(BLOCK_Q, num_tokens)
    max_kv_len = page_table.shape[1] * latent_pages.shape[1]
    scaled = jnp.asarray(scale, jnp.float32)
    # Heads first, and block_q rows more, so that the last tile can be read and written whole.
    q_nope_rows, q_pe_rows = (
        jnp.pad(jnp.swapaxes(x.astype(jnp.float32) * scaled, 0, 1), ((0, 0), (0, block_q), (0, 0)))
        for x in (q_nope, q_pe)
    )
    attend = functools.partial(
        _attend_sequence,
        queries=(q_nope_rows, q_pe_rows),
        weights=(w_uk.astype(jnp.float32), w_uv.astype(jnp.float32)),
        read=functools.partial(read_latents, latent_pages, **cache),
        page_table=page_table,
        page_size=latent_pages.shape[1],
        blocks=(block_q, min(BLOCK_KV, max_kv_len)),
        soft_cap=soft_cap,
        precision=online_softmax.dot_precision(q_nope.dtype),
    )

    def one_sequence(i, running):
        first, last = (jnp.clip(cu_q_lens[i + j], 0, num_tokens) for j in (0, 1))
        length = jnp.clip(kv_lens[i], 0, max_kv_len)
        return attend(Sequence(i, first, last - first, length), running)

    empty = online_softmax.start((num_heads, num_tokens + block_q), w_uv.shape[2])
    out, lse = online_softmax.finish(jax.lax.fori_loop(0, num_seqs, one_sequence, empty))
    out = jnp.swapaxes(out[:, :num_tokens], 0, 1).astype(q_nope.dtype)
    return out, lse[:, :num_tokens].T, latent_pages


class Sequence(NamedTuple):
    """One sequence of the batch; int32 []."""

    row: jax.Array  # of page_table
    first_token: jax.Array
    q_len: jax.Array
    kv_len: jax.Array


def _attend_sequence(
    seq, running, *, queries, weights, read, page_table, page_size, blocks, soft_cap, precision
):
    """All queries of a sequence over all its keys: what `running` holds for its tokens, updated.

    `running` is of [num_q_heads, num_tokens + block_q] rows.
    """
    block_q, block_kv = blocks
    last_column = page_table.shape[1] - 1
    first_q_pos = seq.kv_len - seq.q_len
    num_tiles = -(-seq.q_len // block_q)
    offsets = jnp.arange(block_q, dtype=jnp.int32)

    def one_block(i, running):
        kv_pos = i * block_kv + jnp.arange(block_kv, dtype=jnp.int32)
        pages = page_table[seq.row, jnp.minimum(kv_pos // page_size, last_column)]
        latents = read(pages, kv_pos, kv_pos < seq.kv_len, i)
        keys, values, rope = _expand(latents, *weights, precision)

        def one_tile(t, running):
            first = seq.first_token + t * block_q
            nope_rows, rope_rows = (
                jax.lax.dynamic_slice_in_dim(x, first, block_q, axis=1) for x in queries
            )
            logits = jnp.einsum("ntd,nsd->nts", nope_rows, keys, precision=precision)
            logits = logits + jnp.einsum("ntd,sd->nts", rope_rows, rope, precision=precision)
            if soft_cap is not None:
                logits = soft_cap * jnp.tanh(logits / soft_cap)
            in_seq = t * block_q + offsets
            q_pos = jnp.where(in_seq < seq.q_len, first_q_pos + in_seq, -1)
            rows = jax.tree.map(
                lambda x: jax.lax.dynamic_slice_in_dim(x, first, block_q, axis=1), running
            )
            seen = kv_pos <= q_pos[:, None]
            rows = online_softmax.add_block(rows, logits, seen, values, precision)
            return jax.tree.map(
                lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, first, axis=1),
                running,
                rows,
            )

        first_tile = jnp.maximum(i * block_kv - first_q_pos, 0) // block_q
        return jax.lax.fori_loop(first_tile, num_tiles, one_tile, running)

    num_blocks = jnp.where(seq.q_len > 0, -(-seq.kv_len // block_kv), 0)
    return jax.lax.fori_loop(0, num_blocks, one_block, running)


def _expand(latents, w_uk, w_uv, precision):
    """Latents [keys, row] as keys and values of each head [num_q_heads, keys, dim], and rope."""
    rank = w_uk.shape[0]
    keys, values = (
        jnp.einsum("sr,rnd->nsd", latents[:, :rank], w, precision=precision) for w in (w_uk, w_uv)
    )
    return keys, values, latents[:, rank:]
