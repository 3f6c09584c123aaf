"""The forward of dense attention on Hopper: one producer and two consumer warpgroups a block."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dense.mosaic_gpu_geometry import (
    CONSUMER_ROWS,
    KeyTiles,
    Row,
    Static,
    head_of_grid,
    heads_together,
    key_tiles,
    row_of,
)
from pallas_kernels.dense.mosaic_gpu_softmax import (
    along,
    empty,
    full,
    logits,
    normalised,
    softmax_step,
)
from pallas_kernels.gpu_addresses import tied_to
from pallas_kernels.gpu_zeros import zeros

# Consumers -> (registers a thread of theirs, of the producer's). A block is launched with 65536
# registers over its threads, rounded down to 8 each: more in sum than that would wait for ever.
REGISTERS = {2: (232, 40), 3: (160, 32)}


class Operands(NamedTuple):
    """Arrays of a call, in GMEM; None = not given.

    q, k, v as the contract has them, their lengths padded to a multiple of 8;
    rows int32 [batch, 3] as `Row`; segment ids int32, padded to whole tiles by what no query has;
    bias float32 or q's dtype, its full dimensions padded to whole tiles.
    """

    q: Any
    k: Any
    v: Any
    rows: Any = None
    q_segments: Any = None
    kv_segments: Any = None
    bias: Any = None
    slopes: Any = None
    sinks: Any = None


class Shared(NamedTuple):
    """What the warpgroups of a block share: rings of tiles, and barriers.

    `*_full`: the slot has arrived; `*_empty`: the consumers are done with it. `turn`: whose
    products are issued next, so that one warpgroup's softmax runs beside another's products.
    """

    q: Any
    k: Any
    v: Any
    lse: Any
    segments: Any
    q_full: Any
    k_full: Any
    v_full: Any
    v_raw: Any
    k_empty: Any
    v_empty: Any
    turn: Any


def forward(static: Static, x: Operands) -> tuple[jax.Array, jax.Array]:
    """The two results, out as the contract has it.

    Returns:
        out [batch, q_len as q has it, num_q_heads, head_dim_v]; lse float32 [batch, num_q_heads,
        q_len in whole blocks].
    """
    blocks = pl.cdiv(static.q_len, static.block_q)
    given = Operands(*(field is not None for field in x))
    of_a_head = static.kv_len * (static.head_dim + static.head_dim_v) * x.q.dtype.itemsize
    together = heads_together(static.num_q_heads, of_a_head // static.group)
    out_shape = (*x.q.shape[:3], static.head_dim_v)
    lse_shape = (static.batch, static.num_q_heads, blocks * static.block_q)

    def body(*refs):
        refs = list(refs)
        operands = Operands(*(refs.pop(0) if there else None for there in given))
        out, lse, *scratch = refs
        block(static, operands, out, lse, _shared(static, scratch))

    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(out_shape, x.q.dtype),
            jax.ShapeDtypeStruct(lse_shape, jnp.float32),
        ),
        scratch_types=_scratch(static, x.q.dtype),
        grid=(static.batch, static.num_q_heads // together, blocks, together),
        grid_names=("batch", "heads", "block", "head"),
        num_threads=static.tiles.consumers + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,  # rows are reduced within a warp
        ),
        kernel_name="attnsel_dense_forward",
    )(*(field for field in x if field is not None))


def slot_of(static: Static, n: jax.Array) -> jax.Array:
    """The slot of a block's n-th tile in a ring."""
    stages = static.tiles.stages
    if stages & (stages - 1):
        return lax.rem(n, jnp.int32(stages))
    return n & (stages - 1)


def slot_after(static: Static, slot: jax.Array) -> jax.Array:
    """The next slot of a ring: what a loop carries, for a remainder costs it registers."""
    stages = static.tiles.stages
    if stages & (stages - 1):
        return jnp.where(slot == stages - 1, 0, slot + 1)
    return (slot + 1) & (stages - 1)


