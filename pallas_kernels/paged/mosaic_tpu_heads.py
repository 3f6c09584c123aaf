"""How the TPU kernels of `paged` take each head out of [tokens, heads, head_dim], and put it back.

A token's heads lie beside each other along sublanes, 16 bits wide two in a word. One head of many
tokens is every n-th row of that: a load with a stride brings it, of 16-bit heads two at a time,
from a copy in words. The words are taken apart, and put together, in registers. Where heads do not
fill whole registers the compiler gathers rows itself, which takes it longer.
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
    whole = heads % (packed * tpu_chip.SUBLANES) == 0
    return packed if whole and head_dim <= tpu_chip.LANES else 0


def scratch_shapes(tokens: int, heads: int, head_dim: int, dtype: jnp.dtype) -> list:
    """The heads of so many tokens in words, if they are taken apart there."""
    packed = _heads_in_word(heads, head_dim, dtype)
    words = pltpu.VMEM((tokens * heads // max(packed, 1), head_dim), jnp.int32)
    return [words] if packed else []


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
    stride, (rows,) = heads // packed, words
    _to_words(ref, rows, first, tokens)
    for word in range(stride):
        found = rows[pl.ds(word, tokens, stride=stride), :]
        found = found.T if turned else found
        if packed == 1:
            yield word, pltpu.bitcast(found, jnp.float32)
        else:
            yield 2 * word, pltpu.bitcast(lax.shift_left(found, 16), jnp.float32)
            yield 2 * word + 1, pltpu.bitcast(found & jnp.int32(HIGH), jnp.float32)


def _to_words(ref: Any, rows: Any, first: Any, tokens: int) -> None:
    """Copies some tokens' heads."""
    values = ref[pl.ds(first, tokens)].reshape(tokens * ref.shape[1], ref.shape[2])
    found = pltpu.bitcast(values, jnp.int32)
    rows[: found.shape[0]] = found


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
    stride, (rows,) = heads // packed, words
    if mine is not None:
        _to_words(ref, rows, first, tokens)
    for word in range(stride):
        if packed == 1:
            values = pltpu.bitcast(of_head(word), jnp.int32)
        else:
            values = _bits(of_head(2 * word), ref.dtype)
            values |= lax.shift_left(_bits(of_head(2 * word + 1), ref.dtype), 16)
        values = values.T if turned else values
        at = pl.ds(word, tokens, stride=stride)
        rows[at, :] = values if mine is None else jnp.where(mine, values, rows[at, :])
    found = pltpu.bitcast(rows[: tokens * stride], ref.dtype)
    ref[pl.ds(first, tokens)] = found.reshape(tokens, heads, size)


def _bits(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """A 16-bit number's bits, in the lower half of a word."""
    return lax.bitcast_convert_type(x.astype(dtype), jnp.uint16).astype(jnp.int32)
