"""The forward of dense attention on Ampere: one warpgroup a block, `mma.sync`, `cp.async`.

    cp.async  Q K0 V0 | K1 V1        | K2 V2        | ..
    warps               QK0 sm0 PV0  | QK1 sm1 PV1  | QK2 ..

Each of the four warps has 16 queries of a block of 64 (or twice 16 of 128), their sums and their
online softmax in registers, as FlashAttention-2 has them (Dao, 2023); the weights go from the
layout of one product's result to that of the next one's left operand without leaving the
registers. Tiles are brought as many ahead as there are stages less one; what hides the rest is
another block on the same multiprocessor.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dense.mosaic_gpu_forward import (
    Operands,
    Place,
    along,
    empty,
    logits,
    normalised,
    slot_after,
    softmax_step,
)
from pallas_kernels.dense.mosaic_gpu_geometry import KeyTiles, Static, key_tiles

SWIZZLE = 64  # bytes: 32 columns of 16 bits are what a product takes at a time
MMA_K = 16  # of a 16-bit mma
LINE = 64  # 16-bit numbers of a line of the cache


class Shared(NamedTuple):
    """A block's shared memory: its queries (at last its results), rings of keys and of values."""

    q: Any
    k: Any
    v: Any


def forward(static: Static, x: Operands) -> tuple[jax.Array, jax.Array]:
    """The two results.

    Returns:
        out [batch, q_len in whole blocks, num_q_heads, head_dim_v]; lse float32
        [batch, num_q_heads, q_len in whole blocks].
    """
    tiles, dtype = static.tiles, x.q.dtype
    blocks = pl.cdiv(static.q_len, static.block_q)
    rows, width = blocks * static.block_q, _stored_width(static)
    x = _as_matrices(static, x)
    given = Operands(*(field is not None for field in x))

    def body(*refs):
        refs = list(refs)
        operands = Operands(*(refs.pop(0) if there else None for there in given))
        out, lse, *scratch = refs
        block(static, operands, out, lse, Shared(*scratch))

    out, lse = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((static.batch * rows, static.num_q_heads * width), dtype),
            jax.ShapeDtypeStruct((static.batch, static.num_q_heads, rows), jnp.float32),
        ),
        scratch_types=[
            swizzled(tiles.rows, width, dtype=dtype),
            swizzled(tiles.stages, tiles.block_kv, static.head_dim, dtype=dtype),
            swizzled(tiles.stages, tiles.block_kv, static.head_dim_v, dtype=dtype),
        ],
        grid=(static.batch, blocks, static.num_q_heads),
        grid_names=("batch", "block", "head"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,  # rows are reduced within a warp
        ),
        kernel_name="attnsel_dense_forward_ampere",
    )(*(field for field in x if field is not None))
    out = out.reshape(static.batch, rows, static.num_q_heads, width)
    return out[..., : static.head_dim_v], lse


def _stored_width(static: Static) -> int:
    """Columns of a head's results: Mosaic GPU stores whole lines of 128 bytes of 16-bit numbers."""
    return pl.cdiv(static.head_dim_v, LINE) * LINE


def _as_matrices(static: Static, x: Operands) -> Operands:
    """q, k and v as [batch * length, heads * size], their lengths whole tiles.

    `cp.async` takes two dimensions, and nothing here keeps it from reading past an array's end: a
    length that is not whole tiles is a copy.
    """

    def matrix(array, length, tile):
        missing = length + -length % tile - array.shape[1]
        array = jnp.pad(array, ((0, 0), (0, max(missing, 0)), (0, 0), (0, 0)))
        array = array[:, : length + -length % tile]
        return array.reshape(array.shape[0] * array.shape[1], -1)

    return x._replace(
        q=matrix(x.q, static.q_len, static.block_q),
        k=matrix(x.k, static.kv_len, static.tiles.block_kv),
        v=matrix(x.v, static.kv_len, static.tiles.block_kv),
    )


