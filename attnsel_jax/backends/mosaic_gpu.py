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
    head_size=OneOf(64, 80, 96, 128, 192, 256),
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
        """float16 queries do not fit bfloat16; float8 tiles of large heads do not fit registers."""
        reasons, cache = [], config.cache_dtype
        if config.op == "paged" and config.dtype == "float16" and cache == "bfloat16":
            allowed = OneOf("float16", "fp8_e4m3", "fp8_e5m2")
            why = "bfloat16 would drop three bits of each float16 query"
            reasons.append(Rejection("kv_cache_dtype", cache, allowed, why))
        if config.op == "paged" and str(cache).startswith("fp8") and config.head_size > 128:
            allowed = OneOf(*(size for size in PAGED.head_size.values if size <= 128))
            why = f"with kv_cache_dtype {cache}, whose tiles are converted in registers"
            reasons.append(Rejection("head_size", config.head_size, allowed, why))
        return reasons
