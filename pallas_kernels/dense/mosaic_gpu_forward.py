"""The forward of dense attention on Hopper: one producer and two consumer warpgroups a block."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gpu_chip
from pallas_kernels.dense.mosaic_gpu_geometry import (
    CONSUMER_ROWS,
    KeyTiles,
    Static,
    heads_together,
    key_tiles,
    values_are_whole,
)
from pallas_kernels.dense.mosaic_gpu_plan import Place, place_of, plan, walk
from pallas_kernels.dense.mosaic_gpu_softmax import (
    SLACK,
    empty,
    full,
    logits,
    normalised,
    rescaled,
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
    bias float32 or q's dtype, its full dimensions padded to whole tiles; plan as `plan` says.
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
    plan: Any = None


class Shared(NamedTuple):
    """What the warpgroups of a block share: rings of tiles, and barriers.

    Queries have a slot for each consumer, or two where a core walks over blocks, and results go out
    through theirs. Where a walk has one, results have `staged`, so that the next queries come while
    they are made: a part of their columns at a time.
    `*_full`: the slot has arrived; `*_empty`: the consumers are done with it. `turn`: whose
    products are issued next, so that one warpgroup's softmax runs beside another's products.
    """

    q: Any
    k: Any
    v: Any
    lse: Any
    staged: Any
    segments: Any
    q_full: Any
    q_empty: Any
    k_full: Any
    v_full: Any
    v_raw: Any
    k_empty: Any
    v_empty: Any
    turn: Any


def forward(static: Static, x: Operands) -> tuple[jax.Array, jax.Array]:
    """The two results, out as the contract has it.

    Returns:
        out [batch, q_len as q has it, num_q_heads, head_dim_v]; lse float32 `static.lse_shape`.
    """
    blocks = pl.cdiv(static.q_len, static.block_q)
    of_a_head = static.kv_len * (static.head_dim + static.head_dim_v) * x.q.dtype.itemsize
    together = heads_together(static.num_q_heads, of_a_head // static.group)
    grid = {"batch": static.batch, "heads": static.num_q_heads // together}
    grid |= {"block": blocks, "head": together}
    slots = 1
    walks = plan(static, together, gpu_chip.current().num_cores) if static.tiles.walking else None
    if walks is not None:
        x, grid = x._replace(plan=jnp.asarray(walks)), {"core": len(walks)}
        stages, slots = static.tiles.walking
        static = dataclasses.replace(static, tiles=dataclasses.replace(static.tiles, stages=stages))
    given = Operands(*(field is not None for field in x))
    out_shape = (*x.q.shape[:3], static.head_dim_v)

    shared = _scratch(static, x.q.dtype, slots, apart=walks is not None and slots == 1)

    def body(*refs):
        refs = list(refs)
        operands = Operands(*(refs.pop(0) if there else None for there in given))
        out, lse, *scratch = refs
        here = Shared(*(None if of is None else scratch.pop(0) for of in shared))
        block(static, operands, out, lse, here, together)

    return gpu_chip.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(out_shape, x.q.dtype),
            jax.ShapeDtypeStruct(static.lse_shape, jnp.float32),
        ),
        scratch_types=[of for of in shared if of is not None],
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
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


def _scratch(static: Static, dtype, slots: int, *, apart: bool) -> Shared:
    """Types of what is shared; None = there is no such thing. `apart`: results are `staged`."""
    tiles, stages = static.tiles, static.tiles.stages
    of_queries = slots * tiles.consumers
    ring = functools.partial(plgpu.Barrier, num_barriers=stages)
    width = plgpu.find_swizzle(static.head_dim_v * 16) // 2
    return Shared(
        q=tile(of_queries, CONSUMER_ROWS, static.head_dim, dtype=dtype),
        k=tile(stages, tiles.block_kv, static.head_dim, dtype=dtype),
        v=tile(stages, tiles.block_kv, static.head_dim_v, dtype=dtype),
        lse=plgpu.SMEM((of_queries * static.rows_of_lse, CONSUMER_ROWS), jnp.float32),
        staged=tile(of_queries, CONSUMER_ROWS, width, dtype=dtype) if apart else None,
        segments=plgpu.SMEM((stages, tiles.block_kv), jnp.int32) if static.segments else None,
        q_full=plgpu.Barrier(num_barriers=of_queries),
        q_empty=plgpu.Barrier(num_barriers=of_queries),
        k_full=ring(num_arrivals=1 + static.segments),
        v_full=ring(),
        v_raw=plgpu.Barrier(),
        k_empty=ring(num_arrivals=tiles.consumers),
        v_empty=ring(num_arrivals=tiles.consumers),
        turn=plgpu.Barrier(num_barriers=tiles.consumers),
    )


def queries_slot(static: Static, shared: Shared, n: jax.Array, wg: Any) -> Any:
    """The slot of a consumer's queries, for the n-th block that is walked over."""
    consumers = static.tiles.consumers
    return tied_to(n, wg) if shared.q.shape[0] == consumers else (n & 1) * consumers + wg


