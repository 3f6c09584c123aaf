"""The selector: SELECTOR.md, section 1 name by name and section 2 row by row.

Forcing has a file of its own, and so have the question, the registry and the machine.
"""

import inspect
import logging
import re
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from third_party import PlainBackend, backend

import attnsel_jax
from attnsel_jax import (
    AttentionBackendEnum,
    AttentionSelectorConfig,
    Capabilities,
    Device,
    NoAttentionBackendError,
    OneOf,
    get_attn_backend,
    get_env_variable_attn_backend,
    register_backend,
    select,
    selector,
)
from attnsel_jax.backend_names import VLLM_NAMES
from attnsel_jax.platforms import CHIPS

QUESTION = (64, "float32", "auto", 16)


def chosen(**more):
    return get_attn_backend(*QUESTION, **more).name


# Section 1: the interface, name by name.

SECTION_1 = [
    "get_attn_backend", "_cached_get_attn_backend", "get_env_variable_attn_backend",
    "get_global_forced_attn_backend", "global_force_attn_backend",
    "global_force_attn_backend_context_manager",
]  # fmt: skip
COMPANIONS = [
    "AttentionBackend", "AttentionBackendEnum", "register_backend", "resolve_obj_by_qualname",
    "AttentionType", "MultipleOf", "DeviceCapability", "AttentionSelectorConfig",
    "AttentionMetadata", "CommonAttentionMetadata", "AttentionMetadataBuilder", "AttentionImpl",
    "MLAAttentionImpl", "is_quantized_kv_cache", "CacheDType", "Selection", "select",
    "NoAttentionBackendError", "Device", "dot_product_attention", "paged_attention",
    "mla_attention", "sparse_mla_attention", "indexer_scores", "topk_positions",
]  # fmt: skip


@pytest.mark.parametrize("name", SECTION_1)
def test_the_selectors_names_are_in_its_module_and_in_the_package(name):
    assert callable(getattr(selector, name))
    assert getattr(attnsel_jax, name) is getattr(selector, name)


@pytest.mark.parametrize("name", COMPANIONS)
def test_the_companions_are_in_the_package(name):
    assert getattr(attnsel_jax, name) is not None
    assert name in attnsel_jax.__all__
    assert name in dir(attnsel_jax)


def test_a_name_that_is_not_in_the_package():
    with pytest.raises(AttributeError, match=r"module 'attnsel_jax' has no attribute 'nothing'"):
        attnsel_jax.nothing  # noqa: B018


def test_get_attn_backend_has_vllms_arguments_in_vllms_order_and_the_rest_by_keyword():
    parameters = inspect.signature(get_attn_backend).parameters
    positional = {n: p.default for n, p in parameters.items() if p.kind == p.POSITIONAL_OR_KEYWORD}
    assert list(positional) == [
        "head_size", "dtype", "kv_cache_dtype", "block_size", "use_mla", "has_sink", "use_sparse",
        "attn_type",
    ]  # fmt: skip
    assert list(positional.values())[4:] == [False, False, False, None]
    assert all(positional[name] is inspect.Parameter.empty for name in list(positional)[:4])
    others = [p.kind for n, p in parameters.items() if n not in positional]
    assert set(others) == {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}


def test_further_questions_are_the_questions_other_fields():
    fields = set(AttentionSelectorConfig.__dataclass_fields__) - {"_"}
    positional = list(inspect.signature(get_attn_backend).parameters)[:8]
    assert set(selector.FurtherQuestions.__annotations__) == fields - set(positional)
    with pytest.raises(TypeError, match=r"has_banana"):
        get_attn_backend(*QUESTION, has_banana=True)


def test_a_keyword_that_is_no_question_is_refused_by_the_function_that_was_called():
    with pytest.raises(
        TypeError, match=r"^get_attn_backend got the keyword use_mm_prefix=True, must be .*has_mask"
    ):
        get_attn_backend(64, "bfloat16", "auto", 16, use_mm_prefix=True)


