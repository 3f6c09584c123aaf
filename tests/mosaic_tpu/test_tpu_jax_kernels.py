"""Our TPU kernels beside jax's own, both interpreted, where contracts meet.

jax's flash and splash attention are asked for the dense op, its decoding and its ragged paged
attention for the paged one, and the ragged one for MLA too: keys are the latents' rows, values the
same without the rotary part. Ours write this step's keys; jax's find them in the cache. The ragged
kernel's masked stores are refused by jax's own interpreter: its module's reference answers for it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from latent_kernels import on_rows
from tpu_interpreter import tpu_interpreter

from attnsel_jax.backends.mosaic_tpu import MosaicTpuBackend
from attnsel_jax.compare.kernel_runs import run
from attnsel_jax.problems.mla_inputs import mla_inputs
from attnsel_jax.problems.paged_inputs import paged_inputs
from pallas_kernels.dense import mosaic_tpu
from pallas_kernels.mla.mosaic_tpu import mla_attention

PAGED = MosaicTpuBackend.get_kernel("paged")
WITHIN = 1e-4  # of numbers about 1, all in float32
SIZE = 128


def assert_close(ours, theirs, name="out"):
    np.testing.assert_allclose(ours, theirs, rtol=WITHIN, atol=WITHIN, err_msg=name)


def gradients(attend, q, k, v):
    """out, and gradients of q, k, v for a fixed dout."""
    out, pull_back = jax.vjp(attend, q, k, v)
    return out, *pull_back(jax.random.normal(jax.random.key(9), out.shape))


def tensors(q_heads, kv_heads, length=256):
    """q, k, v: [1, length, heads, SIZE]."""
    heads = (q_heads, kv_heads, kv_heads)
    return [jax.random.normal(jax.random.key(i), (1, length, n, SIZE)) for i, n in enumerate(heads)]


def flash(q, k, v, *, segments=None):
    """jax's flash attention, causal, in our layout."""
    from jax.experimental.pallas.ops.tpu import flash_attention as library

    ids = None if segments is None else library.SegmentIds(segments, segments)
    across = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    sizes = library.BlockSizes(*[128] * 3, 1, *[128] * 7)
    out = library.flash_attention(
        *across, segment_ids=ids, causal=True, sm_scale=SIZE**-0.5, block_sizes=sizes
    )
    return jnp.swapaxes(out, 1, 2)


