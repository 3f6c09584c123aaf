"""The gradient of a bias on Hopper: a block owns a tile of the bias, and adds up what shares it.

    producer         | q, dout, k, v of step i+stages ... as slots become free
    two consumers    | q k.T, dout v.T | weights from lse | sums += dlogits      64 queries each

A bias of queries by keys is shared by the rows of the batch and the heads along which it is not
full: a block has 128 queries by 64 keys of it, and goes through those. A bias of keys alone is
shared by the queries too: a block has 64 keys of a row and a head, goes through the queries, and
leaves a sum for each consumer. The sums are registers, added up in one order. Nothing of the size
[batch, num_q_heads, q_len, kv_len] is made, unless the bias has it.

A kernel of its own, so that a bias whose gradient nobody asks for costs nothing: XLA drops it.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gpu_chip
from pallas_kernels.dense.mosaic_gpu_dkv import seeing_tiles
from pallas_kernels.dense.mosaic_gpu_dq import drain
from pallas_kernels.dense.mosaic_gpu_geometry import Static, row_of
from pallas_kernels.dense.mosaic_gpu_tiles import BackwardTiles
from pallas_kernels.dense.mosaic_gpu_weights import (
    BLOCK,
    LAYOUTS,
    TILE,
    WGMMA,
    Arrays,
    Place,
    logit_gradients,
    swizzled,
    weights,
)
from pallas_kernels.gpu_addresses import tied_to

CONSUMERS = BLOCK // TILE
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 40


class Shared(NamedTuple):
    """Shared memory of a block; `full`: a slot has arrived, `empty`: it was read."""

    q: Any  # [stages, CONSUMERS, TILE, head_dim]
    dout: Any
    k: Any  # [stages, TILE, head_dim]
    v: Any
    lse: Any  # float32 [stages, CONSUMERS, TILE]
    delta: Any
    sums: Any  # [CONSUMERS, TILE, TILE] in the result's dtype; or float32 [CONSUMERS, TILE]
    full: Any
    empty: Any
    added: Any  # a consumer's sums of keys alone are there


def bias_gradient(static: Static, x: Arrays, dtype: Any, tiles: BackwardTiles) -> jax.Array:
    """The gradient of a bias whose last dimension is full.

    Args:
        static: the call.
        x: its arrays, the bias queries first.
        dtype: of the result, where the bias has queries.
        tiles: sizes of the pipeline.

    Returns:
        [1 or batch, 1 or num_q_heads, at least q_len, at least kv_len] for a bias with queries;
        else parts, to be summed, float32 [batch, num_q_heads, 2, at least kv_len].
    """
    by_query, stages = static.bias[2], tiles.bias_stages
    given = Arrays(*(field is not None for field in x))
    owned, sharers = shares(static)
    key_blocks, query_blocks = pl.cdiv(static.kv_len, TILE), pl.cdiv(static.q_len, BLOCK)
    rows = query_blocks * BLOCK if by_query else CONSUMERS
    dtype = dtype if by_query else jnp.float32
    sums = swizzled(CONSUMERS, TILE, TILE, dtype=dtype) if by_query else _numbers()

    def body(sharers: Any, *refs: Any) -> None:
        refs = list(refs)
        arrays = Arrays(*(refs.pop(0) if there else None for there in given))
        result, *scratch = refs
        block(static, arrays, result, Shared(*scratch), sharers)

    tile = functools.partial(swizzled, dtype=x.q.dtype)
    return gpu_chip.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((*owned, rows, key_blocks * TILE), dtype),
        scratch_types=[
            tile(stages, CONSUMERS, TILE, static.head_dim),
            tile(stages, CONSUMERS, TILE, static.head_dim_v),
            tile(stages, TILE, static.head_dim),
            tile(stages, TILE, static.head_dim_v),
            _numbers(stages),
            _numbers(stages),
            sums,
            plgpu.Barrier(num_barriers=stages, num_arrivals=4 * CONSUMERS + 2),
            plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS),
            plgpu.Barrier(num_barriers=CONSUMERS),
        ],
        grid=(*owned, query_blocks if by_query else 1, key_blocks),
        grid_names=("batch", "head", "query", "key"),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="attnsel_dense_dbias",
    )(sharers, *(field for field in x if field is not None))


def shares(static: Static) -> tuple[list[int], jax.Array]:
    """Rows of the batch and heads that have blocks of their own; what `steps_of` takes."""
    sizes = (static.batch, static.num_q_heads)
    full = static.bias[:2] if static.bias[2] else (True, True)
    owned = [size if own else 1 for size, own in zip(sizes, full, strict=True)]
    # In memory, not in the program: a short loop would be unrolled, and spill.
    return owned, jnp.full((1,), math.prod(sizes) // math.prod(owned), jnp.int32)


def _numbers(*stages: int) -> Any:
    return plgpu.SMEM((*stages, CONSUMERS, TILE), jnp.float32)


class Steps(NamedTuple):
    """What a block goes through: rows of the batch, heads, and blocks of queries."""

    b: jax.Array  # the first of each
    head: jax.Array
    block: jax.Array
    heads: int  # of each row
    blocks: jax.Array
    count: jax.Array
    queries: int = BLOCK  # of a block

    def where(self, n: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(row of the batch, head, first query) of step n."""
        blocks = jnp.maximum(self.blocks, 1)
        i, block = lax.div(n, blocks), self.block + lax.rem(n, blocks)
        heads = jnp.int32(self.heads)
        return self.b + lax.div(i, heads), self.head + lax.rem(i, heads), block * self.queries


