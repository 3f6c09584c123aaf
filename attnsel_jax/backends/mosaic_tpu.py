"""MOSAIC_TPU: attention (dense and paged) by Pallas kernels, Mosaic TPU."""

import dataclasses
from collections.abc import Sequence

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.capabilities import Capabilities, Rejection
from attnsel_jax.config import AttentionSelectorConfig, AttentionType
from attnsel_jax.constraints import ANYTHING, EITHER, MultipleOf, OneOf
from attnsel_jax.mosaic_tpu_limits import of_vmem
from attnsel_jax.platforms import Device

PAGED = Capabilities(
    platform=OneOf("tpu"),
    generation=OneOf("v4", "v5e", "v5p", "v6e", "7x"),
    dtype=OneOf("float32", "bfloat16"),
    kv_cache_dtype=OneOf("float32", "bfloat16", "fp8_e4m3", "fp8_e5m2", "int8"),
    head_size=MultipleOf(8, at_most=256),
    block_size=OneOf(8, 16, 32, 64, 128, 256),
    attn_type=OneOf(*AttentionType),
    causal=EITHER,
    has_sink=EITHER,
    has_sliding_window=EITHER,
    has_attention_chunk=EITHER,
    has_soft_cap=EITHER,
    has_alibi=EITHER, needs_lse=EITHER,
)  # fmt: skip
DENSE = dataclasses.replace(
    PAGED,
    kv_cache_dtype=ANYTHING,
    head_size_v=MultipleOf(8, at_most=256),
    block_size=ANYTHING,
    has_bias=EITHER,
    has_mask=EITHER,
    has_segment_ids=EITHER,
    has_lens=EITHER,
    has_q_offset=EITHER,
    needs_grad=EITHER,
)


class MosaicTpuBackend(AttentionBackend):
    """Declares what its kernels honour, and what compiles for these generations."""

    name = "MOSAIC_TPU"
    family = "standard"
    capabilities = {"paged": PAGED, "dense": DENSE}
    kernels = {
        "paged": "pallas_kernels.paged.mosaic_tpu:paged_attention",
        "dense": "pallas_kernels.dense.mosaic_tpu:dense_attention",
    }
    layout = "side_by_side"
    preferred_block_size = 64

    @classmethod
    def supports_combination(
        cls, config: AttentionSelectorConfig, device: Device
    ) -> Sequence[Rejection]:
        """Caches of more heads than VMEM has room for."""
        return list(of_vmem(config, device))
