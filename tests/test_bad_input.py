"""Bad input: an error with the argument, its value and what is allowed, before anything runs.

Each row spoils one argument of a call that is right. Shapes, dtypes and static numbers are refused
while the call is traced, so nothing can have run; values are refused on request (`checked=True`).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import batch, dense, mla, normal, paged, replaced, sparse

from attnsel_jax import (
    AttentionBackendEnum,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    KVCache,
    LatentCache,
    NoAttentionBackendError,
    allocate_kv_cache,
    allocate_latent_cache,
    dot_product_attention,
    get_attn_backend,
    mla_attention,
    paged_attention,
    sparse_mla_attention,
)
from attnsel_jax.backend_names import UnknownBackendError

INF, NAN = float("inf"), float("nan")
ints = np.asarray


def refused(op, call, message, error=ValueError):
    """Refused with this message at trace time, and outside jit too."""
    with pytest.raises(error, match=message) as caught:
        jax.eval_shape(lambda: op(**call))
    assert type(caught.value) in (
        TypeError,
        ValueError,
        NoAttentionBackendError,
        UnknownBackendError,
    )
    with pytest.raises(error, match=message):
        op(**call)


DENSE = [
    # wrong ranks
    ("query", normal(0, 5, 8), r"^query has 2 dimensions \(5, 8\), must have 4: \[batch, length"),
    ("key", normal(0, 1, 2, 7, 2, 8), r"^key has 5 dimensions .*, must have 4"),
    ("value", normal(0, 8), r"^value has 1 dimensions \(8,\), must have 4"),
    ("bias", normal(0, 1, 1, 1, 5, 7), r"^bias has 5 dimensions .*, must have at most 4"),
    ("query_seq_lengths", ints([[5, 5]]), r"^query_seq_lengths has 2 dimensions .* at most 1"),
    ("q_segment_ids", np.zeros((1, 2, 5), int), r"^q_segment_ids has 3 dimensions .* at most 2"),
    ("sinks", normal(0, 1, 4), r"^sinks has 2 dimensions \(1, 4\), must have 1: \[num_heads\]"),
    ("alibi_slopes", 0.5, r"^alibi_slopes has 0 dimensions \(\), must have 1: \[num_heads\]"),
    # sizes that do not fit
    ("key", normal(0, 3, 7, 2, 8), r"^key has batch 3, must be 2 \(as in query\)"),
    ("key", normal(0, 2, 7, 2, 16), r"^key has head_size 16, must be 8 \(as in query\)"),
    ("value", normal(0, 2, 6, 2, 8), r"^value has kv_len 6, must be 7 \(as in key\)"),
    ("value", normal(0, 2, 7, 4, 8), r"^value has num_kv_heads 4, must be 2 \(as in key\)"),
    ("bias", normal(0, 2, 3, 5, 7), r"^bias has num_heads 3, must be 4 or 1 \(as in query\)"),
    ("mask", np.ones((2, 4, 5, 6), bool), r"^mask has kv_len 6, must be 7 or 1 \(as in key\)"),
    ("key_value_seq_lengths", ints([7]), r"^key_value_seq_lengths has batch 1, must be 2"),
    ("sinks", normal(0, 2), r"^sinks has num_heads 2, must be 4 \(as in query\)"),
    ("alibi_slopes", normal(0, 5), r"^alibi_slopes has num_heads 5, must be 4"),
    ("q_offset", ints([0, 0, 0]), r"^q_offset has batch 3, must be 2"),
    (
        "q_segment_ids",
        np.zeros((2, 5), int),
        r"^kv_segment_ids is given alone|^q_segment_ids is gi",
    ),
    # dtypes
    (
        "query",
        jnp.ones((2, 5, 4, 8), int),
        r"^query has dtype int32, must be one of float32, bfloat",
    ),
    (
        "key",
        normal(0, 2, 7, 2, 8, dtype="bfloat16"),
        r"query float32, key bfloat16, .* all be the s",
    ),
    ("mask", np.ones((2, 4, 5, 7), int), r"^mask has dtype int32, must be one of bool"),
    ("bias", np.ones((2, 4, 5, 7), bool), r"^bias has dtype bool, must be one of float32"),
    (
        "query_seq_lengths",
        normal(0, 2),
        r"^query_seq_lengths has dtype float32, must be an integer",
    ),
    (
        "q_offset",
        2**30 + 1,
        "^q_offset is 1073741825, must be -1073741824 to 1073741824: positions",
    ),
    ("q_offset", ints([0, -(2**31)]), "^q_offset is -2147483648, must be -1073741824 to 107374182"),
    ("q_offset", 2**31, "^q_offset has a value of 2147483648, must be -2147483648 to 2147483647"),
    ("q_segment_ids", ints([[2**40] * 5] * 2), "^q_segment_ids has a value of 1099511627776, must"),
    ("kv_segment_ids", ints([[-(2**40)] * 7] * 2), "^kv_segment_ids has a value of -1099511627776"),
    ("key_value_seq_lengths", ints([2**32, 7]), "^key_value_seq_lengths has a value of 4294967296"),
    ("query_seq_lengths", [2**40, 5], "^query_seq_lengths has a value of 1099511627776, must be"),
    ("q_offset", 1.5, r"^q_offset has dtype float32, must be an integer dtype"),
    ("q_offset", True, r"^q_offset has dtype bool, must be an integer dtype"),
    ("sinks", np.ones(4, complex), r"^sinks has dtype complex64, must be float32"),
    # numbers that cannot be
    ("query_seq_lengths", [5, -1], r"^query_seq_lengths\[1\] is -1, must be at least 0"),
    (
        "key_value_seq_lengths",
        ints([-2, 7]),
        r"^key_value_seq_lengths\[0\] is -2, must be at least",
    ),
    ("scale", INF, r"^scale is inf, must be a finite number, or None"),
    ("scale", NAN, r"^scale is nan, must be a finite number, or None"),
    ("scale", "1", r"^scale is '1', must be a finite number, or None"),
    ("scale", np.ones(2), r"^scale is array.*, must be a finite number, or None"),
    ("scale", np.complex64(1j), r"^scale is np.complex64\(1j\), must be a finite number, or None"),
    ("scale", np.array("1"), r"^scale is array\('1', dtype='<U1'\), must be a finite number"),
    ("scale", 1e39, r"^scale is 1e\+39, must be a finite number in float32 \(at most 3.4e\+38"),
    ("scale", -(10**400), "^scale is -10+, must be a finite number in float32"),
    ("soft_cap", 1e300, r"^soft_cap is 1e\+300, must be a finite number above 0 in float32"),
    ("soft_cap", 1e-300, "^soft_cap is 1e-300, must be a finite number above 0 in float32"),
    ("soft_cap", 0.0, r"^soft_cap is 0.0, must be a finite number above 0, or None"),
    ("soft_cap", INF, r"^soft_cap is inf, must be a finite number above 0, or None"),
    ("soft_cap", True, r"^soft_cap is True, must be a finite number above 0, or None"),
    ("attention_chunk_size", 0, r"^attention_chunk_size is 0, must be an integer of at least 1"),
    (
        "attention_chunk_size",
        2.5,
        r"^attention_chunk_size is 2.5, must be an integer of at least 1",
    ),
    ("local_window_size", -1, r"^local_window_size is -1, must be an integer of at least 0"),
    ("local_window_size", (1, -1), r"^local_window_size is \(1, -1\), must be an integer"),
    ("local_window_size", (1, 2, 3), r"^local_window_size is \(1, 2, 3\), must be an integer"),
    ("local_window_size", 1.5, r"^local_window_size is 1.5, must be an integer of at least 0"),
    ("local_window_size", ints([1, 2]), r"^local_window_size is \[1 2\], must be an integer of at"),
    ("local_window_size", 2**31 - 2, "^local_window_size is 2147483646, must be at most 107374182"),
    ("local_window_size", (0, 2**63), r"^local_window_size is \(0, 9223372036854775808\), must be"),
    ("attention_chunk_size", 2**40, "^attention_chunk_size is 1099511627776, must be at most 1073"),
    ("local_window_size", (None, 1), r"^local_window_size is \(None, 1\), must be an integer"),
    ("is_causal", 1, r"^is_causal is 1, must be True or False"),
    ("return_residual", None, r"^return_residual is None, must be True or False"),
    ("needs_grad", "yes", r"^needs_grad is 'yes', must be True or False"),
    # names
    ("implementation", "triton", r"^implementation is 'triton', must be one of xla, cudnn"),
    ("backend", "XLAA", r"backend is 'XLAA' \(did you mean .*XLA.*must be one of MOSAIC_GPU"),
    ("backend", 7, r"^backend is 7, must be a name, a member of AttentionBackendEnum"),
    ("device", "h20", r"^device is 'h20', must be one of cpu, .*did you mean h200"),
    ("device", 3, r"^device is 3, must be a Device, a jax.Device, a chip's name"),
]


@pytest.mark.parametrize(("name", "value", "message"), DENSE)
def test_dot_product_attention(name, value, message):
    refused(dot_product_attention, dense() | {name: value}, message)


@pytest.mark.parametrize("name", ["query", "key", "value", "bias", "mask", "sinks", "q_offset"])
@pytest.mark.parametrize("value", ["text", object(), {"a": 1}])
def test_what_is_no_array_is_a_type_error(name, value):
    refused(
        dot_product_attention,
        dense() | {name: value},
        rf"^{name} is \w+, must be an array",
        TypeError,
    )


def test_a_missing_array_is_a_type_error():
    for name in ("query", "key", "value"):
        refused(dot_product_attention, dense() | {name: None}, rf"^{name} is NoneType", TypeError)


def test_backend_and_implementation_may_not_both_be_given():
    call = dense() | {"implementation": "xla", "backend": "XLA_REFERENCE"}
    refused(
        dot_product_attention, call, r"implementation is 'xla' and backend is 'XLA_REFERENCE', m"
    )


def test_an_explicit_backend_that_does_not_serve():
    call = dense() | {"backend": "CUDNN", "soft_cap": 2.0}
    refused(
        dot_product_attention, call, r"has_soft_cap is True, must be False", NoAttentionBackendError
    )
    refused(
        dot_product_attention,
        dense() | {"backend": "XLA_MLA"},
        r"use_mla is False, must be True",
        NoAttentionBackendError,
    )


def test_head_counts_that_do_not_divide():
    call = dense(heads=4, kv_heads=3)
    refused(
        dot_product_attention, call, r"^num_q_heads is 4, must be a multiple of num_kv_heads, 3"
    )


@pytest.mark.parametrize(
    ("q_shape", "k_shape"),
    [
        ((2, 8, 512, 64), (2, 2, 512, 64)),  # prefill with grouped heads
        ((1, 8, 1, 64), (1, 8, 1024, 64)),  # one query over many keys
        ((1, 32, 7, 64), (1, 8, 300, 64)),  # more keys than queries, grouped heads
        ((2, 12, 384, 64), (2, 12, 384, 64)),
    ],
)
def test_heads_before_length_where_shapes_betray_it(q_shape, k_shape):
    q, k = jnp.zeros(q_shape), jnp.zeros(k_shape)
    call = {"query": q, "key": k, "value": k}
    refused(dot_product_attention, call, r"\(batch, heads, length, size\).*jnp.swapaxes\(x, 1, 2\)")
    right = {name: jnp.swapaxes(x, 1, 2) for name, x in call.items()}
    assert jax.eval_shape(lambda: dot_product_attention(**right)).shape == right["query"].shape


@pytest.mark.parametrize(
    "spelling", [float, np.float64, np.float16, jnp.bfloat16.dtype.type, np.asarray, jnp.asarray]
)
def test_a_number_in_any_spelling(spelling):
    expected = dot_product_attention(**dense(), scale=0.25)
    np.testing.assert_array_equal(dot_product_attention(**dense(), scale=spelling(0.25)), expected)


@pytest.mark.parametrize("name", ["scale", "soft_cap", "attention_chunk_size"])
def test_a_static_number_that_is_traced(name):
    call = dense()
    with pytest.raises(
        ValueError, match=rf"^{name} is traced by jit, vmap or grad, must be a plain"
    ):
        jax.jit(lambda x: dot_product_attention(**call, **{name: x}))(3.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query_seq_lengths": [5, 6]}, r"^query_seq_lengths\[1\] is 6, must be 0 to 5"),
        ({"key_value_seq_lengths": [8, 7]}, r"^key_value_seq_lengths\[0\] is 8, must be 0 to 7"),
        ({"query_seq_lengths": jnp.array([-1, 5])}, r"^query_seq_lengths\[0\] is -1, must be "),
    ],
)
def test_dense_values_on_request(arguments, message):
    with pytest.raises(ValueError, match=message):
        dot_product_attention(**dense(), **arguments, checked=True)


BATCH = [
    ("metadata", None, r"^metadata is NoneType, must be AttentionMetadata", TypeError),
    ("metadata", (1, 2), r"^metadata is tuple, must be AttentionMetadata: build it", TypeError),
    ("metadata.page_table", ints([1, 2]), r"^metadata.page_table has 1 dimensions"),
    (
        "metadata.page_table",
        np.zeros((2, 2), np.int32),
        r"^metadata.kv_lens has max_num_seqs 3, mus",
    ),
    (
        "metadata.page_table",
        np.zeros((3, 2), np.int64),
        r"page_table has dtype int64, must be one of",
    ),
    (
        "metadata.page_table",
        np.zeros((3, 2)),
        r"page_table has dtype float64, must be one of int32",
    ),
    ("metadata.page_table", np.zeros((3, 0), np.int32), r"^pages_per_seq is 0, must be at least 1"),
    (
        "metadata.kv_lens",
        np.ones(3, np.float32),
        r"kv_lens has dtype float32, must be one of int32",
    ),
    ("metadata.kv_lens", np.ones((3, 1), np.int32), r"kv_lens has 2 dimensions .*, must have 1"),
    ("metadata.kv_lens", None, r"^metadata.kv_lens is NoneType, must be an array", TypeError),
    ("metadata.kv_lens", 4, r"^metadata.kv_lens is int, must be an array", TypeError),
    (
        "metadata.cu_q_lens",
        np.ones(3, np.int32),
        r"^metadata.cu_q_lens has size 3, must be 4 \(",
    ),
    ("metadata.num_seqs", np.ones((1, 1), np.int32), r"num_seqs has 2 dimensions \(1, 1\), must"),
    ("metadata.slot_mapping", np.ones(4, np.int32), r"slot_mapping has num_tokens 4, must be 5"),
    (
        "metadata.slot_mapping",
        np.ones(5, np.float32),
        r"slot_mapping has dtype float32, must be one",
    ),
    (
        "metadata.slot_mapping",
        None,
        r"slot_mapping is None, must be an array: build the batch with",
    ),
    ("return_lse", 1, r"^return_lse is 1, must be True or False"),
    ("soft_cap", -1.0, r"^soft_cap is -1.0, must be a finite number above 0"),
    ("scale", INF, r"^scale is inf, must be a finite number"),
    ("backend", "XLAA", r"backend is 'XLAA' \(did you mean"),
    ("cache.pages", None, r"^cache.pages is NoneType, must be an array", TypeError),
    ("cache", None, r"^cache is NoneType, must be (KV|Latent)Cache", TypeError),
]
PAGED = [
    ("q", normal(0, 5, 32), r"^q has 2 dimensions \(5, 32\), must have 3: \[num_tokens, num_heads"),
    ("q", 3, r"^q is int, must be an array", TypeError),
    ("q", None, r"^q is NoneType, must be an array", TypeError),
    ("q", normal(0, 5, 3, 8), r"^num_q_heads is 3, must be a multiple of num_kv_heads, 2"),
    ("q", normal(0, 5, 4, 16), r"^cache has head_size 8, must be 16 \(as in q\)"),
    ("q", normal(0, 5, 4, 8, dtype="bfloat16"), r"q bfloat16, k float32, v float32, must all"),
    ("q", jnp.ones((5, 4, 8), int), r"^q has dtype int32, must be one of float32"),
    ("k", normal(0, 4, 2, 8), r"^k has num_tokens 4, must be 5 \(as in q\)"),
    ("k", normal(0, 5, 4, 8), r"^k has num_kv_heads 4, must be 2 \(as in cache\)"),
    ("k", None, r"^k is None and v is given, must be both or neither"),
    ("v", None, r"^v is None and k is given, must be both or neither"),
    ("cache", jnp.zeros((2, 6, 4, 2, 8)), r"^cache is \w+, must be KVCache: allo", TypeError),
    ("cache", LatentCache(jnp.zeros((6, 4, 12))), r"^cache is LatentCache, must be KVC", TypeError),
    ("cache.pages", jnp.zeros((6, 4, 2, 8)), r"^cache.pages has 4 dimensions .*, must have 5 in"),
    ("cache.pages", jnp.zeros((2, 6, 4, 2, 4)), r"^cache has head_size 4, must be 8 \(as in q\)"),
    ("cache.pages", jnp.zeros((2, 0, 4, 2, 8)), r"^num_pages is 0, must be at least 1"),
    ("cache.pages", jnp.zeros((2, 6, 4, 2, 8), int), r"^cache has dtype int32, must be one of"),
    ("cache.pages", jnp.zeros((3, 6, 4, 2, 8)), r"^cache.pages has shape .*, must be \(2, 6, 4, 2"),
    ("cache.layout", "spiral", r"^layout is 'spiral', must be one of stacked"),
    ("cache.k_scale", jnp.ones(3), r"^cache.k_scale has num_kv_heads 3, must be 2"),
    ("cache.v_scale", jnp.ones((), jnp.bfloat16), r"^cache.v_scale has dtype bfloat16, must"),
    ("cache.v_scale", 2.0, r"^cache.v_scale is float, must be an array", TypeError),
    ("sinks", np.ones(2), r"^sinks has num_heads 2, must be 4 \(as in q\)"),
    ("alibi_slopes", np.ones((4, 1)), r"^alibi_slopes has 2 dimensions"),
    ("sliding_window", 0, r"^sliding_window is 0, must be an integer of at least 1, or None"),
    ("sliding_window", -1, r"^sliding_window is -1, must be an integer of at least 1, or None"),
    ("sliding_window", (0, 3), r"^sliding_window\[0\] is 0, must be an integer of at least 1"),
    ("sliding_window", (1, 2, 3), r"^sliding_window is \(1, 2, 3\), must be an integer, \(lef"),
    ("sliding_window", 2**31 - 1, "^sliding_window is 2147483647, must be at most 1073741824, or"),
    ("sliding_window", (1, 2**40), r"^sliding_window\[1\] is 1099511627776, must be at most 1073"),
    ("sliding_window", 2.5, r"^sliding_window is 2.5, must be an integer of at least 1"),
    ("attention_chunk_size", -4, r"^attention_chunk_size is -4, must be an integer of at least 1"),
    ("metadata.causal", 1, r"^metadata.causal is 1, must be True or False"),
]  # fmt: skip
LATENT = [
    ("ql_nope", normal(0, 5, 8), r"^ql_nope has 2 dimensions \(5, 8\), must have 3"),
    ("q_pe", None, r"^q_pe is NoneType, must be an array", TypeError),
    ("ql_nope", [[1.0]], r"^ql_nope is list, must be an array", TypeError),
    ("ql_nope", normal(0, 5, 4, 8, dtype="float16"), r"ql_nope float16, q_pe float32.*must all be"),
    ("q_pe", normal(0, 5, 3, 4), r"^q_pe has num_heads 3, must be 4 \(as in ql_nope\)"),
    ("q_pe", normal(0, 4, 4, 4), r"^q_pe has num_tokens 4, must be 5 \(as in ql_nope\)"),
    ("q_pe", normal(0, 5, 4, 6), r"^k_pe has rope_dim 4, must be 6 \(as in q_pe\)"),
    ("kv_c", normal(0, 5, 6), r"^kv_c has kv_lora_rank 6, must be 8 \(as in ql_nope\)"),
    ("kv_c", None, r"^kv_c is None and k_pe is given, must be both or neither"),
    ("k_pe", None, r"^k_pe is None and kv_c is given, must be both or neither"),
    (
        "cache",
        KVCache(jnp.zeros((2, 6, 4, 1, 12))),
        r"^cache is KVCache, must be Latent",
        TypeError,
    ),
    ("cache.pages", jnp.zeros((6, 4, 1, 12)), r"^cache.pages has 4 dimensions"),
    (
        "cache",
        LatentCache(jnp.zeros((6, 4, 12)), layout="striped"),
        r"^cache.pages has 3 dimensions \(6, 4, 12\), must have 4 in layout 'striped'",
    ),
    (
        "cache.pages",
        jnp.zeros((6, 4, 16)),
        r"^cache.pages has size 16, must be 12 \(",
    ),
    ("cache.pages", jnp.zeros((6, 4, 12), jnp.uint8), r"^cache.pages has size 12, must be 656 \("),
    (
        "cache.pages",
        jnp.zeros((6, 4, 12), jnp.int8),
        r"^cache.pages has dtype int8, must be one of",
    ),
    ("cache.kv_scale", jnp.ones(2), r"^cache.kv_scale has 1 dimensions"),
    ("scale", None, r"^scale is None, must be a number: \(qk_nope_head_dim \+ rope_dim\)"),
    ("metadata.causal", False, r"causal is False, must be True", NoAttentionBackendError),
]
SPARSE = [
    ("topk_indices", None, r"^topk_indices is None, must be int32 \[num_tokens, topk\] positions"),
    (
        "topk_indices",
        jnp.zeros(5, jnp.int32),
        r"^topk_indices has 1 dimensions \(5,\), must have 2",
    ),
    ("topk_indices", jnp.zeros((5, 3)), r"^topk_indices has dtype float32, must be one of int32"),
    ("topk_indices", jnp.zeros((4, 3), jnp.int32), r"^topk_indices has num_tokens 4, must be 5"),
]


@pytest.mark.parametrize(("name", "value", "message", "error"), [
    (*row, ValueError)[:4] for row in BATCH + PAGED
])  # fmt: skip
def test_paged_attention(name, value, message, error):
    refused(paged_attention, replaced(paged(), name, value), message, error)


@pytest.mark.parametrize(("name", "value", "message", "error"), [
    (*row, ValueError)[:4] for row in BATCH + LATENT
])  # fmt: skip
@pytest.mark.parametrize("op", [mla_attention, sparse_mla_attention])
def test_mla_attention(op, name, value, message, error):
    call = mla() if op is mla_attention else sparse()
    refused(op, replaced(call, name, value), message, error)


@pytest.mark.parametrize(("name", "value", "message"), SPARSE)
def test_sparse_mla_attention(name, value, message):
    refused(sparse_mla_attention, replaced(sparse(), name, value), message)


VALUES = [
    (
        "page_table",
        [[4, 6], [0, 5], [0, 0]],
        r"^page_table\[0, 1\] is 6, must be 0 to 5: the cache",
    ),
    ("page_table", [[-1, 1], [0, 5], [0, 0]], r"^page_table\[0, 0\] is -1, must be 0 to 5"),
    (
        "kv_lens",
        [5, 9, 0],
        r"^kv_lens\[1\] is 9, must be 0 to 8: a row of page_table names 2 pages",
    ),
    ("kv_lens", [-1, 6, 0], r"^kv_lens\[0\] is -1, must be 0 to 8"),
    (
        "cu_q_lens",
        [0, 3, 2, 2],
        r"^cu_q_lens\[2\] is 2, must be at least cu_q_lens\[1\], 3: they are",
    ),
    ("cu_q_lens", [1, 3, 4, 4], r"^cu_q_lens\[0\] is 1, must be 0"),
    ("cu_q_lens", [0, 3, 9, 9], r"^cu_q_lens\[2\] is 9, must be at most 5, the tokens of q"),
    ("num_seqs", 4, r"^num_seqs is 4, must be 0 to 3, the rows of page_table"),
    ("num_seqs", -1, r"^num_seqs is -1, must be 0 to 3"),
    (
        "slot_mapping",
        [0, 1, 24, -1, -1],
        r"^slot_mapping\[2\] is 24, must be -1 to 23: -1 writes now",
    ),
    (
        "slot_mapping",
        [0, 1, 1, -1, -1],
        r"^slot_mapping names a slot twice, must name each at most",
    ),
]
DOORS = [(paged_attention, paged), (mla_attention, mla), (sparse_mla_attention, sparse)]


@pytest.mark.parametrize(("name", "value", "message"), VALUES)
@pytest.mark.parametrize(("op", "make"), DOORS)
def test_values_on_request(op, make, name, value, message):
    call = replaced(make(), f"metadata.{name}", jnp.asarray(value, jnp.int32))
    with pytest.raises(ValueError, match=message):
        op(**call, checked=True)


@pytest.mark.parametrize("wrong", [0.0, -1.0, NAN, INF])
@pytest.mark.parametrize(("op", "make"), DOORS)
def test_scales_on_request(op, make, wrong):
    """Scales change between steps by `dataclasses.replace`, past what allocates a cache."""
    name = "v_scale" if op is paged_attention else "kv_scale"
    with pytest.raises(ValueError, match=rf"^cache.{name} is {wrong}, must be a finite number abo"):
        op(**replaced(make(), f"cache.{name}", jnp.float32(wrong)), checked=True)


@pytest.mark.parametrize(("op", "make"), DOORS)
def test_what_is_padding_is_not_looked_at(op, make):
    junk = {"page_table": [[4, 1], [0, 5], [99, -7]], "kv_lens": [5, 6, 999], "num_seqs": 2,
            "cu_q_lens": [0, 3, 4, -3]}  # fmt: skip
    call = make()
    for name, value in junk.items():
        call = replaced(call, f"metadata.{name}", jnp.asarray(value, jnp.int32))
    op(**call, checked=True)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[0, 8, -1]] * 5, r"^topk_indices\[0, 1\] is 8, must be -1 to 7: -1 is padding"),
        ([[0, -2, -1]] * 5, r"^topk_indices\[0, 1\] is -2, must be -1 to 7"),
        ([[0, 1, 2], [3, 1, 3]] + [[0, 1, 2]] * 3, r"^topk_indices\[1\] names position 3 twice"),
    ],
)
def test_positions_on_request(value, message):
    call = sparse() | {"topk_indices": jnp.asarray(value, jnp.int32)}
    with pytest.raises(ValueError, match=message):
        sparse_mla_attention(**call, checked=True)


@pytest.mark.parametrize(("op", "make"), DOORS)
def test_values_cannot_be_looked_at_under_jit(op, make):
    call = make()
    with pytest.raises(ValueError, match=r"^checked is True, and page_table has no values here"):
        jax.jit(lambda metadata: op(**(call | {"metadata": metadata}), checked=True))(
            call["metadata"]
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q_lens": [-1, 1]}, r"^q_lens\[0\] is -1, must be at least 0"),
        ({"kv_lens": [5, -6]}, r"^kv_lens\[1\] is -6, must be at least 0"),
        ({"kv_lens": [5, 9]}, r"^kv_lens\[1\] is 9, must be at most 8: its 2 pages hold 4 tokens"),
        ({"q_lens": [6, 1]}, r"^q_lens\[0\] is 6, must be at most kv_lens\[0\], 5"),
        (
            {"q_lens": [3]},
            r"q_lens, kv_lens and page_table have 1, 2 and 2 sequences, must have as",
        ),
        ({"q_lens": [1.5, 1]}, r"^q_lens is float64\[2\], must be a row of integers"),
        (
            {"page_table": [[4, 1.0], [0, 5]]},
            r"^page_table\[0\] is float64\[2\], must be a row of in",
        ),
        (
            {"page_table": [[4, -1], [0, 5]]},
            r"^page_table\[0\]\[1\] is -1, must be 0 to 536870911",
        ),
        (
            {"page_table": [[4, 2**29], [0, 5]]},  # whose slots int32 has no room for
            r"^page_table\[0\]\[1\] is 536870912, must be 0 to 536870911",
        ),
        ({"writes": "no"}, r"^writes is 'no', must be True or False"),
        ({"page_size": 0}, r"^page_size is 0, must be an integer of at least 1"),
        ({"page_size": 4.0}, r"^page_size is 4.0, must be an integer of at least 1"),
        ({"num_tokens": 3}, r"^num_tokens is 3, must be at least 4, what the batch has"),
        ({"max_num_seqs": 1}, r"^max_num_seqs is 1, must be at least 2, what the batch has"),
        ({"pages_per_seq": 1}, r"^pages_per_seq is 1, must be at least 2"),
        ({"num_tokens": 8.5}, r"^num_tokens is 8.5, must be an integer, or None"),
        ({"num_tokens": True}, r"^num_tokens is True, must be an integer, or None"),
    ],
)
def test_from_lengths(arguments, message):
    right = {"q_lens": [3, 1], "kv_lens": [5, 6], "page_table": [[4, 1], [0, 5]], "page_size": 4}
    AttentionMetadata.from_lengths(**right)
    with pytest.raises(ValueError, match=message):
        AttentionMetadata.from_lengths(**(right | arguments))


COMMON = {
    "query_start_loc": np.array([0, 3, 4]), "seq_lens": np.array([5, 6]), "num_reqs": 2,
    "num_actual_tokens": 4, "max_query_len": 3, "max_seq_len": 6,
    "block_table_tensor": np.array([[4, 1], [0, 5]]), "slot_mapping": np.arange(4),
}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_reqs": 3}, r"^num_reqs is 3, must be 0 to 2, the rows of block_table_tensor"),
        ({"num_reqs": -1}, r"^num_reqs is -1, must be 0 to 2"),
        ({"num_reqs": None}, r"^num_reqs is None, must be 0 to 2"),
        ({"num_reqs": 2.0}, r"^num_reqs is 2.0, must be 0 to 2"),
        ({"max_seq_len": "6"}, r"^max_seq_len is '6', must be 0 to 8"),
        ({"causal": None}, r"^causal is None, must be True or False"),
        ({"max_seq_len": 9}, r"^max_seq_len is 9, must be 0 to 8, 2 blocks of 4"),
        (
            {"num_actual_tokens": 5},
            r"^num_actual_tokens is 5, must be 0 to 4, the entries of slot_",
        ),
        (
            {"seq_lens": np.ones(3, int)},
            r"^seq_lens has 3 and query_start_loc 3 entries, must have 2",
        ),
        ({"query_start_loc": np.ones(2, int)}, r"^seq_lens has 2 and query_start_loc 2 entries"),
        ({"block_table_tensor": np.ones(2, int)}, r"^block_table_tensor has 1 dimensions"),
        ({"seq_lens": np.ones(2)}, r"^seq_lens has dtype float32, must be an integer dtype"),
        (
            {"slot_mapping": np.array([1, 2, 3, 2**32])},
            "^slot_mapping has a value of 4294967296, mu",
        ),
        (
            {"slot_mapping": np.ones(4)},
            r"^slot_mapping has dtype float32, must be an integer dtype",
        ),
        (
            {"block_table_tensor": [[4, 1], [0]]},
            "^block_table_tensor has rows of several lengths, must be an array: pad it",
        ),
        ({"max_query_len": "3"}, r"^max_query_len is '3', must be 0 to 4, the entries of slot_"),
        ({"seq_lens": np.array([5, -1])}, r"^seq_lens\[1\] is -1, must be 0 to max_seq_len, 6"),
        ({"seq_lens": [5, 99]}, r"^seq_lens\[1\] is 99, must be 0 to max_seq_len, 6"),
        (
            {"seq_lens": np.array([2, 6])},
            r"^seq_lens\[0\] is 2, must be at least the query's length, which it counts too",
        ),
        ({"query_start_loc": [1, 3, 4]}, r"^query_start_loc\[0\] is 1, must be 0$"),
        (
            {"query_start_loc": [0, 3, 2]},
            r"^query_start_loc\[2\] is 2, must be at least the entry before it",
        ),
        (
            {"query_start_loc": [0, 3, 5]},
            r"^query_start_loc\[2\] is 5, must be at most num_actual_tokens, 4",
        ),
        (
            {"query_start_loc": [0, 4, 4]},
            r"^query_start_loc\[1\] is 4, must be at most max_query_len, 3, above the entry before",
        ),
    ],
)
def test_the_builder(arguments, message):
    builder = AttentionMetadataBuilder(4)
    builder.build(0, CommonAttentionMetadata(**COMMON))
    with pytest.raises(ValueError, match=message):
        builder.build(0, CommonAttentionMetadata(**(COMMON | arguments)))


def test_what_the_builder_does_not_look_at():
    """Rows past num_reqs, lengths on a device; a query's length where nothing is written."""
    builder = AttentionMetadataBuilder(4)
    junk = {"query_start_loc": np.array([0, 3, 99]), "seq_lens": np.array([5, -9]), "num_reqs": 1}
    far = {"seq_lens": jnp.array([5, 99]), "query_start_loc": jnp.array([1, 9, 4])}
    cross = {"seq_lens": np.array([2, 6]), "slot_mapping": None, "causal": False}
    for arguments in (junk, far, cross):
        builder.build(0, CommonAttentionMetadata(**(COMMON | arguments)))


