"""Arguments of paged attention: shuffled pages, ragged lengths, NaN in every slot not named."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from attnsel_jax.oracle.attend import Window, visible
from attnsel_jax.oracle.cache import quantise
from attnsel_jax.problems.aim import aim
from attnsel_jax.problems.dense_inputs import alibi_slopes, sharpness_for, sink_values

JUNK_PAGES = (2**30, -7)  # what page tables hold past a sequence's last page
SATURATES_AT = 3.0  # true values past three standard deviations do not fit a quantised cache


class Batch(NamedTuple):
    """A ragged batch.

    Attributes:
        arguments: page_table, kv_lens, cu_q_lens, num_seqs, slot_mapping.
        slots: for each sequence, the cache slot of each of its positions.
        num_tokens, num_pages: sizes, padding included.
    """

    arguments: dict[str, Any]
    slots: list[NDArray[np.int64]]
    num_tokens: int
    num_pages: int

    def rows(
        self, q_lens: tuple[int, ...], kv_lens: tuple[int, ...]
    ) -> Iterator[tuple[slice, int, int, NDArray[np.int64]]]:
        """For each sequence: its tokens, its q_len and kv_len, the slots of its positions."""
        first = 0
        for q_len, kv_len, slots in zip(q_lens, kv_lens, self.slots, strict=True):
            yield slice(first, first + q_len), q_len, kv_len, slots
            first += q_len


def ragged_batch(
    rng: np.random.Generator,
    q_lens: tuple[int, ...],
    kv_lens: tuple[int, ...],
    page_size: int,
    pad_seqs: int = 1,
    pad_tokens: int = 0,
    writes: bool = True,
) -> Batch:
    """Pages in shuffled order with two that nobody uses; junk wherever the contract allows it."""
    pages_of = [-(-kv_len // page_size) for kv_len in kv_lens]
    num_pages, num_seqs = sum(pages_of) + 2, len(kv_lens)
    order = rng.permutation(num_pages)
    table = np.resize(np.array(JUNK_PAGES, np.int32), (num_seqs + pad_seqs, max(pages_of) + 1))
    slots, taken = [], 0
    for i, count in enumerate(pages_of):
        mine = order[taken : taken + count]
        table[i, :count] = mine
        taken += count
        slots.append((mine[:, None] * page_size + np.arange(page_size)).ravel()[: kv_lens[i]])
    starts = np.concatenate([[0], np.cumsum(q_lens), np.full(pad_seqs, 10**6)])
    new = [s[kv - q :] for s, q, kv in zip(slots, q_lens, kv_lens, strict=True)]
    arguments = {
        "page_table": table,
        "kv_lens": np.concatenate([kv_lens, np.full(pad_seqs, 10**6)]).astype(np.int32),
        "cu_q_lens": starts.astype(np.int32),
        "num_seqs": np.array(num_seqs, np.int32),
        "slot_mapping": np.concatenate([*new, np.full(pad_tokens, -1)]).astype(np.int32),
    }
    if not writes:
        arguments["slot_mapping"] = None
    return Batch(arguments, slots, sum(q_lens) + pad_tokens, num_pages)


def unused(shape: tuple[int, ...], dtype: str) -> NDArray:
    """A cache of NaN, or of its largest value where the dtype has no NaN."""
    if dtype == "uint8":  # fp8_ds_mla: NaN as e4m3, as float32 and as bfloat16
        return np.full(shape, 255, np.uint8)
    return np.full(shape, 127 if dtype == "int8" else np.nan, np.dtype(dtype))


def paged_inputs(
    rng: np.random.Generator,
    *,
    heads: tuple[int, int],
    head_size: int,
    q_lens: tuple[int, ...],
    kv_lens: tuple[int, ...],
    page_size: int = 16,
    dtype: str = "bfloat16",
    cache_dtype: str | None = None,
    scales: str | None = None,
    pad_seqs: int = 1,
    pad_tokens: int = 0,
    writes: bool = True,
    sinks: bool = False,
    alibi: bool = False,
    causal: bool = True,
    sliding_window: Window = None,
    attention_chunk_size: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> dict[str, Any]:
    """Arguments of `paged_attention`.

    Args:
        rng: source of everything drawn.
        heads: query heads, kv heads.
        head_size: of q, k and v.
        q_lens: new tokens of each sequence.
        kv_lens: positions of each sequence, the new ones included.
        page_size: positions in a page.
        dtype: of q, k and v.
        cache_dtype: of the cache; None = dtype.
        scales: None, "tensor" or "head": which scales the cache has.
        pad_seqs: rows of page_table beyond the sequences that exist.
        pad_tokens: tokens beyond those of the sequences.
        writes: whether this step's k and v are given, or lie in the cache already.
        sinks: whether there are sinks.
        alibi: whether there are ALiBi slopes.
        causal: as in the contract, like all that follow.
        sliding_window: as in the contract.
        attention_chunk_size: as in the contract.
        scale: as in the contract.
        soft_cap: as in the contract.
    """
    num_q_heads, num_kv_heads = heads
    cache_dtype = cache_dtype or dtype
    batch = ragged_batch(rng, q_lens, kv_lens, page_size, pad_seqs, pad_tokens, writes)
    cache = unused((2, batch.num_pages * page_size, num_kv_heads, head_size), cache_dtype)
    cache_scales = {
        f"{side}_scale": cache_scale(rng, cache_dtype, None if scales == "tensor" else num_kv_heads)
        for side in ("k", "v")
        if scales is not None
    }
    q = np.full((batch.num_tokens, num_q_heads, head_size), np.nan, np.float32)
    new = np.full((2, batch.num_tokens, num_kv_heads, head_size), np.nan, np.float32)
    factor = head_size**-0.5 if scale is None else scale
    for tokens, q_len, kv_len, slots in batch.rows(q_lens, kv_lens):
        true = rng.standard_normal((2, kv_len, num_kv_heads, head_size), dtype=np.float32)
        true = true.astype(dtype).astype(np.float32)
        _fill(cache, slots[: kv_len - q_len if writes else kv_len], true, cache_scales)
        new[:, tokens] = true[:, kv_len - q_len :]
        positions = kv_len - q_len + np.arange(q_len), np.arange(kv_len)
        see = visible(*positions, causal, sliding_window, attention_chunk_size)
        q[tokens] = aim(rng, true[0], see, num_q_heads, factor, sharpness_for(soft_cap))
    options = {
        "causal": None if causal else False,
        "sliding_window": sliding_window,
        "attention_chunk_size": attention_chunk_size,
        "scale": scale,
        "soft_cap": soft_cap,
        "alibi_slopes": alibi_slopes(num_q_heads) if alibi else None,
        "sinks": sink_values(rng, num_q_heads, _most_seen(kv_lens, sliding_window))
        if sinks
        else None,
    }
    return {
        "q": q.astype(dtype),
        **dict(zip("kv", new.astype(dtype) if writes else (None, None), strict=True)),
        "kv_pages": cache.reshape(2, -1, page_size, num_kv_heads, head_size),
        **batch.arguments,
        **cache_scales,
        **{name: value for name, value in options.items() if value is not None},
    }


def _fill(
    cache: NDArray, slots: NDArray, true: NDArray[np.float32], scales: dict[str, NDArray]
) -> None:
    """Puts the first of the true keys and values into their slots."""
    for side, name in enumerate(("k_scale", "v_scale")):
        scale = scales[name].reshape(1, -1, 1) if name in scales else None
        cache[side, slots] = quantise(true[side, : len(slots)], scale, cache.dtype)


def cache_scale(
    rng: np.random.Generator, cache_dtype: str, num_kv_heads: int | None
) -> NDArray[np.float32]:
    """A scale, or one for each head, by which the largest of true values saturate."""
    dtype = np.dtype(cache_dtype)
    largest = np.iinfo(dtype).max if dtype.kind == "i" else float(ml_dtypes.finfo(dtype).max)
    return np.asarray(rng.uniform(0.7, 1.3, num_kv_heads) * SATURATES_AT / largest, np.float32)


def _most_seen(kv_lens: tuple[int, ...], sliding_window: Window) -> int:
    """About how many keys the longest row sees."""
    return min(max(kv_lens), sliding_window if isinstance(sliding_window, int) else max(kv_lens))
