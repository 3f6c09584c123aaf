"""What a warpgroup does with 128 rows of logits in TMEM: masks, online softmax, the results.

A thread has a row: maxima and sums need no other thread. Logits are taken in strips of columns, so
that what masks a strip does not live beside the whole tile.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.dense.mosaic_gpu_forward import Operands
from pallas_kernels.dense.mosaic_gpu_geometry import LOG2E, Row, Static, seen_interval

NATIVE = plgpu.Layout.TCGEN05_TMEM_NATIVE  # a row a thread
ROW = NATIVE.reduce(1)
COLUMN = NATIVE.reduce(0)
STORED = plgpu.Layout.TCGEN05  # what swizzled shared memory takes
# Sums are brought to a new maximum only where it is larger by a factor of over 2^8: float16 holds
# weights up to 2^16, and float32 sums of them.
SLACK = 8.0
STRIP, NARROW = 32, 16  # columns; with slopes strips of 32 spill
# A positive float32 is a positive integer. The barrier is the warpgroup's, as Mosaic GPU counts.
VOTE = (
    "{ .reg .pred p; setp.gt.s32 p, $1, 0; bar.red.or.pred p, $2, 128, p; selp.s32 $0, 1, 0, p; }"
)


class Rows(NamedTuple):
    """Which queries: row of the batch and its lengths, head, the first query."""

    row: Row
    b: Any
    head: Any
    first: Any


class Softmax(NamedTuple):
    """The online softmax of a warpgroup's rows: what weights are relative to (log2), their sum."""

    m: jax.Array
    l: jax.Array


def _full(static: Static, value: float) -> jax.Array:
    return plgpu.layout_cast(jnp.full((static.tiles.rows,), value, jnp.float32), ROW)


def empty(static: Static) -> Softmax:
    """The state before the first tile."""
    return Softmax(_full(static, -jnp.inf), _full(static, 0.0))


def _along(rows: Any, shape: tuple[int, int]) -> Any:
    """A number for each row, as wide as a strip."""
    if jnp.ndim(rows) == 0:
        return rows
    return lax.broadcast_in_dim(plgpu.layout_cast(rows, ROW), shape, [0])


