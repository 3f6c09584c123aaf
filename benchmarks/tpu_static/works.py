"""What is computed: named attention works, with the operations and bytes that none can do without.

Floors count necessary work only: every logit that the mask lets through is two products, each
input is read once, each output written once. A key that was computed in this step need not be read
back from the cache.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

BYTES = 2  # of a bfloat16: inputs, outputs


@dataclasses.dataclass(frozen=True)
class Work:
    """One attention call.

    Attributes:
        name, description: for tables.
        op: "dense", "paged", "mla" or "sparse_mla".
        num_heads, num_kv_heads: of queries, and of keys and values (1 for MLA).
        head_size: of a key; 576 = 512 + 64 for MLA.
        head_size_v: of a value; 512 for MLA.
        q_lens, kv_lens: new tokens of each sequence, and its keys, the new ones included.
        page_size: tokens in a page; None = dense.
        backward: the gradients of q, k and v too (dense).
        topk: positions of each token (sparse MLA).
        causal: no query sees a later key; else every query sees every key.
        cache_dtype: of a paged cache, where it is not bfloat16.
        shape_class: what tile tables are keyed by: "prefill" or "decode".
    """

    name: str
    description: str
    op: str
    num_heads: int
    num_kv_heads: int
    head_size: int
    head_size_v: int
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    page_size: int | None = None
    backward: bool = False
    topk: int | None = None
    causal: bool = True
    cache_dtype: str = "bfloat16"

    @property
    def shape_class(self) -> str:
        """ "decode" where every sequence has one new token."""
        return "decode" if max(self.q_lens) == 1 else "prefill"

    @property
    def tokens(self) -> int:
        """New tokens of all sequences."""
        return sum(self.q_lens)

    @property
    def scale(self) -> float:
        """On the logits."""
        return self.head_size**-0.5

    @property
    def logits(self) -> int:
        """Logits of one head that the mask lets through (causal: bottom-right)."""
        if not self.causal:
            return sum(q * n for q, n in zip(self.q_lens, self.kv_lens, strict=True))
        return sum(
            min(n - q + t + 1, self.topk or n)
            for q, n in zip(self.q_lens, self.kv_lens, strict=True)
            for t in range(q)
        )

    @property
    def flops(self) -> float:
        """Operations of the products; backward: five more for every two, logits recomputed."""
        forward = 2.0 * self.num_heads * self.logits * (self.head_size + self.head_size_v)
        return forward * 3.5 if self.backward else forward

    def floor_bytes(self, *, writes_cache: bool = True) -> float:
        """Bytes that must cross HBM.

        Args:
            writes_cache: the call takes this step's keys and writes them to the cache; else it
                finds them there, and reads them.
        """
        queries = self.tokens * self.num_heads * (self.head_size + self.head_size_v)
        if self.op == "dense":
            keys = sum(self.kv_lens) * self.num_kv_heads * (self.head_size + self.head_size_v)
            if not self.backward:
                return BYTES * (queries + keys)
            # Backward: q, k, v, out, dout and lse in; dq, dk, dv out.
            read = self.tokens * self.num_heads * (self.head_size + 2 * self.head_size_v) + keys
            written = self.tokens * self.num_heads * self.head_size + keys
            lse = 4 * self.tokens * self.num_heads
            return BYTES * (queries + keys + read + written) + 2 * lse
        row = self.num_kv_heads * self.head_size * (1 if self.latent else 2)
        cached = self._cached_rows(writes_cache)
        of_cache = self.cache_itemsize
        # This step's rows are read as they come, and written as the cache stores them.
        new = self.tokens * (BYTES + of_cache) if writes_cache else 0
        return BYTES * queries + row * (cached * of_cache + new)

    @property
    def cache_itemsize(self) -> float:
        """Bytes of a cached value; rows of fp8_ds_mla are 656 bytes for 576 values."""
        return {"fp8_ds_mla": 656 / 576, "bfloat16": 2.0}.get(self.cache_dtype, 1.0)

    @property
    def latent(self) -> bool:
        """Whether keys and values are one row."""
        return self.op in ("mla", "sparse_mla")

    def _cached_rows(self, writes_cache: bool) -> int:
        """Rows of the cache that must be read: for sparse MLA, at least one token's choice."""
        before = [
            n - (q if writes_cache else 0) for q, n in zip(self.q_lens, self.kv_lens, strict=True)
        ]
        if self.topk is None:
            return sum(before)
        return sum(min(rows, self.topk * q) for rows, q in zip(before, self.q_lens, strict=True))


def _spread(count: int, low: int, high: int) -> tuple[int, ...]:
    """Lengths between two bounds, in no order, the same each time."""
    lengths = np.linspace(low, high, count).astype(int)
    return tuple(int(n) for n in np.random.default_rng(0).permutation(lengths))


def _dense(name: str, description: str, *, backward: bool) -> Work:
    lens = (4096,)
    return Work(name, description, "dense", 8, 8, 128, 128, lens, lens, backward=backward)


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


def _latent(
    name: str, description: str, q_lens: Sequence[int], kv_lens: Sequence[int], topk: int | None
) -> Work:
    op = "mla" if topk is None else "sparse_mla"
    return Work(
        name, description, op, 128, 1, 576, 512, tuple(q_lens), tuple(kv_lens), 64, topk=topk
    )


_D128, _D64 = (32, 8, 128), (64, 8, 64)  # query heads, kv heads, head size
_PAGES = (16, 64, 256)
_ALL = (
    _dense("dense_causal", "causal, batch 1, 8 heads, 4096 tokens, head size 128", backward=False),
    _dense("dense_causal_grad", "the same, forward and backward", backward=True),
    *(_prefill(page, _D128) for page in _PAGES),
    *(_decode(page, _D128) for page in _PAGES),
    *(_prefill(page, _D64) for page in (16, 64)),
    *(_decode(page, _D64) for page in (16, 64)),
    _latent("mla_decode", "64 sequences of 1024 to 3072", (1,) * 64, _spread(64, 1024, 3072), None),
    _latent("mla_prefill", "2 sequences of 1024 new tokens", (1024,) * 2, (1024,) * 2, None),
    _latent(
        "sparse_mla_decode", "32 sequences of 4096 to 8192, 2048 positions each",
        (1,) * 32, _spread(32, 4096, 8192), 2048,
    ),
    _latent(
        "sparse_mla_prefill", "the last 256 tokens of 4096, 2048 positions each",
        (256,), (4096,), 2048,
    ),
)  # fmt: skip
WORKS: dict[str, Work] = {work.name: work for work in _ALL}


def named(patterns: Sequence[str]) -> list[Work]:
    """The works whose names are, or begin with, one of these; all where there are none.

    Raises:
        ValueError: one of them names none.
    """
    found: list[Work] = []
    for pattern in patterns or ("",):
        matching = [WORKS[pattern]] if pattern in WORKS else [
            work for work in _ALL if work.name.startswith(pattern)
        ]  # fmt: skip
        if not matching:
            raise ValueError(f"work is {pattern!r}, must be, or begin, one of {', '.join(WORKS)}")
        found += [work for work in matching if work not in found]
    return found
