"""The backward of dense attention on GPUs: what surrounds its kernels.

    delta = sum(out * dout) - dlse                       with dq, or a pass of XLA's
    dq           a block owns queries and goes through the keys       `mosaic_gpu_dq`
    dk, dv       a block owns keys and goes through the queries       `mosaic_gpu_dkv`
    dbias        a block owns a tile of the bias                      `mosaic_gpu_dbias`

Every sum is added up by one warpgroup in one order, so that the same call gives the same bits; the
price is that logits and dout @ v.T are computed in both: 7 products where 5 would do; 9 where a
bias's gradient is asked for.

Reference:
    Dao, "FlashAttention-2", 2023: the recomputation from lse, and delta.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.dense import (
    mosaic_gpu_ampere_backward,
    mosaic_gpu_ampere_dbias,
    mosaic_gpu_blackwell_backward,
)
from pallas_kernels.dense.mosaic_gpu_dbias import bias_gradient
from pallas_kernels.dense.mosaic_gpu_dkv import key_gradients
from pallas_kernels.dense.mosaic_gpu_dq import query_gradients
from pallas_kernels.dense.mosaic_gpu_geometry import (
    Static,
    in_whole_tiles_of_rows,
    row_of,
    seen_interval,
    seen_keys,
)
from pallas_kernels.dense.mosaic_gpu_tiles import backward_tiles
from pallas_kernels.dense.mosaic_gpu_weights import BLOCK, Arrays

# Compute capability -> who gives dq, dk with dv, and a bias's.
KERNELS = {
    (8, 0): (
        mosaic_gpu_ampere_backward.query_gradients,
        mosaic_gpu_ampere_backward.key_gradients,
        mosaic_gpu_ampere_dbias.bias_gradient,
    ),
    (9, 0): (query_gradients, key_gradients, bias_gradient),
    (10, 0): (
        mosaic_gpu_blackwell_backward.query_gradients,
        mosaic_gpu_blackwell_backward.key_gradients,
        mosaic_gpu_ampere_dbias.bias_gradient,
    ),
}


class Gradients(NamedTuple):
    """Each like its argument; None = it is not given."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: jax.Array | None
    slopes: jax.Array | None
    sinks: jax.Array | None


def backward(
    static: Static, x: Arrays, out: jax.Array, lse: jax.Array, log2_sum: jax.Array,
    dlse: jax.Array, sinks: Any,
) -> Gradients:  # fmt: skip
    """The gradients of a call.

    Args:
        static: the call.
        x: its arrays; q, k, dout and bias as they are given, `lse` and `delta` None.
        out, lse: the forward's results, in the contract's layout.
        log2_sum: lse in units of log2, as weights are computed from it.
        dlse: the cotangent of lse.
        sinks: float32 [num_q_heads], or None.
    """
    x, some = cleared(static, x, jnp.isfinite(lse)), lse != -jnp.inf
    delta = -jnp.where(some, dlse.astype(jnp.float32), 0.0)
    if sums_delta(static):
        missing = -static.q_len % BLOCK
        x = x._replace(out=jnp.pad(out, ((0, 0), (0, missing), (0, 0), (0, 0))))
    else:
        delta += jnp.einsum("bthd,bthd->bth", out, x.dout, preferred_element_type=jnp.float32)
    # A row that sees nothing has weights of 0, whatever its logits.
    log2_sum = jnp.where(some, log2_sum, jnp.inf)
    x = x._replace(lse=_by_head(static, log2_sum), delta=_by_head(static, delta))
    padded = {name: in_whole_tiles_of_rows(getattr(x, name)) for name in ("q", "k", "v", "dout")}
    x = x._replace(**padded)
    tiles = backward_tiles(
        static.capability,
        static.head_dim,
        static.head_dim_v,
        capped=static.soft_cap is not None,
        segmented=static.segments,
        added=static.alibi or static.bias is not None,
    )
    of_queries, of_keys, of_bias = KERNELS[static.capability]
    bias = x.bias
    x = x._replace(bias=_in_whole_blocks(static, bias))
    mine = of_queries(static, x, tiles)
    x = x._replace(delta=mine.delta, out=None)
    dsinks = None
    if sinks is not None:
        share = jnp.where(some, jnp.exp(sinks - lse), 0.0)
        dsinks = -jnp.sum(_by_head(static, share) * x.delta, axis=(0, 2))
    across = None if bias is None else jnp.swapaxes(x.bias, 2, 3)
    dk, dv = of_keys(static, x._replace(bias=across), tiles)
    dk, dv = (gradient[:, : static.kv_len] for gradient in (dk, dv))
    dslopes, dbias = mine.by_distance, None
    if dslopes is not None:
        dslopes = -jnp.sum(dslopes[:, :, : static.q_len], axis=(0, 2))
    if bias is not None:
        dbias = _like_the_bias(static, of_bias(static, x, bias.dtype, tiles), bias)
    return Gradients(mine.q[:, : static.q_len], dk, dv, dbias, dslopes, dsinks)


