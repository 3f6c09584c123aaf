"""Puts the partial results of decoding together: one small block for each token and query head."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged.mosaic_gpu_geometry import LANES, ROWS, Geometry
from pallas_kernels.paged.mosaic_gpu_schedule import Decode

F32 = jnp.float32


def merge(
    partial_out: jax.Array, partial_lse: jax.Array, schedule: Decode, v_factor: jax.Array,
    sinks: jax.Array, geometry: Geometry,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Weighs each partial result by exp(lse), always in the same order.

    Args:
        partial_out, partial_lse: of `mosaic_gpu_decode.decode`.
        schedule: where each token finds its own.
        v_factor: float32 [num_q_heads], of the output.
        sinks: float32 [num_q_heads] in units of log2; -inf = none.
        geometry: the call's sizes.

    Returns:
        out [decode_tokens, num_q_heads, partial_width] and lse float32 [..., 128] (natural, the
        same in each column); of tokens that are not decoded, nothing of use.
    """

    def kernel(partial_out, partial_lse, seqs, rows, tokens, v_factor, sinks, out, lse):
        token, head = lax.axis_index("token"), lax.axis_index("head")
        first, last, row = _places(token, head, seqs, rows, tokens, geometry)

        def add(turn, state):
            acc, m, total = state
            here = row + (first + turn) * ROWS
            lse = _splat(partial_lse[here], geometry)
            part = partial_out[here]
            higher = jnp.maximum(m, lse)
            weight, fade = jnp.exp2(lse - higher), jnp.exp2(m - higher)
            return acc * fade + part * weight, higher, total * fade + weight

        zero = _splat(F32(0), geometry)
        state = (zero, _splat(F32(-1e30), geometry), zero)
        acc, m, total = lax.fori_loop(0, last - first + 1, add, state)
        sink = _splat(sinks[head], geometry)
        higher = jnp.maximum(m, sink)
        fade = jnp.exp2(m - higher)
        total = total * fade + jnp.exp2(sink - higher)
        safe = jnp.where(total > 0, total, 1)
        scaled = acc * fade * (_splat(v_factor[head], geometry) / safe)
        out[token, head] = scaled.astype(geometry.out_dtype)
        natural = jnp.where(total > 0, (higher + jnp.log2(safe)) * jnp.log(2.0), -jnp.inf)
        lse[token, head] = natural

    shape = (geometry.decode_tokens, geometry.num_q_heads, geometry.partial_width)
    return plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct(shape, geometry.out_dtype),
            jax.ShapeDtypeStruct(shape, F32),
        ],
        grid=shape[:2],
        grid_names=("token", "head"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_merge",
    )(partial_out, partial_lse, schedule.seqs, schedule.rows, schedule.tokens, v_factor, sinks)


def _splat(value: Any, geometry: Geometry) -> jax.Array:
    return plgpu.layout_cast(
        jnp.full((geometry.partial_width,), value, F32),
        plgpu.Layout.WG_STRIDED(
            (geometry.partial_width,), vec_size=geometry.partial_width // LANES
        ),
    )


def _places(
    token: Any, head: Any, seqs: Any, rows: Any, tokens: Any, geometry: Geometry
) -> tuple[Any, Any, Any]:
    """(first block, last block, row): partial results are at row + block * 64."""
    place, within, per_block = tokens[token, 0], tokens[token, 1], tokens[token, 3]
    exists = place >= 0
    place = lax.max(place, jnp.int32(0))
    group, part_heads = jnp.int32(geometry.group), jnp.int32(geometry.part_heads)
    of_group = lax.rem(head, group)
    unit = lax.div(head, group) * geometry.parts + lax.div(of_group, part_heads)
    count, before = seqs[place, 5], seqs[place, 6]
    start = before * geometry.units + unit * count
    first = lax.div(start, per_block)
    last = lax.div(start + count - 1, per_block)
    last = jnp.where(exists & (count > 0), last, first - 1)
    chunks, chunks_before = rows[place, 0], rows[place, 1]
    row = chunks_before * geometry.units + unit * chunks
    return first, last, row + within * geometry.part_heads + lax.rem(of_group, part_heads)
