"""MOSAIC_GPU_MLA_SPARSE: sparse multi-head latent attention by Pallas kernels, Mosaic GPU."""

import dataclasses
from collections.abc import Sequence

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.backends.mosaic_gpu_mla import GPU_LATENT, HALVES, other_half
from attnsel_jax.capabilities import Rejection
from attnsel_jax.config import AttentionSelectorConfig
from attnsel_jax.constraints import MultipleOf, OneOf
from attnsel_jax.platforms import Device

SPARSE = dataclasses.replace(
    GPU_LATENT,
    kv_cache_dtype=OneOf(*HALVES, "fp8_e4m3", "fp8_e5m2", "fp8_ds_mla"),
    num_index_heads=MultipleOf(1, at_most=64),
    index_head_dim=OneOf(64, 128, 192, 256),
)


class MosaicGpuMlaSparseBackend(AttentionBackend):
    """Each token's own rows, by copies of their own; the indexer's scores by a kernel too.

    The best positions of the scores are picked by XLA, whose top-k is a kernel of its own on GPUs.
    """

    name = "MOSAIC_GPU_MLA_SPARSE"
    family = "sparse_mla"
    capabilities = {"sparse_mla": SPARSE}
    kernels = {
        "sparse_mla": "pallas_kernels.sparse_mla.mosaic_gpu:sparse_mla_attention",
        "indexer_scores": "pallas_kernels.sparse_mla.mosaic_gpu_indexer:indexer_scores",
        "topk_positions": "attnsel_jax.xla.indexer:topk_positions",
    }
    impl = "attnsel_jax.impls.sparse_mla:SparseMLAImpl"
    preferred_block_size = 64

    @classmethod
    def supports_combination(
        cls, config: AttentionSelectorConfig, device: Device
    ) -> Sequence[Rejection]:
        """As MLA's; and the indexer's keys have its queries' dtype."""
        if config.index_head_dim is not None and config.cache_dtype != config.dtype:
            allowed = f"{config.dtype} as the indexer's queries"
            return [Rejection("kv_cache_dtype", config.cache_dtype, allowed)]
        return other_half(config)
