"""MLA: multi-head latent attention (DeepSeek V2, V3) over a paged latent cache, queries absorbed.

    mla_attention(ql_nope, q_pe, kv_c, k_pe, latent_pages, page_table, kv_lens, cu_q_lens, num_seqs,
                  slot_mapping, *, scale, soft_cap=None, kv_scale=None, kv_cache_dtype=None)
                  -> (out, lse, latent_pages)

All heads share one key and value per token: the latent (and a rotary key). Per query and head::

    logit = scale * (dot(ql_nope, latent) + dot(q_pe, k_pe));   out = softmax(logit) @ latent

Batch, page table, positions (bottom-right causal), padding and empty rows as in `paged`.

Args:
    ql_nope: [num_tokens, num_q_heads, kv_lora_rank]: q_nope multiplied by W_UK; 512 in DeepSeek.
    q_pe: [num_tokens, num_q_heads, rope_dim], ql_nope's dtype; 64 in DeepSeek.
    kv_c, k_pe: [num_tokens, kv_lora_rank], [num_tokens, rope_dim]: this step's, written to the
        cache first; or None, both.
    latent_pages: the cache in the lowering's layout. XLA and GPU, "rows": [num_pages, page_size,
        kv_lora_rank + rope_dim], latent first; float32, bfloat16, float16, float8_e4m3fn or
        float8_e5m2 (true value = stored * kv_scale, rope part too); or uint8 [num_pages, page_size,
        656] with kv_cache_dtype "fp8_ds_mla": 512 e4m3 values, 4 float32 scales (one for each 128
        values), 64 bfloat16 rope values, little-endian. TPU: "striped", which has no room for
        fp8_ds_mla; sparse MLA "tiled", of uint8 [num_pages, page_size, 2, 4, 128] with it.
    page_table, kv_lens, cu_q_lens, num_seqs, slot_mapping: as in `paged`.
    scale: float, required: (qk_nope_head_dim + rope_dim) ** -0.5 of the model, not of the latent.
    soft_cap: static float or None.
    kv_scale: float32 []; None = 1. Must be None with fp8_ds_mla, which carries its scales.
    kv_cache_dtype: static; "fp8_ds_mla" or None (= the array's dtype says all).

Returns:
    out [num_tokens, num_q_heads, kv_lora_rank] in ql_nope's dtype (multiply by W_UV next);
    lse float32 [num_tokens, num_q_heads]; latent_pages with this step's rows written.
"""
