"""Sparse MLA on TPU, interpreted with race detection and NaN in uninitialised memory; compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from latent_kernels import found_faulty, row_of

import attnsel_jax
from attnsel_jax import AttentionMetadata, LatentCache, allocate_latent_cache
from attnsel_jax.aot import compile_for, target_for
from attnsel_jax.backends.mosaic_tpu_mla_sparse import TPU_TILED, MosaicTpuMlaSparseBackend
from attnsel_jax.compare.comparison import PASS
from attnsel_jax.problems.mla_inputs import mla_inputs
from pallas_kernels import fp8_ds_mla, tpu_chip
from pallas_kernels.sparse_mla import (
    mosaic_tpu,
    mosaic_tpu_attend,
    mosaic_tpu_masked,
    mosaic_tpu_positions,
    mosaic_tpu_rows,
    mosaic_tpu_softmax,
)
from pallas_kernels.sparse_mla.mosaic_tpu import sparse_mla_attention
from pallas_kernels.sparse_mla.mosaic_tpu_tiles import TILES, Tiles, tiles

# Several groups of keys a token, one token with none, lists with -1, traps and empty ones.
SHAPE = {"rank": 512, "q_lens": (1, 7, 0, 2), "kv_lens": (150, 70, 7, 2), "topk": 70}
SMALL = {"q_lens": (1, 2), "kv_lens": (70, 9), "topk": 40}
BYTES = {"cache_dtype": "fp8_ds_mla", "dtype": "bfloat16", "q_lens": (2,), "kv_lens": (50,),
         "topk": 30, "pad_tokens": 0}  # fmt: skip
CASES = {
    "bfloat16": {"dtype": "bfloat16", **SMALL},
    "e4m3": {"cache_dtype": "float8_e4m3fn", "scaled": True, "dtype": "bfloat16", **SMALL},
    "fp8_ds_mla": BYTES,
}
MORE = {
    "float32": {},
    "soft-cap-nothing-written": {"soft_cap": 5.0, "writes": False, **SMALL},
    "bfloat16-long": {"dtype": "bfloat16", "num_heads": 16, "topk": 130},
    "e5m2": {"cache_dtype": "float8_e5m2", "scaled": True},
    "bfloat16-cache": {"cache_dtype": "bfloat16"},
    "float32-cache": {"cache_dtype": "float32", "dtype": "bfloat16"},
    "page-128": {"page_size": 128, "pad_seqs": 3},
    "page-16": {"page_size": 16},
    "fp8_ds_mla-float32": {"cache_dtype": "fp8_ds_mla", "soft_cap": 5.0, "writes": False},
    "fp8_ds_mla-page-16": {"cache_dtype": "fp8_ds_mla", "dtype": "bfloat16", "page_size": 16},
    "fp8_ds_mla-7x": {"cache_dtype": "fp8_ds_mla", "dtype": "bfloat16", "generation": "7x"},
    "one-position": {"topk": 1},
    "many-rows-written": {"q_lens": (40,), "kv_lens": (40,), "num_heads": 1},
    "no-padding": {"pad_tokens": 0, "pad_seqs": 0},
}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Tiles of a size that a small problem has several of."""
    monkeypatch.setattr(mosaic_tpu, "tiles", lambda *_, **__: Tiles(32, 2))


def interpreted(**options):
    return row_of(sparse_mla_attention, "tiled", **SHAPE | options)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_it_agrees_with_the_oracle(options):
    row = interpreted(**options)
    assert row.verdict == PASS, str(row)


@pytest.mark.sweep
@pytest.mark.parametrize("options", MORE.values(), ids=MORE)
def test_it_agrees_with_the_oracle_on_more_shapes(options):
    row = interpreted(**options)
    assert row.verdict == PASS, str(row)


