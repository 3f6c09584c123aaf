"""Arguments of the lightning indexer and of top-k: ties, short rows, NaN in unused slots."""

from typing import Any

import numpy as np

from attnsel_jax.problems.paged_inputs import ragged_batch, unused


def indexer_inputs(
    rng: np.random.Generator,
    *,
    q_lens: tuple[int, ...],
    kv_lens: tuple[int, ...],
    num_index_heads: int = 64,
    index_head_dim: int = 128,
    page_size: int = 64,
    dtype: str = "bfloat16",
    pad_tokens: int = 0,
) -> dict[str, Any]:
    """Arguments of `indexer_scores`; the words are those of `mla_inputs`."""
    batch = ragged_batch(rng, q_lens, kv_lens, page_size, pad_tokens=pad_tokens)
    pages = unused((batch.num_pages * page_size, index_head_dim), dtype)
    for slots in batch.slots:
        pages[slots] = rng.standard_normal((len(slots), index_head_dim), dtype=np.float32)
    shape = (batch.num_tokens, num_index_heads)
    arguments = {
        "q_index": rng.standard_normal((*shape, index_head_dim), dtype=np.float32).astype(dtype),
        "weights": rng.standard_normal(shape, dtype=np.float32) * num_index_heads**-0.5,
        "index_pages": pages.reshape(-1, page_size, index_head_dim),
        **batch.arguments,
    }
    del arguments["slot_mapping"]
    return arguments


def topk_inputs(
    rng: np.random.Generator, *, num_tokens: int, num_positions: int, topk: int
) -> dict[str, Any]:
    """Scores with many ties, and rows that see fewer positions than topk, or none."""
    scores = rng.integers(-topk, topk, (num_tokens, num_positions)).astype(np.float32)
    for t, row in enumerate(scores):
        row[t * num_positions // num_tokens :] = -np.inf
    return {"scores": scores, "topk": topk}
