"""Arguments of MLA, sparse MLA and the indexer: one latent for all heads, NaN in unused slots."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnsel_jax.oracle.attend import visible
from attnsel_jax.oracle.cache import quantise
from attnsel_jax.oracle.fp8_ds_mla import BYTES, encode_fp8_ds_mla
from attnsel_jax.problems.aim import aim
from attnsel_jax.problems.dense_inputs import sharpness_for
from attnsel_jax.problems.paged_inputs import cache_scale, ragged_batch, unused

FP8_DS_MLA = "fp8_ds_mla"


def mla_inputs(
    rng: np.random.Generator,
    *,
    num_heads: int,
    q_lens: tuple[int, ...],
    kv_lens: tuple[int, ...],
    rank: int = 512,
    rope_dim: int = 64,
    qk_nope_head_dim: int = 128,
    page_size: int = 64,
    dtype: str = "bfloat16",
    cache_dtype: str | None = None,
    scaled: bool = False,
    pad_seqs: int = 1,
    pad_tokens: int = 0,
    writes: bool = True,
    soft_cap: float | None = None,
    topk: int | None = None,
) -> dict[str, Any]:
    """Arguments of `mla_attention`, or of `sparse_mla_attention` where topk is given.

    Args:
        rng: source of everything drawn.
        num_heads: query heads.
        q_lens: new tokens of each sequence.
        kv_lens: positions of each sequence, the new ones included.
        rank: kv_lora_rank.
        rope_dim: size of the rotary part.
        qk_nope_head_dim: of the model; with rope_dim it gives the scale.
        page_size: positions in a page.
        dtype: of queries and latents.
        cache_dtype: of the cache, or "fp8_ds_mla"; None = dtype.
        scaled: whether the cache has a scale.
        pad_seqs: rows of page_table beyond the sequences that exist.
        pad_tokens: tokens beyond those of the sequences.
        writes: whether this step's latents are given, or lie in the cache already.
        soft_cap: as in the contract.
        topk: positions named for each token, -1 and hidden ones among them.
    """
    cache_dtype, size = cache_dtype or dtype, rank + rope_dim
    scale = (qk_nope_head_dim + rope_dim) ** -0.5
    batch = ragged_batch(rng, q_lens, kv_lens, page_size, pad_seqs, pad_tokens, writes)
    is_bytes = cache_dtype == FP8_DS_MLA
    width = BYTES if is_bytes else size
    cache = unused((batch.num_pages * page_size, width), "uint8" if is_bytes else cache_dtype)
    kv_scale = cache_scale(rng, cache_dtype, None) if scaled else None
    q = np.full((batch.num_tokens, num_heads, size), np.nan, np.float32)
    new = np.full((batch.num_tokens, size), np.nan, np.float32)
    named = None if topk is None else np.full((batch.num_tokens, topk), -1, np.int32)
    for tokens, q_len, kv_len, slots in batch.rows(q_lens, kv_lens):
        true = rng.standard_normal((kv_len, size), dtype=np.float32)
        true = true.astype(dtype).astype(np.float32)
        _fill(cache, slots[: kv_len - q_len if writes else kv_len], true, rank, kv_scale)
        new[tokens] = true[kv_len - q_len :]
        see = visible(kv_len - q_len + np.arange(q_len), np.arange(kv_len), True, None, None)
        if named is not None:
            named[tokens], see = _named_positions(rng, see, named.shape[1])
        q[tokens] = aim(rng, true[:, None], see, num_heads, scale, sharpness_for(soft_cap))
    arguments = _split(q.astype(dtype), new.astype(dtype) if writes else None, rank)
    options = {
        "soft_cap": soft_cap,
        "kv_scale": kv_scale,
        "topk_indices": named,
        "kv_cache_dtype": FP8_DS_MLA if is_bytes else None,
    }
    return {
        **arguments,
        "latent_pages": cache.reshape(-1, page_size, width),
        **batch.arguments,
        "scale": scale,
        **{name: value for name, value in options.items() if value is not None},
    }


def _fill(
    cache: NDArray,
    slots: NDArray,
    true: NDArray[np.float32],
    rank: int,
    kv_scale: NDArray[np.float32] | None,
) -> None:
    """Puts the first of the true latents into their slots."""
    true = true[: len(slots)]
    if cache.dtype == np.uint8:
        cache[slots] = encode_fp8_ds_mla(true[:, :rank], true[:, rank:])
    else:
        cache[slots] = quantise(true, kv_scale, cache.dtype)


def _split(q: NDArray, new: NDArray | None, rank: int) -> dict[str, NDArray | None]:
    """Latent and rotary parts of the queries and of this step's rows."""
    parts = {"ql_nope": q[..., :rank], "q_pe": q[..., rank:], "kv_c": None, "k_pe": None}
    if new is not None:
        parts |= {"kv_c": new[:, :rank], "k_pe": new[:, rank:]}
    return {name: x if x is None else np.ascontiguousarray(x) for name, x in parts.items()}


def _named_positions(
    rng: np.random.Generator, see: NDArray[np.bool_], topk: int
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Lists [tokens, topk] in random order, and what they let each token see.

    Four fifths of the visible positions (at most nine tenths of a list); then a hidden one and one
    past the cache as traps; -1 for the rest. Every seventh token's list is empty.
    """
    lists = np.full((len(see), topk), -1, np.int32)
    sees = np.zeros_like(see)
    for t, row in enumerate(see):
        if t % 7 == 6:
            continue
        visible_here, hidden = np.flatnonzero(row), np.flatnonzero(~row)
        count = min(-(-4 * len(visible_here) // 5), topk * 9 // 10)
        chosen = rng.permutation(visible_here)[:count]
        sees[t, chosen] = True
        traps = [*rng.permutation(hidden)[:1], len(row)]
        lists[t, : len(chosen) + len(traps)] = [*chosen, *traps][:topk]
        lists[t] = rng.permutation(lists[t])
    return lists, sees
