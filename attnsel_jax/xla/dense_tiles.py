"""One tile: the logits of a block of queries and a block of keys, and who sees whom there.

A tile is [batch, num_kv_heads, group, block_q, block_kv], or, keys first,
[batch, num_kv_heads, block_kv, group, block_q]: the backward pass wants it so, because dv and dk
are then plain products of the tile, and a product with a transposed left side costs an XLA:CPU
matmul about half of its speed.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from attnsel_jax.xla.dense_blocks import Block, Floats, Masks, Static, key_bounds, split_heads, take
from pallas_kernels import masks


def flat(x: jax.Array, columns: int = 1) -> jax.Array:
    """[batch, num_kv_heads, ...] as a matrix for each kv head; the last `columns` axes are one."""
    return x.reshape(x.shape[0] * x.shape[1], -1, math.prod(x.shape[x.ndim - columns :]))


def matmul(a: jax.Array, b: jax.Array, summed: tuple[int, int]) -> jax.Array:
    """Product of `flat` matrices, float32; float32 operands are multiplied in full float32.

    Three dimensions, because XLA:CPU rewrites a product of more with transposed copies. `summed` is
    the axis of each that is summed over: 2 its columns, 1 its rows.
    """
    return lax.dot_general(
        a,
        b,
        (((summed[0],), (summed[1],)), ((0,), (0,))),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def keys_first(tile: jax.Array) -> jax.Array:
    """[..., group, block_q, block_kv] -> [..., block_kv, group, block_q]."""
    return jnp.moveaxis(tile, -1, -3)


def keys_last(tile: jax.Array) -> jax.Array:
    """[..., block_kv, group, block_q] -> [..., group, block_q, block_kv]."""
    return jnp.moveaxis(tile, -3, -1)


def split_scale(static: Static, dtype: jnp.dtype) -> tuple[float, float]:
    """The scale as (factor on q, factor on the logits): on the rounded q it would cost digits."""
    return (static.scale, 1.0) if dtype == jnp.float32 else (1.0, static.scale)


def cap_and_bias(
    static: Static, x: Floats, who: Masks, logits: jax.Array, q_block: Block, kv_block: Block, place
) -> tuple[jax.Array, jax.Array | None]:
    """From products of q and k to logits, and the slope of the soft cap where there is one.

    Args:
        static, x, who, q_block, kv_block: the call, and which tile.
        logits: a tile: the products of scaled q and k.
        place: `keys_first`, or the identity: the order of the tile's axes.
    """
    _, scale = split_scale(static, x.q.dtype)
    if scale != 1.0:
        logits *= scale
    slope = None
    if static.soft_cap is not None:
        capped = jnp.tanh(logits / static.soft_cap)
        logits, slope = static.soft_cap * capped, 1 - capped * capped
    if x.bias is not None:
        logits += place(_pair_tile(x.bias, static, q_block, kv_block).astype(jnp.float32))
    if x.alibi_slopes is not None:
        slopes = x.alibi_slopes.reshape(-1, static.group)[:, :, None, None]
        logits -= place(slopes * distance(who, q_block, kv_block))
    return logits, slope


def distance(who: Masks, q_block: Block, kv_block: Block) -> jax.Array:
    """float32 [batch, 1, 1, block_q, block_kv]: |q_pos - kv_pos|."""
    q_pos = (q_block.indices() + who.q_offset[:, None])[:, None, None, :, None]
    return jnp.abs(q_pos - kv_block.indices()).astype(jnp.float32)


def seen_tile(
    static: Static, who: Masks, q_block: Block, kv_block: Block, kv_len: int
) -> tuple[jax.Array, jax.Array]:
    """Which keys each query sees, broadcastable to a tile; which some query sees, [b, k, s, 1].

    Args:
        static, who, q_block, kv_block: the call, and which tile.
        kv_len: size of the keys' axis.
    """
    start, stop = key_bounds(static, who, q_block, kv_len)
    kv_pos = kv_block.indices()
    used = (kv_pos >= jnp.maximum(start, kv_block.own)[:, None]) & (kv_pos < stop[:, None])
    t = q_block.indices()
    seen = used[:, None, None, None, :]
    q_pos = (t + who.q_offset[:, None])[:, None, None, :, None]
    band = masks.seen(q_pos, kv_pos, **static.band)
    if band is not None:
        seen = seen & band
    if not who.by_element:
        return seen, used[:, None, :, None]
    if who.q_lens is not None:
        seen = seen & (t < who.q_lens[:, None])[:, None, None, :, None]
    if who.mask is not None:
        seen = seen & _pair_tile(who.mask, static, q_block, kv_block)
    if who.q_segment_ids is not None:
        q_ids = take(who.q_segment_ids, q_block.base, q_block.size, 1)
        kv_ids = take(who.kv_segment_ids, kv_block.base, kv_block.size, 1)
        seen = seen & (q_ids[:, :, None] == kv_ids[:, None, :])[:, None, None]
    return seen, jnp.any(seen, axis=(2, 3))[..., None]


def zero_unless(keep: jax.Array, x: jax.Array) -> jax.Array:
    """What takes no part becomes 0: it may be NaN, and 0 * NaN is NaN."""
    return jnp.where(keep, x, jnp.zeros((), x.dtype))


def _pair_tile(x: jax.Array, static: Static, q_block: Block, kv_block: Block) -> jax.Array:
    """The tile of a bias or mask [b, n, t, s], in a tile's five dimensions (each full or 1)."""
    tile = take(take(x, q_block.base, q_block.size, 2), kv_block.base, kv_block.size, 3)
    return split_heads(tile, static, 1)
