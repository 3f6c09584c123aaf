"""Arguments of `dot_product_attention`: brought to the contract's ranks, and held against it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from attnsel_jax.ops.calls import as_array
from attnsel_jax.static_arguments import check_int32, is_integer, on_host, refuse_traced
from pallas_kernels.masks import FARTHEST, Window
from pallas_kernels.shape_checks import (
    BOOL,
    FLOAT32,
    FLOATS,
    INT32,
    check_arguments,
    check_groups,
    check_same_dtype,
)

# More heads than this, and more than positions, are taken for (batch, heads, length, size) arrays
# given by mistake: no published model has more (DeepSeek V3 has 128).
_MOST_HEADS = 128


def tokens(**arrays: ArrayLike) -> tuple[jax.Array, ...]:
    """Queries, keys and values with a batch dimension, of 1 where they have none.

    Raises:
        TypeError: one is no array.
        ValueError: one has neither 3 dimensions nor 4.
    """
    found = []
    for name, values in arrays.items():
        array = as_array(name, values)
        if array.ndim not in (3, 4):
            raise ValueError(
                f"{name} has {array.ndim} dimensions {array.shape}, must have 4: [batch, length, "
                f"heads, size], or 3 without batch"
            )
        found.append(_expanded(name, array, 4))
    return tuple(found)


def four_dimensions(**arrays: ArrayLike | None) -> tuple[jax.Array | None, ...]:
    """The arrays with leading dimensions of 1 added up to four; None stays."""
    return tuple(
        None if array is None else _expanded(name, as_array(name, array), 4)
        for name, array in arrays.items()
    )


def with_batch(name: str, values: ArrayLike | None, rank: int) -> jax.Array | None:
    """Integers as int32 of the rank, a batch of 1 added if it is missing; None stays."""
    array = as_int32(name, values)
    return None if array is None else _expanded(name, array, rank)


def as_int32(name: str, values: ArrayLike | None) -> jax.Array | None:
    """Integers as int32; None stays.

    Raises:
        ValueError: they are no integers, or one on the host is no int32.
    """
    if values is None:
        return None
    check_int32(name, values)
    array = as_array(name, values)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {array.dtype}, must be an integer dtype")
    return array.astype(jnp.int32)


def lengths(name: str, values: ArrayLike | None) -> jax.Array | None:
    """Lengths as int32 [batch]; None stays. Those on the host are looked at, at no cost.

    Raises:
        ValueError: they are no integers, or one on the host is negative.
    """
    array = with_batch(name, values, 1)
    host = on_host(values)
    if host is not None and (host < 0).any():
        host = np.atleast_1d(host)
        i = int(np.argmax(host < 0))
        raise ValueError(f"{name}[{i}] is {host[i]}, must be at least 0")
    return array


def offset(name: str, values: ArrayLike | None) -> jax.Array | None:
    """The position of query 0 as int32; None stays. One on the host is looked at, at no cost.

    Raises:
        ValueError: no integers, or one on the host to which int32 cannot add every position.
    """
    array, host = as_int32(name, values), on_host(values)
    if host is not None and (abs(host.astype(np.int64)) > FARTHEST).any():
        far = host[abs(host.astype(np.int64)) > FARTHEST].flat[0]
        raise ValueError(
            f"{name} is {far}, must be {-FARTHEST} to {FARTHEST}: positions are int32, and are "
            f"added to it; leave is_causal out where queries are to see every key"
        )
    return array


def own_key_included(local_window_size: int | tuple[int, int] | None) -> Window:
    """The window in this library's words: the own key counts on either side.

    Raises:
        ValueError: neither an integer nor two, or one below 0 or too far for int32.
    """
    if local_window_size is None:
        return None
    pair = isinstance(local_window_size, tuple | list)
    sides = tuple(local_window_size) if pair else (local_window_size,) * 2
    for side in sides:
        refuse_traced("local_window_size", side)
    integers = all(map(is_integer, sides))
    if len(sides) != 2 or not integers or min(s.__index__() for s in sides) < 0:
        raise ValueError(
            f"local_window_size is {local_window_size}, must be an integer of at least 0 (on "
            f"either side), two of them (left, right), or None"
        )
    left, right = (s.__index__() + 1 for s in sides)
    if max(left, right) > FARTHEST:
        raise ValueError(
            f"local_window_size is {local_window_size}, must be at most {FARTHEST - 1} on either "
            f"side, or None: pass None where nothing is too far to be seen"
        )
    return left, right


def check_dense(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    arrays: dict[str, jax.Array | None],
) -> None:
    """Refuses arguments that do not fit the contract, in the words of `dot_product_attention`.

    Raises:
        ValueError: a rank, a dtype or a size that cannot be.
    """
    try:
        check_arguments(_table(q, k, v, arrays))
        check_same_dtype(query=q, key=k, value=v)
        check_groups(q.shape[2], k.shape[2])
    except ValueError as error:
        hint = _transposed_hint(q, k)
        if hint:
            raise ValueError(f"{error}{hint}") from error
        raise
    _check_transposed(q, k)
    if (arrays["q_segment_ids"] is None) != (arrays["kv_segment_ids"] is None):
        given = "q_segment_ids" if arrays["kv_segment_ids"] is None else "kv_segment_ids"
        raise ValueError(f"{given} is given alone, must come with the other: pass both, or neither")


def _table(q, k, v, arrays):
    """The arguments' dimensions and dtypes, as `check_arguments` reads them."""
    logits = "~batch ~num_heads ~q_len ~kv_len"
    offset = arrays["q_offset"]
    return {
        "query": (q, "batch q_len num_heads head_size", FLOATS),
        "key": (k, "batch kv_len num_kv_heads head_size", FLOATS),
        "value": (v, "batch kv_len num_kv_heads head_size_v", FLOATS),
        "bias": (arrays["bias"], logits, FLOATS),
        "mask": (arrays["mask"], logits, BOOL),
        "query_seq_lengths": (arrays["q_lens"], "batch", INT32),
        "key_value_seq_lengths": (arrays["kv_lens"], "batch", INT32),
        "q_segment_ids": (arrays["q_segment_ids"], "batch q_len", INT32),
        "kv_segment_ids": (arrays["kv_segment_ids"], "batch kv_len", INT32),
        "alibi_slopes": (arrays["alibi_slopes"], "num_heads", FLOAT32),
        "sinks": (arrays["sinks"], "num_heads", FLOAT32),
        "q_offset": (offset, "batch" if offset is not None and offset.ndim else "", INT32),
    }


