"""MOSAIC_TPU_MLA_SPARSE: sparse multi-head latent attention by Pallas kernels, Mosaic TPU."""

import dataclasses
from collections.abc import Sequence

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.backends.mosaic_tpu_mla import TPU_LATENT
from attnsel_jax.capabilities import Rejection
from attnsel_jax.config import AttentionSelectorConfig
from attnsel_jax.constraints import MultipleOf, OneOf
from attnsel_jax.platforms import Device

TPU_TILED = dataclasses.replace(
    TPU_LATENT,
    kv_cache_dtype=OneOf("float32", "bfloat16", "fp8_e4m3", "fp8_e5m2", "fp8_ds_mla"),
    block_size=OneOf(16, 32, 64, 128, 256),
    index_head_dim=MultipleOf(128),
)
ROWS_OF_BYTES = 32  # of a register


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

    @classmethod
    def supports_combination(
        cls, config: AttentionSelectorConfig, device: Device
    ) -> Sequence[Rejection]:
        """Pages of the indexer's keys that are no whole registers."""
        of_bytes = config.cache_dtype.startswith("fp8") and config.index_head_dim is not None
        if of_bytes and (config.block_size or ROWS_OF_BYTES) % ROWS_OF_BYTES:
            allowed = f"a multiple of {ROWS_OF_BYTES} with index keys of {config.cache_dtype}"
            return [Rejection("block_size", config.block_size, allowed)]
        return []
