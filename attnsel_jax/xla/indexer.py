"""The lightning indexer on XLA: which positions of its sequence each token should attend to.

The contract is in `pallas_kernels/sparse_mla/__init__.py`.
"""

import functools

import jax
import jax.numpy as jnp

from attnsel_jax.xla import online_softmax
from attnsel_jax.xla.latent_cache import LATENT_DTYPES, read_latents
from attnsel_jax.xla.query_tiles import Tiles, query_tiles
from attnsel_jax.xla.tile_loop import over_tiles, tile_widths
from pallas_kernels import empty_calls
from pallas_kernels.contract_checks import check_indexer
from pallas_kernels.jax_settings import under_own_settings
from pallas_kernels.shape_checks import FLOAT32, FLOATS, check_arguments

# Rows (queries x index heads) of the widest tile, and keys of a block. Intel Xeon, family 6 model
# 207, 2 cores, jax 0.10.2, 2026-11-24, 256 tokens of 64 heads of 128, 8192 bfloat16 keys: 128 x 512
# 689 ms, 512 x 512 484, 512 x 1024 503, 2048 x 512 407.
BLOCK_ROWS, BLOCK_KV = 2048, 512


@under_own_settings
def indexer_scores(
    q_index: jax.Array,
    weights: jax.Array,
    index_pages: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
) -> jax.Array:
    """Scores of every cached position for every token, as the contract of `sparse_mla` has it.

    Positions past a sequence's length are not read, and cost one write each.

    Numerics: float32; float32 queries are multiplied at the highest precision, others at the
    device's default.

    Raises:
        ValueError: a shape or dtype is not the contract's.
    """
    dims = check_indexer(locals(), dtypes=FLOATS, key_dtypes=LATENT_DTYPES)
    if empty_calls.is_empty(dims):
        return empty_calls.scores(dims)
    q_index, weights, index_pages, page_table = map(
        jnp.asarray, (q_index, weights, index_pages, page_table)
    )  # tiles index them by traced numbers, which NumPy's arrays refuse
    num_tokens, page_size = dims["num_tokens"], dims["page_size"]
    most = BLOCK_ROWS // dims["num_index_heads"]
    widths = tile_widths(num_tokens, dims["max_num_seqs"], most)
    tiles, _ = query_tiles(
        kv_lens, cu_q_lens, num_seqs, num_tokens=num_tokens, block_q=widths[-1],
        pages_per_seq=dims["pages_per_seq"], page_size=page_size,
    )  # fmt: skip
    score = functools.partial(
        _score_tile, q_index=q_index, weights=weights, index_pages=index_pages,
        page_table=page_table,
    )  # fmt: skip
    empty_row = jnp.full((dims["pages_per_seq"] * page_size,), -jnp.inf, jnp.float32)
    (scores,) = over_tiles(score, tiles, widths, (empty_row,), num_tokens)
    return scores


@under_own_settings
def topk_positions(scores: jax.Array, topk: int) -> jax.Array:
    """The positions of the largest scores of each token.

    Args:
        scores: float32 [num_tokens, positions], -inf where a position is not seen.
        topk: static; how many to name.

    Returns:
        int32 [num_tokens, topk]: best first, ties to the lower position, -1 where fewer are seen.

    Raises:
        ValueError: topk is below 1, or scores are not float32 of two dimensions.
    """
    check_arguments({"scores": (scores, "num_tokens positions", FLOAT32)}, required=["scores"])
    if topk < 1:
        raise ValueError(f"topk is {topk}, must be at least 1: how many positions to name")
    named = min(topk, scores.shape[1])
    # top_k puts +0 before -0, which are a tie: heads of negative weight give -0. And NaN by its
    # sign, which is the machine's choice.
    scores = jnp.where(jnp.isnan(scores), jnp.nan, jnp.where(scores == 0, 0, scores))
    best, positions = jax.lax.top_k(scores, named)
    positions = jnp.where(best == -jnp.inf, -1, positions.astype(jnp.int32))
    return jnp.pad(positions, ((0, 0), (0, topk - named)), constant_values=-1)


def _score_tile(
    tile: Tiles,
    block_q: int,
    *,
    q_index: jax.Array,
    weights: jax.Array,
    index_pages: jax.Array,
    page_table: jax.Array,
) -> tuple[jax.Array]:
    """Scores [block_q, pages_per_seq * page_size] of one tile; -inf where nothing is seen."""
    num_tokens, num_heads, head_dim = q_index.shape
    page_size = index_pages.shape[1]
    width = page_table.shape[1] * page_size
    block_kv = min(BLOCK_KV, width)
    offsets = jnp.arange(block_q, dtype=jnp.int32)
    token = jnp.minimum(tile.first_token + offsets, num_tokens - 1)
    rows = q_index[token].astype(jnp.float32).reshape(block_q * num_heads, head_dim)
    q_pos = jnp.where(offsets < tile.q_len, tile.first_q_pos + offsets, -1)[:, None]
    stop = jnp.minimum(tile.kv_len, tile.first_q_pos + tile.q_len)
    last_column = page_table.shape[1] - 1
    precision = online_softmax.dot_precision(q_index.dtype)

    def one_block(i, scores):
        first = jnp.minimum(i * block_kv, width - block_kv)  # the last is done in part again
        kv_pos = first + jnp.arange(block_kv, dtype=jnp.int32)
        pages = page_table[tile.seq, jnp.minimum(kv_pos // page_size, last_column)]
        keys = read_latents(
            index_pages, pages, kv_pos, kv_pos < stop, i, kv_scale=None, kv_cache_dtype=None
        )
        dots = jnp.matmul(rows, keys.T, precision=precision).reshape(block_q, num_heads, block_kv)
        block = jnp.sum(jax.nn.relu(dots) * weights[token][:, :, None], axis=1)
        block = jnp.where(kv_pos <= q_pos, block, -jnp.inf)
        return jax.lax.dynamic_update_slice_in_dim(scores, block, first, axis=1)

    unseen = jnp.full((block_q, width), -jnp.inf, jnp.float32)
    return (jax.lax.fori_loop(0, -(-stop // block_kv), one_block, unseen),)
