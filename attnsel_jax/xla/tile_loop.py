"""How the tiles of a ragged batch are run one after another, and their rows put together."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from attnsel_jax.xla.query_tiles import Tiles


def tile_widths(num_tokens: int, max_num_seqs: int, most: int) -> tuple[int, ...]:
    """How many queries tiles are computed as wide as, ascending: one, a few, `most`.

    One is for decoding, a few for speculative decoding and short prompts. Where there are no more
    tokens than sequences, every tile is of one query.
    """
    most = min(most, num_tokens)
    if num_tokens <= max_num_seqs or most <= 1:
        return (1,)
    return tuple(sorted({1, math.isqrt(most), most}))


def over_tiles(
    compute: Callable[[Tiles, int], Sequence[jax.Array]],
    tiles: Tiles,
    widths: tuple[int, ...],
    empty_row: Sequence[jax.Array],
    num_tokens: int,
) -> tuple[jax.Array, ...]:
    """Runs the tiles that are not empty, each as wide as the least of `widths` that holds it.

    A tile writes as many rows as the widest, the last of them empty where it has fewer queries; the
    next tile begins where its queries end, and overwrites them.

    Args:
        compute: from one tile and a width, to arrays of so many rows, the rows past the tile's
            queries empty.
        tiles: of widths[-1] queries each, in the order of their tokens, empty ones last.
        widths: ascending.
        empty_row: for each array, what a row without a query is, in its shape and dtype.
        num_tokens: rows of the results.
    """
    widest = widths[-1]

    def empty(count: int) -> tuple[jax.Array, ...]:
        return tuple(jnp.broadcast_to(row, (count, *row.shape)) for row in empty_row)

    def of_width(width: int, tile: Tiles) -> tuple[jax.Array, ...]:
        pairs = zip(compute(tile, width), empty(widest - width), strict=True)
        return tuple(jnp.concatenate(pair) for pair in pairs)

    def one_tile(i: jax.Array, results: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        tile = jax.tree.map(lambda x: x[i], tiles)
        which = sum(((tile.q_len > width).astype(jnp.int32) for width in widths[:-1]), jnp.int32(0))
        new = jax.lax.switch(which, [functools.partial(of_width, w) for w in widths], tile)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(whole, part, tile.first_token, axis=0)
            for whole, part in zip(results, new, strict=True)
        )

    used = jnp.sum(tiles.q_len > 0, dtype=jnp.int32)
    results = jax.lax.fori_loop(0, used, one_tile, empty(num_tokens + widest - 1))
    return tuple(x[:num_tokens] for x in results)
