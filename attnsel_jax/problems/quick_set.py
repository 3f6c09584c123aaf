"""Tiny problems that reach every feature, dtype and edge: what the tests run on every backend."""

from typing import Any

from attnsel_jax.problems.dense_inputs import dense_inputs
from attnsel_jax.problems.indexer_inputs import indexer_inputs, topk_inputs
from attnsel_jax.problems.materialized_inputs import materialized_inputs
from attnsel_jax.problems.mla_inputs import mla_inputs
from attnsel_jax.problems.paged_inputs import paged_inputs
from attnsel_jax.problems.problem import Problem

DENSE_SHAPE = {"heads": (4, 2), "head_size": 64, "q_len": 37, "dtype": "float32"}
PAGED_SHAPE = {"heads": (4, 2), "head_size": 64, "q_lens": (1, 9, 0, 4), "kv_lens": (35, 25, 7, 4),
               "page_size": 16, "dtype": "float32", "pad_tokens": 2}  # fmt: skip
LATENT_SHAPE = {"num_heads": 3, "rank": 32, "rope_dim": 8, "qk_nope_head_dim": 16,
                "q_lens": (1, 9, 0, 4), "kv_lens": (35, 25, 7, 4), "page_size": 16,
                "dtype": "float32", "pad_tokens": 2}  # fmt: skip
DEEPSEEK = {"num_heads": 16, "rank": 512, "rope_dim": 64, "qk_nope_head_dim": 128, "page_size": 64,
            "dtype": "bfloat16", "q_lens": (1, 3), "kv_lens": (70, 20)}  # fmt: skip
CAUSAL = {"causal": True}


def _dense(name: str, description: str, **options: Any) -> Problem:
    asked = {key: options.pop(key) for key in ("gradients", "attn_type") if key in options}
    return Problem(
        f"quick.dense.{name}", "dense", description, dense_inputs, DENSE_SHAPE | options, **asked
    )


def _paged(name: str, description: str, *, attn_type: str | None = None, **options: Any) -> Problem:
    options = PAGED_SHAPE | options
    return Problem(
        f"quick.paged.{name}", "paged", description, paged_inputs, options, attn_type=attn_type
    )


def _latent(name: str, description: str, shape: dict[str, Any], **options: Any) -> Problem:
    op = "sparse_mla" if "topk" in options else "mla"
    return Problem(f"quick.{op}.{name}", op, description, mla_inputs, shape | options)


