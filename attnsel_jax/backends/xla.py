"""XLA: attention by blocks in plain JAX, memory linear in the length; runs on every platform."""

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.capabilities import Capabilities
from attnsel_jax.config import AttentionType
from attnsel_jax.constraints import EITHER, MultipleOf, OneOf

FLOATS = OneOf("float32", "bfloat16", "float16")
ANY_SIZE = MultipleOf(1)

XLA_DENSE = Capabilities(
    dtype=FLOATS,
    head_size=ANY_SIZE,
    head_size_v=ANY_SIZE,
    attn_type=OneOf(*AttentionType),
    causal=EITHER,
    has_sink=EITHER,
    has_sliding_window=EITHER,
    has_attention_chunk=EITHER,
    has_soft_cap=EITHER,
    has_bias=EITHER,
    has_alibi=EITHER,
    has_mask=EITHER,
    has_segment_ids=EITHER,
    has_lens=EITHER,
    has_q_offset=EITHER,
    needs_grad=EITHER,
    needs_lse=EITHER,
)
XLA_PAGED = Capabilities(
    dtype=FLOATS,
    kv_cache_dtype=OneOf("float32", "bfloat16", "float16", "fp8_e4m3", "fp8_e5m2", "int8"),
    head_size=ANY_SIZE,
    block_size=ANY_SIZE,
    attn_type=OneOf(*AttentionType),
    causal=EITHER,
    has_sink=EITHER,
    has_sliding_window=EITHER,
    has_attention_chunk=EITHER,
    has_soft_cap=EITHER,
    has_alibi=EITHER,
    needs_lse=EITHER,
)


class XlaBackend(AttentionBackend):
    """What a user without an accelerator kernel runs."""

    name = "XLA"
    capabilities = {"paged": XLA_PAGED, "dense": XLA_DENSE}
    kernels = {
        "paged": "attnsel_jax.xla.paged:paged_attention",
        "dense": "attnsel_jax.xla.dense:dense_attention",
    }
