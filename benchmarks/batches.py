"""A work's batch as arrays: lengths, page tables and positions as numbers, the rest as shapes.

Numbers are what steers a kernel (`stand_ins` puts them into it); of the rest only shapes matter.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.work import Work


@dataclasses.dataclass(frozen=True)
class Program:
    """A call that can be compiled.

    Attributes:
        function: of the arguments, in order.
        arguments: arrays by shape (`jax.ShapeDtypeStruct`), or NumPy integers with their values.
        donated: positions of arguments that the call may write into (caches).
        writes_cache: see `Work.floor_bytes`.
    """

    function: Any
    arguments: tuple[Any, ...]
    donated: tuple[int, ...] = ()
    writes_cache: bool = True


def floats(*shape: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
    """An array's shape."""
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def page_table(work: Work) -> np.ndarray:
    """[num_seqs, pages_per_seq]: every page once, in no order; 0 past a sequence's end."""
    pages = [-(-n // work.page_size) for n in work.kv_lens]
    table = np.zeros((len(pages), max(pages)), np.int32)
    shuffled = np.random.default_rng(1).permutation(sum(pages)).astype(np.int32)
    at = 0
    for row, count in zip(table, pages, strict=True):
        row[:count] = shuffled[at : at + count]
        at += count
    return table


def num_pages(work: Work) -> int:
    """Pages that the batch fills."""
    return sum(-(-n // work.page_size) for n in work.kv_lens)


def kv_lens(work: Work) -> np.ndarray:
    """[num_seqs]: keys of each sequence."""
    return np.array(work.kv_lens, np.int32)


def cu_q_lens(work: Work) -> np.ndarray:
    """[num_seqs + 1]: where each sequence's new tokens begin."""
    return np.concatenate([[0], np.cumsum(work.q_lens)]).astype(np.int32)


def slot_mapping(work: Work) -> np.ndarray:
    """[num_tokens]: where this step's keys go."""
    table, slots = page_table(work), []
    for row, q, n in zip(table, work.q_lens, work.kv_lens, strict=True):
        positions = np.arange(n - q, n)
        slots.append(row[positions // work.page_size] * work.page_size + positions % work.page_size)
    return np.concatenate(slots).astype(np.int32)


def topk_indices(work: Work) -> np.ndarray:
    """[num_tokens, topk]: positions of each token, in no order; -1 where it sees too few."""
    rng, rows = np.random.default_rng(2), []
    for q, n in zip(work.q_lens, work.kv_lens, strict=True):
        for seen in range(n - q + 1, n + 1):
            row = np.full(work.topk, -1, np.int32)
            chosen = rng.permutation(seen)[: work.topk]
            row[: len(chosen)] = chosen
            rows.append(row)
    return np.stack(rows)
