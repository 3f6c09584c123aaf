"""The backward of dense attention on Blackwell by tcgen05: dq, then dk and dv, by one scheme.

A block owns 128 rows of two arrays and goes through tiles of two others: queries and dout, and keys
and values, or the other way round::

    TMEM   s = q k' | dp = dout v' | dq              or    k q' | v dout' | dk | dv
    WG0, WG1     p from s     | ds from dp   | p ..      half of the columns each, a row a thread
    multiplier   dv += p dout, next s | dk += ds q, next dp | ..

Weights go back to TMEM where logits were, ds where dp was, in 16 bits: left operands. While the
warpgroups have one of s and dp in hand the tensor core has the other. Every sum is added up by one
block in one order.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gpu_chip
from pallas_kernels.dense.mosaic_gpu_blackwell_softmax import NATIVE, ROW, STORED
from pallas_kernels.dense.mosaic_gpu_blackwell_weights import (
    ROWS,
    Tile,
    distances,
    logit_gradients,
    weights,
)
from pallas_kernels.dense.mosaic_gpu_dkv import steps_of
from pallas_kernels.dense.mosaic_gpu_dq import QueryGradients, drain, seen_tiles
from pallas_kernels.dense.mosaic_gpu_forward import tile as swizzled
from pallas_kernels.dense.mosaic_gpu_geometry import Static, row_of
from pallas_kernels.dense.mosaic_gpu_tiles import BackwardTiles
from pallas_kernels.dense.mosaic_gpu_weights import Arrays, Place
from pallas_kernels.gpu_addresses import tied_to

WEIGHERS = 2
REGISTERS = (232, 40)  # of a thread that weighs, of the others; as in the forward
STRIP, NARROW = 32, 16  # columns; with slopes strips of 32 spill


class Shared(NamedTuple):
    """What a block shares; `*_full`: it is there, `*_empty`, `*_read`: it was read.

    Attributes:
        mine: the two arrays' rows of the block; at the end its results.
        rings: tiles of the two others, [stages, tile, size].
        numbers: lse and delta of a tile of queries, float32 [stages, tile]; () where they are rows.
        s_full, dp_full: products are there; p_full, ds_full: what was made of them is.
        p_read, ds_read: the product that read it is done, all earlier ones are.
        done: the last product is.
        loaded: both warpgroups have a tile in registers.
    """

    mine: Any
    rings: Any
    numbers: Any
    mine_full: Any
    first_full: Any
    second_full: Any
    first_empty: Any
    second_empty: Any
    s_full: Any
    dp_full: Any
    p_full: Any
    ds_full: Any
    p_read: Any
    ds_read: Any
    done: Any
    loaded: Any
    s: Any
    p: Any
    dp: Any
    ds: Any
    sums: Any


class Walk(NamedTuple):
    """What a block goes through: `count` tiles; `where(n)` is the place of the n-th."""

    static: Static
    x: Arrays
    queries: int  # the axis of the queries: 0 = it owns some, 1 = it owns keys
    count: Any
    where: Any
    b: Any
    first: Any  # row
    head: Any


def query_gradients(static: Static, x: Arrays, tiles: BackwardTiles) -> QueryGradients:
    """dq, and the same dlogits' sums: `mosaic_gpu_dq.query_gradients`, on Blackwell."""
    ring = tiles.k_stages, tiles.block_kv
    dq, *found = _launched(static, x, 0, (x.q,), ring, "attnsel_dense_dq_blackwell")
    return QueryGradients(dq, x.delta, found[0].sum(axis=0) if found else None)


def key_gradients(static: Static, x: Arrays, tiles: BackwardTiles) -> tuple[jax.Array, jax.Array]:
    """Dk and dv, like k and v: `mosaic_gpu_dkv.key_gradients`, on Blackwell."""
    ring = tiles.q_stages, tiles.block_q
    return _launched(static, x, 1, (x.k, x.v), ring, "attnsel_dense_dkv_blackwell")


