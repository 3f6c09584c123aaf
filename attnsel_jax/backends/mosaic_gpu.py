"""MOSAIC_GPU: attention (dense and paged) by Pallas kernels, Mosaic GPU."""

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.capabilities import Capabilities
from attnsel_jax.config import AttentionType
from attnsel_jax.constraints import EITHER, AtLeast, OneOf
from attnsel_jax.mosaic_gpu_limits import (
    AMPERE,
    BLACKWELL,
    CACHES,
    HEAD_SIZES,
    HOPPER,
    PAGED_SIZES,
    of_chip,
    of_dense,
    of_paged,
)

BOTH_OPS = {
    **{"platform": OneOf("cuda"), "jax_version": AtLeast((0, 11))},
    "compute_capability": OneOf(AMPERE, HOPPER, BLACKWELL),
    **{"dtype": OneOf("bfloat16", "float16"), "attn_type": OneOf(*AttentionType)},
    "head_size": HEAD_SIZES,
    **dict.fromkeys(("causal", "has_sink", "has_sliding_window", "has_attention_chunk"), EITHER),
    **dict.fromkeys(("has_soft_cap", "has_alibi", "needs_lse"), EITHER),
}
DENSE = Capabilities(
    **BOTH_OPS,
    head_size_v=HEAD_SIZES,
    needs_grad=EITHER,
    **dict.fromkeys(("has_bias", "has_mask", "has_segment_ids"), EITHER),
    **dict.fromkeys(("has_lens", "has_q_offset"), EITHER),
)
PAGED = Capabilities(
    **BOTH_OPS | {"head_size": PAGED_SIZES},
    kv_cache_dtype=CACHES,
    block_size=OneOf(16, 32, 64, 128, 256),
)


class MosaicGpuBackend(AttentionBackend):
    """Declares what its kernels honour, and what compiles for these chips."""

    name, family, layout, preferred_block_size = "MOSAIC_GPU", "standard", "by_head", 64
    capabilities = {"paged": PAGED, "dense": DENSE}
    kernels = {op: f"pallas_kernels.{op}.mosaic_gpu:{op}_attention" for op in ("paged", "dense")}

    @classmethod
    def supports_combination(cls, config, device):
        """Head sizes over caches; some gradients beside a bias; what single chips lack."""
        if config.op == "paged":
            yield from of_paged(config, device)
        else:
            yield from of_dense(config)
            yield from of_chip(config, device)
