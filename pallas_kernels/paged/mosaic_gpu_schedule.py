"""Who attends to what, as int32 arrays that XLA computes on the device from a ragged batch.

Sequences with few new tokens are decoded, all others are prompts. Decoding is cut as if all tiles
of keys of all sequences and heads stood in one line: each block has an equal piece of it, and where
a piece begins or ends within a sequence there are partial results to merge. Prompts are cut into
tiles of queries; tokens of no sequence are a prompt that sees nothing.

A kernel of XLA's costs more than what it computes here, so there are three, each one fusion: sums
over the sequences before each, a search of all places in those sums at once, and one table of
what is found there. Sums and searches compare all with all, and nothing is scattered, scanned or
put together from parts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged.mosaic_gpu_geometry import CHUNK, Geometry

# Columns of the sums.
DECODED, TILES, ROWS_BEFORE, PROMPTS = range(4)


class Batch(NamedTuple):
    """A ragged batch: the contract's arrays."""

    cu_q_lens: jax.Array
    kv_lens: jax.Array
    num_seqs: jax.Array


class Schedule(NamedTuple):
    """The work of a call.

    Attributes:
        table: int32 [rows, 8], three parts. First [max_num_seqs + 1], the sequences that are
            decoded, one after another: sequence, kv_len, its first token, its tokens, first tile
            of keys, tiles, tiles of all sequences before, and their rows (tokens times heads of a
            unit, in chunks of 8); those that do not exist, the last at least, have only sums. Then
            [prefill_tiles], tiles of queries: sequence, kv_len, position less token of its
            queries, the token of the first row, the sequence's first token and its end, first
            tile of keys, tiles. Then [num_blocks], pieces: first item and last, first tile in the
            line and end; where these are equal there is none.
        sums: int32 [max_num_seqs + 2, 4]: of all sequences before each how many are decoded, their
            tiles of keys, their rows, and the tiles of queries of prompts.
        found: int32: the sequence of each token (num_seqs = none), then those of each part of the
            table, the last of each piece, and that of each chunk of 8 rows.
        batch: the call's.
    """

    table: jax.Array
    sums: jax.Array
    found: jax.Array
    batch: Batch


class Parts(NamedTuple):
    """Where parts of `Schedule.found` begin; the table's are as far behind its first."""

    tokens: int
    seqs: int
    tiles: int
    blocks: int
    lasts: int
    chunks: int
    end: int


class Seqs(NamedTuple):
    """What sequences of a batch have to do; int32 of one shape.

    Attributes:
        begin: first token.
        q_len, kv_len: 0 for those that do not exist.
        tokens: those that are decoded, all or none.
        first, count: tiles of keys that they see.
        rows: that they take, in chunks.
        prompt_len: tokens of a prompt; behind the sequences that exist one more, the padding.
        aligned: the token that its first tile begins at.
        prompt_tiles: of queries.
    """

    begin: jax.Array
    q_len: jax.Array
    kv_len: jax.Array
    tokens: jax.Array
    first: jax.Array
    count: jax.Array
    rows: jax.Array
    prompt_len: jax.Array
    aligned: jax.Array
    prompt_tiles: jax.Array


def parts_of(geometry: Geometry) -> Parts:
    """Where parts of `Schedule.found` begin."""
    sizes = (
        geometry.num_tokens, geometry.max_num_seqs + 1, geometry.prefill_tiles,
        geometry.num_blocks, geometry.num_blocks, geometry.decode_rows // CHUNK,
    )  # fmt: skip
    return Parts(*(sum(sizes[:i]) for i in range(len(sizes) + 1)))


