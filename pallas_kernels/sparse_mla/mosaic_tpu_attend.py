"""The gathering half of sparse MLA on TPU: each token over the rows that it names, and no others.

Tokens go one after another, a token's list in groups of `buffers` blocks, a block being `block_kv`
keys. What bounds the kernel on every generation is the scalar unit, which makes one descriptor a
row; so a block's descriptors are made in the shadow of the vector and matrix units, in the same
straight run of code in which another block is multiplied. With 4 buffers, while group k turns::

    descriptors | 3 of k   | 0 of k+1 | 1 of k+1 | 2 of k+1    one for each row of the block
    DMA         | 0 1 2    | 1 2 3    | 2 3 0    | 3 0 1       rows on their way
    multiplied  | 0 of k   | 1 of k   | 2 of k   | 3 of k      unpack, q @ K.T, softmax, p @ V

The list of a block is brought to SMEM as soon as the block before it in that buffer has its
descriptors. Borders between tokens, and so between sequences, are no borders to the pipeline.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.sparse_mla.mosaic_tpu_positions import MASKED
from pallas_kernels.sparse_mla.mosaic_tpu_rows import Row, start_gather, unpack, wait_gather
from pallas_kernels.sparse_mla.mosaic_tpu_softmax import (
    Running,
    add_block,
    dot,
    finished,
    reset,
    running_shapes,
    scaled_logits,
)
from pallas_kernels.tpu_chip import LANES
from pallas_kernels.tpu_operands import operand_dtype


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is static of the attending half.

    Attributes:
        block_kv, buffers: see `Tiles`.
        num_heads: of the queries, a multiple of a packed register's rows.
        row: of the cache.
        q_dtype, cache_dtype: of queries and output; of the rows as they are stored.
        soft_cap: of the logits.
    """

    block_kv: int
    buffers: int
    num_heads: int
    row: Row
    q_dtype: jnp.dtype
    cache_dtype: jnp.dtype
    soft_cap: float | None

    @property
    def group(self) -> int:
        """Keys of a group."""
        return self.block_kv * self.buffers

    @property
    def precision(self) -> jax.lax.Precision | None:
        """Of both products."""
        return jax.lax.Precision.HIGHEST if self.q_dtype == jnp.float32 else None


class Arrays(NamedTuple):
    """The arrays in HBM; in SMEM groups of each token, the tokens, their number, factors."""

    ql_nope: Any
    q_pe: Any
    rows: Any
    bias: Any
    pages: Any
    out: Any
    lse: Any
    groups: Any
    tokens: Any
    num_tokens: Any
    factors: Any


class Cursor(NamedTuple):
    """Group `group` of the listed token `token`, row `at` of the arrays."""

    token: jax.Array
    group: jax.Array
    at: jax.Array


class Scratch(NamedTuple):
    """What it has in VMEM and SMEM, and its semaphores; a list has one for each buffer."""

    ql_nope: Any  # [2, num_heads, rank]: this token's, the next one's
    q_pe: Any  # [2, num_heads, rope_dim]
    bias: list[Any]  # float32 [1, block_kv]
    gathered: list[Any]  # [block_kv * parts, packed, 128], rows as they came
    rows_at: list[Any]  # SMEM int32 [1, block_kv]: where the next ones are
    keys: list[Any]  # [block_kv, rank + 128], operands beside the queries
    logits: list[Any]  # float32 [num_heads, block_kv]
    running: Running
    out: Any  # [2, num_heads, rank]
    lse: Any  # float32 [2, 1, num_heads]
    q_arrived: Any
    rows_arrived: Any
    lists_arrived: Any
    out_left: Any


def scratch_shapes(sizes: Sizes) -> Scratch:
    """The shapes of the scratch."""
    s, row = sizes, sizes.row
    return Scratch(
        ql_nope=pltpu.VMEM((2, s.num_heads, row.rank), s.q_dtype),
        q_pe=pltpu.VMEM((2, s.num_heads, row.rope_dim), s.q_dtype),
        bias=[pltpu.VMEM((1, s.block_kv), jnp.float32) for _ in range(s.buffers)],
        gathered=[
            pltpu.VMEM((s.block_kv * row.parts, row.packed, LANES), s.cache_dtype)
            for _ in range(s.buffers)
        ],
        rows_at=[pltpu.SMEM((1, s.block_kv), jnp.int32) for _ in range(s.buffers)],
        keys=[
            pltpu.VMEM((s.block_kv, row.rank + LANES), operand_dtype(s.cache_dtype, s.q_dtype))
            for _ in range(s.buffers)
        ],
        logits=[pltpu.VMEM((s.num_heads, s.block_kv), jnp.float32) for _ in range(s.buffers)],
        running=running_shapes(s.num_heads, row.rank),
        out=pltpu.VMEM((2, s.num_heads, row.rank), s.q_dtype),
        lse=pltpu.VMEM((2, 1, s.num_heads), jnp.float32),
        q_arrived=pltpu.SemaphoreType.DMA((2,)),
        rows_arrived=pltpu.SemaphoreType.DMA((s.buffers,)),
        lists_arrived=pltpu.SemaphoreType.DMA((s.buffers,)),
        out_left=pltpu.SemaphoreType.DMA((2,)),
    )


