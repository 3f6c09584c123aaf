"""The lightning indexer in float64: scores of cached positions, and the best of them."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attnsel_jax.oracle.attend import float64, visible
from attnsel_jax.oracle.ragged import sequences


def indexer_scores(
    q_index: ArrayLike,
    weights: ArrayLike,
    index_pages: ArrayLike,
    page_table: ArrayLike,
    kv_lens: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike,
) -> NDArray[np.float64]:
    """Scores [num_tokens, pages_per_seq * page_size], -inf where not seen; as in the contract."""
    q, weight, pages = float64(q_index), float64(weights), np.asarray(index_pages)
    page_size = pages.shape[1]
    scores = np.full((len(q), np.asarray(page_table).shape[1] * page_size), -np.inf)
    for seq in sequences(page_size, page_table, kv_lens, cu_q_lens, num_seqs):
        keys = float64(pages[seq.pages, seq.offsets])
        sums = np.zeros((len(seq.q_pos), len(seq.kv_pos)))
        for head in range(q.shape[1]):
            dots = q[seq.tokens, head] @ keys.T
            sums += weight[seq.tokens, head, None] * np.maximum(dots, 0)
        see = visible(seq.q_pos, seq.kv_pos, True, None, None)
        scores[seq.tokens, : len(seq.kv_pos)] = np.where(see, sums, -np.inf)
    return scores


def indexer_score_sizes(
    q_index: ArrayLike, weights: ArrayLike, index_pages: ArrayLike, *batch: ArrayLike
) -> NDArray[np.float64]:
    """Like the scores: sum over heads of |weight| * |q| * |k|, what rounding errors scale with.

    It is the score of lengths, in one dimension; 0 where nothing is seen.
    """
    lengths = [np.linalg.norm(float64(x), axis=-1, keepdims=True) for x in (q_index, index_pages)]
    sizes = indexer_scores(lengths[0], np.abs(float64(weights)), lengths[1], *batch)
    return np.where(np.isfinite(sizes), sizes, 0)


def topk_positions(scores: ArrayLike, topk: int) -> NDArray[np.int32]:
    """Positions [num_tokens, topk] of the largest scores, best first, ties to the lower; or -1."""
    largest = np.finfo(np.float64).max  # inf is below NaN
    scores = np.nan_to_num(float64(scores), nan=np.inf, posinf=largest, neginf=-np.inf)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :topk]
    best = np.where(np.take_along_axis(scores, order, axis=1) == -np.inf, -1, order)
    positions = np.full((len(scores), topk), -1, np.int32)
    positions[:, : best.shape[1]] = best
    return positions
