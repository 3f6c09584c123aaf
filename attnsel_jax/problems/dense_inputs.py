"""Arguments of dense attention: sharp, ragged, and NaN wherever nothing is seen."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnsel_jax.oracle.attend import Window
from attnsel_jax.oracle.dense import dense_heads
from attnsel_jax.problems.aim import aim


def dense_inputs(
    rng: np.random.Generator,
    *,
    heads: tuple[int, int],
    head_size: int,
    q_len: int,
    kv_len: int | None = None,
    batch: int = 1,
    dtype: str = "bfloat16",
    head_size_v: int | None = None,
    q_lens: tuple[int, ...] | None = None,
    kv_lens: tuple[int, ...] | None = None,
    q_offset: int | tuple[int, ...] | None = None,
    segments: int = 0,
    sinks: bool = False,
    alibi: bool = False,
    bias: tuple[bool, bool, bool, bool] | None = None,
    masked: bool = False,
    scale: float | None = None,
    causal: bool = False,
    sliding_window: Window = None,
    attention_chunk_size: int | None = None,
    soft_cap: float | None = None,
) -> dict[str, Any]:
    """Arguments of `dense_attention`.

    Args:
        rng: source of everything drawn.
        heads: query heads, kv heads.
        head_size: of q and k; of v too unless head_size_v is given.
        q_len: queries.
        kv_len: keys; None = q_len.
        batch: rows of the batch.
        dtype: of q, k, v and bias.
        head_size_v: of v.
        q_lens: queries that exist, row by row.
        kv_lens: keys that exist, row by row.
        q_offset: position of query 0.
        segments: how many segments each row is packed of; 0 = no segment ids.
        sinks: whether there are sinks, worth about as much as the logits.
        alibi: whether there are ALiBi slopes, 2 ** (-8 i / heads).
        bias: which of the dimensions (batch, heads, q, kv) are full; None = no bias.
        masked: whether a boolean mask hides a third of the keys.
        scale: as in the contract, like all that follow.
        causal: as in the contract.
        sliding_window: as in the contract.
        attention_chunk_size: as in the contract.
        soft_cap: as in the contract.
    """
    num_q_heads, num_kv_heads = heads
    kv_len, head_size_v = kv_len or q_len, head_size_v or head_size
    lens = {"q_lens": q_lens, "kv_lens": kv_lens}
    masks: dict[str, Any] = {n: np.array(x, np.int32) for n, x in lens.items() if x is not None}
    if q_offset is not None:
        masks["q_offset"] = np.array(q_offset, np.int32)
    if segments:
        masks["q_segment_ids"] = _segment_ids(rng, batch, q_len, segments)
        masks["kv_segment_ids"] = _segment_ids(rng, batch, kv_len, segments)
        if q_len == kv_len:
            masks["kv_segment_ids"] = masks["q_segment_ids"].copy()
    if masked:
        masks["mask"] = rng.random((batch, 1, q_len, kv_len)) < 2 / 3
    statics = {
        "causal": causal,
        "sliding_window": sliding_window,
        "attention_chunk_size": attention_chunk_size,
    }
    masks |= {name: value for name, value in statics.items() if value is not None}
    k = rng.standard_normal((batch, kv_len, num_kv_heads, head_size), dtype=np.float32)
    v = rng.standard_normal((batch, kv_len, num_kv_heads, head_size_v), dtype=np.float32)
    sharpness = max(sharpness_for(soft_cap), 1.4 if bias is not None else 1.0)
    q = _aimed(rng, k, v, (batch, q_len, num_q_heads, head_size), masks, scale, sharpness)
    arguments = {"q": q.astype(dtype), "k": k.astype(dtype), "v": v.astype(dtype), **masks}
    if scale is not None:
        arguments["scale"] = scale
    if soft_cap is not None:
        arguments["soft_cap"] = soft_cap
    if sinks:
        arguments["sinks"] = sink_values(rng, num_q_heads, kv_len)
    if alibi:
        arguments["alibi_slopes"] = alibi_slopes(num_q_heads)
    if bias is not None:
        full = (batch, num_q_heads, q_len, kv_len)
        shape = [size if wide else 1 for size, wide in zip(full, bias, strict=True)]
        arguments["bias"] = (2 * rng.standard_normal(shape, dtype=np.float32)).astype(dtype)
    return arguments


def _aimed(
    rng: np.random.Generator,
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    q_shape: tuple[int, ...],
    masks: dict[str, Any],
    scale: float | None,
    sharpness: float,
) -> NDArray[np.float32]:
    """Aimed queries; rows of q that do not exist, and of k and v that nothing sees, become NaN."""
    q = np.zeros(q_shape, np.float32)
    factor = q_shape[-1] ** -0.5 if scale is None else scale
    for head in dense_heads(
        (q_shape[0], q_shape[1], 1, 1), (k.shape[0], k.shape[1], 1, 1), **masks
    ):
        see, b = head.see, head.b
        q[b] = aim(rng, k[b], see, q_shape[2], factor, sharpness)
        q[b, ~head.exists] = np.nan
        k[b, ~see.any(axis=0)] = v[b, ~see.any(axis=0)] = np.nan
    return q


def _segment_ids(
    rng: np.random.Generator, batch: int, length: int, segments: int
) -> NDArray[np.int32]:
    """Runs of the ids 0 .. segments - 1 with odd ends, [batch, length]."""
    cuts = np.sort(rng.integers(1, length, (batch, segments - 1)), axis=1)
    return (np.arange(length)[None, :, None] >= cuts[:, None, :]).sum(axis=2).astype(np.int32)


def sink_values(rng: np.random.Generator, num_q_heads: int, num_keys: int) -> NDArray[np.float32]:
    """Sinks near the lse that aimed queries have: each takes about a third of the weight."""
    return (np.log(num_keys) + rng.standard_normal(num_q_heads)).astype(np.float32)


def alibi_slopes(num_q_heads: int) -> NDArray[np.float32]:
    """Slopes 2 ** (-8 i / num_q_heads), i = 1 ..: Press et al. 2022."""
    return np.exp2(-8 * np.arange(1, num_q_heads + 1) / num_q_heads).astype(np.float32)


def sharpness_for(soft_cap: float | None) -> float:
    """Logits half as large again under a soft cap, so that it bends them."""
    return 1.0 if soft_cap is None else 1.5
