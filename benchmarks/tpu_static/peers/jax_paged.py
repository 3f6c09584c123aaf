"""`jax.experimental.pallas.ops.tpu.paged_attention`: decode; keys are in the cache already."""

from typing import Any

import jax

from benchmarks import batches
from benchmarks.batches import Program, floats
from benchmarks.tpu_static.peers.caches import refused_cache
from benchmarks.work import Work

PACKAGE = "jax"


def refuses(work: Work) -> str | None:
    """Paged works with one new token in each sequence, head size 128."""
    if work.op != "paged" or work.shape_class != "decode":
        return f"work is {work.name}, must be paged decode"
    if work.head_size % 128:
        return f"head_size is {work.head_size}, must be 128"
    return refused_cache(work, "bfloat16")


def choices(work: Work, generation: str) -> list[dict[str, Any]]:
    """Keys computed on at a time."""
    return [{"keys": 512}]


def program(work: Work, *, keys: int) -> Program:
    """The call; the table is as wide as a whole number of computed blocks."""
    import numpy as np
    from jax.experimental.pallas.ops.tpu import paged_attention as library

    pages = max(keys // work.page_size, 1)
    table = batches.page_table(work)
    table = np.pad(table, ((0, 0), (0, -table.shape[1] % pages)))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, lengths: Any, table: Any) -> jax.Array:
        return library.paged_attention(q, k, v, lengths, table, pages_per_compute_block=pages)

    q = floats(work.tokens, work.num_heads, work.head_size)
    cache = floats(work.num_kv_heads, batches.num_pages(work), work.page_size, work.head_size)
    arguments = (q, cache, cache, batches.kv_lens(work), table)
    return Program(attend, arguments, writes_cache=False)