def test_a_batch_is_not_built_of_what_is_traced():
    names = ("num_reqs", "num_actual_tokens", "max_query_len", "max_seq_len")
    for name in names:
        with pytest.raises(ValueError, match=rf"^{name} is traced by jit, vmap or grad, must be"):
            jax.eval_shape(
                lambda value, name=name: AttentionMetadataBuilder(4).build(
                    0, CommonAttentionMetadata(**(COMMON | {name: value}))
                ),
                COMMON[name],
            )
    lengths = {"q_lens": [3, 1], "kv_lens": [5, 6], "page_table": [[4, 1], [0, 5]]}
    for name, value in lengths.items():
        with pytest.raises(
            ValueError, match=rf"^{name}.* is traced by jit, .*: build the batch out"
        ):
            jax.eval_shape(
                lambda value, name=name: AttentionMetadata.from_lengths(
                    **(lengths | {name: value}), page_size=4
                ),
                np.array(value),
            )
    with pytest.raises(ValueError, match=r"^num_tokens is traced by jit"):
        jax.eval_shape(
            lambda n: AttentionMetadata.from_lengths(**lengths, page_size=4, num_tokens=n), 9
        )


def test_the_builders_other_arguments():
    with pytest.raises(ValueError, match=r"^block_size is 0, must be an integer of at least 1"):
        AttentionMetadataBuilder(0)
    with pytest.raises(
        TypeError, match=r"^common_attn_metadata is AttentionMetadata, must be Comm"
    ):
        AttentionMetadataBuilder(4).build(0, batch())
    with pytest.raises(
        ValueError, match=r"^common_prefix_len is 16, must be 0: no backend here has"
    ):
        AttentionMetadataBuilder(4).build(16, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_pages": 0}, r"^num_pages is 0, must be an integer of at least 1"),
        ({"num_pages": -3}, r"^num_pages is -3, must be an integer of at least 1"),
        ({"num_pages": 2.5}, r"^num_pages is 2.5, must be an integer of at least 1"),
        ({"page_size": 0}, r"^page_size is 0, must be an integer of at least 1"),
        ({"num_kv_heads": 0}, r"^num_kv_heads is 0, must be an integer of at least 1"),
        ({"head_size": "8"}, r"^head_size is '8', must be an integer of at least 1"),
        ({"dtype": "int32"}, r"^dtype is 'int32', must be a floating dtype"),
        ({"kv_cache_dtype": "int4"}, r"^kv_cache_dtype is 'int4', must be one of auto, float32"),
        ({"k_scale": 0.0}, r"^k_scale is 0.0, must be a finite number above 0: what is stored is"),
        ({"v_scale": [1.0, -2.0]}, r"^v_scale is -2.0, must be a finite number above 0"),
        ({"v_scale": NAN}, r"^v_scale is nan, must be a finite number above 0"),
        ({"k_scale": jnp.ones(3)}, r"^k_scale has shape \(3,\), must be \(\) or \(2,\)"),
        ({"v_scale": jnp.ones((2, 1))}, r"^v_scale has shape \(2, 1\), must be \(\) or \(2,\)"),
        ({"kv_cache_dtype": "fp8_ds_mla"}, r"kv_cache_dtype is fp8_ds_mla, must be one of float32"),
        ({"backend": "XLA_MLA"}, r"use_mla is False, must be True"),
    ],
)
def test_allocate_kv_cache(arguments, message):
    right = {"num_pages": 6, "page_size": 4, "num_kv_heads": 2, "head_size": 8, "dtype": "float32"}
    assert allocate_kv_cache(**right).pages.shape == (2, 6, 4, 2, 8)
    with pytest.raises(ValueError, match=message):
        allocate_kv_cache(**(right | arguments))


