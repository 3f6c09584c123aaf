"""dq of dense attention on Hopper: two warpgroups of 64 queries, and a producer of keys.

    producer    | k, v of tile i+stages ... as slots become free
    a consumer  | q k.T, dout v.T | weights from lse | dlogits | dq += dlogits k

The consumers are not in step: one's products run while the other is at its exponentials.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dense.mosaic_gpu_geometry import Static, row_of, seen_interval
from pallas_kernels.dense.mosaic_gpu_tiles import BackwardTiles
from pallas_kernels.dense.mosaic_gpu_weights import (
    BLOCK,
    LAYOUTS,
    TILE,
    Arrays,
    Place,
    logit_gradients,
    swizzled,
    weights,
)
from pallas_kernels.gpu_addresses import tied_to

CONSUMERS = BLOCK // TILE
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24


class Shared(NamedTuple):
    """Shared memory of a block; `*_full`: a slot has arrived, `*_empty`: it was read."""

    q: Any  # [CONSUMERS, TILE, head_dim]; at the end dq
    dout: Any
    k: Any  # [k_stages, TILE, head_dim]
    v: Any
    q_full: Any
    k_full: Any
    v_full: Any
    k_empty: Any
    v_empty: Any


def query_gradients(static: Static, x: Arrays, tiles: BackwardTiles) -> jax.Array:
    """dq, like q.

    Args:
        static: the call.
        x: its arrays.
        tiles: sizes of the pipeline; its block_kv divides 128.
    """
    block_kv, k_stages, v_stages = tiles.block_kv, tiles.k_stages, tiles.v_stages
    given = Arrays(*(field is not None for field in x))

    def body(*refs: Any) -> None:
        refs = list(refs)
        arrays = Arrays(*(refs.pop(0) if there else None for there in given))
        dq, *scratch = refs
        block(static, arrays, dq, Shared(*scratch), tied=tiles.tied)

    dtype = x.q.dtype
    ring = functools.partial(plgpu.Barrier, num_arrivals=1)
    read = functools.partial(plgpu.Barrier, num_arrivals=CONSUMERS)
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(x.q.shape, dtype),
        scratch_types=[
            swizzled(CONSUMERS, TILE, static.head_dim, dtype=dtype),
            swizzled(CONSUMERS, TILE, static.head_dim_v, dtype=dtype),
            swizzled(k_stages, block_kv, static.head_dim, dtype=dtype),
            swizzled(v_stages, block_kv, static.head_dim_v, dtype=dtype),
            plgpu.Barrier(num_barriers=CONSUMERS, num_arrivals=2),
            ring(num_barriers=k_stages),
            ring(num_barriers=v_stages),
            read(num_barriers=k_stages),
            read(num_barriers=v_stages),
        ],
        grid=(static.batch, pl.cdiv(static.q_len, BLOCK), static.num_q_heads),
        grid_names=("batch", "block", "head"),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="attnsel_dense_dq",
    )(*(field for field in x if field is not None))


class KeyRange(NamedTuple):
    """Tiles of keys that a block of queries sees some of: [first, first + count)."""

    first: jax.Array
    count: jax.Array


def block(static: Static, x: Arrays, dq: Any, shared: Shared, *, tied: bool) -> None:
    """One block of the grid: BLOCK queries of a head, and the keys that they see."""
    b, head = lax.axis_index("batch"), lax.axis_index("head")
    index, wg = lax.axis_index("block"), lax.axis_index("wg")
    if static.causal:  # the longest first
        index = pl.cdiv(static.q_len, BLOCK) - 1 - index
    at = Place(b, row_of(static, x.rows, b), index * BLOCK, jnp.int32(0))
    keys = seen_tiles(static, at, BLOCK, shared.k.shape[1])

    @pl.when(wg < CONSUMERS)
    def _():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        mine = at._replace(query=at.query + wg * TILE)
        pl.run_scoped(
            functools.partial(_consume, static, x, dq, shared, mine, keys, head, wg, tied),
            plgpu.ACC((TILE, static.head_dim), jnp.float32),
        )

    @pl.when(wg == CONSUMERS)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        _produce(static, x, shared, at, keys, head)


def seen_tiles(static: Static, at: Place, queries: int, block_kv: int) -> KeyRange:
    """Tiles of block_kv keys that some of so many queries from at.query on see."""
    last = jnp.minimum(at.query + queries, at.row.q_len) - 1
    low = jnp.maximum(seen_interval(static, at.row, at.query)[0], 0)
    high = jnp.where(last < at.query, 0, seen_interval(static, at.row, last)[1])
    first, size = lax.div(low, jnp.int32(block_kv)), jnp.int32(block_kv)
    return KeyRange(first, jnp.maximum(lax.div(high + size - 1, size) - first, 0))


def _produce(static: Static, x: Arrays, shared: Shared, at: Place, keys: KeyRange, head) -> None:
    """Brings the queries, then tiles of keys and values as slots become free."""
    kv_head = lax.div(head, jnp.int32(static.group))
    for i in range(CONSUMERS):
        rows = (at.b, pl.ds(at.query + i * TILE, TILE), head)
        plgpu.copy_gmem_to_smem(x.q.at[rows], shared.q.at[i], shared.q_full.at[i])
        plgpu.copy_gmem_to_smem(x.dout.at[rows], shared.dout.at[i], shared.q_full.at[i])
    rings = (
        (x.k, shared.k, shared.k_full, shared.k_empty),
        (x.v, shared.v, shared.v_full, shared.v_empty),
    )

    block_kv = shared.k.shape[1]

    @pl.loop(0, keys.count)
    def _(n):
        rows = (at.b, pl.ds((keys.first + n) * block_kv, block_kv), kv_head)
        for array, tiles, full, empty in rings:
            slot = lax.rem(n, jnp.int32(tiles.shape[0]))
            pl.when(n >= tiles.shape[0])(functools.partial(plgpu.barrier_wait, empty.at[slot]))
            plgpu.copy_gmem_to_smem(array.at[rows], tiles.at[slot], full.at[slot])

    for _, tiles, _, empty in rings:
        drain(empty, tiles.shape[0], keys.count)


def drain(empty: Any, stages: int, count: Any) -> None:
    """Waits until everything that was brought has been read."""

    @pl.loop(jnp.maximum(count - stages, 0), count)
    def _(n):
        plgpu.barrier_wait(empty.at[lax.rem(n, jnp.int32(stages))])


def _consume(
    static, x: Arrays, dq, shared: Shared, at: Place, keys: KeyRange, head, wg, tied, dq_acc
):
    """One warpgroup's 64 queries against every key tile of the block."""
    numbers = (at.b, head, pl.ds(at.query, TILE))
    lse, delta = (
        plgpu.load(rows.at[numbers], layout=LAYOUTS[0], optimized=False)
        for rows in (x.lse, x.delta)
    )
    plgpu.barrier_wait(shared.q_full.at[wg])

    @pl.loop(0, keys.count)
    def _(n):
        k_slot, v_slot = (lax.rem(n, jnp.int32(t.shape[0])) for t in (shared.k, shared.v))
        k, v = shared.k.at[k_slot], shared.v.at[v_slot]
        q, dout = (tile.at[tied_to(n, wg, tied=tied)] for tile in (shared.q, shared.dout))

        def dlogits(logits_acc, dp_acc):
            plgpu.barrier_wait(shared.k_full.at[k_slot])
            plgpu.wgmma(logits_acc, q, k.transpose((1, 0)))
            plgpu.barrier_wait(shared.v_full.at[v_slot])
            plgpu.wgmma(dp_acc, dout, v.transpose((1, 0)))
            logits = plgpu.wgmma_accumulator_load(logits_acc, wait_n=1)
            here = at._replace(key=(keys.first + n) * k.shape[0])
            w = weights(static, x, here, logits, lse, queries=0, sloped=True)
            dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
            plgpu.barrier_arrive(shared.v_empty.at[v_slot])
            return logit_gradients(w, dp, delta, queries=0).astype(x.q.dtype)

        acc = plgpu.ACC((TILE, k.shape[0]), jnp.float32)
        ds = pl.run_scoped(dlogits, acc, acc)
        plgpu.wgmma(dq_acc, ds, k)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(shared.k_empty.at[k_slot])

    staging = shared.q.at[wg]
    staging[...] = (dq_acc[...] * static.scale).astype(x.q.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, dq.at[at.b, pl.ds(at.query, TILE), head])
    plgpu.wait_smem_to_gmem(0)
