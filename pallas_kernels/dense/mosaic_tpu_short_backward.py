"""The backward pass of dense attention on TPU over short sequences, several heads to a grid step.

The five products of `mosaic_tpu_backward`. While a unit's weights are multiplied into the sums, the
next one's are computed, step by step in turn; see `mosaic_tpu_short`. A group's heads are in one
run, so what is added to, and what goes out, is known when the kernel is traced.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_chip
from pallas_kernels.dense import mosaic_tpu_logits as logits
from pallas_kernels.dense.mosaic_tpu_backward import NAN, Gradients, Operands
from pallas_kernels.dense.mosaic_tpu_logits import LOG2E
from pallas_kernels.dense.mosaic_tpu_schedule import Static
from pallas_kernels.dense.mosaic_tpu_short import Blocks, Heads, Plan, Step, Unit, between, parted

SUBLANES = tpu_chip.SUBLANES


def backward(
    static: Static, plan: Plan, x: Operands, bias_of: str, facts: jax.Array | None
) -> Gradients:
    """What `mosaic_tpu_backward.backward` gives.

    Args:
        static: the call, with the tiles that were `planned`.
        plan: of its heads, by groups.
        x: as that one's, but for k and v, [batch, num_kv_heads, n, kv_len], and has_nan, int32 [1]
            or [grid steps].
        bias_of: along what the bias runs.
        facts: int32 [3, 1 or batch], as `Work.facts`; None = all is known.
    """
    batch, num_q_heads, head_dim, _ = x.q.shape
    blocks, tiles, head_dim_v = Blocks(static, plan), static.tiles, x.v.shape[2]
    specs = blocks.extras(x, bias_of) | {
        "q": blocks.queries(head_dim),
        "k": blocks.keys(head_dim),
        "v": blocks.keys(head_dim_v),
        "dout": blocks.queries(head_dim_v),
        "lse": blocks.queries(1),
        "delta": blocks.queries(1),
    }
    names = [name for name in Operands._fields if getattr(x, name) is not None]
    results = _results(x, blocks)
    made = [name for name in Gradients._fields if getattr(results, name) is not None]
    prefetched = [] if facts is None else [facts]

    def kernel(*refs):
        known, refs = (refs[0], refs[1:]) if prefetched else (None, refs)
        inputs, refs = dict(zip(names, refs, strict=False)), refs[len(names) :]
        gradients = Gradients(*[None] * len(Gradients._fields))
        gradients = gradients._replace(**dict(zip(made, refs, strict=False)))
        heads = Heads(static, plan, known, inputs, bias_of)
        step = _GridStep(heads, _Refs(gradients, *refs[len(made) :]), order)
        step.prologue()
        heads.walk(step.all_weights, step.sums_and_next_weights)

    order = "kv" if tpu_chip.current().mxu > tpu_chip.LANES else "vk"
    weights = pltpu.VMEM((tiles.major_kv, tiles.block_q), x.q.dtype)
    keys = pltpu.VMEM((head_dim, tiles.major_kv), x.k.dtype)
    cleaned = any(step.cleaned for steps in plan.rows for step in steps)
    sums = [pltpu.VMEM((size, tiles.major_kv), jnp.float32) for size in (head_dim, head_dim_v)]
    arrays = tpu_chip.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(num_q_heads // plan.heads, batch // plan.batch),
            in_specs=[specs[name] for name in names],
            out_specs=[getattr(results, name)[0] for name in made],
            scratch_shapes=[
                [weights] * plan.slots,
                [weights] * plan.slots,
                [keys] * plan.slots if cleaned else [],
                sums if static.group * static.rows > 1 else [],
            ],
        ),
        out_shape=[getattr(results, name)[1] for name in made],
        compiler_params=tpu_chip.compiler_params(("parallel", "parallel")),
        name="dense_attention_backward",
        written=[len(prefetched) + names.index(name) for name in ("q", "k", "dout")],
    )(*prefetched, *(getattr(x, name) for name in names))
    return results._replace(**dict(zip(made, arrays, strict=True)))


def _results(x: Operands, blocks: Blocks) -> Gradients:
    """(block, shape) of each result; None where it is not wanted."""
    kv_len = x.k.shape[3]

    def of_queries(size: int, dtype) -> tuple[pl.BlockSpec, jax.ShapeDtypeStruct]:
        shape = (*x.q.shape[:2], size, x.q.shape[3])
        return blocks.queries(size), jax.ShapeDtypeStruct(shape, dtype)

    def of_keys(like: jax.Array) -> tuple[pl.BlockSpec, jax.ShapeDtypeStruct]:
        return blocks.keys(like.shape[2]), jax.ShapeDtypeStruct(like.shape, like.dtype)

    of_logits = blocks.queries(blocks.static.tiles.major_kv)
    logits_shape = jax.ShapeDtypeStruct((*x.q.shape[:2], kv_len, x.q.shape[3]), jnp.float32)
    return Gradients(
        q=of_queries(x.q.shape[2], x.q.dtype),
        k=of_keys(x.k),
        v=of_keys(x.v),
        logits=(of_logits, logits_shape) if blocks.static.bias_gradient else None,
        slopes=None if x.slopes is None else of_queries(SUBLANES, jnp.float32),
    )


class _Refs(NamedTuple):
    """What lies in VMEM beside the operands.

    Attributes:
        results: the results' blocks.
        p, ds: slots: a unit's weights and the gradients of its products with q.
        keys: slots: its keys, those that nobody sees set to 0 (if there may be such).
        sums: gradients of a head's keys and values so far, float32 (if they have several parts).
    """

    results: Gradients
    p: list[jax.Array]
    ds: list[jax.Array]
    keys: list[jax.Array]
    sums: list[jax.Array]


class _Weights(NamedTuple):
    """What a step's keys and queries make, as it is multiplied; and the keys."""

    p: jax.Array
    ds: jax.Array
    k: jax.Array