def test_it_answers_with_a_class():
    found = get_attn_backend(*QUESTION)
    assert issubclass(found, attnsel_jax.AttentionBackend)
    assert get_attn_backend(576, "bfloat16", "auto", 64, True).name == "XLA_MLA"
    assert get_attn_backend(576, "bfloat16", "auto", 64, True, False, True).name == "XLA_MLA_SPARSE"
    assert get_attn_backend(64, "bfloat16", None, None, attn_type="encoder").name == "XLA"


def test_the_cached_part_says_what_it_has_cached():
    cached = selector._cached_get_attn_backend
    assert callable(cached.cache_clear)
    question = (64, "float32", "auto", 48)
    get_attn_backend(*question)
    before = cached.cache_info()
    get_attn_backend(*question)
    assert cached.cache_info().hits == before.hits + 1
    assert cached.cache_info().misses == before.misses


# Section 2, row 1: everything that the answer depends on is in the cache's key.


def test_a_change_of_the_environment_takes_effect_at_the_next_call(monkeypatch):
    assert chosen() == chosen() == "XLA"
    monkeypatch.setenv("ATTNSEL_BACKEND", "XLA_REFERENCE")
    assert chosen() == "XLA_REFERENCE"
    assert get_env_variable_attn_backend() is AttentionBackendEnum["XLA_REFERENCE"]
    monkeypatch.setenv("ATTNSEL_BACKEND", "XLA")
    assert chosen() == "XLA"
    monkeypatch.delenv("ATTNSEL_BACKEND")
    assert chosen() == "XLA"
    assert get_env_variable_attn_backend() is None


def test_a_change_of_the_registry_takes_effect_at_the_next_call():
    assert chosen() == "XLA"
    register_backend("MINE", backend("MINE"), before="XLA")
    assert chosen() == "MINE"
    attnsel_jax.unregister_backend("MINE")
    assert chosen() == "XLA"
    register_backend("XLA", backend("FASTER"))
    assert chosen() == "FASTER"
    AttentionBackendEnum["XLA"].clear_override()
    assert chosen() == "XLA"


def test_another_device_is_another_answer():
    only_cuda = {
        op: Capabilities(platform=OneOf("cuda"), dtype=OneOf("float32"), head_size=OneOf(64))
        for op in ("paged", "dense")
    }
    register_backend("CUDA_ONLY", backend("CUDA_ONLY", capabilities=only_cuda), before="XLA")
    assert chosen() == "XLA"
    assert chosen(device="h200") == "CUDA_ONLY"
    assert chosen(device=Device.named("h200")) == "CUDA_ONLY"
    assert chosen(device="mi300x") == "XLA"
    assert chosen(device=jax.devices()[0]) == "XLA"


def test_the_default_device_is_part_of_the_key(monkeypatch):
    only_cuda = {
        "paged": Capabilities(platform=OneOf("cuda"), dtype=OneOf("float32"), head_size=OneOf(64))
    }
    register_backend("CUDA_ONLY", backend("CUDA_ONLY", capabilities=only_cuda), before="XLA")
    assert chosen() == "XLA"
    monkeypatch.setattr(selector, "current_device", lambda: Device.named("h200"))
    assert chosen() == "CUDA_ONLY"


def test_questions_that_differ_only_in_type_are_not_one():
    assert get_attn_backend(64, "float32", "auto", None, has_sink=False).name == "XLA"
    with pytest.raises(ValueError, match=r"has_sink is 0, must be True or False"):
        get_attn_backend(64, "float32", "auto", None, has_sink=0)
    with pytest.raises(ValueError, match=r"head_size is 64.0, must be an integer"):
        get_attn_backend(64.0, "float32", "auto", None)


# Row 4: unknown and retired names.


@pytest.mark.parametrize("variable", ["ATTNSEL_BACKEND", "VLLM_ATTENTION_BACKEND"])
@pytest.mark.parametrize("ask", [chosen, get_env_variable_attn_backend])
def test_an_unknown_name_in_the_environment_is_an_error(monkeypatch, variable, ask):
    monkeypatch.setenv(variable, "XLA_REFERENC")
    with pytest.raises(
        ValueError,
        match=rf"^{variable} is 'XLA_REFERENC' \(did you mean XLA_REFERENCE.*\), must be one of "
        r"MOSAIC_GPU, .*XLA_MLA_SPARSE; or auto; or one of vLLM's names: PALLAS",
    ):
        ask()


