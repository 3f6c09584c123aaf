"""MOSAIC_GPU_MLA: multi-head latent attention by Pallas kernels, Mosaic GPU."""

from collections.abc import Sequence

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.capabilities import Capabilities, Rejection
from attnsel_jax.config import AttentionSelectorConfig
from attnsel_jax.constraints import EITHER, AtLeast, OneOf
from attnsel_jax.platforms import Device, DeviceCapability

HALVES = ("bfloat16", "float16")

GPU_LATENT = Capabilities(
    platform=OneOf("cuda"),
    compute_capability=OneOf(DeviceCapability(9, 0)),
    jax_version=AtLeast((0, 11)),
    dtype=OneOf(*HALVES),
    kv_cache_dtype=OneOf(*HALVES, "fp8_e4m3", "fp8_e5m2"),
    head_size=OneOf(576),
    head_size_v=OneOf(512),
    block_size=OneOf(16, 32, 64, 128, 256),
    num_kv_heads=OneOf(1),
    has_soft_cap=EITHER,
    needs_lse=EITHER,
)


class MosaicGpuMlaBackend(AttentionBackend):
    """One kernel for decode and prefill on Hopper: TMA, wgmma, warpgroups with roles."""

    name = "MOSAIC_GPU_MLA"
    family = "mla"
    capabilities = {"mla": GPU_LATENT}
    kernels = {"mla": "pallas_kernels.mla.mosaic_gpu:mla_attention"}
    impl = "attnsel_jax.impls.mla:MLAImpl"
    preferred_block_size = 64

    @classmethod
    def supports_combination(
        cls, config: AttentionSelectorConfig, device: Device
    ) -> Sequence[Rejection]:
        """A cache of the other 16-bit dtype."""
        return other_half(config)


def other_half(config: AttentionSelectorConfig) -> Sequence[Rejection]:
    """A 16-bit cache is multiplied as it is, so it has the queries' dtype."""
    if config.cache_dtype in HALVES and config.cache_dtype != config.dtype:
        allowed = f"{config.dtype} as the queries, or of 8 bits"
        return [Rejection("kv_cache_dtype", config.cache_dtype, allowed)]
    return []
