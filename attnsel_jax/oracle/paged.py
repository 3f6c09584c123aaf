"""Paged attention in float64: write the cache, then attend to what it holds."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attnsel_jax.oracle.attend import Attended, Window, attend, float64, visible
from attnsel_jax.oracle.cache import quantise
from attnsel_jax.oracle.ragged import sequences, write_slots


def paged_attention(
    q: ArrayLike,
    k: ArrayLike | None,
    v: ArrayLike | None,
    kv_pages: ArrayLike,
    page_table: ArrayLike,
    kv_lens: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike,
    slot_mapping: ArrayLike | None,
    **arguments: Any,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray]:
    """Paged attention over a stacked cache; arguments and results as in the contract."""
    scales = {name: arguments.get(name) for name in ("k_scale", "v_scale")}
    written = write_kv(k, v, kv_pages, slot_mapping, **scales)
    attended = attend_paged(q, written, page_table, kv_lens, cu_q_lens, num_seqs, **arguments)
    return attended.out, attended.lse, written


def write_kv(
    k: ArrayLike | None,
    v: ArrayLike | None,
    kv_pages: ArrayLike,
    slot_mapping: ArrayLike | None,
    *,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
    nudge: float = 1.0,
) -> NDArray:
    """A copy of kv_pages with k and v written, in the cache's dtype.

    `nudge` multiplies the scales: it shows which values lie next to a tie.
    """
    pages = np.array(kv_pages)
    for side, rows, scale in ((0, k, k_scale), (1, v, v_scale)):
        if rows is not None:
            per_head = (
                None if scale is None else (np.asarray(scale) * np.float32(nudge)).reshape(1, -1, 1)
            )
            write_slots(pages[side], quantise(rows, per_head, pages.dtype), slot_mapping)
    return pages


def attend_paged(
    q: ArrayLike,
    kv_pages: ArrayLike,
    page_table: ArrayLike,
    kv_lens: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike,
    *,
    scale: float | None = None,
    causal: bool = True,
    sliding_window: Window = None,
    attention_chunk_size: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
) -> Attended:
    """Attention to a stacked cache already written; arguments as in the contract."""
    q, pages = float64(q), np.asarray(kv_pages)
    _, num_q_heads, head_dim = q.shape
    page_size, num_kv_heads = pages.shape[2:4]
    group = num_q_heads // num_kv_heads
    scale = head_dim**-0.5 if scale is None else float(scale)
    k_scales = np.broadcast_to(1.0 if k_scale is None else float64(k_scale), num_kv_heads)
    v_scales = np.broadcast_to(1.0 if v_scale is None else float64(v_scale), num_kv_heads)
    result = Attended(
        np.zeros(q.shape), np.full(q.shape[:2], -np.inf), np.zeros(q.shape), np.zeros(q.shape[:2])
    )
    for seq in sequences(page_size, page_table, kv_lens, cu_q_lens, num_seqs):
        see = visible(seq.q_pos, seq.kv_pos, causal, sliding_window, attention_chunk_size)
        distance = np.abs(seq.q_pos[:, None] - seq.kv_pos[None, :])
        for head in range(num_q_heads):
            kv = head // group
            attended = attend(
                q[seq.tokens, head],
                float64(pages[0, seq.pages, seq.offsets, kv]) * k_scales[kv],
                float64(pages[1, seq.pages, seq.offsets, kv]) * v_scales[kv],
                see,
                scale=scale,
                soft_cap=soft_cap,
                added=None if alibi_slopes is None else -float64(alibi_slopes)[head] * distance,
                sinks=None if sinks is None else np.full(len(see), float64(sinks)[head]),
            )
            for whole, part in zip(result, attended, strict=True):
                whole[seq.tokens, head] = part
    return result
