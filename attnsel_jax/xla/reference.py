"""Attention as its definition reads, in float32: the whole logits, a masked softmax, two dots.

What the backend XLA_REFERENCE runs. It does everything that the contracts of `pallas_kernels.dense`
and `pallas_kernels.paged` say, in few lines and with no care for memory or time, so that the other
lowerings have something on the same chip to be compared with. Plain autodiff goes through it.
"""

import jax
import jax.numpy as jnp

from attnsel_jax.xla.cache_writes import write_kv
from pallas_kernels import empty_calls, masks
from pallas_kernels.contract_checks import (
    check_dense,
    check_logit_numbers,
    check_offset,
    check_paged,
)
from pallas_kernels.dense.derivative_rules import giving_correction
from pallas_kernels.jax_settings import under_default_rules, under_own_settings
from pallas_kernels.shape_checks import CACHE_DTYPES, FLOATS

HIGHEST = jax.lax.Precision.HIGHEST


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
    """Attention over contiguous q, k, v: `pallas_kernels.dense` is the contract.

    Numerics: float32 throughout, dots at the highest precision. Differentiable by plain autodiff in
    every float argument, through out and through lse.
    """
    dims = check_dense(locals(), FLOATS)
    check_logit_numbers(soft_cap, attention_chunk_size, sliding_window)
    if empty_calls.is_empty(dims):
        return (*empty_calls.dense(q, v, sinks, q_lens), None)
    batch, q_len, kv_len = dims["batch"], dims["q_len"], dims["kv_len"]
    rows, kv_pos = jnp.arange(q_len, dtype=jnp.int32), jnp.arange(kv_len, dtype=jnp.int32)
    offset = check_offset(0 if q_offset is None else q_offset, batch).astype(jnp.int32)
    q_pos = (rows + jnp.atleast_1d(offset)[:, None])[:, None, :, None]  # [batch or 1, 1, q_len, 1]
    exists = jnp.ones((batch, q_len), bool) if q_lens is None else rows < q_lens[:, None]
    seen = exists[:, None, :, None] & jnp.ones((kv_len,), bool)
    restrictions = [
        masks.seen(
            q_pos,
            kv_pos,
            causal=causal,
            sliding_window=sliding_window,
            attention_chunk_size=attention_chunk_size,
        ),
        mask,
        None if kv_lens is None else (kv_pos < kv_lens[:, None])[:, None, None, :],
    ]
    if q_segment_ids is not None:
        restrictions.append((q_segment_ids[:, :, None] == kv_segment_ids[:, None, :])[:, None])
    for restriction in restrictions:
        seen = seen if restriction is None else seen & restriction
    added = None if bias is None else bias.astype(jnp.float32)
    if alibi_slopes is not None:
        alibi = _alibi(alibi_slopes, q_pos, kv_pos)
        added = alibi if added is None else added + alibi
    *results, rounded = _attend(
        q, k, v, seen, exists, scale=scale, soft_cap=soft_cap, added=added, sinks=sinks
    )
    return *results, None if bias is None else rounded


