"""tpu-inference's ragged paged attention v3 for head size 64: key and value share a row of 128."""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import batches
from benchmarks.batches import Program
from benchmarks.tpu_static.peers.bare_packages import kernel_module
from benchmarks.tpu_static.peers.caches import refused_cache
from benchmarks.tpu_static.peers.tpu_inference_ragged import ragged_program
from benchmarks.work import Work

PACKAGE = "tpu_inference"


def refuses(work: Work) -> str | None:
    """Paged works of head size 64."""
    if work.op != "paged":
        return f"op is {work.op}, must be paged"
    if work.head_size != 64:
        return f"head_size is {work.head_size}, must be 64"
    return refused_cache(work, "bfloat16")


def choices(work: Work, generation: str) -> list[dict[str, Any]]:
    """Its own table's."""
    return [{}]


def program(work: Work, **tiles: Any) -> Program:
    """The call."""
    module = kernel_module("ragged_paged_attention.v3.kernel_hd64")
    shape = module.get_kv_cache_shape(
        batches.num_pages(work), work.page_size, work.num_kv_heads, work.head_size, jnp.bfloat16
    )

    def attend(*arrays: jax.Array) -> Any:
        return module.ragged_paged_attention_hd64(*arrays, sm_scale=work.scale, **tiles)

    return ragged_program(work, attend, shape)