@pytest.mark.parametrize("name", ["num_pages", "page_size", "kv_lora_rank", "rope_dim"])
def test_a_cache_of_nothing_is_refused_in_the_callers_words(name):
    right = {"num_pages": 6, "page_size": 4, "kv_lora_rank": 8, "rope_dim": 4, "dtype": "float32"}
    assert allocate_latent_cache(**right).pages.shape == (6, 4, 12)
    message = rf"^{name} is 0, must be an integer of at least 1"
    with pytest.raises(ValueError, match=message):
        allocate_latent_cache(**right | {name: 0})
    if name == "page_size":
        with pytest.raises(ValueError, match=message):
            allocate_kv_cache(6, 0, 2, 8, "float32")


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ([1.0], r"^kv_scale has shape \(1,\), must be \(\)"),
        (INF, "^kv_scale is inf, must be a fin"),
    ],
)
def test_a_latent_cache_has_one_scale_above_0(scale, message):
    allocate_latent_cache(6, 4, 8, 4, "float32", kv_scale=0.5)
    with pytest.raises(ValueError, match=message):
        allocate_latent_cache(6, 4, 8, 4, "float32", kv_scale=scale)


def test_a_page_that_int32_has_no_number_for_is_refused_not_wrapped():
    with pytest.raises(ValueError, match=r"^page_table\[0\]\[0\] is 1099511627776, must be 0 to"):
        AttentionMetadata.from_lengths([1], [3], [[2**40]], 8)
    with pytest.raises(ValueError, match=r"^causal is 3, must be True or False"):
        AttentionMetadata.from_lengths([1], [3], [[2]], 8, causal=3)


