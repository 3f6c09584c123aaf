"""The indexer's scores on Hopper: 64 index heads are the rows of a product, 64 keys its columns.

The contract is in `pallas_kernels/sparse_mla/__init__.py`. A block of the grid is one token and a
share of its sequence's keys, which come page by page, two blocks of 64 ahead. One warpgroup
multiplies, and adds rows up weighted; its warps' scheduler has the copies' latency to itself, so
several blocks share a core. Keys that the token does not see cost a write of -inf and no read.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import empty_calls, gpu_chip
from pallas_kernels.contract_checks import check_indexer
from pallas_kernels.jax_settings import under_own_settings
from pallas_kernels.mla.mosaic_gpu_arguments import DTYPES, PAGE_SIZES, check_chip
from pallas_kernels.mla.mosaic_gpu_batch import Batch, find_tile
from pallas_kernels.mla.mosaic_gpu_slots import tiled
from pallas_kernels.shape_checks import check_same_dtype

HEADS = 64  # wgmma's M; fewer are padded with weight 0
KEYS = 64
STAGES = 4
SHARE = 16  # blocks of keys of a block of the grid


class _Refs(NamedTuple):
    """What the kernel reads, writes and keeps."""

    q: Any  # [num_tokens * heads, dim]
    weights: Any  # float32 [num_tokens * heads]
    pages: Any
    page_table: Any
    kv_lens: Any
    cu_q_lens: Any
    num_seqs: Any
    scores: Any  # float32 [num_tokens, padded positions]
    q_smem: Any
    weights_smem: Any
    keys: Any  # [STAGES, KEYS, dim]
    row: Any  # float32 [2, KEYS]
    q_full: Any
    full: Any


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

    Numerics: products of 16-bit numbers with float32 sums; weights and sums are float32.

    Raises:
        ValueError: a shape or dtype is not the contract's, or not this lowering's: float32, keys of
            another dtype than the queries, an index_head_dim that is no multiple of 64 up to 256, a
            page size other than 16 to 256 by powers of two, more than 64 index heads; or the chip
            is no Hopper.
    """
    dims = check_indexer(locals(), dtypes=DTYPES, key_dtypes=DTYPES)
    check_same_dtype(q_index=q_index, index_pages=index_pages)
    check_chip("XLA_MLA_SPARSE")
    _check_sizes(dims)
    if empty_calls.is_empty(dims):
        return empty_calls.scores(dims)
    num_tokens, num_heads = weights.shape
    extra = (0, HEADS - num_heads)
    q = jnp.pad(q_index, ((0, 0), extra, (0, 0))).reshape(num_tokens * HEADS, -1)
    weights = jnp.pad(weights, ((0, 0), extra)).reshape(-1)
    most_keys = dims["pages_per_seq"] * dims["page_size"]
    shares = -(-most_keys // (SHARE * KEYS))
    page_size, dim, dtype = dims["page_size"], dims["index_head_dim"], q_index.dtype
    scores = gpu_chip.kernel(
        functools.partial(_kernel, num_tokens=num_tokens, most_keys=most_keys, page_size=page_size),
        out_type=jax.ShapeDtypeStruct((num_tokens, shares * SHARE * KEYS), jnp.float32),
        scratch_types=[
            plgpu.SMEM((HEADS, dim), dtype, transforms=tiled()),
            plgpu.SMEM((HEADS,), jnp.float32),
            plgpu.SMEM((STAGES, KEYS, dim), dtype, transforms=tiled()),
            plgpu.SMEM((2, KEYS), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_barriers=STAGES, num_arrivals=max(1, KEYS // page_size)),
        ],
        grid=(num_tokens, shares),
        grid_names=("token", "share"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="indexer_scores",
    )(q, weights, index_pages, page_table, kv_lens, cu_q_lens, num_seqs.reshape(1))
    return scores[:, :most_keys]


def _check_sizes(dims) -> None:
    """Refuses sizes that the kernel has no room for."""
    if dims["num_index_heads"] > HEADS:
        raise ValueError(
            f"num_index_heads is {dims['num_index_heads']}, must be at most {HEADS}: use the "
            f"indexer of XLA_MLA_SPARSE"
        )
    if dims["index_head_dim"] not in (64, 128, 192, 256):
        raise ValueError(
            f"index_head_dim is {dims['index_head_dim']}, must be one of 64, 128, 192, 256: use "
            f"the indexer of XLA_MLA_SPARSE"
        )
    if dims["page_size"] not in PAGE_SIZES:
        raise ValueError(
            f"page_size is {dims['page_size']}, must be one of {', '.join(map(str, PAGE_SIZES))}"
        )


def _kernel(*refs, num_tokens: int, most_keys: int, page_size: int):
    """One token and a share of the keys: those it sees, then -inf for the others."""
    refs = _Refs(*refs)
    token, share = jax.lax.axis_index("token"), jax.lax.axis_index("share")
    batch = Batch(refs.kv_lens, refs.cu_q_lens, refs.num_seqs, num_tokens, most_keys)
    tile = find_tile(token, batch, 1)
    first = share * (SHARE * KEYS)
    blocks = jnp.clip(pl.cdiv(tile.stop - first, KEYS), 0, SHARE)
    load = functools.partial(_load, refs, tile, first, page_size)

    @pl.when(blocks > 0)
    def _():
        rows = pl.ds(token * HEADS, HEADS)
        plgpu.copy_gmem_to_smem(refs.q.at[rows], refs.q_smem, refs.q_full)
        plgpu.copy_gmem_to_smem(refs.weights.at[rows], refs.weights_smem, refs.q_full)
        for block in range(STAGES - 1):
            pl.when(block < blocks)(functools.partial(load, block))
        plgpu.barrier_wait(refs.q_full)

    by_row = plgpu.Layout.WGMMA.reduce(1)

    def one_block(block, _):
        at = pl.ds(first + block * KEYS, KEYS)

        @pl.when(block < blocks)
        def _():
            sums = _weighted(refs, block, plgpu.load(refs.weights_smem, layout=by_row))
            place = plgpu.broadcasted_iota(
                jnp.int32, (HEADS, KEYS), 1, layout=plgpu.Layout.WGMMA
            ).max(axis=0)
            seen = jnp.where(place < tile.stop - first - block * KEYS, sums, -jnp.inf)
            _store(refs, token, at, block, seen)
            pl.when(block + STAGES - 1 < blocks)(lambda: load(block + STAGES - 1))

        @pl.when(block >= blocks)
        def _():
            nothing = jnp.full((KEYS,), -jnp.inf, jnp.float32)
            by_column = plgpu.Layout.WGMMA.reduce(0)
            _store(refs, token, at, block, plgpu.layout_cast(nothing, by_column))

        return _

    jax.lax.fori_loop(0, SHARE, one_block, None)
    plgpu.wait_smem_to_gmem(0)


def _load(refs: _Refs, tile, first, page_size: int, block) -> None:
    """Starts the copies of a block's keys; past the sequence's end its last page comes again."""
    stage, rows = jax.lax.rem(block, STAGES), min(page_size, KEYS)
    for piece in range(KEYS // rows):
        position = first + block * KEYS + piece * rows
        column = jax.lax.div(jnp.minimum(position, tile.kv_len - 1), page_size)
        page = refs.pages.at[refs.page_table[tile.seq, column]]
        plgpu.copy_gmem_to_smem(
            page.at[pl.ds(jax.lax.rem(position, page_size), rows)],
            refs.keys.at[stage, pl.ds(piece * rows, rows)],
            refs.full.at[stage],
        )


def _weighted(refs: _Refs, block, weights) -> jax.Array:
    """Sum over heads of weight * relu(dot), float32 [KEYS], one number for each column."""
    stage = jax.lax.rem(block, STAGES)
    plgpu.barrier_wait(refs.full.at[stage])

    def dots(acc):
        plgpu.wgmma(acc, refs.q_smem, refs.keys.at[stage].transpose((1, 0)))
        return acc[...]

    products = pl.run_scoped(dots, plgpu.ACC((HEADS, KEYS), jnp.float32))
    wide = jax.lax.broadcast_in_dim(weights, (HEADS, KEYS), [0])
    return (jnp.maximum(products, 0) * wide).sum(axis=0)


def _store(refs: _Refs, token, at, block, values) -> None:
    """A block's scores, by way of one of two rows of shared memory."""
    row = refs.row.at[jax.lax.rem(block, 2)]
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the copy before the last has read it
    row[...] = values
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(row, refs.scores.at[token, at])
