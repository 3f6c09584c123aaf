"""The question that an op's arguments ask, read off their shapes, dtypes and presence."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from attnsel_jax.config import AttentionSelectorConfig

FAMILY_OF = {
    "dense": "dense",
    "paged": "paged",
    "mla": "mla",
    "mla_materialized": "mla",
    "sparse_mla": "sparse_mla",
    "indexer_scores": "sparse_mla",
    "topk_positions": "sparse_mla",
}
DEEPSEEK_LATENT = 576  # kv_lora_rank 512 + rope_dim 64
INDEX_DTYPE = "bfloat16"  # of DeepSeek's cache, for ops whose arguments do not say


def question(
    op: str,
    arguments: Mapping[str, Any],
    *,
    attn_type: str | None = None,
    needs_grad: bool = False,
    needs_lse: bool = False,
) -> AttentionSelectorConfig:
    """The `AttentionSelectorConfig` of a call.

    Args:
        op: one of `FAMILY_OF`.
        arguments: the contract's, by name.
        attn_type: what attends to what; None = decoder.
        needs_grad: whether gradients will be taken.
        needs_lse: whether lse will be read.

    Raises:
        ValueError: no such op.
    """
    if op not in FAMILY_OF:
        raise ValueError(f"op is {op!r}, must be one of {', '.join(FAMILY_OF)}")
    shapes = {"dense": _dense, "paged": _paged}.get(op, _latent)(arguments)
    has = {
        "has_sink": "sinks",
        "has_sliding_window": "sliding_window",
        "has_attention_chunk": "attention_chunk_size",
        "has_soft_cap": "soft_cap",
        "has_bias": "bias",
        "has_alibi": "alibi_slopes",
        "has_mask": "mask",
        "has_segment_ids": "q_segment_ids",
    }
    features = {field: arguments.get(name) is not None for field, name in has.items()}
    return AttentionSelectorConfig(
        **shapes,
        **features,
        op=FAMILY_OF[op],
        use_mla=FAMILY_OF[op] in ("mla", "sparse_mla"),
        use_sparse=FAMILY_OF[op] == "sparse_mla",
        attn_type=attn_type,
        needs_grad=needs_grad,
        needs_lse=needs_lse,
    )


def _dense(arguments: Mapping[str, Any]) -> dict[str, Any]:
    q, k, v = (arguments[name] for name in "qkv")
    return {
        "head_size": q.shape[-1],
        "head_size_v": v.shape[-1],
        "dtype": q.dtype,
        "num_heads": q.shape[2],
        "num_kv_heads": k.shape[2],
        "causal": bool(arguments.get("causal", False)),
        "has_lens": any(arguments.get(name) is not None for name in ("q_lens", "kv_lens")),
        "has_q_offset": arguments.get("q_offset") is not None,
    }


def _paged(arguments: Mapping[str, Any]) -> dict[str, Any]:
    q, pages = arguments["q"], arguments["kv_pages"]
    return {
        "head_size": q.shape[-1],
        "dtype": q.dtype,
        "kv_cache_dtype": pages.dtype,
        "block_size": pages.shape[2],
        "num_heads": q.shape[1],
        "num_kv_heads": pages.shape[3],
        "causal": bool(arguments.get("causal", True)),
    }


def _latent(arguments: Mapping[str, Any]) -> dict[str, Any]:
    q = arguments.get("ql_nope", arguments.get("q_nope"))
    pages = arguments.get("latent_pages")
    if "q_index" in arguments:  # as the op asks: its cache is not the latent one
        keys = arguments["index_pages"]
        return {
            "head_size": DEEPSEEK_LATENT,
            "dtype": arguments["q_index"].dtype,
            "kv_cache_dtype": keys.dtype,
            "block_size": keys.shape[1],
            "num_index_heads": arguments["q_index"].shape[1],
            "index_head_dim": keys.shape[2],
        }
    if q is None or pages is None:  # top-k
        return {"head_size": DEEPSEEK_LATENT, "dtype": INDEX_DTYPE}
    is_bytes = np.dtype(pages.dtype) == np.uint8
    return {
        "head_size": DEEPSEEK_LATENT if is_bytes else pages.shape[-1],
        "dtype": q.dtype,
        "kv_cache_dtype": "fp8_ds_mla" if is_bytes else pages.dtype,
        "block_size": pages.shape[1],
        "num_heads": q.shape[1],
        "num_kv_heads": 1,
    }
