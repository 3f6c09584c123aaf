"""MLA on Hopper: this step's rows are scattered, then one kernel takes decodes and prefills alike.

The contract (maths, arguments, edge cases) is `pallas_kernels/mla/__init__.py`. The cache is plain
rows. A block of the grid is 64 rows of queries, tokens x heads, of one sequence, and a share of its
keys: `mosaic_gpu_batch` says whose, `mosaic_gpu_load` brings, `mosaic_gpu_attend` attends. Where a
batch has fewer tiles than the chip has cores, sequences are split over blocks, and the parts are
merged by lse.
"""

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
from pallas_kernels.mla.mosaic_gpu_batch import Batch, find_tile, num_tiles
from pallas_kernels.mla.mosaic_gpu_load import (
    copies_of_a_block,
    load_pages,
    load_queries,
    load_raw_pages,
)
from pallas_kernels.mla.mosaic_gpu_results import merged, shapes, write
from pallas_kernels.mla.mosaic_gpu_slots import (
    GROUP,
    LANE_ROW,
    ExpandedSlots,
    PlainSlots,
    allocated,
    load_and_expand,
    raw_pieces,
    scratch,
)
from pallas_kernels.mla.mosaic_gpu_tiles import TILES, splits
from pallas_kernels.mla.mosaic_gpu_writes import write_latents
from pallas_kernels.shape_checks import check_positive

