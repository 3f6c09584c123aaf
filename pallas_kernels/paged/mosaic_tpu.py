"""Paged attention on TPU: Pallas kernels that walk each sequence's pages with prefetched copies.

The contract (maths, arguments, edge cases) is `pallas_kernels/paged/__init__.py`. The cache is
"side_by_side": [num_pages, num_kv_heads, tiles, page_size, 128], a head's key and value beside each
other in tiles of 128 lanes (`mosaic_tpu_geometry`), each padded with 0 to a multiple of 64. One
kernel writes this step's keys and values (`mosaic_tpu_write`), then attends (`mosaic_tpu_attend`).
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels import empty_calls, tpu_chip
from pallas_kernels.contract_checks import check_logit_numbers, check_paged
from pallas_kernels.jax_settings import under_own_settings
from pallas_kernels.masks import Window
from pallas_kernels.paged import mosaic_tpu_prompt
from pallas_kernels.paged.mosaic_tpu_attend import PerHead, attend
from pallas_kernels.paged.mosaic_tpu_geometry import (
    HALF,
    LANES,
    ROWS,
    Geometry,
    Masks,
    round_up,
)
from pallas_kernels.paged.mosaic_tpu_tiles import Tiles, decode_tokens, shape_class, tiles_for
from pallas_kernels.paged.mosaic_tpu_write import news
from pallas_kernels.tpu_operands import factor_of
from pallas_kernels.tpu_sequences import Needs, some_sequences_at_a_time

DTYPES = ("float32", "bfloat16")
CACHES = (*DTYPES, "float8_e4m3fn", "float8_e5m2", "int8")
LOG2E = 1.4426950408889634
MOST_ROWS = 64  # of a page that one copy brings
LEAST_BUFFERS = 3
SMALL_VMEM = 16 * 2**20


@under_own_settings
@some_sequences_at_a_time(Needs(token=8, seq=8))
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
            the contract's, see `pallas_kernels.paged`; the cache is "side_by_side".

    Returns:
        out [num_tokens, num_q_heads, head_dim] in q's dtype, lse float32 [num_tokens, num_q_heads],
        and kv_pages with k and v written.

    Numerics:
        Operands of both products have q's dtype, or a float8 cache's: keys and values of a wider
        cache are rounded to q's, and so are the probabilities. Logits, softmax and sums are
        float32; products of float32 operands are computed in full precision.

    Raises:
        ValueError: a shape or dtype is not the contract's, or some of k, v and slot_mapping are
            given and some are not.
    """
    dims = check_paged(
        locals(),
        dtypes=DTYPES,
        cache=("num_pages num_kv_heads tiles page_size lanes", CACHES),
    )
    check_logit_numbers(soft_cap, attention_chunk_size, sliding_window)
    _check_layout(dims)
    if empty_calls.is_empty(dims):
        return empty_calls.ragged(q, kv_pages)
    page_table = jnp.clip(page_table, 0, dims["num_pages"] - 1)  # unused entries may be anything
    new = None if k is None else news(kv_pages, k, v, slot_mapping, k_scale, v_scale)
    geometry = _geometry(q, kv_pages, page_table)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    per_head = _per_head(
        geometry, scale, soft_cap, k_scale, v_scale, alibi_slopes, sinks,
        of_cache=factor_of(kv_pages.dtype, q.dtype),
    )  # fmt: skip
    tokens, heads, _ = q.shape
    q = jnp.pad(q, ((0, max(0, geometry.tile_tokens - tokens)), (0, 0), (0, 0)))
    q = jnp.transpose(q, (1, 2, 0)) if geometry.in_columns else q
    out, lse, kv_pages = attend(
        q, kv_pages, page_table, kv_lens, cu_q_lens, num_seqs, new, per_head,
        geometry=geometry, masks=Masks(causal, sliding_window, attention_chunk_size),
        soft_cap=None if soft_cap is None else float(soft_cap) * LOG2E,
    )  # fmt: skip
    out = jnp.transpose(out, (2, 0, 1)) if geometry.in_columns else out
    lse = jnp.moveaxis(lse, 0, 1).reshape(-1, geometry.lse_lanes)
    return out[:tokens], lse[:tokens, :heads], kv_pages


