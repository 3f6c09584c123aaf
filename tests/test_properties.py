"""For any question and any shapes: what agrees with the oracle, or a refusal with reasons.

Never another exception, and never a wrong number. Sizes come from small pools, so that most calls
find their program compiled.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnsel_jax import (
    AttentionBackendEnum,
    AttentionMetadata,
    AttentionSelectorConfig,
    KVCache,
    LatentCache,
    NoAttentionBackendError,
    dot_product_attention,
    get_attn_backend,
    mla_attention,
    oracle,
    paged_attention,
    select,
)
from attnsel_jax.config import CACHE_DTYPES, AttentionType
from attnsel_jax.platforms import CHIPS

FLAGS = [f.name for f in dataclasses.fields(AttentionSelectorConfig) if f.type is bool]
SIZES = st.sampled_from([1, 7, 8, 16, 64, 96, 128, 192, 256, 512, 576, 0, -1])
NAMES = [member.name for member in AttentionBackendEnum]


def bounded(examples):
    return settings(
        max_examples=examples, deadline=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


# Questions.

questions = st.fixed_dictionaries(
    {
        "head_size": SIZES,
        "dtype": st.sampled_from(
            ["float32", "bfloat16", "float16", "float64", "float8_e5m2", "int8"]
        ),
        "kv_cache_dtype": st.sampled_from([*CACHE_DTYPES, None, "int4"]),
        "block_size": st.none() | SIZES,
        "attn_type": st.sampled_from([None, *AttentionType, "prefix"]),
        "op": st.sampled_from([None, None, "paged", "dense", "mla", "sparse_mla"]),
        "head_size_v": st.none() | SIZES,
        "num_heads": st.none() | st.sampled_from([1, 4, 8, 96, 128]),
        "num_kv_heads": st.none() | st.sampled_from([1, 3, 8]),
        "causal": st.sampled_from([None, True, False]),
    },
    optional={name: st.booleans() for name in FLAGS},
)
forced_names = st.sampled_from([None, None, *NAMES, "FLASH_ATTN", "CPU_ATTN", "PALLAS"])


def answered_or_refused(question, chip, name):
    try:
        config = AttentionSelectorConfig(**question)
    except ValueError as error:
        assert " must be " in str(error)  # noqa: PT017
        with pytest.raises(ValueError, match=r" must be "):
            get_attn_backend(
                **({"block_size": None, "kv_cache_dtype": None} | question), device=chip
            )
        return
    answer = select(config, chip, name)
    assert list(answer.reasons) == NAMES
    for member in AttentionBackendEnum:
        validated = member.get_class().validate_configuration(config, CHIPS[chip])
        assert [str(r) for r in validated] == [str(r) for r in answer.reasons[member.name]]
    fit = [n for n in answer.candidates if not answer.reasons[n]]
    if fit:
        assert answer.backend is AttentionBackendEnum[fit[0]].get_class()
        assert get_attn_backend(**question, device=chip, backend=name) is answer.backend
        return
    assert answer.backend is None
    assert all(answer.reasons[n] for n in answer.candidates)
    if name is None:
        assert all(answer.reasons.values()), "at least one reason for every backend"
    with pytest.raises(NoAttentionBackendError, match=r"is .*, must be ") as caught:
        get_attn_backend(**question, device=chip, backend=name)
    assert all(member.name in str(caught.value) for member in AttentionBackendEnum)


@bounded(150)
@given(questions, st.sampled_from(list(CHIPS)), forced_names)
def test_every_question_has_a_backend_or_reasons(question, chip, name):
    answered_or_refused(question, chip, name)


@pytest.mark.sweep
@bounded(5000)
@given(questions, st.sampled_from(list(CHIPS)), forced_names)
def test_every_question_has_a_backend_or_reasons_at_length(question, chip, name):
    answered_or_refused(question, chip, name)


# Dense calls: each size is drawn from a small pool, and one in three is spoiled.


def array(rng, shape, dtype):
    return jnp.asarray(rng.standard_normal(shape), dtype)


shapes = st.tuples(
    st.sampled_from([1, 2]), st.sampled_from([1, 5]), st.sampled_from([5, 8]),
    st.sampled_from([(4, 2), (4, 4), (3, 1)]),
)  # fmt: skip
spoilers = st.sampled_from(
    [None] * 8 + ["heads", "rank", "batch", "dtype", "mask", "bias", "sinks", "lens", "size"]
)
features = st.sampled_from(
    [
        {}, {"is_causal": True}, {"soft_cap": 2.0}, {"local_window_size": (1, 0)},
        {"local_window_size": 2, "is_causal": True}, {"attention_chunk_size": 3}, {"bias": True},
        {"mask": True}, {"sinks": True, "is_causal": True}, {"lens": True}, {"q_offset": 3},
        {"scale": 0.5, "soft_cap": 1.0, "sinks": True, "mask": True, "is_causal": True},
    ]
)  # fmt: skip


def dense_call(shape, feature, spoiler, seed):
    """Arguments of the door, and the same in the contract's words."""
    rng = np.random.default_rng(seed)
    batch, q_len, kv_len, (heads, kv_heads) = shape
    q, k, v = (
        array(rng, s, "float32")
        for s in ((batch, q_len, heads, 8), *[(batch, kv_len, kv_heads, 8)] * 2)
    )
    call = {"query": 3 * q, "key": k, "value": v}
    call |= {n: x for n, x in feature.items() if n not in ("bias", "mask", "sinks", "lens")}
    if "bias" in feature:
        call["bias"] = array(rng, (1, heads, 1, kv_len), "float32")
    if "mask" in feature:
        call["mask"] = jnp.asarray(rng.random((batch, 1, q_len, kv_len)) < 0.5)
    if "sinks" in feature:
        call["sinks"] = array(rng, heads, "float32")
    if "lens" in feature:
        call["query_seq_lengths"] = jnp.asarray(rng.integers(0, q_len + 1, batch), jnp.int32)
        call["key_value_seq_lengths"] = jnp.asarray(rng.integers(0, kv_len + 1, batch), jnp.int32)
    spoil = {
        "heads": ("key", k[:, :, :1].repeat(heads + 1, 2)), "rank": ("value", v[0, 0]),
        "batch": ("key", jnp.concatenate([k] * 3)), "dtype": ("key", k.astype(jnp.bfloat16)),
        "mask": ("mask", jnp.ones((batch, 1, q_len, kv_len + 1), bool)),
        "bias": ("bias", jnp.ones((1, heads + 1, 1, 1))), "sinks": ("sinks", jnp.ones(heads + 1)),
        "lens": ("query_seq_lengths", jnp.ones(batch + 1, jnp.int32)),
        "size": ("query", q[..., :5]),
    }  # fmt: skip
    if spoiler:
        name, value = spoil[spoiler]
        call[name] = value
    return call


