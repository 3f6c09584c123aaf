"""dq of dense attention on Hopper: two warpgroups of 64 queries, and a producer of keys.

    producer    | k, v of tile i+stages ... as slots become free
    a consumer  | q k.T, dout v.T | weights from lse | dlogits | dq += dlogits k
                                                                   and sums over keys

The consumers are not in step: one's products run while the other is at its exponentials. Before
its keys a consumer computes delta of its queries, for which dout is there anyway, and leaves it for
who comes after.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gpu_chip
from pallas_kernels.dense.mosaic_gpu_geometry import (
    Static,
    head_of_grid,
    heads_together,
    row_of,
    seen_interval,
)
from pallas_kernels.dense.mosaic_gpu_tiles import BackwardTiles
from pallas_kernels.dense.mosaic_gpu_weights import (
    BLOCK,
    LAYOUTS,
    TILE,
    WGMMA,
    Arrays,
    Place,
    distances,
    logit_gradients,
    swizzled,
    weights,
)
from pallas_kernels.gpu_addresses import tied_to
from pallas_kernels.gpu_zeros import zeros

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


class QueryGradients(NamedTuple):
    """dq, like q; delta, for the other gradients; and what slopes' are made of, None = no slopes.

    delta: float32 [batch, num_q_heads, whole blocks].
    by_distance: float32 [batch, num_q_heads, whole blocks], sums over keys of dlogits * distance:
        each query's part of minus the slopes' gradient.
    """

    q: jax.Array
    delta: jax.Array
    by_distance: jax.Array | None


def sums_over_keys(static: Static, at: Place, ds: jax.Array) -> list[jax.Array]:
    """What a tile adds to `QueryGradients.by_distance`: of dlogits without the cap's slope."""
    return [(ds * distances(at, ds.shape, 0)).sum(axis=1)] if static.alibi else []


