"""The backward of dense attention on Ampere: dq, then dk and dv; one warpgroup a block.

    dq        64 queries:  q k', dout v' | weights from lse | dlogits | dq += dlogits k
                                                                        and sums over keys
    dk, dv    64 keys:     k q' | weights | dv += p dout | v dout' | dlogits | dk += dlogits q

Logits of dk and dv lie keys first, so that weights and dlogits are left operands as they leave the
registers. What a block owns stays in shared memory and is read again for each tile: beside two
tiles of sums there are no registers for it. Weights, masks and the order of steps are those of the
kernels for Hopper; each sum is added up by one block in one order.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gpu_chip
from pallas_kernels.dense.mosaic_gpu_ampere import as_matrix, stored_width, swizzle_of
from pallas_kernels.dense.mosaic_gpu_dkv import Steps, steps_of
from pallas_kernels.dense.mosaic_gpu_dq import QueryGradients, seen_tiles, sums_over_keys
from pallas_kernels.dense.mosaic_gpu_geometry import Static, row_of
from pallas_kernels.dense.mosaic_gpu_tiles import BackwardTiles
from pallas_kernels.dense.mosaic_gpu_weights import (
    LAYOUTS,
    TILE,
    Arrays,
    Place,
    Weights,
    logit_gradients,
    weights,
)
from pallas_kernels.gpu_addresses import tied_to
from pallas_kernels.gpu_mma import (
    Ring,
    bring,
    left_strips,
    products,
    sums,
    swizzled,
    weighted_sum,
)


class Shared(NamedTuple):
    """Two tiles that a block owns, [64, whole lines], and rings of two, [stages, tile, head_dim].

    dq: q and dout owned, rings of k and v. dk and dv: k and v owned, rings of q and dout.
    """

    mine: tuple[Any, Any]
    rings: tuple[Any, Any]


def query_gradients(static: Static, x: Arrays, tiles: BackwardTiles) -> QueryGradients:
    """dq, and the same dlogits' sums: `mosaic_gpu_dq.query_gradients`, on Ampere."""
    ring, like = (tiles.k_stages, tiles.block_kv), [x.lse] * static.alibi
    dq, *found = _launched(static, x, _dq_block, (x.q,), ring, "attnsel_dense_dq_ampere", like)
    return QueryGradients(dq, x.delta, found[0] if static.alibi else None)


def key_gradients(static: Static, x: Arrays, tiles: BackwardTiles) -> tuple[jax.Array, jax.Array]:
    """Dk and dv, like k and v: `mosaic_gpu_dkv.key_gradients`, on Ampere."""
    ring = tiles.q_stages, tiles.block_q
    return _launched(static, x, _dkv_block, (x.k, x.v), ring, "attnsel_dense_dkv_ampere")


def _launched(
    static: Static, x: Arrays, block: Any, like: Any, ring: Any, name: str, sums_like: Any = ()
) -> Any:
    """Gradients like some of the arrays, whose blocks of 64 rows the grid goes through; sums."""
    batch, length, heads, _ = like[0].shape
    blocks = pl.cdiv(length, TILE)
    x = as_matrices(static, x)
    given = Arrays(*(field is not None for field in x))

    def body(*refs: Any) -> None:
        refs = list(refs)
        arrays = Arrays(*(refs.pop(0) if there else None for there in given))
        results = [refs.pop(0) for _ in (*like, *sums_like)]
        block(static, arrays, results, Shared(tuple(refs[:2]), tuple(refs[2:])))

    sizes = static.head_dim, static.head_dim_v
    tile = functools.partial(swizzled, dtype=x.q.dtype, swizzle=swizzle_of(static))
    matrices = [
        jax.ShapeDtypeStruct((batch * blocks * TILE, heads * stored_width(a.shape[3])), a.dtype)
        for a in like
    ]
    results = gpu_chip.kernel(
        body,
        out_type=(*matrices, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in sums_like)),
        scratch_types=[
            *(tile(TILE, stored_width(size)) for size in sizes),
            *(tile(*ring, size) for size in sizes),
        ],
        grid=(batch, blocks, heads),
        grid_names=("batch", "block", "head"),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        kernel_name=name,
    )(*(field for field in x if field is not None))
    gradients = (
        g.reshape(batch, blocks * TILE, heads, -1)[:, :length, :, : a.shape[3]]
        for g, a in zip(results, like, strict=False)
    )
    return *gradients, *results[len(like) :]


