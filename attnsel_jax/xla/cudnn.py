"""Dense attention through `jax.nn.dot_product_attention`, by default its cuDNN implementation.

The contract is `pallas_kernels.dense`; what `jax.nn` has no argument for must be left out (the
backend's capabilities say so, and a call with it is refused). Rows that see no key are set to 0,
and keys and values past `kv_lens` to 0 before the call, as the contract asks.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels import empty_calls
from pallas_kernels.contract_checks import check_sizes, existing
from pallas_kernels.jax_settings import under_default_rules
from pallas_kernels.masks import Window, window_bounds
from pallas_kernels.shape_checks import FLOATS, check_arguments


@under_default_rules
def dense_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None = None,
    causal: bool = False,
    q_offset: int | jax.Array | None = None,
    sliding_window: Window = None,
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
) -> tuple[jax.Array, None]:
    """Attends with cuDNN; see the contract for the arguments.

    Returns:
        out, and None for lse, which `jax.nn` gives rounded only.

    Raises:
        ValueError: an argument that this path does not honour is given, or a shape or dtype of q, k
            or v is not the contract's.
    """
    refused = {
        "q_offset": q_offset, "attention_chunk_size": attention_chunk_size, "soft_cap": soft_cap,
        "alibi_slopes": alibi_slopes, "mask": mask, "q_segment_ids": q_segment_ids,
        "kv_segment_ids": kv_segment_ids, "sinks": sinks,
    }  # fmt: skip
    for name, value in refused.items():
        if value is not None:
            raise ValueError(f"{name} is given, must be None for CUDNN: choose another backend")
    table = {
        "q": (q, "batch q_len num_q_heads head_dim", FLOATS),
        "k": (k, "batch kv_len num_kv_heads head_dim", FLOATS),
        "v": (v, "batch kv_len num_kv_heads head_dim", FLOATS),
    }
    dims = check_arguments(table, required=table)
    check_sizes(dims)
    if empty_calls.is_empty(dims):
        return empty_calls.dense(q, v, None, q_lens)[0], None
    q_lens, kv_lens = existing(q_lens, dims["q_len"]), existing(kv_lens, dims["kv_len"])
    return attend(q, k, v, scale, causal, sliding_window, bias, q_lens, kv_lens, "cudnn"), None


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: float | None,
    causal: bool,
    sliding_window: Window,
    bias: jax.Array | None,
    q_lens: jax.Array | None,
    kv_lens: jax.Array | None,
    implementation: Literal["cudnn", "xla"],
) -> jax.Array:
    """Translates the contract's words into those of `jax.nn`, and its results back."""
    left, right = window_bounds(sliding_window)
    if right is not None and not causal:
        raise ValueError(
            f"sliding_window is {sliding_window} with causal=False, must be None: cuDNN has "
            f"causal windows only"
        )
    if kv_lens is not None:
        exists = jnp.arange(k.shape[1], dtype=jnp.int32)[None, :] < kv_lens[:, None]
        k, v = (jnp.where(exists[..., None, None], x, jnp.zeros((), x.dtype)) for x in (k, v))
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        bias=None if bias is None else _full_bias(bias, q, k),
        scale=scale,
        is_causal=causal,
        query_seq_lengths=q_lens,
        key_value_seq_lengths=kv_lens,
        local_window_size=None if left is None else (left - 1, 0),
        implementation=implementation,
    )
    sees = _sees_some_key(q.shape[1], k.shape[1], causal, left, q_lens, kv_lens)
    return out if sees is None else jnp.where(sees[..., None, None], out, jnp.zeros((), out.dtype))


def _full_bias(bias: jax.Array, q: jax.Array, k: jax.Array) -> jax.Array:
    """The bias with full query and key dimensions, in q's dtype; cuDNN broadcasts the others."""
    shape = (*bias.shape[:2], q.shape[1], k.shape[1])
    return jnp.broadcast_to(bias, shape).astype(q.dtype)


def _sees_some_key(q_len, kv_len, causal, left, q_lens, kv_lens) -> jax.Array | None:
    """[batch or 1, q_len]: whether each row sees a key; None where each does by its shape."""
    if q_lens is None and kv_lens is None and (left is None or q_len <= kv_len):
        return None
    q_pos = jnp.arange(q_len, dtype=jnp.int32)[None, :]
    keys = jnp.full((1, 1), kv_len, jnp.int32) if kv_lens is None else kv_lens[:, None]
    sees = keys > (0 if left is None or not causal else jnp.maximum(q_pos - left + 1, 0))
    return sees if q_lens is None else sees & (q_pos < q_lens[:, None])