def test_an_empty_name_of_a_device_is_no_default():
    with pytest.raises(ValueError, match=r"^device is '', must be one of cpu"):
        get_attn_backend(8, "float32", "auto", 4, device="")


IMPL = {"num_heads": 4, "head_size": 8, "scale": 0.3, "num_kv_heads": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, r"^num_q_heads is 3, must be a multiple of num_kv_heads, 2"),
        ({"num_heads": 0}, r"^num_heads is 0, must be an integer of at least 1"),
        ({"num_kv_heads": 0}, r"^num_kv_heads is 0, must be an integer of at least 1"),
        ({"scale": INF}, r"^scale is inf, must be a finite number"),
        ({"sliding_window": -1}, r"^sliding_window is -1, must be an integer of at least 1"),
        ({"logits_soft_cap": -2.0}, r"^logits_soft_cap is -2.0, must be a finite number above 0"),
        ({"attn_type": "prefix"}, r"^attn_type is 'prefix', must be one of decoder, encoder"),
        ({"kv_cache_dtype": "int4"}, r"^kv_cache_dtype is 'int4', must be one of auto"),
        ({"sinks": jnp.ones(2)}, r"^sinks has shape \(2,\), must be \(4,\): one a head"),
        ({"alibi_slopes": [1.0]}, r"^alibi_slopes has shape \(1,\), must be \(4,\): one a head"),
        ({"alibi_slopes": [1j] * 4}, r"^alibi_slopes has dtype complex64, must be float32"),
        ({"kv_cache_dtype": "fp8_ds_mla"}, r"^kv_cache_dtype is fp8_ds_mla, must be one of .*XLA"),
    ],
)
def test_the_impl_is_built_of_what_can_be(arguments, message):
    impl = get_attn_backend(8, "float32", "auto", 4).get_impl_cls()
    with pytest.raises(ValueError, match=message):
        impl(**(IMPL | arguments))


