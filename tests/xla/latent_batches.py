"""Ragged batches over a latent cache: sharp logits, shuffled pages, NaN and junk where allowed."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from attnsel_jax import oracle

DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
}
# relative to the sum of |weight * value|
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2, "float16": 2e-3}
JUNK = np.array([-1, -(2**31), 2**31 - 1, 10**6], np.int32)

# (query lengths, key lengths): decode, prefill, nothing to do, chunk, first token, speculative
MIXED = ([1, 7, 0, 33, 1, 3], [29, 7, 5, 40, 1, 18])


def batch(
    q_lens, kv_lens, *, page_size=4, heads=3, rank=16, rope=8, dtype="float32", cache=None,
    kv_scale=None, write=True, pad_seqs=2, pad_tokens=3, seed=0,
):  # fmt: skip
    """Arguments of `mla_attention`, as NumPy arrays, scale included.

    Each query points at one of the keys it sees: that key gets more than half of the weight.
    """
    rng = np.random.default_rng(seed)
    packed = cache == "fp8_ds_mla"
    num_tokens, pages_per_seq = sum(q_lens) + pad_tokens, -(-max(kv_lens) // page_size) + 2
    num_pages = len(q_lens) * pages_per_seq + 3
    stored = np.dtype(np.uint8) if packed else DTYPES[cache or dtype]
    width = 656 if packed else rank + rope
    pages = np.full((num_pages, page_size, width), 255 if packed else np.nan).astype(stored)
    table = JUNK[rng.integers(0, 4, (len(q_lens) + pad_seqs, pages_per_seq))]
    free = list(rng.permutation(num_pages))
    q = np.full((num_tokens, heads, rank + rope), np.nan)
    new = np.full((num_tokens, rank + rope), np.nan)
    slots = np.full(num_tokens, -1, np.int32)
    starts = np.concatenate([[0], np.cumsum(q_lens)])
    old_rows, old_slots = [], []
    for i, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        used = -(-kv_len // page_size)
        table[i, :used] = [free.pop() for _ in range(used)]
        position = np.arange(kv_len)
        slot = table[i, position // page_size] * page_size + position % page_size
        keys = rng.standard_normal((kv_len, rank + rope))
        first = kv_len - q_len  # position of the first query
        for t in range(q_len):
            if first + t >= 0:
                aims = np.where(
                    rng.random(heads) < 0.5, first + t, rng.integers(0, first + t + 1, heads)
                )
                noise = rng.standard_normal((heads, rank + rope))
                q[starts[i] + t] = noise / 2 + 8 / np.sqrt(rank + rope) * keys[aims]
            else:
                q[starts[i] + t] = 1
        written = range(max(first, 0) if write else kv_len, kv_len)
        for p in written:
            new[starts[i] + p - first], slots[starts[i] + p - first] = keys[p], slot[p]
        old_rows.append(keys[: written.start])
        old_slots.append(slot[: written.start])
    old = np.concatenate(old_rows).astype(DTYPES[dtype])
    kv_cache_dtype = "fp8_ds_mla" if packed else None
    scale_of_cache = None if kv_scale is None else np.float32(kv_scale)
    pages = oracle.write_latents(
        old[:, :rank], old[:, rank:], pages, np.concatenate(old_slots), scale_of_cache,
        kv_cache_dtype,
    )  # fmt: skip
    q, new = q.astype(DTYPES[dtype]), new.astype(DTYPES[dtype])
    return {
        "ql_nope": q[..., :rank],
        "q_pe": q[..., rank:],
        "kv_c": new[:, :rank] if write else None,
        "k_pe": new[:, rank:] if write else None,
        "latent_pages": pages,
        "page_table": table,
        "kv_lens": np.concatenate([kv_lens, JUNK[:pad_seqs]]).astype(np.int32),
        "cu_q_lens": np.concatenate([starts, JUNK[:pad_seqs]]).astype(np.int32),
        "num_seqs": np.int32(len(q_lens)),
        "slot_mapping": slots if write else None,
        "scale": float((rank + rope) ** -0.5),
        "kv_scale": scale_of_cache,
        "kv_cache_dtype": kv_cache_dtype,
    }


def on_device(arguments):
    """The same arguments as JAX arrays; numbers that are static stay what they are."""
    return {
        name: jnp.asarray(x) if isinstance(x, np.ndarray | np.generic) else x
        for name, x in arguments.items()
    }


def attended(arguments, **static):
    """What the oracle says of the arguments: `Attended`, and the cache written."""
    names = ("kv_c", "k_pe", "latent_pages", "slot_mapping")
    kv_c, k_pe, pages, slots = (arguments[name] for name in names)
    written = oracle.write_latents(
        kv_c, k_pe, pages, slots, arguments["kv_scale"], arguments["kv_cache_dtype"]
    )
    rest = {name: x for name, x in arguments.items() if name not in names}
    positional = [rest.pop("ql_nope"), rest.pop("q_pe"), written, rest.pop("topk_indices", None)]
    order = ("page_table", "kv_lens", "cu_q_lens", "num_seqs")
    positional += [rest.pop(name) for name in order]
    return oracle.attend_sparse_mla(*positional, **rest, **static), written


def assert_close(got, want, dtype, factor=1):
    """Holds (out, lse) against the oracle's `Attended`, within the dtype's budget."""
    out, lse = (np.asarray(x).astype(np.float64) for x in got)
    error = np.abs(out - want.out)
    assert np.all(error <= factor * TOLERANCE[dtype] * want.magnitude), error.max()  # NaN fails too
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want.lse))
    finite = np.isfinite(want.lse)
    error = np.abs(lse[finite] - want.lse[finite])
    assert np.all(error <= 2e-6 * (5 + want.logit_size[finite])), error.max()


def assert_same_cache(got, want):
    """Holds a cache against the oracle's, value for value; any NaN is as good as another."""
    as_float = (np.asarray(x).astype(np.float32) for x in (got, want))
    np.testing.assert_array_equal(*as_float)