# Tiles of four tokens, two multiplied at once; of blocks of 128 keys; the rest gathers.
MASKED = Tiles(32, 2, reach=1000, rows=64, step_rows=32, masked_kv=128)
# One gathers; full tiles and a half full one; a tile that is less; a context of three blocks.
MIXED = {"q_lens": (1, 11, 5, 0, 4), "kv_lens": (150, 70, 7, 9, 300), "pad_tokens": 3}
MASKED_CASES = {
    "float32": {},
}
MORE_MASKED = {
    "e4m3-soft-cap": {
        "cache_dtype": "float8_e4m3fn",
        "scaled": True,
        "soft_cap": 5.0,
        "q_lens": (8,),
        "kv_lens": (129,),
    },
    "bfloat16": {"dtype": "bfloat16"},
    "masked-only": {"q_lens": (8,), "kv_lens": (256,), "pad_tokens": 0},
    "longer-contexts-gather": {"topk": 10},
    "nothing-written": {"writes": False, "dtype": "bfloat16"},
    "e5m2": {"cache_dtype": "float8_e5m2", "dtype": "bfloat16"},
    "fp8_ds_mla": {
        "cache_dtype": "fp8_ds_mla",
        "dtype": "bfloat16",
        "q_lens": (1, 8),
        "kv_lens": (30, 129),
    },
    "fp8_ds_mla-page-16": {"cache_dtype": "fp8_ds_mla", "page_size": 16, "soft_cap": 5.0},
    "page-256": {"page_size": 256},
    "page-16": {"page_size": 16, "dtype": "bfloat16"},
    "sixteen-heads": {"num_heads": 16, "dtype": "bfloat16"},
    "forty-heads": {"num_heads": 40},
    "long-lists": {"topk": 290, "q_lens": (6, 4), "kv_lens": (200, 300)},
}


@pytest.mark.once
@pytest.mark.parametrize("options", MASKED_CASES.values(), ids=MASKED_CASES)
def test_masked_tiles_agree_with_the_oracle(monkeypatch, options):
    monkeypatch.setattr(mosaic_tpu, "tiles", lambda *_, **__: MASKED)
    row = interpreted(**MIXED | options)
    assert row.verdict == PASS, str(row)


@pytest.mark.sweep
@pytest.mark.parametrize("options", MORE_MASKED.values(), ids=MORE_MASKED)
def test_masked_tiles_agree_with_the_oracle_on_more_shapes(monkeypatch, options):
    monkeypatch.setattr(mosaic_tpu, "tiles", lambda *_, **__: MASKED)
    row = interpreted(**MIXED | options)
    assert row.verdict == PASS, str(row)


@pytest.mark.sweep
@pytest.mark.parametrize("buffers", [3, 4])
def test_more_buffers_change_nothing(monkeypatch, buffers):
    monkeypatch.setattr(mosaic_tpu, "tiles", lambda *_, **__: Tiles(32, buffers))
    row = interpreted(dtype="bfloat16", topk=200)
    assert row.verdict == PASS, str(row)


def _unmasked(*args, **kwargs):
    chosen = mosaic_tpu_positions.chosen_rows(*args, **kwargs)
    return chosen._replace(bias=jnp.zeros_like(chosen.bias))


def _unguarded(*args, **kwargs):
    """An entry that names nothing brings the first row of the cache, which nobody uses."""
    chosen = mosaic_tpu_positions.chosen_rows(*args, **kwargs)
    return chosen._replace(rows=jnp.where(chosen.bias == 0, chosen.rows, 0))


def _first_group_only(*args, **kwargs):
    chosen = mosaic_tpu_positions.chosen_rows(*args, **kwargs)
    return chosen._replace(groups=jnp.ones_like(chosen.groups))


FAULTS = {
    "entries that name nothing count": (mosaic_tpu, "chosen_rows", _unmasked, {}),
    "entries that name nothing are read": (mosaic_tpu, "chosen_rows", _unguarded, {}),
    "one group of keys": (mosaic_tpu, "chosen_rows", _first_group_only, {}),
    "keys in another order": (mosaic_tpu_rows, "_key", lambda at, row: at, SMALL),
    "no waiting for rows": (mosaic_tpu_attend, "wait_gather", lambda buffer, sem: None, SMALL),
    "nothing written": (mosaic_tpu, "write_rows", lambda *_: None, SMALL),
    "natural logarithm taken for base 2": (mosaic_tpu_softmax, "LN_2", 1.0, SMALL),
    "padding tokens as they were": (mosaic_tpu, "_blank_padding", lambda *_: None, SMALL),
}


