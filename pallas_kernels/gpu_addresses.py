"""Addresses in shared memory that are computed where they are used, and kept in no register.

A product of operands in shared memory takes a descriptor, an address, for every 16 numbers of the
head size. Where an operand stays the same over a loop, the compiler computes all of its descriptors
before the loop and keeps them: 16 of queries and 16 of their gradients at head size 256 are 36
registers of each thread, and were its whole spills (dq: 176 + 188 bytes, none without them).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

ABOVE_ALL_COUNTS = 30  # 2**30: no loop over tiles is that long


def tied_to(count: jax.Array, index: Any, *, tied: bool = True, by_square: bool = False) -> Any:
    """An index, as a number that the compiler has to compute again at each turn of a loop.

    Args:
        count: int32 [], what the loop counts, below 2**30.
        index: int32 []: comes back.
        tied: False = it comes back as it is: where registers are left, 10 to 50 instructions a
            turn are saved.
        by_square: for where the compiler sees that the count is below 2**30 (LLVM, of a loop that
            begins at a known number): it knows that number shifted to be 0, and ties nothing. A
            square is 0, 1 or 4 modulo 8, which no compiler has been seen to know: four
            instructions on scalars, for one.
    """
    if not tied:
        return index
    if by_square:
        square = count * count
        return index + (square & lax.shift_right_logical(square, jnp.int32(2)) & 1)
    return index + lax.shift_right_logical(jnp.int32(count), jnp.int32(ABOVE_ALL_COUNTS))
