"""The question: everything that the choice of an attention backend depends on, as one value."""

import dataclasses
import enum
import functools
from typing import Any, Literal, get_args

import jax.numpy as jnp

from attnsel_jax.static_arguments import count, flag

CacheDType = Literal[
    "auto", "float32", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2", "int8", "fp8_ds_mla"
]
CACHE_DTYPES: tuple[str, ...] = get_args(CacheDType)
OPS = ("dense", "paged", "mla", "sparse_mla")
COUNTS = ("head_size", "block_size", "head_size_v", "num_heads", "num_kv_heads", "num_index_heads",
          "index_head_dim")  # fmt: skip
# What a cache dtype is stored as. fp8_ds_mla rows are bytes: 512 e4m3 values, 4 float32 scales,
# 64 bfloat16 rope values.
STORED_AS = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
    "int8": "int8",
    "fp8_ds_mla": "uint8",
}
_NAME_OF_STORED = {stored: name for name, stored in STORED_AS.items() if name != "fp8_ds_mla"}


class AttentionType(enum.StrEnum):
    """What attends to what, in vLLM's words."""

    DECODER = "decoder"
    ENCODER = "encoder"
    ENCODER_ONLY = "encoder_only"
    ENCODER_DECODER = "encoder_decoder"


@dataclasses.dataclass(frozen=True)
class AttentionSelectorConfig:
    """The question that selection answers; `Capabilities` has the same fields.

    Attributes:
        head_size: size of a head of q and k. For the MLA ops: kv_lora_rank + rope_dim (576).
        dtype: of q, k and v; any spelling that `jnp.dtype` takes.
        kv_cache_dtype: one of `CACHE_DTYPES`, a dtype, or None; "auto" and None mean `dtype`.
        block_size: tokens in a page; None lets the backend say (`get_preferred_block_size`).
        use_mla: multi-head latent attention over a latent cache.
        has_sink: one more logit per head in the softmax's denominator.
        use_sparse: top-k positions for each token; needs use_mla.
        attn_type: an `AttentionType`, or its text; None = decoder.
        op: "dense" or "paged" (the default), or, as use_mla and use_sparse say, "mla",
            "sparse_mla".
        head_size_v: of v, where it differs from head_size; None = the same.
        num_heads, num_kv_heads: query heads and kv heads; None = not said.
        num_index_heads, index_head_dim: of sparse MLA's indexer, where its kernel is asked for,
            kv_cache_dtype and block_size then being those of its keys; None = it is not.
        causal: None = True for decoders, False for the other attention types.
        has_sliding_window, has_attention_chunk, has_soft_cap, has_bias, has_alibi, has_mask,
        has_segment_ids, has_lens, has_q_offset: which features the calls will use.
        needs_grad: gradients will be taken.
        needs_lse: the log-sum-exp will be read.
        context_axis: the mesh axis over which one sequence's keys are spread, so that partial
            results are merged by lse, which is then needed; None = each device meets them all.

    Raises:
        ValueError: a value that no backend could ever accept.
    """

    head_size: int
    dtype: Any
    kv_cache_dtype: Any = "auto"
    block_size: int | None = None
    use_mla: bool = False
    has_sink: bool = False
    use_sparse: bool = False
    attn_type: Any = None
    _: dataclasses.KW_ONLY
    op: str | None = None
    head_size_v: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    num_index_heads: int | None = None
    index_head_dim: int | None = None
    causal: bool | None = None
    has_sliding_window: bool = False
    has_attention_chunk: bool = False
    has_soft_cap: bool = False
    has_bias: bool = False
    has_alibi: bool = False
    has_mask: bool = False
    has_segment_ids: bool = False
    has_lens: bool = False
    has_q_offset: bool = False
    needs_grad: bool = False
    needs_lse: bool = False
    context_axis: str | None = None

    def __post_init__(self):
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("dtype", dtype_name(self.dtype))
        put("kv_cache_dtype", kv_cache_dtype_name(self.kv_cache_dtype))
        put("attn_type", attention_type(self.attn_type))
        for name in COUNTS:
            put(name, count(name, getattr(self, name), optional=name != "head_size"))
        if self.head_size_v == self.head_size:
            put("head_size_v", None)
        for field in dataclasses.fields(self):
            if field.type is bool:
                put(field.name, flag(field.name, getattr(self, field.name)))
        put("needs_lse", self.needs_lse or self._merges())
        put("op", self._resolved_op())
        put("causal", self._resolved_causal())
        self._check_head_counts()
        self._check_indexer()

    def _merges(self) -> bool:
        """Whether partial results will be merged."""
        if not isinstance(self.context_axis, str | None):
            raise ValueError(
                f"context_axis is {self.context_axis!r}, must be the name of a mesh axis, or None"
            )
        return self.context_axis is not None

    def _resolved_op(self) -> str:
        if self.use_sparse and not self.use_mla:
            raise ValueError(
                "use_sparse is True and use_mla is False, must be True both: sparse attention is "
                "sparse MLA here; pass use_mla=True"
            )
        allowed = (
            ("sparse_mla",) if self.use_sparse else ("mla",) if self.use_mla else ("paged", "dense")
        )
        if self.op is None:
            return allowed[0]
        if self.op not in allowed:
            raise ValueError(
                f"op is {self.op!r}, must be one of {', '.join(allowed)} with "
                f"use_mla={self.use_mla}, use_sparse={self.use_sparse}"
            )
        return self.op

    def _resolved_causal(self) -> bool:
        decoder = self.attn_type == AttentionType.DECODER
        if self.causal is None:
            return decoder
        causal = flag("causal", self.causal)
        if causal and not decoder:
            raise ValueError(
                f"causal is True, must be False with attn_type {self.attn_type.value}: leave it "
                f"out, or ask for attn_type decoder"
            )
        return causal

    def _check_head_counts(self) -> None:
        if self.num_heads and self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}, must be a multiple of num_kv_heads, "
                f"{self.num_kv_heads}: each kv head serves as many query heads as every other"
            )

    def _check_indexer(self) -> None:
        for name in ("num_index_heads", "index_head_dim"):
            asked = getattr(self, name)
            if asked is None:
                continue
            if not self.use_sparse:
                raise ValueError(
                    f"{name} is {asked} and use_sparse is False, must be None: the indexer is "
                    f"sparse MLA's; pass use_sparse=True and use_mla=True"
                )
            if None in (self.num_index_heads, self.index_head_dim):
                raise ValueError(
                    f"num_index_heads is {self.num_index_heads} and index_head_dim is "
                    f"{self.index_head_dim}, must be numbers both, or None both"
                )
            if self.kv_cache_dtype == "fp8_ds_mla":
                raise ValueError(
                    f"kv_cache_dtype is fp8_ds_mla with {name} {asked}, must be the dtype of the "
                    f"indexer's keys: ask about the attention itself without {name}"
                )

    @property
    def cache_dtype(self) -> str:
        """The cache's dtype with "auto" resolved, a float8 by its name in `CACHE_DTYPES`."""
        if self.kv_cache_dtype == "auto":
            return _NAME_OF_STORED.get(self.dtype, self.dtype)
        return self.kv_cache_dtype

    def __str__(self) -> str:
        said = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING or value != field.default:
                said.append(f"{field.name}={value}")
        return ", ".join(said)


