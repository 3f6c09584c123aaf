"""`jax.experimental.pallas.ops.tpu.ragged_paged_attention`: keys are in the cache already."""

from typing import Any

import jax
import numpy as np

from benchmarks import batches
from benchmarks.batches import Program, floats
from benchmarks.tpu_static.peers.caches import FLOAT8, refused_cache
from benchmarks.work import Work

PACKAGE = "jax"


def refuses(work: Work) -> str | None:
    """Paged works of head size 128."""
    if work.op != "paged":
        return f"op is {work.op}, must be paged"
    if work.head_size % 128:
        return f"head_size is {work.head_size}, must be 128"
    return refused_cache(work, "bfloat16", FLOAT8)


def choices(work: Work, generation: str) -> list[dict[str, Any]]:
    """Keys and queries of a block; its own table's tiles take eight minutes to compile."""
    queries = 8 if work.shape_class == "decode" else 128
    return [{"keys": 512, "queries": queries}]


def program(work: Work, *, keys: int, queries: int) -> Program:
    """The call; keys and values of a page side by side."""
    from jax.experimental.pallas.ops.tpu import ragged_paged_attention as library

    # Without a scale it multiplies float8 by float8 weights.
    scales = {"k_scale": 1.0, "v_scale": 1.0} if work.cache_dtype == FLOAT8 else {}

    def attend(
        q: jax.Array, pages: jax.Array, kv_lens: Any, table: Any, cu: Any, num_seqs: Any
    ) -> jax.Array:
        return library.ragged_paged_attention(
            q, pages, kv_lens, table, cu, num_seqs, sm_scale=work.scale,
            vmem_limit_bytes=64 << 20, num_queries_per_block=queries,
            num_kv_pages_per_block=max(keys // work.page_size, 1), **scales,
        )  # fmt: skip

    size = work.head_size
    arguments = (
        floats(work.tokens, work.num_heads, size),
        floats(
            batches.num_pages(work),
            work.page_size,
            2 * work.num_kv_heads,
            size,
            dtype=work.cache_dtype,
        ),
        batches.kv_lens(work),
        batches.page_table(work),
        batches.cu_q_lens(work),
        np.array([len(work.q_lens)], np.int32),
    )
    return Program(attend, arguments, writes_cache=False)
