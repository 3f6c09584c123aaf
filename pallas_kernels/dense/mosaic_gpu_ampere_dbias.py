"""The gradient of a bias by `mma.sync`, on Ampere and Blackwell: a block owns a tile of the bias.

    copies     q, dout, k, v of step i + stages - 1      cp.async; TMA on Blackwell
    4 warps    q k', dout v' | weights from lse | sums += dlogits      64 queries x 64 keys

It adds up what shares its tile. What it owns and goes through is what it is on Hopper
(`mosaic_gpu_dbias`), but for its 64 queries. What hides the copies is another block on the same
multiprocessor, or another stage.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gpu_chip
from pallas_kernels.dense.mosaic_gpu_ampere import swizzle_of
from pallas_kernels.dense.mosaic_gpu_ampere_backward import load_numbers
from pallas_kernels.dense.mosaic_gpu_dbias import shares, steps_of
from pallas_kernels.dense.mosaic_gpu_geometry import Static, row_of
from pallas_kernels.dense.mosaic_gpu_mma_copies import COPIES
from pallas_kernels.dense.mosaic_gpu_tiles import BackwardTiles
from pallas_kernels.dense.mosaic_gpu_weights import TILE, Arrays, Place, logit_gradients, weights
from pallas_kernels.gpu_mma import SWIZZLE, left_strips, products, sums, swizzled


class Shared(NamedTuple):
    """Rings of tiles; at the end the sums, on their way to whole lines of memory."""

    q: Any  # [stages, TILE, head_dim]
    dout: Any
    k: Any
    v: Any
    sums: Any  # [TILE, TILE] in the result's dtype, None without queries
    copies: Any  # `mosaic_gpu_mma_copies`


def bias_gradient(static: Static, x: Arrays, dtype: Any, tiles: BackwardTiles) -> jax.Array:
    """The gradient of a bias whose last dimension is full: `mosaic_gpu_dbias.bias_gradient`.

    A bias without queries has one part, float32 [batch, num_q_heads, 1, at least kv_len].
    """
    by_query, stages = static.bias[2], tiles.bias_stages
    owned, sharers = shares(static)
    query_blocks = pl.cdiv(static.q_len, TILE) if by_query else 1
    key_blocks = pl.cdiv(static.kv_len, TILE)
    shape = (*owned, query_blocks * TILE if by_query else 1, key_blocks * TILE)
    means = COPIES[static.capability]
    x = means.arrays(static, x)
    given = Arrays(*(field is not None for field in x))

    def body(sharers: Any, *refs: Any) -> None:
        refs = list(refs)
        arrays = Arrays(*(refs.pop(0) if there else None for there in given))
        result, *rings = refs[:5]
        sums, *barriers = refs[5:] if by_query else (None, *refs[5:])
        block(static, arrays, result, Shared(*rings, sums, means(barriers)), sharers)

    tile = functools.partial(swizzled, dtype=x.q.dtype, swizzle=swizzle_of(static))
    tiles_of = [tile(stages, TILE, size) for size in (static.head_dim, static.head_dim_v) * 2]
    return gpu_chip.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(shape, dtype if by_query else jnp.float32),
        scratch_types=[
            *tiles_of,
            *[swizzled(TILE, TILE, dtype=dtype)] * by_query,
            *means.barrier_types(stages, 4),
        ],
        grid=(*owned, query_blocks, key_blocks),
        grid_names=("batch", "head", "query", "key"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="attnsel_dense_dbias_mma",
    )(sharers, *(field for field in x if field is not None))


def block(static: Static, x: Arrays, result: Any, shared: Shared, sharers: Any) -> None:
    """One block of the grid: a tile of the bias, and everything that shares it."""
    key = lax.axis_index("key") * TILE
    steps = steps_of(static, x, sharers, key, TILE)

    def bring_step(n, slot):
        b, head, query = steps.where(n)
        kv_head = lax.div(head, jnp.int32(static.group))
        q, dout, k, v = (ring.at[slot] for ring in shared[:4])
        bring = shared.copies.bring
        bring(static.q_len, b, query, head, (x.q, x.dout), (q, dout), slot)
        bring(static.kv_len, b, key, kv_head, (x.k, x.v), (k, v), slot)

    ring = shared.copies.ring(shared.q.shape[0], steps.count, 4, bring_step)
    ring.begin()
    strips = functools.partial(left_strips, swizzle=swizzle_of(static))

    def step(n, total):
        slot = ring.slot_of(n)
        q, dout, k, v = (ring.at[slot] for ring in shared[:4])
        b, head, query = steps.where(n)
        at = Place(b, row_of(static, x.rows, b), query, key, head)
        numbers = b, head, pl.ds(query, TILE)
        lse, delta = (load_numbers(rows.at[numbers], 0) for rows in (x.lse, x.delta))
        w = weights(static, x, at, products(strips(q, static.head_dim), k), lse, queries=0)
        dp = products(strips(dout, static.head_dim_v), v)
        return total + logit_gradients(w._replace(slope=None), dp, delta, queries=0)

    total = lax.fori_loop(0, steps.count, step, sums(TILE, TILE, x.q.dtype))
    b, head, index = (lax.axis_index(name) for name in ("batch", "head", "query"))
    keys = pl.ds(key, TILE)
    if shared.sums is not None:
        shared.sums[...] = total.astype(result.dtype)
        layout = plgpu.Layout.SMEM_GMEM_COPY((TILE, TILE), result.dtype, SWIZZLE)
        whole = plgpu.load(shared.sums, layout=layout)
        result[b, head, pl.ds(index * TILE, TILE), keys] = whole
    else:
        result[b, head, 0, keys] = total.sum(axis=0)
