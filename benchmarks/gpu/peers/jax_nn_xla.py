"""`jax.nn.dot_product_attention` as XLA lowers it, every logit in memory."""

from typing import Any

from benchmarks.batches import Program
from benchmarks.gpu.peers import jax_nn_cudnn
from benchmarks.gpu.peers.jax_nn_cudnn import jax_nn_program
from benchmarks.work import Work

PACKAGE = "jax"
MEASURES = True
MOST_LOGITS = 1 << 29  # in float32 and their gradients; more is left to others


def refuses(work: Work) -> str | None:
    """As cuDNN, and not where the logits alone fill the memory."""
    logits = len(work.q_lens) * work.num_heads * max(work.q_lens) * max(work.kv_lens)
    if work.op == "dense" and logits > MOST_LOGITS:
        return f"logits are {logits}, must be at most {MOST_LOGITS}: it builds them all"
    return jax_nn_cudnn.refuses(work)


def choices(work: Work) -> list[dict[str, Any]]:
    """Nothing to choose."""
    del work
    return [{}]


def program(work: Work) -> Program:
    """The call."""
    return jax_nn_program(work, "xla")
