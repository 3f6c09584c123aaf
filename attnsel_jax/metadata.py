"""The ragged batch of one step: who has how many new tokens, and where their keys live.

`AttentionMetadata` is the pytree that kernels read. It is built on the host from lengths and page
tables (`AttentionMetadata.from_lengths`), or from vLLM's words (`vllm_metadata`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnsel_jax.pytrees import exportable_pytree
from attnsel_jax.static_arguments import check_int32, count, flag, is_integer, refuse_traced

INT32_MAX = 2**31 - 1


@exportable_pytree
@dataclasses.dataclass(frozen=True)
class AttentionMetadata:
    """A ragged batch, as the op contracts of `pallas_kernels.paged` name its parts.

    Attributes:
        page_table: int32 [max_num_seqs, pages_per_seq].
        kv_lens: int32 [max_num_seqs]: positions in the cache, this step's included.
        cu_q_lens: int32 [max_num_seqs + 1]: cumulative query lengths, from 0; of several groups
            (see `grouped`) [max_num_seqs + groups], from 0 in each.
        num_seqs: int32 []: sequences that exist; of several groups [groups], those of each.
        slot_mapping: int32 [num_tokens], page * page_size + offset, -1 = nowhere; None where this
            step writes nothing.
        causal: static; False for encoder and cross attention.
    """

    page_table: jax.Array
    kv_lens: jax.Array
    cu_q_lens: jax.Array
    num_seqs: jax.Array
    slot_mapping: jax.Array | None = None
    causal: bool = dataclasses.field(default=True, metadata={"static": True})

    def arrays(self) -> dict[str, jax.Array | None]:
        """The batch by the contracts' names."""
        names = ("page_table", "kv_lens", "cu_q_lens", "num_seqs", "slot_mapping")
        return {name: getattr(self, name) for name in names}

    @staticmethod
    def grouped(batches: Sequence["AttentionMetadata"]) -> "AttentionMetadata":
        """Batches side by side, as shards of a data-parallel mesh hold them.

        Each array is shared out by its first dimension, and so are the tokens and the pages: group
        i's tokens are the i-th part of q, and the pages that it names lie in the shard that holds
        the group. Page ids and slots are of the whole cache.

        Args:
            batches: of equal sizes (pad them in `from_lengths`).

        Raises:
            ValueError: none, batches of unequal sizes, or of groups.
        """
        shapes = [jax.tree.map(jnp.shape, batch) for batch in batches]
        if not shapes or any(shape != shapes[0] for shape in shapes) or shapes[0].num_seqs:
            raise ValueError(
                f"batches have shapes {shapes}, must be at least one, all alike and of one group "
                f"each: pad them to the same num_tokens, max_num_seqs and pages_per_seq"
            )
        return jax.tree.map(
            lambda *parts: jnp.concatenate([jnp.atleast_1d(part) for part in parts]), *batches
        )

    @staticmethod
    def from_lengths(
        q_lens: Sequence[int],
        kv_lens: Sequence[int],
        page_table: Sequence[Sequence[int]],
        page_size: int,
        *,
        num_tokens: int | None = None,
        max_num_seqs: int | None = None,
        pages_per_seq: int | None = None,
        writes: bool = True,
        causal: bool = True,
    ) -> "AttentionMetadata":
        """Builds the batch on the host; what is padded holds zeros, and -1 in the slot mapping.

        Args:
            q_lens: new tokens of each sequence.
            kv_lens: cached positions of each sequence, the new tokens included.
            page_table: the pages of each sequence, in order; rows may differ in length.
            page_size: tokens in a page.
            num_tokens, max_num_seqs, pages_per_seq: sizes to pad to; None = as many as there are.
            writes: whether this step's keys and values go to the cache (the last q_lens[i] of
                kv_lens[i] positions); False gives no slot mapping.
            causal: False for encoder and cross attention.

        Raises:
            ValueError: a negative length, a sequence with more positions than its pages hold, or
                more of something than its padded size.
        """
        page_size, writes = count("page_size", page_size, optional=False), flag("writes", writes)
        q_lens, kv_lens = _integers("q_lens", q_lens), _integers("kv_lens", kv_lens)
        page_table = [_integers(f"page_table[{i}]", row) for i, row in enumerate(page_table)]
        _check_lengths(q_lens, kv_lens, page_table, page_size, writes)
        rows = max((len(row) for row in page_table), default=1)
        sizes = {
            "num_tokens": (num_tokens, int(sum(q_lens))),
            "max_num_seqs": (max_num_seqs, max(len(q_lens), 1)),
            "pages_per_seq": (pages_per_seq, max(rows, 1)),
        }
        tokens, seqs, pages = (_padded_size(name, *pair) for name, pair in sizes.items())
        table = np.zeros((seqs, pages), np.int32)
        for i, row in enumerate(page_table):
            table[i, : len(row)] = row
        lens = np.zeros(seqs, np.int32)
        lens[: len(kv_lens)] = kv_lens
        cu_q_lens = np.full(seqs + 1, sum(q_lens), np.int32)
        cu_q_lens[: len(q_lens) + 1] = np.concatenate([[0], np.cumsum(q_lens)])
        slots = np.full(tokens, -1, np.int32)
        for i, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
            positions = np.arange(kv_len - q_len, kv_len) if writes else np.arange(0)
            first = cu_q_lens[i]
            slots[first : first + len(positions)] = (
                table[i, positions // page_size] * page_size + positions % page_size
            )
        return AttentionMetadata(
            page_table=jnp.asarray(table),
            kv_lens=jnp.asarray(lens),
            cu_q_lens=jnp.asarray(cu_q_lens),
            num_seqs=jnp.asarray(len(q_lens), jnp.int32),
            slot_mapping=jnp.asarray(slots) if writes else None,
            causal=flag("causal", causal),
        )


def check_is_batch(metadata: Any) -> None:
    """Refuses another class of batch, vLLM's words among them, and parts that are no arrays.

    Raises:
        TypeError: it is of another, or has such.
        ValueError: an integer on the host is no int32.
    """
    if not isinstance(metadata, AttentionMetadata):
        raise TypeError(
            f"metadata is {type(metadata).__name__}, must be AttentionMetadata: build it with "
            f"AttentionMetadata.from_lengths, or by the backend's builder"
        )
    for name, array in metadata.arrays().items():
        if array is None and name == "slot_mapping":
            continue
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise TypeError(
                f"metadata.{name} is {type(array).__name__}, must be an array: convert it with "
                f"jnp.asarray"
            )
        check_int32(f"metadata.{name}", array)


def _integers(name: str, values) -> np.ndarray:
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(values)):
        raise ValueError(
            f"{name} is traced by jit, vmap or grad, must be numbers: build the batch outside, and "
            f"pass it as an argument"
        )
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(
            f"{name} is {array.dtype.name}{list(array.shape)}, must be a row of integers"
        )
    return array.astype(np.int64)


