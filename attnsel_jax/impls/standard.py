"""The impl of the standard family: one layer's attention over a paged cache, in vLLM's manner."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from attnsel_jax.backend import AttentionImpl
from attnsel_jax.config import AttentionType, attention_type, kv_cache_dtype_name
from attnsel_jax.kv_cache import KVCache, check_stored
from attnsel_jax.mesh import kernel_over_mesh, plan_call
from attnsel_jax.metadata import AttentionMetadata, check_is_batch
from attnsel_jax.static_arguments import count, distance, flag, number, window
from pallas_kernels.shape_checks import check_groups


class StandardImpl(AttentionImpl):
    """Holds what a layer knows when it is built; see `paged_attention`'s contract for the rest.

    Args:
        num_heads: query heads.
        head_size: size of a head.
        scale: factor on the logits.
        num_kv_heads: kv heads; None = num_heads.
        alibi_slopes: float [num_heads], or None.
        sliding_window: keys a query sees, its own included; None = all.
        kv_cache_dtype: the cache's, as the selector was asked.
        logits_soft_cap: soft cap of the logits; None = none (0, vLLM's word for none, too).
        attn_type: an `AttentionType`.
        sinks: float32 [num_heads], or None.
        attention_chunk_size: chunked-local attention; None = one chunk.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: Sequence[float] | jax.Array | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: Any = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        *,
        sinks: jax.Array | None = None,
        attention_chunk_size: int | None = None,
    ):
        self.num_heads = count("num_heads", num_heads, optional=False)
        self.head_size = count("head_size", head_size, optional=False)
        self.scale = number("scale", scale)
        self.num_kv_heads = count("num_kv_heads", num_kv_heads) or self.num_heads
        check_groups(self.num_heads, self.num_kv_heads)
        self.alibi_slopes = _per_head("alibi_slopes", alibi_slopes, num_heads)
        self.sinks = _per_head("sinks", sinks, num_heads)
        self.sliding_window = window("sliding_window", sliding_window)
        self.attention_chunk_size = distance("attention_chunk_size", attention_chunk_size)
        self.kv_cache_dtype = kv_cache_dtype_name(kv_cache_dtype)
        self.logits_soft_cap = number("logits_soft_cap", logits_soft_cap or None, positive=True)
        self.attn_type = attention_type(attn_type)
        self._check_features()

    def _check_features(self) -> None:
        """Refuses what the backend does not declare: the selector may not have been asked."""
        if "paged" not in self.backend.capabilities:
            raise ValueError(
                f"backend is {self.backend.name}, must be one that serves op paged, as a layer "
                f"does: call dot_product_attention with it"
            )
        stored = self.kv_cache_dtype
        asked = {
            "head_size": self.head_size,
            "kv_cache_dtype": None if stored == "auto" else stored,
            "attn_type": self.attn_type,
            "has_sliding_window": self.sliding_window is not None,
            "has_attention_chunk": self.attention_chunk_size is not None,
            "has_soft_cap": self.logits_soft_cap is not None,
            "has_alibi": self.alibi_slopes is not None,
            "has_sink": self.sinks is not None,
        }
        declared = self.backend.capabilities["paged"]
        for name, value in asked.items():
            allowed = getattr(declared, name)
            if value is not None and value not in allowed:
                raise ValueError(
                    f"{name} is {value}, must be {allowed} with backend {self.backend.name}: ask "
                    f"get_attn_backend for it"
                )

    def forward(
        self,
        q: jax.Array,
        k: jax.Array | None,
        v: jax.Array | None,
        kv_cache: KVCache | jax.Array,
        metadata: AttentionMetadata,
    ) -> tuple[jax.Array, KVCache | jax.Array]:
        """Writes this step's k and v, attends, and returns (output, cache).

        Args:
            q: [num_tokens, num_heads, head_size], or [num_tokens, num_heads * head_size].
            k, v: [num_tokens, num_kv_heads, head_size], or flat likewise; None = nothing to write.
            kv_cache: a `KVCache`, or its bare array in the shape of `get_kv_cache_shape`.
            metadata: the batch.

        Returns:
            output in q's shape and dtype, and the cache as it came, with this step written.

        Raises:
            TypeError: an argument that is no array, or a batch of another class.
            ValueError: tokens or a cache of other sizes than this layer was built for.
        """
        check_is_batch(metadata)
        given, q = q, self._with_heads("q", q, self.num_heads)
        cache = kv_cache if isinstance(kv_cache, KVCache) else self._wrapped(kv_cache)
        self._check_cache(cache, q)
        arrays = self._arrays(q, k, v, cache, metadata)
        plan = plan_call("paged", arrays, layout=cache.layout)
        out, _, pages = kernel_over_mesh(self.backend, "paged", plan)(
            **arrays,
            scale=self.scale,
            causal=self._causal(metadata),
            sliding_window=self.sliding_window,
            attention_chunk_size=self.attention_chunk_size,
            soft_cap=self.logits_soft_cap,
        )
        written = pages if cache is not kv_cache else cache.with_pages(pages)
        return out.reshape(given.shape), written

    def _arrays(self, q, k, v, cache: KVCache, metadata: AttentionMetadata) -> dict[str, Any]:
        """The kernel's arrays by name."""
        return {
            "q": q,
            "k": None if k is None else self._with_heads("k", k, self.num_kv_heads),
            "v": None if v is None else self._with_heads("v", v, self.num_kv_heads),
            "kv_pages": cache.pages,
            **metadata.arrays(),
            "slot_mapping": None if k is None else metadata.slot_mapping,
            "alibi_slopes": self.alibi_slopes,
            "sinks": self.sinks,
            "k_scale": cache.k_scale,
            "v_scale": cache.v_scale,
        }

    def _causal(self, metadata: AttentionMetadata) -> bool:
        """Whether queries see earlier keys only; refused where the backend declares it not."""
        causal = flag("metadata.causal", metadata.causal)
        causal = causal and self.attn_type == AttentionType.DECODER
        allowed = self.backend.capabilities["paged"].causal
        if causal not in allowed:
            raise ValueError(
                f"metadata.causal is {causal}, must be {allowed} with backend "
                f"{self.backend.name}: ask get_attn_backend for it"
            )
        return causal

    def _with_heads(self, name: str, x: jax.Array, count: int) -> jax.Array:
        """[num_tokens, count, head_size]: flat tokens get their heads."""
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise TypeError(f"{name} is {type(x).__name__}, must be an array")
        heads = (count, self.head_size)
        if x.ndim == 2 and x.shape[1] == count * self.head_size:
            return x.reshape(-1, *heads)
        if x.ndim != 3 or x.shape[1:] != heads:
            raise ValueError(
                f"{name} is {tuple(x.shape)}, must be [num_tokens, {count}, {self.head_size}] or "
                f"[num_tokens, {count * self.head_size}], as this layer was built"
            )
        return x

    def _check_cache(self, cache: KVCache, q: jax.Array) -> None:
        """Refuses a cache of another layout, dtype or size than was said at building."""
        if cache.layout != self.backend.layout:
            raise ValueError(
                f"kv_cache.layout is {cache.layout!r}, must be {self.backend.layout!r} for backend "
                f"{self.backend.name}: use kv_cache.converted({self.backend.layout!r})"
            )
        check_stored(cache.pages, self.kv_cache_dtype, q.dtype)
        if cache.num_kv_heads % self.num_kv_heads:
            raise ValueError(
                f"kv_cache has num_kv_heads {cache.num_kv_heads}, must be {self.num_kv_heads}, as "
                f"this layer was built, or a multiple of it"
            )
        if cache.dims[3] != self.head_size:
            raise ValueError(
                f"kv_cache has head_size {cache.dims[3]}, must be {self.head_size}, as this layer "
                f"was built: allocate it with allocate_kv_cache, or give its bare array"
            )

    def _wrapped(self, pages: jax.Array) -> KVCache:
        return KVCache(pages, layout=self.backend.layout, head_size=self.head_size)


def _per_head(name: str, values: Any, num_heads: int) -> jax.Array | None:
    if values is None:
        return None
    values = jnp.asarray(values)
    if not any(jnp.issubdtype(values.dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise ValueError(f"{name} has dtype {values.dtype}, must be float32")
    values = values.astype(jnp.float32)
    if values.shape != (num_heads,):
        raise ValueError(f"{name} has shape {values.shape}, must be ({num_heads},): one a head")
    return values