def attend_tokens(sizes: Sizes, arrays: Arrays) -> None:
    """Attends with every token of a sequence, and writes its output and lse."""

    @pl.when(arrays.num_tokens[0] > 0)
    def _():
        shapes, structure = jax.tree.flatten(scratch_shapes(sizes))

        def scoped(*scratch):
            _Attending(sizes, arrays, jax.tree.unflatten(structure, scratch)).run()

        pl.run_scoped(scoped, *shapes)


class _Attending:
    """The arguments of `attend_tokens`, and the phases of a group as methods."""

    def __init__(self, sizes, arrays, scratch):
        self.sizes, self.arrays, self.scratch = sizes, arrays, scratch
        self.num_tokens = arrays.num_tokens[0]
        # Read here: in a run the read waits for descriptors (v5e decode 208 us in place of 171).
        self.factors = [arrays.factors[i] for i in range(2)]

    def run(self) -> None:
        """Fills the pipeline, turns it until every token is through, and empties it."""
        blocks = range(self.sizes.buffers)
        current = Cursor(jnp.int32(0), jnp.int32(0), self.arrays.tokens[0])
        following = self._after(current)
        reset(self.scratch.running)
        self._start_query(current.token)
        for block in blocks:
            self._start_list(current, block)
        for block in blocks:
            self._wait_list(block)
            self._gather(block)
            self._start_bias(current, block)
            self._start_list(following, block)
        self._receive_query(current.token)
        self._wait_rows(0)
        self._multiply_keys(current.token, 0)

        def one_group(cursors):
            current, following = cursors
            after = self._after(following)
            for block in blocks:
                self._one_block(current, following, after, block)
            pl.when(current.group + 1 == self.arrays.groups[current.at])(
                lambda: self._finish(current.token)
            )
            return following, after

        def is_left(cursors):
            return cursors[0].token < self.num_tokens

        jax.lax.while_loop(is_left, one_group, (current, following))
        self._empty()

    def _one_block(self, current: Cursor, following: Cursor, after: Cursor, block: int) -> None:
        """A block at its values, the next one at its keys, and the one in its place on its way."""
        coming = block + 1 if block + 1 < self.sizes.buffers else 0
        of_coming = current if coming else following
        if not coming:
            is_new = (following.group == 0) & (following.token < self.num_tokens)
            pl.when(is_new)(lambda: self._receive_query(following.token))
        self._wait_list(block)
        self._wait_rows(coming)
        self._gather(block)
        self._multiply_keys(of_coming.token, coming)
        self._multiply_values(block)
        self._start_bias(following, block)
        self._start_list(after, block)

    def _empty(self) -> None:
        """Waits for everything on its way; past the last group, one more is: see `_of_block`."""
        for block in range(self.sizes.buffers):
            if block:
                self._wait_rows(block)
            self._wait_list(block)
        for back in (2, 1):
            token = self.num_tokens - back
            pl.when(token >= 0)(lambda token=token: self._each_output(token, _wait))

    # Where a group is.

    def _after(self, cursor: Cursor) -> Cursor:
        """The next group; the token after the last has one too, which is never come to."""
        is_last = cursor.group + 1 >= self.arrays.groups[cursor.at]
        token = cursor.token + is_last
        return Cursor(token, jnp.where(is_last, 0, cursor.group + 1), self._row(token))

    def _row(self, token: jax.Array) -> jax.Array:
        """The row of a listed token in the arrays; past the last one, that one's."""
        return self.arrays.tokens[jnp.minimum(token, self.num_tokens - 1)]

    # Copies.

    def _of_block(self, array: Any, cursor: Cursor, block: int) -> Any:
        """A block's part of what is known of lists; past the last token, of some that exists."""
        sizes = self.sizes
        first = (cursor.group * sizes.buffers + block) * sizes.block_kv
        at = pl.ds(pl.multiple_of(first, sizes.block_kv), sizes.block_kv)
        return array.at[cursor.at, :, at]

    def _start_list(self, cursor: Cursor, block: int) -> None:
        source, target = (
            self._of_block(self.arrays.rows, cursor, block),
            self.scratch.rows_at[block],
        )
        pltpu.make_async_copy(source, target, self.scratch.lists_arrived.at[block]).start()

    def _wait_list(self, block: int) -> None:
        target = self.scratch.rows_at[block]
        pltpu.make_async_copy(target, target, self.scratch.lists_arrived.at[block]).wait()

    def _gather(self, block: int) -> None:
        """Starts the copies of the rows of a block's list."""
        scratch = self.scratch
        start_gather(
            self.arrays.pages, scratch.rows_at[block], scratch.gathered[block],
            scratch.rows_arrived.at[block], self.sizes.row,
        )  # fmt: skip

    def _start_bias(self, cursor: Cursor, block: int) -> None:
        source, target = self._of_block(self.arrays.bias, cursor, block), self.scratch.bias[block]
        pltpu.make_async_copy(source, target, self.scratch.rows_arrived.at[block]).start()

    def _wait_rows(self, block: int) -> None:
        scratch = self.scratch
        sem = scratch.rows_arrived.at[block]
        pltpu.make_async_copy(scratch.bias[block], scratch.bias[block], sem).wait()
        wait_gather(scratch.gathered[block], sem)

    def _start_query(self, token: jax.Array) -> None:
        self._each_query(token, _start)

    def _each_query(self, token, act) -> None:
        """Starts or awaits the copies of a token's queries."""
        slot = token % 2
        for source, target in (
            (self.arrays.ql_nope, self.scratch.ql_nope),
            (self.arrays.q_pe, self.scratch.q_pe),
        ):
            sem = self.scratch.q_arrived.at[slot]
            act(pltpu.make_async_copy(source.at[self._row(token)], target.at[slot], sem))

    def _receive_query(self, token: jax.Array) -> None:
        """Waits for a token's queries, and calls for the next one's."""
        self._each_query(token, _wait)
        pl.when(token + 1 < self.num_tokens)(lambda: self._start_query(token + 1))

    def _each_output(self, token, act) -> None:
        """Starts or awaits the copies of a token's output and lse."""
        slot = token % 2
        for source, target in (
            (self.scratch.out, self.arrays.out),
            (self.scratch.lse, self.arrays.lse),
        ):
            sem = self.scratch.out_left.at[slot]
            act(pltpu.make_async_copy(source.at[slot], target.at[self._row(token)], sem))

    # Phases of a block.

    def _multiply_keys(self, token: jax.Array, block: int) -> None:
        """Unpacks a gathered block, and multiplies it with the queries of its token.

        Logits are left in base 2, MASKED where an entry names nothing.
        """
        sizes, scratch, row = self.sizes, self.scratch, self.sizes.row
        slot = token % 2
        keys = scratch.keys[block]
        unpack(scratch.gathered[block], keys, row)
        products = dot(scratch.ql_nope[slot], keys[:, : row.rank], (1, 1), sizes.precision)
        rotary = keys[:, row.rank : row.width]
        products += dot(scratch.q_pe[slot], rotary, (1, 1), sizes.precision)
        logits = scaled_logits(products, self.factors[0], sizes.soft_cap)
        scratch.logits[block][...] = jnp.where(scratch.bias[block][...] == 0, logits, MASKED)

    def _multiply_values(self, block: int) -> None:
        """Adds a block to the running softmax."""
        scratch, sizes = self.scratch, self.sizes
        values = scratch.keys[block].at[:, pl.ds(0, sizes.row.rank)]
        logits = scratch.logits[block][...]
        add_block(scratch.running, ..., logits, values, sizes.q_dtype, sizes.precision)

    def _finish(self, token: jax.Array) -> None:
        """Divides, sends a token's output and lse off, and makes room for the next token."""
        scratch, slot = self.scratch, token % 2
        pl.when(token >= 2)(lambda: self._each_output(token - 2, _wait))
        out, lse = finished(scratch.running, self.factors[1])
        scratch.out[slot] = out.astype(self.sizes.q_dtype)
        scratch.lse[slot] = lse.T[:1]
        self._each_output(token, _start)
        reset(scratch.running)


def _start(copy: Any) -> None:
    copy.start()


def _wait(copy: Any) -> None:
    copy.wait()
