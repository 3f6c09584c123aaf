"""Paged attention on any device that XLA compiles for: a loop over tiles of queries and key blocks.

The contract (maths, arguments, edge cases) is `pallas_kernels/paged/__init__.py`.

Each tile of queries belongs to one sequence, and walks over that sequence's pages from the first
that its queries see to the last, several pages at a time, with an online softmax. So reads are
bounded by what each sequence really sees, and temporary memory by one block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnsel_jax.xla.cache_writes import write_kv
from attnsel_jax.xla.paged_tile import PerHead, Static, attend_tile
from attnsel_jax.xla.query_tiles import Tiles, query_tiles
from pallas_kernels import empty_calls
from pallas_kernels.contract_checks import check_logit_numbers, check_paged
from pallas_kernels.jax_settings import under_own_settings
from pallas_kernels.masks import Window
from pallas_kernels.shape_checks import CACHE_DTYPES, FLOATS


class Blocks(NamedTuple):
    """How much is computed at once."""

    widths: tuple[int, ...]  # queries in a tile: a tile takes the least that holds its queries
    block_kv: int  # keys in a block, rounded to whole pages
    tiles_at_once: int  # more than 1: side by side, each as wide as the widest
    float32_operands: bool  # False: q's dtype where it holds every number of the cache


# Intel Xeon, family 6 model 207, 2 cores, 2026-11-23; float32, 32 query heads, 8 kv heads, 128.
# Prefill of 2048 (jax 0.10.2): widest tile 32, 64, 128 queries: 546, 554, 780 ms with 512 keys;
# 547, 742, 680 with 1024; 552, 576, 793 with 256. Decode of 32 x 2048: 128 to 512 keys are alike
# within the noise. Half-precision operands were not tried.
CPU = Blocks(widths=(1, 8, 64), block_kv=256, tiles_at_once=1, float32_operands=True)
# Not measured. One launch does many tiles; a narrow tile wastes rows of a matrix unit, not time.
ACCELERATOR = Blocks(widths=(1, 64), block_kv=256, tiles_at_once=32, float32_operands=False)


@under_own_settings
def paged_attention(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    kv_pages: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
    slot_mapping: jax.Array | None,
    *,
    scale: float | None = None,
    causal: bool = True,
    sliding_window: Window = None,
    attention_chunk_size: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of a ragged batch over a paged cache, as the contract of `paged` has it.

    Args:
        q, k, v, kv_pages, page_table, kv_lens, cu_q_lens, num_seqs, slot_mapping, scale, causal,
            sliding_window, attention_chunk_size, soft_cap, alibi_slopes, sinks, k_scale, v_scale:
            the contract's, see `pallas_kernels.paged`; the cache is "stacked".

    Returns:
        out [num_tokens, num_q_heads, head_dim] in q's dtype, lse float32 [num_tokens, num_q_heads],
        and kv_pages with k and v written.

    Numerics:
        Logits, softmax and sums are float32. So are the operands of products on a CPU; elsewhere
        they have q's dtype where that holds every number of the cache, and the probabilities are
        rounded to it.

    Raises:
        ValueError: a shape or dtype is not the contract's, or some of k, v and slot_mapping are
            given and some are not.
    """
    dims = check_paged(
        locals(),
        dtypes=FLOATS,
        cache=("2 num_pages page_size num_kv_heads head_dim", CACHE_DTYPES),
    )
    check_logit_numbers(soft_cap, attention_chunk_size, sliding_window)
    if empty_calls.is_empty(dims):
        return empty_calls.ragged(q, kv_pages)
    if k is not None:
        kv_pages = write_kv(kv_pages, k, v, slot_mapping, k_scale=k_scale, v_scale=v_scale)
    static = Static(
        scale=float(q.shape[-1] ** -0.5 if scale is None else scale),
        causal=causal,
        sliding_window=sliding_window,
        attention_chunk_size=attention_chunk_size,
        soft_cap=soft_cap,
    )
    per_head = PerHead(
        *(
            None if x is None else _of_each_head(x, q.shape[1], kv_pages.shape[3])
            for x in (alibi_slopes, sinks, k_scale, v_scale)
        )
    )
    out, lse = jax.lax.platform_dependent(
        q, kv_pages, page_table, kv_lens, cu_q_lens, num_seqs, per_head,
        cpu=functools.partial(_attend, static=static, blocks=CPU),
        default=functools.partial(_attend, static=static, blocks=ACCELERATOR),
    )  # fmt: skip
    return out, lse, kv_pages