def as_matrices(static: Static, x: Arrays) -> Arrays:
    """The arrays, those of queries and of keys in whole tiles of rows."""
    lengths = {"q": static.q_len, "dout": static.q_len, "k": static.kv_len, "v": static.kv_len}
    return x._replace(
        **{name: as_matrix(getattr(x, name), length, TILE) for name, length in lengths.items()}
    )


def _dq_block(static: Static, x: Arrays, results: Any, shared: Shared) -> None:
    """64 queries of a head, and the keys that they see."""
    b, head, index = (lax.axis_index(name) for name in ("batch", "head", "block"))
    if static.causal:  # the longest first
        index = pl.cdiv(static.q_len, TILE) - 1 - index
    at = Place(b, row_of(static, x.rows, b), index * TILE, jnp.int32(0), head)
    kv_head = lax.div(head, jnp.int32(static.group))
    rings, (q, dout) = shared.rings, _without_padding(static, shared.mine)
    keys = rings[0].shape[1]
    tiles = seen_tiles(static, at, TILE, keys)
    bring_rows(static.q_len, b, at.query, head, (x.q, x.dout), (q, dout))

    def bring_tile(n, slot):
        key = (tiles.first + n) * keys
        bring_rows(static.kv_len, b, key, kv_head, (x.k, x.v), [ring.at[slot] for ring in rings])

    ring = Ring(rings[0].shape[0], tiles.count, 2, bring_tile)
    ring.begin()
    strips = functools.partial(left_strips, swizzle=swizzle_of(static))
    numbers = b, head, pl.ds(at.query, TILE)
    lse, delta = (load_numbers(rows.at[numbers], 0) for rows in (x.lse, x.delta))

    def step(n, carry):
        acc, sums_ = carry
        slot = ring.slot_of(n)
        k, v = (tile.at[slot] for tile in rings)
        here = at._replace(key=(tiles.first + n) * keys)
        s = products(strips(q, static.head_dim), k)
        w = weights(static, x, here, s, lse, queries=0, sloped=not sums_)
        dp = products(strips(dout, static.head_dim_v), v)
        ds = logit_gradients(w._replace(slope=None), dp, delta, queries=0)
        # Distances are computed again: kept since the weights they would be half of a tile.
        more = sums_over_keys(static, here._replace(query=tied_to(n, here.query)), ds)
        ds = ds if w.slope is None else ds * w.slope
        acc = weighted_sum(acc, ds, k, None)
        return acc, [a + b for a, b in zip(sums_, more, strict=True)]

    nothing = plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), LAYOUTS[0])
    carry = sums(TILE, static.head_dim, x.q.dtype), [nothing] * (len(results) - 1)
    acc, sums_ = lax.fori_loop(0, tiles.count, step, carry)
    for result, found in zip(results[1:], sums_, strict=True):
        result[numbers] = found
    _store(static, acc * static.scale, static.q_len, b, at.query, head, shared.mine[0], results[0])