EVERY_PUSH = ("entries that name nothing are read", "no waiting for rows")
ROWS = mosaic_tpu_rows
OF_BYTES = {
    "one scale for all groups": (ROWS, "_scale", lambda x, line, row: _SCALE(x, 0, row), BYTES),
    "no scales": (ROWS, "_scale", lambda x, line, row: jnp.ones((len(x), 1)), BYTES),
    "lower halves as rotary keys": (ROWS, "UPPER_HALF", 0xFFFF, BYTES),
    "written with another scale": (fp8_ds_mla, "LARGEST_E4M3", 447.0, BYTES),
    "scales not in the list's order": (ROWS, "_key", lambda at, row: at ^ 1, BYTES),
}
_SCALE = mosaic_tpu_rows._scale
PLANTED = [
    pytest.param(*planted, id=name, marks=() if name in EVERY_PUSH else pytest.mark.sweep)
    for name, planted in (FAULTS | OF_BYTES).items()
]


@pytest.mark.once
@pytest.mark.parametrize(("module", "name", "fault", "options"), PLANTED)
def test_a_planted_fault_is_found(monkeypatch, module, name, fault, options):
    monkeypatch.setattr(module, name, fault)
    found_faulty(lambda: interpreted(**{"dtype": "bfloat16"} | options))


def _of_all_positions(lists, q_pos, rows):
    return _TIMES_NAMED(lists, [last + 1000 for last in q_pos], rows)


def _of_each_other(lists, q_pos, rows):
    return _TIMES_NAMED(lists[::-1], q_pos, rows)


def _unpacked_whole(buffer, keys, row, *, count=None):
    return mosaic_tpu_rows.unpack(buffer, keys, row, count=None if count is None else 1 << 20)


def _unpacked_as_gathered(buffer, keys, row, *, count=None):
    return mosaic_tpu_rows.unpack(buffer, keys, row)


def _shared_twice(placed, **options):
    """Masked tokens are gathered, too, and the last of them not masked."""
    shared = mosaic_tpu_positions.shared_tokens(placed, **options)
    return shared._replace(num_tiles=shared.num_tiles - 1)


_TIMES_NAMED = mosaic_tpu_masked._times_named
PASS_OF = mosaic_tpu_masked._Pass
MASKED_FAULTS = {
    "positions after the query's count": (mosaic_tpu_masked, "_times_named", _of_all_positions),
    "masks of another token": (mosaic_tpu_masked, "_times_named", _of_each_other),
    "keys after the last one": (mosaic_tpu_masked, "unpack", _unpacked_whole),
    "keys in another order": (mosaic_tpu_masked, "unpack", _unpacked_as_gathered),
    "a tile left out": (mosaic_tpu, "shared_tokens", _shared_twice),
    "no waiting for pages": (PASS_OF, "_wait_pages", lambda self, k: None),
    "running on from tile to tile": (mosaic_tpu_masked, "reset", lambda running: None),
}


# One at every push, the others on demand.
OFTEN = ("positions after the query's count",)
PLANTED_MASKED = [
    pytest.param(*planted, id=name, marks=() if name in OFTEN else pytest.mark.sweep)
    for name, planted in MASKED_FAULTS.items()
]


@pytest.mark.once
@pytest.mark.parametrize(("owner", "name", "fault"), PLANTED_MASKED)
def test_a_fault_planted_among_masked_tiles_is_found(monkeypatch, owner, name, fault):
    monkeypatch.setattr(mosaic_tpu, "tiles", lambda *_, **__: MASKED)
    monkeypatch.setattr(owner, name, fault)
    found_faulty(lambda: interpreted(dtype="bfloat16", q_lens=(5, 4), kv_lens=(70, 200)))


