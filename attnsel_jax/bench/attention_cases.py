"""The races of the attention ops: dense causal with and without gradients, paged decode."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.bench.race import Inputs, Race, Rival, Target
from attnsel_jax.bench.rivals import jax_nn_dense, jax_nn_gathered, torch_dense, with_gradients
from attnsel_jax.bench.roofline import Work
from attnsel_jax.config import AttentionSelectorConfig


def dense_causal(
    *,
    gradients: bool = False,
    length: int = 4096,
    num_heads: int = 8,
    head_size: int = 128,
    rivals: tuple[Rival, ...] | None = None,
    targets: tuple[Target, ...] | None = None,
) -> Race:
    """Causal dense attention: float32, batch 1."""
    shape = (1, length, num_heads, head_size)
    names = ("q", "k", "v", "dout") if gradients else ("q", "k", "v")

    def make_inputs(rng: np.random.Generator, num_sets: int) -> Sequence[Inputs]:
        return [
            {name: rng.standard_normal(shape, dtype=np.float32) for name in names}
            for _ in range(num_sets)
        ]

    config = AttentionSelectorConfig(
        head_size, "float32", op="dense", num_heads=num_heads, num_kv_heads=num_heads,
        needs_grad=gradients,
    )  # fmt: skip
    own_rivals = (jax_nn_dense(gradients=gradients), torch_dense(gradients=gradients))
    # Against PyTorch the target is the forward pass; its backward pass is timed for the record.
    own_targets = (Target("jax.nn", 3.0),) + (() if gradients else (Target("torch", 1.0),))
    suffix = "_grad" if gradients else ""
    return Race(
        name=f"dense_causal_{length}{suffix}",
        description=f"dense causal{' with gradients' if gradients else ''}: float32, batch 1, "
        f"{num_heads} heads, length {length}, head size {head_size}",
        config=config,
        make_inputs=make_inputs,
        of_backend=lambda backend: _dense_of(backend, gradients),
        rivals=own_rivals if rivals is None else rivals,
        work=_dense_work(length, num_heads, head_size, gradients),
        targets=own_targets if targets is None else targets,
    )


def _dense_of(backend: type[AttentionBackend], gradients: bool) -> Callable[..., Any]:
    kernel = backend.get_kernel("dense")

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return kernel(q, k, v, causal=True)[0]

    return with_gradients(attend) if gradients else attend


def _dense_work(length: int, num_heads: int, head_size: int, gradients: bool) -> Work:
    """Half of the square: 2 products forward; backward 5 more, the logits once again among them.

    Bytes: q, k, v read, out written; with gradients dout read and dq, dk, dv written besides.
    """
    product = 2 * num_heads * length * length * head_size / 2
    array = 4.0 * length * num_heads * head_size
    return Work(flops=product * (7 if gradients else 2), bytes=array * (8 if gradients else 4))


def paged_decode(
    *,
    page_size: int = 16,
    num_seqs: int = 32,
    kv_len: int = 2048,
    num_heads: int = 32,
    num_kv_heads: int = 8,
    head_size: int = 128,
    rivals: tuple[Rival, ...] | None = None,
    targets: tuple[Target, ...] = (Target("gather + jax.nn", 3.0),),
) -> Race:
    """Decode: one token of each sequence over a paged cache that holds it already; float32."""
    pages_per_seq = -(-kv_len // page_size)

    def make_inputs(rng: np.random.Generator, num_sets: int) -> Sequence[Inputs]:
        num_pages = num_seqs * pages_per_seq
        cache = (2, num_pages, page_size, num_kv_heads, head_size)
        shared = {
            "kv_pages": rng.standard_normal(cache, dtype=np.float32),
            "page_table": rng.permutation(num_pages).reshape(num_seqs, -1).astype(np.int32),
            "kv_lens": np.full(num_seqs, kv_len, np.int32),
            "cu_q_lens": np.arange(num_seqs + 1, dtype=np.int32),
            "num_seqs": np.array(num_seqs, np.int32),
        }
        shape = (num_seqs, num_heads, head_size)
        return [
            {"q": rng.standard_normal(shape, dtype=np.float32), **shared} for _ in range(num_sets)
        ]

    config = AttentionSelectorConfig(
        head_size, "float32", block_size=page_size, num_heads=num_heads, num_kv_heads=num_kv_heads
    )
    cached = 4.0 * 2 * num_seqs * kv_len * num_kv_heads * head_size
    return Race(
        name=f"paged_decode_{num_seqs}x{kv_len}_page{page_size}",
        description=f"paged decode: float32, {num_seqs} sequences of {kv_len}, {num_heads} query "
        f"heads, {num_kv_heads} kv heads, head size {head_size}, pages of {page_size}, nothing "
        f"written",
        config=config,
        make_inputs=make_inputs,
        of_backend=_paged_of,
        rivals=(jax_nn_gathered(),) if rivals is None else rivals,
        work=Work(flops=4.0 * num_seqs * num_heads * kv_len * head_size, bytes=cached),
        targets=targets,
    )


def _paged_of(backend: type[AttentionBackend]) -> Callable[..., Any]:
    kernel = backend.get_kernel("paged")

    def attend(q: jax.Array, **batch: jax.Array) -> jax.Array:
        return kernel(q=q, k=None, v=None, slot_mapping=None, **batch)[0]

    return attend
