"""The forward of dense attention on Blackwell: tcgen05 products, sums and weights in TMEM.

A block of the grid owns `tiles.consumers` tiles of 128 queries of a head; its warpgroups are one
for each tile, which weighs, and one of which a warp brings tiles by TMA and another issues every
product. While one tile's logits are weighed the other's are multiplied.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gpu_chip
from pallas_kernels.dense import mosaic_gpu_blackwell_softmax as softmax
from pallas_kernels.dense import mosaic_gpu_forward as hopper
from pallas_kernels.dense.mosaic_gpu_forward import Operands
from pallas_kernels.dense.mosaic_gpu_geometry import KeyTiles, Static, key_tiles
from pallas_kernels.dense.mosaic_gpu_plan import Place
from pallas_kernels.gpu_addresses import tied_to

# Tiles of queries -> (registers a thread that weighs, of the others). A block is launched with
# 65536 registers over its threads, rounded down to 8 each: more in sum would wait for ever.
REGISTERS = {2: (232, 40), 1: (240, 72)}


class Accumulators(NamedTuple):
    """What a tile of queries has in TMEM: logits and, in the same columns, weights; sums.

    Attributes:
        s: float32 [128, block_kv].
        p: [128, block_kv] in v's dtype, two of them in a column.
        o: float32 [128, head_dim_v].
    """

    s: Any
    p: Any
    o: Any


class Shared(NamedTuple):
    """What the warpgroups of a block share.

    Rings and their barriers are as on Hopper, and one each for every tile of queries of
    `s_full`: logits are there, and all earlier products of the tile are done; `p_full`: weights
    are there, sums brought to their maximum; `p_read`: the product that read the weights is done;
    `o_full`: the last one is.
    """

    q: Any
    k: Any
    v: Any
    lse: Any
    inverse: Any
    segments: Any
    q_full: Any
    k_full: Any
    v_full: Any
    v_raw: Any
    k_empty: Any
    v_empty: Any
    s_full: Any
    p_full: Any
    p_read: Any
    o_full: Any
    tmem: list[Accumulators]


def forward(static: Static, x: Operands) -> tuple[jax.Array, jax.Array]:
    """The two results, as `mosaic_gpu_forward.forward` gives them."""
    blocks = pl.cdiv(static.q_len, static.block_q)
    given = Operands(*(field is not None for field in x))
    out_shape = (*x.q.shape[:3], static.head_dim_v)

    def body(*refs):
        refs = list(refs)
        operands = Operands(*(refs.pop(0) if there else None for there in given))
        out, lse, *scratch = refs
        block(static, operands, out, lse, _shared(static, scratch))

    return gpu_chip.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(out_shape, x.q.dtype),
            jax.ShapeDtypeStruct(static.lse_shape, jnp.float32),
        ),
        scratch_types=_scratch(static, x.q.dtype),
        grid=(static.batch, blocks, static.num_q_heads),
        grid_names=("batch", "block", "head"),
        num_threads=static.tiles.consumers + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="attnsel_dense_forward_blackwell",
    )(*(field for field in x if field is not None))


def _scratch(static: Static, dtype) -> list[Any]:
    tiles, stages = static.tiles, static.tiles.stages
    ring = functools.partial(plgpu.Barrier, num_barriers=stages)
    ordered = functools.partial(plgpu.Barrier, orders_tensor_core=True)
    of_a_tile = functools.partial(ordered, num_barriers=tiles.consumers)
    logits = plgpu.TMEM((tiles.rows, tiles.block_kv), jnp.float32)
    weights = plgpu.TMEM((tiles.rows, tiles.block_kv), dtype, packed=True)
    segments = plgpu.SMEM((stages, tiles.block_kv), jnp.int32)
    return [
        hopper.tile(tiles.consumers, tiles.rows, static.head_dim, dtype=dtype),
        hopper.tile(stages, tiles.block_kv, static.head_dim, dtype=dtype),
        hopper.tile(stages, tiles.block_kv, static.head_dim_v, dtype=dtype),
        plgpu.SMEM((tiles.consumers * static.rows_of_lse, tiles.rows), jnp.float32),
        plgpu.SMEM((tiles.consumers, tiles.rows), jnp.float32),
        *([segments] if static.segments else []),
        plgpu.Barrier(num_barriers=tiles.consumers),
        ring(num_arrivals=1 + static.segments),
        ring(),
        ring(),
        ordered(num_barriers=stages, num_arrivals=1 + static.segments * tiles.consumers),
        ordered(num_barriers=stages),
        *(of_a_tile() for _ in range(4)),
        *(plgpu.RefUnion(logits, weights) for _ in range(tiles.consumers)),
        *(
            plgpu.TMEM((tiles.rows, static.head_dim_v), jnp.float32)
            for _ in range(tiles.consumers)
        ),
    ]  # fmt: skip


def _shared(static: Static, scratch: list[Any]) -> Shared:
    if not static.segments:
        scratch = [*scratch[:5], None, *scratch[5:]]
    n = static.tiles.consumers
    rest, unions, sums = scratch[: -2 * n], scratch[-2 * n : -n], scratch[-n:]
    tmem = [Accumulators(*union, o) for union, o in zip(unions, sums, strict=True)]
    return Shared(*rest, tmem)


def block(static: Static, x: Operands, out: Any, lse: Any, shared: Shared) -> None:
    """One block of the grid, by the roles of its warpgroups."""
    wg = lax.axis_index("wg")
    consumers = static.tiles.consumers
    of_a_consumer, of_the_others = REGISTERS[consumers]

    for i in range(consumers):  # apart, for a tile's TMEM is an address of its own

        @pl.when(wg == i)
        def _(i=i):
            plgpu.set_max_registers(of_a_consumer, action="increase")
            consume(
                static, x, out, lse, shared, Place.here(static, x.rows, lax.axis_index("head")), i
            )

    @pl.when(wg == consumers)
    def _():
        plgpu.set_max_registers(of_the_others, action="decrease")
        place = Place.here(static, x.rows, lax.axis_index("head"))
        tiles = _tiles(static, place)

        @plgpu.warp_map
        def _(warp):
            @pl.when(warp == 0)
            def _():
                bring(static, x, shared, place, tiles)

            @pl.when(warp == 1)
            def _():
                multiply(static, shared, tiles)


def _tiles(static: Static, place: Place, tile: int | None = None) -> KeyTiles:
    """The key tiles of the block, those without masks being a tile of queries', or the block's."""
    first = place.index * static.block_q
    rows = (first, static.block_q)
    if tile is not None:
        rows = (first + tile * static.tiles.rows, static.tiles.rows)
    return key_tiles(static, place.row, place.index, rows)


def slot_of(static: Static, n: jax.Array) -> jax.Array:
    """The slot of a block's n-th tile in a ring.

    Of three slots the compiler would take the division into addresses, as base - 24 (n // 3) + 8 n;
    beside those ptxas keeps the base of shared memory on the stack, where it loads it all over.
    """
    return tied_to(n, hopper.slot_of(static, n), tied=static.tiles.stages == 3)


# The warp that brings.


def bring(static: Static, x: Operands, shared: Shared, place: Place, tiles: KeyTiles) -> None:
    """Brings the queries, then key and value tiles as slots become free."""
    _, b, head, index = place
    stages, rows = static.tiles.stages, static.tiles.rows
    kv_head = lax.div(head, jnp.int32(static.group))
    copy = plgpu.copy_gmem_to_smem
    for i in range(static.tiles.consumers):
        queries = pl.ds(index * static.block_q + i * rows, rows)
        copy(x.q.at[b, queries, head], shared.q.at[i], shared.q_full.at[i])

    @pl.loop(tiles.first, tiles.stop)
    def _(tile):
        n = tile - tiles.first
        slot = slot_of(static, n)
        keys = pl.ds(tile * static.tiles.block_kv, static.tiles.block_kv)

        @pl.when(n >= stages)
        def _():
            plgpu.barrier_wait(shared.k_empty.at[slot])

        copy(x.k.at[b, keys, kv_head], shared.k.at[slot], shared.k_full.at[slot])
        if static.segments:
            copy(x.kv_segments.at[b, keys], shared.segments.at[slot], shared.k_full.at[slot])

        @pl.when(n >= stages)
        def _():
            plgpu.barrier_wait(shared.v_empty.at[slot])

        for arrived, here in zip(*_whole_or_raw(static, shared, tiles, tile), strict=True):

            @pl.when(here)
            def _(arrived=arrived):
                copy(x.v.at[b, keys, kv_head], shared.v.at[slot], arrived.at[slot])

    @pl.loop(jnp.maximum(tiles.stop - tiles.first - stages, 0), tiles.stop - tiles.first)
    def _(n):
        slot = slot_of(static, n)
        plgpu.barrier_wait(shared.k_empty.at[slot])
        plgpu.barrier_wait(shared.v_empty.at[slot])


def _whole_or_raw(static: Static, shared: Shared, tiles: KeyTiles, tile):
    """(the barriers that values may arrive at, whether this tile's do): whole, or to be cleared."""
    begin = tile * static.tiles.block_kv
    end = begin + static.tiles.block_kv
    whole = (begin >= tiles.low) & (end <= tiles.high)
    raw = (begin < tiles.low) | (end > tiles.high)  # a warp has no logical_not
    return (shared.v_full, shared.v_raw), (whole, raw)


# The warp that multiplies.


def multiply(static: Static, shared: Shared, tiles: KeyTiles) -> None:
    """Issues the products: logits of the first key tile; then weighed values, and logits, in turn.

    Logits overwrite the columns of the weights before them: that product is waited for, since
    tcgen05 orders products of different accumulators among themselves in no way.
    """
    queries = range(static.tiles.consumers)
    count = tiles.stop - tiles.first

    def logits(i, n):
        slot, k_empty = slot_of(static, n), shared.k_empty
        if i == 0:
            plgpu.barrier_wait(shared.k_full.at[slot])
        keys = shared.k.at[slot].transpose((1, 0))
        plgpu.tcgen05_mma(shared.tmem[i].s, shared.q.at[i], keys, accumulate=False)
        plgpu.tcgen05_commit_arrive(shared.s_full.at[i])
        if i == queries[-1]:
            plgpu.tcgen05_commit_arrive(k_empty.at[slot])

    def weighed_values(i, n, done):
        slot = slot_of(static, n)
        if i == 0:
            plgpu.barrier_wait(shared.v_full.at[slot])
        plgpu.barrier_wait(shared.p_full.at[i])
        _, p, o = shared.tmem[i]
        plgpu.tcgen05_mma(o, p, shared.v.at[slot], accumulate=n > 0)
        plgpu.tcgen05_commit_arrive(done.at[i])
        if i == queries[-1]:
            plgpu.tcgen05_commit_arrive(shared.v_empty.at[slot])

    for i in queries:
        plgpu.barrier_wait(shared.q_full.at[i])
        logits(i, jnp.int32(0))

    @pl.loop(0, count - 1)
    def _(n):
        for i in queries:
            weighed_values(i, n, shared.p_read)
            plgpu.barrier_wait(shared.p_read.at[i])
            logits(i, n + 1)

    for i in queries:
        weighed_values(i, count - 1, shared.o_full)


# The warpgroups that weigh.


def consume(static: Static, x: Operands, out, lse, shared: Shared, place: Place, i: int) -> None:
    """The weights of 128 queries, key tile after key tile, and their sums at the end."""
    tiles = _tiles(static, place, i)
    first_row = place.index * static.block_q + i * static.tiles.rows
    at = softmax.Rows(place.row, place.b, place.head, first_row)

    def clear(tile, slot):
        """Values that the block does not see become 0, for the product."""

        @pl.when(_whole_or_raw(static, shared, tiles, tile)[1][1])
        def _():
            plgpu.barrier_wait(shared.v_raw.at[slot])
            hopper.clear_unseen(static, shared.v.at[slot], tile * static.tiles.block_kv, tiles)
            plgpu.commit_smem()
            plgpu.barrier_arrive(shared.v_full.at[slot])

    def step(tile, state, *, masked):
        plgpu.barrier_wait(shared.s_full.at[i])
        n = tile - tiles.first
        slot = slot_of(static, n)
        state = softmax.weigh(
            static, x, shared, at, i, tile, slot, state, masked=masked, first=n == 0
        )
        if static.segments:
            plgpu.barrier_arrive(shared.k_empty.at[slot])
        plgpu.barrier_arrive(shared.p_full.at[i])
        if masked and i == 0:  # tiles that need no mask are whole
            clear(tile, slot)
        return state

    masked, bare = (functools.partial(step, masked=flag) for flag in (True, False))
    state = softmax.empty(static)
    state = lax.fori_loop(tiles.first, tiles.inner, masked, state)
    state = lax.fori_loop(tiles.inner, tiles.inner_stop, bare, state)
    state = lax.fori_loop(tiles.inner_stop, tiles.stop, masked, state)
    plgpu.barrier_wait(shared.o_full.at[i])
    softmax.epilogue(static, x, shared, at, i, state, out, lse)
