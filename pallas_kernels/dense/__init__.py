"""Dense attention: contiguous q, k, v; training, encoders, prefill without a cache.

    dense_attention(q, k, v, *, scale=None, causal=False, q_offset=None, sliding_window=None,
                    attention_chunk_size=None, soft_cap=None, bias=None, alibi_slopes=None,
                    mask=None, q_segment_ids=None, kv_segment_ids=None, q_lens=None, kv_lens=None,
                    sinks=None) -> (out, lse)

The maths, for batch b, query t, key s, query head n, kv head `n // (num_q_heads // num_kv_heads)`::

    q_pos  = t + q_offset[b]                     kv_pos = s
    logit  = scale * dot(q[b, t, n], k[b, s, kv_head])
    logit  = soft_cap * tanh(logit / soft_cap)                         if soft_cap
    logit += bias[b, n, t, s] - alibi_slopes[n] * |q_pos - kv_pos|     if given (after the cap)
    seen   = s < kv_lens[b]  and  t < q_lens[b]
             and kv_pos <= q_pos                                       if causal
             and q_pos - left < kv_pos < q_pos + right                 if sliding_window
             and kv_pos // attention_chunk_size == q_pos // attention_chunk_size
             and mask[b, n, t, s]  and  q_segment_ids[b, t] == kv_segment_ids[b, s]
    lse    = log(sum over seen s of exp(logit) + exp(sinks[n]))        natural logarithm
    out    = sum over seen s of exp(logit - lse) * v[b, s, kv_head]

A row that sees no key gives out 0, and lse -inf (with a sink: lse = sinks[n]). Rows past `q_lens`
see no key, and have no sink either: out 0, lse -inf. What k and v hold where no query sees them may
be anything, NaN included. A query that is NaN, or sees a key that is, gives out and lse NaN; so
are the gradients that it is in.

Args:
    q: [batch, q_len, num_q_heads, head_dim]; float32, bfloat16 or float16.
    k: [batch, kv_len, num_kv_heads, head_dim], q's dtype; num_kv_heads divides num_q_heads.
    v: [batch, kv_len, num_kv_heads, head_dim_v], q's dtype; head_dim_v may differ from head_dim.
    scale: float; None = head_dim ** -0.5.
    causal: bool, static.
    q_offset: int, or int32 [] or [batch]: position of query 0, at most 2**30 from 0; None = 0
        (aligned top-left). `kv_len - q_len` aligns bottom-right.
    sliding_window: static int w = (w, w), or (left, right), each int or None (no bound on that
        side); the query's own key counts on either side: `q_pos - left < kv_pos < q_pos + right`.
        Under `causal` only `left` matters. None = all.
    attention_chunk_size: static int: chunked-local attention (Llama 4). None = one chunk.
    soft_cap: static float > 0, or None.
    bias: float, broadcastable to [batch, num_q_heads, q_len, kv_len] (4 dimensions, each
        full or 1).
    alibi_slopes: float32 [num_q_heads].
    mask: bool, broadcastable like bias; True = seen.
    q_segment_ids, kv_segment_ids: int32 [batch, q_len], [batch, kv_len]; both or neither.
    q_lens, kv_lens: int32 [batch]: how many queries and keys of each row exist.
    sinks: float32 [num_q_heads]: one more logit per head, in the denominator only, uncapped.

Returns:
    out [batch, q_len, num_q_heads, head_dim_v] in q's dtype;
    lse float32 [batch, q_len, num_q_heads].

Differentiable in q, k, v, bias, sinks (and alibi_slopes where a lowering says so), through out and
through lse. Logits, softmax and accumulation are float32 (float32 inputs are multiplied in float32
on every chip).
"""
