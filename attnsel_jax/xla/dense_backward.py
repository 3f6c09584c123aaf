"""Gradients of dense attention on XLA, from out and lse alone: the logits are computed again.

With p = exp(logit - lse) and delta = sum(out * dout) - dlse, row by row::

    dv = p^T dout      ds = p * (dout v^T - delta)      dq = scale * ds k      dk = scale * ds^T q

`ds` is the gradient of bias as it stands, and of an ALiBi slope times -|q_pos - kv_pos|; the p of a
sink gives -p * delta. One block of keys after another, and for each the queries that see it: dk and
dv are sums within the loop, dq is added to in place.

Of a row whose lse is NaN, p is made inf where it sees a key (0 elsewhere), q and dout 0: their
products are NaN there, and 0 elsewhere.
"""

import jax
import jax.numpy as jnp
from jax import lax

from attnsel_jax.xla.dense_blocks import (
    Block,
    Floats,
    Masks,
    Static,
    block_at,
    kv_rows,
    num_blocks,
    over_blocks,
    q_reach,
    q_rows,
    split_heads,
)
from attnsel_jax.xla.dense_parts import Part, arguments_of, heads_first, over_parts, part_of
from attnsel_jax.xla.dense_tiles import (
    cap_and_bias,
    distance,
    flat,
    keys_first,
    keys_last,
    matmul,
    seen_tile,
    split_scale,
    zero_unless,
)

NAN = -(2.0**125)  # stands for an lse of NaN; no bias that hides is this


def gradients(
    static: Static,
    x: Floats,
    who: Masks,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array,
) -> Floats:
    """Gradients of all of `x`, each in its own shape and dtype (None where `x` has None)."""
    batch, q_len, num_q_heads, size = x.q.shape
    kv_len, heads = x.k.shape[1:3]
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1) - dlse
    # Rows that see nothing have p = exp(logit - inf) = 0. Heads first: a tile reads them by row.
    empty, is_nan = lse == -jnp.inf, jnp.isnan(lse)
    row_lse = jnp.where(is_nan, NAN, jnp.where(empty, jnp.inf, lse))
    row_lse, row_delta = (
        jnp.moveaxis(split_heads(a, static, 2), 1, 3)
        for a in (row_lse, jnp.where(empty | is_nan, 0.0, delta))
    )

    def part_step(part: Part, grads: Floats) -> Floats:
        x_part, who_part = arguments_of(static, x, who, part)
        row_numbers = [part_of(static, part, a, 1) for a in (row_lse, row_delta)]
        counts = ((row_numbers[0] != NAN) & (row_numbers[0] < jnp.inf))[..., None]
        of_rows = x_part.q, heads_first(static, part, dout)
        rows = *(zero_unless(counts, a) for a in of_rows), *row_numbers
        return lax.fori_loop(
            0,
            num_blocks(kv_len, static.block_kv),
            lambda j, grads: _kv_block(static, x_part, who_part, rows, part, j, grads),
            grads,
        )

    # Heads first, as the tiles are: transposed once, at the end.
    q_shape = (batch, heads, static.group, q_len, size)
    shapes = Floats(*(a if a is None else a.shape for a in x))._replace(
        q=q_shape, k=(batch, heads, kv_len, size), v=(batch, heads, kv_len, x.v.shape[-1])
    )
    zeros = Floats(*(s if s is None else jnp.zeros(s, jnp.float32) for s in shapes))
    grads = over_parts(static, batch, heads, part_step, zeros)
    dq = jnp.moveaxis(grads.q, 3, 1).reshape(batch, q_len, num_q_heads, size) * static.scale
    dk, dv = jnp.swapaxes(grads.k, 1, 2), jnp.swapaxes(grads.v, 1, 2)
    dk *= split_scale(static, x.q.dtype)[1]
    grads = grads._replace(q=dq, k=dk, v=dv)
    if x.sinks is not None:
        pull = jnp.where(empty, 0.0, jnp.exp(x.sinks - lse) * delta)
        grads = grads._replace(sinks=-jnp.sum(pull, axis=(0, 1)))
    return jax.tree.map(lambda g, a: g.astype(a.dtype), grads, x)