def shared_of(q_lens, kv_lens, *, num_tokens, keys_per_token, block_q=4):
    """The listed tiles as (first, count, q_pos, seq), and the tokens that gather."""
    cu_q_lens = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    placed = mosaic_tpu_positions.placed_tokens(
        jnp.asarray(kv_lens, jnp.int32), jnp.asarray(cu_q_lens), jnp.int32(len(q_lens)),
        num_tokens=num_tokens, most_keys=1000,
    )  # fmt: skip
    shared = mosaic_tpu_positions.shared_tokens(
        placed, block_q=block_q, keys_per_token=keys_per_token
    )
    tiles = np.stack(shared.tiles)[:, : int(shared.num_tiles[0])].T
    return tiles.tolist(), shared.gathered[: int(shared.num_gathered[0])].tolist()


def test_tokens_are_shared_out_by_how_many_keys_their_tile_has_for_each():
    # 6 tokens at 10 to 15, one at 50, 8 at 32 to 39, of which the last four have 10 keys each.
    lens = {"q_lens": (6, 1, 8), "kv_lens": (16, 51, 40), "num_tokens": 17}
    listed = [[0, 4, 10, 0], [4, 2, 14, 0], [7, 4, 32, 2]]
    assert shared_of(**lens, keys_per_token=9) == (listed, [6, 11, 12, 13, 14])
    assert shared_of(**lens, keys_per_token=10) == ([*listed, [11, 4, 36, 2]], [6])
    assert shared_of(**lens, keys_per_token=9, block_q=0) == ([], list(range(15)))


@pytest.mark.sweep
def test_prompts_are_masked_where_the_table_says_so_and_decodes_never(monkeypatch):
    seen = {}
    monkeypatch.setattr(mosaic_tpu, "tiles", tiles)
    monkeypatch.setattr(
        mosaic_tpu, "shared_tokens",
        lambda placed, **options: seen.update(options) or _SHARED(placed, **options),
    )  # fmt: skip
    for generation, block_q in (("v6e", 8), ("v4", 0)):
        for q_lens, expected in (((1, 30), block_q), ((1, 1, 1), 0)):
            given = arguments_of(num_heads=128, q_lens=q_lens, kv_lens=(70,) * len(q_lens))
            with tpu_chip.for_generation(generation):
                jax.eval_shape(lambda given=given: sparse_mla_attention(**given))
            assert seen["block_q"] == expected, (generation, q_lens)


_SHARED = mosaic_tpu_positions.shared_tokens


def arguments_of(**options):
    shape = {"num_heads": 3, "rank": 512, "page_size": 64, "dtype": "float32", "q_lens": (1, 3),
             "kv_lens": (70, 9), "topk": 40}  # fmt: skip
    made = mla_inputs(np.random.default_rng(0), **shape | options)
    scale = made.pop("scale")
    arrays = {n: jnp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in made.items()}
    cache = LatentCache(arrays["latent_pages"]).converted("tiled")
    return arrays | {"latent_pages": cache.pages, "scale": scale}


