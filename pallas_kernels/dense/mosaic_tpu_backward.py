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

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_chip
from pallas_kernels.dense import mosaic_tpu_logits as logits
from pallas_kernels.dense import mosaic_tpu_schedule as schedule
from pallas_kernels.dense.mosaic_tpu_logits import LOG2E, Extras
from pallas_kernels.dense.mosaic_tpu_schedule import Static, Work
from pallas_kernels.dense.mosaic_tpu_tiles import Tiles
from pallas_kernels.dense.mosaic_tpu_walk import DIAGONAL, FREE, MASKED, Kind, Tile, Walk, before

LANES, SUBLANES = tpu_chip.LANES, tpu_chip.SUBLANES
# What stands for an lse of NaN: weights of keys that are seen are inf, and those of others still 0.
# Where q and dout are 0 (`_GridStep.clear_nan`), every product with inf is NaN, and with 0 is 0. No
# bias that hides is this number.
NAN = -(2.0**125)


class Operands(NamedTuple):
    """The arrays as the kernel takes them; None = not given.

    Queries are padded to whole tiles. Those that do not exist are 0 in q, dout and a bias, and
    their lse is inf: their weights are 0. Where lse is NaN it comes as NAN, and delta as 0.

    Attributes:
        q: [batch, num_q_heads, head_dim, q_len].
        k: [batch, num_kv_heads, kv_len, head_dim].
        v: [batch, num_kv_heads, kv_len, head_dim_v].
        dout: [batch, num_q_heads, head_dim_v, q_len].
        lse, delta: float32 [batch, num_q_heads, 1, q_len]; lse in base 2.
        has_nan: int32 [batch * num_kv_heads] or [1], in SMEM: has a kv head's lse, or any, a NaN?
        bias, slopes, q_segments, kv_segments, mask: as in the forward kernel.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    dout: jax.Array
    lse: jax.Array
    delta: jax.Array
    has_nan: jax.Array
    bias: jax.Array | None
    slopes: jax.Array | None
    q_segments: jax.Array | None
    kv_segments: jax.Array | None
    mask: jax.Array | None


class Gradients(NamedTuple):
    """The results; dq is float32 where several calls' are summed.

    Attributes:
        q: [batch, num_q_heads, head_dim, q_len].
        k: [batch, num_kv_heads, head_dim, kv_len].
        v: [batch, num_kv_heads, head_dim_v, kv_len].
        logits: float32 [batch, num_q_heads, kv_len, q_len], before they are summed where the bias
            is broadcast; None where none is wanted.
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
    tiles, head_dim, head_dim_v = static.tiles, x.k.shape[3], x.v.shape[3]
    specs, results = _input_specs(static, x, bias_of), _results(static, x, dq_dtype)
    names = [name for name in Operands._fields if getattr(x, name) is not None]
    made = [name for name in Gradients._fields if getattr(results, name) is not None]

    def kernel(rows, columns, majors, facts, kv_major, *refs):
        inputs, refs = dict(zip(names, refs, strict=False)), refs[len(names) :]
        blocks = Gradients(*[None] * len(Gradients._fields))
        blocks = blocks._replace(**dict(zip(made, refs, strict=False)))
        sums, *slots = refs[len(made) :]
        scratch = _Refs(blocks, _Sums(*sums), *slots)
        work = Work(rows, columns, majors, facts)
        _kernel(static, bias_of, order, work, kv_major[0], inputs, scratch)

    f32, order = jnp.float32, "kv" if tpu_chip.current().mxu > LANES else "vk"
    weights = pltpu.VMEM((tiles.block_kv, tiles.block_q), x.q.dtype)
    whole = pltpu.VMEM((tiles.block_kv, tiles.block_q), f32)
    used_keys = pltpu.VMEM((tiles.block_kv, head_dim), x.k.dtype)
    arrays = tpu_chip.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(x.k.shape[0], x.k.shape[1], static.group, static.q_majors),
            in_specs=[specs[name] for name in names],
            out_specs=[getattr(results, name)[0] for name in made],
            scratch_shapes=[
                [
                    pltpu.VMEM((head_dim, tiles.major_q + tiles.block_q), f32),
                    pltpu.VMEM((head_dim, tiles.major_kv + tiles.step_kv), f32),
                    pltpu.VMEM((head_dim_v, tiles.major_kv + tiles.step_kv), f32),
                ],
                weights,
                weights,
                [whole] if static.bias_gradient or x.slopes is not None else [],
                [] if static.uses_every_key else [used_keys],
            ],
        ),
        out_shape=[getattr(results, name)[1] for name in made],
        compiler_params=tpu_chip.compiler_params(
            ("parallel", "parallel", "arbitrary", "arbitrary")
        ),
        name="dense_attention_backward",
        written=[5 + names.index(name) for name in ("q", "k", "dout")],  # by `clear_nan`
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
        logits=of_queries(tiles.major_kv, jnp.float32) if static.bias_gradient else None,
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
        def index(b, h, g, i, rows, columns, majors, facts, kv):
            return b, h, kv[0], 0

        return pl.BlockSpec((None, None, tiles.major_kv, size), index)

    def bias_index(b, h, g, i, rows, columns, majors, facts, kv):
        last_two = {"both": (kv[0], i), "queries": (0, i), "keys": (0, kv[0])}[bias_of]
        return *logits.row_and_head(x.bias, b, h * group + g), *last_two

    def mask_index(b, h, g, i, rows, columns, majors, facts, kv):
        return *logits.row_and_head(x.mask, b, h * group + g), kv[0], i

    row = pl.BlockSpec(
        (None, None, 1, tiles.major_q), lambda b, h, g, i, *_: (b, h * group + g, 0, i)
    )
    return {
        "q": of_queries(x.q.shape[2]),
        "k": of_keys(x.k.shape[3]),
        "v": of_keys(x.v.shape[3]),
        "dout": of_queries(x.v.shape[3]),
        "lse": row,
        "delta": row,
        "has_nan": pl.BlockSpec(memory_space=pltpu.SMEM),
        "bias": pl.BlockSpec(logits.bias_block(tiles, bias_of), bias_index),
        "slopes": pl.BlockSpec(memory_space=pltpu.SMEM),
        "q_segments": pl.BlockSpec((None, 1, tiles.major_q), lambda b, h, g, i, *_: (b, 0, i)),
        "kv_segments": pl.BlockSpec(
            (None, 1, tiles.major_kv), lambda b, h, g, i, *work: (b, 0, work[-1][0])
        ),
        "mask": pl.BlockSpec((None, None, tiles.major_kv, tiles.major_q), mask_index),
    }


