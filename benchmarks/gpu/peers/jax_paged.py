"""jax's paged decode attention for GPUs, by Pallas Triton: one token of each sequence."""

from typing import Any

import jax
import numpy as np

from benchmarks import batches
from benchmarks.batches import Program, floats
from benchmarks.work import Work

PACKAGE = "jax"
MEASURES = False
KEYS = 128  # of a block: twice as many do not fit shared memory at head size 128


def refuses(work: Work) -> str | None:
    """Only decode is its, with a bfloat16 cache (its scales are one a token, another contract)."""
    if work.op != "paged" or max(work.q_lens) > 1:
        return "work is no paged decode, must be"
    if work.cache_dtype != "bfloat16":
        return f"cache_dtype is {work.cache_dtype}, must be bfloat16"
    return None


def choices(work: Work) -> list[dict[str, Any]]:
    """More splits where sequences are few."""
    del work
    return [{"k_splits": 16}, {"k_splits": 64}]


def program(work: Work, *, k_splits: int) -> Program:
    """The call; this step's keys are in the cache already."""
    from jax.experimental.pallas.ops.gpu import paged_attention as library

    table = batches.page_table(work)
    per_block = max(1, KEYS // work.page_size)
    # Its splits share the pages out evenly: the table is filled up with page 0, which it masks.
    columns = -(-table.shape[1] // (per_block * k_splits)) * per_block * k_splits
    padded = np.pad(table, ((0, 0), (0, columns - table.shape[1])))
    pages = (work.num_kv_heads, batches.num_pages(work), work.page_size, work.head_size)

    def attend(q, k_pages, v_pages, page_table, kv_lens) -> jax.Array:
        return library.paged_attention(
            q * work.scale,
            k_pages,
            v_pages,
            page_table,
            kv_lens,
            k_splits=k_splits,
            pages_per_compute_block=per_block,
        )

    q = floats(len(work.q_lens), work.num_heads, work.head_size)
    arguments = (q, floats(*pages), floats(*pages), padded, batches.kv_lens(work))
    return Program(attend, arguments, writes_cache=False)
