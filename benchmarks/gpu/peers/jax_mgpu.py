"""jax's own Mosaic GPU attention, an example: float16, dense, no scale, no causal backward."""

from typing import Any

import jax

from benchmarks.batches import Program
from benchmarks.gpu.peers.jax_nn_cudnn import dense_program
from benchmarks.work import Work

PACKAGE = "jax"
MEASURES = False
HEAD_SIZES = (64, 128, 256)


def refuses(work: Work) -> str | None:
    """What its example takes: equal head sizes of these, whole tiles, no causal backward."""
    if work.op != "dense":
        return f"op is {work.op}, must be dense"
    if work.head_size not in HEAD_SIZES or work.head_size_v != work.head_size:
        return f"head_size is {work.head_size}, must be one of 64, 128, 256, v's too"
    if work.backward and work.causal:
        return "causal is True, must be False with gradients"
    return None


def choices(work: Work) -> list[dict[str, Any]]:
    """The tiles that neither spill nor overfill shared memory."""
    if work.backward:
        return [{"block_kv": 64}]
    return [{"block_kv": 64}] if work.head_size == 256 else [{"block_kv": 128}, {"block_kv": 64}]


def program(work: Work, *, block_kv: int) -> Program:
    """The call, in float16: in bfloat16 it does not trace."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu as library

    backward = dict.fromkeys(
        ("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), 64 if work.backward else None
    )
    config = library.TuningConfig(
        block_q=64, block_kv=block_kv, max_concurrent_steps=2, causal=work.causal, **backward
    )

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return library.attention(q, k, v, config)

    return dense_program(work, attend, "float16")
