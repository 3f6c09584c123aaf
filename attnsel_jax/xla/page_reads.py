"""Pages of a cache by their ids, in a loop, without converting the whole cache.

XLA:CPU has no gather of float8 (nor, before jax 0.12, of bfloat16): it converts the operand to a
wider type, and moves that conversion of the whole cache out of the loop, as it does with a bitcast
to integers. Here the cache is made to depend on the loop's index, so the bitcast stays where the
gather is and becomes part of it. Compiled temporary memory, jax 0.10.2 and 0.12.0.1, 2026-11-23:
twice the cache without this, one block of pages with it. (One gather a loop: with two of one cache,
XLA shares the bitcast and stores it. So keys and values are read together.)
"""

import jax
import jax.numpy as jnp

_BITS = {1: jnp.uint8, 2: jnp.uint16}


def read_pages(pages: jax.Array, ids: jax.Array, step: jax.Array, *, axis: int = 0) -> jax.Array:
    """`jnp.take(pages, ids, axis)` for the body of a loop; once a body.

    Args:
        pages: [..., num_pages, page_size, ...], any of the cache dtypes.
        ids: int32 [n], each in 0 ... num_pages - 1.
        step: the loop's index, or anything else that differs between iterations.
        axis: where num_pages is.

    Returns:
        pages with n in place of num_pages.
    """
    dtype = pages.dtype
    if dtype.itemsize > 2 or dtype in (jnp.int8, jnp.uint8, jnp.float16):
        return jnp.take(pages, ids, axis=axis, mode="clip")
    pages, _ = jax.lax.optimization_barrier((pages, step))
    bits = jax.lax.bitcast_convert_type(pages, _BITS[dtype.itemsize])
    return jax.lax.bitcast_convert_type(jnp.take(bits, ids, axis=axis, mode="clip"), dtype)
