"""The softmax of the forwards whose products lie in registers: logits, weights, results."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.dense.mosaic_gpu_distance import distance
from pallas_kernels.dense.mosaic_gpu_geometry import LOG2E, seen_interval

ROW = plgpu.Layout.WGMMA.reduce(1)
COLUMN = plgpu.Layout.WGMMA.reduce(0)
# Sums are brought to a new maximum only where it is larger by a factor of over 2^8: float16 holds
# weights up to 2^16, and float32 sums of them.
SLACK = 8.0
# A positive float32 is a positive integer.
VOTE = "{ .reg .pred p; setp.gt.s32 p, $1, 0; vote.sync.any.pred p, p, -1; selp.s32 $0, 1, 0, p; }"


class Softmax(NamedTuple):
    """The online softmax of a warpgroup's rows: running max (log2), running sum."""

    m: jax.Array
    l: jax.Array


def full(shape, value, layout):
    """float32 of one value in a layout."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def empty(rows: int) -> Softmax:
    """The state of rows before their first tile."""
    return Softmax(full((rows,), -jnp.inf, ROW), full((rows,), 0.0, ROW))


def _row_iota(rows: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=ROW)


def along(rows: jax.Array, like: jax.Array) -> jax.Array:
    """A number for each row, as wide as `like`."""
    if jnp.ndim(rows) == 0:
        return rows
    return lax.broadcast_in_dim(plgpu.layout_cast(rows, ROW), like.shape, [0])


def _across(columns: jax.Array, like: jax.Array) -> jax.Array:
    return lax.broadcast_in_dim(plgpu.layout_cast(columns, COLUMN), like.shape, [1])


def logits(static, x, row, b, head, first_row, s, tile, segments, masked):
    """(y, factor): logits in units of log2 are y * factor; -inf where the row does not see.

    s: float32 [queries, keys], products of the queries from first_row and the keys of a tile, as
    wgmma and mma lay them out; segments: a ref of these keys' segment ids, None without.
    """
    first_key, shape = tile * static.tiles.block_kv, s.shape
    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, shape, layout=plgpu.Layout.WGMMA)
    factor = static.scale
    if static.soft_cap is not None:
        # tanh by exp2: MUFU.TANH is good to 11 bits only.
        e = jnp.exp2(s * (2 * LOG2E * factor / static.soft_cap))
        s, factor = 1.0 - 2.0 / (e + 1.0), static.soft_cap
    unit = LOG2E
    if static.bias is not None:
        # In units of log2 before they are rounded: a product less the maximum is one instruction,
        # which does not round the product, and of -1e9 that is a factor of 2^18.
        bias = _bias_tile(static, x.bias, b, head, first_row, first_key, s)
        s, factor, unit = s * (factor * LOG2E) + bias * LOG2E, 1.0, 1.0
    elif static.alibi:
        s, factor = s * factor, 1.0
    if static.alibi:
        apart = distance(first_row + row.offset - first_key, shape, tile)
        s = s - apart * (x.slopes[head] * (LOG2E / unit))
    if static.segments:
        queries = x.q_segments.at[b, pl.ds(first_row, shape[0])]
        mine = plgpu.load(queries, layout=ROW, optimized=False)
        theirs = plgpu.load(segments, layout=COLUMN, optimized=False)
        s = jnp.where(along(mine, s) == _across(theirs, s), s, -jnp.inf)
    if masked:
        low, high = 0, row.kv_len
        if static.positional:  # a dead vector has no layout, and inferring one takes for ever
            low, high = seen_interval(static, row, _row_iota(shape[0]) + first_row)
        column = iota(1) + first_key
        seen = column < along(high, s)
        if jnp.ndim(low):
            seen = seen & (column >= along(low, s))
        s = jnp.where(seen, s, -jnp.inf)
    return s, factor * unit


def _bias_tile(static, bias, b, head, first_row, first_key, like):
    """The bias of a tile, float32, as wide as it is."""
    b, head = (i if full else 0 for i, full in zip((b, head), static.bias[:2], strict=True))
    rows, keys = pl.ds(first_row, like.shape[0]), pl.ds(first_key, static.tiles.block_kv)
    load = functools.partial(plgpu.load, optimized=False)
    if static.bias[2]:
        tile = load(bias.at[b, head, rows, keys], layout=plgpu.Layout.WGMMA)
    else:
        tile = _across(load(bias.at[b, head, 0, keys], layout=COLUMN), like)
    return tile.astype(jnp.float32)


def softmax_step(y, factor: float, state: Softmax, may_be_empty: bool = True, slack: float = 0.0):
    """(weights of a tile, what earlier sums are multiplied by, the state after it).

    `may_be_empty`: whether a row may have seen no key yet, this tile's included; `slack`: by how
    much (log2) logits may be above what weights are relative to, before that grows.
    """
    top = y.max(axis=1) * factor
    m = jnp.where(top > state.m + slack, top, state.m) if slack else jnp.maximum(state.m, top)
    shift = jnp.where(m == -jnp.inf, 0.0, m) if may_be_empty else m  # -inf - -inf is NaN
    alpha = jnp.exp2(state.m - shift)
    p = jnp.exp2(y * factor - along(shift, y))
    return p, alpha, Softmax(m, state.l * alpha + p.sum(axis=1))


def rescaled(acc: jax.Array, alpha: jax.Array) -> jax.Array:
    """Sums times a number of their rows: nothing to do for a warp whose rows all have a 1."""
    changes = _any_row(jnp.where(alpha == 1.0, 0.0, 1.0))
    return lax.cond(changes > 0, lambda: acc * along(alpha, acc), lambda: acc)


def _any_row(flags: jax.Array) -> jax.Array:
    """int32 []: 1 where a float32 flag of a row that this warp has is above 0; no barrier."""

    @plgpu.inline_mgpu(
        arg_types=(ROW,),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(())),
    )
    def above_0_in_any_row(_, array):
        i32 = ir.IntegerType.get_signless(32)
        bits = [mgpu.utils.bitcast(register, i32) for register in array.registers.flat]
        either = functools.reduce(arith.ori, bits)
        vote = llvm.inline_asm(i32, [either], VOTE, "=r,r", has_side_effects=True)
        return mgpu.FragmentedArray.splat(vote, (), is_signed=True)

    return above_0_in_any_row(plgpu.layout_cast(flags, ROW))


def normalised(static, x, acc, state, row, head, first_row) -> tuple[jax.Array, list[jax.Array]]:
    """(out, [lse]), with the sink in the sum; queries that do not exist give 0 and -inf.

    Where the call is corrected, (out, [maximum, in units of log2, and sum, 0 of nothing]).
    """
    m, l = state
    if static.sinks:
        sink = x.sinks[head] * LOG2E
        top = jnp.maximum(m, sink)
        shift = jnp.where(top == -jnp.inf, 0.0, top)  # -inf - -inf is NaN
        rest = jnp.exp2(m - shift)
        m, l, acc = top, l * rest + jnp.exp2(sink - shift), acc * along(rest, acc)
    rows = _row_iota(acc.shape[0]) + first_row
    exists = (rows < row.q_len) & (l != 0.0)
    inverse = jnp.where(exists, 1.0 / jnp.where(exists, l, 1.0), 0.0)
    o = jnp.where(along(exists, acc), acc * along(inverse, acc), 0.0)
    if static.corrected:
        return o.astype(x.q.dtype), [m, jnp.where(exists, l, 0.0)]
    log_sum = m * (1 / LOG2E) + jnp.log(jnp.where(exists, l, 1.0))
    return o.astype(x.q.dtype), [jnp.where(exists, log_sum, -jnp.inf)]