@under_own_settings
def paged_attention(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    kv_pages: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
    slot_mapping: jax.Array | None,
    *,
    scale: float | None = None,
    causal: bool = True,
    sliding_window: masks.Window = None,
    attention_chunk_size: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of a ragged batch over a "stacked" cache: `pallas_kernels.paged` is the contract.

    One sequence after another, its pages gathered into contiguous keys and values as wide as the
    table; all tokens attend to them, and the sequence's own tokens keep the result.

    Numerics: float32 throughout, dots at the highest precision.
    """
    cache = ("2 num_pages page_size num_kv_heads head_dim", CACHE_DTYPES)
    dims = check_paged(locals(), dtypes=FLOATS, cache=cache)
    check_logit_numbers(soft_cap, attention_chunk_size, sliding_window)
    if empty_calls.is_empty(dims):
        return empty_calls.ragged(q, kv_pages)
    if k is not None:
        kv_pages = write_kv(kv_pages, k, v, slot_mapping, k_scale=k_scale, v_scale=v_scale)
    num_tokens, num_q_heads, _ = q.shape
    _, num_pages, page_size, num_kv_heads, head_dim = kv_pages.shape
    kv_pos = jnp.arange(page_table.shape[1] * page_size, dtype=jnp.int32)
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)
    scales = jnp.stack([_per_head(s, num_kv_heads) for s in (k_scale, v_scale)])

    def one_sequence(i, results):
        start, end = cu_q_lens[i], cu_q_lens[i + 1]
        pages = jnp.clip(page_table[i], 0, num_pages - 1)
        stored = kv_pages[:, pages].reshape(2, -1, num_kv_heads, head_dim).astype(jnp.float32)
        keys, values = stored * scales[:, None, :, None]
        q_pos = (tokens - end + kv_lens[i])[:, None]
        mine = (tokens >= start) & (tokens < end)
        seen = mine[:, None] & (kv_pos < kv_lens[i])
        restriction = masks.seen(
            q_pos,
            kv_pos,
            causal=causal,
            sliding_window=sliding_window,
            attention_chunk_size=attention_chunk_size,
        )
        seen = seen if restriction is None else seen & restriction
        added = None if alibi_slopes is None else _alibi(alibi_slopes, q_pos[None, None], kv_pos)
        out, lse, _ = _attend(
            *(a[None] for a in (q, keys, values, seen[None], mine)),
            scale=scale,
            soft_cap=soft_cap,
            added=added,
            sinks=sinks,
        )
        new = jnp.where(mine[:, None, None], out[0], results[0])
        return new, jnp.where(mine[:, None], lse[0], results[1])

    empty = jnp.zeros_like(q), jnp.full((num_tokens, num_q_heads), -jnp.inf, jnp.float32)
    out, lse = jax.lax.fori_loop(0, num_seqs, one_sequence, empty)
    return out, lse, kv_pages


def _attend(q, k, v, seen, exists, *, scale, soft_cap, added, sinks):
    """Masked softmax attention: q, k, v [batch, length, heads, head_dim] to out, lse, correction.

    `seen` is bool [batch, 1 or num_q_heads, q_len, kv_len]; `exists`, bool [batch, q_len], says
    which rows have a sink; `added` (float32, broadcastable like seen) joins the logits after the
    cap. What nothing sees is zeroed before the dots: neither it nor its gradient can be NaN.
    """
    num_q_heads, num_kv_heads = q.shape[2], k.shape[2]
    repeats = num_q_heads // num_kv_heads
    scale = jnp.asarray(q.shape[-1] ** -0.5 if scale is None else scale, jnp.float32)
    seen = jnp.broadcast_to(seen, (q.shape[0], num_q_heads, q.shape[1], k.shape[1]))
    used_kv = seen.any(2).reshape(k.shape[0], num_kv_heads, repeats, -1).any(2)
    used_kv = used_kv.transpose(0, 2, 1)[..., None]
    used_q = seen.any(3).transpose(0, 2, 1)[..., None]
    q32 = jnp.where(used_q, q.astype(jnp.float32), 0)
    k32, v32 = (
        jnp.repeat(jnp.where(used_kv, x.astype(jnp.float32), 0), repeats, 2) for x in (k, v)
    )
    dots = jnp.einsum("btnd,bsnd->bnts", *map(_without_nan, (q32, k32)), precision=HIGHEST)
    logits = scale * dots
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    # As a term NaN reaches the gradients of who sees it; as a factor it would reach all.
    of_q, of_k = (jnp.isnan(x).any(-1).transpose(0, 2, 1) for x in (q32, k32))
    logits = logits + jnp.where(of_q[..., None] | of_k[:, :, None], jnp.nan, 0)
    if added is not None:
        logits = logits + added
    sink = None if sinks is None else jnp.where(exists[:, None, :], sinks[:, None], -jnp.inf)
    weights, *rows = _masked_softmax(logits, seen, sink)
    out = jnp.einsum("bnts,bsnd->btnd", weights, v32, precision=HIGHEST)
    return out.astype(q.dtype), *(x.transpose(0, 2, 1) for x in rows)


def _masked_softmax(logits, seen, sink):
    """Weights of the seen logits, 0 elsewhere, and lse: -inf, with weights 0, for an empty row.

    And what exp(logit - lse) is multiplied by to be a weight, 1 but for the rounding of lse.
    Both branches of every `where` are finite where it is differentiated, so gradients are too.
    """
    seen = seen & (logits != -jnp.inf)  # a bias of -inf hides a key as a mask does
    top = jnp.max(jnp.where(seen, logits, -jnp.inf), axis=3, initial=-jnp.inf)
    top = top if sink is None else jnp.maximum(top, sink)
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, logits - top[..., None], 0)), 0)
    total = weights.sum(3) if sink is None else weights.sum(3) + jnp.exp(sink - top)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    rounded = jnp.where(jnp.abs(lse) < jnp.inf, jnp.exp(lse - top) / total, 1.0)
    return jnp.where(seen, weights / total[..., None], 0), lse, jax.lax.stop_gradient(rounded)


@jax.custom_jvp
def _without_nan(x: jax.Array) -> jax.Array:
    """0 in place of NaN; the derivative is 1 everywhere."""
    return jnp.where(jnp.isnan(x), 0, x)


_without_nan.defjvp(lambda primals, tangents: (_without_nan(*primals), *tangents))


def _alibi(slopes: jax.Array, q_pos: jax.Array, kv_pos: jax.Array) -> jax.Array:
    """What ALiBi adds: [batch or 1, num_q_heads, q_len, kv_len] from q_pos [.., 1, q_len, 1]."""
    return -slopes[:, None, None] * jnp.abs(q_pos - kv_pos).astype(jnp.float32)


def _per_head(scale: jax.Array | None, num_kv_heads: int) -> jax.Array:
    """A scale of the cache as float32 [num_kv_heads]."""
    return jnp.broadcast_to(jnp.asarray(1 if scale is None else scale, jnp.float32), num_kv_heads)