def block(static: Static, x: Operands, out: Any, lse: Any, shared: Shared, together: int) -> None:
    """One block of the grid, by the roles of its warpgroups."""
    wg = lax.axis_index("wg")
    tiles = static.tiles
    of_a_consumer, of_the_producer = tiles.registers or REGISTERS[tiles.consumers]

    @pl.when(wg < tiles.consumers)
    def _():
        plgpu.set_max_registers(of_a_consumer, action="increase")
        consume(static, x, out, lse, shared, together, wg)

    @pl.when(wg == tiles.consumers)
    def _():
        plgpu.set_max_registers(of_the_producer, action="decrease")
        if not values_are_whole(static):  # it takes a warpgroup to clear some
            produce(static, x, shared, together)
            return

        @plgpu.warp_map
        def _(warp):
            @pl.when(warp == 0)
            def _():
                produce(static, x, shared, together)


# The producer.


def produce(static: Static, x: Operands, shared: Shared, together: int) -> None:
    """Brings what the blocks of queries need, then waits until all of it has been used."""
    stages = static.tiles.stages

    def block_of_queries(n, brought):
        place = place_of(static, x, together, n)
        bring_queries = functools.partial(_bring_queries, static, x, shared, place, n)
        return bring_keys(static, x, shared, place, brought, bring_queries)

    brought = walk(x, block_of_queries, jnp.int32(0))

    @pl.loop(jnp.maximum(brought - stages, 0), brought)
    def _(n):
        slot = slot_of(static, n)
        plgpu.barrier_wait(shared.k_empty.at[slot])
        plgpu.barrier_wait(shared.v_empty.at[slot])


def _bring_queries(static: Static, x: Operands, shared: Shared, place: Place, n: jax.Array) -> None:
    """Brings the queries of the n-th block, once the last in their place, or results, are gone."""
    slots = shared.q.shape[0] // static.tiles.consumers
    for i in range(static.tiles.consumers):
        slot = queries_slot(static, shared, n, i)
        if x.plan is not None:

            @pl.when(n >= slots)
            def _(slot=slot):
                plgpu.barrier_wait(shared.q_empty.at[slot])

        rows = pl.ds(place.index * static.block_q + i * static.tiles.rows, static.tiles.rows)
        queries = x.q.at[place.b, rows, place.head]
        plgpu.copy_gmem_to_smem(queries, shared.q.at[slot], shared.q_full.at[slot])


