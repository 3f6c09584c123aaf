"""The forward pass of dense attention on TPU: one Pallas kernel, keys first.

The grid brings major blocks of q, k and v into VMEM. In one grid step the kernel walks the tiles
that its work list names, row after row of queries, without a pause between rows::

    tile 0   logits
    tile 1          logits │ softmax, values of tile 0
    tile 2                   logits │ softmax, values of tile 1
     ...                              ...                  one straight-line block each

so that the matrix unit multiplies the next tile's keys while the vector unit exponentiates this
one. Each block alternates step by step (step_kv keys) between the two, because the compiler
schedules a block close to the order in which it is written.
"""

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

SUBLANES = tpu_chip.SUBLANES


class Operands(NamedTuple):
    """The arrays as the kernel takes them; None = not given.

    Attributes:
        q: [batch, num_q_heads, head_dim, q_len].
        k: [batch, num_kv_heads, kv_len, head_dim].
        v: [batch, num_kv_heads, head_dim_v, kv_len].
        bias: [1 or batch, 1 or num_q_heads, kv_len or 1, q_len], or [.., 1, kv_len] for keys.
        slopes, sinks: float32 [num_q_heads].
        q_segments: int32 [batch, 1, q_len].
        kv_segments: int32 [batch, 1, kv_len].
        mask: int8 [1 or batch, 1 or num_q_heads, kv_len, q_len], 0 = not seen.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: jax.Array | None
    slopes: jax.Array | None
    sinks: jax.Array | None
    q_segments: jax.Array | None
    kv_segments: jax.Array | None
    mask: jax.Array | None


def forward(static: Static, x: Operands, bias_of: str, work: Work) -> tuple[jax.Array, jax.Array]:
    """Gives out [batch, num_q_heads, head_dim_v, q_len] and lse [batch, num_q_heads, 1, q_len].

    With a bias lse has two rows. The second is what exp(logit - lse) is multiplied by to be a
    probability, 1 but for the rounding of lse: a bias of -1e9 on all keys leaves it no room for the
    logarithm of their number.
    """
    tiles, rows_of_lse = static.tiles, 1 if x.bias is None else 2
    if static.together % 2:
        raise ValueError(
            f"tiles.longest is {tiles.longest}, must be 0 for the forward kernel, whose runs have "
            f"an even number of tiles, not {static.together}"
        )
    batch, num_q_heads, _, q_len = x.q.shape
    head_dim_v = x.v.shape[2]
    specs = _input_specs(static, x, bias_of, work)
    names = [name for name in Operands._fields if getattr(x, name) is not None]

    def kernel(rows, columns, majors, facts, *refs):
        inputs = dict(zip(names, refs, strict=False))
        work = Work(rows, columns, majors, facts)
        _kernel(static, bias_of, work, inputs, _Refs(*refs[len(names) :]))

    def along_q(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, size, tiles.major_q), lambda b, h, i, j, *_: (b, h, 0, i))

    f32 = jnp.float32
    logit_tile = pltpu.VMEM((tiles.block_kv, tiles.block_q), f32)
    used_values = pltpu.VMEM((head_dim_v, tiles.block_kv), x.v.dtype)
    queries = tiles.major_q + tiles.block_q
    per_query = pltpu.VMEM((SUBLANES, queries), f32)
    return tpu_chip.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(batch, num_q_heads, static.q_majors, static.kv_majors),
            in_specs=[specs[name] for name in names],
            out_specs=[along_q(head_dim_v), along_q(rows_of_lse)],
            scratch_shapes=[
                per_query,
                per_query,
                pltpu.VMEM((head_dim_v, queries), f32),
                [logit_tile, logit_tile],
                [pltpu.VMEM((SUBLANES, tiles.block_q), f32)] * 2,
                [] if static.uses_every_key else [used_values] * 2,
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, num_q_heads, head_dim_v, q_len), x.q.dtype),
            jax.ShapeDtypeStruct((batch, num_q_heads, rows_of_lse, q_len), f32),
        ],
        compiler_params=tpu_chip.compiler_params(("parallel", "parallel", "parallel", "arbitrary")),
        name="dense_attention_forward",
    )(*work, *(getattr(x, name) for name in names))


def _input_specs(static: Static, x: Operands, bias_of: str, work: Work) -> dict:
    """How each operand comes: major blocks, those without work left where they are."""
    tiles, group = static.tiles, static.group

    def kv_major(b, i, j, majors):
        at = ((b if work.differs else 0) * static.q_majors + i) * static.kv_majors
        return jnp.clip(j, majors[schedule.FIRST_MAJOR, at], majors[schedule.LAST_MAJOR, at])

    def q_index(b, h, i, j, *_):
        return b, h, 0, i

    def k_index(b, h, i, j, rows, columns, majors, facts):
        return b, h // group, kv_major(b, i, j, majors), 0

    def v_index(b, h, i, j, rows, columns, majors, facts):
        return b, h // group, 0, kv_major(b, i, j, majors)

    def bias_index(b, h, i, j, rows, columns, majors, facts):
        kv = kv_major(b, i, j, majors)
        last_two = {"both": (kv, i), "queries": (0, i), "keys": (0, kv)}[bias_of]
        return *logits.row_and_head(x.bias, b, h), *last_two

    def mask_index(b, h, i, j, rows, columns, majors, facts):
        return *logits.row_and_head(x.mask, b, h), kv_major(b, i, j, majors), i

    def segment_index(b, h, i, j, rows, columns, majors, facts):
        return b, 0, kv_major(b, i, j, majors)

    whole = pl.BlockSpec(memory_space=pltpu.SMEM)
    return {
        "q": pl.BlockSpec((None, None, x.q.shape[2], tiles.major_q), q_index),
        "k": pl.BlockSpec((None, None, tiles.major_kv, x.k.shape[3]), k_index),
        "v": pl.BlockSpec((None, None, x.v.shape[2], tiles.major_kv), v_index),
        "bias": pl.BlockSpec(logits.bias_block(tiles, bias_of), bias_index),
        "slopes": whole,
        "sinks": whole,
        "q_segments": pl.BlockSpec((None, 1, tiles.major_q), lambda b, h, i, j, *_: (b, 0, i)),
        "kv_segments": pl.BlockSpec((None, 1, tiles.major_kv), segment_index),
        "mask": pl.BlockSpec((None, None, tiles.major_kv, tiles.major_q), mask_index),
    }


class _Refs(NamedTuple):
    """What lies in VMEM beside the operands.

    Attributes:
        out, lse: the results' blocks.
        m, l: [8, major_q]: running maximum, the same in all sublanes; running sum, spread over the
            sublanes.
        acc: [head_dim_v, major_q]: unnormalised output; like m and l it is followed by an empty
            row of tiles.
        tile, tile_max, values: two slots each: a tile's logits; their maximum, spread over
            sublanes; its values, those that no query sees set to 0 (if there may be such).
    """

    out: jax.Array
    lse: jax.Array
    m: jax.Array
    l: jax.Array
    acc: jax.Array
    tile: list[jax.Array]
    tile_max: list[jax.Array]
    values: list[jax.Array]


class _GridStep(NamedTuple):
    """A major block of queries against a major block of keys, for one head.

    Attributes:
        walk: the part of the work list.
        x: the operands' blocks, by name.
        refs: everything else in VMEM.
        extras: what else the logits depend on.
        sink: the head's, or None.
    """

    walk: Walk
    x: dict[str, jax.Array]
    refs: _Refs
    extras: Extras
    sink: jax.Array | None

    @property
    def tiles(self) -> Tiles:
        return self.walk.static.tiles

    @property
    def to_log2(self) -> float:
        """From logits as they are stored to base-2 logarithms."""
        return logits.unit(self.walk.static, self.extras) * LOG2E

    @property
    def steps(self) -> range:
        """The steps of a tile."""
        return range(self.tiles.block_kv // self.tiles.step_kv)

    def queries(self, row: jax.Array):
        """A row of tiles in its major block."""
        return pl.ds(
            pl.multiple_of(row * self.tiles.block_q, self.tiles.block_q), self.tiles.block_q
        )

    def keys(self, step: int) -> slice:
        """A step's keys in their tile."""
        return slice(step * self.tiles.step_kv, (step + 1) * self.tiles.step_kv)

    def prologue(self) -> None:
        """Empty is what rows begin with, and those that meet no tile."""
        rows, left_out = self.walk.static.rows, self.walk.of_major(schedule.QUERIES_LEFT_OUT) > 0
        self.empty(rows)
        begins = (self.walk.kv_major == 0) & left_out
        pl.when(begins)(lambda: lax.fori_loop(0, rows, lambda i, _: self.empty(i), None))

    def empty(self, i: jax.Array | int) -> None:
        """No maximum, no sum, no output."""
        refs, here, shape = self.refs, self.queries(i), (SUBLANES, self.tiles.block_q)
        refs.m[:, here] = jnp.full(shape, -jnp.inf, jnp.float32)
        refs.l[:, here] = jnp.zeros(shape, jnp.float32)
        refs.acc[:, here] = jnp.zeros((refs.acc.shape[0], self.tiles.block_q), jnp.float32)

    def qk(self, t: Tile, step: int, slot: int, kind: Kind) -> None:
        """Logits of a step's keys into the slot, and their values."""
        tiles, static, unseen = self.tiles, self.walk.static, self.walk.unseen(step, kind)
        at = self.walk.where(t, step, kind)
        k = self.x["k"][pl.ds(at.kv, tiles.step_kv), :]
        dots = logits.matmul(k, self.x["q"][:, pl.ds(at.q, at.shape[1])])
        s, _ = logits.finished(static, self.extras, dots, at)
        mask = logits.seen(static, self.extras, at) if kind == MASKED else None
        s = logits.hidden(mask, s)
        if kind == DIAGONAL:
            s = logits.below_diagonal(s)
        self.refs.tile[slot][self.keys(step), unseen:] = s
        if self.refs.values:
            v = self.x["v"][:, pl.ds(at.kv, tiles.step_kv)]
            if kind == MASKED:
                v = logits.used(static, self.extras, at, mask).across(v)
            self.refs.values[slot][:, self.keys(step)] = v
        high = jnp.max(s.reshape(-1, SUBLANES, at.shape[1]), axis=0)
        tile_max = self.refs.tile_max[slot]
        tile_max[:, unseen:] = high if step == 0 else jnp.maximum(tile_max[:, unseen:], high)

    def all_of_qk(self, t: Tile, slot: int, kind: Kind) -> None:
        """Logits and values of a tile into the slot."""
        for step in self.steps:
            self.qk(t, step, slot, kind)

    def softmax_step(
        self, step: int, slot: int, shift: jax.Array, kind: Kind
    ) -> tuple[jax.Array, jax.Array]:
        """Weights of a step's keys, [step_kv, queries], and their sum, spread over sublanes."""
        unseen = self.walk.unseen(step, kind)
        s, shift = self.refs.tile[slot][self.keys(step), unseen:], shift[:, unseen:]
        p = jnp.exp2((s.reshape(-1, *shift.shape) - shift) * self.to_log2)
        return p.reshape(s.shape).astype(self.x["v"].dtype), jnp.sum(p, axis=0)

    def pv(self, t: Tile, step: int, slot: int, weights: jax.Array) -> jax.Array:
        """[head_dim_v, queries]: a step's share of the output."""
        if self.refs.values:
            return logits.matmul(self.refs.values[slot][:, self.keys(step)], weights)
        keys = pl.ds(self.walk.where(t, step, FREE).kv, self.tiles.step_kv)
        return logits.matmul(self.x["v"][:, keys], weights)

    def softmax_and_next_qk(
        self, t: Tile, after: Tile | None, slot: int, kind: Kind, kind_after: Kind
    ) -> None:
        """A tile's weights and output from its slot; the following tile's logits into the other."""
        here, size = self.queries(t.row), self.tiles.block_q
        first = self.walk.of_row(schedule.FIRST_OF_ALL, t.row) == t.column
        state = self.refs.m, self.refs.l, self.refs.acc
        m, l, acc = (before(x, t.row * size, size, first) for x in state)
        m_next = jnp.maximum(m, over_sublanes(self.refs.tile_max[slot][...], jnp.maximum))
        shift = jnp.where(m_next == -jnp.inf, 0.0, m_next)  # -inf - -inf is NaN
        fade = jnp.exp2((m - shift) * self.to_log2)
        total, out = l * fade, None
        for step in self.steps:
            if after is not None:
                self.qk(after, step, 1 - slot, kind_after)
            unseen = self.walk.unseen(step, kind)
            weights, sums = self.softmax_step(step, slot, shift, kind)
            part = self.pv(t, step, slot, weights)
            total = logits.added_from(total, unseen, sums)
            out = part if out is None else logits.added_from(out, unseen, part)
        out += by_query(acc, fade, jnp.multiply)
        for x, value in zip(state, (m_next, total, out), strict=True):
            x[:, here] = value

    def epilogue(self) -> None:
        """The sink joins the sum; rows that see nothing, or do not exist, become 0 and -inf."""
        refs, q_len = self.refs, self.walk.facts[schedule.Q_LEN]

        def row(i, _):
            here = self.queries(i)
            high = refs.m[:, here] * (self.to_log2 / LOG2E)
            lane = lax.broadcasted_iota(jnp.int32, high.shape, 1)
            index = lane + (self.walk.q_major * self.tiles.major_q + i * self.tiles.block_q)
            results = closed(high, refs.l[:, here], refs.acc[:, here], self.sink, index < q_len)
            written(refs.out.at[:, here], refs.lse.at[:, here], *results)

        lax.fori_loop(0, self.walk.static.rows, row, None)


