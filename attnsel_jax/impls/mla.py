"""The impl of the MLA family: one layer's latent attention over a paged latent cache."""

from typing import Any

import jax

from attnsel_jax.backend import MLAAttentionImpl
from attnsel_jax.config import kv_cache_dtype_name
from attnsel_jax.kv_cache import LatentCache, check_stored
from attnsel_jax.mesh import kernel_over_mesh, plan_call
from attnsel_jax.metadata import AttentionMetadata, check_is_batch
from attnsel_jax.static_arguments import count, flag, number

NAMES = ("ql_nope", "q_pe", "kv_c", "k_pe")


class MLAImpl(MLAAttentionImpl):
    """Holds what an MLA layer knows when it is built; see the contract of `mla` for the rest.

    Args:
        num_heads: query heads.
        scale: factor on the logits: (qk_nope_head_dim + rope_dim) ** -0.5 of the model.
        kv_lora_rank: size of the latent.
        qk_rope_head_dim: size of the rotary key.
        kv_cache_dtype: the cache's, as the selector was asked.
        logits_soft_cap: soft cap of the logits; None = none.
    """

    op = "mla"

    def __init__(
        self,
        num_heads: int,
        scale: float,
        kv_lora_rank: int,
        qk_rope_head_dim: int,
        kv_cache_dtype: Any = "auto",
        logits_soft_cap: float | None = None,
    ):
        self.num_heads = count("num_heads", num_heads, optional=False)
        self.scale = number("scale", scale)
        if self.scale is None:
            raise ValueError("scale is None, must be a number: the model's, not the latent's")
        self.kv_lora_rank = count("kv_lora_rank", kv_lora_rank, optional=False)
        self.qk_rope_head_dim = count("qk_rope_head_dim", qk_rope_head_dim, optional=False)
        self.kv_cache_dtype = kv_cache_dtype_name(kv_cache_dtype)
        self.logits_soft_cap = number("logits_soft_cap", logits_soft_cap or None, positive=True)
        declared = self.backend.capabilities[self.op]
        if (self.logits_soft_cap is not None) not in declared.has_soft_cap:
            raise ValueError(
                f"logits_soft_cap is {logits_soft_cap}, must be None with backend "
                f"{self.backend.name}: ask get_attn_backend for has_soft_cap"
            )
        stored = self.kv_cache_dtype
        if stored != "auto" and stored not in declared.kv_cache_dtype:
            raise ValueError(
                f"kv_cache_dtype is {stored}, must be {declared.kv_cache_dtype} with backend "
                f"{self.backend.name}: ask get_attn_backend for it"
            )

    def forward(
        self,
        ql_nope: jax.Array,
        q_pe: jax.Array,
        kv_c: jax.Array | None,
        k_pe: jax.Array | None,
        kv_cache: LatentCache | jax.Array,
        metadata: AttentionMetadata,
    ) -> tuple[jax.Array, LatentCache | jax.Array]:
        """Writes this step's latents, attends, and returns (latent output, cache).

        Args:
            ql_nope: [num_tokens, num_heads, kv_lora_rank], absorbed.
            q_pe: [num_tokens, num_heads, qk_rope_head_dim].
            kv_c, k_pe: [num_tokens, kv_lora_rank], [num_tokens, qk_rope_head_dim]; None = nothing
                to write.
            kv_cache: a `LatentCache`, or its bare array in the shape of `get_kv_cache_shape`.
            metadata: the batch.

        Raises:
            TypeError: an argument that is no array, or a batch of another class.
            ValueError: tokens or a cache of other sizes than this layer was built for.
        """
        return self._attend((ql_nope, q_pe, kv_c, k_pe), {}, kv_cache, metadata)

    def _check(self, tokens, cache: LatentCache) -> None:
        """Refuses tokens and a cache of other sizes than were said when the layer was built."""
        if cache.layout != self.backend.latent_layout:
            raise ValueError(
                f"kv_cache.layout is {cache.layout!r}, must be {self.backend.latent_layout!r} for "
                f"backend {self.backend.name}: use "
                f"kv_cache.converted({self.backend.latent_layout!r}, {self.qk_rope_head_dim})"
            )
        own = (self.kv_lora_rank, self.qk_rope_head_dim)
        for name, x in zip(NAMES, tokens, strict=True):
            nothing_to_write = x is None and name in ("kv_c", "k_pe")
            if not (nothing_to_write or (hasattr(x, "shape") and hasattr(x, "dtype"))):
                raise TypeError(f"{name} is {type(x).__name__}, must be an array")
        for name, x, size in zip(NAMES, tokens, own, strict=False):
            if x.shape[1:] != (self.num_heads, size):
                raise ValueError(
                    f"{name} is {tuple(x.shape)}, must be [num_tokens, {self.num_heads}, {size}], "
                    f"as this layer was built"
                )
        check_stored(cache.pages, self.kv_cache_dtype, tokens[0].dtype)

    def _attend(self, tokens, chosen, kv_cache, metadata):
        """Calls the family's kernel; `chosen` holds what it takes beside MLA's."""
        check_is_batch(metadata)
        if not flag("metadata.causal", metadata.causal):
            raise ValueError("metadata.causal is False, must be True: latent attention is causal")
        is_wrapped = isinstance(kv_cache, LatentCache)
        cache = kv_cache
        if not is_wrapped:
            cache = LatentCache(kv_cache, layout=self.backend.latent_layout)
        self._check(tokens, cache)
        arrays = {
            **dict(zip(NAMES, tokens, strict=True)),
            "latent_pages": cache.pages,
            **chosen,
            **metadata.arrays(),
            "slot_mapping": None if tokens[2] is None else metadata.slot_mapping,
            "kv_scale": cache.kv_scale,
        }
        plan = plan_call(self.op, arrays)
        out, _, pages = kernel_over_mesh(self.backend, self.op, plan)(
            **arrays,
            scale=self.scale,
            soft_cap=self.logits_soft_cap,
            kv_cache_dtype=cache.kv_cache_dtype,
        )
        return out, cache.with_pages(pages) if is_wrapped else pages
