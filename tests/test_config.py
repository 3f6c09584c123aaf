"""The question: every field's spellings, what it resolves to, and what no backend could accept."""

import dataclasses
import inspect

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from attnsel_jax import (
    AttentionSelectorConfig,
    AttentionType,
    Capabilities,
    is_quantized_kv_cache,
)
from attnsel_jax.config import CACHE_DTYPES


@pytest.mark.parametrize(
    "spelled", ["bfloat16", jnp.bfloat16, jnp.dtype("bfloat16"), np.dtype(ml_dtypes.bfloat16)]
)
def test_a_dtype_may_be_spelled_in_every_way_jax_knows(spelled):
    assert AttentionSelectorConfig(64, spelled).dtype == "bfloat16"
    assert AttentionSelectorConfig(64, "float32", spelled).kv_cache_dtype == "bfloat16"


@pytest.mark.parametrize("spelled", [np.float32, np.dtype("f4"), "f4", "single", jnp.float32])
def test_numpy_spellings_of_float32(spelled):
    assert AttentionSelectorConfig(64, spelled).dtype == "float32"


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("auto", "auto"), (None, "auto"), ("AUTO", "auto"), ("fp8", "fp8_e4m3"),
        ("FP8_E4M3", "fp8_e4m3"), ("fp8_e5m2", "fp8_e5m2"), (jnp.float8_e4m3fn, "fp8_e4m3"),
        ("float8_e4m3fn", "fp8_e4m3"), (jnp.dtype("float8_e5m2"), "fp8_e5m2"),
        ("int8", "int8"), (np.int8, "int8"), (np.dtype("int8"), "int8"), ("float32", "float32"),
        ("fp8_ds_mla", "fp8_ds_mla"), (jnp.float16, "float16"),
    ],
)  # fmt: skip
def test_a_cache_dtype_may_be_spelled_in_every_way(spelled, name):
    assert AttentionSelectorConfig(64, "bfloat16", spelled).kv_cache_dtype == name


def test_auto_is_the_dtype_of_the_keys():
    assert AttentionSelectorConfig(64, "float16", "auto").cache_dtype == "float16"
    assert AttentionSelectorConfig(64, "float16", "fp8").cache_dtype == "fp8_e4m3"
    assert AttentionSelectorConfig(64, "float8_e4m3fn", "auto").cache_dtype == "fp8_e4m3"


@pytest.mark.parametrize("dtype", [None, "int32", jnp.int8, "bfloat17", 3, [], {}, "", object()])
def test_a_dtype_that_is_none_is_a_value_error(dtype):
    with pytest.raises(ValueError, match=r"^dtype is .*must be a floating dtype such as bfloat16"):
        AttentionSelectorConfig(64, dtype)


@pytest.mark.parametrize("dtype", ["int4", jnp.int32, jnp.uint8, "float64", "x", 3, [], 1.5])
def test_a_cache_dtype_that_is_none_is_a_value_error_not_an_assertion(dtype):
    with pytest.raises(ValueError, match=r"^kv_cache_dtype is .*must be one of auto, float32, .*"):
        AttentionSelectorConfig(64, "float32", dtype)


def test_which_cache_dtypes_are_quantised():
    quantised = {name for name in CACHE_DTYPES if is_quantized_kv_cache(name)}
    assert quantised == {"fp8", "fp8_e4m3", "fp8_e5m2", "int8", "fp8_ds_mla"}
    assert is_quantized_kv_cache(jnp.float8_e5m2)
    assert not is_quantized_kv_cache(None)


@pytest.mark.parametrize("name", ["head_size", "block_size", "head_size_v", "num_heads"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "64", True, np.float32(64), [64]])
def test_counts_are_integers_of_at_least_one(name, value):
    question = {"head_size": 64, "dtype": "float32"} | {name: value}
    with pytest.raises(ValueError, match=rf"^{name} is .*must be an integer of at least 1"):
        AttentionSelectorConfig(**question)


