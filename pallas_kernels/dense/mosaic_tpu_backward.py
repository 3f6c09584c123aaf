"""The backward pass of dense attention on TPU: one Pallas kernel for dq, dk and dv, keys first.

With p = exp(logit - lse), keys first, and delta = sum over features of dout * out, minus dlse::

    dv' = dout' p'       ds = p (v dout' - delta)       dk' = scale q' ds'       dq' = scale k' ds

Five products of a tile: k q' and v dout' for p and ds, whose sums are over features, and these
three, whose results are [head_dim, keys] or [head_dim, queries]: a matrix unit of 256 columns is
then full, whatever the head size (with [keys, head_dim] it would be half empty at 128). One grid
step walks a major block of queries against the call's major block of keys; dk and dv stay in VMEM
for all heads of a group and all queries, dq for all of these keys. Keys beyond one major block are
further calls; their dq are summed in float32, so memory stays linear in the length.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_chip
from pallas_kernels.dense import mosaic_tpu_logits as logits
from pallas_kernels.dense.mosaic_tpu_logits import LOG2E, Extras
from pallas_kernels.dense.mosaic_tpu_schedule import Static, Work
from pallas_kernels.dense.mosaic_tpu_tiles import Tiles
from pallas_kernels.dense.mosaic_tpu_walk import Tile, Walk

SUBLANES = tpu_chip.SUBLANES


class Operands(NamedTuple):
    """The arrays as the kernel takes them; None = not given.

    Queries are padded to whole tiles. Those that do not exist are 0 in q, dout and a bias, and
    their lse is inf: their weights are 0.

    Attributes:
        q: [batch, num_q_heads, head_dim, q_len].
        k: [batch, num_kv_heads, kv_len, head_dim].
        k_across: [batch, num_kv_heads, head_dim, kv_len], the same.
        v: [batch, num_kv_heads, kv_len, head_dim_v].
        dout: [batch, num_q_heads, head_dim_v, q_len].
        lse, delta: float32 [batch, num_q_heads, 1, q_len]; lse in base 2.
        bias, slopes, q_segments, kv_segments: as in the forward kernel.
    """

    q: jax.Array
    k: jax.Array
    k_across: jax.Array
    v: jax.Array
    dout: jax.Array
    lse: jax.Array
    delta: jax.Array
    bias: jax.Array | None
    slopes: jax.Array | None
    q_segments: jax.Array | None
    kv_segments: jax.Array | None


class Gradients(NamedTuple):
    """The results; dq is float32 where several calls' are summed.

    Attributes:
        q: [batch, num_q_heads, head_dim, q_len].
        k: [batch, num_kv_heads, head_dim, kv_len].
        v: [batch, num_kv_heads, head_dim_v, kv_len].
        logits: float32 [batch, num_q_heads, kv_len, q_len], before they are summed where the bias
            is broadcast; None without a bias.
        slopes: float32 [batch, num_q_heads, 8, q_len]: parts of minus the slopes' gradient; None
            without slopes.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    logits: jax.Array | None
    slopes: jax.Array | None


def backward(static: Static, x: Operands, bias_of: str, work: Work) -> Gradients:
    """All gradients, one major block of keys after another."""
    if static.kv_majors == 1:
        return _of_major(static, x, bias_of, work, jnp.int32(0), x.q.dtype)

    def step(dq: jax.Array, kv_major: jax.Array):
        part = _of_major(static, x, bias_of, work, kv_major, jnp.float32)
        return dq + part.q, part._replace(q=None)

    batch, num_q_heads, head_dim, q_len = x.q.shape
    dq = jnp.zeros((batch, num_q_heads, head_dim, q_len), jnp.float32)
    dq, parts = lax.scan(step, dq, jnp.arange(static.kv_majors, dtype=jnp.int32))

    def joined(part: jax.Array | None, axis: int) -> jax.Array | None:
        """[kv_majors, ...] with each block's keys along the axis -> [...] with all of them."""
        return None if part is None else jnp.concatenate([*part], axis=axis)

    return Gradients(
        q=dq.astype(x.q.dtype),
        k=joined(parts.k, 3),
        v=joined(parts.v, 3),
        logits=joined(parts.logits, 2),
        slopes=None if parts.slopes is None else jnp.sum(parts.slopes, axis=0),
    )


