"""The GPU that is traced for."""

import jax
import jax.numpy as jnp
import pytest

from attnsel_jax.aot.targets import GPU_FIGURES
from attnsel_jax.platforms import CHIPS
from pallas_kernels import gpu_chip


@pytest.mark.parametrize("name", gpu_chip.CHIPS)
def test_the_chip_is_the_one_that_is_said(name):
    with gpu_chip.for_chip(name):
        chip = gpu_chip.current()
    assert chip == gpu_chip.CHIPS[name]
    known, figures = CHIPS[name], GPU_FIGURES[name]
    assert (chip.kind, chip.capability) == (known.kind, tuple(known.compute_capability))
    assert (chip.num_cores, chip.smem_bytes) == (figures.cores, (figures.shared_kib - 1) << 10)


def test_nothing_said_is_the_default():
    assert gpu_chip.current() == gpu_chip.CHIPS[gpu_chip.DEFAULT]


def test_an_unknown_chip_is_refused():
    with pytest.raises(ValueError, match=r"chip is 'v100', must be one of a100, h100, h200, b200"):
        gpu_chip.for_chip("v100").__enter__()


class Present:
    """What is asked of a device that is here."""

    device_kind = "NVIDIA GH200 480GB"
    compute_capability = "9.0"
    core_count = 144
    shared_memory_per_block_optin = 232448


def test_a_relative_of_a_known_chip_keeps_its_own_figures(monkeypatch):
    monkeypatch.setattr(gpu_chip, "_default_device", Present)
    chip = gpu_chip.current()
    assert (chip.capability, chip.num_cores, chip.kind) == ((9, 0), 144, "NVIDIA GH200 480GB")


def test_a_gpu_that_no_kernel_knows_is_refused(monkeypatch):
    monkeypatch.setattr(Present, "compute_capability", "7.5")
    monkeypatch.setattr(gpu_chip, "_default_device", Present)
    message = r"compute_capability is 7\.5, must be one of 10\.0, 8\.0, 9\.0: use a backend without"
    with pytest.raises(ValueError, match=message):
        gpu_chip.current()


def test_one_chip_s_trace_is_not_another_s():
    @jax.jit
    def cores(x):
        return x + gpu_chip.current().num_cores

    seen = []
    for name in gpu_chip.CHIPS:
        with gpu_chip.for_chip(name):
            seen.append(int(cores(jnp.int32(0))))
    assert seen == [chip.num_cores for chip in gpu_chip.CHIPS.values()]
