"""Tokamax's Mosaic GPU attention: dense, forward and backward."""

from typing import Any

import jax

from benchmarks.batches import Program
from benchmarks.gpu.peers.jax_nn_cudnn import dense_program
from benchmarks.work import Work

PACKAGE = "tokamax"
MEASURES = False


def refuses(work: Work) -> str | None:
    """Only dense works are its."""
    return None if work.op == "dense" else f"op is {work.op}, must be dense"


def choices(work: Work) -> list[dict[str, Any]]:
    """It chooses its tiles itself."""
    del work
    return [{}]


def program(work: Work) -> Program:
    """The call."""
    import tokamax

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return tokamax.dot_product_attention(
            q, k, v, is_causal=work.causal, scale=work.scale, implementation="mosaic"
        )

    return dense_program(work, attend)
