"""What each dimension of each op's arguments is, as far as a mesh can share it out.

The order of an op's arguments is its contract's, so the first ones are those that kernels take by
position. A dimension called "-" is never shared out. "keys" is every key of a sequence, on each
device, where a sequence's positions are shared out: what is added to a logit, or hides it, has both
its query and its key, and one axis cuts one dimension.
"""

from collections.abc import Mapping
from typing import Any

import jax

from attnsel_jax.cache_layouts import latent_layout_named, layout_named

LOGITS = "batch heads q_len keys"
_BATCH = {
    "page_table": "seqs -",
    "kv_lens": "seqs",
    "cu_q_lens": "starts",
    "num_seqs": "groups",
    "slot_mapping": "tokens",
}
_LATENT = {
    "ql_nope": "tokens heads -",
    "q_pe": "tokens heads -",
    "kv_c": "tokens -",
    "k_pe": "tokens -",
    "latent_pages": "pages ...",  # a layout has as many dimensions as it likes
}
ARGUMENTS: dict[str, dict[str, str]] = {
    "dense": {
        "q": "batch q_len heads -",
        "k": "batch kv_len kv_heads -",
        "v": "batch kv_len kv_heads -",
        "bias": LOGITS,
        "alibi_slopes": "heads",
        "mask": LOGITS,
        "q_segment_ids": "batch q_len",
        "kv_segment_ids": "batch kv_len",
        "q_lens": "batch",
        "kv_lens": "batch",
        "sinks": "heads",
        "q_offset": "batch",
    },
    "paged": {
        "q": "tokens heads -",
        "k": "tokens kv_heads -",
        "v": "tokens kv_heads -",
        "kv_pages": "",  # its layout says
        **_BATCH,
        "alibi_slopes": "heads",
        "sinks": "heads",
        "k_scale": "cache_heads",
        "v_scale": "cache_heads",
    },
    "mla": {**_LATENT, **_BATCH, "kv_scale": ""},
    "sparse_mla": {**_LATENT, "topk_indices": "tokens -", **_BATCH, "kv_scale": ""},
    "indexer_scores": {
        "q_index": "tokens heads -",
        "weights": "tokens heads",
        "index_pages": "pages - -",
        **{name: dims for name, dims in _BATCH.items() if name != "slot_mapping"},
    },
    "topk_positions": {"scores": "tokens -"},
}
# Calls that fill a cache without attending. Their result is the cache.
FILLING: dict[str, dict[str, str]] = {
    "write_kv": {
        "k": "tokens kv_heads -",
        "v": "tokens kv_heads -",
        "kv_pages": "",
        "slot_mapping": "tokens",
        "k_scale": "cache_heads",
        "v_scale": "cache_heads",
    },
    "write_latents": {
        "kv_c": "tokens -",
        "k_pe": "tokens -",
        "latent_pages": "pages ...",
        "slot_mapping": "tokens",
        "kv_scale": "",
    },
    "write_index_keys": {
        "k_index": "tokens -", "index_pages": "pages - -", "slot_mapping": "tokens",
    },
    "copy_kv": {"kv_pages": "", "source": "-", "target": "-"},
    "copy_latents": {"latent_pages": "pages ...", "source": "-", "target": "-"},
    "copy_index_keys": {"index_pages": "pages - -", "source": "-", "target": "-"},
}  # fmt: skip
CACHES = {
    "paged": "kv_pages", "mla": "latent_pages", "sparse_mla": "latent_pages",
    "indexer_scores": "index_pages", "write_kv": "kv_pages", "write_latents": "latent_pages",
    "write_index_keys": "index_pages", "copy_kv": "kv_pages", "copy_latents": "latent_pages",
    "copy_index_keys": "index_pages",
}  # fmt: skip
RESULTS: dict[str, tuple[str, ...]] = {
    "dense": ("batch q_len heads -", "batch q_len heads"),
    "paged": ("tokens heads -", "tokens heads", "kv_pages"),
    "mla": ("tokens heads -", "tokens heads", "latent_pages"),
    "sparse_mla": ("tokens heads -", "tokens heads", "latent_pages"),
    "indexer_scores": ("tokens -",),
    "topk_positions": ("tokens -",),
}
POSITIONAL = {
    "dense": 3, "paged": 9, "mla": 10, "sparse_mla": 11, "indexer_scores": 7, "topk_positions": 1,
}  # fmt: skip

Dims = tuple[str, ...]


def dimensions(
    op: str, arrays: Mapping[str, jax.Array], layout: str = "stacked"
) -> dict[str, Dims]:
    """The dimensions of a call's arrays, by argument.

    Args:
        op: a key of `ARGUMENTS` or `FILLING`.
        arrays: the call's arrays by name, those that are given.
        layout: of the paged cache.
    """
    said = ARGUMENTS.get(op) or FILLING[op]
    return {name: _dims(said[name], name, array, layout) for name, array in arrays.items()}


def _dims(said: str, name: str, array: jax.Array, layout: str) -> Dims:
    if name == "kv_pages":
        return _cache_dims(array.shape, layout)
    dims = tuple(said.split()) if array.ndim else ()
    if dims[1:] == ("...",):
        dims = (dims[0], *"-" * (array.ndim - 1))
    if said == LOGITS:  # a size of 1 stands for all
        dims = tuple("-" if size == 1 else d for d, size in zip(dims, array.shape, strict=True))
    return dims


def _cache_dims(shape: tuple[int, ...], layout: str) -> Dims:
    """Where a layout has its pages and its heads: the dimensions that double when they do."""
    of = layout_named(layout)
    logical = of.dims(shape)
    named = ["-"] * len(shape)
    for index, name in ((0, "pages"), (2, "cache_heads")):
        doubled = [size * (1 + (i == index)) for i, size in enumerate(logical)]
        for axis, (size, more) in enumerate(zip(shape, of.shape(*doubled), strict=True)):
            if more == 2 * size:
                named[axis] = name
    return tuple(named)


def page_counts(op: str, pages: jax.Array, layout: str) -> tuple[int, int]:
    """(num_pages, page_size) of a cache."""
    if CACHES[op] == "index_pages":
        return pages.shape[:2]
    of = layout_named(layout) if CACHES[op] == "kv_pages" else latent_layout_named(layout)
    return of.dims(pages.shape)[:2]


def by_name(op: str, positional: tuple[Any, ...], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """A kernel call's arguments by name."""
    return dict(zip(ARGUMENTS[op], positional, strict=False)) | dict(keywords)