def tile(*shape: int, dtype) -> Any:
    """A tile that TMA writes and wgmma reads: swizzled as far as its rows are long."""
    swizzle = plgpu.find_swizzle(shape[-1] * jnp.dtype(dtype).itemsize * 8)
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def _scratch(static: Static, dtype) -> list[Any]:
    tiles, stages = static.tiles, static.tiles.stages
    ring = functools.partial(plgpu.Barrier, num_barriers=stages)
    segments = plgpu.SMEM((stages, tiles.block_kv), jnp.int32)
    return [
        tile(tiles.consumers, CONSUMER_ROWS, static.head_dim, dtype=dtype),
        tile(stages, tiles.block_kv, static.head_dim, dtype=dtype),
        tile(stages, tiles.block_kv, static.head_dim_v, dtype=dtype),
        plgpu.SMEM((tiles.consumers, CONSUMER_ROWS), jnp.float32),
        *([segments] if static.segments else []),
        plgpu.Barrier(num_barriers=tiles.consumers),
        ring(num_arrivals=1 + static.segments),
        ring(),
        plgpu.Barrier(),
        ring(num_arrivals=tiles.consumers),
        ring(num_arrivals=tiles.consumers),
        plgpu.Barrier(num_barriers=tiles.consumers),
    ]


def _shared(static: Static, scratch: list[Any]) -> Shared:
    if not static.segments:
        scratch = [*scratch[:4], None, *scratch[4:]]
    return Shared(*scratch)


class Place(NamedTuple):
    """What a block of the grid computes: block_q queries of a head, and the keys that they see."""

    row: Row
    b: Any
    head: Any
    index: Any

    @classmethod
    def here(cls, static: Static, rows: Any, head: jax.Array) -> "Place":
        """Where this block is; each role asks for itself, for what both hold would be spilled."""
        b, index = lax.axis_index("batch"), lax.axis_index("block")
        if static.causal:  # the longest first
            index = pl.cdiv(static.q_len, static.block_q) - 1 - index
        return cls(row_of(static, rows, b), b, head, index)


def block(static: Static, x: Operands, out: Any, lse: Any, shared: Shared) -> None:
    """One block of the grid, by the roles of its warpgroups."""
    wg = lax.axis_index("wg")
    of_a_consumer, of_the_producer = REGISTERS[static.tiles.consumers]

    @pl.when(wg < static.tiles.consumers)
    def _():
        plgpu.set_max_registers(of_a_consumer, action="increase")
        consume(static, x, out, lse, shared, Place.here(static, x.rows, head_of_grid()), wg)

    @pl.when(wg == static.tiles.consumers)
    def _():
        plgpu.set_max_registers(of_the_producer, action="decrease")
        produce(static, x, shared, Place.here(static, x.rows, head_of_grid()))


# The producer.


def produce(static: Static, x: Operands, shared: Shared, place: Place) -> None:
    """Brings the queries, then key and value tiles, the last first, as slots become free."""
    row, b, head, index = place
    tiles = key_tiles(static, row, index, (index * static.block_q, static.block_q))
    stages, block_kv = static.tiles.stages, static.tiles.block_kv
    kv_head = lax.div(head, jnp.int32(static.group))
    for i in range(static.tiles.consumers):
        rows = pl.ds(index * static.block_q + i * static.tiles.rows, static.tiles.rows)
        plgpu.copy_gmem_to_smem(x.q.at[b, rows, head], shared.q.at[i], shared.q_full.at[i])

    @pl.loop(0, tiles.stop - tiles.first)
    def _(n):
        tile = tiles.stop - 1 - n
        slot = slot_of(static, n)
        keys = pl.ds(tile * block_kv, block_kv)

        @pl.when(n >= stages)
        def _():
            plgpu.barrier_wait(shared.k_empty.at[slot])

        plgpu.copy_gmem_to_smem(x.k.at[b, keys, kv_head], shared.k.at[slot], shared.k_full.at[slot])
        if static.segments:
            plgpu.copy_gmem_to_smem(
                x.kv_segments.at[b, keys], shared.segments.at[slot], shared.k_full.at[slot]
            )

        @pl.when(n >= stages)
        def _():
            plgpu.barrier_wait(shared.v_empty.at[slot])

        whole = (tile * block_kv >= tiles.low) & ((tile + 1) * block_kv <= tiles.high)

        @pl.when(whole)
        def _():
            plgpu.copy_gmem_to_smem(
                x.v.at[b, keys, kv_head], shared.v.at[slot], shared.v_full.at[slot]
            )

        @pl.when(jnp.logical_not(whole))
        def _():
            plgpu.copy_gmem_to_smem(x.v.at[b, keys, kv_head], shared.v.at[slot], shared.v_raw)
            plgpu.barrier_wait(shared.v_raw)
            clear_unseen(static, shared.v.at[slot], tile * block_kv, tiles)
            plgpu.commit_smem()
            plgpu.barrier_arrive(shared.v_full.at[slot])

    @pl.loop(jnp.maximum(tiles.stop - tiles.first - stages, 0), tiles.stop - tiles.first)
    def _(n):
        slot = slot_of(static, n)
        plgpu.barrier_wait(shared.k_empty.at[slot])
        plgpu.barrier_wait(shared.v_empty.at[slot])


