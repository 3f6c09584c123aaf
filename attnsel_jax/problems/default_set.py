"""The problems of `attnsel compare`: models by name, with their own heads and head sizes.

Lengths are cut so that the whole set runs in about a minute on two cores; where a window is cut
with them, the description says so. Figures are from the models' published configurations.
"""

from typing import Any

from attnsel_jax.problems.dense_inputs import dense_inputs
from attnsel_jax.problems.indexer_inputs import indexer_inputs, topk_inputs
from attnsel_jax.problems.materialized_inputs import materialized_inputs
from attnsel_jax.problems.mla_inputs import mla_inputs
from attnsel_jax.problems.paged_inputs import paged_inputs
from attnsel_jax.problems.problem import Problem

LLAMA3_8B = {"heads": (32, 8), "head_size": 128}
LLAMA4_SCOUT = {"heads": (40, 8), "head_size": 128}
QWEN3_14B = {"heads": (40, 8), "head_size": 128}
GEMMA2_9B = {"heads": (16, 8), "head_size": 256, "soft_cap": 50.0}
GEMMA3_1B = {"heads": (4, 1), "head_size": 256}
GPT_OSS = {"heads": (64, 8), "head_size": 64, "sinks": True, "sliding_window": 128}
DEEPSEEK_V3 = {"num_heads": 128}  # 512 + 64, scale of 128 + 64
BERT_BASE = {"heads": (12, 12), "head_size": 64}
CAUSAL = {"causal": True}


def _paged(name: str, description: str, model: dict[str, Any], **options: Any) -> Problem:
    return Problem(name, "paged", description, paged_inputs, model | options)


def _dense(name: str, description: str, model: dict[str, Any], **options: Any) -> Problem:
    asked = {key: options.pop(key) for key in ("gradients", "attn_type") if key in options}
    return Problem(name, "dense", description, dense_inputs, model | options, **asked)


def _latent(name: str, description: str, **options: Any) -> Problem:
    op = "sparse_mla" if "topk" in options else "mla"
    return Problem(name, op, description, mla_inputs, DEEPSEEK_V3 | options)