@pytest.mark.parametrize("name", ["XFORMERS", "DIFFERENTIAL_FLASH_ATTN", "CUSTOM", "0"])
def test_names_that_have_no_meaning_here_are_unknown(name):
    with pytest.raises(ValueError, match=rf"^argument backend is '{name}'.*must be one of"):
        chosen(backend=name)


@pytest.mark.parametrize("text", ["xla_reference", "Xla_Reference", " XLA_REFERENCE\n"])
def test_names_in_any_case(monkeypatch, text):
    monkeypatch.setenv("ATTNSEL_BACKEND", text)
    assert chosen() == "XLA_REFERENCE"


@pytest.mark.parametrize("text", ["", " ", "auto", "AUTO"])
def test_empty_is_unset_and_auto_automatic(monkeypatch, text):
    monkeypatch.setenv("ATTNSEL_BACKEND", text)
    assert chosen() == "XLA"
    assert get_env_variable_attn_backend() is None
    assert select(AttentionSelectorConfig(*QUESTION)).insistence is None


def test_vllms_variable_is_read_when_ours_is_unset(monkeypatch):
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "XLA_REFERENCE")
    assert chosen() == "XLA_REFERENCE"
    for unset in ("", " "):
        monkeypatch.setenv("ATTNSEL_BACKEND", unset)
        assert chosen() == "XLA_REFERENCE"
    monkeypatch.setenv("ATTNSEL_BACKEND", "auto")
    assert chosen() == "XLA"
    monkeypatch.setenv("ATTNSEL_BACKEND", "XLA")
    assert chosen() == "XLA"


@pytest.mark.parametrize("name", ["XLA_REFERENCE_V1", "xla_reference_vllm_v1"])
def test_the_v1_suffixes_are_accepted_with_a_warning(monkeypatch, name):
    monkeypatch.setenv("ATTNSEL_BACKEND", name)
    with pytest.warns(FutureWarning, match=r"ATTNSEL_BACKEND is .*retired, read as XLA_REFERENCE"):
        assert get_env_variable_attn_backend().name == "XLA_REFERENCE"
    with pytest.warns(FutureWarning, match=r"retired"):
        assert select(AttentionSelectorConfig(*QUESTION)).backend.name == "XLA_REFERENCE"


def test_a_suffix_on_an_unknown_name_is_still_unknown():
    with pytest.raises(ValueError, match=r"is 'BANANA_V1', must be one of"):
        chosen(backend="BANANA_V1")


@pytest.mark.parametrize(("name", "meaning"), VLLM_NAMES.items())
def test_vllms_names_mean_registered_backends_of_that_sort(name, meaning):
    assert meaning
    assert all(member in AttentionBackendEnum for member in meaning)
    answer = select(AttentionSelectorConfig(*QUESTION), backend=name.lower())
    assert answer.candidates == meaning
    assert answer.backend is None or answer.backend.name in meaning


def test_a_vllm_name_takes_the_first_of_its_meanings_that_serves():
    latent = AttentionSelectorConfig(576, "bfloat16", use_mla=True)
    assert select(latent, backend="CPU_ATTN").backend.name == "XLA_MLA"
    assert chosen(backend="CPU_ATTN") == "XLA"


# Row 5: an explicit choice is validated on every platform, and never replaced.


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", ["MOSAIC_GPU_MLA", "XLA_MLA_SPARSE", "FLASHMLA"])
def test_an_explicit_choice_is_used_or_an_error_on_every_platform(monkeypatch, chip, name):
    with pytest.raises(
        NoAttentionBackendError, match=rf"{name}, asked for by argument backend, do"
    ):
        chosen(device=chip, backend=name)
    monkeypatch.setenv("ATTNSEL_BACKEND", name)
    with pytest.raises(NoAttentionBackendError, match=rf"{name}, asked for by ATTNSEL_BACKEND, do"):
        chosen(device=chip)


