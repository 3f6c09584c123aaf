"""Our Pallas kernels for TPU, as the registry's backends declare them, in their cache's layout."""

from typing import Any

import jax
import numpy as np

from attnsel_jax.platforms import CHIPS
from attnsel_jax.registry import AttentionBackendEnum
from benchmarks.tpu_static import batches, tuning
from benchmarks.tpu_static.batches import Program, floats
from benchmarks.tpu_static.works import Work
from pallas_kernels import tpu_chip

PACKAGE = "attnsel_jax"
BACKENDS = {
    "dense": "MOSAIC_TPU",
    "paged": "MOSAIC_TPU",
    "mla": "MOSAIC_TPU_MLA",
    "sparse_mla": "MOSAIC_TPU_MLA_SPARSE",
}
LATENT, ROPE = 512, 64


def backend_of(work: Work) -> Any:
    """The backend whose kernel serves the work's op."""
    return AttentionBackendEnum[BACKENDS[work.op]].get_class()


def refuses(work: Work) -> str | None:
    """No backend declares a kernel for the op, or none takes this call on any generation."""
    backend = backend_of(work)
    if work.op not in backend.capabilities:
        return f"{backend.name} declares no {work.op}"
    reasons = {name: _rejections(work, name) for name in CHIPS if CHIPS[name].platform == "tpu"}
    if all(reasons.values()):
        return next(iter(reasons.values()))
    return None


def _rejections(work: Work, generation: str) -> str:
    """Why selection refuses the call on a generation; empty = it does not."""
    from attnsel_jax.problems import question
    from attnsel_jax.selector import select

    arguments = named_arguments(work)
    # A question is read off the logical layout.
    size = work.head_size
    pages = () if work.page_size is None else (batches.num_pages(work), work.page_size)
    if "kv_pages" in arguments:
        arguments["kv_pages"] = floats(2, *pages, work.num_kv_heads, size)
    if "latent_pages" in arguments:
        arguments["latent_pages"] = floats(*pages, size)
    config = question(work.op, arguments, needs_grad=work.backward)
    selection = select(config, CHIPS[generation], backend_of(work).name)
    return "" if selection.backend is not None else str(selection)


def choices(work: Work, generation: str) -> list[dict[str, Any]]:
    """The kernels choose their tiles themselves, from their tables."""
    del work, generation
    return [{}]


def named_arguments(work: Work, cache_dtype: str = "bfloat16") -> dict[str, Any]:
    """The contract's arguments: what steers the kernel as numbers, the rest as shapes."""
    if work.op == "dense":
        q, kv = (
            (len(work.q_lens), max(lens), heads)
            for lens, heads in ((work.q_lens, work.num_heads), (work.kv_lens, work.num_kv_heads))
        )
        size, size_v = work.head_size, work.head_size_v
        return {"q": floats(*q, size), "k": floats(*kv, size), "v": floats(*kv, size_v),
                "causal": True}  # fmt: skip
    shape = backend_of(work).get_kv_cache_shape(
        batches.num_pages(work), work.page_size, work.num_kv_heads, work.head_size, "bfloat16"
    )
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
        return {"q": q, "k": new, "v": new, "kv_pages": floats(*shape, dtype=cache_dtype), **batch}
    chosen = {"topk_indices": batches.topk_indices(work)} if work.topk else {}
    return {
        "ql_nope": floats(tokens, heads, LATENT),
        "q_pe": floats(tokens, heads, ROPE),
        "kv_c": floats(tokens, LATENT),
        "k_pe": floats(tokens, ROPE),
        "latent_pages": floats(*shape),
        **chosen,
        **batch,
        "scale": work.scale,
    }


def program(
    work: Work, *, tiles: dict[str, int] | None = None, cache_dtype: str = "bfloat16"
) -> Program:
    """The call of the kernel that the backend declares.

    Args:
        work: what is computed.
        tiles: in place of those in the kernel's table; None = as the table has it.
        cache_dtype: of a paged cache. Floors are a bfloat16 cache's: compare times only.
    """
    if tiles is not None:
        tuning.table_of(work, tpu_chip.current().generation, cache_dtype).use(tiles)
    kernel = backend_of(work).get_kernel(work.op)
    given = named_arguments(work, cache_dtype)
    arrays = {name: value for name, value in given.items() if hasattr(value, "shape")}
    fixed = {name: value for name, value in given.items() if name not in arrays}
    names = list(arrays)

    def forward(*values: jax.Array) -> Any:
        return kernel(**dict(zip(names, values, strict=True)), **fixed)

    caches = [i for i, name in enumerate(names) if name in ("kv_pages", "latent_pages")]
    if not work.backward:
        return Program(forward, tuple(arrays.values()), tuple(caches))

    def forward_and_backward(dout: jax.Array, *values: jax.Array) -> Any:
        out, pull_back = jax.vjp(lambda *given: forward(*given)[0], *values)
        return out, pull_back(dout)

    dout = floats(*arrays["q"].shape[:-1], work.head_size_v)
    return Program(forward_and_backward, (dout, *arrays.values()))