BYTES_GIVEN = {
    "latent_pages": jnp.zeros((9, 64, 2, 4, 128), jnp.uint8), "kv_cache_dtype": "fp8_ds_mla",
}  # fmt: skip
REFUSED = {
    "a name": ({"kv_cache_dtype": "int4"}, "kv_cache_dtype is 'int4', must be 'fp8_ds_mla' or N"),
    "bytes that are none": (
        {"kv_cache_dtype": "fp8_ds_mla"}, "latent_pages has dtype float32, must be one of uint8",
    ),
    "unnamed bytes": (
        BYTES_GIVEN | {"kv_cache_dtype": None}, "latent_pages has dtype uint8, must be one of",
    ),
    "plain bytes": (
        BYTES_GIVEN | {"latent_pages": jnp.zeros((9, 64, 656), jnp.uint8)},
        "latent_pages has 3 dimensions (9, 64, 656), must have 5",
    ),
    "scales": (BYTES_GIVEN | {"kv_scale": jnp.float32(1)}, "kv_scale is given, must be None with"),
    "a latent of bytes": (
        BYTES_GIVEN | {"ql_nope": jnp.zeros((4, 3, 128)), "kv_c": jnp.zeros((4, 128))},
        "kv_lora_rank is 128, must be 512 with kv_cache_dtype 'fp8_ds_mla'",
    ),
    "soft cap": ({"soft_cap": -1.0}, "soft_cap is -1.0, must be above 0"),
    "half a step": ({"k_pe": None}, "k_pe is None, must be given with kv_c and slot_mapping: "),
    "plain rows": ({"latent_pages": jnp.zeros((9, 64, 576))}, "latent_pages has 3 dimensions"),
    "another packing": (
        {"latent_pages": jnp.zeros((9, 64, 3, 2, 128))}, "latent_pages has rows of (3, 2, 128)",
    ),
    "float16": (
        {"ql_nope": jnp.zeros((4, 3, 512), jnp.float16)}, "ql_nope has dtype float16, must be one",
    ),
    "rotary part": ({"q_pe": jnp.zeros((4, 3, 32)), "k_pe": jnp.zeros((4, 32))},
                    "rope_dim is 32, must be 64"),
    "latent": ({"ql_nope": jnp.zeros((4, 3, 100)), "kv_c": jnp.zeros((4, 100))},
               "kv_lora_rank is 100, must be a multiple of 128"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_it_does_not_take_is_refused_with_both_values(change, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        sparse_mla_attention(**arguments_of() | change)


@pytest.mark.parametrize(
    ("dtype", "row"),
    [("float32", (5, 1, 128)), ("bfloat16", (3, 2, 128)), ("float8_e4m3fn", (2, 4, 128))],
)
def test_a_converted_cache_holds_the_same_rows(dtype, row):
    rows = np.random.default_rng(0).standard_normal((3, 64, 576)).astype(np.float32)
    rows = jnp.asarray(rows).astype(dtype)
    cache = LatentCache(rows).converted("tiled")
    assert cache.pages.shape == (3, 64, *row)
    assert (cache.num_pages, cache.page_size) == (3, 64)
    back = cache.converted("striped").converted("rows").pages
    np.testing.assert_array_equal(back.astype(np.float32), rows.astype(np.float32))


def test_a_converted_cache_of_bytes_holds_the_same_ones():
    rows = np.random.default_rng(0).integers(0, 256, (3, 16, 656), np.uint8)
    cache = LatentCache(jnp.asarray(rows)).converted("tiled")
    assert cache.pages.shape == (3, 16, 2, 4, 128)
    np.testing.assert_array_equal(cache.converted("rows").pages, rows)
    words = np.ascontiguousarray(np.swapaxes(cache.pages[:, :, 1], 2, 3)).view("<u4")[..., 0]
    np.testing.assert_array_equal(words[..., 64:68], rows[..., 512:528].view("<u4"))
    np.testing.assert_array_equal(words[..., :64] >> 16, rows[..., 528:].view("<u2"))
    with pytest.raises(ValueError, match="layout is 'striped', must be 'rows' or 'tiled'"):
        cache.converted("striped")


@pytest.mark.parametrize(
    ("width", "rope_dim", "dtype", "message"),
    [
        (164, 64, "float32", "kv_lora_rank is 100, must be a multiple of 128"),
        (544, 32, "float32", "rope_dim is 32"),
        (576, 64, "float64", "numbers of 8 bytes, must be of at most 4"),
    ],
)
def test_a_cache_that_does_not_fill_tiles_is_not_converted(width, rope_dim, dtype, message):
    with jax.enable_x64(True), pytest.raises(ValueError, match=message):
        LatentCache(jnp.zeros((3, 8, width), dtype)).converted("tiled", rope_dim)


@pytest.mark.parametrize(
    ("stored", "row"),
    [
        ("auto", (3, 2, 128)),
        ("float32", (5, 1, 128)),
        ("fp8_e4m3", (2, 4, 128)),
        ("fp8_ds_mla", (2, 4, 128)),
    ],
)
def test_the_backend_s_cache_is_in_the_layout_that_its_kernel_takes(stored, row):
    shape = MosaicTpuMlaSparseBackend.get_kv_cache_shape(7, 64, 1, 576, stored)
    assert shape == (7, 64, *row)
    assert MosaicTpuMlaSparseBackend.get_required_kv_cache_layout() == "tiled"


def test_the_op_takes_a_cache_of_bytes_in_that_layout_and_says_so_of_another():
    given = arguments_of(cache_dtype="fp8_ds_mla", dtype="bfloat16")
    cache = allocate_latent_cache(
        3, 64, 512, 64, "bfloat16", use_sparse=True, kv_cache_dtype="fp8_ds_mla", device="v5e"
    )
    assert (cache.layout, cache.pages.shape) == ("tiled", (3, 64, 2, 4, 128))
    metadata = AttentionMetadata.from_lengths((1, 3), (70, 9), ((0, 1), (2,)), 64)

    def call(cache):
        names = ("ql_nope", "q_pe", "kv_c", "k_pe", "topk_indices")
        return jax.eval_shape(
            lambda: attnsel_jax.sparse_mla_attention(
                *(given[name] for name in names), cache, metadata, scale=1.0, device="v5e"
            )
        )

    assert call(cache)[1].pages.shape == cache.pages.shape
    with pytest.raises(ValueError, match=r"cache.layout is 'rows', must be 'tiled' for backend"):
        call(cache.converted("rows"))


def test_short_lists_take_smaller_blocks_and_unlisted_dtypes_take_bfloat16_s():
    chosen = TILES["v5e", "bfloat16", "decode"]
    assert tiles("v5e", "bfloat16", is_decode=True, topk=2048) == chosen
    assert tiles("v5e", "float32", is_decode=True, topk=2048) == chosen
    assert tiles("v5e", "bfloat16", is_decode=True, topk=64).block_kv == 128


def compiles(chip, **options):
    """Lets the chip's own compiler have the kernel."""
    missing = target_for(chip).missing()
    if missing:
        pytest.skip(f"no compiler for {chip} here: {missing}")
    report = compile_for(chip, MosaicTpuMlaSparseBackend.kernels["sparse_mla"],
                         arguments_of(**options))  # fmt: skip
    assert report.compiled, report.refusal


@pytest.mark.parametrize(
    "chip", ["v6e", *(pytest.param(c, marks=pytest.mark.sweep) for c in ("v4", "v5e", "v5p", "7x"))]
)
def test_a_sample_compiles(monkeypatch, chip):
    monkeypatch.setattr(mosaic_tpu, "tiles", lambda *_, **__: Tiles(128, 2))
    compiles(chip, num_heads=16, dtype="bfloat16", cache_dtype="float8_e4m3fn", scaled=True)


@pytest.mark.sweep
@pytest.mark.parametrize("chip", TPU_TILED.generation.values)
def test_a_sample_with_fp8_ds_mla_compiles(monkeypatch, chip):
    monkeypatch.setattr(mosaic_tpu, "tiles", lambda *_, **__: Tiles(128, 2))
    compiles(chip, num_heads=16, dtype="bfloat16", cache_dtype="fp8_ds_mla")


@pytest.mark.sweep
@pytest.mark.parametrize("chip", TPU_TILED.generation.values)
@pytest.mark.parametrize(
    "cache_dtype",
    [
        "float32",
        "bfloat16",
        "float8_e4m3fn",
        "float8_e5m2",
        "fp8_ds_mla",
    ],
)
@pytest.mark.parametrize("dtype", TPU_TILED.dtype.values)
def test_everything_declared_compiles(monkeypatch, chip, cache_dtype, dtype):
    monkeypatch.setattr(mosaic_tpu, "tiles", tiles)
    compiles(chip, num_heads=128, dtype=dtype, cache_dtype=cache_dtype, topk=2048)


@pytest.mark.sweep
@pytest.mark.parametrize("chip", TPU_TILED.generation.values)
@pytest.mark.parametrize("page_size", TPU_TILED.block_size.values)
def test_every_page_size_compiles(chip, page_size):
    compiles(chip, num_heads=16, dtype="bfloat16", page_size=page_size)
