"""Sparse MLA (DeepSeek V3.2): each token attends to its own top-k positions; and the indexer.

    sparse_mla_attention(ql_nope, q_pe, kv_c, k_pe, latent_pages, topk_indices, page_table, kv_lens,
                         cu_q_lens, num_seqs, slot_mapping, *, scale, soft_cap=None, kv_scale=None,
                         kv_cache_dtype=None) -> (out, lse, latent_pages)

As `mla`, with one more argument:

    topk_indices: int32 [num_tokens, topk]: *positions* in the token's own sequence, in any order,
        -1 padded anywhere. A position past kv_lens, or after the query's own, is not seen. Each
        position at most once. The softmax runs over the named positions only; none named: out 0,
        lse -inf.

The lightning indexer scores every cached position for every token and keeps the best::

    indexer_scores(q_index, weights, index_pages, page_table, kv_lens, cu_q_lens, num_seqs)
        -> float32 [num_tokens, pages_per_seq * page_size]
    score[t, s] = sum over index heads h of weights[t, h] * relu(dot(q_index[t, h], k_index[s]))

    q_index: [num_tokens, num_index_heads, index_head_dim] (64 and 128 in DeepSeek V3.2).
    weights: float32 [num_tokens, num_index_heads], every scale folded in.
    index_pages: [num_pages, page_size, index_head_dim], paged as the latent cache is.
    score is -inf where the query sees no such position (causal, bottom-right; past kv_lens;
    padding).

    topk_positions(scores, topk) -> int32 [num_tokens, topk]: the positions of the largest scores,
        best first, ties to the lower position; -1 where fewer than topk positions are seen. NaN is
        the largest score, whatever its sign: what is named shows it, what is left out would not.

Source: DeepSeek-V3.2-Exp technical report, 2025.
"""
