"""MOSAIC_TPU: attention (dense and paged) by Pallas kernels, Mosaic TPU."""

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.capabilities import Capabilities
from attnsel_jax.config import AttentionType
from attnsel_jax.constraints import EITHER, MultipleOf, OneOf

MOSAIC_TPU_DENSE = Capabilities(
    platform=OneOf("tpu"),
    generation=OneOf("v4", "v5e", "v5p", "v6e", "7x"),
    dtype=OneOf("float32", "bfloat16"),
    head_size=MultipleOf(8, at_most=256),
    head_size_v=MultipleOf(8, at_most=256),
    attn_type=OneOf(*AttentionType),
    causal=EITHER,
    has_sink=EITHER,
    has_sliding_window=EITHER,
    has_attention_chunk=EITHER,
    has_soft_cap=EITHER,
    has_bias=EITHER,
    has_alibi=EITHER,
    has_segment_ids=EITHER,
    has_lens=EITHER,
    has_q_offset=EITHER,
    needs_grad=EITHER,
    needs_lse=EITHER,
)


class MosaicTpuBackend(AttentionBackend):
    """What a TPU runs where it is declared; XLA takes the rest."""

    name = "MOSAIC_TPU"
    family = "standard"
    capabilities = {"dense": MOSAIC_TPU_DENSE}
    kernels = {"dense": "pallas_kernels.dense.mosaic_tpu:dense_attention"}
