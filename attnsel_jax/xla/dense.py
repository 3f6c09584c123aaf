"""Dense attention on XLA, block by block: what runs where no accelerator kernel does.

The logits exist one tile at a time, forward and backward, so memory is linear in length; blocks of
keys that causality, window, chunk or lengths exclude are neither loaded nor multiplied.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnsel_jax.xla import dense_backward
from attnsel_jax.xla.dense_blocks import (
    Block,
    Floats,
    Masks,
    Static,
    block_at,
    kv_reach,
    kv_rows,
    num_blocks,
    over_blocks,
    q_rows,
)
from attnsel_jax.xla.dense_parts import Part, arguments_of, over_parts
from attnsel_jax.xla.dense_tiles import (
    cap_and_bias,
    flat,
    matmul,
    seen_tile,
    split_scale,
    zero_unless,
)
from pallas_kernels import contract_checks, empty_calls, masks, shape_checks
from pallas_kernels.dense.derivative_rules import (
    batched_with,
    corrected,
    differentiated_once,
    giving_correction,
    with_named_residuals,
)
from pallas_kernels.jax_settings import under_default_rules, under_own_settings


class Largest(NamedTuple):
    """At most how much a tile holds."""

    rows: int  # queries times the query heads of a kv head
    keys: int
    elements: int  # logits, over all heads and batch rows


# Measured on two cores of a Zen 4 EPYC with noisy neighbours, 2026-11-24, float32, 8 heads of 128,
# length 4096, causal; rows x keys of so many heads: seconds with jax 0.10.2 (0.12.0.1), median.
# Forward: 512x512 of 2 heads 0.27 (0.26), of 1 0.26 (0.26), of 8 0.31 (0.29); 512x256 of 2
# 0.30 (0.26), of 8 0.31 (0.27); earlier that day, of 8: 256x256 0.31 (0.22), 512x128 0.46 (0.22).
# The products alone take 0.21. A tile of more heads leaves the cores' caches.
# With gradients: 256x256 of 2 heads 1.03 (0.83), of 4 1.08 (0.82), of 8 1.11 (0.89); 512x256 of 2
# 1.16 (0.90); 512x512 of 2 1.21 (0.83).
FORWARD, BACKWARD = Largest(512, 512, 2**19), Largest(256, 256, 2**18)


@giving_correction
@under_default_rules
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
    correction: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
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
    contract_checks.check_logit_numbers(soft_cap, attention_chunk_size, sliding_window)
    if empty_calls.is_empty(dims):
        return (*empty_calls.dense(q, v, sinks, q_lens), None)
    q_lens = contract_checks.existing(q_lens, dims["q_len"])
    kv_lens = contract_checks.existing(kv_lens, dims["kv_len"])
    offsets = _offsets(q_offset, dims["batch"])
    who = Masks(mask, q_segment_ids, kv_segment_ids, offsets, q_lens, kv_lens)
    static = Static(
        scale=float(dims["head_dim"] ** -0.5 if scale is None else scale),
        causal=causal,
        sliding_window=masks.window_bounds(sliding_window),
        attention_chunk_size=attention_chunk_size,
        soft_cap=soft_cap,
        group=dims["num_q_heads"] // dims["num_kv_heads"],
        **block_sizes(FORWARD, q, k),
    )
    return _attend(static, floats, who)


def block_sizes(largest: Largest, q: jax.Array, k: jax.Array) -> dict[str, int]:
    """How much of each axis one tile holds; few queries take more keys, short rows more heads."""
    (batch, q_len, num_q_heads, _), (_, kv_len, num_kv_heads, _) = q.shape, k.shape
    group = num_q_heads // num_kv_heads
    block_q = min(max(1, largest.rows // group), q_len)
    block_kv = min(largest.keys * min(8, max(1, largest.rows // (group * block_q))), kv_len)
    heads = max(1, largest.elements // (group * block_q * block_kv))
    block_kv_heads = _largest_divisor(num_kv_heads, heads)
    return {
        "block_batch": _largest_divisor(batch, heads // block_kv_heads),
        "block_kv_heads": block_kv_heads,
        "block_q": block_q,
        "block_kv": block_kv,
    }


def _largest_divisor(of: int, most: int) -> int:
    """The largest divisor of `of` that is at most `most`, and at least 1."""
    return max(n for n in range(1, max(1, min(of, most)) + 1) if of % n == 0)


def _check(x: Floats, mask, q_segment_ids, kv_segment_ids, q_lens, kv_lens) -> dict[str, int]:
    """The contract's shapes and dtypes; returns the sizes by name."""
    masked = {"mask": mask, "q_segment_ids": q_segment_ids, "kv_segment_ids": kv_segment_ids}
    masked |= {"q_lens": q_lens, "kv_lens": kv_lens}
    return contract_checks.check_dense(x._asdict() | masked, shape_checks.FLOATS)


