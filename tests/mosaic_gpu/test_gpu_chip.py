"""The GPU that is traced for, and what it launches."""

import math

import jax
import jax.numpy as jnp
import pytest

from attnsel_jax.aot.targets import GPU_FIGURES
from attnsel_jax.jax_versions import jax_version
from attnsel_jax.platforms import CHIPS
from pallas_kernels import gpu_chip
from pallas_kernels.dense.mosaic_gpu import dense_attention
from pallas_kernels.paged.mosaic_gpu import paged_attention
from pallas_kernels.sparse_mla.mosaic_gpu_indexer import indexer_scores


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


MANY = 70_000


def _like(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _dense(q, k, v):
    def loss(*arrays):
        return dense_attention(*arrays)[0].astype(jnp.float32).sum()

    return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)


def _paged(q, pages, table, kv_lens, cu_q_lens, num_seqs):
    return paged_attention(q, None, None, pages, table, kv_lens, cu_q_lens, num_seqs, None)


WINDOWS = [_like("bfloat16", MANY, 49, 4, 64)] * 3
SEQUENCES = 1100
BATCH = [_like("int32", SEQUENCES, 64), _like("int32", SEQUENCES), _like("int32", SEQUENCES + 1),
         _like("int32")]  # fmt: skip
LARGE = {
    "images' windows, h200": ("h200", _dense, WINDOWS),
    "images' windows, a100": ("a100", _dense, WINDOWS),
    "images' windows, b200": ("b200", _dense, WINDOWS),
    "tokens that may be decoded": (
        "h200", _paged,
        [_like("bfloat16", MANY, 8, 64), _like("bfloat16", 2, 99, 8, 64, 64), *BATCH],
    ),
    "an indexer's tokens": (
        "h200", indexer_scores,
        [_like("bfloat16", MANY, 64, 128), _like("float32", MANY, 64),
         _like("bfloat16", 99, 64, 128), *BATCH],
    ),
}  # fmt: skip


@pytest.mark.skipif(jax_version() < (0, 11), reason="GPU kernels need jax 0.11")
@pytest.mark.parametrize(("chip", "call", "arguments"), LARGE.values(), ids=LARGE)
def test_no_launch_has_more_blocks_than_cuda_takes(monkeypatch, chip, call, arguments):
    """65535 along y and z, which the interpreter and ptxas do not know."""
    grids, kernel = [], gpu_chip.plgpu.kernel

    def recorded(body, **options):
        grids.append(options["grid"])
        return kernel(body, **options)

    monkeypatch.setattr(gpu_chip.plgpu, "kernel", recorded)
    with gpu_chip.for_chip(chip):
        jax.eval_shape(call, *arguments)
    assert any(max(grid) > 65535 for grid in grids)
    for *others, y, x in ((1, *grid) for grid in grids):
        assert max(math.prod(others), y) <= 65535, grids
        assert x < 2**31


def test_a_grid_keeps_its_order_where_it_can():
    assert gpu_chip.launchable((2, 70_000), ("a", "b")) == ((2, 70_000), ("a", "b"))
    assert gpu_chip.launchable((70_000, 3, 2), ("a", "b", "c"))[1] == ("b", "c", "a")
    with pytest.raises(ValueError, match=r"grid is \{'a': 70000, 'b': 70000\}, must be of at most"):
        gpu_chip.launchable((70_000, 70_000), ("a", "b"))