@pytest.mark.parametrize("chip", CHIPS)
def test_an_explicit_choice_that_serves_is_used_on_every_platform(chip):
    assert chosen(device=chip, backend="XLA_REFERENCE") == "XLA_REFERENCE"


def test_an_explicit_choice_may_be_a_member_or_a_class_that_is_not_registered():
    assert chosen(backend=AttentionBackendEnum["XLA_REFERENCE"]) == "XLA_REFERENCE"
    assert get_attn_backend(*QUESTION, backend=PlainBackend) is PlainBackend
    assert "PLAIN" not in AttentionBackendEnum
    with pytest.raises(NoAttentionBackendError, match=r"PLAIN, asked for by argument backend"):
        get_attn_backend(576, "float32", "auto", 16, True, backend=PlainBackend)


@pytest.mark.parametrize("bad", [3, int, ["XLA"], object(), b"XLA"])
def test_a_backend_that_is_none(bad):
    for ask in (
        lambda: chosen(backend=bad),
        lambda: select(AttentionSelectorConfig(*QUESTION), backend=bad),
    ):
        with pytest.raises(
            ValueError, match=r"^backend is .*, must be a name, a member of Attenti"
        ):
            ask()


# Row 6: every reason of every backend, as data; the nearest backend and what to change.


def test_every_backend_has_its_reasons_as_data():
    answer = select(AttentionSelectorConfig(64, "float64", has_bias=True, op="dense"), "a100")
    assert answer.backend is None
    assert list(answer.reasons) == [member.name for member in AttentionBackendEnum]
    assert all(answer.reasons.values())
    for reasons in answer.reasons.values():
        for reason in reasons:
            assert reason.argument
            assert reason.asked not in (
                reason.allowed if not isinstance(reason.allowed, str) else ()
            )
    (only,) = answer.reasons["XLA"]
    assert (only.argument, only.asked) == ("dtype", "float64")
    assert str(only) == "dtype is float64, must be one of float32, bfloat16, float16"


def test_the_error_has_every_reason_the_nearest_backend_and_what_to_change():
    with pytest.raises(NoAttentionBackendError) as caught:
        get_attn_backend(64, "float64", "auto", 16)
    text = str(caught.value)
    assert isinstance(caught.value, ValueError)
    for member in AttentionBackendEnum:
        row = rf"^  {member.name} +refused +\S.* is .*, must be "
        folded = rf"^  refused, use_mla is False, must be True.*:.* {member.name}\b"
        assert re.search(f"{row}|{folded}", text, re.MULTILINE), member
    assert re.search(r"^nearest: XLA, if dtype is float64, must be one of float32", text, re.M)


def test_the_nearest_backend_needs_the_fewest_changes_and_no_other_machine():
    answer = select(
        AttentionSelectorConfig(100, "float32", op="dense", has_sink=True), "cpu", "cudnn"
    )
    assert answer.backend is None
    assert answer.nearest() == "MOSAIC_TPU"  # platform and head size; CUDNN: dtype and sink too
    on_gpu = select(AttentionSelectorConfig(72, "float32", op="dense"), "l40s", "cudnn")
    assert on_gpu.nearest() == "CUDNN"  # another dtype, and not another machine
    with pytest.raises(NoAttentionBackendError, match=r"these would serve it: XLA, XLA_REFERENCE"):
        answer.required()


def test_an_older_jax_is_refused_by_its_version_as_people_write_it(monkeypatch):
    monkeypatch.setattr("attnsel_jax.capabilities.jax_version", lambda: (0, 10, 2))
    answer = select(AttentionSelectorConfig(64, "bfloat16", block_size=64), "h200")
    (reason,) = answer.reasons["MOSAIC_GPU"]
    assert str(reason) == "jax_version is 0.10.2, must be at least 0.11"
    assert reason.to_json()["asked"] == "0.10.2"


