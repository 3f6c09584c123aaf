"""Our Pallas kernels for GPUs, as the registry's backends declare them, in their cache's layout."""

from typing import Any

from attnsel_jax.platforms import CHIPS
from attnsel_jax.registry import AttentionBackendEnum
from benchmarks.arguments import kernel_program, rejections
from benchmarks.batches import Program
from benchmarks.gpu import tuning
from benchmarks.work import Work

PACKAGE = "attnsel_jax"
MEASURES = False
BACKENDS = {
    "dense": "MOSAIC_GPU",
    "paged": "MOSAIC_GPU",
    "mla": "MOSAIC_GPU_MLA",
    "sparse_mla": "MOSAIC_GPU_MLA_SPARSE",
}


def backend_of(work: Work) -> Any:
    """The backend whose kernel serves the work's op."""
    return AttentionBackendEnum[BACKENDS[work.op]].get_class()


def refuses(work: Work) -> str | None:
    """No backend declares a kernel for the op, or none takes this call on any chip."""
    backend = backend_of(work)
    if work.op not in backend.capabilities:
        return f"{backend.name} declares no {work.op}"
    reasons = [
        rejections(work, backend, chip) for chip in CHIPS.values() if chip.platform == "cuda"
    ]
    return min(reasons, key=len) if all(reasons) else None


def choices(work: Work) -> list[dict[str, Any]]:
    """The kernels choose their tiles themselves, from their tables."""
    del work
    return [{}]


def program(
    work: Work, *, writes: bool = True, tiles: dict[str, Any] | None = None, phase: str = "prefill"
) -> Program:
    """The call of the kernel that the backend declares; see `kernel_program` for `writes`.

    `tiles` takes the place of the table's sizes in this process, of `phase` where it is paged.
    """
    if tiles is not None:
        tuning.target_of(work, phase=phase).use(tiles)
    return kernel_program(work, backend_of(work), writes=writes)
