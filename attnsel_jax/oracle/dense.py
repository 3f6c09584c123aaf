"""Dense attention in float64: loops over batch and heads, whole rows of keys at once."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attnsel_jax.oracle.attend import Attended, Window, attend, float64, visible


class Head(NamedTuple):
    """What one query head of one batch row is made of, everything float64.

    Attributes:
        b, n, kv: batch row, query head, kv head.
        see: [q_len, kv_len]. exists: [q_len]: rows below q_lens.
        added: [q_len, kv_len] or None. distance: [q_len, kv_len]: |q_pos - kv_pos|.
        sinks: [q_len], -inf for rows that do not exist; or None.
    """

    b: int
    n: int
    kv: int
    see: NDArray[np.bool_]
    exists: NDArray[np.bool_]
    added: NDArray[np.float64] | None
    distance: NDArray[np.int64]
    sinks: NDArray[np.float64] | None


def dense_attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, **arguments: Any
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Dense attention; arguments and (out, lse) as in the contract, float64."""
    attended = attend_dense(q, k, v, **arguments)
    return attended.out, attended.lse


def attend_dense(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    **masks: Any,
) -> Attended:
    """Dense attention with what an error budget needs; arguments as in the contract."""
    q, k, v = float64(q), float64(k), float64(v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    magnitude = np.zeros_like(out)
    lse = np.full(q.shape[:3], -np.inf)
    logit_size = np.zeros(q.shape[:3])
    for head in dense_heads(q.shape, k.shape, **masks):
        b, n, kv = head.b, head.n, head.kv
        out[b, :, n], lse[b, :, n], magnitude[b, :, n], logit_size[b, :, n] = attend(
            q[b, :, n],
            k[b, :, kv],
            v[b, :, kv],
            head.see,
            scale=scale,
            soft_cap=soft_cap,
            added=head.added,
            sinks=head.sinks,
        )
    return Attended(out, lse, magnitude, logit_size)


def dense_heads(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    *,
    causal: bool = False,
    q_offset: ArrayLike | None = None,
    sliding_window: Window = None,
    attention_chunk_size: int | None = None,
    bias: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    q_segment_ids: ArrayLike | None = None,
    kv_segment_ids: ArrayLike | None = None,
    q_lens: ArrayLike | None = None,
    kv_lens: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
) -> Iterator[Head]:
    """Each query head of each batch row, masked; arguments as in the contract."""
    batch, q_len, num_q_heads, _ = q_shape
    kv_len, num_kv_heads = k_shape[1:3]
    full = (batch, num_q_heads, q_len, kv_len)
    offsets = np.broadcast_to(0 if q_offset is None else np.asarray(q_offset), (batch,))
    q_rows = np.full(batch, q_len) if q_lens is None else np.asarray(q_lens)
    kv_rows = np.full(batch, kv_len) if kv_lens is None else np.asarray(kv_lens)
    biases = None if bias is None else np.broadcast_to(np.asarray(bias), full)
    masks = None if mask is None else np.broadcast_to(np.asarray(mask), full)
    kv_pos = np.arange(kv_len)
    for b in range(batch):
        q_pos = np.arange(q_len) + int(offsets[b])
        exists = np.arange(q_len) < q_rows[b]
        see = visible(q_pos, kv_pos, causal, sliding_window, attention_chunk_size)
        see &= exists[:, None] & (kv_pos < kv_rows[b])[None, :]
        if q_segment_ids is not None:
            q_ids, kv_ids = np.asarray(q_segment_ids)[b], np.asarray(kv_segment_ids)[b]
            see &= q_ids[:, None] == kv_ids[None, :]
        distance = np.abs(q_pos[:, None] - kv_pos[None, :])
        for n in range(num_q_heads):
            added = None if biases is None else float64(biases[b, n])
            if alibi_slopes is not None:
                slope = float(np.asarray(alibi_slopes)[n])
                added = -slope * distance + (0 if added is None else added)
            sink = None
            if sinks is not None:
                sink = np.where(exists, float(np.asarray(sinks)[n]), -np.inf)
            kv = n // (num_q_heads // num_kv_heads)
            seen = see if masks is None else see & masks[b, n]
            yield Head(b, n, kv, seen, exists, added, distance, sink)
