"""One softmax over the keys that each row sees: what every op comes down to.

A row is one query of one head. Callers say which keys a row sees; this file never touches others.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROWS_TIMES_KEYS = 2**22  # logits held at once: 32 MiB of float64
Window = int | tuple[int | None, int | None] | None


class Attended(NamedTuple):
    """An op's result, and the two sizes that its rounding errors are proportional to.

    Attributes:
        out: the output.
        lse: natural logarithm of the softmax's denominator; -inf for an empty row.
        magnitude: like out: sum of weight * |value|, what out would be without cancellation.
        logit_size: like lse: a bound of the terms that a row's logits are sums of.
    """

    out: NDArray[np.float64]
    lse: NDArray[np.float64]
    magnitude: NDArray[np.float64]
    logit_size: NDArray[np.float64]


def float64(x: ArrayLike) -> NDArray[np.float64]:
    """The same numbers in float64, from any dtype that NumPy or ml_dtypes knows."""
    return np.asarray(x).astype(np.float64)


def visible(
    q_pos: NDArray[Any],
    kv_pos: NDArray[Any],
    causal: bool,
    sliding_window: Window,
    attention_chunk_size: int | None,
) -> NDArray[np.bool_]:
    """Which keys (columns, at kv_pos) the queries (rows, at q_pos) see by position alone."""
    left, right = (
        sliding_window if isinstance(sliding_window, tuple) else (sliding_window, sliding_window)
    )
    ahead = np.asarray(kv_pos, np.int64)[None, :] - np.asarray(q_pos, np.int64)[:, None]
    see = np.ones(ahead.shape, bool)
    if causal:
        see[ahead > 0] = False
    if left is not None:
        see[ahead <= -left] = False
    if right is not None:
        see[ahead >= right] = False
    if attention_chunk_size is not None:
        q_chunk = np.floor_divide(q_pos, attention_chunk_size)
        see &= q_chunk[:, None] == np.floor_divide(kv_pos, attention_chunk_size)[None, :]
    return see


def softmax_rows(
    q: NDArray[np.float64],
    k: NDArray[np.float64],
    see: NDArray[np.bool_],
    added: NDArray[np.float64] | None,
    sinks: NDArray[np.float64] | None,
    scale: float,
    soft_cap: float | None,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Weights, lse and d(capped logit)/d(scaled dot product) of rows over the keys given.

    Args:
        q: [rows, head_dim].
        k: [keys, head_dim].
        see: [rows, keys].
        added: [rows, keys], added after the cap.
        sinks: [rows].
        scale: as in the contracts.
        soft_cap: as in the contracts.

    Returns:
        weights [rows, keys] (0 where not seen), lse [rows], slope [rows, keys].
    """
    logits = scale * (q @ k.T)
    slope = np.ones((1, 1))
    if soft_cap is not None:
        squashed = np.tanh(logits / soft_cap)
        logits, slope = soft_cap * squashed, np.where(see, 1 - squashed**2, 0)
    if added is not None:
        logits = logits + np.where(see, added, 0)
    logits = np.where(see, logits, -np.inf)
    peak = logits.max(axis=1, initial=-np.inf)
    if sinks is not None:
        peak = np.maximum(peak, sinks)
    safe_peak = np.where(np.isfinite(peak), peak, 0)
    weights = np.exp(logits - safe_peak[:, None])
    total = weights.sum(axis=1)
    if sinks is not None:
        total = total + np.exp(sinks - safe_peak)
    empty = total == 0
    lse = np.where(empty, -np.inf, np.log(np.where(empty, 1, total)) + safe_peak)
    weights = np.where(see, weights / np.where(empty, 1, total)[:, None], 0)  # of NaN rows too
    return weights, lse, slope


def attend(
    q: NDArray[np.float64],
    k: NDArray[np.float64],
    v: NDArray[np.float64],
    see: NDArray[np.bool_],
    *,
    scale: float,
    soft_cap: float | None = None,
    added: NDArray[np.float64] | None = None,
    sinks: NDArray[np.float64] | None = None,
) -> Attended:
    """Attention of rows to keys; neither keys that no row sees nor rows that see none are read.

    Args:
        q: [rows, head_dim].
        k: [keys, head_dim].
        v: [keys, head_dim_v].
        see: [rows, keys].
        scale: as in the contracts.
        soft_cap: as in the contracts.
        added: [rows, keys]: bias and ALiBi.
        sinks: [rows].

    Returns:
        out and magnitude [rows, head_dim_v]; lse and logit_size [rows].
    """
    out = np.zeros((q.shape[0], v.shape[1]))
    magnitude = np.zeros_like(out)
    lse = np.full(q.shape[0], -np.inf)
    logit_size = np.zeros(q.shape[0])
    step = max(1, ROWS_TIMES_KEYS // max(1, k.shape[0]))
    for first in range(0, q.shape[0], step):
        block = slice(first, first + step)
        keys = np.flatnonzero(see[block].any(axis=0))
        sees = see[block][:, keys]
        some = sees.any(axis=1)
        q_seen = np.where(some[:, None], q[block], 0)
        more = None if added is None else np.where(sees, added[block][:, keys], 0)
        sink = None if sinks is None else sinks[block]
        weights, lse[block], _ = softmax_rows(q_seen, k[keys], sees, more, sink, scale, soft_cap)
        out[block] = weights @ v[keys]
        magnitude[block] = weights @ np.abs(v[keys])
        logit_size[block] = _logit_size(q_seen, k[keys], scale, more, sink)
    return Attended(out, lse, magnitude, logit_size)


def _logit_size(
    q: NDArray[np.float64],
    k: NDArray[np.float64],
    scale: float,
    added: NDArray[np.float64] | None,
    sinks: NDArray[np.float64] | None,
) -> NDArray[np.float64]:
    """No less than |scale| * sum of |q_d k_d|, by Cauchy and Schwarz; and what is added.

    Of what is finite: who sees more has no number to be near.
    """
    keys, queries = (_finite(np.linalg.norm(x, axis=1)) for x in (k, q))
    size = abs(scale) * queries * keys.max(initial=0)
    if added is not None:
        size = size + np.abs(_finite(added)).max(axis=1, initial=0)
    if sinks is not None:
        size = size + np.abs(_finite(sinks))
    return size


def _finite(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """0 in place of NaN and infinities."""
    return np.where(np.isfinite(x), x, 0)
