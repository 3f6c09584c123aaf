"""Puts the partial results of decoding together: a small block for few heads of each token."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gpu_chip
from pallas_kernels.paged.mosaic_gpu_decode import in_chunks
from pallas_kernels.paged.mosaic_gpu_geometry import LANES, ROWS, Geometry
from pallas_kernels.paged.mosaic_gpu_schedule import Schedule, decoded_token, tiles_per_block

F32 = jnp.float32


def merge(
    partial_out: jax.Array, partial_lse: jax.Array, schedule: Schedule, v_factor: jax.Array,
    sinks: jax.Array, of_prompts: jax.Array | None, geometry: Geometry,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Weighs each partial result by exp(lse), always in the same order.

    Args:
        partial_out, partial_lse: of `mosaic_gpu_decode.decode`.
        schedule: where each token finds its own.
        v_factor: float32 [num_q_heads], of the output.
        sinks: float32 [num_q_heads] in units of log2; -inf = none.
        of_prompts: out, [decode_tokens, num_q_heads, partial_width], of tokens that are not
            decoded; None = 0.
        geometry: the call's sizes.

    Returns:
        out [decode_tokens, num_q_heads, partial_width] and lse float32 [..., 128] (natural, the
        same in each column), of tokens that are not decoded nothing of use.
    """
    at_once = next(n for n in (4, 2, 1) if not geometry.group % n and not geometry.part_heads % n)

    def kernel(partial_out, partial_lse, table, sums, found, v_factor, sinks, *more):
        *of_prompts, out, lse = more
        token, head = lax.axis_index("token"), lax.axis_index("heads") * at_once
        work = schedule._replace(table=table, sums=sums, found=found)
        first, last, row, is_decoded = _places(token, head, work, geometry)

        def add(turn, states):
            here = row + (first + turn) * ROWS
            lses = [_splat(partial_lse[here + i], geometry) for i in range(at_once)]
            parts = [partial_out[here + i] for i in range(at_once)]
            return tuple(map(_added, states, parts, lses))

        zero = _splat(F32(0), geometry)
        states = ((zero, _splat(F32(-1e30), geometry), zero),) * at_once
        states = lax.fori_loop(0, last - first + 1, add, states)
        results = []
        for i, state in enumerate(states):
            sink, factor = (_splat(x[head + i], geometry) for x in (sinks, v_factor))
            result, log_sum = _finished(state, sink, factor)
            results.append(result.astype(geometry.out_dtype))
            lse[token, head + i] = log_sum

        def store(result_of):
            for i in range(at_once):
                out[token, head + i] = result_of(i)

        if not of_prompts:
            store(lambda i: results[i])
            return
        pl.when(is_decoded)(lambda: store(lambda i: results[i]))
        pl.when(jnp.logical_not(is_decoded))(
            lambda: store(lambda i: of_prompts[0][token, head + i])
        )

    shape = (geometry.decode_tokens, geometry.num_q_heads, geometry.partial_width)
    return gpu_chip.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct(shape, geometry.out_dtype),
            jax.ShapeDtypeStruct(shape, F32),
        ],
        grid=(shape[0], shape[1] // at_once),
        grid_names=("token", "heads"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_merge",
    )(
        partial_out, partial_lse, schedule.table, schedule.sums, schedule.found, v_factor, sinks,
        *([] if of_prompts is None else [of_prompts]),
    )  # fmt: skip


def _added(
    state: tuple[jax.Array, ...], part: jax.Array, lse: jax.Array
) -> tuple[jax.Array, ...]:  # fmt: skip
    """(weighed results, greatest lse, weights) of one more partial result."""
    acc, m, total = state
    higher = jnp.maximum(m, lse)
    weight, fade = jnp.exp2(lse - higher), jnp.exp2(m - higher)
    return acc * fade + part * weight, higher, total * fade + weight


def _finished(
    state: tuple[jax.Array, ...], sink: jax.Array, factor: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The result and its natural lse, the sink in it."""
    acc, m, total = state
    higher = jnp.maximum(m, sink)
    fade = jnp.exp2(m - higher)
    total = total * fade + jnp.exp2(sink - higher)
    safe = jnp.where(total != 0, total, 1)
    natural = jnp.where(total != 0, (higher + jnp.log2(safe)) * jnp.log(2.0), -jnp.inf)
    return acc * fade * (factor / safe), natural


def _splat(value: Any, geometry: Geometry) -> jax.Array:
    return plgpu.layout_cast(
        jnp.full((geometry.partial_width,), value, F32),
        plgpu.Layout.WG_STRIDED(
            (geometry.partial_width,), vec_size=geometry.partial_width // LANES
        ),
    )


def _places(token: Any, head: Any, schedule: Schedule, geometry: Geometry) -> tuple[Any, ...]:
    """(first block, last, row, whether it is decoded): partial results are at row + block * 64."""
    table = schedule.table
    place, within, exists = decoded_token(token, schedule, geometry)
    per_block = tiles_per_block(table[geometry.max_num_seqs, 6], geometry)
    group, part_heads = jnp.int32(geometry.group), jnp.int32(geometry.part_heads)
    of_group = lax.rem(head, group)
    unit = lax.div(head, group) * geometry.parts + lax.div(of_group, part_heads)
    count, before = table[place, 5], table[place, 6]
    start = before * geometry.units + unit * count
    first = lax.div(start, per_block)
    last = lax.div(start + count - 1, per_block)
    last = jnp.where(exists & (count > 0), last, first - 1)
    row = table[place, 7] * geometry.units + unit * in_chunks(table[place, 3] * part_heads)
    row = row + within * geometry.part_heads + lax.rem(of_group, part_heads)
    return first, last, row, exists
