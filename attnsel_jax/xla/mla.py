"""MLA on any device that XLA compiles for: tiles of queries over blocks of latents, absorbed.

The contract (maths, arguments, edge cases) is `pallas_kernels/mla/__init__.py`.

All heads of a token share its keys, so a tile's queries and heads are the rows of one plain matrix
product with a block of latents. Tiles and blocks are loops whose lengths are known at run time:
what is read and computed follows the lengths of the sequences, not the widths of the arrays.
"""

import functools

import jax
import jax.numpy as jnp

from attnsel_jax.xla import online_softmax
from attnsel_jax.xla.latent_cache import check_rows, read_latents, write_latents
from attnsel_jax.xla.mla_materialized import mla_attention_materialized
from attnsel_jax.xla.query_tiles import query_tiles
from attnsel_jax.xla.tile_loop import over_tiles, tile_widths
from pallas_kernels import empty_calls
from pallas_kernels.jax_settings import under_own_settings
from pallas_kernels.shape_checks import FLOATS, check_positive

__all__ = ["mla_attention", "mla_attention_materialized"]

# Rows (queries x heads) of the widest tile, and keys of a block. Intel Xeon, family 6 model 207,
# 2 cores, jax 0.10.2, 2026-11-24, bfloat16 cache of 512 + 64, pages of 64; times faster than
# gathering the pages and a softmax over whole rows. Prefill of 512, 128 heads: 512 x 512 0.9,
# 1024 x 512 1.5, 2048 x 256 1.9, 2048 x 512 1.8; of 1024, 16 heads: 2.3, 2.2, 3.2, 2.7. Decode of
# 16 x 2048, 256 to 2048 keys, alike within the noise: 1.5 to 1.6, 128 heads; 1.7 to 2.8, 16 heads.
BLOCK_ROWS, BLOCK_KV = 2048, 256

_QUERIES = {
    "ql_nope": ("num_tokens num_q_heads kv_lora_rank", FLOATS),
    "q_pe": ("num_tokens num_q_heads rope_dim", FLOATS),
}


@under_own_settings
def mla_attention(
    ql_nope: jax.Array,
    q_pe: jax.Array,
    kv_c: jax.Array | None,
    k_pe: jax.Array | None,
    latent_pages: jax.Array,
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
    """Absorbed MLA of a ragged batch over a paged latent cache, as the contract of `mla` has it.

    Numerics: logits, softmax and sums are float32 whatever the cache holds; float32 queries are
    multiplied at the highest precision, others at the device's default.

    Raises:
        ValueError: a shape or dtype is not the contract's; fp8_ds_mla with sizes other than 512 and
            64 or with kv_scale; some of kv_c, k_pe and slot_mapping given and some not.
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
    widths = tile_widths(num_tokens, kv_lens.shape[0], BLOCK_ROWS // num_heads)
    tiles, _ = query_tiles(
        kv_lens, cu_q_lens, num_seqs, num_tokens=num_tokens, block_q=widths[-1],
        pages_per_seq=page_table.shape[1], page_size=latent_pages.shape[1],
    )  # fmt: skip
    attend = functools.partial(
        _attend_tile,
        queries=(ql_nope, q_pe),
        page_table=page_table,
        read=functools.partial(read_latents, latent_pages, **cache),
        page_size=latent_pages.shape[1],
        scale=jnp.asarray(scale, jnp.float32),
        soft_cap=soft_cap,
    )
    empty_row = (
        jnp.zeros((num_heads, rank), ql_nope.dtype),
        jnp.full((num_heads,), -jnp.inf, jnp.float32),
    )
    out, lse = over_tiles(attend, tiles, widths, empty_row, num_tokens)
    return out, lse, latent_pages


def _attend_tile(tile, block_q, *, queries, page_table, read, page_size, scale, soft_cap):
    """One tile of at most block_q queries over the keys that they see.

    `read(pages, positions, exists, step)` gives true values of latents. Returns out [block_q,
    num_q_heads, kv_lora_rank] in the queries' dtype and lse float32 [block_q, num_q_heads].
    """
    ql_nope = queries[0]
    num_tokens, num_heads, rank = ql_nope.shape
    offsets = jnp.arange(block_q, dtype=jnp.int32)
    token = jnp.minimum(tile.first_token + offsets, num_tokens - 1)
    rows = jnp.concatenate([x[token] for x in queries], axis=-1).astype(jnp.float32) * scale
    rows = rows.reshape(block_q * num_heads, -1)
    q_pos = jnp.where(offsets < tile.q_len, tile.first_q_pos + offsets, -1)
    q_pos = jnp.repeat(q_pos, num_heads)[:, None]
    stop = jnp.minimum(tile.kv_len, tile.first_q_pos + tile.q_len)
    precision = online_softmax.dot_precision(ql_nope.dtype)
    last_column = page_table.shape[1] - 1

    block_kv = min(BLOCK_KV, page_table.shape[1] * page_size)

    def one_block(i, running):
        kv_pos = i * block_kv + jnp.arange(block_kv, dtype=jnp.int32)
        pages = page_table[tile.seq, jnp.minimum(kv_pos // page_size, last_column)]
        latents = read(pages, kv_pos, kv_pos < stop, i)
        logits = jnp.matmul(rows, latents.T, precision=precision)
        if soft_cap is not None:
            logits = soft_cap * jnp.tanh(logits / soft_cap)
        seen = kv_pos <= q_pos
        return online_softmax.add_block(running, logits, seen, latents[:, :rank], precision)

    first = online_softmax.start((block_q * num_heads,), rank)
    last = jax.lax.fori_loop(0, -(-stop // block_kv), one_block, first)
    out, lse = online_softmax.finish(last)
    out = out.astype(ql_nope.dtype).reshape(block_q, num_heads, rank)
    return out, lse.reshape(block_q, num_heads)
