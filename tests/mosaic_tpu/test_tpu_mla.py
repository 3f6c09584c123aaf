"""MLA on TPU, interpreted with race detection and NaN in uninitialised memory, and compiled."""

import copy
import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest
from latent_kernels import SHAPE, row_of
from tpu_interpreter import tpu_interpreter

from attnsel_jax import LatentCache
from attnsel_jax.aot import compile_for, target_for
from attnsel_jax.backends.mosaic_tpu_mla import TPU_LATENT, MosaicTpuMlaBackend
from attnsel_jax.compare.comparison import FAIL, PASS
from attnsel_jax.problems.mla_inputs import mla_inputs
from pallas_kernels.mla import mosaic_tpu
from pallas_kernels.mla import mosaic_tpu_attend as attending
from pallas_kernels.mla.mosaic_tpu import mla_attention
from pallas_kernels.mla.mosaic_tpu_tiles import Tiles, few_tokens, tiles_for

CASES = {
    "float32": {},
    "decode": {  # more tiles than are under way at once
        "dtype": "bfloat16",
        "q_lens": (1, 1, 1, 1, 1, 1),
        "kv_lens": (1, 64, 193, 320, 9, 70),
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
ON_OLD_JAX_TOO = ("decode", "e4m3")
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
    """Tiles of a size that a small problem has several of; few tokens have none of their own."""
    monkeypatch.setattr(
        mosaic_tpu, "tiles_for", lambda *key: Tiles(0 if key[-1] == "few" else 64, 128, 3, 2)
    )


@pytest.fixture
def _few_are_tiles(monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "tiles_for", lambda *_: Tiles(64, 128, 2, 1))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(CASES[name], id=name, marks=() if name in ON_OLD_JAX_TOO else pytest.mark.once)
        for name in CASES
    ],
)
def test_it_agrees_with_the_oracle(options):
    row = row_of(mla_attention, **options)
    assert row.verdict == PASS, str(row)


# More tiles of both kinds than are under way at once; blocks with pages past a sequence's end.
BOTH_KINDS = {"q_lens": (1, 13, 1, 1, 9, 1, 1), "kv_lens": (300, 71, 1, 193, 9, 5, 130),
              "dtype": "bfloat16"}  # fmt: skip
# Three tokens at most are a tile of their own; beside them some have one token, none, or many.
FEW = {"q_lens": (2, 3, 1, 0, 2, 9, 3, 1), "kv_lens": (300, 71, 193, 7, 129, 9, 3, 1),
       "pad_tokens": 4, "dtype": "bfloat16"}  # fmt: skip
FEW_MORE = {
    "all-have-two": {"q_lens": (2,) * 6, "kv_lens": (2, 64, 193, 320, 9, 70), "pad_seqs": 0,
                     "pad_tokens": 0, "num_heads": 20},
    "float32": FEW | {"dtype": "float32"},
    "e5m2": FEW | {"cache_dtype": "float8_e5m2", "scaled": True},
    "soft-cap-nothing-written": FEW | {"soft_cap": 5.0, "writes": False},
    "page-128": FEW | {"page_size": 128, "cache_dtype": "float32"},
}  # fmt: skip
TABLED = [
    ("v6e", "bfloat16"), ("v4", "bfloat16"), ("v5e", "bfloat16"), ("v5p", "bfloat16"),
    ("7x", "bfloat16"), ("v4", "float8_e4m3fn"), ("v5e", "float8_e4m3fn"), ("v6e", "float8_e4m3fn"),
]  # fmt: skip


def tabled_but_small(*key):
    """What the table chooses, of a size that a small problem has several of."""
    chosen = tiles_for(*key)
    rows = 16 if key[-1] == "decode" else 64  # few tokens have sizes of their own
    return chosen._replace(
        rows=rows, block_kv=128, blocks=min(chosen.blocks, 3), lead=min(chosen.lead, 2)
    )


@pytest.mark.sweep
@pytest.mark.parametrize("options", [BOTH_KINDS, FEW], ids=["both-kinds", "few"])
@pytest.mark.parametrize(("generation", "cache_dtype"), TABLED)
def test_it_agrees_with_what_the_table_chooses(monkeypatch, generation, cache_dtype, options):
    monkeypatch.setattr(mosaic_tpu, "tiles_for", tabled_but_small)
    row = row_of(mla_attention, generation=generation, cache_dtype=cache_dtype, **options)
    assert row.verdict == PASS, str(row)


