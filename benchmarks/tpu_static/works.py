"""What is computed on TPUs: the named works, in the order of the tables."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from benchmarks.work import Work


def _spread(count: int, low: int, high: int) -> tuple[int, ...]:
    """Lengths between two bounds, in no order, the same each time."""
    lengths = np.linspace(low, high, count).astype(int)
    return tuple(int(n) for n in np.random.default_rng(0).permutation(lengths))


def _dense(name: str, heads: tuple[int, int, int]) -> tuple[Work, Work]:
    """Forward, and forward with backward."""
    q, kv, size = heads
    what = f"{q} heads" if q == kv else f"{q} / {kv} heads"
    description = f"causal, batch 1, {what} of {size}, 4096 tokens"
    lens = (4096,)
    forward = Work(name, description, "dense", q, kv, size, size, lens, lens)
    again = "the same, forward and backward"
    return forward, dataclasses.replace(
        forward, name=f"{name}_grad", description=again, backward=True
    )


def _short(name: str, heads: tuple[int, int, int], lens: tuple[int, ...]) -> tuple[Work, Work]:
    """Many short sequences, every query seeing every key; the same with gradients."""
    forward, backward = _dense(name, heads)
    description = f"{len(lens)} x {lens[0]} tokens, full, {heads[0]} heads of {heads[2]}"
    fields = {"q_lens": lens, "kv_lens": lens, "causal": False}
    return (
        dataclasses.replace(forward, description=description, **fields),
        dataclasses.replace(backward, **fields),
    )


def _prefill(page_size: int, heads: tuple[int, int, int]) -> Work:
    q, kv, size = heads
    lens = (2048,) * 4
    return Work(
        f"paged_prefill_d{size}_page{page_size}", "4 sequences of 2048 new tokens",
        "paged", q, kv, size, size, lens, lens, page_size,
    )  # fmt: skip


def _decode(page_size: int, heads: tuple[int, int, int]) -> Work:
    q, kv, size = heads
    return Work(
        f"paged_decode_d{size}_page{page_size}", "64 sequences of 1024 to 3072, one new token each",
        "paged", q, kv, size, size, (1,) * 64, _spread(64, 1024, 3072), page_size,
    )  # fmt: skip


def _share(work: Work) -> Work:
    """The same with the heads that one of eight devices has of 64 / 8."""
    return dataclasses.replace(work, name=f"{work.name}_share", num_heads=8, num_kv_heads=1)


def _speculative(page_size: int, heads: tuple[int, int, int]) -> Work:
    work = _decode(page_size, heads)
    return dataclasses.replace(
        work, name=work.name.replace("decode", "speculative"), q_lens=(4,) * 64,
        description="64 sequences of 1024 to 3072, four new tokens each",
    )  # fmt: skip


def _latent(
    name: str, description: str, q_lens: Sequence[int], kv_lens: Sequence[int], topk: int | None
) -> Work:
    op = "mla" if topk is None else "sparse_mla"
    return Work(
        name, description, op, 128, 1, 576, 512, tuple(q_lens), tuple(kv_lens), 64, topk=topk
    )


def _cached(work: Work, dtype: str) -> Work:
    """The same with a cache of another dtype."""
    cache = {"fp8_ds_mla": "DeepSeek's 656-byte cache"}.get(dtype, f"a cache of {dtype}")
    return dataclasses.replace(
        work, name=f"{work.name}_{dtype}", description=f"{work.description}, {cache}",
        cache_dtype=dtype,
    )  # fmt: skip


def _indexer(name: str, description: str, q_lens: Sequence[int], kv_lens: Sequence[int]) -> Work:
    return Work(
        name, description, "indexer_scores", 64, 1, 128, 0, tuple(q_lens), tuple(kv_lens), 64
    )


def _topk(name: str, description: str, q_lens: Sequence[int], kv_lens: Sequence[int]) -> Work:
    lens = tuple(q_lens), tuple(kv_lens)
    return Work(name, description, "topk_positions", 1, 1, 0, 0, *lens, 64, topk=2048)


_D128, _D64 = (32, 8, 128), (64, 8, 64)  # query heads, kv heads, head size
_PAGES = (16, 64, 256)
_LATENT = (
    _latent("mla_decode", "64 sequences of 1024 to 3072", (1,) * 64, _spread(64, 1024, 3072), None),
    _latent(
        "mla_speculative", "64 sequences of 1024 to 3072, two new tokens each",
        (2,) * 64, _spread(64, 1024, 3072), None,
    ),
    _latent("mla_prefill", "2 sequences of 1024 new tokens", (1024,) * 2, (1024,) * 2, None),
)  # fmt: skip
_SPARSE = (
    _latent(
        "sparse_mla_decode", "32 sequences of 4096 to 8192, 2048 positions each",
        (1,) * 32, _spread(32, 4096, 8192), 2048,
    ),
    _latent(
        "sparse_mla_prefill", "the last 256 tokens of 4096, 2048 positions each",
        (256,), (4096,), 2048,
    ),
)  # fmt: skip
_ALL = (
    *_dense("dense_causal", (8, 8, 128)),
    *_dense("dense_causal_d64", (16, 16, 64)),
    *_dense("dense_causal_gqa", (32, 8, 128)),
    *_short("dense_short_d64", (16, 16, 64), (512,) * 32),
    *(_prefill(page, _D128) for page in _PAGES),
    *(_decode(page, _D128) for page in _PAGES),
    *(_share(of(64, _D128)) for of in (_prefill, _decode)),
    _speculative(64, _D128),
    *(_prefill(page, _D64) for page in (16, 64)),
    *(_decode(page, _D64) for page in (16, 64)),
    *(
        _cached(work, dtype)
        for work, dtype in (
            (_decode(64, _D128), "float8_e4m3fn"),
            (_decode(64, _D128), "int8"),
            (_prefill(64, _D128), "float8_e4m3fn"),
        )
    ),
    *_LATENT,
    *(_cached(work, "float8_e4m3fn") for work in _LATENT if work.name != "mla_speculative"),
    *_SPARSE,
    *(_cached(work, "fp8_ds_mla") for work in _SPARSE),
    _indexer("indexer_decode", "32 sequences of 8192, 64 index heads", (1,) * 32, (8192,) * 32),
    _indexer("indexer_prefill", "the last 256 tokens of 4096, 64 index heads", (256,), (4096,)),
    _topk("topk_decode", "the best 2048 of 8192 scores of 32 tokens", (1,) * 32, (8192,) * 32),
    _topk("topk_prefill", "the best 2048 of 4096 scores of 256 tokens", (256,), (4096,)),
)  # fmt: skip
WORKS: dict[str, Work] = {work.name: work for work in _ALL}
