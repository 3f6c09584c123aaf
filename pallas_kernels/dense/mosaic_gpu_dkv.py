"""dk and dv of dense attention on Hopper: a block owns keys, and goes through the queries.

Logits lie keys first, [keys, queries], so that both gradients are a product with the weights, or
the dlogits, as they leave the registers::

    together   each of two warpgroups has 64 keys: dv += p dout, dk += ds q
    split      the block has 64 keys. One warpgroup has dv: it computes the weights, and leaves
               them in shared memory for the other, which has dk: it computes dout v.T. Two
               products each, and none twice.

`split` is for heads so large that dk and dv of 64 keys do not fit one warpgroup's registers: 64 x
256 floats are 128 registers of each thread, of 240.

All query heads of a kv head are gone through by the same block, one after another.
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
from pallas_kernels.dense.mosaic_gpu_dq import drain, owned
from pallas_kernels.dense.mosaic_gpu_geometry import (
    Static,
    head_of_grid,
    heads_together,
    row_of,
)
from pallas_kernels.dense.mosaic_gpu_tiles import BackwardTiles
from pallas_kernels.dense.mosaic_gpu_weights import (
    LAYOUTS,
    TILE,
    WGMMA,
    Arrays,
    Place,
    Weights,
    logit_gradients,
    swizzled,
    weights,
)
from pallas_kernels.gpu_addresses import tied_to
from pallas_kernels.gpu_zeros import zeros

CONSUMERS = 2
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24


class Shared(NamedTuple):
    """Shared memory of a block; `*_full`: a slot has arrived, `*_empty`: it was read."""

    k: Any  # [owners, TILE, head_dim]
    v: Any
    q: Any  # [stages, TILE, head_dim]
    dout: Any
    lse: Any  # float32 [stages, TILE]
    delta: Any
    kv_full: Any
    q_full: Any
    dout_full: Any
    q_empty: Any
    dout_empty: Any


class Exchange(NamedTuple):
    """What the warpgroups of a split block hand over."""

    p: Any  # float32 [2, TILE, TILE]
    p_full: Any
    p_empty: Any
    k_free: Any  # the other one has read k for the last time
    v_free: Any


def key_gradients(static: Static, x: Arrays, tiles: BackwardTiles) -> tuple[jax.Array, jax.Array]:
    """The gradients of k and v, like k and v."""
    split, stages = tiles.split, tiles.q_stages
    given = Arrays(*(field is not None for field in x))

    def body(*refs: Any) -> None:
        refs = list(refs)
        arrays = Arrays(*(refs.pop(0) if there else None for there in given))
        dk, dv, *scratch = refs
        shared, more = Shared(*scratch[: len(Shared._fields)]), scratch[len(Shared._fields) :]
        exchange = Exchange(*more) if split else None
        block(static, arrays, (dk, dv), shared, exchange, tiles)

    owners, kv_heads = 1 if split else CONSUMERS, x.k.shape[2]
    of_a_head = static.q_len * (static.head_dim + static.head_dim_v) * x.q.dtype.itemsize
    together = heads_together(kv_heads, of_a_head * static.group)
    return gpu_chip.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(x.k.shape, x.k.dtype),
            jax.ShapeDtypeStruct(x.v.shape, x.v.dtype),
        ),
        scratch_types=_scratch(static, x.q.dtype, stages, owners) + (_exchange() if split else []),
        grid=(
            static.batch,
            kv_heads // together,
            pl.cdiv(static.kv_len, owners * TILE),
            together,
        ),
        grid_names=("batch", "heads", "block", "head"),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="attnsel_dense_dkv",
    )(*(field for field in x if field is not None))


def _scratch(static: Static, dtype: Any, stages: int, owners: int) -> list[Any]:
    numbers = plgpu.SMEM((stages, TILE), jnp.float32)
    full = plgpu.Barrier(num_barriers=stages, num_arrivals=2)
    # Both warpgroups read q and dout, together or split.
    empty = plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS)
    return [
        swizzled(owners, TILE, static.head_dim, dtype=dtype),
        swizzled(owners, TILE, static.head_dim_v, dtype=dtype),
        swizzled(stages, TILE, static.head_dim, dtype=dtype),
        swizzled(stages, TILE, static.head_dim_v, dtype=dtype),
        numbers,
        numbers,
        plgpu.Barrier(num_arrivals=2 * owners),
        full,
        full,
        empty,
        empty,
    ]


def _exchange() -> list[Any]:
    ring, once = plgpu.Barrier(num_barriers=2), plgpu.Barrier()
    return [swizzled(2, TILE, TILE, dtype=jnp.float32), ring, ring, once, once]


class Steps(NamedTuple):
    """What a block goes through: `tiles` tiles of queries from `first` on, of each query head."""

    first: jax.Array
    tiles: jax.Array
    head: jax.Array  # the first of the kv head's
    count: jax.Array  # of all of them together
    queries: int = TILE  # of a tile

    def where(self, n: Any) -> tuple[jax.Array, jax.Array]:
        """(query head, first query) of step n."""
        tiles = jnp.maximum(self.tiles, 1)
        return self.head + lax.div(n, tiles), (self.first + lax.rem(n, tiles)) * self.queries


def block(
    static: Static, x: Arrays, results: tuple[Any, Any], shared: Shared,
    exchange: Exchange | None, tiles: BackwardTiles,
) -> None:  # fmt: skip
    """One block of the grid: its keys, and the queries that see them."""
    b, kv_head = lax.axis_index("batch"), head_of_grid()
    index, wg = lax.axis_index("block"), lax.axis_index("wg")
    owners = shared.k.shape[0]
    at = Place(b, row_of(static, x.rows, b), jnp.int32(0), index * (owners * TILE))
    steps = steps_of(static, at, owners * TILE, kv_head)

    def consume(role: Any, width: int, at: Place, wg: Any) -> None:
        accumulators = [plgpu.ACC((TILE, width), jnp.float32)]
        if exchange is None:
            accumulators.append(plgpu.ACC((TILE, static.head_dim), jnp.float32))
        call = _Block(static, x, results, shared, exchange, at, steps, kv_head, wg, tiles)
        pl.run_scoped(functools.partial(role, call), *accumulators)

    @pl.when(wg < CONSUMERS)
    def _():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        if exchange is None:
            consume(together, static.head_dim_v, at._replace(key=at.key + wg * TILE), wg)
            return
        pl.when(wg == 0)(lambda: consume(value_role, static.head_dim_v, at, 0))
        pl.when(wg == 1)(lambda: consume(key_role, static.head_dim, at, 0))

    @pl.when(wg == CONSUMERS)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        _produce(static, x, shared, at, steps, kv_head)


def steps_of(
    static: Static, at: Place, keys: int, kv_head: jax.Array, queries: int = TILE
) -> Steps:
    """What a block of `keys` keys from at.key on goes through, so many queries at a time."""
    first, tiles = seeing_tiles(static, at, keys, queries)
    return Steps(first, tiles, kv_head * static.group, tiles * static.group, queries)


def seeing_tiles(
    static: Static, at: Place, keys: int, queries: int = TILE
) -> tuple[jax.Array, jax.Array]:
    """(first, how many): the tiles of so many queries that see one of `keys` keys from at.key on.

    The interval of keys that a query sees grows with the query: the first query that sees any is
    the first whose interval ends after at.key, the last one the last whose begins before the end.
    """
    row, size = at.row, static.attention_chunk_size
    first, stop = jnp.int32(0), jnp.asarray(row.q_len, jnp.int32)
    left, right = static.sliding_window
    last_key = jnp.minimum(at.key + keys, row.kv_len) - 1
    if static.causal:
        first = jnp.maximum(first, at.key - row.offset)
    elif right is not None:
        first = jnp.maximum(first, at.key - right + 1 - row.offset)
    if left is not None:
        stop = jnp.minimum(stop, last_key + left - row.offset)
    if size is not None:
        begin, end = (lax.div(key, jnp.int32(size)) * size for key in (at.key, last_key))
        first = jnp.maximum(first, begin - row.offset)
        stop = jnp.minimum(stop, end + size - row.offset)
    of_tile = jnp.int32(queries)
    first = lax.div(first, of_tile)
    tiles = jnp.maximum(lax.div(stop + of_tile - 1, of_tile) - first, 0)
    return first, jnp.where((at.key < row.kv_len) & (stop > 0), tiles, 0)


def _produce(static: Static, x: Arrays, shared: Shared, at: Place, steps: Steps, kv_head) -> None:
    """Brings the keys and values, then tiles of queries as slots become free."""
    owners, stages = shared.k.shape[0], shared.q.shape[0]
    for i in range(owners):
        rows = (at.b, pl.ds(at.key + i * TILE, TILE), kv_head)
        plgpu.copy_gmem_to_smem(x.k.at[rows], shared.k.at[i], shared.kv_full)
        plgpu.copy_gmem_to_smem(x.v.at[rows], shared.v.at[i], shared.kv_full)

    @pl.loop(0, steps.count)
    def _(n):
        slot = lax.rem(n, jnp.int32(stages))
        head, query = steps.where(n)
        rows, numbers = (at.b, pl.ds(query, TILE), head), (at.b, head, pl.ds(query, TILE))
        for tile, tiles, number, ring, full, empty in (
            (x.q, shared.q, x.lse, shared.lse, shared.q_full, shared.q_empty),
            (x.dout, shared.dout, x.delta, shared.delta, shared.dout_full, shared.dout_empty),
        ):
            pl.when(n >= stages)(functools.partial(plgpu.barrier_wait, empty.at[slot]))
            plgpu.copy_gmem_to_smem(tile.at[rows], tiles.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(number.at[numbers], ring.at[slot], full.at[slot])

    for empty in (shared.q_empty, shared.dout_empty):
        drain(empty, stages, steps.count)


class _Block(NamedTuple):
    """What a consumer knows of its block."""

    static: Static
    x: Arrays
    results: tuple[Any, Any]
    shared: Shared
    exchange: Exchange | None
    at: Place
    steps: Steps
    kv_head: Any
    owner: Any  # which of the block's keys are this warpgroup's
    tiles: BackwardTiles

    def owned(self, tile: Any) -> Callable[[Any], Any]:
        """What of k or v is this warpgroup's, for a step."""
        return owned(self.tiles, tile, self.owner)

    def weights(self, n: Any, logits: jax.Array, lse: jax.Array) -> Any:
        """The weights of step n, keys first."""
        head, query = self.steps.where(n)
        at = self.at._replace(query=query, head=head)
        return weights(self.static, self.x, at, logits, lse, queries=1)

    def of_queries(self, ring: Any, slot: Any) -> jax.Array:
        """The lse, or the deltas, of a slot's queries."""
        return plgpu.load(ring.at[slot], layout=LAYOUTS[1], optimized=False)

    def go_through(self, first: Any, add: Any, added: Any) -> None:
        """Every step: `first` gives a product, `add` issues another of what it gave.

        With three stages the next step's first product is computed beside this one's exponentials:
        with two its queries would be waited for.
        """
        count = self.steps.count
        if self.tiles.q_stages < 3:

            @pl.loop(0, count)
            def _(n):
                add(n, first(n))
                added(n)

            return

        def step(n, given):
            after = first(n + 1, functools.partial(add, n, given))
            added(n)
            return after

        @pl.when(count > 0)
        def _():
            add(count - 1, lax.fori_loop(0, count - 1, step, first(jnp.int32(0))))
            added(count - 1)

    def leave(self, sums: jax.Array, staging: Any, result: Any) -> None:
        """Sends a gradient of this warpgroup's keys off."""
        staging[...] = sums.astype(self.x.q.dtype)
        plgpu.commit_smem()
        rows = (self.at.b, pl.ds(self.at.key, TILE), self.kv_head)
        plgpu.copy_smem_to_gmem(staging, result.at[rows])
        plgpu.wait_smem_to_gmem(0)