def _launched(static: Static, x: Arrays, queries: int, like: Any, ring: Any, name: str) -> Any:
    """Gradients like some of the arrays, whose 128 rows a block the grid goes through; sums."""
    batch, length, heads, _ = like[0].shape
    given = Arrays(*(field is not None for field in x))
    parts = [jax.ShapeDtypeStruct((WEIGHERS, *x.lse.shape), jnp.float32)]
    results = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in like]
    results += parts * (static.alibi and queries == 0)

    def body(*refs: Any) -> None:
        refs = list(refs)
        arrays = Arrays(*(refs.pop(0) if there else None for there in given))
        found = [refs.pop(0) for _ in results]
        block(static, arrays, queries, found, _shared(queries, refs))

    return gpu_chip.kernel(
        body,
        out_type=tuple(results),
        scratch_types=_scratch(static, x.q.dtype, queries, *ring),
        grid=(batch, pl.cdiv(length, ROWS), heads),
        grid_names=("batch", "block", "head"),
        num_threads=WEIGHERS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
    )(*(field for field in x if field is not None))


def _scratch(static: Static, dtype: Any, queries: int, stages: int, tile: int) -> list[Any]:
    sizes = static.head_dim, static.head_dim_v
    ordered = functools.partial(plgpu.Barrier, orders_tensor_core=True)
    both = functools.partial(ordered, num_arrivals=WEIGHERS)
    with_numbers = 1 + 2 * queries
    logits = plgpu.TMEM((ROWS, tile), jnp.float32)
    operand = plgpu.TMEM((ROWS, tile), dtype, packed=True)
    return [
        *(swizzled(ROWS, size, dtype=dtype) for size in sizes),
        *(swizzled(stages, tile, size, dtype=dtype) for size in sizes),
        *[plgpu.SMEM((stages, tile), jnp.float32)] * (2 * queries),
        plgpu.Barrier(num_arrivals=2),
        plgpu.Barrier(num_barriers=stages, num_arrivals=with_numbers),
        plgpu.Barrier(num_barriers=stages),
        ordered(num_barriers=stages, num_arrivals=with_numbers),
        ordered(num_barriers=stages),
        *(ordered(), ordered(), both(), both(), ordered(), ordered(), ordered(), both()),
        *(plgpu.RefUnion(logits, operand) for _ in range(2)),
        *(plgpu.TMEM((ROWS, size), jnp.float32) for size in sizes[: 1 + queries]),
    ]


def _shared(queries: int, refs: list[Any]) -> Shared:
    (k, v, *rings), refs = refs[:4], refs[4:]
    numbers, refs = refs[: 2 * queries], refs[2 * queries :]
    barriers, ((s, p), (dp, ds), *sums) = refs[:13], refs[13:]
    return Shared((k, v), rings, numbers, *barriers, s, p, dp, ds, sums)


def block(static: Static, x: Arrays, queries: int, results: Any, shared: Shared) -> None:
    """One block of the grid, by the roles of its warpgroups."""
    wg = lax.axis_index("wg")

    for i in range(WEIGHERS):

        @pl.when(wg == i)
        def _(i=i):
            plgpu.set_max_registers(REGISTERS[0], action="increase")
            weigh(walk_of(static, x, queries, shared), results, shared, i)

    @pl.when(wg == WEIGHERS)
    def _():
        plgpu.set_max_registers(REGISTERS[1], action="decrease")
        walk = walk_of(static, x, queries, shared)

        @plgpu.warp_map
        def _(warp):
            pl.when(warp == 0)(lambda: bring(walk, shared))
            pl.when(warp == 1)(lambda: multiply(walk, shared))


def walk_of(static: Static, x: Arrays, queries: int, shared: Shared) -> Walk:
    """What this block owns and goes through."""
    b, head, index = (lax.axis_index(name) for name in ("batch", "head", "block"))
    row, tile, nothing = row_of(static, x.rows, b), shared.rings[0].shape[1], jnp.int32(0)
    if queries == 0:
        if static.causal:  # the longest first
            index = pl.cdiv(static.q_len, ROWS) - 1 - index
        at = Place(b, row, index * ROWS, nothing, head)
        keys = seen_tiles(static, at, ROWS, tile)

        def where(n: Any) -> Place:
            return at._replace(key=(keys.first + n) * tile)

        return Walk(static, x, queries, keys.count, where, b, at.query, head)
    at = Place(b, row, nothing, index * ROWS)
    steps = steps_of(static, at, ROWS, head, tile)

    def where(n: Any) -> Place:
        of_step, query = steps.where(n)
        return at._replace(head=of_step, query=query)

    return Walk(static, x, queries, steps.count, where, b, at.key, head)


