"""MOSAIC_TPU_MLA_SPARSE: sparse multi-head latent attention by Pallas kernels, Mosaic TPU."""

import dataclasses

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.backends.mosaic_tpu_mla import TPU_LATENT
from attnsel_jax.constraints import OneOf

TPU_TILED = dataclasses.replace(
    TPU_LATENT,
    kv_cache_dtype=OneOf("float32", "bfloat16", "fp8_e4m3", "fp8_e5m2", "fp8_ds_mla"),
    block_size=OneOf(16, 32, 64, 128, 256),
)


class MosaicTpuMlaSparseBackend(AttentionBackend):
    """One kernel gathers rows or masks whole contexts; it writes the cache too."""

    name = "MOSAIC_TPU_MLA_SPARSE"
    family = "sparse_mla"
    capabilities = {"sparse_mla": TPU_TILED}
    kernels = {
        "sparse_mla": "pallas_kernels.sparse_mla.mosaic_tpu:sparse_mla_attention",
        "indexer_scores": "pallas_kernels.sparse_mla.mosaic_tpu_indexer:indexer_scores",
        "topk_positions": "pallas_kernels.sparse_mla.mosaic_tpu_topk:topk_positions",
    }
    impl = "attnsel_jax.impls.sparse_mla:SparseMLAImpl"
    latent_layout = "tiled"
    preferred_block_size = 64
