"""MOSAIC_GPU_MLA: multi-head latent attention by Pallas kernels, Mosaic GPU."""

from attnsel_jax.backend import AttentionBackend


class MosaicGpuMlaBackend(AttentionBackend):
    """Declares no op until its kernels are written: selection refuses it with that reason."""

    name = "MOSAIC_GPU_MLA"
    family = "mla"