def test_an_impl_refuses_what_its_backend_does_not_declare():
    from third_party import backend

    from attnsel_jax import Capabilities, OneOf

    bare = {"paged": Capabilities(dtype=OneOf("float32"), head_size=OneOf(8))}
    impl = backend("BARE", capabilities=bare).get_impl_cls()
    impl(**IMPL)
    for arguments, message in (
        ({"sliding_window": 4}, r"^has_sliding_window is True, must be False with backend BARE"),
        ({"sinks": jnp.ones(4)}, r"^has_sink is True, must be False with backend BARE"),
        ({"attn_type": "encoder"}, r"^attn_type is encoder, must be decoder with backend BARE"),
        ({"head_size": 16}, r"^head_size is 16, must be 8 with backend BARE"),
    ):
        with pytest.raises(ValueError, match=message):
            impl(**(IMPL | arguments))
    with pytest.raises(ValueError, match=r"^backend is CUDNN, must be one that serves op paged"):
        AttentionBackendEnum["CUDNN"].get_class().get_impl_cls()(**IMPL)


def test_an_impl_refuses_a_cache_of_another_dtype_than_was_said():
    impl = get_attn_backend(8, "float32", "fp8", 4).get_impl_cls()(**IMPL, kv_cache_dtype="fp8")
    call = paged()
    with pytest.raises(
        ValueError, match=r"^kv_cache has dtype float32, must be float8_e4m3fn, as k"
    ):
        impl.forward(call["q"], call["k"], call["v"], call["cache"], call["metadata"])


