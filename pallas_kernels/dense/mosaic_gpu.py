"""Dense attention on NVIDIA GPUs, by Pallas kernels of Mosaic GPU: the door.

It checks the arguments, brings them into the form that the kernels take, and chooses the kernel by
the chip that is traced for. See `mosaic_gpu_forward` for the pipeline.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import contract_checks, empty_calls, gpu_chip, masks
from pallas_kernels.dense import (
    mosaic_gpu_ampere,
    mosaic_gpu_backward,
    mosaic_gpu_blackwell,
    mosaic_gpu_forward,
    mosaic_gpu_shift,
)
from pallas_kernels.dense.derivative_rules import (
    corrected,
    differentiated_once,
    giving_correction,
    with_named_residuals,
)
from pallas_kernels.dense.mosaic_gpu_forward import Operands
from pallas_kernels.dense.mosaic_gpu_geometry import (
    LOG2E,
    Static,
    in_whole_tiles_of_rows,
    seen_keys,
)
from pallas_kernels.dense.mosaic_gpu_tiles import forward_tiles, padded_sizes
from pallas_kernels.dense.mosaic_gpu_weights import BLOCK, Arrays
from pallas_kernels.jax_settings import under_default_rules, under_own_settings

DTYPES = ("bfloat16", "float16")
HEAD_DIM_MAX = 256
# Compute capability -> its forward.
FORWARD = {
    (8, 0): mosaic_gpu_ampere.forward,
    (9, 0): mosaic_gpu_forward.forward,
    (10, 0): mosaic_gpu_blackwell.forward,
}


class Floats(NamedTuple):
    """What is differentiated, in the contract's layout; None = not given."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: jax.Array | None
    alibi_slopes: jax.Array | None
    sinks: jax.Array | None


class Masks(NamedTuple):
    """Integers that say who sees whom; None = not given.

    Attributes:
        rows: int32 [batch, 3]: q_offset, queries, keys of each row; None = all static.
        q_segment_ids, kv_segment_ids: the contract's.
    """

    rows: jax.Array | None
    q_segment_ids: jax.Array | None
    kv_segment_ids: jax.Array | None