def dtype_name(dtype: Any) -> str:
    """The canonical name of a dtype given as text, numpy or jax dtype, or scalar type."""
    try:
        if dtype is None:  # numpy would read float64
            raise TypeError
        return _dtype_name(dtype)
    except TypeError as error:
        raise ValueError(
            f"dtype is {dtype!r}, must be a floating dtype such as bfloat16, float16, float32 "
            f"(text, numpy dtype, or a scalar type such as jnp.bfloat16)"
        ) from error


@functools.lru_cache(maxsize=256)
def _dtype_name(dtype: Any) -> str:
    found = jnp.dtype(dtype)
    if not jnp.issubdtype(found, jnp.floating):
        raise TypeError
    return found.name


def kv_cache_dtype_name(dtype: Any) -> str:
    """One of `CACHE_DTYPES`, "fp8" resolved to "fp8_e4m3"; takes text, dtypes, or None."""
    if dtype is None:
        return "auto"
    text = dtype.lower() if isinstance(dtype, str) else None
    if text == "fp8":
        return "fp8_e4m3"
    if text in CACHE_DTYPES:
        return text
    try:
        found = jnp.dtype(text or dtype).name
    except TypeError:
        found = None
    if found in _NAME_OF_STORED:
        return _NAME_OF_STORED[found]
    raise ValueError(
        f"kv_cache_dtype is {dtype!r}, must be one of {', '.join(CACHE_DTYPES)}, the dtype of one "
        f"of these (such as jnp.float8_e4m3fn), or None for the dtype of the keys and values"
    )


def is_quantized_kv_cache(kv_cache_dtype: Any) -> bool:
    """Whether the cache holds fewer bits than keys and values have, so that scales matter."""
    name = kv_cache_dtype_name(kv_cache_dtype)
    return name.startswith("fp8") or name == "int8"


def attention_type(value: Any) -> AttentionType:
    """The `AttentionType` that a member, its text or None (decoder) means.

    Raises:
        ValueError: none.
    """
    if value is None:
        return AttentionType.DECODER
    try:
        return AttentionType(value.lower() if isinstance(value, str) else value)
    except ValueError as error:
        allowed = ", ".join(AttentionType)
        raise ValueError(f"attn_type is {value!r}, must be one of {allowed}") from error