def _across(columns: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return lax.broadcast_in_dim(plgpu.layout_cast(columns, COLUMN), shape, [1])


def _strips(width: int, strip: int = STRIP):
    return [pl.ds(begin, min(strip, width - begin)) for begin in range(0, width, strip)]


def weigh(static, x, shared, at: Rows, i: int, tile, slot, state: Softmax, *, masked, first):
    """Logits of a key tile become weights, in their place; sums are brought to their maximum.

    Logits are read twice, for a tile of them and its weights are more than a thread's registers.
    Weights are stored when all logits are read: the interpreter's rows of both do not lie alike.
    """
    s, p, o = shared.tmem[i]
    strips = _strips(static.tiles.block_kv, NARROW if static.alibi else STRIP)
    plain = not (masked or _changes_logits(static))
    maxima, factor = [], static.scale * LOG2E
    for strip in strips:
        y = plgpu.async_load_tmem(s.at[:, strip], layout=NATIVE)
        plgpu.wait_load_tmem()
        if not plain:
            y, factor = _logits(static, x, shared, at, tile, slot, strip, y, masked)
            plgpu.async_store_tmem(s.at[:, strip], y)
        maxima.append(y.max(axis=1))
    if not plain:
        plgpu.commit_tmem()
    top = functools.reduce(jnp.maximum, maxima) * factor
    m, total = _brought_to(o, state, top, first)
    shift = jnp.where(m == -jnp.inf, 0.0, m)
    weights = []
    for strip in strips:
        y = plgpu.async_load_tmem(s.at[:, strip], layout=NATIVE)
        plgpu.wait_load_tmem()  # or the compiler begins all loads at once, and spills
        w = jnp.exp2(y * factor - _along(shift, y.shape))
        total = total + w.sum(axis=1)
        weights.append(w.astype(x.q.dtype))
    for strip, w in zip(strips, weights, strict=True):
        plgpu.async_store_tmem(p.at[:, strip], w)
    plgpu.commit_tmem()
    return Softmax(m, total)


def _changes_logits(static: Static) -> bool:
    """Whether something other than positions is done to logits."""
    added = static.segments or static.bias is not None or static.alibi
    return added or static.soft_cap is not None


def _brought_to(o: Any, state: Softmax, top: jax.Array, first: jax.Array) -> Softmax:
    """The state, and the sums in TMEM, relative to a maximum that does for these new ones too."""
    grown = jnp.where(top > state.m + SLACK, 1.0, 0.0)

    def grow():
        m = jnp.maximum(state.m, top)
        alpha = jnp.exp2(state.m - jnp.where(m == -jnp.inf, 0.0, m))  # -inf - -inf is NaN

        @pl.when(jnp.logical_not(first))
        def _():
            for strip in _strips(o.shape[1]):
                part = plgpu.async_load_tmem(o.at[:, strip], layout=NATIVE)
                plgpu.wait_load_tmem()
                plgpu.async_store_tmem(o.at[:, strip], part * _along(alpha, part.shape))

        return Softmax(m, state.l * alpha)

    return lax.cond(_any_row(grown) > 0, grow, lambda: state)


def _any_row(flags: jax.Array) -> jax.Array:
    """int32 []: 1 where a row's float32 flag is above 0, by a vote at the warpgroup's barrier.

    A maximum over rows would go through shared memory at an address that is a constant; beside
    addresses that are not, ptxas keeps the memory's base on the stack.
    """

    @plgpu.inline_mgpu(
        arg_types=(ROW,),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(())),
    )
    def above_0_in_any_row(_, array):
        i32 = ir.IntegerType.get_signless(32)
        (bits,) = (mgpu.utils.bitcast(register, i32) for register in array.registers.flat)
        barrier = arith.addi(mgpu.utils.warpgroup_idx(sync=False), mgpu.utils.c(1, i32))
        vote = llvm.inline_asm(i32, [bits, barrier], VOTE, "=r,r,r", has_side_effects=True)
        return mgpu.FragmentedArray.splat(vote, (), is_signed=True)

    return above_0_in_any_row(plgpu.layout_cast(flags, ROW))


def _logits(static, x: Operands, shared, at: Rows, tile, slot, strip, s, masked):
    """(y, factor): logits in units of log2 are y * factor; -inf where the row does not see."""
    first_key, shape = tile * static.tiles.block_kv + strip.start, s.shape
    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, shape, layout=NATIVE)
    factor = static.scale
    if static.soft_cap is not None:
        # tanh by exp2: MUFU.TANH is good to 11 bits only.
        e = jnp.exp2(s * (2 * LOG2E * factor / static.soft_cap))
        s, factor = 1.0 - 2.0 / (e + 1.0), static.soft_cap
    unit = LOG2E
    if static.bias is not None:  # in units of log2 before they are rounded, as on Hopper
        bias = _bias_strip(static, x.bias, at, first_key, shape)
        s, factor, unit = s * (factor * LOG2E) + bias * LOG2E, 1.0, 1.0
    elif static.alibi:
        s, factor = s * factor, 1.0
    if static.alibi:
        distance = (iota(0) - iota(1)) + (at.first + at.row.offset - first_key)
        apart = jnp.abs(distance).astype(jnp.float32)
        s = s - apart * (x.slopes[at.head] * (LOG2E / unit))
    if static.segments:
        rows = pl.ds(at.first, static.tiles.rows)
        mine = plgpu.load(x.q_segments.at[at.b, rows], layout=ROW, optimized=False)
        theirs = plgpu.load(shared.segments.at[slot, strip], layout=COLUMN, optimized=False)
        s = jnp.where(_along(mine, shape) == _across(theirs, shape), s, -jnp.inf)
    if masked:
        low, high = 0, at.row.kv_len
        if static.positional:  # a dead vector has no layout
            low, high = seen_interval(static, at.row, _queries(static, at))
        column = iota(1) + first_key
        seen = column < _along(high, shape)
        if jnp.ndim(low):
            seen = seen & (column >= _along(low, shape))
        s = jnp.where(seen, s, -jnp.inf)
    return s, factor * unit


