"""How the TPU kernels of `paged` take each head out of [tokens, heads, head_dim], and put it back.

A token's heads lie beside each other along sublanes, 16 bits wide two in a word. One head of many
tokens is every n-th row of that: a load with a stride brings it, of 16-bit heads two at a time,
from a copy in words. The words are taken apart, and put together, in registers. An odd number of
16-bit heads does not fill its words: the compiler gathers those rows itself, which takes it longer.

VMEM has 32 banks of rows: eight rows that are a multiple of 8, 16 or 32 apart meet in one, and come
in two, four or eight loads. In the copy a token's words begin an odd number of fours after the last
one's, so that no two of them meet.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_chip

HIGH = -(1 << 16)  # the upper half of a word


def _heads_in_word(heads: int, head_dim: int, dtype: jnp.dtype) -> int:
    """How many heads one strided load brings; 0 = none can be made."""
    packed = 4 // jnp.dtype(dtype).itemsize
    return packed if heads % packed == 0 and head_dim <= tpu_chip.LANES else 0


def _stride(each: int) -> int:
    """Rows from one token's words to the next one's: an odd number of fours, see above."""
    return (each + 3) // 8 * 8 + 4


def scratch_shapes(tokens: int, heads: int, head_dim: int, dtype: jnp.dtype) -> list:
    """The heads of so many tokens in words, if they are taken apart there."""
    packed = _heads_in_word(heads, head_dim, dtype)
    if not packed:
        return []
    return [pltpu.VMEM((tokens * _stride(heads // packed), head_dim), jnp.int32)]


def read(
    ref: Any, words: list, first: Any, tokens: int, *, turned: bool
) -> Iterator[tuple[int, jax.Array]]:
    """Each head of some tokens, in float32: [tokens, head_dim], or turned, [head_dim, tokens].

    Args:
        ref: [all tokens, heads, head_dim].
        words: scratch.
        first: of the tokens.
        tokens: how many.
        turned: whether features run down.
    """
    heads, size = ref.shape[1:]
    packed = _heads_in_word(heads, size, ref.dtype)
    if not packed:
        for head in range(heads):
            found = ref[pl.ds(first, tokens), head].astype(jnp.float32)
            yield head, found.T if turned else found
        return
    each, (rows,) = heads // packed, words
    _to_words(ref, rows, first, tokens)
    for word in range(each):
        found = rows[pl.ds(word, tokens, stride=_stride(each)), :]
        found = found.T if turned else found
        if packed == 1:
            yield word, pltpu.bitcast(found, jnp.float32)
        else:
            yield 2 * word, pltpu.bitcast(lax.shift_left(found, 16), jnp.float32)
            yield 2 * word + 1, pltpu.bitcast(found & jnp.int32(HIGH), jnp.float32)


def _to_words(ref: Any, rows: Any, first: Any, tokens: int) -> None:
    """Copies some tokens' heads."""
    there = ref.bitcast(jnp.int32)
    each = there.shape[1]

    def copy(token, _):
        rows[pl.ds(token * _stride(each), each)] = there[first + token]

    lax.fori_loop(0, tokens, copy, None, unroll=True)


def write(
    ref: Any,
    words: list,
    first: Any,
    tokens: int,
    of_head: Callable[[int], jax.Array],
    mine: jax.Array | None,
    *,
    turned: bool,
) -> None:
    """Puts each head's output into some tokens' rows.

    Args:
        ref: [all tokens, heads, head_dim].
        words, first, tokens, turned: as for `read`.
        of_head: from the head to its output, float32.
        mine: [tokens, 1] of bool: rows that are written; None = all.
    """
    heads, size = ref.shape[1:]
    packed = _heads_in_word(heads, size, ref.dtype)
    if not packed:
        for head in range(heads):
            values = of_head(head).T if turned else of_head(head)
            if mine is not None:
                old = ref[pl.ds(first, tokens), head].astype(jnp.float32)
                values = jnp.where(mine, values, old)
            ref[pl.ds(first, tokens), head] = values.astype(ref.dtype)
        return
    each, (rows,) = heads // packed, words
    stride = _stride(each)
    if mine is not None:
        _to_words(ref, rows, first, tokens)
    for word in range(each):
        if packed == 1:
            values = pltpu.bitcast(of_head(word), jnp.int32)
        else:
            both = [of_head(2 * word), of_head(2 * word + 1)]
            values = pltpu.pack_elementwise(both, packed_dtype=ref.dtype)
            values = lax.bitcast_convert_type(values, jnp.int32)
        values = values.T if turned else values
        at = pl.ds(word, tokens, stride=stride)
        rows[at, :] = values if mine is None else jnp.where(mine, values, rows[at, :])
    there = ref.bitcast(jnp.int32)

    def put(token, _):
        there[first + token] = rows[pl.ds(token * stride, each)]

    lax.fori_loop(0, tokens, put, None, unroll=True)
