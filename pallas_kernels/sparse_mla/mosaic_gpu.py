"""Sparse MLA on Hopper: each token's rows are brought one by one, then MLA's warpgroups attend.

The contract (maths, arguments, edge cases) is `pallas_kernels/sparse_mla/__init__.py`. A block of
the grid is one token: 64 rows of heads, and a share of the rows that the token names. Each row is a
copy of its own (TMA on Hopper gathers nothing, and Pallas reads no vector of addresses there), raw
into the slot's own memory; `mosaic_gpu_slots` says how they get from there to where wgmma reads
them. A place in the list that names nothing is a row past the cache's end, which TMA fills with
zeros, and is masked. 16-bit caches are read where they are. Rows of 8-bit caches are gathered and
widened by XLA first, a few tokens at a time.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import empty_calls, gpu_chip
from pallas_kernels.mla import mosaic_gpu_attend as attending
from pallas_kernels.mla.mosaic_gpu_arguments import check_latent
from pallas_kernels.mla.mosaic_gpu_attend import ATTENDING, KEYS, LOG2_E, PAIR, ROWS, Sizes
from pallas_kernels.mla.mosaic_gpu_batch import Batch
from pallas_kernels.mla.mosaic_gpu_load import load_queries
from pallas_kernels.mla.mosaic_gpu_results import merged, shapes, write
from pallas_kernels.mla.mosaic_gpu_slots import (
    GROUP,
    LANE_ROW,
    ExpandedSlots,
    allocated,
    load_and_expand,
    raw_pieces,
    scratch,
)
from pallas_kernels.mla.mosaic_gpu_tiles import TILES, splits
from pallas_kernels.mla.mosaic_gpu_writes import write_latents
from pallas_kernels.shape_checks import INT32, check_positive
from pallas_kernels.sparse_mla.mosaic_gpu_rows import Chosen, chosen_rows, gathered

REGISTERS = {"attends": 216, "loads": 72}  # of a thread; 504 together, in steps of 8
# Bytes of rows that are gathered at once from an 8-bit cache: 227 tokens of 2048 rows.
GATHERED_BYTES = 512 << 20


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

    Numerics: as `mla_attention`; the true values of fp8_ds_mla are rounded to the queries' dtype,
    other 8-bit values are kept as they are.

    Raises:
        ValueError: as `mla_attention`, but fp8_ds_mla is taken.
    """
    dims = check_latent(
        locals(),
        kv_cache_dtype,
        {"topk_indices": ("num_tokens topk", INT32)},
        takes_bytes=True,
    )
    check_positive("soft_cap", soft_cap)
    if empty_calls.is_empty(dims):
        return empty_calls.ragged(ql_nope, latent_pages)
    latent_pages = write_latents(latent_pages, kv_c, k_pe, slot_mapping, kv_scale)
    num_heads, rank = ql_nope.shape[1:]
    padded = num_heads + (-num_heads % (ROWS if num_heads > ROWS else 8))
    chosen = chosen_rows(
        topk_indices, page_table, kv_lens, cu_q_lens, num_seqs, num_pages=dims["num_pages"],
        page_size=dims["page_size"], multiple=PAIR,
    )  # fmt: skip
    extra = ((0, 0), (0, padded - num_heads), (0, 0))
    queries = [jnp.pad(x, extra) for x in (ql_nope, q_pe)]
    sizes = Sizes(
        block_q=1, num_heads=padded, rank=rank, rope_dim=q_pe.shape[2], page_size=dims["page_size"],
        scale=float(scale), soft_cap=soft_cap, splits=1,
    )  # fmt: skip
    kv_scale = jnp.ones((1,), jnp.float32) if kv_scale is None else kv_scale.reshape(1)
    if latent_pages.dtype.itemsize == 2:
        out, lse = _call(queries, _columns(latent_pages), chosen, kv_scale, sizes)
    else:
        out, lse = _in_turns(queries, latent_pages, chosen, kv_scale, sizes)
    return out[:, :num_heads], lse[:, :num_heads], latent_pages


