"""tpu-inference's MLA v2: latent cache, writes it itself; queries come head by head.

It transposes queries and output by kernels of its own, which its users pay for too: they count.
"""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import batches
from benchmarks.batches import Program, floats
from benchmarks.tpu_static.peers.bare_packages import kernel_module
from benchmarks.tpu_static.peers.caches import FLOAT8, refused_cache
from benchmarks.tpu_static.peers.tpu_inference_ragged import distribution
from benchmarks.work import Work

PACKAGE = "tpu_inference"
LATENT, ROPE = 512, 64


def refuses(work: Work) -> str | None:
    """MLA works."""
    if work.op != "mla":
        return f"op is {work.op}, must be mla"
    return refused_cache(work, "bfloat16", FLOAT8)


def choices(work: Work, generation: str) -> list[dict[str, Any]]:
    """Keys and queries of a block; several decodes at once where it can."""
    if work.shape_class == "decode":
        return [{"keys": 1024, "queries": 1, "decodes": n} for n in (1, 4)]
    return [{"keys": 512, "queries": 8, "decodes": 1}]


def program(work: Work, *, keys: int, queries: int, decodes: int) -> Program:
    """The call."""
    module = kernel_module("mla.v2.kernel")
    shape = module.get_kv_cache_shape(
        batches.num_pages(work), work.page_size, 640, jnp.dtype(work.cache_dtype)
    )  # 512 + 128: the rotary part takes a whole row of lanes

    def attend(*arrays: jax.Array) -> Any:
        return module.mla_ragged_paged_attention(
            *arrays, sm_scale=work.scale, num_kv_pages_per_block=max(keys // work.page_size, 1),
            num_queries_per_block=queries, decode_batch_size=decodes,
            # Else weights are rounded to float8, too.
            p_same_dtype_as_v=work.cache_dtype != FLOAT8,
        )  # fmt: skip

    sequences = len(work.q_lens)
    arguments = (
        floats(work.num_heads, work.tokens, LATENT),
        floats(work.tokens, work.num_heads, ROPE),
        floats(work.tokens, LATENT, dtype=work.cache_dtype),
        floats(work.tokens, ROPE, dtype=work.cache_dtype),
        floats(*shape, dtype=work.cache_dtype),
        batches.kv_lens(work),
        batches.page_table(work).reshape(-1),
        batches.cu_q_lens(work),
        distribution(sequences if work.shape_class == "decode" else 0, sequences),
    )
    return Program(attend, arguments, donated=(4,))
