"""MLA on Hopper, interpreted with race detection and NaN in uninitialised memory, and compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_compiler import compiled_cleanly
from gpu_interpreter import needs_gpu_interpreter
from gpu_latents import SHAPE, row_of, with_cores, with_raw_rows_apart

from attnsel_jax.backends.mosaic_gpu_mla import GPU_LATENT, HALVES, MosaicGpuMlaBackend
from attnsel_jax.compare.comparison import PASS
from attnsel_jax.config import AttentionSelectorConfig
from attnsel_jax.platforms import Device
from attnsel_jax.problems.mla_inputs import mla_inputs
from pallas_kernels import gpu_chip
from pallas_kernels.mla import mosaic_gpu, mosaic_gpu_attend, mosaic_gpu_slots
from pallas_kernels.mla.mosaic_gpu import mla_attention
from pallas_kernels.mla.mosaic_gpu_tiles import TILES, Tiles, splits

needs_gpu_interpreter()

CASES = {
    "mixed": {},
    "float16-128-heads-pages-16": {"dtype": "float16", "num_heads": 128, "page_size": 16,
                                   "q_lens": (1,), "kv_lens": (140,)},
    "soft-cap-nothing-written": {"soft_cap": 5.0, "writes": False, "page_size": 128,
                                 "q_lens": (1, 5), "kv_lens": (700, 9)},
    "e4m3": {"cache_dtype": "float8_e4m3fn", "scaled": True, "q_lens": (1, 5),
             "kv_lens": (300, 9)},
}  # fmt: skip
MORE = {
    "decode": {"q_lens": (1, 1, 1, 1), "kv_lens": (1, 64, 193, 320), "pad_tokens": 0,
               "pad_seqs": 2, "num_heads": 16},
    "e5m2-pages-of-16": {"cache_dtype": "float8_e5m2", "page_size": 16, "num_heads": 16,
                         "soft_cap": 20.0},
    "e4m3-float16": {"cache_dtype": "float8_e4m3fn", "scaled": True, "dtype": "float16",
                     "page_size": 32, "rank": 512, "kv_lens": (193, 71, 7, 4)},
    "deepseek": {"rank": 512, "num_heads": 16, "q_lens": (1, 3), "kv_lens": (330, 20)},
    "rank-256": {"rank": 256, "kv_lens": (128, 71, 7, 4)},
    "one-tile-a-token": {"q_lens": (3, 1), "kv_lens": (130, 2), "pad_seqs": 4, "num_heads": 72},
    "pages-of-32": {"page_size": 32, "num_heads": 8, "kv_lens": (257, 127, 7, 4)},
    "pages-of-256": {"page_size": 256, "kv_lens": (257, 128, 7, 4), "num_heads": 24},
    "many-rows-written": {"q_lens": (70, 1), "kv_lens": (70, 40), "num_heads": 1},
    "float16": {"dtype": "float16", "kv_lens": (129, 256, 64, 4)},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _few_cores(monkeypatch):
    """So few that some problems are split and others are not."""
    with_cores(monkeypatch, 8)
    with_raw_rows_apart(monkeypatch)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_it_agrees_with_the_oracle(options):
    row = row_of(mla_attention, **options)
    assert row.verdict == PASS, str(row)


@pytest.mark.sweep
@pytest.mark.parametrize("options", MORE.values(), ids=MORE)
@pytest.mark.parametrize("cores", [1, 40])
def test_it_agrees_with_the_oracle_on_more_shapes(options, cores, monkeypatch):
    with_cores(monkeypatch, cores)
    row = row_of(mla_attention, **options)
    assert row.verdict == PASS, str(row)


def first_key_later(monkeypatch):
    monkeypatch.setattr(mosaic_gpu_attend, "KEYS", 64)
    real = mosaic_gpu_attend.own_block

    def faulty(me, sizes, shared, running, scores, first_key, *rest):
        return real(me, sizes, shared, running, scores, first_key - 1, *rest)

    monkeypatch.setattr(mosaic_gpu_attend, "own_block", faulty)


def unused_kept(monkeypatch):
    monkeypatch.setattr(mosaic_gpu_slots, "blank_rows", lambda *_: None)


def other_maximum_ignored(monkeypatch):
    monkeypatch.setattr(mosaic_gpu_attend, "shrink_to", lambda old, new: jnp.ones_like(old))


def sums_of_one_warpgroup(monkeypatch):
    real = mosaic_gpu_attend.finish

    def faulty(me, shared, running, kv_scale):
        halved = running._replace(l=running.l * (1 - me))
        return real(me, shared, halved, kv_scale)

    monkeypatch.setattr(mosaic_gpu_attend, "finish", faulty)


def soft_cap_dropped(monkeypatch):
    real = mosaic_gpu._sizes
    monkeypatch.setattr(mosaic_gpu, "_sizes", lambda *args: real(*args[:-1], None))


def wrong_sequence(monkeypatch):
    real = mosaic_gpu.find_tile

    def faulty(*args):
        tile = real(*args)
        return tile._replace(seq=jnp.maximum(tile.seq - 1, 0))

    monkeypatch.setattr(mosaic_gpu, "find_tile", faulty)


def nothing_written(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "write_latents", lambda pages, *_: pages)


def scale_dropped(monkeypatch):
    real = mosaic_gpu._walk

    def faulty(*args):
        return real(*args[:-1], 1.0)

    monkeypatch.setattr(mosaic_gpu, "_walk", faulty)


FAULTS = {
    "a key after the query's own is seen": (first_key_later, "mixed"),
    "unused slots are multiplied by 0": (unused_kept, "mixed"),
    "the running maximum is not applied": (other_maximum_ignored, "mixed"),
    "the sum of one warpgroup only": (sums_of_one_warpgroup, "soft-cap-nothing-written"),
    "no soft cap": (soft_cap_dropped, "soft-cap-nothing-written"),
    "the pages of another sequence": (wrong_sequence, "decode"),
    "this step's rows are not written": (nothing_written, "decode"),
    "unused slots of 8 bits are multiplied by 0": (unused_kept, "e4m3"),
    "no scale of the cache": (scale_dropped, "e4m3"),
}


@pytest.mark.sweep
@pytest.mark.parametrize(("fault", "case"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_found(fault, case, monkeypatch):
    fault(monkeypatch)
    assert row_of(mla_attention, **CASES[case]).verdict != PASS


def arguments_of(**options):
    made = mla_inputs(np.random.default_rng(0), **SHAPE | options)
    return {n: jnp.asarray(x) if hasattr(x, "shape") else x for n, x in made.items()}


def test_how_often_sequences_are_split_changes_rounding_only(monkeypatch):
    results = []
    for cores in (1, 20):
        with_cores(monkeypatch, cores)
        results.append(row_of(mla_attention, q_lens=(1,), kv_lens=(320,), num_heads=16))
    assert [row.verdict for row in results] == [PASS, PASS]


def test_the_table_says_how_often_sequences_are_split():
    tiles = Tiles(waves=1, least_pairs=4)
    facts = {"cores": 132, "most_keys": 8192}
    assert splits(tiles, blocks=64, **facts) == 2
    assert splits(tiles, blocks=200, **facts) == 1
    assert splits(tiles, blocks=1, **facts) == 8192 // (4 * 128)
    assert splits(tiles, blocks=1, cores=132, most_keys=100) == 1
    chips = {chip for chip, *_ in TILES}
    assert chips == {name for name, chip in gpu_chip.CHIPS.items() if chip.capability == (9, 0)}


REFUSED = {
    "fp8_ds_mla": ({"kv_cache_dtype": "fp8_ds_mla"}, "kv_cache_dtype is 'fp8_ds_mla', must be"),
    "soft cap": ({"soft_cap": -1.0}, "soft_cap is -1.0, must be above 0"),
    "half a step": ({"k_pe": None}, "k_pe is None, must be given with kv_c and slot_mapping: "),
    "other rows": ({"latent_pages": jnp.zeros((9, 64, 200), jnp.bfloat16)},
                   "latent_pages has rows of 200, must be 192: kv_lora_rank 128 and rope_dim 64"),
    "pages of 8": ({"latent_pages": jnp.zeros((9, 8, 192), jnp.bfloat16)},
                   "page_size is 8, must be one of 16, 32, 64, 128, 256"),
    "float32": ({"ql_nope": jnp.zeros((16, 3, 128))}, "ql_nope has dtype float32, must be one of"),
    "the other half": ({"latent_pages": jnp.zeros((9, 64, 192), jnp.float16)},
                       "latent_pages has dtype float16, must be bfloat16 as the queries"),
    "rotary part": ({"q_pe": jnp.zeros((16, 3, 32), jnp.bfloat16),
                     "k_pe": jnp.zeros((16, 32), jnp.bfloat16)}, "rope_dim is 32, must be 64"),
    "latent": ({"ql_nope": jnp.zeros((16, 3, 64), jnp.bfloat16),
                "kv_c": jnp.zeros((16, 64), jnp.bfloat16)},
               "kv_lora_rank is 64, must be one of 128, 256, 384, 512"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_it_does_not_take_is_refused_with_both_values(change, message):
    with pytest.raises(ValueError, match=message):
        mla_attention(**arguments_of() | change)


def test_another_chip_is_refused():
    with gpu_chip.for_chip("b200"), pytest.raises(ValueError, match=r"is 10\.0, must be 9\.0"):
        mla_attention(**arguments_of())


def question(**changes):
    asked = {"head_size": 576, "head_size_v": 512, "dtype": "bfloat16", "use_mla": True,
             "kv_cache_dtype": "auto", "block_size": 64, "op": "mla"}  # fmt: skip
    return AttentionSelectorConfig(**asked | changes)


def reasons(chip, **changes):
    found = MosaicGpuMlaBackend.validate_configuration(question(**changes), Device.named(chip))
    return [reason.argument for reason in found]


def test_the_backend_says_what_it_takes():
    assert reasons("h200") == []
    assert reasons("b200") == ["compute_capability"]
    assert reasons("h200", dtype="float32") == ["dtype", "kv_cache_dtype"]
    assert reasons("h200", kv_cache_dtype="float16") == ["kv_cache_dtype"]
    assert reasons("h200", block_size=8, head_size=192) == ["head_size", "block_size"]


def test_an_older_jax_is_a_reason_and_no_error(monkeypatch):
    monkeypatch.setattr(jax, "__version__", "0.10.2")
    assert reasons("h200") == ["jax_version"]


def compiled(monkeypatch, num_pages=64, **options):
    """Lets the chip's own compiler have the kernel; its memory, and the cache's bytes."""
    monkeypatch.undo()  # the chip and the kernel as they are, not as they are interpreted
    arguments = arguments_of(rank=512, **options)
    pages = arguments["latent_pages"]
    pages = jax.ShapeDtypeStruct((num_pages, *pages.shape[1:]), pages.dtype)
    kernel = MosaicGpuMlaBackend.kernels["mla"]
    memory = compiled_cleanly("h200", kernel, arguments | {"latent_pages": pages})
    return memory, pages.size * pages.dtype.itemsize


@pytest.mark.parametrize(
    "cache_dtype", [None, pytest.param("float8_e4m3fn", marks=pytest.mark.sweep)]
)
def test_a_sample_compiles_and_the_cache_is_not_copied(monkeypatch, cache_dtype):
    sizes = {"q_lens": (1,) * 4, "kv_lens": (1024,) * 4, "num_heads": 128}
    memory, cache = compiled(monkeypatch, num_pages=8192, cache_dtype=cache_dtype, **sizes)
    assert memory["aliased"] >= cache > 10 * memory["temporaries"]


@pytest.mark.sweep
@pytest.mark.parametrize("page_size", GPU_LATENT.block_size.values)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("cache_dtype", [None, "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("num_heads", [128, 3])
@pytest.mark.parametrize("soft_cap", [None, 30.0])
def test_everything_declared_compiles(
    monkeypatch, num_heads, page_size, dtype, cache_dtype, soft_cap
):
    compiled(monkeypatch, num_heads=num_heads, page_size=page_size, dtype=dtype, soft_cap=soft_cap,
             cache_dtype=cache_dtype)  # fmt: skip
