"""The parts that dense attention is gone through in: some batch rows and some heads at a time."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnsel_jax.xla.dense_blocks import Floats, Masks, Static, split_heads, take


class Part(NamedTuple):
    """Where a part begins: its first batch row and its first kv head."""

    row: jax.Array
    head: jax.Array


def over_parts(static: Static, batch: int, num_kv_heads: int, step: Callable, carry):
    """Runs `step(part, carry)` over the blocks of batch rows and heads."""
    of_heads = jnp.int32(num_kv_heads // static.block_kv_heads)

    def one(i: jax.Array, carry):
        row, head = lax.div(i, of_heads), lax.rem(i, of_heads)
        part = Part(row * jnp.int32(static.block_batch), head * jnp.int32(static.block_kv_heads))
        return step(part, carry)

    count = batch // static.block_batch * (num_kv_heads // static.block_kv_heads)
    start = jnp.int32(0)
    return one(start, carry) if count == 1 else lax.fori_loop(start, jnp.int32(count), one, carry)


def part_of(static: Static, part: Part, x: jax.Array, axis: int, group: int = 1) -> jax.Array:
    """A part of an array [batch, ...] whose `axis` is kv heads, or `group` query heads for each."""
    x = take(x, part.row, static.block_batch, 0)
    return take(x, part.head * jnp.int32(group), static.block_kv_heads * group, axis)


def heads_first(static: Static, part: Part, q: jax.Array) -> jax.Array:
    """A part of [batch, q_len, num_q_heads, d], as [batch, num_kv_heads, group, q_len, d]."""
    return jnp.moveaxis(split_heads(part_of(static, part, q, 2, static.group), static, 2), 1, 3)


def arguments_of(static: Static, x: Floats, who: Masks, part: Part) -> tuple[Floats, Masks]:
    """The arguments for one part; q, k and v with their heads first, so that a block is rows."""

    def of_heads(a: jax.Array | None) -> jax.Array | None:
        size = static.block_kv_heads * static.group
        return a if a is None else take(a, part.head * jnp.int32(static.group), size, 0)

    def of_pairs(a: jax.Array | None) -> jax.Array | None:
        return a if a is None else part_of(static, part, a, 1, static.group)

    mask, *of_rows = who
    of_rows = jax.tree.map(lambda a: take(a, part.row, static.block_batch, 0), of_rows)
    floats = Floats(
        heads_first(static, part, x.q),
        *(jnp.swapaxes(part_of(static, part, a, 2), 1, 2) for a in (x.k, x.v)),
        of_pairs(x.bias),
        of_heads(x.alibi_slopes),
        of_heads(x.sinks),
    )
    return floats, Masks(of_pairs(mask), *of_rows)