def _of_major(
    static: Static, x: Operands, bias_of: str, work: Work, kv_major: jax.Array, dq_dtype
) -> Gradients:
    """What one major block of keys gives; k, v and logits of these keys alone."""
    tiles = static.tiles
    head_dim, head_dim_v = x.k.shape[3], x.v.shape[3]
    specs, results = _input_specs(static, x, bias_of), _results(static, x, dq_dtype)
    names = [name for name in Operands._fields if getattr(x, name) is not None]
    made = [name for name in Gradients._fields if getattr(results, name) is not None]

    def kernel(rows, majors, facts, kv_major, *refs):
        inputs, refs = dict(zip(names, refs, strict=False)), refs[len(names) :]
        blocks = Gradients(*[None] * len(Gradients._fields))
        blocks = blocks._replace(**dict(zip(made, refs, strict=False)))
        scratch = _Refs(blocks, *refs[len(made) :])
        _kernel(static, bias_of, Work(rows, majors, facts), kv_major[0], inputs, scratch)

    f32 = jnp.float32
    logit_tile = pltpu.VMEM((tiles.block_kv, tiles.block_q), f32)
    arrays = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(x.k.shape[0], x.k.shape[1], static.group, static.q_majors),
            in_specs=[specs[name] for name in names],
            out_specs=[getattr(results, name)[0] for name in made],
            scratch_shapes=[
                pltpu.VMEM((head_dim, tiles.major_q), f32),
                pltpu.VMEM((head_dim, tiles.major_kv), f32),
                pltpu.VMEM((head_dim_v, tiles.major_kv), f32),
                [logit_tile] * 2,
                [logit_tile] * 2,
                [logit_tile] * 2 if static.soft_cap is not None else [],
                [pltpu.VMEM((head_dim, tiles.block_kv), x.k.dtype)] * 2,
            ],
        ),
        out_shape=[getattr(results, name)[1] for name in made],
        compiler_params=tpu_chip.compiler_params(
            ("parallel", "parallel", "arbitrary", "arbitrary")
        ),
        name="dense_attention_backward",
    )(*work, kv_major[None], *(getattr(x, name) for name in names))
    return results._replace(**dict(zip(made, arrays, strict=True)))


def _results(static: Static, x: Operands, dq_dtype) -> Gradients:
    """(block, shape) of each result of one call; None where it is not wanted."""
    tiles, group = static.tiles, static.group
    batch, num_q_heads, head_dim, q_len = x.q.shape

    def of_keys(like: jax.Array) -> tuple[pl.BlockSpec, jax.ShapeDtypeStruct]:
        size = like.shape[3]
        block = (None, None, size, tiles.major_kv)
        shape = (batch, like.shape[1], size, tiles.major_kv)
        return (
            pl.BlockSpec(block, lambda b, h, g, i, *_: (b, h, 0, 0)),
            jax.ShapeDtypeStruct(shape, like.dtype),
        )

    def of_queries(size: int, dtype) -> tuple[pl.BlockSpec, jax.ShapeDtypeStruct]:
        return (
            pl.BlockSpec(
                (None, None, size, tiles.major_q), lambda b, h, g, i, *_: (b, h * group + g, 0, i)
            ),
            jax.ShapeDtypeStruct((batch, num_q_heads, size, q_len), dtype),
        )

    return Gradients(
        q=of_queries(head_dim, dq_dtype),
        k=of_keys(x.k),
        v=of_keys(x.v),
        logits=None if x.bias is None else of_queries(tiles.major_kv, jnp.float32),
        slopes=None if x.slopes is None else of_queries(SUBLANES, jnp.float32),
    )


