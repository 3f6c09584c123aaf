"""A ragged batch of several groups: each group's own sequences, tokens and pages, side by side.

A shard of a data-parallel mesh holds some of the groups, and their pages. Kernels take one group at
a time, and pages counted from the first that lies here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnsel_jax.mesh.dimensions import CACHES, RESULTS, page_counts
from attnsel_jax.mesh.plan import Plan
from attnsel_jax.metadata import AttentionMetadata

Arrays = dict[str, jax.Array]
TOKENS = (
    "q", "k", "v", "ql_nope", "q_pe", "kv_c", "k_pe", "topk_indices", "slot_mapping", "q_index",
    "weights",
)  # fmt: skip
CUT = (*TOKENS, "page_table", "kv_lens", "cu_q_lens", "num_seqs")


def attend(kernel: Callable[..., Any], op: str, arrays: Arrays) -> tuple[jax.Array, ...]:
    """What the kernel returns, of all groups: rows one after another, then the cache as written.

    Args:
        kernel: takes the arrays of one group by name.
        op: a key of `CACHES` that attends.
        arrays: of all groups, one after another along their first dimension; num_seqs is
            [groups], or [] where there is one.
    """
    if arrays["num_seqs"].ndim == 0:
        return kernel(arrays)
    count, cache = arrays["num_seqs"].shape[0], CACHES[op]
    pages, parts, writes = arrays[cache], [], cache in RESULTS[op]
    for i in range(count):
        mine = {n: _part(a, i, count) if n in CUT else a for n, a in arrays.items()}
        mine |= {"num_seqs": arrays["num_seqs"][i], cache: pages}
        part = kernel(mine)
        if writes:
            *part, pages = part
        parts.append(part)
    whole = tuple(jnp.concatenate(rows) for rows in zip(*parts, strict=True))
    return (*whole, pages) if writes else whole


def groups_of(metadata: AttentionMetadata) -> list[AttentionMetadata]:
    """The batches that `AttentionMetadata.grouped` put together; itself, where it is one."""
    if metadata.num_seqs.ndim == 0:
        return [metadata]
    count = metadata.num_seqs.shape[0]
    cut = {
        name: [_part(array, i, count) for i in range(count)]
        for name, array in metadata.arrays().items()
        if array is not None
    }
    cut["num_seqs"] = [metadata.num_seqs[i] for i in range(count)]
    return [
        dataclasses.replace(metadata, **{name: mine[i] for name, mine in cut.items()})
        for i in range(count)
    ]


def with_own_pages(op: str, arrays: Arrays, plan: Plan, layout: str) -> Arrays:
    """The arrays of a shard with page ids and slots counted from the first page that lies here.

    What lies elsewhere has a negative slot, so it is written nowhere here.
    """
    axes = plan.axes("pages")
    if not axes:
        return arrays
    num_pages, page_size = page_counts(op, arrays[CACHES[op]], layout)
    first = jax.lax.axis_index(axes) * num_pages
    moved = {"page_table": arrays["page_table"] - first} if "page_table" in arrays else {}
    if "slot_mapping" in arrays:
        slots, here = arrays["slot_mapping"], num_pages * page_size
        slots = jnp.where(slots >= 0, slots - first * page_size, -1)
        moved["slot_mapping"] = jnp.where((slots >= 0) & (slots < here), slots, -1)
    return arrays | moved


def _part(array: jax.Array, i: int, count: int) -> jax.Array:
    size = array.shape[0] // count
    return array[i * size : (i + 1) * size]