def together(call: _Block, dv_acc: Any, dk_acc: Any) -> None:
    """A warpgroup that owns dk and dv of its 64 keys."""
    shared, dtype = call.shared, call.x.q.dtype
    none = zeros(TILE, TILE)
    plgpu.barrier_wait(shared.kv_full)
    k_of, v_of = call.owned(shared.k), call.owned(shared.v)

    @pl.loop(0, call.steps.count)
    def _(n):
        slot = lax.rem(n, jnp.int32(shared.q.shape[0]))
        q, dout = shared.q.at[slot], shared.dout.at[slot]
        k, v = k_of(n), v_of(n)

        def dlogits(logits_acc, dp_acc):
            logits_acc[...] = dp_acc[...] = none
            plgpu.wgmma(logits_acc, k, q.transpose((1, 0)))
            plgpu.wgmma(dp_acc, v, dout.transpose((1, 0)))
            lse = functools.partial(call.of_queries, shared.lse, slot)
            # Read before what it goes with is awaited, but beside a cap's slopes there is no room.
            lse = lse if call.static.soft_cap is not None else lse()
            logits = plgpu.wgmma_accumulator_load(logits_acc, wait_n=1)
            w = call.weights(n, logits, lse() if callable(lse) else lse)
            plgpu.wgmma(dv_acc, w.p.astype(dtype), dout)
            dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=1)
            delta = call.of_queries(shared.delta, slot)
            return logit_gradients(w, dp, delta, queries=1).astype(dtype)

        plgpu.barrier_wait(shared.q_full.at[slot])
        plgpu.barrier_wait(shared.dout_full.at[slot])
        acc = plgpu.ACC((TILE, TILE), jnp.float32)
        plgpu.wgmma(dk_acc, pl.run_scoped(dlogits, acc, acc), q)
        plgpu.commit_smem()  # lse and delta were read otherwise than they will be written
        plgpu.wgmma_wait(1)
        plgpu.barrier_arrive(shared.dout_empty.at[slot])
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(shared.q_empty.at[slot])

    dk, dv = call.results
    call.leave(dk_acc[...] * call.static.scale, shared.k.at[call.owner], dk)
    call.leave(dv_acc[...], shared.v.at[call.owner], dv)


