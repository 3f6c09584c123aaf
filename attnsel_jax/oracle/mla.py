"""MLA and sparse MLA in float64: one key for all heads, whose first part is also the value."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attnsel_jax.oracle.attend import Attended, attend, float64, visible
from attnsel_jax.oracle.cache import quantise
from attnsel_jax.oracle.fp8_ds_mla import decode_fp8_ds_mla, encode_fp8_ds_mla
from attnsel_jax.oracle.ragged import sequences, write_slots


def mla_attention(
    ql_nope: ArrayLike,
    q_pe: ArrayLike,
    kv_c: ArrayLike | None,
    k_pe: ArrayLike | None,
    latent_pages: ArrayLike,
    page_table: ArrayLike,
    kv_lens: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike,
    slot_mapping: ArrayLike | None,
    *,
    scale: float,
    soft_cap: float | None = None,
    kv_scale: ArrayLike | None = None,
    kv_cache_dtype: str | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray]:
    """MLA; arguments and (out, lse, latent_pages) as in the contract, float64."""
    written = write_latents(kv_c, k_pe, latent_pages, slot_mapping, kv_scale, kv_cache_dtype)
    batch = (page_table, kv_lens, cu_q_lens, num_seqs)
    numbers = {"scale": scale, "soft_cap": soft_cap, "kv_scale": kv_scale}
    got = attend_mla(ql_nope, q_pe, written, *batch, **numbers, kv_cache_dtype=kv_cache_dtype)
    return got.out, got.lse, written


def sparse_mla_attention(
    ql_nope: ArrayLike,
    q_pe: ArrayLike,
    kv_c: ArrayLike | None,
    k_pe: ArrayLike | None,
    latent_pages: ArrayLike,
    topk_indices: ArrayLike,
    page_table: ArrayLike,
    kv_lens: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike,
    slot_mapping: ArrayLike | None,
    *,
    scale: float,
    soft_cap: float | None = None,
    kv_scale: ArrayLike | None = None,
    kv_cache_dtype: str | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray]:
    """Sparse MLA; arguments and (out, lse, latent_pages) as in the contract, float64."""
    written = write_latents(kv_c, k_pe, latent_pages, slot_mapping, kv_scale, kv_cache_dtype)
    batch = (topk_indices, page_table, kv_lens, cu_q_lens, num_seqs)
    numbers = {"scale": scale, "soft_cap": soft_cap, "kv_scale": kv_scale}
    got = attend_sparse_mla(
        ql_nope, q_pe, written, *batch, **numbers, kv_cache_dtype=kv_cache_dtype
    )
    return got.out, got.lse, written


def write_latents(
    kv_c: ArrayLike | None,
    k_pe: ArrayLike | None,
    latent_pages: ArrayLike,
    slot_mapping: ArrayLike | None,
    kv_scale: ArrayLike | None = None,
    kv_cache_dtype: str | None = None,
    nudge: float = 1.0,
) -> NDArray:
    """A copy of latent_pages with this step's rows written, in the cache's format.

    `nudge` multiplies the scales: it shows which values lie next to a tie.
    """
    pages = np.array(latent_pages)
    if kv_c is None:
        return pages
    if kv_cache_dtype == "fp8_ds_mla":
        rows = encode_fp8_ds_mla(kv_c, k_pe, nudge)
    else:
        row = np.concatenate([np.asarray(kv_c), np.asarray(k_pe)], axis=-1)
        scale = None if kv_scale is None else np.asarray(kv_scale) * np.float32(nudge)
        rows = quantise(row, scale, pages.dtype)
    write_slots(pages, rows, slot_mapping)
    return pages


def attend_mla(
    ql_nope: ArrayLike, q_pe: ArrayLike, latent_pages: ArrayLike, *batch: Any, **numbers: Any
) -> Attended:
    """MLA over a latent cache already written; every position is named.

    Args:
        ql_nope: as in the contract.
        q_pe: as in the contract.
        latent_pages: as in the contract.
        *batch: page_table, kv_lens, cu_q_lens, num_seqs.
        **numbers: scale, soft_cap, kv_scale, kv_cache_dtype.
    """
    return attend_sparse_mla(ql_nope, q_pe, latent_pages, None, *batch, **numbers)


def attend_sparse_mla(
    ql_nope: ArrayLike,
    q_pe: ArrayLike,
    latent_pages: ArrayLike,
    topk_indices: ArrayLike | None,
    page_table: ArrayLike,
    kv_lens: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike,
    *,
    scale: float,
    soft_cap: float | None = None,
    kv_scale: ArrayLike | None = None,
    kv_cache_dtype: str | None = None,
) -> Attended:
    """Sparse MLA over a latent cache already written; topk_indices None = every position."""
    q = np.concatenate([float64(ql_nope), float64(q_pe)], axis=-1)
    num_tokens, num_q_heads, _ = q.shape
    rank = np.asarray(ql_nope).shape[-1]
    pages = np.asarray(latent_pages)
    result = Attended(
        np.zeros((num_tokens, num_q_heads, rank)),
        np.full((num_tokens, num_q_heads), -np.inf),
        np.zeros((num_tokens, num_q_heads, rank)),
        np.zeros((num_tokens, num_q_heads)),
    )
    for seq in sequences(pages.shape[1], page_table, kv_lens, cu_q_lens, num_seqs):
        stored = pages[seq.pages, seq.offsets]
        if kv_cache_dtype == "fp8_ds_mla":
            latent = decode_fp8_ds_mla(stored)
        else:
            latent = float64(stored) * (1.0 if kv_scale is None else float(np.asarray(kv_scale)))
        see = visible(seq.q_pos, seq.kv_pos, True, None, None)
        if topk_indices is not None:
            see &= named(np.asarray(topk_indices)[seq.tokens], len(seq.kv_pos))
        rows = q[seq.tokens].reshape(-1, q.shape[-1])  # (token, head), the head fastest
        attended = attend(
            rows, latent, latent[:, :rank], np.repeat(see, num_q_heads, axis=0),
            scale=float(scale), soft_cap=soft_cap,
        )  # fmt: skip
        for whole, part in zip(result, attended, strict=True):
            whole[seq.tokens] = part.reshape(whole[seq.tokens].shape)
    return result


def named(topk_indices: NDArray, kv_len: int) -> NDArray[np.bool_]:
    """[tokens, kv_len]: whether a token's list names the position; -1 and beyond name nothing."""
    see = np.zeros((len(topk_indices), kv_len), bool)
    for row, positions in zip(see, topk_indices, strict=True):
        row[positions[(positions >= 0) & (positions < kv_len)]] = True
    return see