def _dkv_block(static: Static, x: Arrays, results: Any, shared: Shared) -> None:
    """64 keys of a kv head, and the queries of its heads that see them."""
    b, kv_head, index = (lax.axis_index(name) for name in ("batch", "head", "block"))
    at = Place(b, row_of(static, x.rows, b), jnp.int32(0), index * TILE)
    steps = steps_of(static, at, TILE, kv_head, shared.rings[0].shape[1])
    rings, owned = shared.rings, _without_padding(static, shared.mine)
    bring_rows(static.kv_len, b, at.key, kv_head, (x.k, x.v), owned)

    def bring_tile(n, slot):
        head, query = steps.where(n)
        bring_rows(static.q_len, b, query, head, (x.q, x.dout), [ring.at[slot] for ring in rings])

    ring = Ring(rings[0].shape[0], steps.count, 2, bring_tile)
    ring.begin()
    step = functools.partial(_dkv_step, static, x, at, steps, ring, shared)
    dtype = x.q.dtype
    carry = sums(TILE, static.head_dim, dtype), sums(TILE, static.head_dim_v, dtype)
    dk, dv = lax.fori_loop(0, steps.count, step, carry)
    _store(static, dk * static.scale, static.kv_len, b, at.key, kv_head, shared.mine[0], results[0])
    _store(static, dv, static.kv_len, b, at.key, kv_head, shared.mine[1], results[1])


def _dkv_step(
    static: Static, x: Arrays, at: Place, steps: Steps, ring: Ring, shared: Shared, n: Any,
    carry: Any,
) -> Any:  # fmt: skip
    """What a tile of queries adds to dk and dv."""
    (k, v), (dk, dv) = _without_padding(static, shared.mine), carry
    head, query = steps.where(n)
    slot = ring.slot_of(n)
    q, dout = (tile.at[slot] for tile in shared.rings)
    at = at._replace(query=query, head=head)
    strips = functools.partial(left_strips, swizzle=swizzle_of(static))
    numbers = at.b, head, pl.ds(query, steps.queries)
    lse, delta = (load_numbers(rows.at[numbers], 1) for rows in (x.lse, x.delta))
    s = products(strips(k, static.head_dim), q)
    w = weights(static, x, at, s, lse, queries=1)
    dv = weighted_sum(dv, w.p, dout, None)
    if w.slope is not None:  # one tile of registers less beside the next product
        w = Weights(w.p * w.slope, None)
    dp = products(strips(v, static.head_dim_v), dout)
    ds = logit_gradients(w, dp, delta, queries=1)
    return weighted_sum(dk, ds, q, None), dv


def _without_padding(static: Static, tiles: tuple[Any, Any]) -> tuple[Any, Any]:
    """The columns that are brought of a tile of head_dim, and of one of head_dim_v."""
    first, second = tiles
    return first.at[:, pl.ds(0, static.head_dim)], second.at[:, pl.ds(0, static.head_dim_v)]


def load_numbers(numbers: Any, axis: int) -> jax.Array:
    """Numbers of queries in GMEM, along that axis of a tile."""
    return plgpu.load(numbers, layout=LAYOUTS[axis], optimized=False)


def _rows(length: int, b: Any, first: Any, count: int) -> Any:
    """Rows of a row of the batch, in matrices of whole tiles."""
    return pl.ds(b * (pl.cdiv(length, TILE) * TILE) + first, count)


def bring_rows(length: int, b: Any, first: Any, head: Any, sources: Any, targets: Any) -> None:
    """A head's rows of two matrices: a group each."""
    for source, target in zip(sources, targets, strict=True):
        count, size = target.shape
        bring(source.at[_rows(length, b, first, count), pl.ds(head * size, size)], target)


def _store(
    static: Static, acc: jax.Array, length: int, b: Any, first: Any, head: Any, staging: Any,
    out: Any,
) -> None:  # fmt: skip
    """A block's 64 rows of a gradient, through shared memory that nobody reads any more."""
    staging.at[:, pl.ds(0, acc.shape[1])][...] = acc.astype(out.dtype)
    layout = plgpu.Layout.SMEM_GMEM_COPY(staging.shape, staging.dtype, swizzle_of(static))
    columns = pl.ds(head * staging.shape[1], staging.shape[1])
    out[_rows(length, b, first, TILE), columns] = plgpu.load(staging, layout=layout)
