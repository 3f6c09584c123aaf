"""Tokamax's splash attention: dense, sparse masks, one sequence a call."""

from typing import Any

import jax

from benchmarks.batches import Program
from benchmarks.tpu_static.peers.jax_flash import dense_program
from benchmarks.work import Work

PACKAGE = "tokamax"


def refuses(work: Work) -> str | None:
    """Only dense works are its."""
    return None if work.op == "dense" else f"op is {work.op}, must be dense"


def choices(work: Work, generation: str) -> list[dict[str, Any]]:
    """With and without its experimental scheduler, which helps where vectors bound it."""
    tiles = {"block_q": 1024, "block_kv": 1024, "block_kv_compute": 512}
    return [tiles, tiles | {"scheduler": True}]


def program(
    work: Work, *, block_q: int, block_kv: int, block_kv_compute: int, scheduler: bool = False
) -> Program:
    """The call, mapped over the batch; blocks are no longer than a sequence."""
    from tokamax._src.ops.experimental.tpu.splash_attention import (
        splash_attention_kernel as library,
    )
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

    block_q, block_kv = min(block_q, *work.q_lens), min(block_kv, *work.kv_lens)
    config = library.SplashConfig(
        block_q=block_q, block_kv=block_kv, block_kv_compute=block_kv_compute,
        block_q_dkv=block_q, block_kv_dkv=block_kv, block_kv_dkv_compute=block_kv_compute,
        use_experimental_scheduler=scheduler,
    )  # fmt: skip
    kind = masks.CausalMask if work.causal else masks.FullMask
    mask = kind((max(work.q_lens), max(work.kv_lens)))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        kernel = library.make_splash_mha_single_device(mask, config=config)
        return jax.vmap(kernel)(q * work.scale, k, v)

    return dense_program(work, attend)