def _kv_block(static: Static, x: Floats, who: Masks, rows, part: Part, j, grads: Floats) -> Floats:
    """Adds to `grads` what one block of keys gives; `rows` are q, dout, lse and delta."""
    q_len, kv_len = x.q.shape[3], x.k.shape[2]
    kv_block = block_at(j, static.block_kv, kv_len)
    k, v = kv_rows(x.k, kv_block), kv_rows(x.v, kv_block)
    k = zero_unless(~jnp.isnan(k), k)  # the lse of who sees it is NaN

    def q_step(i, carry, *, masked):
        grads, dk, dv = carry
        block = block_at(i, static.block_q, q_len)
        q, do, lse, delta = _own_rows(static, who, rows, block)
        seen, k_used, v_used = None, k, v
        if masked:
            seen, used = seen_tile(static, who, block, kv_block, kv_len)
            k_used, v_used = zero_unless(used, k), zero_unless(used, v)
        tile = (*k.shape[:3], static.group, block.size)
        logits = matmul(flat(k_used), flat(q), (2, 2)).reshape(tile)
        logits, cap_slope = cap_and_bias(static, x, who, logits, block, kv_block, keys_first)
        if masked:
            logits = jnp.where(keys_first(seen), logits, -jnp.inf)
        p = jnp.exp(logits - lse[:, :, None])
        dp = matmul(flat(v_used), flat(do), (2, 2)).reshape(tile)
        ds = p * (dp - delta[:, :, None])
        dv += matmul(flat(p.astype(do.dtype), 2), flat(do), (2, 1)).reshape(dv.shape)
        grads = _add_to_bias(grads, who, keys_last(ds), static, block, kv_block, part)
        ds = flat((ds if cap_slope is None else ds * cap_slope).astype(q.dtype), 2)
        dk += matmul(ds, flat(q), (2, 1)).reshape(dk.shape)
        # Left to itself XLA merges this transposition into the product, which is slower.
        ds = lax.optimization_barrier(jnp.swapaxes(ds, 1, 2))
        dq = matmul(ds, flat(k_used), (2, 1)).reshape(q.shape)
        return grads._replace(q=_add(grads.q, dq, (*part, 0, block.base, 0))), dk, dv

    reach = q_reach(static, who, kv_block, q_len, kv_len)
    zeros = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    grads, dk, dv = over_blocks(reach, q_step, (grads, *zeros))
    place = (*part, kv_block.base, 0)
    return grads._replace(k=_add(grads.k, dk, place), v=_add(grads.v, dv, place))


def _own_rows(static: Static, who: Masks, rows, block: Block):
    """The block's scaled q, dout, lse and delta; rows of the block before take no part."""
    q, do, lse, delta = (q_rows(a, block) for a in rows)
    if who.q_lens is not None:
        # Past q_lens anything may stand, NaN included.
        real = (block.indices() < who.q_lens[:, None])[:, None, None, :, None]
        q, do = zero_unless(real, q), zero_unless(real, do)
    if rows[0].shape[3] % block.size:
        lse = jnp.where(block.indices() >= block.own, lse, jnp.inf)
    return q * jnp.asarray(split_scale(static, q.dtype)[0], q.dtype), do, lse, delta


def _add(whole: jax.Array, part: jax.Array, at) -> jax.Array:
    """Adds `part` in place, its first element at `at`."""
    at = [jnp.asarray(i, jnp.int32) for i in at]
    old = lax.dynamic_slice(whole, at, part.shape)
    return lax.dynamic_update_slice(whole, old + part, at)


def _add_to_bias(
    grads: Floats,
    who: Masks,
    ds: jax.Array,
    static: Static,
    q_block: Block,
    kv_block: Block,
    part: Part,
) -> Floats:
    """Adds a tile of the logits' gradient to those of bias and ALiBi slopes."""
    head = part.head * jnp.int32(static.group)
    if grads.alibi_slopes is not None:
        slopes = jnp.sum(ds * distance(who, q_block, kv_block), axis=(0, 3, 4)).reshape(-1)
        grads = grads._replace(alibi_slopes=_add(grads.alibi_slopes, -slopes, (head,)))
    if grads.bias is None:
        return grads
    tile = ds.reshape(ds.shape[0], -1, *ds.shape[3:])
    full = [size > 1 for size in grads.bias.shape]
    shared = tuple(i for i in range(4) if not full[i])
    bases = (part.row, head, q_block.base, kv_block.base)
    at = [base if own else 0 for base, own in zip(bases, full, strict=True)]
    return grads._replace(bias=_add(grads.bias, jnp.sum(tile, axis=shared, keepdims=True), at))