PAGED = (
    _paged("llama3.decode", "Llama 3 8B, one new token in each of 5 sequences", LLAMA3_8B,
           q_lens=(1,) * 5, kv_lens=(700, 16, 1, 333, 257)),
    _paged("llama3.prefill", "Llama 3 8B, two whole prompts", LLAMA3_8B,
           q_lens=(161, 48), kv_lens=(161, 48)),
    _paged("llama3.chunked-prefill", "Llama 3 8B, the next 96 tokens of a prompt of 353",
           LLAMA3_8B, q_lens=(96,), kv_lens=(353,), page_size=32),
    _paged("llama3.mixed", "Llama 3 8B, decode, a chunk and a prompt in one step, with padding",
           LLAMA3_8B, q_lens=(1, 60, 1, 37), kv_lens=(211, 187, 64, 37), pad_tokens=5, pad_seqs=3),
    _paged("llama3.fp8-cache", "Llama 3 8B over a float8_e4m3fn cache, one scale each for k and v",
           LLAMA3_8B, q_lens=(1, 33, 1), kv_lens=(400, 145, 31), cache_dtype="float8_e4m3fn",
           scales="tensor"),
    _paged("llama3.int8-cache", "Llama 3 8B over an int8 cache, a scale for each kv head",
           LLAMA3_8B, q_lens=(1, 33, 1), kv_lens=(300, 145, 31), cache_dtype="int8",
           scales="head"),
    _paged("qwen3.speculative-decode", "Qwen 3 14B, 4 draft tokens in each of 4 sequences",
           QWEN3_14B, q_lens=(4,) * 4, kv_lens=(260, 4, 33, 515), page_size=64),
    _paged("gemma2.decode", "Gemma 2 9B, soft cap 50, window 4096 with the context just over it",
           GEMMA2_9B, q_lens=(1, 1), kv_lens=(4131, 90), sliding_window=4096),
    _paged("gemma3.decode", "Gemma 3 1B, window 512 with contexts around it", GEMMA3_1B,
           q_lens=(1, 1, 3), kv_lens=(600, 511, 514), sliding_window=512),
    _paged("gemma3.long-decode", "Gemma 3 1B, global layer, one token after 16384", GEMMA3_1B,
           q_lens=(1,), kv_lens=(16385,), page_size=64),
    _paged("gpt-oss.mixed", "gpt-oss, sinks and window 128: decode and a chunk", GPT_OSS,
           q_lens=(1, 40, 1), kv_lens=(300, 200, 129), pad_tokens=3),
    _paged("llama4.decode", "Llama 4 Scout, chunk 8192 with the context just over it", LLAMA4_SCOUT,
           q_lens=(1,), kv_lens=(8213,), attention_chunk_size=8192, page_size=64),
    _paged("mpt.decode", "MPT 7B, ALiBi, float16", {"heads": (32, 32), "head_size": 128},
           q_lens=(1, 9), kv_lens=(150, 77), alibi=True, dtype="float16"),
    Problem("whisper.cross-attention", "paged",
            "Whisper large, cross attention: decoder tokens see 1500 cached encoder frames",
            paged_inputs, {"heads": (20, 20), "head_size": 64, "q_lens": (2, 1),
                           "kv_lens": (1500, 1499), "writes": False, "causal": False,
                           "dtype": "float16"},
            attn_type="encoder_decoder"),
)  # fmt: skip
DENSE = (
    _dense("llama3.train", "Llama 3 8B, causal, with gradients", LLAMA3_8B, q_len=257, **CAUSAL,
           gradients=True),
    _dense("llama3.packed", "Llama 3 8B, 4 documents packed in a row, with gradients", LLAMA3_8B,
           q_len=250, segments=4, **CAUSAL, gradients=True),
    _dense("llama3.append", "Llama 3 8B, 64 queries after 200 keys: bottom-right by q_offset",
           LLAMA3_8B, q_len=64, kv_len=264, q_offset=200, dtype="float16", **CAUSAL),
    _dense("llama4.train", "Llama 4 Scout, chunked-local, chunk cut from 8192 to 96 with length",
           LLAMA4_SCOUT, q_len=250, attention_chunk_size=96, **CAUSAL),
    _dense("gemma2.train", "Gemma 2 9B, soft cap 50, window cut from 4096 to 100 with the length",
           GEMMA2_9B, q_len=250, sliding_window=100, **CAUSAL, gradients=True),
    _dense("gemma3.long-prefill", "Gemma 3 1B, global layer, 2048 tokens", GEMMA3_1B, q_len=2048,
           **CAUSAL),
    _dense("gpt-oss.train", "gpt-oss, sinks and window 128, with gradients", GPT_OSS, q_len=200,
           **CAUSAL, gradients=True),
    _dense("bert.encode", "BERT base, two padded sentences, float32, with gradients", BERT_BASE,
           q_len=128, batch=2, q_lens=(128, 77), kv_lens=(128, 77), dtype="float32",
           gradients=True, attn_type="encoder_only"),
    _dense("t5.encode", "T5 base, a bias for each head, no scale, float32, with gradients",
           BERT_BASE, q_len=150, bias=(False, True, True, True), scale=1.0, dtype="float32",
           gradients=True, attn_type="encoder"),
    _dense("t5.cross-attention", "T5 base, 40 decoder tokens see 90 and 57 encoder tokens",
           BERT_BASE, q_len=40, kv_len=90, batch=2, kv_lens=(90, 57), scale=1.0,
           attn_type="encoder_decoder"),
    _dense("siglip.encode", "SigLIP so400m, 256 patches, head size 72",
           {"heads": (16, 16), "head_size": 72}, q_len=256, attn_type="encoder_only"),
    _dense("phi2.prefill", "Phi 2, head size 80, float32", {"heads": (32, 32), "head_size": 80},
           q_len=130, dtype="float32", **CAUSAL),
    _dense("bloom.prefill", "BLOOM 176B, 112 heads of 128, ALiBi",
           {"heads": (112, 112), "head_size": 128}, q_len=60, alibi=True, **CAUSAL),
    _dense("deepseek-v3.expanded", "DeepSeek V3 prefill, latents expanded: head sizes 192, 128",
           {"heads": (128, 128), "head_size": 192, "head_size_v": 128}, q_len=96, **CAUSAL),
)  # fmt: skip
LATENT = (
    _latent("deepseek-v3.decode", "DeepSeek V3, one new token in each of 4 sequences",
            q_lens=(1,) * 4, kv_lens=(520, 64, 1, 301)),
    _latent("deepseek-v3.prefill", "DeepSeek V3, a prompt and a chunk, with padding",
            q_lens=(35, 20), kv_lens=(35, 150), pad_tokens=2),
    _latent("deepseek-v3.fp8-cache", "DeepSeek V3 over a float8_e4m3fn cache with a scale",
            q_lens=(1, 2), kv_lens=(400, 130), cache_dtype="float8_e4m3fn", scaled=True),
    _latent("deepseek-v3.fp8-ds-mla", "DeepSeek V3 over its own 656-byte cache",
            q_lens=(1, 2), kv_lens=(400, 130), cache_dtype="fp8_ds_mla"),
    _latent("deepseek-v3.2.decode", "DeepSeek V3.2, top-k 2048 of 2500 positions",
            q_lens=(1, 2), kv_lens=(2500, 300), topk=2048),
    _latent("deepseek-v3.2.fp8-ds-mla", "DeepSeek V3.2 prefill over its own cache; top-k cut to 64",
            q_lens=(30,), kv_lens=(190,), topk=64, cache_dtype="fp8_ds_mla"),
    Problem("deepseek-v3.materialized-prefill", "mla_materialized",
            "DeepSeek V3 prefill from the latent cache, keys and values of each head made first",
            materialized_inputs, DEEPSEEK_V3 | {"q_lens": (20, 9), "kv_lens": (90, 9)}),
    Problem("deepseek-v3.2.indexer", "indexer_scores",
            "DeepSeek V3.2, 64 index heads of 128, a chunk and a decode", indexer_inputs,
            {"q_lens": (20, 1), "kv_lens": (300, 700)}),
    Problem("deepseek-v3.2.topk", "topk_positions",
            "DeepSeek V3.2, the best 2048 of up to 3000 positions, with ties", topk_inputs,
            {"num_tokens": 9, "num_positions": 3000, "topk": 2048}),
)  # fmt: skip
DEFAULT = (*PAGED, *DENSE, *LATENT)