WORDS = {
    "query": "q", "key": "k", "value": "v", "is_causal": "causal", "query_seq_lengths": "q_lens",
    "key_value_seq_lengths": "kv_lens",
}  # fmt: skip


def in_the_contracts_words(call):
    words = {WORDS.get(name, name): value for name, value in call.items()}
    window = words.pop("local_window_size", None)
    if window is not None:
        left, right = window if isinstance(window, tuple) else (window, window)
        words["sliding_window"] = (left + 1, right + 1)
    return words


def dense_agrees_or_is_refused(shape, feature, spoiler, seed, name):
    call = dense_call(shape, feature, spoiler, seed)
    if spoiler:
        with pytest.raises(ValueError, match=r" must "):
            jax.eval_shape(lambda: dot_product_attention(**call, backend=name))
        return
    try:
        out, lse = dot_product_attention(**call, return_residual=True, backend=name)
    except NoAttentionBackendError as error:
        assert " must be " in str(error)  # noqa: PT017
        return
    expected, expected_lse = oracle.dense_attention(**in_the_contracts_words(call))
    np.testing.assert_allclose(out, expected, rtol=3e-5, atol=3e-5)
    np.testing.assert_allclose(lse, expected_lse, rtol=3e-5, atol=3e-5)


dense_backends = st.sampled_from([None, "XLA_REFERENCE", "CUDNN"])


@bounded(30)
@given(shapes, features, spoilers, st.integers(0, 3), dense_backends)
def test_a_dense_call_agrees_with_the_oracle_or_is_refused(shape, feature, spoiler, seed, name):
    dense_agrees_or_is_refused(shape, feature, spoiler, seed, name)


@pytest.mark.sweep
@bounded(1000)
@given(shapes, features, spoilers, st.integers(0, 99), dense_backends)
def test_dense_calls_at_length(shape, feature, spoiler, seed, name):
    dense_agrees_or_is_refused(shape, feature, spoiler, seed, name)


# Ragged calls: any lengths over one padded shape, so that one program serves them all.

PAGE, WIDTH, ROWS, TOKENS = 4, 4, 3, 12


