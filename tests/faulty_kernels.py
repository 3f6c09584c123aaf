"""Attention lowerings with one fault each, for the comparison to find."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from attnsel_jax.xla import reference
from attnsel_jax.xla.cache_writes import write_kv

LOG2_E = 1.4426950408889634


def dense(fault):
    """XLA_REFERENCE's dense attention with a fault of `DENSE_FAULTS`."""
    return functools.partial(DENSE_FAULTS[fault], reference.dense_attention)


def paged(fault):
    """A plain paged attention with a fault of `PAGED_FAULTS`, or None."""
    return functools.partial(plain_paged, fault=fault)


def changed(**changes):
    """The kernel with some arguments replaced: a value, or a function of (value, arguments)."""

    def faulty(kernel, **arguments):
        for name, change in changes.items():
            value = change(arguments) if callable(change) else change
            arguments = arguments | {name: value}
        return kernel(**arguments)

    return faulty


def scaled(factor):
    def default_scale(arguments):
        given = arguments.get("scale")
        return factor * (arguments["q"].shape[-1] ** -0.5 if given is None else given)

    return changed(scale=default_scale)


def base_two_lse(kernel, **arguments):
    out, lse, *cache = kernel(**arguments)
    return out, lse * jnp.float32(LOG2_E), *cache


def grouped_by_remainder(kernel, **arguments):
    """Query head h reads kv head h % K, not h // (H / K)."""
    num_q_heads = arguments["q"].shape[-2]
    num_kv_heads = arguments["k"].shape[-2]
    order = np.argsort(np.arange(num_q_heads) % num_kv_heads, kind="stable")
    arguments = arguments | {"q": arguments["q"][..., order, :]}
    if arguments.get("sinks") is not None:
        arguments["sinks"] = arguments["sinks"][order]
    back = np.argsort(order)
    out, lse, *cache = kernel(**arguments)
    return out[..., back, :], lse[..., back], *cache


def gradient_scaled(name, factor):
    @jax.custom_vjp
    def through(x):
        return x

    through.defvjp(lambda x: (x, None), lambda _, g: ((g * factor).astype(g.dtype),))

    def faulty(kernel, **arguments):
        return kernel(**(arguments | {name: through(arguments[name])}))

    return faulty


DENSE_FAULTS = {
    None: changed(),
    "window one too wide": changed(sliding_window=lambda a: a["sliding_window"] + 1),
    "window one too narrow": changed(sliding_window=lambda a: a["sliding_window"] - 1),
    "top-left": changed(q_offset=None),
    "sink dropped": changed(sinks=None),
    "soft cap dropped": changed(soft_cap=None),
    "scale 2 % too large": scaled(1.02),
    "scale 2 % too small": scaled(0.98),
    "grouped by remainder": grouped_by_remainder,
    "base-2 lse": base_two_lse,
    "segment leak": changed(q_segment_ids=None, kv_segment_ids=None),
    "causal one too far": changed(
        causal=False,
        sliding_window=(None, 2),
    ),
    "kv_lens ignored": changed(kv_lens=None),
    "gradient of q 3 % too large": gradient_scaled("q", 1.03),
    "gradient of k 3 % too large": gradient_scaled("k", 1.03),
    "gradient of v 3 % too large": gradient_scaled("v", 1.03),
    "gradient of bias 3 % too large": gradient_scaled("bias", 1.03),
    "gradient of sinks dropped": gradient_scaled("sinks", 0.0),
}
PAGED_FAULTS = (
    None,
    "window one too wide",
    "top-left",
    "sink dropped",
    "soft cap dropped",
    "scale 2 % too large",
    "grouped by remainder",
    "page skipped",
    "base-2 lse",
    "v unscaled",
    "k unscaled",
    "last page whole",
    "cache not written",
)


def plain_paged(
    q, k, v, kv_pages, page_table, kv_lens, cu_q_lens, num_seqs, slot_mapping, *, scale=None,
    causal=True, sliding_window=None, attention_chunk_size=None, soft_cap=None, alibi_slopes=None,
    sinks=None, k_scale=None, v_scale=None, fault=None,
):  # fmt: skip
    """Every token gathers its whole sequence; float32 throughout."""
    assert fault in PAGED_FAULTS
    assert alibi_slopes is None
    assert attention_chunk_size is None
    written = kv_pages
    if k is not None and fault != "cache not written":
        written = write_kv(kv_pages, k, v, slot_mapping, k_scale=k_scale, v_scale=v_scale)
    _, num_pages, page_size, num_kv_heads, head_dim = kv_pages.shape
    seq = jnp.searchsorted(cu_q_lens[1:], jnp.arange(q.shape[0]), side="right")
    exists = seq < num_seqs
    seq = jnp.minimum(seq, num_seqs - 1)
    kv_len, start, end = kv_lens[seq], cu_q_lens[seq], cu_q_lens[seq + 1]
    shift = 0 if fault == "top-left" else kv_len - (end - start)
    q_pos = (jnp.arange(q.shape[0]) - start + shift)[:, None]
    rows = written[:, jnp.clip(page_table[seq], 0, num_pages - 1)].astype(jnp.float32)
    rows = rows.reshape(2, q.shape[0], -1, num_kv_heads, head_dim)  # [2, tokens, keys, heads, dim]
    kv_pos = jnp.arange(rows.shape[2])[None, :]
    limit = kv_len[:, None]
    if fault == "last page whole":
        limit = -(-limit // page_size) * page_size
    see = exists[:, None] & (kv_pos < limit)
    if fault == "page skipped":
        see &= kv_pos // page_size != 1
    if causal:
        see &= kv_pos <= q_pos
    if sliding_window is not None:
        see &= kv_pos > q_pos - sliding_window - (fault == "window one too wide")
    rows = jnp.where(see[None, :, :, None, None], rows, 0)
    scales = [jnp.ones(num_kv_heads) * (1 if s is None else s) for s in (k_scale, v_scale)]
    keys = rows[0] * (1 if fault == "k unscaled" else scales[0][:, None])
    values = rows[1] * (1 if fault == "v unscaled" else scales[1][:, None])
    group = q.shape[1] // num_kv_heads
    heads = np.arange(q.shape[1])
    of = heads % num_kv_heads if fault == "grouped by remainder" else heads // group
    factor = (head_dim**-0.5 if scale is None else scale) * (
        1.02 if fault == "scale 2 % too large" else 1
    )
    q32 = jnp.where(exists[:, None, None], q.astype(jnp.float32), 0)
    logits = factor * jnp.einsum("tnd,tsnd->tns", q32, keys[:, :, of], precision="highest")
    if soft_cap is not None and fault != "soft cap dropped":
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    logits = jnp.where(see[:, None, :], logits, -jnp.inf)
    if sinks is not None and fault != "sink dropped":
        extra = jnp.where(exists[:, None], sinks, -jnp.inf)[:, :, None]
    else:
        extra = jnp.full((*logits.shape[:2], 1), -jnp.inf)
    lse = jax.nn.logsumexp(jnp.concatenate([logits, extra], 2), axis=2)
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(lse), lse, 0)[:, :, None])
    out = jnp.einsum("tns,tsnd->tnd", weights, values[:, :, of], precision="highest")
    if fault == "base-2 lse":
        lse = lse * LOG2_E
    return out.astype(q.dtype), lse.astype(jnp.float32), written
