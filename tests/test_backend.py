"""What a backend is: every method of vLLM's interface, read off one declaration."""

import inspect

import jax.numpy as jnp
import pytest

from attnsel_jax import (
    AttentionBackend,
    AttentionBackendEnum,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionSelectorConfig,
    Capabilities,
    Device,
    DeviceCapability,
    MLAAttentionImpl,
    MultipleOf,
    OneOf,
    Rejection,
)
from attnsel_jax.capabilities import DECODER
from attnsel_jax.constraints import AtLeast

XLA = AttentionBackendEnum["XLA"].get_class()
CUDNN = AttentionBackendEnum["CUDNN"].get_class()
MLA = AttentionBackendEnum["XLA_MLA"].get_class()
SPARSE = AttentionBackendEnum["XLA_MLA_SPARSE"].get_class()
STRIPED = AttentionBackendEnum["MOSAIC_TPU_MLA"].get_class()
TILED = AttentionBackendEnum["MOSAIC_TPU_MLA_SPARSE"].get_class()


class PickyBackend(AttentionBackend):
    """Separates every field, so that each has one value that fits and one that does not."""

    name = "PICKY"
    capabilities = {
        "paged": Capabilities(
            platform=OneOf("cuda"),
            compute_capability=AtLeast((9, 0)),
            dtype=OneOf("bfloat16"),
            kv_cache_dtype=OneOf("bfloat16", "fp8_e4m3"),
            head_size=OneOf(64, 128),
            block_size=OneOf(16, 32),
            has_sink=OneOf(False, True),
        )
    }
    kernels = {"paged": "attnsel_jax.xla.paged:paged_attention"}
    preferred_block_size = 32

    @classmethod
    def supports_combination(cls, config, device):
        if config.cache_dtype.startswith("fp8") and config.head_size != 128:
            return [Rejection("head_size", config.head_size, OneOf(128), "with an fp8 cache")]
        return ()


METHODS = [
    "get_name", "get_impl_cls", "get_metadata_cls", "get_builder_cls", "get_kv_cache_shape",
    "get_kv_cache_stride_order", "get_supported_head_sizes", "get_supported_kernel_block_sizes",
    "get_preferred_block_size", "get_required_kv_cache_layout", "full_cls_name",
    "supports_head_size", "supports_dtype", "supports_kv_cache_dtype", "supports_block_size",
    "supports_sink", "supports_attn_type", "supports_compute_capability", "supports_combination",
    "is_mla", "is_sparse", "validate_configuration",
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_backend_answers_every_method_without_being_instantiated(method):
    for member in AttentionBackendEnum:
        assert callable(getattr(member.get_class(), method))


def test_only_hooks_are_written_by_hand():
    """DESIGN.md: read off one declaration; supports_combination is the one hook."""
    for member in AttentionBackendEnum:
        by_hand = set(METHODS) & set(vars(member.get_class()))
        assert by_hand <= {"supports_combination"}, member


def test_a_backend_is_never_instantiated():
    with pytest.raises(TypeError, match=r"XlaBackend is a declaration, never instantiated"):
        XLA()


def test_names():
    assert XLA.get_name() == "XLA"
    assert XLA.full_cls_name() == ("attnsel_jax.backends.xla", "XlaBackend")
    for member in AttentionBackendEnum:
        assert member.get_class().get_name() == member.name


def test_families():
    assert (XLA.is_mla(), XLA.is_sparse()) == (False, False)
    assert (MLA.is_mla(), MLA.is_sparse()) == (True, False)
    assert (SPARSE.is_mla(), SPARSE.is_sparse()) == (True, True)


def test_impl_metadata_and_builder_classes():
    assert issubclass(XLA.get_impl_cls(), AttentionImpl)
    assert XLA.get_impl_cls() is XLA.get_impl_cls()
    assert XLA.get_impl_cls().backend is XLA
    assert AttentionBackendEnum["XLA_REFERENCE"].get_class().get_impl_cls().backend.name == (
        "XLA_REFERENCE"
    )
    assert issubclass(MLA.get_impl_cls(), MLAAttentionImpl)
    assert issubclass(SPARSE.get_impl_cls(), MLAAttentionImpl)
    assert not issubclass(XLA.get_impl_cls(), MLAAttentionImpl)
    assert XLA.get_metadata_cls() is AttentionMetadata
    assert XLA.get_builder_cls() is AttentionMetadataBuilder


def test_the_cache_shape_has_vllms_arguments_and_order():
    parameters = inspect.signature(XLA.get_kv_cache_shape).parameters
    assert list(parameters) == [
        "num_blocks", "block_size", "num_kv_heads", "head_size", "cache_dtype_str",
    ]  # fmt: skip
    assert parameters["cache_dtype_str"].default == "auto"


def test_cache_shapes():
    assert XLA.get_kv_cache_shape(7, 16, 2, 96) == (2, 7, 16, 2, 96)
    assert sorted(XLA.get_kv_cache_stride_order()) == [0, 1, 2, 3, 4]
    assert XLA.get_required_kv_cache_layout() == "stacked"
    assert MLA.get_kv_cache_shape(7, 64, 1, 576) == (7, 64, 576)
    assert MLA.get_kv_cache_shape(7, 64, 1, 576, "fp8_ds_mla") == (7, 64, 656)
    assert MLA.get_kv_cache_stride_order() == (0, 1, 2)
    assert MLA.get_required_kv_cache_layout() is None
    with pytest.raises(ValueError, match=r"num_kv_heads is 8, must be 1: MLA's latent is shared"):
        MLA.get_kv_cache_shape(7, 64, 8, 576)
    with pytest.raises(ValueError, match=r"head_size is 320, must be 576 .* with fp8_ds_mla"):
        MLA.get_kv_cache_shape(7, 64, 1, 320, "fp8_ds_mla")
    assert TILED.get_kv_cache_shape(7, 64, 1, 576, "fp8_ds_mla") == (7, 64, 2, 4, 128)
    assert STRIPED.get_kv_cache_shape(7, 64, 1, 576, "fp8_e4m3") == (7, 9, 32, 128)
    no_room = r"layout is 'striped', must be 'rows' or 'tiled' with fp8_ds_mla, .* cache fp8_e4m3"
    with pytest.raises(ValueError, match=no_room):
        STRIPED.get_kv_cache_shape(7, 64, 1, 576, "fp8_ds_mla")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 16, 1, 576), r"^num_blocks is -1, must be an integer of at least 1$"),
        ((4, 16.0, 1, 576), r"^block_size is 16.0, must be an integer of at least 1$"),
        ((4, 16, 0, 576), r"^num_kv_heads is 0, must be an integer of at least 1$"),
        ((4, 16, 1, "576"), r"^head_size is '576', must be an integer of at least 1$"),
        ((4, 16, 1, 576, "fp9"), r"cache_dtype is 'fp9', must be one of auto, float32"),
    ],
)
def test_a_cache_that_cannot_be_has_no_shape(arguments, message):
    for backend in (XLA, MLA, TILED, STRIPED):
        with pytest.raises(ValueError, match=message):
            backend.get_kv_cache_shape(*arguments)


