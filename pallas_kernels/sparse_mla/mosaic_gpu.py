"""Sparse MLA on Hopper: each token's rows are brought one by one, then MLA's warpgroups attend.

The contract (maths, arguments, edge cases) is `pallas_kernels/sparse_mla/__init__.py`. A block of
the grid is one token: 64 rows of heads, and a share of the rows that the token names. Each row is a
copy of its own (TMA on Hopper gathers nothing, and Pallas reads no vector of addresses there), raw
into the slot's own memory; `mosaic_gpu_slots` says how they get from there to where wgmma reads
them, and `mosaic_gpu_raw` how the rows of each kind of cache come and are converted. A place in the
list that names nothing is a row past the cache's end, which TMA fills with zeros, and is masked.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import empty_calls, gpu_chip
from pallas_kernels.jax_settings import under_own_settings
from pallas_kernels.mla import mosaic_gpu_attend as attending
from pallas_kernels.mla.mosaic_gpu_arguments import check_latent
from pallas_kernels.mla.mosaic_gpu_attend import ATTENDING, KEYS, LOG2_E, PAIR, ROWS, Sizes
from pallas_kernels.mla.mosaic_gpu_batch import Batch
from pallas_kernels.mla.mosaic_gpu_load import load_queries
from pallas_kernels.mla.mosaic_gpu_results import merged, shapes, write
from pallas_kernels.mla.mosaic_gpu_slots import (
    GROUP,
    ExpandedSlots,
    allocated,
    load_and_expand,
    scratch,
)
from pallas_kernels.mla.mosaic_gpu_tiles import TILES, splits
from pallas_kernels.mla.mosaic_gpu_writes import write_latents
from pallas_kernels.shape_checks import INT32, check_positive
from pallas_kernels.sparse_mla.mosaic_gpu_raw import kind_of
from pallas_kernels.sparse_mla.mosaic_gpu_rows import Chosen, chosen_rows

REGISTERS = {"attends": 216, "loads": 72}  # of a thread; 504 together, in steps of 8


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
    out, lse = _call(queries, latent_pages, chosen, kv_scale, sizes)
    return out[:, :num_heads], lse[:, :num_heads], latent_pages


class _Arrays(NamedTuple):
    """What the kernel reads and writes in GMEM."""

    ql_nope: Any  # [num_tokens * num_heads, rank]
    q_pe: Any
    rows: Any  # of the cache, as `mosaic_gpu_raw` has them copied
    chosen: Any  # int32 [num_tokens, listed]
    used: Any  # int32 [num_tokens]
    kv_scale: Any  # float32 [1]
    out: Any  # see `mosaic_gpu_results`
    lse: Any


def _call(queries, latent_pages, chosen: Chosen, kv_scale, sizes: Sizes):
    """The kernel, and what puts its parts together: out and lse of padded heads."""
    ql_nope, q_pe = queries
    num_tokens, num_heads, rank = ql_nope.shape
    dtype, row_blocks = ql_nope.dtype, -(-num_heads // ROWS)
    tiles = num_tokens * row_blocks
    chip, listed = gpu_chip.current(), chosen.rows.shape[1]
    choice = TILES[chip.name, 16, "sparse"]
    parts = splits(choice, cores=chip.num_cores, blocks=tiles, most_keys=listed)
    sizes = dataclasses.replace(sizes, splits=parts)
    kind = kind_of(latent_pages)
    rows = kind.in_cache(latent_pages)
    slots = ExpandedSlots.scratch(kind.scratch(rows), sizes, dtype, KEYS * kind.copies() + 1)
    called = gpu_chip.kernel(
        functools.partial(_kernel, sizes=sizes, row_blocks=row_blocks, kind=kind),
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


def _kernel(*refs, sizes: Sizes, row_blocks: int, kind):
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
        raw = [kind(*views) for views in shared.slots.raw]
        listed = arrays.chosen.at[token]
        load = functools.partial(
            _load_rows, arrays.rows, listed, chosen, raw, shared.slots.arrived, walk
        )

        def pieces(slot, group):
            return raw[slot].pieces(group, walk.zero, shared.q.dtype)

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


def _load_rows(rows, listed, chosen, raw, arrived, walk, i, slot) -> None:
    """The rows of one block, each by copies of its own; every warp brings those of one group."""
    first = (walk.first_pair + i) * PAIR + slot * KEYS
    arrived = arrived.at[slot]
    plgpu.copy_gmem_to_smem(listed.at[pl.ds(first, KEYS)], chosen.at[slot], arrived)

    @plgpu.warp_map
    def _(warp):
        for place in range(GROUP):
            row = rows.at[pl.ds(listed[first + warp * GROUP + place], 1)]
            raw[slot].bring(row, warp, place, arrived)


def _is_row(chosen, none, me, sizes, shared, first_key, walk) -> jax.Array:
    """Whether each key of a block is a row of the cache: as `sees` of `attend`."""
    named = plgpu.load(chosen.at[me], layout=plgpu.Layout.WGMMA.reduce(0))
    return jax.lax.broadcast_in_dim(named, (ROWS, KEYS), [1]) < none