class Exact(NamedTuple):
    """What lse is in the backward pass of a call with a bias, float32 [batch, q_len, num_q_heads].

    Of a bias of -1e9 on all keys of a row lse has no room for the logarithm of their number, and in
    units of log2 it is another number than what the kernel's weights are relative to.

    Attributes:
        log2_sum: it in units of log2, made of the maximum that weights are relative to.
        correction: what exp2(logit - log2_sum) is multiplied by to be a probability.
    """

    log2_sum: jax.Array
    correction: jax.Array


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
    """Attention over contiguous q, k, v, as `pallas_kernels.dense` defines it, for NVIDIA GPUs.

    Args:
        q, k, v, scale, causal, q_offset, sliding_window, attention_chunk_size, soft_cap, bias,
            alibi_slopes, mask, q_segment_ids, kv_segment_ids, q_lens, kv_lens, sinks: the
            contract's, see `pallas_kernels.dense`; q, k and v bfloat16 or float16, head sizes
            multiples of 8 up to 256.

    Returns:
        out [batch, q_len, num_q_heads, head_dim_v] in q's dtype; lse float32
        [batch, q_len, num_q_heads].

    Raises:
        ValueError: a shape, a dtype or a static number is not what the contract says, or is one
            that this lowering, or the chip, does not take.

    Numerics:
        float32 logits, softmax and accumulation; weights are rounded to v's dtype before they meet
        it. Exponentials, logarithms and quotients are the hardware's approximations (2 units).

    Cost beside the kernel's:
        q, k and v whose length is no multiple of 8 are copied once, padded; so are heads whose
        sizes are none of the chip's in `mosaic_gpu_tiles.TILES`, to the next ones. With segment ids
        v is copied once (values that no query sees become 0). A full bias whose lengths are no
        whole tiles is copied once, padded; with gradients once more, its last two dimensions
        swapped. A bias without keys is a pass over the output. A mask is a bias of 0 and -inf in
        q's dtype, so no tile is left out for it, and k and v are copied once (what no query sees
        becomes 0).

    Gradients:
        Of q, k, v, bias, alibi_slopes and sinks, through out and lse. A bias's is added up in a
        kernel of its own where the bias has keys; under `jax.jit` it costs nothing where it is not
        asked for.

    Reference:
        Shah et al., "FlashAttention-3", 2024.
    """
    given = Floats(q, k, v, bias, alibi_slopes, sinks)
    dims = _check(given, mask, q_segment_ids, kv_segment_ids, q_lens, kv_lens)
    contract_checks.check_logit_numbers(soft_cap, attention_chunk_size, sliding_window)
    if empty_calls.is_empty(dims):
        return (*empty_calls.dense(q, v, sinks, q_lens), None)
    scale = float(dims["head_dim"] ** -0.5 if scale is None else scale)
    offset, rows = _rows(dims, q_offset, q_lens, kv_lens)
    window = masks.window_bounds(sliding_window)
    bounds = window != (None, None) or attention_chunk_size is not None
    chip = _chip()
    head_dim, head_dim_v = padded_sizes(chip.capability, dims["head_dim"], dims["head_dim_v"])
    if mask is not None:
        bias = jnp.where(mask, jnp.zeros((), q.dtype) if bias is None else bias, -jnp.inf)
    # The kernels' scale is above 0: a sign, or nothing at all, is q's.
    q = q if scale > 0 else q * jnp.sign(scale).astype(q.dtype)
    x = given._replace(
        q=_heads_of(head_dim, q), k=_heads_of(head_dim, k), v=_heads_of(head_dim_v, v), bias=bias
    )
    is_shift = bias is not None and bias.shape[3] == 1
    if is_shift:
        x = x._replace(bias=None, sinks=None)
    static = Static(
        scale=abs(scale) or 1.0,
        causal=causal,
        sliding_window=window,
        attention_chunk_size=attention_chunk_size,
        soft_cap=soft_cap,
        offset=offset,
        lengths=q_lens is not None or kv_lens is not None,
        group=dims["num_q_heads"] // dims["num_kv_heads"],
        batch=dims["batch"],
        num_q_heads=dims["num_q_heads"],
        q_len=dims["q_len"],
        kv_len=dims["kv_len"],
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        bias=None if x.bias is None else _full_dimensions(bias, dims),
        segments=q_segment_ids is not None,
        alibi=alibi_slopes is not None,
        sinks=x.sinks is not None,
        tiles=forward_tiles(
            chip,
            head_dim,
            head_dim_v,
            capped=soft_cap is not None,
            segmented=q_segment_ids is not None,
            added=x.bias is not None or alibi_slopes is not None,
            sloped=alibi_slopes is not None and x.bias is None,
            bounded=bounds and rows is not None,
        ),
        capability=chip.capability,
        corrected=correction and x.bias is not None,
    )
    if mask is not None:
        used = seen_keys(static, rows, q_segment_ids, kv_segment_ids, mask)
        x = x._replace(k=jnp.where(used, x.k, 0), v=jnp.where(used, x.v, 0))
    out, lse, exact = _attend(static, x, Masks(rows, q_segment_ids, kv_segment_ids))
    out = out[..., : dims["head_dim_v"]]
    if is_shift:
        return mosaic_gpu_shift.shifted(out, lse, bias, sinks, q_lens)
    return out, lse, None if exact is None else exact.correction


def _chip() -> gpu_chip.GpuChip:
    """The chip that is traced for, which must be one that there is a kernel for."""
    chip = gpu_chip.current()
    if chip.capability not in FORWARD:
        known = ", ".join("{}.{}".format(*capability) for capability in sorted(FORWARD))
        major, minor = chip.capability
        raise ValueError(
            f"compute_capability is {major}.{minor} ({chip.kind}), must be one of {known}: use "
            f"CUDNN or XLA"
        )
    return chip


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


