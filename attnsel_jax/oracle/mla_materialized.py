"""MLA with keys and values of each head made from the latent first, in float64."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from attnsel_jax.oracle.attend import Attended, attend, float64, visible
from attnsel_jax.oracle.fp8_ds_mla import decode_fp8_ds_mla
from attnsel_jax.oracle.ragged import sequences


def attend_mla_materialized(
    q_nope: ArrayLike,
    q_pe: ArrayLike,
    latent_pages: ArrayLike,
    w_uk: ArrayLike,
    w_uv: ArrayLike,
    *batch: Any,
    scale: float,
    soft_cap: float | None = None,
    kv_scale: ArrayLike | None = None,
    kv_cache_dtype: str | None = None,
) -> Attended:
    """MLA over a latent cache already written, head by head.

    Args:
        q_nope: [num_tokens, num_q_heads, nope_dim].
        q_pe: [num_tokens, num_q_heads, rope_dim].
        latent_pages: as in the contract of `mla`.
        w_uk: [kv_lora_rank, num_q_heads, nope_dim].
        w_uv: [kv_lora_rank, num_q_heads, v_dim].
        *batch: page_table, kv_lens, cu_q_lens, num_seqs.
        scale: as in the contract, like all that follow.
        soft_cap: as in the contract.
        kv_scale: as in the contract.
        kv_cache_dtype: as in the contract.
    """
    q = np.concatenate([float64(q_nope), float64(q_pe)], axis=-1)
    w_uk, w_uv, pages = float64(w_uk), float64(w_uv), np.asarray(latent_pages)
    rank, num_heads, v_dim = w_uv.shape
    shape = (len(q), num_heads)
    result = Attended(
        np.zeros((*shape, v_dim)),
        np.full(shape, -np.inf),
        np.zeros((*shape, v_dim)),
        np.zeros(shape),
    )
    for seq in sequences(pages.shape[1], *batch):
        stored = pages[seq.pages, seq.offsets]
        factor = 1.0 if kv_scale is None else float(np.asarray(kv_scale))
        is_bytes = kv_cache_dtype == "fp8_ds_mla"
        row = decode_fp8_ds_mla(stored) if is_bytes else float64(stored) * factor
        latent, k_pe = row[:, :rank], row[:, rank:]
        see = visible(seq.q_pos, seq.kv_pos, True, None, None)
        for head in range(num_heads):
            keys = np.concatenate([latent @ w_uk[:, head], k_pe], axis=-1)
            values = latent @ w_uv[:, head]
            part = attend(
                q[seq.tokens, head], keys, values, see, scale=float(scale), soft_cap=soft_cap
            )
            for whole, piece in zip(result, part, strict=True):
                whole[seq.tokens, head] = piece
    return result