@pytest.mark.once
@pytest.mark.usefixtures("_few_are_tiles")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(FEW, id="bfloat16"),
        *(pytest.param(o, id=n, marks=pytest.mark.sweep) for n, o in FEW_MORE.items()),
    ],
)
def test_few_new_tokens_agree_with_the_oracle_beside_one_and_many(options):
    row = row_of(mla_attention, **options)
    assert row.verdict == PASS, str(row)


SEEN = attending._Pass._seen


def _all_rows_as_the_first(self, logits, at):
    of_one = copy.copy(self)
    of_one.sizes = dataclasses.replace(self.sizes, block_q=1)
    return SEEN(of_one, logits, at)


@pytest.mark.once
@pytest.mark.usefixtures("_few_are_tiles")
def test_a_mask_that_takes_all_tokens_of_a_tile_for_its_first_is_seen(monkeypatch):
    monkeypatch.setattr(attending._Pass, "_seen", _all_rows_as_the_first)
    row = row_of(mla_attention, **FEW_MORE["all-have-two"])
    assert row.verdict == FAIL, str(row)


@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "tokens"),
    [(64, 128, 1), (65, 128, 2), (128, 128, 2), (192, 128, 3), (193, 128, 1), (256, 96, 4),
     (512, 16, 8), (513, 16, 1)],
)  # fmt: skip
def test_as_many_tokens_are_a_tile_as_come_if_they_are_few(num_tokens, num_heads, tokens):
    assert few_tokens(num_tokens, 64, num_heads, 384) == tokens


@pytest.mark.sweep
@pytest.mark.parametrize(
    "tiles",
    [
        Tiles(64, 128, 3, 1, lag=0),
        Tiles(64, 128, 3, 1, lag=0, starts_within=False),
        Tiles(64, 128, 3, 1, lag=0, finishes=0),
        Tiles(64, 128, 2, 2, lag=2, finishes=0, starts_within=False),
        Tiles(64, 128, 3, 1, lag=2),
    ],
    ids=str,
)
def test_it_agrees_with_other_choices_for_both_kinds(monkeypatch, tiles):
    monkeypatch.setattr(mosaic_tpu, "tiles_for", lambda *_: tiles)
    row = row_of(mla_attention, generation="v6e", **CASES["e4m3"])
    assert row.verdict == PASS, str(row)


@pytest.mark.sweep
@pytest.mark.parametrize("options", MORE.values(), ids=MORE)
def test_it_agrees_with_the_oracle_on_more_shapes(options):
    row = row_of(mla_attention, **options)
    assert row.verdict == PASS, str(row)


RESET = attending._Pass._reset


def _reset_before_the_first_only(self, state):
    if isinstance(state, int):  # a tracer after a tile
        RESET(self, state)


# Each is planted in one of `CASES`, which pass without it.
FAULTS = {
    "mask": ((attending._Pass, "_seen", lambda self, logits, step: logits), "e4m3"),
    "scale": ((attending._Pass, "_scaled", lambda self, x: x * self.sizes.scale), "decode"),
    "kv_scale": (
        (attending._Pass, "_scaled", lambda self, x: x * (self.sizes.scale * attending.LOG2_E)),
        "e4m3",
    ),
    "soft cap": (
        (attending._Pass, "_scaled", lambda self, x: x * (self.sizes.scale * attending.LOG2_E)),
        "soft-cap-nothing-written",
    ),
    "lse": ((attending, "LN_2", 1.0), "decode"),
    "border between tiles": (
        (attending._Pass, "_reset", _reset_before_the_first_only), "decode",
    ),
    "write": ((mosaic_tpu, "write_rows", lambda *_, **__: None), "decode"),
}  # fmt: skip
EVERY_PUSH = ("mask", "border between tiles", "write")