# Registers of a thread, by what its warpgroup does: 504 together, in steps of 8.
REGISTERS = {"attends": 240, "loads": 24}
REGISTERS_EXPANDED = {"attends": 224, "loads": 56}


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

    Numerics: products of 16-bit numbers with float32 sums; logits, softmax and sums are float32;
    weights are rounded to the queries' dtype. An 8-bit cache is multiplied as float16, which has
    every value of it: bfloat16 queries are converted, and must not be beyond 65504.

    Raises:
        ValueError: a shape or dtype is not the contract's, or not this lowering's: float32, a page
            size other than 16 to 256 by powers of two, a kv_lora_rank other than 128, 256, 384 and
            512, a rope_dim other than 64, a 16-bit cache of another dtype than the queries,
            fp8_ds_mla; or the chip is no Hopper.
    """
    dims = check_latent(
        locals(),
        kv_cache_dtype,
    )
    check_positive("soft_cap", soft_cap)
    if empty_calls.is_empty(dims):
        return empty_calls.ragged(ql_nope, latent_pages)
    latent_pages = write_latents(latent_pages, kv_c, k_pe, slot_mapping, kv_scale)
    num_heads = ql_nope.shape[1]
    most_keys = page_table.shape[1] * latent_pages.shape[1]
    max_num_seqs = kv_lens.shape[0]
    sizes = _sizes(ql_nope, q_pe, latent_pages, max_num_seqs, most_keys, float(scale), soft_cap)
    extra = ((0, 0), (0, sizes.num_heads - num_heads), (0, 0))
    batch = Batch(kv_lens, cu_q_lens, num_seqs.reshape(1), ql_nope.shape[0], most_keys)
    queries = [jnp.pad(x, extra) for x in (ql_nope, q_pe)]
    if latent_pages.dtype.itemsize == 1:
        queries = [x.astype(jnp.float16) for x in queries]
    kv_scale = jnp.ones((1,), jnp.float32) if kv_scale is None else kv_scale.reshape(1)
    out, lse = _call(
        *queries, latent_pages, page_table, batch, kv_scale, sizes, dtype=ql_nope.dtype
    )
    return out[:, :num_heads], lse[:, :num_heads], latent_pages


def _sizes(ql_nope, q_pe, pages, max_num_seqs: int, most_keys: int, scale, soft_cap) -> Sizes:
    """Static facts of a call: heads are padded to 8, or to whole tiles; the split count."""
    num_tokens, num_heads, rank = ql_nope.shape
    padded = num_heads + (-num_heads % (ROWS if num_heads > ROWS else 8))
    block_q = max(1, ROWS // padded)
    chip = gpu_chip.current()
    parts = splits(
        TILES[chip.name, 8 * pages.dtype.itemsize, "decode"],
        cores=chip.num_cores,
        blocks=num_tiles(num_tokens, max_num_seqs, block_q) * -(-padded // ROWS),
        most_keys=most_keys,
    )
    return Sizes(
        block_q=block_q, num_heads=padded, rank=rank, rope_dim=q_pe.shape[2],
        page_size=pages.shape[1], scale=scale, soft_cap=soft_cap, splits=parts,
    )  # fmt: skip


class _Arrays(NamedTuple):
    """What the kernel reads and writes in GMEM."""

    ql_nope: Any  # [num_tokens * num_heads, rank]
    q_pe: Any
    pages: Any
    page_table: Any
    kv_lens: Any
    cu_q_lens: Any
    num_seqs: Any
    kv_scale: Any
    out: Any  # see `mosaic_gpu_results`
    lse: Any


def _call(ql_nope, q_pe, pages, page_table, batch: Batch, kv_scale, sizes: Sizes, *, dtype):
    """The kernel, and what puts its parts together: out and lse of padded heads."""
    num_tokens, num_heads, rank = ql_nope.shape
    max_num_seqs = batch.kv_lens.shape[0]
    row_blocks = -(-num_heads // ROWS)
    tiles = num_tiles(num_tokens, max_num_seqs, sizes.block_q) * row_blocks
    is_raw = pages.dtype.itemsize == 1
    if is_raw:
        pages = pages.reshape(*pages.shape[:2], -1, LANE_ROW)
    facts = {
        "num_tokens": num_tokens, "most_keys": batch.most_keys, "row_blocks": row_blocks,
        "converts": ql_nope.dtype != dtype,
    }  # fmt: skip
    called = gpu_chip.kernel(
        functools.partial(_kernel, sizes=sizes, **facts),
        out_type=shapes(sizes, num_tokens, tiles, dtype),
        scratch_types=scratch(
            sizes, _slots(sizes, ql_nope.dtype, pages.dtype), ql_nope.dtype, dtype
        ),
        grid=(sizes.splits, tiles),
        grid_names=("split", "tile"),
        num_threads=ATTENDING + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="mla_attention",
    )
    out, lse = called(
        ql_nope.reshape(-1, rank), q_pe.reshape(num_tokens * num_heads, -1), pages, page_table,
        *batch[:3], kv_scale,
    )  # fmt: skip
    return merged(out, lse, batch, sizes, dtype)


def _slots(sizes: Sizes, q_dtype, cache_dtype) -> Any:
    """The slots of keys, to allocate."""
    if cache_dtype == q_dtype:
        return PlainSlots.scratch(sizes, q_dtype, copies_of_a_block(sizes.page_size))
    columns = sizes.rank + sizes.rope_dim
    groups = KEYS // GROUP
    raw = plgpu.SMEM((groups, 2 * GROUP, columns // LANE_ROW, LANE_ROW), cache_dtype)
    return ExpandedSlots.scratch((raw,), sizes, q_dtype, groups)


def _kernel(*refs, sizes: Sizes, num_tokens, most_keys, row_blocks, converts):
    """One block: finds its tile and its share of the keys; each warpgroup takes its part."""
    arrays = _Arrays(*refs[: len(_Arrays._fields)])
    shared = allocated(refs[len(_Arrays._fields) :], sizes, converts)
    split, number = jax.lax.axis_index("split"), jax.lax.axis_index("tile")
    batch = Batch(arrays.kv_lens, arrays.cu_q_lens, arrays.num_seqs, num_tokens, most_keys)
    tile = find_tile(jax.lax.div(number, row_blocks), batch, sizes.block_q)
    kv_scale = arrays.kv_scale[0]
    walk = _walk(tile, split, sizes, arrays.num_seqs[0], kv_scale)
    row = tile.token * sizes.num_heads + jax.lax.rem(number, row_blocks) * ROWS
    is_raw = isinstance(shared.slots, ExpandedSlots)
    registers = REGISTERS_EXPANDED if is_raw else REGISTERS
    warpgroup = jax.lax.axis_index("warpgroup")

    @pl.when(tile.count > 0)
    def _():
        for me in range(ATTENDING):

            @pl.when(warpgroup == me)
            def _(me=me):
                plgpu.set_max_registers(registers["attends"], action="increase")
                mine = walk._replace(seen=attending.seen_pairs(walk))
                running = attending.attend(me, sizes, shared, mine, attending.sees_causally)
                results = attending.finish(me, shared, running, kv_scale)
                write(me, sizes, shared, arrays, results, (split, number), row, tile.count)

        @pl.when(warpgroup == ATTENDING)
        def _():
            plgpu.set_max_registers(registers["loads"], action="decrease")
            load_queries(sizes, shared, arrays.ql_nope, arrays.q_pe, row)
            sources = arrays.pages, arrays.page_table, tile, walk
            if not is_raw:
                load_pages(sizes, shared.slots, *sources)
                return
            first = walk.first_pair * PAIR
            load_and_expand(
                shared.slots, walk.pairs,
                functools.partial(load_raw_pages, sizes, shared.slots, *sources),
                functools.partial(_converted, shared.q.dtype, walk.zero, shared.slots),
                lambda i, slot: walk.kv_len - first - i * PAIR - slot * KEYS,
            )  # fmt: skip


def _walk(tile, split, sizes: Sizes, num_seqs, kv_scale) -> attending.Walk:
    """A split's share of the keys of a tile."""
    pairs = pl.cdiv(tile.stop, PAIR)
    share = pl.cdiv(pairs, sizes.splits)
    to_tanh = LOG2_E if sizes.soft_cap is None else 2 * LOG2_E / sizes.soft_cap
    return attending.Walk(
        pairs=jnp.clip(pairs - split * share, 0, share),
        seen=None,
        first_pair=split * share,
        q_pos=tile.q_pos,
        kv_len=tile.kv_len,
        zero=jnp.minimum(num_seqs, 0),
        factor=kv_scale * (sizes.scale * to_tanh),
    )


def _converted(dtype, zero, slots: ExpandedSlots, slot, group) -> list[jax.Array]:
    """The columns of a group of 8-bit rows, as `load_and_expand` wants them."""
    (raw,) = slots.raw[slot]
    return [piece.astype(dtype) for piece in raw_pieces(raw.at[group, pl.ds(0, GROUP)], zero)]
