"""What is computed on GPUs: the named works, in the order in which a run takes them.

Operations are counted as 4 B H T S D for a forward pass, half of it when causal, three and a half
times as much with the backward pass; see `benchmarks.work.Work` for the floors.
"""

import itertools

from benchmarks.work import Work

TOKENS = 16384  # of all sequences together, where only the length varies (FlashAttention-3's way)


def _dense(
    length: int, size: int, *, causal: bool, heads: tuple[int, int] = (16, 16),
    size_v: int | None = None, batch: int | None = None, backward: bool = False,
) -> Work:  # fmt: skip
    batch = batch or max(1, TOKENS // length)
    lens, size_v = (length,) * batch, size_v or size
    sizes = f"{size}" if size == size_v else f"{size}_{size_v}"
    kind = "causal" if causal else "full"
    name = f"dense_d{sizes}_{kind}_{batch}x{length}_h{heads[0]}_{heads[1]}"
    name += "_grad" if backward else ""
    description = f"{batch} x {length} tokens, {heads[0]} / {heads[1]} heads of {sizes}, {kind}"
    return Work(
        name, description, "dense", *heads, size, size_v, lens, lens, backward=backward,
        causal=causal,
    )  # fmt: skip


def _decode(batch: int, length: int, cache_dtype: str = "bfloat16", page_size: int = 64) -> Work:
    return Work(
        f"paged_decode_{batch}x{length}_{cache_dtype}_page{page_size}",
        f"{batch} sequences of {length}, one new token each, cache in {cache_dtype}",
        "paged", 32, 8, 128, 128, (1,) * batch, (length,) * batch, page_size,
        cache_dtype=cache_dtype,
    )  # fmt: skip


def _prefill(cache_dtype: str = "bfloat16") -> Work:
    lens = (2048,) * 4
    return Work(
        f"paged_prefill_4x2048_{cache_dtype}_page64", "4 sequences of 2048 new tokens",
        "paged", 32, 8, 128, 128, lens, lens, 64, cache_dtype=cache_dtype,
    )  # fmt: skip


def _latent(name: str, batch: int, q_len: int, length: int, topk=None, dtype="bfloat16") -> Work:
    op = "mla" if topk is None else "sparse_mla"
    description = f"{batch} sequences of {length}, {q_len} new tokens each, cache in {dtype}"
    return Work(
        f"{name}_{batch}x{length}_{dtype}", description, op, 128, 1, 576, 512, (q_len,) * batch,
        (length,) * batch, 64, topk=topk, cache_dtype=dtype,
    )  # fmt: skip


_FORWARD = [
    *(_dense(n, 128, causal=True) for n in (4096, 16384, 2048, 512, 8192, 32768)),
    *(_dense(n, 128, causal=False) for n in (4096, 16384, 2048, 512, 32768)),
    *(_dense(16384, size, causal=True) for size in (64, 256)),
    _dense(4096, 128, causal=True, heads=(32, 8), batch=32),
    _dense(1024, 192, causal=True, heads=(128, 128), size_v=128, batch=16),
]
_BACKWARD = [
    *(_dense(n, 128, causal=True, backward=True) for n in (4096, 16384)),
    *(_dense(n, 128, causal=False, backward=True) for n in (4096, 16384)),
    _dense(16384, 64, causal=True, backward=True),
    *(_dense(n, 256, causal=True, backward=True) for n in (4096, 16384)),
    _dense(1024, 192, causal=True, heads=(128, 128), size_v=128, batch=16, backward=True),
]
_PAGED = [
    _decode(64, 8192), _decode(64, 8192, "float8_e4m3fn"), _decode(1, 131072),
    _decode(1, 131072, "float8_e4m3fn"), _decode(256, 1024), _decode(16, 32768),
    _decode(64, 8192, page_size=16), _prefill(), _prefill("float8_e4m3fn"),
]  # fmt: skip
_LATENT = [
    _latent("mla_decode", 128, 1, 4096), _latent("mla_decode", 128, 1, 4096, dtype="float8_e4m3fn"),
    _latent("mla_decode", 16, 1, 16384), _latent("mla_prefill", 2, 2048, 2048),
    _latent("sparse_mla_prefill", 1, 2048, 16384, 2048),
    _latent("sparse_mla_decode", 64, 1, 16384, 2048),
    _latent("sparse_mla_decode", 64, 1, 16384, 2048, "fp8_ds_mla"),
    _latent("sparse_mla_prefill", 1, 2048, 16384, 2048, "fp8_ds_mla"),
]  # fmt: skip
# In turns: a run that is cut off has something of each.
_TURNS = itertools.zip_longest(_FORWARD, _PAGED, _BACKWARD, _LATENT)
WORKS: dict[str, Work] = {w.name: w for turn in _TURNS for w in turn if w is not None}
