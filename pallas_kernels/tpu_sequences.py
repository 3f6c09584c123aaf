"""Ragged batches whose page table is larger than SMEM: a kernel takes some sequences at a time.

A TPU kernel looks pages up in SMEM, 1 MiB: 256 sequences of 1024 pages are too many. Each part of
the sequences is a call of its own, over the tokens rotated until the part's are the first. The
first call writes all of this step's rows, since pages may be shared.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.tpu_chip import LANES, SMEM_BYTES, SMEM_RESERVED, SmemError

WRITTEN = ("k", "v", "kv_c", "k_pe", "slot_mapping")
OF_TOKENS = ("q", "ql_nope", "q_pe", "topk_indices", "q_index", "weights")
PAGES = ("kv_pages", "latent_pages")


class Needs(NamedTuple):
    """SMEM that a kernel takes, in bytes.

    Attributes:
        token: for each token.
        seq: for each sequence, its row of the page table left out.
    """

    token: int
    seq: int


def some_sequences_at_a_time(needs: Needs) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator of a ragged kernel's door: calls it as often as its page table needs."""

    def decorate(door: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(door)

        @functools.wraps(door)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            most = _most_sequences(given, needs)
            if most is None or most >= given["page_table"].shape[0]:
                return door(**given)
            return _in_parts(door, given, most)

        return call

    return decorate


def _most_sequences(given: Mapping[str, Any], needs: Needs) -> int | None:
    """How many sequences fit SMEM, one at least; None where the door will refuse the arguments.

    Raises:
        ValueError: the row of one sequence does not fit, whatever else is there.
    """
    tokens = next(given[name] for name in OF_TOKENS if name in given)
    table = given["page_table"]
    if getattr(tokens, "ndim", 0) != 3 or getattr(table, "ndim", 0) != 2:
        return None
    row = 4 * -(-table.shape[1] // LANES) * LANES
    if row > SMEM_BYTES:
        raise ValueError(
            f"page_table has {table.shape[1]} pages a sequence, must have at most "
            f"{SMEM_BYTES // 4}, which a TPU's SMEM holds: use larger pages, or an XLA backend"
        )
    free = SMEM_BYTES - SMEM_RESERVED - needs.token * tokens.shape[0]
    return max(1, free // (row + needs.seq))


def _in_parts(door: Callable[..., Any], given: dict[str, Any], most: int) -> Any:
    """The call, with at most so many sequences at a time."""
    _check_whole_call(door, given)
    part, parts = _cut(given, most)
    tokens = {name: given[name] for name in OF_TOKENS if name in given}
    pages = [name for name in PAGES if name in given]
    *found, cache = _results(door(**given | part(0)), pages)
    reads = given | {name: None for name in WRITTEN if name in given}

    def one_more(i: jax.Array, carry: tuple[list[jax.Array], Any]) -> tuple[list[jax.Array], Any]:
        found, cache = carry
        mine = part(i)
        first, stop = mine["cu_q_lens"][0], mine["cu_q_lens"][mine["num_seqs"]]
        turned = {name: jnp.roll(x, -first, axis=0) for name, x in tokens.items()}
        mine |= turned | {"cu_q_lens": mine["cu_q_lens"] - first} | dict.fromkeys(pages, cache)
        *more, cache = _results(door(**reads | mine), pages)

        def joined(old: jax.Array, new: jax.Array) -> jax.Array:
            token = jax.lax.broadcasted_iota(jnp.int32, old.shape, 0)
            return jnp.where((token >= first) & (token < stop), jnp.roll(new, first, axis=0), old)

        return jax.tree.map(joined, found, more), cache

    found, cache = jax.lax.fori_loop(1, parts, one_more, (found, cache))
    return (*found, cache) if pages else found[0]


def _check_whole_call(door: Callable[..., Any], given: dict[str, Any]) -> None:
    """Lets the door check the whole call; raises what it raises, but that SMEM is too small."""
    arrays = {name: x for name, x in given.items() if hasattr(x, "dtype")}
    static = {name: x for name, x in given.items() if name not in arrays}
    with contextlib.suppress(SmemError):
        jax.eval_shape(lambda arrays: door(**arrays, **static), arrays)


def _cut(
    given: Mapping[str, Any], most: int
) -> tuple[Callable[[int | jax.Array], dict[str, jax.Array]], int]:
    """A function from a part's number to its batch, and how many parts there are."""
    max_num_seqs = given["page_table"].shape[0]
    parts = -(-max_num_seqs // most)
    size = -(-max_num_seqs // parts)
    missing = parts * size - max_num_seqs
    whole = {
        "page_table": jnp.pad(given["page_table"], ((0, missing), (0, 0))),
        "kv_lens": jnp.pad(given["kv_lens"], (0, missing)),
        "cu_q_lens": jnp.pad(given["cu_q_lens"], (0, missing)),
    }

    def part(i: int | jax.Array) -> dict[str, jax.Array]:
        of_part = {
            name: jax.lax.dynamic_slice_in_dim(x, i * size, size + (name == "cu_q_lens"))
            for name, x in whole.items()
        }
        return of_part | {"num_seqs": jnp.clip(given["num_seqs"] - i * size, 0, size)}

    return part, parts


def _results(results: Any, pages: list[str]) -> tuple[Any, ...]:
    """Results of tokens, and the cache, last; None where the kernel gives none."""
    return results if pages else (results, None)
