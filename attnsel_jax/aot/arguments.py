"""A call's arguments without their values: written down as JSON, and read back as shapes."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

ABSTRACT = "abstract"


def described(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as JSON: arrays by shape and dtype, everything else as it is."""
    return {
        name: {ABSTRACT: [list(value.shape), jnp.dtype(value.dtype).name]}
        if hasattr(value, "shape") and hasattr(value, "dtype")
        else value
        for name, value in arguments.items()
    }


def read_back(
    description: Mapping[str, Any], sharding: Any = None
) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, Any]]:
    """(arrays as shapes on a device, static arguments) of what `described` wrote."""
    arrays, static = {}, {}
    for name, value in description.items():
        if isinstance(value, dict) and ABSTRACT in value:
            shape, dtype = value[ABSTRACT]
            arrays[name] = jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=sharding)
        else:
            static[name] = tuple(value) if isinstance(value, list) else value
    return arrays, static


def dense_arguments(
    *,
    batch: int,
    q_len: int,
    kv_len: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    dtype: str,
    **static: Any,
) -> dict[str, Any]:
    """Abstract arguments of the op dense."""
    dtype = jnp.dtype(dtype)
    kv = jax.ShapeDtypeStruct((batch, kv_len, num_kv_heads, head_size), dtype)
    q = jax.ShapeDtypeStruct((batch, q_len, num_heads, head_size), dtype)
    return {"q": q, "k": kv, "v": kv, **static}


def paged_arguments(
    *,
    batch: int,
    q_len: int,
    kv_len: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    dtype: str,
    cache_dtype: Any,
    cache_shape: tuple[int, ...],
    page_size: int,
    **static: Any,
) -> dict[str, Any]:
    """Abstract arguments of the op paged: `batch` sequences of `q_len` new tokens each."""
    tokens = batch * q_len
    new = jax.ShapeDtypeStruct((tokens, num_kv_heads, head_size), jnp.dtype(dtype))
    return {
        "q": jax.ShapeDtypeStruct((tokens, num_heads, head_size), jnp.dtype(dtype)),
        "k": new,
        "v": new,
        "kv_pages": jax.ShapeDtypeStruct(cache_shape, jnp.dtype(cache_dtype)),
        **_batch(batch, tokens, -(-kv_len // page_size)),
        **static,
    }


def mla_arguments(
    *,
    batch: int,
    q_len: int,
    kv_len: int,
    num_heads: int,
    kv_lora_rank: int,
    rope_dim: int,
    dtype: str,
    cache_dtype: Any,
    cache_shape: tuple[int, ...],
    page_size: int,
    topk: int | None = None,
    **static: Any,
) -> dict[str, Any]:
    """Abstract arguments of the op mla; with topk, of sparse_mla."""
    tokens = batch * q_len

    def floats(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    chosen = {"topk_indices": _ints(tokens, topk)} if topk else {}
    return {
        "ql_nope": floats(tokens, num_heads, kv_lora_rank),
        "q_pe": floats(tokens, num_heads, rope_dim),
        "kv_c": floats(tokens, kv_lora_rank),
        "k_pe": floats(tokens, rope_dim),
        "latent_pages": jax.ShapeDtypeStruct(cache_shape, jnp.dtype(cache_dtype)),
        **chosen,
        **_batch(batch, tokens, -(-kv_len // page_size)),
        **static,
    }


def _batch(num_seqs: int, tokens: int, pages_per_seq: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        "page_table": _ints(num_seqs, pages_per_seq),
        "kv_lens": _ints(num_seqs),
        "cu_q_lens": _ints(num_seqs + 1),
        "num_seqs": _ints(),
        "slot_mapping": _ints(tokens),
    }


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
