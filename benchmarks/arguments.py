"""A work as a call of a backend's kernel: numbers for what steers it, shapes for the rest."""

from typing import Any

import jax
import numpy as np

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.kv_cache import stored_dtype
from attnsel_jax.platforms import Device
from benchmarks import batches
from benchmarks.batches import Program, floats
from benchmarks.work import Work

LATENT, ROPE = 512, 64
# What is None where nothing is written.
WRITTEN = {
    "dense": (),
    "paged": ("k", "v", "slot_mapping"),
    "mla": ("kv_c", "k_pe", "slot_mapping"),
    "sparse_mla": ("kv_c", "k_pe", "slot_mapping"),
    "indexer_scores": (),
    "topk_positions": (),
}


def kernel_program(work: Work, backend: type[AttentionBackend], *, writes: bool = True) -> Program:
    """The call of the kernel that the backend declares, with the backward pass if it is wanted.

    Args:
        work: what is computed.
        backend: whose kernel.
        writes: this step's keys are written to the cache, which is donated and comes back; else
            they are there already, and only out comes back: such a call can be repeated.
    """
    kernel = backend.get_kernel(work.op)
    given = contract_arguments(work, backend)
    if not writes:
        given |= dict.fromkeys(name for name in WRITTEN[work.op] if name in given)
    arrays = {name: value for name, value in given.items() if hasattr(value, "shape")}
    fixed = {name: value for name, value in given.items() if name not in arrays}
    names = list(arrays)

    def forward(*values: jax.Array) -> Any:
        results = kernel(**dict(zip(names, values, strict=True)), **fixed)
        return results if writes else results[0]

    if not writes and work.op != "dense":
        return Program(forward, tuple(arrays.values()), writes_cache=False)
    caches = [i for i, name in enumerate(names) if name in ("kv_pages", "latent_pages")]
    if not work.backward:
        return Program(forward, tuple(arrays.values()), tuple(caches))

    def forward_and_backward(dout: jax.Array, *values: jax.Array) -> Any:
        out, pull_back = jax.vjp(lambda *given: kernel(*given, **fixed)[0], *values)
        return out, pull_back(dout)

    dout = floats(*arrays["q"].shape[:-1], work.head_size_v)
    return Program(forward_and_backward, (dout, *arrays.values()))


def contract_arguments(work: Work, backend: type[AttentionBackend]) -> dict[str, Any]:
    """The arguments of the op by name, the cache as the backend has it."""
    if work.op == "dense":
        return _dense(work)
    if work.op == "indexer_scores":
        return _indexer(work)
    if work.op == "topk_positions":
        return {
            "scores": floats(work.tokens, work.positions, dtype="float32"), "topk": work.topk,
        }  # fmt: skip
    cache = jax.ShapeDtypeStruct(
        backend.get_kv_cache_shape(
            batches.num_pages(work), work.page_size, work.num_kv_heads, work.head_size,
            work.cache_dtype,
        ),
        _stored(work),
    )  # fmt: skip
    batch = {
        "page_table": batches.page_table(work),
        "kv_lens": batches.kv_lens(work),
        "cu_q_lens": batches.cu_q_lens(work),
        "num_seqs": np.array(len(work.q_lens), np.int32),
        "slot_mapping": batches.slot_mapping(work),
    }
    tokens, heads = work.tokens, work.num_heads
    if work.op == "paged":
        new = floats(tokens, work.num_kv_heads, work.head_size)
        q = floats(tokens, heads, work.head_size)
        return {"q": q, "k": new, "v": new, "kv_pages": cache, **batch}
    chosen = {"topk_indices": batches.topk_indices(work)} if work.topk else {}
    rows = {"kv_cache_dtype": "fp8_ds_mla"} if work.cache_dtype == "fp8_ds_mla" else {}
    return {
        "ql_nope": floats(tokens, heads, LATENT),
        "q_pe": floats(tokens, heads, ROPE),
        "kv_c": floats(tokens, LATENT),
        "k_pe": floats(tokens, ROPE),
        "latent_pages": cache,
        **chosen, **batch, **rows,
        "scale": work.scale,
    }  # fmt: skip


def _dense(work: Work) -> dict[str, Any]:
    """q, k and v of one length a batch."""
    q, kv = (
        (len(work.q_lens), max(lens), heads)
        for lens, heads in ((work.q_lens, work.num_heads), (work.kv_lens, work.num_kv_heads))
    )
    return {
        "q": floats(*q, work.head_size),
        "k": floats(*kv, work.head_size),
        "v": floats(*kv, work.head_size_v),
        "causal": work.causal,
    }


def _indexer(work: Work) -> dict[str, Any]:
    """Queries, weights, and pages of keys."""
    tokens, heads, size = work.tokens, work.num_heads, work.head_size
    return {
        "q_index": floats(tokens, heads, size),
        "weights": floats(tokens, heads, dtype="float32"),
        "index_pages": floats(batches.num_pages(work), work.page_size, size),
        "page_table": batches.page_table(work),
        "kv_lens": batches.kv_lens(work),
        "cu_q_lens": batches.cu_q_lens(work),
        "num_seqs": np.array(len(work.q_lens), np.int32),
    }


def _stored(work: Work) -> Any:
    """The dtype of the cache's array."""
    return np.dtype(stored_dtype(work.cache_dtype, "bfloat16"))


def rejections(work: Work, backend: type[AttentionBackend], device: Device) -> str:
    """Why selection refuses the work for a backend on a chip; empty = it does not."""
    from attnsel_jax.problems import question
    from attnsel_jax.selector import select

    arguments = contract_arguments(work, backend)
    # A question is read off the logical layout.
    pages = () if work.page_size is None else (batches.num_pages(work), work.page_size)
    for name, shape in (
        ("kv_pages", (2, *pages, work.num_kv_heads, work.head_size)),
        ("latent_pages", (*pages, 656 if work.cache_dtype == "fp8_ds_mla" else work.head_size)),
    ):
        if name in arguments:
            arguments[name] = jax.ShapeDtypeStruct(shape, arguments[name].dtype)
    config = question(work.op, arguments, needs_grad=work.backward)
    selection = select(config, device, backend.name)
    return "" if selection.backend is not None else str(selection)
