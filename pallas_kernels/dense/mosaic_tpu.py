"""Dense attention on TPU, by Pallas kernels of Mosaic: what the contract says, keys first.

The kernels want queries and values transposed, [.., head_dim, length], those of short sequences
keys too: XLA then lays out the projections that make them so, and nothing is copied. See
`mosaic_tpu_forward` for the pipeline, and `mosaic_tpu_short` for that of short sequences.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import contract_checks, empty_calls, masks, tpu_chip
from pallas_kernels.dense import (
    mosaic_tpu_backward,
    mosaic_tpu_forward,
    mosaic_tpu_schedule,
    mosaic_tpu_short,
    mosaic_tpu_short_backward,
    mosaic_tpu_short_forward,
)
from pallas_kernels.dense.derivative_rules import (
    corrected,
    differentiated_once,
    giving_correction,
    told_what_is_asked,
    with_named_residuals,
    with_zeros,
)
from pallas_kernels.dense.mosaic_tpu_forward import Operands
from pallas_kernels.dense.mosaic_tpu_logits import LOG2E
from pallas_kernels.dense.mosaic_tpu_schedule import Masks, Static, work_list
from pallas_kernels.dense.mosaic_tpu_tiles import backward_tiles, fitted, forward_tiles
from pallas_kernels.jax_settings import under_default_rules, under_own_settings

DTYPES = ("float32", "bfloat16")
HEAD_DIM_MAX = 256
MOST_FLAGS = mosaic_tpu_schedule.OTHER_SMEM // 8  # half of what lists leave of SMEM


class Floats(NamedTuple):
    """What is differentiated, in the contract's layout; None = not given."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: jax.Array | None
    alibi_slopes: jax.Array | None
    sinks: jax.Array | None


@giving_correction
@under_default_rules
def dense_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None = None,
    causal: bool = False,
    q_offset: int | jax.Array | None = None,
    sliding_window: masks.Window = None,
    attention_chunk_size: int | None = None,
    soft_cap: float | None = None,
    bias: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    mask: jax.Array | None = None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    q_lens: jax.Array | None = None,
    kv_lens: jax.Array | None = None,
    sinks: jax.Array | None = None,
    correction: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Attention over contiguous q, k, v, as `pallas_kernels.dense` defines it, for TPU.

    Differentiable in reverse mode in q, k, v, bias, alibi_slopes and sinks, through out and lse. A
    bias' gradient is made in full, [batch, num_q_heads, q_len, kv_len] in float32, and then summed
    where the bias is broadcast; not where the bias is a constant.

    Args:
        q, k, v, scale, causal, q_offset, sliding_window, attention_chunk_size, soft_cap, bias,
            alibi_slopes, mask, q_segment_ids, kv_segment_ids, q_lens, kv_lens, sinks: the
            contract's, see `pallas_kernels.dense`; q, k and v float32 or bfloat16, head sizes up to
            256.

    Returns:
        out [batch, q_len, num_q_heads, head_dim_v] in q's dtype; lse float32
        [batch, q_len, num_q_heads].

    Raises:
        ValueError: a shape, a dtype or a static number is not what the contract says, or is one
            that this lowering does not take.

    Numerics:
        float32 logits, softmax and accumulation; float32 inputs are multiplied at the highest
        precision. For bfloat16 the weights are rounded before they meet v, as are the logits'
        gradients before they meet q and k.

    Reference:
        Dao, "FlashAttention-2", 2023; Rabe and Staats, "Self-attention does not need O(n^2)
        memory", 2021.
    """
    x = Floats(q, k, v, bias, alibi_slopes, sinks)
    dims = _check(x, mask, q_segment_ids, kv_segment_ids, q_lens, kv_lens)
    contract_checks.check_logit_numbers(soft_cap, attention_chunk_size, sliding_window)
    if empty_calls.is_empty(dims):
        return (*empty_calls.dense(q, v, sinks, q_lens), None)
    first, offsets = _offsets(q_offset, dims["batch"])
    q_lens = contract_checks.existing(q_lens, dims["q_len"])
    kv_lens = contract_checks.existing(kv_lens, dims["kv_len"])
    who = Masks(q_segment_ids, kv_segment_ids, offsets, q_lens, kv_lens, None)
    who = who if mask is None else _with_mask(who, mask, dims)
    scale = float(dims["head_dim"] ** -0.5 if scale is None else scale)
    group = dims["num_q_heads"] // dims["num_kv_heads"]
    q_len, kv_len = dims["q_len"], dims["kv_len"]
    static = Static(
        scale=abs(scale) or 1.0,
        causal=causal,
        sliding_window=masks.window_bounds(sliding_window),
        attention_chunk_size=attention_chunk_size,
        soft_cap=soft_cap,
        group=group,
        batch=dims["batch"],
        q_len=q_len,
        kv_len=kv_len,
        q_offset=first,
        has_kv_lens=kv_lens is not None,
        by_arrays=any(x is not None for x in who),
        tiles=fitted(forward_tiles(*_size_class(x, who)), q_len, kv_len),
    )
    # The kernels' scale is above 0: a sign, or nothing at all, is q's.
    return _attend(
        static, x._replace(q=q if scale > 0 else q * jnp.sign(scale).astype(q.dtype)), who
    )


def _check(x: Floats, mask, q_segment_ids, kv_segment_ids, q_lens, kv_lens) -> dict[str, int]:
    """The contract's shapes and dtypes, as far as this lowering takes them; sizes by name."""
    masked = {"mask": mask, "q_segment_ids": q_segment_ids, "kv_segment_ids": kv_segment_ids}
    masked |= {"q_lens": q_lens, "kv_lens": kv_lens}
    dims = contract_checks.check_dense(x._asdict() | masked, DTYPES)
    for name in ("head_dim", "head_dim_v"):
        if dims[name] % 8 or not 0 < dims[name] <= HEAD_DIM_MAX:
            raise ValueError(
                f"{name} is {dims[name]}, must be a multiple of 8 up to {HEAD_DIM_MAX}: pad the "
                f"heads with zeros, or use XLA"
            )
    return dims


