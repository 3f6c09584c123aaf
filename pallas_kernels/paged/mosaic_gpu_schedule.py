"""Who attends to what, as int32 arrays that XLA computes on the device from a ragged batch.

Sequences with few new tokens are decoded, all others are prompts. Decoding is cut as if all tiles
of keys of all sequences and heads stood in one line: each block has an equal piece of it, and where
a piece begins or ends within a sequence there are partial results to merge. Prompts are cut into
tiles of queries; tokens of no sequence are a prompt that sees nothing.

A kernel of XLA's costs more than what it computes here. So all sums and searches compare all with
all, gathers follow them, and nothing is scattered, scanned or put together from parts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged.mosaic_gpu_geometry import CHUNK, Geometry


class Decode(NamedTuple):
    """Sequences that are decoded, one after another, and the pieces of the blocks.

    Attributes:
        seqs: int32 [max_num_seqs + 1, 8]: sequence, kv_len, its first token, its tokens, first tile
            of keys, tiles, tiles of all sequences before, and their rows (tokens times heads of a
            unit, in chunks of 8). Those that do not exist, the last at least, have only sums.
        blocks: int32 [num_blocks, 4]: first item, items, first tile in the line, end of its piece.
        places: int32 [max_num_seqs + 2]: for each sequence of the batch how many before it are
            decoded: its row of `seqs`, where the next has one more.
        seq_of_token: int32 [num_tokens]: each token's sequence; num_seqs = none.
        place_of_chunk: int32 [decode_rows / 8]: row of `seqs` of each chunk.
    """

    seqs: jax.Array
    blocks: jax.Array
    places: jax.Array
    seq_of_token: jax.Array
    place_of_chunk: jax.Array


class Prefill(NamedTuple):
    """Tiles of queries.

    Attributes:
        tiles: int32 [prefill_tiles, 8]: sequence, kv_len, position less token of its queries, the
            token of the first row, the sequence's first token and its end, first tile of keys,
            tiles.
        before: int32 [max_num_seqs + 2]: tiles of all sequences before; the last is how many exist.
        of_token: int32 [num_tokens]: which row of all tiles a token is, or anything.
        is_of_none: bool [num_tokens]: whether a token is no sequence's.
    """

    tiles: jax.Array
    before: jax.Array
    of_token: jax.Array
    is_of_none: jax.Array


class Batch(NamedTuple):
    """A ragged batch: int32 [max_num_seqs + 1], the last, or what is behind num_seqs, of no use.

    Attributes:
        begin: first token of each sequence.
        q_lens, kv_lens: 0 for those that do not exist.
        num_seqs: how many exist.
    """

    begin: jax.Array
    q_lens: jax.Array
    kv_lens: jax.Array
    num_seqs: jax.Array


def schedule(
    cu_q_lens: jax.Array, kv_lens: jax.Array, num_seqs: jax.Array, geometry: Geometry
) -> tuple[Decode, Prefill]:
    """Who attends to what."""
    exists = jnp.arange(len(cu_q_lens)) < num_seqs
    following = jnp.pad(cu_q_lens[1:], (0, 1))
    q_lens = jnp.where(exists, following - cu_q_lens, 0)
    batch = Batch(cu_q_lens, q_lens, jnp.where(exists, jnp.pad(kv_lens, (0, 1)), 0), num_seqs)
    prompts = _prompts(batch, geometry)
    aligned, of_seq = _tiles_of(prompts, geometry)
    is_decoded = (q_lens > 0) & (q_lens <= geometry.decode_q_len)
    places, before = _sums_before(is_decoded.astype(jnp.int32), of_seq)
    of_place, of_tile = _ended(
        (places[1:], jnp.arange(len(cu_q_lens))), (before[1:], jnp.arange(geometry.prefill_tiles))
    )
    ends = jnp.where(exists, following, geometry.num_tokens)
    (of_token,) = _ended((ends, jnp.arange(geometry.num_tokens)))
    return (
        _decode(batch, places, of_place, of_token, geometry),
        _prefill(prompts, before, aligned, of_tile, of_token, geometry),
    )


def _decode(
    batch: Batch, places: jax.Array, of_place: jax.Array, of_token: jax.Array, geometry: Geometry
) -> Decode:
    """The sequences that are decoded, and what each block does."""
    exists = of_place < len(batch.begin)
    seq = jnp.where(exists, of_place, 0)
    first_token, tokens, kv_len = (jnp.where(exists, x[seq], 0) for x in batch[:3])
    keys = geometry.tiles.decode.keys
    start, stop = geometry.masks.bounds(kv_len - tokens, kv_len - 1, kv_len)
    first = jnp.broadcast_to(start // keys, stop.shape)
    count = jnp.where(exists & (stop > start), -(-stop // keys) - first, 0)
    chunks = (tokens * geometry.part_heads + (CHUNK - 1)) & -CHUNK
    before, rows = (sums[:-1] for sums in _sums_before(count, chunks))
    total, per_block = before[-1] * geometry.units, tiles_per_block(before[-1], geometry)
    begin = jnp.minimum(jnp.arange(geometry.num_blocks) * per_block, total)
    end = jnp.minimum(begin + per_block, total)
    last = jnp.maximum(end - 1, 0)
    units_before = before * geometry.units
    *of_ends, of_chunk = _ended(
        (units_before, begin), (units_before, last),
        (rows, jnp.arange(geometry.decode_rows // CHUNK) * CHUNK),
    )  # fmt: skip

    def item_at(tile, ended):
        place = ended - 1
        within = (tile - units_before[place]) // jnp.maximum(count[place], 1)
        return place * geometry.units + within

    first_item, last_item = map(item_at, (begin, last), of_ends)
    items = jnp.where(end > begin, last_item - first_item + 1, 0)
    return Decode(
        seqs=_table([seq, kv_len, first_token, tokens, first, count, before, rows]),
        blocks=_table([first_item, items, begin, end]),
        places=places,
        seq_of_token=of_token,
        place_of_chunk=of_chunk - 1,
    )


def _prompts(batch: Batch, geometry: Geometry) -> Batch:
    """The sequences that are not decoded, and behind those that exist one more: the padding."""
    is_padding = jnp.arange(len(batch.begin)) == batch.num_seqs
    q_lens = jnp.where(batch.q_lens > geometry.decode_q_len, batch.q_lens, 0)
    return batch._replace(q_lens=jnp.where(is_padding, geometry.num_tokens - batch.begin, q_lens))


def _tiles_of(prompts: Batch, geometry: Geometry) -> tuple[jax.Array, jax.Array]:
    """Where the first tile of queries of each begins, and how many there are."""
    # Queries are read from multiples of 8 on (TMA): a sequence's first tile may begin before it.
    aligned = prompts.begin // geometry.tiles.alignment * geometry.tiles.alignment
    tokens = prompts.begin + prompts.q_lens - aligned
    return aligned, jnp.where(prompts.q_lens > 0, -(-tokens // geometry.prefill_tokens), 0)


def _prefill(
    prompts: Batch, before: jax.Array, aligned: jax.Array, of_tile: jax.Array,
    of_token: jax.Array, geometry: Geometry,
) -> Prefill:  # fmt: skip
    """Tiles of queries of all sequences that are not decoded, and of tokens of none."""
    tokens, keys = geometry.prefill_tokens, geometry.tiles.prefill.keys
    until = before[1:]
    seq = jnp.minimum(of_tile, len(until) - 1)
    begin, q_len, kv_len = (x[seq] for x in prompts[:3])
    # The last tile of a sequence comes first: it sees the most keys.
    token = aligned[seq] + (until[seq] - 1 - jnp.arange(geometry.prefill_tiles)) * tokens
    shift = kv_len - q_len - begin
    first_row, stop_row = jnp.maximum(token, begin), begin + q_len
    last_row = jnp.minimum(token + tokens, stop_row) - 1
    start, stop = geometry.masks.bounds(shift + first_row, shift + last_row, kv_len)
    first = jnp.broadcast_to(start // keys, stop.shape)
    of_keys = jnp.where(stop > start, -(-stop // keys) - first, 0)
    ahead = jnp.arange(geometry.num_tokens) - aligned[of_token]
    row = (until[of_token] - 1 - ahead // tokens) * tokens + ahead % tokens
    return Prefill(
        tiles=_table([seq, kv_len, shift, token, begin, stop_row, first, of_keys]),
        before=before,
        of_token=jnp.where(prompts.q_lens[of_token] > 0, row, 0),
        is_of_none=of_token == prompts.num_seqs,
    )


def tiles_per_block(total: jax.Array, geometry: Geometry) -> jax.Array:
    """How long a block's piece is of a line of so many tiles of each unit."""
    blocks = jnp.int32(geometry.num_blocks)
    return jnp.maximum(jax.lax.div(total * geometry.units + (blocks - 1), blocks), 1)


