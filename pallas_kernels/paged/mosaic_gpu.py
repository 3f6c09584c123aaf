"""Paged attention on NVIDIA GPUs: Pallas Mosaic GPU kernels that bring pages by TMA or cp.async.

The contract (maths, arguments, edge cases) is `pallas_kernels/paged/__init__.py`. The cache is
"by_head": [2, num_pages, num_kv_heads, page_size, head_dim], so that what one TMA brings, one
head's part of a page, lies together. A step is four programs: `mosaic_gpu_write` puts this step's
keys and values into the cache, `mosaic_gpu_decode` attends for sequences with few new tokens and
`mosaic_gpu_merge` merges its partial results, `mosaic_gpu_prefill` attends for all others; on
Ampere `mosaic_gpu_ampere` has both that attend, on Blackwell `mosaic_gpu_blackwell`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import empty_calls, gpu_chip
from pallas_kernels.contract_checks import check_logit_numbers, check_paged
from pallas_kernels.jax_settings import under_own_settings
from pallas_kernels.masks import Window
from pallas_kernels.paged import mosaic_gpu_ampere, mosaic_gpu_blackwell
from pallas_kernels.paged.mosaic_gpu_decode import decode
from pallas_kernels.paged.mosaic_gpu_geometry import ROWS, Geometry, Masks, round_up
from pallas_kernels.paged.mosaic_gpu_merge import merge
from pallas_kernels.paged.mosaic_gpu_prefill import PerHead, prefill
from pallas_kernels.paged.mosaic_gpu_schedule import (
    Batch,
    Schedule,
    decoded_token,
    place_of_rows,
    row_of_token,
    schedule,
)
from pallas_kernels.paged.mosaic_gpu_tiles import tiles_for_chip
from pallas_kernels.paged.mosaic_gpu_write import write_kv

DTYPES = ("bfloat16", "float16")
CACHES = (*DTYPES, "float8_e4m3fn", "float8_e5m2")
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
PAGE_SIZES = (16, 32, 64, 128, 256)
LOG2E = math.log2(math.e)
# Compute capability -> its (decode, prefill).
KERNELS = {
    (8, 0): (mosaic_gpu_ampere.decode, mosaic_gpu_ampere.prefill),
    (9, 0): (decode, prefill),
    (10, 0): (mosaic_gpu_blackwell.decode, mosaic_gpu_blackwell.prefill),
}
# Whose kernels bring queries to float16 themselves, and up to which head size: at 256 there is no
# room for them twice.
SCALE_ROWS = {(9, 0): 192}


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
            the contract's, see `pallas_kernels.paged`; the cache is "by_head".

    Returns:
        out [num_tokens, num_q_heads, head_dim] in q's dtype, lse float32 [num_tokens, num_q_heads],
        and kv_pages with k and v written.

    Numerics:
        Operands of both products have the cache's dtype, or float16 over a float8 cache, the one
        dtype that the hardware converts to; probabilities are rounded to it. bfloat16 queries that
        become float16 are first divided by a power of two, each row by its own. Logits, softmax and
        sums are float32.

    Raises:
        ValueError: a shape or dtype is not the contract's or not of those that these kernels take,
            or some of k, v and slot_mapping are given and some are not.
    """
    dims = check_paged(
        locals(),
        dtypes=DTYPES,
        cache=("2 num_pages num_kv_heads page_size head_dim", CACHES),
    )
    check_logit_numbers(soft_cap, attention_chunk_size, sliding_window)
    _check_limits(dims, q, kv_pages)
    if empty_calls.is_empty(dims):
        return empty_calls.ragged(q, kv_pages)
    if k is not None:
        kv_pages = write_kv(kv_pages, k, v, slot_mapping, k_scale=k_scale, v_scale=v_scale)
    masks = Masks(causal, sliding_window, attention_chunk_size)
    geometry = _geometry(q, kv_pages, page_table, masks, soft_cap, alibi_slopes is not None)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    q, scale, k_scale = _with_positive_factors(q, scale, k_scale, geometry)
    queries, row_factor = _operands(q, geometry)
    heads = _per_head(geometry, scale, soft_cap, k_scale, v_scale, alibi_slopes, sinks, row_factor)
    work = schedule(Batch(cu_q_lens, kv_lens, num_seqs), geometry)
    if geometry.num_tokens > geometry.decode_q_len:
        out, lse = _prompts(queries, kv_pages, page_table, work, heads, geometry)
    else:  # so few tokens are decoded, whosever they are
        out, lse = jnp.zeros((), q.dtype), -jnp.inf
    rows = _packed(queries, row_factor, work, geometry)
    is_merged = geometry.decode_tokens == geometry.num_tokens and (
        geometry.partial_width == geometry.head_dim
    )
    of_prompts = out if is_merged and out.ndim else None
    few_out, few_lse = _decoded(*rows, kv_pages, page_table, work, heads, of_prompts, geometry)
    token = jnp.arange(geometry.decode_tokens)
    place, within, exists = decoded_token(token, work, geometry)
    if geometry.decode_tokens == geometry.num_tokens:
        out = few_out if is_merged else jnp.where(exists[:, None, None], few_out, out)
        return out, jnp.where(exists[:, None], few_lse, lse), kv_pages
    token = jnp.where(exists, work.table[place, 2] + within, geometry.num_tokens)
    out = out.at[token].set(few_out, mode="drop", unique_indices=True)
    lse = lse.at[token].set(few_lse, mode="drop", unique_indices=True)
    return out, lse, kv_pages


