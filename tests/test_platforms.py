"""The machine: every chip as a value, and read off jax devices, real and made up."""

import types

import jax
import pytest

from attnsel_jax import AttentionSelectorConfig, Device, DeviceCapability, current_device, select
from attnsel_jax.platforms import CHIPS, device_of
from attnsel_jax.selector import as_device

TPU_KINDS = {  # jax's device_kind -> generation
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
    "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "7x",
}  # fmt: skip


class FakeDevice:
    """What jax.Device shows of a chip that is not here."""

    def __init__(self, platform, kind, version="", **more):
        self.platform, self.device_kind = platform, kind
        self.client = types.SimpleNamespace(platform_version=version)
        vars(self).update(more)


@pytest.mark.parametrize(
    ("name", "platform", "detail"),
    [
        ("cpu", "cpu", None), ("a100", "cuda", (8, 0)), ("L40S", "cuda", (8, 9)),
        ("h100", "cuda", (9, 0)), ("H200", "cuda", (9, 0)), ("b200", "cuda", (10, 0)),
        ("sm120", "cuda", (12, 0)), ("NVIDIA H100 80GB HBM3", "cuda", (9, 0)),
        ("mi300x", "rocm", "gfx942"), ("gfx950", "rocm", "gfx950"),
        ("AMD Instinct MI300X", "rocm", "gfx942"), ("tpu v4", "tpu", "v4"), ("v5e", "tpu", "v5e"),
        ("tpu-v5p", "tpu", "v5p"), ("TPU v6e", "tpu", "v6e"), ("7x", "tpu", "7x"),
        ("TPU v6 lite", "tpu", "v6e"), ("tpu_v7x", "tpu", "7x"), ("TPU7x", "tpu", "7x"),
    ],
)  # fmt: skip
def test_every_chip_can_be_written_down(name, platform, detail):
    device = Device.named(name)
    assert device.platform == platform
    assert (device.compute_capability or device.generation) == detail


@pytest.mark.parametrize("chip", CHIPS)
def test_selection_answers_for_every_chip_on_this_machine(chip):
    standard = select(AttentionSelectorConfig(128, "bfloat16", block_size=64), chip)
    latent = select(AttentionSelectorConfig(576, "bfloat16", use_mla=True), chip)
    assert standard.backend is not None
    assert latent.backend is not None
    assert chip == "cpu" or CHIPS[chip].kind in str(standard)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h20", r"device is 'h20', must be one of cpu, a100, .*; did you mean .*h200"),
        ("", "device is '', must be one of cpu"),
        ("tpu v99", "device is 'tpu v99', must be one of cpu"),
        (None, "device is None, must be one of cpu"),
        (3, "device is 3, must be one of cpu"),
        ("cuda", "device is 'cuda', .*; did you mean a100 or l40s or h100 or h200 or b200 or rtx5"),
        ("GPU", "device is 'GPU', .*; did you mean a100 or .* or mi355x"),
        ("tpu", "device is 'tpu', .*; did you mean v4 or v5e or v5p or v6e or 7x"),
    ],
)
def test_an_unknown_chip_is_an_error_with_the_known_ones(name, message):
    with pytest.raises(ValueError, match=message):
        Device.named(name)


def test_a_chip_that_has_no_name_may_be_built_as_the_error_says():
    with pytest.raises(ValueError, match=r"^device is 'l4'") as caught:
        Device.named("l4")
    built = str(caught.value).partition("such as ")[2]
    l4 = eval(built, {"Device": Device, "DeviceCapability": DeviceCapability})
    assert str(l4) == "cuda (NVIDIA L4, sm 8.9)"
    reasons = map(str, select(AttentionSelectorConfig(64, "bfloat16"), l4).reasons["MOSAIC_GPU"])
    assert "compute_capability is 8.9, must be one of 8.0, 9.0, 10.0" in reasons


@pytest.mark.parametrize(("kind", "generation"), TPU_KINDS.items())
def test_every_tpu_kind_is_read_off_its_device(kind, generation):
    device = device_of(FakeDevice("tpu", kind))
    assert (device.platform, device.kind, device.generation) == ("tpu", kind, generation)
    assert device.compute_capability is None


@pytest.mark.parametrize(("kind", "generation"), TPU_KINDS.items())
def test_known_kinds_have_the_figures_of_their_datasheets(kind, generation):
    assert device_of(FakeDevice("tpu", kind)).peak_flops == CHIPS[generation].peak_flops > 1e14


@pytest.mark.parametrize("platform", ["gpu", "cuda"])
def test_a_cuda_device_has_a_compute_capability(platform):
    device = device_of(FakeDevice(platform, "NVIDIA H200", "cuda 12090", compute_capability="9.0"))
    assert device == Device.named("h200")
    new = device_of(FakeDevice(platform, "NVIDIA X", "cuda", compute_capability="12.1"))
    assert new == Device("cuda", "NVIDIA X", DeviceCapability(12, 1))
    assert new.compute_capability > DeviceCapability(9, 0)
    assert str(new.compute_capability) == "12.1"


@pytest.mark.parametrize("architecture", ["gfx942", "gfx942:sramecc+:xnack-"])
def test_a_rocm_device_is_told_by_its_platform_version(architecture):
    fake = FakeDevice("gpu", "AMD Instinct MI300X", "rocm 70000", compute_capability=architecture)
    assert device_of(fake) == Device.named("mi300x")
    backend = select(AttentionSelectorConfig(128, "bfloat16"), device_of(fake)).backend
    assert backend.name == "XLA"


def test_the_current_device_is_the_default_one():
    assert current_device() == Device("cpu", "cpu")
    with jax.default_device(jax.devices("cpu")[0]):
        assert current_device().platform == "cpu"
    with jax.default_device("cpu"):
        assert current_device().platform == "cpu"


def test_the_question_says_which_device_where_there_are_several():
    here = jax.devices()[0]
    assert as_device(here) == as_device(None) == current_device()
    assert as_device("h200") == as_device(Device.named("h200")) == Device.named("h200")
    for bad in (3, [], object()):
        with pytest.raises(ValueError, match=r"device is .*must be a Device, a jax.Device, a chip"):
            as_device(bad)


def test_a_device_is_a_value():
    assert Device.named("h200") == Device.named("nvidia h200")
    assert hash(Device.named("h200")) == hash(Device.named("H200"))
    assert str(Device.named("h200")) == "cuda (NVIDIA H200, sm 9.0)"
    assert str(Device.named("v6e")) == "tpu (TPU v6 lite, v6e)"
