"""Our Pallas kernels for TPU, as the registry's backends declare them, in their cache's layout."""

import dataclasses
from typing import Any

from attnsel_jax.platforms import CHIPS
from attnsel_jax.registry import AttentionBackendEnum
from benchmarks.arguments import kernel_program, rejections
from benchmarks.batches import Program
from benchmarks.tpu_static import tuning
from benchmarks.work import Work
from pallas_kernels import tpu_chip

PACKAGE = "attnsel_jax"
BACKENDS = {
    "dense": "MOSAIC_TPU",
    "paged": "MOSAIC_TPU",
    "mla": "MOSAIC_TPU_MLA",
    "sparse_mla": "MOSAIC_TPU_MLA_SPARSE",
    "indexer_scores": "MOSAIC_TPU_MLA_SPARSE",
    "topk_positions": "MOSAIC_TPU_MLA_SPARSE",
}


def backend_of(work: Work) -> Any:
    """The backend whose kernel serves the work's op."""
    return AttentionBackendEnum[BACKENDS[work.op]].get_class()


def refuses(work: Work) -> str | None:
    """No backend declares a kernel for the op, or none takes this call on any generation."""
    backend = backend_of(work)
    if work.op in ("indexer_scores", "topk_positions"):  # selection knows the op they are for
        return None
    if work.op not in backend.capabilities:
        return f"{backend.name} declares no {work.op}"
    chips = {name: chip for name, chip in CHIPS.items() if chip.platform == "tpu"}
    reasons = {name: rejections(work, backend, chip) for name, chip in chips.items()}
    if all(reasons.values()):
        return next(iter(reasons.values()))
    return None


def choices(work: Work, generation: str) -> list[dict[str, Any]]:
    """The kernels choose their tiles themselves, from their tables."""
    del work, generation
    return [{}]


def program(
    work: Work, *, tiles: dict[str, int] | None = None, cache_dtype: str | None = None
) -> Program:
    """The call of the kernel that the backend declares.

    Args:
        work: what is computed.
        tiles: in place of those in the kernel's table, at the cache's entry; None = as the table
            has it.
        cache_dtype: in place of the work's, whose floors stay: compare times only.
    """
    if cache_dtype is not None:
        work = dataclasses.replace(work, cache_dtype=cache_dtype)
    if tiles is not None:
        tuning.table_of(work, tpu_chip.current().generation).use(tiles)
    return kernel_program(work, backend_of(work))