def decoded_token(token: jax.Array, schedule: Decode, geometry: Geometry) -> tuple[jax.Array, ...]:
    """(row of `seqs`, token within the sequence, whether it is decoded) of a result of `merge`."""
    if geometry.decode_tokens < geometry.num_tokens:
        most = jnp.full_like(token, geometry.decode_q_len)
        place, within = jax.lax.div(token, most), jax.lax.rem(token, most)
        return place, within, within < schedule.seqs[place, 3]
    seq = schedule.seq_of_token[token]
    place = schedule.places[seq]
    is_decoded = schedule.places[seq + 1] > place
    return place, token - schedule.seqs[place, 2], is_decoded


def _sums_before(*values: jax.Array) -> list[jax.Array]:
    """int32 [n + 1] for each int32 [n]: the sums of all values before each, and of all."""
    size = len(values[0])
    earlier = jnp.arange(size)[None, :] < jnp.arange(size + 1)[:, None]
    return jax.lax.reduce(
        [jnp.where(earlier, x[None, :], 0) for x in values],
        [jnp.int32(0)] * len(values),
        lambda a, b: [x + y for x, y in zip(a, b, strict=True)],
        (1,),
    )


def _ended(*lines: tuple[jax.Array, jax.Array]) -> list[jax.Array]:
    """For each (ends, places) how many ends are at each place or before it."""
    is_before = [ends[None, :] <= places[:, None] for ends, places in lines]
    sums = jnp.sum(jnp.concatenate(is_before), axis=1, dtype=jnp.int32)
    return jnp.split(sums, np.cumsum([len(places) for _, places in lines])[:-1])


def _table(columns: list[jax.Array]) -> jax.Array:
    """int32 [rows, columns], a choice for each number: XLA concatenates in kernels of its own."""
    table = jnp.broadcast_to(columns[0][:, None], (len(columns[0]), len(columns)))
    column = jnp.arange(len(columns))[None, :]
    for i, values in enumerate(columns[1:], 1):
        table = jnp.where(column == i, values[:, None], table)
    return table.astype(jnp.int32)
