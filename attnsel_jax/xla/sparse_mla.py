"""Sparse MLA on any device that XLA compiles for: each token gathers its own rows, and no others.

The contract (maths, arguments, edge cases) is `pallas_kernels/sparse_mla/__init__.py`.

A few tokens at a time, so that what is gathered, tokens x topk x row, stays within a budget.
"""

import functools

import jax
import jax.numpy as jnp

from attnsel_jax.xla import online_softmax
from attnsel_jax.xla.latent_cache import check_rows, read_latents, write_latents
from attnsel_jax.xla.query_tiles import query_tiles
from pallas_kernels import empty_calls
from pallas_kernels.jax_settings import under_own_settings
from pallas_kernels.shape_checks import FLOATS, INT32, check_positive

# Float32 numbers gathered at once: 4 MiB; DeepSeek's 2048 positions of 576 come alone. Intel Xeon,
# family 6 model 207, 2 cores, jax 0.10.2, 2026-11-24, 16 tokens of 128 heads over 8192 bfloat16
# keys, times faster than `mla_attention` over all of them: 2**20 3.8, 2**22 2.3, 2**24 1.2; of 16
# heads: 0.9, 0.9, 0.4.
GATHERED = 2**20

_QUERIES = {
    "ql_nope": ("num_tokens num_q_heads kv_lora_rank", FLOATS),
    "q_pe": ("num_tokens num_q_heads rope_dim", FLOATS),
    "topk_indices": ("num_tokens topk", INT32),
}


@under_own_settings
def sparse_mla_attention(
    ql_nope: jax.Array,
    q_pe: jax.Array,
    kv_c: jax.Array | None,
    k_pe: jax.Array | None,
    latent_pages: jax.Array,
    topk_indices: jax.Array,
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
    """MLA over the positions that each token names, as the contract of `sparse_mla` has it.

    Any negative entry of topk_indices names nothing, and so does one that the token does not see.

    Numerics: logits, softmax and sums are float32 whatever the cache holds; float32 queries are
    multiplied at the highest precision, others at the device's default.

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
        return empty_calls.ragged(ql_nope, latent_pages)
    cache = {"kv_scale": kv_scale, "kv_cache_dtype": kv_cache_dtype}
    latent_pages = write_latents(latent_pages, kv_c, k_pe, slot_mapping, **cache)
    num_tokens, num_heads, rank = ql_nope.shape
    tiles, _ = query_tiles(  # of one query: tile i is token i
        kv_lens, cu_q_lens, num_seqs, num_tokens=num_tokens, block_q=1,
        pages_per_seq=dims["pages_per_seq"], page_size=dims["page_size"],
    )  # fmt: skip
    attend = functools.partial(
        _attend_tokens,
        page_table=page_table,
        page_size=dims["page_size"],
        read=functools.partial(read_latents, latent_pages, **cache),
        scale=jnp.asarray(scale, jnp.float32),
        soft_cap=soft_cap,
    )
    gathered = dims["topk"] * (rank + dims["rope_dim"])
    block = max(1, min(num_tokens, GATHERED // max(1, gathered)))

    def one_block(i, results):
        first = jnp.minimum(i * block, num_tokens - block)  # the last is done in part again
        mine = (
            jax.lax.dynamic_slice_in_dim(x, first, block) for x in (ql_nope, q_pe, topk_indices)
        )
        facts = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, block), tiles)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(whole, part, first, axis=0)
            for whole, part in zip(results, attend(*mine, facts, i), strict=True)
        )

    empty = (
        jnp.zeros(ql_nope.shape, ql_nope.dtype),
        jnp.full((num_tokens, num_heads), -jnp.inf, jnp.float32),
    )
    real_tokens = jnp.sum(tiles.q_len, dtype=jnp.int32)
    out, lse = jax.lax.fori_loop(0, -(-real_tokens // block), one_block, empty)
    return out, lse, latent_pages


def _attend_tokens(
    ql_nope, q_pe, topk_indices, tokens, step, *, page_table, page_size, read, scale, soft_cap
):
    """A block of tokens, each over the rows that it names: out in the queries' dtype, and lse."""
    pages_per_seq = page_table.shape[1]
    q_pos = jnp.where(tokens.q_len > 0, tokens.first_q_pos, -1)  # always below kv_len
    seen = (topk_indices >= 0) & (topk_indices <= q_pos[:, None])
    column = jnp.clip(topk_indices // page_size, 0, pages_per_seq - 1)
    latents = read(page_table[tokens.seq[:, None], column], topk_indices, seen, step)
    queries = jnp.concatenate([ql_nope, q_pe], axis=-1).astype(jnp.float32) * scale
    precision = online_softmax.dot_precision(ql_nope.dtype)
    logits = jnp.einsum("tnr,tkr->tnk", queries, latents, precision=precision)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    rank = ql_nope.shape[-1]
    nothing = online_softmax.start(logits.shape[:2], rank)
    running = online_softmax.add_block(
        nothing, logits, seen[:, None, :], latents[..., :rank], precision
    )
    out, lse = online_softmax.finish(running)
    return out.astype(ql_nope.dtype), lse