def _of_each_head(x: jax.Array, num_q_heads: int, num_kv_heads: int) -> jax.Array:
    """A number, or one of each kv head or query head, as [num_kv_heads, group or 1, 1]."""
    if x.shape == (num_q_heads,):
        return x.reshape(num_kv_heads, -1, 1)
    return jnp.broadcast_to(x, (num_kv_heads,)).reshape(-1, 1, 1)


def _attend(
    q, kv_pages, page_table, kv_lens, cu_q_lens, num_seqs, per_head, *, static: Static,
    blocks: Blocks,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Cuts the batch into tiles, attends with one group of tiles after another: out and lse."""
    widths = _widths(q.shape[0], kv_lens.shape[0], blocks)
    tiles, tokens = query_tiles(
        kv_lens, cu_q_lens, num_seqs, num_tokens=q.shape[0], block_q=widths[-1],
        pages_per_seq=page_table.shape[1], page_size=kv_pages.shape[2],
    )  # fmt: skip
    operand = jnp.float32 if blocks.float32_operands else _operand_dtype(q.dtype, kv_pages.dtype)

    def of_width(width: int, tile: Tiles) -> tuple[jax.Array, jax.Array]:
        rows = tile.first_token + jnp.arange(width, dtype=jnp.int32)
        q_tile = q[jnp.minimum(rows, q.shape[0] - 1)].astype(operand)
        out, lse = attend_tile(
            tile, q_tile, kv_pages, page_table, per_head, static, block_kv=blocks.block_kv
        )
        missing = widths[-1] - width
        out = jnp.pad(out.astype(q.dtype), ((0, missing), (0, 0), (0, 0)))
        return out, jnp.pad(lse, ((0, missing), (0, 0)))

    def attend(tile: Tiles) -> tuple[jax.Array, jax.Array]:
        which = sum((tile.q_len > width).astype(jnp.int32) for width in widths[:-1])
        return jax.lax.switch(which, [functools.partial(of_width, w) for w in widths], tile)

    out, lse = _map_in_groups(attend, tiles, blocks.tiles_at_once)
    exists = tokens.exists[:, None]
    return (
        jnp.where(exists[..., None], out[tokens.tile, tokens.row], 0),
        jnp.where(exists, lse[tokens.tile, tokens.row], -jnp.inf),
    )


def _widths(num_tokens: int, max_num_seqs: int, blocks: Blocks) -> tuple[int, ...]:
    """The widths that tiles of this batch may have, ascending."""
    if num_tokens <= max_num_seqs:  # decode
        return (1,)
    covering = [w for w in blocks.widths if w >= num_tokens][:1]
    widths = [w for w in blocks.widths if w < num_tokens] + covering
    # Side by side, every width would be computed for every tile.
    return tuple(widths) if blocks.tiles_at_once == 1 else (widths[-1],)


def _operand_dtype(q: jnp.dtype, cache: jnp.dtype) -> jnp.dtype:
    """The dtype of q if every number of the cache's dtype is one of it, else float32."""
    return q if cache == q or cache.itemsize == 1 else jnp.dtype(jnp.float32)


def _map_in_groups(f, tiles: Tiles, size: int) -> tuple[jax.Array, jax.Array]:
    """Calls f on each tile, `size` side by side; empty tiles fill up the last group."""
    if size == 1:
        return jax.lax.map(f, tiles)
    num_tiles = tiles.seq.shape[0]
    size = min(size, num_tiles)
    groups = jax.tree.map(lambda x: jnp.pad(x, (0, -num_tiles % size)).reshape(-1, size), tiles)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(jax.vmap(f), groups))