@pytest.mark.once
@pytest.mark.parametrize(
    ("fault", "case"),
    [
        pytest.param(*planted, id=name, marks=() if name in EVERY_PUSH else pytest.mark.sweep)
        for name, planted in FAULTS.items()
    ],
)
def test_a_planted_fault_is_seen(monkeypatch, fault, case):
    monkeypatch.setattr(*fault)
    row = row_of(mla_attention, **CASES[case])
    assert row.verdict == FAIL, str(row)


@pytest.mark.sweep
@pytest.mark.once
def test_pages_past_an_end_that_are_not_zeroed_are_seen(monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "tiles_for", tabled_but_small)
    monkeypatch.setattr(attending._Pass, "_make_nothing", lambda self: None)
    row = row_of(mla_attention, generation="v6e", **BOTH_KINDS)
    assert row.verdict == FAIL, str(row)


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
        {"latent_pages": jnp.zeros((9, 64, 192))}, "latent_pages has 3 dimensions (9, 64, 192)",
    ),
    "another rank's pages": (
        {"latent_pages": jnp.zeros((9, 9, 32, 128))},
        "latent_pages has 9 parts of 128 lanes a page, must be 3 of 128",
    ),
    "pages of 16": (
        {"latent_pages": jnp.zeros((9, 3, 8, 128))}, "page_size is 16, must be one of 64",
    ),
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
    with pytest.raises(ValueError, match=re.escape(message)):
        mla_attention(**arguments_of() | change)