class _Sums(NamedTuple):
    """Gradients so far, float32, and behind them 0 for a tile's queries or a step's keys."""

    q: jax.Array
    k: jax.Array
    v: jax.Array


class _Refs(NamedTuple):
    """What lies in VMEM beside the operands.

    Attributes:
        results: the results' blocks.
        sums: the gradients so far.
        p, ds: a tile's weights and the gradients of its products with q, as they are multiplied.
        whole: the gradients of its finished logits, float32 (if some result is made of them).
        keys: its keys [block_kv, head_dim], those that no query sees set to 0 (if there may be
            such).
    """

    results: Gradients
    sums: _Sums
    p: jax.Array
    ds: jax.Array
    whole: list[jax.Array]
    keys: list[jax.Array]


class _Weights(NamedTuple):
    """What a step's keys and queries make, and the keys; see `_Refs`."""

    p: jax.Array
    ds: jax.Array
    whole: jax.Array
    k: jax.Array


class _GridStep(NamedTuple):
    """A major block of queries against the call's major block of keys, for one query head.

    Attributes:
        walk: the part of the work list.
        x: the operands' blocks, by name.
        refs: everything else in VMEM.
        extras: what else the logits depend on.
        is_first_head: whether it is the first of its group.
        order: which of k and v is first in the sums of a step.
    """

    walk: Walk
    x: dict[str, jax.Array]
    refs: _Refs
    extras: Extras
    is_first_head: jax.Array
    order: str

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

    def weights(self, t: Tile, step: int, kind: Kind) -> Iterator[_Weights | None]:
        """A step's weights: first what logits give, then all; others' products come between."""
        static, at = self.walk.static, self.walk.where(t, step, kind)
        keys, queries = pl.ds(at.kv, at.shape[0]), pl.ds(at.q, at.shape[1])
        k, v = self.x["k"][keys, :], self.x["v"][keys, :]
        mask = logits.seen(static, self.extras, at) if kind == MASKED else None
        if kind == MASKED and not static.uses_every_key:
            # Queries that do not exist weigh no key, as their lse is inf; but 0 * NaN is NaN.
            used = logits.used(static, self.extras, at, mask)
            k, v = used.down(k), used.down(v)
        dots = logits.matmul(k, self.x["q"][:, queries])
        s, slope = logits.finished(static, self.extras, dots, at)
        s = logits.below_diagonal(s) if kind == DIAGONAL else logits.hidden(mask, s)
        p = jnp.exp2(s * (logits.unit(static, self.extras) * LOG2E) - self.x["lse"][:, queries])
        yield None
        whole = p * (logits.matmul(v, self.x["dout"][:, queries]) - self.x["delta"][:, queries])
        ds = whole if slope is None else whole * slope
        yield _Weights(p.astype(k.dtype), ds.astype(k.dtype), whole, k)

    def keep(self, made: _Weights, step: int, kind: Kind) -> None:
        """A step's weights are kept for the sums."""
        here, some = self.keys_in_tile(step), slice(self.walk.unseen(step, kind), None)
        self.refs.p[here, some] = made.p
        self.refs.ds[here, some] = made.ds
        for kept in self.refs.whole:
            kept[here, some] = made.whole
        for kept in self.refs.keys:
            kept[here, :] = made.k

    def all_weights(self, t: Tile, _: int, kind: Kind) -> None:
        """Weights of a whole tile."""
        for step in self.steps:
            *_, made = self.weights(t, step, kind)
            self.keep(made, step, kind)

    def sums_and_next_weights(
        self, t: Tile, after: Tile | None, _: int, kind: Kind, kind_after: Kind
    ) -> None:
        """A tile's part of the gradients from its weights; those of the following tile.

        What a step keeps is read before the same step of the following tile comes there: one slot
        does. The compiler keeps near the order of this code. The products for sums push much into
        the matrix unit and multiply little by it, those for weights the other way round: on v6e a
        free tile takes 1023 cycles if both of these come first, and 952 in turn; with dk first 952,
        with dv first 967, but on v5e 2780 and 2587.
        """
        refs = self.refs
        ends_keys = kind == DIAGONAL and self.keys_end
        ends_queries = kind == DIAGONAL and self.queries_end
        dq, first = None, self.walk.begins_keys(t) & self.is_first_head
        for step in self.steps:
            at, here = self.walk.where(t, step, kind), self.keys_in_tile(step)
            unseen = self.walk.unseen(step, kind)
            keys, queries = pl.ds(at.kv, at.shape[0]), pl.ds(at.q, at.shape[1])
            p, ds = refs.p[here, unseen:], refs.ds[here, unseen:]
            k = refs.keys[0][here, :] if refs.keys else self.x["k"][keys, :]
            for kept in refs.whole:
                self.of_logits(kept[here, unseen:], at)
            next_weights = None if after is None else self.weights(after, step, kind_after)
            for name in self.order:
                made = None if next_weights is None else next(next_weights)
                of, weights = {"k": ("q", ds), "v": ("dout", p)}[name]
                part = logits.matmul(self.x[of][:, queries], weights, (1, 1))
                self.add(name, keys, first, part, ends_keys)
            part = logits.matmul(k, ds, (0, 0))
            dq = part if dq is None else logits.added_from(dq, unseen, part)
            if made is not None:
                self.keep(made, step, kind_after)
        first = self.walk.of_row(schedule.FIRST_HERE, t.row) == t.column
        self.add("q", self.queries(t), first, dq, ends_queries)

    def of_logits(self, ds: jax.Array, at: logits.Where) -> None:
        """Gradients of a step's finished logits: into those of the bias, and of the slopes."""
        results, queries = self.refs.results, pl.ds(at.q, at.shape[1])
        if results.logits is not None:
            results.logits[pl.ds(at.kv, at.shape[0]), queries] = ds
        if results.slopes is not None:
            distance = logits.distance(at).reshape(-1, SUBLANES, at.shape[1])
            results.slopes[:, queries] += jnp.sum(ds.reshape(distance.shape) * distance, axis=0)

    def queries(self, t: Tile) -> pl.Slice:
        """A tile's queries in their major block."""
        return pl.ds(self.walk.where(t, 0, FREE).q, self.tiles.block_q)

    def keys(self, t: Tile) -> pl.Slice:
        """A tile's keys in their major block."""
        return pl.ds(self.walk.where(t, 0, FREE).kv, self.tiles.block_kv)

    @property
    def queries_end(self) -> bool:
        """Whether a grid step that meets the diagonal has each of its queries on it."""
        return self.walk.static.diagonal == self.walk.static.rows

    @property
    def keys_end(self) -> bool:
        """Whether the same holds for the keys, and they meet the queries of one grid step only."""
        static = self.walk.static
        return static.diagonal == static.columns and static.group * static.q_majors == 1

    def add(self, name: str, here: pl.Slice, first: jax.Array, part: jax.Array, ends: bool) -> None:
        """A part of a gradient is added to the sum, or goes out with it."""
        sums = getattr(self.refs.sums, name)
        total = before(sums, here.start, here.size, first) + part
        if ends:
            self.out(name, here, total)
        else:
            sums[:, here] = total

    def out(self, name: str, here: pl.Slice, total: jax.Array | None = None) -> None:
        """A gradient goes out, as it is summed up if not given."""
        total = getattr(self.refs.sums, name)[:, here] if total is None else total
        result = getattr(self.refs.results, name)
        result[:, here] = (total * (1.0 if name == "v" else self.walk.static.scale)).astype(
            result.dtype
        )

    def clear_nan(self) -> None:
        """Sets q and dout of queries whose lse is NaN, and keys that are NaN, to 0 in their blocks.

        A key that is NaN is seen by such queries alone.
        """
        tiles = self.tiles

        def of_queries(i, _):
            here = pl.ds(pl.multiple_of(i * tiles.block_q, tiles.block_q), tiles.block_q)
            is_nan = self.x["lse"][:, here] == NAN
            for x in (self.x["q"], self.x["dout"]):
                x[:, here] = jnp.where(is_nan, 0.0, x[:, here].astype(jnp.float32)).astype(x.dtype)

        def of_keys(i, _):
            here = pl.ds(pl.multiple_of(i * tiles.step_kv, tiles.step_kv), tiles.step_kv)
            k = self.x["k"][here, :].astype(jnp.float32)
            self.x["k"][here, :] = jnp.where(jnp.isnan(k), 0.0, k).astype(self.x["k"].dtype)

        lax.fori_loop(0, tiles.major_q // tiles.block_q, of_queries, None)
        lax.fori_loop(0, tiles.major_kv // tiles.step_kv, of_keys, None)

    def prologue(self, starts: jax.Array) -> None:
        """What sums begin with; those that no tile begins are 0."""
        walk, sums, results = self.walk, self.refs.sums, self.refs.results
        keys_left_out = walk.of_column(schedule.KEYS_LEFT_OUT, 0) > 0
        pl.when(starts & keys_left_out)(lambda: _clear(sums.k, sums.v))
        pl.when(walk.of_major(schedule.QUERIES_LEFT_OUT) > 0)(lambda: _clear(sums.q))
        _clear(sums.q.at[:, self.tiles.major_q :])
        _clear(*(x.at[:, self.tiles.major_kv :] for x in (sums.k, sums.v)))
        _clear(*(x for x in (results.logits, results.slopes) if x is not None))

    def epilogue(self, ends: jax.Array) -> None:
        """All goes out that the run over the diagonal did not send."""
        on_diagonal = self.walk.of_major(schedule.MASKED) > 0
        first = self.walk.first_of(MASKED)
        queries, keys = pl.ds(0, self.tiles.major_q), pl.ds(0, self.tiles.major_kv)
        if self.queries_end:
            pl.when(on_diagonal)(lambda: self.out("q", self.queries(first)))
            pl.when(~on_diagonal)(lambda: self.out("q", queries))
        else:
            self.out("q", queries)
        for name in ("k", "v"):
            if self.keys_end:
                pl.when(on_diagonal)(functools.partial(self.out, name, self.keys(first)))
                ends = ~on_diagonal
            pl.when(ends)(functools.partial(self.out, name, keys))


def _kernel(
    static: Static, bias_of: str, order: str, work: Work, kv_major: jax.Array, x: dict, refs: _Refs
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
        mask=x.get("mask"),
    )
    step = _GridStep(walk, x, refs, extras, g == 0, order)
    flag = jnp.minimum(b * pl.num_programs(1) + h, x["has_nan"].shape[0] - 1)
    pl.when(x["has_nan"][flag] > 0)(step.clear_nan)
    step.prologue((g == 0) & (q_major == 0))
    walk.run(step.all_weights, step.sums_and_next_weights)
    step.epilogue((g == static.group - 1) & (q_major == static.q_majors - 1))


def _clear(*sums: jax.Array) -> None:
    for x in sums:
        x[...] = jnp.zeros(x.shape, x.dtype)