def _slot(shared: Shared, n: Any) -> Any:
    return lax.rem(n, jnp.int32(shared.rings[0].shape[0]))


# The warp that brings.


def bring(walk: Walk, shared: Shared) -> None:
    """Brings what the block owns, then tiles as slots become free."""
    x, b, copy = walk.x, walk.b, plgpu.copy_gmem_to_smem
    of_queries, of_keys, group = (x.q, x.dout), (x.k, x.v), jnp.int32(walk.static.group)
    mine, others = (of_queries, of_keys) if walk.queries == 0 else (of_keys, of_queries)
    stages, tile = shared.rings[0].shape[:2]

    @pl.when(walk.count > 0)
    def _():
        for source, target in zip(mine, shared.mine, strict=True):
            copy(source.at[b, pl.ds(walk.first, ROWS), walk.head], target, shared.mine_full)

    @pl.loop(0, walk.count)
    def _(n):
        at, slot = walk.where(n), _slot(shared, n)
        head = lax.div(at.head, group) if walk.queries == 0 else at.head
        rows = pl.ds(at.key if walk.queries == 0 else at.query, tile)
        first, second = shared.rings
        pl.when(n >= stages)(lambda: plgpu.barrier_wait(shared.first_empty.at[slot]))
        copy(others[0].at[b, rows, head], first.at[slot], shared.first_full.at[slot])
        if walk.queries == 1:
            for source, ring in zip((x.lse, x.delta), shared.numbers, strict=True):
                copy(source.at[b, head, rows], ring.at[slot], shared.first_full.at[slot])
        pl.when(n >= stages)(lambda: plgpu.barrier_wait(shared.second_empty.at[slot]))
        copy(others[1].at[b, rows, head], second.at[slot], shared.second_full.at[slot])

    for empty in (shared.first_empty, shared.second_empty):
        drain(empty, stages, walk.count)


# The warp that multiplies.


def multiply(walk: Walk, shared: Shared) -> None:
    """Issues the products.

    What overwrites an operand waits for the product that reads it: tcgen05 orders products of
    different accumulators among themselves in no way.
    """
    count, by_keys = walk.count, walk.queries == 1
    (mine_1, mine_2), (ring_1, ring_2) = shared.mine, shared.rings
    commit, wait = plgpu.tcgen05_commit_arrive, plgpu.barrier_wait

    def logits(n):
        slot = _slot(shared, n)
        wait(shared.first_full.at[slot])
        plgpu.tcgen05_mma(shared.s, mine_1, ring_1.at[slot].transpose((1, 0)), accumulate=False)
        commit(shared.s_full)

    def weight_gradients(n):
        slot = _slot(shared, n)
        wait(shared.second_full.at[slot])
        plgpu.tcgen05_mma(shared.dp, mine_2, ring_2.at[slot].transpose((1, 0)), accumulate=False)
        commit(shared.dp_full)
        if not by_keys:
            commit(shared.second_empty.at[slot])

    def weighed(n):
        """dv, or nothing: then logits have been read."""
        slot = _slot(shared, n)
        wait(shared.p_full)
        if by_keys:
            plgpu.tcgen05_mma(shared.sums[1], shared.p, ring_2.at[slot], accumulate=n > 0)
            commit(shared.second_empty.at[slot])

    def added(n, read):
        slot = _slot(shared, n)
        wait(shared.ds_full)
        plgpu.tcgen05_mma(shared.sums[0], shared.ds, ring_1.at[slot], accumulate=n > 0)
        commit(shared.first_empty.at[slot])
        commit(read)

    @pl.when(count > 0)
    def _():
        wait(shared.mine_full)
        logits(jnp.int32(0))
        weight_gradients(jnp.int32(0))

        @pl.loop(0, count - 1)
        def _(n):
            weighed(n)
            if by_keys:
                commit(shared.p_read)
                wait(shared.p_read)
            logits(n + 1)
            added(n, shared.ds_read)
            wait(shared.ds_read)
            weight_gradients(n + 1)

        weighed(count - 1)
        added(count - 1, shared.done)


# The warpgroups that weigh.