def _geometry(q, kv_pages, page_table, masks, soft_cap, has_slopes) -> Geometry:
    """The sizes of this call."""
    num_tokens, num_q_heads, head_dim = q.shape
    _, _, num_kv_heads, page_size, _ = kv_pages.shape
    is_narrow = kv_pages.dtype.itemsize == 1
    dtype = jnp.dtype(jnp.float16) if is_narrow else kv_pages.dtype
    added = has_slopes or soft_cap is not None
    scales = dtype != q.dtype and head_dim <= SCALE_ROWS.get(gpu_chip.current().capability, 0)
    tiles = tiles_for_chip(
        head_dim, kv_pages.dtype.itemsize, added=added, bounded=masks.bound_first_keys,
        scaled=scales,
    )  # fmt: skip
    return Geometry(
        num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        page_size=page_size, pages_per_seq=page_table.shape[1], num_tokens=num_tokens,
        max_num_seqs=page_table.shape[0], cache_dtype=kv_pages.dtype, dtype=dtype,
        out_dtype=q.dtype, masks=masks,
        tiles=tiles,
        soft_cap=None if soft_cap is None else float(soft_cap) * LOG2E, has_slopes=has_slopes,
        has_row_factors=dtype != q.dtype and not scales, scales_rows=scales,
        num_blocks=gpu_chip.current().num_cores * tiles.blocks,
    )  # fmt: skip


def _with_positive_factors(
    q: jax.Array, scale: float, k_scale: jax.Array | None, geometry: Geometry
) -> tuple[jax.Array, float, jax.Array | None]:
    """(q, scale, k_scale) whose logits are the same; the factors are above 0, as kernels want them.

    A sign, or nothing at all, is q's: the greatest logit is then that of the greatest product.
    """
    if scale <= 0:
        q, scale = q * jnp.sign(scale).astype(q.dtype), abs(scale) or 1.0
    if k_scale is None:
        return q, scale, None
    k_scale = jnp.broadcast_to(jnp.asarray(k_scale, jnp.float32), geometry.num_kv_heads)
    signs = jnp.repeat(jnp.sign(k_scale), geometry.group).astype(q.dtype)
    return q * signs[:, None], scale, jnp.where(k_scale == 0, 1, jnp.abs(k_scale))


def _operands(q: jax.Array, geometry: Geometry) -> tuple[jax.Array, jax.Array | None]:
    """Queries as they are multiplied, and what each row was divided by (None: by nothing)."""
    if not geometry.has_row_factors:
        return q, None
    wide = q.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    _, exponent = jnp.frexp(jnp.where(jnp.isfinite(largest) & (largest > 0), largest, 1))
    # Two steps: 2.0 ** 128 is no float32.
    half = exponent // 2
    power = jnp.exp2(half.astype(jnp.float32)), jnp.exp2((exponent - half).astype(jnp.float32))
    scaled = (wide / power[0] / power[1]).astype(geometry.dtype)
    return scaled, (power[0] * power[1])[..., 0]