def test_counts_may_be_numpy_integers_and_become_int():
    config = AttentionSelectorConfig(np.int64(64), "float32", block_size=np.int32(16))
    assert type(config.head_size) is int
    assert type(config.block_size) is int


@pytest.mark.parametrize("value", [1, None, "yes", 0])
def test_flags_are_true_or_false(value):
    with pytest.raises(ValueError, match=r"^has_sink is .*, must be True or False"):
        AttentionSelectorConfig(64, "float32", has_sink=value)
    assert AttentionSelectorConfig(64, "float32", has_sink=np.True_).has_sink is True


def test_attention_types():
    assert [str(kind) for kind in AttentionType] == [
        "decoder", "encoder", "encoder_only", "encoder_decoder",
    ]  # fmt: skip
    for spelled in ("encoder_only", "ENCODER_ONLY", AttentionType.ENCODER_ONLY):
        config = AttentionSelectorConfig(64, "float32", attn_type=spelled)
        assert config.attn_type is AttentionType.ENCODER_ONLY
        assert config.causal is False
    assert AttentionSelectorConfig(64, "float32").causal is True
    with pytest.raises(
        ValueError, match=r"attn_type is 'prefix', must be one of decoder, encoder, encoder_only"
    ):
        AttentionSelectorConfig(64, "float32", attn_type="prefix")


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"use_sparse": True}, "use_sparse is True and use_mla is False, must be True both"),
        ({"op": "mla"}, "op is 'mla', must be one of paged, dense with use_mla=False"),
        ({"op": "dense", "use_mla": True}, "op is 'dense', must be one of mla with use_mla=True"),
        ({"op": "banana"}, "op is 'banana', must be one of paged, dense"),
        ({"op": ["paged"]}, "must be one of paged, dense"),
        ({"causal": True, "attn_type": "encoder"}, "causal is True, must be False with attn_type"),
        ({"num_heads": 8, "num_kv_heads": 3}, "num_heads is 8, must be a multiple of num_kv_heads"),
    ],
)
def test_questions_that_no_backend_could_serve(question, message):
    with pytest.raises(ValueError, match=message):
        AttentionSelectorConfig(64, "float32", **question)


def test_the_op_follows_from_the_family():
    assert AttentionSelectorConfig(64, "float32").op == "paged"
    assert AttentionSelectorConfig(64, "float32", use_mla=True).op == "mla"
    assert AttentionSelectorConfig(64, "float32", use_mla=True, use_sparse=True).op == "sparse_mla"


def test_equal_questions_are_equal_however_they_are_spelled():
    a = AttentionSelectorConfig(64, jnp.bfloat16, None, 16, attn_type=None, head_size_v=64)
    b = AttentionSelectorConfig(np.int32(64), "bfloat16", "auto", 16, attn_type="decoder")
    assert a == b
    assert hash(a) == hash(b)


def test_a_question_prints_what_was_said():
    text = str(AttentionSelectorConfig(96, "bfloat16", has_sink=True))
    assert "head_size=96" in text
    assert "dtype=bfloat16" in text
    assert "has_sink=True" in text
    assert "has_bias" not in text


def test_every_question_has_an_answer_field_so_that_none_can_be_dropped():
    """A question that `Capabilities` does not know would be asked in vain (vllm#22331, ...)."""
    asked = {f.name for f in dataclasses.fields(AttentionSelectorConfig)}
    asked -= {"context_axis"}  # needs_lse answers for it
    answered = {f.name for f in dataclasses.fields(Capabilities)}
    by_family = {"use_mla", "use_sparse", "op"}
    assert asked - answered == by_family
    for field in dataclasses.fields(Capabilities):
        if field.name.startswith(("has_", "needs_")):
            assert True not in field.default, f"{field.name} must be absent unless declared"


def test_the_order_of_the_positional_fields_is_vllms():
    assert list(inspect.signature(AttentionSelectorConfig).parameters)[:8] == [
        "head_size", "dtype", "kv_cache_dtype", "block_size", "use_mla", "has_sink", "use_sparse",
        "attn_type",
    ]  # fmt: skip