def query_gradients(static: Static, x: Arrays, tiles: BackwardTiles) -> QueryGradients:
    """dq, and sums that come of the same dlogits.

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
        results = [refs.pop(0) for _ in out_type]
        block(static, arrays, results, Shared(*refs), tiles)

    dtype = x.q.dtype
    of_a_head = static.kv_len * (static.head_dim + static.head_dim_v) * dtype.itemsize
    together = heads_together(static.num_q_heads, of_a_head // static.group)
    out_type = [
        jax.ShapeDtypeStruct(x.q.shape, dtype),
        *[jax.ShapeDtypeStruct(x.lse.shape, jnp.float32)] * (1 + static.alibi),
    ]
    ring = functools.partial(plgpu.Barrier, num_arrivals=1)
    read = functools.partial(plgpu.Barrier, num_arrivals=CONSUMERS)
    dq, delta, *sums = gpu_chip.kernel(
        body,
        out_type=out_type,
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
        grid=(
            static.batch,
            static.num_q_heads // together,
            pl.cdiv(static.q_len, BLOCK),
            together,
        ),
        grid_names=("batch", "heads", "block", "head"),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="attnsel_dense_dq",
    )(*(field for field in x if field is not None))
    return QueryGradients(dq, delta, sums[0] if static.alibi else None)


class KeyRange(NamedTuple):
    """Tiles of keys that a block of queries sees some of: [first, first + count)."""

    first: jax.Array
    count: jax.Array


def block(static: Static, x: Arrays, results: Any, shared: Shared, tiles: BackwardTiles) -> None:
    """One block of the grid: BLOCK queries of a head, and the keys that they see."""
    b, head = lax.axis_index("batch"), head_of_grid()
    index, wg = lax.axis_index("block"), lax.axis_index("wg")
    if static.causal:  # the longest first
        index = pl.cdiv(static.q_len, BLOCK) - 1 - index
    at = Place(b, row_of(static, x.rows, b), index * BLOCK, jnp.int32(0), head)
    keys = seen_tiles(static, at, BLOCK, shared.k.shape[1])

    @pl.when(wg < CONSUMERS)
    def _():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        mine = at._replace(query=at.query + wg * TILE)
        pl.run_scoped(
            functools.partial(_consume, static, x, results, shared, mine, keys, wg, tiles),
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


def owned(tiles: BackwardTiles, tile: Any, wg: Any) -> Callable[[Any], Any]:
    """What a warpgroup owns of a tile, for a step.

    In shared memory: ptxas takes registers that a product reads in every turn of a loop for others
    within it (13.0, wrong at head size 64 on an H100).
    """
    return lambda n: tile.at[tied_to(n, wg, tied=tiles.tied)]


def _consume(
    static, x: Arrays, results, shared: Shared, at: Place, keys: KeyRange, wg, tiles, dq_acc
):
    """One warpgroup's 64 queries against every key tile of the block."""
    staging, (dq, deltas, *wholes) = shared.q.at[wg], results
    rows, numbers = (at.b, pl.ds(at.query, TILE), at.head), (at.b, at.head, pl.ds(at.query, TILE))
    lse, delta = (
        plgpu.load(of_rows.at[numbers], layout=LAYOUTS[0], optimized=False)
        for of_rows in (x.lse, x.delta)
    )
    adds = x.out is not None
    out = plgpu.load(x.out.at[rows], layout=WGMMA, optimized=False) if adds else None
    plgpu.barrier_wait(shared.q_full.at[wg])
    none = zeros(TILE, shared.k.shape[1])
    q_of, dout_of = (owned(tiles, tile, wg) for tile in (shared.q, shared.dout))
    if adds:
        delta = delta + _sums_of_rows(out, plgpu.load(shared.dout.at[wg], layout=WGMMA))
    deltas[numbers] = delta

    def step(n, sums):
        k_slot, v_slot = (
            tied_to(n, lax.rem(n, jnp.int32(tile.shape[0])), tied=tiles.tied)
            for tile in (shared.k, shared.v)
        )
        k, v = shared.k.at[k_slot], shared.v.at[v_slot]
        q, dout = q_of(n), dout_of(n)

        def dlogits(logits_acc, dp_acc):
            logits_acc[...] = dp_acc[...] = none
            plgpu.wgmma(logits_acc, q, k.transpose((1, 0)))
            plgpu.wgmma(dp_acc, dout, v.transpose((1, 0)))
            logits = plgpu.wgmma_accumulator_load(logits_acc, wait_n=1)
            here = at._replace(key=(keys.first + n) * k.shape[0])
            w = weights(static, x, here, logits, lse, queries=0, sloped=not sums)
            dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
            plgpu.barrier_arrive(shared.v_empty.at[v_slot])
            ds = logit_gradients(w._replace(slope=None), dp, delta, queries=0)
            # Distances are computed again: kept since the weights they would be 32 registers.
            more = sums_over_keys(static, here._replace(query=tied_to(n, here.query)), ds)
            ds = ds if w.slope is None else ds * w.slope
            return ds.astype(x.q.dtype), [a + b for a, b in zip(sums, more, strict=True)]

        plgpu.barrier_wait(shared.k_full.at[k_slot])
        plgpu.barrier_wait(shared.v_full.at[v_slot])
        acc = plgpu.ACC((TILE, k.shape[0]), jnp.float32)
        ds, sums = pl.run_scoped(dlogits, acc, acc)
        plgpu.wgmma(dq_acc, ds, k)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(shared.k_empty.at[k_slot])
        return sums

    nothing = plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), LAYOUTS[0])
    sums = lax.fori_loop(0, keys.count, step, [nothing] * static.alibi)
    staging[...] = (dq_acc[...] * static.scale).astype(x.q.dtype)
    for whole, part in zip(wholes, sums, strict=True):
        whole[numbers] = part
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, dq.at[rows])
    plgpu.wait_smem_to_gmem(0)


def _sums_of_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    """sum(a * b) of each row, float32."""
    return (a.astype(jnp.float32) * b.astype(jnp.float32)).sum(axis=1)
