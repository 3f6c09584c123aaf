"""A piece of attention work, with the operations and bytes that none can do without.

Floors count necessary work only: every logit that the mask lets through is two products, each
input is read once, each output written once. A key that was computed in this step need not be read
back from the cache.
"""

import dataclasses
from collections.abc import Mapping, Sequence

BYTES = 2  # of a bfloat16: inputs, outputs


@dataclasses.dataclass(frozen=True)
class Work:
    """One attention call.

    Attributes:
        name, description: for tables.
        op: "dense", "paged", "mla", "sparse_mla", "indexer_scores" or "topk_positions".
        num_heads, num_kv_heads: of queries, and of keys and values (1 for MLA).
        head_size: of a key; 576 = 512 + 64 for MLA.
        head_size_v: of a value; 512 for MLA, 0 for the indexer, which has none.
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
        if self.op == "topk_positions":
            return 0.0
        forward = 2.0 * self.num_heads * self.logits * (self.head_size + self.head_size_v)
        return forward * 3.5 if self.backward else forward

    def floor_bytes(self, *, writes_cache: bool = True) -> float:
        """Bytes that must cross HBM.

        Args:
            writes_cache: the call takes this step's keys and writes them to the cache; else it
                finds them there, and reads them.
        """
        if self.op in ("indexer_scores", "topk_positions"):
            return self._indexer_bytes()
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
    def positions(self) -> int:
        """Positions that a row of the page table can name, each with a score (indexer)."""
        return max(-(-n // self.page_size) for n in self.kv_lens) * self.page_size

    def _indexer_bytes(self) -> float:
        """Float32 scores, out or in; with queries, float32 weights and keys, or positions."""
        scores = 4 * self.tokens * self.positions
        if self.op == "topk_positions":
            return scores + 4 * self.tokens * self.topk
        queries = self.tokens * self.num_heads * (BYTES * self.head_size + 4)
        return queries + BYTES * self.head_size * sum(self.kv_lens) + scores

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


def named(works: Mapping[str, Work], patterns: Sequence[str]) -> list[Work]:
    """The works whose names are, or begin with, one of these; all where there are none.

    Raises:
        ValueError: one of them names none.
    """
    found: dict[str, Work] = {}
    for pattern in patterns or ("",):
        exact = {pattern: works[pattern]} if pattern in works else {}
        matching = exact or {n: work for n, work in works.items() if n.startswith(pattern)}
        if not matching:
            raise ValueError(f"work is {pattern!r}, must be, or begin, one of {', '.join(works)}")
        found |= matching
    return list(found.values())