def _heads_of(size: int, x: jax.Array) -> jax.Array:
    """Heads padded with zeros, which change no product."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, size - x.shape[3])))


def _full_dimensions(bias: jax.Array, dims: dict[str, int]) -> tuple[bool, ...]:
    """Of those before the keys."""
    names = ("batch", "num_q_heads", "q_len")
    return tuple(bias.shape[i] == dims[name] for i, name in enumerate(names))


def _rows(dims, q_offset, q_lens, kv_lens) -> tuple[int | None, jax.Array | None]:
    """(the offset where it is static, `Masks.rows`)."""
    batch, offset = dims["batch"], q_offset
    static = offset is None or isinstance(offset, int | np.integer)
    if not static:
        offset = contract_checks.check_offset(q_offset, batch)
    if static and q_lens is None and kv_lens is None:
        return int(offset or 0), None
    sizes = (0, dims["q_len"], dims["kv_len"])
    q_lens, kv_lens = (
        contract_checks.existing(*pair) for pair in zip((q_lens, kv_lens), sizes[1:], strict=True)
    )
    columns = (0 if offset is None else offset, q_lens, kv_lens)
    rows = [
        jnp.broadcast_to(jnp.asarray(size if c is None else c, jnp.int32), (batch,))
        for c, size in zip(columns, sizes, strict=True)
    ]
    return int(offset or 0) if static else None, jnp.stack(rows, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@under_own_settings
def _attend(static: Static, x: Floats, who: Masks) -> tuple[jax.Array, jax.Array, Exact | None]:
    """Out, lse, and of a call that is corrected what its backward pass needs for lse."""
    out, lse = FORWARD[static.capability](static, _operands(static, x, who))
    out, lse = out[:, : static.q_len], jnp.swapaxes(lse[:, :, : static.q_len], 1, 2)
    if not static.corrected:
        return out, lse, None
    top, total = jnp.split(lse, 2, axis=2)
    some = total != 0
    top, total = jnp.where(some, top, 0.0), jnp.where(some, total, 1.0)
    log2_sum = top + jnp.log2(total)
    correction = jnp.where(jnp.abs(log2_sum) < jnp.inf, jnp.exp2(log2_sum - top) / total, 1.0)
    lse = jnp.where(some, top * (1 / LOG2E) + jnp.log(total), -jnp.inf)
    return out, lse, Exact(log2_sum, correction)


def _operands(static: Static, x: Floats, who: Masks) -> Operands:
    """What the forward kernel takes."""
    v, bias = x.v, x.bias
    missing_q = -static.q_len % static.block_q
    missing_kv = -static.kv_len % static.tiles.block_kv
    q_segments, kv_segments = who.q_segment_ids, who.kv_segment_ids
    if static.segments:
        used = seen_keys(static, who.rows, q_segments, kv_segments)
        v = jnp.where(used, v, jnp.zeros_like(v))
        q_segments = jnp.pad(q_segments, ((0, 0), (0, missing_q)))
        kv_segments = jnp.pad(kv_segments, ((0, 0), (0, missing_kv)))
    if static.bias is not None:
        pads = (0, 0, missing_q * static.bias[2], missing_kv)
        bias = jnp.pad(bias, [(0, pad) for pad in pads])
    q, k, v = (in_whole_tiles_of_rows(array) for array in (x.q, x.k, v))
    return Operands(q, k, v, who.rows, q_segments, kv_segments, bias, x.alibi_slopes, x.sinks)


@with_named_residuals
@differentiated_once
@under_own_settings
def _forward(static: Static, x: Floats, who: Masks):
    for_gradients = dataclasses.replace(static, corrected=x.bias is not None)
    out, lse, exact = _attend(for_gradients, x, who)
    return (out, lse, exact if static.corrected else None), (x, who, exact, out, lse)


@differentiated_once
@under_own_settings
def _backward(static: Static, residuals, cotangents):
    x, who, exact, out, lse = residuals
    dout, dlse, _ = cotangents
    log2_sum = lse * LOG2E
    if exact is not None:
        log2_sum, (dout, dlse) = exact.log2_sum, corrected((dout, dlse), exact.correction)
    mosaic_gpu_backward.check_backward(static)
    segments = (who.q_segment_ids, who.kv_segment_ids)
    if static.segments:
        segments = (jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % BLOCK))) for ids in segments)
    arrays = Arrays(
        x.q, x.k, x.v, dout, None, None, who.rows, *segments, x.bias, x.alibi_slopes
    )  # fmt: skip
    gradients = mosaic_gpu_backward.backward(static, arrays, out, lse, log2_sum, dlse, x.sinks)
    return Floats(*gradients), None


_attend.defvjp(_forward, _backward)