def bring_keys(static: Static, x: Operands, shared: Shared, place: Place, brought, bring_queries):
    """Brings key and value tiles, the last first, as slots become free.

    Queries come after the first keys, which need not wait for the results before them.

    Args:
        static, x, shared: the call's.
        place: whose keys.
        brought: tiles before these, int32 [].
        bring_queries: brings the place's queries.

    Returns:
        Tiles brought, these included.
    """
    row, b, head, index = place
    tiles = key_tiles(static, row, index, (index * static.block_q, static.block_q))
    stages, block_kv = static.tiles.stages, static.tiles.block_kv
    kv_head = lax.div(head, jnp.int32(static.group))
    after = brought + tiles.stop - tiles.first

    @pl.loop(brought, after)
    def _(n):
        tile = tiles.stop - 1 - (n - brought)
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

        @pl.when(n == brought)
        def _():
            bring_queries()

        @pl.when(n >= stages)
        def _():
            plgpu.barrier_wait(shared.v_empty.at[slot])

        values = functools.partial(plgpu.copy_gmem_to_smem, x.v.at[b, keys, kv_head])
        if values_are_whole(static):
            values(shared.v.at[slot], shared.v_full.at[slot])
            return

        whole = (tile * block_kv >= tiles.low) & ((tile + 1) * block_kv <= tiles.high)

        @pl.when(whole)
        def _():
            values(shared.v.at[slot], shared.v_full.at[slot])

        @pl.when(jnp.logical_not(whole))
        def _():
            values(shared.v.at[slot], shared.v_raw)
            plgpu.barrier_wait(shared.v_raw)
            clear_unseen(static, shared.v.at[slot], tile * block_kv, tiles)
            plgpu.commit_smem()
            plgpu.barrier_arrive(shared.v_full.at[slot])

    return after


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


def consume(static: Static, x: Operands, out, lse, shared: Shared, together: int, wg) -> None:
    """What a consumer computes, and whose turn it is first."""
    if static.tiles.turns:

        @pl.when(wg == static.tiles.consumers - 1)
        def _():
            plgpu.barrier_arrive(shared.turn.at[0])

    def block_of_queries(n, slot):
        place = functools.partial(place_of, static, x, together, n)
        slot_q = queries_slot(static, shared, n, wg)
        acc, state, slot = attend(static, x, shared, place(), wg, slot_q, slot)
        finish = store if shared.staged is None else store_apart
        finish(static, x, acc, state, out, lse, shared, place(), wg, slot_q)
        return slot

    walk(x, block_of_queries, jnp.int32(0))
    if shared.staged is not None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    if static.tiles.turns:

        @pl.when(wg == 0)
        def _():
            plgpu.barrier_wait(shared.turn.at[0])


def attend(static: Static, x: Operands, shared: Shared, place: Place, wg, slot_q, first_slot):
    """One warpgroup's 64 queries against every key tile of the block, the last first.

    The first that it takes is masked; where queries see a causal square, that is all that needs it.

    Returns:
        (weighted values, softmax, the slot after the last).
    """
    row, b, head, index = place
    first_row = index * static.block_q + wg * CONSUMER_ROWS
    tiles = key_tiles(static, row, index, (first_row, CONSUMER_ROWS))
    consumers = static.tiles.consumers
    turns = static.tiles.turns
    weighted_by = functools.partial(logits, static, x, row, b, head, first_row)
    plgpu.barrier_wait(shared.q_full.at[slot_q])

    def weigh(s, tile, slot, state, masked):
        y, factor = weighted_by(s, tile, _segments_of(shared, slot), masked)
        hides = masked or static.segments or static.bias is not None
        return softmax_step(y, factor, state, may_be_empty=hides, slack=SLACK)

    def step(n, carry, *, masked):
        """Scores of the n-th tile beside the weighted values of the one before."""
        acc, p, state, before = carry
        tile = tiles.stop - 1 - n
        slot = slot_after(static, before)
        plgpu.barrier_wait(shared.k_full.at[slot])
        if turns:
            plgpu.barrier_wait(shared.turn.at[wg])

        def products(o_ref, s_ref):
            how = {"tied": static.tiles.tied, "by_square": static.tiles.by_square}
            q_here = shared.q.at[tied_to(tile, slot_q, **how)]
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
            return rescaled(o, alpha), next_p.astype(p.dtype), next_state, slot

        return _with_accumulators(static, acc, no_scores, products)

    def first_scores(s_ref):
        plgpu.barrier_wait(shared.k_full.at[first_slot])
        plgpu.wgmma(s_ref, shared.q.at[slot_q], shared.k.at[first_slot].transpose((1, 0)))
        return s_ref[...]

    s = pl.run_scoped(first_scores, plgpu.ACC((CONSUMER_ROWS, static.tiles.block_kv), jnp.float32))
    no_scores = zeros(CONSUMER_ROWS, static.tiles.block_kv)
    state = empty(CONSUMER_ROWS)
    p, _, state = weigh(s, tiles.stop - 1, first_slot, state, True)
    if static.segments:
        plgpu.commit_smem()
    plgpu.barrier_arrive(shared.k_empty.at[first_slot])
    plgpu.barrier_wait(shared.v_full.at[first_slot])
    acc = full((CONSUMER_ROWS, static.head_dim_v), 0.0, plgpu.Layout.WGMMA)
    carry = acc, p.astype(x.q.dtype), state, first_slot
    inner = jnp.maximum(tiles.stop - tiles.inner_stop, 1)
    inner_stop = jnp.maximum(tiles.stop - tiles.inner, 1)
    masked, bare = (functools.partial(step, masked=flag) for flag in (True, False))
    carry = lax.fori_loop(1, inner, masked, carry)
    carry = lax.fori_loop(inner, inner_stop, bare, carry)
    acc, p, state, last = lax.fori_loop(inner_stop, tiles.stop - tiles.first, masked, carry)
    if shared.staged is not None:
        plgpu.barrier_arrive(shared.q_empty.at[slot_q])
    acc = pl.run_state(lambda o: plgpu.wgmma(o, p, shared.v.at[last]))(plgpu.ACC.init(acc))
    plgpu.barrier_arrive(shared.v_empty.at[last])
    return acc, state, slot_after(static, last)


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