def swizzled(*shape: int, dtype) -> Any:
    """Shared memory that `cp.async` writes and `ldmatrix` reads without bank conflicts."""
    tiling = plgpu.TilingTransform((8, SWIZZLE // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(SWIZZLE)))


def bring(source: Any, target: Any) -> None:
    """One group of `cp.async`; the source lies inside its array."""
    plgpu.copy_gmem_to_smem(source, target, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)


def arrived(groups: int) -> None:
    """Waits until no more than so many groups are in flight, those sent for last."""
    plgpu.wait_gmem_to_smem(groups)


def free_slot(static: Static, slot: Any) -> Any:
    """The slot that no tile is in or on its way to, while this one is read."""
    return lax.rem(slot + (static.tiles.stages - 1), jnp.int32(static.tiles.stages))


def block(static: Static, x: Operands, out: Any, lse: Any, shared: Shared) -> None:
    """One block of the grid: its queries of a head against every key tile that they see."""
    row, b, head, index = Place.here(static, x.rows)
    first_row = index * static.block_q
    tiles = key_tiles(static, row, index, (first_row, static.block_q))
    _bring_queries(static, x, shared, b, head, first_row)
    bring_tile = functools.partial(_bring_tile, static, x, shared, b, head)
    _bring_first(static, tiles, bring_tile)
    q = left_strips(shared.q, static.head_dim)
    weigh = functools.partial(logits, static, x, row, b, head, first_row)

    def step(tile, carry, *, masked):
        acc, state, slot = carry
        _bring_ahead(static, tiles, tile, slot, bring_tile)
        ids = None
        if static.segments:
            ids = x.kv_segments.at[b, pl.ds(tile * static.tiles.block_kv, static.tiles.block_kv)]
        y, factor = weigh(products(q, shared.k.at[slot]), tile, ids, masked)
        hides = masked or static.segments or static.bias is not None
        p, alpha, state = softmax_step(y, factor, state, may_be_empty=hides)
        seen = _seen_values(static, tiles, tile) if masked else None
        acc = weighted_sum(acc * along(alpha, acc), p, shared.v.at[slot], seen)
        return acc, state, slot_after(static, slot)

    masked, bare = (functools.partial(step, masked=flag) for flag in (True, False))
    acc = sums(static.block_q, static.head_dim_v, x.q.dtype)
    carry = acc, empty(static.block_q), jnp.int32(0)
    carry = lax.fori_loop(tiles.first, tiles.inner, masked, carry)
    carry = lax.fori_loop(tiles.inner, tiles.inner_stop, bare, carry)
    acc, state, _ = lax.fori_loop(tiles.inner_stop, tiles.stop, masked, carry)
    o, log_sum = normalised(static, x, acc, state, row, head, first_row)
    lse[b, head, pl.ds(first_row, static.block_q)] = log_sum
    shared.q.at[:, pl.ds(0, static.head_dim_v)][...] = o  # the queries are done with
    _store_queries(static, shared, out, b, head, first_row)


# What is brought when.


def _rows_of(static: Static, b: Any, first_row: Any) -> Any:
    """A block's rows of q and out as matrices."""
    in_blocks = pl.cdiv(static.q_len, static.block_q) * static.block_q
    return pl.ds(b * in_blocks + first_row, static.block_q)


def _bring_queries(static: Static, x: Operands, shared: Shared, b, head, first_row) -> None:
    columns = pl.ds(head * static.head_dim, static.head_dim)
    target = shared.q.at[:, pl.ds(0, static.head_dim)]
    bring(x.q.at[_rows_of(static, b, first_row), columns], target)


def _store_queries(static: Static, shared: Shared, out: Any, b, head, first_row) -> None:
    """The results as rows of 16 bytes a thread."""
    width = shared.q.shape[1]
    layout = plgpu.Layout.SMEM_GMEM_COPY(shared.q.shape, shared.q.dtype, SWIZZLE)
    columns = pl.ds(head * width, width)
    out[_rows_of(static, b, first_row), columns] = plgpu.load(shared.q, layout=layout)


def _bring_tile(static: Static, x: Operands, shared: Shared, b, head, tile, slot) -> None:
    """A tile's keys and values: two groups."""
    block_kv = static.tiles.block_kv
    in_tiles = pl.cdiv(static.kv_len, block_kv) * block_kv
    keys = pl.ds(b * in_tiles + tile * block_kv, block_kv)
    kv_head = lax.div(head, jnp.int32(static.group))
    for source, target in ((x.k, shared.k), (x.v, shared.v)):
        size = target.shape[-1]
        bring(source.at[keys, pl.ds(kv_head * size, size)], target.at[slot])


def _bring_first(static: Static, tiles: KeyTiles, bring_tile) -> None:
    """The first tiles, one less than there are stages; the queries are there when it ends."""
    ahead = static.tiles.stages - 1
    bring_tile(tiles.first, 0)
    for i in range(1, ahead):

        @pl.when(tiles.first + i < tiles.stop)
        def _(i=i):
            bring_tile(tiles.first + i, i)

    arrived(2)


def _bring_ahead(static: Static, tiles: KeyTiles, tile, slot, bring_tile) -> None:
    """Sends for the tile that the freed slot is for, and waits for this one."""
    ahead = static.tiles.stages - 1
    more = tile + ahead < tiles.stop

    @pl.when(more)
    def _():
        bring_tile(tile + ahead, free_slot(static, slot))
        arrived(2 * ahead)

    @pl.when(jnp.logical_not(more))
    def _():
        arrived(0)


# Products.


def sums(rows: int, columns: int, dtype) -> jax.Array:
    """Zeros for products of dtype to be added to."""
    zeros = jnp.zeros((rows, columns), jnp.float32)
    return plgpu.layout_cast(zeros, plgpu.Layout.MMA_ACC(dtype))


def left_strips(ref: Any, n: int) -> list[jax.Array]:
    """The first n columns of shared memory as left operands, a swizzle's columns each."""
    width = SWIZZLE // jnp.dtype(ref.dtype).itemsize
    layout = plgpu.Layout.MMA_LHS(ref.dtype)
    return [plgpu.load(ref.at[:, pl.ds(i, width)], layout=layout) for i in range(0, n, width)]


def products(q: list[jax.Array], k: Any) -> jax.Array:
    """float32 [queries, keys] of queries in registers and keys in shared memory."""
    dtype, width = q[0].dtype, q[0].shape[1]
    s = sums(q[0].shape[0], k.shape[0], dtype)
    for i, strip in enumerate(q):
        keys = k.at[:, pl.ds(i * width, width)].transpose((1, 0))
        s = plgpu.mma(s, strip, plgpu.load(keys, layout=plgpu.Layout.MMA_RHS(dtype)))
    return s


def weighted_sum(acc: jax.Array, p: jax.Array, v: Any, seen: tuple[Any, Any] | None):
    """The sums, and p @ v; of values outside [low, high) of the tile, where given, nothing is read.

    An unseen value's weight is 0, and 0 * NaN is NaN.
    """
    layout = plgpu.Layout.MMA_RHS(v.dtype)
    p = as_left_operand(p, v.dtype)
    for i in range(0, v.shape[0], MMA_K):
        values = plgpu.load(v.at[pl.ds(i, MMA_K)], layout=layout)
        if seen is not None:
            key = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=layout) + i
            kept = (key >= seen[0]) & (key < seen[1])
            values = jnp.where(kept, values, jnp.zeros_like(values))
        acc = plgpu.mma(acc, p[:, i : i + MMA_K], values)
    return acc


def as_left_operand(p: jax.Array, dtype) -> jax.Array:
    """float32 results of a product, rounded to dtype, as the left operand of the next.

    A thread holds the same elements in either layout, and in the same order: of each 16 columns,
    those of two results side by side. Mosaic GPU has no cast between them.
    """
    left, results = plgpu.Layout.MMA_LHS(dtype), plgpu.Layout.MMA_ACC(dtype)

    @plgpu.inline_mgpu(
        arg_types=(results,),
        return_type=plgpu.ShapeDtypeStruct(p.shape, dtype, layout=left),
    )
    def rounded_as_left_operand(_, array):
        rounded = array.astype(mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype)))
        layout = left.to_mgpu()
        registers = rounded.registers.reshape(layout.registers_shape(rounded.shape))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return rounded_as_left_operand(p)


def _seen_values(static: Static, tiles: KeyTiles, tile: Any) -> tuple[Any, Any]:
    first_key = tile * static.tiles.block_kv
    return tiles.low - first_key, tiles.high - first_key