def _offsets(q_offset: int | jax.Array | None, batch: int) -> jax.Array:
    """int32 [batch]."""
    offset = contract_checks.check_offset(0 if q_offset is None else q_offset, batch)
    return jnp.broadcast_to(offset.astype(jnp.int32), (batch,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@under_own_settings
def _attend(static: Static, x: Floats, who: Masks) -> tuple[jax.Array | None, ...]:
    """Out, lse, and with a bias what the rows' probabilities are multiplied by, else None."""
    out, *of_rows = _rows(static, x, who)
    lse, correction = (batched_with(x.v, array) for array in of_rows)
    return out, lse, None if x.bias is None else correction


def _rows(static: Static, x: Floats, who: Masks) -> tuple[jax.Array, ...]:
    """Out, lse and `correction` of all rows, one part and one block of its queries after another.

    correction: what exp(logit - lse) of a row is multiplied by to be its probability, 1 but for the
    rounding of lse. A bias of -1e9 on all keys of a row leaves lse no room for their number.
    """
    batch, q_len, num_q_heads, _ = x.q.shape

    def part_step(part: Part, outputs):
        x_part, who_part = arguments_of(static, x, who, part)

        def q_step(i, outputs):
            block = block_at(i, static.block_q, q_len)
            results = _q_block(static, x_part, who_part, block)
            at = part.row, block.base, part.head * jnp.int32(static.group)
            return tuple(_write_rows(*pair, at) for pair in zip(outputs, results, strict=True))

        return lax.fori_loop(0, num_blocks(q_len, static.block_q), q_step, outputs)

    out = jnp.zeros((batch, q_len, num_q_heads, x.v.shape[-1]), x.q.dtype)
    lse = jnp.zeros((batch, q_len, num_q_heads), jnp.float32)
    return over_parts(static, batch, x.k.shape[2], part_step, (out, lse, jnp.ones_like(lse)))


def _write_rows(whole: jax.Array, rows: jax.Array, at) -> jax.Array:
    """Writes [b, k, g, t, ...] into [batch, q_len, num_q_heads, ...] at (row, query, head)."""
    rows = jnp.moveaxis(rows, 3, 1)
    rows = rows.reshape(*rows.shape[:2], -1, *rows.shape[4:]).astype(whole.dtype)
    zeros = (jnp.int32(0),) * (whole.ndim - 3)
    return lax.dynamic_update_slice(whole, rows, (*at, *zeros))


def _q_block(static: Static, x: Floats, who: Masks, block: Block) -> tuple[jax.Array, ...]:
    """One block of queries against all keys that it sees: [b, k, g, t, d], twice [b, k, g, t]."""
    kv_len = x.k.shape[2]
    q = q_rows(x.q, block) * jnp.asarray(split_scale(static, x.q.dtype)[0], x.q.dtype)

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
    rounded = jnp.where(jnp.abs(lse) < jnp.inf, jnp.exp(lse - m) / total, 1.0)
    if who.q_lens is not None:
        real = (block.indices() < who.q_lens[:, None])[:, None, None, :]
        out, lse = zero_unless(real[..., None], out), jnp.where(real, lse, -jnp.inf)
    return out, lse, rounded


def _start(static: Static, x: Floats, rows: tuple[int, ...]):
    """Maximum, sum and output before the first key; a sink is a key whose value is 0."""
    acc = jnp.zeros((*rows, x.v.shape[-1]), jnp.float32)
    if x.sinks is None:
        return jnp.full(rows, -jnp.inf, jnp.float32), jnp.zeros(rows, jnp.float32), acc
    sinks = x.sinks.reshape(-1, static.group)[:, :, None]
    return jnp.broadcast_to(sinks, rows), jnp.ones(rows, jnp.float32), acc


@with_named_residuals
@differentiated_once
@under_own_settings
def _forward(static: Static, x: Floats, who: Masks):
    out, lse, correction = _attend(static, x, who)
    return (out, lse, correction), (x, who, correction, out, lse)


@differentiated_once
@under_own_settings
def _backward(static: Static, residuals, cotangents):
    x, who, correction, out, lse = residuals
    static = dataclasses.replace(static, **block_sizes(BACKWARD, x.q, x.k))
    gradients = dense_backward.gradients(
        static, x, who, out, lse, *corrected(cotangents[:2], correction)
    )
    return gradients, None


_attend.defvjp(_forward, _backward)
