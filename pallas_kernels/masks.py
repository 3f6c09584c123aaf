"""Which keys a query sees, as predicates on absolute positions.

Every mask of every op is one of these, so a kernel can also ask which *blocks* of keys can be seen
at all (`seen_bounds`) and skip the rest.
"""

import jax
import numpy as np

Window = int | tuple[int | None, int | None] | None
FARTHEST = 2**30  # no window or chunk is larger: its sums with positions are int32


def window_bounds(sliding_window: Window) -> tuple[int | None, int | None]:
    """(left, right), the query's own key counted on either side; None = no bound."""
    if sliding_window is None or isinstance(sliding_window, int):
        return sliding_window, sliding_window
    return sliding_window


def seen(
    q_pos: jax.Array,
    kv_pos: jax.Array,
    *,
    causal: bool,
    sliding_window: Window = None,
    attention_chunk_size: int | None = None,
) -> jax.Array | None:
    """Whether the query at `q_pos` sees the key at `kv_pos`; None where every key is seen.

    Args:
        q_pos, kv_pos: integer positions, broadcast against each other.
        causal: `kv_pos <= q_pos`.
        sliding_window: `q_pos - left < kv_pos < q_pos + right`; an int is both.
        attention_chunk_size: both in the same chunk of so many positions.

    Returns:
        bool of the broadcast shape, or None when nothing restricts.
    """
    left, right = window_bounds(sliding_window)
    terms = []
    if causal:
        terms.append(kv_pos <= q_pos)
    if left is not None:
        terms.append(kv_pos > q_pos - left)
    if right is not None and not causal:
        terms.append(kv_pos < q_pos + right)
    if attention_chunk_size is not None:
        terms.append(q_pos // attention_chunk_size == kv_pos // attention_chunk_size)
    if not terms:
        return None
    mask = terms[0]
    for term in terms[1:]:
        mask = mask & term
    return mask


def seen_bounds(
    first_q_pos: jax.Array,
    last_q_pos: jax.Array,
    kv_len: jax.Array | int,
    *,
    causal: bool,
    sliding_window: Window = None,
    attention_chunk_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Half-open range [start, stop) of key positions that queries of a range can see.

    Args:
        first_q_pos, last_q_pos: the range of query positions, both included.
        kv_len: keys that exist.
        causal, sliding_window, attention_chunk_size: as in `seen`.

    Returns:
        start, stop: int32, 0 <= start, stop <= kv_len; empty when start >= stop. Of NumPy arrays
        where all arguments are: known at trace time, and constants of the program.
    """
    known = all(isinstance(x, np.ndarray) for x in (first_q_pos, last_q_pos, kv_len))
    jnp = np if known else jax.numpy
    left, right = window_bounds(sliding_window)
    start, stop = jnp.int32(0), jnp.asarray(kv_len, jnp.int32)
    if causal:
        stop = jnp.minimum(stop, last_q_pos + 1)
    if left is not None:
        start = jnp.maximum(start, first_q_pos - left + 1)
    if right is not None and not causal:
        stop = jnp.minimum(stop, last_q_pos + right)
    if attention_chunk_size is not None:
        start = jnp.maximum(start, first_q_pos // attention_chunk_size * attention_chunk_size)
        stop = jnp.minimum(stop, (last_q_pos // attention_chunk_size + 1) * attention_chunk_size)
    return start, stop
