"""Dense attention on XLA, block by block: what runs where no accelerator kernel does.

The logits exist one tile at a time, forward and backward, so memory is linear in length; blocks of
keys that causality, window, chunk or lengths exclude are neither loaded nor multiplied.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnsel_jax.xla import dense_backward
from attnsel_jax.xla.dense_blocks import (
    Block,
    Floats,
    Masks,
    Static,
    batch_block,
    block_at,
    kv_reach,
    kv_rows,
    num_blocks,
    over_batch,
    over_blocks,
    q_rows,
)
from attnsel_jax.xla.dense_tiles import (
    cap_and_bias,
    flat,
    matmul,
    seen_tile,
    split_scale,
    zero_unless,
)
from pallas_kernels import masks, shape_checks

# At most so many heads (of all batch rows of a step), and so many queries and keys, in a tile.
# Measured, float32, 8 heads of 128, length 4096, causal, seconds on two cores. Forward, 2026-11-24,
# Zen 4 EPYC, jax 0.10.2 (0.12.0.1): 512x256 0.23 (0.22), 256x512 0.23 (0.23), 512x512 0.24 (0.23),
# 1024x256 0.26, 256x256 0.31 (0.22), 512x128 0.46 (0.22); the products alone take 0.21. With
# gradients, 2026-11-23, Sapphire Rapids: 256x256 1.7, 256x512 1.75, 512x256 1.85. Products batched
# over 8 heads run at 220 GFLOP/s there, one by one at 180.
BLOCK_HEADS = 16
FORWARD_BLOCK, BACKWARD_BLOCK = (512, 256), (256, 256)


def dense_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None = None,
    causal: bool = False,
    q_offset: int | jax.Array | None = None,
    sliding_window: masks.Window = None,
    attention_chunk_size: int | None = None,
    soft_cap: float | None = None,
    bias: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    mask: jax.Array | None = None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    q_lens: jax.Array | None = None,
    kv_lens: jax.Array | None = None,
    sinks: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention over contiguous q, k, v, as `pallas_kernels.dense` defines it.

    Differentiable in reverse mode (not by `jax.jvp`) in q, k, v, bias, alibi_slopes and sinks,
    through out and lse; the backward pass computes the logits again.

    Args:
        q, k, v, scale, causal, q_offset, sliding_window, attention_chunk_size, soft_cap, bias,
            alibi_slopes, mask, q_segment_ids, kv_segment_ids, q_lens, kv_lens, sinks: the
            contract's, see `pallas_kernels.dense`.

    Returns:
        out [batch, q_len, num_q_heads, head_dim_v] in q's dtype; lse float32
        [batch, q_len, num_q_heads].

    Raises:
        ValueError: a shape, a dtype or a static number is not what the contract says.

    Numerics:
        float32 logits, softmax and accumulation; float32 inputs are multiplied at the highest
        precision. For bfloat16 and float16 the probabilities are rounded to v's dtype before they
        meet v, as are the logits' gradients before they meet q and k.

    Reference:
        Rabe and Staats, "Self-attention does not need O(n^2) memory", 2021; Dao,
        "FlashAttention-2", 2023, for the order of the loops and the recomputation.
    """
    floats = Floats(q, k, v, bias, alibi_slopes, sinks)
    dims = _check(floats, mask, q_segment_ids, kv_segment_ids, q_lens, kv_lens)
    for name, value in (("attention_chunk_size", attention_chunk_size), ("soft_cap", soft_cap)):
        shape_checks.check_positive(name, value)
    for side in masks.window_bounds(sliding_window):
        shape_checks.check_positive("sliding_window", side)
    batch = dims["batch"]
    who = Masks(mask, q_segment_ids, kv_segment_ids, _offsets(q_offset, batch), q_lens, kv_lens)
    static = Static(
        scale=float(dims["head_dim"] ** -0.5 if scale is None else scale),
        causal=causal,
        sliding_window=masks.window_bounds(sliding_window),
        attention_chunk_size=attention_chunk_size,
        soft_cap=soft_cap,
        group=shape_checks.check_groups(dims["num_q_heads"], dims["num_kv_heads"]),
        **block_sizes(FORWARD_BLOCK, q, k),
    )
    return _attend(static, floats, who)