def splash(q, k, v, *, window=None, soft_cap=None):
    """jax's splash attention, causal, in our layout."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (q.shape[1], k.shape[1])
    # Its window counts the keys before the query's own.
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    backward = ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
    sizes = library.BlockSizes(*[128] * 3, **dict.fromkeys(backward, 128))
    kernel = library.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * q.shape[2]), block_sizes=sizes, attn_logits_soft_cap=soft_cap
    )
    across = (jnp.swapaxes(x[0], 0, 1) for x in (q * SIZE**-0.5, k, v))
    return jnp.swapaxes(kernel(*across), 0, 1)[None]


SEGMENTS = jnp.asarray([[0] * 100 + [1] * 156], jnp.int32)
DENSE = {
    "flash": ((2, 2), flash, {}),
    "flash, segments": (
        (2, 2), lambda q, k, v: flash(q, k, v, segments=SEGMENTS),
        {"q_segment_ids": SEGMENTS, "kv_segment_ids": SEGMENTS},
    ),
    "splash, groups": ((4, 2), splash, {}),
    "splash, window, soft cap": (
        (2, 1), lambda q, k, v: splash(q, k, v, window=90, soft_cap=3.0),
        {"sliding_window": 90, "soft_cap": 3.0},
    ),
}  # fmt: skip


@pytest.mark.sweep
@pytest.mark.parametrize("case", DENSE)
def test_dense_and_its_gradients_agree(case):
    heads, theirs, options = DENSE[case]

    def ours(q, k, v):
        return mosaic_tpu.dense_attention(q, k, v, causal=True, **options)[0]

    given = tensors(*heads)
    with tpu_interpreter(detect_races=False):
        found = jax.jit(lambda *x: gradients(ours, *x))(*given)
        wanted = jax.jit(lambda *x: gradients(theirs, *x))(*given)
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        assert_close(a, b, name)


def batch(q_lens, kv_lens, **options):
    """A ragged batch in float32, and our answer: (arguments, out of its tokens, k and v pages)."""
    arguments = paged_inputs(
        np.random.default_rng(0), q_lens=q_lens, kv_lens=kv_lens, heads=(4, 2), head_size=SIZE,
        page_size=16, dtype="float32", **options,
    )  # fmt: skip
    for name in ("k", "v", "kv_pages"):  # the decoding one rounds what it finds in the cache
        arguments[name] = arguments[name].astype("bfloat16").astype("float32")
    with tpu_interpreter(detect_races=False):
        results = run(PAGED, "paged", arguments, layout="side_by_side")
    return arguments, results["out"], np.nan_to_num(results["kv_pages"])


def table_of(arguments):
    """Page table and lengths of the sequences that exist; no junk in them."""
    sequences = int(arguments["num_seqs"])
    table = arguments["page_table"][:sequences]
    return np.where((table < 0) | (table > 1 << 20), 0, table), arguments["kv_lens"][:sequences]


def ragged(q, pages, arguments, **options):
    """jax's ragged paged attention; pages [num_pages, page_size, 2 * kv heads, size]."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel as library

    table, kv_lens = table_of(arguments)
    starts, count = arguments["cu_q_lens"][: len(kv_lens) + 1], np.array([len(kv_lens)], np.int32)
    given = (jnp.asarray(x) for x in (q, pages, kv_lens, table, starts))
    out = library.ref_ragged_paged_attention(*given, count, sm_scale=arguments["scale"], **options)
    return np.asarray(out)


@pytest.mark.sweep
@pytest.mark.parametrize("options", [{}, {"sliding_window": 20, "soft_cap": 3.0}], ids=str)
def test_paged_agrees_with_the_ragged_one(options):
    arguments, out, cache = batch((1, 20, 5), (40, 33, 5), **options)
    with_scale = arguments | {"scale": arguments.get("scale") or SIZE**-0.5}
    pages = np.stack(cache, axis=3).reshape(*cache.shape[1:3], -1, SIZE)  # k, v, k, v, ...
    assert_close(out, ragged(arguments["q"], pages, with_scale, **options))


@pytest.mark.sweep
def test_paged_agrees_with_the_decoding_one():
    from jax.experimental.pallas.ops.tpu import paged_attention as library

    arguments, out, cache = batch((1, 1, 1), (40, 33, 64))
    table, kv_lens = table_of(arguments)
    table = np.pad(table, ((0, 0), (0, -table.shape[1] % 2)))
    k, v = np.moveaxis(cache, 3, 1)
    with tpu_interpreter(detect_races=False):
        theirs = jax.jit(lambda *x: library.paged_attention(*x, pages_per_compute_block=2))(
            arguments["q"] * SIZE**-0.5, k, v, kv_lens, table
        )
    assert_close(out, theirs)


@pytest.mark.sweep
def test_mla_agrees_with_the_ragged_one():
    rank, rope_dim = 128, 64
    arguments = mla_inputs(
        np.random.default_rng(0), num_heads=4, rank=rank, rope_dim=rope_dim, page_size=64,
        q_lens=(1, 9, 4), kv_lens=(100, 71, 4), dtype="float32",
    )  # fmt: skip
    with tpu_interpreter(detect_races=False):
        ours = run(on_rows(mla_attention, "striped"), "mla", arguments, layout="rows")
    keys = np.nan_to_num(ours["latent_pages"])
    values = np.where(np.arange(rank + rope_dim) < rank, keys, 0)
    q = np.concatenate([arguments["ql_nope"], arguments["q_pe"]], axis=-1)
    theirs = ragged(q, np.stack([keys, values], axis=2), arguments)
    assert_close(ours["out"], theirs[..., :rank])