@pytest.mark.parametrize(
    ("name", "value", "message", "error"),
    [
        ("q", normal(0, 5, 64), r"^q is \(5, 64\), must be \[num_tokens, 4, 8\] or", ValueError),
        ("q", normal(0, 5, 8, 8), r"^q is \(5, 8, 8\), must be \[num_tokens, 4, 8\]", ValueError),
        ("q", normal(0, 1, 5, 4, 8), r"^q is \(1, 5, 4, 8\), must be", ValueError),
        ("q", [1.0], "^q is list, must be an array", TypeError),
        ("k", normal(0, 5, 8), r"^k is \(5, 8\), must be \[num_tokens, 2, 8\] or", ValueError),
        ("v", normal(0, 5, 4, 8), r"^v is \(5, 4, 8\), must be \[num_tokens, 2, 8\]", ValueError),
        ("cache", None, "^kv_cache is NoneType, must be a cache, or its array", TypeError),
        (
            "cache", jnp.zeros((2, 6, 4, 1, 8)),
            "^kv_cache has num_kv_heads 1, must be 2, as this layer was built", ValueError,
        ),
        ("cache", jnp.zeros(0), r"^pages has 1 dimensions \(0,\), must have 5 in lay", ValueError),
        ("metadata", None, "^metadata is NoneType, must be AttentionMetadata: build", TypeError),
        ("metadata.causal", None, "^metadata.causal is None, must be True or False", ValueError),
        ("metadata.num_seqs", 2, "^metadata.num_seqs is int, must be an array: conv", TypeError),
        (
            "metadata.kv_lens", np.array([5, 2**40]),
            "^metadata.kv_lens has a value of 1099511627776, must be", ValueError,
        ),
    ],
)  # fmt: skip
def test_an_impl_refuses_a_step_that_it_was_not_built_for(name, value, message, error):
    """Flat tokens of another width would be read as other tokens."""
    layer = get_attn_backend(8, "float32", "auto", 4).get_impl_cls()(**IMPL)
    call = paged()
    if name == "q":
        call |= {"k": None, "v": None}
    with pytest.raises(error, match=message):
        layer.forward(**{"kv_cache" if n == "cache" else n: x
                         for n, x in replaced(call, name, value).items()})  # fmt: skip