def block_sizes(largest: tuple[int, int], q: jax.Array, k: jax.Array) -> dict[str, int]:
    """How much of each axis one tile holds; few queries take more keys at a time."""
    batch, q_len, num_q_heads, _ = q.shape
    largest_q, largest_kv = largest
    rows = max(1, min(batch, BLOCK_HEADS // num_q_heads))
    block_q = min(largest_q, q_len)
    return {
        "block_batch": max(n for n in range(1, rows + 1) if batch % n == 0),
        "block_q": block_q,
        "block_kv": min(largest_kv * min(8, largest_q // block_q), k.shape[1]),
    }


def _check(x: Floats, mask, q_segment_ids, kv_segment_ids, q_lens, kv_lens) -> dict[str, int]:
    """The contract's shapes and dtypes; returns the sizes by name."""
    floats, full = shape_checks.FLOATS, "~batch ~num_q_heads ~q_len ~kv_len"
    if (q_segment_ids is None) != (kv_segment_ids is None):
        raise ValueError(
            "q_segment_ids and kv_segment_ids: one is given and one is None, must be both or "
            "neither: give each token of q and of k the id of its segment"
        )
    dims = shape_checks.check_arguments(
        {
            "q": (x.q, "batch q_len num_q_heads head_dim", floats),
            "k": (x.k, "batch kv_len num_kv_heads head_dim", floats),
            "v": (x.v, "batch kv_len num_kv_heads head_dim_v", floats),
            "bias": (x.bias, full, floats),
            "alibi_slopes": (x.alibi_slopes, "num_q_heads", shape_checks.FLOAT32),
            "mask": (mask, full, shape_checks.BOOL),
            "q_segment_ids": (q_segment_ids, "batch q_len", shape_checks.INT32),
            "kv_segment_ids": (kv_segment_ids, "batch kv_len", shape_checks.INT32),
            "q_lens": (q_lens, "batch", shape_checks.INT32),
            "kv_lens": (kv_lens, "batch", shape_checks.INT32),
            "sinks": (x.sinks, "num_q_heads", shape_checks.FLOAT32),
        },
        required="qkv",
    )
    shape_checks.check_same_dtype(q=x.q, k=x.k, v=x.v)
    return dims


def _offsets(q_offset: int | jax.Array | None, batch: int) -> jax.Array:
    """int32 [batch]."""
    offset = jnp.asarray(0 if q_offset is None else q_offset)
    if not jnp.issubdtype(offset.dtype, jnp.integer) or offset.shape not in ((), (1,), (batch,)):
        raise ValueError(
            f"q_offset is {offset.dtype.name}{list(offset.shape)}, must be an integer, or int32 [] "
            f"or [{batch}] (batch): the position of query 0"
        )
    return jnp.broadcast_to(offset.astype(jnp.int32), (batch,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: Static, x: Floats, who: Masks) -> tuple[jax.Array, jax.Array]:
    """The two results, one block of batch rows and queries after another."""
    batch, q_len, num_q_heads, _ = x.q.shape

    def batch_step(row, outputs):
        x_rows, who_rows = batch_block(static, x, who, row)

        def q_step(i, outputs):
            block = block_at(i, static.block_q, q_len)
            parts = _q_block(static, x_rows, who_rows, block)
            at = row * jnp.int32(static.block_batch), block.base
            return tuple(_write_rows(*pair, at) for pair in zip(outputs, parts, strict=True))

        return lax.fori_loop(0, num_blocks(q_len, static.block_q), q_step, outputs)

    out = jnp.zeros((batch, q_len, num_q_heads, x.v.shape[-1]), x.q.dtype)
    lse = jnp.zeros((batch, q_len, num_q_heads), jnp.float32)
    return over_batch(static, batch, batch_step, (out, lse))


def _write_rows(whole: jax.Array, part: jax.Array, at) -> jax.Array:
    """Writes [b, k, g, t, ...] into [batch, q_len, num_q_heads, ...] at (batch row, query)."""
    part = jnp.moveaxis(part, 3, 1)
    part = part.reshape(*part.shape[:2], *whole.shape[2:]).astype(whole.dtype)
    zeros = (jnp.int32(0),) * (whole.ndim - 2)
    return lax.dynamic_update_slice(whole, part, (*at, *zeros))


def _q_block(static: Static, x: Floats, who: Masks, block: Block) -> tuple[jax.Array, jax.Array]:
    """One block of queries against all keys that it sees: [b, k, g, t, d] and [b, k, g, t]."""
    kv_len = x.k.shape[1]
    q = q_rows(x.q, static, block) * jnp.asarray(split_scale(static, x.q.dtype)[0], x.q.dtype)

    def kv_step(j, carry, *, masked):
        m, total, acc = carry
        kv_block = block_at(j, static.block_kv, kv_len)
        k, v = kv_rows(x.k, kv_block), kv_rows(x.v, kv_block)
        logits = matmul(flat(q), flat(k), (2, 2)).reshape(*q.shape[:-1], kv_block.size)
        logits, _ = cap_and_bias(static, x, who, logits, block, kv_block, lambda tile: tile)
        if masked:
            seen, used = seen_tile(static, who, block, kv_block, kv_len)
            logits, v = jnp.where(seen, logits, -jnp.inf), zero_unless(used, v)
        m_next = jnp.maximum(m, jnp.max(logits, axis=-1))
        shift = jnp.where(m_next == -jnp.inf, 0.0, m_next)  # -inf - -inf is NaN
        p, fade = jnp.exp(logits - shift[..., None]), jnp.exp(m - shift)
        pv = matmul(flat(p.astype(v.dtype)), flat(v), (2, 1))
        acc = acc * fade[..., None] + pv.reshape(acc.shape)
        return m_next, total * fade + jnp.sum(p, axis=-1), acc

    carry = _start(static, x, q.shape[:-1])
    m, total, acc = over_blocks(kv_reach(static, who, block, kv_len), kv_step, carry)
    out = acc / jnp.where(total == 0, 1.0, total)[..., None]
    lse = jnp.where(total == 0, -jnp.inf, m + jnp.log(total))
    if who.q_lens is not None:
        real = (block.indices() < who.q_lens[:, None])[:, None, None, :]
        out, lse = zero_unless(real[..., None], out), jnp.where(real, lse, -jnp.inf)
    return out, lse


def _start(static: Static, x: Floats, rows: tuple[int, ...]):
    """Maximum, sum and output before the first key; a sink is a key whose value is 0."""
    acc = jnp.zeros((*rows, x.v.shape[-1]), jnp.float32)
    if x.sinks is None:
        return jnp.full(rows, -jnp.inf, jnp.float32), jnp.zeros(rows, jnp.float32), acc
    sinks = x.sinks.reshape(-1, static.group)[:, :, None]
    return jnp.broadcast_to(sinks, rows), jnp.ones(rows, jnp.float32), acc


def _forward(static: Static, x: Floats, who: Masks):
    out, lse = _attend(static, x, who)
    return (out, lse), (x, who, out, lse)


def _backward(static: Static, residuals, cotangents):
    x, who, out, lse = residuals
    static = dataclasses.replace(static, **block_sizes(BACKWARD_BLOCK, x.q, x.k))
    gradients = dense_backward.gradients(static, x, who, out, lse, *cotangents)
    return gradients, jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), who)


_attend.defvjp(_forward, _backward)