def _input_specs(static: Static, x: Operands, bias_of: str) -> dict:
    """How each operand comes: major blocks of queries by the grid, of keys by the call."""
    tiles, group = static.tiles, static.group

    def of_queries(size: int) -> pl.BlockSpec:
        def index(b, h, g, i, *_):
            return b, h * group + g, 0, i

        return pl.BlockSpec((None, None, size, tiles.major_q), index)

    def of_keys(size: int) -> pl.BlockSpec:
        def index(b, h, g, i, rows, majors, facts, kv):
            return b, h, kv[0], 0

        return pl.BlockSpec((None, None, tiles.major_kv, size), index)

    def bias_index(b, h, g, i, rows, majors, facts, kv):
        last_two = {"both": (kv[0], i), "queries": (0, i), "keys": (0, kv[0])}[bias_of]
        head = h * group + g
        return b if x.bias.shape[0] > 1 else 0, head if x.bias.shape[1] > 1 else 0, *last_two

    bias_block = {
        "both": (tiles.major_kv, tiles.major_q),
        "queries": (1, tiles.major_q),
        "keys": (1, tiles.major_kv),
        "": (),
    }[bias_of]
    row = pl.BlockSpec(
        (None, None, 1, tiles.major_q), lambda b, h, g, i, *_: (b, h * group + g, 0, i)
    )
    return {
        "q": of_queries(x.q.shape[2]),
        "k": of_keys(x.k.shape[3]),
        "k_across": pl.BlockSpec(
            (None, None, x.k.shape[3], tiles.major_kv),
            lambda b, h, g, i, rows, majors, facts, kv: (b, h, 0, kv[0]),
        ),
        "v": of_keys(x.v.shape[3]),
        "dout": of_queries(x.v.shape[3]),
        "lse": row,
        "delta": row,
        "bias": pl.BlockSpec((None, None, *bias_block), bias_index),
        "slopes": pl.BlockSpec(memory_space=pltpu.SMEM),
        "q_segments": pl.BlockSpec((None, 1, tiles.major_q), lambda b, h, g, i, *_: (b, 0, i)),
        "kv_segments": pl.BlockSpec(
            (None, 1, tiles.major_kv), lambda b, h, g, i, rows, majors, facts, kv: (b, 0, kv[0])
        ),
    }


class _Refs(NamedTuple):
    """What lies in VMEM beside the operands.

    Attributes:
        results: the results' blocks.
        dq_sum, dk_sum, dv_sum: float32 sums so far.
        tile, dp, slope, keys: two slots each: a tile's logits; products of v and dout; derivative
            of the soft cap (with one only); the keys [head_dim, block_kv], those that no query
            sees set to 0.
    """

    results: Gradients
    dq_sum: jax.Array
    dk_sum: jax.Array
    dv_sum: jax.Array
    tile: list[jax.Array]
    dp: list[jax.Array]
    slope: list[jax.Array]
    keys: list[jax.Array]