@st.composite
def batches(draw):
    """(q_lens, kv_lens, shuffled pages of each sequence): at most 3 sequences and 12 tokens."""
    sequences = draw(st.integers(0, ROWS))
    q_lens = [draw(st.integers(0, 4)) for _ in range(sequences)]
    kv_lens = [draw(st.integers(q, WIDTH * PAGE)) for q in q_lens]
    ids = iter(draw(st.permutations(range(ROWS * WIDTH))))
    return q_lens, kv_lens, [[next(ids) for _ in range(-(-n // PAGE))] for n in kv_lens]


def ragged(drawn, seed, row):
    """(metadata, pages [num_pages, page_size, *row]) with NaN where no position lies."""
    q_lens, kv_lens, table = drawn
    metadata = AttentionMetadata.from_lengths(
        q_lens, kv_lens, table, PAGE, num_tokens=TOKENS, max_num_seqs=ROWS, pages_per_seq=WIDTH
    )
    pages = np.full((ROWS * WIDTH * PAGE, *row), np.nan, np.float32)
    rng = np.random.default_rng(seed)
    for q_len, kv_len, ids in zip(q_lens, kv_lens, table, strict=True):
        for p in range(kv_len - q_len):
            pages[ids[p // PAGE] * PAGE + p % PAGE] = rng.standard_normal(row)
    return metadata, pages.reshape(ROWS * WIDTH, PAGE, *row), rng


def check_ragged(got, expected):
    for actual, wanted in zip(got[:2], expected[:2], strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=3e-5, atol=3e-5)
    np.testing.assert_array_equal(got[2].pages, expected[2])


paged_features = st.sampled_from([{}, {"sliding_window": 3, "soft_cap": 2.0}])


def paged_agrees(drawn, seed, feature, name):
    metadata, both, rng = ragged(drawn, seed, (2, 2, 8))
    pages = jnp.asarray(np.moveaxis(both, 2, 0))
    q, k, v = (array(rng, (TOKENS, heads, 8), "float32") for heads in (4, 2, 2))
    got = paged_attention(
        3 * q,
        k,
        v,
        KVCache(pages),
        metadata,
        return_lse=True,
        backend=name,
        checked=True,
        **feature,
    )
    m = metadata
    check_ragged(got, oracle.paged_attention(
        3 * q, k, v, pages, m.page_table, m.kv_lens, m.cu_q_lens, m.num_seqs, m.slot_mapping,
        **feature,
    ))  # fmt: skip


@bounded(40)
@given(batches(), st.integers(0, 3), paged_features, st.sampled_from([None, "XLA_REFERENCE"]))
def test_any_ragged_batch_agrees_with_the_oracle(drawn, seed, feature, name):
    paged_agrees(drawn, seed, feature, name)


@pytest.mark.sweep
@bounded(1000)
@given(batches(), st.integers(0, 99), paged_features, st.sampled_from([None, "XLA_REFERENCE"]))
def test_ragged_batches_at_length(drawn, seed, feature, name):
    paged_agrees(drawn, seed, feature, name)


@bounded(20)
@given(batches(), st.integers(0, 3))
def test_any_ragged_batch_of_latents_agrees_with_the_oracle(drawn, seed):
    metadata, pages, rng = ragged(drawn, seed, (12,))
    tokens = [array(rng, (TOKENS, *s), "float32") for s in ((4, 8), (4, 4), (8,), (4,))]
    got = mla_attention(
        *tokens, LatentCache(jnp.asarray(pages)), metadata, scale=0.5, return_lse=True, checked=True
    )
    m = metadata
    check_ragged(got, oracle.mla_attention(
        *tokens, pages, m.page_table, m.kv_lens, m.cu_q_lens, m.num_seqs, m.slot_mapping, scale=0.5,
    ))  # fmt: skip


# What spoils a batch: refused by value, and nothing else.


@bounded(60)
@given(
    batches(),
    st.sampled_from(["page_table", "kv_lens", "cu_q_lens", "num_seqs", "slot_mapping"]),
    st.integers(0, 11),
    st.sampled_from([-7, -1, 0, 2, 13, 99, 2**31 - 1]),
)
def test_a_batch_with_any_wrong_value_is_refused_or_right(drawn, name, place, value):
    metadata, both, rng = ragged(drawn, 0, (2, 2, 8))
    wrong = np.array(getattr(metadata, name))
    wrong.reshape(-1)[place % wrong.size] = value
    metadata = dataclasses.replace(metadata, **{name: jnp.asarray(wrong)})
    pages = jnp.asarray(np.moveaxis(np.nan_to_num(both), 2, 0))
    q, k, v = (array(rng, (TOKENS, heads, 8), "float32") for heads in (4, 2, 2))
    try:
        got = paged_attention(3 * q, k, v, KVCache(pages), metadata, return_lse=True, checked=True)
    except ValueError as error:
        assert " must " in str(error)  # noqa: PT017
        return
    m = metadata
    check_ragged(got, oracle.paged_attention(
        3 * q, k, v, pages, m.page_table, m.kv_lens, m.cu_q_lens, m.num_seqs, m.slot_mapping
    ))  # fmt: skip
