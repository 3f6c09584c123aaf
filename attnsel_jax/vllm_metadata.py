"""A batch in vLLM's words, and the one translator into the words that kernels read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from attnsel_jax.metadata import INT32_MAX, AttentionMetadata
from attnsel_jax.static_arguments import (
    check_int32,
    count,
    flag,
    is_integer,
    on_host,
    refuse_traced,
)


@dataclasses.dataclass(frozen=True)
class CommonAttentionMetadata:
    """A batch in vLLM's words, arrays on the host or on the device.

    Attributes:
        query_start_loc: [num_reqs + 1] cumulative query lengths.
        seq_lens: [num_reqs] cached positions, this step's included.
        num_reqs: sequences that exist; may be fewer than the arrays have rows.
        num_actual_tokens: tokens that exist; q may be padded past them.
        max_query_len, max_seq_len: of this batch.
        block_table_tensor: [num_reqs, blocks_per_seq].
        slot_mapping: [num_tokens] block * block_size + offset, -1 = nowhere.
        causal: False for encoder and cross attention.
    """

    query_start_loc: jax.Array | np.ndarray
    seq_lens: jax.Array | np.ndarray
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: jax.Array | np.ndarray
    slot_mapping: jax.Array | np.ndarray | None
    causal: bool = True


class AttentionMetadataBuilder:
    """Translates vLLM's batch into the kernels' words; the only place that knows both."""

    def __init__(self, block_size: int):
        self.block_size = count("block_size", block_size, optional=False)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata
    ) -> AttentionMetadata:
        """The batch as kernels read it.

        Args:
            common_prefix_len: tokens that all sequences share; a hint, no lowering here uses it,
                so it must be 0.
            common_attn_metadata: the batch in vLLM's words.

        Raises:
            TypeError: another class of batch.
            ValueError: a common prefix is asked for, the numbers do not fit the arrays, or lengths
                on the host make no sense (those on a device are not waited for).
        """
        if common_prefix_len:
            raise ValueError(
                f"common_prefix_len is {common_prefix_len}, must be 0: no backend here has cascade "
                f"attention; sequences that share pages may name them in their own tables"
            )
        common = common_attn_metadata
        if not isinstance(common, CommonAttentionMetadata):
            raise TypeError(
                f"common_attn_metadata is {type(common).__name__}, must be CommonAttentionMetadata"
            )
        self._check(common)
        slots = common.slot_mapping
        return AttentionMetadata(
            page_table=_int32("block_table_tensor", common.block_table_tensor),
            kv_lens=_int32("seq_lens", common.seq_lens),
            cu_q_lens=_int32("query_start_loc", common.query_start_loc),
            num_seqs=jnp.asarray(common.num_reqs, jnp.int32),
            slot_mapping=None if slots is None else _int32("slot_mapping", slots),
            causal=flag("causal", common.causal),
        )

    def _check(self, common: CommonAttentionMetadata) -> None:
        """Refuses numbers that the arrays have no room for."""
        rows, width = _shape("block_table_tensor", common.block_table_tensor, 2)
        (lens,) = _shape("seq_lens", common.seq_lens, 1)
        (starts,) = _shape("query_start_loc", common.query_start_loc, 1)
        if lens != rows or starts != rows + 1:
            raise ValueError(
                f"seq_lens has {lens} and query_start_loc {starts} entries, must have {rows} and "
                f"{rows + 1}: block_table_tensor has {rows} rows"
            )
        tokens, of_tokens = INT32_MAX, "an int32"
        if common.slot_mapping is not None:
            (tokens,) = _shape("slot_mapping", common.slot_mapping, 1)
            of_tokens = "the entries of slot_mapping"
        limits = {
            "num_reqs": (rows, "the rows of block_table_tensor"),
            "max_seq_len": (width * self.block_size, f"{width} blocks of {self.block_size}"),
            "num_actual_tokens": (tokens, of_tokens),
            "max_query_len": (tokens, of_tokens),
        }
        for name, (limit, source) in limits.items():
            value = getattr(common, name)
            refuse_traced(name, value)
            if not is_integer(value) or not 0 <= value <= limit:
                raise ValueError(f"{name} is {value!r}, must be 0 to {limit}, {source}")
        _check_lengths(common)


def _check_lengths(common: CommonAttentionMetadata) -> None:
    """Refuses lengths on the host that make no sense, or exceed what is said to be their most."""
    starts, lens = on_host(common.query_start_loc), on_host(common.seq_lens)
    seqs = int(common.num_reqs)
    if lens is not None:
        lens = lens[:seqs]
        wrong = (lens < 0) | (lens > common.max_seq_len)
        _refuse_first("seq_lens", lens, wrong, f"0 to max_seq_len, {common.max_seq_len}")
    if starts is None:
        return
    starts = starts[: seqs + 1].astype(np.int64)
    q_lens, tokens, longest = np.diff(starts), common.num_actual_tokens, common.max_query_len
    _refuse_first("query_start_loc", starts, (starts != 0) & (np.arange(seqs + 1) == 0), "0")
    falls = np.append(False, q_lens < 0)
    _refuse_first("query_start_loc", starts, falls, "at least the entry before it: a sum so far")
    wrong = starts > tokens
    _refuse_first("query_start_loc", starts, wrong, f"at most num_actual_tokens, {tokens}")
    wrong = np.append(False, q_lens > longest)
    most = f"at most max_query_len, {longest}, above the entry before it"
    _refuse_first("query_start_loc", starts, wrong, most)
    if lens is not None and common.slot_mapping is not None and common.causal:
        wrong = lens < q_lens
        _refuse_first("seq_lens", lens, wrong, "at least the query's length, which it counts too")


def _refuse_first(name: str, values: np.ndarray, wrong: np.ndarray, allowed: str) -> None:
    """Refuses the first of the values that is wrong, if one is."""
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ValueError(f"{name}[{i}] is {values[i]}, must be {allowed}")


def _shape(name: str, array, rank: int) -> tuple[int, ...]:
    try:
        shape = np.shape(array)
    except ValueError as error:  # a list of lists of several lengths
        raise ValueError(f"{name} has rows of several lengths, must be an array: pad it") from error
    if len(shape) != rank:
        raise ValueError(f"{name} has {len(shape)} dimensions {shape}, must have {rank}")
    return shape


def _int32(name: str, array) -> jax.Array:
    check_int32(name, array)
    dtype = jnp.asarray(array).dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {dtype}, must be an integer dtype")
    return jnp.asarray(array, jnp.int32)