class _GridStep(NamedTuple):
    """A major block of queries against the call's major block of keys, for one query head.

    Attributes:
        walk: the part of the work list.
        x: the operands' blocks, by name.
        refs: everything else in VMEM.
        extras: what else the logits depend on.
    """

    walk: Walk
    x: dict[str, jax.Array]
    refs: _Refs
    extras: Extras

    @property
    def tiles(self) -> Tiles:
        return self.walk.static.tiles

    @property
    def steps(self) -> range:
        """The steps of a tile."""
        return range(self.tiles.block_kv // self.tiles.step_kv)

    def keys_in_tile(self, step: int) -> slice:
        """A step's keys in their tile."""
        return slice(step * self.tiles.step_kv, (step + 1) * self.tiles.step_kv)

    def products(self, t: Tile, step: int, slot: int, masked: bool) -> None:
        """Logits of a step's keys, products of their values with dout, and these keys."""
        static, refs = self.walk.static, self.refs
        at = self.walk.where(t, step)
        keys, queries = pl.ds(at.kv, at.shape[0]), pl.ds(at.q, at.shape[1])
        here = self.keys_in_tile(step)
        k, k_across, v = self.x["k"][keys, :], self.x["k_across"][:, keys], self.x["v"][keys, :]
        mask = logits.seen(static, self.extras, at) if masked else None
        if masked:
            # Queries that do not exist weigh no key, as their lse is inf; but 0 * NaN is NaN.
            used = logits.used(static, self.extras, at, mask)
            k, k_across, v = used.down(k), used.across(k_across), used.down(v)
        dots = logits.matmul(k, self.x["q"][:, queries])
        s, slope = logits.finished(static, self.extras, dots, at)
        refs.tile[slot][here, :] = logits.hidden(mask, s)
        refs.dp[slot][here, :] = logits.matmul(v, self.x["dout"][:, queries])
        refs.keys[slot][:, here] = k_across
        if slope is not None:
            refs.slope[slot][here, :] = slope

    def all_products(self, t: Tile, slot: int, masked: bool) -> None:
        """The products of a whole tile."""
        for step in self.steps:
            self.products(t, step, slot, masked)

    def weights(self, t: Tile, step: int, slot: int) -> tuple[jax.Array, jax.Array]:
        """Weights of a step's keys and the gradients of their logits, float32."""
        at, here = self.walk.where(t, step), self.keys_in_tile(step)
        queries = pl.ds(at.q, at.shape[1])
        to_log2 = logits.unit(self.walk.static, self.extras) * LOG2E
        p = jnp.exp2(self.refs.tile[slot][here, :] * to_log2 - self.x["lse"][:, queries])
        return p, p * (self.refs.dp[slot][here, :] - self.x["delta"][:, queries])

    def sums_and_next_products(self, t: Tile, after: Tile | None, slot: int, masked: bool) -> None:
        """A tile's part of the gradients from its slot; the following tile's products."""
        refs, dtype = self.refs, self.x["q"].dtype
        dq = None
        for step in self.steps:
            if after is not None:
                self.products(after, step, 1 - slot, masked)
            at, here = self.walk.where(t, step), self.keys_in_tile(step)
            keys, queries = pl.ds(at.kv, at.shape[0]), pl.ds(at.q, at.shape[1])
            p, ds = self.weights(t, step, slot)
            if refs.results.logits is not None:
                refs.results.logits[keys, queries] = ds
            if refs.results.slopes is not None:
                distance = logits.distance(at).reshape(-1, SUBLANES, at.shape[1])
                parts = jnp.sum(ds.reshape(distance.shape) * distance, axis=0)
                refs.results.slopes[:, queries] += parts
            if refs.slope:
                ds *= refs.slope[slot][here, :]
            p, ds = p.astype(dtype), ds.astype(dtype)
            refs.dv_sum[:, keys] += logits.matmul(self.x["dout"][:, queries], p, (1, 1))
            refs.dk_sum[:, keys] += logits.matmul(self.x["q"][:, queries], ds, (1, 1))
            part = logits.matmul(refs.keys[slot][:, here], ds)
            dq = part if dq is None else dq + part
        refs.dq_sum[:, queries] += dq


def _kernel(
    static: Static, bias_of: str, work: Work, kv_major: jax.Array, x: dict, refs: _Refs
) -> None:
    """One grid step."""
    b, h, g, q_major = (pl.program_id(axis) for axis in range(4))
    walk = Walk(static, work, b if work.differs else 0, q_major, kv_major)
    extras = Extras(
        bias=x.get("bias"),
        bias_of=bias_of,
        slope=x["slopes"][h * static.group + g] if "slopes" in x else None,
        q_segments=x.get("q_segments"),
        kv_segments=x.get("kv_segments"),
    )
    step = _GridStep(walk, x, refs, extras)

    @pl.when((g == 0) & (q_major == 0))
    def _():
        refs.dk_sum[...] = jnp.zeros_like(refs.dk_sum)
        refs.dv_sum[...] = jnp.zeros_like(refs.dv_sum)

    refs.dq_sum[...] = jnp.zeros_like(refs.dq_sum)
    for sums in (refs.results.logits, refs.results.slopes):
        if sums is not None:
            sums[...] = jnp.zeros_like(sums)
    walk.run(step.all_products, step.sums_and_next_products)
    refs.results.q[...] = (refs.dq_sum[...] * static.scale).astype(refs.results.q.dtype)

    @pl.when((g == static.group - 1) & (q_major == static.q_majors - 1))
    def _():
        refs.results.k[...] = (refs.dk_sum[...] * static.scale).astype(refs.results.k.dtype)
        refs.results.v[...] = refs.dv_sum[...].astype(refs.results.v.dtype)