class _GridStep(NamedTuple):
    """Some heads, everything in VMEM beside their operands, and which sum of a step is first."""

    heads: Heads
    refs: _Refs
    order: str

    def weights(self, u: Unit, step: Step) -> Iterator[_Weights | None]:
        """A step's weights: first what logits give, then all; others' products come between."""
        heads, x = self.heads, self.heads.x
        at, extras = heads.where(u, step), heads.extras(u)
        k, v = (x[name].at[u.kv_head][:, step.keys] for name in ("k", "v"))
        if step.cleaned:
            # Queries that do not exist weigh no key, as their lse is inf; but 0 * NaN is NaN.
            some = heads.used(u, step)
            k, v = some.across(k), some.across(v)
        q, dout, lse, delta = (
            x[name].at[u.head][:, heads.queries(u, step.unseen)]
            for name in ("q", "dout", "lse", "delta")
        )
        s, slope = logits.finished(heads.static, extras, logits.matmul(k, q, (0, 0)), at)
        s = heads.hidden(u, step, s)
        p = jnp.exp2(s * (logits.unit(heads.static, extras) * LOG2E) - lse)
        yield None
        whole = p * (logits.matmul(v, dout, (0, 0)) - delta)
        self.of_logits(u, step, whole, at)
        ds = whole if slope is None else whole * slope
        yield _Weights(p.astype(k.dtype), ds.astype(k.dtype), k)

    def of_logits(self, u: Unit, step: Step, ds: jax.Array, at: logits.Where) -> None:
        """Gradients of a step's finished logits: into those of the bias, and of the slopes."""
        results, here = self.refs.results, self.heads.queries(u, step.unseen)
        if results.logits is not None:
            results.logits.at[u.head][step.keys, here] = ds
        if results.slopes is not None:
            distance = logits.distance(at).reshape(-1, SUBLANES, at.shape[1])
            part = jnp.sum(ds.reshape(distance.shape) * distance, axis=0)
            slopes, first = results.slopes.at[u.head], step is self.heads.steps(u)[0]
            slopes[:, here] = part if first else slopes[:, here] + part

    def keep(self, u: Unit, step: Step, made: _Weights) -> None:
        """A step's weights are kept for the sums."""
        self.refs.p[u.slot][step.keys, step.unseen :] = made.p
        self.refs.ds[u.slot][step.keys, step.unseen :] = made.ds
        if self.refs.keys:
            self.refs.keys[u.slot][:, step.keys] = made.k

    def all_weights(self, u: Unit) -> None:
        """Weights of a unit."""
        for step in self.heads.steps(u):
            *_, made = self.weights(u, step)
            self.keep(u, step, made)

    def sums_and_next_weights(self, u: Unit, after: Unit | None) -> None:
        """A unit's part of the gradients from its slot; the weights of another into its own.

        The order of a step's products is that of `mosaic_tpu_backward`.
        """
        heads, refs, x = self.heads, self.refs, self.heads.x
        steps, dq = heads.steps(u), None
        others = between(steps, () if after is None else heads.steps(after))
        for step, others_here in zip(steps, others, strict=True):
            here = heads.queries(u, step.unseen)
            p, ds = (slots[u.slot][step.keys, step.unseen :] for slots in (refs.p, refs.ds))
            k = refs.keys[u.slot] if refs.keys else x["k"].at[u.kv_head]
            coming = [self.weights(after, other) for other in others_here]
            made = []
            for name in self.order:
                made = [next(weights) for weights in coming]
                of, weights = {"k": ("q", ds), "v": ("dout", p)}[name]
                part = logits.matmul(x[of].at[u.head][:, here], weights, (1, 1))
                self.add(u, name, step, part)
            part = logits.matmul(k[:, step.keys], ds)
            dq = part if dq is None else logits.added_from(dq, step.unseen, part)
            for other, weights in zip(others_here, made, strict=True):
                self.keep(after, other, weights)
        out = refs.results.q.at[u.head]
        out[:, heads.queries(u)] = (dq * heads.static.scale).astype(out.dtype)

    def add(self, u: Unit, name: str, step: Step, part: jax.Array) -> None:
        """A part of a head's gradient is added to the sum, or goes out with it."""
        rows = [i for i, steps in enumerate(self.heads.plan.rows) if step.kv in _starts(steps)]
        if (u.member, u.row) != (0, rows[0]):
            part += self.refs.sums["kv".index(name)][:, step.keys]
        if (u.member, u.row) == (self.heads.static.group - 1, rows[-1]):
            out = getattr(self.refs.results, name).at[u.kv_head]
            scale = self.heads.static.scale if name == "k" else 1.0
            out[:, step.keys] = (part * scale).astype(out.dtype)
        else:
            self.refs.sums["kv".index(name)][:, step.keys] = part

    def prologue(self) -> None:
        """Gradients that no step makes are 0; NaN is cleared where there may be any."""
        plan, results, x = self.heads.plan, self.refs.results, self.heads.x
        every = all(_sees_all(x["k"].shape[3], steps) for steps in plan.rows)
        if results.logits is not None and not every:
            results.logits[...] = jnp.zeros(results.logits.shape, jnp.float32)
        met = {(s.kv, s.size) for steps in plan.rows for s in steps}
        if sum(size for _, size in met) < x["k"].shape[3]:
            for out in (results.k, results.v):
                out[...] = jnp.zeros(out.shape, out.dtype)
        at = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)
        flag = jnp.minimum(at, x["has_nan"].shape[0] - 1)
        pl.when(x["has_nan"][flag] > 0)(self.clear_nan)

    def clear_nan(self) -> None:
        """Sets q and dout of queries whose lse is NaN, and keys that are NaN, to 0 in their blocks.

        A key that is NaN is seen by such queries alone.
        """
        x = self.heads.x
        heads = x["q"].shape[1]

        def of_head(n, _):
            head = parted(n, heads)
            is_nan = x["lse"].at[head][...] == NAN
            for ref in (x["q"].at[head], x["dout"].at[head]):
                ref[...] = jnp.where(is_nan, 0.0, ref[...].astype(jnp.float32)).astype(ref.dtype)

        def of_kv_head(n, _):
            ref = x["k"].at[parted(n, kv_heads)]
            k = ref[...].astype(jnp.float32)
            ref[...] = jnp.where(jnp.isnan(k), 0.0, k).astype(ref.dtype)

        kv_heads = x["k"].shape[1]
        lax.fori_loop(0, x["q"].shape[0] * heads, of_head, None)
        lax.fori_loop(0, x["k"].shape[0] * kv_heads, of_kv_head, None)


def _starts(steps: tuple[Step, ...]) -> set[int]:
    return {step.kv for step in steps}


def _sees_all(keys: int, steps: tuple[Step, ...]) -> bool:
    """Whether a row takes every step of the keys with all of its queries."""
    return sum(step.size for step in steps) == keys and not any(step.unseen for step in steps)