def test_a_cache_of_a_dtype_that_the_backend_does_not_take_has_no_shape():
    for backend, name in ((XLA, "fp8_ds_mla"), (PickyBackend, "int8"), (CUDNN, "fp8")):
        with pytest.raises(ValueError, match=rf"^cache_dtype_str is {name}, must be .*auto"):
            backend.get_kv_cache_shape(7, 16, 2, 64, name)


def test_supported_head_sizes_are_all_of_them_or_empty_where_they_have_no_end():
    assert PickyBackend.get_supported_head_sizes() == [64, 128]
    assert XLA.get_supported_head_sizes() == []
    assert CUDNN.get_supported_head_sizes() == list(range(8, 257, 8))
    assert all(CUDNN.supports_head_size(size) for size in CUDNN.get_supported_head_sizes())


def test_supported_block_sizes():
    assert PickyBackend.get_supported_kernel_block_sizes() == [16, 32]
    assert XLA.get_supported_kernel_block_sizes() == [MultipleOf(1)]
    assert CUDNN.get_supported_kernel_block_sizes() == []


def test_the_preferred_block_size_keeps_a_default_that_is_supported():
    assert PickyBackend.get_preferred_block_size(16) == 16
    assert PickyBackend.get_preferred_block_size(128) == 32
    assert PickyBackend.get_preferred_block_size() == 32
    assert XLA.get_preferred_block_size(48) == 48
    for wrong in (16.0, "16", True, 0):
        with pytest.raises(ValueError, match=r"^default is .*, must be an integer of at least 1"):
            XLA.get_preferred_block_size(wrong)


@pytest.mark.parametrize(
    ("method", "yes", "no"),
    [
        ("supports_head_size", (64, 128), (96, 0, -64)),
        ("supports_dtype", ("bfloat16", jnp.bfloat16), ("float32", jnp.float16)),
        ("supports_kv_cache_dtype", (None, "auto", "fp8", jnp.float8_e4m3fn), ("int8", "fp8_e5m2")),
        ("supports_block_size", (None, 16, 32), (8, 64)),
        ("supports_attn_type", ("decoder",), ("encoder", "encoder_only", "encoder_decoder")),
        (
            "supports_compute_capability",
            (DeviceCapability(9, 0), DeviceCapability(12, 0)),
            (DeviceCapability(8, 9),),
        ),
    ],
)
def test_supports_each_field_by_itself(method, yes, no):
    supports = getattr(PickyBackend, method)
    assert all(supports(value) for value in yes)
    assert not any(supports(value) for value in no)