def _offsets(q_offset: int | jax.Array | None, batch: int) -> tuple[int, jax.Array | None]:
    """A number that is known by now; else an int32 [1] for all rows of the batch, or [batch]."""
    if q_offset is None or type(q_offset) is int:
        return q_offset or 0, None
    offset = contract_checks.check_offset(q_offset, batch)
    return 0, jnp.atleast_1d(offset.astype(jnp.int32))


def _with_mask(who: Masks, mask: jax.Array, dims: dict[str, int]) -> Masks:
    """Its queries and keys in full; one of keys alone is segments."""
    batch, q_len, kv_len = dims["batch"], dims["q_len"], dims["kv_len"]
    if mask.shape[1:3] == (1, 1) and who.q_segment_ids is None:
        of_keys = jnp.broadcast_to(mask[:, 0, 0], (batch, kv_len))
        ids = jnp.zeros((batch, q_len), jnp.int32), jnp.where(of_keys, 0, 1)
        return who._replace(q_segment_ids=ids[0], kv_segment_ids=ids[1].astype(jnp.int32))
    return who._replace(mask=jnp.broadcast_to(mask, (*mask.shape[:2], q_len, kv_len)))


def _size_class(x: Floats, who: Masks) -> tuple[tpu_chip.TpuChip, str, int, bool]:
    """What the table of tiles asks."""
    head_dim, of_logits = max(x.q.shape[3], x.v.shape[3]), (x.bias, who.mask)
    return tpu_chip.current(), x.q.dtype.name, head_dim, any(a is not None for a in of_logits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@under_own_settings
def _attend(static: Static, x: Floats, who: Masks) -> tuple[jax.Array | None, ...]:
    """Out, lse, and with a bias what the rows' probabilities are multiplied by, else None."""
    bias, bias_of = _bias_operand(x.bias, static)
    short, plan = mosaic_tpu_short.planned(static, who, x, bias_of)
    operands = Operands(
        q=jnp.transpose(x.q, (0, 2, 3, 1)),
        k=_keys(x.k, plan),
        v=jnp.transpose(x.v, (0, 2, 3, 1)),
        bias=bias,
        slopes=x.alibi_slopes,
        sinks=x.sinks,
        q_segments=_row(who.q_segment_ids),
        kv_segments=_row(who.kv_segment_ids),
        mask=_keys_first(who.mask),
    )
    if plan is None:
        out, lse = mosaic_tpu_forward.forward(static, operands, bias_of, work_list(static, who))
    else:
        facts = mosaic_tpu_schedule.facts(static, who) if static.by_arrays else None
        out, lse = mosaic_tpu_short_forward.forward(short, plan, operands, bias_of, facts)
    lse = jnp.moveaxis(lse, (2, 3), (0, 2))  # [1 or 2, batch, q_len, num_q_heads]
    return jnp.transpose(out, (0, 3, 1, 2)), lse[0], None if x.bias is None else lse[1]


def _row(ids: jax.Array | None) -> jax.Array | None:
    return None if ids is None else ids[:, None, :]


def _keys_first(mask: jax.Array | None) -> jax.Array | None:
    return None if mask is None else jnp.swapaxes(mask, 2, 3).astype(jnp.int8)


def _bias_operand(bias: jax.Array | None, static: Static) -> tuple[jax.Array | None, str]:
    """The bias keys first, and along what it runs."""
    if bias is None:
        return None, ""
    if bias.shape[2] == 1 and bias.shape[3] > 1:
        return bias, "keys"
    bias = jnp.swapaxes(bias, 2, 3)
    of = "queries" if bias.shape[2] == 1 else "both"
    return jnp.broadcast_to(bias, (*bias.shape[:3], static.q_len)), of


@with_named_residuals
@differentiated_once
@under_own_settings
def _forward(static: Static, x: Floats, who: Masks):
    out, lse, correction = _attend(static, x, who)
    return (out, lse, correction), (x, who, correction, out, lse)


@differentiated_once
@under_own_settings
def _backward(static: Static, residuals, cotangents):
    x, who, correction, out, lse = residuals
    gradients = _gradients(static, x, who, out, lse, *corrected(cotangents[:2], correction))
    return gradients, None


@told_what_is_asked
def _forward_rule(static: Static, asked: tuple[Floats, Masks], x: Floats, who: Masks):
    results, residuals = _forward(static, x, who)
    of_floats, _ = asked
    return results, (dataclasses.replace(static, bias_gradient=bool(of_floats.bias)), residuals)


def _backward_rule(_, residuals, cotangents):
    static, residuals = residuals
    return _backward(static, residuals, with_zeros(cotangents))


def _gradients(
    static: Static, x: Floats, who: Masks, out: jax.Array, lse: jax.Array, dout, dlse
) -> Floats:
    """Gradients of everything in x, in the contract's layout."""
    bias, bias_of = _bias_operand(x.bias, static)
    short, plan = mosaic_tpu_short.planned(static, who, x, bias_of, backward=True)
    tiles = fitted(backward_tiles(*_size_class(x, who)), static.q_len, static.kv_len)
    static = dataclasses.replace(static, tiles=tiles) if plan is None else short
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - dlse
    # Whether a row counts: it sees a key.
    exists = None if _every_row_sees(static, x, who) else lse != -jnp.inf
    delta, is_nan = _counted(exists, delta, 0.0), jnp.isnan(lse)
    log2_sum = jnp.where(is_nan, mosaic_tpu_backward.NAN, _counted(exists, lse * LOG2E, jnp.inf))
    log2_sum = _per_query(static, log2_sum, jnp.inf)
    if bias_of in ("both", "queries"):
        bias = jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (0, _missing(static))))
    has_nan = log2_sum == mosaic_tpu_backward.NAN
    operands = mosaic_tpu_backward.Operands(
        q=_queries(static, x.q, exists),
        k=_keys(x.k, plan),
        v=_keys(x.v, plan),
        dout=_queries(static, dout.astype(x.q.dtype), exists),
        lse=log2_sum,
        delta=_per_query(static, jnp.where(is_nan, 0.0, delta), 0.0),
        has_nan=_of_kv_heads(static, has_nan) if plan is None else _of_steps(plan, has_nan),
        bias=bias,
        slopes=x.alibi_slopes,
        q_segments=_row(who.q_segment_ids),
        kv_segments=_row(who.kv_segment_ids),
        mask=_keys_first(who.mask),
    )
    if plan is None:
        work = work_list(static, who)
        part = mosaic_tpu_backward.backward(static, operands, bias_of, work)
    else:
        facts = mosaic_tpu_schedule.facts(static, who) if static.by_arrays else None
        part = mosaic_tpu_short_backward.backward(static, plan, operands, bias_of, facts)
    q_len, kv_len = static.q_len, static.kv_len
    dbias = dslopes = dsinks = None
    if static.bias_gradient:
        full = jnp.swapaxes(part.logits[:, :, :kv_len, :q_len], 2, 3)
        axes = tuple(axis for axis in range(4) if x.bias.shape[axis] < full.shape[axis])
        dbias = jnp.sum(full, axis=axes, keepdims=True).astype(x.bias.dtype)
    if x.alibi_slopes is not None:
        dslopes = -jnp.sum(part.slopes, axis=(0, 2, 3))
    if x.sinks is not None:
        weight = _counted(exists, jnp.exp(x.sinks - _counted(exists, lse, 0.0)), 0.0)
        dsinks = -jnp.sum(weight * delta, axis=(0, 1))
    return Floats(
        q=jnp.transpose(part.q[..., :q_len], (0, 3, 1, 2)),
        k=jnp.transpose(part.k[..., :kv_len], (0, 3, 1, 2)),
        v=jnp.transpose(part.v[..., :kv_len], (0, 3, 1, 2)),
        bias=dbias,
        alibi_slopes=dslopes,
        sinks=dsinks,
    )


