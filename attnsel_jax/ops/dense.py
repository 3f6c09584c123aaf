"""Attention over contiguous keys and values: `dot_product_attention`."""

from typing import Any, Literal

import jax
from jax.typing import ArrayLike

from attnsel_jax.mesh import MeshAxes, Plan, asked_of_kernel, kernel_over_mesh, plan_call
from attnsel_jax.ops.calls import as_array, as_float32, asked_device, features, head_counts
from attnsel_jax.ops.dense_arguments import (
    check_dense,
    four_dimensions,
    lengths,
    offset,
    own_key_included,
    tokens,
    with_batch,
)
from attnsel_jax.selector import BackendLike, DeviceLike, get_attn_backend
from attnsel_jax.static_arguments import distance, flag, number
from attnsel_jax.value_checks import check_lengths
from pallas_kernels import empty_calls
from pallas_kernels.dense.derivative_rules import DENSE_RESIDUALS as DENSE_RESIDUALS

_IMPLEMENTATIONS = {"xla": "XLA", "cudnn": "CUDNN"}


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Literal["xla", "cudnn"] | None = None,
    return_residual: bool = False,
    q_offset: ArrayLike | None = None,
    soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    q_segment_ids: ArrayLike | None = None,
    kv_segment_ids: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    attention_chunk_size: int | None = None,
    needs_grad: bool = True,
    backend: BackendLike = None,
    device: DeviceLike = None,
    checked: bool = False,
    mesh_axes: MeshAxes | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention over contiguous keys: `jax.nn.dot_product_attention`, and more keywords.

    The maths, and what every argument means to a kernel, are in `pallas_kernels.dense`. Two things
    differ from `jax.nn`, on every backend: a row that sees no key gives out 0 (and lse -inf), and
    the residual is float32. What the gradient needs of the forward pass has the name
    `DENSE_RESIDUALS` for `jax.checkpoint`'s policies.

    Args:
        query: [batch, q_len, num_heads, head_size], or without batch.
        key: [batch, kv_len, num_kv_heads, head_size]; num_kv_heads divides num_heads.
        value: [batch, kv_len, num_kv_heads, head_size_v].
        bias, mask: broadcastable to [batch, num_heads, q_len, kv_len]; float, bool (True = seen).
        scale: factor on the logits; None = head_size ** -0.5.
        is_causal: aligned top-left; see q_offset.
        query_seq_lengths, key_value_seq_lengths: int32 [batch].
        local_window_size: keys seen before and after the query's own, as `jax.nn` counts them: the
            own key not included.
        implementation: "xla" and "cudnn" insist on the backends XLA and CUDNN.
        return_residual: also return the lse.
        q_offset: position of query 0, int32 [] or [batch], at most 2**30 from 0; kv_len - q_len
            aligns bottom-right.
        soft_cap: `soft_cap * tanh(logits / soft_cap)`.
        sinks: float32 [num_heads], one more logit per head in the denominator.
        q_segment_ids, kv_segment_ids: int32 [batch, q_len], [batch, kv_len].
        alibi_slopes: float32 [num_heads].
        attention_chunk_size: chunked-local attention.
        needs_grad: False admits backends that have no backward.
        backend: insist on one: a name, a member, a class.
        device: the chip to select for; None = the one that query, key or value was put on, where it
            shows (not under `jit`, `grad`, `vmap`), else JAX's default device.
        checked: also check values (outside `jit` only).
        mesh_axes: which mesh axes share out batch, heads and positions; None = what
            `use_mesh_axes` says, else what the arrays' shardings show.

    Returns:
        out [batch, q_len, num_heads, head_size_v] in query's dtype; with return_residual also the
        lse, float32 [batch, q_len, num_heads]. Without batch where query has none.

    Raises:
        TypeError: an argument that is no array.
        ValueError: arguments that do not fit together.
        NoAttentionBackendError: no backend here honours them all.
    """
    has_batch = as_array("query", query).ndim != 3
    q, k, v = tokens(query=query, key=key, value=value)
    bias, mask = four_dimensions(bias=bias, mask=mask)
    arrays = {
        "q_offset": offset("q_offset", q_offset), "bias": bias, "mask": mask,
        "alibi_slopes": as_float32("alibi_slopes", alibi_slopes),
        "sinks": as_float32("sinks", sinks),
        "q_segment_ids": with_batch("q_segment_ids", q_segment_ids, 2),
        "kv_segment_ids": with_batch("kv_segment_ids", kv_segment_ids, 2),
        "q_lens": lengths("query_seq_lengths", query_seq_lengths),
        "kv_lens": lengths("key_value_seq_lengths", key_value_seq_lengths),
    }  # fmt: skip
    static = {
        "scale": number("scale", scale), "causal": flag("is_causal", is_causal),
        "attention_chunk_size": distance("attention_chunk_size", attention_chunk_size),
        "sliding_window": own_key_included(local_window_size),
        "soft_cap": number("soft_cap", soft_cap, positive=True),
    }  # fmt: skip
    check_dense(q, k, v, arrays)
    if checked:
        check_lengths("query_seq_lengths", arrays["q_lens"], q.shape[1])
        check_lengths("key_value_seq_lengths", arrays["kv_lens"], k.shape[1])
    plan = plan_call("dense", {"q": q, "k": k, "v": v, **arrays}, mesh_axes)
    chosen = get_attn_backend(
        q.shape[-1], q.dtype, "auto", None, op="dense",
        device=asked_device(device, q, k, v),
        backend=_insisted(backend, implementation), head_size_v=v.shape[-1], causal=is_causal,
        needs_grad=flag("needs_grad", needs_grad),
        needs_lse=flag("return_residual", return_residual),
        **head_counts(plan, q.shape[2], k.shape[2]), **_asked(plan, static, arrays),
    )  # fmt: skip
    if 0 in (q.shape[0], q.shape[1], k.shape[1]):
        out, lse = empty_calls.dense(q, v, arrays["sinks"], arrays["q_lens"])
    else:
        out, lse = kernel_over_mesh(chosen, "dense", plan)(q, k, v, **arrays, **static)
    if not has_batch:
        out, lse = out[0], lse if lse is None else lse[0]
    return (out, lse) if return_residual else out


def _asked(
    plan: Plan | None, static: dict[str, Any], arrays: dict[str, jax.Array | None]
) -> dict[str, Any]:
    """The question's flags for the arrays and the static arguments that are given."""
    names = {
        "has_sink": "sinks", "has_bias": "bias", "has_mask": "mask", "has_q_offset": "q_offset",
        "has_alibi": "alibi_slopes", "has_segment_ids": "q_segment_ids",
    }  # fmt: skip
    given = {name for name, array in arrays.items() if array is not None}
    flags = features(static) | {flag: name in given for flag, name in names.items()}
    flags["has_lens"] = bool(given & {"q_lens", "kv_lens"})
    masks = ("has_sliding_window", "has_attention_chunk", "has_alibi")
    by_position = static["causal"] or any(flags[mask] for mask in masks)
    return asked_of_kernel("dense", plan, flags, by_position=by_position)


def _insisted(backend: BackendLike, implementation: str | None) -> BackendLike:
    """What `backend` and `implementation` insist on together."""
    if implementation is None:
        return backend
    if backend is not None:
        raise ValueError(
            f"implementation is {implementation!r} and backend is {backend!r}, must not be given "
            f"both: backend alone says it"
        )
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {implementation!r}, must be one of "
            f"{', '.join(_IMPLEMENTATIONS)}, or None; backend= takes every backend's name"
        )
    return _IMPLEMENTATIONS[implementation]