def clear_unseen(static: Static, v: Any, first_key: Any, tiles: KeyTiles) -> None:
    """Values that the block does not see become 0: their weight is 0, and 0 * NaN is NaN."""
    width = plgpu.find_swizzle(static.head_dim_v * 16) // 2
    layout = plgpu.Layout.WGMMA
    height = static.tiles.block_kv
    for i in sorted({*range(0, height - CONSUMER_ROWS, CONSUMER_ROWS), height - CONSUMER_ROWS}):
        for j in range(0, static.head_dim_v, width):
            part = v.at[pl.ds(i, CONSUMER_ROWS), pl.ds(j, width)]
            shape = (CONSUMER_ROWS, width)
            keys = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout) + (first_key + i)
            value = plgpu.load(part, layout=layout)
            part[...] = jnp.where((keys >= tiles.low) & (keys < tiles.high), value, 0.0).astype(
                value.dtype
            )


# The consumers.


def consume(static: Static, x: Operands, out, lse, shared: Shared, place: Place, wg) -> None:
    """One warpgroup's 64 queries against every key tile of the block, the last first.

    The first that it takes is masked; where queries see a causal square, that is all that needs it.
    """
    row, b, head, index = place
    first_row = index * static.block_q + wg * CONSUMER_ROWS
    tiles = key_tiles(static, row, index, (first_row, CONSUMER_ROWS))
    consumers = static.tiles.consumers
    turns = static.tiles.turns
    q = shared.q.at[wg]
    weighted_by = functools.partial(logits, static, x, row, b, head, first_row)
    plgpu.barrier_wait(shared.q_full.at[wg])

    def weigh(s, tile, slot, state, masked):
        y, factor = weighted_by(s, tile, _segments_of(shared, slot), masked)
        hides = masked or static.segments or static.bias is not None
        return softmax_step(y, factor, state, may_be_empty=hides)

    def step(n, carry, *, masked):
        """Scores of the n-th tile beside the weighted values of the one before."""
        acc, p, state, before = carry
        tile = tiles.stop - 1 - n
        slot = slot_after(static, before)
        plgpu.barrier_wait(shared.k_full.at[slot])
        if turns:
            plgpu.barrier_wait(shared.turn.at[wg])

        def products(o_ref, s_ref):
            q_here = shared.q.at[tied_to(tile, wg, tied=static.tiles.tied)]
            plgpu.wgmma(s_ref, q_here, shared.k.at[slot].transpose((1, 0)))
            plgpu.wgmma(o_ref, p, shared.v.at[before])
            if turns:
                plgpu.barrier_arrive(shared.turn.at[lax.rem(wg + 1, jnp.int32(consumers))])
            s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
            next_p, alpha, next_state = weigh(s, tile, slot, state, masked)
            if static.segments:
                plgpu.commit_smem()
            plgpu.barrier_arrive(shared.k_empty.at[slot])
            # The next values are waited for here: the branch keeps the compiler from moving the
            # softmax past the wait for the products that it is to run beside.
            plgpu.barrier_wait(shared.v_full.at[slot])
            o = plgpu.wgmma_accumulator_load(o_ref, wait_n=0)
            plgpu.barrier_arrive(shared.v_empty.at[before])
            return o * along(alpha, o), next_p.astype(p.dtype), next_state, slot

        return _with_accumulators(static, acc, no_scores, products)

    def first_scores(s_ref):
        plgpu.barrier_wait(shared.k_full.at[0])
        plgpu.wgmma(s_ref, q, shared.k.at[0].transpose((1, 0)))
        return s_ref[...]

    s = pl.run_scoped(first_scores, plgpu.ACC((CONSUMER_ROWS, static.tiles.block_kv), jnp.float32))
    no_scores = zeros(CONSUMER_ROWS, static.tiles.block_kv)
    state = empty(CONSUMER_ROWS)
    p, _, state = weigh(s, tiles.stop - 1, 0, state, True)
    if static.segments:
        plgpu.commit_smem()
    plgpu.barrier_arrive(shared.k_empty.at[0])
    plgpu.barrier_wait(shared.v_full.at[0])
    acc = full((CONSUMER_ROWS, static.head_dim_v), 0.0, plgpu.Layout.WGMMA)
    carry = acc, p.astype(x.q.dtype), state, jnp.int32(0)
    inner = jnp.maximum(tiles.stop - tiles.inner_stop, 1)
    inner_stop = jnp.maximum(tiles.stop - tiles.inner, 1)
    masked, bare = (functools.partial(step, masked=flag) for flag in (True, False))
    if turns:

        @pl.when(wg == consumers - 1)
        def _():
            plgpu.barrier_arrive(shared.turn.at[0])

    carry = lax.fori_loop(1, inner, masked, carry)
    carry = lax.fori_loop(inner, inner_stop, bare, carry)
    acc, p, state, last = lax.fori_loop(inner_stop, tiles.stop - tiles.first, masked, carry)
    if turns:

        @pl.when(wg == 0)
        def _():
            plgpu.barrier_wait(shared.turn.at[0])

    acc = pl.run_state(lambda o: plgpu.wgmma(o, p, shared.v.at[last]))(plgpu.ACC.init(acc))
    plgpu.barrier_arrive(shared.v_empty.at[last])
    epilogue(static, x, acc, state, out, lse, shared, row, b, head, first_row, wg)