def steps_of(
    static: Static, x: Arrays, sharers: Any, key: jax.Array, queries: int = BLOCK
) -> Steps:
    """The steps of a block; none where it is known that no query of it sees a key.

    Args:
        static: the call.
        x: its arrays.
        sharers: int32 [1], how many rows times heads share a block's bias.
        key: the first of the block's 64 keys.
        queries: of a block.
    """
    b, head, index = (lax.axis_index(name) for name in ("batch", "head", "query"))
    by_query = static.bias[2]
    heads = 1 if static.bias[1] or not by_query else static.num_q_heads
    first, stop = jnp.int32(0), jnp.int32(pl.cdiv(static.q_len, queries))
    if x.rows is None or static.bias[0] or not by_query:
        at = Place(b, row_of(static, x.rows, b), jnp.int32(0), key)
        first, blocks = seeing_tiles(static, at, TILE, queries)
        stop = first + blocks
    if by_query:
        blocks = jnp.where((index >= first) & (index < stop), 1, 0)
        first = index
    else:
        blocks = stop - first
    return Steps(b, head, first, heads, blocks, blocks * sharers[0], queries)


def block(static: Static, x: Arrays, result: Any, shared: Shared, sharers: Any) -> None:
    """One block of the grid: a tile of the bias, and everything that shares it."""
    wg, key = lax.axis_index("wg"), lax.axis_index("key") * TILE
    steps = steps_of(static, x, sharers, key)

    @pl.when(wg < CONSUMERS)
    def _():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        _consume(static, x, result, shared, steps, key, wg)

    @pl.when(wg == CONSUMERS)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        _produce(static, x, shared, steps, key)


def _produce(static: Static, x: Arrays, shared: Shared, steps: Steps, key: jax.Array) -> None:
    """Brings what a step takes as slots become free."""
    stages = shared.k.shape[0]

    @pl.loop(0, steps.count)
    def _(n):
        slot = lax.rem(n, jnp.int32(stages))
        b, head, query = steps.where(n)
        pl.when(n >= stages)(functools.partial(plgpu.barrier_wait, shared.empty.at[slot]))
        full = shared.full.at[slot]
        for i in range(CONSUMERS):
            rows = pl.ds(query + i * TILE, TILE)
            for tile, tiles in ((x.q, shared.q), (x.dout, shared.dout)):
                plgpu.copy_gmem_to_smem(tile.at[b, rows, head], tiles.at[slot, i], full)
            for numbers, ring in ((x.lse, shared.lse), (x.delta, shared.delta)):
                plgpu.copy_gmem_to_smem(numbers.at[b, head, rows], ring.at[slot, i], full)
        kv_head = lax.div(head, jnp.int32(static.group))
        for tile, tiles in ((x.k, shared.k), (x.v, shared.v)):
            plgpu.copy_gmem_to_smem(tile.at[b, pl.ds(key, TILE), kv_head], tiles.at[slot], full)

    drain(shared.empty, stages, steps.count)


def _consume(static: Static, x: Arrays, result, shared: Shared, steps: Steps, key, wg) -> None:
    """The dlogits of one warpgroup's 64 queries, summed over the steps."""

    def step(n, sums):
        slot = tied_to(n, lax.rem(n, jnp.int32(shared.k.shape[0])))
        b, head, query = steps.where(n)
        mine = tied_to(n, query + wg * TILE)  # else what it gives is kept between turns
        at = Place(b, row_of(static, x.rows, b), mine, key, head)

        def dlogits(logits_acc, dp_acc):
            plgpu.barrier_wait(shared.full.at[slot])
            plgpu.wgmma(logits_acc, shared.q.at[slot, wg], shared.k.at[slot].transpose((1, 0)))
            plgpu.wgmma(dp_acc, shared.dout.at[slot, wg], shared.v.at[slot].transpose((1, 0)))
            lse, delta = (
                plgpu.load(ring.at[slot, wg], layout=LAYOUTS[0], optimized=False)
                for ring in (shared.lse, shared.delta)
            )
            logits = plgpu.wgmma_accumulator_load(logits_acc, wait_n=1)
            w = weights(static, x, at, logits, lse, queries=0)
            dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
            plgpu.commit_smem()  # lse and delta were read otherwise than they will be written
            plgpu.barrier_arrive(shared.empty.at[slot])
            return logit_gradients(w._replace(slope=None), dp, delta, queries=0)

        acc = plgpu.ACC((TILE, TILE), jnp.float32)
        return sums + pl.run_scoped(dlogits, acc, acc)

    nothing = plgpu.layout_cast(jnp.zeros((TILE, TILE), jnp.float32), WGMMA)
    sums = lax.fori_loop(0, steps.count, step, nothing)
    b, head, index = (lax.axis_index(name) for name in ("batch", "head", "query"))
    staging, keys = shared.sums.at[wg], pl.ds(key, TILE)
    if static.bias[2]:
        staging[...] = sums.astype(shared.sums.dtype)
        mine = result.at[b, head, pl.ds(index * BLOCK + wg * TILE, TILE), keys]
    else:
        for i in range(CONSUMERS):
            pl.when(wg == i)(functools.partial(_add_up, sums, staging, shared.added, i))
        mine = result.at[b, head, wg, keys]
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, mine)
    plgpu.wait_smem_to_gmem(0)


def _add_up(sums: jax.Array, staging: Any, added: Any, i: int) -> None:
    """Sums over queries, one warpgroup after another.

    Its four warps add through memory that Mosaic keeps for all warpgroups together; two at once
    gave each other's sums on an H100.
    """
    if i > 0:
        plgpu.barrier_wait(added.at[i - 1])
    staging[...] = sums.sum(axis=0)
    plgpu.barrier_arrive(added.at[i])
