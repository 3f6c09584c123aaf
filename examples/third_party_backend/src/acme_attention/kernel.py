"""Dense attention one query head at a time, so that the logits of one head exist at once."""

import jax
import jax.numpy as jnp


def dense_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None = None,
    causal: bool = False,
    q_offset: int | jax.Array | None = None,
    sliding_window: int | tuple[int | None, int | None] | None = None,
    attention_chunk_size: int | None = None,
    soft_cap: float | None = None,
    bias: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    mask: jax.Array | None = None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    q_lens: jax.Array | None = None,
    kv_lens: jax.Array | None = None,
    sinks: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The contract of `pallas_kernels.dense`, where the backend declares it; the rest stays None.

    Every lowering has all of the contract's arguments: selection has refused those that this one
    does not honour before it is called.
    """
    _, q_len, num_q_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    group = num_q_heads // num_kv_heads
    seen = True
    if causal:  # keys that no query sees may hold NaN: they are left out, not multiplied by 0
        k, v = k[:, :q_len], v[:, :q_len]
        seen = jnp.arange(k.shape[1]) <= jnp.arange(q_len)[:, None]

    def one_head(n):
        q_n, k_n, v_n = q[:, :, n], k[:, :, n // group], v[:, :, n // group]
        logits = scale * jnp.einsum(
            "btd,bsd->bts", q_n, k_n, precision="highest", preferred_element_type=jnp.float32
        )
        logits = jnp.where(seen, logits, -jnp.inf)
        lse = jax.nn.logsumexp(logits, axis=-1)
        weights = jnp.exp(logits - lse[..., None]).astype(v.dtype)
        out = jnp.einsum(
            "bts,bsd->btd", weights, v_n, precision="highest", preferred_element_type=jnp.float32
        )
        return out.astype(q.dtype), lse

    out, lse = jax.lax.map(one_head, jnp.arange(num_q_heads))
    return jnp.moveaxis(out, 0, 2), jnp.moveaxis(lse, 0, 2)