def weigh(walk: Walk, results: Any, shared: Shared, i: int) -> None:
    """The weights and dlogits of a half of the columns, tile after tile; a result at the end."""
    static, x, width = walk.static, walk.x, shared.rings[0].shape[1] // WEIGHERS
    adds = static.alibi and walk.queries == 0
    of_rows = ()
    if walk.queries == 0:
        place = walk.b, walk.head, pl.ds(walk.first, ROWS)
        load = functools.partial(plgpu.load, layout=ROW, optimized=False)
        of_rows = load(x.lse.at[place]), load(x.delta.at[place])
    size = NARROW if static.alibi else STRIP
    strips = [pl.ds(i * width + start, min(size, width)) for start in range(0, width, size)]

    def step(n, sums):
        slot = _slot(shared, n)
        numbers = of_rows or tuple(ring.at[slot] for ring in shared.numbers)
        tile = Tile(static, x, walk.where(n), walk.queries, WEIGHERS * width, numbers)
        masked = tile.needs_mask
        plgpu.barrier_wait(shared.s_full)
        found = []
        for strip in strips:
            s = _loaded(shared.s, strip)
            found.append(weights(tile, strip, s, masked))
        if walk.queries == 1:
            _store(shared, shared.p, strips, [w.p for w in found])
        plgpu.barrier_arrive(shared.p_full)
        plgpu.barrier_wait(shared.dp_full)
        gradients = []
        for strip, w in zip(strips, found, strict=True):
            ds = logit_gradients(tile, strip, w.p, _loaded(shared.dp, strip))
            if adds:  # distances are computed again: kept they would be half of a tile
                again = tile._replace(at=tile.at._replace(query=tied_to(n, tile.at.query)))
                sums = sums + (ds * distances(again, strip, ds.shape)).sum(axis=1)
            gradients.append(ds if w.slope is None else ds * w.slope)
        _store(shared, shared.ds, strips, gradients)
        plgpu.barrier_arrive(shared.ds_full)
        if walk.queries == 1:
            plgpu.commit_smem()  # they were read otherwise than they will be written
            plgpu.barrier_arrive(shared.first_empty.at[slot])
        return sums

    nothing = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW) if adds else 0
    sums = lax.fori_loop(0, walk.count, step, nothing)
    if adds:
        results[1][i, walk.b, walk.head, pl.ds(walk.first, ROWS)] = sums
    pl.when(walk.count > 0)(lambda: plgpu.barrier_wait(shared.done))
    if i < len(shared.sums):
        _leave(walk, shared.sums[i], static.scale if i == 0 else 1.0, shared.mine[i], results[i])


def _loaded(ref: Any, strip: Any) -> jax.Array:
    part = plgpu.async_load_tmem(ref.at[:, strip], layout=NATIVE)
    plgpu.wait_load_tmem()  # or the compiler begins all loads at once, and spills
    return part


def _store(shared: Shared, ref: Any, strips: Any, parts: list[jax.Array]) -> None:
    """Stores operands in the columns of float32 that both warpgroups have loaded."""
    parts = [part.astype(ref.dtype) for part in parts]
    both_have_loaded(shared)
    for strip, part in zip(strips, parts, strict=True):
        plgpu.async_store_tmem(ref.at[:, strip], part)
    plgpu.commit_tmem()


def both_have_loaded(shared: Shared) -> None:
    """Waits for the other warpgroup, whose columns lie elsewhere as operands."""
    plgpu.barrier_arrive(shared.loaded)
    plgpu.barrier_wait(shared.loaded)


def _leave(walk: Walk, acc: Any, factor: float, staging: Any, result: Any) -> None:
    """Sends a gradient off; 0 where nothing was added up."""
    width = plgpu.find_swizzle(acc.shape[1] * 16) // 2
    for start in range(0, acc.shape[1], width):
        strip = pl.ds(start, width)
        part = plgpu.async_load_tmem(acc.at[:, strip], layout=STORED) * factor
        none = plgpu.layout_cast(jnp.zeros(part.shape, jnp.float32), STORED)
        part = lax.cond(walk.count > 0, lambda part, _: part, lambda _, none: none, part, none)
        staging[:, strip] = part.astype(staging.dtype)
    plgpu.commit_smem()
    rows = pl.ds(walk.first, ROWS)
    plgpu.copy_smem_to_gmem(staging, result.at[walk.b, rows, walk.head])
    plgpu.wait_smem_to_gmem(0)