def _with_accumulators(static: Static, acc: jax.Array, no_scores: jax.Array, products):
    """What `products` returns of sums that begin as acc, and of scores that begin as zeros."""

    def filled(o_ref, s_ref):
        o_ref[...] = acc
        s_ref[...] = no_scores
        return products(o_ref, s_ref)

    return pl.run_scoped(
        filled,
        plgpu.ACC((CONSUMER_ROWS, static.head_dim_v), jnp.float32),
        plgpu.ACC((CONSUMER_ROWS, static.tiles.block_kv), jnp.float32),
    )


def _segments_of(shared: Shared, slot: Any) -> Any:
    return None if shared.segments is None else shared.segments.at[slot]


def epilogue(static, x, acc, state, out, lse, shared, row, b, head, first_row, wg) -> None:
    """The results of a warpgroup, through shared memory."""
    staged = shared.q.at[wg, :, pl.ds(0, static.head_dim_v)]  # the queries are done with
    staged[...], shared.lse[wg, :] = normalised(static, x, acc, state, row, head, first_row)
    plgpu.commit_smem()
    queries = pl.ds(first_row, CONSUMER_ROWS)
    # Rows of queries longer than the output's lie apart: then only 8 of them are one copy.
    height = CONSUMER_ROWS if static.head_dim == static.head_dim_v else 8
    for i in range(0, CONSUMER_ROWS, height):
        rows_of = pl.ds(first_row + i, height)
        plgpu.copy_smem_to_gmem(staged.at[pl.ds(i, height)], out.at[b, rows_of, head])
    plgpu.copy_smem_to_gmem(shared.lse.at[wg], lse.at[b, head, queries])
    plgpu.wait_smem_to_gmem(0)