def _geometry(q: jax.Array, kv_pages: jax.Array, page_table: jax.Array) -> Geometry:
    """The sizes of this call."""
    num_tokens, num_q_heads, head_dim = q.shape
    max_num_seqs, pages_per_seq = page_table.shape
    few = decode_tokens(num_tokens, max_num_seqs, num_q_heads)
    of_class = shape_class(num_tokens, few * max_num_seqs, head_dim)
    _, num_kv_heads, lane_tiles, rows, _ = kv_pages.shape
    tiles = tiles_for(kv_pages.dtype, of_class, num_kv_heads)
    # Of a sequence's last page only what holds keys is brought.
    page_size = math.gcd(rows, MOST_ROWS)
    parts = rows // page_size
    page_bytes = num_kv_heads * lane_tiles * page_size * LANES * kv_pages.dtype.itemsize
    # The buffers take a third of VMEM: many heads, or wide ones, have fewer keys in a block.
    third = tpu_chip.current().vmem_bytes // 3 // page_bytes
    num_buffers, wanted = tiles.num_buffers, tiles.block_tokens // page_size
    most, with_one_less = (_power_of_two(third // n) for n in (num_buffers, num_buffers - 1))
    if num_buffers > LEAST_BUFFERS and most < min(wanted, with_one_less):
        num_buffers, most = num_buffers - 1, with_one_less
    chunk_pages = min(max(1, tiles.chunk_tokens // page_size), most)
    chunks = max(1, min(wanted, most) // chunk_pages)
    chunks = 1 << (chunks.bit_length() - 1)
    tile_tokens = _tile_tokens(q, tiles)
    # Heads that do not fill registers: XLA keeps tokens along lanes, and so do prompts.
    in_columns = (
        of_class.startswith("prefill")
        and mosaic_tpu_prompt.serves(tile_tokens)
        and head_dim % LANES != 0
        and q.dtype == jnp.bfloat16
    )
    return Geometry(
        num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        page_size=page_size, page_parts=parts, pages_per_seq=parts * pages_per_seq,
        num_tokens=num_tokens, tile_tokens=tile_tokens, decode_tokens=few, in_columns=in_columns,
        block_pages=chunks * chunk_pages, chunk_pages=chunk_pages, num_buffers=num_buffers,
    )  # fmt: skip


def _power_of_two(most: int) -> int:
    """The largest one up to a number, 1 at least."""
    return 1 << (max(1, most).bit_length() - 1)


def _tile_tokens(q: jax.Array, tiles: Tiles) -> int:
    """Queries of a grid step: no more than there are, and than two fifths of VMEM hold.

    Of v4's 16 MiB a quarter, since what else a kernel keeps is as large as elsewhere.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    # Queries and outputs come and go in two buffers each; queries and sums are kept once more.
    of_token = num_q_heads * round_up(head_dim, LANES) * (6 * q.dtype.itemsize + 8)
    vmem = tpu_chip.current().vmem_bytes
    most = max(ROWS, (vmem // 4 if vmem == SMALL_VMEM else vmem * 2 // 5) // of_token)
    most = min(tiles.tile_tokens, 1 << (most.bit_length() - 1))
    return min(most, max(ROWS, 1 << (num_tokens - 1).bit_length()))


def _per_head(
    geometry, scale, soft_cap, k_scale, v_scale, alibi_slopes, sinks, *, of_cache: float
) -> PerHead:
    """The numbers of each query head, in base 2 where they join the logits.

    Both factors make good for what the cache's values are multiplied as: `of_cache`.
    """
    heads = geometry.num_q_heads

    def of_q_heads(x):
        x = jnp.broadcast_to(
            jnp.asarray(1.0 if x is None else x, jnp.float32), geometry.num_kv_heads
        )
        return jnp.repeat(x, geometry.group)

    unit = LOG2E if soft_cap is None else 1 / float(soft_cap)
    return PerHead(
        factor=of_q_heads(k_scale) * jnp.float32(scale * unit * of_cache),
        v_factor=of_q_heads(v_scale) * jnp.float32(of_cache),
        slope=jnp.zeros(heads, jnp.float32) if alibi_slopes is None else alibi_slopes * LOG2E,
        sink=jnp.full(heads, -jnp.inf, jnp.float32) if sinks is None else sinks * LOG2E,
        has_slope=alibi_slopes is not None,
        is_signed=k_scale is not None or scale <= 0,
    )


def _check_layout(dims: dict[str, int]) -> None:
    """Refuses sizes that the cache's layout has no room for."""
    tiles = round_up(dims["head_dim"], HALF) // HALF
    if (dims["tiles"], dims["lanes"]) != (tiles, LANES):
        raise ValueError(
            f"kv_pages has {dims['tiles']} tiles of {dims['lanes']} lanes, must have {tiles} of "
            f"{LANES}: twice the head_dim of q, {dims['head_dim']}, padded to a multiple of {HALF}"
        )
    if dims["page_size"] % 8:
        raise ValueError(f"page_size is {dims['page_size']}, must be a multiple of 8")
