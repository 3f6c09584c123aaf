"""`jax.nn.dot_product_attention` through cuDNN: dense, [batch, length, heads, size]."""

from typing import Any

import jax

from benchmarks.batches import Program, floats
from benchmarks.work import Work

PACKAGE = "jax"
MEASURES = False


def refuses(work: Work) -> str | None:
    """Only dense works with equal head sizes are its."""
    if work.op != "dense":
        return f"op is {work.op}, must be dense"
    if work.head_size != work.head_size_v:
        return f"head_size_v is {work.head_size_v}, must be {work.head_size}"
    return None


def choices(work: Work) -> list[dict[str, Any]]:
    """Nothing to choose."""
    del work
    return [{}]


def program(work: Work) -> Program:
    """The call."""
    return jax_nn_program(work, "cudnn")


def jax_nn_program(work: Work, implementation: str) -> Program:
    """The call of one implementation."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=work.causal, scale=work.scale, implementation=implementation
        )

    return dense_program(work, attend)


def dense_program(work: Work, attend: Any, dtype: str = "bfloat16") -> Program:
    """A dense call on [batch, length, heads, size], with its gradients where they are wanted."""
    batch, t, s = len(work.q_lens), max(work.q_lens), max(work.kv_lens)
    q, k, v, dout = (
        jax.ShapeDtypeStruct(floats(batch, length, heads, size).shape, dtype)
        for length, heads, size in (
            (t, work.num_heads, work.head_size), (s, work.num_kv_heads, work.head_size),
            (s, work.num_kv_heads, work.head_size_v), (t, work.num_heads, work.head_size_v),
        )
    )  # fmt: skip
    if not work.backward:
        return Program(attend, (q, k, v))

    def forward_and_backward(dout: jax.Array, *given: jax.Array) -> Any:
        out, pull_back = jax.vjp(attend, *given)
        return out, pull_back(dout)

    return Program(forward_and_backward, (dout, q, k, v))
