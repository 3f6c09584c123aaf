"""MLA on TPU, interpreted with race detection and NaN in uninitialised memory, and compiled."""

import jax.numpy as jnp
import numpy as np
import pytest
from latent_kernels import SHAPE, row_of

from attnsel_jax import LatentCache
from attnsel_jax.aot import compile_for, target_for
from attnsel_jax.backends.mosaic_tpu_mla import TPU_LATENT, MosaicTpuMlaBackend
from attnsel_jax.compare.comparison import PASS
from attnsel_jax.problems.mla_inputs import mla_inputs
from pallas_kernels.mla import mosaic_tpu
from pallas_kernels.mla import mosaic_tpu_attend as attending
from pallas_kernels.mla.mosaic_tpu import mla_attention
from pallas_kernels.mla.mosaic_tpu_tiles import Tiles

CASES = {
    "float32": {},
    "decode": {
        "dtype": "bfloat16",
        "q_lens": (1, 1, 1, 1),
        "kv_lens": (1, 64, 193, 320),
        "pad_tokens": 0,
        "pad_seqs": 2,
    },
    "e4m3": {
        "cache_dtype": "float8_e4m3fn",
        "scaled": True,
        "dtype": "bfloat16",
        "q_lens": (1, 5),
        "kv_lens": (140, 9),
    },
    "soft-cap-nothing-written": {
        "soft_cap": 5.0,
        "writes": False,
        "q_lens": (1, 5),
        "kv_lens": (140, 9),
    },
}
MORE = {
    "bfloat16": {"dtype": "bfloat16", "num_heads": 16},
    "one-tile-a-token": {"q_lens": (3, 1), "kv_lens": (130, 2), "pad_seqs": 4},
    "e5m2": {"cache_dtype": "float8_e5m2", "scaled": True},
    "bfloat16-cache": {"cache_dtype": "bfloat16"},
    "float32-cache": {"cache_dtype": "float32", "dtype": "bfloat16"},
    "page-128": {"page_size": 128, "kv_lens": (257, 128, 7, 4)},
    "many-rows-written": {"q_lens": (70, 1), "kv_lens": (70, 40), "num_heads": 1},
    "deepseek": {"rank": 512, "num_heads": 16, "dtype": "bfloat16", "q_lens": (1, 3),
                 "kv_lens": (70, 20)},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Tiles of a size that a small problem has several of."""
    monkeypatch.setattr(mosaic_tpu, "tiles_for", lambda *_, **__: Tiles(64, 128, 3, 2))


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_it_agrees_with_the_oracle(options):
    row = row_of(mla_attention, **options)
    assert row.verdict == PASS, str(row)


def test_it_agrees_where_copies_are_started_between_the_products(monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "tiles_for", lambda *_, **__: Tiles(64, 128, 2, 2, 1, False))
    row = row_of(mla_attention, generation="v6e", **CASES["e4m3"])
    assert row.verdict == PASS, str(row)


@pytest.mark.sweep
@pytest.mark.parametrize("options", MORE.values(), ids=MORE)
def test_it_agrees_with_the_oracle_on_more_shapes(options):
    row = row_of(mla_attention, **options)
    assert row.verdict == PASS, str(row)


def _reset_but_once(self):
    if not hasattr(self, "was_reset"):
        self.was_reset = True
        RESET(self)


RESET = attending._Pass._reset
SMALL = {"q_lens": (1, 3, 1), "kv_lens": (70, 9, 4), "pad_tokens": 0}
FAULTS = {
    "mask": ((attending._Pass, "_seen", lambda self, logits, step: logits), {}),
    "scale": (
        (attending._Pass, "_scaled", lambda self, x: x * self.sizes.scale), {},
    ),
    "kv_scale": (
        (attending._Pass, "_scaled", lambda self, x: x * (self.sizes.scale * attending.LOG2_E)),
        {"cache_dtype": "float8_e4m3fn", "scaled": True, "dtype": "bfloat16"},
    ),
    "soft cap": (
        (attending._Pass, "_scaled", lambda self, x: x * (self.sizes.scale * attending.LOG2_E)),
        {"soft_cap": 5.0},
    ),
    "lse": ((attending, "LN_2", 1.0), {}),
    "border between tiles": ((attending._Pass, "_reset", _reset_but_once), {}),
    "write": ((mosaic_tpu, "write_rows", lambda *_, **__: None), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", ["mask", "kv_scale", "soft cap"])
def test_what_faults_are_planted_in_agrees_without_them(name):
    row = row_of(mla_attention, **SMALL | FAULTS[name][1])
    assert row.verdict == PASS, str(row)


@pytest.mark.planted
@pytest.mark.parametrize(("fault", "options"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_seen(monkeypatch, fault, options):
    monkeypatch.setattr(*fault)
    assert row_of(mla_attention, **SMALL | options).verdict != PASS


def arguments_of(**options):
    made = mla_inputs(np.random.default_rng(0), **SHAPE | options)
    scale = made.pop("scale")
    arrays = {n: None if x is None else jnp.asarray(x) for n, x in made.items()}
    cache = LatentCache(arrays["latent_pages"]).converted("striped")
    return arrays | {"latent_pages": cache.pages, "scale": scale}


REFUSED = {
    "fp8_ds_mla": ({"kv_cache_dtype": "fp8_ds_mla"}, "kv_cache_dtype is 'fp8_ds_mla', must be"),
    "soft cap": ({"soft_cap": -1.0}, "soft_cap is -1.0, must be above 0"),
    "half a step": ({"k_pe": None}, "k_pe is None, must be given with kv_c and slot_mapping: "),
    "plain rows": (
        {"latent_pages": jnp.zeros((9, 64, 192))}, "latent_pages has rows of 192, must be 384",
    ),
    "pages of 16": ({"latent_pages": jnp.zeros((9, 8, 384))}, "page_size is 16, must be one of 64"),
    "float16": (
        {"ql_nope": jnp.zeros((16, 3, 128), jnp.float16)}, "ql_nope has dtype float16, must be one",
    ),
    "rotary part": ({"q_pe": jnp.zeros((16, 3, 32)), "k_pe": jnp.zeros((16, 32))},
                    "rope_dim is 32, must be 64"),
    "latent": ({"ql_nope": jnp.zeros((16, 3, 100)), "kv_c": jnp.zeros((16, 100))},
               "kv_lora_rank is 100, must be a multiple of 128"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_it_does_not_take_is_refused_with_both_values(change, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        mla_attention(**arguments_of() | change)


def test_a_converted_cache_holds_the_same_rows():
    rows = jnp.asarray(np.random.default_rng(0).standard_normal((3, 64, 192)), jnp.float32)
    cache = LatentCache(rows).converted("striped")
    assert cache.pages.shape == (3, 32, 384)
    assert (cache.num_pages, cache.page_size) == (3, 64)
    np.testing.assert_array_equal(cache.converted("rows").pages, rows)


def test_the_backend_s_cache_is_in_the_layout_that_its_kernel_takes():
    assert MosaicTpuMlaBackend.get_kv_cache_shape(7, 64, 1, 576) == (7, 9, 32, 128)
    assert MosaicTpuMlaBackend.get_required_kv_cache_layout() == "striped"


def compiles(chip, **options):
    """Lets the chip's own compiler have the kernel."""
    missing = target_for(chip).missing()
    if missing:
        pytest.skip(f"no compiler for {chip} here: {missing}")
    arguments = arguments_of(rank=512, **options)
    report = compile_for(chip, MosaicTpuMlaBackend.kernels["mla"], arguments)
    assert report.compiled, report.refusal


@pytest.mark.parametrize("chip", TPU_LATENT.generation.values)
def test_a_sample_compiles(chip):
    compiles(chip, num_heads=16, dtype="bfloat16", cache_dtype="float8_e4m3fn", scaled=True)


@pytest.mark.sweep
@pytest.mark.parametrize("chip", TPU_LATENT.generation.values)
@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("page_size", TPU_LATENT.block_size.values)
@pytest.mark.parametrize("dtype", TPU_LATENT.dtype.values)
def test_everything_declared_compiles(chip, cache_dtype, page_size, dtype):
    compiles(chip, num_heads=128, page_size=page_size, dtype=dtype, cache_dtype=cache_dtype)
