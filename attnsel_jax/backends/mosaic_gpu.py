"""MOSAIC_GPU: attention (dense and paged) by Pallas kernels, Mosaic GPU."""

from attnsel_jax.backend import AttentionBackend


class MosaicGpuBackend(AttentionBackend):
    """Declares no op until its kernels are written: selection refuses it with that reason."""

    name = "MOSAIC_GPU"
    family = "standard"