def test_a_selection_prints_as_a_table_and_as_json():
    answer = select(AttentionSelectorConfig(*QUESTION), "h200")
    lines = str(answer).splitlines()
    assert "head_size=64" in lines[0]
    assert "on cuda (NVIDIA H200, sm 9.0)" in lines[1]
    standard = [m for m in AttentionBackendEnum if not m.get_class().is_mla()]
    assert len(lines) == 2 + len(standard) + 2  # the MLA and sparse MLA families in a line each
    assert any(re.match(r"  XLA +chosen$", line) for line in lines)
    assert any(re.match(r"  XLA_REFERENCE +eligible$", line) for line in lines)
    data = answer.to_json()
    assert data["backend"] == "XLA"
    assert data["backends"]["CUDNN"]["status"] == "refused"
    assert data["backends"]["CUDNN"]["reasons"][0]["argument"] == "op"


# Row 7: a block size is validated, never rewritten; None lets the backend say.


def test_a_block_size_is_validated_and_never_rewritten():
    picky = {
        "paged": Capabilities(dtype=OneOf("float32"), head_size=OneOf(64), block_size=OneOf(32, 64))
    }
    register_backend("PICKY", backend("PICKY", capabilities=picky, preferred_block_size=64))
    for chip in CHIPS:
        with pytest.raises(
            NoAttentionBackendError, match=r"block_size is 16, must be one of 32, 64"
        ):
            get_attn_backend(64, "float32", "auto", 16, backend="PICKY", device=chip)
        found = get_attn_backend(64, "float32", "auto", None, backend="PICKY", device=chip)
        assert found.get_preferred_block_size() == 64
    assert select(AttentionSelectorConfig(64, "float32", None, 16)).config.block_size == 16


# Row 8: dtypes.


@pytest.mark.parametrize("spelled", ["bfloat16", jnp.bfloat16, jnp.dtype("bfloat16")])
def test_dtypes_in_every_spelling_give_one_answer(spelled):
    cache = [None, "auto", spelled]
    found = {get_attn_backend(64, spelled, c, 16, backend="XLA") for c in cache}
    assert len(found) == 1


@pytest.mark.parametrize("bad", ["int3", [], {"a": 1}, jnp.int32])
def test_a_bad_dtype_is_a_value_error(bad):
    with pytest.raises(ValueError, match=r"^dtype is .*must be a floating dtype"):
        get_attn_backend(64, bad, "auto", 16)
    with pytest.raises(ValueError, match=r"^kv_cache_dtype is .*must be one of auto"):
        get_attn_backend(64, "float32", bad, 16)


# Rows 9 and 10: features that the question carries, and arguments that a path cannot honour.

FEATURES = [
    "has_sink", "has_sliding_window", "has_attention_chunk", "has_soft_cap", "has_bias",
    "has_alibi", "has_mask", "has_segment_ids", "has_lens", "has_q_offset", "needs_grad",
    "needs_lse",
]  # fmt: skip


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_that_is_not_declared_is_refused_at_selection(feature):
    bare = {"dense": Capabilities(dtype=OneOf("float32"), head_size=OneOf(64))}
    register_backend("BARE", backend("BARE", capabilities=bare), before="XLA")
    assert chosen(op="dense") == "BARE"
    assert chosen(op="dense", **{feature: True}) == "XLA"
    with pytest.raises(NoAttentionBackendError, match=rf"{feature} is True, must be False"):
        chosen(op="dense", backend="BARE", **{feature: True})


def test_what_paged_attention_has_no_argument_for_is_refused():
    for feature in ("has_bias", "has_mask", "has_segment_ids", "has_q_offset", "needs_grad"):
        with pytest.raises(NoAttentionBackendError, match=rf"{feature} is True, must be False"):
            chosen(**{feature: True})


def test_numbers_of_heads_and_head_size_of_v_are_asked_too():
    few = {
        "paged": Capabilities(
            dtype=OneOf("float32"),
            head_size=OneOf(64),
            num_heads=OneOf(8),
            num_kv_heads=OneOf(8, 1),
        )
    }
    register_backend("FEW", backend("FEW", capabilities=few))
    assert chosen(backend="FEW") == "FEW"
    for question, reason in (
        ({"num_heads": 4}, "num_heads is 4, must be 8"),
        ({"num_kv_heads": 2}, "num_kv_heads is 2, must be one of 8, 1"),
        ({"head_size_v": 32}, "head_size_v is 32, must be 64, as head_size"),
        ({"causal": False}, "causal is False, must be True"),
    ):
        with pytest.raises(NoAttentionBackendError, match=reason):
            chosen(backend="FEW", **question)


