"""True values as a cache stores them, the same wherever they were divided and rounded.

Knows nothing of attention, nor of where in a cache a value goes.
"""

import jax
import jax.numpy as jnp


def divide(x: jax.Array, by: jax.Array) -> jax.Array:
    """The quotient x / by as IEEE has it; `by` broadcasts to x.

    Where the divisor stays the same along a loop, XLA on a CPU multiplies by its reciprocal: half
    of the quotients are a bit off (measured with 448), and next to a tie a stored value then rounds
    the other way. It cannot see that through the barrier. The `where` makes the divisor as large as
    x under vmap too.
    """
    by = jnp.where(jnp.isnan(x), by, by)
    return x / jax.lax.optimization_barrier(by)


def quantise(values: jax.Array, scale: jax.Array | None, dtype: jax.typing.DTypeLike) -> jax.Array:
    """True values as a cache stores them: `values / scale`, saturated into `dtype`.

    Args:
        values: float array.
        scale: float32, broadcastable to values; None = 1.
        dtype: float32, bfloat16, float16, float8_e4m3fn, float8_e5m2 or int8.

    Returns:
        values' shape, in dtype. What is past the largest finite number becomes that number (a bare
        cast of JAX gives NaN or inf there); NaN stays NaN, and is 0 in int8, which has none. int8
        rounds to nearest even.
    """
    dtype = jnp.dtype(dtype)
    stored = values.astype(jnp.float32)
    if scale is not None:
        stored = divide(stored, scale)
    if dtype == jnp.int8:
        stored = jnp.where(jnp.isnan(stored), 0, stored)
        return jnp.clip(jnp.round(stored), -128, 127).astype(dtype)
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(stored, -largest, largest).astype(dtype)