def _every_row_sees(static: Static, x: Floats, who: Masks) -> bool:
    """Whether it is known by now that each row sees a key, so that its lse is finite."""
    last = static.q_offset + static.q_len
    bounded = static.sliding_window != (None, None) or static.attention_chunk_size is not None
    inside = static.q_offset >= 0 and (last <= static.kv_len or not bounded)
    return all(given is None for given in who) and x.bias is None and inside


def _counted(exists: jax.Array | None, x: jax.Array, otherwise: float) -> jax.Array:
    """[batch, q_len, num_q_heads, ...] with another number in rows that do not count."""
    if exists is None:
        return x
    return jnp.where(
        exists.reshape(*exists.shape, *[1] * (x.ndim - 3)), x, jnp.asarray(otherwise, x.dtype)
    )


def _queries(static: Static, x: jax.Array, exists: jax.Array | None) -> jax.Array:
    """[batch, num_q_heads, n, q_len in whole tiles]; rows that do not count are 0."""
    x = _counted(exists, x, 0.0)
    x = jnp.pad(x, ((0, 0), (0, _missing(static)), (0, 0), (0, 0)))
    return jnp.transpose(x, (0, 2, 3, 1))


def _keys(x: jax.Array, plan: mosaic_tpu_short.Plan | None) -> jax.Array:
    """[batch, num_kv_heads, kv_len, n], or of short sequences [batch, num_kv_heads, n, kv_len]."""
    return jnp.swapaxes(x, 1, 2) if plan is None else jnp.transpose(x, (0, 2, 3, 1))


