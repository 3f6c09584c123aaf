"""MOSAIC_GPU: attention (dense and paged) by Pallas kernels, Mosaic GPU."""

from collections.abc import Sequence

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.capabilities import Capabilities, Rejection
from attnsel_jax.config import AttentionSelectorConfig, AttentionType
from attnsel_jax.constraints import EITHER, AtLeast, OneOf
from attnsel_jax.platforms import Device, DeviceCapability

PAGED = Capabilities(
    platform=OneOf("cuda"),
    compute_capability=OneOf(DeviceCapability(9, 0)),
    jax_version=AtLeast((0, 11)),
    dtype=OneOf("bfloat16", "float16"),
    kv_cache_dtype=OneOf("bfloat16", "float16", "fp8_e4m3", "fp8_e5m2"),
    head_size=OneOf(64, 96, 128, 192, 256),
    block_size=OneOf(16, 32, 64, 128, 256),
    attn_type=OneOf(*AttentionType),
    causal=EITHER,
    has_sink=EITHER,
    has_sliding_window=EITHER,
    has_attention_chunk=EITHER,
    has_soft_cap=EITHER,
    has_alibi=EITHER,
    needs_lse=EITHER,
)


class MosaicGpuBackend(AttentionBackend):
    """Declares what its kernels honour, and what compiles for these chips."""

    name = "MOSAIC_GPU"
    family = "standard"
    capabilities = {"paged": PAGED}
    kernels = {"paged": "pallas_kernels.paged.mosaic_gpu:paged_attention"}
    layout = "by_head"
    preferred_block_size = 64

    @classmethod
    def supports_combination(
        cls, config: AttentionSelectorConfig, device: Device
    ) -> Sequence[Rejection]:
        """A wgmma multiplies equal dtypes, and bfloat16 does not hold a float16 query."""
        if config.op == "paged" and config.dtype == "float16" and config.cache_dtype == "bfloat16":
            allowed = OneOf("float16", "fp8_e4m3", "fp8_e5m2")
            why = "bfloat16 would drop three bits of each float16 query"
            return [Rejection("kv_cache_dtype", config.cache_dtype, allowed, why)]
        return ()
