"""Queries that bite: one visible key carries more than half of the weight, and a hidden key would.

Random normal queries see every key about equally, and hide a missing mask, sink or soft cap. Here
each query points at one key that it sees (at an edge of what it sees, by turns) and, as strongly,
at a trap: the nearest key that it does not see, which takes half of the weight where a mask leaks.
"""

import numpy as np
from numpy.typing import NDArray

MARGIN = 1.0  # the target's logit minus the log of the others' sum: about 3/4 of the weight


def aim(
    rng: np.random.Generator,
    keys: NDArray[np.float32],
    see: NDArray[np.bool_],
    num_q_heads: int,
    scale: float,
    sharpness: float = 1.0,
) -> NDArray[np.float32]:
    """Queries for keys of about unit variance.

    Args:
        rng: source of the targets that are drawn.
        keys: [kv_len, num_kv_heads, head_dim], finite.
        see: [q_len, kv_len].
        num_q_heads: query heads.
        scale: factor on the logits.
        sharpness: factor on the logits that are aimed at; above 1 where a soft cap should bite.

    Returns:
        q [q_len, num_q_heads, head_dim].
    """
    q_len, kv_len = see.shape
    num_kv_heads, head_dim = keys.shape[1:]
    if not kv_len:
        return rng.standard_normal((q_len, num_q_heads, head_dim), dtype=np.float32)
    target = targets(rng, see, num_q_heads)
    first, last = see.argmax(axis=1), kv_len - 1 - see[:, ::-1].argmax(axis=1)
    before, after = first - 1, last + 1
    late = (np.arange(q_len)[:, None] + np.arange(num_q_heads)) % 2 == 0
    trap = np.where(late, after[:, None], before[:, None])
    trap = np.where((trap < 0) | (trap >= kv_len), before[:, None] + after[:, None] - trap, trap)
    caught = (trap >= 0) & (trap < kv_len)
    # A dot of such a query and another key is scale * a * N(0, sqrt(head_dim)); with the target's
    # own, scale * a * head_dim, this solves target - log(others' sum) = MARGIN.
    wanted = np.log(np.maximum(see.sum(axis=1), 1)) + MARGIN
    noise = wanted / np.sqrt(head_dim)
    noise = (wanted + noise**2 / 2) / np.sqrt(head_dim)
    a = (sharpness * noise / (abs(scale) * np.sqrt(head_dim)))[:, None, None]
    kv_head = np.arange(num_q_heads) // (num_q_heads // num_kv_heads)
    aimed = keys[target, kv_head]
    traps = np.where(caught[..., None], keys[np.clip(trap, 0, kv_len - 1), kv_head], 0)
    return (np.sign(scale) * a * (aimed + traps)).astype(np.float32)


def targets(rng: np.random.Generator, see: NDArray[np.bool_], num_q_heads: int) -> NDArray:
    """A visible key for each query and head: the first, the last, and drawn ones, by turns."""
    q_len, kv_len = see.shape
    turn = (np.arange(q_len)[:, None] + np.arange(num_q_heads)) % 4
    first = see.argmax(axis=1)[:, None]
    last = (kv_len - 1 - see[:, ::-1].argmax(axis=1))[:, None]
    drawn = rng.integers(np.minimum(first, last), np.maximum(first, last) + 1, turn.shape)
    drawn = np.where(np.take_along_axis(see, drawn, axis=1), drawn, first)
    return np.where(turn == 0, first, np.where(turn == 1, last, drawn))