def sums_delta(static: Static) -> bool:
    """Whether dq's kernel sums out * dout: Hopper's, but it spills at 256 beside a bias, slopes."""
    added = static.alibi or static.bias is not None
    return static.capability == (9, 0) and not (static.head_dim_v > 192 and added)


def check_backward(static: Static) -> None:
    """Refuses what would spill.

    Raises:
        ValueError: the argument, its value, what is allowed.
    """
    added = static.alibi or static.bias is not None
    if static.capability != (9, 0):  # what others do not take, their tables of tiles say
        return
    # At head size 256 sums of dq alone are half of all registers.
    if static.head_dim > 192 and added and (static.segments or static.soft_cap is not None):
        raise ValueError(
            f"head_dim is {static.head_dim}, must be at most 192 where gradients are taken with a "
            f"bias, mask or alibi_slopes beside a soft_cap or segment ids: use XLA"
        )
    # dk and dv, which hold the cap's slopes while they read segments, spill 20 to 40 bytes.
    if static.head_dim_v > 128 and added and static.segments and static.soft_cap is not None:
        raise ValueError(
            f"head_dim_v is {static.head_dim_v}, must be at most 128 where gradients are taken "
            f"with a bias, mask or alibi_slopes beside both a soft_cap and segment ids: use XLA"
        )


def _in_whole_blocks(static: Static, bias: jax.Array | None) -> jax.Array | None:
    """The bias with its full last dimensions padded."""
    if bias is None:
        return None
    missing = (-static.q_len % BLOCK * static.bias[2], -static.kv_len % BLOCK)
    return jnp.pad(bias, [(0, pad) for pad in (0, 0, *missing)])


def _like_the_bias(static: Static, dbias: jax.Array, bias: jax.Array) -> jax.Array:
    """What is left to add up: parts of a gradient [rows, heads, queries or parts, keys]."""
    dbias = dbias[:, :, : static.q_len if static.bias[2] else None, : static.kv_len]
    if shared := [axis for axis in range(4) if dbias.shape[axis] > bias.shape[axis]]:
        dbias = jnp.sum(dbias.astype(jnp.float32), axis=shared, keepdims=True)
    return dbias.astype(bias.dtype)


def _by_head(static: Static, rows: jax.Array) -> jax.Array:
    """[batch, q_len, heads] as [batch, heads, whole tiles]."""
    missing = -static.q_len % BLOCK
    return jnp.pad(jnp.swapaxes(rows, 1, 2), ((0, 0), (0, 0), (0, missing)))


def cleared(static: Static, x: Arrays, some: jax.Array) -> Arrays:
    """The arrays with 0 where NaN may be: a weight of 0 does not undo it in a product.

    Costs a pass over k and v where some key may be unseen, and over q and dout where some query may
    see none: with lengths, segments, offsets that are not static, windows that end before the keys
    do. A select for each of the kernels' logits would do for v, and is an eighth of what they do.

    Args:
        static: the call.
        x: its arrays.
        some: bool [batch, q_len, num_q_heads]: rows whose lse is finite.
    """

    def keep(where: jax.Array, a: jax.Array) -> jax.Array:
        return jnp.where(where, a, jnp.zeros_like(a))

    if not everything_is_seen(static):
        used = _used(static, x)
        x = x._replace(k=keep(used, x.k), v=keep(used, x.v))
        x = x._replace(q=keep(some[..., None], x.q), dout=keep(some[..., None], x.dout))
    return x


def everything_is_seen(static: Static) -> bool:
    """Whether each key is seen by a query and each query sees a key, as far as is known before."""
    if static.lengths or static.segments or static.offset is None:
        return False
    if static.attention_chunk_size is not None:
        return static.offset == 0 and static.q_len == static.kv_len
    left, right = static.sliding_window
    first, last = static.offset, static.offset + static.q_len - 1
    keys_are_seen = (left is None or first < left) and (
        last + 1 >= static.kv_len if static.causal
        else right is None or last + right >= static.kv_len
    )  # fmt: skip
    rows_see = (first >= 0 or not (static.causal or right)) and (
        left is None or last - left + 1 < static.kv_len
    )
    return keys_are_seen and rows_see


def _used(static: Static, x: Arrays) -> jax.Array:
    """Bool [batch, kv_len, 1, 1]: keys that some query sees."""
    if static.segments:
        mine, theirs = x.q_segments[:, : static.q_len], x.kv_segments[:, : static.kv_len]
        return seen_keys(static, x.rows, mine, theirs)
    key = jnp.arange(static.kv_len, dtype=jnp.int32)

    def of_row(b: jax.Array) -> jax.Array:
        row = row_of(static, x.rows, b)
        low = seen_interval(static, row, jnp.int32(0))[0]
        high = seen_interval(static, row, jnp.asarray(row.q_len, jnp.int32) - 1)[1]
        return (key >= low) & (key < high) & (row.q_len > 0)

    return jax.vmap(of_row)(jnp.arange(static.batch))[:, :, None, None]
