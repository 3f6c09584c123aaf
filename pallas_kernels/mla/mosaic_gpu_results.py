"""What the blocks of latent kernels on Hopper write, and how parts of a sequence are put together.

Not split, a block writes its tokens' rows of the output; split, float32 parts [splits, tiles, ROWS,
rank] that are merged by their lse. lse itself is always of tiles, [splits, tiles, ROWS]: a row of
8 heads is too short for a copy of its own.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mla.mosaic_gpu_attend import ROWS, Shared, Sizes
from pallas_kernels.mla.mosaic_gpu_batch import Batch, tiles_of_tokens


def shapes(sizes: Sizes, num_tokens: int, tiles: int, dtype: Any) -> list[jax.ShapeDtypeStruct]:
    """Of out and lse, as the blocks write them."""
    out = jax.ShapeDtypeStruct((num_tokens * sizes.num_heads, sizes.rank), dtype)
    if sizes.splits > 1:
        out = jax.ShapeDtypeStruct((sizes.splits, tiles, ROWS, sizes.rank), jnp.float32)
    return [out, jax.ShapeDtypeStruct((sizes.splits, tiles, ROWS), jnp.float32)]


def write(me: int, sizes: Sizes, shared: Shared, arrays: Any, results, at, row, count) -> None:
    """One's half of the output, and lse: of the tile's tokens, or all rows of a split's part."""
    out, lse = results
    columns = sizes.columns(me)
    if me == 0:
        shared.lse[...] = lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(shared.lse, arrays.lse.at[at])
    if sizes.splits > 1:
        arrays.out[(*at, slice(None), columns)] = out
    else:
        shared.out[me] = out.astype(arrays.out.dtype)
        plgpu.commit_smem()
        height = min(sizes.num_heads, ROWS)
        for token in range(sizes.block_q):

            @pl.when(token < count)
            def _(first=token * height):
                plgpu.copy_smem_to_gmem(
                    shared.out.at[me, pl.ds(first, height)],
                    arrays.out.at[pl.ds(row + first, height), columns],
                )

    plgpu.wait_smem_to_gmem(0)


def merged(out, lse, batch: Batch, sizes: Sizes, dtype):
    """Out [num_tokens, num_heads, rank] and lse [num_tokens, num_heads] of what the blocks made."""
    num_heads = sizes.num_heads
    tile, place = tiles_of_tokens(batch, sizes.block_q)

    def of_tokens(parts):
        """[splits, tiles, ROWS, ...] -> [splits, num_tokens, num_heads, ...]."""
        rows = sizes.block_q if num_heads <= ROWS else 1
        if num_heads <= ROWS:
            parts = parts[:, :, : rows * num_heads]
        splits, _, _, *rest = parts.shape
        parts = parts.reshape(splits, -1, rows, num_heads, *rest)
        return parts[:, :, 0] if rows == 1 else parts[:, tile, place]

    lse = of_tokens(lse)
    if sizes.splits == 1:
        return out.reshape(batch.num_tokens, num_heads, sizes.rank), lse[0]
    most = jnp.max(lse, axis=0)
    shares = jnp.exp(lse - jnp.where(jnp.isfinite(most), most, 0))
    total = jnp.sum(shares, axis=0)
    weights = shares / jnp.where(total == 0, 1, total)
    out = jnp.sum(weights[..., None] * of_tokens(out), axis=0)
    whole = jnp.where(total == 0, -jnp.inf, most + jnp.log(jnp.where(total == 0, 1, total)))
    return out.astype(dtype), whole