@pytest.mark.parametrize("wrong", [16.0, "16", True])
def test_what_is_no_size_is_not_supported(wrong):
    for backend in (PickyBackend, XLA, MLA):
        assert not backend.supports_block_size(wrong)
        assert not backend.supports_head_size(wrong)


def test_supports_sink_only_where_it_is_declared():
    assert PickyBackend.supports_sink()
    assert XLA.supports_sink()
    assert not CUDNN.supports_sink()
    assert not MLA.supports_sink()


def test_a_backend_without_a_cache_supports_no_cache_dtype_and_no_block_size():
    assert not CUDNN.supports_kv_cache_dtype("fp8")
    assert not CUDNN.supports_block_size(16)


def test_a_backend_of_another_platform_supports_no_compute_capability():
    class TpuOnly(PickyBackend):
        name = "TPU_ONLY"
        capabilities = {
            "paged": Capabilities(
                platform=OneOf("tpu"), dtype=OneOf("bfloat16"), head_size=OneOf(8)
            )
        }

    assert not TpuOnly.supports_compute_capability(DeviceCapability(9, 0))


def test_validation_lists_every_reason_as_argument_asked_allowed():
    question = AttentionSelectorConfig(96, "float32", "int8", 8, has_soft_cap=True)
    reasons = PickyBackend.validate_configuration(question, Device.named("a100"))
    assert isinstance(reasons, list)
    found = {(r.argument, r.asked, str(r.allowed)) for r in reasons}
    assert found == {
        ("compute_capability", DeviceCapability(8, 0), "at least 9.0"),
        ("dtype", "float32", "bfloat16"),
        ("kv_cache_dtype", "int8", "one of bfloat16, fp8_e4m3"),
        ("head_size", 96, "one of 64, 128"),
        ("block_size", 8, "one of 16, 32"),
        ("has_soft_cap", True, "False"),
    }
    assert "head_size is 96, must be one of 64, 128" in map(str, reasons)


def test_validation_asks_the_hook_too():
    question = AttentionSelectorConfig(64, "bfloat16", "fp8", 16)
    (reason,) = PickyBackend.validate_configuration(question, Device.named("h200"))
    assert str(reason) == "head_size is 64, must be 128: with an fp8 cache"
    assert PickyBackend.validate_configuration(
        AttentionSelectorConfig(128, "bfloat16", "fp8", 16), Device.named("h200")
    ) == []  # fmt: skip


def test_validation_on_the_machine_here_is_the_default():
    question = AttentionSelectorConfig(64, "bfloat16")
    assert [r.argument for r in PickyBackend.validate_configuration(question)] == ["platform"]
    assert XLA.validate_configuration(question) == []


FLAGS = [n for n in Capabilities.__dataclass_fields__ if n.startswith(("has_", "needs_"))]


@pytest.mark.parametrize("field", FLAGS)
def test_a_feature_is_refused_unless_it_is_declared(field):
    """Every has_ and needs_ flag alone is a reason for a backend that declares none."""
    bare = Capabilities(dtype=OneOf("float32"), head_size=OneOf(64))
    question = AttentionSelectorConfig(64, "float32", op="dense", **{field: True})
    (reason,) = bare.compare(question, Device.named("cpu"))
    assert str(reason).startswith(f"{field} is True, must be False")


def test_what_else_a_bare_declaration_refuses():
    bare = Capabilities(dtype=OneOf("float32"), head_size=OneOf(64))
    assert bare.attn_type is DECODER
    cpu = Device.named("cpu")
    encoder = AttentionSelectorConfig(64, "float32", attn_type="encoder")
    assert [r.argument for r in bare.compare(encoder, cpu)] == ["attn_type", "causal"]
    wide_v = AttentionSelectorConfig(64, "float32", head_size_v=128)
    assert [str(r) for r in bare.compare(wide_v, cpu)] == [
        "head_size_v is 128, must be 64, as head_size"
    ]


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"family": "banana"}, "family is 'banana', must be one of standard, mla, sparse_mla"),
        ({"capabilities": {"mla": None}}, "has op 'mla', must be of family standard: paged, dense"),
        ({"capabilities": {"paged": None}}, "kernels has no 'paged', which it declares"),
    ],
)
def test_a_declaration_that_does_not_hold_together_is_refused_when_it_is_written(
    attributes, message
):
    with pytest.raises(ValueError, match=message):
        type("BadBackend", (AttentionBackend,), {"name": "BAD", **attributes})


def test_get_kernel():
    from attnsel_jax.xla.paged import paged_attention

    assert XLA.get_kernel("paged") is paged_attention
    with pytest.raises(
        ValueError, match=r"op is 'mla', must be one of paged, dense: XLA lowers no"
    ):
        XLA.get_kernel("mla")
