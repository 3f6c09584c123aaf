"""What the oracle expects of an op's call: each quantity, its budget, and the names of its axes."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnsel_jax import oracle
from attnsel_jax.compare import budgets

OUT_AXES = {"dense": ("batch", "query", "head", "feature")}
RAGGED_AXES = ("token", "head", "feature")
GRADIENT_AXES = {
    "q": ("batch", "query", "head", "feature"),
    "k": ("batch", "key", "kv head", "feature"),
    "v": ("batch", "key", "kv head", "feature"),
    "bias": ("batch", "head", "query", "key"),
    "alibi_slopes": ("head",),
    "sinks": ("head",),
}
PAGE_AXES = ("side", "page", "offset", "kv head", "feature")
LATENT_AXES = ("page", "offset", "feature")


class Expected(NamedTuple):
    """One quantity.

    Attributes:
        values: what the oracle says; a cache stays in its own dtype.
        budget: how far from it each element may lie.
        axes: a name for each dimension.
    """

    values: NDArray
    budget: NDArray[np.float64]
    axes: tuple[str, ...]


def expected(
    op: str,
    arguments: Mapping[str, Any],
    cotangents: tuple[NDArray, NDArray] | None = None,
) -> dict[str, Expected]:
    """The oracle's answer to a call.

    Args:
        op: a kernel's key, as in `Problem`.
        arguments: the contract's, by name.
        cotangents: dout and dlse, if gradients are asked for (dense only).

    Returns:
        Quantity -> expectation: "out", "lse", the written cache under its argument's name,
        "grad q", ...; "scores" or "positions" for the indexer.
    """
    if op == "dense":
        return _dense(arguments, cotangents)
    if op == "paged":
        return _paged(arguments)
    if op in ("mla", "mla_materialized", "sparse_mla"):
        return _latent(op, arguments)
    if op == "indexer_scores":
        scores, sizes = (f(**arguments) for f in (oracle.indexer_scores, oracle_sizes))
        _, num_heads, head_dim = arguments["q_index"].shape
        budget = budgets.score_budget(sizes, head_dim, num_heads)
        return {"scores": Expected(scores, budget, ("token", "position"))}
    if op == "topk_positions":
        positions = oracle.topk_positions(**arguments).astype(np.float64)
        return {"positions": Expected(positions, np.zeros(positions.shape), ("token", "rank"))}
    raise ValueError(f"op is {op!r}, must be one that the oracle defines")


def oracle_sizes(q_index, weights, index_pages, **batch) -> NDArray[np.float64]:
    """`oracle.indexer_score_sizes` by keyword."""
    order = ("page_table", "kv_lens", "cu_q_lens", "num_seqs")
    return oracle.indexer_score_sizes(q_index, weights, index_pages, *(batch[n] for n in order))


def gradient_names(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """The arguments of dense attention whose gradients are compared."""
    return tuple(name for name in GRADIENT_AXES if arguments.get(name) is not None)


def _dense(
    arguments: Mapping[str, Any], cotangents: tuple[NDArray, NDArray] | None
) -> dict[str, Expected]:
    q, k = arguments["q"], arguments["k"]
    attended = oracle.attend_dense(**arguments)
    quantities = _outputs(attended, OUT_AXES["dense"], q.shape[-1], k.shape[1], q.dtype)
    if cotangents is None:
        return quantities
    gradients = oracle.attend_dense_gradients(*cotangents, **arguments)
    rows = q.shape[1] * q.shape[2] // k.shape[2]
    for name in gradient_names(arguments):
        budget = budgets.gradient_budget(
            gradients.magnitudes[name], gradients.rounded[name], gradients.slopes[name],
            attended.logit_size.max(), q.shape[-1], rows, k.shape[1], q.dtype,
        )  # fmt: skip
        values, dtype = gradients.values[name], arguments[name].dtype
        if dtype != q.dtype:
            budget = budgets.rounded_once_more(budget, values, dtype)
        quantities[f"grad {name}"] = Expected(values, budget, GRADIENT_AXES[name])
    return quantities


def _paged(arguments: Mapping[str, Any]) -> dict[str, Expected]:
    rest = dict(arguments)
    q, pages = rest["q"], rest["kv_pages"]
    step = {name: rest.pop(name) for name in ("k", "v", "kv_pages", "slot_mapping")}
    scales = {name: rest.get(name) for name in ("k_scale", "v_scale")}
    written, budget = _nudged(
        lambda nudge: oracle.write_kv(**step, **scales, nudge=nudge),
        any(scale is not None for scale in scales.values()),
    )
    attended = oracle.attend_paged(kv_pages=written, **rest)
    loaded = budgets.rounds_on_load(pages.dtype, q.dtype)
    quantities = _outputs(attended, RAGGED_AXES, q.shape[-1], _longest(arguments), q.dtype, loaded)
    quantities["kv_pages"] = Expected(written, budget, PAGE_AXES)
    return quantities


def _latent(op: str, arguments: Mapping[str, Any]) -> dict[str, Expected]:
    rest = dict(arguments)
    pages = rest["latent_pages"]
    step = {name: rest.pop(name) for name in ("kv_c", "k_pe", "latent_pages", "slot_mapping")}
    numbers = {name: rest.get(name) for name in ("kv_scale", "kv_cache_dtype")}
    written, budget = _nudged(
        lambda nudge: oracle.write_latents(**step, **numbers, nudge=nudge),
        pages.dtype == np.uint8 or numbers["kv_scale"] is not None,
    )
    q, q_pe = rest.pop("q_nope" if op == "mla_materialized" else "ql_nope"), rest.pop("q_pe")
    order = ("w_uk", "w_uv", "topk_indices", "page_table", "kv_lens", "cu_q_lens", "num_seqs")
    batch = [rest.pop(name) for name in order if name in rest]
    attended = getattr(oracle, f"attend_{op}")(q, q_pe, written, *batch, **rest)
    loaded, width = budgets.rounds_on_load(pages.dtype, q.dtype), q.shape[-1] + q_pe.shape[-1]
    if op == "mla_materialized":  # keys and values are dots too, rounded to the dtype once
        loaded, width = True, budgets.of_two_dots(width, pages.shape[-1])
    quantities = _outputs(attended, RAGGED_AXES, width, _longest(arguments), q.dtype, loaded)
    if op == "mla_materialized":
        w_uv = np.asarray(arguments["w_uv"]).astype(np.float64)
        scale = 1.0 if numbers["kv_scale"] is None else float(numbers["kv_scale"])
        latents = scale * numbers_in(written)[..., : w_uv.shape[0]]
        some = np.isfinite(attended.lse)[..., None]
        more = np.where(some, budgets.made_values_budget(latents, w_uv), 0)
        out = quantities["out"]
        quantities["out"] = out._replace(budget=out.budget + more)
    quantities["latent_pages"] = Expected(written, budget, LATENT_AXES)
    return quantities


def _outputs(
    attended: oracle.Attended,
    axes: tuple[str, ...],
    head_dim: float,
    num_keys: int,
    dtype: np.dtype,
    loaded: bool = False,
) -> dict[str, Expected]:
    """Outputs and lse with their budgets."""
    sizes = (head_dim, num_keys, dtype, loaded)
    return {
        "out": Expected(attended.out, budgets.out_budget(attended, *sizes), axes),
        "lse": Expected(attended.lse, budgets.lse_budget(attended, *sizes), axes[:-1]),
    }


def _longest(arguments: Mapping[str, Any]) -> int:
    """Keys of the longest sequence that exists."""
    return int(np.max(arguments["kv_lens"][: int(arguments["num_seqs"])], initial=1))


def numbers_in(cache: NDArray) -> NDArray[np.float64]:
    """Stored values in float64; bytes are read as fp8_ds_mla."""
    if cache.dtype == np.uint8:
        return oracle.decode_fp8_ds_mla(cache)
    return np.asarray(cache).astype(np.float64)


def _nudged(write: Callable[[float], NDArray], scaled: bool) -> tuple[NDArray, NDArray[np.float64]]:
    """A written cache, and how far each value is from its neighbour if it lies next to a tie.

    A quotient next to a tie may be rounded either way: float32 divisions differ in the last bit.
    Without a scale nothing is divided, and every bit is determined.
    """
    written = write(1.0)
    if not scaled:
        return written, np.broadcast_to(0.0, written.shape)
    values = numbers_in(written)
    budget = np.zeros(values.shape)
    for nudge in (1 - budgets.NUDGE, 1 + budgets.NUDGE):
        apart = np.abs(numbers_in(write(nudge)) - values)
        budget = np.fmax(budget, np.where(np.isfinite(apart), apart, 0))
    if written.dtype == np.uint8:  # the scales themselves are float32 quotients
        budget = budget + 2 * budgets.U32 * np.where(np.isfinite(values), np.abs(values), 0)
    return written, budget
