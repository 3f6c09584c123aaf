"""Ragged batches that punish every short cut, and the comparison of `paged` with the oracle."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from attnsel_jax import oracle
from attnsel_jax.xla import paged

STATIC = ("scale", "causal", "sliding_window", "attention_chunk_size", "soft_cap")


@functools.cache
def attend_with(blocks):
    """The kernel, compiled with these sizes of tiles and blocks."""

    def attend(**arguments):
        with mock.patch.object(paged, "CPU", blocks):
            return paged.paged_attention(**arguments)

    return jax.jit(attend, static_argnames=STATIC)


# relative to the sum of |weight * value|; lse relative to the size of its logits
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2, "float16": 2e-3}
# So small that short sequences have several tiles and blocks.
SMALL = paged.CPU._replace(widths=(4,), block_kv=8)
SIDE_BY_SIDE = paged.ACCELERATOR._replace(widths=(4,), block_kv=8, tiles_at_once=3)
JUNK = np.array([-1, -(2**31), 2**31 - 1, 10**6], np.int32)


def batch(
    q_lens, kv_lens, *, page_size=4, heads=(4, 2), head_dim=16, dtype="float32", cache=None,
    k_scale=None, v_scale=None, pad_seqs=2, pad_tokens=3, write=True, seed=0,
):  # fmt: skip
    """Arguments of a ragged batch: sharp logits, shuffled pages, NaN and junk wherever allowed."""
    rng = np.random.default_rng(seed)
    cache, dtype = np.dtype(cache or dtype), np.dtype(dtype)
    num_seqs, num_tokens = len(q_lens), sum(q_lens) + pad_tokens
    n_q, n_kv = heads
    pages_per_seq = -(-max(*kv_lens, 1) // page_size) + 2
    num_pages = num_seqs * pages_per_seq + 3
    garbage = 127 if cache == np.int8 else np.nan
    pages = np.full((2, num_pages, page_size, n_kv, head_dim), garbage, np.float32).astype(cache)
    table = JUNK[rng.integers(0, 4, (num_seqs + pad_seqs, pages_per_seq))]
    ids = iter(rng.permutation(num_pages))
    q = np.full((num_tokens, n_q, head_dim), np.nan, np.float32)
    new = np.full((2, num_tokens, n_kv, head_dim), np.nan, np.float32)
    slots = np.full(num_tokens, -1, np.int32)
    cu = np.concatenate([[0], np.cumsum(q_lens)])
    scales = [np.ones(1) if s is None else np.reshape(s, -1) for s in (k_scale, v_scale)]
    for i, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        used = -(-kv_len // page_size)
        table[i, :used] = [next(ids) for _ in range(used)]
        kv = rng.standard_normal((2, kv_len, n_kv, head_dim)).astype(np.float32)
        for t in range(q_len):
            pos = kv_len - q_len + t
            q[cu[i] + t] = rng.standard_normal((n_q, head_dim))
            if kv_len:  # each head's favourite key among those before it, often its own or an edge
                target = rng.integers(0, max(pos, 0) + 1, n_q)
                target = np.where(rng.random(n_q) < 0.5, max(pos, 0), target)
                q[cu[i] + t] += kv[0, target, np.arange(n_q) * n_kv // n_q] * 6 / head_dim**0.5
        for pos in range(kv_len):
            page, offset = table[i, pos // page_size], pos % page_size
            token = cu[i] + pos - (kv_len - q_len)
            if write and pos >= kv_len - q_len:
                new[:, token], slots[token] = kv[:, pos], page * page_size + offset
            else:
                for side in (0, 1):
                    pages[side, page, offset] = oracle.quantise(
                        kv[side, pos], scales[side][:, None], cache
                    )
    junk_cu = JUNK[rng.integers(0, 4, pad_seqs)]
    return {
        "q": q.astype(dtype),
        "k": new[0].astype(dtype) if write else None,
        "v": new[1].astype(dtype) if write else None,
        "kv_pages": pages,
        "page_table": table.astype(np.int32),
        "kv_lens": np.concatenate([kv_lens, JUNK[rng.integers(0, 4, pad_seqs)]]).astype(np.int32),
        "cu_q_lens": np.concatenate([cu, junk_cu]).astype(np.int32),
        "num_seqs": np.int32(num_seqs),
        "slot_mapping": slots if write else None,
        "k_scale": None if k_scale is None else np.float32(k_scale),
        "v_scale": None if v_scale is None else np.float32(v_scale),
    }


def as_jax(args):
    return {n: jnp.asarray(a) if isinstance(a, np.ndarray | np.generic) else a
            for n, a in args.items()}  # fmt: skip


def check(args, given=None, attend=None, **static):
    """Runs the kernel on `given` (args if None) and holds it against the oracle on args."""
    attend = attend or attend_with(SMALL)
    out, lse, pages = attend(**as_jax(given or args), **static)
    written = oracle.write_kv(
        args["k"], args["v"], args["kv_pages"], args["slot_mapping"],
        k_scale=args["k_scale"], v_scale=args["v_scale"],
    )  # fmt: skip
    rest = {n: a for n, a in args.items() if n not in ("k", "v", "kv_pages", "slot_mapping")}
    want = oracle.attend_paged(kv_pages=written, **rest, **static)
    assert out.dtype == args["q"].dtype
    assert lse.dtype == np.float32
    if given is None:
        np.testing.assert_array_equal(
            np.asarray(pages).astype(np.float32), written.astype(np.float32), err_msg="cache"
        )
    tolerance = TOLERANCE[args["q"].dtype.name]
    error = np.abs(np.asarray(out, np.float64) - want.out)
    assert np.all(error <= tolerance * want.magnitude), error.max()  # NaN fails too
    lse = np.asarray(lse, np.float64)
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want.lse))
    finite = np.isfinite(want.lse)
    error = np.abs(lse[finite] - want.lse[finite])
    assert np.all(error <= 2e-6 * (5 + want.logit_size[finite])), error.max()
    return want


MIXED = ([1, 7, 0, 33, 1, 3], [29, 7, 5, 40, 1, 18])  # decode, prefill, none, chunk, first, spec
