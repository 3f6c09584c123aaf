"""`jax.experimental.pallas.ops.tpu.flash_attention`: dense, [batch, heads, length, size]."""

from typing import Any

import jax

from benchmarks.batches import Program, floats
from benchmarks.work import Work

PACKAGE = "jax"


def refuses(work: Work) -> str | None:
    """Only dense works are its, with as many heads of keys as of queries."""
    if work.op != "dense":
        return f"op is {work.op}, must be dense"
    if work.num_kv_heads != work.num_heads:
        return f"num_kv_heads is {work.num_kv_heads}, must be num_heads, {work.num_heads}"
    return None


def choices(work: Work, generation: str) -> list[dict[str, Any]]:
    """Its default, blocks of 128, takes ten times as long; several short sequences to a step."""
    if len(work.q_lens) > 8 and max(work.q_lens) <= 512:
        return [{"block": 1024, "block_b": rows} for rows in (1, 2, 4, 8, 16, 32)]
    return [{"block": 1024}, {"block": 512}] if work.backward else [{"block": 1024}]


def program(work: Work, *, block: int, block_b: int = 1) -> Program:
    """The call with one block size for everything, or all of a shorter sequence.

    Forward, a grid step takes block_b rows of the batch.
    """
    from jax.experimental.pallas.ops.tpu import flash_attention as library

    block = min(block, *work.q_lens, *work.kv_lens)
    sizes = library.BlockSizes(
        block_q=block, block_k_major=block, block_k=block, block_b=block_b,
        block_q_major_dkv=block, block_k_major_dkv=block, block_k_dkv=block, block_q_dkv=block,
        block_k_major_dq=block, block_k_dq=block, block_q_dq=block,
    )  # fmt: skip

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return library.flash_attention(
            q, k, v, causal=work.causal, sm_scale=work.scale, block_sizes=sizes
        )

    return dense_program(work, attend)


def dense_program(work: Work, attend: Any) -> Program:
    """A dense call on [batch, heads, length, size], with its gradients where they are wanted."""
    batch = len(work.q_lens)
    q = floats(batch, work.num_heads, max(work.q_lens), work.head_size)
    k = floats(batch, work.num_kv_heads, max(work.kv_lens), work.head_size)
    v = floats(batch, work.num_kv_heads, max(work.kv_lens), work.head_size_v)
    if not work.backward:
        return Program(attend, (q, k, v))

    def forward_and_backward(dout: jax.Array, *given: jax.Array) -> Any:
        out, pull_back = jax.vjp(attend, *given)
        return out, pull_back(dout)

    dout = floats(batch, work.num_heads, max(work.q_lens), work.head_size_v)
    return Program(forward_and_backward, (dout, q, k, v))
