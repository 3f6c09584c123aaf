"""Who attends to what, as int32 arrays that XLA computes on the device from a ragged batch.

Sequences with few new tokens are decoded, all others are prompts. Decoding is cut as if all tiles
of keys of all sequences and heads stood in one line: each block has an equal piece of it, and where
a piece begins or ends within a sequence there are partial results to merge. Prompts are cut into
tiles of queries; tokens of no sequence are a prompt that sees nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.paged.mosaic_gpu_geometry import CHUNK, Geometry


class Decode(NamedTuple):
    """Sequences that are decoded, one after another, and the pieces of the blocks.

    Attributes:
        seqs: int32 [max_num_seqs, 8]: sequence, kv_len, position of its first query, its tokens,
            first tile of keys, tiles, tiles of all sequences before, unused.
        rows: int32 [max_num_seqs, 2]: its rows (tokens times heads of a unit, in chunks of 8), and
            those of all sequences before.
        blocks: int32 [num_blocks, 4]: first item, items, first tile in the line, end of its piece.
        tokens: int32 [decode_tokens, 4]: row of `seqs` (-1 = of none), token within the sequence,
            token of the batch (num_tokens = none), and how many tiles a block has.
    """

    seqs: jax.Array
    rows: jax.Array
    blocks: jax.Array
    tokens: jax.Array


class Prefill(NamedTuple):
    """Tiles of queries.

    Attributes:
        tiles: int32 [prefill_tiles, 8]: sequence, kv_len, position less token of its queries, the
            token of the first row, the sequence's first token and its end, first tile of keys,
            tiles.
        num_tiles: int32 [1].
        of_token: int32 [num_tokens]: which row of all tiles a token is, or anything.
        end: int32 []: tokens from here on are no sequence's.
    """

    tiles: jax.Array
    num_tiles: jax.Array
    of_token: jax.Array
    end: jax.Array


def query_lengths(cu_q_lens: jax.Array, num_seqs: jax.Array) -> jax.Array:
    """New tokens of each sequence, 0 for those that do not exist."""
    exists = jnp.arange(cu_q_lens.shape[0] - 1) < num_seqs
    return jnp.where(exists, cu_q_lens[1:] - cu_q_lens[:-1], 0)


def schedule_decode(
    cu_q_lens: jax.Array, kv_lens: jax.Array, num_seqs: jax.Array, geometry: Geometry
) -> Decode:
    """The sequences that are decoded, and what each block does."""
    q_lens = query_lengths(cu_q_lens, num_seqs)
    wanted = (q_lens > 0) & (q_lens <= geometry.decode_q_len)
    place = jnp.where(wanted, jnp.cumsum(wanted) - 1, len(q_lens))
    of_place = jnp.zeros_like(q_lens).at[place].set(jnp.arange(len(q_lens)), mode="drop")
    exists = jnp.arange(len(q_lens)) < jnp.sum(wanted)
    tokens = jnp.where(exists, q_lens[of_place], 0)
    kv_len = jnp.where(exists, kv_lens[of_place], 0)
    q_pos = kv_len - tokens
    keys = geometry.tiles.decode.keys
    start, stop = geometry.masks.bounds(q_pos, kv_len - 1, kv_len)
    first = jnp.broadcast_to(start // keys, stop.shape)
    count = jnp.where(exists & (stop > start), -(-stop // keys) - first, 0)
    before = jnp.cumsum(count) - count
    chunks = -(-tokens * geometry.part_heads // CHUNK) * CHUNK
    seqs = jnp.stack([of_place, kv_len, q_pos, tokens, first, count, before, before], axis=1)
    rows = jnp.stack([chunks, jnp.cumsum(chunks) - chunks], axis=1)
    blocks, per_block = _pieces(count, before, geometry)
    return Decode(
        seqs.astype(jnp.int32), rows.astype(jnp.int32), blocks,
        _decoded_tokens(cu_q_lens[of_place], tokens, per_block, geometry),
    )  # fmt: skip


def _pieces(count: jax.Array, before: jax.Array, geometry: Geometry) -> tuple[jax.Array, jax.Array]:
    """The blocks' pieces of the line, and how long one is."""
    units = geometry.units
    total = jnp.sum(count) * units
    per_block = jnp.maximum(-(-total // geometry.num_blocks), 1)
    begin = jnp.minimum(jnp.arange(geometry.num_blocks) * per_block, total)
    end = jnp.minimum(begin + per_block, total)

    def item_at(tile):
        seq = jnp.sum((before * units)[None, :] <= tile[:, None], axis=1) - 1
        return seq * units + (tile - before[seq] * units) // jnp.maximum(count[seq], 1)

    first, last = item_at(begin), item_at(jnp.maximum(end - 1, 0))
    items = jnp.where(end > begin, last - first + 1, 0)
    return jnp.stack([first, items, begin, end], axis=1).astype(jnp.int32), per_block


def _decoded_tokens(
    first_token: jax.Array, tokens: jax.Array, per_block: jax.Array, geometry: Geometry
) -> jax.Array:
    """Where each token that may be decoded finds its partial results."""
    most = jnp.arange(geometry.decode_tokens)
    if geometry.decode_tokens < geometry.num_tokens:
        seq, within = most // geometry.decode_q_len, most % geometry.decode_q_len
        known = within < tokens[seq]
        token = first_token[seq] + within
    else:
        inside = (first_token <= most[:, None]) & (most[:, None] < first_token + tokens)
        seq, known, token = jnp.argmax(inside, axis=1), jnp.any(inside, axis=1), most
        within = most - first_token[seq]
    seq = jnp.where(known, seq, -1)
    token = jnp.where(known, token, geometry.num_tokens)
    per_block = jnp.broadcast_to(per_block, seq.shape)
    return jnp.stack([seq, within, token, per_block], axis=1).astype(jnp.int32)


def schedule_prefill(
    cu_q_lens: jax.Array, kv_lens: jax.Array, num_seqs: jax.Array, geometry: Geometry
) -> Prefill:
    """Tiles of queries of all sequences that are not decoded, and of tokens of none."""
    tokens, keys = geometry.prefill_tokens, geometry.tiles.prefill.keys
    q_lens = query_lengths(cu_q_lens, num_seqs)
    end = jnp.max(jnp.where(jnp.arange(len(cu_q_lens)) <= num_seqs, cu_q_lens, 0))
    is_prompt = q_lens > geometry.decode_q_len
    # One more sequence: the padding.
    q_lens = jnp.append(jnp.where(is_prompt, q_lens, 0), geometry.num_tokens - end)
    begin = jnp.append(cu_q_lens[:-1], end)
    kv_lens = jnp.append(kv_lens, 0)
    # Queries are read from multiples of 8 on (TMA): a sequence's first tile may begin before it.
    aligned = begin // geometry.tiles.alignment * geometry.tiles.alignment
    of_seq = jnp.where(q_lens > 0, -(-(begin + q_lens - aligned) // tokens), 0)
    until = jnp.cumsum(of_seq)
    index = jnp.arange(geometry.prefill_tiles)
    seq = jnp.minimum(jnp.sum(until[None, :] <= index[:, None], axis=1), len(q_lens) - 1)
    # The last tile of a sequence comes first: it sees the most keys.
    token = aligned[seq] + (until[seq] - 1 - index) * tokens
    before = kv_lens[seq] - q_lens[seq] - begin[seq]
    first_row, stop_row = jnp.maximum(token, begin[seq]), (begin + q_lens)[seq]
    last_row = jnp.minimum(token + tokens, stop_row) - 1
    start, stop = geometry.masks.bounds(before + first_row, before + last_row, kv_lens[seq])
    first = jnp.broadcast_to(start // keys, stop.shape)
    of_keys = jnp.where(stop > start, -(-stop // keys) - first, 0)
    tiles = [seq, kv_lens[seq], before, token, begin[seq], stop_row, first, of_keys]
    batch_token = jnp.arange(geometry.num_tokens)
    inside = (begin <= batch_token[:, None]) & (batch_token[:, None] < begin + q_lens)
    mine = jnp.argmax(inside, axis=1)
    ahead = batch_token - aligned[mine]
    row = (until[mine] - 1 - ahead // tokens) * tokens + ahead % tokens
    return Prefill(
        jnp.stack(tiles, axis=1).astype(jnp.int32),
        until[-1:].astype(jnp.int32),
        jnp.where(jnp.any(inside, axis=1), row, 0).astype(jnp.int32),
        end,
    )
