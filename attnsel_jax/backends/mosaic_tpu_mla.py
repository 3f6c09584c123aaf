"""MOSAIC_TPU_MLA: multi-head latent attention by Pallas kernels, Mosaic TPU."""

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.capabilities import Capabilities
from attnsel_jax.constraints import EITHER, OneOf

TPU_LATENT = Capabilities(
    platform=OneOf("tpu"),
    generation=OneOf("v4", "v5e", "v5p", "v6e", "7x"),
    dtype=OneOf("float32", "bfloat16"),
    kv_cache_dtype=OneOf("float32", "bfloat16", "fp8_e4m3", "fp8_e5m2"),
    head_size=OneOf(576),
    head_size_v=OneOf(512),
    block_size=OneOf(64, 128, 256),
    num_kv_heads=OneOf(1),
    has_soft_cap=EITHER,
    needs_lse=EITHER,
)


class MosaicTpuMlaBackend(AttentionBackend):
    """One kernel for decode and prefill; it writes the cache too."""

    name = "MOSAIC_TPU_MLA"
    family = "mla"
    capabilities = {"mla": TPU_LATENT}
    kernels = {"mla": "pallas_kernels.mla.mosaic_tpu:mla_attention"}
    impl = "attnsel_jax.impls.mla:MLAImpl"
    latent_layout = "striped"
    preferred_block_size = 64
