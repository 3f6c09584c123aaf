"""tpu-inference's ragged paged attention v3: prefill and decode mixed, writes the cache itself."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import batches
from benchmarks.batches import Program, floats
from benchmarks.tpu_static.peers.bare_packages import kernel_module
from benchmarks.tpu_static.peers.caches import FLOAT8, refused_cache
from benchmarks.work import Work

PACKAGE = "tpu_inference"
FEW = 16  # new tokens of a sequence


def refuses(work: Work) -> str | None:
    """Paged works; head size 64 has a kernel of its own."""
    if work.op != "paged":
        return f"op is {work.op}, must be paged"
    if work.head_size == 64:
        return "head_size is 64, must be 128: see the variant hd64"
    return refused_cache(work, "bfloat16", FLOAT8)


def choices(work: Work, generation: str) -> list[dict[str, Any]]:
    """Its heuristic, and for prefill the tiles that were found better for this batch.

    For a few new tokens of each sequence, as many, also its kernel for chunks of one length.
    """
    if work.shape_class == "decode":
        return [{}]
    if len(set(work.q_lens)) == 1 and work.q_lens[0] <= FEW:
        return [{}, {"chunk_prefill_size": work.q_lens[0]}]
    return [{}, {"m_block_sizes": [512, 512, 128, 512]}]


def program(
    work: Work, *, m_block_sizes: list[int] | None = None, chunk_prefill_size: int | None = None
) -> Program:
    """The call."""
    module = kernel_module("ragged_paged_attention.v3.kernel")
    shape = module.get_kv_cache_shape(
        batches.num_pages(work), work.page_size, work.num_kv_heads, work.head_size,
        jnp.dtype(work.cache_dtype),
    )  # fmt: skip
    options: dict[str, Any] = {"m_block_sizes": tuple(m_block_sizes)} if m_block_sizes else {}
    if chunk_prefill_size is not None:
        options["chunk_prefill_size"] = chunk_prefill_size

    def attend(*arrays: jax.Array) -> Any:
        return module.ragged_paged_attention(*arrays, sm_scale=work.scale, **options)

    return ragged_program(work, attend, shape, of_one_length=chunk_prefill_size is not None)


def ragged_program(
    work: Work, attend: Any, cache: tuple[int, ...], *, of_one_length: bool = False
) -> Program:
    """A call of either variant of v3; `of_one_length`: as chunks of one length."""
    new = floats(work.tokens, work.num_kv_heads, work.head_size, dtype=work.cache_dtype)
    sequences = len(work.q_lens)
    decodes = sequences if work.shape_class == "decode" else 0
    arguments = (
        floats(work.tokens, work.num_heads, work.head_size),
        new,
        new,
        floats(*cache, dtype=work.cache_dtype),
        batches.kv_lens(work),
        batches.page_table(work).reshape(-1),
        batches.cu_q_lens(work),
        distribution(decodes, sequences, sequences if of_one_length else 0),
    )
    return Program(attend, arguments, donated=(3,))


def distribution(decodes: int, sequences: int, of_one_length: int = 0) -> np.ndarray:
    """The library's word: the ends of decodes, of chunks of one length, of all sequences."""
    return np.array([decodes, decodes + of_one_length, sequences], np.int32)