def test_an_impl_refuses_a_batch_that_its_backend_does_not_declare():
    from third_party import backend

    from attnsel_jax import Capabilities, OneOf

    bare = {"paged": Capabilities(dtype=OneOf("float32"), head_size=OneOf(8))}
    layer = backend("BARE", capabilities=bare).get_impl_cls()(**IMPL)
    q, k, v, cache, metadata = replaced(paged(), "metadata.causal", False).values()
    with pytest.raises(ValueError, match=r"^metadata.causal is False, must be True with backend B"):
        layer.forward(q, k, v, cache, metadata)
    found = get_attn_backend(12, "float32", "auto", 4, True).get_impl_cls()
    layer = found(num_heads=4, scale=0.3, kv_lora_rank=8, qk_rope_head_dim=4)
    call = replaced(mla(), "metadata.causal", False)
    call.pop("scale")
    with pytest.raises(ValueError, match=r"^metadata.causal is False, must be True: latent"):
        layer.forward(*call.values())


def test_an_mla_impl_refuses_sizes_that_it_was_not_built_for():
    found = get_attn_backend(12, "float32", "auto", 4, True).get_impl_cls()
    impl = found(num_heads=4, scale=0.3, kv_lora_rank=8, qk_rope_head_dim=4)
    call = mla(heads=2)
    call.pop("scale")
    with pytest.raises(ValueError, match=r"^ql_nope is \(5, 2, 8\), must be \[num_tokens, 4, 8\]"):
        impl.forward(*call.values())
    with pytest.raises(TypeError, match=r"^metadata is NoneType, must be AttentionMetadata"):
        impl.forward(*(call | {"metadata": None}).values())
    for name, value in (("kv_c", [1.0]), ("ql_nope", None)):
        with pytest.raises(TypeError, match=rf"^{name} is {type(value).__name__}, must be an arr"):
            impl.forward(*(call | {name: value}).values())
    sizes = {"num_heads": 4, "kv_lora_rank": 8, "qk_rope_head_dim": 4}
    with pytest.raises(ValueError, match=r"^scale is None, must be a number"):
        found(**sizes, scale=None)
    with pytest.raises(ValueError, match=r"^kv_cache_dtype is int8, must be one of .*XLA_MLA: ask"):
        found(**sizes, scale=0.3, kv_cache_dtype="int8")
