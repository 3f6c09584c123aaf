"""MOSAIC_GPU_MLA_SPARSE: sparse multi-head latent attention by Pallas kernels, Mosaic GPU."""

from attnsel_jax.backend import AttentionBackend


class MosaicGpuMlaSparseBackend(AttentionBackend):
    """Declares no op until its kernels are written: selection refuses it with that reason."""

    name = "MOSAIC_GPU_MLA_SPARSE"
    family = "sparse_mla"
