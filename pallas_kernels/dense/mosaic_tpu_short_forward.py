"""The forward pass of dense attention on TPU over short sequences, several heads to a grid step.

While one unit's logits are exponentiated and multiplied with values, the next one's are computed,
step by step in turn; see `mosaic_tpu_short`. All of a unit's logits are there before the first is
exponentiated, so there is one maximum, and nothing is added to what was before.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_chip
from pallas_kernels.dense import mosaic_tpu_logits as logits
from pallas_kernels.dense.mosaic_tpu_forward import Operands, closed, over_sublanes, written
from pallas_kernels.dense.mosaic_tpu_logits import LOG2E
from pallas_kernels.dense.mosaic_tpu_schedule import Q_LEN, Static
from pallas_kernels.dense.mosaic_tpu_short import Blocks, Heads, Plan, Step, Unit, between

SUBLANES = tpu_chip.SUBLANES


def forward(
    static: Static, plan: Plan, x: Operands, bias_of: str, facts: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """What `mosaic_tpu_forward.forward` gives.

    Args:
        static: the call, with the tiles that were `planned`.
        plan: of its heads.
        x: as that one's, but for k: [batch, num_kv_heads, head_dim, kv_len].
        bias_of: along what the bias runs.
        facts: int32 [3, 1 or batch], as `Work.facts`; None = all is known.
    """
    batch, num_q_heads, head_dim, q_len = x.q.shape
    head_dim_v, rows_of_lse = x.v.shape[2], 1 if x.bias is None else 2
    blocks, tiles = Blocks(static, plan), static.tiles
    specs = blocks.extras(x, bias_of) | {
        "q": blocks.queries(head_dim),
        "k": blocks.keys(head_dim),
        "v": blocks.keys(head_dim_v),
    }
    names = [name for name in Operands._fields if getattr(x, name) is not None]

    def kernel(*refs):
        known, refs = (None, refs) if facts is None else (refs[0], refs[1:])
        inputs = dict(zip(names, refs, strict=False))
        heads = Heads(static, plan, known, inputs, bias_of)
        step = _GridStep(heads, _Refs(*refs[len(names) :]))
        heads.walk(step.all_of_qk, step.softmax_and_next_qk)

    f32 = jnp.float32
    return tpu_chip.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0 if facts is None else 1,
            grid=(num_q_heads // plan.heads, batch // plan.batch),
            in_specs=[specs[name] for name in names],
            out_specs=[blocks.queries(head_dim_v), blocks.queries(rows_of_lse)],
            scratch_shapes=[
                [pltpu.VMEM((tiles.major_kv, tiles.block_q), f32)] * plan.slots,
                [pltpu.VMEM((SUBLANES, tiles.block_q), f32)] * plan.slots,
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, num_q_heads, head_dim_v, q_len), x.q.dtype),
            jax.ShapeDtypeStruct((batch, num_q_heads, rows_of_lse, q_len), f32),
        ],
        compiler_params=tpu_chip.compiler_params(("parallel", "parallel")),
        name="dense_attention_forward",
    )(*([] if facts is None else [facts]), *(getattr(x, name) for name in names))


class _Refs(NamedTuple):
    """What lies in VMEM beside the operands.

    Attributes:
        out, lse: the results' blocks.
        tile, tile_max: slots: a unit's logits; their maximum, spread over sublanes.
    """

    out: jax.Array
    lse: jax.Array
    tile: list[jax.Array]
    tile_max: list[jax.Array]


class _GridStep(NamedTuple):
    """Some heads, and everything in VMEM beside their operands."""

    heads: Heads
    refs: _Refs

    def qk(self, u: Unit, step: Step) -> None:
        """Logits of a step's keys into the unit's slot."""
        static, x = self.heads.static, self.heads.x
        at, extras = self.heads.where(u, step), self.heads.extras(u)
        k = x["k"].at[u.kv_head][:, step.keys]
        q = x["q"].at[u.head][:, self.heads.queries(u, step.unseen)]
        s, _ = logits.finished(static, extras, logits.matmul(k, q, (0, 0)), at)
        s = self.heads.hidden(u, step, s)
        self.refs.tile[u.slot][step.keys, step.unseen :] = s
        high = jnp.max(s.reshape(-1, SUBLANES, at.shape[1]), axis=0)
        tile_max, first = self.refs.tile_max[u.slot], step is self.heads.steps(u)[0]
        here = slice(step.unseen, None)
        tile_max[:, here] = high if first else jnp.maximum(tile_max[:, here], high)

    def all_of_qk(self, u: Unit) -> None:
        """Logits of a unit."""
        for step in self.heads.steps(u):
            self.qk(u, step)

    def values(self, u: Unit, step: Step) -> jax.Array:
        """[head_dim_v, keys] of a step, those that nobody sees set to 0."""
        v = self.heads.x["v"].at[u.kv_head][:, step.keys]
        return self.heads.used(u, step).across(v) if step.cleaned else v

    def softmax_and_next_qk(self, u: Unit, after: Unit | None) -> None:
        """A unit's results from its slot; the logits of another into its own."""
        steps = self.heads.steps(u)
        to_log2 = logits.unit(self.heads.static, self.heads.extras(u)) * LOG2E
        high = over_sublanes(self.refs.tile_max[u.slot][...], jnp.maximum)
        shift = jnp.where(high == -jnp.inf, 0.0, high)  # -inf - -inf is NaN
        total = out = None
        others = between(steps, () if after is None else self.heads.steps(after))
        for step, others_here in zip(steps, others, strict=True):
            for other in others_here:
                self.qk(after, other)
            s = self.refs.tile[u.slot][step.keys, step.unseen :]
            p = jnp.exp2((s.reshape(-1, SUBLANES, s.shape[1]) - shift[:, step.unseen :]) * to_log2)
            sums, v = jnp.sum(p, axis=0), self.values(u, step)
            part = logits.matmul(v, p.reshape(s.shape).astype(v.dtype))
            total = sums if total is None else logits.added_from(total, step.unseen, sums)
            out = part if out is None else logits.added_from(out, step.unseen, part)
        self.epilogue(u, high * (to_log2 / LOG2E), total, out)

    def epilogue(self, u: Unit, high: jax.Array, total: jax.Array, out: jax.Array) -> None:
        """A unit's results go out."""
        heads, here = self.heads, self.heads.queries(u)
        sink = heads.x["sinks"][heads.index_of_head(u)] if "sinks" in heads.x else None
        index = lax.broadcasted_iota(jnp.int32, high.shape, 1) + here.start
        results = closed(high, total, out, sink, index < heads.facts_of(u)[Q_LEN])
        out, lse = (ref.at[u.head].at[:, here] for ref in (self.refs.out, self.refs.lse))
        written(out, lse, *results)