DENSE = (
    _dense("causal", "causal, with gradients", **CAUSAL, gradients=True),
    _dense("bfloat16", "causal, bfloat16, with gradients", dtype="bfloat16", **CAUSAL,
           gradients=True),
    _dense("float16", "causal, float16, head size 128, with gradients", dtype="float16",
           head_size=128, **CAUSAL, gradients=True),
    _dense("encoder", "everyone sees everyone; multi-head", heads=(3, 3),
           attn_type="encoder_only"),
    _dense("window", "causal, sliding window", sliding_window=8, **CAUSAL, gradients=True),
    _dense("two-sided-window", "encoder, window (5, 9), gradients", sliding_window=(5, 9),
           attn_type="encoder", gradients=True),
    _dense("chunked", "chunked-local, chunk 16", attention_chunk_size=16, **CAUSAL,
           gradients=True),
    _dense("soft-cap", "soft cap 5, multi-query, head size 256", heads=(3, 1), head_size=256,
           soft_cap=5.0, **CAUSAL, gradients=True),
    _dense("sinks", "sinks and window", sinks=True, sliding_window=16, **CAUSAL, gradients=True),
    _dense("bias", "a bias broadcast over the batch", bias=(False, True, True, True), batch=2,
           gradients=True),
    _dense("key-bias", "a bias for each key, broadcast over queries and heads",
           bias=(True, False, False, True), batch=2, **CAUSAL, gradients=True),
    _dense("alibi", "ALiBi, decoder, queries at an offset", alibi=True, q_len=20, kv_len=45,
           q_offset=25, **CAUSAL),
    _dense("mask", "a boolean mask", masked=True, gradients=True),
    _dense("segments", "packed segments", segments=3, **CAUSAL, gradients=True),
    _dense("lens", "padded queries and keys, head size 80", batch=2, head_size=80, kv_len=41,
           q_lens=(37, 18), kv_lens=(41, 23), gradients=True, attn_type="encoder"),
    _dense("offset", "a q_offset for each row, the first below 0: empty rows", batch=2, kv_len=50,
           q_offset=(-3, 13), **CAUSAL, gradients=True),
    _dense("head-sizes", "head size 192 for q and k, 128 for v", head_size=192, head_size_v=128,
           **CAUSAL, gradients=True),
    _dense("odd", "head size 40, grouped by 5, cross attention", head_size=40, heads=(5, 1),
           q_len=3, kv_len=71, attn_type="encoder_decoder"),
    _dense("one-query", "a single query", q_len=1, kv_len=33, q_offset=32, **CAUSAL),
    _dense("everything", "all features at once", batch=2, sinks=True, alibi=True, soft_cap=8.0,
           bias=(True, True, True, True), segments=2, sliding_window=20, q_lens=(37, 21),
           kv_lens=(37, 30), masked=True, attention_chunk_size=24, **CAUSAL, gradients=True),
)  # fmt: skip
PAGED = (
    _paged("mixed", "decode, a chunk, no new token, a prompt"),
    _paged("bfloat16", "bfloat16, head size 128", dtype="bfloat16", head_size=128),
    _paged("float16", "float16, head size 256", dtype="float16", head_size=256),
    _paged("window", "sliding window, pages of 8", sliding_window=9, page_size=8),
    _paged("two-sided-window", "encoder over a cache, window (6, 4)", sliding_window=(6, 4),
           causal=False, attn_type="encoder"),
    _paged("encoder-only", "everyone sees the whole sequence, whole prompts",
           q_lens=(9, 4), kv_lens=(9, 4), causal=False, attn_type="encoder_only"),
    _paged("cross", "cross attention: nothing written", writes=False, causal=False,
           attn_type="encoder_decoder"),
    _paged("chunked", "chunked-local, chunk 12", attention_chunk_size=12),
    _paged("soft-cap", "soft cap 5, multi-query", heads=(3, 1), soft_cap=5.0),
    _paged("sinks", "sinks and window", sinks=True, sliding_window=16),
    _paged("alibi", "ALiBi", alibi=True),
    _paged("page-1", "pages of one token, head size 72", page_size=1, head_size=72,
           q_lens=(1, 3), kv_lens=(9, 5)),
    _paged("page-32", "pages of 32, head size 80, speculative decode", page_size=32, head_size=80,
           q_lens=(3, 3), kv_lens=(65, 32)),
    _paged("page-64", "pages of 64, head size 96, bfloat16", page_size=64, head_size=96,
           dtype="bfloat16"),
    _paged("page-128", "pages of 128, head size 128, bfloat16", page_size=128, head_size=128,
           dtype="bfloat16", q_lens=(1, 5), kv_lens=(300, 128)),
    _paged("page-256", "pages of 256, head size 112", page_size=256, head_size=112),
    _paged("e4m3", "float8_e4m3fn cache, one scale each", cache_dtype="float8_e4m3fn",
           scales="tensor"),
    _paged("e4m3-unscaled", "float8_e4m3fn cache without scales, bfloat16 queries",
           cache_dtype="float8_e4m3fn", dtype="bfloat16", head_size=128),
    _paged("e5m2", "float8_e5m2 cache, scales by head, bfloat16 queries", dtype="bfloat16",
           cache_dtype="float8_e5m2", scales="head"),
    _paged("int8", "int8 cache, scales by head", cache_dtype="int8", scales="head"),
    _paged("bfloat16-cache", "bfloat16 cache under float32 queries", cache_dtype="bfloat16"),
    _paged("float16-cache", "float16 cache under float32 queries", cache_dtype="float16"),
    _paged("float32-cache", "float32 cache under bfloat16 queries", cache_dtype="float32",
           dtype="bfloat16"),
    _paged("everything", "all features at once", sinks=True, alibi=True, soft_cap=8.0,
           sliding_window=20, attention_chunk_size=24, cache_dtype="int8", scales="head",
           pad_seqs=3, pad_tokens=7, dtype="bfloat16"),
)  # fmt: skip
LATENT = (
    _latent("mixed", "decode, a chunk, no new token, a prompt", LATENT_SHAPE),
    _latent("soft-cap", "soft cap, float16, nothing written", LATENT_SHAPE, soft_cap=5.0,
            dtype="float16", writes=False),
    _latent("deepseek", "DeepSeek's dimensions", DEEPSEEK),
    _latent("e4m3", "float8_e4m3fn cache with a scale", LATENT_SHAPE, scaled=True,
            cache_dtype="float8_e4m3fn"),
    _latent("e5m2", "float8_e5m2 cache with a scale", LATENT_SHAPE, scaled=True,
            cache_dtype="float8_e5m2", dtype="bfloat16"),
    _latent("bfloat16-cache", "bfloat16 cache under float32 queries", LATENT_SHAPE,
            cache_dtype="bfloat16"),
    _latent("float16-cache", "float16 cache under float32 queries", LATENT_SHAPE,
            cache_dtype="float16"),
    _latent("float32-cache", "float32 cache under bfloat16 queries", LATENT_SHAPE,
            cache_dtype="float32", dtype="bfloat16"),
    _latent("fp8-ds-mla", "DeepSeek's 656-byte cache", DEEPSEEK, cache_dtype="fp8_ds_mla"),
    _latent("mixed", "lists with -1, traps, empty ones", LATENT_SHAPE, topk=16),
    _latent("soft-cap", "soft cap, float16", LATENT_SHAPE, topk=12, soft_cap=5.0,
            dtype="float16"),
    _latent("deepseek", "DeepSeek's dimensions", DEEPSEEK, topk=32),
    _latent("e4m3", "float8_e4m3fn cache with a scale", LATENT_SHAPE, topk=16, scaled=True,
            cache_dtype="float8_e4m3fn"),
    _latent("e5m2", "float8_e5m2 cache with a scale", LATENT_SHAPE, topk=16, scaled=True,
            cache_dtype="float8_e5m2", dtype="bfloat16"),
    _latent("bfloat16-cache", "bfloat16 cache under float32 queries", LATENT_SHAPE, topk=16,
            cache_dtype="bfloat16"),
    _latent("float16-cache", "float16 cache under float32 queries", LATENT_SHAPE, topk=16,
            cache_dtype="float16"),
    _latent("fp8-ds-mla", "DeepSeek's 656-byte cache", DEEPSEEK, topk=32,
            cache_dtype="fp8_ds_mla"),
    Problem("quick.mla.materialized", "mla_materialized", "keys and values made first",
            materialized_inputs, LATENT_SHAPE | {"v_dim": 24}),
    Problem("quick.mla.materialized-bfloat16", "mla_materialized",
            "keys and values made first, bfloat16 over an fp8 cache with a scale",
            materialized_inputs, LATENT_SHAPE | {"v_dim": 24, "dtype": "bfloat16", "scaled": True,
                                                 "cache_dtype": "float8_e4m3fn"}),
    Problem("quick.indexer", "indexer_scores", "a small indexer, float32", indexer_inputs,
            {"q_lens": (3, 1, 5), "kv_lens": (21, 40, 5), "num_index_heads": 4,
             "index_head_dim": 16, "page_size": 16, "dtype": "float32", "pad_tokens": 2}),
    Problem("quick.topk", "topk_positions", "ties, short rows, an empty row", topk_inputs,
            {"num_tokens": 5, "num_positions": 40, "topk": 16}),
)  # fmt: skip
QUICK = (*DENSE, *PAGED, *LATENT)