@pytest.mark.parametrize("page_size", [64, 256])
@pytest.mark.parametrize(
    ("dtype", "tile"), [("float32", 8), ("bfloat16", 16), ("float8_e4m3fn", 32)]
)
def test_a_converted_cache_holds_the_same_rows_where_the_layout_says(dtype, tile, page_size):
    rows = np.random.default_rng(0).standard_normal((3, page_size, 576)).astype(dtype)
    cache = LatentCache(jnp.asarray(rows)).converted("striped")
    assert cache.pages.shape == (3, 9, page_size // 2, 128)
    assert (cache.num_pages, cache.page_size) == (3, page_size)
    np.testing.assert_array_equal(cache.converted("rows").pages, rows)
    pages = np.asarray(cache.pages)
    for token in (0, tile - 1, tile, 2 * tile - 1, page_size // 2, page_size - 1):
        half, line = divmod(token, page_size // 2)
        for c in range(4):
            stripe = rows[1, token, 128 * c : 128 * (c + 1)]
            np.testing.assert_array_equal(pages[1, 4 * half + c, line], stripe)
        unit, rest = divmod(token, 2 * tile)
        second, line = divmod(rest, tile)
        rope = pages[1, 8, tile * unit + line, 64 * second : 64 * (second + 1)]
        np.testing.assert_array_equal(rope, rows[1, token, 512:])


NOT_STRIPED = {
    "rank of 100": ((3, 64, 164), 64, "row is 164 and page_size 64, must be a multiple of 128 and"),
    "page of 24": ((3, 24, 192), 64, "row is 192 and page_size 24, must be .* multiple of 16, in"),
    "rotary part": ((3, 64, 160), 32, "rope_dim is 32, must be 64 in layout 'striped'"),
}


@pytest.mark.parametrize(("shape", "rope_dim", "message"), NOT_STRIPED.values(), ids=NOT_STRIPED)
def test_a_cache_that_cannot_be_striped_says_why(shape, rope_dim, message):
    with pytest.raises(ValueError, match=message):
        LatentCache(jnp.zeros(shape, jnp.float32)).converted("striped", rope_dim)


@pytest.mark.sweep
@pytest.mark.once
@pytest.mark.usefixtures("_few_are_tiles")
def test_of_few_tokens_those_that_see_nothing_give_nothing_even_if_they_are_nan():
    arguments = arguments_of(q_lens=(2, 3, 2), kv_lens=(70, 9, 4), pad_tokens=0, pad_seqs=0)
    arguments |= {"kv_lens": jnp.asarray([0, 2, 4], jnp.int32)}
    blind = np.asarray([0, 1, 2])
    arguments |= {"ql_nope": arguments["ql_nope"].at[blind].set(jnp.nan)}
    with tpu_interpreter():
        out, lse, _ = mla_attention(**arguments)
    np.testing.assert_array_equal(out[blind], 0)
    np.testing.assert_array_equal(lse[blind], -np.inf)
    assert np.isfinite(out[3:]).all()
    assert np.isfinite(lse[3:]).all()


@pytest.mark.once
def test_a_query_that_sees_nothing_gives_nothing_even_if_it_is_nan():
    arguments = arguments_of(q_lens=(1, 3, 1), kv_lens=(70, 9, 4), pad_tokens=0)
    arguments |= {"kv_lens": jnp.asarray([0, 2, 4, 0], jnp.int32)}  # blind: 0, 1
    nan = jnp.asarray([0, 1, 4])
    arguments |= {"ql_nope": arguments["ql_nope"].at[nan].set(jnp.nan)}
    with tpu_interpreter():
        out, lse, _ = mla_attention(**arguments)
    blind = np.asarray([0, 1])
    np.testing.assert_array_equal(out[blind], 0)
    np.testing.assert_array_equal(lse[blind], -np.inf)
    assert np.isnan(out[4]).all()  # it sees keys
    assert np.isfinite(out[2:4]).all()
    assert np.isfinite(lse[2:4]).all()


@pytest.mark.once
@pytest.mark.parametrize(
    "cache_dtype", ["bfloat16", pytest.param("float8_e4m3fn", marks=pytest.mark.sweep)]
)
def test_rows_go_to_their_slots_in_any_order_and_nothing_else_is_touched(cache_dtype):
    rng = np.random.default_rng(0)
    arguments = arguments_of(
        q_lens=(1,) * 40, kv_lens=(5,) * 40, num_heads=1, cache_dtype=cache_dtype, pad_tokens=0
    )
    others = np.delete(np.arange(128), np.arange(40, 52))
    slots = np.concatenate([np.arange(40, 52), rng.permutation(others)[:28]])
    slots[[3, 17]] = -1, 9 * 64 * 1000  # nowhere
    stored = LatentCache(arguments["latent_pages"], layout="striped").converted("rows").pages
    before = np.array(stored).reshape(-1, 192)
    before[:] = rng.standard_normal(before.shape).astype(before.dtype)
    rows = jnp.asarray(before).reshape(-1, 64, 192)
    pages = LatentCache(rows).converted("striped").pages
    arguments |= {"latent_pages": pages, "slot_mapping": jnp.asarray(slots, jnp.int32)}
    with tpu_interpreter():
        *_, pages = mla_attention(**arguments)
    new = np.concatenate([arguments["kv_c"], arguments["k_pe"]], axis=1).astype(before.dtype)
    named = (slots >= 0) & (slots < len(before))
    before[slots[named]] = new[named]
    after = LatentCache(pages, layout="striped").converted("rows").pages
    after = np.array(after).reshape(-1, 192)
    np.testing.assert_array_equal(after.astype(np.float32), before.astype(np.float32))


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


@pytest.mark.parametrize(
    "chip", ["v5e", *(pytest.param(c, marks=pytest.mark.sweep) for c in ("v4", "v5p", "v6e", "7x"))]
)
def test_a_sample_compiles(chip):
    compiles(chip, num_heads=16, dtype="bfloat16", cache_dtype="float8_e4m3fn", scaled=True)


@pytest.mark.sweep
@pytest.mark.parametrize("chip", TPU_LATENT.generation.values)
@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("page_size", TPU_LATENT.block_size.values)
@pytest.mark.parametrize("dtype", TPU_LATENT.dtype.values)
def test_everything_declared_compiles(chip, cache_dtype, page_size, dtype):
    compiles(chip, num_heads=128, page_size=page_size, dtype=dtype, cache_dtype=cache_dtype)


@pytest.mark.sweep
@pytest.mark.parametrize("chip", TPU_LATENT.generation.values)
@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize(("num_heads", "tokens"), [(128, 2), (128, 3), (16, 8)])
def test_few_new_tokens_compile(monkeypatch, chip, cache_dtype, num_heads, tokens):
    monkeypatch.setattr(mosaic_tpu, "tiles_for", tiles_for)
    batch = {"q_lens": (tokens,) * 4, "kv_lens": (70, 300, tokens, 64), "pad_seqs": 0}
    batch |= {"pad_tokens": 0, "dtype": "bfloat16", "cache_dtype": cache_dtype}
    compiles(chip, num_heads=num_heads, **batch)