def _columns(rows: jax.Array) -> jax.Array:
    """Rows as a copy takes them: 64 columns at a time."""
    return rows.reshape(-1, rows.shape[-1] // LANE_ROW, LANE_ROW)


def _in_turns(queries, latent_pages, chosen: Chosen, kv_scale, sizes: Sizes):
    """An 8-bit cache: gathers the rows of some tokens, attends, and goes on."""
    dtype = queries[0].dtype
    num_tokens, listed = chosen.rows.shape
    row_bytes = (sizes.rank + sizes.rope_dim) * dtype.itemsize
    block = max(1, min(num_tokens, GATHERED_BYTES // (listed * row_bytes)))

    def one_block(i, results):
        first = jnp.minimum(i * block, num_tokens - block)  # the last is done in part again
        mine = [jax.lax.dynamic_slice_in_dim(x, first, block) for x in (*queries, *chosen)]
        rows, moved = gathered(latent_pages, Chosen(*mine[2:]), dtype)
        parts = _call(mine[:2], _columns(rows), moved, kv_scale, sizes)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(whole, part, first, axis=0)
            for whole, part in zip(results, parts, strict=True)
        )

    shape = num_tokens, sizes.num_heads
    empty = jnp.zeros((*shape, sizes.rank), dtype), jnp.zeros(shape, jnp.float32)
    return jax.lax.fori_loop(0, -(-num_tokens // block), one_block, empty)


class _Arrays(NamedTuple):
    """What the kernel reads and writes in GMEM."""

    ql_nope: Any  # [num_tokens * num_heads, rank]
    q_pe: Any
    rows: Any  # [num_rows, columns / 64, 64]
    chosen: Any  # int32 [num_tokens, listed]
    used: Any  # int32 [num_tokens]
    kv_scale: Any  # float32 [1]
    out: Any  # see `mosaic_gpu_results`
    lse: Any


def _call(queries, rows, chosen: Chosen, kv_scale, sizes: Sizes):
    """The kernel, and what puts its parts together: out and lse of padded heads."""
    ql_nope, q_pe = queries
    num_tokens, num_heads, rank = ql_nope.shape
    dtype, row_blocks = ql_nope.dtype, -(-num_heads // ROWS)
    tiles = num_tokens * row_blocks
    chip, listed = gpu_chip.current(), chosen.rows.shape[1]
    choice = TILES[chip.name, 16, "sparse"]
    parts = splits(choice, cores=chip.num_cores, blocks=tiles, most_keys=listed)
    sizes = dataclasses.replace(sizes, splits=parts)
    raw = plgpu.SMEM((KEYS // GROUP, GROUP, *rows.shape[1:]), dtype)
    slots = ExpandedSlots.scratch(raw, sizes, dtype, KEYS + 1)
    called = plgpu.kernel(
        functools.partial(_kernel, sizes=sizes, row_blocks=row_blocks),
        out_type=shapes(sizes, num_tokens, tiles, dtype),
        scratch_types=[*scratch(sizes, slots, dtype, dtype), plgpu.SMEM((2, KEYS), jnp.int32)],
        grid=(sizes.splits, tiles),
        grid_names=("split", "tile"),
        num_threads=ATTENDING + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="sparse_mla_attention",
    )
    q_pe = q_pe.reshape(num_tokens * num_heads, -1)
    out, lse = called(ql_nope.reshape(-1, rank), q_pe, rows, *chosen, kv_scale)
    return merged(out, lse, Batch(None, None, None, num_tokens, 0), sizes, dtype)


def _kernel(*refs, sizes: Sizes, row_blocks: int):
    """One block: a token's heads and a share of its rows; each warpgroup takes its part."""
    arrays = _Arrays(*refs[: len(_Arrays._fields)])
    *own, chosen = refs[len(_Arrays._fields) :]
    shared = allocated(own, sizes, False)
    split, number = jax.lax.axis_index("split"), jax.lax.axis_index("tile")
    token = jax.lax.div(number, row_blocks)
    kv_scale = arrays.kv_scale[0]
    walk = _walk(arrays.used[token], arrays.chosen[token, 0], split, sizes, kv_scale)
    row = token * sizes.num_heads + jax.lax.rem(number, row_blocks) * ROWS
    warpgroup = jax.lax.axis_index("warpgroup")
    for me in range(ATTENDING):

        @pl.when(warpgroup == me)
        def _(me=me):
            plgpu.set_max_registers(REGISTERS["attends"], action="increase")
            sees = functools.partial(_is_row, chosen, arrays.rows.shape[0])
            running = attending.attend(me, sizes, shared, walk, sees)
            results = attending.finish(me, shared, running, kv_scale)
            write(me, sizes, shared, arrays, results, (split, number), row, 1)

    @pl.when(warpgroup == ATTENDING)
    def _():
        plgpu.set_max_registers(REGISTERS["loads"], action="decrease")
        load_queries(sizes, shared, arrays.ql_nope, arrays.q_pe, row)
        listed = arrays.chosen.at[token]
        load = functools.partial(_load_rows, arrays.rows, listed, chosen, shared.slots, walk)
        pieces = functools.partial(_pieces, walk.zero)
        load_and_expand(shared.slots, walk.pairs, load, pieces, None)


def _walk(used, a_row, split, sizes: Sizes, kv_scale) -> attending.Walk:
    """A split's share of a token's list."""
    pairs = pl.cdiv(used, PAIR)
    share = pl.cdiv(pairs, sizes.splits)
    to_tanh = LOG2_E if sizes.soft_cap is None else 2 * LOG2_E / sizes.soft_cap
    return attending.Walk(
        pairs=jnp.clip(pairs - split * share, 0, share),
        seen=None,
        first_pair=split * share,
        q_pos=0,
        kv_len=0,
        zero=jnp.minimum(a_row, 0),  # not of `used`: in a loop it is known to be above 0
        factor=kv_scale * (sizes.scale * to_tanh),
    )


def _load_rows(rows, listed, chosen, slots: ExpandedSlots, walk, i, slot) -> None:
    """The rows of one block, each by a copy; every warp brings those of one group."""
    first = (walk.first_pair + i) * PAIR + slot * KEYS
    arrived = slots.arrived.at[slot]
    plgpu.copy_gmem_to_smem(listed.at[pl.ds(first, KEYS)], chosen.at[slot], arrived)

    @plgpu.warp_map
    def _(warp):
        for place in range(GROUP):
            row = rows.at[listed[first + warp * GROUP + place]]
            plgpu.copy_gmem_to_smem(row, slots.raw[slot].at[warp, place], arrived)


def _pieces(zero, raw, slot) -> list[jax.Array]:
    """The columns of a group of rows, as `load_and_expand` wants them."""
    return raw_pieces(raw, zero)


def _is_row(chosen, none, me, sizes, shared, first_key, walk) -> jax.Array:
    """Whether each key of a block is a row of the cache: as `sees` of `attend`."""
    named = plgpu.load(chosen.at[me], layout=plgpu.Layout.WGMMA.reduce(0))
    return jax.lax.broadcast_in_dim(named, (ROWS, KEYS), [1]) < none