def value_role(call: _Block, dv_acc: Any) -> None:
    """The warpgroup of a split block that has dv: it computes the weights, for both."""
    shared, exchange, dtype = call.shared, call.exchange, call.x.q.dtype
    stages, none = shared.q.shape[0], zeros(TILE, TILE)
    plgpu.barrier_wait(shared.kv_full)
    k_of = call.owned(shared.k)

    def logits(n, beside=None):
        slot = lax.rem(n, jnp.int32(stages))
        plgpu.barrier_wait(shared.q_full.at[slot])
        q = shared.q.at[slot]
        return product(none, k_of(n), q.transpose((1, 0)), beside)

    def add(n, s):
        tied = call.tiles.tied
        slot, turn = (tied_to(n, lax.rem(n, jnp.int32(m)), tied=tied) for m in (stages, 2))
        w = call.weights(n, s, call.of_queries(shared.lse, slot))
        pl.when(n >= 2)(functools.partial(plgpu.barrier_wait, exchange.p_empty.at[turn]))
        # What dlogits are a multiple of: the weight, and the soft cap's slope.
        exchange.p[turn] = w.p if w.slope is None else w.p * w.slope
        plgpu.barrier_arrive(exchange.p_full.at[turn])
        plgpu.barrier_wait(shared.dout_full.at[slot])
        plgpu.wgmma(dv_acc, w.p.astype(dtype), shared.dout.at[slot])
        plgpu.commit_smem()  # lse was read otherwise than it will be written
        plgpu.barrier_arrive(shared.q_empty.at[slot])

    def added(n):
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(shared.dout_empty.at[lax.rem(n, jnp.int32(stages))])

    call.go_through(logits, add, added)
    drain(exchange.p_empty, 2, call.steps.count)
    plgpu.barrier_arrive(exchange.k_free)
    plgpu.barrier_wait(exchange.v_free)
    call.leave(dv_acc[...], shared.v.at[0], call.results[1])


