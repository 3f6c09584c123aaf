"""A bias without keys, beside the kernels: it changes no weights of a row but against its sink.

    lse   = log(exp(lse + bias) + exp(sink))              out and lse of the call without both
    out   = exp(lse + bias) / (exp(lse + bias) + exp(sink)) * out

Added to the logits, a bias of -1e9 would take all their digits. Its gradient is that of these
lines, and the kernels' own is of a call that knows of no bias.
"""

import jax
import jax.numpy as jnp
from jax import lax


def shifted(
    out: jax.Array,
    lse: jax.Array,
    bias: jax.Array,
    sinks: jax.Array | None,
    q_lens: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The results with the bias and the sinks; without sinks also what `corrected` says.

    Args:
        out, lse: the contract's, without both.
        bias: [batch or 1, num_q_heads or 1, q_len or 1, 1]; -inf leaves a row none of its keys.
        sinks, q_lens: the contract's.
    """
    bias = jnp.swapaxes(bias[..., 0], 1, 2).astype(jnp.float32)
    some = (lse != -jnp.inf) & (bias != -jnp.inf)
    keys = jnp.where(some, lse + bias, -jnp.inf)
    if sinks is None:
        rounded = jnp.exp(lax.stop_gradient(jnp.where(some, (keys - bias) - lse, 0.0)))
        return jnp.where(some[..., None], out, jnp.zeros_like(out)), keys, rounded
    sink = jnp.broadcast_to(sinks, lse.shape)
    if q_lens is not None:
        exists = jnp.arange(lse.shape[1]) < q_lens[:, None]
        sink = jnp.where(exists[..., None], sink, -jnp.inf)
    top = lax.stop_gradient(jnp.maximum(keys, sink))
    empty = top == -jnp.inf
    top = jnp.where(empty, 0.0, top)  # -inf - -inf is NaN
    weight = jnp.exp(keys - top)
    total = jnp.where(empty, 1.0, weight + jnp.exp(sink - top))
    share = (weight / total)[..., None]
    out = jnp.where(share != 0.0, out.astype(jnp.float32) * share, 0.0).astype(out.dtype)
    return out, jnp.where(empty, -jnp.inf, top + jnp.log(total)), None
