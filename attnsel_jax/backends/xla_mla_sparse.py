"""XLA_MLA_SPARSE: sparse multi-head latent attention in plain JAX; runs on every platform."""

from collections.abc import Sequence

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.backends.xla_mla import XLA_LATENT, other_rows
from attnsel_jax.capabilities import Rejection
from attnsel_jax.config import AttentionSelectorConfig
from attnsel_jax.platforms import Device


class XlaMlaSparseBackend(AttentionBackend):
    """Attends to each token's top-k positions; has the indexer that finds them."""

    name = "XLA_MLA_SPARSE"
    family = "sparse_mla"
    capabilities = {"sparse_mla": XLA_LATENT}
    kernels = {
        "sparse_mla": "attnsel_jax.xla.sparse_mla:sparse_mla_attention",
        "indexer_scores": "attnsel_jax.xla.indexer:indexer_scores",
        "topk_positions": "attnsel_jax.xla.indexer:topk_positions",
    }
    impl = "attnsel_jax.impls.sparse_mla:SparseMLAImpl"
    preferred_block_size = 64

    @classmethod
    def supports_combination(
        cls, config: AttentionSelectorConfig, device: Device
    ) -> Sequence[Rejection]:
        """With fp8_ds_mla latents of 512 and rotary keys of 64 only."""
        return other_rows(config)