def schedule(batch: Batch, geometry: Geometry) -> Schedule:
    """Who attends to what."""
    seq = jnp.arange(geometry.max_num_seqs + 1)
    seqs = _seqs_at(seq, batch, geometry)
    decoded = (seqs.tokens > 0).astype(jnp.int32)
    sums = _sums_before(decoded, seqs.count, seqs.rows, seqs.prompt_tiles)
    until, (begin, end) = sums[1:], _pieces(sums, jnp.arange(geometry.num_blocks), geometry)
    until_units = until[:, TILES] * geometry.units
    ends_of_tokens = jnp.where(seq < batch.num_seqs, seqs.begin + seqs.q_len, geometry.num_tokens)
    found = _ended(
        (ends_of_tokens, jnp.arange(geometry.num_tokens)),
        (until[:, DECODED], seq),
        (until[:, PROMPTS], jnp.arange(geometry.prefill_tiles)),
        (until_units, begin),
        (until_units, jnp.maximum(end - 1, 0)),
        (until[:, ROWS_BEFORE], jnp.arange(geometry.decode_rows // CHUNK) * CHUNK),
    )
    return Schedule(_table(found, sums, batch, geometry), sums, found, batch)


def _seqs_at(seq: jax.Array, batch: Batch, geometry: Geometry) -> Seqs:
    """What sequences have to do, by their numbers from 0 on; past the last there is nothing."""
    exists, begin = seq < batch.num_seqs, _clipped(batch.cu_q_lens, seq)
    q_len = jnp.where(exists, _clipped(batch.cu_q_lens, seq + 1) - begin, 0)
    kv_len = jnp.where(exists, _clipped(batch.kv_lens, seq), 0)
    is_few = q_len <= geometry.decode_q_len
    tokens, of_prompt = jnp.where(is_few, q_len, 0), jnp.where(is_few, 0, q_len)
    keys = geometry.tiles.decode.keys
    start, stop = geometry.masks.bounds(kv_len - tokens, kv_len - 1, kv_len)
    first = jnp.broadcast_to(start // keys, stop.shape)
    prompt_len = jnp.where(seq == batch.num_seqs, geometry.num_tokens - begin, of_prompt)
    # Queries are read from multiples of 8 on (TMA): a sequence's first tile may begin before it.
    aligned = begin // geometry.tiles.alignment * geometry.tiles.alignment
    of_queries = -(-(begin + prompt_len - aligned) // geometry.prefill_tokens)
    return Seqs(
        begin=begin, q_len=q_len, kv_len=kv_len, tokens=tokens, first=first,
        count=jnp.where((tokens > 0) & (stop > start), -(-stop // keys) - first, 0),
        rows=(tokens * geometry.part_heads + (CHUNK - 1)) & -CHUNK,
        prompt_len=prompt_len, aligned=aligned,
        prompt_tiles=jnp.where(prompt_len > 0, of_queries, 0),
    )  # fmt: skip


def _pieces(sums: jax.Array, block: jax.Array, geometry: Geometry) -> tuple[jax.Array, jax.Array]:
    """Where the pieces of blocks of the line of tiles begin and end."""
    total = sums[-1, TILES]
    size = tiles_per_block(total, geometry)
    begin = jnp.minimum(block * size, total * geometry.units)
    return begin, jnp.minimum(begin + size, total * geometry.units)


def _table(found: jax.Array, sums: jax.Array, batch: Batch, geometry: Geometry) -> jax.Array:
    """`Schedule.table`."""
    parts = parts_of(geometry)
    place, seq = np.arange(parts.seqs, parts.lasts), found[parts.seqs : parts.lasts]
    seqs, before = _seqs_at(seq, batch, geometry), sums[seq]
    decoded = [
        jnp.where(seq <= geometry.max_num_seqs, seq, 0), seqs.kv_len, seqs.begin, seqs.tokens,
        seqs.first, seqs.count, before[:, TILES], before[:, ROWS_BEFORE],
    ]  # fmt: skip
    until = _clipped(sums, seq + 1)[:, PROMPTS]
    prompts = _tiles_of_queries(seq, seqs, until - 1 - (place - parts.tiles), geometry)
    begin, end = _pieces(sums, place - parts.blocks, geometry)
    last = found[np.minimum(place + geometry.num_blocks, parts.chunks - 1)]
    first_item = _item_at(begin, seq, sums, batch, geometry)
    last_item = _item_at(jnp.maximum(end - 1, 0), last, sums, batch, geometry)
    pieces = [first_item, last_item, begin, end] + [end] * 4
    return _by_column(
        [
            jnp.where(place < parts.tiles, of_seq, jnp.where(place < parts.blocks, of_tile, piece))
            for of_seq, of_tile, piece in zip(decoded, prompts, pieces, strict=True)
        ],
        axis=1,
    )


def _tiles_of_queries(
    seq: jax.Array, seqs: Seqs, tiles_behind: jax.Array, geometry: Geometry
) -> list[jax.Array]:
    """The columns of tiles, of whose sequences so many tiles are later in the list."""
    tokens, keys = geometry.prefill_tokens, geometry.tiles.prefill.keys
    # The last tile of a sequence comes first: it sees the most keys.
    token = seqs.aligned + tiles_behind * tokens
    # Of the padding, which has no keys and whose tokens are no sequence's, nothing is seen.
    shift = seqs.kv_len - seqs.prompt_len - seqs.begin
    first_row, stop_row = jnp.maximum(token, seqs.begin), seqs.begin + seqs.prompt_len
    last_row = jnp.minimum(token + tokens, stop_row) - 1
    start, stop = geometry.masks.bounds(shift + first_row, shift + last_row, seqs.kv_len)
    first = jnp.broadcast_to(start // keys, stop.shape)
    of_keys = jnp.where(stop > start, -(-stop // keys) - first, 0)
    row = jnp.minimum(seq, geometry.max_num_seqs)
    return [row, seqs.kv_len, shift, token, seqs.begin, stop_row, first, of_keys]


def _item_at(
    tile: jax.Array, seq: jax.Array, sums: jax.Array, batch: Batch, geometry: Geometry
) -> jax.Array:
    """The item of a tile of the line, which is of that sequence."""
    before, count = sums[seq], jnp.maximum(_seqs_at(seq, batch, geometry).count, 1)
    within = (tile - before[:, TILES] * geometry.units) // count
    return before[:, DECODED] * geometry.units + within


def row_of_token(schedule: Schedule, geometry: Geometry) -> tuple[jax.Array, jax.Array]:
    """Which row of all tiles of queries each token is, or anything; whether it is no sequence's."""
    token, seq = jnp.arange(geometry.num_tokens), schedule.found[: geometry.num_tokens]
    seqs, until = _seqs_at(seq, schedule.batch, geometry), schedule.sums[seq + 1, PROMPTS]
    ahead, tokens = token - seqs.aligned, geometry.prefill_tokens
    row = (until - 1 - ahead // tokens) * tokens + ahead % tokens
    return jnp.where(seqs.prompt_len > 0, row, 0), seq == schedule.batch.num_seqs


def place_of_rows(schedule: Schedule, row: jax.Array, geometry: Geometry) -> tuple[jax.Array, ...]:
    """(first token of its sequence, rows from there) of rows of queries that are decoded."""
    seq = schedule.found[parts_of(geometry).chunks + row // CHUNK]
    return _clipped(schedule.batch.cu_q_lens, seq), row - schedule.sums[seq, ROWS_BEFORE]


def tiles_per_block(total: jax.Array, geometry: Geometry) -> jax.Array:
    """How long a block's piece is of a line of so many tiles of each unit."""
    blocks = jnp.int32(geometry.num_blocks)
    return jnp.maximum(jax.lax.div(total * geometry.units + (blocks - 1), blocks), 1)


def decoded_token(
    token: jax.Array, schedule: Schedule, geometry: Geometry
) -> tuple[jax.Array, ...]:
    """(row of the table, token within the sequence, whether it is decoded) of one of `merge`'s."""
    table = schedule.table
    if geometry.decode_tokens < geometry.num_tokens:
        most = jnp.full_like(token, geometry.decode_q_len)
        place, within = jax.lax.div(token, most), jax.lax.rem(token, most)
        return place, within, within < table[place, 3]
    seq = schedule.found[token]
    place = schedule.sums[seq, DECODED]
    is_decoded = schedule.sums[seq + 1, DECODED] > place
    return place, token - table[place, 2], is_decoded


def _clipped(x: jax.Array, i: jax.Array) -> jax.Array:
    """x[i], of the last for what is past it."""
    return x.at[i].get(mode="clip")


def _sums_before(*values: jax.Array) -> jax.Array:
    """int32 [n + 1, values] of each int32 [n]: the sums before each, and of all."""
    size = len(values[0])
    earlier = np.arange(size) < np.arange(size + 1)[:, None, None]
    by_value = _by_column(values, axis=0)
    return jnp.sum(jnp.where(earlier, by_value, 0), axis=2, dtype=jnp.int32)


def _ended(*lines: tuple[jax.Array, jax.Array]) -> jax.Array:
    """For each (ends, places) how many ends are at each place or before it, one after another."""
    is_before = [ends[None, :] <= places[:, None] for ends, places in lines]
    return jnp.sum(jnp.concatenate(is_before), axis=1, dtype=jnp.int32)


def _by_column(columns: Sequence[jax.Array], axis: int) -> jax.Array:
    """What jnp.stack gives, as a choice for each number: XLA stacks in kernels of its own."""
    columns = [jnp.expand_dims(values, axis) for values in columns]
    column = jnp.expand_dims(np.arange(len(columns)), 1 - axis)
    table = jnp.broadcast_to(columns[0], np.broadcast_shapes(columns[0].shape, column.shape))
    for i, values in enumerate(columns[1:], 1):
        table = jnp.where(column == i, values, table)
    return table.astype(jnp.int32)
