"""What a kernel returned against its contract, while it is traced: a third party's may be wrong."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from attnsel_jax.backend import AttentionBackend

Result = tuple[str, tuple[int, ...], Any]  # name, shape, dtype


def check_results(
    backend: type[AttentionBackend], op: str, results: Any, given: Mapping[str, Any]
) -> Any:
    """The results as they came; refuses a count, shapes or dtypes that are not the contract's.

    Args:
        backend: whose kernel it was. Where it declares no lse, its lse may be None.
        op: which kernel.
        results: what the kernel returned.
        given: what it was called with, by the contract's names.

    Raises:
        ValueError: something is not what the contract says.
    """
    wanted = _wanted(op, given)
    if wanted is None:  # an op of a third party's own
        return results
    whose, hint = f"op {op} of backend {backend.name}", _hint(op)
    found = results if isinstance(results, tuple) or len(wanted) > 1 else (results,)
    if not isinstance(found, tuple) or len(found) != len(wanted):
        what = f"{len(found)} results" if isinstance(found, tuple) else _described(found)
        names = ", ".join(name for name, _, _ in wanted)
        raise ValueError(f"{whose} returns {what}, must return {len(wanted)} ({names}){hint}")
    for (name, shape, dtype), x in zip(wanted, found, strict=True):
        if x is None and name == "lse" and not _gives_lse(backend, op):
            continue
        allowed = jax.ShapeDtypeStruct(shape, dtype)
        is_array = hasattr(x, "shape") and hasattr(x, "dtype")
        if not is_array or (tuple(x.shape), x.dtype) != (allowed.shape, allowed.dtype):
            raise ValueError(
                f"{name} of {whose} is {_described(x)}, must be {_described(allowed)}{hint}"
            )
    return results


def _wanted(op: str, given: Mapping[str, Any]) -> tuple[Result, ...] | None:
    """The results that the op's contract promises for these arguments."""
    if op == "indexer_scores":
        positions = given["page_table"].shape[1] * given["index_pages"].shape[1]
        return (("scores", (given["q_index"].shape[0], positions), jnp.float32),)
    if op == "topk_positions":
        return (("positions", (given["scores"].shape[0], given["topk"]), jnp.int32),)
    if op not in ("dense", "paged", "mla", "sparse_mla"):
        return None
    is_latent = op in ("mla", "sparse_mla")
    q = given["ql_nope" if is_latent else "q"]
    width = given["v"].shape[-1] if op == "dense" else q.shape[-1]
    tokens = (("out", (*q.shape[:-1], width), q.dtype), ("lse", q.shape[:-1], jnp.float32))
    if op == "dense":
        return tokens
    cache = "latent_pages" if is_latent else "kv_pages"
    return (*tokens, (cache, given[cache].shape, given[cache].dtype))


def _gives_lse(backend: type[AttentionBackend], op: str) -> bool:
    return op in backend.capabilities and True in backend.capabilities[op].needs_lse


def _hint(op: str) -> str:
    file = {"indexer_scores": "sparse_mla", "topk_positions": "sparse_mla"}.get(op, op)
    return f", as the contract in pallas_kernels.{file} says: mend the kernel, or use another"


def _described(x: Any) -> str:
    """An array by dtype and shape, anything else by its class."""
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        return type(x).__name__
    return f"{jnp.dtype(x.dtype).name}{list(x.shape)}"