# Row 11: what fails while a kernel is imported.


@pytest.fixture
def failing_kernel(monkeypatch):
    """Registers a backend before XLA whose kernel's module raises at import."""

    def register(error, name="BROKEN"):
        class Finder:
            @staticmethod
            def find_spec(fullname, path=None, target=None):
                if fullname == "broken_kernel":
                    raise error

        monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
        kernels = {"paged": "broken_kernel:run", "dense": "broken_kernel:run"}
        register_backend(name, backend(name, kernels=kernels), before="XLA")

    return register


@pytest.mark.parametrize(
    "error", [ImportError("no module of mine"), OSError("libmine.so: cannot open shared object")]
)
def test_an_import_error_of_a_kernel_is_a_reason_with_its_cause_chained(failing_kernel, error):
    failing_kernel(error)
    answer = select(AttentionSelectorConfig(*QUESTION))
    assert answer.backend.name == "XLA"
    (reason,) = answer.reasons["BROKEN"]
    assert reason.argument == "import"
    assert reason.cause is error
    assert str(error) in str(reason)
    assert chosen() == "XLA"
    with pytest.raises(NoAttentionBackendError, match=r"import is failing \(\w+: ") as caught:
        chosen(backend="BROKEN")
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [RuntimeError("a bug"), AttributeError("x"), KeyError("y")])
def test_any_other_error_of_a_kernels_import_propagates(failing_kernel, error):
    failing_kernel(error)
    with pytest.raises(type(error)) as caught:
        chosen()
    assert caught.value is error


def test_a_kernel_is_imported_only_for_what_may_be_chosen(failing_kernel):
    failing_kernel(RuntimeError("must not be imported"))
    assert chosen(backend="XLA") == "XLA"
    assert get_attn_backend(576, "float32", "auto", 16, True).name == "XLA_MLA"


# Rows 12 and 13: selection is per call, and seen.


def test_selection_is_per_call():
    kinds = {"global": {}, "local": {"has_sliding_window": True}, "vision": {"causal": False}}
    windows = {
        "paged": Capabilities(
            dtype=OneOf("float32"), head_size=OneOf(64), has_sliding_window=OneOf(True)
        )
    }
    register_backend("WINDOWS", backend("WINDOWS", capabilities=windows), before="XLA")
    found = {kind: chosen(**question) for kind, question in kinds.items()}
    assert found == {"global": "XLA", "local": "WINDOWS", "vision": "XLA"}
    assert chosen(backend="XLA_REFERENCE", has_sliding_window=True) == "XLA_REFERENCE"
    assert {kind: chosen(**question) for kind, question in kinds.items()} == found


def test_one_info_line_for_each_distinct_selection(caplog):
    question = (40, "bfloat16", "auto", 16)
    with caplog.at_level(logging.INFO, logger="attnsel_jax"):
        for _ in range(3):
            get_attn_backend(*question)
        get_attn_backend(40, jnp.bfloat16, None, 16)
        get_attn_backend(*question, device="cpu")
        get_attn_backend(*question, device=Device.named("cpu"))
        register_backend("UNRELATED", backend("UNRELATED"))
        get_attn_backend(*question)
        first = list(caplog.records)
        get_attn_backend(*question, backend="XLA_REFERENCE")
        get_attn_backend(40, "bfloat16", "auto", 32)
    assert len(first) == 1
    assert len(caplog.records) == 3
    assert all(record.levelno == logging.INFO for record in caplog.records)
    assert re.search(r"attention backend XLA \(automatic\) .*head_size=40", first[0].getMessage())
    assert "XLA_REFERENCE, by argument backend" in caplog.records[1].getMessage()


@pytest.mark.parametrize("config", [None, {"head_size": 64, "dtype": "float32"}, 64])
def test_a_question_of_another_class(config):
    with pytest.raises(TypeError, match=r"^config is .*, must be an AttentionSelectorConfig"):
        select(config, "cpu")