def _per_query(static: Static, x: jax.Array, fill: float) -> jax.Array:
    """[batch, num_q_heads, 1, q_len in whole tiles]."""
    x = jnp.pad(x, ((0, 0), (0, _missing(static)), (0, 0)), constant_values=fill)
    return jnp.swapaxes(x, 1, 2)[:, :, None]


def _of_kv_heads(static: Static, is_nan: jax.Array) -> jax.Array:
    """From [batch, num_q_heads, 1, q_len] to int32 [batch * num_kv_heads]: whether one is.

    Where these are more than SMEM holds beside the work list, [1]: of all.
    """
    of_heads = is_nan.reshape(-1, static.group * is_nan.shape[3])
    of_heads = of_heads if of_heads.shape[0] <= MOST_FLAGS else of_heads.reshape(1, -1)
    return jnp.max(of_heads.astype(jnp.int32), axis=1)


def _of_steps(plan: mosaic_tpu_short.Plan, is_nan: jax.Array) -> jax.Array:
    """The same of the short sequences' grid steps."""
    batch, heads, _, q_len = is_nan.shape
    steps = batch // plan.batch, heads // plan.heads
    of_steps = is_nan.reshape(steps[0], plan.batch, steps[1], plan.heads * q_len)
    of_steps = jnp.swapaxes(jnp.max(of_steps.astype(jnp.int32), axis=(1, 3)), 0, 1).reshape(-1)
    return of_steps if of_steps.size <= MOST_FLAGS else jnp.max(of_steps, keepdims=True)


def _missing(static: Static) -> int:
    """Queries that the last tile lacks."""
    return -static.q_len % static.tiles.block_q


_attend.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)
