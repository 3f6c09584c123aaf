"""Where the tokens and the cached positions of each sequence of a ragged batch lie."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Sequence(NamedTuple):
    """One sequence of the batch.

    Attributes:
        tokens: which rows of this step's arrays are its own.
        q_pos: [its tokens]: their positions; the last is kv_len - 1.
        kv_pos: [kv_len]: 0, 1, ...
        pages, offsets: [kv_len]: where each position lies in the cache.
    """

    tokens: slice
    q_pos: NDArray[np.int64]
    kv_pos: NDArray[np.int64]
    pages: NDArray[np.int64]
    offsets: NDArray[np.int64]


def sequences(
    page_size: int,
    page_table: ArrayLike,
    kv_lens: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike,
) -> Iterator[Sequence]:
    """The sequences that exist; page_table's entries past a sequence's last page are not read."""
    table, starts = np.asarray(page_table), np.asarray(cu_q_lens)
    for i in range(int(num_seqs)):
        first, last, kv_len = int(starts[i]), int(starts[i + 1]), int(np.asarray(kv_lens)[i])
        kv_pos = np.arange(kv_len)
        yield Sequence(
            tokens=slice(first, last),
            q_pos=kv_len - (last - first) + np.arange(last - first),
            kv_pos=kv_pos,
            pages=table[i, kv_pos // page_size],
            offsets=kv_pos % page_size,
        )


def write_slots(pages: NDArray, rows: NDArray, slot_mapping: ArrayLike) -> None:
    """Puts rows[t] at slot_mapping[t] of pages [num_pages, page_size, ...]; -1 goes nowhere."""
    page_size = pages.shape[1]
    for row, slot in zip(rows, np.asarray(slot_mapping), strict=True):
        if slot >= 0:
            pages[slot // page_size, slot % page_size] = row