def _kernel(static: Static, bias_of: str, work: Work, x: dict, refs: _Refs) -> None:
    """One grid step."""
    b, h, q_major, kv_major = (pl.program_id(axis) for axis in range(4))
    walk = Walk(static, work, b if work.differs else 0, q_major, kv_major)
    extras = Extras(
        bias=x.get("bias"),
        bias_of=bias_of,
        slope=x["slopes"][h] if "slopes" in x else None,
        q_segments=x.get("q_segments"),
        kv_segments=x.get("kv_segments"),
        mask=x.get("mask"),
    )
    step = _GridStep(walk, x, refs, extras, x["sinks"][h] if "sinks" in x else None)
    step.prologue()
    walk.run(step.all_of_qk, step.softmax_and_next_qk)
    pl.when(kv_major == static.kv_majors - 1)(step.epilogue)


def closed(
    high: jax.Array, sums: jax.Array, acc: jax.Array, sink: jax.Array | None, exists: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Output, lse, and what exp(logit - lse) is multiplied by to be a probability.

    The sink joins the sum; rows that see nothing, or do not exist, become 0 and -inf.

    Args:
        high: [8, n], the largest logit, the same in all sublanes.
        sums: [8, n], of weights, spread over sublanes.
        acc: [head_dim_v, n], unnormalised output.
        sink: the head's, or None.
        exists: [8, n].
    """
    total = over_sublanes(sums, jnp.add)
    top = high if sink is None else jnp.maximum(high, sink)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    share = jnp.exp2((high - top) * LOG2E)
    total *= share
    if sink is not None:
        total += jnp.exp2((sink - top) * LOG2E)
    seen = (total != 0) & exists  # NaN stays NaN
    out = by_query(acc, share / jnp.where(seen, total, 1.0), jnp.multiply)
    out = by_query(out, seen, lambda a, s: jnp.where(s, a, 0.0))
    lse = jnp.where(seen, top + jnp.log(total), -jnp.inf)
    rounded = jnp.exp2((lse - top) * LOG2E) / total
    return out, lse, jnp.where(jnp.abs(lse) < jnp.inf, rounded, 1.0)


def written(
    out_ref: jax.Array, lse_ref: jax.Array, out: jax.Array, lse: jax.Array, rounded: jax.Array
) -> None:
    """Results go into their blocks; lse's has a second row with a bias."""
    out_ref[...] = out.astype(out_ref.dtype)
    lse_ref[:1] = lse[:1]
    if lse_ref.shape[0] > 1:
        lse_ref[1:] = rounded[:1]


def over_sublanes(x: jax.Array, combine) -> jax.Array:
    """[8, n]: each sublane holds the combination of all."""
    for distance in (4, 2, 1):
        x = combine(x, pltpu.roll(x, distance, 0))
    return x


def by_query(x: jax.Array, per_query: jax.Array, combine) -> jax.Array:
    """Combines [rows, n] with [8, n], a value for each query in all sublanes."""
    if x.shape[0] % SUBLANES:
        return combine(x, per_query[:1])
    tall = x.reshape(-1, SUBLANES, x.shape[1])
    return combine(tall, per_query[None]).reshape(x.shape)
