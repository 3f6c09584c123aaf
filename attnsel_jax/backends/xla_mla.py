"""XLA_MLA: multi-head latent attention by blocks in plain JAX; runs on every platform."""

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.capabilities import Capabilities
from attnsel_jax.constraints import EITHER, MultipleOf, OneOf

XLA_LATENT = Capabilities(
    dtype=OneOf("float32", "bfloat16", "float16"),
    kv_cache_dtype=OneOf("float32", "bfloat16", "float16", "fp8_e4m3", "fp8_e5m2", "fp8_ds_mla"),
    head_size=MultipleOf(1),
    head_size_v=MultipleOf(1),
    block_size=MultipleOf(1),
    num_kv_heads=OneOf(1),
    has_soft_cap=EITHER,
    needs_lse=EITHER,
)


class XlaMlaBackend(AttentionBackend):
    """Absorbed queries over a latent cache, and the materialised form for prefill."""

    name = "XLA_MLA"
    family = "mla"
    capabilities = {"mla": XLA_LATENT}
    kernels = {
        "mla": "attnsel_jax.xla.mla:mla_attention",
        "mla_materialized": "attnsel_jax.xla.mla:mla_attention_materialized",
    }
    impl = "attnsel_jax.impls.mla:MLAImpl"
    preferred_block_size = 64