def _expanded(name: str, array: jax.Array, rank: int) -> jax.Array:
    if array.ndim > rank:
        raise ValueError(
            f"{name} has {array.ndim} dimensions {array.shape}, must have at most {rank}"
        )
    return jnp.reshape(array, (1,) * (rank - array.ndim) + array.shape)


def _transposed_hint(q: jax.Array, k: jax.Array) -> str:
    """What to add to an error where (batch, heads, length, size) would have fitted."""
    fits = k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0 and q.shape[1] <= _MOST_HEADS
    if not fits or (q.shape[1] >= q.shape[2] and k.shape[1] >= k.shape[2]):
        return ""
    return (
        "; query and key look like (batch, heads, length, size), must be (batch, length, heads, "
        "size): use jnp.swapaxes(x, 1, 2)"
    )


def _check_transposed(q: jax.Array, k: jax.Array) -> None:
    heads = q.shape[2]
    if heads > _MOST_HEADS and heads > q.shape[1] and heads > k.shape[1]:
        raise ValueError(
            f"query has {heads} heads {tuple(q.shape)}, must have at most {_MOST_HEADS} where "
            f"there are fewer positions than heads{_transposed_hint(q, k)}; if there really are so "
            f"many heads, attend to parts of them, or call a backend's kernel"
        )