def test_select_with_a_fake_kernel_runs_nothing(monkeypatch):
    """Selection never looks at an array: a kernel that cannot run can still be selected."""
    module = types.ModuleType("fake_kernel")
    module.run = lambda *args, **kwargs: pytest.fail("called")
    monkeypatch.setitem(sys.modules, "fake_kernel", module)
    kernels = {"paged": "fake_kernel:run", "dense": "fake_kernel:run"}
    register_backend("FAKE", backend("FAKE", kernels=kernels), before="XLA")
    assert chosen() == "FAKE"


# The indexer of sparse MLA: its own sizes are asked for where its kernel is.

INDEXER = {"head_size": 576, "dtype": "bfloat16", "use_mla": True, "use_sparse": True}
SERVED = {"index_head_dim": 128, "num_index_heads": 64}


@pytest.mark.parametrize(
    ("chip", "asked", "said"),
    [
        ("v6e", {"index_head_dim": 64}, "index_head_dim is 64, must be a multiple of 128"),
        ("v6e", {"index_head_dim": 128, "kv_cache_dtype": "fp8", "block_size": 16},
         "block_size is 16, must be a multiple of 32 with index keys of fp8_e4m3"),
        ("h200", {"index_head_dim": 96}, "index_head_dim is 96, must be one of 64, 128, 192, 256"),
        ("h200", {"index_head_dim": 128, "num_index_heads": 96},
         "num_index_heads is 96, must be at most 64"),
        ("h200", {"index_head_dim": 128, "kv_cache_dtype": "fp8"},
         "kv_cache_dtype is fp8_e4m3, must be bfloat16 as the indexer's queries"),
    ],
)  # fmt: skip
def test_an_indexer_that_the_chips_own_backend_refuses_is_xla_s(chip, asked, said):
    answer = select(AttentionSelectorConfig(**INDEXER | SERVED | asked), chip)
    assert answer.backend.name == "XLA_MLA_SPARSE"
    own = "MOSAIC_TPU_MLA_SPARSE" if chip == "v6e" else "MOSAIC_GPU_MLA_SPARSE"
    reasons = [str(reason) for reason in answer.reasons[own]]
    assert said in reasons
    reasons = select(AttentionSelectorConfig(**INDEXER, **SERVED), chip).reasons[own]
    assert {reason.argument for reason in reasons} <= {"jax_version"}


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ({"head_size": 128, "dtype": "bfloat16", **SERVED},
         "num_index_heads is 64 and use_sparse is False, must be None"),
        ({**INDEXER, "index_head_dim": 128},
         "num_index_heads is None and index_head_dim is 128, must be numbers both, or None both"),
        ({**INDEXER, **SERVED, "kv_cache_dtype": "fp8_ds_mla"},
         "kv_cache_dtype is fp8_ds_mla with num_index_heads 64, must be the dtype of the index"),
    ],
)  # fmt: skip
def test_questions_about_no_indexer(question, said):
    with pytest.raises(ValueError, match=said):
        AttentionSelectorConfig(**question)


@pytest.mark.parametrize("use_sparse", [False, True])
@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"head_size": 320}, "head_size is 320, must be 576 with kv_cache_dtype fp8_ds_mla"),
        ({"head_size_v": 448}, "head_size_v is 448, must be 512 with kv_cache_dtype fp8_ds_mla"),
    ],
)
def test_rows_of_bytes_have_one_size(sizes, said, use_sparse):
    question = {"head_size": 576, "dtype": "bfloat16", "kv_cache_dtype": "fp8_ds_mla",
                "use_mla": True, "use_sparse": use_sparse}  # fmt: skip
    assert select(AttentionSelectorConfig(**question), "cpu").backend is not None
    answer = select(AttentionSelectorConfig(**question | sizes), "cpu")
    assert answer.backend is None
    reasons = answer.reasons["XLA_MLA_SPARSE" if use_sparse else "XLA_MLA"]
    assert [str(reason) for reason in reasons] == [said]
