"""What tests of the latent kernels share: one problem, interpreted as a Hopper, by the oracle."""

import dataclasses

import jax
import jax.numpy as jnp
from gpu_interpreter import gpu_interpreter
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attnsel_jax.compare import compare
from attnsel_jax.problems import Problem
from attnsel_jax.problems.mla_inputs import mla_inputs
from pallas_kernels import gpu_chip
from pallas_kernels.mla import mosaic_gpu as mla
from pallas_kernels.mla import mosaic_gpu_slots, mosaic_gpu_tiles
from pallas_kernels.sparse_mla import mosaic_gpu as sparse_mla
from pallas_kernels.sparse_mla import mosaic_gpu_raw

# Small, and with every edge: one query, several tiles of queries, none, more queries than a tile;
# keys in one block, in several pairs, on a block's border.
SHAPE = {"num_heads": 3, "rank": 128, "rope_dim": 64, "qk_nope_head_dim": 16, "page_size": 64,
         "dtype": "bfloat16", "q_lens": (1, 9, 0, 4), "kv_lens": (300, 71, 7, 4),
         "pad_tokens": 2}  # fmt: skip


def with_cores(monkeypatch, cores):
    """A Hopper of fewer cores, where each pair of key blocks is worth a split."""
    tiles = {key: tiles._replace(least_pairs=1) for key, tiles in mosaic_gpu_tiles.TILES.items()}
    monkeypatch.setattr(mosaic_gpu_tiles, "TILES", tiles)
    for kernel in (mla, sparse_mla):
        monkeypatch.setattr(kernel, "TILES", tiles)
    chip = dataclasses.replace(gpu_chip.CHIPS["h200"], num_cores=cores)
    monkeypatch.setitem(gpu_chip.CHIPS, "h200", chip)


def row_of(kernel, *, seed=0, **options):
    """The comparison's row of one problem; options are those of `mla_inputs`."""
    op = "sparse_mla" if "topk" in options else "mla"
    problem = Problem("interpreted", op, "", mla_inputs, SHAPE | options)
    with gpu_interpreter("h200"):
        (row,) = compare([problem], {"kernel": kernel}, seed=seed).rows
    return row


def with_raw_rows_apart(monkeypatch):
    """Raw rows and keys of a slot in memory of their own: the interpreter has room, and asks it.

    So no view sees what was written through another: numbers are made of the bytes that came.
    """

    def as_numbers(raw, dtype, group, at, layout):
        size = jnp.dtype(dtype).itemsize
        at = pl.ds(size * at.start, size * at.size)
        spelt = plgpu.load(raw.values.at[group, :, at]).reshape(mosaic_gpu_slots.GROUP, -1, size)
        return jax.lax.bitcast_convert_type(spelt, dtype)

    monkeypatch.setattr(mosaic_gpu_slots, "one_memory", lambda raw, kv: (*raw, kv))
    monkeypatch.setattr(mosaic_gpu_raw, "as_numbers", as_numbers)
