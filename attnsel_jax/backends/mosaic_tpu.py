"""MOSAIC_TPU: attention (dense and paged) by Pallas kernels, Mosaic TPU."""

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.capabilities import Capabilities
from attnsel_jax.config import AttentionType
from attnsel_jax.constraints import EITHER, OneOf

PAGED = Capabilities(
    platform=OneOf("tpu"),
    generation=OneOf("v5e", "v5p", "v6e", "7x"),
    dtype=OneOf("float32", "bfloat16"),
    kv_cache_dtype=OneOf("float32", "bfloat16", "fp8_e4m3", "fp8_e5m2", "int8"),
    head_size=OneOf(64, 80, 96, 112, 128, 192, 256),
    block_size=OneOf(8, 16, 32, 64, 128, 256),
    attn_type=OneOf(*AttentionType),
    causal=EITHER,
    has_sink=EITHER,
    has_sliding_window=EITHER,
    has_attention_chunk=EITHER,
    has_soft_cap=EITHER,
    has_alibi=EITHER,
    needs_lse=EITHER,
)


class MosaicTpuBackend(AttentionBackend):
    """Declares what its kernels honour, and what compiles for these generations."""

    name = "MOSAIC_TPU"
    family = "standard"
    capabilities = {"paged": PAGED}
    kernels = {"paged": "pallas_kernels.paged.mosaic_tpu:paged_attention"}
    layout = "side_by_side"
    preferred_block_size = 64
