"""Ring attention: keys and values go round the devices; each meets them as they pass.

At step r a device holds the keys of the device r before it. It sends them on while its queries
attend to them, and merges what comes out by lse. Nothing of the size of the whole sequence exists
anywhere. Backward, keys go round once more, and their gradients with them, back to where they came
from; each meeting's forward pass is computed again, so nothing is stored but inputs and results.

With w = exp(lse_j - lse), the share of one meeting j in the result (`merging.share_of`)::

    dout_j = w * dout          dlse_j = w * (dout . out_j - dout . out + dlse)

Reference: Liu, Zaharia and Abbeel, "Ring attention with blockwise transformers", 2023.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from attnsel_jax.mesh.merging import Partial, merged, nothing, share_of, with_sinks
from attnsel_jax.mesh.positions import Piece, meet_at_all, met, pieces
from attnsel_jax.mesh.zigzag import from_zigzag, to_zigzag
from pallas_kernels.dense.derivative_rules import DENSE_RESIDUALS, batched_with
from pallas_kernels.jax_settings import under_default_rules

Arrays = dict[str, jax.Array]
FLOATS = ("q", "k", "v", "bias", "alibi_slopes", "sinks")
BY_QUERY, BY_KEY = ("q", "q_segment_ids"), ("k", "v", "kv_segment_ids")
LOGITS = ("bias", "mask")  # this device's queries by every key; a size of 1 stands for all


class Ring(NamedTuple):
    """A call's ring.

    Attributes:
        kernel: takes arrays by name; returns out and lse, and a correction if it is asked for one.
        static: the call's static arguments.
        axis: the mesh axis.
        n: devices along it.
        zigzag: whether positions lie in zig-zag order.
    """

    kernel: Callable[..., tuple[jax.Array, jax.Array]]
    static: dict[str, Any]
    axis: str
    n: int
    zigzag: bool

    def results(self, arrays: Arrays) -> tuple[tuple[jax.Array, jax.Array], jax.Array | None]:
        """The kernel's out and lse; beside a bias the correction of these, None = 1."""
        if "bias" not in arrays:
            return self.kernel(arrays), None
        *results, correction = self.kernel(arrays, correction=True)
        return tuple(results), correction

    def onward(self, tree: Any) -> Any:
        """What the device before this one holds; what this one holds goes to the next."""
        return jax.lax.ppermute(tree, self.axis, [(i, (i + 1) % self.n) for i in range(self.n)])

    def held(self, step: jax.Array, kv_len: int) -> list[Piece]:
        """Where the keys lie that this device holds at a step."""
        owner = (jax.lax.axis_index(self.axis) - step) % self.n
        return pieces(owner, self.n, kv_len, self.zigzag)

    def cut(self, length: int) -> list[slice]:
        """Where the pieces lie in a device's array."""
        count = 2 if self.zigzag else 1
        return [slice(i * length // count, (i + 1) * length // count) for i in range(count)]

    def pairs(self, arrays: Arrays) -> list[tuple[int, int]]:
        """Pieces of queries and of keys that may meet: in zig-zag order no first sees a second."""
        count = range(2 if self.zigzag else 1)
        every = [(i, j) for i in count for j in count]
        aligned = "q_offset" not in arrays and arrays["q"].shape[1] == arrays["k"].shape[1]
        return [pair for pair in every if pair != (0, 1)] if aligned else every

    def own(self, q_len: int) -> list[Piece]:
        """Where this device's queries lie."""
        return pieces(jax.lax.axis_index(self.axis), self.n, q_len, self.zigzag)


def ring_attention(
    kernel: Callable[..., tuple[jax.Array, jax.Array]],
    arrays: Arrays,
    static: dict[str, Any],
    axis: str,
    n: int,
) -> tuple[jax.Array, jax.Array]:
    """Out and lse of this device's queries over the keys of all devices along an axis.

    Differentiable in q, k, v, bias, alibi_slopes and sinks, through out and lse.

    Args:
        kernel: the dense kernel, as a function of its arrays by name.
        arrays: this device's; `q_lens`, `kv_lens` and `q_offset` are the whole sequence's.
        static: the kernel's static arguments.
        axis: the mesh axis that cuts positions.
        n: its size.
    """
    q_len, kv_len = arrays["q"].shape[1], arrays["k"].shape[1]
    ring = Ring(kernel, static, axis, n, in_zigzag(static, q_len, kv_len, n))
    cut = [name for name in (*BY_QUERY, *BY_KEY) if name in arrays]
    if ring.zigzag:
        ordered = {name: to_zigzag(arrays[name], axis, n) for name in cut}
        for name in LOGITS:
            if name in arrays and arrays[name].shape[2] > 1:
                ordered[name] = to_zigzag(arrays[name], axis, n, axis=2)
        arrays = arrays | ordered

    @jax.custom_vjp
    def attend(floats: Arrays, others: Arrays) -> tuple[jax.Array, jax.Array]:
        return _forward(ring, floats | others)[:2]

    @under_default_rules
    def forward(floats: Arrays, others: Arrays):
        whole = checkpoint_name(_forward(ring, floats | others), DENSE_RESIDUALS)
        return whole[:2], (floats, others, whole)

    @under_default_rules
    def backward(kept, cotangents):
        floats, others, whole = kept
        return _backward(ring, floats | others, whole, *cotangents), None

    attend.defvjp(forward, backward)
    floats = {name: arrays[name] for name in FLOATS if name in arrays}
    out, lse = attend(floats, {name: a for name, a in arrays.items() if name not in floats})
    if ring.zigzag:
        out, lse = (from_zigzag(x, axis, n) for x in (out, lse))
    return out, lse


def in_zigzag(static: dict[str, Any], q_len: int, kv_len: int, n: int) -> bool:
    """Whether the ring puts a device's q_len queries and kv_len keys in zig-zag order.

    Where a query sees all that is before it, and the halves of a device's positions are whole; and
    whole chunks, where there are chunks.
    """
    chunk = static.get("attention_chunk_size") or 1
    halves = q_len % 2 == 0 and kv_len % (2 * chunk) == 0
    return bool(static.get("causal")) and n > 1 and halves


def _forward(ring: Ring, arrays: Arrays) -> Partial:
    """Once round, keys sent on before they are met, so that both go on; out is in q's dtype."""
    q, width = arrays["q"], arrays["v"].shape[-1]

    def meet(step, kv: Arrays, so_far: list[Partial]) -> list[Partial]:
        parts = list(so_far)
        for i, j in ring.pairs(arrays):
            parts[i] = _met_too(ring, arrays | kv, step, (i, j), parts[i])
        return parts

    def one_step(step, carry):
        kv, so_far = carry
        following = ring.onward(kv)
        return following, meet(step, kv, so_far)

    kv = {name: arrays[name] for name in BY_KEY if name in arrays}
    rows = [q[:, cut].shape[:3] for cut in ring.cut(q.shape[1])]
    empty = [nothing(shape, width, corrected="bias" in arrays) for shape in rows]
    carry = jax.lax.fori_loop(0, ring.n - 1, one_step, (kv, empty))
    parts = meet(ring.n - 1, *carry)
    whole = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)
    whole = with_sinks(whole, arrays.get("sinks"), _exists(ring, arrays))
    lse = batched_with(arrays["v"], whole.lse)
    return whole._replace(out=whole.out.astype(q.dtype), lse=lse)


def _met_too(ring: Ring, arrays: Arrays, step, pair: tuple[int, int], so_far: Partial) -> Partial:
    """What a piece of queries has, and what it finds in a piece of the keys that are here."""
    mine, told, some = _pair(ring, arrays, step, *pair)

    def with_these(so_far: Partial) -> Partial:
        (out, lse), correction = ring.results(mine | told)
        return merged(so_far, Partial(out.astype(jnp.float32), lse, correction))

    if some is None:
        return with_these(so_far)
    return jax.lax.cond(some, with_these, lambda so_far: so_far, so_far)


def _pair(ring: Ring, arrays: Arrays, step, i: int, j: int):
    """A piece of queries and one of keys: their arrays, what the kernel is told, if they meet."""
    q_len, kv_len = arrays["q"].shape[1], arrays["k"].shape[1]
    q_pieces, kv_pieces = ring.own(q_len), ring.held(step, kv_len)
    q_rows, kv_rows = ring.cut(q_len)[i], ring.cut(kv_len)[j]
    mine = {name: arrays[name][:, q_rows] for name in BY_QUERY if name in arrays}
    mine |= {name: arrays[name][:, kv_rows] for name in BY_KEY if name in arrays}
    if "alibi_slopes" in arrays:
        mine["alibi_slopes"] = arrays["alibi_slopes"]
    for name in LOGITS:
        if name in arrays:
            first, sizes = _of_logits(arrays[name], q_rows, kv_pieces[j])
            mine[name] = jax.lax.dynamic_slice(arrays[name], first, sizes)
    told = met(arrays, ring.static, q_pieces[i], kv_pieces[j], arrays["q"].shape[0])
    return mine, told, meet_at_all(arrays, ring.static, q_pieces[i], kv_pieces[j])


def _of_logits(x: jax.Array, rows: slice, keys: Piece):
    """(first, sizes) of the part of a bias or mask that a piece of queries and one of keys have."""
    first, sizes = [0] * 4, list(x.shape)
    if x.shape[2] > 1:
        first[2], sizes[2] = rows.start, rows.stop - rows.start
    if x.shape[3] > 1:
        first[3], sizes[3] = keys.start, keys.size
    return [jnp.asarray(i, jnp.int32) for i in first], sizes


def _exists(ring: Ring, arrays: Arrays) -> jax.Array | None:
    """Which of this device's query rows exist, bool [batch, q_len]; None = all."""
    if "q_lens" not in arrays:
        return None
    rows = [
        piece.start + jnp.arange(piece.size, dtype=jnp.int32)
        for piece in ring.own(arrays["q"].shape[1])
    ]
    return jnp.concatenate(rows) < arrays["q_lens"][:, None]


def _backward(
    ring: Ring, arrays: Arrays, whole: Partial, dout: jax.Array, dlse: jax.Array
) -> Arrays:
    """Gradients of the floats: once round, the keys' gradients one step behind the keys."""
    dout = dout.astype(jnp.float32)
    delta = jnp.sum(whole.out.astype(jnp.float32) * dout, axis=-1) - dlse
    rows = {"whole": whole, "dout": dout, "delta": delta}
    kv = {name: arrays[name] for name in BY_KEY if name in arrays}
    stay = [name for name in ("q", "bias", "alibi_slopes") if name in arrays]

    def meet(step, kv: Arrays, here: Arrays) -> tuple[Arrays, Arrays]:
        """Adds to what stays here, and gives the gradients of the keys that are here now."""
        grads = {name: jnp.zeros(kv[name].shape, jnp.float32) for name in "kv"} | here
        for i, j in ring.pairs(arrays):
            q_rows, kv_rows = ring.cut(arrays["q"].shape[1])[i], ring.cut(kv["k"].shape[1])[j]
            part = jax.tree.map(lambda x, q_rows=q_rows: x[:, q_rows], rows)
            own_rows = {"q": q_rows, "k": kv_rows, "v": kv_rows}
            at = {name: [0, rows.start, 0, 0] for name, rows in own_rows.items()}
            if "bias" in arrays:
                piece = ring.held(step, kv["k"].shape[1])[j]
                at["bias"], _ = _of_logits(arrays["bias"], q_rows, piece)
            grads = _add_meeting(ring, arrays | kv, part, step, (i, j), at, grads)
        return {name: grads[name] for name in here}, {name: grads[name] for name in "kv"}

    def one_step(step, carry):
        kv, travelling, here = carry
        following, travelling = ring.onward((kv, travelling))
        here, mine = meet(step + 1, kv, here)
        return following, jax.tree.map(jnp.add, travelling, mine), here

    here = {name: jnp.zeros(arrays[name].shape, jnp.float32) for name in stay}
    following = ring.onward(kv)
    here, own = meet(0, kv, here)
    carry = (following, jax.tree.map(jnp.zeros_like, own), here)
    _, travelling, here = jax.lax.fori_loop(0, ring.n - 1, one_step, carry)
    back = jax.tree.map(jnp.add, own, ring.onward(travelling))
    grads = here | back
    if "sinks" in arrays:
        logits = jnp.broadcast_to(arrays["sinks"], whole.lse.shape)
        share = share_of(Partial(whole.out, logits), whole)
        exists = _exists(ring, arrays)
        share = share if exists is None else jnp.where(exists[..., None], share, 0)
        grads["sinks"] = -jnp.sum(share * delta, axis=(0, 1))
    return {name: grad.astype(arrays[name].dtype) for name, grad in grads.items()}


def _add_meeting(
    ring: Ring, arrays: Arrays, rows: dict[str, Any], step, pair: tuple[int, int], at, grads: Arrays
) -> Arrays:
    """Adds the gradients of one meeting; `at` says where its part of each gradient starts.

    A meeting that is none leaves them as they are: nothing is added. And no sums stand outside of
    the branch, behind which a compiler would rather hide an exchange than behind the kernels.
    """
    mine, told, some = _pair(ring, arrays, step, *pair)
    wanted = {name: mine[name] for name in FLOATS if name in mine}

    def pulled() -> Arrays:
        rest = {name: x for name, x in mine.items() if name not in wanted} | told
        (out, lse), pull_back, correction = jax.vjp(
            lambda x: ring.results(x | rest), wanted, has_aux=True
        )
        share = share_of(Partial(out, lse, correction), rows["whole"])
        along = jnp.sum(rows["dout"] * out.astype(jnp.float32), axis=-1)
        seeds = (share[..., None] * rows["dout"]).astype(out.dtype), share * (along - rows["delta"])
        (pulled,) = pull_back(seeds)
        return jax.tree.map(lambda g: g.astype(jnp.float32), pulled)

    def sum_of(so_far: jax.Array, name: str, g: jax.Array) -> jax.Array:
        if name not in at:
            return so_far + g
        here = jax.lax.dynamic_slice(so_far, at[name], g.shape)
        return jax.lax.dynamic_update_slice(so_far, here + g, at[name])

    def with_these(grads: Arrays) -> Arrays:
        return grads | {name: sum_of(grads[name], name, g) for name, g in pulled().items()}

    return with_these(grads) if some is None else jax.lax.cond(some, with_these, lambda g: g, grads)