def _queries(static: Static, at: Rows) -> jax.Array:
    rows = plgpu.broadcasted_iota(jnp.int32, (static.tiles.rows,), 0, layout=ROW)
    return rows + at.first


def _bias_strip(static, bias, at: Rows, first_key, shape):
    """The bias of a strip, float32."""
    b, head = (i if full else 0 for i, full in zip((at.b, at.head), static.bias[:2], strict=True))
    rows, keys = pl.ds(at.first, shape[0]), pl.ds(first_key, shape[1])
    load = functools.partial(plgpu.load, optimized=False)
    if static.bias[2]:
        strip = load(bias.at[b, head, rows, keys], layout=NATIVE)
    else:
        strip = _across(load(bias.at[b, head, 0, keys], layout=COLUMN), shape)
    return strip.astype(jnp.float32)


def epilogue(static, x: Operands, shared, at: Rows, i: int, state: Softmax, out, lse) -> None:
    """Normalises, with the sink in the sum; queries that do not exist give 0 and -inf.

    Where the call is corrected, for lse the maximum, in units of log2, and the sum, 0 of nothing.
    """
    m, l = state
    rest = _full(static, 1.0)
    if static.sinks:
        sink = x.sinks[at.head] * LOG2E
        top = jnp.maximum(m, sink)
        shift = jnp.where(top == -jnp.inf, 0.0, top)  # -inf - -inf is NaN
        rest = jnp.exp2(m - shift)
        m, l = top, l * rest + jnp.exp2(sink - shift)
    exists = (_queries(static, at) < at.row.q_len) & (l != 0.0)
    if static.corrected:
        numbers = [m, jnp.where(exists, l, 0.0)]
    else:
        log_sum = m * (1 / LOG2E) + jnp.log(jnp.where(exists, l, 1.0))
        numbers = [jnp.where(exists, log_sum, -jnp.inf)]
    for mine, number in enumerate(numbers):
        shared.lse[i + mine * static.tiles.consumers, :] = number
    shared.inverse[i, :] = jnp.where(exists, rest / jnp.where(exists, l, 1.0), 0.0)
    inverse = plgpu.load(shared.inverse.at[i], layout=STORED.reduce(1), optimized=False)
    staged = shared.q.at[i]  # the queries are done with
    for strip in _strips(static.head_dim_v, plgpu.find_swizzle(static.head_dim * 16) // 2):
        part = plgpu.async_load_tmem(shared.tmem[i].o.at[:, strip], layout=STORED)
        wide = lax.broadcast_in_dim(inverse, part.shape, [0])
        staged[:, strip] = jnp.where(wide == 0.0, 0.0, part * wide).astype(x.q.dtype)
    plgpu.commit_smem()
    # Rows of queries longer than the output's lie apart: then only 8 of them are one copy.
    height = static.tiles.rows if static.head_dim == static.head_dim_v else 8
    for begin in range(0, static.tiles.rows, height):
        here, there = pl.ds(begin, height), pl.ds(at.first + begin, height)
        part = staged.at[here, pl.ds(0, static.head_dim_v)]
        plgpu.copy_smem_to_gmem(part, out.at[at.b, there, at.head])
    rows = pl.ds(at.first, static.tiles.rows)
    for mine in range(static.rows_of_lse):
        there = lse.at[at.b, at.head + mine * static.num_q_heads, rows]
        plgpu.copy_smem_to_gmem(shared.lse.at[i + mine * static.tiles.consumers], there)
    plgpu.wait_smem_to_gmem(0)
