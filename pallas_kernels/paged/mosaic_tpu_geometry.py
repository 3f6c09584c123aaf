"""What the TPU kernels of `paged` know when they are traced: sizes, lanes, masks, tile sizes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tpu_chip
from pallas_kernels.masks import Window, seen_bounds, window_bounds

LANES, ROWS = tpu_chip.LANES, 16  # a row tile holds 16 tokens: one register of bfloat16
HALF = LANES // 2  # the cache pads heads to a multiple of it


def round_up(x: int, multiple: int) -> int:
    """The least multiple that is not below x."""
    return -(-x // multiple) * multiple


def divided(x: jax.Array, by: int) -> jax.Array:
    """The quotient, rounded down: a shift where it can be, for the scalar unit divides slowly."""
    if by & (by - 1):
        return x // by
    return lax.shift_right_arithmetic(x, jnp.int32(by.bit_length() - 1))


def remainder(x: jax.Array, by: int) -> jax.Array:
    """What `divided` leaves, not negative."""
    return x - divided(x, by) * by


class Masks(NamedTuple):
    """Which keys a query sees; as the contract has it."""

    causal: bool
    sliding_window: Window
    attention_chunk_size: int | None

    @property
    def has_start(self) -> bool:
        """Whether a query may not see the first keys."""
        return window_bounds(self.sliding_window)[0] is not None or bool(self.attention_chunk_size)

    def bounds(self, first_q: jax.Array, last_q: jax.Array, kv_len: jax.Array):
        """[start, stop) of the keys that some query of the range sees."""
        return seen_bounds(first_q, last_q, kv_len, **self._asdict())

    def bounds_of_all(self, first_q: jax.Array, last_q: jax.Array, start, stop):
        """[start, stop) of the keys that every query of the range sees."""
        left, right = window_bounds(self.sliding_window)
        if self.causal:
            stop = jnp.minimum(stop, first_q + 1)
        if left is not None:
            start = jnp.maximum(start, last_q - left + 1)
        if right is not None and not self.causal:
            stop = jnp.minimum(stop, first_q + right)
        if self.attention_chunk_size is not None:
            chunk = self.attention_chunk_size
            start = jnp.maximum(start, divided(last_q, chunk) * chunk)
            stop = jnp.minimum(stop, (divided(first_q, chunk) + 1) * chunk)
        return start, stop

    def limits(self, q_pos: jax.Array, start, stop):
        """(first, last) of the keys in [start, stop) that each query sees; first None = all."""
        left, right = window_bounds(self.sliding_window)
        chunk = self.attention_chunk_size
        last = jnp.broadcast_to(stop - 1, q_pos.shape)
        if self.causal:
            last = jnp.minimum(last, q_pos)
        if right is not None and not self.causal:
            last = jnp.minimum(last, q_pos + right - 1)
        if left is None and chunk is None:
            return None, last
        first = jnp.broadcast_to(start, q_pos.shape)
        if left is not None:
            first = jnp.maximum(first, q_pos - left + 1)
        if chunk is not None:
            of_chunk = divided(q_pos, chunk) * chunk
            first, last = jnp.maximum(first, of_chunk), jnp.minimum(last, of_chunk + chunk - 1)
        return first, last


class Geometry(NamedTuple):
    """Static sizes of one call.

    The cache is [num_pages, num_kv_heads, tiles, page_size, 128]. A head's key and value lie side
    by side, each in `stored_dim` lanes of all tiles' together: head_dim numbers, then zeros. Where
    that is half a register more, the register in the middle is read twice: a key is lanes [0,
    row_lanes), which end with the value's beginning (q is 0 there), and a value is row_lanes from
    v_start on, of which [v_offset, v_offset + head_dim) is the value.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int  # tokens that one copy brings: a page, or a part of a large one
    page_parts: int  # copies that bring a page; pages are such parts, wherever one is counted
    pages_per_seq: int
    num_tokens: int
    tile_tokens: int  # queries of a grid step
    block_pages: int  # pages of a block: what one buffer holds
    chunk_pages: int  # pages that prefill computes at once
    num_buffers: int
    decode_tokens: int  # of one sequence, that are computed as a decode at most
    in_columns: bool  # whether q and out come as [num_q_heads, head_dim, num_tokens]

    @property
    def group(self) -> int:
        """Query heads of one kv head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def shares(self) -> int:
        """Parts of a kv head's query heads: of one, prompts make products beside another's sums.

        Two where an odd number of kv heads would leave one without.
        """
        return 2 if self.num_kv_heads % 2 and self.group % 2 == 0 else 1

    @property
    def share(self) -> int:
        """Query heads of one share."""
        return self.group // self.shares

    @property
    def decode_rows(self) -> int:
        """Rows that one kv head's group takes among the 8 sublanes of a register, all tokens."""
        rows = self.group * self.decode_tokens
        return round_up(rows, 8) if rows >= 8 else 1 << (rows - 1).bit_length()

    @property
    def heads_at_once(self) -> int:
        """Kv heads that one product takes when decoding: two, where a head is half a register.

        Where the matrix unit is 128 wide, turning lanes takes longer than what it saves.
        """
        halves = self.stored_dim == HALF and self.num_kv_heads % 2 == 0
        return 2 if halves and tpu_chip.current().mxu > LANES else 1

    @property
    def all_decode_rows(self) -> int:
        """Rows of a decode's query heads, whole registers."""
        return round_up(self.num_kv_heads * self.decode_rows, 8)

    @property
    def stored_dim(self) -> int:
        """Lanes of a key in the cache, and of a value."""
        return round_up(self.head_dim, HALF)

    @property
    def row_lanes(self) -> int:
        """Lanes of a row that are read as a key, or as a value."""
        return round_up(self.head_dim, LANES)

    @property
    def v_start(self) -> int:
        """First lane of a row that is read as a value."""
        return self.stored_dim // LANES * LANES

    @property
    def v_offset(self) -> int:
        """Where the value begins among them."""
        return self.stored_dim - self.v_start

    @property
    def lse_lanes(self) -> int:
        """Lanes of one token's lse, whole registers."""
        return round_up(self.num_q_heads, LANES)

    @property
    def block_tokens(self) -> int:
        """Keys in a block."""
        return self.block_pages * self.page_size

    @property
    def chunks(self) -> int:
        """Chunks of a block."""
        return self.block_pages // self.chunk_pages

    @property
    def chunk_tokens(self) -> int:
        """Keys in a chunk."""
        return self.chunk_pages * self.page_size

    def keys(self, head: Any) -> jax.Array:
        """What is read as the keys of a head, [pages, tiles, page_size, 128]: [keys, row_lanes]."""
        return self._read(head, 0)

    def values(self, head: Any) -> jax.Array:
        """The same of its values."""
        return self._read(head, self.v_start // LANES)

    def _read(self, head: Any, first: int) -> jax.Array:
        tiles = range(first, first + self.row_lanes // LANES)
        rows = jnp.concatenate([head[:, tile] for tile in tiles], axis=-1)
        return rows.reshape(-1, self.row_lanes)

    def decode_row(self, q_head: int, token: int = 0) -> int:
        """The row of a query head of a decode's token, each token's group beside the one before."""
        of_kv_head, of_group = divmod(q_head, self.group)
        return of_kv_head * self.decode_rows + token * self.group + of_group
