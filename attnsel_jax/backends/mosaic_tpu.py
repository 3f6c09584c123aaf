"""MOSAIC_TPU: attention (dense and paged) by Pallas kernels, Mosaic TPU."""

from attnsel_jax.backend import AttentionBackend


class MosaicTpuBackend(AttentionBackend):
    """Declares no op until its kernels are written: selection refuses it with that reason."""

    name = "MOSAIC_TPU"
    family = "standard"
