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
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gpu_chip
from pallas_kernels.dense.mosaic_gpu_forward import Operands
from pallas_kernels.dense.mosaic_gpu_geometry import KeyTiles, Static, key_tiles
from pallas_kernels.dense.mosaic_gpu_plan import Place
from pallas_kernels.dense.mosaic_gpu_softmax import (
    along,
    empty,
    logits,
    normalised,
    softmax_step,
)
from pallas_kernels.gpu_mma import (
    SWIZZLE,
    Ring,
    bring,
    left_strips,
    products,
    sums,
    swizzled,
    weighted_sum,
)

LINE = 64  # 16-bit numbers of a line of the cache
KEPT = 128  # the largest head size whose queries stay in registers


class Shared(NamedTuple):
    """A block's shared memory: its queries (at last its results), rings of keys and of values."""

    q: Any
    k: Any
    v: Any


def forward(static: Static, x: Operands) -> tuple[jax.Array, jax.Array]:
    """The two results.

    Returns:
        out [batch, q_len in whole blocks, num_q_heads, head_dim_v]; lse float32
        `static.lse_shape`.
    """
    tiles, dtype = static.tiles, x.q.dtype
    blocks = pl.cdiv(static.q_len, static.block_q)
    rows, width = blocks * static.block_q, stored_width(static.head_dim_v)
    x = _as_matrices(static, x)
    given = Operands(*(field is not None for field in x))
    tile = functools.partial(swizzled, dtype=dtype, swizzle=swizzle_of(static))

    def body(*refs):
        refs = list(refs)
        operands = Operands(*(refs.pop(0) if there else None for there in given))
        out, lse, *scratch = refs
        block(static, operands, out, lse, Shared(*scratch))

    out, lse = gpu_chip.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((static.batch * rows, static.num_q_heads * width), dtype),
            jax.ShapeDtypeStruct(static.lse_shape, jnp.float32),
        ),
        scratch_types=[
            tile(tiles.rows, max(width, static.head_dim)),
            tile(tiles.stages, tiles.block_kv, static.head_dim),
            tile(tiles.stages, tiles.block_kv, static.head_dim_v),
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


def stored_width(size: int) -> int:
    """Columns of a head's results: Mosaic GPU stores whole lines of 128 bytes of 16-bit numbers."""
    return pl.cdiv(size, LINE) * LINE


def as_matrix(array: jax.Array, length: int, tile: int) -> jax.Array:
    """[batch, length or more, heads, size] as [batch * length, heads * size], in whole tiles.

    `cp.async` takes two dimensions, and nothing here keeps it from reading past an array's end: a
    length that is not whole tiles is a copy.
    """
    missing = length + -length % tile - array.shape[1]
    array = jnp.pad(array, ((0, 0), (0, max(missing, 0)), (0, 0), (0, 0)))
    array = array[:, : length + -length % tile]
    return array.reshape(array.shape[0] * array.shape[1], -1)


def _as_matrices(static: Static, x: Operands) -> Operands:
    return x._replace(
        q=as_matrix(x.q, static.q_len, static.block_q),
        k=as_matrix(x.k, static.kv_len, static.tiles.block_kv),
        v=as_matrix(x.v, static.kv_len, static.tiles.block_kv),
    )


def swizzle_of(static: Static) -> int:
    """Bytes of a head's columns that lie together: head size 80 is not a multiple of 32."""
    return SWIZZLE if static.head_dim * 2 % SWIZZLE == 0 else SWIZZLE // 2


def block(static: Static, x: Operands, out: Any, lse: Any, shared: Shared) -> None:
    """One block of the grid: its queries of a head against every key tile that they see."""
    row, b, head, index = Place.here(static, x.rows, lax.axis_index("head"))
    first_row = index * static.block_q
    tiles = key_tiles(static, row, index, (first_row, static.block_q))
    _bring_queries(static, x, shared, b, head, first_row)
    bring_tile = functools.partial(_bring_tile, static, x, shared, b, head, tiles.first)
    ring = Ring(static.tiles.stages, tiles.stop - tiles.first, 2, bring_tile)
    ring.begin()
    queries = functools.partial(left_strips, shared.q, static.head_dim, swizzle_of(static))
    kept = queries() if static.head_dim <= KEPT else None
    weigh = functools.partial(logits, static, x, row, b, head, first_row)

    def step(tile, carry, *, masked):
        acc, state = carry
        slot = ring.slot_of(tile - tiles.first)
        ids = None
        if static.segments:
            ids = x.kv_segments.at[b, pl.ds(tile * static.tiles.block_kv, static.tiles.block_kv)]
        y, factor = weigh(products(kept or queries(), shared.k.at[slot]), tile, ids, masked)
        hides = masked or static.segments or static.bias is not None
        p, alpha, state = softmax_step(y, factor, state, may_be_empty=hides)
        seen = _seen_values(static, tiles, tile) if masked else None
        acc = weighted_sum(acc * along(alpha, acc), p, shared.v.at[slot], seen)
        return acc, state

    masked, bare = (functools.partial(step, masked=flag) for flag in (True, False))
    acc = sums(static.block_q, static.head_dim_v, x.q.dtype)
    carry = acc, empty(static.block_q)
    carry = lax.fori_loop(tiles.first, tiles.inner, masked, carry)
    carry = lax.fori_loop(tiles.inner, tiles.inner_stop, bare, carry)
    acc, state = lax.fori_loop(tiles.inner_stop, tiles.stop, masked, carry)
    o, numbers = normalised(static, x, acc, state, row, head, first_row)
    for i, number in enumerate(numbers):
        lse[b, head + i * static.num_q_heads, pl.ds(first_row, static.block_q)] = number
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
    width = stored_width(static.head_dim_v)
    staged = shared.q.at[:, pl.ds(0, width)]
    shape, dtype = (static.block_q, width), shared.q.dtype
    layout = plgpu.Layout.SMEM_GMEM_COPY(shape, dtype, swizzle_of(static))
    columns = pl.ds(head * width, width)
    out[_rows_of(static, b, first_row), columns] = plgpu.load(staged, layout=layout)


def _bring_tile(static: Static, x: Operands, shared: Shared, b, head, first, n, slot) -> None:
    """Keys and values of the n-th tile from the first on: two groups."""
    block_kv = static.tiles.block_kv
    in_tiles = pl.cdiv(static.kv_len, block_kv) * block_kv
    keys = pl.ds(b * in_tiles + (first + n) * block_kv, block_kv)
    kv_head = lax.div(head, jnp.int32(static.group))
    for source, target in ((x.k, shared.k), (x.v, shared.v)):
        size = target.shape[-1]
        bring(source.at[keys, pl.ds(kv_head * size, size)], target.at[slot])


def _seen_values(static: Static, tiles: KeyTiles, tile: Any) -> tuple[Any, Any]:
    first_key = tile * static.tiles.block_kv
    return tiles.low - first_key, tiles.high - first_key