def _padded_size(name: str, asked: int | None, needed: int) -> int:
    if asked is None:
        return needed
    refuse_traced(name, asked)
    if not is_integer(asked):
        raise ValueError(f"{name} is {asked!r}, must be an integer, or None")
    if asked < needed:
        raise ValueError(f"{name} is {asked}, must be at least {needed}, what the batch has")
    return asked.__index__()


def _check_lengths(q_lens, kv_lens, page_table, page_size, writes) -> None:
    """Refuses a batch that cannot be."""
    if not len(q_lens) == len(kv_lens) == len(page_table):
        raise ValueError(
            f"q_lens, kv_lens and page_table have {len(q_lens)}, {len(kv_lens)} and "
            f"{len(page_table)} sequences, must have as many"
        )
    for i, (q_len, kv_len, row) in enumerate(zip(q_lens, kv_lens, page_table, strict=True)):
        if q_len < 0 or kv_len < 0:
            name, value = ("q_lens", q_len) if q_len < 0 else ("kv_lens", kv_len)
            raise ValueError(f"{name}[{i}] is {value}, must be at least 0")
        if writes and q_len > kv_len:
            raise ValueError(
                f"q_lens[{i}] is {q_len}, must be at most kv_lens[{i}], {kv_len}, which counts "
                f"this step's tokens too; or pass writes=False"
            )
        if kv_len > len(row) * page_size:
            raise ValueError(
                f"kv_lens[{i}] is {kv_len}, must be at most {len(row) * page_size}: its "
                f"{len(row)} pages hold {page_size} tokens each"
            )
        used = row[: -(-kv_len // page_size)]
        most = (INT32_MAX + 1) // page_size - 1 if writes else INT32_MAX  # slots are int32, too
        outside = (used < 0) | (used > most)
        if outside.any():
            j = int(np.argmax(outside))
            raise ValueError(
                f"page_table[{i}][{j}] is {row[j]}, must be 0 to {most}: kv_lens[{i}] is "
                f"{kv_len}, so that page is read"
            )
