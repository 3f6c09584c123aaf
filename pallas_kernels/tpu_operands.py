"""Values of a cache as a TPU's matrix unit multiplies them, beside bfloat16 or float32.

The unit takes one operand in bfloat16 and the other in float8, which it widens as it comes: nothing
is unpacked, and a register of 32 rows is pushed where bfloat16 has two. Its float8 is
`float8_e5m2`, and on 7x `float8_e4m3fn`; before that it is `float8_e4m3b11fnuz` (B11), whose
exponents count from four more. So the bytes of e4m3fn are taken for those, of a sixteenth of the
value, and `factor_of` makes good for it on logits and sums. v4 takes none: there values are cast.
All this is what the compiler accepts (libtpu 0.0.52): nothing of it has run on a TPU.

Vector operations for a register of 4096 values, and registers to push then, on v5e, v6e, 7x:

                     cast to bfloat16        here                    least
    float8_e4m3fn    30, 30, 2 and 2         6, 6, 0 and 1           the same
    float8_e5m2      6, 6, 2 and 2           0 and 1                 the same
    int8             10, 2, 2 and 2          as cast                 as cast: 8 bits in no float8
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_chip

E4M3, E5M2 = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2)
B11 = jnp.dtype(jnp.float8_e4m3b11fnuz)
B11_FACTOR = 16.0  # the value of some bits as E4M3 by that of the same bits as B11


def readable_dtype(stored: jax.typing.DTypeLike) -> jnp.dtype:
    """What `as_readable` makes of a cache's dtype: B11 of E4M3 where the chip has that."""
    stored = jnp.dtype(stored)
    return B11 if stored == E4M3 and tpu_chip.current().float8 == B11.name else stored


def operand_dtype(stored: jax.typing.DTypeLike, beside: jax.typing.DTypeLike) -> jnp.dtype:
    """What `as_operand` makes of a cache's dtype beside an operand of another."""
    stored, beside = jnp.dtype(stored), jnp.dtype(beside)
    is_taken = tpu_chip.current().float8 is not None and stored in (E4M3, E5M2)
    return readable_dtype(stored) if is_taken and beside == jnp.bfloat16 else beside


def factor_of(stored: jax.typing.DTypeLike, beside: jax.typing.DTypeLike) -> float:
    """What a product with `as_operand` is to be multiplied by."""
    return B11_FACTOR if operand_dtype(stored, beside) == B11 else 1.0


def as_operand(values: jax.Array, beside: jax.typing.DTypeLike) -> jax.Array:
    """Stored values, over `factor_of`, in a dtype that multiplies one of another.

    Args:
        values: [rows, lanes], as a cache stores them.
        beside: dtype of the other operand, bfloat16 or float32.

    Returns:
        the shape of values, in `operand_dtype`.
    """
    wanted = operand_dtype(values.dtype, beside)
    return as_readable(values) if wanted == B11 else values.astype(wanted)


def as_readable(values: jax.Array) -> jax.Array:
    """Stored values as this chip reads them: B11's are over `B11_FACTOR`, any others as they are.

    Args:
        values: [rows, lanes], as a cache stores them; rows fill whole registers.
    """
    if readable_dtype(values.dtype) == values.dtype:
        return values
    return pltpu.bitcast(in_b11(pltpu.bitcast(values, jnp.uint32)), B11)


def in_b11(words: jax.Array) -> jax.Array:
    """Words of four E4M3 as of B11, of a sixteenth of the values; uint32 both.

    Finite numbers have the same bits. 0x80 is -0 in E4M3, and becomes 0: in B11 it is NaN, and what
    0x7f and 0xff become. So where the lower seven bits are all alike, it is one of them that stays,
    as the upper one: 6 operations, for bytes are compared four to a lane.
    """
    raised = words << jnp.uint32(1)
    unlike = (words ^ raised) & jnp.uint32(0x7E7E7E7E)
    alike, values, others = (
        pltpu.bitcast(x, jnp.int8) for x in (raised & jnp.uint32(0x80808080), words, unlike)
    )
    return pltpu.bitcast(jnp.where(others != 0, values, alike), jnp.uint32)
