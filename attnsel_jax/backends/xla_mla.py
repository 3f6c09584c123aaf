"""XLA_MLA: multi-head latent attention by blocks in plain JAX; runs on every platform."""

from collections.abc import Sequence

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.capabilities import Capabilities, Rejection
from attnsel_jax.config import AttentionSelectorConfig
from attnsel_jax.constraints import EITHER, MultipleOf, OneOf
from attnsel_jax.platforms import Device
from pallas_kernels import fp8_ds_mla

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


def other_rows(config: AttentionSelectorConfig) -> list[Rejection]:
    """Rows of bytes hold a latent of 512 and a rotary key of 64, and nothing else."""
    rank = fp8_ds_mla.KV_LORA_RANK
    sizes = {
        "head_size": (config.head_size, rank + fp8_ds_mla.ROPE_DIM),
        "head_size_v": (config.head_size_v or rank, rank),
    }
    return [
        Rejection(name, asked, f"{allowed} with kv_cache_dtype fp8_ds_mla")
        for name, (asked, allowed) in sizes.items()
        if config.cache_dtype == "fp8_ds_mla" and asked != allowed
    ]


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

    @classmethod
    def supports_combination(
        cls, config: AttentionSelectorConfig, device: Device
    ) -> Sequence[Rejection]:
        """With fp8_ds_mla latents of 512 and rotary keys of 64 only."""
        return other_rows(config)