def _per_head(
    geometry, scale, soft_cap, k_scale, v_scale, alibi_slopes, sinks, row_factor
) -> PerHead:
    """The numbers of each query head, in base 2 where they join the logits."""
    heads = geometry.num_q_heads

    def of_q_heads(x):
        if x is None:
            return np.ones(heads, np.float32)
        x = jnp.broadcast_to(jnp.asarray(x, jnp.float32), geometry.num_kv_heads)
        return jnp.repeat(x, geometry.group)

    unit = LOG2E if soft_cap is None else 1 / float(soft_cap)
    factor = of_q_heads(k_scale) * np.float32(scale * unit)
    by_row = factor
    if row_factor is not None:
        by_row = jnp.pad(factor[:, None] * row_factor.T, ((0, 0), (0, 2 * ROWS)))
    return PerHead(
        row_factor=_constant(by_row),
        factor=_constant(factor),
        v_factor=_constant(of_q_heads(v_scale)),
        sinks=_constant(np.full(heads, -np.inf, np.float32)) if sinks is None else sinks * LOG2E,
        slopes=None if alibi_slopes is None else alibi_slopes * LOG2E,
    )


def _constant(x):
    """Equal numbers, known now, with one more: XLA would make each array of equals in a kernel."""
    return np.append(x, np.float32(0)) if isinstance(x, np.ndarray) else x


def _prompts(queries, kv_pages, page_table, schedule, heads, geometry):
    """(out, lse) of tokens that are not decoded."""
    # Copies of queries take 64 rows from multiples of 8 on, past the last one too.
    whole = round_up(geometry.num_tokens, geometry.tiles.alignment)
    fewer = max(ROWS, whole) - geometry.num_tokens
    queries = jnp.pad(queries, ((0, fewer), (0, 0), (0, 0)))
    _, prefill = KERNELS[gpu_chip.current().capability]
    out, lse = prefill(queries, kv_pages, page_table, schedule, heads, geometry)
    out = out[: geometry.num_tokens, :, : geometry.head_dim]
    row, is_of_none = row_of_token(schedule, geometry)
    lse = lse.reshape(geometry.num_q_heads, -1)[:, row].T
    # A sink is no sequence either.
    return out, jnp.where(is_of_none[:, None], -jnp.inf, lse)


def _packed(
    queries: jax.Array, row_factor: jax.Array | None, schedule: Schedule, geometry: Geometry
) -> tuple[jax.Array, jax.Array | None]:
    """Queries (and their factors) as decoding has them: [units, rows, ...], 64 rows more."""
    heads = geometry.part_heads
    row = jnp.minimum(jnp.arange(geometry.decode_rows + ROWS), geometry.decode_rows - 1)
    first, ahead = place_of_rows(schedule, row, geometry)
    token, head = first + ahead // heads, ahead % heads

    def pack(x):
        more = geometry.parts * heads - geometry.group
        x = x.reshape(x.shape[0], geometry.num_kv_heads, geometry.group, -1)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0)))
        x = x.reshape(x.shape[0], geometry.units, heads, -1)
        # Rows that do not exist are anybody's.
        return jnp.moveaxis(x.at[token, :, head].get(mode="clip"), 0, 1)

    return pack(queries), None if row_factor is None else pack(row_factor)[..., 0]


def _decoded(rows, row_factor, kv_pages, page_table, schedule, heads, of_prompts, geometry):
    """(out, lse) of tokens that may be decoded."""
    first_head = np.arange(geometry.num_kv_heads) * geometry.group
    per_unit = np.repeat(first_head, geometry.parts)
    if row_factor is None:
        factor = _constant(heads.factor[per_unit])
    else:
        factor = row_factor * heads.factor[per_unit][:, None]
    slopes = None
    if heads.slopes is not None:
        part = np.arange(geometry.units)[:, None] % geometry.parts * geometry.part_heads
        of_group = part + np.arange(ROWS) % geometry.part_heads
        head = per_unit[:, None] + np.minimum(of_group, geometry.group - 1)
        slopes = heads.slopes[head]
    decode, _ = KERNELS[gpu_chip.current().capability]
    partial = decode(rows, kv_pages, page_table, schedule, factor, slopes, geometry)
    out, lse = merge(*partial, schedule, heads.v_factor, heads.sinks, of_prompts, geometry)
    return out[..., : geometry.head_dim], lse[..., 0]


def _check_limits(dims: dict[str, int], q: jax.Array, kv_pages: jax.Array) -> None:
    """Refuses what these kernels do not take."""
    for name, allowed in (("page_size", PAGE_SIZES), ("head_dim", HEAD_DIMS)):
        if dims[name] not in allowed:
            raise ValueError(
                f"{name} is {dims[name]}, must be one of {', '.join(map(str, allowed))}"
            )
    if q.dtype == jnp.float16 and kv_pages.dtype == jnp.bfloat16:
        raise ValueError(
            "kv_pages has dtype bfloat16, must be float16 or a float8 with q of float16: bfloat16 "
            "would drop three bits of each query"
        )
