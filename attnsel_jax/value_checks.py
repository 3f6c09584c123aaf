"""What `checked=True` looks at: values that would read outside a cache, or make no sense.

Values exist outside `jax.jit` only; under it, these checks refuse and say so.
"""

import jax
import numpy as np

from attnsel_jax.mesh.groups import groups_of
from attnsel_jax.metadata import AttentionMetadata


def check_batch(
    metadata: AttentionMetadata, num_tokens: int, num_pages: int, page_size: int
) -> None:
    """Refuses a ragged batch whose values do not fit together, or not the cache.

    Args:
        metadata: the batch.
        num_tokens: tokens that q holds.
        num_pages, page_size: of the cache.

    Raises:
        ValueError: num_seqs out of range, cu_q_lens not from 0 or decreasing or beyond the tokens,
            kv_lens negative or beyond the page table's row, a page id or a slot outside the cache;
            or values are not known here (under `jax.jit`).
    """
    table, kv_lens, cu_q_lens, num_seqs = (
        _values(name, getattr(metadata, name))
        for name in ("page_table", "kv_lens", "cu_q_lens", "num_seqs")
    )
    seqs = int(num_seqs)
    if not 0 <= seqs <= len(kv_lens):
        raise ValueError(
            f"num_seqs is {seqs}, must be 0 to {len(kv_lens)}, the rows of page_table and kv_lens"
        )
    _check_cumulative(cu_q_lens[: seqs + 1], num_tokens)
    for i in range(seqs):
        _check_sequence(i, int(kv_lens[i]), table[i], num_pages, page_size)
    if metadata.slot_mapping is not None:
        slots = _values("slot_mapping", metadata.slot_mapping)
        _check_range("slot_mapping", slots, -1, num_pages * page_size - 1, "-1 writes nowhere")
        written = slots[slots >= 0]
        if len(np.unique(written)) != len(written):
            raise ValueError("slot_mapping names a slot twice, must name each at most once")


def check_groups(
    metadata: AttentionMetadata, num_tokens: int, num_pages: int, page_size: int
) -> None:
    """Refuses a batch, or one of its groups, as `check_batch` does; arguments as there."""
    groups = groups_of(metadata)
    for group in groups:
        check_batch(group, num_tokens // len(groups), num_pages, page_size)


def check_lengths(name: str, lens: jax.Array | None, limit: int) -> None:
    """Refuses lengths that are negative or beyond the array they count in.

    Raises:
        ValueError: such a length, or values are not known here (under `jax.jit`).
    """
    if lens is not None:
        _check_range(name, _values(name, lens), 0, limit, "rows past a length do not exist")


def check_topk(topk_indices: jax.Array, kv_limit: int) -> None:
    """Refuses positions beyond the table, or named twice by one token.

    Raises:
        ValueError: such a position, or values are not known here (under `jax.jit`).
    """
    values = _values("topk_indices", topk_indices)
    _check_range("topk_indices", values, -1, kv_limit - 1, "-1 is padding")
    ordered = np.sort(values, axis=-1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        token, place = np.argwhere(twice)[0]
        raise ValueError(
            f"topk_indices[{token}] names position {ordered[token, place]} twice, must name each "
            f"at most once: it would count double"
        )


def check_scales(**scales: jax.Array | None) -> None:
    """Refuses scales by which nothing can be divided; None = 1.

    Raises:
        ValueError: one is not finite or not above 0, or has no value here (under `jax.jit`).
    """
    for name, scale in scales.items():
        values = np.ones(()) if scale is None else _values(f"cache.{name}", scale)
        wrong = values[~((values > 0) & (values < np.inf))]
        if wrong.size:
            raise ValueError(
                f"cache.{name} is {wrong[0]}, must be a finite number above 0: what is stored is "
                f"divided by it"
            )


def _values(name: str, array: jax.Array) -> np.ndarray:
    if isinstance(array, jax.core.Tracer):
        raise ValueError(
            f"checked is True, and {name} has no values here (it is traced by jit, vmap or grad), "
            f"must be a concrete array: check outside, then call with checked=False"
        )
    return np.asarray(array)


def _check_range(name: str, values: np.ndarray, low: int, high: int, hint: str) -> None:
    outside = np.argwhere((values < low) | (values > high))
    if len(outside):
        place = tuple(int(i) for i in outside[0])
        raise ValueError(
            f"{name}[{', '.join(map(str, place))}] is {values[place]}, must be {low} to {high}: "
            f"{hint}"
        )


def _check_cumulative(cu_q_lens: np.ndarray, num_tokens: int) -> None:
    if cu_q_lens[0] != 0:
        raise ValueError(f"cu_q_lens[0] is {cu_q_lens[0]}, must be 0")
    falls = np.argwhere(np.diff(cu_q_lens) < 0)
    if len(falls):
        i = int(falls[0, 0])
        raise ValueError(
            f"cu_q_lens[{i + 1}] is {cu_q_lens[i + 1]}, must be at least cu_q_lens[{i}], "
            f"{cu_q_lens[i]}: they are cumulative"
        )
    if cu_q_lens[-1] > num_tokens:
        raise ValueError(
            f"cu_q_lens[{len(cu_q_lens) - 1}] is {cu_q_lens[-1]}, must be at most {num_tokens}, "
            f"the tokens of q"
        )


def _check_sequence(i: int, kv_len: int, row: np.ndarray, num_pages: int, page_size: int) -> None:
    capacity = len(row) * page_size
    if not 0 <= kv_len <= capacity:
        raise ValueError(
            f"kv_lens[{i}] is {kv_len}, must be 0 to {capacity}: a row of page_table names "
            f"{len(row)} pages of {page_size} tokens"
        )
    used = row[: -(-kv_len // page_size)]
    wrong = np.argwhere((used < 0) | (used >= num_pages))
    if len(wrong):
        j = int(wrong[0, 0])
        raise ValueError(
            f"page_table[{i}, {j}] is {used[j]}, must be 0 to {num_pages - 1}: the cache has "
            f"{num_pages} pages"
        )
