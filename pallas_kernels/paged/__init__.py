"""Paged attention: a ragged batch of this step's tokens over a paged KV cache.

    paged_attention(q, k, v, kv_pages, page_table, kv_lens, cu_q_lens, num_seqs, slot_mapping, *,
                    scale=None, causal=True, sliding_window=None, attention_chunk_size=None,
                    soft_cap=None, alibi_slopes=None, sinks=None, k_scale=None, v_scale=None)
                    -> (out, lse, kv_pages)

Prefill, chunked prefill, decode and speculative decode in one call: sequence i's new tokens are
`q[cu_q_lens[i]:cu_q_lens[i + 1]]`, and its cache positions are `0 .. kv_lens[i] - 1`, this step's
included; position p lives in page `page_table[i, p // page_size]` at offset `p % page_size`.
First k and v are written to the cache at `slot_mapping`, then every query attends::

    q_pos  = kv_lens[i] - q_len[i] + t           (bottom-right: the last query sees the last key)
    logit  = scale * dot(q, k_scale * k_page);   soft cap, ALiBi, mask, sinks, lse as in dense
    out    = sum of exp(logit - lse) * v_scale * v_page

`causal=False` (encoder and cross attention): every query sees all kv_lens[i] keys, subject to the
window. A row that sees no key gives out 0 and lse -inf (with a sink: the sink). Padding tokens
(from `cu_q_lens[num_seqs]` on) give out 0 and lse -inf. Slots that no position of a real sequence
names may hold anything, NaN included, and so may page_table entries past a sequence's last page,
and the rows of page_table and kv_lens from num_seqs on.

Args:
    q: [num_tokens, num_q_heads, head_dim]; float32, bfloat16 or float16.
    k, v: [num_tokens, num_kv_heads, head_dim] this step's keys and values in q's dtype, unscaled
        true values; or None, both: nothing is written (cross attention, shared caches).
    kv_pages: the cache in the lowering's layout. XLA, "stacked": [2, num_pages, page_size,
        num_kv_heads, head_dim] (0 = keys, 1 = values); float32, bfloat16, float16, float8_e4m3fn,
        float8_e5m2 or int8. True value = stored value * scale. Writing divides by the scale, and
        saturates (and, for int8, rounds to nearest even) into the cache's dtype.
    page_table: int32 [max_num_seqs, pages_per_seq].
    kv_lens: int32 [max_num_seqs].
    cu_q_lens: int32 [max_num_seqs + 1], from 0; entries past num_seqs repeat the last or hold junk.
    num_seqs: int32 []: sequences that exist; at most max_num_seqs.
    slot_mapping: int32 [num_tokens]: page * page_size + offset; -1 = written nowhere. None together
        with k and v.
    scale: float; None = head_dim ** -0.5.
    causal, sliding_window, attention_chunk_size, soft_cap: static, as in dense.
    alibi_slopes, sinks: float32 [num_q_heads].
    k_scale, v_scale: float32 [] or [num_kv_heads]; None = 1.

Returns:
    out [num_tokens, num_q_heads, head_dim] in q's dtype; lse float32 [num_tokens, num_q_heads];
    kv_pages as given, with this step's k and v written (donate it and it is updated in place).
"""
