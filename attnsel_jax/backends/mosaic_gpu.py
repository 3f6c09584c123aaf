"""MOSAIC_GPU: attention (dense and paged) by Pallas kernels, Mosaic GPU."""

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.capabilities import Capabilities, Rejection
from attnsel_jax.config import AttentionType
from attnsel_jax.constraints import EITHER, AtLeast, OneOf
from attnsel_jax.platforms import DeviceCapability

AMPERE, HOPPER = DeviceCapability(8, 0), DeviceCapability(9, 0)
BOTH_OPS = {
    **{"platform": OneOf("cuda"), "jax_version": AtLeast((0, 11))},
    **{"dtype": OneOf("bfloat16", "float16"), "attn_type": OneOf(*AttentionType)},
    "head_size": OneOf(64, 80, 96, 128, 192, 256),
    **dict.fromkeys(("causal", "has_sink", "has_sliding_window", "has_attention_chunk"), EITHER),
    **dict.fromkeys(("has_soft_cap", "has_alibi", "needs_lse"), EITHER),
}
DENSE = Capabilities(
    **BOTH_OPS,
    **{"compute_capability": OneOf(AMPERE, HOPPER), "needs_grad": EITHER},
    head_size_v=OneOf(64, 80, 96, 128, 192, 256),
    **dict.fromkeys(("has_bias", "has_segment_ids", "has_lens", "has_q_offset"), EITHER),
)
PAGED = Capabilities(
    **BOTH_OPS | {"head_size": OneOf(64, 80, 96, 128, 192)},  # at 256 no prompt's kernel compiles
    compute_capability=OneOf(AMPERE, HOPPER),
    kv_cache_dtype=OneOf("bfloat16", "float16", "fp8_e4m3", "fp8_e5m2"),
    block_size=OneOf(16, 32, 64, 128, 256),
)
AMPERE_HEAD_SIZES, HEAD_SIZES_V = OneOf(64, 96, 128), {192: (128, 192)}  # others: as head_size


class MosaicGpuBackend(AttentionBackend):
    """Declares what its kernels honour, and what compiles for these chips."""

    name, family, layout, preferred_block_size = "MOSAIC_GPU", "standard", "by_head", 64
    capabilities = {"paged": PAGED, "dense": DENSE}
    kernels = {op: f"pallas_kernels.{op}.mosaic_gpu:{op}_attention" for op in ("paged", "dense")}

    @classmethod
    def supports_combination(cls, config, device):
        """No gradient beside bias or slopes; v as k, or 128 by 192; float8 up to head size 128."""
        size, size_v, cache = config.head_size, config.head_size_v, str(config.cache_dtype)
        if (ampere := device.compute_capability == AMPERE) and size not in AMPERE_HEAD_SIZES:
            yield Rejection("head_size", size, AMPERE_HEAD_SIZES, "with Ampere, 8.0")
        if config.op == "dense":
            for name in ("has_bias", "has_alibi"):
                if config.needs_grad and getattr(config, name):
                    yield Rejection(name, True, "False with needs_grad")
            sizes = OneOf(*HEAD_SIZES_V.get(size, (size,)))
            if size_v is not None and size in DENSE.head_size and size_v not in sizes:
                yield Rejection("head_size_v", size_v, f"{sizes} with head_size {size}")
        elif ampere and cache.startswith("fp8"):
            yield Rejection("kv_cache_dtype", cache, DENSE.dtype, "with Ampere: it has no float8")
        elif cache == "bfloat16" and config.dtype == "float16":
            yield Rejection("kv_cache_dtype", cache, OneOf("float16", "fp8_e4m3", "fp8_e5m2"),
                            "bfloat16 would drop three bits of each float16 query")  # fmt: skip
        elif cache.startswith("fp8") and size > 128:
            yield Rejection("head_size", size, OneOf(64, 80, 96, 128), f"with a cache of {cache}")