def store(static, x, acc, state, out, lse, shared, place: Place, wg, slot) -> None:
    """The results of a warpgroup, through shared memory."""
    row, b, head, index = place
    first_row = index * static.block_q + wg * CONSUMER_ROWS
    staged = shared.q.at[slot, :, pl.ds(0, static.head_dim_v)]  # the queries are done with
    staged[...], numbers = normalised(static, x, acc, state, row, head, first_row)
    for i, number in enumerate(numbers):
        shared.lse[slot + i * shared.q.shape[0], :] = number
    plgpu.commit_smem()
    # Rows of queries longer than the output's lie apart: then only 8 of them are one copy.
    height = CONSUMER_ROWS if static.head_dim == static.head_dim_v else 8
    for i in range(0, CONSUMER_ROWS, height):
        rows_of = pl.ds(first_row + i, height)
        plgpu.copy_smem_to_gmem(staged.at[pl.ds(i, height)], out.at[b, rows_of, head])
    _store_lse(static, shared, slot, lse, place, pl.ds(first_row, CONSUMER_ROWS))
    plgpu.wait_smem_to_gmem(0, wait_read_only=x.plan is not None)
    if x.plan is not None:
        plgpu.barrier_arrive(shared.q_empty.at[slot])


def store_apart(static, x, acc, state, out, lse, shared, place: Place, wg, slot) -> None:
    """The same by parts of columns, through memory that the next queries are not waiting for."""
    row, b, head, index = place
    first_row = index * static.block_q + wg * CONSUMER_ROWS
    o, numbers = normalised(static, x, acc, state, row, head, first_row)
    rows, staged = pl.ds(first_row, CONSUMER_ROWS), shared.staged.at[slot]
    width = staged.shape[1]
    for begin in range(0, static.head_dim_v, width):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staged[...] = o[:, begin : begin + width]
        if begin == 0:
            for i, number in enumerate(numbers):
                shared.lse[slot + i * shared.q.shape[0], :] = number
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, out.at[b, rows, head, pl.ds(begin, width)])
        if begin == 0:
            _store_lse(static, shared, slot, lse, place, rows)


def _store_lse(static: Static, shared: Shared, slot: Any, lse: Any, place: Place, rows: Any):
    for i in range(static.rows_of_lse):
        there = lse.at[place.b, place.head + i * static.num_q_heads, rows]
        plgpu.copy_smem_to_gmem(shared.lse.at[slot + i * shared.q.shape[0]], there)
