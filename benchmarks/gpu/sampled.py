"""Holds a large call's output to the float64 oracle where that is affordable: the last queries.

Of the last sequence, the last few queries of the heads that share the first kv head, against all
their keys. The whole contract is checked by `checks.py` on smaller calls; this one sees that the
very call that is timed is right, odd grids and large offsets included.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.cache_layouts import LATENT_LAYOUTS, LAYOUTS
from attnsel_jax.compare.deviations import Deviation, deviation
from attnsel_jax.compare.expected import expected
from benchmarks.work import Work

QUERIES, LATENT_HEADS = 16, 16


def sampled_deviation(
    work: Work, arguments: Mapping[str, Any], out: Any, backend: type[AttentionBackend] | None
) -> Deviation:
    """How far the sampled part of an output is from the oracle's.

    Args:
        work: what was computed.
        arguments: the contract's arrays by name, the cache in the backend's layout; what is written
            in this step is None.
        out: the output of the call.
        backend: whose layout the cache has; None = dense.
    """
    if work.op == "dense":
        part, rows = _dense(work, arguments)
    elif work.op == "paged":
        part, rows = _paged(work, arguments, LAYOUTS[backend.layout])
    else:
        part, rows = _latent(work, arguments, LATENT_LAYOUTS[backend.latent_layout])
    part = {name: _host(value) for name, value in part.items()}
    return deviation("out", _host(out[rows]), expected(work.op, part)["out"])


def _host(value: Any) -> Any:
    return np.asarray(value) if isinstance(value, jax.Array) else value


def _dense(work: Work, given: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    group = work.num_heads // work.num_kv_heads
    length = max(work.q_lens)
    first = max(0, length - QUERIES)
    rows = (slice(-1, None), slice(first, None), slice(0, group))
    part = {
        "q": given["q"][rows],
        "k": given["k"][-1:, :, :1],
        "v": given["v"][-1:, :, :1],
        "causal": work.causal,
        "scale": work.scale,
        "q_offset": first,
    }
    return part, rows


def _last(work: Work, given: Mapping[str, Any]) -> tuple[dict[str, Any], slice, np.ndarray]:
    """A batch of the last sequence's last queries; their tokens; the pages that they read."""
    keys = work.kv_lens[-1]
    pages = -(-keys // work.page_size)
    queries = min(QUERIES, work.q_lens[-1])
    batch = {
        "page_table": np.arange(pages, dtype=np.int32)[None],
        "kv_lens": np.array([keys], np.int32),
        "cu_q_lens": np.array([0, queries], np.int32),
        "num_seqs": np.array(1, np.int32),
        "slot_mapping": None,
    }
    ids = np.asarray(given["page_table"])[-1, :pages]
    return batch, slice(work.tokens - queries, work.tokens), ids


def _paged(work: Work, given: Mapping[str, Any], layout: Any) -> tuple[dict[str, Any], Any]:
    batch, tokens, ids = _last(work, given)
    group = work.num_heads // work.num_kv_heads
    both = layout.split(given["kv_pages"])
    pages = np.stack([np.asarray(side[ids][:, :, :1]) for side in both])
    rows = (tokens, slice(0, group))
    return {"q": given["q"][rows], "k": None, "v": None, "kv_pages": pages, **batch}, rows


def _latent(work: Work, given: Mapping[str, Any], layout: Any) -> tuple[dict[str, Any], Any]:
    batch, tokens, ids = _last(work, given)
    pages, rows = given["latent_pages"], (tokens, slice(0, LATENT_HEADS))
    if pages.dtype != np.uint8:
        pages = layout.to_rows(pages, given["q_pe"].shape[-1])
    part = {name: given[name][rows] for name in ("ql_nope", "q_pe")}
    if work.topk is not None:
        part["topk_indices"] = given["topk_indices"][tokens]
    if work.cache_dtype == "fp8_ds_mla":
        part["kv_cache_dtype"] = "fp8_ds_mla"
    nothing = {"kv_c": None, "k_pe": None}
    return {**part, **nothing, "latent_pages": pages[ids], "scale": work.scale, **batch}, rows