def key_role(call: _Block, dk_acc: Any) -> None:
    """The warpgroup of a split block that has dk."""
    shared, exchange = call.shared, call.exchange
    stages, none = shared.q.shape[0], zeros(TILE, TILE)
    plgpu.barrier_wait(shared.kv_full)
    v_of = call.owned(shared.v)

    def weight_gradients(n, beside=None):
        slot = lax.rem(n, jnp.int32(stages))
        plgpu.barrier_wait(shared.dout_full.at[slot])
        dout = shared.dout.at[slot]
        return product(none, v_of(n), dout.transpose((1, 0)), beside)

    def add(n, dp):
        slot, turn = lax.rem(n, jnp.int32(stages)), lax.rem(n, jnp.int32(2))
        plgpu.barrier_wait(exchange.p_full.at[turn])
        p = plgpu.load(exchange.p.at[turn], layout=WGMMA)
        plgpu.barrier_arrive(exchange.p_empty.at[turn])
        delta = call.of_queries(shared.delta, slot)
        ds = logit_gradients(Weights(p, None), dp, delta, queries=1)
        plgpu.commit_smem()  # delta was read otherwise than it will be written
        plgpu.barrier_arrive(shared.dout_empty.at[slot])
        plgpu.barrier_wait(shared.q_full.at[slot])
        plgpu.wgmma(dk_acc, ds.astype(call.x.q.dtype), shared.q.at[slot])

    def added(n):
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(shared.q_empty.at[lax.rem(n, jnp.int32(stages))])

    call.go_through(weight_gradients, add, added)
    plgpu.barrier_arrive(exchange.v_free)
    plgpu.barrier_wait(exchange.k_free)
    call.leave(dk_acc[...] * call.static.scale, shared.k.at[0], call.results[0])


def product(none: jax.Array, a: Any, b: Any, beside: Any = None) -> jax.Array:
    """The product a @ b; `beside` issues one more while this one is computed, and awaits none."""

    def of(acc):
        acc[...] = none
        plgpu.wgmma(acc, a, b)
        if beside is not None:
            beside()
        return plgpu.wgmma_accumulator_load(acc, wait_n=0 if beside is None else 1)

    return pl.run_scoped(of, plgpu.ACC(none.shape, jnp.float32))
